"""w8a8_gemm through csrc/cuda/gemm/gemm_sm90.cu: fills the parameter struct, picks the build, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda import images, launch
from attnkit.backends.cuda.builds import gemm as builds
from attnkit.configs import gemm_cuda
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import GemmSig

NAME = "attnkit_w8a8_gemm"
POINTERS = ("a", "w", "a_scale", "w_scale", "bias", "out")
#: struct GemmParams of csrc/cuda/gemm/gemm_sm90.cuh
PARAMS = launch.Fields(
    maps=("a_map", "w_map"),
    words=(*POINTERS, "out_m"),
    ints=(
        "M", "N", "steps", "tiles_m", "tiles_n", "group", "cluster_m", "cluster_n", "splits", "a_box", "a_rows", "w_rows",
        "bias_type", "out_type", "whole", "stream",
    ),
    floats=(),
)  # fmt: skip
#: enum Type of csrc/cuda/common/convert.cuh
TYPES = {None: 0, torch.bfloat16: 0, torch.float16: 1, torch.float32: 4}
LEAST_TOKENS = 33
#: The next launch may start, and set itself up, while this one still runs; it waits before it reads.
PROGRAMMATIC = True


def _supports(sig: GemmSig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if sig.M < LEAST_TOKENS:
        return f"M is {sig.M}: below {LEAST_TOKENS} tokens the Triton kernel, which is tuned for reading weights, serves"
    if sig.dtype != torch.int8 and sig.out_dtype == torch.float32:
        return "the tensor core adds e4m3 products up in some 14 bits, fewer than a float32 output is asked for"
    if not sig.operands_aligned:
        return "needs a and w at 16-byte aligned addresses and row strides"
    if sig.K == 0 or (sig.M > 1 and sig.a_stride[0] == 0) or (sig.N > 1 and sig.w_stride[0] == 0):
        return f"needs K of at least 1 and rows of their own, got K = {sig.K} and strides {sig.a_stride}, {sig.w_stride}"
    return launch.unavailable() or launch.missing(_variant(sig, gemm_cuda.default(sig, arch.of(sig.device))))


def _variant(sig: GemmSig, config: gemm_cuda.CudaConfig) -> images.Variant:
    return builds.build(sig.dtype == torch.int8, config.block_m, config.block_n, config.turns)


def _map(rows: int, K: int, stride: int, box: int) -> Any:
    """A map of ``rows`` x K bytes in swizzled slices of ``box`` x 128."""
    return launch.compiled().CudaMapSpec(
        launch.MAP_TYPE[1], [K, rows], [stride if rows > 1 else -(-K // 16) * 16], [128, box], launch.MAP_SWIZZLE[128],
        launch.MAP_PROMOTE_128,
    )  # fmt: skip


def a_box(M: int, c: gemm_cuda.CudaConfig) -> int:
    """Rows of a that one load brings: a tile's, or all M where they are fewer; in whole groups of 8 (the swizzle's)."""
    whole = 8 * c.cluster_n
    return min(c.block_m, -(-M // whole) * whole) // c.cluster_n


def _check(sig: GemmSig, c: gemm_cuda.CudaConfig) -> None:
    """Raises ValueError for a config that the kernel has no build for."""
    int8 = sig.dtype == torch.int8
    widths = builds.TURN_WIDTHS if c.turns else builds.WIDTHS[int8]
    if c.block_n not in widths or c.block_m not in (128, 192) or (c.turns and (not int8 or c.splits > 1)):
        raise ValueError(f"{sig.op}: no build for {c}, wanted block_n one of {widths}; turns are int8, unsplit")
    if c.splits not in (1, 2, 4) or c.splits > -(-sig.K // 128):
        raise ValueError(f"{sig.op}: config.splits is {c.splits}, wanted 1, 2 or 4, and a slice of 128 of K for each")
    if c.cluster_m not in (1, 2, 4) or c.cluster_n not in (1, 2, 4) or c.block_n % (8 * c.cluster_m):
        raise ValueError(f"{sig.op}: cluster {c.cluster_m} x {c.cluster_n}, wanted 1, 2 or 4 each that cut block_n by eights")


def _prepare(plan: Plan) -> Any:
    sig, c = plan.sig, plan.config
    device = arch.of(sig.device)
    _check(sig, c)
    maps = [
        ("a", _map(sig.M, sig.K, sig.a_stride[0], a_box(sig.M, c))),
        ("w", _map(sig.N, sig.K, sig.w_stride[0], c.block_n // c.cluster_m)),
    ]
    tiles_m, tiles_n = gemm_cuda.cluster_tiles(sig, c)
    values = {
        "out_m": sig.out_stride[0] * sig.out_dtype.itemsize, "M": sig.M, "N": sig.N, "steps": -(-sig.K // 128),
        "tiles_m": tiles_m, "tiles_n": tiles_n, "group": c.group, "cluster_m": c.cluster_m, "cluster_n": c.cluster_n,
        "splits": c.splits, "a_box": a_box(sig.M, c), "a_rows": int(sig.a_scale_per_token),
        "w_rows": int(sig.w_scale_per_channel), "bias_type": TYPES[sig.bias], "out_type": TYPES[sig.out_dtype],
        "whole": int(sig.aligned), "stream": int(tiles_m == 1),
    }  # fmt: skip
    kernel = launch.kernel(_variant(sig, c), NAME, launch.index_of(sig.device), gemm_cuda.smem(c, sig))
    clusters, size = tiles_m * tiles_n, c.cluster_m * c.cluster_n * c.splits
    if c.splits == 1:  # a split ends with its one tile
        clusters = min(clusters, gemm_cuda.resident(c, device))
    return launch.compiled().CudaLaunch(
        kernel, (clusters * size, 1, 1), (2 * c.block_m + 128, 1, 1), (size, 1, 1), PROGRAMMATIC,
        PARAMS.pack(values), [PARAMS.offsets[name] for name in POINTERS],
        [(PARAMS.offsets[f"{name}_map"], POINTERS.index(name), spec) for name, spec in maps],
    )  # fmt: skip


def _launch(plan: Plan, a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    run = plan.state.get("launch")
    if run is None:
        run = plan.state["launch"] = _prepare(plan)
    pointers = (a, w, a_scale, w_scale, bias, out)
    run(launch.stream_of(launch.index_of(plan.sig.device)), *(launch.pointer(t) for t in pointers))


W8A8_GEMM = Kernel("cuda_sm90", "cuda", _supports, _launch, gemm_cuda.CUDA)
