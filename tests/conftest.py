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


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
