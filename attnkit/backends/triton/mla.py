"""mla_decode and mla_prefill by Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch, workspace
from attnkit.backends.triton.decode import decode_tile, run, strides, too_large, unsupported
from attnkit.backends.triton.prefill import prefill_tile
from attnkit.configs import decode as decode_configs
from attnkit.configs import mla as configs
from attnkit.configs import prefill as prefill_configs
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import MlaSig, RaggedSig


def _decode_supports(sig: MlaSig) -> str | None:
    fp8 = sig.kv_dtype == torch.uint8
    reason = unsupported(sig.device, sig.q_dtype, torch.float8_e4m3fn if fp8 else sig.kv_dtype)
    if reason is None and fp8 and not sig.aligned:
        reason = "an fp8 cache whose pointer or strides are not multiples of 16 bytes"
    if reason is None and (sig.C < 16 or sig.C & (sig.C - 1)):
        reason = f"C must be a power of two from 16 on, got {sig.C}"
    if reason is None:
        reason = too_large(configs.decode_smem(configs.decode_default(sig, arch.of(sig.device)), sig), sig.device)
    return reason


def _bind_decode(sig: MlaSig, config: decode_configs.TritonConfig, sinks: Tensor | None, tree_mask: Tensor | None) -> Any:
    from attnkit.triton_kernels import decode, mla

    shape = mla.decode_shape(
        sig.B, sig.Q, sig.H, sig.C, sig.R, sig.S, sig.W * sig.S, sig.q_stride[:3], sig.kv_stride[:2], sig.pages_stride,
        sig.out_stride[:3], sig.scale, tree=None if tree_mask is None else tree_mask.stride(), sinks=strides(sinks)[0],
        softcap=sig.softcap, window=sig.window, invariant=sig.batch_invariant,
    )  # fmt: skip
    return decode.bind(shape, decode_tile(config), arch.of(sig.device).sms * config.ctas, sig.aligned)


def _decode(
    plan: Plan, q: Tensor, kv: Tensor, pages: Tensor, lens: Tensor, sinks: Tensor | None, tree_mask: Tensor | None,
    out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    bound = plan.state.get("bound")
    if bound is None:
        bound = plan.state["bound"] = _bind_decode(plan.sig, plan.config, sinks, tree_mask)
    run(bound, q, kv, kv, pages, lens, sinks, None, None, tree_mask, out, lse)


def _prefill_supports(sig: RaggedSig) -> str | None:
    reason = unsupported(sig.device, sig.dtype)
    if reason is None:
        reason = too_large(configs.prefill_smem(configs.prefill_default(sig, arch.of(sig.device)), sig), sig.device)
    return reason


def _bind_prefill(sig: RaggedSig, config: prefill_configs.TritonConfig, sinks: Tensor | None) -> Any:
    from attnkit.triton_kernels import mla, prefill

    shape = mla.prefill_shape(
        sig.B, sig.T, sig.N, sig.H, sig.Hk, sig.D, sig.Dv, sig.q_stride[:2], sig.k_stride[:2], sig.v_stride[:2],
        sig.out_stride[:2], sig.scale, sinks=strides(sinks)[0], softcap=sig.softcap, window=sig.window, causal=sig.causal,
        invariant=sig.batch_invariant,
    )  # fmt: skip
    return prefill.bind(shape, prefill_tile(config), arch.of(sig.device).sms * config.ctas, sig.aligned)


def _prefill(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sinks: Tensor | None, out: Tensor,
    lse: Tensor | None,
) -> None:  # fmt: skip
    bound = plan.state.get("bound")
    if bound is None:
        bound = plan.state["bound"] = _bind_prefill(plan.sig, plan.config, sinks)
    parts = counters = cu_q  # unused where the keys are not split
    if bound.part_bytes:
        parts = workspace.partials(q.device, bound.part_bytes)
        counters = workspace.counters(q.device, bound.counters)
    bound.launcher(q, k, v, None, None, cu_q, cu_k, sinks, None, None, out, lse, parts, counters)


MLA_DECODE = Kernel("triton", "triton", _decode_supports, _decode, configs.TRITON_DECODE)
MLA_PREFILL = Kernel("triton", "triton", _prefill_supports, _prefill, configs.TRITON_PREFILL)
