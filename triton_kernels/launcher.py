"""Launches of one compiled kernel, over and over, at a lower cost on the host than Triton's own binder."""

from __future__ import annotations

from typing import Any

import torch
import triton


def _hooked() -> bool:
    """Whether a profiler wants to see Triton's launches."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))


class Launcher:
    """A kernel whose grid, scalars and constants stay the same from call to call; only the tensors change.

    The first call goes through Triton, which compiles for the arguments it sees. Later calls reuse that kernel
    with bare pointers. That is right only if every later tensor has the device, the dtype and the alignment of the
    first (and is None where that was), so ``reusable`` must be False where this is not known; then each call goes
    through Triton.

    fn      jit kernel; its parameters are tensors, then scalars, then constants
    grid    number of programs (one dimension)
    fixed   what follows the tensors, in the kernel's order
    """

    __slots__ = ("fixed", "fn", "grid", "kernel", "options", "reusable")

    def __init__(
        self, fn: Any, grid: int, fixed: tuple[Any, ...], *, num_warps: int, num_stages: int = 1, reusable: bool = True
    ) -> None:
        self.fn = fn
        self.grid = grid
        self.fixed = fixed
        self.options = {"num_warps": num_warps, "num_stages": num_stages}
        self.reusable = reusable
        self.kernel: Any = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        device = tensors[0].device  # type: ignore[union-attr]
        if device.type == "cpu":
            self.fn[(self.grid,)](*tensors, *self.fixed, **self.options)
        elif device.index == torch.cuda.current_device():
            self._launch(device.index, tensors)
        else:
            with torch.cuda.device(device):
                self._launch(device.index, tensors)

    def _launch(self, index: int, tensors: tuple[torch.Tensor | None, ...]) -> None:
        kernel = self.kernel
        if kernel is None or _hooked():
            kernel = self.fn[(self.grid,)](*tensors, *self.fixed, **self.options)
            if self.reusable:
                self.kernel = kernel
            return
        stream = triton.runtime.driver.active.get_current_stream(index)
        pointers = [None if t is None else t.data_ptr() for t in tensors]
        kernel.run(self.grid, 1, 1, stream, kernel.function, kernel.packed_metadata, None, None, None, *pointers, *self.fixed)
