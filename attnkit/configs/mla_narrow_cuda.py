"""Configs of mla_decode's CUDA kernel for few rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from attnkit.arch import Arch
from attnkit.backends.cuda.builds.mla_narrow import TILE
from attnkit.configs import Space
from attnkit.configs.mla import decode_bucket


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    grid       CTAs the work is divided over, in percent of the multiprocessors
    min_tiles  tiles of 64 tokens that a CTA gets at least, where there are enough
    cluster    CTAs that add up pieces together: 1 or 8 (1 where the call is batch-invariant)
    """

    grid: int
    min_tiles: int
    cluster: int


#: CTAs in percent of the multiprocessors that clusters of 8 find room for: 15 clusters on 132.
ROOM = 91


def default(sig: Any, arch: Arch) -> CudaConfig:
    """Where all is over in a few tiles, fewer and larger pieces cost less to add up than they save.

    Clusters add up a sequence's pieces in a fraction of the time, and cost some microseconds otherwise: worth it where
    a sequence has many pieces.
    """
    tiles = sig.B * -(-sig.W * sig.S // TILE)
    few = tiles <= 4 * arch.sms
    if few and sig.B <= 8 and not sig.batch_invariant:
        return CudaConfig(grid=ROOM, min_tiles=2, cluster=8)
    return CudaConfig(grid=100, min_tiles=2 if few else 1, cluster=1)


def candidates(sig: Any, arch: Arch) -> list[CudaConfig]:
    return [CudaConfig(g, m, c) for g, c in ((100, 1), (50, 1), (ROOM, 8)) for m in (1, 2, 4, 8)]


CUDA = Space(
    "mla_decode",
    "cuda_sm90_narrow",
    CudaConfig,
    default,
    candidates,
    decode_bucket,
    sources=(
        "csrc/cuda/mla/mla_narrow_sm90.cuh",
        "csrc/cuda/decode/decode_schedule.cuh",
        "csrc/cuda/decode/decode_combine.cuh",
    ),
)
