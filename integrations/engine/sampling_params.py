"""SamplingParams: what one request asks of the sampler, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

_SEED_LOW, _SEED_HIGH = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """
    max_tokens           tokens to generate at most (None: as many as the context holds)
    min_tokens           end-of-text and stop token ids cannot be drawn before so many tokens
    temperature          0 is greedy, ties to the lowest id
    top_k, top_p, min_p  0, 1 and 0 switch them off
    repetition_penalty, presence_penalty, frequency_penalty   1, 0 and 0 switch them off
    seed                 the request's own noise: the same seed draws the same tokens in any batch (None: fresh)
    stop                 strings that end the text; they are not part of it
    stop_token_ids       token ids that end it, beside the model's own
    ignore_eos           go on past the model's end-of-text ids
    logprobs             n: log-probabilities of each token drawn and of the n most likely ones
    logit_bias           token id -> what is added to its logit
    allowed_token_ids    only these may be drawn

    Raises ValueError (TypeError for a wrong type) naming the field.
    """

    max_tokens: int | None = 128
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_token_ids: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _number(self, "max_tokens", int, 1)
        _number(self, "min_tokens", int, 0, math.inf if self.max_tokens is None else self.max_tokens)
        _number(self, "temperature", float, 0.0)
        _number(self, "top_k", int, 0)
        _number(self, "top_p", float, 0.0, 1.0)
        _number(self, "min_p", float, 0.0, 1.0)
        _number(self, "repetition_penalty", float, 0.0)
        if self.repetition_penalty == 0:
            raise ValueError("SamplingParams: repetition_penalty is 0, wanted a number above 0")
        _number(self, "presence_penalty", float)
        _number(self, "frequency_penalty", float)
        if self.seed is not None:
            _number(self, "seed", int, _SEED_LOW, _SEED_HIGH)
        if self.logprobs is not None:
            _number(self, "logprobs", int, 0)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(f"SamplingParams: ignore_eos is {self.ignore_eos!r}, wanted True or False")
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else _tuple(self, "stop", str))
        if "" in self.stop:
            raise ValueError("SamplingParams: stop holds an empty string, which would end every text at once")
        object.__setattr__(self, "stop_token_ids", _tuple(self, "stop_token_ids", int))
        if self.allowed_token_ids is not None:
            object.__setattr__(self, "allowed_token_ids", _tuple(self, "allowed_token_ids", int))
            if not self.allowed_token_ids:
                raise ValueError("SamplingParams: allowed_token_ids is empty, wanted at least one token")
        _check_bias(self.logit_bias)

    @property
    def penalised(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)

    def token_ids(self) -> dict[str, Sequence[int]]:
        """The fields that name token ids, for the check against a vocabulary."""
        return {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": tuple(self.logit_bias),
            "allowed_token_ids": self.allowed_token_ids or (),
        }


def _number(params: SamplingParams, name: str, kind: type, low: float = -math.inf, high: float = math.inf) -> None:
    value: Any = getattr(params, name)
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else int):
        raise TypeError(f"SamplingParams: {name} is {value!r}, wanted {'a number' if kind is float else 'a whole number'}")
    if not math.isfinite(value) or not low <= value <= high:
        bounds = f"at least {low:g}" if high == math.inf else f"{low:g} to {high:g}"
        raise ValueError(f"SamplingParams: {name} is {value!r}, wanted {'a finite number' if low == -math.inf else bounds}")


def _tuple(params: SamplingParams, name: str, kind: type) -> tuple[Any, ...]:
    value = getattr(params, name)
    noun = "strings" if kind is str else "whole numbers"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"SamplingParams: {name} is {value!r}, wanted a list of {noun}")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, kind):
            raise TypeError(f"SamplingParams: {name} holds {item!r}, wanted {noun}")
    return tuple(value)


def _check_bias(bias: Any) -> None:
    if not isinstance(bias, Mapping):
        raise TypeError(f"SamplingParams: logit_bias is {bias!r}, wanted a dict of token id to number")
    for token, value in bias.items():
        if isinstance(token, bool) or not isinstance(token, int):
            raise TypeError(f"SamplingParams: logit_bias has the key {token!r}, wanted a token id")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or math.isnan(value):
            raise TypeError(f"SamplingParams: logit_bias[{token}] is {value!r}, wanted a number")
