"""Configs of mla_decode's CUDA kernel for many query rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnkit.arch import Arch
from attnkit.configs import Space
from attnkit.configs.mla import decode_bucket


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    least_tiles  tiles of 64 keys that a group of CTAs gets at least, where there are enough
    patience     how often a CTA asks whether the other pieces of a sequence have come, before it leaves its part of
                 their sum to the last of them (0: at once; the same bits)
    """

    least_tiles: int = 1
    patience: int = 1 << 16


def ctas(rows: int) -> int:
    """CTAs in a cluster. Two read each KV tile from L2 once; an odd block of 64 rows would leave one of them idle."""
    return 1 if -(-rows // 64) in (1, 3) else 2


def default(sig: Any, arch: Arch) -> CudaConfig:
    return CudaConfig()


def candidates(sig: Any, arch: Arch) -> list[CudaConfig]:
    return [CudaConfig(), CudaConfig(least_tiles=2), CudaConfig(least_tiles=4)]


CUDA = Space(
    "mla_decode", "cuda_sm90_wide", CudaConfig, default, candidates, decode_bucket,
    sources=tuple(f"csrc/cuda/mla/mla_wide_{p}.cuh" for p in ("sm90", "shared", "scorer", "adder", "schedule", "combine")),
)  # fmt: skip
