"""Latent caches for mla_decode's tests, 16-bit and fp8: every byte that may not be read is NaN or garbage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit import PageTable, attention, reference
from tests.inputs import GARBAGE_PAGE


@dataclass
class Latents:
    q: Tensor
    kv: Tensor
    table: PageTable
    C: int
    options: dict[str, Any]

    def truth(self, compute: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        B, Q, H, D = self.q.shape
        kv = reference.dequantise_latent(self.kv, compute) if self.kv.dtype == torch.uint8 else self.kv
        k = kv.unsqueeze(2)
        cu = torch.arange(B + 1, dtype=torch.int32, device=self.q.device) * Q
        options = {"window": 0, **{n: v for n, v in self.options.items() if v is not None}}
        out, lse = reference.paged_attention(
            self.q.flatten(0, 1),
            k,
            k[..., : self.C],
            *self.table,
            cu,
            scale=(128 + D - self.C) ** -0.5,
            compute=compute,
            **options,
        )
        return out.view(B, Q, H, self.C), lse.view(B, Q, H)

    def plain(self) -> tuple[Tensor, Tensor]:
        out, lse = self.truth(self.q.dtype)
        return out, lse.float()


def make(
    lens: tuple[int, ...], device: str, *, Q: int = 1, H: int = 16, C: int = 512, R: int = 64, S: int = 16,
    dtype: torch.dtype = torch.bfloat16, fp8: bool = False, gap: int = 0, seed: int = 0, size: float = 1.0,
    window: int | None = None, softcap: float = 0.0, sinks: bool = False, tree: bool = False,
) -> Latents:  # fmt: skip
    """``gap``: bytes (fp8) or elements between pages; ``size``: the latents' standard deviation, which grows with the token."""
    g = torch.Generator(device=device).manual_seed(seed)
    counts = [-(-n // S) for n in lens]
    P, row = sum(counts) + 2, attention.LATENT_ROW if fp8 else C + R
    order = torch.randperm(P, generator=g, device=device).int()
    pages = torch.full((len(lens), max([1, *counts]) + 1), GARBAGE_PAGE, dtype=torch.int32, device=device)
    flat = torch.empty(P * (S * row + gap), dtype=torch.uint8 if fp8 else dtype, device=device)
    flat.fill_(0xFF if fp8 else float("nan"))
    kv = flat.as_strided((P, S, row), (S * row + gap, row, 1))
    start = 0
    for b, (n, count) in enumerate(zip(lens, counts)):
        pages[b, :count] = order[start : start + count]
        start += count
        at = torch.arange(n, device=device)
        page, slot = pages[b].long()[at // S], at % S
        x = torch.randn(n, C + R, generator=g, device=device) * size * (1 + at[:, None] / 64)
        if fp8:
            reference.write_latent(x[:, :C], x[:, C:], kv, page * S + slot)
        else:
            kv[page, slot] = x.to(dtype)
    q = torch.randn(len(lens), Q, H, C + R, generator=g, device=device).to(dtype)
    options: dict[str, Any] = {"window": window, "softcap": softcap, "sinks": None, "tree_mask": None}
    if sinks:
        options["sinks"] = torch.randn(H, generator=g, device=device)
    if tree:
        mask = torch.rand(len(lens), Q, Q, generator=g, device=device) < 0.5
        options["tree_mask"] = mask | torch.eye(Q, dtype=torch.bool, device=device)
    table = PageTable(pages, torch.tensor(lens, dtype=torch.int32, device=device))
    return Latents(q, kv, table, C, options)


def compare(call: Callable[..., Any], x: Latents, **more: Any) -> None:
    """One call with lse, held to float64."""
    from tests.close import assert_close

    out, lse = call(x.q, x.kv, x.table, latent=x.C, return_lse=True, **x.options, **more)
    want, plain = x.truth(), x.plain()
    assert_close(out, want[0], plain[0])
    assert_close(lse, want[1], plain[1], "lse")


def check_replays(call: Callable[..., Any], x: Latents) -> None:
    """A captured call of three sequences, the second of 500 tokens and the third of one, replayed with other lens."""
    out = torch.empty_like(x.q[..., : x.C])
    call(x.q, x.kv, x.table, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call(x.q, x.kv, x.table, out=out)
    longest = int(x.table.lens[0])
    for lens in ([longest, 500, 1], [17, 500, 0], [longest - 1, 1, 1], [0, 0, 0], [longest, 500, 1]):
        x.table.lens.copy_(torch.tensor(lens))
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, call(x.q, x.kv, x.table))
        assert not out.isnan().any()


def check_nan_stays(call: Callable[..., Any], x: Latents) -> None:
    """NaN in a page of the first sequence reaches no other."""
    first = call(x.q, x.kv, x.table)
    x.kv[x.table.pages[0, 3].long()] = 0xFF if x.kv.dtype == torch.uint8 else float("nan")
    second = call(x.q, x.kv, x.table)
    assert second[0].isnan().all() and torch.equal(second[1], first[1])


def check_repeats(call: Callable[..., Any], x: Latents) -> None:
    first = call(x.q, x.kv, x.table)
    for _ in range(250):
        assert torch.equal(call(x.q, x.kv, x.table), first)
