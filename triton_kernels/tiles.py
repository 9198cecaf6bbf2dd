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


def _interpreted_loop(start: Any, stop: Any, step: int) -> range:
    """A range over the interpreter's scalars, which are arrays of one element that numpy 2.4 takes for no index."""
    first, last = (int(x.handle.data.item()) if isinstance(x, tl.tensor) else x for x in (start, stop))
    return range(first, last, step)


#: for at in loop(start, stop, step): ``tl.range``, made to work in the interpreter.
loop = _interpreted_loop if triton.knobs.runtime.interpret else tl.range


@device_function
def widen(x):
    """Any element type to float32, exactly (the interpreter holds bfloat16 as bits)."""
    if INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@device_function
def narrow(x, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest even (the interpreter's own cast to bfloat16 truncates)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True).to(tl.uint64)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        bits = tl.where(x == x, bits, 0x7FC0)
        return bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


#: Four int8 to bfloat16: 128 + the low seven bits, less 128 or 256 as the sign bit says; both are exact.
INT8_TO_BF16 = tl.constexpr("""{
.reg .b32 p, a, c, one;
mov.b32 one, 0xBF80BF80;
prmt.b32 p, $2, 0, 0x4140;
lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 c, p, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $0, c, one, a;
prmt.b32 p, $2, 0, 0x4342;
lop3.b32 a, p, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 c, p, 0x00800080, 0x43004300, 0xEA;
fma.rn.bf16x2 $1, c, one, a;
}""")

#: Four int8 to float16: 1024 + (x + 128) by the bits, less 1152.
INT8_TO_FP16 = tl.constexpr("""{
.reg .b32 x, p, n;
mov.b32 n, 0x64806480;
xor.b32 x, $2, 0x80808080;
mov.b32 p, 0x64646464;
prmt.b32 $0, x, p, 0x4140;
prmt.b32 $1, x, p, 0x4342;
sub.f16x2 $0, $0, n;
sub.f16x2 $1, $1, n;
}""")

#: Four e4m3 to bfloat16: the bits in place are the value times 2^-120, subnormals too; one product puts that right.
E4M3_TO_BF16 = tl.constexpr("""{
.reg .b32 p, u, big, zero;
mov.b32 big, 0x7B807B80;
mov.b32 zero, 0x80008000;
prmt.b32 p, $2, 0, 0x1404;
shr.u32 u, p, 4;
and.b32 u, u, 0x07F007F0;
lop3.b32 p, p, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $0, p, big, zero;
prmt.b32 p, $2, 0, 0x3424;
shr.u32 u, p, 4;
and.b32 u, u, 0x07F007F0;
lop3.b32 p, p, 0x80008000, u, 0xEA;
fma.rn.bf16x2 $1, p, big, zero;
}""")

#: Four e4m3 to float16, by the instruction for it (compute capability 8.9).
E4M3_TO_FP16 = tl.constexpr("""{
.reg .b16 a, b;
mov.b32 {a, b}, $2;
cvt.rn.f16x2.e4m3x2 $0, a;
cvt.rn.f16x2.e4m3x2 $1, b;
}""")


@device_function
def operand(x, dtype: tl.constexpr, PTX: tl.constexpr, STAY: tl.constexpr):
    """A KV tile as a dot operand: quantised values become ``dtype``, exactly (but e4m3's NaN, which may read as 480).

    Triton converts 8-bit values one at a time; the assembly takes four at once. Triton also moves a change of layout
    before a conversion, which for V then loads single bytes from shared memory. STAY, by calling the assembly impure,
    keeps the conversion where the values lie side by side.
    """
    if INTERPRETED:
        return widen(x)
    elif PTX and x.dtype == tl.int8 and dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(INT8_TO_BF16, "=&r,=&r,r", [x], tl.bfloat16, is_pure=not STAY, pack=4)
    elif PTX and x.dtype == tl.int8 and dtype == tl.float16:
        return tl.inline_asm_elementwise(INT8_TO_FP16, "=&r,=&r,r", [x], tl.float16, is_pure=not STAY, pack=4)
    elif PTX and x.dtype == tl.float8e4nv and dtype == tl.bfloat16:
        bits = x.to(tl.uint8, bitcast=True)
        return tl.inline_asm_elementwise(E4M3_TO_BF16, "=&r,=&r,r", [bits], tl.bfloat16, is_pure=not STAY, pack=4)
    elif PTX and x.dtype == tl.float8e4nv and dtype == tl.float16:
        bits = x.to(tl.uint8, bitcast=True)
        return tl.inline_asm_elementwise(E4M3_TO_FP16, "=&r,=&r,r", [bits], tl.float16, is_pure=not STAY, pack=4)
    else:
        return x.to(dtype)


@device_function
def dot(a, b, acc):
    """acc + a b with float32 accumulation; float32 operands are multiplied as float32, not as tf32."""
    if INTERPRETED:
        return acc + tl.dot(widen(a), widen(b), input_precision="ieee")
    else:
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
    else:
        at = key + offs
        return tl.load(row + at // S, mask=(at >= floor) & (at < L), other=0)


@device_function
def load_tile(rows, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, ok, MASKED: tl.constexpr):
    """Columns [FROM, FROM + WIDTH) of the rows at pointers ``rows``; columns from D on, and rows not ok, are 0."""
    cols = FROM + tl.arange(0, WIDTH)
    at = rows[:, None] + cols[None, :]
    if MASKED and FROM + WIDTH > D:
        return tl.load(at, mask=ok[:, None] & (cols < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=ok[:, None], other=0.0)
    elif FROM + WIDTH > D:
        return tl.load(at, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@device_function
def latent_tile(rows, C: tl.constexpr, ok, dtype: tl.constexpr, PTX: tl.constexpr):
    """The latent part of rows of an fp8 latent cache (C e4m3 values, a float32 scale for each 128) as a dot operand."""
    BN: tl.constexpr = rows.shape[0]
    BLOCKS: tl.constexpr = C // 128
    middle: tl.constexpr = tl.bfloat16 if dtype == tl.float32 else dtype
    bits = load_tile(rows, C, 0, C, ok, True)
    x = widen(operand(bits.to(tl.float8e4nv, bitcast=True), middle, PTX, False))
    at = (rows + C).to(tl.pointer_type(tl.float32))
    scale = tl.load(at[:, None] + tl.arange(0, BLOCKS)[None, :], mask=ok[:, None], other=0.0)
    x = tl.reshape(x, [BN, BLOCKS, 128]) * tl.expand_dims(scale, 2)
    return narrow(tl.reshape(x, [BN, C]), dtype)


@device_function
def latent_rope_tile(rows, C: tl.constexpr, R: tl.constexpr, ok, dtype: tl.constexpr):
    """The rope part of the same rows: R bf16 values after the scales."""
    at = (rows + (C + C // 32)).to(tl.pointer_type(tl.bfloat16))
    return narrow(widen(load_tile(at, R, 0, R, ok, True)), dtype)


@device_function
def store_tile(rows, x, D: tl.constexpr, FROM: tl.constexpr, WIDTH: tl.constexpr, ok):
    cols = FROM + tl.arange(0, WIDTH)
    mask = ok[:, None]
    if FROM + WIDTH > D:
        mask = mask & (cols < D)[None, :]
    tl.store(rows[:, None] + cols[None, :], x, mask=mask)


@device_function
def visible(key, pos, L, bits, near, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr):
    """Which keys each query position sees; ``key``, and ``pos`` and ``bits``, come with axes that broadcast."""
    if TREE:
        j = tl.minimum(tl.maximum(key - near, 0), 31)
        see = (key < near) | (((bits >> j) & 1) != 0)
        see = see & (key < L) & (pos >= 0)
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
    MASKED: tl.constexpr, RISING: tl.constexpr, SWAP: tl.constexpr, PTX: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, TREE: tl.constexpr, SOFTCAP: tl.constexpr,
    PAGED: tl.constexpr, SHARED: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, DV: tl.constexpr, DV0: tl.constexpr, DV1: tl.constexpr,
):  # fmt: skip
    """Online softmax of one query tile over the keys [start, stop), in tiles of BN.

    q0 [M, D0] and q1 [M, D1] are the two parts of the queries (D = D0 + D1 spares the padding of 80, 96, 192 to
    the next power of two); k, v point at the head's first element of page 0 (or of the sequence's first row where
    not PAGED); of uint8 they are rows of an fp8 latent cache. ``floor`` is the lowest key that any row sees. ``scale``
    takes q.k to log2 units (with SOFTCAP: to units of the cap, and ``softcap`` back to log2 units); RISING promises that
    it is positive, which lets it join the subtraction of the maximum. SHARED reads no V: it is K's first part. SWAP
    computes the transposed products, keys (and value columns) on the side of the tile that tensor cores want large: acc0
    is then [DV0, M], acc1 [DV1, M].
    The page ids of the next tile are fetched a turn ahead, so that the pipeliner sees no chain of loads.
    """
    ONE: tl.constexpr = S % BN == 0
    M: tl.constexpr = q0.shape[0]
    AXIS: tl.constexpr = 0 if SWAP else 1
    # From 64 rows on V goes to shared memory as it is converted, and Triton cannot predicate impure code there.
    STAY: tl.constexpr = M < 64
    dtype: tl.constexpr = q0.dtype
    LATENT8: tl.constexpr = k.dtype.element_ty == tl.uint8
    offs = tl.arange(0, BN)
    if PAGED:
        ids = page_ids(pages, start, offs, floor, L, S, ONE)
    for at in loop(start, stop, BN):
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
        if LATENT8:
            k0 = latent_tile(krow, D0, ok, dtype, PTX)
        else:
            k0 = operand(load_tile(krow, D, 0, D0, ok, MASKED), dtype, PTX, False)
        if SWAP:
            s = dot(k0, tl.trans(q0), tl.zeros([BN, M], tl.float32))
        else:
            s = dot(q0, tl.trans(k0), tl.zeros([M, BN], tl.float32))
        if D1 > 0:
            if LATENT8:
                k1 = latent_rope_tile(krow, D0, D1, ok, dtype)
            else:
                k1 = operand(load_tile(krow, D, D0, D1, ok, MASKED), dtype, PTX, False)
            if SWAP:
                s = dot(k1, tl.trans(q1), s)
            else:
                s = dot(q1, tl.trans(k1), s)
        if MASKED or SOFTCAP or not RISING:
            s = s * scale
            if SOFTCAP:
                s = tanh(s, dtype == tl.float32) * softcap
            if MASKED:
                keys = tl.expand_dims(key, 1 - AXIS)
                rows = tl.expand_dims(pos, AXIS)
                see = visible(keys, rows, L, tl.expand_dims(bits, AXIS), near, window, CAUSAL, WINDOW, TREE)
                s = tl.where(see, s, float("-inf"))
            top = tl.maximum(m, tl.max(s, AXIS))
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s - tl.expand_dims(base, AXIS))
        else:
            top = tl.maximum(m, tl.max(s, AXIS) * scale)
            base = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s * scale - tl.expand_dims(base, AXIS))
        fade = tl.exp2(m - base)
        l = l * fade + tl.sum(p, AXIS)
        m = top
        p = narrow(p, dtype)
        fades = tl.expand_dims(fade, AXIS)
        v0 = k0
        if not SHARED:
            v0 = operand(load_tile(vrow, DV, 0, DV0, ok, MASKED), dtype, PTX, STAY)
        if SWAP:
            acc0 = dot(tl.trans(v0), p, acc0 * fades)
        else:
            acc0 = dot(p, v0, acc0 * fades)
        if DV1 > 0:
            v1 = operand(load_tile(vrow, DV, DV0, DV1, ok, MASKED), dtype, PTX, STAY)
            if SWAP:
                acc1 = dot(tl.trans(v1), p, acc1 * fades)
            else:
                acc1 = dot(p, v1, acc1 * fades)
    return m, l, acc0, acc1
