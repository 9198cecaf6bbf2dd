"""Configs of w8a8_gemm."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnkit.arch import Arch
from attnkit.configs import Space, pow2
from attnkit.signature import GemmSig


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """
    block_m, block_n, block_k  one tile
    split_k                    stretches of the K axis computed side by side
    group_m                    rows of tiles that are walked together, for L2
    num_warps, num_stages      of a program; stages are K tiles in flight
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int
    group_m: int
    num_warps: int
    num_stages: int


def smem(c: TritonConfig) -> int:
    """Bytes of shared memory that the tiles in flight take."""
    return (c.block_m + c.block_n) * c.block_k * c.num_stages


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def split_for(sig: GemmSig, arch: Arch, block_m: int, block_n: int, block_k: int, waves: float) -> int:
    """How many stretches of K fill ``waves`` times the multiprocessors; each keeps at least four tiles."""
    tiles = _cdiv(sig.M, block_m) * _cdiv(sig.N, block_n)
    most = max(1, _cdiv(sig.K, block_k) // 4)
    return max(1, min(most, int(waves * max(arch.sms, 1) / tiles), 32))


def default(sig: GemmSig, arch: Arch) -> TritonConfig:
    """By M: the smallest row tile that holds it; few rows stream weights, many rows fill the tensor cores."""
    if arch.sm == 0:  # the interpreter: few, large tiles
        return TritonConfig(min(64, max(16, pow2(sig.M))), 64, 64, min(2, _cdiv(sig.K, 256)), 8, 4, 1)
    roomy = arch.smem >= 160 * 1024
    if sig.M <= 64:
        m = max(16, pow2(sig.M))
        k = 256 if roomy and sig.K >= 2048 and m <= 32 else 128
        shape, warps, stages, waves = (m, 128 if roomy and m == 64 else 64, k), 4, 4, 2.0
    elif not roomy:
        shape, warps, stages, waves = (128, 128, 64), 4, 3, 1.0
    elif sig.M <= 128 or sig.dtype != torch.int8:
        # Adding e4m3 up in two levels takes a second set of accumulators: 128 x 256 would spill.
        shape, warps, stages, waves = (128, 128, 128), 8, 4, 1.0
    else:
        shape, warps, stages, waves = (128, 256, 128), 8, 4, 1.0
    config = TritonConfig(*shape, split_for(sig, arch, *shape, waves), 8, warps, stages)
    while smem(config) > arch.smem - 1024 and stages > 1:
        stages -= 1
        config = TritonConfig(*shape, config.split_k, 8, warps, stages)
    return config


#: Rows up to which a group of candidates is worth measuring: (block_m or 0 for M's own, block_n, block_k, num_warps,
#: num_stages, waves of programs to split K into). Few enough that a sweep of a model's layers ends within minutes.
_SWEEP: dict[int, list[tuple[int, int, int, int, int, float]]] = {
    16: [
        (16, 64, 256, 4, 4, 1.0), (16, 64, 256, 4, 4, 8.0), (16, 32, 256, 4, 4, 2.0), (16, 64, 512, 4, 3, 2.0),
        (16, 128, 128, 4, 4, 2.0), (16, 64, 128, 4, 6, 4.0),
    ],
    64: [
        (0, 64, 128, 4, 5, 2.0), (0, 64, 256, 4, 4, 1.0), (0, 64, 256, 4, 4, 2.0), (0, 128, 128, 4, 4, 1.0),
        (0, 128, 256, 4, 3, 1.0),
    ],
    512: [
        (64, 128, 128, 4, 4, 1.0), (64, 256, 128, 8, 4, 1.0), (128, 128, 128, 8, 4, 0.0), (128, 128, 128, 8, 4, 1.0),
        (128, 256, 128, 8, 4, 0.0), (128, 64, 128, 4, 5, 1.0),
    ],
    1 << 31: [
        (128, 256, 128, 8, 3, 0.0), (128, 256, 128, 8, 4, 0.0), (128, 256, 64, 8, 4, 0.0), (256, 128, 128, 8, 4, 0.0),
        (128, 128, 128, 8, 4, 0.0), (128, 128, 128, 4, 4, 0.0), (128, 128, 64, 4, 4, 0.0),
    ],
}  # fmt: skip


def candidates(sig: GemmSig, arch: Arch) -> list[TritonConfig]:
    """The default, and what is worth measuring for so many rows."""
    found = [default(sig, arch)]
    if arch.sm == 0:
        return found
    group = min(limit for limit in _SWEEP if sig.M <= limit)
    for block_m, block_n, block_k, warps, stages, waves in _SWEEP[group]:
        m = block_m or max(16, pow2(sig.M))
        if sig.dtype != torch.int8 and m * block_n > 128 * 128:
            continue  # two sets of accumulators: spills
        c = TritonConfig(m, block_n, block_k, split_for(sig, arch, m, block_n, block_k, waves), 8, warps, stages)
        if smem(c) <= arch.smem - 1024 and c not in found:
            found.append(c)
    return found


def bucket(sig: GemmSig) -> str:
    kind = "int8" if sig.dtype == torch.int8 else "e4m3"
    return f"M{pow2(sig.M)}-N{pow2(sig.N)}-K{pow2(sig.K)}-{kind}"


TRITON = Space("w8a8_gemm", "triton", TritonConfig, default, candidates, bucket, sources=("triton_kernels/gemm.py",))
