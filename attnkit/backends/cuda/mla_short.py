"""mla_decode by csrc/cuda/mla/mla_short_sm90: more than 32 query rows a sequence and few keys in all, on Hopper."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from attnkit.backends.cuda import mla_wide, mla_wide_fp8
from attnkit.backends.cuda.builds import mla_short as builds
from attnkit.backends.cuda.builds.mla_wide import TILE
from attnkit.backends.cuda.images import Variant
from attnkit.backends.cuda.launch import missing
from attnkit.configs.mla_short_cuda import CUDA
from attnkit.dispatch import Kernel
from attnkit.signature import MlaSig

NAME = "attnkit_mla_decode_short"


def supports(sig: MlaSig) -> str | None:
    cache = _form(sig)
    reason = mla_wide.unsuited_device(sig) or cache.unsuited_cache(sig) or mla_wide.unsuited_call(sig)
    if reason is not None:
        return reason
    if sig.q_dtype != torch.bfloat16:
        return f"q is {sig.q_dtype}, wanted bfloat16"
    if sig.softcap > 0:
        return "takes no softcap"
    pieces, groups = _pieces(sig), mla_wide.groups(sig)
    if pieces > groups:
        return f"{sig.B} tables of {sig.W * sig.S} tokens are up to {pieces} pieces, wanted at most {groups}"
    return missing(_variant(sig))


def _form(sig: MlaSig) -> ModuleType:
    """Of the cache: who knows what it has to be like."""
    return mla_wide_fp8 if sig.kv_dtype == torch.uint8 else mla_wide


def _pieces(sig: MlaSig) -> int:
    """Of builds.TILES tiles, if all tables are full; a window may begin within a tile."""
    tiles = -(-sig.W * sig.S // TILE) + (sig.window > 0)
    return sig.B * -(-tiles // builds.TILES)


def _variant(sig: MlaSig) -> Variant:
    return builds.build(mla_wide.ctas(sig), sig.kv_dtype == torch.uint8)


def prepare(plan: Any) -> None:
    mla_wide.set_up(plan, NAME, _variant(plan.sig), builds.SHARED_BYTES, *_form(plan.sig).boxes(plan.sig))


def launch(plan: Any, *tensors: Any) -> None:
    if not plan.state:
        prepare(plan)
    mla_wide.launch(plan, *tensors)


MLA_DECODE = Kernel("cuda_sm90_short", "cuda", supports, launch, CUDA)
