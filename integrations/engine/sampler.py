"""From logits to token ids: the requests' options as tensors, kept while the same requests draw."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import attnkit

from .request import Request

#: option -> (value that switches it off, dtype of its tensor)
_NUMERIC = {
    "temperature": (0.0, torch.float32),
    "top_k": (0, torch.int64),
    "top_p": (1.0, torch.float32),
    "min_p": (0.0, torch.float32),
    "repetition_penalty": (1.0, torch.float32),
    "presence_penalty": (0.0, torch.float32),
    "frequency_penalty": (0.0, torch.float32),
}


@dataclass(frozen=True, slots=True)
class Drawn:
    """tokens: None where a row had nothing to draw from. logprobs: per row id -> value, or None."""

    tokens: list[int | None]
    logprobs: list[dict[int, float] | None]


class Sampler:
    """Draws for a list of requests. A request's tokens depend on its seed, its positions and its logits alone."""

    def __init__(self, vocab: int, device: torch.device) -> None:
        self.vocab, self.device = vocab, device
        self._key: Any = None
        self._options: dict[str, Any] = {}
        self._counts: Tensor | None = None
        self._draws = False

    def __call__(self, logits: Tensor, requests: list[Request]) -> Drawn:
        early = [len(r.output) < r.params.min_tokens for r in requests]
        if self._key != (requests, early):
            self._prepare(requests, early)
            self._key = (list(requests), early)
        options = self._options
        if self._draws:
            options["offset"] = self._put([r.length for r in requests], torch.int64)
        sampled = attnkit.sample(logits, **options)
        if self._counts is not None:
            ones = torch.ones((len(requests), 1), dtype=torch.int32, device=self.device)
            self._counts.scatter_add_(1, sampled.tokens[:, None], ones)
        ids = torch.where(sampled.valid, sampled.tokens, -1).tolist()
        return Drawn([None if i < 0 else i for i in ids], _logprobs(sampled, requests))

    def _prepare(self, requests: list[Request], early: list[bool]) -> None:
        """Options that hold until other requests draw. An option nobody uses is left out."""
        params = [r.params for r in requests]
        o: dict[str, Any] = {"temperature": 0.0, "seed": self._put([r.seed for r in requests], torch.int64)}
        self._draws = any(p.temperature for p in params)
        for name, (off, dtype) in _NUMERIC.items():
            values = [getattr(p, name) for p in params]
            if any(v != off for v in values):
                o[name] = self._put([min(v, self.vocab) for v in values] if name == "top_k" else values, dtype)
        self._counts = None
        if any(p.penalised for p in params):
            self._counts = o["output_counts"] = self._rows(requests, np.int32, lambda row, r: np.add.at(row, r.output, 1))
            o["prompt_mask"] = self._rows(requests, np.bool_, lambda row, r: row.__setitem__(r.prompt, True))
        if any(p.logit_bias for p in params):
            o["logit_bias"] = self._rows(requests, np.float32, _add_bias)
        if any(early) or any(p.allowed_token_ids is not None for p in params):
            o["allowed"] = self._allowed(requests, early)
        asked = [p.logprobs for p in params if p.logprobs is not None]
        if asked:
            o["logprobs"] = max(asked)
        self._options = o

    def _put(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype).to(self.device)

    def _rows(self, requests: list[Request], dtype: Any, fill: Callable[[np.ndarray, Request], None]) -> Tensor:
        """[B, V], zero but for what ``fill`` puts into each request's row."""
        table = np.zeros((len(requests), self.vocab), dtype=dtype)
        for row, request in zip(table, requests):
            fill(row, request)
        return torch.from_numpy(table).to(self.device)

    def _allowed(self, requests: list[Request], early: list[bool]) -> Tensor:
        """Bitmask int32 [B, ceil(V / 32)], low bits first: no end before min_tokens, nothing beyond allowed_token_ids."""
        bits = np.ones((len(requests), -(-self.vocab // 32) * 32), dtype=np.uint8)
        for row, request, is_early in zip(bits, requests, early):
            only = request.params.allowed_token_ids
            if only is not None:
                row[:] = 0
                row[list(only)] = 1
            if is_early:
                row[list(request.stops)] = 0
        return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i4").astype(np.int32)).to(self.device)


def _add_bias(row: np.ndarray, request: Request) -> None:
    for token, value in request.params.logit_bias.items():
        row[token] = value


def _logprobs(sampled: attnkit.Sampled, requests: list[Request]) -> list[dict[int, float] | None]:
    """Each row's drawn token first, then as many of the most likely as it asked for."""
    if sampled.logprobs is None or sampled.top_ids is None:
        return [None] * len(requests)
    out: list[dict[int, float] | None] = []
    for request, ids, values in zip(requests, sampled.top_ids.tolist(), sampled.logprobs.tolist()):
        n = request.params.logprobs
        out.append(None if n is None else dict(zip(ids[: 1 + n], values[: 1 + n])))
    return out
