"""paged_decode: a few new tokens a sequence against a paged cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import attention, check, registry, settings
from attnkit.backends import flashinfer, torch_ref
from attnkit.backends.cpu import attention as cpu_attention
from attnkit.backends.cuda import decode as cuda_decode
from attnkit.backends.triton import decode as triton_decode
from attnkit.cache import PageTable
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.roofline import Cost

OP = "paged_decode"
KERNELS = (
    cuda_decode.PAGED_DECODE,
    triton_decode.PAGED_DECODE,
    flashinfer.PAGED_DECODE,
    cpu_attention.PAGED_DECODE,
    torch_ref.PAGED_DECODE,
)
MAX_QUERIES = 16
_PLANS = PlanCache()


def paged_decode(
    q: Tensor,
    kv: attention.KV,
    table: PageTable,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    tree_mask: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest tokens of each sequence over its pages (split over KV: Flash-Decoding).

    q                [B, Hq, D], or [B, Q, Hq, D] for Q = 1 to 16 new tokens a sequence (they see each other
                     causally); bf16, fp16 or fp32
    kv               [P, 2, S, Hkv, D], or a pair of [P, S, Hkv, D] and [P, S, Hkv, Dv]; q's dtype, int8 or
                     float8_e4m3fn; any strides with a contiguous last dimension; S a power of two up to 256
    table            PageTable(pages [B, W] int32, lens [B] int32); lens counts the new tokens too
    scale            factor on q.k (default 1 / sqrt(D))
    window           keys a query sees, itself included
    softcap          s -> softcap * tanh(s / softcap)
    sinks            [Hq] float32 or q's dtype: a logit that takes probability and gives no value
    k_scale, v_scale a number, or float32 [] or [Hkv]: what an int8 or e4m3 cache is multiplied by
    tree_mask        bool [Q, Q] or [B, Q, Q]: which new token (column) a new token (row) sees
    return_lse       also return the log-sum-exp of the scores (natural, float32, q's shape without D)
    batch_invariant  a sequence's bits do not depend on the rest of the batch

    Returns q's shape with D replaced by Dv, in q's dtype. A sequence with lens 0 gives 0 and lse -inf.
    Nothing on the host depends on lens: a captured CUDA graph replays with other lengths.

    Raises ValueError or TypeError for shapes, dtypes, devices and strides that do not fit, before anything
    is launched; under ATTNKIT_DEBUG=1 also for lens and page ids outside the table and the pool.
    """
    k, v = (kv, None) if isinstance(kv, Tensor) and kv.dim() == 5 else attention.split_kv(OP, kv, q.shape[-1])
    pages, lens = table
    shape = q.shape
    if len(shape) not in (3, 4):
        raise ValueError(f"{OP}: q's shape is {list(shape)}, wanted [B, Hq, D] or [B, Q, Hq, D]")
    fresh = out is None
    if out is None:
        Dv = (k if v is None else v).shape[-1]
        # the same, and half the time
        out = torch.empty_like(q) if Dv == shape[-1] and q.is_contiguous() else q.new_empty((*shape[:-1], Dv))
    lse = q.new_empty(shape[:-1], dtype=torch.float32) if return_lse else None
    if tree_mask is not None and tree_mask.dim() == 2:
        tree_mask = tree_mask.expand(shape[0], -1, -1)
    if window is not None or softcap != 0:
        window, softcap = attention.options(OP, window, softcap)
    else:
        window, softcap = 0, 0.0
    k_factor, v_factor = 1.0, 1.0
    if k_scale is not None:
        k_factor, k_scale = attention.fold_scale(OP, "k_scale", k_scale, k.shape[-2])
    if v_scale is not None:
        v_factor, v_scale = attention.fold_scale(OP, "v_scale", v_scale, k.shape[-2])
    if scale is not None or k_factor != 1.0:
        scale = attention.softmax_scale(OP, scale, shape[-1] ** -0.5) * k_factor
    static = (scale, v_factor, window, softcap, batch_invariant, impl)
    if config is None and registry.traced(q):
        k, v = attention.split_kv(OP, kv, shape[-1])
        _op(q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse, *static)
    else:
        _run(q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse, *static, config, fresh)
    return out if lse is None else (out, lse)


def _run(q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse,
         scale, out_scale, window, softcap, batch_invariant, impl, config=None, fresh=False) -> None:  # fmt: skip
    """``k`` may be the whole cache and ``v`` None: two views would take 2 us. ``fresh``: out is as the op makes it."""
    static = (scale, out_scale, window, softcap, batch_invariant, impl, config)
    shapes = (q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, None if fresh else out, lse)
    key = call_key(shapes, static)
    plan = _PLANS.get(key)
    if plan is None:
        tensors = _views(q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse)
        plan = _PLANS.put(key, make_plan(KERNELS, _signature(tensors, static), impl, config))
    check.inference_only(OP, q, k, v)
    if settings.get().debug:
        check.table_values(OP, pages, lens, plan.sig.P, plan.sig.S)
    if not out.numel():
        return
    if plan.kernel.impl == "cuda":  # which takes addresses, and strides from the signature
        plan.launch(plan, q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse)
    else:
        plan.launch(plan, *_views(q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse))


def _views(q, k, v, *others_out_lse):
    """The tensors as kernels name their dimensions: keys and values apart, q, out and lse with the dimension Q."""
    if v is None:
        k, v = attention.split_kv(OP, k, q.shape[-1])
    if q.dim() == 4:
        return (q, k, v, *others_out_lse)
    *others, out, lse = others_out_lse
    return (q.unsqueeze(1), k, v, *others, out.unsqueeze(1), None if lse is None else lse.unsqueeze(1))


def _signature(tensors, static):
    q, tree_mask = tensors[0], tensors[8]
    scale, out_scale, window, softcap, batch_invariant, _, _ = static
    if scale is None:
        scale = tensors[0].shape[-1] ** -0.5
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(f"{OP}: Q is {q.shape[1]} in q, wanted 1 to {MAX_QUERIES} query tokens (more is paged_prefill's work)")
    if tree_mask is not None and tree_mask.dim() != 3:
        raise ValueError(f"{OP}: tree_mask's shape is {list(tree_mask.shape)}, wanted [Q, Q] or [B, Q, Q]")
    return attention.signature(
        OP, *tensors, q_letters="B Q Hq D", scale=scale, out_scale=out_scale, causal=True, window=window,
        softcap=softcap, batch_invariant=batch_invariant,
    )  # fmt: skip


_op = registry.define(
    "paged_decode(Tensor q, Tensor k, Tensor v, Tensor pages, Tensor lens, Tensor? sinks, Tensor? k_scale, Tensor? v_scale,"
    " Tensor? tree_mask, Tensor(a!) out, Tensor(b!)? lse, float? scale, float out_scale, int window, float softcap,"
    " bool batch_invariant, str? impl) -> ()",
    _run,
)


def cost(lens: list[int], Q: int, Hq: int, Hkv: int, D: int, Dv: int, kv_bytes: int, q_bytes: int, window: int = 0) -> Cost:
    """Ideal work of one call: each visible key and value read once, q once, out written once."""
    seen = [min(n, window + Q - 1) if window else n for n in lens]
    tokens = sum(seen)
    flops = 2 * Q * Hq * (D + Dv) * tokens
    moved = tokens * Hkv * (D + Dv) * kv_bytes + len(lens) * Q * Hq * (D + Dv) * q_bytes
    return Cost(flops=flops, bytes=moved, kind="bf16")
