"""FlashAttention-3, FlashInfer, FlashMLA and torch's own attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit.workload import Inputs
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Paged, Prefill
from perf.peers.base import Call, module, need


def _plain(case: Paged) -> None:
    need(case.softcap == 0 and not case.sinks)


def fa3(case: Decode | Prefill, x: Inputs) -> Call:
    fa = module("flash_attn_interface")
    need(case.dtype in ("bf16", "fp16") and case.kv in ("", "fp8") and not getattr(case, "tree", False))
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
    need(case.dtype == "bf16" and not case.window and not case.tree and case.Q == 1 and case.value_size == case.D)
    need((case.kv == "" and case.D in (64, 128, 256)) or (case.kv == "fp8" and case.D == 128))
    q, out = x["q"].squeeze(1), torch.empty_like(x["out"]).squeeze(1)
    wrapper = fi.BatchDecodeWithPagedKVCacheWrapper(_workspace(q.device), "NHD", use_tensor_cores=True)
    wrapper.plan(*_pages(case, x), case.Hq, case.Hkv, case.D, case.S, q_data_type=q.dtype, kv_data_type=x["k"].dtype)
    kv = (x["k"], x["v"])
    return lambda: wrapper.run(q, kv, out=out).unsqueeze(1)


def flashinfer_prefill(case: Prefill | Decode, x: Inputs) -> Call:
    fi = module("flashinfer")
    _plain(case)
    need(case.dtype == "bf16" and not case.window and not case.kv and case.value_size == case.D)
    need(case.D in (64, 128, 256) and not getattr(case, "tree", False))
    q = x["q"].flatten(0, 1) if isinstance(case, Decode) else x["q"]
    cu = torch.arange(case.B + 1, dtype=torch.int32) * case.Q if isinstance(case, Decode) else x["cu_q"].cpu()
    need(not isinstance(case, Decode) or case.Q > 1)
    wrapper = fi.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD", backend="fa3")
    wrapper.plan(
        cu, *_pages(case, x), case.Hq, case.Hkv, case.D, case.S, causal=True, q_data_type=q.dtype, kv_data_type=x["k"].dtype
    )
    kv, out, shape = (x["k"], x["v"]), torch.empty_like(q), x["out"].shape
    return lambda: wrapper.run(q, kv, out=out).view(shape)


def flashmla(case: MlaDecode, x: Inputs) -> Call:
    fm = module("flash_mla")
    need(case.S == 64 and (case.C, case.R) == (512, 64) and case.dtype == "bf16" and not case.kv)
    q, kv, scale = x["q"], x["kv"].unsqueeze(2), (128 + case.R) ** -0.5
    meta, splits = fm.get_mla_metadata(x["lens"], case.Q * case.H, 1)
    table, lens = x["pages"], x["lens"]
    return lambda: fm.flash_mla_with_kvcache(
        q, kv, table, lens, case.C, meta, splits, softmax_scale=scale, causal=True
    )[0]  # fmt: skip


def flashinfer_mla(case: MlaDecode, x: Inputs) -> Call:
    fi = module("flashinfer")
    need((case.C, case.R) == (512, 64) and case.dtype == "bf16" and not case.kv)
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
    need(isinstance(case.L, int) and not case.kv and not case.window)
    _plain(case)
    return tuple(  # type: ignore[return-value]
        t[x["pages"].long()].flatten(1, 2)[:, : case.L].transpose(1, 2).contiguous() for t in (x["k"], x["v"])
    )


def sdpa_decode(case: Decode, x: Inputs) -> Call:
    """torch's attention on contiguous keys, the heads of a group as its queries: its best form for one token."""
    need(case.Q == 1 and not case.tree)
    k, v = _contiguous(case, x)
    q, shape = x["q"].view(case.B, case.Hkv, -1, case.D), x["out"].shape
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v).reshape(shape)


def sdpa_prefill(case: Prefill, x: Inputs) -> Call:
    """torch's attention on contiguous keys, already repeated for every head: its best form on a CPU."""
    need(not case.n and isinstance(case.L, int))
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
