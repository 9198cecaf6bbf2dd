"""Prefill over ragged queries: paged KV, or (``paged`` False) keys and values in rows of their own.

The G query heads that share a KV head stand in one tile, row by row: token after token, each with its G heads. So
a tile of BM rows covers BM / G tokens, which keeps it full for short prompts and its causal edge short for long ones.
The rows of sequence b start at tile cu_q[b] G // BM + b of the grid, which depends on no length but the sum. Rows
past the last sequence (the padding of a captured batch) are set to 0.

Where the shape gives fewer tiles than the device has room for, the keys of a tile are split over Z programs,
combined by the one that arrives last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .decode import Bound, split
from .launcher import Launcher
from .merge import combine_constants, combine_parts, store_part, store_rows
from .tiles import LOG2E, device_function, load_tile, loop, walk


@device_function
def _sequence_of(tile, cu_q, B, G: tl.constexpr, BM: tl.constexpr, BB: tl.constexpr):
    """The last sequence whose first tile is at or before ``tile``; B stands for the rows that no sequence owns."""
    b = tile * 0 - 1
    for base in loop(0, B + 1, BB):
        at = base + tl.arange(0, BB)
        first = tl.load(cu_q + at, mask=at <= B, other=0).to(tl.int64) * G // BM + at
        b += tl.sum(((first <= tile) & (at <= B)).to(tl.int32), 0)
    return b


@device_function
def _rows(r, n, t0, h, o_t, o_h, HKV: tl.constexpr, G: tl.constexpr):
    """Of a sequence's rows r: (row is real, query token in the sequence, head, token in q, offset in out, offset in lse)."""
    at = r // G
    head = h * G + r % G
    token = (t0 + at).to(tl.int64)
    return r < n * G, at, head, token, token * o_t + head.to(tl.int64) * o_h, token * (HKV * G) + head


_PLAIN = ("sink_stride", "ks_stride", "vs_stride", "T", "B", "capacity", "window", "pages_b", "least")
_FREE = ("lens", "pages", "cu_q", "cu_k", "sinks", "k_scale", "v_scale", "lse")


@triton.jit(do_not_specialize=_PLAIN, do_not_specialize_on_alignment=_FREE)
def prefill_kernel(
    q, k, v, pages, lens, cu_q, cu_k, sinks, k_scale, v_scale, out, lse, parts, counters,
    sink_stride, ks_stride, vs_stride, T, B, capacity, window, pages_b, least,
    q_t, q_h, k_p, k_s, k_h, v_p, v_s, v_h, o_t, o_h, scale, softcap, out_scale,
    HKV: tl.constexpr, G: tl.constexpr, S: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, Z: tl.constexpr, RISING: tl.constexpr, PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PAGED: tl.constexpr,
    BD: tl.constexpr, RB: tl.constexpr, CW: tl.constexpr, ZB: tl.constexpr,
):  # fmt: skip
    parts = parts.to(tl.pointer_type(tl.float32))
    pid = tl.program_id(0)
    h = pid % HKV
    z = (pid // HKV) % Z
    # The last tiles of a causal sequence have the most keys: they go first.
    tile = tl.num_programs(0) // (HKV * Z) - 1 - pid // (HKV * Z)
    b = _sequence_of(tile, cu_q, B, G, BM, BB)
    t0 = tl.load(cu_q + b)
    n = tl.minimum(tl.load(cu_q + b + 1, mask=b < B, other=2147483647), T) - t0
    row0 = (tile - (t0.to(tl.int64) * G // BM).to(tl.int32) - b) * BM
    if row0 >= n * G:
        return
    if b == B:
        ok, _, _, _, to, lse_at = _rows(row0 + tl.arange(0, BM), n, t0, h, o_t, o_h, HKV, G)
        cols = tl.arange(0, BD)
        nothing = tl.zeros([BM, BD], out.dtype.element_ty)
        tl.store(out + to[:, None] + cols[None, :], nothing, mask=ok[:, None] & (cols < DV)[None, :])
        if lse is not None:
            tl.store(lse + lse_at, tl.full([BM], float("-inf"), tl.float32), mask=ok)
        return
    if PAGED:
        L = tl.minimum(tl.maximum(tl.load(lens + b), 0), capacity)
    else:
        k0_row = tl.load(cu_k + b)
        L = tl.minimum(tl.load(cu_k + b + 1), capacity) - k0_row

    # Keys that some row of the tile sees: [floor, top); keys that every row sees: [full, even).
    early = L - n + row0 // G
    late = L - n + tl.minimum(row0 + BM - 1, n * G - 1) // G
    floor = L * 0
    full = L * 0
    top = L
    even = L
    if CAUSAL:
        top = tl.minimum(late + 1, L)
        even = tl.minimum(early + 1, L)
    if WINDOW:
        floor = tl.maximum(early - window + 1, 0)
        full = tl.maximum(late - window + 1, 0)
        if not CAUSAL:
            top = tl.minimum(top, late + window)
            even = tl.minimum(even, early + window)
    if not CAUSAL:
        even = tl.where(early < 0, 0, even)
        top = tl.where(late < 0, 0, top)
    top = tl.maximum(top, 0)
    origin = floor // BN * BN
    tiles = tl.maximum((top - origin + BN - 1) // BN, 0)
    share = tiles
    n_parts = tiles * 0 + 1
    if Z > 1:
        share = tl.maximum((tiles + Z - 1) // Z, least)
        n_parts = tl.maximum((tiles + share - 1) // share, 1)
        if z >= n_parts:
            return
    start = origin + z * share * BN
    stop = tl.minimum(start + share * BN, top)
    # Three walks: masked up to the first tile that all rows see, plain, masked again.
    lead = start
    if WINDOW:
        lead = tl.minimum(tl.maximum((full + BN - 1) // BN * BN, start), stop)
    plain = tl.maximum(tl.minimum(even // BN * BN, stop // BN * BN), lead)

    ok, at, head, token, _, _ = _rows(row0 + tl.arange(0, BM), n, t0, h, o_t, o_h, HKV, G)
    pos = L - n + at
    factor = scale
    if k_scale is not None:
        factor = factor * tl.load(k_scale + h * ks_stride)
    qrow = q + (token * q_t + head.to(tl.int64) * q_h)
    q0 = load_tile(qrow, D, 0, D0, ok, True)
    q1 = q0
    if D1 > 0:
        q1 = load_tile(qrow, D, D0, D1, ok, True)
    m = tl.full([BM], float("-inf"), tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc0 = tl.zeros([BM, DV0], tl.float32)
    acc1 = tl.zeros([BM, DV1 if DV1 > 0 else 16], tl.float32)
    kh = k + h.to(tl.int64) * k_h
    vh = v + h.to(tl.int64) * v_h
    row = pages
    if PAGED:
        row = pages + b.to(tl.int64) * pages_b
    else:
        kh += k0_row.to(tl.int64) * k_s
        vh += k0_row.to(tl.int64) * v_s
    if WINDOW:
        m, l, acc0, acc1 = walk(
            q0, q1, kh, vh, row, k_p, k_s, v_p, v_s, start, lead, floor, L, pos, at, L, window, factor, softcap,
            m, l, acc0, acc1, True, RISING, False, PTX, CAUSAL, WINDOW, False, SOFTCAP, PAGED, False, S, BN,
            D, D0, D1, DV, DV0, DV1,
        )  # fmt: skip
    m, l, acc0, acc1 = walk(
        q0, q1, kh, vh, row, k_p, k_s, v_p, v_s, lead, plain, floor, L, pos, at, L, window, factor, softcap,
        m, l, acc0, acc1, False, RISING, False, PTX, CAUSAL, WINDOW, False, SOFTCAP, PAGED, False, S, BN,
        D, D0, D1, DV, DV0, DV1,
    )  # fmt: skip
    m, l, acc0, acc1 = walk(
        q0, q1, kh, vh, row, k_p, k_s, v_p, v_s, plain, stop, floor, L, pos, at, L, window, factor, softcap,
        m, l, acc0, acc1, True, RISING, False, PTX, CAUSAL, WINDOW, False, SOFTCAP, PAGED, False, S, BN,
        D, D0, D1, DV, DV0, DV1,
    )  # fmt: skip

    gain = out_scale
    if v_scale is not None:
        gain = gain * tl.load(v_scale + h * vs_stride)
    # Where the rows go is worked out from what memory says again, and so not held in registers over the walks.
    t0 = tl.load(cu_q + b)
    n = tl.minimum(tl.load(cu_q + b + 1), T) - t0
    row0 = (tile - (t0.to(tl.int64) * G // BM).to(tl.int32) - b) * BM
    ok, _, head, _, to, lse_at = _rows(row0 + tl.arange(0, BM), n, t0, h, o_t, o_h, HKV, G)
    # Z is a constant: where it is 1, what comes after the first branch is not compiled.
    if Z == 1:  # noqa: SIM114
        store_rows(acc0, acc1, m, l, out + to, ok, gain, sinks, head * sink_stride, lse, lse_at, DV, DV0, DV1)
    elif n_parts == 1:
        store_rows(acc0, acc1, m, l, out + to, ok, gain, sinks, head * sink_stride, lse, lse_at, DV, DV0, DV1)
    else:
        slot = (tile * HKV + h) * Z
        store_part(parts, slot + z, acc0, acc1, m, l, ok, BM, DV0, DV1)
        tl.debug_barrier()
        counter = counters + (tile * HKV + h)
        arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
        if arrived == n_parts - 1:
            for r0 in loop(0, tl.minimum(n * G - row0, BM), RB):
                r = r0 + tl.arange(0, RB)
                fine, _at, whose, _token, dest, lse_to = _rows(row0 + r, n, t0, h, o_t, o_h, HKV, G)
                for col in loop(0, DV0 + DV1, CW):
                    combine_parts(
                        parts, slot, slot, 1, n_parts, r, col, fine & (r < BM), out + dest, gain, sinks, whose * sink_stride,
                        lse, lse_to, DV, DV0 + DV1, BM, RB, CW, ZB,
                    )  # fmt: skip
            tl.store(counter, 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch is bound to. Strides count elements.

    q, out    strides of [T, Hq]; k, v strides of page, slot, head (not paged: 0, row, head)
    pages_b   stride between rows of the table
    scales    strides of sinks, k_scale and v_scale (0 where they do not come);
              k_scale: whether that one comes
    capacity  paged: W S, the keys that a row of the table can name; else the rows of k
    """

    B: int
    T: int
    HKV: int
    G: int
    S: int
    D: int
    DV: int
    capacity: int
    q: tuple[int, int]
    k: tuple[int, int, int]
    v: tuple[int, int, int]
    pages_b: int
    out: tuple[int, int]
    scale: float
    scales: tuple[int, int, int] = (0, 0, 0)
    k_scale: bool = False
    out_scale: float = 1.0
    softcap: float = 0.0
    window: int = 0
    causal: bool = True
    paged: bool = True
    invariant: bool = False


@dataclass(frozen=True, slots=True)
class Tile:
    """How a launch is cut; see attnkit/configs/prefill.py."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    min_tiles: int


def constants(shape: Shape, tile: Tile, splits: int) -> dict[str, Any]:
    """The constexpr parameters of the kernel, in its order."""
    d0, d1 = split(shape.D)
    dv0, dv1 = split(shape.DV)
    return {
        "HKV": shape.HKV, "G": shape.G, "S": shape.S, "D": shape.D, "D0": d0, "D1": d1, "DV": shape.DV, "DV0": dv0, "DV1": dv1,
        "BM": tile.block_m, "BN": tile.block_n, "BB": min(1024, max(16, triton.next_power_of_2(shape.B + 1))), "Z": splits,
        "RISING": shape.scale > 0.0 and not shape.k_scale, "PTX": torch.version.hip is None, "CAUSAL": shape.causal,
        "WINDOW": shape.window > 0, "SOFTCAP": shape.softcap > 0.0, "PAGED": shape.paged,
        "BD": triton.next_power_of_2(dv0 + dv1),
        **combine_constants(splits, tile.block_m, dv0 + dv1, tile.num_warps),
    }  # fmt: skip


def splits_for(tiles: int, reach: int, block_n: int, least: int, programs: int) -> int:
    """Programs for the keys of one tile: as many (a power of two) as fill ``programs``, each with ``least`` tiles of keys."""
    room = programs // max(1, tiles)
    most = triton.cdiv(reach, block_n * least)
    return 1 << max(0, min(room, most, 64).bit_length() - 1)


def bind(shape: Shape, tile: Tile, programs: int, reusable: bool) -> Bound:
    """A launch that splits keys only where its tiles leave some of ``programs`` idle, and never where ``invariant``."""
    rows = shape.T * shape.G
    tiles = rows // tile.block_m + shape.B + 1
    reach = shape.capacity
    if shape.window:
        reach = min(reach, shape.window + triton.cdiv(tile.block_m, shape.G))
    busy = max(1, triton.cdiv(rows, tile.block_m)) * shape.HKV
    z = 1 if shape.invariant else splits_for(busy, reach, tile.block_n, tile.min_tiles, programs)
    fixed = constants(shape, tile, z)
    cap = shape.softcap
    scalars = (
        *shape.scales, shape.T, shape.B, shape.capacity, shape.window, shape.pages_b, tile.min_tiles,
        *shape.q, *shape.k, *shape.v, *shape.out,
        shape.scale / cap if cap else shape.scale * LOG2E.value, cap * LOG2E.value, shape.out_scale,
    )  # fmt: skip
    launcher = Launcher(
        prefill_kernel, tiles * shape.HKV * z, (*scalars, *fixed.values()),
        num_warps=tile.num_warps, num_stages=tile.num_stages, reusable=reusable,
    )  # fmt: skip
    items = tiles * shape.HKV
    width = fixed["DV0"] + fixed["DV1"] + 2
    return Bound(launcher, 4 * items * z * tile.block_m * width if z > 1 else 0, items if z > 1 else 0)


def launch(
    bound: Bound,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pages: torch.Tensor | None, lens: torch.Tensor | None,
    cu_q: torch.Tensor, cu_k: torch.Tensor | None, sinks: torch.Tensor | None, k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor | None, parts: torch.Tensor, counters: torch.Tensor,
) -> None:  # fmt: skip
    """``parts`` and ``counters`` as in decode; where the bound launch wants none of them, any tensor will do."""
    bound.launcher(q, k, v, pages, lens, cu_q, cu_k, sinks, k_scale, v_scale, out, lse, parts, counters)


def specimen(name: str, shape: Shape, q: str, kv: str, tile: Tile, splits: int = 1, targets: tuple[str, ...] | None = None,
             options: tuple[str, ...] = ()) -> Specimen:  # fmt: skip
    """``options``: the optional tensors that come (sinks, k_scale, v_scale, lse)."""
    pointers = {"q": q, "k": kv, "v": kv, "cu_q": "*i32", "out": q, "parts": "*u8", "counters": "*i32"}
    pointers |= {"pages": "*i32", "lens": "*i32"} if shape.paged else {"cu_k": "*i32"}
    optional = {"sinks": "*fp32", "k_scale": "*fp32", "v_scale": "*fp32", "lse": "*fp32"}
    pointers |= {n: t for n, t in optional.items() if n in options}
    strides = ("q_t", "q_h", "k_p", "k_s", "k_h", "v_p", "v_s", "v_h", "o_t", "o_h")
    ints = dict.fromkeys((*_PLAIN, *strides), "i32")
    floats = dict.fromkeys(("scale", "softcap", "out_scale"), "fp32")
    absent = {n: None for n in (*optional, "pages", "lens", "cu_k") if n not in pointers}
    fixed = constants(shape, tile, splits)
    types = pointers | ints | floats
    warps, stages = tile.num_warps, tile.num_stages
    return Specimen(name, prefill_kernel, types, absent | fixed, warps, stages, targets, (*_FREE, *_PLAIN))


def _shape(D: int, DV: int, G: int = 4, HKV: int = 8, S: int = 16, **more: Any) -> Shape:
    two, three = (0, 0), (0, 0, 0)
    strides: dict[str, Any] = {"q": two, "k": three, "v": three, "pages_b": 0, "out": two}
    return Shape(B=4, T=8192, HKV=HKV, G=G, S=S, D=D, DV=DV, capacity=8192, scale=1.0, **strides, **more)


_LARGE = ("cuda:80", "cuda:90", "cuda:100")
_FP8 = ("cuda:89", "cuda:90", "cuda:100", "cuda:120")
_WIDE = Tile(128, 64, 8, 3, 4)
_HALF = Tile(64, 64, 4, 2, 4)
_SMALL = Tile(64, 32, 4, 2, 4)

SPECIMENS = [
    specimen("prefill-D128-bf16", _shape(128, 128), "*bf16", "*bf16", _WIDE, targets=_LARGE),
    specimen("prefill-D128-S128-bf16", _shape(128, 128, S=128), "*bf16", "*bf16", Tile(128, 64, 8, 2, 4), targets=_LARGE),
    specimen("prefill-D128-M64-bf16", _shape(128, 128), "*bf16", "*bf16", _SMALL),
    specimen(
        "prefill-D64-window-sinks-fp16", _shape(64, 64, G=8, window=128), "*fp16", "*fp16", _HALF, options=("sinks", "lse")
    ),
    specimen("prefill-D80-full-bf16", _shape(80, 80, causal=False), "*bf16", "*bf16", _HALF),
    specimen("prefill-D96-softcap-bf16", _shape(96, 96, softcap=50.0), "*bf16", "*bf16", _SMALL),
    specimen("prefill-D192-Dv128-bf16", _shape(192, 128), "*bf16", "*bf16", _SMALL),
    specimen("prefill-D256-bf16", _shape(256, 256), "*bf16", "*bf16", Tile(128, 32, 8, 2, 4), targets=_LARGE),
    specimen("prefill-D128-split-bf16", _shape(128, 128), "*bf16", "*bf16", Tile(32, 64, 4, 2, 4), splits=8),
    specimen("prefill-D128-int8", _shape(128, 128, k_scale=True), "*bf16", "*i8", _HALF, options=("k_scale", "v_scale")),
    specimen("prefill-D128-e4m3", _shape(128, 128), "*bf16", "*fp8e4nv", _HALF, targets=_FP8),
    specimen("prefill-D128-fp32", _shape(128, 128), "*fp32", "*fp32", Tile(16, 16, 4, 2, 4)),
]
