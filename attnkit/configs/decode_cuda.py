"""Configs of paged_decode's CUDA kernel, and which build of it serves a shape."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from attnkit.arch import Arch
from attnkit.backends.cuda.builds.decode import BF16, E4M3, F16, INT8, Build, build_for
from attnkit.configs import Space
from attnkit.configs.decode import bucket

KV_TYPE = {torch.bfloat16: BF16, torch.float16: F16, torch.float8_e4m3fn: E4M3, torch.int8: INT8}


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    ctas_per_sm  CTAs that share a multiprocessor: 1 or 2, each with a ring of its own
    grid         CTAs the work is divided over, in percent of what fits the GPU
    min_tiles    tiles of keys that a CTA gets at least, where there are enough
    late         tiles a CTA has left to ask for when it lets the next grid start; 0: it may start at once
    ahead        tiles that a CTA asks of L2 while the grid before it still runs
    stages       tiles under way in a CTA, at most; 0: as many as fit
    cluster      CTAs that have a head and meet in shared memory, whatever grid and min_tiles say; 1: heads are cut anywhere
    share        where a head's pieces meet, the last CTAs to come each add up so many units of four columns at least; 0: one
                 CTA adds up all, or many pieces meet in groups first
    """

    ctas_per_sm: int
    grid: int
    min_tiles: int
    late: int = 0
    ahead: int = 1
    stages: int = 0
    cluster: int = 1
    share: int = 0


def build_of(sig: Any, config: CudaConfig) -> Build:
    return _build(sig, config.ctas_per_sm, config.cluster, config.share)


def _build(sig: Any, ctas_per_sm: int, cluster: int = 1, share: int = 0) -> Build:
    if sig.batch_invariant and sig.G * sig.Q > 16:
        ctas_per_sm = 2  # the two builds for so many rows give keys to warps differently, which shows in the last bits
    cluster = cluster if _by_cluster(sig) else 1
    # Large batches of usual shapes: elsewhere it is not worth another build.
    charge = sig.B > 32 and ctas_per_sm == 2 and cluster == 1 and _usual(sig) and not sig.batch_invariant
    heads = 2 if _by_twos(sig) else 1
    by_share = share > 0 and cluster == 1 and _usual(sig) and not charge and not sig.batch_invariant
    return build_for(sig.D, sig.Dv, KV_TYPE[sig.kv_dtype], sig.G * sig.Q, sig.G, ctas_per_sm, heads, cluster, charge, by_share)


def _usual(sig: Any) -> bool:
    return sig.D == sig.Dv == 128 and sig.kv_dtype.itemsize == 2


def _by_cluster(sig: Any) -> bool:
    """Whether clusters can serve the shape: rows that one group of warps has, and columns that up to 16 CTAs share."""
    return sig.G * sig.Q <= 8 and sig.Dv % 64 == 0 and not sig.batch_invariant


def _by_twos(sig: Any) -> bool:
    """Whether KV heads are taken two at a time: where a head's row is 128 bytes long, memory is slower by a tenth.

    Not where heads are few (more pieces of each would have to meet), and never where bits may not depend on the batch.
    """
    item = sig.kv_dtype.itemsize
    side_by_side = sig.D * item == sig.Dv * item == 128 and sig.k_stride[2] == sig.v_stride[2] == sig.D
    return side_by_side and sig.Hkv % 2 == 0 and sig.G * sig.Q <= 8 and sig.B * sig.Hkv >= 384 and not sig.batch_invariant


#: For so many heads at most: (tiles a head at most, config), ... Some 96 CTAs in all do best, while they are enough to read all
#: of it in time. Measured on 132 multiprocessors, which two to each hold 132 clusters of 2, 62 of 4, 30 of 8 and 14 of 16.
CLUSTERS = (
    (2, (8, CudaConfig(1, 100, 1, cluster=8)), (128, CudaConfig(1, 100, 1, cluster=16))),
    (4, (32, CudaConfig(1, 100, 1, cluster=8)), (128, CudaConfig(1, 100, 1, cluster=16))),
    (6, (16, CudaConfig(1, 100, 1, cluster=8)), (96, CudaConfig(2, 100, 1, late=1, cluster=12))),
    (8, (4, CudaConfig(1, 100, 1, cluster=4)), (24, CudaConfig(2, 100, 1, late=1, cluster=8)),
        (96, CudaConfig(2, 100, 1, late=1, cluster=12))),
    (12, (4, CudaConfig(1, 100, 1, cluster=4)), (80, CudaConfig(2, 100, 1, late=1, cluster=8))),
    (16, (64, CudaConfig(2, 100, 1, late=1, cluster=6))),
    (24, (64, CudaConfig(2, 100, 1, late=1, cluster=4))),
    (32, (32, CudaConfig(2, 100, 1, late=1, cluster=3))),
    (40, (16, CudaConfig(2, 100, 1, late=1, cluster=2))),
    (66, (16, CudaConfig(2, 100, 1, late=1, cluster=2)), (32, CudaConfig(2, 100, 1, late=3, ahead=3, cluster=2))),
)  # fmt: skip


def _cluster(sig: Any, arch: Arch, of_head: int) -> CudaConfig | None:
    """The cluster config of a shape that is worth one: usual head sizes and caches, few heads, each of more than one tile."""
    if not _usual(sig) or not _by_cluster(sig) or arch.sms < 132 or of_head == 1:
        return None
    ways = next((ways for heads, *ways in CLUSTERS if sig.B * sig.Hkv <= heads), [])
    return next((config for most, config in ways if of_head <= most), None)


def _pieces(config: CudaConfig, arch: Arch, heads: int, tiles: int) -> int:
    """Pieces that a head comes in, all of one length."""
    return min(arch.sms * config.ctas_per_sm * config.grid // 100, tiles // config.min_tiles) // heads


def default(sig: Any, arch: Arch) -> CudaConfig:
    """The config whose heads' pieces one CTA adds up; where they are so many that they would meet in groups, several do."""
    config = _default(sig, arch)
    rows, heads = sig.G * sig.Q, sig.B * sig.Hkv
    if not _usual(sig) or sig.batch_invariant or config.cluster > 1 or not (rows <= 8 or 16 < rows <= 32):
        return config
    tiles = heads * -(-sig.W * sig.S // build_of(sig, config).tile)
    if _pieces(config, arch, heads, tiles) <= (8 if rows > 16 else 32):
        return config
    # CTAs that add up end later and the others sooner than they would: the next grid comes a tile sooner, before they do.
    late = config.late + 1 if config.late >= 3 else config.late
    return replace(config, share=4 if rows <= 8 and heads <= 2 else 8, late=late)


def _default(sig: Any, arch: Arch) -> CudaConfig:
    """Two rings a multiprocessor keep the memory busier, with two tiles each: more under way make it slower again by 2 to 4%.
    Where that cuts heads which one ring would leave whole, where pieces are large and many of them meet, and where all is over
    in a few tiles, half the CTAs do better. Then half of each multiprocessor is free for the next launch's beginning, which in
    some cases is let in late, before the first CTA ends: else two of it meet in one multiprocessor. Where heads and keys are
    few, a cluster of CTAs has a head.
    """
    heads, rows = sig.B * sig.Hkv, sig.G * sig.Q
    if 16 < rows <= 32 and 2 * heads <= arch.sms:
        return CudaConfig(ctas_per_sm=1, grid=100, min_tiles=4, ahead=2, stages=3)
    of_head = -(-sig.W * sig.S // _build(sig, 2).tile)
    tiles = heads * of_head
    cluster = _cluster(sig, arch, of_head)
    if cluster is not None:
        return cluster
    if rows <= 8 and sig.B <= 32 and not sig.batch_invariant:
        if 9 * arch.sms <= 10 * heads and heads <= arch.sms:  # one CTA a multiprocessor cuts no head, two do
            if 24 * arch.sms < tiles <= 40 * arch.sms:
                return CudaConfig(ctas_per_sm=2, grid=50, min_tiles=1, late=6, ahead=6)
            if 40 * arch.sms < tiles <= 80 * arch.sms:
                return CudaConfig(ctas_per_sm=2, grid=50, min_tiles=1, ahead=2)
        if 6 * arch.sms < tiles <= 16 * arch.sms:
            return CudaConfig(ctas_per_sm=2, grid=50, min_tiles=1, late=3, ahead=3)
    if tiles > 8 * arch.sms:
        return CudaConfig(ctas_per_sm=2, grid=100, min_tiles=1, ahead=3, stages=2)
    if tiles > 2 * arch.sms:
        late = int(rows <= 16 and sig.B <= 32 and not sig.batch_invariant)
        return CudaConfig(ctas_per_sm=2, grid=50, min_tiles=2, late=late)
    # Half the multiprocessors at most, so that the next grid starts beside this one; 16 pieces meet a head, or 32.
    least = max(-(-2 * tiles // arch.sms), min(4, -(-of_head // 16)), -(-of_head // 32))
    return CudaConfig(ctas_per_sm=1, grid=100, min_tiles=least)


def candidates(sig: Any, arch: Arch) -> list[CudaConfig]:
    found = [CudaConfig(c, g, m) for c in (2, 1) for g in (100, 50) for m in (1, 2, 4)]
    found += [CudaConfig(2, 100, 1, ahead=a, stages=2) for a in (1, 3)]
    found += [CudaConfig(2, 50, 1, late=n, ahead=n) for n in (3, 6)]
    if _by_cluster(sig) and sig.B * sig.Hkv <= arch.sms:
        configs = [config for _, *ways in CLUSTERS for _, config in ways]
        found += [config for config in configs if sig.B * sig.Hkv * config.cluster <= 2 * arch.sms]
    shared = [CudaConfig(2, 100, 1, ahead=3, stages=2, share=n) for n in (4, 8)]
    shared += [CudaConfig(1, 100, 1, ahead=2, stages=3, share=8), CudaConfig(2, 50, 1, late=3, ahead=3, share=4)]
    found += [config for config in shared if build_of(sig, config).share]
    return list(dict.fromkeys([default(sig, arch), *found]))


CUDA = Space(
    "paged_decode",
    "cuda_sm90",
    CudaConfig,
    default,
    candidates,
    bucket,
    sources=(
        "csrc/cuda/decode/decode_sm90.cuh",
        "csrc/cuda/decode/decode_wide_sm90.cuh",
        "csrc/cuda/decode/decode_load.cuh",
        "csrc/cuda/decode/decode_schedule.cuh",
        "csrc/cuda/decode/decode_combine.cuh",
        "csrc/cuda/decode/decode_cluster.cuh",
        "csrc/cuda/decode/decode_share.cuh",
    ),
)
