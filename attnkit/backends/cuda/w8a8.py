"""What the two W8A8 kernels of csrc/cuda/gemm share on the host: what neither serves, the operands' maps, the launch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda import launch
from attnkit.dispatch import Plan
from attnkit.signature import GemmSig

POINTERS = ("a", "w", "a_scale", "w_scale", "bias", "out")
#: enum Type of csrc/cuda/common/convert.cuh
TYPES = {None: 0, torch.bfloat16: 0, torch.float16: 1, torch.float32: 4}
#: The next launch may start, and set itself up, while this one still runs; it waits before it reads.
PROGRAMMATIC = True


def fields(*ints: str) -> launch.Fields:
    """A kernel's parameter struct: maps of both operands, their pointers, and integers of its own."""
    return launch.Fields(maps=("a_map", "w_map"), words=(*POINTERS, "out_m"), ints=ints, floats=())


def why_not(sig: GemmSig, tokens: str | None) -> str | None:
    """None where an sm_90a kernel can serve ``sig``, else the reason; ``tokens``: the kernel's own word on M."""
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if tokens is not None:
        return tokens
    if sig.dtype != torch.int8 and sig.out_dtype == torch.float32:
        return "the tensor core adds e4m3 products up in some 14 bits, fewer than a float32 output is asked for"
    if not sig.operands_aligned:
        return "needs a and w at 16-byte aligned addresses and row strides"
    if sig.K == 0 or (sig.M > 1 and sig.a_stride[0] == 0) or (sig.N > 1 and sig.w_stride[0] == 0):
        return f"needs K of at least 1 and rows of their own, got K = {sig.K} and strides {sig.a_stride}, {sig.w_stride}"
    return launch.unavailable()


def operand_map(rows: int, K: int, stride: int, box: int) -> Any:
    """A map of ``rows`` x K bytes in swizzled slices of ``box`` x 128."""
    return launch.compiled().CudaMapSpec(
        launch.MAP_TYPE[1], [K, rows], [stride if rows > 1 else -(-K // 16) * 16], [128, box], launch.MAP_SWIZZLE[128],
        launch.MAP_PROMOTE_128,
    )  # fmt: skip


def values(sig: GemmSig) -> dict[str, int]:
    """What both structs say of the output and the bias."""
    return {
        "M": sig.M, "N": sig.N, "out_m": sig.out_stride[0] * sig.out_dtype.itemsize, "bias_type": TYPES[sig.bias],
        "out_type": TYPES[sig.out_dtype], "whole": int(sig.aligned),
    }  # fmt: skip


def prepared(
    params: launch.Fields, kernel: Any, sig: GemmSig, boxes: tuple[int, int], ctas: int, threads: int, cluster: int,
    own: Mapping[str, int],
) -> Any:  # fmt: skip
    """A CudaLaunch of ``ctas``; ``boxes``: rows of a and of w that one load brings; ``own``: the struct's other integers."""
    a = operand_map(sig.M, sig.K, sig.a_stride[0], boxes[0])
    w = operand_map(sig.N, sig.K, sig.w_stride[0], boxes[1])
    return launch.compiled().CudaLaunch(
        kernel, (ctas, 1, 1), (threads, 1, 1), (cluster, 1, 1), PROGRAMMATIC, params.pack({**values(sig), **own}),
        [params.offsets[name] for name in POINTERS],
        [(params.offsets["a_map"], POINTERS.index("a"), a), (params.offsets["w_map"], POINTERS.index("w"), w)],
    )  # fmt: skip


def launcher(prepare: Callable[[Plan], Any]) -> Callable[..., None]:
    """A Kernel's launch: ``prepare`` makes the plan's CudaLaunch at the first call."""

    def run(plan: Plan, a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
        ready = plan.state.get("launch")
        if ready is None:
            ready = plan.state["launch"] = prepare(plan)
        ready(launch.stream_of(launch.index_of(plan.sig.device)), a, w, a_scale, w_scale, bias, out)

    return run
