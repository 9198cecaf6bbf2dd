"""Cases of write_kv, write_latent and merge_states: what stands around the attention kernels in every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit import attention, cache, latent, reference
from attnkit.dispatch import Kernel
from attnkit.roofline import Cost
from attnkit.workload import DTYPES, Case, Inputs, relative_error, remembered, sized


@dataclass(frozen=True, kw_only=True)
class WriteKv(Case):
    """T new tokens into scattered slots of a paged cache; ``kv`` names an 8-bit one. "out" is the cache."""

    family: ClassVar[str] = "cache"
    op: ClassVar[str] = "write_kv"
    T: int
    Hkv: int
    D: int = 128
    S: int = 16
    kv: str = ""

    def letters(self) -> list[str]:
        return ["write", f"T{self.T}", f"Hkv{self.Hkv}", f"D{self.D}", f"S{self.S}", f"{self.kv}kv" if self.kv else "bf16"]

    def kernels(self) -> tuple[Kernel, ...]:
        return cache.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        P = -(-2 * self.T // self.S)
        k, v = (torch.empty(self.T, self.Hkv, self.D, dtype=torch.bfloat16, device=device) for _ in range(2))
        if not empty:
            k.normal_()
            v.normal_()
        slots = torch.randperm(P * self.S, device=device)[: self.T]
        kept = DTYPES[self.kv or "bf16"]
        scale = torch.full((self.Hkv,), 0.03, device=device) if self.kv else None
        out = torch.zeros(P, 2, self.S, self.Hkv, self.D, dtype=kept, device=device)
        return {"k": k, "v": v, "slots": slots, "scale": scale, "out": out}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        k, v, kv, slots, scale = (x[name] for name in ("k", "v", "out", "slots", "scale"))
        return lambda: cache.write_kv(k, v, kv, slots, k_scale=scale, v_scale=scale, impl=impl)

    def cost(self) -> Cost:
        values = 2 * self.T * self.Hkv * self.D
        return Cost(0, values * (2 + (1 if self.kv else 2)) + 8 * self.T)

    def small(self) -> WriteKv:
        return sized(self, T=min(self.T, 19), Hkv=min(self.Hkv, 3))

    def poison(self, x: Inputs) -> None:
        x["out"].view(torch.uint8).fill_(0x7F)

    def error(self, x: Inputs, out: Any = None) -> float:
        """Of the written slots, against the reference's (which must be the same), and all others untouched."""
        kv = x["out"]
        want = remembered(x, lambda: self._truth(x))
        left = torch.ones(kv.shape[0] * self.S, dtype=torch.bool, device=kv.device)
        left[x["slots"]] = False
        raw = kv.view(torch.uint8).transpose(1, 2).flatten(0, 1)
        if not bool((raw[left] == 0x7F).all()):
            return float("inf")
        return relative_error(kv.transpose(1, 2).flatten(0, 1)[x["slots"]].float(), want)

    def _truth(self, x: Inputs) -> Tensor:
        kept = [reference.quantise_kv(x[name], x["out"].dtype, x["scale"]).float() for name in ("k", "v")]
        return torch.stack(kept, 1)

    @property
    def limit(self) -> float:
        return 1e-6


@dataclass(frozen=True, kw_only=True)
class WriteLatent(Case):
    """T new latents into scattered slots of an fp8 latent cache. "out" is the cache."""

    family: ClassVar[str] = "cache"
    op: ClassVar[str] = "write_latent"
    T: int
    S: int = 64

    def letters(self) -> list[str]:
        return ["write-latent", f"T{self.T}", f"S{self.S}", "fp8kv"]

    def kernels(self) -> tuple[Kernel, ...]:
        return latent.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        P = -(-2 * self.T // self.S)
        both = torch.empty(self.T, attention.LATENT + attention.LATENT_ROPE, dtype=torch.bfloat16, device=device)
        if not empty:
            both.normal_()
        slots = torch.randperm(P * self.S, device=device)[: self.T]
        out = torch.zeros(P, self.S, attention.LATENT_ROW, dtype=torch.uint8, device=device)
        return {"both": both, "slots": slots, "out": out}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        new, rope = x["both"].split([attention.LATENT, attention.LATENT_ROPE], -1)
        return lambda: latent.write_latent(new, rope, x["out"], x["slots"], impl=impl)

    def cost(self) -> Cost:
        return Cost(0, self.T * (2 * (attention.LATENT + attention.LATENT_ROPE) + attention.LATENT_ROW + 8))

    def small(self) -> WriteLatent:
        return sized(self, T=min(self.T, 19), S=8)

    def poison(self, x: Inputs) -> None:
        x["out"].fill_(0x7F)

    def error(self, x: Inputs, out: Any = None) -> float:
        """0 where every byte is the reference's, those of slots that were not written among them."""
        want = remembered(x, lambda: self._truth(x))
        return 0.0 if torch.equal(x["out"], want) else float("inf")

    def _truth(self, x: Inputs) -> Tensor:
        want = torch.full_like(x["out"], 0x7F)
        new, rope = x["both"].split([attention.LATENT, attention.LATENT_ROPE], -1)
        reference.write_latent(new, rope, want, x["slots"])
        return want

    @property
    def limit(self) -> float:
        return 0.0


@dataclass(frozen=True, kw_only=True)
class Merge(Case):
    """merge_states of T queries."""

    family: ClassVar[str] = "cache"
    op: ClassVar[str] = "merge_states"
    T: int
    Hq: int
    D: int = 128
    dtype: str = "bf16"

    def letters(self) -> list[str]:
        return ["merge", f"T{self.T}", f"Hq{self.Hq}", f"D{self.D}", self.dtype]

    def kernels(self) -> tuple[Kernel, ...]:
        return cache.MERGE_KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        a, b, out = (torch.empty(self.T, self.Hq, self.D, dtype=DTYPES[self.dtype], device=device) for _ in range(3))
        if not empty:
            a.normal_()
            b.normal_()
        lse_a, lse_b = (torch.randn(self.T, self.Hq, device=device) for _ in range(2))
        return {"a": a, "lse_a": lse_a, "b": b, "lse_b": lse_b, "out": out}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        a, lse_a, b, lse_b, out = (x[name] for name in ("a", "lse_a", "b", "lse_b", "out"))
        return lambda: cache.merge_states(a, lse_a, b, lse_b, out=out, impl=impl)[0]

    def cost(self) -> Cost:
        rows = self.T * self.Hq
        return Cost(0, rows * (3 * self.D * DTYPES[self.dtype].itemsize + 3 * 4))

    def small(self) -> Merge:
        return sized(self, T=min(self.T, 5), Hq=min(self.Hq, 3))

    def error(self, x: Inputs, out: Any = None) -> float:
        doubles = [x[name].double() for name in ("a", "lse_a", "b", "lse_b")]
        truth = remembered(x, lambda: reference.merge_states(*doubles)[0])
        return relative_error(x["out"] if out is None else out, truth)

    @property
    def limit(self) -> float:
        return {"bf16": 4e-3, "fp16": 5e-4, "fp32": 1e-6}[self.dtype]
