"""PageTable, write_kv and merge_states: where keys and values live, and how partial answers join."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit import attention, check, registry, settings
from attnkit.backends import torch_ref
from attnkit.backends.cpu import cache as cpu_cache
from attnkit.backends.cuda import cache as cuda_cache
from attnkit.backends.triton import cache as triton_cache
from attnkit.backends.triton import decode as triton_decode
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.signature import MergeSig, WriteSig

WRITE, MERGE = "write_kv", "merge_states"
KERNELS = (cuda_cache.WRITE_KV, triton_cache.WRITE_KV, cpu_cache.WRITE_KV, torch_ref.WRITE_KV)
MERGE_KERNELS = (cuda_cache.MERGE, triton_decode.MERGE, cpu_cache.MERGE, torch_ref.MERGE)
_WRITE_PLANS = PlanCache()
_MERGE_PLANS = PlanCache()


class PageTable(NamedTuple):
    """Which pages hold each sequence.

    pages  [B, W] int32: page ids in order; entries at and beyond ceil(L / S) are never read
    lens   [B] int32: tokens in the cache, the ones being computed included
    """

    pages: Tensor
    lens: Tensor

    @classmethod
    def of_lengths(cls, lens: list[int], page_size: int, device: torch.device | str = "cpu") -> PageTable:
        """A table that gives each sequence its own run of pages, from page 0 on."""
        counts = [-(-n // page_size) for n in lens]
        pages = torch.full((len(lens), max([1, *counts])), -1, dtype=torch.int32)
        start = 0
        for b, count in enumerate(counts):
            pages[b, :count] = torch.arange(start, start + count, dtype=torch.int32)
            start += count
        return cls(pages.to(device), torch.tensor(lens, dtype=torch.int32, device=device))


def write_kv(
    k: Tensor,
    v: Tensor,
    kv: attention.KV,
    slots: Tensor,
    *,
    k_scale: float | Tensor | None = None,
    v_scale: float | Tensor | None = None,
    impl: str | None = None,
) -> None:
    """Put new keys and values into the cache, quantising where the cache is int8 or float8_e4m3fn.

    k, v    [T, Hkv, D] and [T, Hkv, Dv]; bf16, fp16 or fp32
    kv      the cache, as in paged_decode; k's dtype, int8 or float8_e4m3fn
    slots   [T] int64: page * S + offset; -1 skips a row (a padded row of a captured batch)
    k_scale, v_scale   a number, or float32 [] or [Hkv]: what is stored times this is the value

    int8 rounds half to even and clamps to +-127; e4m3 clamps to +-448. A slot given twice holds one of
    the two rows. Raises as paged_decode does; a slot outside the pool raises on the CPU and under
    ATTNKIT_DEBUG=1, and is skipped on a GPU otherwise.
    """
    k_cache, v_cache = attention.split_kv(WRITE, kv, k.shape[-1])
    heads = k.shape[1] if k.dim() == 3 else 1
    scales = []
    for name, given in (("k_scale", k_scale), ("v_scale", v_scale)):
        number, tensor = attention.fold_scale(WRITE, name, given, heads)
        if tensor is None and number != 1.0:
            tensor = torch.full((1,), number, dtype=torch.float32, device=k.device).expand(heads)
        scales.append(tensor)
    arguments = (k, v, k_cache, v_cache, slots, *scales, impl)
    (_write_op if registry.traced(k) else _run_write)(*arguments)


def _run_write(k, v, k_cache, v_cache, slots, k_scale, v_scale, impl) -> None:
    tensors = (k, v, k_cache, v_cache, slots, k_scale, v_scale)
    key = call_key(tensors, (impl,))
    plan = _WRITE_PLANS.get(key)
    if plan is None:
        plan = _WRITE_PLANS.put(key, make_plan(KERNELS, _write_signature(*tensors), impl))
    if settings.get().debug:
        check.slot_values(WRITE, slots, k_cache.shape[0] * k_cache.shape[1])
    if k.numel() or v.numel():
        plan.launch(plan, *tensors)


def _write_signature(k, v, k_cache, v_cache, slots, k_scale, v_scale) -> WriteSig:
    a = check.Letters(WRITE, k.device)
    a.tensor("k", k, "T Hkv D", check.FLOATS)
    a.tensor("v", v, "T Hkv Dv", (k.dtype,))
    a.tensor("kv", k_cache, "P S Hkv D", (k.dtype, *check.QUANTISED))
    a.tensor("kv", v_cache, "P S Hkv Dv", (k_cache.dtype,))
    a.tensor("slots", slots, "T", (torch.int64,))
    attention.check_scales(a, k_scale, v_scale, k_cache.dtype)
    n = a.size
    rows = n["D"] % 8 == 0 == n["Dv"] % 8 and check.multiples(8, k_cache, v_cache) and check.aligned16(k, v)
    aligned = rows and (k_cache.dtype.itemsize == 1 or check.aligned16(k_cache, v_cache))
    return WriteSig(
        op=WRITE, device=k.device, dtype=k.dtype, kv_dtype=k_cache.dtype, T=n["T"], Hkv=n["Hkv"], D=n["D"], Dv=n["Dv"],
        P=n["P"], S=n["S"], k_in_stride=k.stride(), v_in_stride=v.stride(), k_stride=k_cache.stride(),
        v_stride=v_cache.stride(), k_scale=k_scale is not None, v_scale=v_scale is not None, aligned=aligned,
    )  # fmt: skip


_write_op = registry.define(
    "write_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor slots, Tensor? k_scale, Tensor? v_scale,"
    " str? impl) -> ()",
    _run_write,
)


def merge_states(
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    *,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> tuple[Tensor, Tensor]:
    """Join two attentions of the same queries over disjoint keys (cascade and shared-prefix attention).

    out_a, out_b   [..., H, Dv], contiguous; lse_a, lse_b [..., H] float32, natural logarithms
    Returns (out, lse) as if both parts had been seen at once. A part whose lse is -inf has no say, whatever
    its out holds. Sinks belong to one of the two parts only.

    A prefix that a whole batch shares is read once this way: run it as one paged_prefill with B = 1 and
    causal=False over all the batch's queries, the rest as paged_decode, both with return_lse=True.
    """
    if out is None:
        out = torch.empty_like(out_a, memory_format=torch.contiguous_format)
    lse = torch.empty_like(lse_a, memory_format=torch.contiguous_format)
    if config is not None:
        raise ValueError(f"{MERGE}: takes no config, got {config!r}")
    (_merge_op if registry.traced(out_a) else _run_merge)(out_a, lse_a, out_b, lse_b, out, lse, impl)
    return out, lse


def _run_merge(out_a, lse_a, out_b, lse_b, out, lse, impl) -> None:
    tensors = (out_a, lse_a, out_b, lse_b, out, lse)
    key = call_key(tensors, (impl,))
    plan = _MERGE_PLANS.get(key)
    if plan is None:
        plan = _MERGE_PLANS.put(key, make_plan(MERGE_KERNELS, _merge_signature(*tensors), impl))
    if out.numel():
        rows, Dv = lse.numel(), out.shape[-1]
        flat = [t.view(rows, Dv) if i % 2 == 0 else t.view(rows) for i, t in enumerate(tensors)]
        plan.launch(plan, *flat)


def _merge_signature(out_a, lse_a, out_b, lse_b, out, lse) -> MergeSig:
    a = check.Letters(MERGE, out_a.device)
    letters = " ".join([*(f"n{i}" for i in range(out_a.dim() - 2)), "H", "Dv"])
    rows = letters.rsplit(" ", 1)[0]
    if out_a.dim() < 2:
        raise ValueError(f"{MERGE}: out_a's shape is {list(out_a.shape)}, wanted [..., H, Dv]")
    for name, t in (("out_a", out_a), ("out_b", out_b), ("out", out)):
        a.tensor(name, t, letters, check.FLOATS if name == "out_a" else (out_a.dtype,))
    for name, t in (("lse_a", lse_a), ("lse_b", lse_b), ("lse", lse)):
        a.tensor(name, t, rows, (torch.float32,))
    for name, t in (("out_a", out_a), ("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b), ("out", out)):
        if not t.is_contiguous():
            raise a.fail(f"{name}'s layout", f"strides {t.stride()}", "contiguous")
    aligned = check.aligned16(*(t.view(-1) for t in (out_a, out_b, out)))
    return MergeSig(op=MERGE, device=out.device, dtype=out.dtype, rows=lse.numel(), Dv=out.shape[-1], aligned=aligned)


_merge_op = registry.define(
    "merge_states(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b, Tensor(a!) out, Tensor(b!) lse, str? impl) -> ()",
    _run_merge,
)
