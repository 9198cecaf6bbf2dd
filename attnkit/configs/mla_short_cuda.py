"""Configs of mla_decode's CUDA kernel for many query rows and few keys: patience alone."""

from __future__ import annotations

from typing import Any

from attnkit.arch import Arch
from attnkit.configs import Space
from attnkit.configs.mla import decode_bucket
from attnkit.configs.mla_wide_cuda import CudaConfig, default


def candidates(sig: Any, arch: Arch) -> list[CudaConfig]:
    return [CudaConfig()]


CUDA = Space(
    "mla_decode", "cuda_sm90_short", CudaConfig, default, candidates, decode_bucket,
    sources=(
        *(f"csrc/cuda/mla/mla_short_{p}.cuh" for p in ("sm90", "meeting", "schedule", "widener")),
        *(f"csrc/cuda/mla/mla_wide_{p}.cuh" for p in ("shared", "schedule", "combine")),
    ),
)  # fmt: skip
