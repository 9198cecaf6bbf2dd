"""Configs of mla_decode's and mla_prefill's kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from attnkit.arch import Arch
from attnkit.configs import Space, decode, pow2, prefill
from attnkit.configs.decode import NAMES, fit, rows_block, tile_smem


def decode_smem(config: Any, sig: Any) -> int:
    q, kv, swap = sig.q_dtype.itemsize, sig.kv_dtype.itemsize, config.swap
    size = tile_smem(config.block_m, config.block_n, config.num_stages, sig.C + sig.R, sig.C, q, kv, 90, shared=True, swap=swap)
    # An fp8 cache's rope part is 16-bit already, and counted as bytes; its tile is kept a second time as operands.
    return size + (config.block_n * (sig.R * 2 * (q + config.num_stages) + 64) if kv < q else 0)


def _resized(config: decode.TritonConfig, sig: Any, arch: Arch) -> decode.TritonConfig:
    tile = config.block_n * (sig.C + sig.R) * sig.kv_dtype.itemsize
    return replace(config, ctas=decode.resident(config, tile, decode_smem(config, sig), arch.smem))


def decode_default(sig: Any, arch: Arch) -> decode.TritonConfig:
    """One KV tile serves as K and V. What an H200 measured best is the default; transposed products are for tuning."""
    rows = sig.Q * sig.H
    limit = arch.smem or 1 << 20
    if sig.q_dtype == torch.float32:
        first = decode.TritonConfig(16, 16, 4, 2, 1, 1)
    elif rows > 32 and arch.sm == 90:
        first = decode.TritonConfig(64, 64, 8, 2, 1, 1)
    elif limit >= 200 * 1024:
        first = decode.TritonConfig(16, 64, 8, 3, 1, 1)
    else:
        first = decode.TritonConfig(16, 32, 4, 3, 1, 1)
    if sig.batch_invariant:
        first = replace(first, min_tiles=16)
    return _resized(fit(first, lambda c: decode_smem(c, sig), limit), sig, arch)


def decode_candidates(sig: Any, arch: Arch) -> list[decode.TritonConfig]:
    base = decode_default(sig, arch)
    if sig.q_dtype == torch.float32:
        return [base, replace(base, num_warps=8)]
    out = [base]
    shapes = (
        (16, 32, 4, 2, False), (16, 32, 4, 3, False), (16, 64, 4, 2, False), (16, 64, 8, 3, False), (32, 32, 4, 3, False),
        (32, 64, 8, 2, False), (64, 32, 8, 2, False), (64, 64, 8, 2, False), (16, 64, 4, 2, True), (16, 64, 8, 2, True),
        (32, 64, 8, 2, True),
    )  # fmt: skip
    for block_m, block_n, num_warps, num_stages, swap in shapes:
        if block_m > rows_block(sig.Q * sig.H) or (swap and arch.sm != 90):
            continue
        config = replace(base, block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages, swap=swap)
        config = _resized(config, sig, arch)
        if decode_smem(config, sig) <= (arch.smem or 1 << 20) and config not in out:
            out.append(config)
    return out


def decode_bucket(sig: Any) -> str:
    size = "invariant" if sig.batch_invariant else f"B{pow2(sig.B)}-L{pow2(sig.W * sig.S)}"
    extra = f"{'-window' if sig.window else ''}{'-softcap' if sig.softcap else ''}{'-tree' if sig.tree_mask else ''}"
    kind = NAMES[sig.q_dtype] + ("-fp8" if sig.kv_dtype == torch.uint8 else "")
    return f"Q{pow2(sig.Q)}-H{sig.H}-C{sig.C}-R{sig.R}-S{sig.S}-{size}-{kind}{extra}"


def prefill_smem(config: Any, sig: Any) -> int:
    size = sig.dtype.itemsize
    return tile_smem(config.block_m, config.block_n, config.num_stages, sig.D, sig.Dv, size, size, 90)


def prefill_default(sig: Any, arch: Arch) -> prefill.TritonConfig:
    rows = prefill.mean_rows(sig.T, sig.B, sig.H // sig.Hk, sig.batch_invariant)
    return prefill.tile_default(rows, sig.D, sig.Dv, 1, sig.dtype, lambda c: prefill_smem(c, sig), arch)


def prefill_candidates(sig: Any, arch: Arch) -> list[prefill.TritonConfig]:
    base = prefill_default(sig, arch)
    if sig.dtype == torch.float32:
        return [base, replace(base, num_warps=8)]
    return prefill.tile_candidates(base, lambda c: prefill_smem(c, sig), arch)


def prefill_bucket(sig: Any) -> str:
    size = "invariant" if sig.batch_invariant else f"B{pow2(sig.B)}-T{pow2(sig.T)}-N{pow2(sig.N)}"
    extra = f"{'' if sig.causal else '-full'}{'-window' if sig.window else ''}{'-softcap' if sig.softcap else ''}"
    return f"H{sig.H}-Hk{sig.Hk}-D{sig.D}-Dv{sig.Dv}-{size}-{NAMES[sig.dtype]}{extra}"


TRITON_DECODE = Space(
    "mla_decode", "triton", decode.TritonConfig, decode_default, decode_candidates, decode_bucket,
    ("triton_kernels/mla.py", *decode.SOURCES), decode_smem,
)  # fmt: skip
TRITON_PREFILL = Space(
    "mla_prefill", "triton", prefill.TritonConfig, prefill_default, prefill_candidates, prefill_bucket,
    ("triton_kernels/mla.py", *prefill.SOURCES), prefill_smem,
)  # fmt: skip
