"""sample on the CPU: csrc/cpu/sampling*. One thread a row; no row is sorted, whatever top-k and top-p ask for."""

from __future__ import annotations

from torch import Tensor

from attnkit.backends.cpu import native
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import SampleSig

_FLOAT_OPTIONS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
_WHOLE_OPTIONS = ("top_k", "offset")
_MASKS = ("counts", "prompt_mask", "logit_bias", "allowed")


def _supports(sig: SampleSig) -> str | None:
    if sig.dtype not in native.FLOATS:
        return f"logits' dtype is {sig.dtype}, wanted float32, bfloat16 or float16"
    return native.unsupported(sig.device)


def _launch(
    plan: Plan,
    logits: Tensor,
    seeds: Tensor,
    options: dict[str, Tensor],
    tokens: Tensor,
    valid: Tensor,
    logprobs: Tensor | None,
    top_ids: Tensor | None,
) -> None:
    sig: SampleSig = plan.sig
    state = plan.state
    if "numbers" not in state:
        state["numbers"] = tuple(float(getattr(sig, name) or 0.0) for name in _FLOAT_OPTIONS)
    masks: list[int] = []
    for name in _MASKS:
        mask = options.get(name)
        masks += (0, 0) if mask is None else (mask.data_ptr(), mask.stride(0))
    native.module().cpu_sample(
        native.CODES[logits.dtype], sig.B, sig.V, logits.data_ptr(), logits.stride(0), seeds.data_ptr(),
        state["numbers"], min(sig.top_k or 0, sig.V), sig.offset or 0,
        tuple(native.address(options.get(name)) for name in (*_FLOAT_OPTIONS, *_WHOLE_OPTIONS)), tuple(masks),
        tokens.data_ptr(), valid.data_ptr(), native.address(logprobs), native.address(top_ids), sig.logprobs or 0,
        native.threads(), native.isa,
    )  # fmt: skip


SAMPLE = Kernel("cpu", "cpu", _supports, _launch)
