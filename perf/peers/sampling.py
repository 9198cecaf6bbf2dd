"""FlashInfer's sampler and torch's."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.workload import Inputs, Sample
from perf.peers.base import Call, module, need


def flashinfer_sampling(case: Sample, x: Inputs) -> Call:
    fi = module("flashinfer")
    need(case.dtype == "fp32" and not case.penalties and case.temperature > 0 and case.logprobs is None)
    logits, temperature = x["logits"], x["temperature"]
    s = fi.sampling
    if not case.top_k and case.top_p == 1 and not case.min_p:
        return lambda: s.sampling_from_logits(logits, deterministic=True)
    if case.min_p:
        need(not case.top_k and case.top_p == 1)
        return lambda: s.min_p_sampling_from_probs(s.softmax(logits, temperature), x["min_p"])
    if case.top_k:
        k, p = x["top_k"].int(), x.get("top_p", torch.ones_like(temperature))
        return lambda: s.top_k_top_p_sampling_from_probs(s.softmax(logits, temperature), k, p, filter_apply_order="joint")
    return lambda: s.top_p_sampling_from_probs(s.softmax(logits, temperature), x["top_p"])


def torch_sort(case: Sample, x: Inputs) -> Call:
    """The sampler every engine starts with: sort, mask, softmax, draw."""
    need(not case.penalties and case.temperature > 0 and case.logprobs is None)
    logits, t = x["logits"], x["temperature"][:, None]

    def run() -> Tensor:
        z = logits.float() / t
        if case.top_k or case.top_p < 1:
            z, order = z.sort(dim=-1, descending=True)
            if case.top_k:
                z = z.masked_fill(torch.arange(case.V, device=z.device) >= x["top_k"][:, None], -float("inf"))
            p = z.softmax(-1)
            if case.top_p < 1:
                p = p.masked_fill(p.cumsum(-1) - p >= x["top_p"][:, None], 0.0)
        else:
            p, order = z.softmax(-1), None
        if case.min_p:
            p = p.masked_fill(p < case.min_p * p.amax(-1, keepdim=True), 0.0)
        token = (p / torch.empty_like(p).exponential_()).argmax(-1)
        return token if order is None else order.gather(1, token[:, None])[:, 0]

    return run


def torch_argmax(case: Sample, x: Inputs) -> Call:
    need(not case.penalties and case.temperature == 0 and case.logprobs is None)
    logits = x["logits"]
    return lambda: logits.argmax(-1)
