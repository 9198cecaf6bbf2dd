"""Configs of the sm_90a W8A8 kernel, chosen by a model of its time."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

import torch

from attnkit.arch import Arch
from attnkit.backends.cuda.builds import gemm as builds
from attnkit.configs import Space
from attnkit.configs.gemm import bucket
from attnkit.signature import GemmSig


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    block_m, block_n      one CTA's tile: 64 rows a warpgroup, and the columns of one wgmma
    cluster_m, cluster_n  CTAs above and beside one another that multicast what they share: rows of w, rows of a
    splits                CTAs of a cluster that take a stretch of K each
    group                 rows of cluster tiles that are walked together, for L2
    turns                 int8: each of the two warpgroups takes whole tiles, and finishes one while the other multiplies
    """

    block_m: int
    block_n: int
    cluster_m: int
    cluster_n: int
    splits: int
    group: int
    turns: bool = False


#: (cluster_m, cluster_n, splits) worth having.
CLUSTERS = ((1, 1, 1), (2, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2), (2, 1, 2), (1, 2, 2), (1, 1, 4))
TURN_CLUSTERS = ((2, 1, 1), (1, 1, 1))
#: The model counts cycles; under load an H200 has about so many a second.
CLOCK = 1.55e9
DRAM = 3.7e12 / CLOCK  # bytes a cycle
L2 = 76  # bytes a cycle and multiprocessor


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def resident(c: CudaConfig, arch: Arch) -> int:
    """Clusters that run at one time. Those of 4 do not fill every GPC: an H200 has room for 30."""
    size = c.cluster_m * c.cluster_n * c.splits
    return max(1, (arch.sms if size <= 2 else arch.sms * 10 // 11) // size)


def cluster_tiles(sig: GemmSig, c: CudaConfig) -> tuple[int, int]:
    return _cdiv(sig.M, c.block_m * c.cluster_m), _cdiv(sig.N, c.block_n * c.cluster_n)


def cycles(sig: GemmSig, c: CudaConfig, arch: Arch) -> float:
    """About how long ``c`` takes: waves of tiles, each as slow as its scarcest resource, and never faster than memory.

    Fitted to sweeps on an H200 (docs/hopper/gemm.md): the constants are the best together, none of them a measurement.
    """
    m, n = cluster_tiles(sig, c)
    waves = _cdiv(m * n, resident(c, arch))
    steps = _cdiv(_cdiv(sig.K, 128), c.splits)
    tensor = c.block_m * c.block_n / 32
    shared = 1.27 * c.block_m / 64 * (64 + c.block_n)
    l2 = (c.block_m / c.cluster_n + c.block_n / c.cluster_m) * 128 / L2
    promote = 0 if sig.dtype == torch.int8 else 130 - 0.7 * c.block_n if builds.parts(False, c.block_n) == 2 else 130
    step = max(tensor + promote, shared, l2)
    finish = 6 * c.block_n
    meeting = (c.splits > 1) * (1850 + c.block_m * c.block_n * 0.19)
    busy = waves * (steps * step + (200 if c.turns else 500)) + (1.65 if c.turns else waves) * finish + meeting
    memory = (sig.N * sig.K + sig.M * sig.K + 2 * sig.M * sig.N) / DRAM + finish
    busy *= (0.94 if c.cluster_m > 1 else 1) * (1.02 if c.cluster_n > 1 else 1)  # w is shared at no cost, a is not
    return 5000 + max(busy, memory) + 0.3 * min(busy, memory)


def _group(sig: GemmSig, c: CudaConfig, arch: Arch) -> int:
    """Rows such that what runs at one time is about as tall as wide, or all whose a fits a fifth of L2: each group reads w."""
    rows = cluster_tiles(sig, c)[0]
    square = isqrt(resident(c, arch) * c.cluster_n * c.block_n // (c.cluster_m * c.block_m))
    held = arch.l2 // 5 // (c.cluster_m * c.block_m * max(1, sig.K))
    groups = max(1, _cdiv(rows, max(1, square, held)))
    return max(1, _cdiv(rows, groups))


def _fits(sig: GemmSig, c: CudaConfig, arch: Arch) -> bool:
    m, n = cluster_tiles(sig, c)
    if c.splits > 1 and (c.splits > _cdiv(sig.K, 128) or m * n > resident(c, arch)):
        return False  # splits in several waves took twice the time
    return (c.cluster_m == 1 or sig.M > c.block_m) and (c.cluster_n == 1 or sig.N > c.block_n)


def _every(sig: GemmSig, arch: Arch) -> list[CudaConfig]:
    int8 = sig.dtype == torch.int8
    kinds = [(width, *cluster, False) for width in builds.WIDTHS[int8] for cluster in CLUSTERS]
    if int8:
        kinds += [(width, *cluster, True) for width in builds.TURN_WIDTHS for cluster in TURN_CLUSTERS]
    found = []
    for width, m, n, splits, turns in kinds:
        c = CudaConfig(128, width, m, n, splits, 1, turns)
        if _fits(sig, c, arch):
            found.append(CudaConfig(128, width, m, n, splits, _group(sig, c, arch), turns))
    return sorted(found, key=lambda c: cycles(sig, c, arch))


def default(sig: GemmSig, arch: Arch) -> CudaConfig:
    return _every(sig, arch)[0]


def candidates(sig: GemmSig, arch: Arch) -> list[CudaConfig]:
    """What the model thinks best, and the best of each kind of cluster."""
    ranked = _every(sig, arch)
    kinds = {(c.cluster_m, c.cluster_n, c.splits, c.turns): c for c in reversed(ranked)}
    return list(dict.fromkeys([*ranked[:6], *sorted(kinds.values(), key=ranked.index)]))


def smem(c: CudaConfig, sig: GemmSig) -> int:
    return builds.shared_bytes(c.block_m, c.block_n, builds.stages(c.block_m, c.block_n))


CUDA = Space(
    "w8a8_gemm", "cuda_sm90", CudaConfig, default, candidates, bucket,
    sources=tuple(f"csrc/cuda/{part}.cuh" for part in ("gemm/gemm_sm90", "gemm/gemm_epilogue", "common/wgmma_q8_sm90")),
    smem=smem,
)  # fmt: skip
