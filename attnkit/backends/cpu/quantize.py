"""quantize_per_token and its fused forms on the CPU: csrc/cpu/gemm*. A row's bits do not depend on M or its place."""

from __future__ import annotations

from torch import Tensor

from attnkit.backends.cpu import native
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import QuantSig, RmsNormQuantSig, SiluMulQuantSig


def _supports(sig: QuantSig | RmsNormQuantSig | SiluMulQuantSig) -> str | None:
    if sig.dtype not in native.FLOATS:
        return f"x's dtype is {sig.dtype}, wanted float32, bfloat16 or float16"
    if sig.out_dtype not in native.QUANTISED:
        return f"out's dtype is {sig.out_dtype}, wanted int8 or float8_e4m3fn"
    return native.unsupported(sig.device)


def _quantize(plan: Plan, x: Tensor, out: Tensor, scale: Tensor) -> None:
    native.module().cpu_quantize_per_token(
        native.CODES[x.dtype], native.CODES[out.dtype], *x.shape, x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0),
        scale.data_ptr(), native.threads(), native.isa,
    )  # fmt: skip


def _rms_norm_quantize(plan: Plan, x: Tensor, weight: Tensor, residual: Tensor | None, out: Tensor, scale: Tensor) -> None:
    native.module().cpu_rms_norm_quantize(
        native.CODES[x.dtype], native.CODES[weight.dtype], native.CODES[out.dtype], *x.shape, x.data_ptr(), x.stride(0),
        weight.data_ptr(), native.address(residual), 0 if residual is None else residual.stride(0), out.data_ptr(),
        out.stride(0), scale.data_ptr(), plan.sig.eps, native.threads(), native.isa,
    )  # fmt: skip


def _silu_mul_quantize(plan: Plan, x: Tensor, out: Tensor, scale: Tensor) -> None:
    native.module().cpu_silu_mul_quantize(
        native.CODES[x.dtype], native.CODES[out.dtype], *out.shape, x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0),
        scale.data_ptr(), native.threads(), native.isa,
    )  # fmt: skip


QUANTIZE = Kernel("cpu", "cpu", _supports, _quantize)
RMS_NORM_QUANTIZE = Kernel("cpu", "cpu", _supports, _rms_norm_quantize)
SILU_MUL_QUANTIZE = Kernel("cpu", "cpu", _supports, _silu_mul_quantize)
