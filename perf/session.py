"""One run of perf/: checks a case, then times its kernels and peers, and keeps the rows.

The gate comes first: a kernel whose answer is not the reference's fails its test and gets no number.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from attnkit import arch, roofline, settings, timing, workload
from attnkit.configs import store
from attnkit.dispatch import Kernel, Plan
from attnkit.roofline import Row
from attnkit.workload import Case, Inputs
from perf import peers
from perf.cases import FAMILIES
from perf.receipt import source_hash

#: Seconds of measuring a kernel or peer of one case.
GPU_BUDGET = 0.06
CPU_BUDGET = 1.5


class Bench:
    """What the session has measured. ``timed`` is False where perf/ only checks, at small sizes.

    ``first``: time the kernel that serves a case, and leave out those behind it.
    """

    def __init__(self, timed: bool, first: bool = False) -> None:
        self.timed = timed
        self.first = first
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.rows: list[Row] = []
        self.engine: list[dict[str, Any]] = []
        self.calls: dict[str, dict[str, float]] = {}
        self.notes: list[str] = []
        self._inputs: tuple[Case, list[Inputs]] | None = None
        self._peers: dict[Case, dict[str, float]] = {}
        self._roof: roofline.Roof | None = None

    @property
    def roof(self) -> roofline.Roof:
        if self._roof is None:
            self._roof = roofline.measure_roof(self.device)
            self._roof.product.update(peers.better_products(self._roof.product, self.device))
        return self._roof

    def kernels(self, case: Case) -> list[Kernel]:
        """Which kernels run. Triton's interpreter is left to tests/. The reference is checked and not timed,
        and FlashInfer behind attnkit's names neither: it stands among the peers, planned beforehand.
        """
        left_out = {"torch", "flashinfer"} if self.timed else set()
        if settings.get().interpret:
            left_out.add("triton")
        return [k for k in case.kernels() if k.impl not in left_out]

    def inputs(self, case: Case) -> list[Inputs]:
        """The case's rotated inputs; the last case's are kept, as its kernels follow one another."""
        if self._inputs is None or self._inputs[0] != case:
            self._inputs = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            torch.manual_seed(0)
            x = case.build(self.device)
            self._inputs = (case, workload.rotated(case, x, self.device) if self.timed else [x])
        return self._inputs[1]

    def run(self, case: Case, kernel: Kernel, request: pytest.FixtureRequest) -> None:
        if self.first and case in self._peers:
            pytest.skip("--first: another kernel serves this case")
        sets = self.inputs(case)
        try:
            plan = workload.plan(case, sets[0], kernel.name)
        except RuntimeError as reason:
            pytest.skip(str(reason).splitlines()[-1].strip())
        error = workload.checked_error(case, sets[0], case.call(sets[0], kernel.name))
        assert error <= case.limit, (
            f"{case.op} {case.name} by {kernel.name}: error {error:.2e}, wanted at most {case.limit:.0e}"
        )
        if self.timed:
            self._time(case, kernel, plan, error, sets, request)

    def _time(self, case: Case, kernel: Kernel, plan: Plan, error: float, sets: list[Inputs], request: Any) -> None:
        calls = [case.call(x, kernel.name) for x in sets]
        if self.device.type == "cuda":
            t, theirs = self._cuda(case, calls, sets, request)
        else:
            t, theirs = self._cpu(case, calls, sets, request)
        row = roofline.row(
            case.family, case.name, kernel.name, case.cost(), t, self.roof, error,
            config="" if plan.config is None else str(plan.config), origin=plan.origin, peers=theirs,
            default_us=self._default(case, kernel, plan, sets),
        )  # fmt: skip
        self.rows.append(row)
        request.getfixturevalue("benchmark").extra_info.update(
            {k: v for k, v in row.as_json().items() if k not in ("family", "case", "impl")}
        )

    def _cuda(self, case: Case, calls: list[Any], sets: list[Inputs], request: Any) -> tuple[timing.Timing, dict[str, float]]:
        """A case's first kernel and the peers in turn: under the power limit the clock is one thing in one moment."""
        ours = timing.Replay(calls, self.device)
        contenders = {"": ours}
        if case not in self._peers:
            self._peers[case] = {}
            for name, made in self._peer_calls(case, sets).items():
                try:
                    contenders[name] = timing.Replay(made, self.device)
                except timing.NotCapturable:
                    self._peers[case][name] = timing.events(made, self.device, GPU_BUDGET).us
                except RuntimeError as problem:
                    self._note(case, name, problem)
        both = timing.in_turn(contenders, GPU_BUDGET)
        t = both.timings[""]
        self._peers[case] |= {name: t.us * ratio for name, ratio in both.ratios.items() if name}
        request.getfixturevalue("benchmark").pedantic(ours.run, rounds=5, iterations=1)
        for replay in contenders.values():
            replay.close()
        return t, self._peers[case]

    def _cpu(self, case: Case, calls: list[Any], sets: list[Inputs], request: Any) -> tuple[timing.Timing, dict[str, float]]:
        """Kernel and peers in turn, so that the ratios are of the same moments."""
        contenders = {"": calls, **self._peer_calls(case, sets)}
        both = timing.paired(contenders, CPU_BUDGET * len(contenders))
        request.getfixturevalue("benchmark").pedantic(calls[0], rounds=3, iterations=1)
        us = both.timings[""].us
        return both.timings[""], {name: us * ratio for name, ratio in both.ratios.items() if name}

    def _peer_calls(self, case: Case, sets: list[Inputs]) -> dict[str, list[Any]]:
        """Every peer that suits the case and answers rightly: its calls over the rotated inputs."""
        found: dict[str, list[Any]] = {}
        for name, maker in peers.makers(case, self.device).items():
            try:
                first = maker(case, sets[0])
                if not peers.right(case, sets[0], first):
                    self.notes.append(f"{case.name}: {name} is off by more than {peers.PEER_LIMIT:g}, not timed")
                    continue
                found[name] = [first, *(maker(case, x) for x in sets[1:])]
            except peers.Unsuited:
                continue
            except Exception as problem:  # a peer's failure is not ours
                self._note(case, name, problem)
        return found

    def _note(self, case: Case, name: str, problem: Exception) -> None:
        self.notes.append(
            f"{case.name}: {name} failed: {str(problem).strip().splitlines()[0][:160] if str(problem) else problem!r}"
        )

    def _default(self, case: Case, kernel: Kernel, plan: Plan, sets: list[Inputs]) -> float | None:
        """What default() would take, where a tuned config runs in its place: what tuning gains."""
        if kernel.configs is None or plan.origin == "default":
            return None
        config = kernel.configs.default(plan.sig, arch.of(self.device))
        if config == plan.config:
            return None
        return timing.measure([case.call(x, kernel.name, config) for x in sets], self.device, GPU_BUDGET).us

    # ---------------------------------------------------------------- results

    def resume(self, path: Path) -> None:
        """Go on from what an earlier run of this code on this device left in ``path``: its rows, and its roof."""
        if not path.is_file():
            return
        data = json.loads(path.read_text(encoding="utf-8"))
        if (data["source"], data["gpu"]) != (source_hash(), arch.of(self.device).name):
            return
        fields = Row.__dataclass_fields__
        self.rows = [Row(**{k: v for k, v in r.items() if k in fields}) for r in data["rows"]]
        self.engine, self.calls, self.notes = data["engine"], data["calls"], data["notes"]
        if data["roofs"]:
            self._roof = roofline.Roof.from_json(data["roofs"])

    def versions(self) -> dict[str, str]:
        found = {"python": platform.python_version(), **store.versions()}
        for name in ("flashinfer", "transformers", "cupy"):
            version = getattr(peers.module(name), "__version__", None) if name == "flashinfer" else _installed(name)
            if version:
                found[name] = version
        if self.device.type == "cuda":
            found["cuda"] = torch.version.cuda or ""
        return found

    def as_json(self) -> dict[str, Any]:
        here = arch.of(self.device)
        return {
            "source": source_hash(),
            "gpu": here.name,
            "arch": asdict(here),
            "versions": self.versions(),
            "roofs": self.roof.as_json() if self.rows else {},
            "rows": [r.as_json() for r in self.rows],
            "engine": self.engine,
            "calls": self.calls,
            "notes": self.notes,
        }

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        store.write_json(path, self.as_json())

    def show(self, width: int | None) -> None:
        """The roofline table, last on the terminal."""
        from rich.console import Console
        from rich.markup import escape

        console = Console(width=width)
        order = {name: i for i, name in enumerate(FAMILIES)}
        rows = sorted(self.rows, key=lambda r: order.get(r.family, 9))
        for note in self.notes:
            console.print(f"[dim]{escape(note)}[/dim]")
        if self.engine:
            console.print(_engine_table(self.engine))
        if self.calls:
            console.print(_calls_table(self.calls))
        if rows:
            console.print()
            console.print(roofline.table(rows, self.roof, self.device, console.width))


def _engine_table(lines: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table(title="engine", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("case", "dtype", "tokens/s", "transformers", "ratio"):
        table.add_column(name, justify="left" if name in ("case", "dtype") else "right")
    for r in lines:
        rates = f"{r['tokens_per_s']:,.0f}", f"{r['transformers_tokens_per_s']:,.0f}", f"{r['ratio']:.2f}"
        table.add_row(r["case"], r["dtype"], *rates)
    return table


def _calls_table(measured: dict[str, dict[str, float]]) -> Any:
    from rich.table import Table

    table = Table(title="calls", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("op")
    for what in measured:
        table.add_column(what, justify="right")
    for op in next(iter(measured.values())):
        table.add_row(op, *(f"{found[op]:.2f}" if op in found else "-" for found in measured.values()))
    return table


def _installed(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    for candidate in (name, f"{name}-cuda13x", f"{name}-cuda12x"):
        try:
            return version(candidate)
        except PackageNotFoundError:
            continue
    return None
