"""What sample and sample_from_hidden share: the options of a draw, and all of a call but the operands and their record."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attnkit import check, registry
from attnkit.dispatch import Kernel, PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.signature import SampleSig, Sig

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
NAMES = tuple(OPTIONS)
#: name in a signature -> (the argument's, its shape or "" for one bit a token, dtype)
MASKS = {
    "counts": ("output_counts", "B V", torch.int32),
    "prompt_mask": ("prompt_mask", "B V", torch.bool),
    "logit_bias": ("logit_bias", "B V", torch.float32),
    "allowed": ("allowed", "", torch.int32),
}
GIVEN = (*NAMES, *MASKS)


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


#: What is written, as the fields of Sampled.
Written = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


class Op:
    """An op that draws a token for each row of its first operand.

    operands   what its schema begins with
    signature  signature(*operands, seeds, given, written) -> a call's record, where ``given`` is a value or tensor for each
               of NAMES, then a tensor or None for each of MASKS
    """

    def __init__(self, name: str, operands: str, kernels: Sequence[Kernel], signature: Callable[..., Sig]) -> None:
        self.name, self.kernels, self.signature, self.plans = name, kernels, signature, PlanCache()
        self.torch_op = registry.define(
            f"{name}({operands}, Tensor seeds, Tensor?[] options, Tensor? counts, Tensor? prompt_mask, Tensor? logit_bias,"
            " Tensor? allowed, Tensor(a!) tokens, Tensor(b!) valid, Tensor(c!)? chosen, Tensor(d!)? top, Scalar[] numbers,"
            " str? impl) -> ()",
            self._from_torch,
        )

    def draw(
        self, operands: tuple[Tensor, ...], options: tuple[Any, ...], masks: tuple[Tensor | None, ...],
        seed: int | Tensor | None, logprobs: int | None, out: Tensor | None, impl: str | None, config: Any,
    ) -> Sampled:  # fmt: skip
        """What the public function does once its operands are known to be matrices."""
        rows = operands[0]
        B = rows.shape[0]
        counts, prompt_mask, logit_bias, allowed = masks
        if logit_bias is not None and logit_bias.dim() == 1:
            logit_bias = logit_bias.expand(B, -1)
        seeds = seeds_of(self.name, seed, B, rows.device)
        written = outputs(rows, logprobs, out)
        if config is None and registry.traced(rows):
            numbers = [number(self.name, name, x) for name, x in zip(NAMES, options)]
            tensors = [x if isinstance(x, Tensor) else None for x in options]
            self.torch_op(*operands, seeds, tensors, counts, prompt_mask, logit_bias, allowed, *written, numbers, impl)
        else:
            self._run(operands, seeds, (*options, counts, prompt_mask, logit_bias, allowed), written, impl, config)
        return Sampled(*written)

    def _from_torch(self, *arguments: Any) -> None:
        *operands, seeds, options, counts, prompt_mask, bias, allowed, tokens, valid, chosen, top, numbers, impl = arguments
        given = (*(x if t is None else t for t, x in zip(options, numbers)), counts, prompt_mask, bias, allowed)
        self._run(tuple(operands), seeds, given, (tokens, valid, chosen, top), impl, None)

    def _run(
        self, operands: tuple[Tensor, ...], seeds: Tensor, given: tuple[Any, ...], written: Written, impl: str | None,
        config: Any,
    ) -> None:  # fmt: skip
        tensors = tuple(t if isinstance(t, Tensor) else None for t in given)
        # The types tell 1 from True; a tensor subclass counts as what it is.
        rest = (impl, config, *map(type, given), *[None if isinstance(t, Tensor) else t for t in given])
        key = call_key((*operands, seeds, written[0], written[2], *tensors), rest)
        try:
            plan = self.plans.get(key)
        except TypeError:  # something that cannot be hashed, and so is no option: the signature says which
            plan = None
        if plan is None:
            sig = self.signature(*operands, seeds, given, written)
            plan = self.plans.put(key, make_plan(self.kernels, sig, impl, config))
            plan.state["given"] = tuple((name, i) for i, name in enumerate(GIVEN) if isinstance(given[i], Tensor))
        if operands[0].shape[0]:
            plan.launch(plan, *operands, seeds, {name: given[i] for name, i in plan.state["given"]}, *written)


def outputs(rows: Tensor, logprobs: int | None, out: Tensor | None) -> Written:
    """What is written for each of ``rows``: tokens (``out`` if given), valid, log-probabilities, ids."""
    B = rows.shape[0]
    tokens = rows.new_empty(B, dtype=torch.int64) if out is None else out
    valid = rows.new_empty(B, dtype=torch.bool)
    if logprobs is None:
        return tokens, valid, None, None
    shape = (B, 1 + logprobs)
    return tokens, valid, rows.new_empty(shape, dtype=torch.float32), rows.new_empty(shape, dtype=torch.int64)


def number(op: str, name: str, x: float | Tensor) -> float:
    """The option's number, checked; its off value where a tensor comes along instead."""
    off, whole, low, high = OPTIONS[name]
    if isinstance(x, Tensor):
        return float(off)
    if isinstance(x, bool) or not isinstance(x, int if whole else (int, float)):
        raise TypeError(f"{op}: {name} is {x!r}, wanted {'a whole number' if whole else 'a number'} or a tensor [B]")
    if not low <= x <= high or (name == "repetition_penalty" and x == 0):
        raise ValueError(f"{op}: {name} is {x!r}, wanted {_range(name, low, high)}")
    return x


def _range(name: str, low: float, high: float) -> str:
    if name == "repetition_penalty":
        return "a number above 0"
    if high == math.inf or name == "offset":
        return "a finite number" if low == -math.inf else f"at least {low:g}"
    return f"{low:g} to {high:g}"


def seeds_of(op: str, seed: int | Tensor | None, B: int, device: torch.device) -> Tensor:
    if isinstance(seed, Tensor):
        return seed
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (B,), device=device, dtype=torch.int64)
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"{op}: seed is {seed!r}, wanted a whole number, an int64 tensor [B] or None")
    start = (seed + 2**63) % 2**64 - 2**63
    return torch.arange(B, device=device, dtype=torch.int64) + start


def signature(
    a: check.Letters, dtype: torch.dtype, stride: tuple[int, int], aligned: bool, seeds: Tensor, given: tuple[Any, ...],
    written: Written,
) -> SampleSig:  # fmt: skip
    """The draw's record, checked. ``a`` knows B and V; then what kind of logits are drawn from."""
    tokens, _, chosen, _ = written
    options, masks = given[: len(NAMES)], given[len(NAMES) :]
    numbers = [number(a.op, name, x) for name, x in zip(NAMES, options)]
    B, V = a.size["B"], a.size["V"]
    if V < 1:
        raise a.fail("V", V, "at least 1 token to choose from")
    a.fits("V")
    a.tensor("seed", seeds, "B", (torch.int64,))
    for name, t in zip(NAMES, options):
        if isinstance(t, Tensor):
            a.tensor(name, t, "B", (torch.int64,) if OPTIONS[name][1] else (torch.float32,))
    for (name, shape, kind), t in zip(MASKS.values(), masks):
        if t is not None:
            a.tensor(name, t, shape or f"B {(V + 31) // 32}", (kind,))
    a.tensor("out", tokens, "B", (torch.int64,))
    n = None if chosen is None else chosen.shape[1] - 1
    if n is not None and not 0 <= n <= V:
        raise a.fail("logprobs", n, f"0 to V = {V}")
    static: dict[str, Any] = {
        name: None if isinstance(t, Tensor) else (int(x) if OPTIONS[name][1] else float(x))
        for name, t, x in zip(NAMES, options, numbers)
    }
    return SampleSig(
        op=a.op, device=a.device, dtype=dtype, B=B, V=V, logits_stride=stride, aligned=aligned,
        **{name: t is not None for name, t in zip(MASKS, masks)}, logprobs=n, **static,
    )  # fmt: skip
