"""New latents into an fp8 cache of 656 bytes a token: 512 e4m3 values, four float32 scales, 64 bf16 of rope."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from .aot import Specimen
from .launcher import Launcher
from .numerics import to_e4m3
from .tiles import narrow, widen


@triton.jit
def write_latent_kernel(
    latent, rope, cache, slots, P, latent_t, rope_t, c_p, c_s, S: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """One token a program. A slot outside [0, P S) is left out."""
    t = tl.program_id(0).to(tl.int64)
    at = tl.load(slots + t)
    page = at // S
    if (at >= 0) & (page < P):
        row = cache + (page * c_p + (at % S) * c_s)
        block = tl.arange(0, 4)
        value = block[:, None] * 128 + tl.arange(0, 128)[None, :]
        x = widen(tl.load(latent + t * latent_t + value))
        bad = tl.max((tl.abs(x) < float("inf")).to(tl.int32) ^ 1, 1)
        most = tl.max(tl.where(x == x, tl.abs(x), 0.0), 1)
        scale = tl.where(most == 0.0, 1.0, tl.div_rn(most, 448.0))
        scale = tl.where(bad != 0, float("nan"), scale)
        code = to_e4m3(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape)), BY_HAND)
        if not BY_HAND:
            code = code.to(tl.uint8, bitcast=True)
        tl.store(row + value, code)
        tl.store((row + 512).to(tl.pointer_type(tl.float32)) + block, scale)
        cols = tl.arange(0, 64)
        key = narrow(widen(tl.load(rope + t * rope_t + cols)), tl.bfloat16)
        tl.store((row + 528).to(tl.pointer_type(tl.bfloat16)) + cols, key)


def bind(T: int, P: int, S: int, latent_t: int, rope_t: int, cache: tuple[int, int], by_hand: bool, reusable: bool) -> Launcher:
    """Strides count elements: latent and rope of token; the cache of page and slot."""
    return Launcher(write_latent_kernel, T, (P, latent_t, rope_t, *cache, S, by_hand), num_warps=2, reusable=reusable)


def _specimen(name: str, by_hand: bool, targets: tuple[str, ...] | None) -> Specimen:
    pointers = {"latent": "*bf16", "rope": "*bf16", "cache": "*u8", "slots": "*i64"}
    ints: dict[str, Any] = dict.fromkeys(("P", "latent_t", "rope_t", "c_p", "c_s"), "i32")
    return Specimen(name, write_latent_kernel, pointers | ints, {"S": 64, "BY_HAND": by_hand}, 2, 1, targets, ("P",))


SPECIMENS = [
    _specimen("write-latent", False, ("cuda:89", "cuda:90", "cuda:100", "cuda:120")),
    _specimen("write-latent-by-hand", True, None),
]
