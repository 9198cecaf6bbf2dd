"""sample_from_hidden: the product with the output embedding, and the next token of each row, in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import check, drawing
from attnkit.backends import torch_ref, two_steps
from attnkit.backends.cpu import sampling as cpu_sampling
from attnkit.backends.cuda import hidden as cuda_hidden
from attnkit.backends.cuda import sampling as cuda_sampling
from attnkit.backends.triton import sampling as triton_sampling
from attnkit.drawing import Sampled
from attnkit.roofline import Cost
from attnkit.signature import HiddenSig

OP = "sample_from_hidden"
KERNELS = (
    cuda_hidden.SAMPLE_FROM_HIDDEN,
    *map(two_steps.before, (cuda_sampling.SAMPLE, triton_sampling.SAMPLE, cpu_sampling.SAMPLE, torch_ref.SAMPLE)),
)


def sample_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    repetition_penalty: float | Tensor = 1.0,
    presence_penalty: float | Tensor = 0.0,
    frequency_penalty: float | Tensor = 0.0,
    output_counts: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed: Tensor | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor = 0,
    logprobs: int | None = None,
    out: Tensor | None = None,
    impl: str | None = None,
    config: Any = None,
) -> Sampled:
    """One token a row, as ``sample`` draws it from the logits hidden @ weight^T, which are float32.

    hidden   [B, H] bf16, fp16 or fp32; any row stride
    weight   [V, H], hidden's dtype, likewise: the output embedding as torch's Linear keeps it
    The rest is ``sample``'s: the same options, noise and token for the same seed, but for the rounding of sums over H.

    On Hopper, up to 64 rows of 16-bit operands take one read of the weights: without top-k, top-p, min-p and logprobs the
    tokens are drawn from each tile of logits as it is multiplied, and none goes to memory; with them float32 logits do,
    for ``sample``'s kernels. Elsewhere torch multiplies, into float32 too, and a kernel of ``sample``'s draws.
    Returns Sampled; raises ValueError or TypeError before anything is launched.
    """
    if hidden.dim() != 2 or weight.dim() != 2:
        shapes = f"hidden's shape is {list(hidden.shape)} and weight's {list(weight.shape)}"
        raise ValueError(f"{OP}: {shapes}, wanted [B, H] and [V, H]")
    options = (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, offset)
    masks = (output_counts, prompt_mask, logit_bias, allowed)
    return _OP.draw((hidden, weight), options, masks, seed, logprobs, out, impl, config)


def _signature(hidden, weight, seeds, given, written) -> HiddenSig:
    a = check.Letters(OP, hidden.device)
    a.tensor("hidden", hidden, "B H", check.FLOATS)
    a.tensor("weight", weight, "V H", (hidden.dtype,))
    a.fits("H")
    check.inference_only(OP, hidden, weight)
    n = a.size
    draw = drawing.signature(a, torch.float32, (n["V"], 1), True, seeds, given, written)
    return HiddenSig(
        op=OP, device=hidden.device, dtype=hidden.dtype, B=n["B"], V=n["V"], H=n["H"], hidden_stride=hidden.stride(),
        weight_stride=weight.stride(), aligned=check.aligned16(hidden, weight), draw=draw,
    )  # fmt: skip


_OP = drawing.Op(OP, "Tensor hidden, Tensor weight", KERNELS, _signature)


def cost(B: int, V: int, H: int, item: int = 2) -> Cost:
    """Ideal work of one call: both operands read once."""
    return Cost(flops=2 * B * V * H, bytes=(V + B) * H * item + B * 9, kind="bf16")
