"""sample: the next token of each row, from logits to id, in one op."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit import check, registry
from attnkit.backends import torch_ref
from attnkit.backends.cpu import sampling as cpu_sampling
from attnkit.backends.cuda import sampling as cuda_sampling
from attnkit.backends.triton import sampling as triton_sampling
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.roofline import Cost
from attnkit.signature import SampleSig

OP = "sample"
KERNELS = (cuda_sampling.SAMPLE, triton_sampling.SAMPLE, cpu_sampling.SAMPLE, torch_ref.SAMPLE)
_PLANS = PlanCache()

#: option -> (its "off" value, is it a whole number, lowest, highest)
OPTIONS: dict[str, tuple[float, bool, float, float]] = {
    "temperature": (1.0, False, 0.0, math.inf),
    "top_k": (0, True, 0, math.inf),
    "top_p": (1.0, False, 0.0, 1.0),
    "min_p": (0.0, False, 0.0, 1.0),
    "repetition_penalty": (1.0, False, 0.0, math.inf),
    "presence_penalty": (0.0, False, -math.inf, math.inf),
    "frequency_penalty": (0.0, False, -math.inf, math.inf),
    "offset": (0, True, 0, 2**63 - 1),
}
_NAMES = tuple(OPTIONS)
#: name in a signature -> (the argument's, its shape or "" for one bit a token, dtype)
_MASKS = {
    "counts": ("output_counts", "B V", torch.int32),
    "prompt_mask": ("prompt_mask", "B V", torch.bool),
    "logit_bias": ("logit_bias", "B V", torch.float32),
    "allowed": ("allowed", "", torch.int32),
}
_GIVEN = (*_NAMES, *_MASKS)


class Sampled(NamedTuple):
    """
    tokens    [B] int64
    valid     [B] bool: False where the row held NaN or nothing to choose from (its token is 0)
    logprobs  [B, 1 + n] float32 or None: log_softmax of the logits as given, for the chosen token and the n highest
    top_ids   [B, 1 + n] int64 or None: the ids those belong to
    """

    tokens: Tensor
    valid: Tensor
    logprobs: Tensor | None = None
    top_ids: Tensor | None = None


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    output_counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    logprobs: int | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> Sampled:
    """Draw one token a row: penalties, bias and mask, then temperature, top-k, top-p, min-p, then a draw by Gumbel noise.

    logits              [B, V] bf16, fp16 or fp32; any row stride
    temperature         0 is greedy; ties go to the lowest id
    top_k, top_p, min_p 0, 1 and 0 switch them off; each counts on what the one before left over; ties at the
                        last place go to the lowest ids, so top_k=1 is exactly greedy
    repetition_penalty  of tokens in the prompt or the output; presence_ and frequency_penalty of the output only
    output_counts       int32 [B, V]: how often each token was generated
    prompt_mask         bool [B, V]: the prompt's tokens
    logit_bias          float32 [V] or [B, V], added
    allowed             int32 [B, ceil(V / 32)]: bit v % 32 of word v // 32 (xgrammar's layout)
    seed                a number (row b uses seed + b), an int64 tensor [B] (a row's draw then depends on its seed,
                        offset and logits alone, not on its place), or None: fresh seeds from torch's generator
    offset              number or int64 [B]: which draw of the seed this is; an engine passes the token's position
    logprobs            n: also return log-probabilities (of the logits as given) of the chosen and the n highest

    The numeric options are numbers or float32 (top_k: int64) tensors [B]. The noise is Philox4x32-10
    (Salmon et al. 2011), the same in every implementation; attnkit/reference.py says how it draws. Nothing
    synchronises. +inf counts as the largest float.
    Returns Sampled; raises ValueError or TypeError before anything is launched.
    """
    if logits.dim() != 2:
        raise ValueError(f"{OP}: logits' shape is {list(logits.shape)}, wanted [B, V]")
    B = logits.shape[0]
    if logit_bias is not None and logit_bias.dim() == 1:
        logit_bias = logit_bias.expand(B, -1)
    options = (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, offset)
    masks = (output_counts, prompt_mask, logit_bias, allowed)
    seeds = seed if isinstance(seed, Tensor) else _seeds(seed, B, logits.device)
    tokens = logits.new_empty(B, dtype=torch.int64) if out is None else out
    valid = logits.new_empty(B, dtype=torch.bool)
    chosen = top = None
    if logprobs is not None:
        chosen = logits.new_empty((B, 1 + logprobs), dtype=torch.float32)
        top = logits.new_empty((B, 1 + logprobs), dtype=torch.int64)
    if config is None and registry.traced(logits):
        numbers = [_number(name, x) for name, x in zip(_NAMES, options)]
        tensors = [x if isinstance(x, Tensor) else None for x in options]
        _op(logits, seeds, tensors, *masks, tokens, valid, chosen, top, numbers, impl)
    else:
        _call(logits, seeds, (*options, *masks), tokens, valid, chosen, top, impl, config)
    return Sampled(tokens, valid, chosen, top)


def _number(name: str, x: float | Tensor) -> float:
    """The option's number, checked; its off value where a tensor comes along instead."""
    off, whole, low, high = OPTIONS[name]
    if isinstance(x, Tensor):
        return float(off)
    if isinstance(x, bool) or not isinstance(x, int if whole else (int, float)):
        raise TypeError(f"{OP}: {name} is {x!r}, wanted {'a whole number' if whole else 'a number'} or a tensor [B]")
    if not low <= x <= high or (name == "repetition_penalty" and x == 0):
        raise ValueError(f"{OP}: {name} is {x!r}, wanted {_range(name, low, high)}")
    return x


def _range(name: str, low: float, high: float) -> str:
    if name == "repetition_penalty":
        return "a number above 0"
    if high == math.inf or name == "offset":
        return "a finite number" if low == -math.inf else f"at least {low:g}"
    return f"{low:g} to {high:g}"


def _seeds(seed: int | None, B: int, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (B,), device=device, dtype=torch.int64)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{OP}: seed is {seed!r}, wanted a whole number, an int64 tensor [B] or None")
    start = (seed + 2**63) % 2**64 - 2**63
    return torch.arange(B, device=device, dtype=torch.int64) + start


def _run(
    logits, seeds, options, counts, prompt_mask, logit_bias, allowed, tokens, valid, chosen, top, numbers, impl
) -> None:  # fmt: skip
    given = (*(x if t is None else t for t, x in zip(options, numbers)), counts, prompt_mask, logit_bias, allowed)
    _call(logits, seeds, given, tokens, valid, chosen, top, impl, None)


def _call(logits, seeds, given, tokens, valid, chosen, top, impl, config) -> None:
    """``given``: a value or tensor for each of _NAMES, then a tensor or None for each of _MASKS."""
    tensors = (logits, seeds, tokens, chosen, *[t if isinstance(t, Tensor) else None for t in given])
    # The types tell 1 from True; a tensor subclass counts as what it is.
    key = call_key(tensors, (impl, config, *map(type, given), *[None if isinstance(t, Tensor) else t for t in given]))
    try:
        plan = _PLANS.get(key)
    except TypeError:  # something that cannot be hashed, and so is no option: _signature says which
        plan = None
    if plan is None:
        plan = _PLANS.put(key, make_plan(KERNELS, _signature(logits, seeds, given, tokens, chosen), impl, config))
        plan.state["given"] = tuple((name, i) for i, name in enumerate(_GIVEN) if isinstance(given[i], Tensor))
    if logits.shape[0]:
        options = {name: given[i] for name, i in plan.state["given"]}
        plan.launch(plan, logits, seeds, options, tokens, valid, chosen, top)


def _signature(logits, seeds, given, tokens, chosen) -> SampleSig:
    options, masks = given[: len(_NAMES)], given[len(_NAMES) :]
    numbers = [_number(name, x) for name, x in zip(_NAMES, options)]
    a = check.Letters(OP, logits.device)
    a.tensor("logits", logits, "B V", check.FLOATS)
    B, V = logits.shape
    if V < 1:
        raise a.fail("V", V, "at least 1 token to choose from")
    a.fits("V")
    a.tensor("seed", seeds, "B", (torch.int64,))
    for name, t in zip(_NAMES, options):
        if isinstance(t, Tensor):
            a.tensor(name, t, "B", (torch.int64,) if OPTIONS[name][1] else (torch.float32,))
    for (name, shape, dtype), t in zip(_MASKS.values(), masks):
        if t is not None:
            a.tensor(name, t, shape or f"B {(V + 31) // 32}", (dtype,))
    a.tensor("out", tokens, "B", (torch.int64,))
    n = None if chosen is None else chosen.shape[1] - 1
    if n is not None and not 0 <= n <= V:
        raise a.fail("logprobs", n, f"0 to V = {V}")
    static: dict[str, Any] = {
        name: None if isinstance(t, Tensor) else (int(x) if OPTIONS[name][1] else float(x))
        for name, t, x in zip(_NAMES, options, numbers)
    }
    return SampleSig(
        op=OP, device=logits.device, dtype=logits.dtype, B=B, V=V, logits_stride=logits.stride(),
        aligned=check.aligned16(logits), **{name: t is not None for name, t in zip(_MASKS, masks)}, logprobs=n, **static,
    )  # fmt: skip


_op = registry.define(
    "sample(Tensor logits, Tensor seeds, Tensor?[] options, Tensor? counts, Tensor? prompt_mask, Tensor? logit_bias,"
    " Tensor? allowed, Tensor(a!) tokens, Tensor(b!) valid, Tensor(c!)? chosen, Tensor(d!)? top, Scalar[] numbers,"
    " str? impl) -> ()",
    _run,
)


def cost(B: int, V: int, logits_bytes: int = 4) -> Cost:
    """Ideal work of one call: the logits read once."""
    return Cost(flops=0, bytes=B * V * logits_bytes + B * 9, kind="fp32")
