"""Rounding that gives the same bits on every target and in Triton's interpreter.

The interpreter truncates float32 to bfloat16 and rounds e4m3 halves away from zero, and sm_80 has no
e4m3 conversion at all; these helpers round to nearest even by hand where ``BY_HAND`` says so.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Adding and taking away 1.5 * 2^23 leaves a float32 below 2^22 rounded to the nearest integer, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


@triton.jit
def round_even(x):
    """float32 below 2^22 in magnitude -> the nearest integer, halves to even, still float32."""
    return (x + _ROUNDER) - _ROUNDER


@triton.jit
def to_int8(x):
    """float32 -> int8: round half to even, clamp to +-127, NaN to 0."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -127.0), 127.0), 0.0)
    return round_even(x).to(tl.int8)


@triton.jit
def e4m3_bits(x):
    """float32 -> the bits of torch.float8_e4m3fn in uint8, clamped to +-448, halves to even, NaN kept."""
    bits = x.to(tl.uint32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    up = size.to(tl.uint32, bitcast=True)
    # Normal: drop 20 mantissa bits, then move the exponent's bias from 127 to 7.
    normal = ((up + 0x7FFFF + ((up >> 20) & 1)) >> 20) - 960
    # Below 2^-6 the steps are 2^-9; eight of them are the bits of 2^-6 itself.
    small = round_even(tl.where(size < 0.015625, size, 0.0) * 512.0).to(tl.uint32)
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x == x, code, 0x7F)
    return (sign | code).to(tl.uint8)


@triton.jit
def to_e4m3(x, BY_HAND: tl.constexpr):
    """float32 -> e4m3, clamped to +-448: uint8 bits where BY_HAND, else the hardware's type."""
    if BY_HAND:
        return e4m3_bits(x)
    else:
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -448.0), 448.0), x)
        return x.to(tl.float8e4nv)


@triton.jit
def narrow(x, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """float32 -> dtype (float32, float16 or bfloat16), halves to even."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return tl.where(x == x, bits, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)
