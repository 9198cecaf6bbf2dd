"""CUTLASS and the quantising kernels as vLLM builds them, and torch's products."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.roofline import product_rate
from attnkit.workload import Gemm, Inputs, Quantize
from attnkit.workload_quantize import QuantizedLinear, RmsNormQuantize, SiluMulQuantize
from perf.peers.base import Call, module, need


def cutlass(case: Gemm, x: Inputs) -> Call:
    ops = module("vllm._custom_ops")
    need(case.N % 16 == 0 and case.K % 16 == 0)
    a, w, bias = x["a"], x["w"].t(), x["bias"]
    scales = x["a_scale"][:, None], x["w_scale"][None, :]
    return lambda: ops.cutlass_scaled_mm(a, w, *scales, torch.bfloat16, bias)


def better_products(roof: dict[str, float], device: torch.device) -> dict[str, float]:
    """Where a peer multiplies large matrices faster than torch does, its rate is the roof."""
    if device.type != "cuda" or module("vllm._custom_ops") is None:
        return {}
    found = {}
    for kind in ("int8", "fp8"):
        case = Gemm(M=8192, N=8192, K=8192, dtype=kind)
        found[kind] = max(roof.get(kind, 0.0), product_rate(cutlass(case, case.build(device)), 8192, device))
    return found


def cutlass_quant(case: Quantize, x: Inputs) -> Call:
    return _vllm_quant(case.dtype, x["x"], torch.empty_like(x["out"]))


def _vllm_quant(dtype: str, data: Tensor, out: Tensor) -> Call:
    """A scale a row: scaled_int8_quant's kernel, or scaled_fp8_quant's."""
    scale = torch.empty(data.shape[0], 1, device=data.device)
    if dtype == "int8":
        return lambda: (torch.ops._C.dynamic_scaled_int8_quant(out, data, scale, None), (out, scale))[1]
    return lambda: (torch.ops._C.dynamic_per_token_scaled_fp8_quant(out, data, scale, None), (out, scale))[1]


def vllm_rms_norm_quant(case: RmsNormQuantize, x: Inputs) -> Call:
    """One kernel too: it adds the residual in place, and rounds the norm to 16 bits before it quantises."""
    data, weight, residual, out = x["x"], x["weight"], x["residual"], torch.empty_like(x["out"])
    scale = torch.empty(case.M, 1, device=data.device)

    def run() -> tuple[Tensor, Tensor]:
        torch.ops._C.rms_norm_dynamic_per_token_quant(out, data, weight, scale, case.eps, None, residual)
        return out, scale

    return run


def vllm_silu_mul_quant(case: SiluMulQuantize, x: Inputs) -> Call:
    """Two kernels: it has none that does both with a scale a token."""
    data, y = x["x"], torch.empty(case.M, case.K, dtype=x["x"].dtype, device=x["x"].device)
    quant = _vllm_quant(case.dtype, y, torch.empty_like(x["out"]))

    def run() -> tuple[Tensor, Tensor]:
        torch.ops._C.silu_and_mul(y, data)
        return quant()

    return run


def _torch_quant(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top = 127.0 if dtype == torch.int8 else 448.0
    scale = (y.abs().amax(1, keepdim=True).float() / top).clamp_(min=1e-30)
    scaled = y / scale
    return (scaled.round_() if dtype == torch.int8 else scaled).clamp_(-top, top).to(dtype), scale


def torch_fused(case: RmsNormQuantize | SiluMulQuantize, x: Inputs) -> Call:
    """The same in torch's own operations, one after another."""
    data, dtype, f = x["x"], x["out"].dtype, torch.nn.functional
    if isinstance(case, SiluMulQuantize):
        gate, up = data.chunk(2, 1)
        return lambda: _torch_quant(f.silu(gate) * up, dtype)
    weight, residual = x["weight"], x["residual"]
    return lambda: _torch_quant(
        f.rms_norm(data if residual is None else residual.add_(data), weight.shape, weight, case.eps), dtype
    )


def bf16_linear(case: QuantizedLinear, x: Inputs) -> Call:
    """What quantising is there to beat: the product of the bf16 values themselves."""
    data, dense = x["x"], x["dense"]
    return lambda: torch.nn.functional.linear(data, dense)


def torch_int_mm(case: Gemm, x: Inputs) -> Call:
    need(case.dtype == "int8" and (case.M > 16 or x["a"].device.type == "cpu") and not case.N % 8 and not case.K % 8)
    a, w, bias = x["a"], x["w"].t(), x["bias"]
    a_scale, w_scale = x["a_scale"][:, None], x["w_scale"][None, :]

    def run() -> Tensor:
        out = torch._int_mm(a, w) * a_scale * w_scale
        return (out if bias is None else out + bias).to(torch.bfloat16)

    return run


def torch_scaled_mm(case: Gemm, x: Inputs) -> Call:
    need(case.dtype == "fp8" and not case.bias and x["a"].device.type == "cuda")
    a, w = x["a"], x["w"].t()
    a_scale, w_scale = x["a_scale"][:, None], x["w_scale"][None, :]
    return lambda: torch._scaled_mm(a, w, scale_a=a_scale, scale_b=w_scale, out_dtype=torch.bfloat16)


def torch_linear(case: Gemm, x: Inputs) -> Call:
    """bf16 weights and activations of the same values: what quantising is meant to beat."""
    a = (x["a"].float() * x["a_scale"][:, None]).bfloat16()
    w = torch.empty(x["w"].shape, dtype=torch.bfloat16, device=a.device)
    for rows in range(0, w.shape[0], 4096):
        part = slice(rows, rows + 4096)
        w[part] = (x["w"][part].float() * x["w_scale"][part, None]).bfloat16()
    bias = x["bias"]
    return lambda: torch.nn.functional.linear(a, w, bias)
