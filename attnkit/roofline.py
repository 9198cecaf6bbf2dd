"""The measured roof and how near to it a kernel comes.

``Cost`` counts ideal traffic: each input read once, each output written once. ``Roof`` is measured in the
same run, on the same device, by a large read and large matrix products. A time's floor is the larger of
bytes over the read rate and operations over the product rate, and the larger says which bound holds.
Idea: S. Williams, A. Waterman, D. Patterson, "Roofline", CACM 52(4), 2009.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from attnkit import arch as arch_of
from attnkit import timing


@dataclass(frozen=True, slots=True)
class Cost:
    """
    flops  multiplications and additions
    bytes  each input read once, each output written once
    kind   whose product rate bounds it: "bf16" (fp16 too), "int8", "fp8" or "fp32"
    """

    flops: float
    bytes: float
    kind: str = "bf16"

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes, self.kind)


@dataclass(frozen=True, slots=True)
class Roof:
    """
    read     bytes a second of a large read
    product  operations a second of a large matrix product, by kind
    """

    read: float
    product: dict[str, float]

    def seconds(self, cost: Cost) -> float:
        """The floor under a time."""
        return max(cost.bytes / self.read, cost.flops / self.product[self._kind(cost)])

    def bound(self, cost: Cost) -> str:
        return "memory" if cost.bytes / self.read >= cost.flops / self.product[self._kind(cost)] else "compute"

    def _kind(self, cost: Cost) -> str:
        return cost.kind if cost.kind in self.product else next(iter(self.product))

    def as_json(self) -> dict[str, Any]:
        return {"read_gbs": self.read / 1e9, **{f"{k}_tflops": v / 1e12 for k, v in self.product.items()}}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Roof:
        product = {k.removesuffix("_tflops"): v * 1e12 for k, v in data.items() if k.endswith("_tflops")}
        return Roof(data["read_gbs"] * 1e9, product)


def _cuda_read(device: torch.device) -> float:
    free = torch.cuda.mem_get_info(device)[0]
    n = min(4 << 30, free // 4) // 4
    x = torch.randn(n, device=device)
    out = torch.empty((), device=device)
    t = timing.measure([lambda: torch.sum(x, dim=0, out=out)], device, 0.1)
    return n * 4 / (t.best * 1e-6)


def product_rate(call: timing.Call, n: int, device: torch.device) -> float:
    """Operations a second of ``call``, a product of two n x n matrices, at its best."""
    return 2.0 * n**3 / (timing.measure([call], device, 0.1).best * 1e-6)


def _cuda_products(device: torch.device, n: int = 8192) -> dict[str, float]:
    """bf16 by torch.mm; fp8 by torch._scaled_mm; int8 by torch._int_mm.

    A tensor core multiplies int8 and fp8 at one rate, and cuBLAS's int8 is the slower path to it, so the
    int8 roof is the better of the two.
    """
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty(n, n, device=device, dtype=torch.bfloat16)
    rates = {"bf16": product_rate(lambda: torch.mm(a, b, out=out), n, device)}
    x, y = (torch.randint(-127, 128, (n, n), device=device, dtype=torch.int8) for _ in range(2))
    rates["int8"] = product_rate(lambda: torch._int_mm(x, y.t()), n, device)
    if torch.cuda.get_device_capability(device) >= (8, 9):
        f, g, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)
        options: dict[str, Any] = {"scale_a": one, "scale_b": one, "out_dtype": torch.bfloat16, "use_fast_accum": True}
        rates["fp8"] = product_rate(lambda: torch._scaled_mm(f, g.t(), **options), n, device)
        rates["int8"] = max(rates["int8"], rates["fp8"])
    return rates


def _cpu(n: int = 1024) -> Roof:
    """The best of some rounds: a roof is what the machine can do, and others may be using it."""
    words = (256 << 20) // 4
    x = torch.ones(words)
    a, b = torch.randn(n, n), torch.randn(n, n)
    half_a, half_b = a.bfloat16(), b.bfloat16()
    i, j = (torch.randint(-127, 128, (n, n), dtype=torch.int8) for _ in range(2))
    times = timing.paired(
        {
            "read": [lambda: torch.sum(x)],
            "bf16": [lambda: torch.mm(half_a, half_b)],
            "fp32": [lambda: torch.mm(a, b)],
            "int8": [lambda: torch._int_mm(i, j)],
        },
        budget=1.0,
    ).timings
    rates = {kind: 2.0 * n**3 / (times[kind].best * 1e-6) for kind in ("bf16", "fp32", "int8")}
    # A CPU without bf16 (int8) products widens the operands: then the wider product is the roof.
    product = {"bf16": max(rates["bf16"], rates["fp32"]), "fp32": rates["fp32"], "int8": max(rates.values())}
    return Roof(words * 4 / (times["read"].best * 1e-6), product)


_roofs: dict[str, Roof] = {}


def measure_roof(device: torch.device) -> Roof:
    """Measure the device's roof, once a process: about a second."""
    name = str(device)
    if name not in _roofs:
        if device.type == "cuda":
            _roofs[name] = Roof(_cuda_read(device), _cuda_products(device))
            torch.cuda.empty_cache()
        else:
            _roofs[name] = _cpu()
    return _roofs[name]


@dataclass(frozen=True, slots=True)
class Row:
    """One case by one kernel, beside its peers.

    us, spread  microseconds; ``default_us`` is what default() takes where a tuned config ran
    err         how far from the reference
    peers       name -> microseconds
    """

    family: str
    case: str
    impl: str
    us: float
    spread: float
    flops: float
    bytes: float
    kind: str
    bound: str
    roof_pct: float
    err: float
    config: str = ""
    origin: str = ""
    default_us: float | None = None
    peers: dict[str, float] = field(default_factory=dict)

    @property
    def tflops(self) -> float:
        return self.flops / self.us * 1e-6

    @property
    def gbs(self) -> float:
        return self.bytes / self.us * 1e-3

    @property
    def over_peer(self) -> float | None:
        """The best peer's time over ours: above 1 is faster than every peer."""
        return min(self.peers.values()) / self.us if self.peers else None

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "tflops": self.tflops, "gbs": self.gbs}


def row(family: str, case: str, kernel: str, cost: Cost, t: timing.Timing, roof: Roof, err: float, **more: Any) -> Row:
    pct = 100 * roof.seconds(cost) / (t.us * 1e-6)
    work = (cost.flops, cost.bytes, cost.kind)
    return Row(family, case, kernel, t.us, t.spread, *work, roof.bound(cost), pct, err, **more)


COLUMNS = ("case", "kernel", "us ± spread", "TFLOP/s", "TB/s", "bound", "% of roof", "x best peer")


def cells(row: Row) -> tuple[str, ...]:
    """A row as text, in the order of COLUMNS."""
    us = f"{row.us:,.1f} ± {row.spread:,.1f}" if row.us < 1e4 else f"{row.us:,.0f} ± {row.spread:,.0f}"
    rates = (_rate(row.tflops) if row.flops else "", _rate(row.gbs * 1e-3))
    over = "" if row.over_peer is None else f"{row.over_peer:.2f}"
    return (row.case, row.impl, us, *rates, row.bound, f"{row.roof_pct:.0f}", over)


def _rate(x: float) -> str:
    """Three figures, and no exponent: a CPU's small numbers stand in the same column as a GPU's."""
    return f"{x:.4f}" if x < 1 else f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def headline(roof: Roof, device: torch.device) -> str:
    rates = ", ".join(f"{kind} {rate / 1e12:.3g}" for kind, rate in roof.product.items())
    return f"{arch_of.of(device).name}: measured roof {roof.read / 1e12:.3g} TB/s read; TFLOP/s: {rates}"


def table(rows: Sequence[Row], roof: Roof, device: torch.device, width: int = 100) -> Any:
    """The roofline table for a terminal of ``width`` columns (a rich Table): a heading a family, long names folded."""
    from rich.table import Table

    columns = COLUMNS if any(r.peers for r in rows) else COLUMNS[:-1]
    lines = [cells(r)[: len(columns)] for r in rows]
    rest = sum(max(len(line[i]) for line in [columns, *lines]) + 1 for i in range(1, len(columns)))
    out = Table(title=headline(roof, device), title_justify="left", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in columns:
        out.add_column(
            name, justify="left" if name in ("case", "kernel", "bound") else "right", overflow="fold", no_wrap=name != "case"
        )
    family = None
    for r, line in zip(rows, lines, strict=True):
        if r.family != family:
            family = r.family
            out.add_row(f"[bold]{family}[/bold]")
        out.add_row(_folded(line[0], max(12, width - rest - 1)), *line[1:])
    return out


def _folded(name: str, width: int) -> str:
    """``name`` broken after dashes into lines of at most ``width``."""
    lines = [""]
    for part in re.findall(r"[^-]*-|[^-]+$", name):
        if len(lines[-1]) + len(part) > width and lines[-1]:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)
