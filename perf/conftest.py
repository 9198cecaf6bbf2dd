"""`pytest perf/` checks every case, small. `pytest perf/ --benchmark` also times it and prints the roofline table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # `perf` itself is not installed

from perf.cases import cases
from perf.session import Bench

OUT = Path(__file__).parent / "out" / "run.json"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attnkit")
    group.addoption("--benchmark", action="store_true", help="time every case and print the roofline table")
    group.addoption("--first", action="store_true", help="with --benchmark: only the kernel that serves each case")
    group.addoption("--append", action="store_true", help="keep the rows and the roof that PATH already holds of this code")
    group.addoption("--roofline-json", default=str(OUT), metavar="PATH", help=f"where the rows go (default {OUT})")


def pytest_configure(config: pytest.Config) -> None:
    timed = config.getoption("--benchmark")
    if timed:
        if getattr(config.option, "numprocesses", None):
            raise pytest.UsageError("--benchmark times one thing at a time: leave out -n")
        config.option.benchmark_quiet = True  # pytest-benchmark's own table times whole replays
        config.option.benchmark_disable_gc = True
    for peers in ("attention", "hidden", "sampling"):  # FlashInfer's older names
        config.addinivalue_line("filterwarnings", f"ignore::DeprecationWarning:perf.peers.{peers}")
    config.stash[BENCH] = bench = Bench(timed, first=config.getoption("--first"))
    if timed and config.getoption("--append"):
        bench.resume(Path(config.getoption("--roofline-json")))


BENCH = pytest.StashKey[Bench]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that names a FAMILY gets each of its cases with each of the case's kernels."""
    family = getattr(metafunc.module, "FAMILY", None)
    if family is None or "kernel" not in metafunc.fixturenames:
        return
    bench = metafunc.config.stash[BENCH]
    pairs = [
        pytest.param(case, kernel, id=f"{kernel.name}-{case.name}")
        for case in cases(family, bench.device.type, small=not bench.timed)
        for kernel in bench.kernels(case)
    ]
    metafunc.parametrize(("case", "kernel"), pairs)


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Bench:
    return request.config.stash[BENCH]


def pytest_unconfigure(config: pytest.Config) -> None:
    bench = config.stash.get(BENCH, None)
    if bench is None or not bench.timed or not (bench.rows or bench.engine or bench.calls):
        return
    path = Path(config.getoption("--roofline-json"))
    bench.save(path)
    bench.show(None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "100")))
    print(f"\nrows: {path}   page: attnkit report {path} -o report.html")
