"""Configs of the sm_90a sampling kernels."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.arch import Arch
from attnkit.backends.cuda.builds.sampling import DRAW_CTAS, TILE
from attnkit.configs import Space
from attnkit.configs.sampling import bucket, filtered
from attnkit.signature import SampleSig


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    ctas  that the tiles of all rows are dealt to (greedy and plain temperature; what filters use follows from V)
    """

    ctas: int


def default(sig: SampleSig, arch: Arch) -> CudaConfig:
    tiles = sig.B * -(-sig.V // TILE)
    return CudaConfig(max(1, min(max(arch.sms, 1) * DRAW_CTAS, tiles)))


def candidates(sig: SampleSig, arch: Arch) -> list[CudaConfig]:
    base = default(sig, arch)
    if filtered(sig):
        return [base]
    return list(dict.fromkeys([base, *(CudaConfig(max(1, min(arch.sms * n, base.ctas))) for n in (1, 2, 3))]))


CUDA = Space(
    "sample", "cuda_sm90", CudaConfig, default, candidates, bucket,
    sources=("csrc/cuda/sample_row_sm90.cuh", "csrc/cuda/sample_draw_sm90.cuh"),
)  # fmt: skip
