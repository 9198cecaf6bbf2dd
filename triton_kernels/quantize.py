"""Per-token quantisation: one float32 scale a row, int8 or e4m3 codes.

Source: symmetric scaling a token as in ZeroQuant (Yao et al., arXiv 2206.01861).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .numerics import to_e4m3, to_int8
from .tiles import device_function, loop, widen


@device_function
def _codes(x, scale, INT8: tl.constexpr, BY_HAND: tl.constexpr):
    scaled = tl.div_rn(x, scale)
    if INT8:
        return to_int8(scaled)
    else:
        return to_e4m3(scaled, BY_HAND)


@triton.jit
def quantize_kernel(
    x_ptr, out_ptr, scale_ptr, K, stride_x, stride_out,
    INT8: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_K: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One row a program: its largest magnitude, then the codes. With ONE_TILE the row stays in registers."""
    TOP: tl.constexpr = 127.0 if INT8 else 448.0
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    out_ptr += row * stride_out
    at = tl.arange(0, BLOCK_K)
    if ONE_TILE:
        x = widen(tl.load(x_ptr + at, mask=at < K, other=0.0))
        top = tl.where(x == x, tl.abs(x), 0.0)
        bad = (x != x).to(tl.int32)
    else:
        top = tl.zeros([BLOCK_K], tl.float32)
        bad = tl.zeros([BLOCK_K], tl.int32)
        for start in loop(0, K, BLOCK_K):
            x = widen(tl.load(x_ptr + start + at, mask=start + at < K, other=0.0))
            top = tl.maximum(top, tl.where(x == x, tl.abs(x), 0.0))
            bad = bad | (x != x).to(tl.int32)
    scale = tl.div_rn(tl.max(top, 0), TOP)
    scale = tl.where(scale == 0.0, 1.0, scale)
    scale = tl.where(tl.max(bad, 0) > 0, float("nan"), scale)
    tl.store(scale_ptr + row, scale)
    if ONE_TILE:
        tl.store(out_ptr + at, _codes(x, scale, INT8, BY_HAND), mask=at < K)
    else:
        for start in loop(0, K, BLOCK_K):
            x = widen(tl.load(x_ptr + start + at, mask=start + at < K, other=0.0))
            tl.store(out_ptr + start + at, _codes(x, scale, INT8, BY_HAND), mask=start + at < K)


#: A longer row is read twice; up to here it fits the registers of one program.
LONGEST_TILE = 16384


def tile(K: int) -> tuple[int, int]:
    """(BLOCK_K, warps) for rows of K: at most 32 elements a thread."""
    block = min(max(triton.next_power_of_2(K), 256), LONGEST_TILE)
    return block, min(16, max(1, block // 1024))


def bind(M: int, K: int, stride_x: int, stride_out: int, *, int8: bool, by_hand: bool, reusable: bool) -> Launcher:
    """A launch for x [M, K]; ``by_hand`` where the output comes as uint8 and holds e4m3 bits."""
    block, warps = tile(K)
    fixed = (K, stride_x, stride_out, int8, by_hand, block, block >= K)
    return Launcher(quantize_kernel, M, fixed, num_warps=warps, reusable=reusable)


def launch(launcher: Launcher, x: torch.Tensor, out: torch.Tensor, scale: torch.Tensor) -> None:
    launcher(x, out, scale)


def _specimen(x: str, out: str, K: int) -> Specimen:
    block, warps = tile(K)
    signature = {"x_ptr": f"*{x}", "out_ptr": f"*{out}", "scale_ptr": "*fp32"}
    signature |= dict.fromkeys(("K", "stride_x", "stride_out"), "i32")
    consts = {"INT8": out == "i8", "BY_HAND": out == "u8", "BLOCK_K": block, "ONE_TILE": block >= K}
    # The hardware's e4m3 is another format on gfx942, and sm_80 has none: there the bits are made by hand.
    targets = ("cuda:89", "cuda:90", "cuda:100", "cuda:120") if out == "fp8e4nv" else None
    return Specimen(f"quantize-{x}-{out}-K{K}", quantize_kernel, signature, consts, warps, 1, targets)


_KINDS = (("bf16", "i8"), ("fp32", "u8"), ("fp16", "fp8e4nv"))
SPECIMENS = [_specimen(x, out, K) for x, out in _KINDS for K in (4096, 14336, 65536)]
