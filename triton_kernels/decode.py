"""Paged decode: 1 to 16 query tokens a sequence against a paged KV cache, divided evenly over the device.

All KV tiles of all (sequence, KV head, row block) items stand in one line; every program takes an equal stretch of
it, whatever the lengths are, as stream-K does for matrix products (Osama et al., arXiv 2301.03598). An item inside
one stretch is written at once. A cut item leaves partial sums in a workspace, and the program that arrives last
(a counter an item) combines them in order. Lengths are read on the device only, so a captured graph serves any.

With INVARIANT the unit of the line is a chunk of KV whose size depends on the item's length alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .merge import combine_parts, store_part, store_rows
from .tiles import LOG2E, device_function, load_tile, narrow, walk, widen

#: Chunks that an item has at most where batch_invariant fixes them.
MAX_CHUNKS = 32


@device_function
def _span(L, Q, capacity, window, WINDOW: tl.constexpr, BN: tl.constexpr):
    """(L within the table, lowest key that a query sees, start of its tile, number of tiles, at least 1)."""
    L = tl.minimum(tl.maximum(L, 0), capacity)
    floor = L * 0
    if WINDOW:
        floor = tl.maximum(L - Q - window + 1, 0)
    start = floor // BN * BN
    return L, floor, start, tl.maximum((L - start + BN - 1) // BN, 1)


@device_function
def _units(tiles, MIN: tl.constexpr, MAX: tl.constexpr, INVARIANT: tl.constexpr):
    """(tiles in a unit, units) of an item with that many tiles."""
    if INVARIANT:
        size = tl.maximum((tiles + MAX - 1) // MAX, MIN)
        return size, (tiles + size - 1) // size
    return tiles * 0 + 1, tiles


@device_function
def _lens_units(lens, base, B, Q, capacity, window, BB: tl.constexpr, BN: tl.constexpr, MIN: tl.constexpr,
                MAX: tl.constexpr, WINDOW: tl.constexpr, INVARIANT: tl.constexpr):  # fmt: skip
    """Units of an item of each of the sequences base .. base + BB - 1 (0 past the last)."""
    at = base + tl.arange(0, BB)
    L = tl.load(lens + at, mask=at < B, other=0)
    _, _, _, tiles = _span(L, Q, capacity, window, WINDOW, BN)
    _, units = _units(tiles, MIN, MAX, INVARIANT)
    return tl.where(at < B, units, 0)


@device_function
def tree_bits(tree, t_q, t_k, qi, ok, Q, TREE: tl.constexpr):
    """Row i's tree mask as bits: bit j says whether it sees the j-th of the new tokens."""
    if TREE:
        j = tl.arange(0, 16)
        at = tree + (qi[:, None] * t_q + j[None, :] * t_k)
        see = tl.load(at, mask=ok[:, None] & (j < Q)[None, :], other=0)
        return tl.sum(see.to(tl.int32) << j[None, :], 1)
    return qi


_LATE = ("t_b", "t_q", "t_k", "sink_stride", "ks_stride", "vs_stride")
_FREE = ("lens", "pages", "sinks", "k_scale", "v_scale", "tree", "lse")


@triton.jit(do_not_specialize=(*_LATE, "B", "capacity", "window"), do_not_specialize_on_alignment=_FREE)
def decode_kernel(
    q, k, v, pages, lens, sinks, k_scale, v_scale, tree, out, lse, parts, counters,
    t_b, t_q, t_k, sink_stride, ks_stride, vs_stride,
    B, capacity, window, q_b, q_q, q_h, k_p, k_s, k_h, v_p, v_s, v_h, pages_b, o_b, o_q, o_h,
    scale, softcap, out_scale,
    Q: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr, UNROLL: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TREE: tl.constexpr, INVARIANT: tl.constexpr,
):  # fmt: skip
    MB: tl.constexpr = (Q * G + BM - 1) // BM
    HM: tl.constexpr = HKV * MB
    parts = parts.to(tl.pointer_type(tl.float32))
    cta = tl.program_id(0)
    first_units = _lens_units(lens, 0, B, Q, capacity, window, BB, BN, MIN, MAX, WINDOW, INVARIANT)
    total = tl.sum(first_units, 0)
    for base in range(BB, B, BB):
        total += tl.sum(_lens_units(lens, base, B, Q, capacity, window, BB, BN, MIN, MAX, WINDOW, INVARIANT), 0)
    total = total * HM
    ctas = tl.num_programs(0)
    share = (total + ctas - 1) // ctas
    if not INVARIANT:
        share = tl.maximum(share, MIN)
    pos = cta * share
    end = tl.minimum(pos + share, total)

    # The sequence in which the stretch starts, and the units of an item before it.
    ends = tl.cumsum(first_units, 0)
    passed = (ends * HM <= pos) & (tl.arange(0, BB) < B)
    b = tl.sum(passed.to(tl.int32), 0)
    before = tl.sum(tl.where(passed, first_units, 0), 0)
    offset = tl.sum(first_units, 0)
    for base in range(BB, B, BB):
        units = _lens_units(lens, base, B, Q, capacity, window, BB, BN, MIN, MAX, WINDOW, INVARIANT)
        ends = offset + tl.cumsum(units, 0)
        passed = (ends * HM <= pos) & (base + tl.arange(0, BB) < B)
        b += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, units, 0), 0)
        offset += tl.sum(units, 0)

    while pos < end:
        L, floor, origin, tiles = _span(tl.load(lens + b), Q, capacity, window, WINDOW, BN)
        size, units = _units(tiles, MIN, MAX, INVARIANT)
        rel = pos - before * HM
        hm = rel // units
        unit = rel - hm * units
        item = pos - unit
        if INVARIANT:
            stretch = unit * 0 + 1
        else:
            stretch = tl.minimum(units - unit, end - pos)
        h = hm // MB
        r = (hm - h * MB) * BM + tl.arange(0, BM)
        ok = r < Q * G
        qi = r // G
        head = h * G + r % G
        b64 = b.to(tl.int64)
        near = L - Q
        bits = tree_bits(tree + b64 * t_b if TREE else tree, t_q, t_k, qi, ok, Q, TREE)

        factor = scale
        if k_scale is not None:
            factor = factor * tl.load(k_scale + h * ks_stride)
        sign = tl.where(factor < 0, -1.0, 1.0)
        qrow = q + (b64 * q_b + qi * q_q + head.to(tl.int64) * q_h)
        q0 = load_tile(qrow, D, 0, D0, ok, True)
        q0 = narrow(widen(q0) * sign, q.dtype.element_ty)
        q1 = q0
        if D1 > 0:
            q1 = narrow(widen(load_tile(qrow, D, D0, D1, ok, True)) * sign, q.dtype.element_ty)

        m = tl.full([BM], float("-inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        acc0 = tl.zeros([BM, DV0], tl.float32)
        acc1 = tl.zeros([BM, DV1 if DV1 > 0 else 16], tl.float32)
        start = origin + unit * size * BN
        stop = tl.minimum(start + stretch * size * BN, L)
        m, l, acc0, acc1 = walk(
            q0, q1, k + h.to(tl.int64) * k_h, v + h.to(tl.int64) * v_h, pages + b64 * pages_b, k_p, k_s, v_p, v_s,
            start, stop, floor, L, near + qi, bits, near, window, factor * sign, softcap, m, l, acc0, acc1,
            True, True, WINDOW, TREE, SOFTCAP, True, SHARED, S, BN, D, D0, D1, DV, DV0, DV1,
        )  # fmt: skip

        gain = out_scale
        if v_scale is not None:
            gain = gain * tl.load(v_scale + h * vs_stride)
        orow = out + (b64 * o_b + qi * o_q + head.to(tl.int64) * o_h)
        lrow = lse
        if lse is not None:
            lrow = lse + ((b64 * Q + qi) * (HKV * G) + head)
        srow = sinks
        if stretch == units:
            store_rows(acc0, acc1, m, l, orow, ok, gain, srow, head * sink_stride, lrow, DV, DV0, DV1)
        else:
            if INVARIANT:
                slot = pos
                n = units
                first = item
                where = item
                step = 1
            else:
                slot = 2 * cta + (pos > cta * share).to(tl.int32)
                low = item // share
                n = (item + units - 1) // share - low + 1
                first = 2 * low + (item > low * share).to(tl.int32)
                where = 2 * low
                step = 2
            store_part(parts, slot, acc0, acc1, m, l, ok, BM, DV0, DV1)
            tl.debug_barrier()
            counter = counters + (b * HM + hm)
            arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
            if arrived == n - 1:
                mc, lc, sum0, sum1 = combine_parts(parts, first, where, step, n, ok, BM, DV0, DV1, UNROLL)
                store_rows(sum0, sum1, mc, lc, orow, ok, gain, srow, head * sink_stride, lrow, DV, DV0, DV1)
                tl.store(counter, 0)
        pos += stretch
        over = (unit + stretch == units) & (hm == HM - 1)
        before += tl.where(over, units, 0)
        b += over.to(tl.int32)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch is bound to. Strides count elements; the last dimension's is 1.

    q, out    strides of [B, Q, Hq, D]; k, v strides of page, slot, head; pages_b between rows of the table
    capacity  W S, the keys that a row of the table can name
    shared    V is the first DV columns of K (``v`` is then not read)
    """

    B: int
    Q: int
    HKV: int
    G: int
    S: int
    D: int
    DV: int
    capacity: int
    q: tuple[int, int, int]
    k: tuple[int, int, int]
    v: tuple[int, int, int]
    pages_b: int
    out: tuple[int, int, int]
    scale: float
    out_scale: float = 1.0
    softcap: float = 0.0
    window: int = 0
    tree: bool = False
    shared: bool = False
    invariant: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """A launch made ready: bytes of workspace and number of counters it wants, and the launcher."""

    launcher: Launcher
    part_bytes: int
    counters: int


def split(d: int) -> tuple[int, int]:
    """A head size as two powers of two (the second may be 0, and stands for columns that are partly masked)."""
    low = max(16, 1 << (d.bit_length() - 1))
    if low >= d:
        return low, 0
    rest = max(16, triton.next_power_of_2(d - low))
    return (2 * low, 0) if rest == low else (low, rest)


def constants(shape: Shape, block_m: int, block_n: int, num_warps: int, min_tiles: int) -> dict[str, Any]:
    """The constexpr parameters of the kernel, in its order."""
    d0, d1 = split(shape.D)
    dv0, dv1 = split(shape.DV)
    return {
        "Q": shape.Q, "HKV": shape.HKV, "G": shape.G, "S": shape.S,
        "D": shape.D, "D0": d0, "D1": d1, "DV": shape.DV, "DV0": dv0, "DV1": dv1,
        "BM": block_m, "BN": block_n, "BB": min(1024, max(16, triton.next_power_of_2(shape.B))),
        "MIN": min_tiles, "MAX": MAX_CHUNKS, "UNROLL": max(1, min(8, 2048 * num_warps // (block_m * (dv0 + dv1)))),
        "SHARED": shape.shared, "WINDOW": shape.window > 0, "SOFTCAP": shape.softcap > 0.0, "TREE": shape.tree,
        "INVARIANT": shape.invariant,
    }  # fmt: skip


def bind(
    shape: Shape, *, block_m: int, block_n: int, num_warps: int, num_stages: int, min_tiles: int, programs: int, reusable: bool
) -> Bound:
    """A launch of at most ``programs`` programs; none gets fewer than ``min_tiles`` tiles of KV, if it can be helped."""
    fixed = constants(shape, block_m, block_n, num_warps, min_tiles)
    items = shape.B * shape.HKV * triton.cdiv(shape.Q * shape.G, block_m)
    reach = shape.capacity
    if shape.window:
        reach = min(reach, shape.window + shape.Q - 1 + block_n)
    units = max(1, triton.cdiv(triton.cdiv(reach, block_n), min_tiles))
    if shape.invariant:
        units = min(units, MAX_CHUNKS)
    grid = min(programs, items * units)
    slots = items * units if shape.invariant else 2 * grid
    cap = shape.softcap
    scalars = (
        shape.B, shape.capacity, shape.window, *shape.q, *shape.k, *shape.v, shape.pages_b, *shape.out,
        shape.scale / cap if cap else shape.scale * LOG2E.value, cap * LOG2E.value, shape.out_scale,
    )  # fmt: skip
    launcher = Launcher(
        decode_kernel, grid, (*scalars, *fixed.values()), num_warps=num_warps, num_stages=num_stages, reusable=reusable
    )
    width = fixed["DV0"] + fixed["DV1"] + 2
    return Bound(launcher, 4 * slots * block_m * width, items)


def launch(
    bound: Bound,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, lens: torch.Tensor,
    sinks: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, tree: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor | None, parts: torch.Tensor, counters: torch.Tensor,
) -> None:  # fmt: skip
    """``parts`` holds at least part_bytes bytes (uint8), ``counters`` int32 zeros, which are zeros again afterwards."""
    late = (
        *((0, 0, 0) if tree is None else tree.stride()),
        0 if sinks is None else sinks.stride(0),
        0 if k_scale is None else k_scale.stride(0),
        0 if v_scale is None else v_scale.stride(0),
    )
    bound.launcher(q, k, v, pages, lens, sinks, k_scale, v_scale, tree, out, lse, parts, counters, late=late)


def specimen(name: str, shape: Shape, q: str, kv: str, block_m: int, block_n: int, num_warps: int, num_stages: int,
             targets: tuple[str, ...] | None = None, options: tuple[str, ...] = ()) -> Specimen:  # fmt: skip
    """``options``: the optional tensors that come (sinks, k_scale, v_scale, lse)."""
    pointers = {"q": q, "k": kv, "v": kv, "pages": "*i32", "lens": "*i32", "out": q, "parts": "*u8", "counters": "*i32"}
    optional = {"sinks": "*fp32", "k_scale": "*fp32", "v_scale": "*fp32", "lse": "*fp32"}
    pointers |= {n: t for n, t in optional.items() if n in options}
    if shape.tree:
        pointers["tree"] = "*i1"
    strides = ("q_b", "q_q", "q_h", "k_p", "k_s", "k_h", "v_p", "v_s", "v_h", "pages_b", "o_b", "o_q", "o_h")
    ints = dict.fromkeys((*_LATE, "B", "capacity", "window", *strides), "i32")
    floats = dict.fromkeys(("scale", "softcap", "out_scale"), "fp32")
    absent = {n: None for n in (*optional, "tree") if n not in pointers}
    fixed = constants(shape, block_m, block_n, num_warps, 2)
    unaligned = (*_FREE, *_LATE, "B", "capacity", "window", "pages_b")
    return Specimen(
        name, decode_kernel, pointers | ints | floats, absent | fixed, num_warps, num_stages, targets, unaligned
    )


def _shape(D: int, DV: int, G: int = 4, HKV: int = 8, S: int = 16, **more: Any) -> Shape:
    none = (0, 0, 0)
    more = {"B": 64, "Q": 1} | more
    return Shape(HKV=HKV, G=G, S=S, D=D, DV=DV, capacity=8192, q=none, k=none, v=none, pages_b=0, out=none, scale=1.0, **more)
