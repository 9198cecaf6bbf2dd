"""w8a8_gemm for few tokens by csrc/cuda/gemm/gemm_skinny_sm90.cu: fills the parameter struct, picks the build, launches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda import launch
from attnkit.backends.cuda.builds import gemm_skinny as builds
from attnkit.configs import gemm_skinny as configs
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import GemmSig

NAME = "attnkit_w8a8_gemm_skinny"
POINTERS = ("a", "w", "a_scale", "w_scale", "bias", "out")
#: struct SkinnyParams of csrc/cuda/gemm/gemm_skinny_sm90.cuh
PARAMS = launch.Fields(
    maps=("a_map", "w_map"),
    words=(*POINTERS, "out_m"),
    ints=(
        "M", "N", "steps", "tiles", "splits", "stages", "a_rows", "ahead", "a_scales", "w_scales",
        "bias_type", "out_type", "whole",
    ),
    floats=(),
)  # fmt: skip
#: enum Type of csrc/cuda/common/convert.cuh
TYPES = {None: 0, torch.bfloat16: 0, torch.float16: 1, torch.float32: 4}
#: The next launch may start, and set itself up, while this one still runs; it waits before it reads.
PROGRAMMATIC = True


def _supports(sig: GemmSig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if sig.M > builds.MOST_TOKENS:
        return f"M is {sig.M}: more than {builds.MOST_TOKENS} tokens do not fit its one row of tiles"
    if sig.dtype != torch.int8 and sig.out_dtype == torch.float32:
        return "the tensor core adds e4m3 products up in some 14 bits, fewer than a float32 output is asked for"
    if not sig.operands_aligned:
        return "needs a and w at 16-byte aligned addresses and row strides"
    if sig.K == 0 or (sig.M > 1 and sig.a_stride[0] == 0) or (sig.N > 1 and sig.w_stride[0] == 0):
        return f"needs K of at least 1 and rows of their own, got K = {sig.K} and strides {sig.a_stride}, {sig.w_stride}"
    return launch.unavailable() or launch.missing(
        builds.build(sig.dtype == torch.int8, configs.default(sig, arch.of(sig.device)).block_n)
    )


def _map(rows: int, K: int, stride: int, box: int) -> Any:
    """A map of ``rows`` x K bytes in swizzled slices of ``box`` x 128."""
    return launch.compiled().CudaMapSpec(
        launch.MAP_TYPE[1], [K, rows], [stride if rows > 1 else -(-K // 16) * 16], [128, box], launch.MAP_SWIZZLE[128],
        launch.MAP_PROMOTE_128,
    )  # fmt: skip


def _check(sig: GemmSig, c: configs.SkinnyConfig) -> None:
    """Raises ValueError for a config that the kernel has no build for, or no room."""
    if c.block_n not in builds.WIDTHS or c.splits not in (1, 2, 4):
        raise ValueError(f"{sig.op}: no build for {c}, wanted block_n one of {builds.WIDTHS} and 1, 2 or 4 splits")
    if c.splits > -(-sig.K // builds.slice_bytes(c.block_n)):
        raise ValueError(f"{sig.op}: config.splits is {c.splits}, wanted a slice of K for each, and K is {sig.K}")
    if not 1 <= c.ctas <= 2 or configs.stages(c, sig) < 2:
        raise ValueError(f"{sig.op}: {c} leaves no room for two slices in shared memory")


def _prepare(plan: Plan) -> Any:
    sig, c = plan.sig, plan.config
    _check(sig, c)
    a_rows, tiles = builds.rows(sig.M), -(-sig.N // c.block_n)
    maps = [
        ("a", _map(sig.M, sig.K, sig.a_stride[0], a_rows)),
        ("w", _map(sig.N, sig.K, sig.w_stride[0], c.block_n)),
    ]
    values = {
        "out_m": sig.out_stride[0] * sig.out_dtype.itemsize, "M": sig.M, "N": sig.N,
        "steps": -(-sig.K // builds.slice_bytes(c.block_n)), "tiles": tiles, "splits": c.splits,
        "stages": configs.stages(c, sig), "a_rows": a_rows, "ahead": c.ahead,
        "a_scales": int(sig.a_scale_per_token), "w_scales": int(sig.w_scale_per_channel),
        "bias_type": TYPES[sig.bias], "out_type": TYPES[sig.out_dtype], "whole": int(sig.aligned),
    }  # fmt: skip
    kernel = launch.kernel(
        builds.build(sig.dtype == torch.int8, c.block_n), NAME, launch.index_of(sig.device), configs.smem(c, sig)
    )
    if c.splits == 1:  # a split ends with its one tile
        tiles = min(tiles, arch.of(sig.device).sms)
    return launch.compiled().CudaLaunch(
        kernel, (tiles * c.splits, 1, 1), (builds.THREADS, 1, 1), (c.splits, 1, 1), PROGRAMMATIC,
        PARAMS.pack(values), [PARAMS.offsets[name] for name in POINTERS],
        [(PARAMS.offsets[f"{name}_map"], POINTERS.index(name), spec) for name, spec in maps],
    )  # fmt: skip


def _launch(plan: Plan, a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, out: Tensor) -> None:
    run = plan.state.get("launch")
    if run is None:
        run = plan.state["launch"] = _prepare(plan)
    pointers = (a, w, a_scale, w_scale, bias, out)
    run(launch.stream_of(launch.index_of(plan.sig.device)), *(launch.pointer(t) for t in pointers))


W8A8_GEMM = Kernel("cuda_sm90_skinny", "cuda", _supports, _launch, configs.CUDA)
