"""Attention on the CPU: csrc/cpu/attention*, picked at run time for AVX-512 with BF16, AVX2 or the baseline.

Every op is the same kernel: rows of queries that share a KV head, over tiles of keys read through the page table.
KV is split into chunks by the sequence's own length and query count, so ``batch_invariant`` always holds. lens, page
ids and cumulative offsets are checked before anything is written, and a bad one raises ValueError naming its place.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from attnkit import settings
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import AttentionSig, MlaSig, RaggedSig

_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
_LATENT8 = 5
_MAX_HEAD = 576

#: Which build to run, of ``attnkit._C.cpu_attention_isas()``; empty is the best. Tests set it.
isa = ""


def _supports(device: torch.device, q: torch.dtype, kv: torch.dtype, D: int, Dv: int, Q: int) -> str | None:
    if device.type != "cpu":
        return f"device is {device}, wanted cpu"
    if q not in (torch.float32, torch.bfloat16, torch.float16):
        return f"q's dtype is {q}, wanted float32, bfloat16 or float16"
    if kv not in (q, torch.int8, torch.float8_e4m3fn):
        return f"kv's dtype is {kv}, wanted {q}, torch.int8 or torch.float8_e4m3fn"
    for letter, size in (("D", D), ("Dv", Dv)):
        if size % 8 or not 8 <= size <= _MAX_HEAD:
            return f"{letter} is {size}, wanted a multiple of 8 from 8 to {_MAX_HEAD}"
    if Q > 16:
        return f"Q is {Q}, wanted at most 16 query tokens"
    return None


def _paged_supports(sig: AttentionSig) -> str | None:
    return _supports(sig.device, sig.q_dtype, sig.kv_dtype, sig.D, sig.Dv, sig.Q)


def _mla_supports(sig: MlaSig) -> str | None:
    kv = sig.q_dtype if sig.kv_dtype == torch.uint8 else sig.kv_dtype
    return _supports(sig.device, sig.q_dtype, kv, sig.C + sig.R, sig.C, sig.Q)


def _ragged_supports(sig: RaggedSig) -> str | None:
    return _supports(sig.device, sig.dtype, sig.dtype, sig.D, sig.Dv, 0)


def _kernel(sig: Any, sizes: list[int], strides: list[tuple[int, ...]], **options: Any) -> Any:
    """The C++ object that holds what a signature fixes. sizes: B T Q Hq Hkv D Dv P S W; strides: q, k, v, out."""
    compiled: Any = import_module("attnkit._C")
    return compiled.CpuAttention(
        op=sig.op, sizes=sizes, strides=strides, scale=sig.scale, causal=sig.causal, window=sig.window, softcap=sig.softcap,
        **options,
    )  # fmt: skip


def _paged_kernel(sig: AttentionSig) -> Any:
    q, out = (s if sig.Q else (0, *s) for s in (sig.q_stride, sig.out_stride))
    return _kernel(
        sig, [sig.B, sig.T, sig.Q, sig.Hq, sig.Hkv, sig.D, sig.Dv, sig.P, sig.S, sig.W],
        [q[:3], sig.k_stride[:3], sig.v_stride[:3], out[:3]],
        q_type=_CODES[sig.q_dtype], kv_type=_CODES[sig.kv_dtype], pages_stride=sig.pages_stride, out_scale=sig.out_scale,
        values_in_keys=False,
    )  # fmt: skip


def _mla_kernel(sig: MlaSig) -> Any:
    kv = (*sig.kv_stride[:2], 0)
    return _kernel(
        sig, [sig.B, sig.B * sig.Q, sig.Q, sig.H, 1, sig.C + sig.R, sig.C, sig.P, sig.S, sig.W],
        [sig.q_stride[:3], kv, kv, sig.out_stride[:3]],
        q_type=_CODES[sig.q_dtype], kv_type=_CODES.get(sig.kv_dtype, _LATENT8), pages_stride=sig.pages_stride, out_scale=1.0,
        values_in_keys=True,
    )  # fmt: skip


def _ragged_kernel(sig: RaggedSig) -> Any:
    q, k, v, out = ((0, *s[:2]) for s in (sig.q_stride, sig.k_stride, sig.v_stride, sig.out_stride))
    code = _CODES[sig.dtype]
    return _kernel(
        sig, [sig.B, sig.T, 0, sig.H, sig.Hk, sig.D, sig.Dv, 1, 0, 0], [q, k, v, out],
        q_type=code, kv_type=code, pages_stride=0, out_scale=1.0, values_in_keys=False,
    )  # fmt: skip


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()


def _run(kernel: Any, q: Tensor, k: Tensor, v: Tensor, pages: Tensor | None, lens: Tensor | None, cu_q: Tensor | None,
         cu_k: Tensor | None, sinks: Tensor | None, k_scale: Tensor | None, v_scale: Tensor | None, tree_mask: Tensor | None,
         out: Tensor, lse: Tensor | None) -> None:  # fmt: skip
    if sinks is not None:
        sinks = sinks.float()
    tree_stride = (0, 0, 0) if tree_mask is None else tree_mask.stride()
    threads = settings.get().threads or torch.get_num_threads()
    kernel(
        q.data_ptr(), k.data_ptr(), v.data_ptr(), _address(pages), _address(lens), _address(cu_q), _address(cu_k),
        k.shape[0], _address(sinks), _address(k_scale), 0 if k_scale is None else k_scale.stride(0), _address(v_scale),
        0 if v_scale is None else v_scale.stride(0), _address(tree_mask), tree_stride, out.data_ptr(), _address(lse),
        threads, isa,
    )  # fmt: skip


def _launch_prefill(plan: Plan, q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse) -> None:
    kernel = plan.state.get("kernel") or plan.state.setdefault("kernel", _paged_kernel(plan.sig))
    _run(kernel, q, k, v, pages, lens, cu_q, None, sinks, k_scale, v_scale, None, out, lse)


def _launch_decode(plan: Plan, q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse) -> None:
    kernel = plan.state.get("kernel") or plan.state.setdefault("kernel", _paged_kernel(plan.sig))
    _run(kernel, q, k, v, pages, lens, None, None, sinks, k_scale, v_scale, tree_mask, out, lse)


def _launch_mla_decode(plan: Plan, q, kv, pages, lens, sinks, tree_mask, out, lse) -> None:
    kernel = plan.state.get("kernel") or plan.state.setdefault("kernel", _mla_kernel(plan.sig))
    _run(kernel, q, kv, kv, pages, lens, None, None, sinks, None, None, tree_mask, out, lse)


def _launch_mla_prefill(plan: Plan, q, k, v, cu_q, cu_k, sinks, out, lse) -> None:
    kernel = plan.state.get("kernel") or plan.state.setdefault("kernel", _ragged_kernel(plan.sig))
    _run(kernel, q, k, v, None, None, cu_q, cu_k, sinks, None, None, None, out, lse)


PAGED_PREFILL = Kernel("cpu", "cpu", _paged_supports, _launch_prefill)
PAGED_DECODE = Kernel("cpu", "cpu", _paged_supports, _launch_decode)
MLA_DECODE = Kernel("cpu", "cpu", _mla_supports, _launch_mla_decode)
MLA_PREFILL = Kernel("cpu", "cpu", _ragged_supports, _launch_mla_prefill)
