"""Who else computes the same: each peer is used where it imports, and only after its answer was compared.

A maker takes a case and one set of inputs and returns a call that gives the case's output (or raises
Unsuited). What a peer must prepare on the host (FlashInfer's plan, FlashAttention's schedule) is prepared
here, outside of the time: it is the peer at its best. FlashInfer is kept from compiling anything.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnkit import reference
from attnkit.roofline import product_rate
from attnkit.workload import Case, Gemm, Inputs, Quantize, Sample
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Paged, Prefill
from attnkit.workload_cache import Merge, WriteKv
from attnkit.workload_quantize import QuantizedLinear, RmsNormQuantize, SiluMulQuantize

Call = Callable[[], Any]
Maker = Callable[[Any, Inputs], Call]


class Unsuited(Exception):
    """The peer does not do this case."""


@cache
def module(name: str) -> Any:
    """An optional module, or None."""
    os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    try:
        return importlib.import_module(name)
    except Exception:  # a peer built for another torch fails in its own ways
        return None


def _need(holds: bool) -> None:
    if not holds:
        raise Unsuited


def _plain(case: Paged) -> None:
    _need(case.softcap == 0 and not case.sinks)


# ---------------------------------------------------------------- attention


def fa3(case: Decode | Prefill, x: Inputs) -> Call:
    fa = module("flash_attn_interface")
    _need(case.dtype in ("bf16", "fp16") and case.kv in ("", "fp8") and not getattr(case, "tree", False))
    q, k, v = x["q"], x["k"], x["v"]
    B, lens = case.B, x["lens"]
    if isinstance(case, Decode):
        n = case.Q
        cu = torch.arange(B + 1, dtype=torch.int32, device=q.device) * n
        flat = q.flatten(0, 1)
    else:
        cu, flat, n = x["cu_q"], q, max(case.queries())
    longest = int(lens.max())
    extra: dict[str, Any] = {"window_size": (case.window - 1, 0) if case.window else (-1, -1), "softcap": case.softcap}
    if case.sinks:
        extra["s_aux"] = x["sinks"].to(q.dtype)
    kind = q.dtype
    if case.kv:  # FlashAttention-3 takes an fp8 cache with fp8 queries only
        kind = torch.float8_e4m3fn
        flat = flat.to(kind)
        one = torch.ones(B, case.Hkv, device=q.device)
        extra |= {"q_descale": one, "k_descale": one, "v_descale": one}
    schedule = fa.get_scheduler_metadata(
        B, n, longest, case.Hq, case.Hkv, case.D, lens, qkv_dtype=kind, headdim_v=case.value_size, cu_seqlens_q=cu,
        page_size=case.S, causal=True, window_size=extra["window_size"],
    )  # fmt: skip
    shape = x["out"].shape

    def run() -> Tensor:
        return fa.flash_attn_varlen_func(
            flat, k, v, n, cu, longest, lens, x["pages"], causal=True, scheduler_metadata=schedule, **extra
        ).view(shape)

    return run


_workspaces: dict[torch.device, Tensor] = {}


def _workspace(device: torch.device) -> Tensor:
    if device not in _workspaces:
        _workspaces[device] = torch.zeros(256 << 20, dtype=torch.uint8, device=device)
    return _workspaces[device]


def _pages(case: Any, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """FlashInfer's form of a page table: indptr, indices, last_page_len."""
    lens = x["lens"].tolist()
    counts = [-(-n // case.S) for n in lens]
    indptr = torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32)
    indices = torch.cat([x["pages"][b, :count] for b, count in enumerate(counts)])
    last = torch.tensor([(n - 1) % case.S + 1 for n in lens], dtype=torch.int32)
    return indptr, indices, last


def flashinfer_decode(case: Decode, x: Inputs) -> Call:
    fi = module("flashinfer")
    _plain(case)
    _need(case.dtype == "bf16" and not case.window and not case.tree and case.Q == 1 and case.value_size == case.D)
    _need((case.kv == "" and case.D in (64, 128, 256)) or (case.kv == "fp8" and case.D == 128))
    q, out = x["q"].squeeze(1), torch.empty_like(x["out"]).squeeze(1)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD", use_tensor_cores=True)
    wrapper.plan(*_pages(case, x), case.Hq, case.Hkv, case.D, case.S, q_data_type=q.dtype, kv_data_type=x["k"].dtype)
    kv = (x["k"], x["v"])
    return lambda: wrapper.run(q, kv, out=out).unsqueeze(1)


def flashinfer_prefill(case: Prefill | Decode, x: Inputs) -> Call:
    fi = module("flashinfer")
    _plain(case)
    _need(case.dtype == "bf16" and not case.window and not case.kv and case.value_size == case.D)
    _need(case.D in (64, 128, 256) and not getattr(case, "tree", False))
    q = x["q"].flatten(0, 1) if isinstance(case, Decode) else x["q"]
    cu = torch.arange(case.B + 1, dtype=torch.int32) * case.Q if isinstance(case, Decode) else x["cu_q"].cpu()
    _need(not isinstance(case, Decode) or case.Q > 1)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD", backend="fa3")
    wrapper.plan(
        cu, *_pages(case, x), case.Hq, case.Hkv, case.D, case.S, causal=True, q_data_type=q.dtype, kv_data_type=x["k"].dtype
    )
    kv, out, shape = (x["k"], x["v"]), torch.empty_like(q), x["out"].shape
    return lambda: wrapper.run(q, kv, out=out).view(shape)


def flashmla(case: MlaDecode, x: Inputs) -> Call:
    fm = module("flash_mla")
    _need(case.S == 64 and (case.C, case.R) == (512, 64) and case.dtype == "bf16" and not case.kv)
    q, kv, scale = x["q"], x["kv"].unsqueeze(2), (128 + case.R) ** -0.5
    meta, splits = fm.get_mla_metadata(x["lens"], case.Q * case.H, 1)
    table, lens = x["pages"], x["lens"]
    return lambda: fm.flash_mla_with_kvcache(
        q, kv, table, lens, case.C, meta, splits, softmax_scale=scale, causal=True
    )[0]  # fmt: skip


def flashinfer_mla(case: MlaDecode, x: Inputs) -> Call:
    fi = module("flashinfer")
    _need((case.C, case.R) == (512, 64) and case.dtype == "bf16" and not case.kv)
    q = x["q"].flatten(0, 1)
    indptr, indices, _ = _pages(case, x)
    wrapper = fi.mla.BatchMLAPagedAttentionWrapper(_workspace(q.device), backend="fa3")
    wrapper.plan(
        torch.arange(case.B + 1, dtype=torch.int32) * case.Q, indptr, indices, x["lens"].cpu(), case.H, case.C, case.R,
        case.S, True, (128 + case.R) ** -0.5, q.dtype, x["kv"].dtype,
    )  # fmt: skip
    parts = q[..., : case.C], q[..., case.C :], x["kv"][..., : case.C], x["kv"][..., case.C :]
    shape, out = x["out"].shape, torch.empty(x["out"].flatten(0, 1).shape, dtype=q.dtype, device=q.device)
    return lambda: wrapper.run(*parts, out=out).view(shape)


def _contiguous(case: Paged, x: Inputs) -> tuple[Tensor, Tensor]:
    """The cache gathered to [B, Hkv, L, D]: what a model without pages would hold."""
    _need(isinstance(case.L, int) and not case.kv and not case.window)
    _plain(case)
    return tuple(  # type: ignore[return-value]
        t[x["pages"].long()].flatten(1, 2)[:, : case.L].transpose(1, 2).contiguous() for t in (x["k"], x["v"])
    )


def sdpa_decode(case: Decode, x: Inputs) -> Call:
    """torch's attention on contiguous keys, the heads of a group as its queries: its best form for one token."""
    _need(case.Q == 1 and not case.tree)
    k, v = _contiguous(case, x)
    q, shape = x["q"].view(case.B, case.Hkv, -1, case.D), x["out"].shape
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).reshape(shape)


def sdpa_prefill(case: Prefill, x: Inputs) -> Call:
    """torch's attention on contiguous keys, already repeated for every head: its best form on a CPU."""
    _need(not case.n and isinstance(case.L, int))
    k, v = (t.repeat_interleave(case.Hq // case.Hkv, 1) for t in _contiguous(case, x))
    q = x["q"].view(case.B, case.L, case.Hq, case.D).transpose(1, 2).contiguous()
    shape = x["out"].shape

    def run() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(shape)

    return run


def sdpa_expanded(case: MlaPrefill, x: Inputs) -> Call:
    q, k, v = (x[name].view(case.B, case.L, case.H, -1).transpose(1, 2).contiguous() for name in ("q", "k", "v"))
    shape = x["out"].shape

    def run() -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(shape)

    return run


# ---------------------------------------------------------------- gemm


def cutlass(case: Gemm, x: Inputs) -> Call:
    ops = module("vllm._custom_ops")
    _need(case.N % 16 == 0 and case.K % 16 == 0)
    a, w, bias = x["a"], x["w"].t(), x["bias"]
    scales = x["a_scale"][:, None], x["w_scale"][None, :]
    return lambda: ops.cutlass_scaled_mm(a, w, *scales, torch.bfloat16, bias)


def better_products(roof: dict[str, float], device: torch.device) -> dict[str, float]:
    """Where a peer multiplies large matrices faster than torch does, its rate is the roof."""
    if device.type != "cuda" or module("vllm._custom_ops") is None:
        return {}
    found = {}
    for kind in ("int8", "fp8"):
        case = Gemm(M=8192, N=8192, K=8192, dtype=kind)
        found[kind] = max(roof.get(kind, 0.0), product_rate(cutlass(case, case.build(device)), 8192, device))
    return found


def cutlass_quant(case: Quantize, x: Inputs) -> Call:
    return _vllm_quant(case.dtype, x["x"], torch.empty_like(x["out"]))


def _vllm_quant(dtype: str, data: Tensor, out: Tensor) -> Call:
    """A scale a row: scaled_int8_quant's kernel, or scaled_fp8_quant's."""
    scale = torch.empty(data.shape[0], 1, device=data.device)
    if dtype == "int8":
        return lambda: (torch.ops._C.dynamic_scaled_int8_quant(out, data, scale, None), (out, scale))[1]
    return lambda: (torch.ops._C.dynamic_per_token_scaled_fp8_quant(out, data, scale, None), (out, scale))[1]


def vllm_rms_norm_quant(case: RmsNormQuantize, x: Inputs) -> Call:
    """One kernel too: it adds the residual in place, and rounds the norm to 16 bits before it quantises."""
    data, weight, residual, out = x["x"], x["weight"], x["residual"], torch.empty_like(x["out"])
    scale = torch.empty(case.M, 1, device=data.device)

    def run() -> tuple[Tensor, Tensor]:
        torch.ops._C.rms_norm_dynamic_per_token_quant(out, data, weight, scale, case.eps, None, residual)
        return out, scale

    return run


def vllm_silu_mul_quant(case: SiluMulQuantize, x: Inputs) -> Call:
    """Two kernels: it has none that does both with a scale a token."""
    data, y = x["x"], torch.empty(case.M, case.K, dtype=x["x"].dtype, device=x["x"].device)
    quant = _vllm_quant(case.dtype, y, torch.empty_like(x["out"]))

    def run() -> tuple[Tensor, Tensor]:
        torch.ops._C.silu_and_mul(y, data)
        return quant()

    return run


def _torch_quant(y: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    top = 127.0 if dtype == torch.int8 else 448.0
    scale = (y.abs().amax(1, keepdim=True).float() / top).clamp_(min=1e-30)
    scaled = y / scale
    return (scaled.round_() if dtype == torch.int8 else scaled).clamp_(-top, top).to(dtype), scale


def torch_fused(case: RmsNormQuantize | SiluMulQuantize, x: Inputs) -> Call:
    """The same in torch's own operations, one after another."""
    data, dtype, f = x["x"], x["out"].dtype, torch.nn.functional
    if isinstance(case, SiluMulQuantize):
        gate, up = data.chunk(2, 1)
        return lambda: _torch_quant(f.silu(gate) * up, dtype)
    weight, residual = x["weight"], x["residual"]
    return lambda: _torch_quant(
        f.rms_norm(data if residual is None else residual.add_(data), weight.shape, weight, case.eps), dtype
    )


def bf16_linear(case: QuantizedLinear, x: Inputs) -> Call:
    """What quantising is there to beat: the product of the bf16 values themselves."""
    data, dense = x["x"], x["dense"]
    return lambda: torch.nn.functional.linear(data, dense)


def torch_int_mm(case: Gemm, x: Inputs) -> Call:
    _need(case.dtype == "int8" and (case.M > 16 or x["a"].device.type == "cpu") and not case.N % 8 and not case.K % 8)
    a, w, bias = x["a"], x["w"].t(), x["bias"]
    a_scale, w_scale = x["a_scale"][:, None], x["w_scale"][None, :]

    def run() -> Tensor:
        out = torch._int_mm(a, w) * a_scale * w_scale
        return (out if bias is None else out + bias).to(torch.bfloat16)

    return run


def torch_scaled_mm(case: Gemm, x: Inputs) -> Call:
    _need(case.dtype == "fp8" and not case.bias and x["a"].device.type == "cuda")
    a, w = x["a"], x["w"].t()
    a_scale, w_scale = x["a_scale"][:, None], x["w_scale"][None, :]
    return lambda: torch._scaled_mm(a, w, scale_a=a_scale, scale_b=w_scale, out_dtype=torch.bfloat16)


def torch_linear(case: Gemm, x: Inputs) -> Call:
    """bf16 weights and activations of the same values: what quantising is meant to beat."""
    a = (x["a"].float() * x["a_scale"][:, None]).bfloat16()
    w = torch.empty(x["w"].shape, dtype=torch.bfloat16, device=a.device)
    for rows in range(0, w.shape[0], 4096):
        part = slice(rows, rows + 4096)
        w[part] = (x["w"][part].float() * x["w_scale"][part, None]).bfloat16()
    bias = x["bias"]
    return lambda: torch.nn.functional.linear(a, w, bias)


# ---------------------------------------------------------------- sampling


def flashinfer_sampling(case: Sample, x: Inputs) -> Call:
    fi = module("flashinfer")
    _need(case.dtype == "fp32" and not case.penalties and case.temperature > 0)
    logits, temperature = x["logits"], x["temperature"]
    s = fi.sampling
    if not case.top_k and case.top_p == 1 and not case.min_p:
        return lambda: s.sampling_from_logits(logits, deterministic=True)
    if case.min_p:
        _need(not case.top_k and case.top_p == 1)
        return lambda: s.min_p_sampling_from_probs(s.softmax(logits, temperature), x["min_p"])
    if case.top_k:
        k, p = x["top_k"].int(), x.get("top_p", torch.ones_like(temperature))
        return lambda: s.top_k_top_p_sampling_from_probs(s.softmax(logits, temperature), k, p, filter_apply_order="joint")
    return lambda: s.top_p_sampling_from_probs(s.softmax(logits, temperature), x["top_p"])


def torch_sort(case: Sample, x: Inputs) -> Call:
    """The sampler every engine starts with: sort, mask, softmax, draw."""
    _need(not case.penalties and case.temperature > 0)
    logits, t = x["logits"], x["temperature"][:, None]

    def run() -> Tensor:
        z = logits.float() / t
        if case.top_k or case.top_p < 1:
            z, order = z.sort(dim=-1, descending=True)
            if case.top_k:
                z = z.masked_fill(torch.arange(case.V, device=z.device) >= x["top_k"][:, None], -float("inf"))
            p = z.softmax(-1)
            if case.top_p < 1:
                p = p.masked_fill(p.cumsum(-1) - p >= x["top_p"][:, None], 0.0)
        else:
            p, order = z.softmax(-1), None
        if case.min_p:
            p = p.masked_fill(p < case.min_p * p.amax(-1, keepdim=True), 0.0)
        token = (p / torch.empty_like(p).exponential_()).argmax(-1)
        return token if order is None else order.gather(1, token[:, None])[:, 0]

    return run


def torch_argmax(case: Sample, x: Inputs) -> Call:
    _need(not case.penalties and case.temperature == 0)
    logits = x["logits"]
    return lambda: logits.argmax(-1)


# ---------------------------------------------------------------- cache


def torch_write(case: WriteKv, x: Inputs) -> Call:
    """An indexed write of keys and one of values."""
    _need(not case.kv)
    k, v, kv, at = x["k"], x["v"], x["out"], (x["slots"] // case.S, x["slots"] % case.S)

    def run() -> None:
        kv[:, 0][at] = k
        kv[:, 1][at] = v

    return run


def torch_merge(case: Merge, x: Inputs) -> Call:
    parts = (x["a"], x["lse_a"], x["b"], x["lse_b"])
    return lambda: reference.merge_states(*parts)[0].to(x["a"].dtype)


#: (op, device type, name shown, module it needs, maker)
PEERS: tuple[tuple[str, str, str, str | None, Maker], ...] = (
    ("paged_prefill", "cuda", "FA3", "flash_attn_interface", fa3),
    ("paged_prefill", "cuda", "FlashInfer", "flashinfer", flashinfer_prefill),
    ("paged_prefill", "cpu", "SDPA", None, sdpa_prefill),
    ("paged_decode", "cuda", "FA3", "flash_attn_interface", fa3),
    ("paged_decode", "cuda", "FlashInfer", "flashinfer", flashinfer_decode),
    ("paged_decode", "cuda", "FlashInfer", "flashinfer", flashinfer_prefill),
    ("paged_decode", "cpu", "SDPA", None, sdpa_decode),
    ("mla_decode", "cuda", "FlashMLA", "flash_mla", flashmla),
    ("mla_decode", "cuda", "FlashInfer", "flashinfer", flashinfer_mla),
    ("mla_prefill", "any", "SDPA", None, sdpa_expanded),
    ("w8a8_gemm", "cuda", "CUTLASS", "vllm._custom_ops", cutlass),
    ("w8a8_gemm", "any", "_int_mm", None, torch_int_mm),
    ("w8a8_gemm", "cuda", "_scaled_mm", None, torch_scaled_mm),
    ("w8a8_gemm", "any", "bf16 linear", None, torch_linear),
    ("quantize_per_token", "cuda", "vLLM", "vllm._custom_ops", cutlass_quant),
    ("rms_norm_quantize", "cuda", "vLLM", "vllm._custom_ops", vllm_rms_norm_quant),
    ("rms_norm_quantize", "any", "torch", None, torch_fused),
    ("silu_mul_quantize", "cuda", "vLLM", "vllm._custom_ops", vllm_silu_mul_quant),
    ("silu_mul_quantize", "any", "torch", None, torch_fused),
    ("quantized_linear", "any", "bf16 linear", None, bf16_linear),
    ("sample", "cuda", "FlashInfer", "flashinfer", flashinfer_sampling),
    ("sample", "any", "torch sort", None, torch_sort),
    ("sample", "any", "torch argmax", None, torch_argmax),
    ("write_kv", "any", "torch", None, torch_write),
    ("merge_states", "any", "torch", None, torch_merge),
)


def makers(case: Case, device: torch.device) -> dict[str, Maker]:
    """The peers that can be tried on this case here, by name."""
    found: dict[str, Maker] = {}
    for op, kind, name, needs, maker in PEERS:
        if op != case.op or kind not in ("any", device.type) or (needs is not None and module(needs) is None):
            continue
        if name in found:  # two forms of one peer: the first that suits
            first = found[name]
            found[name] = lambda c, x, first=first, second=maker: _either(c, x, first, second)
        else:
            found[name] = maker
    return found


def _either(case: Case, x: Inputs, first: Maker, second: Maker) -> Call:
    try:
        return first(case, x)
    except Unsuited:
        return second(case, x)


#: Peers round where attnkit does not (fp8 queries, bf16 weights), so they may be further off and still count.
PEER_LIMIT = 0.08


def right(case: Case, x: Inputs, call: Call) -> bool:
    """True if a peer's answer is the case's. A sampler draws its own noise: its tokens need only be in range."""
    out = call()
    if isinstance(case, Sample):
        return bool(((out >= 0) & (out < case.V)).all())
    if isinstance(case, Quantize):
        return True
    return case.error(x, out) <= PEER_LIMIT
