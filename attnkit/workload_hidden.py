"""Cases of sample_from_hidden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit import drawing, hidden, reference
from attnkit.dispatch import Kernel
from attnkit.roofline import Cost
from attnkit.workload import DTYPES, TRUTH, Case, Inputs, clone, remembered, sample_rows, sized


@dataclass(frozen=True, kw_only=True)
class SampleFromHidden(Case):
    """sample_from_hidden, its options as tensors a row."""

    family: ClassVar[str] = "hidden"
    op: ClassVar[str] = "sample_from_hidden"
    #: Of the logits, as in Sample.
    WIDTH: ClassVar[float] = 2.5
    #: Less than this between two scores counts as a tie: sums over H differ by their order.
    TIE: ClassVar[float] = 0.02
    B: int
    V: int
    H: int
    dtype: str = "bf16"
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    penalties: bool = False

    def letters(self) -> list[str]:
        on = [f"k{self.top_k}"] if self.top_k else []
        on += [f"p{self.top_p:g}"] if self.top_p < 1 else []
        on += ["penalties"] if self.penalties else []
        on = on or ["temperature" if self.temperature else "greedy"]
        return [f"B{self.B}", f"V{self.V}", f"H{self.H}", *on, self.dtype]

    def kernels(self) -> tuple[Kernel, ...]:
        return hidden.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        B, V, H, dtype = self.B, self.V, self.H, DTYPES[self.dtype]
        rows, weight = (torch.empty(n, H, dtype=dtype, device=device) for n in (B, V))
        if not empty:
            rows.normal_(), weight.normal_(0, self.WIDTH / H**0.5)
        full = lambda x, dtype=torch.float32: torch.full((B,), x, dtype=dtype, device=device)  # noqa: E731
        options: Inputs = {"temperature": full(self.temperature)}
        if self.top_k:
            options["top_k"] = full(self.top_k, torch.int64)
        if self.top_p < 1:
            options["top_p"] = full(self.top_p)
        if self.penalties:
            options |= {"repetition_penalty": full(1.1), "presence_penalty": full(0.2), "frequency_penalty": full(0.1)}
            options["output_counts"] = torch.randint(0, 64, (B, V), dtype=torch.int32, device=device).sub_(60).clamp_(min=0)
        seed = torch.randint(0, 2**62, (B,), device=device)
        out = torch.empty(B, dtype=torch.int64, device=device)
        return {"hidden": rows, "weight": weight, "seed": seed, **options, "out": out}

    def another(self, x: Inputs) -> Inputs:
        found = {k: v for k, v in clone(x).items() if k != TRUTH}
        found["hidden"].normal_()
        found["seed"].random_(0, 2**62)
        return found

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        rest = {k: v for k, v in x.items() if k not in ("hidden", "weight", TRUTH)}
        return lambda: hidden.sample_from_hidden(x["hidden"], x["weight"], **rest, impl=impl, config=config).tokens

    def cost(self) -> Cost:
        base = hidden.cost(self.B, self.V, self.H, DTYPES[self.dtype].itemsize)
        return base + Cost(0, 4.0 * self.B * self.V if self.penalties else 0.0)

    def small(self) -> SampleFromHidden:
        return sized(self, B=min(self.B, 3), V=min(self.V, 1003), H=min(self.H, 72), top_k=min(self.top_k, 40))

    def error(self, x: Inputs, out: Any = None) -> float:
        """The share of rows whose token neither the reference draws nor would with a tie decided otherwise."""
        out = x["out"] if out is None else out
        rows = sample_rows(self.B, 16, out.device)
        logits = remembered(x, lambda: logits_of(x["hidden"][rows], x["weight"]))
        options = reference_options(x, rows)
        tokens = out[rows].clamp(0, self.V - 1)
        tries = [logits, *(_raised(logits, tokens, self.TIE, group) for group in (True, False))]
        drawn = torch.stack([reference.sample(t, x["seed"][rows], options)[0] for t in tries])
        right = (drawn == tokens).any(0) & (tokens == out[rows])
        return float((~right).double().mean())

    @property
    def limit(self) -> float:
        return 0.0


def logits_of(rows: Tensor, weight: Tensor) -> Tensor:
    """rows @ weight^T, added up in float64, as float32."""
    parts = [rows.double() @ part.double().t() for part in weight.split(8192)]
    return torch.cat(parts, 1).float()


def reference_options(x: Inputs, rows: Tensor) -> dict[str, Tensor]:
    """Every option of reference.sample, a row each."""
    found: dict[str, Tensor] = {}
    for name, (off, whole, _, _) in drawing.OPTIONS.items():
        value = x[name][rows] if name in x else torch.full((len(rows),), float(off), device=rows.device)
        found[name] = value.long() if whole else value
    if "output_counts" in x:
        found["counts"] = x["output_counts"][rows]
    return found


def _raised(logits: Tensor, tokens: Tensor, by: float, group: bool) -> Tensor:
    """``logits`` with each row's token raised, or all of its group."""
    v = torch.arange(logits.shape[1], device=logits.device)[None]
    name = lambda t: t // 512 * 32 + t % 128 // 4  # noqa: E731
    mine = name(v) == name(tokens[:, None]) if group else v == tokens[:, None]
    return torch.where(mine, logits + by, logits)
