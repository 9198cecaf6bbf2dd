"""Paged decode: 1 to 16 query tokens a sequence against a paged KV cache, divided evenly over the device.

All KV tiles of all (sequence, KV head, row block) items stand in one line; every program takes an equal stretch of
it, whatever the lengths are, as stream-K does for matrix products (Osama et al., arXiv 2301.03598). An item inside
one stretch is written at once. A cut item leaves partial sums in a workspace. Where these are few and small, the
program that arrives last (a counter an item) combines them in order; else a second kernel does, in parallel.
Lengths are read on the device only, so a captured graph serves any.

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
from .merge import combine_constants, combine_parts, store_part, store_rows
from .tiles import LOG2E, device_function, load_tile, loop, walk

#: Chunks that an item has at most where batch_invariant fixes them.
MAX_CHUNKS = 32
#: Floats of an item's sums, and parts of an item, above which a kernel of its own combines the parts.
FUSED_FLOATS = 2048
FUSED_PARTS = 8


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
    else:
        return tiles * 0 + 1, tiles


@device_function
def _units_of(lens, at, B, Q, capacity, window, BN: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr,
              WINDOW: tl.constexpr, INVARIANT: tl.constexpr):  # fmt: skip
    """Units of an item of each of the sequences ``at`` (0 past the last)."""
    L = tl.load(lens + at, mask=at < B, other=0)
    _, _, _, tiles = _span(L, Q, capacity, window, WINDOW, BN)
    _, units = _units(tiles, MIN, MAX, INVARIANT)
    return tl.where(at < B, units, 0)


@device_function
def _share(total, ctas, MIN: tl.constexpr, INVARIANT: tl.constexpr):
    """Units that each of ``ctas`` programs takes, of ``total``."""
    share = (total + ctas - 1) // ctas
    if not INVARIANT:
        share = tl.maximum(share, MIN)
    return share


@device_function
def _locate(lens, cta, B, Q, capacity, window, HM: tl.constexpr, BB: tl.constexpr, BN: tl.constexpr, MIN: tl.constexpr,
            MAX: tl.constexpr, WINDOW: tl.constexpr, INVARIANT: tl.constexpr):  # fmt: skip
    """Where program ``cta`` works: (units a program takes, its first, the one after its last, the sequence that the
    first is in, and the units of one item of each sequence before that).
    """
    seq = tl.arange(0, BB)
    units = _units_of(lens, seq, B, Q, capacity, window, BN, MIN, MAX, WINDOW, INVARIANT)
    total = tl.sum(units, 0)
    for start in loop(BB, B, BB):
        total += tl.sum(_units_of(lens, start + seq, B, Q, capacity, window, BN, MIN, MAX, WINDOW, INVARIANT), 0)
    total = total * HM
    share = _share(total, tl.num_programs(0), MIN, INVARIANT)
    pos = cta * share
    passed = (tl.cumsum(units, 0) * HM <= pos) & (seq < B)
    b = tl.sum(passed.to(tl.int32), 0)
    before = tl.sum(tl.where(passed, units, 0), 0)
    offset = tl.sum(units, 0)
    for start in loop(BB, B, BB):
        more = _units_of(lens, start + seq, B, Q, capacity, window, BN, MIN, MAX, WINDOW, INVARIANT)
        passed = ((offset + tl.cumsum(more, 0)) * HM <= pos) & (start + seq < B)
        b += tl.sum(passed.to(tl.int32), 0)
        before += tl.sum(tl.where(passed, more, 0), 0)
        offset += tl.sum(more, 0)
    return share, pos, tl.minimum(pos + share, total), b, before


@device_function
def _parts_of(item, units, share, INVARIANT: tl.constexpr):
    """(number of parts, first slot, origin, step) of the item whose units begin at ``item`` of the line.

    A program has two slots: for the stretch that it begins with, and for one that it begins later and its end cuts.
    """
    if INVARIANT:
        return units, item, item, 1
    else:
        low = item // share
        n = (item + units - 1) // share - low + 1
        return n, 2 * low + (item > low * share).to(tl.int32), 2 * low, 2


@device_function
def _rows(r, b, h, Q, o_b, o_q, o_h, HKV: tl.constexpr, G: tl.constexpr):
    """Of tile rows r: (row is real, query token, head, offset in out, offset in lse)."""
    qi = r // G
    head = h * G + r % G
    b64 = b.to(tl.int64)
    return r < Q * G, qi, head, b64 * o_b + qi * o_q + head.to(tl.int64) * o_h, (b64 * Q + qi) * (HKV * G) + head


@device_function
def _gain(out_scale, v_scale, h, vs_stride):
    if v_scale is not None:
        out_scale = out_scale * tl.load(v_scale + h * vs_stride)
    return out_scale


@device_function
def tree_bits(tree, t_q, t_k, qi, ok, Q, TREE: tl.constexpr):
    """Row i's tree mask as bits: bit j says whether it sees the j-th of the new tokens."""
    if TREE:
        j = tl.arange(0, 16)
        at = tree + (qi[:, None] * t_q + j[None, :] * t_k)
        see = tl.load(at, mask=ok[:, None] & (j < Q)[None, :], other=0)
        return tl.sum(see.to(tl.int32) << j[None, :], 1)
    else:
        return qi


#: Scalars that would only multiply the number of compiled kernels.
_PLAIN = ("t_b", "t_q", "t_k", "sink_stride", "ks_stride", "vs_stride", "B", "capacity", "window", "pages_b")
#: Pointers that need no alignment beyond their element's.
_FREE = ("lens", "pages", "sinks", "k_scale", "v_scale", "tree", "lse")


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_FREE)
def decode_kernel(
    q, k, v, pages, lens, sinks, k_scale, v_scale, tree, out, lse, parts, counters,
    t_b, t_q, t_k, sink_stride, ks_stride, vs_stride,
    B, capacity, window, q_b, q_q, q_h, k_p, k_s, k_h, v_p, v_s, v_h, pages_b, o_b, o_q, o_h,
    scale, softcap, out_scale,
    Q: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr,
    SHARED: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, TREE: tl.constexpr, INVARIANT: tl.constexpr,
    SWAP: tl.constexpr, PTX: tl.constexpr, FUSED: tl.constexpr, RB: tl.constexpr, CW: tl.constexpr, ZB: tl.constexpr,
):  # fmt: skip
    MB: tl.constexpr = (Q * G + BM - 1) // BM
    HM: tl.constexpr = HKV * MB
    parts = parts.to(tl.pointer_type(tl.float32))
    cta = tl.program_id(0)
    share, pos, end, b, before = _locate(
        lens, cta, B, Q, capacity, window, HM, BB, BN, MIN, MAX, WINDOW, INVARIANT
    )  # fmt: skip
    while pos < end:
        L, floor, origin, tiles = _span(tl.load(lens + b), Q, capacity, window, WINDOW, BN)
        size, units = _units(tiles, MIN, MAX, INVARIANT)
        rel = pos - before * HM
        hm = rel // units
        unit = rel - hm * units
        if INVARIANT:
            stretch = unit * 0 + 1
        else:
            stretch = tl.minimum(units - unit, end - pos)
        h = hm // MB
        row0 = (hm - h * MB) * BM
        ok, qi, head, at, lse_at = _rows(row0 + tl.arange(0, BM), b, h, Q, o_b, o_q, o_h, HKV, G)
        b64 = b.to(tl.int64)
        near = L - Q
        bits = tree_bits(tree + b64 * t_b if TREE else tree, t_q, t_k, qi, ok, Q, TREE)
        factor = scale
        if k_scale is not None:
            factor = factor * tl.load(k_scale + h * ks_stride)
        qrow = q + (b64 * q_b + qi * q_q + head.to(tl.int64) * q_h)
        q0 = load_tile(qrow, D, 0, D0, ok, True)
        q1 = q0
        if D1 > 0:
            q1 = load_tile(qrow, D, D0, D1, ok, True)

        m = tl.full([BM], float("-inf"), tl.float32)
        l = tl.zeros([BM], tl.float32)
        if SWAP:
            acc0 = tl.zeros([DV0, BM], tl.float32)
            acc1 = tl.zeros([DV1 if DV1 > 0 else 16, BM], tl.float32)
        else:
            acc0 = tl.zeros([BM, DV0], tl.float32)
            acc1 = tl.zeros([BM, DV1 if DV1 > 0 else 16], tl.float32)
        start = origin + unit * size * BN
        stop = tl.minimum(start + stretch * size * BN, L)
        m, l, acc0, acc1 = walk(
            q0, q1, k + h.to(tl.int64) * k_h, v + h.to(tl.int64) * v_h, pages + b64 * pages_b, k_p, k_s, v_p, v_s,
            start, stop, floor, L, near + qi, bits, near, window, factor, softcap, m, l, acc0, acc1,
            True, False, SWAP, PTX, True, WINDOW, TREE, SOFTCAP, True, SHARED, S, BN, D, D0, D1, DV, DV0, DV1,
        )  # fmt: skip
        if SWAP:
            acc0 = tl.trans(acc0)
            acc1 = tl.trans(acc1)

        gain = _gain(out_scale, v_scale, h, vs_stride)
        if stretch == units:
            store_rows(
                acc0, acc1, m, l, out + at, ok, gain, sinks, head * sink_stride, lse, lse_at, DV, DV0, DV1
            )  # fmt: skip
        else:
            if INVARIANT:
                slot = pos
            else:
                slot = 2 * cta + (pos > cta * share).to(tl.int32)
            store_part(parts, slot, acc0, acc1, m, l, ok, BM, DV0, DV1)
            if FUSED:
                n, first, zero, step = _parts_of(pos - unit, units, share, INVARIANT)
                tl.debug_barrier()
                counter = counters + (b * HM + hm)
                arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                if arrived == n - 1:
                    for r0 in loop(0, tl.minimum(Q * G - row0, BM), RB):
                        r = r0 + tl.arange(0, RB)
                        fine, _qi, whose, to, lse_to = _rows(row0 + r, b, h, Q, o_b, o_q, o_h, HKV, G)
                        for col in loop(0, DV0 + DV1, CW):
                            combine_parts(
                                parts, first, zero, step, n, r, col, fine & (r < BM), out + to, gain, sinks,
                                whose * sink_stride, lse, lse_to, DV, DV0 + DV1, BM, RB, CW, ZB,
                            )  # fmt: skip
                    tl.store(counter, 0)
        pos += stretch
        over = (unit + stretch == units) & (hm == HM - 1)
        before += tl.where(over, units, 0)
        b += over.to(tl.int32)


@triton.jit(do_not_specialize=("sink_stride", "vs_stride", "B", "capacity", "window"), do_not_specialize_on_alignment=_FREE)
def combine_kernel(
    lens, sinks, v_scale, out, lse, parts, sink_stride, vs_stride, ctas, B, capacity, window, o_b, o_q, o_h, out_scale,
    Q: tl.constexpr, HKV: tl.constexpr, G: tl.constexpr, DV: tl.constexpr, WIDTH: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, MIN: tl.constexpr, MAX: tl.constexpr,
    WINDOW: tl.constexpr, INVARIANT: tl.constexpr, RB: tl.constexpr, CW: tl.constexpr, ZB: tl.constexpr,
):  # fmt: skip
    """The parts that decode_kernel left with ``ctas`` programs; one program for RB rows and CW columns of an item."""
    MB: tl.constexpr = (Q * G + BM - 1) // BM
    HM: tl.constexpr = HKV * MB
    ROWS: tl.constexpr = (BM + RB - 1) // RB
    COLS: tl.constexpr = (WIDTH + CW - 1) // CW
    parts = parts.to(tl.pointer_type(tl.float32))
    pid = tl.program_id(0)
    col = pid % COLS * CW
    r0 = pid // COLS % ROWS * RB
    hm = pid // (COLS * ROWS) % HM
    b = pid // (COLS * ROWS * HM)
    h = hm // MB
    row0 = (hm - h * MB) * BM
    if row0 + r0 >= Q * G:
        return
    seq = tl.arange(0, BB)
    total = b * 0
    before = b * 0
    for start in loop(0, B, BB):
        more = _units_of(lens, start + seq, B, Q, capacity, window, BN, MIN, MAX, WINDOW, INVARIANT)
        total += tl.sum(more, 0)
        before += tl.sum(tl.where(start + seq < b, more, 0), 0)
    _, _, _, tiles = _span(tl.load(lens + b), Q, capacity, window, WINDOW, BN)
    _, units = _units(tiles, MIN, MAX, INVARIANT)
    share = _share(total * HM, ctas, MIN, INVARIANT)
    n, first, zero, step = _parts_of(before * HM + hm * units, units, share, INVARIANT)
    if n == 1:
        return
    r = r0 + tl.arange(0, RB)
    ok, _, head, at, lse_at = _rows(row0 + r, b, h, Q, o_b, o_q, o_h, HKV, G)
    combine_parts(
        parts, first, zero, step, n, r, col, ok & (r < BM), out + at, _gain(out_scale, v_scale, h, vs_stride), sinks,
        head * sink_stride, lse, lse_at, DV, WIDTH, BM, RB, CW, ZB,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch is bound to. Strides count elements.

    q, out    strides of [B, Q, Hq]; k, v strides of page, slot, head; pages_b between rows of the table;
              tree strides of [B, Q, Q]; scales strides of sinks, k_scale and v_scale (0 where they do not come)
    capacity  W S, the keys that a row of the table can name
    shared    V is the first DV columns of K (``v`` is then not read); DV is a power of two from 16 on
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
    tree: tuple[int, int, int] | None = None
    scales: tuple[int, int, int] = (0, 0, 0)
    out_scale: float = 1.0
    softcap: float = 0.0
    window: int = 0
    shared: bool = False
    invariant: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch is cut; see attnkit/configs/decode.py."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_tiles: int
    swap: bool = False


@dataclass(frozen=True, slots=True)
class Bound:
    """A launch made ready: bytes of workspace and number of counters it wants, the launcher, and one to combine parts."""

    launcher: Launcher
    part_bytes: int
    counters: int
    combine: Launcher | None = None


def split(d: int) -> tuple[int, int]:
    """A head size as a power of two from 16 on and a second from 32 on (0 for none); they may reach past ``d``."""
    low = max(16, 1 << (d.bit_length() - 1))
    if low >= d:
        return low, 0
    rest = max(32, triton.next_power_of_2(d - low))
    return (2 * low, 0) if rest >= low else (low, rest)


def constants(shape: Shape, tile: Tile, parts: int) -> dict[str, Any]:
    """The constexpr parameters of the kernel, in its order; ``parts`` is about how many an item has."""
    d0, d1 = split(shape.D)
    dv0, dv1 = split(shape.DV)
    if shape.shared:
        rest = shape.D - shape.DV
        d0, d1 = dv0, max(16, triton.next_power_of_2(rest)) if rest else 0
    rows = min(tile.block_m, shape.Q * shape.G)
    return {
        "Q": shape.Q, "HKV": shape.HKV, "G": shape.G, "S": shape.S,
        "D": shape.D, "D0": d0, "D1": d1, "DV": shape.DV, "DV0": dv0, "DV1": dv1,
        "BM": tile.block_m, "BN": tile.block_n, "BB": min(1024, max(16, triton.next_power_of_2(shape.B))),
        "MIN": tile.min_tiles, "MAX": MAX_CHUNKS, "SHARED": shape.shared, "WINDOW": shape.window > 0,
        "SOFTCAP": shape.softcap > 0.0, "TREE": shape.tree is not None, "INVARIANT": shape.invariant, "SWAP": tile.swap,
        "PTX": torch.version.hip is None, "FUSED": rows * shape.DV <= FUSED_FLOATS and parts <= FUSED_PARTS,
        **combine_constants(parts, rows, dv0 + dv1, tile.num_warps),
    }  # fmt: skip


def bind(shape: Shape, tile: Tile, programs: int, reusable: bool) -> Bound:
    """A launch of at most ``programs`` programs; none gets fewer than ``min_tiles`` tiles of KV, if it can be helped."""
    items = shape.B * shape.HKV * triton.cdiv(shape.Q * shape.G, tile.block_m)
    reach = shape.capacity
    if shape.window:
        reach = min(reach, shape.window + shape.Q - 1 + tile.block_n)
    units = max(1, triton.cdiv(triton.cdiv(reach, tile.block_n), tile.min_tiles))
    if shape.invariant:
        units = min(units, MAX_CHUNKS)
    grid = min(programs, items * units)
    parts = MAX_CHUNKS if shape.invariant else triton.cdiv(grid, items) + 1
    fixed = constants(shape, tile, parts)
    slots = items * units if shape.invariant else 2 * grid
    cap = shape.softcap
    scalars = (
        *(shape.tree or (0, 0, 0)), *shape.scales,
        shape.B, shape.capacity, shape.window, *shape.q, *shape.k, *shape.v, shape.pages_b, *shape.out,
        shape.scale / cap if cap else shape.scale * LOG2E.value, cap * LOG2E.value, shape.out_scale,
    )  # fmt: skip
    warps, stages = tile.num_warps, tile.num_stages
    launcher = Launcher(decode_kernel, grid, (*scalars, *fixed.values()), num_warps=warps, num_stages=stages, reusable=reusable)
    combine = None if fixed["FUSED"] or units == 1 else _bind_combine(shape, fixed, items, grid, parts, reusable)
    return Bound(launcher, 4 * slots * tile.block_m * (fixed["DV0"] + fixed["DV1"] + 2), items, combine)


def _bind_combine(shape: Shape, fixed: dict[str, Any], items: int, grid: int, parts: int, reusable: bool) -> Launcher:
    own = combine_fixed(fixed, parts)
    rows, columns = triton.cdiv(own["BM"], own["RB"]), triton.cdiv(own["WIDTH"], own["CW"])
    scalars = (*shape.scales[::2], grid, shape.B, shape.capacity, shape.window, *shape.out, shape.out_scale)
    return Launcher(combine_kernel, items * rows * columns, (*scalars, *own.values()), num_warps=4, reusable=reusable)


def combine_fixed(fixed: dict[str, Any], parts: int) -> dict[str, Any]:
    """The constexpr parameters of combine_kernel, from those of decode_kernel: small blocks, so that there are many."""
    width = fixed["DV0"] + fixed["DV1"]
    names = ("Q", "HKV", "G", "DV")
    first = {n: fixed[n] for n in names} | {"WIDTH": width}
    second = {n: fixed[n] for n in ("BM", "BN", "BB", "MIN", "MAX", "WINDOW", "INVARIANT")}
    return first | second | combine_constants(parts, 1, min(width, 128), 4)


def launch(
    bound: Bound,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor, lens: torch.Tensor,
    sinks: torch.Tensor | None, k_scale: torch.Tensor | None, v_scale: torch.Tensor | None, tree: torch.Tensor | None,
    out: torch.Tensor, lse: torch.Tensor | None, parts: torch.Tensor, counters: torch.Tensor,
) -> None:  # fmt: skip
    """``parts`` holds at least part_bytes bytes (uint8), ``counters`` int32 zeros, which are zeros again afterwards."""
    bound.launcher(q, k, v, pages, lens, sinks, k_scale, v_scale, tree, out, lse, parts, counters)
    if bound.combine is not None:
        bound.combine(lens, sinks, v_scale, out, lse, parts)


def specimen(name: str, shape: Shape, q: str, kv: str, tile: Tile, targets: tuple[str, ...] | None = None,
             options: tuple[str, ...] = (), parts: int = 3) -> Specimen:  # fmt: skip
    """``options``: the optional tensors that come (sinks, k_scale, v_scale, lse); ``parts``: of an item, about."""
    pointers = {"q": q, "k": kv, "v": kv, "pages": "*i32", "lens": "*i32", "out": q, "parts": "*u8", "counters": "*i32"}
    optional = {"sinks": "*fp32", "k_scale": "*fp32", "v_scale": "*fp32", "lse": "*fp32"}
    pointers |= {n: t for n, t in optional.items() if n in options}
    if shape.tree is not None:
        pointers["tree"] = "*i1"
    strides = ("q_b", "q_q", "q_h", "k_p", "k_s", "k_h", "v_p", "v_s", "v_h", "o_b", "o_q", "o_h")
    ints = dict.fromkeys((*_PLAIN, *strides), "i32")
    floats = dict.fromkeys(("scale", "softcap", "out_scale"), "fp32")
    absent = {n: None for n in (*optional, "tree") if n not in pointers}
    fixed = constants(shape, tile, parts)
    types = pointers | ints | floats
    warps, stages = tile.num_warps, tile.num_stages
    return Specimen(name, decode_kernel, types, absent | fixed, warps, stages, targets, (*_FREE, *_PLAIN))


def combine_specimen(name: str, shape: Shape, out: str, tile: Tile) -> Specimen:
    pointers = {"lens": "*i32", "out": out, "lse": "*fp32", "parts": "*u8"}
    plain = ("sink_stride", "vs_stride", "B", "capacity", "window")
    ints = dict.fromkeys((*plain, "ctas", "o_b", "o_q", "o_h"), "i32")
    fixed = combine_fixed(constants(shape, tile, 16), 16)
    absent = {"sinks": None, "v_scale": None}
    return Specimen(name, combine_kernel, pointers | ints | {"out_scale": "fp32"}, absent | fixed, 4, 1, None, (*_FREE, *plain))


def _shape(D: int, DV: int, G: int = 4, HKV: int = 8, S: int = 16, **more: Any) -> Shape:
    none = (0, 0, 0)
    more = {"B": 64, "Q": 1} | more
    return Shape(HKV=HKV, G=G, S=S, D=D, DV=DV, capacity=8192, q=none, k=none, v=none, pages_b=0, out=none, scale=1.0, **more)


_NO_HIP = ("cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120")
_FP8 = _NO_HIP[1:]
_WIDE = Tile(16, 64, 4, 3, 1)
_SMALL = Tile(16, 32, 4, 2, 1)

SPECIMENS = [
    specimen("decode-D128-bf16", _shape(128, 128), "*bf16", "*bf16", _WIDE, _NO_HIP),
    specimen("decode-D128-many-bf16", _shape(128, 128, B=1), "*bf16", "*bf16", _WIDE, _NO_HIP, parts=34),
    specimen("decode-D128-S64-bf16", _shape(128, 128, S=64), "*bf16", "*bf16", _WIDE, _NO_HIP),
    specimen("decode-D128-small-bf16", _shape(128, 128), "*bf16", "*bf16", _SMALL, options=("sinks", "lse")),
    specimen("decode-D64-G7-fp16", _shape(64, 64, G=7, HKV=1, softcap=30.0, window=128), "*fp16", "*fp16", _WIDE),
    specimen("decode-D80-bf16", _shape(80, 80), "*bf16", "*bf16", _WIDE, _NO_HIP),
    specimen("decode-D96-bf16", _shape(96, 96), "*bf16", "*bf16", _WIDE, _NO_HIP),
    specimen("decode-D192-Dv128-bf16", _shape(192, 128), "*bf16", "*bf16", Tile(16, 32, 4, 3, 1)),
    specimen("decode-D256-bf16", _shape(256, 256), "*bf16", "*bf16", _SMALL),
    specimen("decode-D128-Q4-tree-bf16", _shape(128, 128, Q=4, tree=(16, 4, 1)), "*bf16", "*bf16", _WIDE, _NO_HIP),
    specimen("decode-D128-Q16-bf16", _shape(128, 128, Q=16), "*bf16", "*bf16", Tile(64, 32, 4, 3, 1), _NO_HIP),
    specimen("decode-D128-invariant-bf16", _shape(128, 128, invariant=True), "*bf16", "*bf16", Tile(16, 64, 4, 3, 8), _NO_HIP),
    specimen("decode-D128-int8", _shape(128, 128), "*bf16", "*i8", _WIDE, options=("k_scale", "v_scale")),
    specimen("decode-D128-int8-fp16", _shape(128, 128), "*fp16", "*i8", _WIDE, options=("k_scale", "v_scale")),
    specimen("decode-D128-e4m3", _shape(128, 128), "*bf16", "*fp8e4nv", _WIDE, _FP8),
    specimen("decode-D128-fp32", _shape(128, 128), "*fp32", "*fp32", _SMALL),
    combine_specimen("decode-combine-D128-bf16", _shape(128, 128, Q=8), "*bf16", _WIDE),
]
