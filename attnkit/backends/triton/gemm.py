"""w8a8_gemm in Triton: sm_80 and up, and CPU tensors in its interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import workspace
from attnkit.backends.triton.common import aligned, has_e4m3, why_not
from attnkit.configs import gemm as configs
from attnkit.dispatch import Kernel, Plan
from attnkit.settings import get as settings
from attnkit.signature import GemmSig


def _gemm_supports(sig: GemmSig) -> str | None:
    reason = why_not(sig.device)
    if reason is None and sig.dtype == torch.float8_e4m3fn and not (settings().interpret or has_e4m3(sig.device)):
        return "e4m3 products need sm_89 or newer"
    return reason


def _bind_gemm(plan: Plan, reusable: bool) -> Any:
    from attnkit.triton_kernels import gemm

    s, c = plan.sig, plan.config
    shape = gemm.Shape(
        s.M, s.N, s.K, s.a_stride[0], s.w_stride[0], s.out_stride[0], s.dtype == torch.int8,
        s.a_scale_per_token, s.w_scale_per_channel,
    )  # fmt: skip
    bound = gemm.bind(
        shape, block_m=c.block_m, block_n=c.block_n, block_k=c.block_k, split_k=c.split_k, group_m=c.group_m,
        num_warps=c.num_warps, num_stages=c.num_stages, reusable=reusable,
    )  # fmt: skip
    return bound, gemm.launch


def _gemm(plan: Plan, a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    key = "reused" if aligned(a, w, a_scale, w_scale, bias, out) else "fresh"
    held = plan.state.get(key)
    if held is None:
        held = plan.state[key] = _bind_gemm(plan, key == "reused")
    bound, launch = held
    parts = counters = None
    if bound.counters:
        parts = workspace.partials(a.device, bound.part_bytes)
        counters = workspace.counters(a.device, bound.counters)
    launch(bound, a, w, a_scale, w_scale, bias, out, parts, counters)


W8A8_GEMM = Kernel("triton", "triton", _gemm_supports, _gemm, configs.TRITON)
