"""What the sampling kernels share: a row's logits after penalties and temperature, and the Gumbel noise.

Noise: Philox4x32-10 (Salmon et al., SC 2011) keyed by the row's seed, counted by token id (or group of tokens) and
offset, so that every split of a row and every implementation draws the same numbers; then Gumbel-max (Gumbel 1954).
"""

from __future__ import annotations

from typing import Any

import triton.language as tl

from .tiles import INTERPRETED, device_function, loop, widen

F32_MAX = tl.constexpr(3.4028234663852886e38)
NO_LOGIT = tl.constexpr(float("-inf"))
#: An id that no token has, after all others.
NO_TOKEN = tl.constexpr(0x7FFFFFFF)
#: Tokens of 32 groups, 16 each: four neighbours in each of four chunks of 128.
PIECE = tl.constexpr(512)
LOG_16 = tl.constexpr(2.772588722239781)
#: 2^42: masses are summed as whole multiples of 2^-42 of the largest token's, so that no order of adding matters.
MASS_ONE = tl.constexpr(4398046511104.0)
#: Noise lies in [-3.2, 22.9]: a token this far below the largest logit can never be drawn.
REACH = tl.constexpr(27.0)


def _plain_loop(start: Any, stop: Any, step: int, num_stages: int) -> range:
    return loop(start, stop, step)


#: tl.range that loads tiles ``num_stages`` - 1 turns ahead (the interpreter loads as it goes).
stream = _plain_loop if INTERPRETED.value else tl.range


@device_function
def option(pointer, value, b, dtype: tl.constexpr):
    """An option of row b: from its tensor where one comes, else the number."""
    if pointer is not None:
        return tl.load(pointer + b).to(dtype)
    else:
        return tl.full([], value, dtype)


@device_function
def numbers(repetition, presence, frequency, temperature, values, b):
    """A row's numbers: (repetition, presence, frequency, divisor, its reciprocal, 1 where the row is greedy)."""
    temp = option(temperature, values[3], b, tl.float32)
    t = tl.where(temp == 0.0, 1.0, tl.maximum(temp, 1e-30))
    r = option(repetition, values[0], b, tl.float32)
    pp = option(presence, values[1], b, tl.float32)
    fp = option(frequency, values[2], b, tl.float32)
    return r, pp, fp, t, tl.div_rn(1.0, t), (temp == 0.0).to(tl.int32)


@device_function
def _penalised(x, v, ok, src, strides, b, num, REPEAT: tl.constexpr):
    """Penalties, bias and mask on x."""
    if src[1] is not None:
        n = tl.load(src[1] + b * strides[1] + v, mask=ok, other=0)
    if REPEAT:
        seen = v < 0
        if src[1] is not None:
            seen = seen | (n > 0)
        if src[2] is not None:
            seen = seen | (tl.load(src[2] + b * strides[2] + v, mask=ok, other=0) != 0)
        x = tl.where(seen, tl.where(x > 0.0, tl.div_rn(x, num[0]), x * num[0]), x)
    if src[1] is not None:
        x = x - num[2] * n.to(tl.float32)
        x = x - num[1] * (n > 0).to(tl.float32)
    if src[3] is not None:
        x = x + tl.load(src[3] + b * strides[3] + v, mask=ok, other=0.0)
    if src[4] is not None:
        word = tl.load(src[4] + b * strides[4] + (v >> 5), mask=ok, other=0)
        x = tl.where(((word >> (v & 31)) & 1) != 0, x, NO_LOGIT)
    return tl.where(x == x, x, NO_LOGIT)


@device_function
def _warm(x, t, reciprocal):
    """x / t rounded once, at most the largest float: a product and Markstein's correction (1990), no division."""
    if INTERPRETED:
        x = tl.div_rn(x, t)
    else:
        q = x * reciprocal
        x = tl.where(tl.abs(q) < F32_MAX, tl.fma(tl.fma(-q, t, x), reciprocal, q), q)
    return tl.minimum(x, F32_MAX)


@device_function
def scores(src, strides, num, b, v, V, REPEAT: tl.constexpr, TEMPERED: tl.constexpr):
    """Of the ids v in row b (int64): (logits after penalties and temperature, before temperature, 1 where NaN).

    src      (logits, counts, prompt mask, bias, allowed bits), None where one does not come
    strides  of their rows
    num      the row's ``numbers``

    +inf counts as the largest float; NaN, and ids past the end, as -inf.
    """
    ok = v < V
    x = widen(tl.load(src[0] + b * strides[0] + v, mask=ok, other=NO_LOGIT))
    bad = (x != x).to(tl.int32)
    x = tl.where(x == x, tl.minimum(x, F32_MAX), NO_LOGIT)
    x = _penalised(x, v, ok, src, strides, b, num, REPEAT)
    l = x
    if TEMPERED:
        l = _warm(x, num[3], num[4])
    return l, x, bad


@device_function
def uniform4(seed, offset, group):
    """u in (0, 1) for the ids 4 group .. 4 group + 3: [N] int32 -> [N, 4] float32."""
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (group * 0).to(tl.uint32)
    a, b, c, d = tl.philox(seed, group.to(tl.uint32), zero + low, zero + high, zero)
    words = tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), [group.shape[0], 4])
    u = (words.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.minimum(u, 0.999999940395355224609375)


@device_function
def uniform1(seed, offset, v):
    """u for the ids v [N], which need not be neighbours."""
    group = v >> 2
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (group * 0).to(tl.uint32)
    a, b, c, d = tl.philox(seed, group.to(tl.uint32), zero + low, zero + high, zero)
    word = tl.where((v & 2) == 0, tl.where((v & 1) == 0, a, b), tl.where((v & 1) == 0, c, d))
    u = (word.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.minimum(u, 0.999999940395355224609375)


@device_function
def _uniform_of(seed, offset, counter, stream: tl.constexpr, word):
    """u from a word (0 to 3) of each counter; stream 1: of groups of tokens, 2: of the choice inside a group."""
    low = (offset & 0xFFFFFFFF).to(tl.uint32)
    high = ((offset >> 32) & 0xFFFFFFFF).to(tl.uint32)
    zero = (counter * 0).to(tl.uint32)
    a, b, c, d = tl.philox(seed, counter.to(tl.uint32), zero + low, zero + high, zero + stream)
    x = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    u = (x.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    return tl.minimum(u, 0.999999940395355224609375)


@device_function
def group_peaks(l, PIECES: tl.constexpr):
    """The largest logit of each group: [128 PIECES, 4] -> [PIECES, 32]."""
    return tl.max(tl.reshape(tl.max(l, 1), [PIECES, 4, 32]), 1)


@device_function
def group_numbers(piece, PIECES: tl.constexpr):
    """The numbers of the groups of the pieces from ``piece`` on: [PIECES, 32]."""
    return (tl.arange(0, PIECES) + piece)[:, None] * 32 + tl.arange(0, 32)[None, :]


@device_function
def group_uniform(seed, offset, group):
    return _uniform_of(seed, offset, group // 128 * 32 + group % 32, 1, group // 32 % 4)


@device_function
def group_scores(l, peaks, u, PIECES: tl.constexpr):
    """log(sum of exp(l)) + Gumbel of each group."""
    base = tl.where(peaks > NO_LOGIT, peaks, 0.0)
    four = tl.reshape(l, [PIECES, 4, 32, 4])
    total = tl.sum(tl.sum(tl.exp(four - base[:, None, :, None]), 3), 1)
    return tl.where(peaks > NO_LOGIT, noisy(base + tl.log(total), u), NO_LOGIT)


@device_function
def inside(group, seed, offset, src, strides, num, b, V, REPEAT: tl.constexpr, TEMPERED: tl.constexpr):
    """The token that a group's choice falls on. See draw_of_all in attnkit/reference.py."""
    j = tl.arange(0, 16)
    v = group // 32 * PIECE + j // 4 * (PIECE // 4) + group % 32 * 4 + j % 4
    l, _, _ = scores(src, strides, num, b, v, V, REPEAT, TEMPERED)
    top = tl.max(l, 0)
    mass = tl.cumsum(tl.exp(l - tl.where(top > NO_LOGIT, top, 0.0)), 0)
    u = tl.max(_uniform_of(seed, offset, group + j * 0, 2, 0), 0)
    # A scan rounds, so sums may differ behind the last token, and the share may be all of it: only tokens that are there count.
    here = l > NO_LOGIT
    at = tl.min(tl.where(here & (mass > u * tl.max(mass, 0)), j, 16), 0)
    at = tl.minimum(at, tl.max(tl.where(here, j, 0), 0))
    return group // 32 * PIECE + at // 4 * (PIECE // 4) + group % 32 * 4 + at % 4


@device_function
def exponential(u):
    """E = -log(1 - u); a series keeps small E exact, where the winners are."""
    series = u * (1.0 + u * (0.5 + u * (0.3333333333333333 + u * (0.25 + tl.div_rn(u, 5.0)))))
    return tl.where(u < 0.02, series, -tl.log(1.0 - u))


@device_function
def noisy(l, u):
    return l - tl.log(exponential(u))


@device_function
def arrivals(l, first, seed, offset, N: tl.constexpr):
    """Minus the logarithm of when N tokens arrive, from id ``first`` on: see draw_by_arrival in attnkit/reference.py."""
    PIECES: tl.constexpr = N // PIECE
    four = tl.reshape(l, [PIECES, 4, 32, 4])
    peaks = tl.max(tl.max(four, 3), 1)
    base = tl.where(peaks > NO_LOGIT, peaks, 0.0)[:, None, :, None]
    mass = tl.exp(four - base)
    chunks = tl.sum(mass, 3)
    to = tl.cumsum(mass, 3) + (tl.cumsum(chunks, 1) - chunks)[:, :, :, None]
    total = tl.sum(chunks, 1)
    group = group_numbers(first // PIECE, PIECES)
    reach = (_uniform_of(seed, offset, group, 2, 0) * total)[:, None, :, None]
    at = tl.arange(0, 4)[None, :, None, None] * 4 + tl.arange(0, 4)[None, None, None, :]
    here = four > NO_LOGIT
    chosen = tl.min(tl.min(tl.where(here & (to > reach), at, 16), 3), 1)
    chosen = tl.minimum(chosen, tl.max(tl.max(tl.where(here, at, 0), 3), 1))
    time = exponential(group_uniform(seed, offset, group)) / total
    own = tl.reshape(uniform4(seed, offset, first // 4 + tl.arange(0, N // 4)), [PIECES, 4, 32, 4])
    wait = tl.where(at == chosen[:, None, :, None], 0.0, exponential(own) / mass)
    score = tl.where(here, base - tl.log(time[:, None, :, None] + wait), NO_LOGIT)
    return tl.reshape(score, [N])


@device_function
def may_win(l, u, floor):
    """False only where noisy(l, u) cannot exceed ``floor``: E >= u, so it is at most l - log(u)."""
    slack = tl.abs(floor) * 4.76837158203125e-07 + 1e-3
    return (l > NO_LOGIT) & (u <= tl.exp(l - (floor - slack)))


@device_function
def order_key(l):
    """int32 that orders as l does; both zeros are one."""
    bits = tl.where(l == 0.0, 0.0, l).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@device_function
def mass(l, peak):
    """exp(l - peak) in units of 2^-42, int64."""
    return (tl.exp(l - peak) * MASS_ONE).to(tl.int64)
