"""Greedy choice and plain temperature sampling: one read of the logits, a row split over several programs.

Each program keeps its best token so far; noise is made for every token, but its logarithms only for tiles in which
some token could still win. The last program of a row to arrive combines the row's parts. Filters (top-k, top-p,
min-p) are in filters.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .logits import NO_LOGIT, may_win, noisy, numbers, option, scores, stream, uniform4
from .tiles import device_function


@device_function
def _first_best(top, at, V):
    """(largest of top [N, 4], the lowest id in ``at`` that has it, or V where nothing was seen)."""
    best = tl.max(tl.max(top, 1), 0)
    return best, tl.min(tl.min(tl.where(top == best, at, V), 1), 0)


@device_function
def _write_token(tokens, valid, b, best, token, nans, alive):
    good = (nans == 0) & (alive > 0)
    tl.store(tokens + b, tl.where(good & (best > NO_LOGIT), token, 0).to(tl.int64))
    tl.store(valid + b, good)


@device_function
def _combine(parts, counters, tokens, valid, b, part, best, token, nans, alive, V, PARTS: tl.constexpr, PARTS_2: tl.constexpr):
    """Leave this part's result in the workspace; the last part of the row to arrive writes the best of all."""
    floats = parts.to(tl.pointer_type(tl.float32), bitcast=True)
    words = parts.to(tl.pointer_type(tl.int32), bitcast=True)
    mine = (b * PARTS + part) * 4
    tl.store(floats + mine, best)
    tl.store(words + mine + 1, token)
    tl.store(words + mine + 2, nans)
    tl.store(words + mine + 3, alive)
    tl.debug_barrier()
    arrived = tl.atomic_add(counters + b, 1, sem="acq_rel", scope="gpu")
    if arrived == PARTS - 1:
        z = tl.arange(0, PARTS_2)
        every = (b * PARTS + z) * 4
        tops = tl.load(floats + every, mask=z < PARTS, other=float("-inf"))
        best = tl.max(tops, 0)
        token = tl.min(tl.where(tops == best, tl.load(words + every + 1, mask=z < PARTS, other=V), V), 0)
        nans = tl.max(tl.load(words + every + 2, mask=z < PARTS, other=0), 0)
        alive = tl.max(tl.load(words + every + 3, mask=z < PARTS, other=0), 0)
        _write_token(tokens, valid, b, best, token, nans, alive)
        tl.store(counters + b, 0)


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
    cold = num[5] > 0
    seed = tl.load(seeds + b)
    draw = option(offset, offset_value, b, tl.int64)

    group = tl.arange(0, GROUPS)
    ids = group[:, None] * 4 + tl.arange(0, 4)[None, :]
    top = tl.full([GROUPS, 4], float("-inf"), tl.float32)
    at = tl.zeros([GROUPS, 4], tl.int32) + V
    state = tl.zeros([GROUPS, 4], tl.int32)
    floor = tl.full([], float("-inf"), tl.float32)
    share = tl.cdiv(tl.cdiv(V, 4 * GROUPS), PARTS)
    for tile in stream(part * share, part * share + share, 1, num_stages=STAGES):
        v = tile * (4 * GROUPS) + ids
        l, x, bad = scores(src, strides, num, wide, v, V, REPEAT, TEMPERED)
        state = state | bad | tl.where(x > NO_LOGIT, 2, 0)
        if GREEDY:
            better = l > top
            top = tl.where(better, l, top)
            at = tl.where(better, v, at)
        else:
            u = uniform4(seed, draw, tile * GROUPS + group)
            hope = may_win(l, u, floor) | (cold & (l > floor))
            if tl.max(tl.max(hope.to(tl.int32), 1), 0) > 0:
                score = tl.where(cold, l, noisy(l, u))
                better = hope & (score > top)
                top = tl.where(better, score, top)
                at = tl.where(better, v, at)
                floor = tl.max(tl.max(top, 1), 0)
    best, token = _first_best(top, at, V)
    nans = tl.max(tl.max(state & 1, 1), 0)
    alive = tl.max(tl.max(state & 2, 1), 0)
    if PARTS == 1:
        _write_token(tokens, valid, b, best, token, nans, alive)
    else:
        _combine(parts, counters, tokens, valid, b, part, best, token, nans, alive, V, PARTS, PARTS_2)


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
