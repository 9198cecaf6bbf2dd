"""Per-token quantisation: one float32 scale a row, int8 or e4m3 codes.

Source: per-token symmetric scaling as in SmoothQuant (Xiao et al. 2022) and ZeroQuant (Yao et al. 2022).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .numerics import to_e4m3, to_int8


@triton.jit
def _codes(x, scale, INT8: tl.constexpr, BY_HAND: tl.constexpr):
    scaled = tl.div_rn(x, scale)
    if INT8:
        return to_int8(scaled)
    else:
        return to_e4m3(scaled, BY_HAND)


@triton.jit
def quantize_kernel(
    x_ptr,
    out_ptr,
    scale_ptr,
    K,
    stride_x,
    stride_out,
    INT8: tl.constexpr,
    BY_HAND: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ONE_TILE: tl.constexpr,
):
    """One row a program: the row's largest magnitude, then the codes. A row up to BLOCK_K stays in registers."""
    TOP: tl.constexpr = 127.0 if INT8 else 448.0
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    out_ptr += row * stride_out
    at = tl.arange(0, BLOCK_K)
    if ONE_TILE:
        x = tl.load(x_ptr + at, mask=at < K, other=0.0).to(tl.float32)
        amax = tl.max(tl.abs(tl.where(x == x, x, 0.0)), 0)
        bad = tl.max((x != x).to(tl.int32), 0)
    else:
        top = tl.zeros([BLOCK_K], tl.float32)
        nan = tl.zeros([BLOCK_K], tl.int32)
        for start in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + start + at, mask=start + at < K, other=0.0).to(tl.float32)
            top = tl.maximum(top, tl.abs(tl.where(x == x, x, 0.0)))
            nan = nan | (x != x).to(tl.int32)
        amax = tl.max(top, 0)
        bad = tl.max(nan, 0)
    scale = tl.div_rn(amax, TOP)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(bad > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    if ONE_TILE:
        tl.store(out_ptr + at, _codes(x, scale, INT8, BY_HAND), mask=at < K)
    else:
        for start in range(0, K, BLOCK_K):
            x = tl.load(x_ptr + start + at, mask=start + at < K, other=0.0).to(tl.float32)
            tl.store(out_ptr + start + at, _codes(x, scale, INT8, BY_HAND), mask=start + at < K)


def launch(x: torch.Tensor, out: torch.Tensor, scale: torch.Tensor, block_k: int, warps: int, by_hand: bool) -> None:
    """x [M, K] -> out [M, K] (int8, or e4m3 as uint8 where ``by_hand``) and scale [M]."""
    M, K = x.shape
    quantize_kernel[(M,)](
        x,
        out,
        scale,
        K,
        x.stride(0),
        out.stride(0),
        INT8=out.dtype == torch.int8,
        BY_HAND=by_hand,
        BLOCK_K=block_k,
        ONE_TILE=block_k >= K,
        num_warps=warps,
    )


def specimens(make: Any) -> list[Any]:
    """Ahead-of-time builds; ``make`` is the record to fill: (name, fn, signature, constexprs, num_warps, num_stages)."""
    found = []
    for name, x, out, by_hand in (("int8", "bf16", "i8", True), ("e4m3-by-hand", "fp16", "u8", True), ("e4m3", "bf16", "fp8e4nv", False)):
        signature = {"x_ptr": f"*{x}", "out_ptr": f"*{out}", "scale_ptr": "*fp32", "K": "i32", "stride_x": "i32", "stride_out": "i32"}
        for block_k, one in ((4096, True), (16384, True), (8192, False)):
            consts = {"INT8": out == "i8", "BY_HAND": by_hand, "BLOCK_K": block_k, "ONE_TILE": one}
            found.append(make(f"quantize-{name}-{block_k}", quantize_kernel, signature, consts, 4 if block_k == 4096 else 16, 1))
    return found
