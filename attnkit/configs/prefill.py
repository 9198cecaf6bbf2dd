"""Configs of paged_prefill's kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from attnkit.arch import Arch
from attnkit.configs import Space, pow2
from attnkit.configs.decode import NAMES, fit, padded, rows_block, tile_smem


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """
    block_m     query rows (query tokens x heads of a KV head) of a tile: 16 to 128
    block_n     keys of a tile
    num_warps, num_stages   as Triton's
    ctas        programs a multiprocessor below which the keys of a tile are split
    min_tiles   tiles of keys that a split gets at least
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ctas: int
    min_tiles: int


def smem(config: Any, sig: Any) -> int:
    q, kv = sig.q_dtype.itemsize, sig.kv_dtype.itemsize
    return tile_smem(config.block_m, config.block_n, config.num_stages, sig.D, sig.Dv, q, kv, 90)


def tile_default(
    rows: int, D: int, Dv: int, S: int, dtype: torch.dtype, size: Any, arch: Arch, *, quantised: bool = False
) -> TritonConfig:
    """For ``rows`` query rows a sequence (their mean): 128 rows and 8 warps where there are that many."""
    wide = padded(D) + padded(Dv)
    if dtype == torch.float32:
        first = TritonConfig(16, 16, 4, 2, 1, 4)
    elif padded(Dv) > 256:
        first = TritonConfig(16, 32, 8, 2, 1, 4)
    elif rows <= 32:
        first = TritonConfig(rows_block(rows, 32), 64 if wide <= 256 else 32, 4, 3, 2, 4)
    elif rows <= 64:
        first = TritonConfig(64, 64 if wide <= 256 else 32, 4 if padded(Dv) <= 128 else 8, 3, 2, 4)
    elif wide <= 128 and not quantised:
        first = TritonConfig(128, 64, 4, 3, 1, 4)
    elif wide > 384:
        first = TritonConfig(128, 64 if arch.sm == 90 else 32, 8, 2, 1, 4)
    elif wide == 256 and S % 128 == 0 and not quantised and arch.sm >= 90:
        first = TritonConfig(128, 128, 8, 2, 1, 4)
    else:
        first = TritonConfig(128, 64, 8, 2 if quantised else 3, 1, 4)
    limit = arch.smem or 1 << 20
    config = fit(first, size, limit)
    if config.block_n < 32 and config.block_m > 64:
        config = fit(replace(first, block_m=64, block_n=64, num_warps=4), size, limit)
    return config


def mean_rows(T: int, B: int, G: int, invariant: bool) -> int:
    """Query rows of a sequence on average; as many as there may be where bits must not depend on the batch."""
    return 1 << 20 if invariant else -(-T // max(1, B)) * G


def default(sig: Any, arch: Arch) -> TritonConfig:
    rows = mean_rows(sig.T, sig.B, sig.G, sig.batch_invariant)
    quantised = sig.kv_dtype != sig.q_dtype
    return tile_default(rows, sig.D, sig.Dv, sig.S, sig.q_dtype, lambda c: smem(c, sig), arch, quantised=quantised)


def tile_candidates(base: TritonConfig, size: Any, arch: Arch) -> list[TritonConfig]:
    limit = arch.smem or 1 << 20
    shapes = (
        (128, 64, 8, 2), (128, 64, 8, 3), (128, 128, 8, 2), (128, 32, 8, 4), (64, 64, 4, 2), (64, 64, 4, 3),
        (64, 128, 4, 2), (64, 32, 4, 3), (32, 64, 4, 3), (16, 64, 4, 3), (16, 128, 4, 3),
    )  # fmt: skip
    out = [base]
    for block_m, block_n, num_warps, num_stages in shapes:
        config = replace(base, block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
        if size(config) <= limit and config not in out:
            out.append(config)
    return out


def candidates(sig: Any, arch: Arch) -> list[TritonConfig]:
    base = default(sig, arch)
    if sig.q_dtype == torch.float32:
        return [base, replace(base, num_warps=8), replace(base, block_n=16)]
    out = tile_candidates(base, lambda c: smem(c, sig), arch)
    if not sig.batch_invariant:
        out += [replace(base, ctas=3 - base.ctas), replace(base, min_tiles=8)]
    return out


def bucket(sig: Any) -> str:
    what = f"Hq{sig.Hq}-Hkv{sig.Hkv}-D{sig.D}-Dv{sig.Dv}-S{sig.S}"
    size = "invariant" if sig.batch_invariant else f"B{pow2(sig.B)}-T{pow2(sig.T)}-L{pow2(sig.W * sig.S)}"
    extra = f"{'' if sig.causal else '-full'}{'-window' if sig.window else ''}{'-softcap' if sig.softcap else ''}"
    return f"{what}-{size}-{NAMES[sig.q_dtype]}-{NAMES[sig.kv_dtype]}{extra}"


SOURCES = ("triton_kernels/prefill.py", "triton_kernels/tiles.py", "triton_kernels/merge.py")

TRITON = Space("paged_prefill", "triton", TritonConfig, default, candidates, bucket, SOURCES, smem)
