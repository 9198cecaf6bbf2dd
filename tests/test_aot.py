"""Every Triton kernel compiles for every architecture, within its shared memory, on a machine without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

TARGETS = ["cuda:80", "cuda:89", "cuda:90", "cuda:100", "cuda:120", "hip:gfx942"]
#: Bytes of spills a kernel may have, by target; -1 in a row means the back end does not say.
SPILLS = {"cuda:90": 0}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", TARGETS)
def test_every_specimen_compiles(target):
    """In a process of its own: the interpreter, which the other tests use, replaces the compiler."""
    done = subprocess.run(
        [sys.executable, "-m", "attnkit.triton_kernels.aot", target],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert len(rows) > 20
    over = [r["specimen"] for r in rows if r["over"]]
    assert not over, f"more shared memory than {target} has: {over}"
    spilling = {r["specimen"]: r["spills"] for r in rows if r["spills"] > SPILLS.get(target, 1 << 20)}
    assert not spilling, f"spills on {target}: {spilling}"
