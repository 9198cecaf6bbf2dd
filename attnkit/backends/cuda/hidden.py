"""sample_from_hidden through csrc/cuda/hidden/hidden_sm90.cu: one launch that multiplies and draws, or one that writes float32
logits for sample's kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda import launch, sampling
from attnkit.backends.cuda.builds import hidden as builds
from attnkit.backends.cuda.images import Variant
from attnkit.configs import hidden as configs
from attnkit.configs.sampling import filtered
from attnkit.dispatch import Kernel, Plan, make_plan
from attnkit.signature import HiddenSig

NAME = "attnkit_sample_from_hidden"
OWN = ("hidden", "weight", "partials", "out", "out_b", "tiles", "steps", "stages", "ahead", "extras")
#: struct HiddenParams of csrc/cuda/hidden/hidden_sm90.cuh, which ends with sampling's
PARAMS = launch.Fields(
    maps=("hidden_map", "w_map"), words=(*OWN, *sampling.WORDS), ints=sampling.INTS, floats=sampling.FLOATS
)  # fmt: skip


def _supports(sig: HiddenSig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if sig.dtype not in (torch.bfloat16, torch.float16):
        return f"hidden's dtype is {sig.dtype}, wanted bfloat16 or float16"
    if sig.B > builds.ROWS[-1]:
        return f"B is {sig.B}, wanted at most {builds.ROWS[-1]}"
    if not sig.aligned or sig.H == 0 or (sig.V > 1 and sig.weight_stride[0] == 0) or (sig.B > 1 and sig.hidden_stride[0] == 0):
        return "needs hidden and weight at 16-byte aligned addresses and row strides, rows of their own, and H of at least 1"
    reason = None if draws(sig) else sampling.SAMPLE.supports(sig.draw)
    return reason or launch.unavailable() or launch.missing(_variant(sig))


def draws(sig: HiddenSig) -> bool:
    """Whether the launch that multiplies also draws: from all tokens, and nothing else is asked for."""
    return not filtered(sig.draw) and sig.draw.logprobs is None


def _variant(sig: HiddenSig) -> Variant:
    return builds.build(sig.dtype == torch.bfloat16, sig.B)


def _map(rows: int, H: int, stride: int, box: int) -> Any:
    return launch.compiled().CudaMapSpec(
        launch.MAP_TYPE[2], [H, rows], [2 * stride if rows > 1 else -(-H // 8) * 16], [64, box], launch.MAP_SWIZZLE[128],
        launch.MAP_PROMOTE_128,
    )  # fmt: skip


def _prepare(plan: Plan, options: dict[str, Tensor]) -> None:
    """What all calls of a plan have in common."""
    sig, c, state = plan.sig, plan.config, plan.state
    # A slice is let go behind the next one's product.
    if builds.stages(sig.B, c.stages) < 2:
        raise ValueError(f"{sig.op}: config.stages is {c.stages}, wanted at least 2")
    index = launch.index_of(sig.device)
    fused = draws(sig)
    tiles, rows = builds.tiles(sig.V, fused), builds.rows(sig.B)
    ctas = min(arch.of(sig.device).sms, tiles)
    extras = sampling.extras(sig.draw) if fused else set()
    used = {n: t for n, t in options.items() if fused and (n not in sampling.STRIDES or n in extras)}
    strides = {f"{n}_b": t.stride(0) * sampling.STRIDES[n] for n, t in used.items() if n in extras}
    values = sampling.values_of(sig.draw, strides) | {
        "out_b": builds.pitch(sig.V), "tiles": tiles, "steps": -(-sig.H // builds.SLICE), "ahead": c.ahead,
        "stages": builds.stages(sig.B, c.stages), "extras": int(bool(strides)),
    }  # fmt: skip
    pointers = ("hidden", "weight", "partials", "state", *(("seeds", "tokens", "valid", *used) if fused else ("out",)))
    kernel = launch.kernel(_variant(sig), NAME, index, builds.shared_bytes(sig.B, c.stages))
    maps = [
        (PARAMS.offsets["hidden_map"], 0, _map(sig.B, sig.H, sig.hidden_stride[0], rows)),
        (PARAMS.offsets["w_map"], 1, _map(sig.V, sig.H, sig.weight_stride[0], builds.STRETCH)),
    ]
    state["launch"] = launch.compiled().CudaLaunch(
        kernel, (ctas, 1, 1), (builds.THREADS, 1, 1), (1, 1, 1), True, PARAMS.pack(values),
        [PARAMS.offsets[name] for name in pointers], maps,
    )  # fmt: skip
    state["options"] = tuple(used)
    state["index"] = index
    state["scratch"] = {}
    state["counters"] = 4 * sig.B + ctas
    state["partial_bytes"] = ctas * builds.partial_bytes(sig.B)
    rows_of_logits = replace(sig.draw, logits_stride=(builds.pitch(sig.V), 1))
    state["draw"] = None if fused else make_plan((sampling.SAMPLE,), rows_of_logits)


def _launch(
    plan: Plan, hidden: Tensor, weight: Tensor, seeds: Tensor, options: dict[str, Tensor], tokens: Tensor, valid: Tensor,
    logprobs: Tensor | None, top_ids: Tensor | None,
) -> None:  # fmt: skip
    state, sig = plan.state, plan.sig
    if "launch" not in state:
        _prepare(plan, options)
    stream = launch.stream_of(state["index"])
    partials, counters = launch.scratch(plan, stream)
    draw = state["draw"]
    if draw is None:
        given = (options[name] for name in state["options"])
        state["launch"](stream, hidden, weight, partials, counters, seeds, tokens, valid, *given)
        return
    # Of its own: the draw's kernels have the workspace.
    logits = hidden.new_empty((sig.B, builds.pitch(sig.V)), dtype=torch.float32)
    state["launch"](stream, hidden, weight, partials, counters, logits)
    draw.launch(draw, logits, seeds, options, tokens, valid, logprobs, top_ids)


SAMPLE_FROM_HIDDEN = Kernel("cuda_sm90", "cuda", _supports, _launch, configs.CUDA)
