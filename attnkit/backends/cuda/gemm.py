"""w8a8_gemm through csrc/cuda/gemm/gemm_sm90.cu: says what it serves, picks the build, fills the parameter struct."""

from __future__ import annotations

from typing import Any

import torch

from attnkit import arch
from attnkit.backends.cuda import images, launch, w8a8
from attnkit.backends.cuda.builds import gemm as builds
from attnkit.configs import gemm_cuda
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import GemmSig

NAME = "attnkit_w8a8_gemm"
#: struct GemmParams of csrc/cuda/gemm/gemm_sm90.cuh
PARAMS = w8a8.fields(
    "M", "N", "steps", "tiles_m", "tiles_n", "group", "cluster_m", "cluster_n", "splits", "a_box", "a_rows", "w_rows",
    "bias_type", "out_type", "whole", "stream",
)  # fmt: skip
LEAST_TOKENS = 33


def _supports(sig: GemmSig) -> str | None:
    few = f"M is {sig.M}: below {LEAST_TOKENS} tokens most of its tiles of 128 rows would be empty"
    reason = w8a8.why_not(sig, few if sig.M < LEAST_TOKENS else None)
    return reason or launch.missing(_variant(sig, gemm_cuda.default(sig, arch.of(sig.device))))


def _variant(sig: GemmSig, config: gemm_cuda.CudaConfig) -> images.Variant:
    return builds.build(sig.dtype == torch.int8, config.block_m, config.block_n, config.turns)


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
    _check(sig, c)
    tiles_m, tiles_n = gemm_cuda.cluster_tiles(sig, c)
    own = {
        "steps": -(-sig.K // 128), "tiles_m": tiles_m, "tiles_n": tiles_n, "group": c.group, "cluster_m": c.cluster_m,
        "cluster_n": c.cluster_n, "splits": c.splits, "a_box": a_box(sig.M, c), "a_rows": int(sig.a_scale_per_token),
        "w_rows": int(sig.w_scale_per_channel), "stream": int(tiles_m == 1),
    }  # fmt: skip
    kernel = launch.kernel(_variant(sig, c), NAME, launch.index_of(sig.device), gemm_cuda.smem(c, sig))
    clusters, size = tiles_m * tiles_n, c.cluster_m * c.cluster_n * c.splits
    if c.splits == 1:  # a split ends with its one tile
        clusters = min(clusters, gemm_cuda.resident(c, arch.of(sig.device)))
    boxes = own["a_box"], c.block_n // c.cluster_m
    return w8a8.prepared(PARAMS, kernel, sig, boxes, clusters * size, 2 * c.block_m + 128, size, own)


W8A8_GEMM = Kernel("cuda_sm90", "cuda", _supports, w8a8.launcher(_prepare), gemm_cuda.CUDA)
