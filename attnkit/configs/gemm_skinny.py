"""Configs of the sm_90a W8A8 kernel for few tokens, chosen by a model of its time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from attnkit.arch import Arch
from attnkit.backends.cuda.builds import gemm_skinny as builds
from attnkit.configs import Space
from attnkit.configs.gemm import bucket
from attnkit.signature import GemmSig


@dataclass(frozen=True, slots=True)
class SkinnyConfig:
    """
    block_n  columns of a tile
    splits   CTAs of a cluster that take a stretch of K each
    ctas     CTAs that may share a multiprocessor (the next launch's beside this one's)
    stages   slices in flight, if there is room
    ahead    slices of K that L2 is asked for while the previous launch still runs
    tall     a tile has up to 128 tokens, not 64, and each warpgroup all of its columns
    deep     a slice has 256 bytes of K, not 128
    """

    block_n: int
    splits: int
    ctas: int
    stages: int
    ahead: int
    tall: bool = False
    deep: bool = False


#: Slices in flight, and of large weights slices to ask for ahead, that were best: some 100 KB of weights. More than that, and
#: CTAs that start late wait behind all others.
LOW_RING = {64: (10, 10), 96: (8, 8), 128: (7, 7), 160: (6, 5), 224: (6, 6)}
DEEP_RING = {64: (6, 5), 80: (5, 4), 96: (5, 4)}
#: Weights that are read in some 6 us: the ends of launches count, and little may be asked for ahead.
SMALL = 26 << 20
#: Weights that are read in 60 us and more: asking for much ahead costs more than the start is worth.
LARGE = 256 << 20
#: The model's rates, bytes a microsecond: memory, and what one CTA gets at most.
DRAM = 4.45e6
CTA = {64: 34.5e3, 80: 38e3, 96: 39e3, 112: 40e3, 128: 41e3, 160: 42e3, 224: 42e3}
LEAST_FLIGHT = 72 * 1024
#: How unevenly tall tiles of all of K may be spread.
UNEVEN = 0.1


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def stages(c: SkinnyConfig, sig: GemmSig) -> int:
    return min(c.stages, builds.stages(sig.M, c.block_n, c.splits, c.ctas, c.tall, c.deep))


def smem(c: SkinnyConfig, sig: GemmSig) -> int:
    """So much that no more than ``ctas`` share a multiprocessor."""
    ring = stages(c, sig) * builds.stage_bytes(sig.M, c.block_n, c.deep)
    used = builds.fixed_bytes(sig.M, c.block_n, c.splits, c.ctas, c.tall) + ring
    return max(used, builds.MOST_SHARED // 2 + 1024 if c.ctas == 1 else builds.MOST_SHARED // 3 + 1024)


def _rounds(sig: GemmSig, width: int, splits: int, arch: Arch) -> int:
    """Tiles that follow one another. Clusters of 4 do not fill every GPC."""
    clusters = (arch.sms if splits <= 2 else arch.sms * 10 // 11) // splits
    return _cdiv(_cdiv(sig.N, width), max(1, clusters))


def _uneven(sig: GemmSig, width: int, splits: int, arch: Arch) -> float:
    """By how much the busiest multiprocessor has more than its share of N."""
    return _rounds(sig, width, splits, arch) * width * max(1, arch.sms) / max(1, sig.N * splits) - 1


def _even(sig: GemmSig, width: int, arch: Arch) -> bool:
    """Whether tall tiles of all of K fill their rounds, and bring more weights than tokens if there are several."""
    several = _rounds(sig, width, 1, arch) > 1
    return _uneven(sig, width, 1, arch) <= UNEVEN and not (several and sig.M > 1.2 * width)


def time(sig: GemmSig, c: SkinnyConfig, arch: Arch) -> float:
    """About how many microseconds ``c`` takes: memory or the busiest CTA, and what cannot overlap it."""
    rounds, slice_bytes = _rounds(sig, c.block_n, c.splits, arch), builds.slice_bytes(c.deep)
    depth = _cdiv(_cdiv(sig.K, slice_bytes), c.splits) * slice_bytes
    busiest = rounds * c.block_n * depth
    uneven = _uneven(sig, c.block_n, c.splits, arch)
    flight = (stages(c, sig) - 1) * c.block_n * slice_bytes
    short = 1.0 if sig.M > builds.LOW else max(1.0, (LEAST_FLIGHT / flight) ** 0.4) * (1.02 if c.block_n == 224 else 1.0)
    read = short * max(sig.N * sig.K / DRAM * (1 + 0.3 * max(0.0, uneven)), busiest / CTA[c.block_n])
    meet = {1: 0.0, 2: 0.25, 4: 1.3}[c.splits] + (c.splits > 1) * 8e-5 * sig.M * c.block_n
    tokens = rounds * builds.rows(sig.M) * depth / (7e5 if c.deep and c.tall else 5e5)
    end = 0.15 * (rounds - 1) + meet + 1.4e-4 * sig.M * c.block_n / c.splits
    return read + tokens + end + (0.0 if c.deep or not c.tall else 0.2 if sig.dtype == torch.int8 else 0.3)


def _config(sig: GemmSig, width: int, splits: int, tall: bool, deep: bool) -> SkinnyConfig:
    size = sig.N * sig.K
    if deep:
        ring = (5, 2) if size <= SMALL else DEEP_RING[width]
    elif tall:
        ring = (10, 8) if SMALL < size <= LARGE else (8, 4)
    else:
        held, ahead = LOW_RING[width]
        ring = held, min(ahead, 4) if size <= SMALL and width <= 128 else ahead
    return SkinnyConfig(width, splits, 1, *ring, tall, deep)


def _kinds(sig: GemmSig) -> list[tuple[bool, bool]]:
    """Tall and deep or not, as far as they hold M."""
    if sig.M > builds.LOW:
        return [(True, False)] if sig.M <= builds.TALL else []
    return [(tall, deep) for deep in (False, True) for tall in (False, True)]


def fits_tall(sig: GemmSig, arch: Arch) -> bool:
    """Whether more than 64 tokens are served: where two CTAs for each tile of N, all at one time, have enough to read, or
    tiles of all of K come out even."""
    return builds.LOW < sig.M <= builds.TALL and bool(_every(sig, arch))


def _suits(sig: GemmSig, c: SkinnyConfig, arch: Arch) -> bool:
    """A split ends with its one tile, and has two slices at least: so can all of a bucket. Low tiles of up to 96 columns are
    for 4 CTAs each: else tall ones are faster."""
    if c.splits > 1:
        long = 2 * c.splits <= _cdiv(sig.K, builds.slice_bytes(c.deep))
        return long and _rounds(sig, c.block_n, c.splits, arch) == 1 and (c.tall or c.block_n > 96 or c.splits == 4)
    return (c.tall or c.block_n > 96) and (sig.M <= builds.LOW or _even(sig, c.block_n, arch))


def _every(sig: GemmSig, arch: Arch) -> list[SkinnyConfig]:
    """Best first, as the model has it."""
    int8 = sig.dtype == torch.int8
    every = [
        _config(sig, width, splits, tall, deep)
        for tall, deep in _kinds(sig)
        for width in builds.widths(int8, tall, deep)
        for splits in builds.splits(tall)
    ]
    found = [c for c in every if stages(c, sig) >= 3 and _suits(sig, c, arch)]
    return sorted(found, key=lambda c: time(sig, c, arch))


def _beside(sig: GemmSig, c: SkinnyConfig) -> SkinnyConfig:
    """``c`` with a ring that leaves room for the next launch's CTA."""
    return replace(c, ctas=2, stages=builds.MOST_STAGES, ahead=3)


def default(sig: GemmSig, arch: Arch) -> SkinnyConfig:
    """Few tokens, narrow tiles, small matrices: launches stand side by side (2 to 4% faster there)."""
    c = _every(sig, arch)[0]
    few = sig.M <= 16 and sig.N * sig.K < 20e6
    return _beside(sig, c) if few and (c.block_n, c.splits, c.tall, c.deep) == (64, 2, True, True) else c


def candidates(sig: GemmSig, arch: Arch) -> list[SkinnyConfig]:
    """The default, what else the model thinks well of, and a few with other amounts in flight."""
    ranked = _every(sig, arch)[:5]
    found = [default(sig, arch), *ranked, *(replace(c, ahead=c.ahead // 2) for c in ranked[:2])]
    if sig.M <= 32 and builds.most_ctas(sig.dtype == torch.int8, ranked[0].block_n, ranked[0].tall) == 2:
        found.append(_beside(sig, ranked[0]))
    return [c for c in dict.fromkeys(found) if stages(c, sig) >= 3]


CUDA = Space(
    "w8a8_gemm", "cuda_sm90_skinny", SkinnyConfig, default, candidates, bucket,
    sources=tuple(f"csrc/cuda/{part}.cuh" for part in ("gemm/gemm_skinny_sm90", "gemm/gemm_epilogue", "common/wgmma_q8_sm90")),
    smem=smem,
)  # fmt: skip
