"""NVRTC, the run-time CUDA compiler, through ctypes: the copy torch brings, the system's, or CuPy's.

Only the driver of the device is needed besides; no toolkit, no nvcc, no headers.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path


def _candidates() -> Iterator[str]:
    names = [f"libnvrtc.so.{major}" for major in (13, 12)]
    for folder in sys.path:
        nvidia = Path(folder or ".") / "nvidia"
        for name in names:
            yield from map(str, sorted(nvidia.glob(f"*/lib/{name}")))
    yield from names


@cache
def _library() -> ctypes.CDLL:
    reasons = []
    for name in _candidates():
        try:
            return ctypes.CDLL(name)
        except OSError as error:
            reasons.append(str(error))
    raise RuntimeError(
        "NVRTC was not found (pip install nvidia-cuda-nvrtc, or cupy-cuda13x, brings it): " + "; ".join(dict.fromkeys(reasons))
    )


def _check(result: int, what: str) -> None:
    if result != 0:
        describe = _library().nvrtcGetErrorString
        describe.restype = ctypes.c_char_p
        raise RuntimeError(f"{what}: {describe(result).decode()}")


def version() -> tuple[int, int]:
    """NVRTC's version. Raises RuntimeError where there is none."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "nvrtcVersion")
    return major.value, minor.value


def compile_cubin(source: str, name: str, options: Sequence[str]) -> bytes:
    """Compile ``source`` to a cubin. Raises RuntimeError with the compiler's log where it does not compile."""
    lib = _library()
    program = ctypes.c_void_p()
    _check(lib.nvrtcCreateProgram(ctypes.byref(program), source.encode(), name.encode(), 0, None, None), "nvrtcCreateProgram")
    try:
        words = (ctypes.c_char_p * len(options))(*(o.encode() for o in options))
        result = lib.nvrtcCompileProgram(program, len(options), words)
        if result != 0:
            size = ctypes.c_size_t()
            lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            lib.nvrtcGetProgramLog(program, log)
            raise RuntimeError(
                f"NVRTC {'.'.join(map(str, version()))} could not compile {name}:\n{log.value.decode(errors='replace')}"
            )
        size = ctypes.c_size_t()
        _check(lib.nvrtcGetCUBINSize(program, ctypes.byref(size)), "nvrtcGetCUBINSize")
        image = ctypes.create_string_buffer(size.value)
        _check(lib.nvrtcGetCUBIN(program, image), "nvrtcGetCUBIN")
        return image.raw
    finally:
        lib.nvrtcDestroyProgram(ctypes.byref(program))
