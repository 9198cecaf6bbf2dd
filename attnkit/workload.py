"""A shape as something that can be run, checked and timed: what the tuner, the demo and perf/ share.

A case knows its letters, makes its inputs (never zeros: a tensor core runs faster on them), says what it
costs, and compares an output with the reference. Attention's cases are in workload_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, TypeVar

import torch
from torch import Tensor

from attnkit import arch, dispatch, gemm, quantize, reference, sampling, timing
from attnkit.dispatch import Kernel, Plan
from attnkit.roofline import Cost

Inputs = dict[str, Any]
C = TypeVar("C", bound="Case")

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "int8": torch.int8,
    "fp8": torch.float8_e4m3fn,
}
#: Relative L2 error an output of this dtype may have against the reference (close.py in tests/ is stricter).
LIMITS = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 2e-4}


#: Where inputs keep what the reference gave for them: many candidates are compared with it.
TRUTH = "_truth"


def remembered(x: Inputs, make: Callable[[], Tensor]) -> Tensor:
    """The reference's answer to ``x``, computed once."""
    if TRUTH not in x:
        x[TRUTH] = make()
    return x[TRUTH]


def clone(x: Inputs) -> Inputs:
    """Inputs with memory of their own; the reference's answer is shared."""
    return {k: v.clone() if isinstance(v, Tensor) and k != TRUTH else v for k, v in x.items()}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One shape of one op. ``label`` replaces the letters in the name where they are too many."""

    family: ClassVar[str]
    op: ClassVar[str]
    #: Sets of inputs that a GPU is timed over at the least: more where a launch's time hangs on few of their values.
    SETS: ClassVar[int] = 2
    label: str = ""

    @property
    def name(self) -> str:
        return self.label or "-".join(self.letters())

    def letters(self) -> list[str]:
        raise NotImplementedError

    def kernels(self) -> tuple[Kernel, ...]:
        raise NotImplementedError

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        """The inputs and "out". ``empty`` leaves memory untouched: for planning only."""
        raise NotImplementedError

    def another(self, x: Inputs) -> Inputs:
        """Inputs like ``x`` in memory of their own; the same values, unless a launch's time hangs on few of them."""
        return clone(x)

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        """One call that writes x["out"]."""
        raise NotImplementedError

    def cost(self) -> Cost:
        raise NotImplementedError

    def small(self) -> Case:
        """The same options at a size that a CPU checks in a fraction of a second."""
        raise NotImplementedError

    def error(self, x: Inputs, out: Any = None) -> float:
        """How far ``out`` (x["out"] unless given) is from the reference, on a sample of it; inf for NaN."""
        raise NotImplementedError

    @property
    def limit(self) -> float:
        """The largest error that still counts as right."""
        raise NotImplementedError

    def poison(self, x: Inputs) -> None:
        """Fill x["out"] with what no kernel would write, so that an element left out shows."""
        out = x["out"]
        out.fill_(float("nan") if out.is_floating_point() else -1)

    def nbytes(self, x: Inputs) -> int:
        return sum(t.numel() * t.element_size() for k, t in x.items() if isinstance(t, Tensor) and k != TRUTH)


def sized(case: C, **changes: Any) -> C:
    """``case`` with other sizes, its label dropped (fields the case does not have are ignored)."""
    known = {f.name for f in fields(case)}
    return replace(case, **{"label": "", **{k: v for k, v in changes.items() if k in known}})


def rotated(case: Case, x: Inputs, device: torch.device) -> list[Inputs]:
    """``x`` and as many like it as it takes to leave no cache warm."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30
    n = timing.copies(case.nbytes(x), arch.of(device), free, case.SETS if device.type == "cuda" else 2)
    return [x, *(case.another(x) for _ in range(n - 1))]


def plan(case: Case, x: Inputs, impl: str | None = None, config: Any = None) -> Plan:
    """What a call would run with; raises RuntimeError with the reasons where no kernel serves."""
    return dispatch.plan_of(case.call(x, impl, config))


def relative_error(out: Tensor, truth: Tensor) -> float:
    """|out - truth| / |truth| in L2; inf where one is NaN or infinite."""
    out, truth = out.double(), truth.double()
    if not bool(torch.isfinite(out).all()):
        return float("inf")
    return float((out - truth).norm() / truth.norm().clamp(min=1e-30))


def checked_error(case: Case, x: Inputs, run: Callable[[], Any]) -> float:
    """Run on a poisoned output and compare."""
    case.poison(x)
    result = run()
    return case.error(x, None if result is None else result)


# ---------------------------------------------------------------- gemm


@dataclass(frozen=True, kw_only=True)
class Gemm(Case):
    """w8a8_gemm with a scale a token and a channel."""

    family: ClassVar[str] = "gemm"
    op: ClassVar[str] = "w8a8_gemm"
    M: int
    N: int
    K: int
    dtype: str = "int8"
    bias: bool = False

    def letters(self) -> list[str]:
        return [f"M{self.M}", f"N{self.N}", f"K{self.K}", self.dtype, *(["bias"] if self.bias else [])]

    def kernels(self) -> tuple[Kernel, ...]:
        return gemm.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        M, N, K = self.M, self.N, self.K
        out = torch.empty(M, N, dtype=torch.bfloat16, device=device)
        scales = {
            "a_scale": torch.rand(M, device=device) * 0.02 + 0.01,
            "w_scale": torch.rand(N, device=device) * 0.02 + 0.01,
            "bias": torch.randn(N, device=device, dtype=torch.bfloat16) if self.bias else None,
        }
        pair = [_eight_bit((rows, K), self.dtype, device, empty) for rows in (M, N)]
        return {"a": pair[0], "w": pair[1], **scales, "out": out}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        a, w, a_scale, w_scale, bias, out = (x[k] for k in ("a", "w", "a_scale", "w_scale", "bias", "out"))
        return lambda: gemm.w8a8_gemm(a, w, a_scale, w_scale, bias=bias, out=out, impl=impl, config=config)

    def cost(self) -> Cost:
        return gemm.cost(self.M, self.N, self.K, kind=self.dtype)

    def small(self) -> Gemm:
        return sized(self, M=min(self.M, 33), N=min(self.N, 144), K=min(self.K, 256))

    def error(self, x: Inputs, out: Any = None) -> float:
        out = x["out"] if out is None else out
        rows = sample_rows(self.M, 64, out.device)
        a, a_scale = x["a"][rows], x["a_scale"][rows]
        truth = remembered(x, lambda: reference.w8a8_gemm(a, x["w"], a_scale, x["w_scale"], x["bias"], _wide(self.K)))
        return relative_error(out[rows], truth)

    @property
    def limit(self) -> float:
        return 4e-3


@dataclass(frozen=True, kw_only=True)
class Quantize(Case):
    """quantize_per_token."""

    family: ClassVar[str] = "gemm"
    op: ClassVar[str] = "quantize_per_token"
    M: int
    K: int
    dtype: str = "int8"

    def letters(self) -> list[str]:
        return ["quantize", f"M{self.M}", f"K{self.K}", self.dtype]

    def kernels(self) -> tuple[Kernel, ...]:
        return quantize.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        x = torch.empty(self.M, self.K, dtype=torch.bfloat16, device=device)
        return {
            "x": x if empty else x.normal_(),
            "out": torch.empty(self.M, self.K, dtype=DTYPES[self.dtype], device=device),
            "scale": torch.empty(self.M, device=device),
        }

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        data, out, scale, dtype = x["x"], x["out"], x["scale"], DTYPES[self.dtype]
        return lambda: quantize.quantize_per_token(data, dtype=dtype, out=out, out_scale=scale, impl=impl, config=config)

    def cost(self) -> Cost:
        return quantize.cost(self.M, self.K)

    def small(self) -> Quantize:
        return sized(self, M=min(self.M, 17), K=min(self.K, 200))

    def error(self, x: Inputs, out: Any = None) -> float:
        """``out``: a peer's (values, scale)."""
        rows = sample_rows(self.M, 256, x["x"].device)
        values, scale = out if isinstance(out, tuple) else (x["out"], x["scale"])
        want, want_scale = reference.quantize_per_token(x["x"][rows], DTYPES[self.dtype])
        return relative_error(values[rows].float() * scale[rows].view(-1, 1), want.float() * want_scale[:, None])

    @property
    def limit(self) -> float:
        """A quotient that falls between two 8-bit values may go to either."""
        return 2e-3

    def poison(self, x: Inputs) -> None:
        x["out"].view(torch.uint8).fill_(0x7F)
        x["scale"].fill_(float("nan"))


def _eight_bit(shape: tuple[int, int], dtype: str, device: torch.device, empty: bool) -> Tensor:
    if dtype == "int8":
        if empty:
            return torch.empty(shape, dtype=torch.int8, device=device)
        return torch.randint(-127, 128, shape, dtype=torch.int8, device=device)
    x = torch.empty(shape, dtype=torch.bfloat16, device=device)
    return (x if empty else x.normal_()).to(torch.float8_e4m3fn)


def sample_rows(n: int, most: int, device: torch.device) -> Tensor:
    """Up to ``most`` of n rows, the first and the last among them."""
    return torch.linspace(0, n - 1, min(n, most), device=device).round().long().unique()


def _wide(K: int) -> torch.dtype:
    """float32 holds every int8 sum exactly up to K = 1040; above that float64 does."""
    return torch.float32 if K <= 1040 else torch.float64


# ---------------------------------------------------------------- sampling


@dataclass(frozen=True, kw_only=True)
class Drawn(Case):
    """What sample and sample_from_hidden share: options and seeds as tensors a row, as an engine gives them.

    ``penalties`` also brings the counts.
    """

    #: A language model's logits: a wide bulk and a few that stand out.
    WIDTH: ClassVar[float] = 2.5
    #: The operand that has a row for each token, and its spread.
    ROWS: ClassVar[tuple[str, float]]
    B: int
    V: int
    dtype: str = "fp32"
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    penalties: bool = False

    def _filters(self) -> dict[str, str]:
        """Filters that are on, and their letters."""
        on = {"top_k": f"k{self.top_k}"} if self.top_k else {}
        return on | ({"top_p": f"p{self.top_p:g}"} if self.top_p < 1 else {})

    def _on(self) -> list[str]:
        """Options that are on, in letters."""
        on = [*self._filters().values(), *(["penalties"] if self.penalties else [])]
        on = on or ["temperature" if self.temperature else "greedy"]
        return on if self.temperature in (0.0, Drawn.temperature) else [*on, f"T{self.temperature:g}"]

    def _rest(self, device: torch.device) -> Inputs:
        """All inputs but the operands, and "out"."""
        values = {name: getattr(self, name) for name in ("temperature", *self._filters())}
        if self.penalties:
            values |= {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1}
        x: Inputs = {name: _option(name, value, self.B, device) for name, value in values.items()}
        if self.penalties:
            counts = torch.randint(0, 64, (self.B, self.V), dtype=torch.int32, device=device)
            x["output_counts"] = counts.sub_(60).clamp_(min=0)
        x["seed"] = torch.randint(0, 2**62, (self.B,), device=device)
        return x | {"out": torch.empty(self.B, dtype=torch.int64, device=device)}

    def another(self, x: Inputs) -> Inputs:
        """Other rows and seeds: a launch lasts as long as its slowest row, so one draw of them is one sample."""
        found = {k: v for k, v in clone(x).items() if k != TRUTH}
        name, spread = self.ROWS
        found[name].normal_(0, spread)
        found["seed"].random_(0, 2**62)
        return found

    def _counts_cost(self) -> Cost:
        return Cost(0, 4.0 * self.B * self.V if self.penalties else 0.0)

    def small(self) -> Self:
        return sized(self, B=min(self.B, 3), V=min(self.V, 1003), top_k=min(self.top_k, 40))

    def _drawn(self, x: Inputs, rows: Tensor, logits: Tensor) -> Tensor:
        """The tokens that the reference draws for ``rows``, from their ``logits``."""
        options = {}
        for name, (off, *_) in sampling.OPTIONS.items():
            options[name] = x[name][rows] if name in x else _option(name, off, len(rows), rows.device)
        if "output_counts" in x:
            options["counts"] = x["output_counts"][rows]
        return reference.sample(logits, x["seed"][rows], options)[0]


def _option(name: str, value: float, n: int, device: torch.device) -> Tensor:
    """One of sampling.OPTIONS, for n rows."""
    return torch.full((n,), value, dtype=torch.int64 if sampling.OPTIONS[name][1] else torch.float32, device=device)


@dataclass(frozen=True, kw_only=True)
class Sample(Drawn):
    """sample."""

    family: ClassVar[str] = "sampling"
    op: ClassVar[str] = "sample"
    SETS: ClassVar[int] = 10
    ROWS: ClassVar[tuple[str, float]] = ("logits", Drawn.WIDTH)
    min_p: float = 0.0
    logprobs: int | None = None

    def _filters(self) -> dict[str, str]:
        return super()._filters() | ({"min_p": f"minp{self.min_p:g}"} if self.min_p else {})

    def letters(self) -> list[str]:
        more = [] if self.logprobs is None else [f"logprobs{self.logprobs}"]
        return [f"B{self.B}", f"V{self.V}", *self._on(), *more, self.dtype]

    def kernels(self) -> tuple[Kernel, ...]:
        return sampling.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        logits = torch.empty(self.B, self.V, dtype=DTYPES[self.dtype], device=device)
        return {"logits": logits if empty else logits.normal_(0, self.WIDTH), **self._rest(device)}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        logits, rest = x["logits"], {k: v for k, v in x.items() if k not in ("logits", TRUTH)}
        rest["logprobs"] = self.logprobs
        return lambda: sampling.sample(logits, **rest, impl=impl, config=config).tokens

    def cost(self) -> Cost:
        base = sampling.cost(self.B, self.V, DTYPES[self.dtype].itemsize)
        total = base + self._counts_cost()
        return total if self.logprobs is None else total + base

    def error(self, x: Inputs, out: Any = None) -> float:
        """The share of rows whose token is not the reference's: both draw the same noise."""
        out = x["out"] if out is None else out
        rows = sample_rows(self.B, 16, out.device)
        tokens = remembered(x, lambda: self._drawn(x, rows, x["logits"][rows]))
        return float((tokens != out[rows]).double().mean())

    @property
    def limit(self) -> float:
        """One row in 16 may differ: at a rounding tie two sums in another order choose differently."""
        return 1 / 16
