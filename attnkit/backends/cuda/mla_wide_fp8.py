"""mla_decode by csrc/cuda/mla/mla_wide_fp8_sm90: more than 32 query rows a sequence over an fp8 cache, on Hopper."""

from __future__ import annotations

from typing import Any

import torch

from attnkit.backends.cuda import mla_wide
from attnkit.backends.cuda.builds import mla_wide_fp8 as builds
from attnkit.backends.cuda.images import Variant
from attnkit.backends.cuda.launch import missing
from attnkit.configs.mla_wide_fp8_cuda import CUDA
from attnkit.dispatch import Kernel
from attnkit.signature import MlaSig

NAME = "attnkit_mla_decode_wide_fp8"
MAX_PAGE, MAX_CACHE = 1 << 34, 1 << 36  # bytes; places in the cache are counted in 16 of them, in 32 bits


def supports(sig: MlaSig) -> str | None:
    return mla_wide.unsuited_device(sig) or unsuited_cache(sig) or mla_wide.unsuited_call(sig) or missing(_variant(sig))


def unsuited_cache(sig: MlaSig) -> str | None:
    if sig.kv_dtype != torch.uint8 or sig.q_dtype != torch.bfloat16:
        return f"q is {sig.q_dtype} and kv {sig.kv_dtype}, wanted bfloat16 and an fp8 cache"
    if sig.S > 1 and sig.kv_stride[1] != builds.ROW_BYTES:
        return f"kv's stride from slot to slot is {sig.kv_stride[1]} bytes, wanted {builds.ROW_BYTES}"
    if sig.kv_stride[0] >= MAX_PAGE:
        return f"kv's stride from page to page is {sig.kv_stride[0]} bytes, wanted less than {MAX_PAGE}"
    if sig.P * sig.kv_stride[0] > MAX_CACHE:
        return f"kv's pages span {sig.P * sig.kv_stride[0]} bytes, wanted up to {MAX_CACHE}"
    return None


def _variant(sig: MlaSig) -> Variant:
    return builds.build(mla_wide.ctas(sig))


def prepare(plan: Any) -> None:
    mla_wide.set_up(plan, NAME, _variant(plan.sig), builds.SHARED_BYTES, *boxes(plan.sig))


def boxes(sig: MlaSig) -> tuple[int, list[tuple[int, int, Any]]]:
    """There is no tensor map: the field that says how large its boxes are says here how far apart pages are."""
    return sig.kv_stride[0] // 16, []


def launch(plan: Any, *tensors: Any) -> None:
    if not plan.state:
        prepare(plan)
    mla_wide.launch(plan, *tensors)


MLA_DECODE = Kernel("cuda_sm90_wide_fp8", "cuda", supports, launch, CUDA)
