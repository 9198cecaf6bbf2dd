"""What a call costs beside the kernel's time: the first one on empty caches, and on the host every later one."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import time

import pytest
import torch

from perf import peers
from perf.calls import calls, cases
from perf.receipt import ROOT

#: Seconds that an op's first call may take; microseconds of host time that an eager paged_decode may, or which share of the
#: quickest library's, whatever is more: a host that others use takes twice as long for both.
FIRST_LIMIT, HOST_LIMIT, HOST_SHARE = 2.0, 15.0, 0.5


@pytest.fixture(autouse=True)
def timed_on_a_gpu(bench):
    if not bench.timed or not torch.cuda.is_available():
        pytest.skip("timed with --benchmark on a GPU only")


@pytest.mark.parametrize("how", ["cubins", "nvrtc"])
def test_first_call(bench, how):
    command = [sys.executable, "-m", "perf.calls", *(["--nvrtc"] if how == "nvrtc" else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seconds = json.loads(done.stdout.splitlines()[-1])
    bench.calls[f"first call, s ({how})"] = seconds
    if how == "cubins":
        slow = {op: round(s, 2) for op, s in seconds.items() if s > FIRST_LIMIT}
        assert not slow, f"first calls that took more than {FIRST_LIMIT} s: {slow}"


def host_us(call, calls: int = 200, rounds: int = 7) -> float:
    """Median host time of one eager call. The kernels are so small that the device keeps up."""
    call()
    taken = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(taken)


def peers_host_us() -> dict[str, float]:
    """Host time of each op's quickest library; what it plans or schedules before the call is not counted."""
    device, quickest = torch.device("cuda"), {}
    for name, case in cases().items():
        x = case.build(device)
        libraries = [make for peer, make in peers.makers(case, device).items() if peer in peers.LIBRARIES]
        for make in libraries:
            try:
                call = make(case, x)
                if peers.right(case, x, call):
                    quickest[name] = min(host_us(call), quickest.get(name, math.inf))
            except peers.Unsuited:
                continue
    return quickest


def test_host_cost(bench):
    bench.calls["host time of a call, us"] = found = {name: host_us(call) for name, call in calls()}
    bench.calls["of the quickest library's, us"] = quickest = peers_host_us()
    assert found["paged_decode"] <= max(HOST_LIMIT, HOST_SHARE * quickest.get("paged_decode", 0.0))
