"""Scratch counters: one range a capture and stream, none shared between graphs."""

from __future__ import annotations

import pytest
import torch

from attnkit import workload, workspace
from attnkit.workload_attention import Decode

CPU = torch.device("cpu")


@pytest.fixture
def captures(monkeypatch):
    """Pretends that the CPU captures: sets what stream and which capture ``counters`` sees."""
    now = {"stream": 1, "capture": 7}
    monkeypatch.setattr(workspace, "_capturing", lambda device: True)
    monkeypatch.setattr(workspace, "_stream", lambda device: now["stream"])
    monkeypatch.setattr(workspace, "_capture_id", lambda stream: now["capture"])
    monkeypatch.setattr(workspace, "_counters", {CPU: workspace._Arena(CPU)})
    monkeypatch.setattr(workspace, "_captured_counters", {})
    return now


def place(t: torch.Tensor) -> range:
    return range(t.data_ptr(), t.data_ptr() + 4 * t.numel())


def test_launches_of_a_capture_share_and_graphs_do_not(captures):
    first = workspace.counters(CPU, 100)
    assert place(workspace.counters(CPU, 1000)) == place(first), "one stream's launches follow one another"
    captures["stream"] = 2
    forked = workspace.counters(CPU, 100)
    captures.update(stream=1, capture=8)
    other = workspace.counters(CPU, 100)
    captures["capture"] = 0
    unknown = [workspace.counters(CPU, 100) for _ in range(2)]
    ranges = [place(t) for t in (first, forked, other, *unknown)]
    assert all(not set(a) & set(b) for i, a in enumerate(ranges) for b in ranges[:i])


def test_a_capture_that_needs_more_gets_more(captures):
    assert workspace.counters(CPU, 10).numel() >= 10
    large = workspace.counters(CPU, 50_000)
    assert large.numel() >= 50_000
    assert place(workspace.counters(CPU, 10)) == place(large)


def test_an_arena_that_is_empty_is_replaced_by_zeros(captures):
    workspace._counters[CPU].used = workspace.ARENA_COUNTERS
    made = workspace.counters(CPU, 10)
    assert not made.any() and made.numel() >= 10
    assert place(workspace.counters(CPU, 10)) == place(made)


@pytest.mark.gpu
def test_thousands_of_captured_launches_take_one_range():
    device = torch.device("cuda")
    case = Decode(B=6, L=(3000, 3, 1, 640, 17, 2048), Hq=32, Hkv=8)
    x = case.build(device)
    run = case.call(x, "cuda_sm90")
    assert workload.checked_error(case, x, run) <= case.limit
    want = x["out"].clone()
    arena = next(iter(workspace._counters.values()))
    used = arena.used
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3000):
            run()
    assert arena.used - used <= workspace.CAPTURE_COUNTERS
    case.poison(x)
    graph.replay()
    assert torch.equal(x["out"], want)
