"""mla_decode and mla_prefill: multi-head latent attention (DeepSeek-V2), absorbed and expanded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import attention, check, registry, settings
from attnkit.backends import torch_ref
from attnkit.backends.cpu import attention as cpu_attention
from attnkit.backends.cuda import mla_narrow, mla_short, mla_wide, mla_wide_fp8
from attnkit.backends.cuda import mla_prefill as cuda_mla_prefill
from attnkit.backends.triton import mla as triton_mla
from attnkit.cache import PageTable
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.roofline import Cost
from attnkit.signature import MlaSig, RaggedSig

DECODE, PREFILL = "mla_decode", "mla_prefill"
DECODE_KERNELS = (
    mla_narrow.MLA_DECODE,
    mla_short.MLA_DECODE,
    mla_wide.MLA_DECODE,
    mla_wide_fp8.MLA_DECODE,
    triton_mla.MLA_DECODE,
    cpu_attention.MLA_DECODE,
    torch_ref.MLA_DECODE,
)
PREFILL_KERNELS = (cuda_mla_prefill.MLA_PREFILL, triton_mla.MLA_PREFILL, cpu_attention.MLA_PREFILL, torch_ref.MLA_PREFILL)
MAX_QUERIES = 16
#: DeepSeek's head size before rope: what the absorbed form's default scale needs and cannot see.
NOPE = 128
_DECODE_PLANS = PlanCache()
_PREFILL_PLANS = PlanCache()


def mla_decode(
    q: Tensor,
    kv: Tensor,
    table: PageTable,
    *,
    latent: int = 512,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    tree_mask: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Absorbed latent attention: every head reads the one latent row of a token (DeepSeek-V2, section 2.1).

    q       [B, H, C+R], or [B, Q, H, C+R] for 1 to 16 new tokens: the absorbed query, then its rope part
    kv      [P, S, C+R]: the latent (C = ``latent`` columns) then the shared rope key, as vLLM lays it out; q's dtype.
            Or uint8 [P, S, 656], the fp8 cache that write_latent fills (C = 512 and R = 64; q of any dtype)
    table   PageTable(pages [B, W] int32, lens [B] int32); lens counts the new tokens too
    scale   factor on q.k (default 1 / sqrt(128 + R), right for DeepSeek's heads of 128 + 64; the absorbed
            form cannot know the model's own head size, so pass it for other models)

    The other options are as in paged_decode. Returns [..., H, C]: the latent output, still to be taken
    through the value up-projection (and lse [..., H] float32).
    """
    pages, lens = table
    if q.dim() not in (3, 4):
        raise ValueError(f"{DECODE}: q's shape is {list(q.shape)}, wanted [B, H, C+R] or [B, Q, H, C+R]")
    if out is None:
        out = q.new_empty((*q.shape[:-1], latent))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else None
    q4, out4, lse3 = q, out, lse
    if q.dim() == 3:
        q4, out4 = q.unsqueeze(1), out.unsqueeze(1)
        lse3 = None if lse is None else lse.unsqueeze(1)
    if tree_mask is not None and tree_mask.dim() == 2:
        tree_mask = tree_mask.expand(q4.shape[0], -1, -1)
    window, softcap = attention.options(DECODE, window, softcap)
    scale = attention.softmax_scale(DECODE, scale, (NOPE + max(q.shape[-1] - latent, 0)) ** -0.5)
    arguments = (q4, kv, pages, lens, sinks, tree_mask, out4, lse3)
    static = (latent, scale, window, softcap, batch_invariant, impl)
    if config is None and registry.traced(q):
        _decode_op(*arguments, *static)
    else:
        _run_decode(*arguments, *static, config)
    return out if lse is None else (out, lse)


def _run_decode(q, kv, pages, lens, sinks, tree_mask, out, lse,
                latent, scale, window, softcap, batch_invariant, impl, config=None) -> None:  # fmt: skip
    tensors = (q, kv, pages, lens, sinks, tree_mask, out, lse)
    static = (latent, scale, window, softcap, batch_invariant, impl, config)
    key = call_key(tensors, static)
    plan = _DECODE_PLANS.get(key)
    if plan is None:
        plan = _DECODE_PLANS.put(key, make_plan(DECODE_KERNELS, _decode_signature(tensors, static), impl, config))
    check.inference_only(DECODE, q, kv)
    if settings.get().debug:
        check.table_values(DECODE, pages, lens, kv.shape[0], kv.shape[1])
    if out.numel():
        plan.launch(plan, *tensors)


def _decode_signature(tensors, static) -> MlaSig:
    q, kv, pages, lens, sinks, tree_mask, out, lse = tensors
    latent, scale, window, softcap, batch_invariant, _, _ = static
    a = check.Letters(DECODE, q.device)
    a.tensor("q", q, "B Q H C+R", check.FLOATS)
    fp8 = isinstance(kv, Tensor) and kv.dtype == torch.uint8
    if fp8:
        a.tensor("kv", kv, f"P S {attention.LATENT_ROW}", (torch.uint8,))
    else:
        a.tensor("kv", kv, "P S C+R", (q.dtype, torch.uint8))
    a.tensor("table.pages", pages, "B W", (torch.int32,))
    a.tensor("table.lens", lens, "B", (torch.int32,))
    n = a.size
    if not 1 <= n["Q"] <= MAX_QUERIES:
        raise a.fail("Q", n["Q"], f"1 to {MAX_QUERIES} query tokens")
    if not 1 <= n["S"] <= 256 or not check.is_power_of_two(n["S"]):
        raise a.fail("S (tokens in a page)", n["S"], "a power of two from 1 to 256")
    if latent % 16 or not 16 <= latent <= 512:
        raise a.fail("latent", latent, "a multiple of 16 from 16 to 512")
    rope = n["C+R"] - latent
    if rope % 16 or not 0 <= rope <= 128:
        raise a.fail("C+R", n["C+R"], f"latent = {latent} plus a multiple of 16 up to 128")
    if fp8 and (latent, rope) != (attention.LATENT, attention.LATENT_ROPE):
        wanted = f"{attention.LATENT} + {attention.LATENT_ROPE} with an fp8 cache"
        raise a.fail("latent and rope sizes", f"{latent} + {rope}", wanted)
    if not 1 <= n["H"] <= 256:
        raise a.fail("H", n["H"], "1 to 256 heads")
    a.bind("C", latent, "latent")
    a.tensor("out", out, "B Q H C", (q.dtype,))
    if sinks is not None:
        a.tensor("sinks", sinks, "H", (torch.float32, q.dtype))
    if tree_mask is not None:
        a.tensor("tree_mask", tree_mask, "B Q Q", (torch.bool,))
    if lse is not None:
        a.tensor("lse", lse, "B Q H", (torch.float32,))
    return MlaSig(
        op=DECODE, device=q.device, q_dtype=q.dtype, kv_dtype=kv.dtype, B=n["B"], Q=n["Q"], H=n["H"], C=latent, R=rope,
        P=n["P"], S=n["S"], W=n["W"], q_stride=q.stride(), kv_stride=kv.stride(), pages_stride=pages.stride(0),
        out_stride=out.stride(), aligned=check.aligned16(q, kv, out), scale=scale, causal=True, window=window,
        softcap=softcap, sinks=None if sinks is None else sinks.dtype, tree_mask=tree_mask is not None,
        lse=lse is not None, batch_invariant=batch_invariant,
    )  # fmt: skip


_decode_op = registry.define(
    "mla_decode(Tensor q, Tensor kv, Tensor pages, Tensor lens, Tensor? sinks, Tensor? tree_mask, Tensor(a!) out,"
    " Tensor(b!)? lse, int latent, float scale, int window, float softcap, bool batch_invariant, str? impl) -> ()",
    _run_decode,
)


def mla_prefill(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    window: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    batch_invariant: bool = False,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Expanded latent attention, ragged and without pages: head sizes of q and k (192) and of v (128) differ.

    q      [T, H, D], k [N, Hk, D], v [N, Hk, Dv]; H a multiple of Hk; bf16, fp16 or fp32
    cu_q   [B + 1] int32, cu_k [B + 1] int32: sequence b owns queries cu_q[b] to cu_q[b + 1] and keys likewise
    causal aligned to the end of each sequence's keys

    The other options are as in paged_prefill. Returns [T, H, Dv] (and lse [T, H] float32). Serves any
    ragged attention without a paged cache, also with D = Dv.
    """
    if q.dim() != 3 or v.dim() != 3:
        raise ValueError(f"{PREFILL}: q's shape is {list(q.shape)} and v's {list(v.shape)}, wanted [T, H, D] and [N, Hk, Dv]")
    if out is None:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
    lse = q.new_empty(q.shape[:-1], dtype=torch.float32) if return_lse else None
    window, softcap = attention.options(PREFILL, window, softcap)
    scale = attention.softmax_scale(PREFILL, scale, q.shape[-1] ** -0.5)
    arguments = (q, k, v, cu_q, cu_k, sinks, out, lse)
    static = (scale, causal, window, softcap, batch_invariant, impl)
    if config is None and registry.traced(q):
        _prefill_op(*arguments, *static)
    else:
        _run_prefill(*arguments, *static, config)
    return out if lse is None else (out, lse)


def _run_prefill(q, k, v, cu_q, cu_k, sinks, out, lse,
                 scale, causal, window, softcap, batch_invariant, impl, config=None) -> None:  # fmt: skip
    tensors = (q, k, v, cu_q, cu_k, sinks, out, lse)
    static = (scale, causal, window, softcap, batch_invariant, impl, config)
    key = call_key(tensors, static)
    plan = _PREFILL_PLANS.get(key)
    if plan is None:
        plan = _PREFILL_PLANS.put(key, make_plan(PREFILL_KERNELS, _prefill_signature(tensors, static), impl, config))
    check.inference_only(PREFILL, q, k, v)
    if settings.get().debug:
        check.cumulative_values(PREFILL, "cu_q", cu_q, q.shape[0])
        check.cumulative_values(PREFILL, "cu_k", cu_k, k.shape[0])
    if out.numel():
        plan.launch(plan, *tensors)


def _prefill_signature(tensors, static) -> RaggedSig:
    q, k, v, cu_q, cu_k, sinks, out, lse = tensors
    scale, causal, window, softcap, batch_invariant, _, _ = static
    a = check.Letters(PREFILL, q.device)
    a.tensor("q", q, "T H D", check.FLOATS)
    a.tensor("k", k, "N Hk D", (q.dtype,))
    a.tensor("v", v, "N Hk Dv", (q.dtype,))
    a.tensor("cu_q", cu_q, "B+1", (torch.int32,))
    a.tensor("cu_k", cu_k, "B+1", (torch.int32,))
    n = a.size
    if n["B+1"] < 1:
        raise a.fail("cu_q's length", n["B+1"], "B + 1, at least 1")
    if n["Hk"] < 1 or n["H"] % n["Hk"]:
        raise a.fail("H", n["H"], f"a multiple of Hk = {n['Hk']}")
    for letter in ("D", "Dv"):
        if n[letter] % 8 or not 8 <= n[letter] <= 576:
            raise a.fail(letter, n[letter], "a multiple of 8 from 8 to 576")
    a.fits("T")
    a.fits("N")
    a.tensor("out", out, "T H Dv", (q.dtype,))
    if sinks is not None:
        a.tensor("sinks", sinks, "H", (torch.float32, q.dtype))
    if lse is not None:
        a.tensor("lse", lse, "T H", (torch.float32,))
    return RaggedSig(
        op=PREFILL, device=q.device, dtype=q.dtype, B=n["B+1"] - 1, T=n["T"], N=n["N"], H=n["H"], Hk=n["Hk"], D=n["D"],
        Dv=n["Dv"], q_stride=q.stride(), k_stride=k.stride(), v_stride=v.stride(), out_stride=out.stride(),
        aligned=check.aligned16(q, k, v, out), scale=scale, causal=causal, window=window, softcap=softcap,
        sinks=None if sinks is None else sinks.dtype, lse=lse is not None, batch_invariant=batch_invariant,
    )  # fmt: skip


_prefill_op = registry.define(
    "mla_prefill(Tensor q, Tensor k, Tensor v, Tensor cu_q, Tensor cu_k, Tensor? sinks, Tensor(a!) out, Tensor(b!)? lse,"
    " float scale, bool causal, int window, float softcap, bool batch_invariant, str? impl) -> ()",
    _run_prefill,
)


def decode_cost(lens: list[int], Q: int, H: int, C: int, R: int, row_bytes: int, q_bytes: int) -> Cost:
    """Ideal work of mla_decode: each latent row of ``row_bytes`` read once for all heads."""
    tokens = sum(lens)
    flops = 2 * Q * H * (2 * C + R) * tokens
    return Cost(flops=flops, bytes=tokens * row_bytes + len(lens) * Q * H * (2 * C + R) * q_bytes, kind="bf16")
