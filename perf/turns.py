"""This checkout and others in turn: `python -m perf.turns OTHER... --family sampling --match p0.9`.

Each is served by a process of its own, with its own attnkit, builds and cases, over the same inputs, and only one runs at a
time. So what an edit gained is a ratio of the same moments, case by case, and a change of results shows beside it. OTHER is a
checkout that is built: `git worktree add ../there COMMIT`, then `python setup.py build_ext --inplace` in it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
#: Elements of a result that are compared one by one; of longer ones only whether they are the same bits.
FEW = 4096
#: Seconds whose rounds are not counted: pages, threads and clocks settle in them.
WARM = 1.0


class Failed(Exception):
    """A checkout cannot serve a case, or not at all; the message says why."""


# ---------------------------------------------------------------- a checkout's process


def enter(root: Path) -> None:
    """Everything of attnkit and perf is the checkout's from here on."""
    sys.path[:] = [str(root), *(p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent)]
    import attnkit

    found = Path(str(attnkit.__file__)).resolve().parent.parent
    if found != root:
        raise SystemExit(f"turns: attnkit comes from {found}, not from {root}")
    attnkit.__path__.append(str(root))  # an installation puts triton_kernels and integrations inside attnkit


class Server:
    """Opens a case, times it, closes it, as it is told; one line of JSON each way."""

    def __init__(self) -> None:
        import torch

        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.replay: Any = None
        self.calls: list[Any] = []
        self.turn = 0

    def open(self, family: str, case: str, impl: str | None) -> dict[str, Any]:
        import torch

        from attnkit import timing, workload
        from perf.cases import cases

        found = next((c for c in cases(family, self.device.type) if c.name == case), None)
        if found is None:
            raise Failed("has no such case")
        torch.manual_seed(0)
        x = found.build(self.device)
        kernel = workload.plan(found, x, impl).kernel.name
        error = workload.checked_error(found, x, found.call(x, impl))
        if not error <= found.limit:
            raise Failed(f"{kernel} is off by {error:.2e}, wanted at most {found.limit:.0e}")
        torch.manual_seed(1)
        sets = workload.rotated(found, x, self.device)
        self.calls = [found.call(s, impl) for s in sets]
        outs = [call() for call in self.calls]
        results = [s["out"] if out is None else out for s, out in zip(sets, outs, strict=True)]
        if self.device.type == "cuda":
            self.replay = timing.Replay(self.calls, self.device)
        return {"kernel": kernel, **_described(results)}

    def time(self) -> dict[str, Any]:
        """Microseconds of one launch: the median of a few replays, or the next call's."""
        if self.replay is not None:
            return {"us": self.replay.time(budget=0.01, least=3).us}
        call = self.calls[self.turn % len(self.calls)]
        self.turn += 1
        start = time.perf_counter_ns()
        call()
        return {"us": (time.perf_counter_ns() - start) * 1e-3}

    def close(self) -> dict[str, Any]:
        import torch

        if self.replay is not None:
            self.replay.close()
        self.replay, self.calls = None, []
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}


def _described(results: Sequence[Any]) -> dict[str, Any]:
    """What tells results apart: the elements of all sets if they are few, else a digest of the first one's bits."""
    import torch

    few = sum(r.numel() for r in results) <= FEW
    flat = torch.cat([r.detach().reshape(-1).cpu() for r in (results if few else results[:1])])
    digest = hashlib.sha256(flat.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
    return {"digest": digest, "elements": flat.tolist() if few else None}


def serve(lines: IO[str], out: IO[str]) -> None:
    server = Server()
    for line in lines:
        asked = json.loads(line)
        try:
            answer = getattr(server, asked.pop("do"))(**asked)
        except Exception as problem:
            answer = {"failed": str(problem).strip().splitlines()[-1] if str(problem).strip() else repr(problem)}
        print(json.dumps(answer), file=out, flush=True)


# ---------------------------------------------------------------- who asks


class Checkout:
    """The process of one checkout."""

    def __init__(self, name: str, root: Path) -> None:
        self.name = name
        if not (root / "attnkit" / "__init__.py").is_file():
            raise Failed(f"{root} is no checkout: it has no attnkit/__init__.py")
        # Who waits leaves the cores to the other.
        surroundings = {"OMP_WAIT_POLICY": "passive", **os.environ, "PYTHONPATH": str(root)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self._process = subprocess.Popen(
            command, cwd=root, env=surroundings, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def ask(self, do: str, **more: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **more}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"turns: the process of {self.name} ended with {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if "failed" in answer:
            raise Failed(f"{self.name}: {answer['failed']}")
        return answer

    def end(self) -> None:
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(timeout=60)


def compare(checkouts: Sequence[Checkout], family: str, case: str, impl: str | None, rounds: int) -> list[dict[str, Any]]:
    """A case of each: its median, the median ratio of a round to the first's (above 1: the first is the quicker), what differs."""
    from attnkit.timing import Paired, order

    named = {c.name: c for c in checkouts}
    opened = {name: c.ask("open", family=family, case=case, impl=impl) for name, c in named.items()}
    us: dict[str, list[float]] = {name: [] for name in named}
    warm = time.monotonic() + WARM
    while time.monotonic() < warm:
        for c in named.values():
            c.ask("time")
    for turn in range(rounds):
        for name in order(list(named), turn):
            us[name].append(named[name].ask("time")["us"])
    for c in named.values():
        c.ask("close")
    paired, first = Paired.of(us, dict.fromkeys(us, 1), "turns"), opened[checkouts[0].name]
    return [
        {
            "kernel": opened[name]["kernel"], "us": paired.timings[name].us, "ratio": paired.ratios[name],
            "results": _difference(opened[name], first),
        }
        for name in named
    ]  # fmt: skip


def _difference(a: dict[str, Any], b: dict[str, Any]) -> str:
    if a["digest"] == b["digest"]:
        return "same bits"
    if a["elements"] is None or b["elements"] is None or len(a["elements"]) != len(b["elements"]):
        return "other bits"
    return f"{sum(x != y for x, y in zip(a['elements'], b['elements'], strict=True))} of {len(a['elements'])} differ"


def chosen(families: Sequence[str], match: str) -> Iterator[tuple[str, str]]:
    """(family, case) of this checkout's cases that are asked for."""
    import torch

    from perf.cases import cases

    kind = "cuda" if torch.cuda.is_available() else "cpu"
    for family in families:
        yield from ((family, c.name) for c in cases(family, kind) if re.search(match, c.name))


def main(arguments: Sequence[str] | None = None) -> None:
    from perf.cases import FAMILIES

    parser = argparse.ArgumentParser(prog="python -m perf.turns", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("others", type=Path, nargs="+", metavar="OTHER", help="another checkout, built")
    parser.add_argument(
        "--family", nargs="*", choices=FAMILIES, default=list(FAMILIES), help="families of cases (default: all)"
    )
    parser.add_argument("--match", default="", metavar="REGEX", help="cases whose name has it")
    parser.add_argument("--impl", help="a kernel by name, instead of the one that serves each case")
    parser.add_argument("--rounds", type=int, default=20, help="turns of each (default 20)")
    asked = parser.parse_args(arguments)
    wanted = list(chosen(asked.family, asked.match))
    if not wanted:
        raise SystemExit(f"turns: no case of {', '.join(asked.family)} has {asked.match!r} in its name")
    others = [other.resolve() for other in asked.others]
    alike = len({o.name for o in others}) < len(others)
    names = [f"{o.name}-{i}" if alike else o.name for i, o in enumerate(others, 1)]
    checkouts: list[Checkout] = []
    try:
        for name, root in (*zip(names, others, strict=True), ("", ROOT)):
            checkouts.append(Checkout(name, root))
    except Failed as problem:
        for c in checkouts:
            c.end()
        raise SystemExit(f"turns: {problem}") from None
    checkouts = [checkouts[-1], *checkouts[:-1]]
    print(f"{'case':43}{'here us':>9}" + "".join(f"{name[-5:] + ' us':>9}{'ratio':>7}" for name in names) + "  results")
    for family, case in wanted:
        try:
            here, *rows = compare(checkouts, family, case, asked.impl, asked.rounds)
        except Failed as problem:
            for c in checkouts:
                c.ask("close")
            print(f"{case:43} {problem}", flush=True)
            continue
        print(f"{case:43}{here['us']:9.2f}" + "".join(f"{row['us']:9.2f}{row['ratio']:7.3f}" for row in rows), end="  ")
        print(", ".join(_said(here, row) for row in rows), flush=True)
    for c in checkouts:
        c.end()


def _said(here: dict[str, Any], row: dict[str, Any]) -> str:
    kernels = "" if row["kernel"] == here["kernel"] else f" ({row['kernel']}, here {here['kernel']})"
    return f"{row['results']}{kernels}"


if __name__ == "__main__":
    if sys.argv[1:] == ["--serve"]:
        enter(Path.cwd().resolve())
        answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)  # what libraries print goes where errors go
        serve(sys.stdin, answers)
    else:
        main()
