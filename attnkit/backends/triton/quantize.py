"""quantize_per_token, rms_norm_quantize and silu_mul_quantize in Triton: sm_80 and up, CPU tensors in its interpreter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.backends.triton.common import aligned, has_e4m3, why_not
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import QuantSig, RmsNormQuantSig, SiluMulQuantSig


def _supports(sig: QuantSig | RmsNormQuantSig | SiluMulQuantSig) -> str | None:
    return why_not(sig.device)


def _bind(plan: Plan, form: str, out: Tensor, reusable: bool) -> Any:
    from attnkit.triton_kernels import quantize

    s = plan.sig
    int8 = s.out_dtype == torch.int8
    by_hand = not int8 and not has_e4m3(s.device)
    shape = quantize.Shape(
        s.M, s.K, s.x_stride[0], (getattr(s, "residual_stride", None) or (0,))[0], out.stride(0), form, int8, by_hand,
        getattr(s, "eps", 0.0),
    )  # fmt: skip
    return quantize.bind(shape, reusable=reusable), by_hand


def _launch(
    plan: Plan, form: str, x: Tensor, weight: Tensor | None, residual: Tensor | None, out: Tensor, scale: Tensor
) -> None:
    key = "reused" if aligned(x, weight, residual, out, scale) else "fresh"
    held = plan.state.get(key)
    if held is None:
        held = plan.state[key] = _bind(plan, form, out, key == "reused")
    launcher, by_hand = held
    launcher(x, weight, residual, out.view(torch.uint8) if by_hand else out, scale)


def _quantize(plan: Plan, x: Tensor, out: Tensor, scale: Tensor) -> None:
    _launch(plan, "plain", x, None, None, out, scale)


def _rms_norm_quantize(plan: Plan, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, scale: Tensor) -> None:
    _launch(plan, "rms_norm", x, weight, residual, out, scale)


def _silu_mul_quantize(plan: Plan, x: Tensor, out: Tensor, scale: Tensor) -> None:
    _launch(plan, "silu_mul", x, None, None, out, scale)


QUANTIZE = Kernel("triton", "triton", _supports, _quantize)
RMS_NORM_QUANTIZE = Kernel("triton", "triton", _supports, _rms_norm_quantize)
SILU_MUL_QUANTIZE = Kernel("triton", "triton", _supports, _silu_mul_quantize)
