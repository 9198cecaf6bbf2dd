"""The `attnkit` command: what it prints at 80 columns, and that every error is one line and exit code 2."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import sys

import pytest
import torch

from attnkit import cli, settings
from attnkit.configs import store
from attnkit.shapes import CASES, TYPICAL, parse

needs_install = pytest.mark.skipif(
    importlib.util.find_spec("attnkit.integrations") is None, reason="attnkit is not installed (pip install -e .)"
)
ON_CPU = ["--device", "cpu"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    settings.reload()
    store.forget()
    yield
    monkeypatch.undo()
    settings.reload()
    store.forget()


@pytest.fixture
def attnkit(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["attnkit", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return stop.value.code or 0, out, err

    return run


def test_help_fits(attnkit):
    code, out, _ = attnkit("--help")
    assert code == 0
    assert all(len(line) <= 80 for line in out.splitlines())
    for command in ("info", "generate", "bench", "tune", "report", "demo"):
        assert f"\n  {command} " in out
    assert "..." not in out.split("Commands:")[1], "a command's line is cut"


def test_no_command_shows_the_help(attnkit):
    code, out, _ = attnkit()
    assert code == 2 and "Commands:" in out


def test_info(attnkit):
    code, out, err = attnkit("info", *ON_CPU)
    assert code == 0, err
    assert "cpu-" in out and f"torch {torch.__version__}" in out
    for op in CASES:
        assert op in out
    table = out.split("why not")[1]
    assert all(len(line) <= 80 for line in table.splitlines())
    assert "first" in table


def test_info_says_which_config_a_shape_gets_and_from_where(attnkit, tmp_path):
    code, out, err = attnkit("info", "--op", "paged_decode", "--shape", "B64-L4096-Hq32-Hkv8-D128-S16-bf16", *ON_CPU)
    assert code == 0, err
    assert "nothing to tune" in out or "default: " in out
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    case = parse("paged_decode", "B4-L256-Hq8-Hkv2")
    space = next(k.configs for k in case.kernels() if k.name == "triton")
    if space is None or not settings.get().interpret:
        pytest.skip(f"the Triton {triton.__version__} kernel does not serve here")
    from attnkit import arch, workload

    cpu = torch.device("cpu")
    sig = workload.plan(case, case.build(cpu, empty=True), "triton").sig
    from dataclasses import asdict

    path = store.user_path(arch.of(cpu))
    store.update(path, space, {space.bucket(sig): {"config": asdict(space.default(sig, arch.of(cpu)))}}, arch.of(cpu))
    code, out, err = attnkit("info", "--op", "paged_decode", "--shape", "B4-L256-Hq8-Hkv2", *ON_CPU)
    assert code == 0 and "user cache: " in out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["frob"], "No such command"),
        (["info", "--frob"], "No such option"),
        (["info", "--op", "flash"], "--op is 'flash', wanted one of paged_prefill"),
        (["info", "--shape", "B3"], "--shape needs --op"),
        (["info", "--op", "sample", "--shape", "B3-Q4"], "'Q4' in the shape"),
        (["info", "--op", "sample", "--shape", "B3"], "lacks V"),
        (["info", "--device", "tpu9"], "--device is 'tpu9'"),
        (["tune", "--op", "flash"], "op is 'flash', wanted one of"),
        (["tune", "--shape", "B3"], "--shape needs --op"),
        (["report", "gone.json"], "gone.json: No such file"),
        (["generate"], "Missing argument"),
    ],
)
def test_an_error_is_one_line(attnkit, arguments, says):
    code, out, err = attnkit(*arguments)
    assert code == 2 and out == ""
    assert err.startswith("attnkit: ") and err.count("\n") == 1 and says in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_device_that_is_not_there(attnkit):
    code, _, err = attnkit("info", "--device", "cuda")
    assert code == 2 and "sees no CUDA device" in err


def test_a_bad_setting_is_one_line(attnkit, monkeypatch):
    monkeypatch.setenv("ATTNKIT_THREADS", "many")
    settings.get.cache_clear()
    code, _, err = attnkit("info", *ON_CPU)
    assert code == 2 and err == "attnkit: ATTNKIT_THREADS is 'many', wanted a whole number, 0 or more\n"


def test_a_bug_keeps_its_traceback(attnkit, monkeypatch):
    monkeypatch.setattr(cli, "_about", lambda *_: 1 // 0)
    monkeypatch.setattr(sys, "argv", ["attnkit", "info", *ON_CPU])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_report(attnkit, tmp_path):
    rows = [
        {
            "family": "decode",
            "case": "B1-L1024",
            "impl": "cpu",
            "us": 10.0,
            "tflops": 1.0,
            "gbs": 100.0,
            "roof_pct": 50.0,
            "err": 1e-3,
            "peers": {},
        }
    ]
    (tmp_path / "run.json").write_text(json.dumps({"gpu": "cpu-test", "roofs": {}, "rows": rows}))
    code, out, err = attnkit("report", tmp_path / "run.json", "-o", tmp_path / "page.html")
    assert code == 0, err
    assert "B1-L1024" in (tmp_path / "page.html").read_text() and "page.html" in out


def test_tune_with_nothing_to_measure(attnkit, tmp_path):
    code, out, err = attnkit("tune", "--op", "quantize_per_token", "--shape", "M4-K64", "-o", tmp_path / "t.json", *ON_CPU)
    assert code == 0, err
    assert "nothing to measure" in out or "buckets in" in out


def test_an_interrupt_of_tune_says_how_to_go_on(attnkit, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(importlib.import_module("attnkit.tune"), "tune", interrupted)
    code, _, err = attnkit("tune", *ON_CPU)
    assert code == 130 and "goes on" in err and err.count("\n") == 1


def test_a_warning_is_one_line(attnkit, tmp_path):
    from attnkit import arch

    path = store.user_path(arch.of(torch.device("cpu")))
    path.parent.mkdir(parents=True)
    path.write_text("{")
    code, _, err = attnkit("info", *ON_CPU)
    assert code == 0 and err.startswith("attnkit: warning: ") and str(path) in err and err.count("\n") == 1


@needs_install
def test_generate_reports_a_bad_checkpoint(attnkit, tmp_path):
    code, out, err = attnkit("generate", tmp_path, "-p", "hi", *ON_CPU)
    assert code == 2 and "no such file" in out + err and (out + err).count("\n") == 1


@needs_install
@pytest.mark.slow
def test_demo(attnkit, monkeypatch):
    from attnkit import demo
    from attnkit.workload import Gemm, Sample
    from attnkit.workload_attention import Decode, MlaDecode, Prefill

    small = [
        Prefill(B=1, L=64, Hq=4, Hkv=2, D=64),
        Decode(B=2, L=64, Hq=4, Hkv=2, D=64),
        MlaDecode(B=1, L=64, H=4),
        Gemm(M=4, N=64, K=64),
        Sample(B=2, V=1000),
    ]
    monkeypatch.setattr(demo, "cases", lambda device: small)
    monkeypatch.setenv("ATTNKIT_IMPL", "cpu")  # tests/ turns Triton's interpreter on, which takes minutes
    monkeypatch.setenv("ATTNKIT_THREADS", "1")
    settings.reload()
    code, out, err = attnkit("demo", "-n", "12", *ON_CPU)
    assert code == 0, err
    text, table = out.split("measured roof")
    assert "def " in text
    for family in ("prefill", "decode", "mla", "gemm", "sampling"):
        assert f"\n{family}" in table
    assert all(len(line) <= 80 for line in table.splitlines())


# ---------------------------------------------------------------- shapes


@pytest.mark.parametrize("op", CASES)
def test_typical_shapes_parse(op):
    assert parse(op, TYPICAL[op]).op == op


def test_shapes_in_any_form():
    a = parse("paged_decode", "B64-L4096-Hq32-Hkv8-D128-S16-bf16-fp8kv-Q4-win1024-tree-invariant")
    assert a == parse("paged_decode", "Hkv=8, Hq=32, B=64 L=4096, D=128 S=16 fp8kv Q=4 win=1024 tree invariant bf16")
    assert (a.B, a.Q, a.kv, a.window, a.tree, a.batch_invariant) == (64, 4, "fp8", 1024, True, True)
    assert parse("sample", "B4-V1000-k50-p0.9-minp0.05").top_p == 0.9


@pytest.mark.parametrize("op", CASES)
def test_a_cases_name_reads_back(op):
    case = parse(op, TYPICAL[op])
    name = re.sub("^(quantize|rms_norm|silu_mul)-|-expanded", "", case.name)
    if "/" not in name:
        assert parse(op, name) == case
