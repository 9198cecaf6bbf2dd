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
    tall     a tile has up to 128 tokens, not 64
    """

    block_n: int
    splits: int
    ctas: int
    stages: int
    ahead: int
    tall: bool = False


#: Slices in flight that were best: some 100 KB of weights. More than that, and CTAs that start late wait behind all others.
STAGES = {64: 6, 96: 5, 128: 6, 160: 6, 224: 6}
TALL_STAGES = 8
#: Slices of large weights to ask for ahead.
AHEAD = {64: 6, 96: 4, 128: 8, 160: 6, 224: 6}
#: Weights that are read in some 6 us: the ends of launches count, and little may be asked for ahead.
SMALL = 26 << 20
#: The model's rates, bytes a microsecond: memory, and what one CTA gets at most.
DRAM = 4.45e6
CTA = {64: 36e3, 80: 38e3, 96: 39e3, 112: 40e3, 128: 41e3, 160: 42e3, 224: 42e3}
LEAST_FLIGHT = 72 * 1024
#: How unevenly tall tiles of all of K may be spread.
UNEVEN = 0.1


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def stages(c: SkinnyConfig, sig: GemmSig) -> int:
    return min(c.stages, builds.stages(sig.M, c.block_n, c.splits, c.ctas, c.tall))


def smem(c: SkinnyConfig, sig: GemmSig) -> int:
    """So much that no more than ``ctas`` share a multiprocessor."""
    ring = stages(c, sig) * builds.stage_bytes(sig.M, c.block_n, c.tall)
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
    """Whether tall tiles of all of K fill their rounds, and bring more weights than tokens if there are several (int8's: e4m3's
    were not timed)."""
    several = _rounds(sig, width, 1, arch) > 1
    return sig.dtype == torch.int8 and _uneven(sig, width, 1, arch) <= UNEVEN and not (several and sig.M > 1.2 * width)


def time(sig: GemmSig, c: SkinnyConfig, arch: Arch) -> float:
    """About how many microseconds ``c`` takes: memory or the busiest CTA, and what cannot overlap it."""
    rounds, slice_bytes = _rounds(sig, c.block_n, c.splits, arch), builds.slice_bytes(c.block_n, c.tall)
    depth = _cdiv(_cdiv(sig.K, slice_bytes), c.splits) * slice_bytes
    busiest = rounds * c.block_n * depth
    uneven = _uneven(sig, c.block_n, c.splits, arch)
    flight = (stages(c, sig) - 1) * c.block_n * slice_bytes
    short = 1.0 if sig.M > builds.LOW else max(1.0, (LEAST_FLIGHT / flight) ** 0.4) * (1.02 if c.block_n == 64 else 1.0)
    read = short * max(sig.N * sig.K / DRAM * (1 + 0.3 * max(0.0, uneven)), busiest / CTA[c.block_n])
    meet = {1: 0.0, 2: 0.25, 4: 1.1}[c.splits] + (c.splits > 1) * 8e-5 * sig.M * c.block_n
    return read + rounds * builds.rows(sig.M) * depth / 5e5 + meet + 1.4e-4 * sig.M * c.block_n / c.splits + 0.2 * c.tall


def _config(sig: GemmSig, width: int, splits: int, tall: bool) -> SkinnyConfig:
    small = sig.N * sig.K <= SMALL
    if tall:
        return SkinnyConfig(width, splits, 1, TALL_STAGES, 4 if small else 8, True)
    ahead = 256 // builds.slice_bytes(width) * 2 if small and width <= 128 else AHEAD[width]
    return SkinnyConfig(width, splits, 1, STAGES[width] - (small and width == 64), ahead)


def _heights(sig: GemmSig) -> list[bool]:
    """Low tiles and tall ones, as far as they hold M. Tall e4m3 ones wait for each slice's sums: not over large weights."""
    tall = sig.dtype == torch.int8 or sig.N * sig.K <= SMALL
    return [t for t in (False, True) if sig.M <= builds.tokens(t) and (tall or not t)]


def fits_tall(sig: GemmSig, arch: Arch) -> bool:
    """Whether more than 64 tokens are served: where two CTAs for each tile of N, all at one time, have enough to read, or
    tiles of all of K come out even."""
    return builds.LOW < sig.M <= builds.TALL and bool(_every(sig, arch))


def _every(sig: GemmSig, arch: Arch) -> list[SkinnyConfig]:
    """Best first, as the model has it. A split ends with its one tile, and has two slices at least: so can all of a bucket."""
    found = []
    for tall in _heights(sig):
        for width in builds.widths(sig.dtype == torch.int8, tall):
            for splits in builds.splits(tall):
                deep = 2 * splits <= _cdiv(sig.K, builds.slice_bytes(width, tall))
                if splits > 1 and not (deep and _rounds(sig, width, splits, arch) == 1):
                    continue
                if splits == 1 and tall and not _even(sig, width, arch):
                    continue
                c = _config(sig, width, splits, tall)
                if stages(c, sig) >= 3:
                    found.append(c)
    return sorted(found, key=lambda c: time(sig, c, arch))


def _beside(sig: GemmSig, c: SkinnyConfig) -> SkinnyConfig:
    """``c`` with a ring that leaves room for the next launch's CTA."""
    return replace(c, ctas=2, stages=builds.MOST_STAGES, ahead=3)


def default(sig: GemmSig, arch: Arch) -> SkinnyConfig:
    """Few tokens, narrow tiles, small matrices: launches stand side by side (2 to 7% faster there, slower elsewhere)."""
    c = _every(sig, arch)[0]
    most = 64e6 if sig.M <= 8 else 20e6 if sig.M <= 16 else 0
    return _beside(sig, c) if (c.block_n, c.splits, c.tall) == (64, 2, False) and sig.N * sig.K < most else c


def candidates(sig: GemmSig, arch: Arch) -> list[SkinnyConfig]:
    """The default, what else the model thinks well of, and a few with other amounts in flight."""
    ranked = _every(sig, arch)[:5]
    found = [default(sig, arch), *ranked, *(replace(c, ahead=c.ahead // 2) for c in ranked[:2])]
    if sig.M <= 32 and ranked[0].block_n <= 128 and not ranked[0].tall:
        found.append(_beside(sig, ranked[0]))
    return [c for c in dict.fromkeys(found) if stages(c, sig) >= 3]


CUDA = Space(
    "w8a8_gemm", "cuda_sm90_skinny", SkinnyConfig, default, candidates, bucket,
    sources=tuple(f"csrc/cuda/{part}.cuh" for part in ("gemm/gemm_skinny_sm90", "gemm/gemm_epilogue", "common/wgmma_q8_sm90")),
    smem=smem,
)  # fmt: skip
