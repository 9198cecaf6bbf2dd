"""The first call of every op on empty caches, with the shipped cubins and without them: a service must not wait minutes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from perf.receipt import ROOT

#: Seconds that a first call may take.
LIMIT = 2.0


@pytest.mark.parametrize("how", ["cubins", "nvrtc"])
def test_first_call(bench, how):
    if not bench.timed or not torch.cuda.is_available():
        pytest.skip("timed with --benchmark on a GPU only")
    command = [sys.executable, "-m", "perf.cold", *(["--nvrtc"] if how == "nvrtc" else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    seconds = json.loads(done.stdout.splitlines()[-1])
    bench.cold[how] = seconds
    if how == "cubins":
        slow = {op: round(s, 2) for op, s in seconds.items() if s > LIMIT}
        assert not slow, f"first calls that took more than {LIMIT} s: {slow}"
