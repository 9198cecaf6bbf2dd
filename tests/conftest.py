"""Where there is no GPU, Triton kernels run in its interpreter: that must be said before triton is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest

from attnkit import workspace


@pytest.fixture(autouse=True)
def poison_workspace(monkeypatch):
    """Scratch memory starts as NaN, so a kernel that reads what it did not write shows."""
    real = workspace.partials

    def poisoned(device, nbytes):
        memory = real(device, nbytes)
        if not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
            memory.fill_(0xFF)
        return memory

    monkeypatch.setattr(workspace, "partials", poisoned)


@pytest.fixture(autouse=True)
def counters_left_at_zero():
    """A kernel that leaves a counter behind fails here, not in whoever is given the counter next."""
    yield
    if not torch.cuda.is_available():
        return
    held = {**workspace._eager_counters, **{key: arena.memory for key, arena in workspace._counters.items()}}
    torch.cuda.synchronize()
    left = {key: memory.nonzero().flatten()[:8].tolist() for key, memory in held.items() if memory.any()}
    assert not left, f"counters that are not zero: {left}"


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
