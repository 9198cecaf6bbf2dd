"""What paged_prefill and paged_decode share: the cache's forms, the options, the signature."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attnkit import check
from attnkit.signature import AttentionSig

KV = Tensor | tuple[Tensor, Tensor]
#: A token of an fp8 latent cache, as vLLM lays it out: 512 e4m3 values, a float32 scale for each 128 of them, 64 bf16 of rope.
LATENT, LATENT_BLOCK, LATENT_ROPE = 512, 128, 64
LATENT_ROW = LATENT + 4 * (LATENT // LATENT_BLOCK) + 2 * LATENT_ROPE


def split_kv(op: str, kv: Any, D: int) -> tuple[Tensor, Tensor]:
    """kv [P, 2, S, Hkv, D], or a pair of [P, S, Hkv, D], as the pair; views, never copies."""
    if isinstance(kv, Tensor):
        shape = kv.shape
        if len(shape) != 5 or shape[1] != 2:
            raise ValueError(f"{op}: kv's shape is {list(shape)}, wanted [P, 2, S, Hkv, D] or a pair (k, v) of [P, S, Hkv, D]")
        if shape[4] != D:
            raise ValueError(f"{op}: D is {D} in q but {shape[4]} in kv (dim 4)")
        k, v = kv.unbind(1)  # half the time of two indexings
        return k, v
    if not isinstance(kv, (tuple, list)) or len(kv) != 2:
        raise TypeError(f"{op}: kv is {type(kv).__name__}, wanted a tensor [P, 2, S, Hkv, D] or a pair (k, v)")
    return kv[0], kv[1]


def fold_scale(op: str, name: str, scale: float | Tensor | None, heads: int) -> tuple[float, Tensor | None]:
    """A KV scale as (a number to fold in, a tensor [Hkv]); one of the two is trivial."""
    if scale is None:
        return 1.0, None
    if not isinstance(scale, Tensor):
        return float(scale), None
    if scale.dtype != torch.float32:
        raise ValueError(f"{op}: {name}'s dtype is {scale.dtype}, wanted torch.float32")
    if scale.numel() == 1:
        return 1.0, scale.reshape(1).expand(heads)
    if scale.dim() != 1 or scale.shape[0] != heads:
        raise ValueError(f"{op}: {name}'s shape is {list(scale.shape)}, wanted [] or [Hkv] = [{heads}]")
    return 1.0, scale


def check_scales(a: check.Letters, k_scale: Tensor | None, v_scale: Tensor | None, kv_dtype: torch.dtype) -> None:
    """Scales a head go with a quantised cache only."""
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if scale is None:
            continue
        a.tensor(name, scale, "Hkv", (torch.float32,), dense_last=False)
        if kv_dtype not in check.QUANTISED:
            wanted = "torch.int8 or torch.float8_e4m3fn with scales"
            raise ValueError(f"{a.op}: {name} is given but kv's dtype is {kv_dtype}, wanted {wanted}")


def options(op: str, window: int | None, softcap: float) -> tuple[int, float]:
    """window None or a positive number of keys; softcap 0 or above."""
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"{op}: window is {window!r}, wanted None or at least 1 key")
    if not 0 <= softcap < math.inf:
        raise ValueError(f"{op}: softcap is {softcap!r}, wanted 0 (off) or a positive number")
    return window or 0, float(softcap)


def softmax_scale(op: str, scale: float | None, default: float) -> float:
    if scale is None:
        return default
    if not -math.inf < scale < math.inf:
        raise ValueError(f"{op}: scale is {scale!r}, wanted a finite number")
    return float(scale)


def signature(
    op: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lens: Tensor,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tree_mask: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
    *,
    q_letters: str,
    scale: float,
    out_scale: float,
    causal: bool,
    window: int,
    softcap: float,
    batch_invariant: bool,
    extra: Callable[[check.Letters], None] | None = None,
) -> AttentionSig:
    """Check every tensor of an attention call and describe it. q is [T, Hq, D] or [B, Q, Hq, D]."""
    a = check.Letters(op, q.device)
    a.tensor("q", q, q_letters, check.FLOATS)
    a.tensor("kv", k, "P S Hkv D", (q.dtype, *check.QUANTISED))
    a.tensor("kv", v, "P S Hkv Dv", (k.dtype,))
    a.tensor("table.pages", pages, "B W", (torch.int32,))
    a.tensor("table.lens", lens, "B", (torch.int32,))
    if extra is not None:
        extra(a)
    size = a.size
    if not 1 <= size["S"] <= 256 or not check.is_power_of_two(size["S"]):
        raise a.fail("S (tokens in a page)", size["S"], "a power of two from 1 to 256")
    if size["Hkv"] < 1 or size["Hq"] % size["Hkv"]:
        raise a.fail("Hq", size["Hq"], f"a multiple of Hkv = {size['Hkv']}")
    for letter in ("D", "Dv"):
        if size[letter] % 8 or not 8 <= size[letter] <= 576:
            raise a.fail(letter, size[letter], "a multiple of 8 from 8 to 576")
    if size["W"] * size["S"] > check.MAX_INT32:
        raise a.fail("W x S", size["W"] * size["S"], f"at most {check.MAX_INT32} tokens a sequence")
    for letter in ("B", "P", "T"):
        if letter in size:
            a.fits(letter)
    if sinks is not None:
        a.tensor("sinks", sinks, "Hq", (torch.float32, q.dtype))
    check_scales(a, k_scale, v_scale, k.dtype)
    if tree_mask is not None:
        a.tensor("tree_mask", tree_mask, "B Q Q", (torch.bool,))
    a.tensor("out", out, q_letters.replace("D", "Dv"), (q.dtype,))
    if lse is not None:
        a.tensor("lse", lse, q_letters.rsplit(" ", 1)[0], (torch.float32,))
        if not lse.is_contiguous():
            raise a.fail("lse's layout", f"strides {lse.stride()}", "contiguous")
    return AttentionSig(
        op=op,
        device=q.device,
        q_dtype=q.dtype,
        kv_dtype=k.dtype,
        B=size["B"],
        T=size["T"] if "T" in size else size["B"] * size["Q"],
        Q=size.get("Q", 0),
        Hq=size["Hq"],
        Hkv=size["Hkv"],
        D=size["D"],
        Dv=size["Dv"],
        P=size["P"],
        S=size["S"],
        W=size["W"],
        q_stride=q.stride(),
        k_stride=k.stride(),
        v_stride=v.stride(),
        pages_stride=pages.stride(0),
        out_stride=out.stride(),
        aligned=check.aligned16(q, k, v, out),
        scale=scale,
        out_scale=out_scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sinks=None if sinks is None else sinks.dtype,
        k_scale=k_scale is not None,
        v_scale=v_scale is not None,
        tree_mask=tree_mask is not None,
        lse=lse is not None,
        batch_invariant=batch_invariant,
    )
