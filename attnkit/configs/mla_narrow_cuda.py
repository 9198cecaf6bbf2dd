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
    patience   how often a CTA asks whether the other pieces of a sequence have come, before it leaves its share of adding
               them up to the last of them (0: at once; the same bits)
    """

    grid: int
    min_tiles: int
    patience: int = 1 << 16


def default(sig: Any, arch: Arch) -> CudaConfig:
    """Where all is over in a few tiles, fewer and larger pieces cost less to add up than they save."""
    tiles = sig.B * -(-sig.W * sig.S // TILE)
    return CudaConfig(grid=100, min_tiles=2 if tiles <= 4 * arch.sms else 1)


def candidates(sig: Any, arch: Arch) -> list[CudaConfig]:
    return [CudaConfig(g, m) for g in (100, 50) for m in (1, 2, 4, 8)]


CUDA = Space(
    "mla_decode",
    "cuda_sm90_narrow",
    CudaConfig,
    default,
    candidates,
    decode_bucket,
    sources=(
        "csrc/cuda/mla/mla_narrow_sm90.cuh",
        "csrc/cuda/mla/mla_narrow_fp8_sm90.cuh",
        "csrc/cuda/mla/mla_narrow_common.cuh",
        "csrc/cuda/mla/mla_narrow_meeting.cuh",
        "csrc/cuda/decode/decode_schedule.cuh",
        "csrc/cuda/decode/decode_combine.cuh",
    ),
)
