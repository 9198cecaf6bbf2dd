"""Poisoned inputs for a case: every KV slot, page and table entry that may not be read is NaN or garbage.

And the options of a draw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from attnkit import PageTable, reference
from tests.cases import Case

GARBAGE_PAGE = 1 << 30


@dataclass
class Inputs:
    case: Case
    q: Tensor
    kv: Tensor | tuple[Tensor, Tensor]
    table: PageTable
    cu_q: Tensor
    options: dict[str, Any]
    clean: dict[str, Any] = field(default_factory=dict)  # what reference.paged_attention takes

    def truth(self, compute: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        k, v = self.kv if isinstance(self.kv, tuple) else (self.kv[:, 0], self.kv[:, 1])
        q = self.q.flatten(0, 1) if self.q.dim() == 4 else self.q
        out, lse = reference.paged_attention(q, k, v, *self.table, self.cu_q, compute=compute, **self.clean)
        return out.view(*self.q.shape[:-1], -1), lse.view(self.q.shape[:-1])

    def plain(self) -> tuple[Tensor, Tensor]:
        return self.truth(self.q.dtype)


def pool(case: Case, P: int, device: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Any]:
    """k and v views [P, S, Hkv, D] of a NaN-filled cache in the case's layout, and the cache as a user passes it."""
    S, H, D, Dv = case.S, case.Hkv, case.D, case.Dv or case.D
    dtype = case.kv_dtype or case.dtype

    def empty(*shape: int) -> Tensor:
        if dtype == torch.int8:
            return torch.full(shape, 113, dtype=dtype, device=device)
        return torch.full(shape, float("nan"), device=device).to(dtype)

    if case.layout == "pair" or D != Dv:
        k, v = empty(P, S, H, D), empty(P, S, H, Dv)
        return k, v, (k, v)
    if case.layout == "HND":
        kv = empty(P, 2, H, S, D).transpose(2, 3)
    elif case.layout == "interleaved":  # K then V of a head side by side, as some engines keep them
        both = empty(P, S, H, 2 * D)
        return both[..., :D], both[..., D:], (both[..., :D], both[..., D:])
    else:
        kv = empty(P, 2, S, H, D)
    return kv[:, 0], kv[:, 1], kv


def fill(cache: Tensor, values: Tensor, page: Tensor, slot: Tensor) -> None:
    raw = torch.uint8 if cache.dtype == torch.float8_e4m3fn else cache.dtype
    cache.view(raw)[page, slot] = values.to(cache.dtype).view(raw)


def make(case: Case, device: str = "cpu", seed: int = 0) -> Inputs:
    g = torch.Generator(device=device).manual_seed(seed)
    S, W = case.S, max([1, *(-(-n // case.S) for n in case.lens)]) + 1
    needed = sum(-(-n // S) for n in case.lens)
    P = needed + 3
    order = torch.randperm(P, generator=g, device=device).int()
    pages = torch.full((len(case.lens), W), GARBAGE_PAGE, dtype=torch.int32, device=device)
    k, v, kv = pool(case, P, device, g)
    quantised = case.kv_dtype is not None
    start = 0
    for b, n in enumerate(case.lens):
        count = -(-n // S)
        pages[b, :count] = order[start : start + count]
        start += count
        at = torch.arange(n, device=device)
        page, slot = pages[b].long()[at // S], at % S
        for cache in (k, v):
            x = torch.randn(n, *cache.shape[2:], generator=g, device=device)
            if case.kv_dtype == torch.int8:
                x = (x * 40).round().clamp(-127, 127)
            fill(cache, x, page, slot)
    q_lens = case.q_lens or (case.Q,) * len(case.lens)
    T, Hq, D = sum(q_lens), case.Hq, case.D
    wide = torch.randn(T, Hq, D + (8 if case.strided_q else 0), generator=g, device=device).to(case.dtype)
    q = wide[..., :D]
    if not case.q_lens:
        q = q.view(len(case.lens), case.Q, Hq, D) if not case.strided_q else q.unflatten(0, (len(case.lens), case.Q))
    cu = torch.tensor([0, *q_lens], device=device).cumsum(0).int()
    options, clean = _options(case, device, g, quantised)
    return Inputs(case, q, kv, PageTable(pages, torch.tensor(case.lens, dtype=torch.int32, device=device)), cu, options, clean)


def _options(case: Case, device: str, g: torch.Generator, quantised: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same options as the public functions and as the reference take them."""
    options: dict[str, Any] = {"batch_invariant": case.batch_invariant, "window": case.window, "softcap": case.softcap}
    clean: dict[str, Any] = {
        "scale": case.D**-0.5,
        "causal": case.causal,
        "window": case.window or 0,
        "softcap": case.softcap,
    }
    if case.sinks:
        options["sinks"] = clean["sinks"] = torch.randn(case.Hq, generator=g, device=device)
    if quantised:
        unit = 1 / 40 if case.kv_dtype == torch.int8 else 1.0
        for name in ("k_scale", "v_scale"):
            heads = (torch.rand(case.Hkv, generator=g, device=device) + 0.5) * unit
            if case.scales == "head":
                options[name] = clean[name] = heads
            elif case.scales == "tensor":
                options[name], clean[name] = heads[:1].clone(), heads[:1].expand(case.Hkv)
            elif case.scales == "number":
                options[name], clean[name] = float(heads[0]), heads[:1].expand(case.Hkv)
    if case.tree:
        mask = torch.rand(len(case.lens), case.Q, case.Q, generator=g, device=device) < 0.5
        options["tree_mask"] = clean["tree_mask"] = mask | torch.eye(case.Q, dtype=torch.bool, device=device)
    return options, clean


def of_a_draw(B: int, V: int, device: str) -> dict[str, Any]:
    """Every option of sample and sample_from_hidden that may be a tensor, as one; the first row is greedy."""
    g = torch.Generator(device=device).manual_seed(1)

    def rand(low: float, high: float) -> Tensor:
        return torch.rand(B, generator=g, device=device) * (high - low) + low

    temperature = rand(0.5, 1.5)
    temperature[0] = 0
    words = torch.randint(-(2**31), 2**31 - 1, (B, (V + 31) // 32), generator=g, device=device, dtype=torch.int32)
    words[:, 0] |= 1
    return {
        "temperature": temperature,
        "repetition_penalty": rand(0.8, 1.5),
        "presence_penalty": rand(-1, 1),
        "frequency_penalty": rand(-1, 1),
        "output_counts": torch.randint(0, 3, (B, V), generator=g, device=device, dtype=torch.int32),
        "prompt_mask": torch.rand(B, V, generator=g, device=device) < 0.3,
        "logit_bias": torch.randn(V, generator=g, device=device),
        "allowed": words,
        "seed": torch.randint(-(2**63), 2**63 - 1, (B,), generator=g, device=device),
        "offset": torch.arange(B, device=device) + 2**33,
        "top_k": torch.randint(0, 60, (B,), generator=g, device=device),
        "top_p": rand(0.5, 1.0),
        "min_p": rand(0.0, 0.02),
    }
