"""sample: the next token of each row, from logits to id, in one op."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit import check, drawing
from attnkit.backends import torch_ref
from attnkit.backends.cpu import sampling as cpu_sampling
from attnkit.backends.cuda import sampling as cuda_sampling
from attnkit.backends.triton import sampling as triton_sampling
from attnkit.drawing import OPTIONS, Sampled
from attnkit.roofline import Cost
from attnkit.signature import SampleSig

__all__ = ["KERNELS", "OP", "OPTIONS", "Sampled", "cost", "sample"]

OP = "sample"
KERNELS = (cuda_sampling.SAMPLE, triton_sampling.SAMPLE, cpu_sampling.SAMPLE, torch_ref.SAMPLE)


def sample(
    logits: Tensor,
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
    """Draw one token a row: penalties, bias and mask, then temperature, top-k, top-p, min-p, then a draw by Gumbel noise.

    logits              [B, V] bf16, fp16 or fp32; any row stride
    temperature         0 is greedy; ties go to the lowest id
    top_k, top_p, min_p 0, 1 and 0 switch them off; each counts on what the one before left over; ties at the
                        last place go to the lowest ids, so top_k=1 is exactly greedy
    repetition_penalty  of tokens in the prompt or the output; presence_ and frequency_penalty of the output only
    output_counts       int32 [B, V]: how often each token was generated
    prompt_mask         bool [B, V]: the prompt's tokens
    logit_bias          float32 [V] or [B, V], added
    allowed             int32 [B, ceil(V / 32)]: bit v % 32 of word v // 32 (xgrammar's layout)
    seed                a number (row b uses seed + b), an int64 tensor [B] (a row's draw then depends on its seed,
                        offset and logits alone, not on its place), or None: fresh seeds from torch's generator
    offset              number or int64 [B]: which draw of the seed this is; an engine passes the token's position
    logprobs            n: also return log-probabilities (of the logits as given) of the chosen and the n highest

    The numeric options are numbers or float32 (top_k: int64) tensors [B]. The noise is Philox4x32-10
    (Salmon et al. 2011), the same in every implementation; attnkit/reference.py says how it draws. Nothing
    synchronises. +inf counts as the largest float.
    Returns Sampled; raises ValueError or TypeError before anything is launched.
    """
    if logits.dim() != 2:
        raise ValueError(f"{OP}: logits' shape is {list(logits.shape)}, wanted [B, V]")
    options = (temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, offset)
    masks = (output_counts, prompt_mask, logit_bias, allowed)
    return _OP.draw((logits,), options, masks, seed, logprobs, out, impl, config)


def _signature(logits, seeds, given, written) -> SampleSig:
    a = check.Letters(OP, logits.device)
    a.tensor("logits", logits, "B V", check.FLOATS)
    return drawing.signature(a, logits.dtype, logits.stride(), check.aligned16(logits), seeds, given, written)


_OP = drawing.Op(OP, "Tensor logits", KERNELS, _signature)


def cost(B: int, V: int, logits_bytes: int = 4) -> Cost:
    """Ideal work of one call: the logits read once."""
    return Cost(flops=0, bytes=B * V * logits_bytes + B * 9, kind="fp32")
