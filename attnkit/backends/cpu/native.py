"""What the CPU kernels' Python sides share: the compiled module, its numbers for dtypes, threads and instruction set."""

from __future__ import annotations

import importlib
from functools import cache
from types import ModuleType

import torch

from attnkit import settings

#: DType in csrc/cpu/convert.h.
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float8_e4m3fn: 4}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
QUANTISED = (torch.int8, torch.float8_e4m3fn)

#: Which build of gemm, sampling and cache to run: 0 baseline, 1 AVX2, 2 AVX-512, -1 the best. Tests set it.
isa = -1


@cache
def module() -> ModuleType:
    """attnkit._C. Raises ImportError where it was not built."""
    return importlib.import_module("attnkit._C")


@cache
def _missing() -> str | None:
    try:
        module()
    except ImportError as error:
        return f"attnkit._C does not load: {error}"
    return None


def unsupported(device: torch.device) -> str | None:
    """Why no compiled CPU kernel serves ``device``, or None."""
    return f"device is {device}, wanted cpu" if device.type != "cpu" else _missing()


def threads() -> int:
    return settings.get().threads or torch.get_num_threads()


def address(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()
