"""Rounding to 8 bits that gives the same codes on every target and in Triton's interpreter.

The interpreter rounds e4m3 halves away from zero, and sm_80 has no e4m3 conversion at all, so the codes can be
made by hand.
"""

from __future__ import annotations

import triton.language as tl

from .tiles import device_function

#: Adding and taking away 1.5 * 2^23 leaves a float32 below 2^22 rounded to the nearest integer, halves to even.
_ROUNDER = tl.constexpr(12582912.0)


@device_function
def round_even(x):
    """float32 below 2^22 in magnitude -> the nearest integer, halves to even, still float32."""
    return (x + _ROUNDER) - _ROUNDER


@device_function
def to_int8(x):
    """float32 -> int8: round half to even, clamp to +-127, NaN to 0."""
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -127.0), 127.0), 0.0)
    return round_even(x).to(tl.int8)


@device_function
def e4m3_bits(x):
    """float32 -> the bits of torch.float8_e4m3fn in uint8, clamped to +-448, halves to even, NaN kept."""
    sign = (x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    size = tl.minimum(tl.where(x == x, tl.abs(x), 0.0), 448.0)
    tiny = size < 0.015625
    # Normal numbers: drop 20 mantissa bits, then move the exponent's bias from 127 to 7.
    up = tl.where(tiny, 1.0, size).to(tl.uint32, bitcast=True)
    normal = ((up + 0x7FFFF + ((up >> 20) & 1)) >> 20) - 960
    # Below 2^-6 the steps are 2^-9, and eight of them give the bits of 2^-6 itself.
    small = round_even(tl.where(tiny, size, 0.0) * 512.0).to(tl.uint32)
    code = tl.where(x == x, tl.where(tiny, small, normal), 0x7F)
    return (sign | code).to(tl.uint8)


@device_function
def to_e4m3(x, BY_HAND: tl.constexpr):
    """float32 -> e4m3, clamped to +-448: uint8 bits where BY_HAND, else the hardware's type."""
    if BY_HAND:
        return e4m3_bits(x)
    else:
        return tl.where(x == x, tl.minimum(tl.maximum(x, -448.0), 448.0), x).to(tl.float8e4nv)
