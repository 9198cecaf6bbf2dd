"""New keys and values into the paged cache, quantised on the way where the cache holds 8 bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .numerics import to_e4m3, to_int8
from .tiles import device_function, widen


@device_function
def _copy(
    x, cache, scale, t, page, slot, heads, x_t, x_h, c_p, c_s, c_h, scale_h, HKV,
    D: tl.constexpr, BD: tl.constexpr, INT8: tl.constexpr, E4M3: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """Token t's ``heads`` of x to its slot."""
    cols = tl.arange(0, BD)
    ok = (heads < HKV)[:, None] & (cols < D)[None, :]
    wide = heads.to(tl.int64)[:, None]
    new = tl.load(x + t * x_t + wide * x_h + cols[None, :], mask=ok, other=0.0)
    if INT8 or E4M3:
        new = widen(new)
        if scale is not None:
            new = tl.div_rn(new, tl.load(scale + heads * scale_h, mask=heads < HKV, other=1.0)[:, None])
        if INT8:
            new = to_int8(new)
        else:
            new = to_e4m3(new, BY_HAND)
    tl.store(cache + page * c_p + slot * c_s + wide * c_h + cols[None, :], new, mask=ok)


@triton.jit
def write_kernel(
    k, v, k_cache, v_cache, slots, k_scale, v_scale,
    P, HKV, k_t, k_h, v_t, v_h, kc_p, kc_s, kc_h, vc_p, vc_s, vc_h, ks_h, vs_h,
    S: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BH: tl.constexpr,
    INT8: tl.constexpr, E4M3: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """BH heads of one token's key or value a program. A slot outside [0, P S) is left out."""
    blocks = tl.cdiv(HKV, BH)
    t = (tl.program_id(0) // (2 * blocks)).to(tl.int64)
    which = tl.program_id(0) % (2 * blocks)
    heads = (which // 2) * BH + tl.arange(0, BH)
    at = tl.load(slots + t)
    page = at // S
    slot = at % S
    if (at >= 0) & (page < P):
        if which % 2 == 0:
            _copy(k, k_cache, k_scale, t, page, slot, heads, k_t, k_h, kc_p, kc_s, kc_h, ks_h, HKV, D, BD, INT8, E4M3, BY_HAND)
        else:
            _copy(
                v, v_cache, v_scale, t, page, slot, heads, v_t, v_h, vc_p, vc_s, vc_h, vs_h, HKV, DV, BDV, INT8, E4M3, BY_HAND
            )


@dataclass(frozen=True, slots=True)
class Shape:
    """Strides count elements: k, v of token and head; the caches of page, slot and head; scales of head."""

    T: int
    Hkv: int
    D: int
    Dv: int
    P: int
    S: int
    k: tuple[int, int]
    v: tuple[int, int]
    k_cache: tuple[int, int, int]
    v_cache: tuple[int, int, int]
    scales: tuple[int, int]
    int8: bool
    e4m3: bool
    by_hand: bool


def _constants(s: Shape) -> dict[str, int | bool]:
    bd, bdv = (max(16, triton.next_power_of_2(d)) for d in (s.D, s.Dv))
    heads = min(triton.next_power_of_2(s.Hkv), max(1, 2048 // max(bd, bdv)))
    return {
        "S": s.S, "D": s.D, "DV": s.Dv, "BD": bd, "BDV": bdv, "BH": heads,
        "INT8": s.int8, "E4M3": s.e4m3, "BY_HAND": s.by_hand,
    }  # fmt: skip


def bind(shape: Shape, reusable: bool) -> Launcher:
    fixed = _constants(shape)
    programs = shape.T * 2 * triton.cdiv(shape.Hkv, fixed["BH"])
    scalars = (shape.P, shape.Hkv, *shape.k, *shape.v, *shape.k_cache, *shape.v_cache, *shape.scales)
    return Launcher(write_kernel, programs, (*scalars, *fixed.values()), num_warps=2, reusable=reusable)


def launch(
    launcher: Launcher,
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor,
    k_scale: torch.Tensor | None, v_scale: torch.Tensor | None,
) -> None:  # fmt: skip
    """The caches come as uint8 where the e4m3 bits are made by hand."""
    launcher(k, v, k_cache, v_cache, slots, k_scale, v_scale)


def _specimen(kind: str) -> Specimen:
    """``kind`` of the cache: bf16, i8, u8 (e4m3 by hand) or fp8e4nv."""
    shape = Shape(
        256, 8, 128, 128, 1024, 16, (1024, 128), (1024, 128), (16384, 1024, 128), (16384, 1024, 128), (1, 1),
        kind == "i8", kind in ("u8", "fp8e4nv"), kind == "u8",
    )  # fmt: skip
    pointers = {"k": "*bf16", "v": "*bf16", "k_cache": f"*{kind}", "v_cache": f"*{kind}", "slots": "*i64"}
    scales = {"k_scale": "*fp32", "v_scale": "*fp32"} if kind != "bf16" else {}
    ints = ("P", "HKV", "k_t", "k_h", "v_t", "v_h", "kc_p", "kc_s", "kc_h", "vc_p", "vc_s", "vc_h", "ks_h", "vs_h")
    consts = _constants(shape) | ({} if scales else {"k_scale": None, "v_scale": None})
    targets = ("cuda:89", "cuda:90", "cuda:100", "cuda:120") if kind == "fp8e4nv" else None
    return Specimen(
        f"write-{kind}", write_kernel, pointers | scales | dict.fromkeys(ints, "i32"), consts, 2, 1, targets,
        ("P", "HKV", "ks_h", "vs_h"),
    )  # fmt: skip


SPECIMENS = [_specimen(kind) for kind in ("bf16", "i8", "u8", "fp8e4nv")]
