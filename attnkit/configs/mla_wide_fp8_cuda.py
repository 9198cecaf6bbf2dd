"""Configs of mla_decode's CUDA kernel for many query rows over an fp8 cache: those of the 16-bit one."""

from __future__ import annotations

from attnkit.configs import Space
from attnkit.configs.mla import decode_bucket
from attnkit.configs.mla_wide_cuda import CUDA as WIDE
from attnkit.configs.mla_wide_cuda import CudaConfig, candidates, default

CUDA = Space(
    "mla_decode", "cuda_sm90_wide_fp8", CudaConfig, default, candidates, decode_bucket,
    sources=(*WIDE.sources, *(f"csrc/cuda/mla/mla_wide_fp8_{p}.cuh" for p in ("sm90", "shared", "converter"))),
)  # fmt: skip
