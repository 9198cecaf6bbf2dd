"""top-k, top-p and min-p sampling, and the n best log-probabilities, without sorting the vocabulary.

Four launches, none of which depends on what the logits hold:

stats     reads the logits: per block of tokens the maximum and the mass; of each 16 to 64 tokens the largest (a peak)
          and one other (a sample).
bracket   one program a row: from peaks and samples, two values lo <= hi between which the cut lies. The k-th largest
          peak is below the k-th largest token, so for top-k that is certain; for top-p it is an estimate with a margin.
collect   reads the logits again: counts, sums and draws among the tokens above hi, and lists those in [lo, hi].
resolve   one program a row: the best draw among the list that the filters let pass, checked by counting what lies
          before it; a refused one lowers the bound, and the next best is tried. If the bracket missed or the list ran
          over, it does the same on the whole row: slower, as exact.

Rows that neither top-k nor min-p holds back draw by groups, in collect; resolve writes what they drew, if top-p keeps it.
Where it does not, it does as with others on the whole row, by the times of arrival.

Ties break to the lowest id throughout. Masses are summed as integers, so no order of adding shows in the result.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .logits import (
    MASS_ONE,
    NO_LOGIT,
    NO_TOKEN,
    PIECE,
    REACH,
    arrivals,
    group_peaks,
    inside,
    mass,
    may_win,
    noisy,
    numbers,
    option,
    order_key,
    scores,
    stream,
    uniform1,
    uniform4,
)
from .sampling import PENALTIES, Shape, exact, first_best, specimen, try_groups
from .tiles import device_function, loop

#: Tokens of a block.
BLOCK = tl.constexpr(8192)
#: Places in order that no token has, one after all and one before all of them.
LAST = tl.constexpr(-0x7FFFFFFFFFFFFFFF)
FIRST = tl.constexpr(0x7FFFFFFFFFFFFFFF)
#: 4-byte words of the record of a block and of a row.
BLOCK_WORDS = tl.constexpr(8)
ROW_WORDS = tl.constexpr(16)
# Record of a block: 0 largest, 1 mass, 2 NaN (bit 0) and any candidate (bit 1), 3 count above hi, 4-5 mass above hi,
# 6 best draw above hi, 7 its id; for a row drawn by group collect puts the best group's score and the token chosen in it in
# place of 0 and 1. Record of a row:
# 0 largest, 1 lo, 2 hi, 3 min-p's floor, 4 flags as a block's, 5 length of the list, 6-7 mass of the row, 8 lowest logit
# that matters, 9 how the row draws: 0 by token, 1 by group, 2 by group under top-p.


@device_function
def row_words(blocks, PEAKS: tl.constexpr, CAP: tl.constexpr):
    """4-byte words of workspace of one row: peaks, samples, records, list of values and ids."""
    return blocks * (2 * PEAKS + BLOCK_WORDS) + ROW_WORDS + 2 * CAP


@device_function
def _floats(parts):
    return parts.to(tl.pointer_type(tl.float32), bitcast=True)


@device_function
def _ints(parts):
    return parts.to(tl.pointer_type(tl.int32), bitcast=True)


@device_function
def _longs(parts):
    return parts.to(tl.pointer_type(tl.int64), bitcast=True)


@triton.jit
def stats_kernel(
    logits, counts, prompt, bias, allowed, repetition, presence, frequency, temperature, parts,
    V, logits_b, counts_b, prompt_b, bias_b, allowed_b,
    repetition_value, presence_value, frequency_value, temperature_value,
    REPEAT: tl.constexpr, TEMPERED: tl.constexpr, TURNS: tl.constexpr, STAGES: tl.constexpr, PEAKS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """One block of one row a program, TURNS times PEAKS tokens at a time."""
    SPAN: tl.constexpr = BLOCK // PEAKS
    blocks = tl.cdiv(V, BLOCK)
    b = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    wide = b.to(tl.int64)
    src = (logits, counts, prompt, bias, allowed)
    strides = (logits_b, counts_b, prompt_b, bias_b, allowed_b)
    values = (repetition_value, presence_value, frequency_value, temperature_value)
    num = numbers(repetition, presence, frequency, temperature, values, b)

    # The tokens of a peak are PEAKS apart: neighbours in the vocabulary, which often are large together, fall apart.
    spot = tl.arange(0, PEAKS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    v = block * BLOCK + tl.arange(0, TURNS)[:, None, None] * PEAKS + spot[None, :, :]
    peaks = tl.full([PEAKS // 4, 4], float("-inf"), tl.float32)
    samples = tl.full([PEAKS // 4, 4], float("-inf"), tl.float32)
    total = tl.zeros([PEAKS // 4, 4], tl.float32)
    state = tl.zeros([TURNS, PEAKS // 4, 4], tl.int32)
    for turn in stream(0, SPAN // TURNS, 1, num_stages=STAGES):
        l, x, bad = scores(src, strides, num, wide, v + turn * (TURNS * PEAKS), V, REPEAT, TEMPERED)
        state = state | bad | tl.where(x > NO_LOGIT, 2, 0)
        larger = tl.maximum(peaks, tl.max(l, 0))
        base = tl.where(larger > NO_LOGIT, larger, 0.0)
        total = total * tl.exp(peaks - base) + tl.sum(tl.exp(l - base[None, :, :]), 0)
        peaks = larger
        first = tl.sum(tl.where(tl.arange(0, TURNS)[:, None, None] == 0, l, 0.0), 0)
        samples = tl.where(turn == 0, first, samples)
    top = tl.max(tl.max(peaks, 1), 0)
    base = tl.where(top > NO_LOGIT, top, 0.0)
    total = tl.sum(tl.sum(total * tl.exp(peaks - base), 1), 0)
    nans = tl.max(tl.max(tl.max(state & 1, 0), 1), 0)
    alive = tl.max(tl.max(tl.max(state & 2, 0), 1), 0)

    words = _floats(parts) + wide * row_words(blocks, PEAKS, CAP)
    here = block * PEAKS + tl.arange(0, PEAKS // 4)[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(words + here, peaks)
    tl.store(words + blocks * PEAKS + here, samples)
    record = blocks * (2 * PEAKS) + block * BLOCK_WORDS
    tl.store(words + record, top)
    tl.store(words + record + 1, total)
    tl.store(_ints(parts) + wide * row_words(blocks, PEAKS, CAP) + record + 2, alive | nans)


@device_function
def _weight(l, peak, by_mass):
    return tl.where(l > NO_LOGIT, tl.where(by_mass, tl.exp(l - peak), 1.0), 0.0)


@device_function
def _above(peaks, samples, wp, ws, cut, rest):
    """Estimated weight of the tokens >= cut: the peaks' own, and the samples' share of the rest."""
    return tl.sum(tl.where(peaks >= cut, wp, 0.0), 0) + rest * tl.sum(tl.where(samples >= cut, ws, 0.0), 0)


@device_function
def _row_stats(words, counters, blocks, BLOCKS_2: tl.constexpr):
    """(largest logit, the same or 0 where there is none, mass of the row, flags) from its blocks' records."""
    z = tl.arange(0, BLOCKS_2)
    tops = tl.load(words + z * BLOCK_WORDS, mask=z < blocks, other=float("-inf"))
    sums = tl.load(words + z * BLOCK_WORDS + 1, mask=z < blocks, other=0.0)
    flags = tl.load(counters + z * BLOCK_WORDS + 2, mask=z < blocks, other=0)
    peak = tl.max(tops, 0)
    base = tl.where(peak > NO_LOGIT, peak, 0.0)
    shares = tl.where(tops > NO_LOGIT, sums * tl.exp(tops - base), 0.0)
    return peak, base, tl.sum((shares * MASS_ONE).to(tl.int64), 0), tl.max(flags & 1, 0) | tl.max(flags & 2, 0)


@device_function
def _cuts(peaks, samples, wp, ws, unit, lowest, base, more, less):
    """(the largest cut with at least ``more`` above it, the smallest with less than ``less``), by bisection."""
    low_a = lowest
    low_b = base
    high_a = lowest
    high_b = base
    for _ in loop(0, 16, 1):
        cut = 0.5 * low_a + 0.5 * low_b
        enough = _above(peaks, samples, wp, ws, cut, unit) >= more
        low_a = tl.where(enough, cut, low_a)
        low_b = tl.where(enough, low_b, cut)
        cut = 0.5 * high_a + 0.5 * high_b
        enough = _above(peaks, samples, wp, ws, cut, unit) >= less
        high_a = tl.where(enough, cut, high_a)
        high_b = tl.where(enough, high_b, cut)
    return low_a, high_b


@triton.jit
def bracket_kernel(
    parts, temperature, top_k, top_p, min_p,
    V, temperature_value, top_k_value, top_p_value, min_p_value,
    BLOCKS_2: tl.constexpr, EXACT: tl.constexpr, PEAKS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One row a program. EXACT: the list must hold the k largest however small they are (for log-probabilities)."""
    SPAN: tl.constexpr = BLOCK // PEAKS
    blocks = tl.cdiv(V, BLOCK)
    b = tl.program_id(0)
    start = b.to(tl.int64) * row_words(blocks, PEAKS, CAP)
    words = _floats(parts) + start
    counters = _ints(parts) + start
    records = blocks * (2 * PEAKS)
    peak, base, total, flags = _row_stats(words + records, counters + records, blocks, BLOCKS_2)
    k = option(top_k, top_k_value, b, tl.int64)
    p = option(top_p, top_p_value, b, tl.float32)
    cold = option(temperature, temperature_value, b, tl.float32) == 0.0
    k_on = (k > 0) & (k < V)
    p_on = p < 1.0
    lowest = base - REACH
    if EXACT:
        lowest = base - 1024.0

    at = tl.arange(0, BLOCKS_2 * PEAKS)
    peaks = tl.load(words + at, mask=at < blocks * PEAKS, other=float("-inf"))
    samples = tl.load(words + blocks * PEAKS + at, mask=at < blocks * PEAKS, other=float("-inf"))
    samples = tl.where(samples < peaks, samples, NO_LOGIT)
    by_mass = p_on & (k_on == 0)
    wp = _weight(peaks, base, by_mass)
    ws = _weight(samples, base, by_mass)
    n_peaks = tl.sum((peaks > NO_LOGIT).to(tl.float32), 0)
    n_samples = tl.sum((samples > NO_LOGIT).to(tl.float32), 0)
    in_peaks = tl.sum(wp, 0)
    in_samples = tl.maximum(tl.sum(ws, 0), 1e-30)
    # Of the tokens that are no peaks, the samples are a fair draw; how many of them there are is estimated likewise.
    others = n_samples * (SPAN - 1) * tl.where(n_peaks > 0.0, V / (tl.maximum(n_peaks, 1.0) * SPAN), 1.0)
    whole = total.to(tl.float32) / MASS_ONE
    few = k_on & (k.to(tl.float32) * 4.0 <= n_peaks)
    rest = tl.where(by_mass, tl.maximum(whole - in_peaks, 0.0), others)
    rest = tl.where(few, 0.0, rest)
    target = tl.where(by_mass, p * whole, k.to(tl.float32))
    share = tl.where(by_mass, p, tl.minimum(k.to(tl.float32) / V, 1.0))
    spread = tl.sqrt(tl.sum(ws * ws, 0) * share * (1.0 - share)) / in_samples
    margin = tl.where(few, 0.0, 3.5 * spread * rest + 1e-4 * tl.where(by_mass, whole, 0.0))

    low, high = _cuts(peaks, samples, wp, ws, rest / in_samples, lowest, base, target + margin, target - margin)
    # A short list needs no upper end, and then nothing above it can be missed.
    listed = tl.sum((peaks >= low).to(tl.float32), 0)
    listed += others * tl.sum((samples >= low).to(tl.float32), 0) / tl.maximum(n_samples, 1.0)
    high = tl.where(few | (k_on & p_on) | (1.3 * listed + 64.0 <= CAP), float("inf"), high)
    if EXACT:
        low = tl.where(low > lowest, low, float("-inf"))
        high = tl.full([], float("inf"), tl.float32)
        lowest = tl.full([], float("-inf"), tl.float32)
    filtered = (k_on | p_on) & (cold == 0)
    m = option(min_p, min_p_value, b, tl.float32)
    record = records + blocks * BLOCK_WORDS
    tl.store(words + record, peak)
    tl.store(words + record + 1, tl.where(filtered, low, float("inf")))
    tl.store(words + record + 2, tl.where(filtered, high, float("-inf")))
    tl.store(words + record + 3, tl.where(cold | (m == 0.0), float("-inf"), base + tl.log(tl.maximum(m, 1e-37))))
    tl.store(counters + record + 4, flags)
    tl.store(counters + record + 5, 0)
    tl.store(_longs(parts) + (start + record + 6) // 2, total)
    tl.store(words + record + 8, lowest)
    by_group = (k_on == 0) & (m <= 0.0) & (cold == 0)
    tl.store(counters + record + 9, tl.where(by_group, 1 + p_on.to(tl.int32), 0))


@device_function
def _append(l, v, listed, words, counters, record, CAP: tl.constexpr):
    """Put the listed tokens of a tile [N, 4] at the end of the row's list."""
    row_count = tl.sum(listed, 1)
    n = tl.sum(row_count, 0)
    if n > 0:
        first = tl.atomic_add(counters + record + 5, n, sem="relaxed", scope="gpu")
        before = tl.cumsum(row_count, 0) - row_count
        at = first + before[:, None] + tl.cumsum(listed, 1) - listed
        ok = (listed > 0) & (at < CAP)
        tl.store(words + record + ROW_WORDS + at, l, mask=ok)
        tl.store(counters + record + ROW_WORDS + CAP + at, v, mask=ok)


@triton.jit(do_not_specialize=["offset_value"])
def collect_kernel(
    logits, counts, prompt, bias, allowed, repetition, presence, frequency, temperature, seeds, offset, parts,
    offset_value, V, logits_b, counts_b, prompt_b, bias_b, allowed_b,
    repetition_value, presence_value, frequency_value, temperature_value,
    REPEAT: tl.constexpr, TEMPERED: tl.constexpr, DRAW: tl.constexpr, GROUPS: tl.constexpr, STAGES: tl.constexpr,
    PEAKS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One block of one row a program, in tiles of 4 GROUPS tokens. Without DRAW only the list is made."""
    blocks = tl.cdiv(V, BLOCK)
    b = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    wide = b.to(tl.int64)
    start = wide * row_words(blocks, PEAKS, CAP)
    words = _floats(parts) + start
    counters = _ints(parts) + start
    src = (logits, counts, prompt, bias, allowed)
    strides = (logits_b, counts_b, prompt_b, bias_b, allowed_b)
    values = (repetition_value, presence_value, frequency_value, temperature_value)
    num = numbers(repetition, presence, frequency, temperature, values, b)
    cold = num[5] > 0
    if DRAW:
        seed = tl.load(seeds + b)
        draw = option(offset, offset_value, b, tl.int64)

    record = blocks * (2 * PEAKS + BLOCK_WORDS)
    peak = tl.load(words + record)
    low = tl.load(words + record + 1)
    high = tl.load(words + record + 2)
    min_floor = tl.load(words + record + 3)
    group = tl.arange(0, GROUPS)
    ids = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    count = tl.zeros([GROUPS, 4], tl.int32)
    weight = tl.zeros([GROUPS, 4], tl.float32)
    top = tl.full([GROUPS, 4], float("-inf"), tl.float32)
    at = tl.zeros([GROUPS, 4], tl.int32) + V
    floor = tl.full([], float("-inf"), tl.float32)
    PIECES: tl.constexpr = 4 * GROUPS // PIECE
    how = tl.load(counters + record + 9)
    score_at = tl.full([PIECES, 32], float("-inf"), tl.float32)
    group_at = tl.zeros([PIECES, 32], tl.int32) + NO_TOKEN
    reached = tl.full([], float("-inf"), tl.float32)
    for tile in stream(0, BLOCK // (4 * GROUPS), 1, num_stages=STAGES):
        v = block * BLOCK + tile * (4 * GROUPS) + ids
        l, _, _ = scores(src, strides, num, wide, v, V, REPEAT, TEMPERED)
        if DRAW:
            if how > 0:
                first = block * (BLOCK // PIECE) + tile * PIECES
                score_at, group_at, reached = try_groups(
                    l, group_peaks(l, PIECES), score_at, group_at, reached, first, seed, draw, PIECES
                )
        _append(l, v, ((l >= low) & (l <= high) & (v < V)).to(tl.int32), words, counters, record, CAP)
        if DRAW:
            over = l > high
            if (tl.max(tl.max(over.to(tl.int32), 1), 0) > 0) & (how != 1):
                count += over.to(tl.int32)
                weight += tl.where(over, tl.exp(l - peak), 0.0)
                if how == 0:
                    u = uniform4(seed, draw, (block * BLOCK) // 4 + tile * GROUPS + group)
                    hope = over & (l >= min_floor) & (may_win(l, u, floor) | (cold & (l > floor)))
                    if tl.max(tl.max(hope.to(tl.int32), 1), 0) > 0:
                        score = tl.where(cold, l, noisy(l, u))
                        better = hope & (score > top)
                        top = tl.where(better, score, top)
                        at = tl.where(better, v, at)
                        floor = tl.max(tl.max(top, 1), 0)
    if DRAW:
        best = tl.max(tl.max(top, 1), 0)
        mine = blocks * (2 * PEAKS) + block * BLOCK_WORDS
        tl.store(counters + mine + 3, tl.sum(tl.sum(count, 1), 0))
        tl.store(_longs(parts) + (start + mine + 4) // 2, (tl.sum(tl.sum(weight, 1), 0) * MASS_ONE).to(tl.int64))
        tl.store(words + mine + 6, best)
        tl.store(counters + mine + 7, tl.min(tl.min(tl.where(top == best, at, V), 1), 0))
        if how > 0:
            best, first = first_best(score_at, group_at)
            if best > NO_LOGIT:
                first = inside(first, seed, draw, src, strides, num, wide, V, REPEAT, TEMPERED)
            tl.store(words + mine, best)
            tl.store(counters + mine + 1, first)


@device_function
def _place(l, v):
    """int64 that is larger the earlier a token comes in order: by logit, then by the lower id. No two are the same."""
    return (order_key(l).to(tl.int64) << 32) | (0x7FFFFFFF - v).to(tl.int64)


@device_function
def _source(i, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT: tl.constexpr, TEMPERED: tl.constexpr):
    """Tokens number i of the row's list, or of the row itself: (logit, id, place; LAST where there is none)."""
    if from_list:
        l = tl.load(lists[0] + i, mask=i < n, other=NO_LOGIT)
        v = tl.load(lists[1] + i, mask=i < n, other=0)
        ok = i < n
    else:
        l, _, _ = scores(src, strides, num, b, i, V, REPEAT, TEMPERED)
        v = i
        ok = (i < n) & (l >= lowest)
    return l, v, tl.where(ok, _place(l, v), LAST)


@device_function
def _kth(need, above, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT: tl.constexpr, TEMPERED: tl.constexpr,
         TILE: tl.constexpr):  # fmt: skip
    """The place of the token that ``need`` - 1 others precede (LAST + 1: there are not as many), by bisection."""
    at = tl.arange(0, TILE)
    cut = tl.full([], LAST + 1, tl.int64)
    turn = tl.full([], 0, tl.int32)
    while (cut < above) & (turn < 70):
        # Places lie further apart than int64 reaches.
        middle = (cut >> 1) + (above >> 1) + (cut & above & 1)
        middle = tl.maximum(middle, cut + 1)
        more = tl.zeros([TILE], tl.int32)
        least = tl.full([TILE], FIRST, tl.int64)
        most = tl.full([TILE], LAST + 1, tl.int64)
        for i in loop(0, n, TILE):
            _, _, place = _source(i + at, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT, TEMPERED)
            more += (place >= middle).to(tl.int32)
            least = tl.minimum(least, tl.where(place >= middle, place, FIRST))
            most = tl.maximum(most, tl.where(place < middle, place, LAST + 1))
        if tl.sum(more, 0) >= need:
            cut = tl.min(least, 0)
        else:
            above = tl.max(most, 0)
        turn += 1
    return cut


@device_function
def _before(cut, peak, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT: tl.constexpr, TEMPERED: tl.constexpr,
            TILE: tl.constexpr):  # fmt: skip
    """(number, mass) of the tokens before place ``cut``."""
    at = tl.arange(0, TILE)
    count = tl.zeros([TILE], tl.int64)
    weight = tl.zeros([TILE], tl.int64)
    for i in loop(0, n, TILE):
        l, _, place = _source(i + at, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT, TEMPERED)
        count += (place > cut).to(tl.int64)
        weight += tl.where(place > cut, mass(l, peak), 0)
    return tl.sum(count, 0), tl.sum(weight, 0)


@device_function
def _best_draw(cut, min_floor, seed, draw, by_group, n, from_list, lists, lowest, src, strides, num, b, V,
               REPEAT: tl.constexpr, TEMPERED: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """(noisy logit, id, place) of the best draw among the tokens at or before place ``cut``; -inf where there is none.

    ``by_group``: of the row itself, by the times of arrival.
    """
    at = tl.arange(0, TILE)
    top = tl.full([TILE], float("-inf"), tl.float32)
    ids = tl.zeros([TILE], tl.int32) + V
    places = tl.full([TILE], LAST, tl.int64)
    for i in loop(0, n, TILE):
        l, v, place = _source(i + at, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT, TEMPERED)
        if by_group:
            score = arrivals(l, i, seed, draw, TILE)
        else:
            score = noisy(l, uniform1(seed, draw, v))
        score = tl.where((place >= cut) & (l >= min_floor), score, NO_LOGIT)
        better = (score > top) | ((score == top) & (v < ids) & (score > NO_LOGIT))
        top = tl.where(better, score, top)
        ids = tl.where(better, v, ids)
        places = tl.where(better, place, places)
    best = tl.max(top, 0)
    token = tl.min(tl.where(top == best, ids, V), 0)
    return best, token, tl.max(tl.where((top == best) & (ids == token), places, LAST), 0)


@device_function
def _listed_mass(lists, n, peak, TILE: tl.constexpr):
    at = tl.arange(0, TILE)
    weight = tl.zeros([TILE], tl.int64)
    for i in loop(0, n, TILE):
        weight += tl.where(i + at < n, mass(tl.load(lists[0] + i + at, mask=i + at < n, other=NO_LOGIT), peak), 0)
    return tl.sum(weight, 0)


@device_function
def _best_above(words, counters, longs, blocks, V, BLOCKS_2: tl.constexpr):
    """(number, mass, best draw, its id) of the tokens above hi, from the records of the row's blocks."""
    z = tl.arange(0, BLOCKS_2)
    mine = z * BLOCK_WORDS
    held = z < blocks
    count = tl.sum(tl.load(counters + mine + 3, mask=held, other=0), 0).to(tl.int64)
    weight = tl.sum(tl.load(longs + (mine + 4) // 2, mask=held, other=0), 0)
    tops = tl.load(words + mine + 6, mask=held, other=float("-inf"))
    best = tl.max(tops, 0)
    return count, weight, best, tl.min(tl.where(tops == best, tl.load(counters + mine + 7, mask=held, other=V), V), 0)


@device_function
def _from_all(words, counters, blocks, BLOCKS_2: tl.constexpr):
    """The token of a row drawn by group, from the records of its blocks."""
    z = tl.arange(0, BLOCKS_2)
    best = tl.load(words + z * BLOCK_WORDS, mask=z < blocks, other=float("-inf"))
    tokens = tl.load(counters + z * BLOCK_WORDS + 1, mask=z < blocks, other=NO_TOKEN)
    return tl.min(tl.where(best == tl.max(best, 0), tokens, NO_TOKEN), 0)


@device_function
def _first_to_pass(
    best, token, count, weight, target, cut, k, k_on, p_on, peak, min_floor, seed, draw, by_group, n,
    from_list, lists, lowest, src, strides, num, b, V, REPEAT: tl.constexpr, TEMPERED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The best draw that the filters let pass: (noisy logit, id), starting from the best of those that surely do.

    ``count`` tokens of ``weight`` precede all of the source. Each turn tries the best draw at or before ``cut``; where
    that fails, so does every token after it, and the cut moves up to it.
    """
    turn = tl.full([], 0, tl.int32)
    while turn < V:
        score, drawn, place = _best_draw(
            cut, min_floor, seed, draw, by_group, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT, TEMPERED, TILE
        )
        turn += 1
        if (score > best) | ((score == best) & (score > NO_LOGIT) & (drawn < token)):
            more, heavier = _before(place, peak, n, from_list, lists, lowest, src, strides, num, b, V, REPEAT, TEMPERED, TILE)
            passes = (k_on == 0) | (count + more < k)
            passes = passes & ((p_on == 0) | (weight + heavier < target) | (count + more == 0))
            best = tl.where(passes, score, best)
            token = tl.where(passes, drawn, token)
            cut = tl.where(passes, cut, place + 1)
            turn = tl.where(passes, V, turn)
        else:
            turn = V + turn * 0
    return best, token


@triton.jit(do_not_specialize=["offset_value"])
def resolve_kernel(
    logits, counts, prompt, bias, allowed, repetition, presence, frequency, temperature, seeds, offset,
    top_k, top_p, tokens, valid, parts,
    offset_value, V, logits_b, counts_b, prompt_b, bias_b, allowed_b,
    repetition_value, presence_value, frequency_value, temperature_value, top_k_value, top_p_value,
    REPEAT: tl.constexpr, TEMPERED: tl.constexpr, BLOCKS_2: tl.constexpr, TILE: tl.constexpr, PEAKS: tl.constexpr,
    CAP: tl.constexpr,
):  # fmt: skip
    """One row a program."""
    blocks = tl.cdiv(V, BLOCK)
    b = tl.program_id(0)
    wide = b.to(tl.int64)
    start = wide * row_words(blocks, PEAKS, CAP)
    words = _floats(parts) + start
    counters = _ints(parts) + start
    src = (logits, counts, prompt, bias, allowed)
    strides = (logits_b, counts_b, prompt_b, bias_b, allowed_b)
    values = (repetition_value, presence_value, frequency_value, temperature_value)
    num = numbers(repetition, presence, frequency, temperature, values, b)
    seed = tl.load(seeds + b)
    draw = option(offset, offset_value, b, tl.int64)
    k = option(top_k, top_k_value, b, tl.int64)
    p = option(top_p, top_p_value, b, tl.float32)
    k_on = (k > 0) & (k < V)
    p_on = p < 1.0

    records = blocks * (2 * PEAKS)
    record = records + blocks * BLOCK_WORDS
    count, weight, best, token = _best_above(
        words + records, counters + records, _longs(parts) + (start + records) // 2, blocks, V, BLOCKS_2
    )
    peak = tl.load(words + record)
    low = tl.load(words + record + 1)
    min_floor = tl.load(words + record + 3)
    flags = tl.load(counters + record + 4)
    n = tl.load(counters + record + 5)
    lowest = tl.load(words + record + 8)
    how = tl.load(counters + record + 9)
    drawn = _from_all(words + records, counters + records, blocks, BLOCKS_2)
    lists = (words + record + ROW_WORDS, counters + record + ROW_WORDS + CAP)

    if (flags == 2) & (k_on | p_on) & (num[5] == 0):
        total = tl.load(_longs(parts) + (start + record + 6) // 2)
        target = (p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        # The list will do if all above it passes, and all below it does not (or lies too deep to be drawn).
        fits = n <= CAP
        deep = low <= lowest
        listed = _listed_mass(lists, tl.where(fits & p_on & (k_on == 0), n, 0), peak, TILE)
        k_fine = (k_on == 0) | ((count <= k) & (deep | (count + n >= k)))
        p_fine = (p_on == 0) | k_on | ((weight <= target) & (deep | (weight + listed >= target)))
        from_list = fits & k_fine & p_fine
        n = tl.where(from_list, n, V)
        count = tl.where(from_list, count, 0)
        weight = tl.where(from_list, weight, 0)
        best = tl.where(from_list, best, float("-inf"))
        token = tl.where(from_list, token, V)

        cut = tl.full([], LAST + 1, tl.int64)
        if k_on & p_on:
            # top-p's share is one of what top-k leaves.
            above = _place(peak, token * 0)
            cut = _kth(k - count, above, n, from_list, lists, lowest, src, strides, num, wide, V, REPEAT, TEMPERED, TILE)
            _, kept = _before(cut - 1, peak, n, from_list, lists, lowest, src, strides, num, wide, V, REPEAT, TEMPERED, TILE)
            target = (p.to(tl.float64) * (weight + kept).to(tl.float64)).to(tl.int64)
        if how == 2:
            # The first of all to arrive is drawn where top-p keeps it.
            token = drawn
            logit, _, _ = scores(src, strides, num, wide, token + tl.arange(0, 1), V, REPEAT, TEMPERED)
            place = tl.max(_place(logit, token), 0)
            more, heavier = _before(
                place, peak, n, from_list, lists, lowest, src, strides, num, wide, V, REPEAT, TEMPERED, TILE
            )
            surely = from_list & (tl.max(logit, 0) > tl.load(words + record + 2))
            passes = surely | (count + more == 0) | (weight + heavier < target)
            best = tl.where(passes, 0.0, float("-inf"))
            cut = place + 1
            n = V
            from_list = from_list & False
            count = count * 0
            weight = weight * 0
        if (how != 2) | (best == NO_LOGIT):
            best, token = _first_to_pass(
                best, token, count, weight, target, cut, k, k_on, p_on, peak, min_floor, seed, draw, how == 2, n,
                from_list, lists, lowest, src, strides, num, wide, V, REPEAT, TEMPERED, TILE,
            )  # fmt: skip
    elif how > 0:
        token = drawn
        best = tl.full([], 0.0, tl.float32)
    good = flags == 2
    tl.store(tokens + b, tl.where(good & (best > NO_LOGIT), token, 0).to(tl.int64))
    tl.store(valid + b, good)


@triton.jit
def pick_kernel(
    logits, tokens, chosen, top_ids, parts,
    V, logits_b, columns,
    TILE: tl.constexpr, PEAKS: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """One row a program: log-probabilities of the token drawn and of the ``columns`` highest, [B, 1 + columns]."""
    blocks = tl.cdiv(V, BLOCK)
    b = tl.program_id(0)
    wide = b.to(tl.int64)
    start = wide * row_words(blocks, PEAKS, CAP)
    words = _floats(parts) + start
    counters = _ints(parts) + start
    record = blocks * (2 * PEAKS + BLOCK_WORDS)
    src = (logits, None, None, None, None)
    strides = (logits_b, 0, 0, 0, 0)
    num = numbers(None, None, None, None, (1.0, 0.0, 0.0, 1.0), b)
    lists = (words + record + ROW_WORDS, counters + record + ROW_WORDS + CAP)
    peak = tl.load(words + record)
    flags = tl.load(counters + record + 4)
    n = tl.load(counters + record + 5)
    total = tl.load(_longs(parts) + (start + record + 6) // 2).to(tl.float32) / MASS_ONE
    norm = tl.where(flags == 2, tl.log(total), float("nan"))
    from_list = (n <= CAP) & (n >= columns)
    n = tl.where(from_list, n, V)
    out = wide * (columns + 1)
    token = tl.load(tokens + b)
    own = scores(src, strides, num, wide, token + tl.arange(0, 1), V, False, False)
    tl.store(chosen + out + tl.arange(0, 1), own[0] - peak - norm)
    tl.store(top_ids + out, token)
    at = tl.arange(0, TILE)
    last = tl.full([], FIRST, tl.int64)
    lowest = tl.full([], float("-inf"), tl.float32)
    for column in loop(0, columns, 1):
        place = tl.full([TILE], LAST, tl.int64)
        for i in loop(0, n, TILE):
            found = _source(i + at, n, from_list, lists, lowest, src, strides, num, wide, V, False, False)
            place = tl.maximum(place, tl.where(found[2] < last, found[2], LAST))
        last = tl.max(place, 0)
        key = (last >> 32).to(tl.int32)
        value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
        tl.store(chosen + out + 1 + column, value - peak - norm)
        tl.store(top_ids + out + 1 + column, 0x7FFFFFFF - (last & 0xFFFFFFFF))


@dataclass(frozen=True, slots=True)
class Bound:
    """Launches made ready, and the bytes of workspace they share."""

    stats: Launcher
    bracket: Launcher
    collect: Launcher
    last: Launcher
    part_bytes: int


def _sizes(V: int) -> tuple[int, int, int, int]:
    """(blocks, the power of two that holds them, peaks of a block, places in a row's list)."""
    blocks = triton.cdiv(V, BLOCK.value)
    blocks_2 = triton.next_power_of_2(blocks)
    return blocks, blocks_2, max(32, min(512, 8192 // blocks_2)), min(triton.next_power_of_2(max(V, 1024)), max(16384, V // 8))


def part_bytes(B: int, V: int) -> int:
    blocks, _, peaks, cap = _sizes(V)
    return 4 * B * (blocks * (2 * peaks + BLOCK_WORDS.value) + ROW_WORDS.value + 2 * cap)


#: A longer vocabulary would overflow the sum of masses.
MAX_V = 1 << 19


def bind(
    shape: Shape, *, top_k: int, top_p: float, min_p: float, offset: int, tile: int, num_warps: int, stages: int,
    exact_k: bool = False, columns: int = 0, reusable: bool = True,
) -> Bound:  # fmt: skip
    """The numbers serve where no tensor comes. With ``exact_k`` what is made ready is ``launch_logprobs``."""
    blocks, blocks_2, peaks, cap = _sizes(shape.V)
    flags = (shape.repeat, shape.tempered)
    scalars = shape.scalars()
    programs = shape.B * blocks
    sizes = (peaks, cap)
    numbers_of_row = (top_k, top_p, min_p)

    def launcher(fn: Any, grid: int, fixed: tuple[Any, ...], warps: int) -> Launcher:
        return exact(Launcher(fn, grid, (*fixed, *sizes), num_warps=warps, reusable=reusable))

    stats = launcher(stats_kernel, programs, (*scalars, *flags, 1 if shape.penalised else 4, stages), num_warps)
    bracket = launcher(
        bracket_kernel, shape.B, (shape.V, shape.temperature, *numbers_of_row, blocks_2, exact_k), min(16, max(4, blocks_2))
    )
    collect = launcher(collect_kernel, programs, (offset, *scalars, *flags, not exact_k, tile // 4, stages), num_warps)
    if exact_k:
        last = launcher(pick_kernel, shape.B, (shape.V, shape.logits_b, columns, 1024), 8)
    else:
        last = launcher(resolve_kernel, shape.B, (offset, *scalars, top_k, top_p, *flags, blocks_2, 1024), 16)
    return Bound(stats, bracket, collect, last, part_bytes(shape.B, shape.V))


def launch(
    bound: Bound,
    logits: torch.Tensor, seeds: torch.Tensor, options: dict[str, torch.Tensor], tokens: torch.Tensor, valid: torch.Tensor,
    parts: torch.Tensor,
) -> None:  # fmt: skip
    """``parts`` (uint8) as ``bound`` wants it; nothing in it outlives the call."""
    get = options.get
    row = (
        logits, get("counts"), get("prompt_mask"), get("logit_bias"), get("allowed"), get("repetition_penalty"),
        get("presence_penalty"), get("frequency_penalty"), get("temperature"),
    )  # fmt: skip
    bound.stats(*row, parts)
    bound.bracket(parts, row[-1], get("top_k"), get("top_p"), get("min_p"))
    bound.collect(*row, seeds, get("offset"), parts)
    bound.last(*row, seeds, get("offset"), get("top_k"), get("top_p"), tokens, valid, parts)


def launch_logprobs(
    bound: Bound, logits: torch.Tensor, tokens: torch.Tensor, chosen: torch.Tensor, top_ids: torch.Tensor, parts: torch.Tensor
) -> None:
    """``chosen`` float32 and ``top_ids`` int64, both [B, 1 + columns]; ``tokens`` as drawn."""
    none = (None,) * 8
    bound.stats(logits, *none, parts)
    bound.bracket(parts, *none[:4])
    if chosen.shape[1] > 1:
        bound.collect(logits, *none, None, None, parts)
    bound.last(logits, tokens, chosen, top_ids, parts)


def _specimens() -> list[Specimen]:
    found = []
    V = 128256
    _, blocks_2, peaks, cap = _sizes(V)
    sizes = {"PEAKS": peaks, "CAP": cap}
    tensors = ("temperature", "offset", "top_k", "top_p", "min_p")
    kinds = (("plain", "fp32", ()), ("tensors", "bf16", tensors), ("penalties", "fp32", (*PENALTIES, *tensors)))
    for name, dtype, options in kinds:
        row = {"REPEAT": "repetition" in options, "TEMPERED": True}
        for fn, consts, warps in (
            (stats_kernel, row | {"TURNS": 1 if row["REPEAT"] else 4, "STAGES": 1}, 4),
            (bracket_kernel, {"BLOCKS_2": blocks_2, "EXACT": False}, 16),
            (collect_kernel, row | {"DRAW": True, "GROUPS": 256, "STAGES": 1}, 4),
            (resolve_kernel, row | {"BLOCKS_2": blocks_2, "TILE": 1024}, 16),
        ):
            if fn is not bracket_kernel or name != "penalties":
                found.append(specimen(f"{fn.__name__}-{name}", fn, dtype, options, consts | sizes, warps))
    found.append(specimen("pick_kernel", pick_kernel, "bf16", (), {"TILE": 1024} | sizes, 8))
    return found


SPECIMENS = _specimens()
