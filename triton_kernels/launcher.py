"""Launches of one compiled kernel, over and over, at a lower cost on the host than Triton's own binder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton


class Launcher:
    """A kernel whose grid, scalars and constants stay the same from call to call; only the tensors change.

    The first call goes through Triton, which compiles for the arguments it sees. Later calls reuse that kernel
    with bare pointers. That is right only if every later tensor has the dtype and the alignment that the first
    had, so ``reusable`` must be False where that is not known; then each call goes through Triton.

    fn         jit kernel; its parameters are tensors, then scalars, then constants
    grid       number of programs (one dimension)
    fixed      what follows the tensors and the ``late`` integers of a call, in the kernel's order
    """

    __slots__ = ("compiled", "fixed", "fn", "grid", "options", "reusable", "run")

    def __init__(
        self, fn: Any, grid: int, fixed: tuple[Any, ...], *, num_warps: int, num_stages: int = 1, reusable: bool = True
    ) -> None:
        self.fn = fn
        self.grid = grid
        self.fixed = fixed
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.reusable = reusable
        self.compiled: dict[tuple[int, int], Any] = {}
        self.run: Callable[..., None] | None = None

    def __call__(self, *tensors: torch.Tensor | None, late: tuple[int, ...] = ()) -> None:
        """``late`` are integers that may differ from call to call (parameters that are not specialised on)."""
        device = tensors[0].device  # type: ignore[union-attr]
        if device.type == "cpu":
            self.fn[(self.grid,)](*tensors, *late, *self.fixed, **self.options)
        elif device.index == torch.cuda.current_device():
            self._launch(device.index, tensors, late)
        else:
            with torch.cuda.device(device):
                self._launch(device.index, tensors, late)

    def _launch(self, index: int, tensors: tuple[torch.Tensor | None, ...], late: tuple[int, ...]) -> None:
        # Which optional tensors come is part of what was compiled.
        key = (index, sum(1 << i for i, t in enumerate(tensors) if t is None))
        kernel = self.compiled.get(key)
        if kernel is None or triton.knobs.runtime.launch_enter_hook is not None:
            kernel = self.fn[(self.grid,)](*tensors, *late, *self.fixed, **self.options)
            if self.reusable:
                self.compiled[key] = kernel
            return
        stream = triton.runtime.driver.active.get_current_stream(index)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        kernel.run(
            self.grid, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None,
            *pointers, *late, *self.fixed,
        )  # fmt: skip
