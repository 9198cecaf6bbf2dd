"""What the attention kernels share: casts that the interpreter gets right, and the walk over KV tiles.

Scores are kept in units of log2, so exp2 needs no multiplication. A row that has seen no key has maximum
-inf; every difference with it is taken against 0 instead, so no NaN arises and no finite sentinel is needed.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


def device_function(fn: Any) -> Any:
    """A function that kernels call.

    The interpreter patches the whole language anew at each call of a jit function (milliseconds), but a plain
    function called from a kernel runs under the kernel's patches. So there the function stays as it is.
    """
    return fn if triton.knobs.runtime.interpret else triton.jit(fn)


@device_function
def widen(x):
    """Any element type to float32, exactly (the interpreter holds bfloat16 as bits)."""
    if INTERPRETED:
        if x.dtype == tl.bfloat16:
            return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@device_function
def narrow(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even (the interpreter's own cast to bfloat16 truncates)."""
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
            bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
            bits = tl.where(x == x, bits, 0x7FC0)
            return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return x.to(dtype)


@device_function
def operand(x, dtype: tl.constexpr):
    """A KV tile as a dot operand: quantised values become ``dtype`` (int8 and e4m3 fit bfloat16 exactly)."""
    if INTERPRETED:
        return widen(x)
    if x.dtype == dtype:
        return x
    return x.to(dtype)


@device_function
def dot(a, b, acc):
    """acc + a b with float32 accumulation; float32 operands are multiplied as float32, not as tf32."""
    if INTERPRETED:
        return acc + tl.dot(widen(a), widen(b), input_precision="ieee")
    return tl.dot(a, b, acc, input_precision="ieee")


@device_function
def tanh(x, EXACT: tl.constexpr):
    """tanh by exp2; EXACT takes a polynomial near 0, where 1 - 2 / (1 + e^2x) cancels (Cephes' tanhf)."""
    t = 1.0 - 2.0 / (1.0 + tl.exp2(x * 2.8853900817779268))
    if EXACT:
        z = x * x
        r = (((-5.70498872745e-3 * z + 2.06390887954e-2) * z - 5.37397155531e-2) * z + 1.33314422036e-1) * z
        t = tl.where(z < 0.390625, (r - 3.33332819422e-1) * z * x + x, t)
    return t


@device_function
def page_ids(row, key, offs, floor, L, S: tl.constexpr, ONE: tl.constexpr):
    """Table entries for the keys of the tile at ``key``: one where a page holds the tile, else one a key.

    Entries that hold no key in [floor, L) are not read.
    """
    if ONE:
        return tl.load(row + key // S, mask=key < L, other=0)
    at = key + offs
    return tl.load(row + at // S, mask=(at >= floor) & (at < L), other=0)


@device_function
def load_tile(rows, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, ok, MASKED: tl.constexpr):
    """Columns [FROM, FROM + WIDTH) of the rows at pointers ``rows``; columns from D on, and rows not ok, are 0."""
    cols = FROM + tl.arange(0, WIDTH)
    at = rows[:, None] + cols[None, :]
    if FROM + WIDTH > D:
        if MASKED:
            return tl.load(at, mask=ok[:, None] & (cols < D)[None, :], other=0.0)
        return tl.load(at, mask=(cols < D)[None, :], other=0.0)
    if MASKED:
        return tl.load(at, mask=ok[:, None], other=0.0)
    return tl.load(at)


@device_function
def store_tile(rows, x, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, ok):
    cols = FROM + tl.arange(0, WIDTH)
    mask = ok[:, None]
    if FROM + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    tl.store(rows[:, None] + cols[None, :], x, mask=mask)


@device_function
def visible(key, pos, L, bits, near, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr):
    """Which keys [N] each query position [M] sees, as [M, N]."""
    key = key[None, :]
    pos = pos[:, None]
    if TREE:
        j = tl.minimum(tl.maximum(key - near, 0), 31)
        see = (key < near) | (((bits[:, None] >> j) & 1) != 0)
        see = see & (key < L)
    elif CAUSAL:
        see = key <= pos
    else:
        see = (key < L) & (pos >= 0)
    if WINDOW:
        see = see & (key > pos - window)
        if not CAUSAL:
            see = see & (key < pos + window)
    return see


@device_function
def walk(
    q0, q1, k, v, pages, k_p, k_s, v_p, v_s,
    start, stop, floor, L, pos, bits, near, window, scale, softcap,
    m, l, acc0, acc1,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr, SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr, SHARED: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile over the keys [start, stop), in tiles of BN.

    q0 [M, D0] and q1 [M, D1] are the two parts of the queries (D = D0 + D1 spares the padding of 80, 96, 192 to
    the next power of two); k, v point at the head's first element of page 0 (or of the sequence's first row where
    not PAGED). ``floor`` is the lowest key that any row sees. ``scale`` takes q.k to log2 units (with SOFTCAP: to
    units of the cap, and ``softcap`` back to log2 units) and is not negative. SHARED reads no V: it is K's first part.
    The page ids of the next tile are fetched a turn ahead, so that the pipeliner sees no chain of loads.
    """
    ONE: tl.constexpr = S % BN == 0
    dtype: tl.constexpr = q0.dtype
    offs = tl.arange(0, BN)
    ids = offs
    if PAGED:
        ids = page_ids(pages, start, offs, floor, L, S, ONE)
    for at in tl.range(start, stop, BN):
        key = at + offs
        ok = key < L
        if WINDOW:
            ok = ok & (key >= floor)
        if PAGED:
            slot = (key % S).to(tl.int64)
            page = ids.to(tl.int64)
            krow = k + (page * k_p + slot * k_s)
            vrow = v + (page * v_p + slot * v_s)
            ids = page_ids(pages, at + BN, offs, floor, L, S, ONE)
        else:
            krow = k + key.to(tl.int64) * k_s
            vrow = v + key.to(tl.int64) * v_s
        k0 = operand(load_tile(krow, D, 0, D0, ok, MASKED), dtype)
        s = dot(q0, tl.trans(k0), tl.zeros([q0.shape[0], BN], tl.float32))
        if D1 > 0:
            k1 = operand(load_tile(krow, D, D0, D1, ok, MASKED), dtype)
            s = dot(q1, tl.trans(k1), s)
        if MASKED or SOFTCAP:
            s = s * scale
            if SOFTCAP:
                s = tanh(s, dtype == tl.float32) * softcap
            if MASKED:
                s = tl.where(visible(key, pos, L, bits, near, window, CAUSAL, WINDOW, TREE), s, float("-inf"))
            top = tl.maximum(m, tl.max(s, 1))
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s - base[:, None])
        else:
            top = tl.maximum(m, tl.max(s, 1) * scale)
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s * scale - base[:, None])
        fade = tl.exp2(m - base)
        l = l * fade + tl.sum(p, 1)
        m = top
        p = narrow(p, dtype)
        v0 = k0
        if not SHARED:
            v0 = operand(load_tile(vrow, DV, 0, DV0, ok, MASKED), dtype)
        acc0 = dot(p, v0, acc0 * fade[:, None])
        if DV1 > 0:
            v1 = operand(load_tile(vrow, DV, DV0, DV1, ok, MASKED), dtype)
            acc1 = dot(p, v1, acc1 * fade[:, None])
    return m, l, acc0, acc1
