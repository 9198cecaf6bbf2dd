"""w8a8_gemm on the CPU: csrc/cpu/gemm*.

int8 runs on VNNI dot products (AVX-512), else widened to int16, and is exact; e4m3 is widened to bf16 (AVX-512 with
bf16 dot products) or float32 on the way and accumulates in float32. A row's bits do not depend on M or its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.backends.cpu import native
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import GemmSig

#: The sum of K products of two int8 stays within int32.
MAX_K = 1 << 17


def _gemm_supports(sig: GemmSig) -> str | None:
    if sig.dtype not in native.QUANTISED:
        return f"a's dtype is {sig.dtype}, wanted int8 or float8_e4m3fn"
    if sig.out_dtype not in native.FLOATS:
        return f"out's dtype is {sig.out_dtype}, wanted float32, bfloat16 or float16"
    if sig.bias is not None and sig.bias not in native.FLOATS:
        return f"bias's dtype is {sig.bias}, wanted float32, bfloat16 or float16"
    if sig.dtype == torch.int8 and sig.K > MAX_K:
        return f"K is {sig.K}, wanted at most {MAX_K} (int32 sums)"
    return native.unsupported(sig.device)


def _gemm(plan: Plan, a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    sig: GemmSig = plan.sig
    native.module().cpu_w8a8_gemm(
        native.CODES[a.dtype], native.CODES[out.dtype], 0 if bias is None else native.CODES[bias.dtype],
        sig.M, sig.N, sig.K, a.data_ptr(), a.stride(0), w.data_ptr(), w.stride(0),
        a_scale.data_ptr(), int(sig.a_scale_per_token), w_scale.data_ptr(), int(sig.w_scale_per_channel),
        native.address(bias), out.data_ptr(), out.stride(0), native.threads(), native.isa,
    )  # fmt: skip


W8A8_GEMM = Kernel("cpu", "cpu", _gemm_supports, _gemm)
