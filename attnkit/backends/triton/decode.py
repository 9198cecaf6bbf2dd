"""paged_decode and merge_states by Triton."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch, settings, workspace
from attnkit.backends.triton import common
from attnkit.configs import decode as configs
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import AttentionSig, MergeSig


def unsupported(device: torch.device, *dtypes: torch.dtype) -> str | None:
    """Why Triton's attention does not run on ``device`` with ``dtypes``, or None. The interpreter knows e4m3."""
    reason = common.why_not(device)
    if reason is None and torch.float8_e4m3fn in dtypes and not settings.get().interpret and not common.has_e4m3(device):
        return f"e4m3 needs NVIDIA's sm_89 or newer, {device} is sm_{arch.of(device).sm}"
    return reason


def too_large(size: int, device: torch.device) -> str | None:
    limit = arch.of(device).smem
    return f"its smallest tiles take {size} bytes of shared memory, the device has {limit}" if 0 < limit < size else None


def decode_supports(sig: AttentionSig) -> str | None:
    reason = unsupported(sig.device, sig.q_dtype, sig.kv_dtype)
    if reason is None:
        reason = too_large(configs.smem(configs.default(sig, arch.of(sig.device)), sig), sig.device)
    return reason


def strides(*scales: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if t is None else t.stride(0) for t in scales)


def decode_tile(config: configs.TritonConfig) -> Any:
    from attnkit.triton_kernels.decode import Tile

    return Tile(config.block_m, config.block_n, config.num_warps, config.num_stages, config.min_tiles, config.swap)


def run(bound: Any, *tensors: Tensor | None) -> None:
    """Launch with a workspace of the current stream; ``tensors`` from q to lse."""
    from attnkit.triton_kernels.decode import launch

    device = tensors[0].device  # type: ignore[union-attr]
    parts = workspace.partials(device, bound.part_bytes)
    launch(bound, *tensors, parts, workspace.counters(device, bound.counters))


def _bind(sig: AttentionSig, config: configs.TritonConfig, sinks: Tensor | None, k_scale: Tensor | None,
          v_scale: Tensor | None, tree_mask: Tensor | None) -> Any:  # fmt: skip
    from attnkit.triton_kernels import decode

    shape = decode.Shape(
        B=sig.B, Q=sig.Q, HKV=sig.Hkv, G=sig.G, S=sig.S, D=sig.D, DV=sig.Dv, capacity=sig.W * sig.S,
        q=sig.q_stride[:3], k=sig.k_stride[:3], v=sig.v_stride[:3], pages_b=sig.pages_stride, out=sig.out_stride[:3],
        scale=sig.scale, tree=None if tree_mask is None else tree_mask.stride(), scales=strides(sinks, k_scale, v_scale),
        out_scale=sig.out_scale, softcap=sig.softcap, window=sig.window, invariant=sig.batch_invariant,
    )  # fmt: skip
    return decode.bind(shape, decode_tile(config), arch.of(sig.device).sms * config.ctas, sig.aligned)


def _decode(
    plan: Plan, q: Tensor, k: Tensor, v: Tensor, pages: Tensor, lens: Tensor, sinks: Tensor | None, k_scale: Tensor | None,
    v_scale: Tensor | None, tree_mask: Tensor | None, out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    bound = plan.state.get("bound")
    if bound is None:
        bound = plan.state["bound"] = _bind(plan.sig, plan.config, sinks, k_scale, v_scale, tree_mask)
    run(bound, q, k, v, pages, lens, sinks, k_scale, v_scale, tree_mask, out, lse)


def _merge_supports(sig: MergeSig) -> str | None:
    return unsupported(sig.device, sig.dtype)


def _merge(plan: Plan, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    from attnkit.triton_kernels.merge import merge

    merge(out_a, lse_a, out_b, lse_b, out, lse)


PAGED_DECODE = Kernel("triton", "triton", decode_supports, _decode, configs.TRITON)
MERGE = Kernel("triton", "triton", _merge_supports, _merge)
