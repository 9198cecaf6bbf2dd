"""impl="flashinfer": FlashInfer's paged kernels behind the same call, where that package is installed.

Its wrappers want a plan made from lens on the host, so a call synchronises and cannot be captured. It
stands behind attnkit's own kernels and serves when they decline, or when ``impl=`` asks for it.
"""

from __future__ import annotations

import math
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from attnkit.dispatch import Kernel, Plan
from attnkit.signature import AttentionSig

WORKSPACE_BYTES = 128 << 20


@cache
def _installed() -> bool:
    return find_spec("flashinfer") is not None


@cache
def _workspace(device: torch.device) -> Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _supports(sig: AttentionSig) -> str | None:
    if not _installed():
        return "flashinfer-python is not installed"
    if sig.device.type != "cuda":
        return f"needs a CUDA device, got {sig.device}"
    if sig.q_dtype == torch.float32 or sig.kv_dtype != sig.q_dtype:
        return f"needs bf16 or fp16 for q and kv alike, got {sig.q_dtype} and {sig.kv_dtype}"
    if sig.D != sig.Dv or sig.D not in (64, 128, 256):
        return f"D and Dv must be 64, 128 or 256 alike, got {sig.D} and {sig.Dv}"
    if sig.sinks is not None or sig.tree_mask or sig.batch_invariant:
        return "takes no sinks, tree mask or batch_invariant here"
    if sig.Q > 1:
        return f"decodes one query token a sequence, got Q = {sig.Q}"
    if sig.k_stride != sig.v_stride:
        return "k and v must have the same strides"
    if sig.window and not sig.causal:
        return "takes a window only with causal"
    return None


def _ragged_pages(pages: Tensor, lens: Tensor, page_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The table as indptr, indices and last_page_len (a sequence of length 0 has no page)."""
    counts = (lens + page_size - 1) // page_size
    indptr = torch.zeros(len(lens) + 1, dtype=torch.int32, device=lens.device)
    indptr[1:] = counts.cumsum(0)
    used = torch.arange(pages.shape[1], device=pages.device) < counts[:, None]
    return indptr, pages[used], (lens - (counts - 1).clamp(min=0) * page_size).int()


def _finish(sig: AttentionSig, result: Any, out: Tensor, lse: Tensor | None) -> None:
    values, log2 = result
    out.copy_((values * sig.out_scale if sig.out_scale != 1.0 else values).view(out.shape))
    if lse is not None:
        lse.copy_((log2 * math.log(2)).view(lse.shape))


def _decode(plan: Plan, q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse) -> None:
    import flashinfer

    sig = plan.sig
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(sig.device), "NHD", use_tensor_cores=True)
    indptr, indices, last = _ragged_pages(pages, lens, sig.S)
    wrapper.plan(
        indptr, indices, last, sig.Hq, sig.Hkv, sig.D, sig.S, window_left=sig.window - 1, logits_soft_cap=sig.softcap or None,
        q_data_type=sig.q_dtype, kv_data_type=sig.kv_dtype, sm_scale=sig.scale,
    )  # fmt: skip
    _finish(sig, wrapper.run(q.flatten(0, 1).contiguous(), (k, v), return_lse=True), out, lse)


def _prefill(plan: Plan, q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse) -> None:
    import flashinfer

    sig = plan.sig
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(sig.device), "NHD", backend="fa2")
    indptr, indices, last = _ragged_pages(pages, lens, sig.S)
    wrapper.plan(
        cu_q, indptr, indices, last, sig.Hq, sig.Hkv, sig.D, sig.S, causal=sig.causal, window_left=sig.window - 1,
        logits_soft_cap=sig.softcap or None, q_data_type=sig.q_dtype, kv_data_type=sig.kv_dtype, sm_scale=sig.scale,
    )  # fmt: skip
    out.zero_()
    if lse is not None:
        lse.fill_(-math.inf)
    real = int(cu_q[-1])
    rows = None if lse is None else lse[:real]
    _finish(sig, wrapper.run(q[:real].contiguous(), (k, v), return_lse=True), out[:real], rows)


PAGED_DECODE = Kernel("flashinfer", "flashinfer", _supports, _decode)
PAGED_PREFILL = Kernel("flashinfer", "flashinfer", _supports, _prefill)
