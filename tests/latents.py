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
