"""Tuning and its files: CASES.md 24, 25, 28, bad inputs 8 and 9."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
import warnings
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import pytest
import torch

import attnkit
from attnkit import arch, dispatch, settings
from attnkit.configs import Space, resolve, store
from attnkit.dispatch import Kernel, PlanCache, make_plan
from attnkit.roofline import Cost
from attnkit.tune import tune
from attnkit.workload import Case, plan

tuner = sys.modules["attnkit.tune"]  # the name `attnkit.tune` is callable, and so is the module
CPU = torch.device("cpu")
HERE = arch.of(CPU)


@dataclass(frozen=True)
class DoubleConfig:
    how: str
    smem: int = 0


@dataclass(frozen=True)
class DoubleSig:
    op: str
    device: torch.device
    n: int


def _launch(plan, x, out):
    """out = 2x, in the way the config says."""
    LAUNCHED.append((plan.sig.n, plan.config.how))
    how = plan.config.how
    if how == "wrong":
        out.copy_(3 * x)
    elif how == "in place":
        x.mul_(2)
        out.copy_(x)
    elif how == "unfit":
        raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448")
    elif how == "buggy":
        raise RuntimeError("index 7 is out of bounds")
    elif how != "lazy":
        time.sleep({"slow": 0.004, "default": 0.003, "fast": 0.0005, "in place": 0.0}[how])
        out.copy_(2 * x)


LAUNCHED: list[tuple[int, str]] = []
DEFAULT = DoubleConfig("default")


def _candidates(sig, device):
    return [DEFAULT, *(DoubleConfig(how) for how in HOWS), DoubleConfig("slow", smem=1 << 30)]


HOWS = ["slow", "wrong", "lazy", "unfit", "fast"]
SPACE = Space(
    "double", "plain", DoubleConfig, lambda sig, device: DEFAULT, _candidates, lambda sig: f"n{sig.n}", ("attnkit/arch.py",)
)
KERNELS = (Kernel("plain", "torch", lambda sig: None, _launch, SPACE),)
PLANS = PlanCache()


def double(x, out, impl=None, config=None):
    key = (tuple(x.shape), impl, config)
    plan = PLANS.get(key) or PLANS.put(key, make_plan(KERNELS, DoubleSig("double", x.device, x.numel()), impl, config))
    plan.launch(plan, x, out)
    return out


@dataclass(frozen=True, kw_only=True)
class Double(Case):
    family: ClassVar[str] = "decode"
    op: ClassVar[str] = "double"
    n: int
    limit = 1e-6

    def letters(self):
        return [f"n{self.n}"]

    def kernels(self):
        return KERNELS

    def build(self, device, empty=False):
        return {"x": torch.ones(self.n, device=device), "out": torch.empty(self.n, device=device)}

    def call(self, x, impl=None, config=None):
        return lambda: double(x["x"], x["out"], impl, config)

    def cost(self):
        return Cost(self.n, 8 * self.n)

    def error(self, x, out=None):
        out = x["out"]
        return float((out - 2).abs().max()) if torch.isfinite(out).all() else float("inf")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(store, "SHIPPED", tmp_path / "shipped")
    settings.reload()
    store.forget()
    dispatch.forget_plans()
    LAUNCHED.clear()
    yield
    monkeypatch.undo()
    settings.reload()
    store.forget()
    dispatch.forget_plans()


def sig(n=64) -> DoubleSig:
    return DoubleSig("double", CPU, n)


def write(path, *, gpu=HERE.name, versions=None, source=None, config=None, fmt=store.FORMAT, bucket="n64") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    source = store.source_hash(SPACE.sources) if source is None else source
    header = {"format": fmt, "gpu": gpu, "versions": versions or store.versions(), "sources": {"double/plain": source}}
    entries = {"double/plain": {bucket: {"config": config or asdict(DoubleConfig("fast"))}}}
    path.write_text(json.dumps({"header": header, "entries": entries}))


def looked_up(n=64) -> tuple[Any, str, list[warnings.WarningMessage]]:
    """resolve() twice, for a warning must come once."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        config, origin = resolve(SPACE, sig(n), HERE)
        assert (config, origin) == resolve(SPACE, sig(n), HERE)
    return config, origin, caught


# ---------------------------------------------------------------- look-up


def test_look_up_order():
    assert looked_up() == (DEFAULT, "default", [])
    write(store.shipped_path(HERE), config={"how": "slow"})
    assert looked_up()[:2] == (DoubleConfig("slow"), "shipped")
    write(store.user_path(HERE))
    assert looked_up() == (DoubleConfig("fast"), "user cache", [])
    assert looked_up(n=65) == (DEFAULT, "default", [])
    assert resolve(SPACE, sig(), HERE, DoubleConfig("slow")) == (DoubleConfig("slow"), "argument")


def test_config_of_another_kernel_is_refused():
    with pytest.raises(ValueError, match=r"double: config is str, kernel plain wants DoubleConfig"):
        resolve(SPACE, sig(), HERE, "fast")


def test_case_28_tuned_configs_are_used_and_it_shows():
    tune(shapes=[Double(n=64)], device=CPU)
    LAUNCHED.clear()
    double(torch.ones(64), torch.empty(64))
    assert LAUNCHED == [(64, "fast")]
    (plan,) = PLANS.plans.values()
    assert plan.origin == "user cache" and plan.config == DoubleConfig("fast")


@pytest.mark.parametrize("content", ["", "{", '{"header": 3}', "[]", '{"header": {}, "entries": {"a": {"b": 1}}}', "\x00\xff"])
def test_case_28_invalid_json_is_set_aside_with_one_warning(content):
    path = store.user_path(HERE)
    path.parent.mkdir(parents=True)
    path.write_text(content, encoding="latin-1")
    config, origin, caught = looked_up()
    assert (config, origin) == (DEFAULT, "default")
    assert len(caught) == 1 and str(path) in str(caught[0].message) and "set aside" in str(caught[0].message)
    assert not path.exists() and path.with_name(path.name + ".corrupt").read_text(encoding="latin-1") == content


def test_a_corrupt_shipped_file_stays_where_it_is():
    path = store.shipped_path(HERE)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    config, origin, caught = looked_up()
    assert (config, origin, len(caught)) == (DEFAULT, "default", 1)
    assert path.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu": "nvidia-a100"}, "was tuned on 'nvidia-a100'"),
        ({"source": "0123"}, "other sources of double/plain"),
        ({"fmt": 0}, "format 0, wanted 1"),
        ({"config": {"how": "fast", "gone": 1}}, "gone"),
    ],
)
def test_bad_input_8_a_file_that_does_not_belong(change, says):
    write(store.user_path(HERE), **change)
    config, origin, caught = looked_up()
    assert (config, origin) == (DEFAULT, "default")
    assert len(caught) == 1 and says in str(caught[0].message) and str(store.user_path(HERE)) in str(caught[0].message)
    assert store.user_path(HERE).exists(), "it may belong to another checkout: left alone"


def test_bad_input_8_another_triton():
    space = Space("double", "triton", DoubleConfig, SPACE.default, _candidates, SPACE.bucket, SPACE.sources)
    write(store.user_path(HERE), versions={"triton": "1.0"})
    data = json.loads(store.user_path(HERE).read_text())
    for part in ("entries",):
        data[part]["double/triton"] = data[part].pop("double/plain")
    data["header"]["sources"] = {"double/triton": store.source_hash(SPACE.sources)}
    store.user_path(HERE).write_text(json.dumps(data))
    with pytest.warns(store.TunedFileWarning, match=r"tuned with Triton 1\.0"):
        assert resolve(space, sig(), HERE) == (DEFAULT, "default")


def test_a_stale_user_cache_leaves_the_shipped_file_in_force():
    write(store.user_path(HERE), source="0123")
    write(store.shipped_path(HERE), config={"how": "slow"})
    config, origin, caught = looked_up()
    assert (config, origin, len(caught)) == (DoubleConfig("slow"), "shipped", 1)


def test_sources_that_are_not_installed_go_by_the_version():
    space = Space("double", "plain", DoubleConfig, SPACE.default, _candidates, SPACE.bucket, ("csrc/gone.cu",))
    assert store.source_hash(space.sources) is None
    write(store.user_path(HERE), source="anything")
    assert resolve(space, sig(), HERE) == (DoubleConfig("fast"), "user cache")
    store.forget()
    write(store.user_path(HERE), source="anything", versions={"attnkit": "0.0.0"})
    with pytest.warns(store.TunedFileWarning, match=r"attnkit 0\.0\.0"):
        assert resolve(space, sig(), HERE) == (DEFAULT, "default")


def test_every_kernels_sources_exist():
    """A path that is written wrongly would switch the hash off."""
    from attnkit.shapes import CASES, TYPICAL, parse

    spaces = [k.configs for op in CASES for k in parse(op, TYPICAL[op]).kernels() if k.configs is not None]
    assert spaces
    for space in spaces:
        assert store.source_hash(space.sources) is not None, (space.op, space.kernel, space.sources)


# ---------------------------------------------------------------- the sweep


def test_the_fastest_right_candidate_wins():
    (found,) = tune(shapes=[Double(n=64)], device=CPU)
    assert found.config == DoubleConfig("fast") and found.bucket == "n64"
    assert found.us < found.default_us
    assert (found.tried, found.wrong, found.unfit) == (7, 2, 1)
    entry = json.loads(store.user_path(HERE).read_text())
    assert entry["header"]["gpu"] == HERE.name and entry["header"]["versions"] == store.versions()
    assert entry["entries"]["double/plain"]["n64"]["config"] == {"how": "fast", "smem": 0}


def test_case_24_candidates_are_checked_on_outputs_and_inputs_of_their_own(monkeypatch):
    """One that writes nothing, and one that spoils its input, cannot hide behind another's output."""
    monkeypatch.setitem(globals(), "HOWS", ["lazy", "in place", "fast"])
    case = Double(n=32)
    x = case.build(CPU)
    monkeypatch.setattr(Double, "build", lambda self, device, empty=False: x)
    (found,) = tune(shapes=[case], device=CPU)
    assert found.wrong == 1, "the lazy one"
    assert found.config != DoubleConfig("lazy")


def test_prunes_what_cannot_fit_before_it_runs(monkeypatch):
    small = arch.Arch("cpu-test", 90, 1, 1024, 1 << 20)
    monkeypatch.setattr(arch, "of", lambda device: small)
    space = Space("double", "plain", DoubleConfig, SPACE.default, _candidates, SPACE.bucket, SPACE.sources, lambda c, s: c.smem)
    monkeypatch.setattr(sys.modules[__name__], "KERNELS", (Kernel("plain", "torch", lambda sig: None, _launch, space),))
    launched = []
    monkeypatch.setattr(tuner, "_verdict", lambda case, x, kernel, config: launched.append(config) or "right")
    monkeypatch.setattr(tuner, "_times", lambda case, x, kernel, configs, device, step: dict.fromkeys(configs, 1.0))
    (found,) = tune(shapes=[Double(n=64)], device=CPU)
    assert found.unfit == 1 and all(c.smem <= 1024 for c in launched)


def test_a_gain_within_noise_keeps_the_default(monkeypatch):
    monkeypatch.setattr(
        tuner, "_times", lambda case, x, kernel, configs, device, step: {c: 100.0 if c == DEFAULT else 99.0 for c in configs}
    )
    (found,) = tune(shapes=[Double(n=64)], device=CPU)
    assert found.config == DEFAULT


def test_a_bug_is_not_taken_for_a_resource_limit(monkeypatch):
    monkeypatch.setitem(globals(), "HOWS", ["buggy"])
    with pytest.raises(RuntimeError, match="out of bounds"):
        tune(shapes=[Double(n=64)], device=CPU)


def test_resumes_after_an_interrupt(monkeypatch):
    real = tuner._verdict

    def interrupted(case, x, kernel, config):
        if case.n == 16:
            raise KeyboardInterrupt
        return real(case, x, kernel, config)

    monkeypatch.setattr(tuner, "_verdict", interrupted)
    shapes = [Double(n=8), Double(n=16)]
    with pytest.raises(KeyboardInterrupt):
        tune(shapes=shapes, device=CPU)
    monkeypatch.setattr(tuner, "_verdict", real)
    assert [t.bucket for t in tune(shapes=shapes, device=CPU)] == ["n16"]
    assert tune(shapes=shapes, device=CPU) == []
    assert len(tune(shapes=shapes, device=CPU, force=True)) == 2


def test_progress_bar(capsys):
    tune(shapes=[Double(n=8)], device=CPU, progress=True)
    assert "double" in capsys.readouterr().err


def test_bad_input_9_refused_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(tuner, "_capturing", lambda: True)
    with pytest.raises(RuntimeError, match=r"attnkit\.tune: a CUDA graph is being captured"):
        tune(shapes=[Double(n=8)], device=CPU)
    assert LAUNCHED == []


@pytest.mark.gpu
def test_bad_input_9_refused_inside_a_real_capture():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), pytest.raises(RuntimeError, match="being captured"):
        tune("sample")


def test_attnkit_tune_is_callable_before_and_after_the_module_is_imported():
    assert attnkit.tune(shapes=[], device=CPU) == []
    script = (
        "import attnkit; assert attnkit.tune(shapes=[], device='cpu') == []; assert attnkit.tune(shapes=[], device='cpu') == []"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_unknown_op():
    with pytest.raises(ValueError, match=r"attnkit\.tune: op is 'flash', wanted one of paged_prefill"):
        attnkit.tune("flash")


def test_the_interpreter_is_not_tuned():
    """Its times say nothing, and it would take hours."""
    from attnkit.workload_attention import Decode

    assert tune("paged_decode", shapes=[Decode(B=2, L=40, Hq=4, Hkv=2, D=64)], device=CPU) == []


@pytest.mark.gpu
def test_a_real_kernel():
    from attnkit.workload_attention import Decode

    case = Decode(B=16, L=2048, Hq=32, Hkv=8)
    found = tune("paged_decode", shapes=[case], device="cuda")
    assert found and all(t.us > 0 and t.wrong == 0 for t in found)
    device = torch.device("cuda")
    triton = next(k for k in case.kernels() if k.name == "triton")
    assert plan(case, case.build(device, empty=True), triton.name).origin == "user cache"


# ---------------------------------------------------------------- writing


def test_bad_input_8_unwritable_cache_warns_once_and_goes_on(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path / "file" / "below"))
    settings.reload()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = tune(shapes=[Double(n=8), Double(n=16)], device=CPU)
    assert len(found) == 2
    assert len(caught) == 1 and str(store.user_path(HERE)) in str(caught[0].message)
    assert resolve(SPACE, sig(16), HERE) == (DoubleConfig("fast"), "user cache"), "the results serve this process"


def test_writing_over_a_stale_or_corrupt_file():
    write(store.user_path(HERE), source="0123")
    store.update(store.user_path(HERE), SPACE, {"n8": {"config": {"how": "fast"}}}, HERE)
    data = json.loads(store.user_path(HERE).read_text())
    assert list(data["entries"]["double/plain"]) == ["n8"], "entries of other sources are dropped"
    store.user_path(HERE).write_text("{")
    with pytest.warns(store.TunedFileWarning, match="set aside"):
        store.update(store.user_path(HERE), SPACE, {"n9": {"config": {"how": "fast"}}}, HERE)
    assert resolve(SPACE, sig(9), HERE)[1] == "user cache"


def test_other_kernels_entries_survive():
    write(store.user_path(HERE))
    other = Space("other", "plain", DoubleConfig, SPACE.default, _candidates, SPACE.bucket, ("attnkit/check.py",))
    store.update(store.user_path(HERE), other, {"n1": {"config": {"how": "slow"}}}, HERE)
    assert resolve(SPACE, sig(), HERE)[1] == "user cache"
    assert resolve(other, sig(1), HERE)[1] == "user cache"


def _writer(path, who):
    warnings.simplefilter("error")
    for i in range(20):
        assert store.update(path, SPACE, {f"n{who}-{i}": {"config": {"how": str(who)}}}, HERE)
        data = store.read(path)
        assert data is not None and f"n{who}-{i}" in data["entries"]["double/plain"]


def test_case_25_eight_writers_lose_nothing_and_readers_never_see_half(tmp_path):
    path = tmp_path / "shared.json"
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=_writer, args=(path, who)) for who in range(8)]
    for w in writers:
        w.start()
    reads = 0
    while any(w.is_alive() for w in writers):
        if path.exists():
            json.loads(path.read_text())
            reads += 1
    assert [w.exitcode for w in writers] == [0] * 8
    assert reads
    entries = json.loads(path.read_text())["entries"]["double/plain"]
    assert len(entries) == 160
    assert all(e["config"]["how"] == bucket[1:].split("-")[0] for bucket, e in entries.items())
    assert not list(tmp_path.glob("*.tmp"))


def test_every_space_names_sources_that_are_there():
    """One that is missing would switch tuned configs off without a word."""
    from attnkit.shapes import TYPICAL, parse

    kernels = [kernel for op, shape in TYPICAL.items() for kernel in parse(op, shape).kernels()]
    sources = {source for kernel in kernels if kernel.configs is not None for source in kernel.configs.sources}
    assert len(sources) > 20
    assert not [source for source in sources if store.source_hash((source,)) is None]
