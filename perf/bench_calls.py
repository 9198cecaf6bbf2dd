"""What a call costs beside the kernel's time: the first one on empty caches, and on the host every later one."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import pytest
import torch

from perf.calls import calls
from perf.receipt import ROOT

#: Seconds that an op's first call may take, and microseconds of host time that an eager paged_decode may.
FIRST_LIMIT, HOST_LIMIT = 2.0, 15.0


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


def test_host_cost(bench):
    bench.calls["host time of a call, us"] = found = {name: host_us(call) for name, call in calls()}
    assert found["paged_decode"] <= HOST_LIMIT
