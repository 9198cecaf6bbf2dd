"""Configs of the sm_90a sampling kernels."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.arch import Arch
from attnkit.backends.cuda.builds.sampling import BLOCK, STREAM_CTAS
from attnkit.configs import Space
from attnkit.configs.sampling import bucket
from attnkit.signature import SampleSig


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    ctas  that the blocks of all rows are dealt to where nothing else says how many (greedy and plain temperature of few rows,
          peaks of few rows without penalties; what else is drawn follows from the shape)
    """

    ctas: int


def default(sig: SampleSig, arch: Arch) -> CudaConfig:
    blocks = sig.B * -(-sig.V // BLOCK)
    return CudaConfig(max(1, min(max(arch.sms, 1) * STREAM_CTAS, blocks)))


def candidates(sig: SampleSig, arch: Arch) -> list[CudaConfig]:
    base = default(sig, arch)
    return list(dict.fromkeys([base, CudaConfig(max(1, min(arch.sms, base.ctas)))]))


CUDA = Space(
    "sample", "cuda_sm90", CudaConfig, default, candidates, bucket,
    sources=tuple(
        f"csrc/cuda/sampling/sample_{part}_sm90.cuh" for part in ("row", "group", "stream", "draw", "peaks")
    ),
)  # fmt: skip
