"""sample in Triton: sm_80 and up, and CPU tensors in its interpreter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit import workspace
from attnkit.backends.triton.common import aligned, why_not
from attnkit.configs import sampling as configs
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import SampleSig

#: Longer vocabularies would overflow the filters' sums.
MAX_V = 1 << 19


def _supports(sig: SampleSig) -> str | None:
    if sig.V > MAX_V and (configs.filtered(sig) or sig.logprobs is not None):
        return f"V is {sig.V}, filters and logprobs go up to {MAX_V}"
    return why_not(sig.device)


def _number(value: float | None, off: float) -> float:
    return off if value is None else value


def _shape(sig: SampleSig, options: dict[str, Tensor]) -> Any:
    """What the kernels are bound to; penalties that do nothing are left out."""
    from attnkit.triton_kernels import sampling

    def stride(name: str) -> int:
        return options[name].stride(0) if name in options else 0

    repeat = sig.repetition_penalty != 1.0 and ("counts" in options or "prompt_mask" in options)
    return sampling.Shape(
        sig.B, sig.V, sig.logits_stride[0], stride("counts"), stride("prompt_mask"), stride("logit_bias"), stride("allowed"),
        _number(sig.repetition_penalty, 1.0), _number(sig.presence_penalty, 0.0), _number(sig.frequency_penalty, 0.0),
        _number(sig.temperature, 1.0), repeat, sig.temperature not in (0.0, 1.0),
        any(name in options for name in ("counts", "prompt_mask", "logit_bias", "allowed")),
    )  # fmt: skip


def _used(sig: SampleSig, options: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without tensors that no option reads: neither counts nor the prompt matter while their penalties are off."""
    idle = set()
    if sig.repetition_penalty == 1.0:
        idle |= {"prompt_mask"} if "prompt_mask" in options else set()
        if sig.presence_penalty == 0.0 and sig.frequency_penalty == 0.0:
            idle.add("counts")
    return {n: t for n, t in options.items() if n not in idle} if idle else options


def _bind(plan: Plan, options: dict[str, Tensor], reusable: bool) -> tuple[Any, Any]:
    """(the draw, the log-probabilities or None), made ready."""
    from attnkit.triton_kernels import filters, sampling

    s, c = plan.sig, plan.config
    shape = _shape(s, options)
    offset = int(_number(s.offset, 0))
    if configs.filtered(s):
        draw = filters.bind(
            shape, top_k=int(_number(s.top_k, 0)), top_p=_number(s.top_p, 1.0), min_p=_number(s.min_p, 0.0), offset=offset,
            tile=c.filter_tile, num_warps=c.filter_warps, stages=c.stages, reusable=reusable,
        )  # fmt: skip
    else:
        draw = sampling.bind(
            shape, greedy=s.temperature == 0.0, offset=offset, parts=c.parts, tile=c.tile, num_warps=c.num_warps,
            stages=c.stages, reusable=reusable,
        )  # fmt: skip
    if s.logprobs is None:
        return draw, None
    bare = sampling.Shape(s.B, s.V, s.logits_stride[0])
    return draw, filters.bind(
        bare, top_k=s.logprobs, top_p=1.0, min_p=0.0, offset=0, tile=c.filter_tile, num_warps=c.filter_warps,
        stages=c.stages, exact_k=True, columns=s.logprobs, reusable=reusable,
    )  # fmt: skip


def _launch(
    plan: Plan, logits: Tensor, seeds: Tensor, options: dict[str, Tensor], tokens: Tensor, valid: Tensor,
    logprobs: Tensor | None, top_ids: Tensor | None,
) -> None:  # fmt: skip
    from attnkit.triton_kernels import filters, sampling

    s = plan.sig
    options = _used(s, options)
    reusable = aligned(logits, seeds, tokens, valid, logprobs, top_ids, *options.values())
    key = "reused" if reusable else "fresh"
    held = plan.state.get(key)
    if held is None:
        held = plan.state[key] = _bind(plan, options, reusable)
    draw, picks = held
    need = max(draw.part_bytes, picks.part_bytes if picks is not None else 0)
    parts = workspace.partials(s.device, need) if need else None
    if isinstance(draw, filters.Bound):
        filters.launch(draw, logits, seeds, options, tokens, valid, parts)
    else:
        counters = workspace.counters(s.device, draw.counters) if draw.counters else None
        sampling.launch(draw, logits, seeds, options, tokens, valid, parts, counters)
    if picks is not None:
        filters.launch_logprobs(picks, logits, tokens, logprobs, top_ids, parts)


SAMPLE = Kernel("triton", "triton", _supports, _launch, configs.TRITON)
