"""Rows to 8 bits, one float32 scale a row, int8 or e4m3 codes: as they are, after an RMSNorm, or after silu(gate) * up.

Source: symmetric scaling a token as in ZeroQuant (Yao et al., arXiv 2206.01861).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .numerics import to_e4m3, to_int8
from .tiles import device_function, loop, narrow, widen

PLAIN = tl.constexpr(0)
RMS_NORM = tl.constexpr(1)
SILU_MUL = tl.constexpr(2)
FORMS = {"plain": 0, "rms_norm": 1, "silu_mul": 2}


@device_function
def _codes(x, scale, INT8: tl.constexpr, BY_HAND: tl.constexpr):
    scaled = tl.div_rn(x, scale)
    if INT8:
        return to_int8(scaled)
    else:
        return to_e4m3(scaled, BY_HAND)


@device_function
def _read(x_ptr, weight_ptr, residual_ptr, at, K, FORM: tl.constexpr, FIRST: tl.constexpr):
    """(what is quantised, what is squared) of the columns ``at``; the FIRST time a sum is also written as the residual."""
    x = widen(tl.load(x_ptr + at, mask=at < K, other=0.0))
    v = x
    if FORM == SILU_MUL:
        v = x / (1.0 + tl.exp(-x)) * widen(tl.load(x_ptr + K + at, mask=at < K, other=0.0))
    if FORM == RMS_NORM:
        if residual_ptr is not None:
            before = tl.load(residual_ptr + at, mask=at < K, other=0.0)
            if FIRST:
                total = narrow(x + widen(before), before.dtype)
                tl.store(residual_ptr + at, total, mask=at < K)
                x = widen(total)
            else:
                x = widen(before)
        v = x * widen(tl.load(weight_ptr + at, mask=at < K, other=0.0))
    return v, x


@triton.jit
def quantize_kernel(
    x_ptr, weight_ptr, residual_ptr, out_ptr, scale_ptr, K, stride_x, stride_residual, stride_out, eps,
    FORM: tl.constexpr, INT8: tl.constexpr, BY_HAND: tl.constexpr, BLOCK_K: tl.constexpr, ONE_TILE: tl.constexpr,
):  # fmt: skip
    """One row a program: its largest magnitude, then the codes. With ONE_TILE the row stays in registers.

    The root of an RMSNorm cancels out of the codes: x * weight is what is quantised, and the root is in the scale alone.
    """
    TOP: tl.constexpr = 127.0 if INT8 else 448.0
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * stride_x
    out_ptr += row * stride_out
    if residual_ptr is not None:
        residual_ptr += row * stride_residual
    at = tl.arange(0, BLOCK_K)
    if ONE_TILE:
        v, x = _read(x_ptr, weight_ptr, residual_ptr, at, K, FORM, True)
        top = tl.where(v == v, tl.abs(v), 0.0)
        bad = (v != v).to(tl.int32)
        squares = x * x
    else:
        top = tl.zeros([BLOCK_K], tl.float32)
        bad = tl.zeros([BLOCK_K], tl.int32)
        squares = tl.zeros([BLOCK_K], tl.float32)
        for start in loop(0, K, BLOCK_K):
            v, x = _read(x_ptr, weight_ptr, residual_ptr, start + at, K, FORM, True)
            top = tl.maximum(top, tl.where(v == v, tl.abs(v), 0.0))
            bad = bad | (v != v).to(tl.int32)
            squares += x * x
    scale = tl.div_rn(tl.max(top, 0), TOP)
    zeros = scale == 0.0
    scale = tl.where(zeros, 1.0, scale)
    scale = tl.where(tl.max(bad, 0) > 0, float("nan"), scale)
    said = scale
    if FORM == RMS_NORM:
        root = tl.sqrt_rn(tl.sum(squares, 0) / K + eps)
        said = tl.where(zeros, scale, scale / root)
        scale = tl.where(said == said, scale, said)
    tl.store(scale_ptr + row, said)
    if ONE_TILE:
        tl.store(out_ptr + at, _codes(v, scale, INT8, BY_HAND), mask=at < K)
    else:
        tl.debug_barrier()
        for start in loop(0, K, BLOCK_K):
            v, x = _read(x_ptr, weight_ptr, residual_ptr, start + at, K, FORM, False)
            tl.store(out_ptr + start + at, _codes(v, scale, INT8, BY_HAND), mask=start + at < K)


#: A longer row is read twice, in tiles of half that; up to here it fits the registers of one program.
LONGEST_TILE = 16384


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes and strides (elements) of one launch; ``by_hand`` where the output comes as uint8 and holds e4m3 bits."""

    M: int
    K: int
    stride_x: int
    stride_residual: int
    stride_out: int
    form: str
    int8: bool
    by_hand: bool
    eps: float


def tile(K: int) -> tuple[int, int]:
    """(BLOCK_K, warps) for rows of K: at most 32 elements a thread."""
    block = max(triton.next_power_of_2(K), 256)
    if block > LONGEST_TILE:
        return LONGEST_TILE // 2, 16
    return block, min(16, max(1, block // 1024))


def bind(s: Shape, *, reusable: bool) -> Launcher:
    """A launch with (x, weight, residual, out, scale); tensors that a form does not have are None."""
    block, warps = tile(s.K)
    fixed = (
        s.K, s.stride_x, s.stride_residual, s.stride_out, s.eps, FORMS[s.form], s.int8, s.by_hand, block, block >= s.K,
    )  # fmt: skip
    return Launcher(quantize_kernel, s.M, fixed, num_warps=warps, reusable=reusable)


def launch(
    launcher: Launcher, x: torch.Tensor, weight: torch.Tensor | None, residual: torch.Tensor | None, out: torch.Tensor,
    scale: torch.Tensor,
) -> None:  # fmt: skip
    launcher(x, weight, residual, out, scale)


def _specimen(form: str, x: str, out: str, K: int, residual: bool = False) -> Specimen:
    block, warps = tile(K)
    signature = {"x_ptr": f"*{x}", "out_ptr": f"*{out}", "scale_ptr": "*fp32", "eps": "fp32"}
    signature |= dict.fromkeys(("K", "stride_x", "stride_residual", "stride_out"), "i32")
    consts: dict[str, Any] = {
        "FORM": FORMS[form],
        "INT8": out == "i8",
        "BY_HAND": out == "u8",
        "BLOCK_K": block,
        "ONE_TILE": block >= K,
    }
    if form == "rms_norm":
        signature["weight_ptr"] = f"*{x}"
    if residual:
        signature["residual_ptr"] = f"*{x}"
    consts |= dict.fromkeys({"weight_ptr", "residual_ptr"} - signature.keys())
    # The hardware's e4m3 is another format on gfx942, and sm_80 has none: there the bits are made by hand.
    targets = ("cuda:89", "cuda:90", "cuda:100", "cuda:120") if out == "fp8e4nv" else None
    name = f"quantize-{form}{'-residual' if residual else ''}-{x}-{out}-K{K}"
    return Specimen(name, quantize_kernel, signature, consts, warps, 1, targets)


_KINDS = (("bf16", "i8"), ("fp32", "u8"), ("fp16", "fp8e4nv"))
SPECIMENS = [
    *(_specimen("plain", x, out, K) for x, out in _KINDS for K in (4096, 14336, 65536)),
    *(_specimen("rms_norm", x, out, K, K != 8192) for x, out in _KINDS for K in (4096, 8192, 65536)),
    *(_specimen("silu_mul", x, out, K) for x, out in _KINDS for K in (4096, 14336, 65536)),
]
