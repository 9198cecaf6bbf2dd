"""Activations (and weights) to 8 bits with one scale a row: what w8a8_gemm takes.

quantize_per_token and quantize_weight quantise what is there. rms_norm_quantize and silu_mul_quantize compute it
first, in float32, so that the row is read once and its 16-bit form is never written.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from attnkit import check, registry
from attnkit.backends import torch_ref
from attnkit.backends.cpu import quantize as cpu
from attnkit.backends.cuda import quantize as cuda
from attnkit.backends.triton import quantize as triton
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.roofline import Cost
from attnkit.signature import QuantSig, RmsNormQuantSig, SiluMulQuantSig

QUANTIZE, RMS_NORM, SILU_MUL = "quantize_per_token", "rms_norm_quantize", "silu_mul_quantize"
KERNELS = (cuda.QUANTIZE, triton.QUANTIZE, cpu.QUANTIZE, torch_ref.QUANTIZE)
RMS_NORM_KERNELS = (cuda.RMS_NORM_QUANTIZE, triton.RMS_NORM_QUANTIZE, cpu.RMS_NORM_QUANTIZE, torch_ref.RMS_NORM_QUANTIZE)
SILU_MUL_KERNELS = (cuda.SILU_MUL_QUANTIZE, triton.SILU_MUL_QUANTIZE, cpu.SILU_MUL_QUANTIZE, torch_ref.SILU_MUL_QUANTIZE)
_QUANTIZE_PLANS = PlanCache()
_RMS_NORM_PLANS = PlanCache()
_SILU_MUL_PLANS = PlanCache()


def quantize_per_token(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """x [M, K] (bf16, fp16 or fp32) as ``dtype`` (int8 or float8_e4m3fn) and one float32 scale a row [M].

    scale = amax / 127 (int8) or amax / 448 (e4m3), 1 for a row of zeros; values are divided by it, rounded
    half to even and clamped. x is about a * scale. A NaN stays in its own row's scale.
    ``out`` [M, K] and ``out_scale`` [M], contiguous, are written where they are given: such a call allocates nothing.
    """
    if x.dim() != 2:
        raise ValueError(f"{QUANTIZE}: x's shape is {list(x.shape)}, wanted [M, K]")
    if out is None:
        out = x.new_empty(x.shape, dtype=dtype)
    scale = _scales(x, out_scale)
    if config is None and registry.traced(x):
        _quantize_op(x, out, scale, impl)
    else:
        _run_quantize(x, out, scale, impl, config)
    return out, scale


def quantize_weight(w: Tensor, *, dtype: torch.dtype = torch.int8, impl: str | None = None) -> tuple[Tensor, Tensor]:
    """A Linear's weight [N, K] as int8 or e4m3 with one scale an output channel [N]: what w8a8_gemm takes."""
    return quantize_per_token(w, dtype=dtype, impl=impl)


def rms_norm_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    residual: Tensor | None = None,
    dtype: torch.dtype = torch.int8,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """The RMSNorm of x, quantised: a layer's norm and the next product's left side in one pass.

    x         [M, K] bf16, fp16 or fp32; any row stride, contiguous last dimension. Only read
    weight    [K], x's dtype or fp32
    eps       what is added to the mean square
    residual  [M, K], x's dtype, any row stride; not x's memory. **Written in place**: it becomes residual + x, added in
              float32 and rounded once to its dtype, and the norm is that of the rounded sum. Nothing else is written to it

    With h = x, or the sum: y = h / sqrt(mean(h^2) + eps) * weight in float32, not rounded to 16 bits on the way. Returns
    y's values [M, K] in ``dtype`` (int8 or float8_e4m3fn) and their float32 scale [M], as quantize_per_token would; y is
    about values * scale. A NaN or infinity makes its own row's scale NaN, and no other's. ``out`` and ``out_scale`` as there.
    Source: Zhang and Sennrich, arXiv 1910.07467; the scales as in ZeroQuant, arXiv 2206.01861.
    """
    if x.dim() != 2:
        raise ValueError(f"{RMS_NORM}: x's shape is {list(x.shape)}, wanted [M, K]")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"{RMS_NORM}: eps is {eps!r}, wanted a finite number of at least 0")
    if out is None:
        out = x.new_empty(x.shape, dtype=dtype)
    scale = _scales(x, out_scale)
    arguments = (x, weight, residual, out, scale, float(eps), impl)
    if config is None and registry.traced(x):
        _rms_norm_op(*arguments)
    else:
        _run_rms_norm(*arguments, config)
    return out, scale


def silu_mul_quantize(
    x: Tensor,
    *,
    dtype: torch.dtype = torch.int8,
    out: Tensor | None = None,
    out_scale: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """silu(gate) * up, quantised: what lies between a gated MLP's two products.

    x  [M, 2 K] bf16, fp16 or fp32, the gate in the first K columns; any row stride, contiguous last dimension

    y = gate / (1 + exp(-gate)) * up in float32, not rounded to 16 bits on the way. Returns y's values [M, K] in ``dtype``
    (int8 or float8_e4m3fn) and their float32 scale [M], as quantize_per_token would; y is about values * scale. A NaN
    stays in its own row. ``out`` and ``out_scale`` as there. Source: SwiGLU, Shazeer, arXiv 2002.05202.
    """
    if x.dim() != 2 or x.shape[1] % 2:
        raise ValueError(f"{SILU_MUL}: x's shape is {list(x.shape)}, wanted [M, 2 K]")
    if out is None:
        out = x.new_empty((x.shape[0], x.shape[1] // 2), dtype=dtype)
    scale = _scales(x, out_scale)
    if config is None and registry.traced(x):
        _silu_mul_op(x, out, scale, impl)
    else:
        _run_silu_mul(x, out, scale, impl, config)
    return out, scale


# ---------------------------------------------------------------- from a call to a plan


def _scales(x: Tensor, given: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], dtype=torch.float32) if given is None else given


def _run_quantize(x, out, scale, impl, config=None) -> None:
    tensors = (x, out, scale)
    key = call_key(tensors, (impl, config))
    plan = _QUANTIZE_PLANS.get(key)
    if plan is None:
        plan = _QUANTIZE_PLANS.put(key, make_plan(KERNELS, _quantize_signature(*tensors), impl, config))
    check.inference_only(QUANTIZE, x)
    if scale.numel():
        plan.launch(plan, *tensors)


def _run_rms_norm(x, weight, residual, out, scale, eps, impl, config=None) -> None:
    tensors = (x, weight, residual, out, scale)
    if residual is not None and x.numel() and residual.data_ptr() == x.data_ptr():
        raise ValueError(f"{RMS_NORM}: residual is x's memory, wanted memory of its own")
    key = call_key(tensors, (impl, config, eps))
    plan = _RMS_NORM_PLANS.get(key)
    if plan is None:
        plan = _RMS_NORM_PLANS.put(key, make_plan(RMS_NORM_KERNELS, _rms_norm_signature(*tensors, eps), impl, config))
    check.inference_only(RMS_NORM, x, weight, *(() if residual is None else (residual,)))
    if scale.numel():
        plan.launch(plan, *tensors)


def _run_silu_mul(x, out, scale, impl, config=None) -> None:
    tensors = (x, out, scale)
    key = call_key(tensors, (impl, config))
    plan = _SILU_MUL_PLANS.get(key)
    if plan is None:
        plan = _SILU_MUL_PLANS.put(key, make_plan(SILU_MUL_KERNELS, _silu_mul_signature(*tensors), impl, config))
    check.inference_only(SILU_MUL, x)
    if scale.numel():
        plan.launch(plan, *tensors)


def _bind(op: str, x: Tensor, out: Tensor, scale: Tensor, letters: str = "M K") -> check.Letters:
    c = check.Letters(op, x.device)
    c.tensor("x", x, letters, check.FLOATS)
    if letters != "M K":
        c.bind("K", x.shape[1] // 2, "half of x", 1)
    c.tensor("out", out, "M K", check.QUANTISED)
    if not out.is_contiguous():
        raise c.fail("out's layout", f"strides {out.stride()}", "contiguous")
    c.tensor("out_scale", scale, "M", (torch.float32,))
    for letter in "MK":
        c.fits(letter)
    return c


def _quantize_signature(x, out, scale) -> QuantSig:
    _bind(QUANTIZE, x, out, scale)
    return QuantSig(
        op=QUANTIZE, device=x.device, dtype=x.dtype, out_dtype=out.dtype, M=x.shape[0], K=x.shape[1], x_stride=x.stride(),
        aligned=check.aligned16(x) and not out.data_ptr() & 15,
    )  # fmt: skip


def _rms_norm_signature(x, weight, residual, out, scale, eps) -> RmsNormQuantSig:
    c = _bind(RMS_NORM, x, out, scale)
    c.tensor("weight", weight, "K", tuple(dict.fromkeys((x.dtype, torch.float32))))
    if residual is not None:
        c.tensor("residual", residual, "M K", (x.dtype,))
        if residual.shape[0] > 1 and residual.stride(0) < residual.shape[1]:
            raise c.fail("residual's row stride", residual.stride(0), "at least K (its rows are written)")
    return RmsNormQuantSig(
        op=RMS_NORM, device=x.device, dtype=x.dtype, weight_dtype=weight.dtype, out_dtype=out.dtype, M=x.shape[0],
        K=x.shape[1], x_stride=x.stride(), residual_stride=None if residual is None else residual.stride(), eps=eps,
        aligned=check.aligned16(x, weight, residual) and not out.data_ptr() & 15,
    )  # fmt: skip


def _silu_mul_signature(x, out, scale) -> SiluMulQuantSig:
    _bind(SILU_MUL, x, out, scale, "M 2K")
    return SiluMulQuantSig(
        op=SILU_MUL, device=x.device, dtype=x.dtype, out_dtype=out.dtype, M=x.shape[0], K=out.shape[1], x_stride=x.stride(),
        aligned=check.aligned16(x) and not out.data_ptr() & 15,
    )  # fmt: skip


_quantize_op = registry.define("quantize_per_token(Tensor x, Tensor(a!) out, Tensor(b!) scale, str? impl) -> ()", _run_quantize)
_rms_norm_op = registry.define(
    "rms_norm_quantize(Tensor x, Tensor weight, Tensor(a!)? residual, Tensor(b!) out, Tensor(c!) scale, float eps, str? impl)"
    " -> ()",
    _run_rms_norm,
)
_silu_mul_op = registry.define("silu_mul_quantize(Tensor x, Tensor(a!) out, Tensor(b!) scale, str? impl) -> ()", _run_silu_mul)


# ---------------------------------------------------------------- ideal work


def cost(M: int, K: int, x_bytes: int = 2) -> Cost:
    """x read once, the 8-bit copy and the scales written once."""
    return Cost(flops=2 * M * K, bytes=M * K * (x_bytes + 1) + 4 * M, kind="fp32")


def rms_norm_cost(M: int, K: int, x_bytes: int = 2, residual: bool = False) -> Cost:
    """x and the weight read once, the 8-bit copy and the scales written once; the residual read and written once."""
    rows = M * K * (x_bytes + 1 + (2 * x_bytes if residual else 0))
    return Cost(flops=(7 if residual else 6) * M * K, bytes=rows + K * x_bytes + 4 * M, kind="fp32")


def silu_mul_cost(M: int, K: int, x_bytes: int = 2) -> Cost:
    """Gate and up read once, the 8-bit copy and the scales written once."""
    return Cost(flops=6 * M * K, bytes=M * K * (2 * x_bytes + 1) + 4 * M, kind="fp32")
