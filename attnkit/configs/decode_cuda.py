"""Configs of paged_decode's CUDA kernel, and which build of it serves a shape."""

from __future__ import annotations

from dataclasses import dataclass
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
    late         tiles a CTA has left to ask for when it lets the next grid start, whose CTAs then ask L2 for as many;
                 0: it may start at once
    """

    ctas_per_sm: int
    grid: int
    min_tiles: int
    late: int = 0


def build_of(sig: Any, config: CudaConfig) -> Build:
    return _build(sig, config.ctas_per_sm)


def _build(sig: Any, ctas_per_sm: int) -> Build:
    return build_for(sig.D, sig.Dv, KV_TYPE[sig.kv_dtype], sig.G * sig.Q, sig.G, ctas_per_sm, 2 if _by_twos(sig) else 1)


def _by_twos(sig: Any) -> bool:
    """Whether KV heads are taken two at a time: where a head's row is 128 bytes long, memory is slower by a tenth.

    Not where heads are few (more pieces of each would have to meet), and never where bits may not depend on the batch.
    """
    item = sig.kv_dtype.itemsize
    side_by_side = sig.D * item == sig.Dv * item == 128 and sig.k_stride[2] == sig.v_stride[2] == sig.D
    return side_by_side and sig.Hkv % 2 == 0 and sig.G * sig.Q <= 8 and sig.B * sig.Hkv >= 384 and not sig.batch_invariant


def default(sig: Any, arch: Arch) -> CudaConfig:
    """Two rings a multiprocessor keep the memory busier. Where pieces are large and many of them meet, and where all is over
    in a few tiles, half the pieces do better; then half of each multiprocessor is free for the next launch's beginning.
    """
    heads, rows = sig.B * sig.Hkv, sig.G * sig.Q
    if 16 < rows <= 32 and 2 * heads <= arch.sms:
        return CudaConfig(ctas_per_sm=1, grid=100, min_tiles=1)
    tiles = heads * -(-sig.W * sig.S // _build(sig, 2).tile)
    if rows <= 8 and sig.B <= 32 and not sig.batch_invariant and 24 * arch.sms < tiles <= 40 * arch.sms:
        return CudaConfig(ctas_per_sm=2, grid=50, min_tiles=1, late=4)
    if tiles > 8 * arch.sms:
        return CudaConfig(ctas_per_sm=2, grid=100, min_tiles=1)
    if tiles > 2 * arch.sms:
        return CudaConfig(ctas_per_sm=2, grid=50, min_tiles=2)
    return CudaConfig(ctas_per_sm=1, grid=100, min_tiles=1 if 2 * tiles <= arch.sms else 2)


def candidates(sig: Any, arch: Arch) -> list[CudaConfig]:
    return [CudaConfig(c, g, m) for c in (2, 1) for g in (100, 50) for m in (1, 2, 4)]


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
    ),
)
