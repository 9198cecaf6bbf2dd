"""Configs of paged_decode's kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from attnkit.arch import Arch
from attnkit.configs import Space, pow2

NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8", torch.float8_e4m3fn: "e4m3",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """
    block_m     query rows (query tokens x heads of a KV head) of a tile: 16, 32, 64 or 128
    block_n     keys of a tile
    num_warps, num_stages   as Triton's: num_stages - 1 tiles are under way while one is computed on
    ctas        programs a multiprocessor that the work is divided over
    min_tiles   tiles of keys that a program gets at least
    swap        transposed products: keys, not query rows, on the large side of the tensor core's tile
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    ctas: int
    min_tiles: int
    swap: bool = False


def padded(d: int) -> int:
    """Columns of a tile of head size ``d``, which is held as two powers of two (``split`` in triton_kernels/decode.py)."""
    low = max(16, pow2(d + 1) // 2)
    return low if low >= d else low + min(low, max(32, pow2(d - low)))


def tile_smem(
    block_m: int, block_n: int, stages: int, d: int, dv: int, q_size: int, kv_size: int, sm: int, shared: bool = False,
    swap: bool = False,
) -> int:  # fmt: skip
    """Bytes of shared memory of one program, from above: the tiles in flight, the queries, the probabilities."""
    keys = dv + (max(16, pow2(d - dv)) if d > dv else 0) if shared else padded(d)
    columns = keys if shared else keys + padded(dv)
    wide = (block_m >= 64 or swap) and sm >= 90  # wgmma and tcgen05 read K and V in place, which keeps one tile more
    tiles = stages if wide else max(1, stages - 1)
    loop = tiles * block_n * columns * kv_size + block_m * (keys + block_n) * q_size
    if kv_size < q_size:  # the converted tiles
        loop += block_n * (columns if wide else padded(dv)) * q_size
    return max(loop + 1024, 4 * block_m * padded(dv) + 1024)


def rows_block(rows: int, most: int = 64) -> int:
    return min(most, max(16, pow2(rows)))


def smem(config: Any, sig: Any) -> int:
    q, kv = sig.q_dtype.itemsize, sig.kv_dtype.itemsize
    return tile_smem(config.block_m, config.block_n, config.num_stages, sig.D, sig.Dv, q, kv, 90, swap=config.swap)


#: Bytes of KV on the way in each multiprocessor that reach the roof (measured on an H200).
IN_FLIGHT = 128 * 1024


def resident(config: Any, tile: int, smem: int, limit: int) -> int:
    """Programs a multiprocessor: as many as IN_FLIGHT wants, no more than fit; ``tile`` is the bytes of a KV tile."""
    want = IN_FLIGHT // (tile * max(1, config.num_stages - 1))
    return max(1, min(want, 4, (limit + 1024) // smem if limit else 2, 16 // config.num_warps))


def fit(config: Any, size: Any, limit: int) -> Any:
    """``config`` with fewer stages, then smaller tiles of keys, until ``size(config)`` is within ``limit`` bytes."""
    while size(config) > limit and config.num_stages > 2:
        config = replace(config, num_stages=config.num_stages - 1)
    while size(config) > limit and config.block_n > 16:
        config = replace(config, block_n=config.block_n // 2)
    return replace(config, num_stages=1) if size(config) > limit else config


def _tile(config: Any, sig: Any) -> int:
    return config.block_n * (padded(sig.D) + padded(sig.Dv)) * sig.kv_dtype.itemsize


def _resized(config: TritonConfig, sig: Any, arch: Arch) -> TritonConfig:
    return replace(config, ctas=resident(config, _tile(config, sig), smem(config, sig), arch.smem))


def default(sig: Any, arch: Arch) -> TritonConfig:
    """Tiles of 64 keys, and IN_FLIGHT bytes of them on the way; nothing here depends on lens.

    Where batch_invariant is asked, nothing depends on B or on the table's width either.
    """
    wide = padded(sig.D) + padded(sig.Dv)
    block_m, block_n = rows_block(sig.G * sig.Q), 64 if wide <= 512 else 32
    if sig.q_dtype == torch.float32:
        block_m, block_n = 16, 32 if wide <= 256 else 16
    elif block_m >= 64:
        block_n = 32
    first = TritonConfig(block_m, block_n, 4, 3, 1, 8 if sig.batch_invariant else 1)
    config = fit(first, lambda c: smem(c, sig), arch.smem or 1 << 20)
    return _resized(config, sig, arch)


#: num_warps, num_stages and swap of the candidates.
VARIANTS = ((4, 2, False), (4, 3, False), (4, 4, False), (2, 3, False), (8, 3, False), (4, 3, True))


def candidates(sig: Any, arch: Arch) -> list[TritonConfig]:
    base = default(sig, arch)
    out = [base]
    for block_n in (32, 64, 128):
        for num_warps, num_stages, swap in VARIANTS:
            if (swap and arch.sm != 90) or (sig.q_dtype == torch.float32 and (block_n > base.block_n or swap)):
                continue
            config = replace(base, block_n=block_n, num_warps=num_warps, num_stages=num_stages, swap=swap)
            config = _resized(config, sig, arch)
            if smem(config, sig) <= (arch.smem or 1 << 20) and config not in out:
                out.append(config)
    if not sig.batch_invariant:
        out += [replace(base, min_tiles=n) for n in (2, 4)]
        out += [replace(base, ctas=n) for n in (1, 2, 3, 4) if n != base.ctas]
    return out


def bucket(sig: Any) -> str:
    """Sizes rounded up to powers of two. Where bits must not depend on the batch, its size stays out."""
    kv = NAMES[sig.kv_dtype]
    what = f"Q{pow2(sig.Q)}-Hq{sig.Hq}-Hkv{sig.Hkv}-D{sig.D}-Dv{sig.Dv}-S{sig.S}"
    size = "invariant" if sig.batch_invariant else f"B{pow2(sig.B)}-L{pow2(sig.W * sig.S)}"
    extra = f"{'-window' if sig.window else ''}{'-softcap' if sig.softcap else ''}{'-tree' if sig.tree_mask else ''}"
    return f"{what}-{size}-{NAMES[sig.q_dtype]}-{kv}{extra}"


SOURCES = ("triton_kernels/decode.py", "triton_kernels/tiles.py", "triton_kernels/merge.py")

TRITON = Space("paged_decode", "triton", TritonConfig, default, candidates, bucket, SOURCES, smem)
