"""paged_prefill: ragged batches of new tokens against a paged cache that already holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import attention, check, registry, settings
from attnkit.backends import flashinfer, torch_ref
from attnkit.backends.cpu import attention as cpu_attention
from attnkit.backends.cuda import prefill as cuda_prefill
from attnkit.backends.cuda import prefill_q8 as cuda_prefill_q8
from attnkit.backends.triton import prefill as triton_prefill
from attnkit.cache import PageTable
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.roofline import Cost

OP = "paged_prefill"
KERNELS = (
    cuda_prefill.PAGED_PREFILL,
    cuda_prefill_q8.PAGED_PREFILL,
    triton_prefill.PAGED_PREFILL,
    flashinfer.PAGED_PREFILL,
    cpu_attention.PAGED_PREFILL,
    torch_ref.PAGED_PREFILL,
)
_PLANS = PlanCache()


def paged_prefill(
    q: Tensor,
    kv: attention.KV,
    table: PageTable,
    cu_q: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of ragged query tokens over their sequences' pages (FlashAttention, paged).

    q       [T, Hq, D]: the sequences' new tokens one after another; bf16, fp16 or fp32
    cu_q    [B + 1] int32: sequence b owns rows cu_q[b] to cu_q[b + 1]; rows at and beyond cu_q[B] give 0
    causal  aligned to the end: a sequence's last query sees all its L keys, so a chunk of a long prompt and
            a prompt with a cached prefix need nothing special

    kv, table, scale, window, softcap, sinks, k_scale, v_scale, return_lse and batch_invariant are as in
    paged_decode; without causal, window = w lets a query see keys less than w away on both sides.

    Returns [T, Hq, Dv] in q's dtype (and lse [T, Hq] float32). A query with no visible key gives 0 and -inf.
    Raises as paged_decode does.
    """
    k, v = attention.split_kv(OP, kv, q.shape[-1])
    pages, lens = table
    if out is None:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else None
    window, softcap = attention.options(OP, window, softcap)
    k_factor, k_scale = attention.fold_scale(OP, "k_scale", k_scale, k.shape[2])
    v_factor, v_scale = attention.fold_scale(OP, "v_scale", v_scale, k.shape[2])
    scale = attention.softmax_scale(OP, scale, q.shape[-1] ** -0.5) * k_factor
    arguments = (q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse)
    static = (scale, v_factor, causal, window, softcap, batch_invariant, impl)
    if config is None and registry.traced(q):
        _op(*arguments, *static)
    else:
        _run(*arguments, *static, config)
    return out if lse is None else (out, lse)


def _run(q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse,
         scale, out_scale, causal, window, softcap, batch_invariant, impl, config=None) -> None:  # fmt: skip
    tensors = (q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse)
    static = (scale, out_scale, causal, window, softcap, batch_invariant, impl, config)
    key = call_key(tensors, static)
    plan = _PLANS.get(key)
    if plan is None:
        sig = _signature(tensors, static)
        plan = _PLANS.put(key, make_plan(KERNELS, sig, impl, config))
    check.inference_only(OP, q, k, v)
    if settings.get().debug:
        check.table_values(OP, pages, lens, k.shape[0], k.shape[1])
        check.cumulative_values(OP, "cu_q", cu_q, q.shape[0])
    if out.numel():
        plan.launch(plan, *tensors)


def _signature(tensors, static):
    q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse = tensors
    scale, out_scale, causal, window, softcap, batch_invariant, _, _ = static

    def ragged(a: check.Letters) -> None:
        a.tensor("cu_q", cu_q, "B+1", (torch.int32,))
        a.bind("B", a.size["B+1"] - 1, "cu_q (less one)")

    return attention.signature(
        OP, q, k, v, pages, lens, sinks, k_scale, v_scale, None, out, lse, q_letters="T Hq D", scale=scale,
        out_scale=out_scale, causal=causal, window=window, softcap=softcap, batch_invariant=batch_invariant, extra=ragged,
    )  # fmt: skip


_op = registry.define(
    "paged_prefill(Tensor q, Tensor k, Tensor v, Tensor pages, Tensor lens, Tensor cu_q, Tensor? sinks, Tensor? k_scale,"
    " Tensor? v_scale, Tensor(a!) out, Tensor(b!)? lse, float scale, float out_scale, bool causal, int window, float softcap,"
    " bool batch_invariant, str? impl) -> ()",
    _run,
)


def visible_pairs(n: int, L: int, causal: bool = True, window: int = 0) -> int:
    """How many (query, key) pairs of one sequence count: n queries at the end of L keys."""
    total = 0
    full = min(L, window) if window else L
    if not causal:
        return n * full
    first = L - n + 1  # keys the first query sees
    if window:
        short = max(0, min(n, full - first + 1)) if first < full else 0
        total = short * first + short * (short - 1) // 2
        return total + (n - short) * full
    return n * first + n * (n - 1) // 2


def cost(
    q_lens: list[int], lens: list[int], Hq: int, Hkv: int, D: int, Dv: int, kv_bytes: int, q_bytes: int,
    causal: bool = True, window: int = 0,
) -> Cost:  # fmt: skip
    """Ideal work of one call: the visible pairs' flops; q and the visible keys read once, out written once."""
    pairs = sum(visible_pairs(n, L, causal, window) for n, L in zip(q_lens, lens))
    keys = sum(min(L, window + n - 1) if window else L for n, L in zip(q_lens, lens))
    moved = keys * Hkv * (D + Dv) * kv_bytes + sum(q_lens) * Hq * (D + Dv) * q_bytes
    return Cost(flops=2 * Hq * (D + Dv) * pairs, bytes=moved, kind="bf16")
