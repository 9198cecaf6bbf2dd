"""What every Triton record asks before it serves a call."""

from __future__ import annotations

import importlib.util
from functools import cache

import torch

from attnkit import arch, settings

#: The lowest compute capability with e4m3 in hardware.
FP8_SM = 89


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def why_not(device: torch.device) -> str | None:
    """None where Triton kernels run on ``device``, else the reason why not."""
    if not _installed():
        return "triton is not installed"
    if settings.get().interpret:
        return None
    if device.type != "cuda":
        return f"needs a GPU, got {device.type} (TRITON_INTERPRET=1 runs it on a CPU)"
    sm = arch.of(device).sm
    return None if sm >= 80 else f"needs sm_80 or newer, {device} is sm_{sm}"


def has_e4m3(device: torch.device) -> bool:
    """True where the compiler can convert to and multiply torch.float8_e4m3fn in hardware."""
    if settings.get().interpret:
        return False
    return torch.version.hip is None and arch.of(device).sm >= FP8_SM


def aligned(*tensors: torch.Tensor | None) -> bool:
    """True if every base pointer is a multiple of 16 bytes: what a compiled launch may be reused for."""
    bits = 0
    for t in tensors:
        if t is not None:
            bits |= t.data_ptr()
    return not bits & 15
