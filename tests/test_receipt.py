"""The receipt of GPU runs: its hash, its contents, and when it is refused."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from perf import readme, receipt, session

CASE = '<testcase classname="t" name="{}">{}</testcase>'
#: Nine passed, two skipped; one failed, and its clean-up did too.
JUNIT = [CASE.format(f"p{i}", "") for i in range(9)] + [CASE.format(f"s{i}", "<skipped/>") for i in range(2)]
FAILED = [CASE.format("f", "<failure/>"), CASE.format("f", "<error/>")]


@pytest.fixture
def tree(tmp_path):
    for name in (
        "attnkit/a.py",
        "csrc/cuda/k.cu",
        "triton_kernels/t.py",
        "integrations/engine/e.py",
        "attnkit/configs/tuned/x.json",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    return tmp_path


def test_the_hash_sees_every_change(tree):
    seen = {receipt.source_hash(tree)}
    (tree / "attnkit/a.py").write_text("other")
    seen.add(receipt.source_hash(tree))
    (tree / "csrc/cuda/k.cu").rename(tree / "csrc/cuda/l.cu")
    seen.add(receipt.source_hash(tree))
    (tree / "integrations/engine/new.json").write_text("{}")
    seen.add(receipt.source_hash(tree))
    (tree / "attnkit/configs/tuned/x.json").write_text("{}")
    seen.add(receipt.source_hash(tree))
    assert len(seen) == 5


def test_the_hash_ignores_what_a_build_leaves(tree):
    before = receipt.source_hash(tree)
    for name in (
        "attnkit/_C.cpython-311-x86_64-linux-gnu.so", "attnkit/__pycache__/a.pyc", "attnkit/cubins/decode.cubin", "csrc/build/a.o",
        "attnkit/attnkit.egg-info/PKG-INFO", "integrations/.mypy_cache/x.json", "attnkit/configs/tuned/x.json.lock",
        "perf/out/run.json", "tests/test_a.py",
    ):  # fmt: skip
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("x")
    assert receipt.source_hash(tree) == before


def test_git_tracks_exactly_what_is_hashed():
    """So that the copy on a GPU machine, without .git, gives the same hash."""
    import subprocess

    command = ["git", "ls-files", "-co", "--exclude-standard", *receipt.MEASURED]
    listed = subprocess.run(command, cwd=receipt.ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    kept = {name for name in listed.stdout.splitlines() if (receipt.ROOT / name).is_file()}
    assert {p.as_posix() for p in receipt.sources()} == kept


def outputs(tree, source, gpu="nvidia-h200", failed=1):
    run, junit = tree / "run.json", tree / "tests.xml"
    rows = [
        {
            "family": "decode",
            "case": "B1",
            "impl": "triton",
            "us": 1.23456789,
            "tflops": 1,
            "gbs": 1,
            "roof_pct": 1,
            "err": 0,
            "peers": {},
        }
    ]
    run.write_text(
        json.dumps({"source": source, "gpu": gpu, "versions": {}, "roofs": {}, "rows": rows, "engine": [{"case": "x"}]})
    )
    junit.write_text(f"<testsuites><testsuite>{''.join(JUNIT + FAILED * failed)}</testsuite></testsuites>")
    return run, [junit]


def test_a_receipt_has_what_is_asked_for(tree, monkeypatch):
    monkeypatch.setattr(receipt, "RESULTS", tree / "results")
    monkeypatch.setattr(receipt, "source_hash", lambda root=None, family=None: "abc")
    path = receipt.write(*outputs(tree, "abc"))
    assert path.name == "nvidia-h200.json"
    data = json.loads(path.read_text())
    assert set(data) >= {"source", "gpu", "versions", "roofs", "tests", "rows", "engine"}
    assert data["tests"] == {"passed": 9, "failed": 1, "skipped": 2}
    assert data["rows"][0]["us"] == 1.2346 and data["engine"] == [{"case": "x"}]


@pytest.mark.parametrize(("source", "taken"), [("abc", True), ("old", False)])
def test_the_sanitizers_counts_are_taken_up_if_they_are_of_this_code(tree, monkeypatch, source, taken):
    monkeypatch.setattr(receipt, "source_hash", lambda root=None, family=None: "abc")
    run, junit = outputs(tree, "abc")
    tools = {"memcheck": {"errors": 0, "cases": 9}}
    (tree / receipt.SANITIZER).write_text(json.dumps({"source": source, "tools": tools}))
    assert receipt.build(run, junit, tree).get("sanitizer") == (tools if taken else None)


@pytest.mark.parametrize(
    ("change", "says"), [({"source": "old"}, "measured on other code"), ({"gpu": "cpu-avx2"}, "a receipt is of a GPU")]
)
def test_refuses_what_was_not_measured_here(tree, change, says):
    run, junit = outputs(tree, **{"source": receipt.source_hash(tree), **change})
    with pytest.raises(receipt.Refused, match=says):
        receipt.build(run, junit, tree)


def test_a_test_that_is_known_to_fail_stays_by_name(tree):
    run, junit = outputs(tree, receipt.source_hash(tree))
    built = receipt.build(run, junit, tree, {"t::f": "why"})
    assert built["known"] == {"t::f": "why"} and built["tests"]["failed"] == 1
    for name in ("t::p1", "t::s1", "t::other"):
        with pytest.raises(receipt.Refused, match=name):
            receipt.build(run, junit, tree, {name: "why"})


def test_refuses_without_runs(tree):
    with pytest.raises(receipt.Refused, match="run `pytest perf/ --benchmark` first"):
        receipt.build(tree / "gone.json", [], tree)
    run, _ = outputs(tree, receipt.source_hash(tree))
    with pytest.raises(receipt.Refused, match="no JUnit files"):
        receipt.build(run, [], tree)
    (tree / "bad.xml").write_text("<")
    with pytest.raises(receipt.Refused, match=r"bad\.xml"):
        receipt.build(run, [tree / "bad.xml"], tree)


def test_check(tree):
    results = tree / "results"
    results.mkdir()
    assert "no receipt" in receipt.check(results, tree)[0]
    good = {"source": receipt.source_hash(tree), "tests": {"failed": 0}, "rows": [1]}
    (results / "a.json").write_text(json.dumps(good))
    assert receipt.check(results, tree) == []
    known = {"tests": {"failed": 1}, "known": {"t::f": "why"}}
    (results / "a.json").write_text(json.dumps({**good, **known}))
    assert receipt.check(results, tree) == []
    (results / "a.json").write_text(json.dumps({**good, **known, "tests": {"failed": 2}}))
    assert "1 tests failed" in receipt.check(results, tree)[0]
    (results / "a.json").write_text(json.dumps(good))
    (results / "b.json").write_text(json.dumps({**good, "source": "old"}))
    (results / "c.json").write_text(json.dumps({**good, "tests": {"failed": 3}}))
    (results / "d.json").write_text("{")
    (results / "e.json").write_text(json.dumps({**good, "sanitizer": {"memcheck": {"errors": 2, "cases": 9}}}))
    problems = receipt.check(results, tree)
    assert len(problems) == 4 and "memcheck found 2 errors" in problems[3]
    assert "other code" in problems[0] and "3 tests failed" in problems[1] and "not a receipt" in problems[2]


def test_a_familys_hash_sees_what_it_runs(tree):
    """Its own room and what is of no room; not the rooms of others."""
    for name in ("csrc/cuda/sampling/s.cuh", "csrc/cuda/common/c.cuh", "attnkit/backends/cuda/builds/gemm_skinny.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    families = tuple(receipt.RUNS)

    def changed(name):
        before = [receipt.source_hash(tree, family) for family in families]
        (tree / name).write_text(f"other {name}")
        return {f for f, was in zip(families, before, strict=True) if receipt.source_hash(tree, f) != was}

    assert changed("csrc/cuda/sampling/s.cuh") == {"sampling", "hidden"}
    assert changed("attnkit/backends/cuda/builds/gemm_skinny.py") == {"gemm"}
    assert changed("csrc/cuda/common/c.cuh") == changed("attnkit/a.py") == set(families)


def test_every_room_of_cuda_code_is_some_familys():
    folders = {p.name for p in (receipt.ROOT / "csrc" / "cuda").iterdir() if p.is_dir()}
    assert folders - {"common"} == receipt.ROOMS


def test_a_family_runs_what_its_rooms_take_from_others():
    """Imports of Python, includes of CUDA."""
    taken = set()
    for path in receipt.sources():
        room, text = receipt.room_of(path), (receipt.ROOT / path).read_text(encoding="utf-8", errors="replace")
        if room and path.suffix == ".py":
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.ImportFrom) and node.module:
                    names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                    taken |= {(room, receipt.room_of(Path(*name.split(".")).with_suffix(".py"))) for name in names}
        elif room:
            taken |= {(room, other) for other in re.findall(r'#include "\.\./(\w+)/', text)}
    assert ("mla", "decode") in taken and ("hidden", "sampling") in taken
    for family, rooms in receipt.RUNS.items():
        missing = {other for room, other in taken if room in rooms and other in receipt.ROOMS} - rooms
        assert not missing, f"{family} also runs {missing}"


def test_rows_stay_where_nothing_that_they_ran_has_changed(tree, monkeypatch):
    """A run of one family keeps the others' rows, but not those of a family whose code is another now, or of other versions."""
    monkeypatch.setattr(receipt, "RESULTS", tree / "results")
    path, roofs = tree / "results" / "nvidia-h200.json", {"read_gbs": 2}
    families = {
        "gemm": {"source": receipt.source_hash(tree, "gemm"), "roofs": roofs},
        "mla": {"source": "another", "roofs": roofs},
    }
    before = {"families": families, "rows": [{"family": f, "case": "old", "us": 1.0} for f in ("gemm", "mla", "decode")]}
    path.parent.mkdir()
    for versions, stay in (({}, {"gemm"}), ({"torch": "older"}, set())):
        path.write_text(json.dumps(before | {"versions": versions}))
        data = json.loads(receipt.write(*outputs(tree, receipt.source_hash(tree), failed=0), tree).read_text())
        assert {r["family"] for r in data["rows"]} == data["families"].keys() == {"decode"} | stay
        assert [r["case"] for r in data["rows"] if r["family"] == "decode"] == ["B1"]
        assert all(data["families"][family]["roofs"] == roofs for family in stay)
    assert receipt.check(tree / "results", tree) == []
    (tree / "csrc/cuda/decode").mkdir()
    (tree / "csrc/cuda/decode/d.cu").write_text("new")
    assert any("rows of decode are of other code" in problem for problem in receipt.check(tree / "results", tree))


def test_steps_clear_and_run_what_was_asked_for(tmp_path, monkeypatch):
    """A family a process, all into one run.json; what other steps left stays."""
    monkeypatch.setattr(receipt, "OUT", tmp_path)
    for name in ("sanitizer.json", "tests.xml", "perf-old.xml", "run.json"):
        (tmp_path / name).write_text("{}")
    ran = []
    monkeypatch.setattr(
        receipt.subprocess, "run", lambda command, cwd, env: ran.append(command[3:]) or SimpleNamespace(returncode=1)
    )
    receipt.run_steps(["perf"], first=True)
    assert {p.name for p in tmp_path.iterdir()} == {"sanitizer.json", "tests.xml"}
    files = [arguments[1] for arguments in ran]
    assert len(files) >= 6 and all(f.startswith("perf/bench_") for f in files)
    assert all({"--benchmark", "--append", "--first"} <= set(arguments) for arguments in ran)
    assert {Path(f) for f in files} == {p.relative_to(receipt.ROOT) for p in (receipt.ROOT / "perf").glob("bench_*.py")}
    ran.clear()
    receipt.run_steps(["perf"], families=["sampling"])
    assert [arguments[1] for arguments in ran] == [f"perf/bench_{name}.py" for name in ("calls", "engine", "sampling")]
    ran.clear()
    receipt.run_steps(["tests"])
    assert [arguments[1] for arguments in ran] == ["tests", receipt.STRESS] and all("gpu" in arguments for arguments in ran)
    monkeypatch.setattr(receipt.subprocess, "run", lambda command, cwd, env: SimpleNamespace(returncode=-11))
    with pytest.raises(receipt.Refused, match="ended with -11"):
        receipt.run_steps(["tests"])


def test_a_run_goes_on_from_the_rows_of_the_one_before(tmp_path, monkeypatch):
    from attnkit.roofline import Cost, Roof, row
    from attnkit.timing import Timing

    one, path = session.Bench(timed=True), tmp_path / "run.json"
    roof = one._roof = Roof(read=1e11, product={"bf16": 1e12})
    t = Timing(10.0, 0.1, 9.0, 5, 1, "clock")
    one.rows.append(row("decode", "B1", "cpu", Cost(1e6, 1e5), t, roof, 1e-3, peers={"torch": 12.0}))
    one.engine.append({"case": "x"})
    one.calls["cubins"] = {"paged_decode": 0.1}
    one.save(path)
    two = session.Bench(timed=True)
    two.resume(path)
    assert two.rows == one.rows and two.engine == one.engine and two.calls == one.calls and two.roof == roof
    monkeypatch.setattr(session, "source_hash", lambda: "another")
    three = session.Bench(timed=True)
    three.resume(path)
    three.resume(tmp_path / "missing.json")
    assert not three.rows and not three.engine


def test_readme_shows_the_receipts_numbers():
    text = readme.README.read_text(encoding="utf-8")
    committed = json.loads(readme.receipt_file().read_text(encoding="utf-8"))
    assert readme.rewritten(text, committed) == text, "run python -m perf.readme"
    rows = readme.first_rows(committed)
    missing = [case for case in readme.SHOWN if case not in rows]
    assert not missing


def test_readmes_means_leave_torch_out():
    row = {"family": "gemm", "impl": "cuda", "us": 10.0, "bound": "memory", "gbs": 4e3, "tflops": 1, "roof_pct": 90}
    rows = [
        {**row, "case": "a", "peers": {"CUTLASS": 20.0, "bf16 linear": 5.0}},
        {**row, "case": "b", "peers": {"CUTLASS": 5.0}},
    ]
    rows += [{**row, "case": "c", "peers": {"torch sort": 1e6}}, {**row, "case": "a", "us": 1e3, "peers": {"CUTLASS": 20.0}}]
    assert readme._means(readme.first_rows({"rows": rows})) == "1.00 in GEMM and quantising (2 cases, 1 below 1)"
    assert readme._line("A", rows[0]) == "| A | cuda | 10.0 | 4.00 TB/s | 90% | bf16 linear 5.0 us | 0.50 |"
