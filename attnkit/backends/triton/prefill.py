"""paged_prefill by Triton."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit import arch, workspace
from attnkit.backends.triton.decode import strides, too_large, unsupported
from attnkit.configs import prefill as configs
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import AttentionSig


def _supports(sig: AttentionSig) -> str | None:
    reason = unsupported(sig.device, sig.q_dtype, sig.kv_dtype)
    if reason is None:
        reason = too_large(configs.smem(configs.default(sig, arch.of(sig.device)), sig), sig.device)
    return reason


def prefill_tile(config: configs.TritonConfig) -> Any:
    from attnkit.triton_kernels.prefill import Tile

    return Tile(config.block_m, config.block_n, config.num_warps, config.num_stages, config.min_tiles)


def _bind(sig: AttentionSig, config: configs.TritonConfig, sinks: Tensor | None, k_scale: Tensor | None,
          v_scale: Tensor | None) -> Any:  # fmt: skip
    from attnkit.triton_kernels import prefill

    shape = prefill.Shape(
        B=sig.B, T=sig.T, HKV=sig.Hkv, G=sig.G, S=sig.S, D=sig.D, DV=sig.Dv, capacity=sig.W * sig.S,
        q=sig.q_stride[:2], k=sig.k_stride[:3], v=sig.v_stride[:3], pages_b=sig.pages_stride, out=sig.out_stride[:2],
        scale=sig.scale, scales=strides(sinks, k_scale, v_scale), k_scale=k_scale is not None, out_scale=sig.out_scale,
        softcap=sig.softcap, window=sig.window, causal=sig.causal, invariant=sig.batch_invariant,
    )  # fmt: skip
    return prefill.bind(shape, prefill_tile(config), arch.of(sig.device).sms * config.ctas, sig.aligned)


def _prefill(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lens: Tensor, cu_q: Tensor, sinks: Tensor | None,
    k_scale: Tensor | None, v_scale: Tensor | None, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    bound = plan.state.get("bound")
    if bound is None:
        bound = plan.state["bound"] = _bind(plan.sig, plan.config, sinks, k_scale, v_scale)
    parts = counters = lens  # unused where the keys are not split
    if bound.part_bytes:
        parts = workspace.partials(q.device, bound.part_bytes)
        counters = workspace.counters(q.device, bound.counters)
    bound.launcher(q, k, v, pages, lens, cu_q, None, sinks, k_scale, v_scale, out, lse, parts, counters)


PAGED_PREFILL = Kernel("triton", "triton", _supports, _prefill, configs.TRITON)
