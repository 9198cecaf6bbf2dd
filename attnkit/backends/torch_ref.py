"""impl="torch": the reference in float32, on any device. Reads lens on the host, so it synchronises and cannot be captured."""

from __future__ import annotations

import torch

from attnkit import reference
from attnkit.dispatch import Kernel, Plan


def _any(sig) -> str | None:
    return None


def _options(sig) -> dict:
    return {
        "scale": sig.scale,
        "causal": sig.causal,
        "window": sig.window,
        "softcap": sig.softcap,
        "compute": torch.float32,
    }


def _put(out, lse, result) -> None:
    out.copy_(result[0].view(out.shape))
    if lse is not None:
        lse.copy_(result[1].view(lse.shape))


def _prefill(plan: Plan, q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse) -> None:
    result = reference.paged_attention(
        q,
        k,
        v,
        pages,
        lens,
        cu_q,
        out_scale=plan.sig.out_scale,
        sinks=sinks,
        k_scale=k_scale,
        v_scale=v_scale,
        **_options(plan.sig),
    )
    _put(out, lse, result)


def _every(q: torch.Tensor) -> torch.Tensor:
    """cu_q of decode: Q queries a sequence."""
    return torch.arange(q.shape[0] + 1, dtype=torch.int32, device=q.device) * q.shape[1]


def _decode(plan: Plan, q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse) -> None:
    result = reference.paged_attention(
        q.flatten(0, 1), k, v, pages, lens, _every(q), out_scale=plan.sig.out_scale, sinks=sinks, k_scale=k_scale,
        v_scale=v_scale, tree_mask=tree_mask, **_options(plan.sig),
    )  # fmt: skip
    _put(out, lse, result)


def _mla_decode(plan: Plan, q, kv, pages, lens, sinks, tree_mask, out, lse) -> None:
    if kv.dtype == torch.uint8:
        kv = reference.dequantise_latent(kv, torch.float32)
    k = kv.unsqueeze(2)
    result = reference.paged_attention(
        q.flatten(0, 1),
        k,
        k[..., : plan.sig.C],
        pages,
        lens,
        _every(q),
        sinks=sinks,
        tree_mask=tree_mask,
        **_options(plan.sig),
    )
    _put(out, lse, result)


def _mla_prefill(plan: Plan, q, k, v, cu_q, cu_k, sinks, out, lse) -> None:
    _put(out, lse, reference.ragged_attention(q, k, v, cu_q, cu_k, sinks=sinks, **_options(plan.sig)))


def _gemm(plan: Plan, a, w, a_scale, w_scale, bias, out) -> None:
    out.copy_(reference.w8a8_gemm(a, w, a_scale, w_scale, bias))


def _quantize(plan: Plan, x, out, scale) -> None:
    values, scales = reference.quantize_per_token(x, out.dtype)
    out.copy_(values)
    scale.copy_(scales)


def _rms_norm_quantize(plan: Plan, x, weight, residual, out, scale) -> None:
    values, scales, total = reference.rms_norm_quantize(x, weight, plan.sig.eps, residual, out.dtype)
    if residual is not None:
        residual.copy_(total)
    out.copy_(values)
    scale.copy_(scales)


def _silu_mul_quantize(plan: Plan, x, out, scale) -> None:
    values, scales = reference.silu_mul_quantize(x, out.dtype)
    out.copy_(values)
    scale.copy_(scales)


def _sample(plan: Plan, logits, seeds, options, tokens, valid, logprobs, top_ids) -> None:
    sig, full = plan.sig, dict(options)
    for name in ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"):
        full.setdefault(name, torch.full((sig.B,), getattr(sig, name) or 0.0, device=logits.device))
    for name in ("top_k", "offset"):
        full.setdefault(name, torch.full((sig.B,), getattr(sig, name) or 0, dtype=torch.int64, device=logits.device))
    results = reference.sample(logits, seeds, full, sig.logprobs)
    for target, result in zip((tokens, valid, logprobs, top_ids), results):
        if target is not None:
            target.copy_(result)


def _write(plan: Plan, k, v, k_cache, v_cache, slots, k_scale, v_scale) -> None:
    reference.write_kv(k, v, k_cache, v_cache, slots, k_scale, v_scale)


def _write_latent(plan: Plan, latent, rope, cache, slots) -> None:
    reference.write_latent(latent, rope, cache, slots)


def _merge(plan: Plan, out_a, lse_a, out_b, lse_b, out, lse) -> None:
    _put(out, lse, reference.merge_states(out_a, lse_a, out_b, lse_b))


PAGED_PREFILL = Kernel("torch", "torch", _any, _prefill)
PAGED_DECODE = Kernel("torch", "torch", _any, _decode)
MLA_DECODE = Kernel("torch", "torch", _any, _mla_decode)
MLA_PREFILL = Kernel("torch", "torch", _any, _mla_prefill)
W8A8_GEMM = Kernel("torch", "torch", _any, _gemm)
QUANTIZE = Kernel("torch", "torch", _any, _quantize)
RMS_NORM_QUANTIZE = Kernel("torch", "torch", _any, _rms_norm_quantize)
SILU_MUL_QUANTIZE = Kernel("torch", "torch", _any, _silu_mul_quantize)
SAMPLE = Kernel("torch", "torch", _any, _sample)
WRITE_KV = Kernel("torch", "torch", _any, _write)
WRITE_LATENT = Kernel("torch", "torch", _any, _write_latent)
MERGE = Kernel("torch", "torch", _any, _merge)
