"""Ends of a softmax: normalising one, combining the partial ones of a split, merging two finished ones."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .tiles import LN2, LOG2E, device_function, loop, narrow, store_tile, widen


@device_function
def finish(m, l, sinks, head, ok):
    """(weight, lse) of rows with maximum ``m`` (log2 units) and sum ``l``; the sink joins the denominator.

    Rows without any key and sink: weight 0, lse -inf.
    """
    keep = l * 0.0 + 1.0
    if sinks is not None:
        sink = widen(tl.load(sinks + head, mask=ok, other=0.0)) * LOG2E
        top = tl.maximum(m, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        keep = tl.exp2(m - base)
        l = l * keep + tl.exp2(sink - base)
    else:
        base = tl.where(m == float("-inf"), 0.0, m)
    none = l == 0.0
    full = tl.where(none, 1.0, l)
    return tl.where(none, 0.0, keep / full), tl.where(none, float("-inf"), (base + tl.log2(full)) * LN2)


@device_function
def store_rows(
    acc0, acc1, m, l, rows, ok, gain, sinks, sink_at, lse, lse_at, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr
):
    """Finish an accumulator and write it to the output rows at pointers ``rows`` (and lse, where asked)."""
    weight, total = finish(m, l, sinks, sink_at, ok)
    weight = weight * gain
    dtype: tl.constexpr = rows.dtype.element_ty
    store_tile(rows, narrow(acc0 * weight[:, None], dtype), DV, 0, DV0, ok)
    if DV1 > 0:
        store_tile(rows, narrow(acc1 * weight[:, None], dtype), DV, DV0, DV1, ok)
    if lse is not None:
        tl.store(lse + lse_at, total, mask=ok)


@device_function
def store_part(parts, slot, acc0, acc1, m, l, ok, BM: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr):
    """Write one partial softmax to its slot: [BM, DV0 + DV1] sums, then [BM] maxima and [BM] denominators, float32."""
    r = tl.arange(0, BM)
    at = parts + slot.to(tl.int64) * (BM * (DV0 + DV1 + 2))
    rows = at + r * (DV0 + DV1)
    store_tile(rows, acc0, DV0 + DV1, 0, DV0, ok)
    if DV1 > 0:
        store_tile(rows, acc1, DV0 + DV1, DV0, DV1, ok)
    tl.store(at + BM * (DV0 + DV1) + r, m, mask=ok)
    tl.store(at + BM * (DV0 + DV1 + 1) + r, l, mask=ok)


@device_function
def combine_parts(
    parts, first, origin, step, n, r, col, ok, rows, gain, sinks, sink_at, lse, lse_at,
    DV: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, RB: tl.constexpr, CW: tl.constexpr, ZB: tl.constexpr,
):  # fmt: skip
    """Write CW columns from ``col`` on of the RB tile rows ``r``: the softmax over ``n`` parts.

    The parts lie in slot ``first``, then in origin + step z. They are summed in that order, ZB at a time, whoever
    wrote them last, and are loaded past the first-level cache, which may hold what a slot was before.
    """
    cols = col + tl.arange(0, CW)
    m = tl.full([RB], float("-inf"), tl.float32)
    l = tl.zeros([RB], tl.float32)
    acc = tl.zeros([RB, CW], tl.float32)
    for z0 in loop(0, n, ZB):
        z = z0 + tl.arange(0, ZB)
        slot = tl.where(z == 0, first, origin + step * z).to(tl.int64)
        at = (parts + slot * (BM * (WIDTH + 2)))[:, None]
        have = (z < n)[:, None] & ok[None, :]
        ends = at + BM * WIDTH + r[None, :]
        mz = tl.load(ends, mask=have, other=float("-inf"), cache_modifier=".cg")
        lz = tl.load(ends + BM, mask=have, other=0.0, cache_modifier=".cg")
        from_ = (at + (r * WIDTH)[None, :])[:, :, None] + cols[None, None, :]
        part = tl.load(from_, mask=have[:, :, None] & (cols < WIDTH)[None, None, :], other=0.0, cache_modifier=".cg")
        top = tl.maximum(m, tl.max(mz, 0))
        base = tl.where(top == float("-inf"), 0.0, top)
        old = tl.exp2(m - base)
        new = tl.exp2(mz - base[None, :])
        l = l * old + tl.sum(lz * new, 0)
        acc = acc * old[:, None] + tl.sum(part * new[:, :, None], 0)
        m = top
    weight, total = finish(m, l, sinks, sink_at, ok)
    y = narrow(acc * (weight * gain)[:, None], rows.dtype.element_ty)
    tl.store(rows[:, None] + cols[None, :], y, mask=ok[:, None] & (cols < DV)[None, :])
    if lse is not None:
        tl.store(lse + lse_at, total, mask=ok)


def combine_constants(parts: int, rows: int, width: int, num_warps: int) -> dict[str, int]:
    """RB, CW and ZB for about ``parts`` parts of ``rows`` rows: 16 values a thread are loaded side by side."""
    room = 512 * num_warps
    cw = min(triton.next_power_of_2(width), room // 4)
    rb = min(triton.next_power_of_2(rows), room // (4 * cw))
    return {"RB": rb, "CW": cw, "ZB": max(2, min(triton.next_power_of_2(parts), room // (rb * cw)))}


@triton.jit
def merge_kernel(
    out_a, lse_a, out_b, lse_b, out, lse,
    a_stride, la_stride, b_stride, lb_stride, o_stride, lo_stride, rows, DV,
    BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    ok = r < rows
    d = tl.arange(0, BD)
    mask = ok[:, None] & (d < DV)[None, :]
    a = tl.load(lse_a + r * la_stride, mask=ok, other=float("-inf"))
    b = tl.load(lse_b + r * lb_stride, mask=ok, other=float("-inf"))
    top = tl.maximum(a, b)
    base = tl.where(top == float("-inf"), 0.0, top)
    wa = tl.exp2((a - base) * LOG2E)
    wb = tl.exp2((b - base) * LOG2E)
    total = wa + wb
    none = total == 0.0
    full = tl.where(none, 1.0, total)
    tl.store(lse + r * lo_stride, tl.where(none, float("-inf"), base + tl.log2(full) * LN2), mask=ok)
    # A side without keys may hold anything, NaN included: it is left out by selection, not by its weight of 0.
    xa = tl.load(out_a + (r * a_stride)[:, None] + d[None, :], mask=mask & (wa != 0.0)[:, None], other=0.0)
    xb = tl.load(out_b + (r * b_stride)[:, None] + d[None, :], mask=mask & (wb != 0.0)[:, None], other=0.0)
    y = widen(xa) * (wa / full)[:, None] + widen(xb) * (wb / full)[:, None]
    tl.store(out + (r * o_stride)[:, None] + d[None, :], narrow(y, out.dtype.element_ty), mask=mask)


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """out [rows, Dv], lse [rows] (float32) of the union of two disjoint sets of keys. Any row strides."""
    rows, DV = out.shape
    if rows == 0:
        return
    BD = max(16, triton.next_power_of_2(DV))
    BR = max(1, 2048 // BD)
    strides = tuple(t.stride(0) for t in (out_a, lse_a, out_b, lse_b, out, lse))
    launch = Launcher(merge_kernel, triton.cdiv(rows, BR), (*strides, rows, DV, BR, BD), num_warps=4, reusable=False)
    launch(out_a, lse_a, out_b, lse_b, out, lse)


def _specimen(name: str, ptr: str) -> Specimen:
    pointers: dict[str, Any] = {"out_a": ptr, "lse_a": "*fp32", "out_b": ptr, "lse_b": "*fp32", "out": ptr, "lse": "*fp32"}
    ints = ("a_stride", "la_stride", "b_stride", "lb_stride", "o_stride", "lo_stride", "rows", "DV")
    return Specimen(name, merge_kernel, pointers | dict.fromkeys(ints, "i32"), {"BR": 16, "BD": 128})


SPECIMENS = [_specimen("merge-D128-bf16", "*bf16"), _specimen("merge-D128-fp32", "*fp32")]
