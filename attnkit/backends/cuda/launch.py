"""What every CUDA kernel's host side shares: parameter structs, prepared launches, the tensor's stream."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import torch

from attnkit import workspace
from attnkit.backends.cuda import images

#: cuTensorMapEncodeTiled's names for what the kernels use; 16-bit floats travel as 16-bit integers.
MAP_TYPE = {1: 0, 2: 1}
MAP_SWIZZLE = {0: 0, 32: 1, 64: 2, 128: 3}
MAP_PROMOTE_128 = 2
MAP_BYTES = 128


class Fields:
    """A kernel's one parameter struct: tensor maps first, then 8-byte values, 32-bit integers and floats.

    Mirrors a struct in csrc/cuda; the groups keep every member at its natural alignment.
    """

    def __init__(self, maps: Sequence[str], words: Sequence[str], ints: Sequence[str], floats: Sequence[str]) -> None:
        self.names = (*words, *ints, *floats)
        self._format = struct.Struct(f"<{MAP_BYTES * len(maps)}x{len(words)}q{len(ints)}i{len(floats)}f")
        self.offsets = {name: MAP_BYTES * i for i, name in enumerate(maps)}
        self.offsets |= {name: MAP_BYTES * len(maps) + 8 * i for i, name in enumerate(words)}

    def pack(self, values: Mapping[str, Any]) -> bytes:
        """Values by name; those left out are 0 (they come with each call)."""
        unknown = values.keys() - set(self.names)
        if unknown:
            raise KeyError(f"no such parameter: {', '.join(sorted(unknown))}")
        return self._format.pack(*(values.get(name, 0) for name in self.names))


@cache
def compiled() -> Any:
    """attnkit._C. Raises RuntimeError where it was not built."""
    try:
        from attnkit import _C
    except ImportError as error:
        raise RuntimeError(f"attnkit's compiled part is missing: {error}") from error
    return _C


@cache
def unavailable() -> str | None:
    """None where kernels can be launched, else why not."""
    try:
        return compiled().cuda_unavailable()
    except RuntimeError as error:
        return str(error)


@cache
def kernel(variant: images.Variant, name: str, device: int, shared_bytes: int) -> Any:
    """The kernel loaded on ``device`` (a CudaKernel), ready for ``shared_bytes`` of dynamic shared memory."""
    return compiled().CudaKernel(images.image(variant), name, device, shared_bytes)


@cache
def missing(variant: images.Variant) -> str | None:
    """None where a cubin of ``variant`` is there or can be made, else why not. Compiles nothing."""
    if images.prebuilt_path(variant).is_file():
        return None
    try:
        images.cached_path(variant)
    except RuntimeError as error:
        return f"no prebuilt cubin, and none can be compiled: {error}"
    return None


def index_of(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def stream_of(device: int) -> int:
    """The current stream of a device, as the driver's handle (0.1 us; torch.cuda.current_stream takes 1 us)."""
    return torch._C._cuda_getCurrentRawStream(device)


def scratch(plan: Any, stream: int) -> tuple[int, int]:
    """Addresses of the partials and counters that plan.state asks for ("partial_bytes", which may be 0, and "counters").

    Outside a capture they are looked up once a stream (5 us a time) and kept in plan.state["scratch"].
    """
    state, capturing = plan.state, compiled().cuda_capture_id(stream)
    held = None if capturing else state["scratch"].get(stream)
    if held is None:
        device = plan.sig.device
        with torch.cuda.device(state["index"]):  # the workspace asks about the current device's stream
            partials = workspace.partials(device, state["partial_bytes"]) if state["partial_bytes"] else None
            counters = workspace.counters(device, state["counters"])
        held = (0 if partials is None else partials.data_ptr(), counters.data_ptr()), (partials, counters)
        if not capturing:
            state["scratch"][stream] = held
    return held[0]
