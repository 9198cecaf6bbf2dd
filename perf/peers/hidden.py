"""The two steps that sample_from_hidden does in one: torch's product, and a draw."""

from __future__ import annotations

import torch

import attnkit
from attnkit.workload import TRUTH, Inputs
from attnkit.workload_hidden import SampleFromHidden
from perf.peers.base import Call, module, need


def two_steps(case: SampleFromHidden, x: Inputs) -> Call:
    """cuBLAS into 16-bit logits, as engines do it, and attnkit's own sample."""
    hidden, weight = x["hidden"], x["weight"].t()
    rest = {k: v for k, v in x.items() if k not in ("hidden", "weight", "out", TRUTH)}
    return lambda: attnkit.sample(hidden @ weight, **rest).tokens


def flashinfer_two_steps(case: SampleFromHidden, x: Inputs) -> Call:
    """cuBLAS into float32 logits, which FlashInfer's sampler takes."""
    fi = module("flashinfer")
    need(not case.penalties and case.temperature > 0)
    hidden, weight, temperature, s = x["hidden"], x["weight"].t(), x["temperature"], fi.sampling
    product = lambda: torch.mm(hidden, weight, out_dtype=torch.float32)  # noqa: E731
    if not case.top_k and case.top_p == 1:
        return lambda: s.sampling_from_logits(product(), deterministic=True)
    if case.top_k:
        k, p = x["top_k"].int(), x.get("top_p", torch.ones_like(temperature))
        return lambda: s.top_k_top_p_sampling_from_probs(s.softmax(product(), temperature), k, p, filter_apply_order="joint")
    return lambda: s.top_p_sampling_from_probs(s.softmax(product(), temperature), x["top_p"])


def torch_argmax(case: SampleFromHidden, x: Inputs) -> Call:
    need(not case.penalties and case.temperature == 0)
    hidden, weight = x["hidden"], x["weight"].t()
    return lambda: (hidden @ weight).argmax(-1)
