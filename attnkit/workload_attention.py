"""Attention's cases: paged prefill and decode, MLA decode and prefill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit import attention, decode, mla, prefill, reference
from attnkit.cache import PageTable
from attnkit.dispatch import Kernel
from attnkit.roofline import Cost
from attnkit.workload import DTYPES, LIMITS, Case, Inputs, relative_error, remembered, sized

Lens = int | tuple[int, ...]


def _lens(B: int, L: Lens) -> list[int]:
    return [L] * B if isinstance(L, int) else list(L)


def _normal(shape: tuple[int, ...], dtype: str, device: torch.device, empty: bool) -> Tensor:
    """Normal values; int8 ones are what quantising them by 1/32 gives."""
    if dtype not in ("int8", "fp8"):
        x = torch.empty(shape, dtype=DTYPES[dtype], device=device)
        return x if empty else x.normal_()
    out = torch.empty(shape, dtype=DTYPES[dtype], device=device)
    if not empty:
        for piece in out.split(max(1, (1 << 26) // max(1, out[0].numel()))):  # a float copy of a large pool would not fit
            wide = torch.randn(piece.shape, device=device)
            piece.copy_((wide * 32).round_().clamp_(-127, 127) if dtype == "int8" else wide)
    return out


def _table(lens: list[int], S: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """A shuffled table that uses every page of its pool: pages, lens, P."""
    counts = [-(-n // S) for n in lens]
    total = max(1, sum(counts))
    order = torch.randperm(total, generator=torch.Generator().manual_seed(7), dtype=torch.int64).to(torch.int32)
    pages = torch.zeros(len(lens), max(1, *counts), dtype=torch.int32)
    start = 0
    for b, count in enumerate(counts):
        pages[b, :count] = order[start : start + count]
        start += count
    return pages.to(device), torch.tensor(lens, dtype=torch.int32, device=device), total


def _latents(P: int, S: int, device: torch.device, empty: bool) -> Tensor:
    """An fp8 latent cache of normal values."""
    cache = torch.empty(P, S, attention.LATENT_ROW, dtype=torch.uint8, device=device)
    if not empty:
        for piece in cache.split(max(1, (1 << 26) // (S * attention.LATENT_ROW))):
            n = piece.shape[0] * S
            latent, rope = torch.randn(n, attention.LATENT, device=device), torch.randn(n, attention.LATENT_ROPE, device=device)
            reference.write_latent(latent, rope, piece, torch.arange(n, device=device))
    return cache


def _renumbered(pages: Tensor) -> Tensor:
    """The table of a pool that holds just these pages, in order."""
    return torch.arange(pages.numel(), dtype=torch.int32, device=pages.device).view(pages.shape)


def _cumulative(sizes: list[int], device: torch.device) -> Tensor:
    return torch.tensor([0, *torch.tensor(sizes).cumsum(0).tolist()], dtype=torch.int32, device=device)


def _some(lens: list[int], most: int = 3) -> list[int]:
    """Which sequences to check: the shortest, the longest and one between."""
    order = sorted(range(len(lens)), key=lens.__getitem__)
    return sorted({order[0], order[len(order) // 2], order[-1]})[:most] if order else []


@dataclass(frozen=True, kw_only=True)
class Paged(Case):
    """What prefill and decode share."""

    L: Lens
    Hq: int
    Hkv: int
    D: int = 128
    Dv: int = 0
    S: int = 16
    dtype: str = "bf16"
    kv: str = ""  # "int8" or "fp8"; the queries' dtype otherwise
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False

    @property
    def value_size(self) -> int:
        return self.Dv or self.D

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]

    def tail(self) -> list[str]:
        heads = [f"Hq{self.Hq}", f"Hkv{self.Hkv}", f"D{self.D}" + (f"/{self.Dv}" if self.Dv else ""), f"S{self.S}"]
        on = [f"win{self.window}"] if self.window else []
        on += ["softcap"] if self.softcap else []
        on += ["sinks"] if self.sinks else []
        return [*heads, self.dtype, *([f"{self.kv}kv"] if self.kv else []), *on]

    def cache(self, lens: list[int], device: torch.device, empty: bool) -> Inputs:
        pages, lens_t, P = _table(lens, self.S, device)
        kind = self.kv or self.dtype
        k = _normal((P, self.S, self.Hkv, self.D), kind, device, empty)
        v = _normal((P, self.S, self.Hkv, self.value_size), kind, device, empty)
        scale = torch.full((self.Hkv,), 1 / 32 if kind == "int8" else 1.0, device=device) if self.kv else None
        sinks = torch.linspace(-1, 1, self.Hq, device=device) if self.sinks else None
        return {"k": k, "v": v, "pages": pages, "lens": lens_t, "scale": scale, "sinks": sinks}

    def options(self, x: Inputs) -> dict[str, Any]:
        return {
            "window": self.window or None,
            "softcap": self.softcap,
            "sinks": x["sinks"],
            "k_scale": x["scale"],
            "v_scale": x["scale"],
        }

    def truth(self, x: Inputs, q: Tensor, which: list[int], lens: list[int], cu: Tensor, tree: Tensor | None = None) -> Tensor:
        index = torch.tensor(which, device=q.device)
        return reference.paged_attention(
            q, x["k"], x["v"], x["pages"][index], torch.tensor(lens), cu, scale=self.D**-0.5, window=self.window,
            softcap=self.softcap, sinks=x["sinks"], k_scale=x["scale"], v_scale=x["scale"],
            tree_mask=None if tree is None else tree[index], compute=torch.float32,
        )[0]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Decode(Paged):
    """paged_decode: B sequences of L (or a tuple of lengths), Q query tokens each."""

    family: ClassVar[str] = "decode"
    op: ClassVar[str] = "paged_decode"
    B: int = 1
    Q: int = 1
    tree: bool = False
    batch_invariant: bool = False

    def letters(self) -> list[str]:
        L = f"L{self.L}" if isinstance(self.L, int) else "Lmixed"
        more = [f"Q{self.Q}"] if self.Q > 1 else []
        more += ["tree"] if self.tree else []
        more += ["invariant"] if self.batch_invariant else []
        return [f"B{self.B}", L, *self.tail(), *more]

    def kernels(self) -> tuple[Kernel, ...]:
        return decode.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        lens = _lens(self.B, self.L)
        q = _normal((self.B, self.Q, self.Hq, self.D), self.dtype, device, empty)
        tree = None
        if self.tree:  # a token sees itself and its parent's line in a binary tree
            tree = torch.zeros(self.Q, self.Q, dtype=torch.bool)
            for i in range(self.Q):
                j = i
                while j >= 0:
                    tree[i, j] = True
                    j = (j - 1) // 2 if j else -1
            tree = tree.expand(self.B, -1, -1).contiguous().to(device)
        out = torch.empty(self.B, self.Q, self.Hq, self.value_size, dtype=q.dtype, device=device)
        return {"q": q, **self.cache(lens, device, empty), "tree": tree, "out": out}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        table, options = PageTable(x["pages"], x["lens"]), self.options(x)
        q, kv, tree, out = x["q"], (x["k"], x["v"]), x["tree"], x["out"]
        return lambda: decode.paged_decode(
            q,
            kv,
            table,
            tree_mask=tree,
            batch_invariant=self.batch_invariant,
            out=out,
            impl=impl,
            config=config,
            **options,
        )  # type: ignore[arg-type]

    def cost(self) -> Cost:
        sizes = DTYPES[self.kv or self.dtype].itemsize, DTYPES[self.dtype].itemsize
        lens = _lens(self.B, self.L)
        return decode.cost(lens, self.Q, self.Hq, self.Hkv, self.D, self.value_size, *sizes, window=self.window)

    def small(self) -> Decode:
        return sized(self, B=3, L=(1, self.S + 1, 67), window=min(self.window, 19), D=min(self.D, 128))

    def error(self, x: Inputs, out: Any = None) -> float:
        out = x["out"] if out is None else out.view(x["out"].shape)
        lens = _lens(self.B, self.L)
        which = _some(lens)
        q = x["q"][torch.tensor(which, device=out.device)].flatten(0, 1)
        cu = torch.arange(len(which) + 1) * self.Q
        truth = remembered(x, lambda: self.truth(x, q, which, [lens[b] for b in which], cu, x["tree"]))
        return relative_error(out[torch.tensor(which, device=out.device)].flatten(0, 1), truth)


@dataclass(frozen=True, kw_only=True)
class Prefill(Paged):
    """paged_prefill: sequences of L keys whose last ``n`` tokens are queries (all of them unless given)."""

    family: ClassVar[str] = "prefill"
    op: ClassVar[str] = "paged_prefill"
    B: int = 1
    n: Lens = 0

    def queries(self) -> list[int]:
        return _lens(self.B, self.n) if self.n else _lens(self.B, self.L)

    def letters(self) -> list[str]:
        L = f"L{self.L}" if isinstance(self.L, int) else "Lmixed"
        return [f"B{self.B}", *([f"n{self.n}"] if self.n and isinstance(self.n, int) else []), L, *self.tail()]

    def kernels(self) -> tuple[Kernel, ...]:
        return prefill.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        counts = self.queries()
        q = _normal((sum(counts), self.Hq, self.D), self.dtype, device, empty)
        out = torch.empty(sum(counts), self.Hq, self.value_size, dtype=q.dtype, device=device)
        return {
            "q": q,
            **self.cache(_lens(self.B, self.L), device, empty),
            "cu_q": _cumulative(counts, device),
            "out": out,
        }

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        table, options = PageTable(x["pages"], x["lens"]), self.options(x)
        q, kv, cu, out = x["q"], (x["k"], x["v"]), x["cu_q"], x["out"]
        return lambda: prefill.paged_prefill(q, kv, table, cu, out=out, impl=impl, config=config, **options)  # type: ignore[arg-type]

    def cost(self) -> Cost:
        sizes = DTYPES[self.kv or self.dtype].itemsize, DTYPES[self.dtype].itemsize
        lens = _lens(self.B, self.L)
        return prefill.cost(self.queries(), lens, self.Hq, self.Hkv, self.D, self.value_size, *sizes, window=self.window)

    def small(self) -> Prefill:
        n: Lens = (5, 1, 40) if self.n else 0
        return sized(self, B=3, L=(self.S + 1, 1, 67), n=n and (5, 1, 40), window=min(self.window, 19))

    def error(self, x: Inputs, out: Any = None) -> float:
        out = x["out"] if out is None else out
        blocks = _blocks(self.queries(), _lens(self.B, self.L))
        rows = torch.cat([torch.arange(row, row + n) for _, row, n, _ in blocks]).to(out.device)
        which, lens = [b for b, *_ in blocks], [seen for *_, seen in blocks]
        cu = _cumulative([n for _, _, n, _ in blocks], torch.device("cpu"))
        return relative_error(out[rows], remembered(x, lambda: self.truth(x, x["q"][rows], which, lens, cu)))


def _blocks(counts: list[int], lens: list[int], most: int = 32) -> list[tuple[int, int, int, int]]:
    """Runs of queries to check: (sequence, first row, how many, keys that the last of them sees)."""
    blocks = []
    for b in _some(lens):
        start, n, L = sum(counts[:b]), counts[b], lens[b]
        for first in sorted({0, max(0, n // 2 - most // 2), max(0, n - most)}):
            size = min(most, n - first)
            if size:
                blocks.append((b, start + first, size, L - n + first + size))
    return blocks


@dataclass(frozen=True, kw_only=True)
class MlaDecode(Case):
    """mla_decode, absorbed."""

    family: ClassVar[str] = "mla"
    op: ClassVar[str] = "mla_decode"
    B: int
    L: Lens
    H: int
    Q: int = 1
    C: int = 512
    R: int = 64
    S: int = 64
    dtype: str = "bf16"
    kv: str = ""  # "fp8": 656 bytes a token

    def letters(self) -> list[str]:
        L = f"L{self.L}" if isinstance(self.L, int) else "Lmixed"
        latent = [] if (self.C, self.R) == (512, 64) else [f"C{self.C}", f"R{self.R}"]
        return [
            f"B{self.B}",
            L,
            f"H{self.H}",
            *latent,
            f"S{self.S}",
            self.dtype,
            *([f"kv_{self.kv}"] if self.kv else []),
            *([f"Q{self.Q}"] if self.Q > 1 else []),
        ]

    def kernels(self) -> tuple[Kernel, ...]:
        return mla.DECODE_KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        pages, lens, P = _table(_lens(self.B, self.L), self.S, device)
        q = _normal((self.B, self.Q, self.H, self.C + self.R), self.dtype, device, empty)
        if self.kv == "fp8":
            kv = _latents(P, self.S, device, empty)
        else:
            kv = _normal((P, self.S, self.C + self.R), self.dtype, device, empty)
        out = torch.empty(self.B, self.Q, self.H, self.C, dtype=q.dtype, device=device)
        return {"q": q, "kv": kv, "pages": pages, "lens": lens, "out": out}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        q, kv, out, table = x["q"], x["kv"], x["out"], PageTable(x["pages"], x["lens"])
        return lambda: mla.mla_decode(q, kv, table, latent=self.C, out=out, impl=impl, config=config)

    def cost(self) -> Cost:
        size = DTYPES[self.dtype].itemsize
        row = attention.LATENT_ROW if self.kv == "fp8" else (self.C + self.R) * size
        return mla.decode_cost(_lens(self.B, self.L), self.Q, self.H, self.C, self.R, row, size)

    def small(self) -> MlaDecode:
        return sized(self, B=3, L=(self.Q, self.S + 1, 2 * self.S + 3), H=min(self.H, 16))

    def truth(self, x: Inputs, index: Tensor, lens: list[int]) -> Tensor:
        kv, pages = x["kv"], x["pages"][index]
        if self.kv == "fp8":  # only the pages that are looked at: a pool as float32 is large
            kv, pages = reference.dequantise_latent(kv[pages.flatten().long()], torch.float32), _renumbered(pages)
        k = kv.unsqueeze(2)
        return reference.paged_attention(
            x["q"][index].flatten(0, 1), k, k[..., : self.C], pages, torch.tensor(lens),
            torch.arange(len(lens) + 1) * self.Q, scale=(mla.NOPE + self.R) ** -0.5, compute=torch.float32,
        )[0]  # fmt: skip

    def error(self, x: Inputs, out: Any = None) -> float:
        out = x["out"] if out is None else out.view(x["out"].shape)
        lens = _lens(self.B, self.L)
        which = _some(lens)[-2:]
        index = torch.tensor(which, device=out.device)
        truth = remembered(x, lambda: self.truth(x, index, [lens[b] for b in which]))
        return relative_error(out[index].flatten(0, 1), truth)

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]


@dataclass(frozen=True, kw_only=True)
class MlaPrefill(Case):
    """mla_prefill, expanded: B sequences of L tokens, all of them queries."""

    family: ClassVar[str] = "mla"
    op: ClassVar[str] = "mla_prefill"
    B: int
    L: int
    H: int
    D: int = 192
    Dv: int = 128
    dtype: str = "bf16"

    def letters(self) -> list[str]:
        return [f"B{self.B}", f"L{self.L}", f"H{self.H}", f"D{self.D}/{self.Dv}", self.dtype, "expanded"]

    def kernels(self) -> tuple[Kernel, ...]:
        return mla.PREFILL_KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        T = self.B * self.L
        q, k = (_normal((T, self.H, self.D), self.dtype, device, empty) for _ in range(2))
        v = _normal((T, self.H, self.Dv), self.dtype, device, empty)
        return {"q": q, "k": k, "v": v, "cu": _cumulative([self.L] * self.B, device), "out": torch.empty_like(v)}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        q, k, v, cu, out = (x[name] for name in ("q", "k", "v", "cu", "out"))
        return lambda: mla.mla_prefill(q, k, v, cu, cu, out=out, impl=impl, config=config)

    def cost(self) -> Cost:
        size = DTYPES[self.dtype].itemsize
        lens = [self.L] * self.B
        return prefill.cost(lens, lens, self.H, self.H, self.D, self.Dv, size, size)

    def small(self) -> MlaPrefill:
        return sized(self, B=2, L=37, H=min(self.H, 4))

    def error(self, x: Inputs, out: Any = None) -> float:
        out = x["out"] if out is None else out
        blocks = _blocks([self.L] * self.B, [self.L] * self.B)
        rows = torch.cat([torch.arange(row, row + n) for _, row, n, _ in blocks]).to(out.device)
        return relative_error(out[rows], remembered(x, lambda: torch.cat([self.truth(x, *block) for block in blocks])))

    def truth(self, x: Inputs, b: int, row: int, n: int, seen: int) -> Tensor:
        keys = slice(b * self.L, b * self.L + seen)
        mask = reference.visible(n, seen, True, 0, None, x["q"].device)
        q, k, v = x["q"][row : row + n], x["k"][keys], x["v"][keys]
        return reference.attention(q, k, v, mask, scale=self.D**-0.5, compute=torch.float32)[0]

    @property
    def limit(self) -> float:
        return LIMITS[self.dtype]
