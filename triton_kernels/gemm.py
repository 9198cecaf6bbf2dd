"""W8A8 matrix product: a [M, K] x w [N, K]^T, int8 or e4m3, scales and bias in the epilogue.

Tiles are walked in groups of rows, so that neighbouring programs share weights in L2. Where M is small the K axis
is split over programs: each leaves its partial sums in a workspace and the last to arrive adds them in order, so
the result does not depend on which one that was.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .tiles import device_function, loop, narrow, widen


@device_function
def _load(rows, at, K, EVEN_K: tl.constexpr):
    if EVEN_K:
        return tl.load(rows + at[None, :])
    else:
        return tl.load(rows + at[None, :], mask=at[None, :] < K, other=0.0)


@device_function
def _products(
    a, w, K, stride_a, stride_w, m, n, first, last,
    INT8: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Sum over the K tiles first .. last - 1 of rows m of a times rows n of w: int32 or float32 [BM, BN]."""
    # sm_90's tensor core adds e4m3 products with 14 bits; every PROMOTE of them go to a float32 register.
    PROMOTE: tl.constexpr = 128 if BK > 128 else BK
    if WIDE:
        m = m.to(tl.int64)
        n = n.to(tl.int64)
    a_rows = a + m[:, None] * stride_a
    w_rows = w + n[:, None] * stride_w
    acc = tl.zeros([BM, BN], tl.int32 if INT8 else tl.float32)
    for t in loop(first, last, 1):
        at = t * BK + tl.arange(0, BK)
        x = _load(a_rows, at, K, EVEN_K)
        y = tl.trans(_load(w_rows, at, K, EVEN_K))
        if INT8:
            acc = tl.dot(x, y, acc, out_dtype=tl.int32)
        else:
            acc = tl.dot(x, y, acc, max_num_imprecise_acc=PROMOTE)
    return acc


@device_function
def _finish(acc, a_scale, w_scale, bias, out, M, N, stride_o, m, n, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr):
    """acc * a_scale * w_scale + bias, rounded once, to out."""
    ok_m = m < M
    ok_n = n < N
    sa = tl.load(a_scale + m, mask=ok_m, other=0.0)[:, None] if A_ROWS else tl.load(a_scale)
    sw = tl.load(w_scale + n, mask=ok_n, other=0.0)[None, :] if W_ROWS else tl.load(w_scale)
    y = acc.to(tl.float32) * sa * sw
    if bias is not None:
        y += widen(tl.load(bias + n, mask=ok_n, other=0.0))[None, :]
    at = out + m.to(tl.int64)[:, None] * stride_o + n[None, :]
    tl.store(at, narrow(y, out.dtype.element_ty), mask=ok_m[:, None] & ok_n[None, :])


@triton.jit
def gemm_kernel(
    a, w, a_scale, w_scale, bias, out, parts, counters,
    M, N, K, stride_a, stride_w, stride_o,
    INT8: tl.constexpr, A_ROWS: tl.constexpr, W_ROWS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    SPLIT: tl.constexpr, GROUP: tl.constexpr, EVEN_K: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """One output tile, or one of SPLIT stretches of its K axis, a program."""
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    tiles = tiles_m * tiles_n
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    group = tile // (GROUP * tiles_n) * GROUP
    height = tl.minimum(tiles_m - group, GROUP)
    within = tile % (GROUP * tiles_n)
    m = (group + within % height) * BM + tl.arange(0, BM)
    n = (within // height) * BN + tl.arange(0, BN)

    turns = tl.cdiv(K, BK)
    share = tl.cdiv(turns, SPLIT)
    first = part * share
    last = tl.minimum(first + share, turns)
    # Rows past the end wrap around to rows that exist: no mask in the loop, and nothing of them is stored.
    acc = _products(a, w, K, stride_a, stride_w, m % M, n % N, first, last, INT8, BM, BN, BK, EVEN_K, WIDE)
    if SPLIT == 1:
        _finish(acc, a_scale, w_scale, bias, out, M, N, stride_o, m, n, A_ROWS, W_ROWS)
    else:
        typed = parts.to(tl.pointer_type(tl.int32 if INT8 else tl.float32), bitcast=True)
        spot = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
        mine = typed + tile.to(tl.int64) * (SPLIT * BM * BN)
        tl.store(mine + part * (BM * BN) + spot, acc)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu")
        if arrived == SPLIT - 1:
            acc = tl.load(mine + spot)
            for other in loop(1, SPLIT, 1):
                acc += tl.load(mine + other * (BM * BN) + spot)
            _finish(acc, a_scale, w_scale, bias, out, M, N, stride_o, m, n, A_ROWS, W_ROWS)
            tl.store(counters + tile, 0)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch is bound to. Strides count elements; a_rows, w_rows: a scale a row, else one for all."""

    M: int
    N: int
    K: int
    stride_a: int
    stride_w: int
    stride_o: int
    int8: bool
    a_rows: bool
    w_rows: bool


@dataclass(frozen=True, slots=True)
class Bound:
    """A launch made ready: bytes of workspace and number of counters it wants (0 without a split)."""

    launcher: Launcher
    part_bytes: int
    counters: int


def _constants(shape: Shape, block_m: int, block_n: int, block_k: int, split_k: int, group_m: int) -> dict[str, Any]:
    wide = max(shape.M * shape.stride_a, shape.N * shape.stride_w) + shape.K >= 2**31
    return {
        "INT8": shape.int8, "A_ROWS": shape.a_rows, "W_ROWS": shape.w_rows, "BM": block_m, "BN": block_n, "BK": block_k,
        "SPLIT": split_k, "GROUP": group_m, "EVEN_K": shape.K % block_k == 0, "WIDE": wide,
    }  # fmt: skip


def bind(
    shape: Shape, *, block_m: int, block_n: int, block_k: int, split_k: int, group_m: int, num_warps: int, num_stages: int,
    reusable: bool,
) -> Bound:  # fmt: skip
    split_k = max(1, min(split_k, triton.cdiv(shape.K, block_k)))
    tiles = triton.cdiv(shape.M, block_m) * triton.cdiv(shape.N, block_n)
    fixed = _constants(shape, block_m, block_n, block_k, split_k, group_m)
    sizes = (shape.M, shape.N, shape.K, shape.stride_a, shape.stride_w, shape.stride_o)
    launcher = Launcher(
        gemm_kernel, tiles * split_k, (*sizes, *fixed.values()), num_warps=num_warps, num_stages=num_stages, reusable=reusable
    )
    split = split_k > 1
    return Bound(launcher, 4 * tiles * split_k * block_m * block_n * split, tiles * split)


def launch(
    bound: Bound,
    a: torch.Tensor, w: torch.Tensor, a_scale: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor | None,
    out: torch.Tensor, parts: torch.Tensor | None, counters: torch.Tensor | None,
) -> None:  # fmt: skip
    """``parts`` (uint8) and ``counters`` (int32 zeros, zeros again afterwards) as ``bound`` wants them."""
    bound.launcher(a, w, a_scale, w_scale, bias, out, parts, counters)


def specimen(
    kind: str, M: int, block_m: int, block_n: int, block_k: int, split_k: int, num_warps: int, num_stages: int,
    targets: tuple[str, ...] | None, K: int = 4096,
) -> Specimen:  # fmt: skip
    """``kind``: i8 or fp8e4nv."""
    shape = Shape(M, 4096, K, K, K, 4096, kind == "i8", True, True)
    pointers = {"a": f"*{kind}", "w": f"*{kind}", "a_scale": "*fp32", "w_scale": "*fp32", "bias": "*bf16", "out": "*bf16"}
    consts = _constants(shape, block_m, block_n, block_k, split_k, 8)
    if split_k > 1:
        pointers |= {"parts": "*u8", "counters": "*i32"}
    else:
        consts |= {"parts": None, "counters": None}
    ints = dict.fromkeys(("M", "N", "K", "stride_a", "stride_w", "stride_o"), "i32")
    free = ("M",) if K % 16 == 0 else ("M", "K", "stride_a", "stride_w")
    name = f"gemm-{kind}-{block_m}x{block_n}x{block_k}-split{split_k}-K{K}"
    return Specimen(name, gemm_kernel, pointers | ints, consts, num_warps, num_stages, targets, free)


#: Targets and their default tiles: (M, block_m, block_n, block_k, split_k, num_warps, num_stages).
_HOPPER, _SMALL = ("cuda:90", "cuda:100"), ("cuda:89", "cuda:120", "hip:gfx942")
_LOW = [(1, 16, 64, 256, 8, 4, 4), (32, 32, 64, 256, 4, 4, 4), (64, 64, 128, 128, 2, 4, 4), (128, 128, 128, 128, 2, 8, 4)]
_TILES = [
    (("cuda:80", *_HOPPER), _LOW, True),
    (_HOPPER, [(4096, 128, 256, 128, 1, 8, 4)], False),
    (("cuda:80",), [(4096, 128, 256, 128, 1, 8, 3)], False),
    (_SMALL, [(1, 16, 64, 128, 8, 4, 4), (64, 64, 64, 128, 2, 4, 4), (4096, 128, 128, 64, 1, 4, 3)], True),
]


def _specimens() -> list[Specimen]:
    found = []
    for targets, tiles, both in _TILES:
        # No e4m3 products on sm_80; gfx942 multiplies another e4m3 (fnuz).
        fp8 = tuple(t for t in targets if both and t not in ("cuda:80", "hip:gfx942"))
        for tile in tiles:
            found.append(specimen("i8", *tile, targets))
            if fp8:
                found.append(specimen("fp8e4nv", *tile, fp8))
    found.append(specimen("i8", 16, 16, 64, 128, 4, 4, 3, None, K=1001))
    return found


SPECIMENS = _specimens()
