"""Greedy choice and plain temperature sampling: one read of the logits, a row split over several programs.

Each program keeps its best group of tokens so far (greedy: token); exponentials and logarithms are taken only for tiles
in which some group could still win. The last program of a row to arrive combines the row's parts and chooses inside
the best group. Filters (top-k, top-p, min-p) are in filters.py.
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
    LOG_16,
    NO_LOGIT,
    NO_TOKEN,
    PIECE,
    group_numbers,
    group_peaks,
    group_scores,
    group_uniform,
    inside,
    may_win,
    numbers,
    option,
    scores,
    stream,
)
from .tiles import device_function


@device_function
def first_best(top, at):
    """(largest of top [N, M], the lowest id in ``at`` that has it)."""
    best = tl.max(tl.max(top, 1), 0)
    return best, tl.min(tl.min(tl.where(top == best, at, NO_TOKEN), 1), 0)


@device_function
def _try_largest(l, v, peaks, top, at, PIECES: tl.constexpr):
    """The largest token of each group so far, and the lowest id it is at: (top, at) after the tile of logits l."""
    if tl.max(tl.max((peaks > top).to(tl.int32), 1), 0) > 0:
        is_peak = tl.reshape(l, [PIECES, 4, 32, 4]) == peaks[:, None, :, None]
        lowest = tl.min(tl.min(tl.where(is_peak, tl.reshape(v, [PIECES, 4, 32, 4]), NO_TOKEN), 3), 1)
        at = tl.where(peaks > top, lowest, at)
        top = tl.maximum(peaks, top)
    return top, at


@device_function
def try_groups(l, peaks, top, at, floor, piece, seed, draw, PIECES: tl.constexpr):
    """The best scores so far of PIECES times 32 groups, their numbers and the largest: after the tile of logits l."""
    group = group_numbers(piece, PIECES)
    u = group_uniform(seed, draw, group)
    if tl.max(tl.max(may_win(peaks + LOG_16, u, floor).to(tl.int32), 1), 0) > 0:
        score = group_scores(l, peaks, u, PIECES)
        at = tl.where(score > top, group, at)
        top = tl.maximum(score, top)
        floor = tl.max(tl.max(top, 1), 0)
    return top, at, floor


@device_function
def _write_token(tokens, valid, b, best, token, nans, alive):
    good = (nans == 0) & (alive > 0)
    tl.store(tokens + b, tl.where(good & (best > NO_LOGIT), token, 0).to(tl.int64))
    tl.store(valid + b, good)


@device_function
def _combine(parts, counters, b, part, best, token, nans, alive, PARTS: tl.constexpr, PARTS_2: tl.constexpr):
    """Leave this part's result in the workspace; the last part of the row to arrive has the best of all.

    Returns (1 in that part, best, token, nans, alive)."""
    floats = parts.to(tl.pointer_type(tl.float32), bitcast=True)
    words = parts.to(tl.pointer_type(tl.int32), bitcast=True)
    mine = (b * PARTS + part) * 4
    tl.store(floats + mine, best)
    tl.store(words + mine + 1, token)
    tl.store(words + mine + 2, nans)
    tl.store(words + mine + 3, alive)
    tl.debug_barrier()
    last = (tl.atomic_add(counters + b, 1, sem="acq_rel", scope="gpu") == PARTS - 1).to(tl.int32)
    if last > 0:
        z = tl.arange(0, PARTS_2)
        every = (b * PARTS + z) * 4
        tops = tl.load(floats + every, mask=z < PARTS, other=float("-inf"))
        best = tl.max(tops, 0)
        token = tl.min(tl.where(tops == best, tl.load(words + every + 1, mask=z < PARTS, other=NO_TOKEN), NO_TOKEN), 0)
        nans = tl.max(tl.load(words + every + 2, mask=z < PARTS, other=0), 0)
        alive = tl.max(tl.load(words + every + 3, mask=z < PARTS, other=0), 0)
        tl.store(counters + b, 0)
    return last, best, token, nans, alive


@triton.jit(do_not_specialize=["offset_value"])
def draw_kernel(
    logits, counts, prompt, bias, allowed, repetition, presence, frequency, temperature, seeds, offset,
    tokens, valid, parts, counters,
    offset_value, V, logits_b, counts_b, prompt_b, bias_b, allowed_b,
    repetition_value, presence_value, frequency_value, temperature_value,
    REPEAT: tl.constexpr, TEMPERED: tl.constexpr, GREEDY: tl.constexpr, PARTS: tl.constexpr, PARTS_2: tl.constexpr,
    GROUPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One of PARTS stretches of one row a program, in tiles of 4 GROUPS tokens."""
    b = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    wide = b.to(tl.int64)
    src = (logits, counts, prompt, bias, allowed)
    strides = (logits_b, counts_b, prompt_b, bias_b, allowed_b)
    values = (repetition_value, presence_value, frequency_value, temperature_value)
    num = numbers(repetition, presence, frequency, temperature, values, b)
    cold = num[5]
    seed = tl.load(seeds + b)
    draw = option(offset, offset_value, b, tl.int64)

    PIECES: tl.constexpr = 4 * GROUPS // PIECE
    ids = tl.arange(0, GROUPS)[:, None] * 4 + tl.arange(0, 4)[None, :]
    top = tl.full([PIECES, 32], float("-inf"), tl.float32)
    at = tl.zeros([PIECES, 32], tl.int32) + NO_TOKEN
    state = tl.zeros([GROUPS, 4], tl.int32)
    floor = tl.full([], float("-inf"), tl.float32)
    share = tl.cdiv(tl.cdiv(V, 4 * GROUPS), PARTS)
    for tile in stream(part * share, part * share + share, 1, num_stages=STAGES):
        v = tile * (4 * GROUPS) + ids
        l, x, bad = scores(src, strides, num, wide, v, V, REPEAT, TEMPERED)
        state = state | bad | tl.where(x > NO_LOGIT, 2, 0)
        peaks = group_peaks(l, PIECES)
        if GREEDY:  # noqa: SIM114  (known when this compiles)
            top, at = _try_largest(l, v, peaks, top, at, PIECES)
        elif cold > 0:
            top, at = _try_largest(l, v, peaks, top, at, PIECES)
        else:
            top, at, floor = try_groups(l, peaks, top, at, floor, tile * PIECES, seed, draw, PIECES)
    best, token = first_best(top, at)
    nans = tl.max(tl.max(state & 1, 1), 0)
    alive = tl.max(tl.max(state & 2, 1), 0)
    last = part * 0 + 1
    if PARTS > 1:
        last, best, token, nans, alive = _combine(parts, counters, b, part, best, token, nans, alive, PARTS, PARTS_2)
    if last > 0:
        if not GREEDY:
            if (cold == 0) & (best > NO_LOGIT):
                token = inside(token, seed, draw, src, strides, num, wide, V, REPEAT, TEMPERED)
        _write_token(tokens, valid, b, best, token, nans, alive)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a launch is bound to. Strides are those between rows, 0 where the tensor does not come.

    The numbers serve where no tensor comes; ``repeat``, ``tempered`` say whether those options do anything at all, and
    ``penalised`` whether counts, prompt mask, bias or allowed bits come.
    """

    B: int
    V: int
    logits_b: int
    counts_b: int = 0
    prompt_b: int = 0
    bias_b: int = 0
    allowed_b: int = 0
    repetition: float = 1.0
    presence: float = 0.0
    frequency: float = 0.0
    temperature: float = 1.0
    repeat: bool = False
    tempered: bool = False
    penalised: bool = False

    def scalars(self) -> tuple[Any, ...]:
        """The kernels' plain parameters from V on, in order."""
        return (
            self.V, self.logits_b, self.counts_b, self.prompt_b, self.bias_b, self.allowed_b,
            self.repetition, self.presence, self.frequency, self.temperature,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Bound:
    """A launch made ready: bytes of workspace and number of counters it wants (0: none)."""

    launcher: Launcher
    part_bytes: int
    counters: int


def exact(launcher: Launcher) -> Launcher:
    """Without contraction of a*b + c, so that penalties and noise round as the reference's do."""
    launcher.options["enable_fp_fusion"] = False
    return launcher


def _constants(shape: Shape, greedy: bool, parts: int, tile: int, stages: int) -> dict[str, Any]:
    return {
        "REPEAT": shape.repeat, "TEMPERED": shape.tempered and not greedy, "GREEDY": greedy, "PARTS": parts,
        "PARTS_2": triton.next_power_of_2(parts), "GROUPS": tile // 4,
        "STAGES": stages,
    }  # fmt: skip


def bind(
    shape: Shape, *, greedy: bool, offset: int, parts: int, tile: int, num_warps: int, stages: int, reusable: bool
) -> Bound:
    """``parts`` programs a row at most, ``tile`` tokens at a time; ``offset`` where no tensor of offsets comes."""
    parts = max(1, min(parts, triton.cdiv(shape.V, tile)))
    fixed = (offset, *shape.scalars(), *_constants(shape, greedy, parts, tile, stages).values())
    launcher = exact(Launcher(draw_kernel, shape.B * parts, fixed, num_warps=num_warps, reusable=reusable))
    split = parts > 1
    return Bound(launcher, shape.B * parts * 16 * split, shape.B * split)


def launch(
    bound: Bound,
    logits: torch.Tensor, seeds: torch.Tensor, options: dict[str, torch.Tensor], tokens: torch.Tensor, valid: torch.Tensor,
    parts: torch.Tensor | None, counters: torch.Tensor | None,
) -> None:  # fmt: skip
    """``parts`` (uint8) and ``counters`` (int32 zeros, zeros again afterwards) as ``bound`` wants them."""
    get = options.get
    bound.launcher(
        logits, get("counts"), get("prompt_mask"), get("logit_bias"), get("allowed"), get("repetition_penalty"),
        get("presence_penalty"), get("frequency_penalty"), get("temperature"), seeds, get("offset"),
        tokens, valid, parts, counters,
    )  # fmt: skip


_TYPES = {
    "counts": "*i32", "prompt": "*i1", "bias": "*fp32", "allowed": "*i32", "repetition": "*fp32", "presence": "*fp32",
    "frequency": "*fp32", "temperature": "*fp32", "seeds": "*i64", "offset": "*i64", "top_k": "*i64", "top_p": "*fp32",
    "min_p": "*fp32", "tokens": "*i64", "valid": "*i1", "parts": "*u8", "counters": "*i32", "chosen": "*fp32",
    "top_ids": "*i64", "offset_value": "i64", "columns": "i32", "top_k_value": "i32",
}  # fmt: skip
_ALWAYS = ("logits", "seeds", "tokens", "valid", "parts", "counters", "chosen", "top_ids")
PENALTIES = ("counts", "prompt", "bias", "allowed", "repetition", "presence", "frequency")


def specimen(name: str, fn: Any, dtype: str, options: tuple[str, ...], constants: dict[str, Any], num_warps: int) -> Specimen:
    """``options``: the optional tensors that come. V stands for any vocabulary; row strides are multiples of 16."""
    signature: dict[str, str] = {}
    absent: dict[str, Any] = {}
    for parameter in fn.arg_names:
        if parameter in constants:
            continue
        kind = _TYPES.get(parameter, "fp32" if parameter.endswith("_value") else "i32")
        if parameter == "logits":
            signature[parameter] = f"*{dtype}"
        elif kind.startswith("*") and parameter not in (*options, *_ALWAYS):
            absent[parameter] = None
        else:
            signature[parameter] = kind
    free = ("V", "offset_value", "columns", "top_k_value")
    return Specimen(name, fn, signature, absent | constants, num_warps, 1, None, free)


def _draw_specimen(name: str, dtype: str, options: tuple[str, ...], greedy: bool, parts: int, stages: int) -> Specimen:
    shape = Shape(32, 128256, 128256, tempered=not greedy, repeat="repetition" in options)
    return specimen(f"draw-{name}", draw_kernel, dtype, options, _constants(shape, greedy, parts, 1024, stages), 4)


SPECIMENS = [
    _draw_specimen("greedy", "bf16", (), True, 16, 1),
    _draw_specimen("plain", "fp32", (), False, 16, 1),
    _draw_specimen("staged", "fp32", (), False, 16, 3),
    _draw_specimen("penalties", "fp32", (*PENALTIES, "temperature", "offset"), False, 1, 1),
]
