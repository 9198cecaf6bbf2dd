"""Scratch memory that kernels share between calls, so that a call allocates nothing but its output.

Kept per device and stream: two streams never write the same bytes. Under CUDA-graph capture the
partials come from the graph's own pool, which keeps them alive and lets later nodes reuse them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch

_partials: dict[tuple[torch.device, int], torch.Tensor] = {}
_counters: dict[torch.device, _Arena] = {}
_eager_counters: dict[tuple[torch.device, int], torch.Tensor] = {}

#: What each capture holds, by its stream: (the capture, its counters).
_captured_counters: dict[tuple[torch.device, int], tuple[int, torch.Tensor]] = {}

#: Zeroed int32 counters set aside a device; the launches of a captured graph keep a range of theirs for good.
ARENA_COUNTERS = 1 << 22
EAGER_COUNTERS = 1 << 16
CAPTURE_COUNTERS = 1 << 12


class _Arena:
    def __init__(self, device: torch.device) -> None:
        self.memory = torch.zeros(ARENA_COUNTERS, dtype=torch.int32, device=device)
        self.used = 0

    def take(self, n: int) -> torch.Tensor | None:
        start, self.used = self.used, self.used + (n + 31) // 32 * 32
        return self.memory[start : start + n] if self.used <= ARENA_COUNTERS else None


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _to_keep(device: torch.device, make: Callable[[], Any]) -> Any:
    """make() in a thread of its own, on the caller's stream: what it allocates may be kept for later calls.

    The caller's thread may be in inference mode, or in the warm-up of torch.compile's CUDA graphs, which sends a thread's
    allocations to the graph's pool and forbids that any of them outlives the run.
    """
    made: list[Any] = []

    def run() -> None:
        if device.type == "cuda":
            with torch.cuda.stream(stream):
                made.append(make())
        else:
            made.append(make())

    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return made[0]


def partials(device: torch.device, nbytes: int) -> torch.Tensor:
    """At least ``nbytes`` of uninitialised memory, uint8, 256-byte aligned; valid until the next call's launch."""
    if _capturing(device):
        return torch.empty(nbytes, dtype=torch.uint8, device=device)
    key = (device, _stream(device))
    held = _partials.get(key)
    if held is None or held.numel() < nbytes:
        size = max(nbytes, 1 << 20)
        rounded = 1 << (size - 1).bit_length()
        held = _partials[key] = _to_keep(device, lambda: torch.empty(rounded, dtype=torch.uint8, device=device))
    return held


def counters(device: torch.device, n: int) -> torch.Tensor:
    """At least ``n`` int32 counters that hold zero; the kernel that uses them must leave them zero.

    The launches of a stream follow one another, in a captured graph too, and share a range; two graphs have none in common,
    so they may replay side by side. Where the first use on a device happens inside a capture, the zeroing becomes part of
    that graph.
    """
    key = (device, _stream(device))
    if _capturing(device):
        return _of_capture(key, n)
    if device not in _counters:
        _counters[device] = _to_keep(device, lambda: _Arena(device))
    held = _eager_counters.get(key)
    if held is None or held.numel() < n:
        size = max(n, EAGER_COUNTERS)
        held = _eager_counters[key] = _to_keep(device, lambda: torch.zeros(size, dtype=torch.int32, device=device))
    return held


def _of_capture(key: tuple[torch.device, int], n: int) -> torch.Tensor:
    """A zeroing node before each launch would keep it from starting beside the one before: hence one range a capture."""
    device, stream = key
    capture = _capture_id(stream)
    before, held = _captured_counters.get(key, (0, None))
    if held is not None and before == capture != 0 and held.numel() >= n:
        return held
    arena = _counters.get(device)
    taken = arena.take(max(n, CAPTURE_COUNTERS)) if arena is not None else None
    if taken is None:
        taken = torch.zeros(max(n, CAPTURE_COUNTERS), dtype=torch.int32, device=device)
    _captured_counters[key] = (capture, taken)
    return taken


def _capture_id(stream: int) -> int:
    """Which capture a stream is part of; 0 where attnkit's compiled part, which can ask, is missing."""
    try:
        from attnkit import _C
    except ImportError:
        return 0
    compiled: Any = _C
    return compiled.cuda_capture_id(stream)


def release() -> None:
    """Give the cached partials and eager counters back to the allocator (captured graphs keep theirs)."""
    _partials.clear()
    _eager_counters.clear()
    _captured_counters.clear()
