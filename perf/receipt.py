"""What CI cannot run, written down: `python -m perf.receipt write | check | source`.

`write` runs compute-sanitizer, the GPU tests and the perf suite, and puts their counts and rows into
perf/results/<gpu>.json. `--steps` runs some of the three and takes what an earlier run left in perf/out of the others;
`--no-run` takes all of it from there: sanitizer.json, run.json and JUnit files. Rows of a family that was not timed anew stay
if nothing that it runs has changed since: each family has a hash of its own. A failed test stays in a receipt only by name and
with a reason (`--known`). `check` says whether the committed receipts belong to the code as it stands. It needs neither git nor
a GPU.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "perf" / "results"
OUT = ROOT / "perf" / "out"
MEASURED = ("attnkit", "csrc", "triton_kernels", "integrations")
#: What a build, an editor or a test run leaves behind: .gitignore's list for these folders.
PRODUCTS = frozenset({"__pycache__", "cubins", "build", "dist"})
SUFFIXES = frozenset({".so", ".pyc", ".pyd", ".o", ".tmp", ".lock", ".corrupt", ".orig", ".rej", ".swp"})


#: The rooms of CUDA code that a family runs. What is of no room is of all families.
RUNS = {
    "prefill": {"prefill", "decode"}, "decode": {"decode"}, "mla": {"mla", "decode", "prefill"}, "gemm": {"gemm", "quantize"},
    "sampling": {"sampling"}, "hidden": {"hidden", "sampling"}, "cache": {"cache"},
}  # fmt: skip
ROOMS = frozenset().union(*RUNS.values())

#: No test is known to fail.
NONE: Mapping[str, str] = MappingProxyType({})


class Refused(Exception):
    """There is nothing to write a receipt of; the message says why."""


def sources(root: Path = ROOT) -> Iterator[Path]:
    """The measured code's files, relative to ``root``, in one order everywhere."""
    found = []
    for folder in MEASURED:
        for path in (root / folder).rglob("*"):
            parts = path.relative_to(root).parts
            hidden = any(p in PRODUCTS or p.startswith(".") or p.endswith(".egg-info") for p in parts)
            if not hidden and path.suffix not in SUFFIXES and path.is_file():
                found.append(path.relative_to(root))
    yield from sorted(found, key=lambda p: p.as_posix())


def room_of(path: Path) -> str | None:
    """The room that a file is of: its folder's under csrc/cuda, or the one that it is named after among builds and configs."""
    if path.parts[:2] == ("csrc", "cuda"):
        return path.parts[2] if path.parts[2] in ROOMS else None
    if path.parts[:3] == ("attnkit", "backends", "cuda") or path.parts[:2] == ("attnkit", "configs"):
        name = path.stem.partition("_")[0]
        return name if name in ROOMS else None
    return None


def source_hash(root: Path = ROOT, family: str | None = None) -> str:
    """Of all of the measured code, or of what a family runs."""
    digest = hashlib.sha256()
    for path in sources(root):
        if family is not None and room_of(path) not in (None, *RUNS[family]):
            continue
        content = (root / path).read_bytes()
        digest.update(f"{path.as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:32]


def outcomes(files: Sequence[Path]) -> dict[str, str]:
    """Of each test of JUnit files, "passed", "failed" or "skipped"; an error is a failure."""
    found: dict[str, str] = {}
    for path in files:
        try:
            cases = list(ElementTree.parse(path).getroot().iter("testcase"))
        except (OSError, ElementTree.ParseError) as error:
            raise Refused(f"{path}: cannot be read as JUnit XML ({error})") from None
        of_file: dict[str, str] = {}
        for case in cases:  # a test whose clean-up fails too has two entries
            tags = {element.tag for element in case}
            now = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
            name = f"{case.get('classname')}::{case.get('name')}"
            of_file[name] = "failed" if "failed" in (now, of_file.get(name)) else now
        found |= {f"{path.name}:{name}" if name in found else name: word for name, word in of_file.items()}
    return found


def counts(tests: Mapping[str, str]) -> dict[str, int]:
    """How many passed, failed and were skipped."""
    return {word: list(tests.values()).count(word) for word in ("passed", "failed", "skipped")}


#: What perf/sanitize.py leaves beside run.json.
SANITIZER = "sanitizer.json"
STEPS = ("sanitizer", "tests", "perf")
STRESS = "tests/test_stress.py"


#: What the perf step always runs: they are of all the code.
WHOLE = ("calls", "engine")


def run_steps(steps: Sequence[str], first: bool = False, families: Sequence[str] = tuple(RUNS)) -> None:
    """Run what is asked for into perf/out, anew; failures end up in the JUnit files.

    Each family is timed in a process of its own: one that loses the device costs no other's rows.
    """
    OUT.mkdir(parents=True, exist_ok=True)
    for old in chain.from_iterable(OUT.glob(pattern) for step in steps for pattern in PRODUCED[step]):
        old.unlink()
    if "sanitizer" in steps:
        print("receipt: compute-sanitizer", flush=True)
        subprocess.run([sys.executable, "-m", "perf.sanitize"], cwd=ROOT)  # what it found is in its file
    if "tests" in steps:  # most of their time is compilation; stress is long, and apart so that it can be cut off alone
        workers = str(max(1, min(12, (os.cpu_count() or 4) - 2)))
        common = ["-m", "gpu", "-n", workers, "--dist", "worksteal"]
        alone = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}  # the workers fill the machine as they are
        _pytest("tests", ["tests", "--ignore", STRESS, *common], alone)
        _pytest("stress", [STRESS, *common], alone)
    if "perf" in steps:
        options = ["--benchmark", "--append", *(["--first"] if first else [])]
        for name in sorted({*families, *WHOLE}):
            _pytest(f"perf-{name}", [f"perf/bench_{name}.py", *options])


#: The files under perf/out that each step makes.
PRODUCED = {"sanitizer": (SANITIZER,), "tests": ("tests.xml", "stress.xml"), "perf": ("perf-*.xml", "run.json")}


def _pytest(name: str, arguments: Sequence[str], environment: Mapping[str, str] = MappingProxyType({})) -> None:
    command = [sys.executable, "-m", "pytest", "-q", *arguments, f"--junitxml={OUT / f'{name}.xml'}"]
    print("receipt: pytest", *arguments, flush=True)
    start = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}).returncode
    print(f"receipt: {name} took {time.monotonic() - start:.0f} s", flush=True)
    if code not in (0, 1):  # 1: tests failed, which the receipt says
        raise Refused(f"pytest {' '.join(arguments)} ended with {code}")


def build(run: Path, junit: Sequence[Path], root: Path = ROOT, known: Mapping[str, str] = NONE) -> dict[str, Any]:
    """The receipt; raises Refused where the run is missing, of a CPU, or of other code. ``known``: failed tests that are to
    stay in it by name, and why."""
    try:
        data = json.loads(run.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refused(f"{run}: {error}; run `pytest perf/ --benchmark` first") from None
    if data["gpu"].startswith("cpu"):
        raise Refused(f"{run}: was measured on {data['gpu']}; a receipt is of a GPU")
    source = source_hash(root)
    if data["source"] != source:
        raise Refused(f"{run}: was measured on other code ({data['source']}, now {source}); measure again")
    if not junit:
        raise Refused(f"no JUnit files under {OUT}; run the tests with --junitxml={OUT}/tests.xml first")
    keys = ("source", "gpu", "versions", "roofs")
    rest = {k: data.get(k, []) for k in ("rows", "engine", "notes")} | {"calls": data.get("calls", {})}
    families = {
        f: {"source": source_hash(root, f), "roofs": data["roofs"]} for f in sorted({r["family"] for r in rest["rows"]})
    }
    tests = outcomes(junit)
    for name in known:
        if tests.get(name) != "failed":
            raise Refused(f"{name}: is said to be known to fail, but is {tests.get(name, 'not there')}")
    return {
        **{k: data[k] for k in keys}, "families": families, "tests": counts(tests), **({"known": dict(known)} if known else {}),
        **_sanitizer(run.parent / SANITIZER, source), **rest,
    }  # fmt: skip


def kept(receipt: dict[str, Any], before: dict[str, Any], root: Path = ROOT) -> dict[str, Any]:
    """``receipt`` with rows of the one before it: of families that it has not timed, and that run what they ran then."""
    if before.get("versions") != receipt["versions"]:
        return receipt
    families = receipt["families"]
    stay = {f: of for f, of in before.get("families", {}).items() if f not in families and of["source"] == source_hash(root, f)}
    rows = [row for row in before["rows"] if row["family"] in stay]
    return receipt | {"families": families | stay, "rows": [*receipt["rows"], *rows]}


def _sanitizer(path: Path, source: str) -> dict[str, Any]:
    """Errors and cases of each of compute-sanitizer's tools; empty where it was not run on this code."""
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {"sanitizer": found["tools"]} if found["source"] == source else {}


def write(run: Path, junit: Sequence[Path], root: Path = ROOT, known: Mapping[str, str] = NONE) -> Path:
    receipt = build(run, junit, root, known)
    path = RESULTS / f"{receipt['gpu']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        receipt = kept(receipt, json.loads(path.read_text(encoding="utf-8")), root)
    path.write_text(json.dumps(_rounded(receipt), indent=1) + "\n", encoding="utf-8")
    return path


def _rounded(value: Any) -> Any:
    """Five significant figures: what is beyond them is noise, and the file is read in diffs."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def check(results: Path = RESULTS, root: Path = ROOT) -> list[str]:
    """What is wrong with the receipts; empty where all is well."""
    files = sorted(results.glob("*.json"))
    if not files:
        return [f"{results}: no receipt; run `make gpu-check` on a machine with a GPU"]
    source, problems = source_hash(root), []
    for path in files:
        try:
            receipt = json.loads(path.read_text(encoding="utf-8"))
            belongs, rows = receipt["source"] == source, len(receipt["rows"])
            failed = receipt["tests"]["failed"] - len(receipt.get("known", {}))
        except (ValueError, KeyError, TypeError) as error:
            problems.append(f"{path.name}: not a receipt ({error!r})")
            continue
        if not belongs:
            problems.append(f"{path.name}: is of other code ({receipt['source']}, now {source})")
        for family, of in receipt.get("families", {}).items():
            if of["source"] != source_hash(root, family):
                problems.append(f"{path.name}: its rows of {family} are of other code")
        for tool, result in receipt.get("sanitizer", {}).items():
            if result["errors"]:
                problems.append(f"{path.name}: {tool} found {result['errors']} errors (-1: did not finish)")
        if failed or not rows:
            problems.append(f"{path.name}: {failed} tests failed, {rows} rows")
    return problems


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.receipt", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("write", "check", "source"))
    parser.add_argument("--no-run", action="store_true", help="take what perf/out holds")
    parser.add_argument("--steps", nargs="*", choices=STEPS, default=list(STEPS), help="what to run (default: all)")
    parser.add_argument(
        "--families", nargs="+", choices=tuple(RUNS), default=tuple(RUNS), help="what perf times (default: all)"
    )
    parser.add_argument("--first", action="store_true", help="time only the kernel that serves each case, and its peers")
    parser.add_argument("--run", type=Path, default=OUT / "run.json", help="rows (default perf/out/run.json)")
    parser.add_argument("--junit", type=Path, nargs="*", help="JUnit files (default perf/out/*.xml)")
    parser.add_argument(
        "--known", nargs=2, action="append", default=[], metavar=("TEST", "WHY"),
        help="a test that failed and is known to: the receipt names it",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.what == "source":
        print(source_hash())
        return 0
    if args.what == "check":
        problems = check()
        for problem in problems:
            print(f"receipt: {problem}", file=sys.stderr)
        for path in sorted(RESULTS.glob("*.json")) if not problems else ():
            for name, why in json.loads(path.read_text(encoding="utf-8")).get("known", {}).items():
                print(f"receipt: {path.name}: known to fail: {name}: {why}")
        if not problems:
            print(f"receipt: every receipt in {RESULTS.relative_to(ROOT)} is of this code ({source_hash()})")
        return 1 if problems else 0
    try:
        if not args.no_run:
            run_steps(args.steps, args.first, args.families)
        junit = args.junit if args.junit is not None else sorted(OUT.glob("*.xml"))
        path = write(args.run, junit, known=dict(args.known))
    except Refused as reason:
        print(f"receipt: {reason}", file=sys.stderr)
        return 2
    tests = json.loads(path.read_text())["tests"]
    print(f"receipt: {path.relative_to(ROOT)}: {tests['passed']} passed, {tests['failed']} failed, {tests['skipped']} skipped")
    return 1 if tests["failed"] > len(args.known) else 0


if __name__ == "__main__":
    sys.exit(main())
