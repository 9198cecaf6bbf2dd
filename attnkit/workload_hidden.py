"""Cases of sample_from_hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from attnkit import hidden
from attnkit.dispatch import Kernel
from attnkit.roofline import Cost
from attnkit.workload import DTYPES, TRUTH, Drawn, Inputs, remembered, sample_rows, sized


@dataclass(frozen=True, kw_only=True)
class SampleFromHidden(Drawn):
    """sample_from_hidden."""

    family: ClassVar[str] = "hidden"
    op: ClassVar[str] = "sample_from_hidden"
    ROWS: ClassVar[tuple[str, float]] = ("hidden", 1.0)
    #: Less than this between two scores counts as a tie: sums over H differ by their order.
    TIE: ClassVar[float] = 0.02
    H: int
    dtype: str = "bf16"

    def letters(self) -> list[str]:
        return [f"B{self.B}", f"V{self.V}", f"H{self.H}", *self._on(), self.dtype]

    def kernels(self) -> tuple[Kernel, ...]:
        return hidden.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        rows, weight = (torch.empty(n, self.H, dtype=DTYPES[self.dtype], device=device) for n in (self.B, self.V))
        if not empty:
            rows.normal_(), weight.normal_(0, self.WIDTH / self.H**0.5)
        return {"hidden": rows, "weight": weight, **self._rest(device)}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        rest = {k: v for k, v in x.items() if k not in ("hidden", "weight", TRUTH)}
        return lambda: hidden.sample_from_hidden(x["hidden"], x["weight"], **rest, impl=impl, config=config).tokens

    def cost(self) -> Cost:
        return hidden.cost(self.B, self.V, self.H, DTYPES[self.dtype].itemsize) + self._counts_cost()

    def small(self) -> Self:
        return sized(super().small(), H=min(self.H, 72))

    def error(self, x: Inputs, out: Any = None) -> float:
        """The share of rows whose token neither the reference draws nor would with a tie decided otherwise."""
        out = x["out"] if out is None else out
        rows = sample_rows(self.B, 16, out.device)
        logits = remembered(x, lambda: logits_of(x["hidden"][rows], x["weight"]))
        tokens = out[rows].clamp(0, self.V - 1)
        tries = [logits, *(_raised(logits, tokens, self.TIE, group) for group in (True, False))]
        drawn = torch.stack([self._drawn(x, rows, t) for t in tries])
        right = (drawn == tokens).any(0) & (tokens == out[rows])
        return float((~right).double().mean())

    @property
    def limit(self) -> float:
        return 0.0


def logits_of(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight^T, added up in float64, as float32."""
    parts = [rows.double() @ part.double().t() for part in weight.split(8192)]
    return torch.cat(parts, 1).float()


def _raised(logits: Tensor, tokens: Tensor, by: float, group: bool) -> Tensor:
    """``logits`` with each row's token raised, or all of its group."""
    v = torch.arange(logits.shape[1], device=logits.device)[None]
    name = lambda t: t // 512 * 32 + t % 128 // 4  # noqa: E731
    mine = name(v) == name(tokens[:, None]) if group else v == tokens[:, None]
    return torch.where(mine, logits + by, logits)
