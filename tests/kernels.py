"""Every kernel of an op that can run here, on the device it runs on: what the op tests are parametrised over."""

from __future__ import annotations

import pytest
import torch

from attnkit.dispatch import Kernel

DEVICES = {"cuda": "cuda", "triton": "cuda", "flashinfer": "cuda", "cpu": "cpu", "torch": "cpu"}


def device_of(kernel: Kernel) -> str:
    """GPU kernels run on the GPU; Triton falls to its interpreter on the CPU where there is none."""
    if not torch.cuda.is_available() and kernel.impl == "triton":
        return "cpu"
    return DEVICES[kernel.impl]


def every(kernels: tuple[Kernel, ...]) -> list:
    """pytest parameters (impl, device), impl by the kernel's own name: an op may have several kernels of one impl.

    FlashInfer's are not attnkit's to hold to these cases: see test_flashinfer.py.
    """
    return [
        pytest.param(k.name, device_of(k), id=k.name, marks=[pytest.mark.gpu] if device_of(k) == "cuda" else [])
        for k in kernels
        if k.impl != "flashinfer"
    ]


def skip_if_declined(call):
    """Run ``call``; a kernel that declines the case (and says why) is skipped, not failed."""
    try:
        return call()
    except RuntimeError as error:
        if "no kernel serves this call" in str(error):
            pytest.skip(str(error).splitlines()[-1].strip())
        raise
