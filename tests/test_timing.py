"""timing and roofline: the numbers that everything else is judged by."""

from __future__ import annotations

import gc
import io
import time
import weakref
from itertools import pairwise

import pytest
import torch

from attnkit import roofline, timing
from attnkit.arch import Arch
from attnkit.roofline import Cost, Roof
from attnkit.workload import TRUTH, Gemm, Sample, checked_error, plan, rotated
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill

CPU = torch.device("cpu")
H200 = Arch("nvidia-h200", 90, 132, 232448, 60 << 20)


def test_copies_are_three_times_the_cache():
    assert timing.copies(60 << 20, H200) == 3
    assert timing.copies((60 << 20) + 1, H200) == 3
    assert timing.copies(1 << 20, H200) == 180
    assert timing.copies(10 << 30, H200) == 2, "of one set the next launch would find the end in the cache"
    assert timing.copies(1, H200) == 256, "a tiny case is not cloned without end"


def test_copies_leave_memory_to_others():
    assert timing.copies(60 << 20, H200, free=8 * (60 << 20)) == 2
    assert timing.copies(60 << 20, H200, free=0) == 1
    assert timing.copies(60 << 20, H200, least=10) == 10 and timing.copies(1 << 20, H200, least=10) == 180
    assert timing.copies(60 << 20, H200, free=8 * (60 << 20), least=10) == 2


def test_paired_sees_a_ratio_and_goes_round_every_buffer():
    seen = []

    def wait(seconds, name):
        def call():
            seen.append(name)
            time.sleep(seconds)

        return call

    both = timing.paired({"a": [wait(0.002, "a0"), wait(0.002, "a1")], "b": [wait(0.006, "b")]}, budget=0.1)
    assert 2.0 < both.ratios["b"] < 4.0
    assert both.ratios["a"] == 1.0
    assert both.timings["a"].us > 2000 and both.timings["a"].best <= both.timings["a"].us
    assert {"a0", "a1", "b"} == set(seen[3:]), "every buffer has its turn after the warm-up"
    order = [n[0] for n in seen[3:]]
    assert order[:4] == ["a", "b", "b", "a"], "rounds alternate who goes first"


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_nobody_runs_in_anothers_wake_more_than_the_rest_do(n):
    names = "abcdef"[:n]
    rounds = [timing.order(names, turn) for turn in range(2 * n)]
    assert all(sorted(r) == list(names) for r in rounds)
    for place in range(n):
        assert sorted(r[place] for r in rounds) == sorted(2 * names), "each has each place as often"
    before = [a + b for r in rounds for a, b in pairwise(r)]
    assert len({before.count(a + b) for a in names for b in names if a != b}) <= 1


def test_a_time_of_zero_is_an_error(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: 5)
    with pytest.raises(RuntimeError, match="nothing ran"):
        timing.measure([lambda: None], CPU, budget=0.0)


def test_median_and_spread():
    t = timing._timing([10.0, 11.0, 12.0, 13.0, 100.0], 1, "clock")
    assert t.us == 12.0 and t.best == 10.0 and t.samples == 5
    assert 20 < t.spread < 45
    assert timing._timing([3.0, 5.0], 4, "graph").spread == 1.0


# ---------------------------------------------------------------- roofline

ROOF = Roof(read=4e12, product={"bf16": 800e12, "int8": 1400e12})


def test_bound_and_floor():
    read = Cost(flops=1e9, bytes=4e9)
    assert ROOF.bound(read) == "memory" and ROOF.seconds(read) == pytest.approx(1e-3)
    work = Cost(flops=8e12, bytes=4e9)
    assert ROOF.bound(work) == "compute" and ROOF.seconds(work) == pytest.approx(1e-2)
    assert ROOF.seconds(Cost(1.4e15, 1, "int8")) == pytest.approx(1.0)
    assert ROOF.seconds(Cost(8e14, 1, "fp8")) == pytest.approx(1.0), "a kind that was not measured takes the first roof"


def test_roof_round_trips_through_json():
    assert Roof.from_json(ROOF.as_json()) == ROOF


def test_row_numbers():
    t = timing.Timing(us=2000.0, spread=10.0, best=1990.0, samples=9, launches=1, how="graph")
    row = roofline.row("decode", "x", "triton", Cost(8e9, 4e9), t, ROOF, 1e-3, peers={"FA3": 3000.0, "slow": 9000.0})
    assert row.roof_pct == pytest.approx(50.0)
    assert row.tflops == pytest.approx(4.0) and row.gbs == pytest.approx(2000.0)
    assert row.over_peer == pytest.approx(1.5)
    data = row.as_json()
    assert {"family", "case", "impl", "us", "tflops", "gbs", "roof_pct", "err", "peers"} <= set(data)


@pytest.mark.parametrize("width", [80, 100])
def test_the_table_fits(width):
    from rich.console import Console

    t = timing.Timing(12345.6, 12.3, 12300.0, 9, 1, "graph")
    case = Decode(B=64, L=4096, Hq=32, Hkv=8, kv="fp8", Q=4)
    row = roofline.row("decode", case.name, "cuda_sm90", case.cost(), t, ROOF, 1e-3, peers={"FA3": 3000.0})
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(roofline.table([row], ROOF, CPU, width))
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    for word in ("12,346 ± 12", "cuda_sm90", "% of roof", "memory"):
        assert word in text, f"{word!r} is cut at {width} columns:\n{text}"


def test_measured_roof_of_this_cpu():
    roof = roofline.measure_roof(CPU)
    assert 1e9 < roof.read < 2e12
    assert 1e9 < roof.product["fp32"] < 1e14
    assert roof.product["bf16"] >= roof.product["fp32"] * 0.99
    assert roofline.measure_roof(CPU) is roof, "measured once a process"


# ---------------------------------------------------------------- cases

CASES = [
    Prefill(B=1, L=64, n=9, Hq=4, Hkv=2, D=64, window=16),
    Prefill(B=3, L=(5, 1, 33), Hq=4, Hkv=2, D=64, S=8, sinks=True, softcap=20.0),
    Decode(B=3, L=(1, 17, 40), Hq=6, Hkv=2, D=64),
    Decode(B=2, L=40, Hq=6, Hkv=2, D=64, Q=4, tree=True, kv="int8"),
    Decode(B=2, L=40, Hq=6, Hkv=2, D=64, kv="fp8", dtype="fp16"),
    MlaDecode(B=2, L=40, H=4, C=128, S=16, Q=2),
    MlaPrefill(B=2, L=40, H=2),
    Gemm(M=5, N=48, K=1200, bias=True),
    Gemm(M=5, N=48, K=64, dtype="fp8"),
    Sample(B=5, V=500, top_k=20, top_p=0.9, penalties=True),
    Sample(B=5, V=500, temperature=0.0),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.op}-{c.name}")
def test_a_case_tells_right_from_wrong(case):
    x = case.build(CPU)
    assert plan(case, x, "torch").kernel.name == "torch"
    assert checked_error(case, x, case.call(x, "torch")) <= case.limit
    assert checked_error(case, x, lambda: None) > case.limit, "an output nobody wrote must not pass"
    cost = case.cost()
    assert cost.bytes > 0 and cost.flops >= 0
    sets = rotated(case, x, CPU)
    assert sets[0] is x and len(sets) > 1 and sets[1]["out"].data_ptr() != x["out"].data_ptr()
    same = all(torch.equal(v, sets[1][k]) for k, v in x.items() if isinstance(v, torch.Tensor) and k not in ("out", TRUTH))
    assert same != isinstance(case, Sample), "a draw's time hangs on its logits: each set has others"


def test_empty_inputs_plan_like_full_ones():
    case = Decode(B=64, L=65536, Hq=32, Hkv=8)  # 17 GB that nobody touches
    x = case.build(CPU, empty=True)
    sig = plan(case, x, "torch").sig
    assert (sig.B, sig.W, sig.S) == (64, 4096, 16)


# ---------------------------------------------------------------- CUDA


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_replay_keeps_what_its_calls_hold():
    x = torch.ones(8, device="cuda")
    held = weakref.ref(x)
    replay = timing.Replay([lambda x=x: x.add_(1)], torch.device("cuda"))
    del x
    gc.collect()
    assert held() is not None, "the graph would read memory that is another's by now"
    replay.close()
    gc.collect()
    assert held() is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graph_replay_times_the_device():
    device = torch.device("cuda")
    pairs = [(torch.randn(1 << 26, device=device), torch.empty(1 << 26, device=device)) for _ in range(2)]
    calls = [lambda a=a, b=b: torch.add(a, 1.0, out=b) for a, b in pairs]
    replay = timing.Replay(calls, device)
    t = replay.time(0.05)
    replay.close()
    assert t.how == "graph" and t.launches % 2 == 0
    rate = 2 * 4 * (1 << 26) / t.us * 1e-6
    assert 0.05 < rate < 20, f"{rate:.2f} TB/s"
    assert 0 < t.best <= t.us  # how far they spread depends on who else uses the GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_call_that_synchronises_is_timed_by_events():
    x = torch.randn(1 << 20, device="cuda")
    with pytest.raises(timing.NotCapturable):
        timing.Replay([lambda: x.sum().item()], torch.device("cuda"))
    assert timing.measure([lambda: x.sum().item()], torch.device("cuda")).how == "events"
    assert torch.randn(9, device="cuda").isfinite().all(), "the generator has left capture mode"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_in_turn_see_a_ratio():
    device = torch.device("cuda")
    a, b = torch.randn(1 << 26, device=device), torch.empty(1 << 26, device=device)
    long, short = (timing.Replay([lambda n=n: torch.add(a[:n], 1.0, out=b[:n])], device) for n in (1 << 26, 1 << 25))
    both = timing.in_turn({"long": long, "short": short}, 0.05)
    assert both.ratios["long"] == 1.0 and 0.35 < both.ratios["short"] < 0.75
    assert both.timings["short"].how == "graph" and both.timings["short"].samples >= 5
    for replay in (long, short):
        replay.close()
