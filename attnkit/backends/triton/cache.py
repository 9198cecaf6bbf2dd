"""write_kv in Triton: sm_80 and up, and CPU tensors in its interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.backends.triton.common import aligned, has_e4m3, why_not
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import WriteSig


def _supports(sig: WriteSig) -> str | None:
    return why_not(sig.device)


def _bind(plan: Plan, scales: tuple[int, int], reusable: bool) -> Any:
    from attnkit.triton_kernels import cache

    s = plan.sig
    e4m3 = s.kv_dtype == torch.float8_e4m3fn
    by_hand = e4m3 and not has_e4m3(s.device)
    shape = cache.Shape(
        s.T, s.Hkv, s.D, s.Dv, s.P, s.S, s.k_in_stride[:2], s.v_in_stride[:2], s.k_stride[:3], s.v_stride[:3], scales,
        s.kv_dtype == torch.int8, e4m3, by_hand,
    )  # fmt: skip
    return cache.bind(shape, reusable), by_hand


def _launch(
    plan: Plan, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    scales = (0 if k_scale is None else k_scale.stride(0), 0 if v_scale is None else v_scale.stride(0))
    reusable = aligned(k, v, k_cache, v_cache, slots, k_scale, v_scale)
    key = f"{scales} reused" if reusable else f"{scales} fresh"
    held = plan.state.get(key)
    if held is None:
        held = plan.state[key] = _bind(plan, scales, reusable)
    launcher, by_hand = held
    if by_hand:
        k_cache, v_cache = k_cache.view(torch.uint8), v_cache.view(torch.uint8)
    launcher(k, v, k_cache, v_cache, slots, k_scale, v_scale)


WRITE_KV = Kernel("triton", "triton", _supports, _launch)
