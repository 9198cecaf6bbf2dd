"""w8a8_gemm: 8-bit matrix products with scales in the epilogue."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import check, registry
from attnkit.backends import torch_ref
from attnkit.backends.cpu import gemm as cpu_gemm
from attnkit.backends.cuda import gemm as cuda_gemm
from attnkit.backends.cuda import gemm_skinny as cuda_gemm_skinny
from attnkit.backends.triton import gemm as triton_gemm
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.roofline import Cost
from attnkit.signature import GemmSig

GEMM = "w8a8_gemm"
KERNELS = (cuda_gemm_skinny.W8A8_GEMM, cuda_gemm.W8A8_GEMM, triton_gemm.W8A8_GEMM, cpu_gemm.W8A8_GEMM, torch_ref.W8A8_GEMM)
_GEMM_PLANS = PlanCache()


def w8a8_gemm(
    a: Tensor,
    w: Tensor,
    a_scale: Tensor,
    w_scale: Tensor,
    *,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> Tensor:
    """(a . w^T) * a_scale * w_scale + bias, rounded once (SmoothQuant's W8A8 form).

    a        [M, K] int8 or float8_e4m3fn; any row stride, contiguous last dimension; M >= 0
    w        [N, K], a's dtype, likewise; as torch's Linear keeps its weight
    a_scale  float32 [M], [M, 1], or one value (per tensor)
    w_scale  float32 [N], [N, 1], or one value
    bias     [N] bf16, fp16 or fp32

    int8 accumulates exactly in int32, e4m3 in float32. Returns [M, N] in ``out_dtype`` (bf16, fp16 or fp32).
    Any M, N and K: no padding asked for. K up to 2^17 for int8, so that int32 cannot wrap.
    """
    if a.dim() != 2 or w.dim() != 2:
        raise ValueError(f"{GEMM}: a's shape is {list(a.shape)} and w's {list(w.shape)}, wanted [M, K] and [N, K]")
    if out is None:
        out = a.new_empty((a.shape[0], w.shape[0]), dtype=out_dtype)
    arguments = (a, w, _flat_scale("a_scale", a_scale), _flat_scale("w_scale", w_scale), bias, out)
    if config is None and registry.traced(a):
        _gemm_op(*arguments, impl)
    else:
        _run_gemm(*arguments, impl, config)
    return out


def _flat_scale(name: str, scale: Tensor) -> Tensor:
    """[M], [M, 1], [] and [1] alike as one dimension."""
    if not isinstance(scale, Tensor):
        raise TypeError(f"{GEMM}: {name} is {type(scale).__name__}, wanted a float32 tensor")
    return scale if scale.dim() == 1 else scale.reshape(-1)


def _run_gemm(a, w, a_scale, w_scale, bias, out, impl, config=None) -> None:
    tensors = (a, w, a_scale, w_scale, bias, out)
    key = call_key(tensors, (impl, config))
    plan = _GEMM_PLANS.get(key)
    if plan is None:
        plan = _GEMM_PLANS.put(key, make_plan(KERNELS, _gemm_signature(*tensors), impl, config))
    if out.numel():
        plan.launch(plan, *tensors)


def _gemm_signature(a, w, a_scale, w_scale, bias, out) -> GemmSig:
    c = check.Letters(GEMM, a.device)
    c.tensor("a", a, "M K", check.QUANTISED)
    c.tensor("w", w, "N K", (a.dtype,))
    n = c.size
    for letter, name, s in (("M", "a_scale", a_scale), ("N", "w_scale", w_scale)):
        if s.numel() == 1 and n[letter] != 1:
            c.tensor(name, s, "1", (torch.float32,))
        else:
            c.tensor(name, s, letter, (torch.float32,))
    if bias is not None:
        c.tensor("bias", bias, "N", check.FLOATS)
    c.tensor("out", out, "M N", check.FLOATS)
    for letter in "MNK":
        c.fits(letter)
    if a.dtype == torch.int8 and n["K"] > 1 << 17:
        raise c.fail("K", n["K"], f"at most {1 << 17} (int8 products in int32)")
    return GemmSig(
        op=GEMM, device=a.device, dtype=a.dtype, out_dtype=out.dtype, M=n["M"], N=n["N"], K=n["K"], a_stride=a.stride(),
        w_stride=w.stride(), out_stride=out.stride(), operands_aligned=check.aligned16(a, w),
        aligned=check.aligned16(a, w, out), a_scale_per_token=a_scale.numel() != 1,
        w_scale_per_channel=w_scale.numel() != 1, bias=None if bias is None else bias.dtype,
    )  # fmt: skip


_gemm_op = registry.define(
    "w8a8_gemm(Tensor a, Tensor w, Tensor a_scale, Tensor w_scale, Tensor? bias, Tensor(a!) out, str? impl) -> ()",
    _run_gemm,
)


def cost(M: int, N: int, K: int, out_bytes: int = 2, kind: str = "int8") -> Cost:
    """Ideal work of one product: both operands and the scales read once, the output written once."""
    return Cost(flops=2 * M * N * K, bytes=M * K + N * K + 4 * (M + N) + M * N * out_bytes, kind=kind)
