"""sample_from_hidden in two steps: torch's product into float32 logits, then one of sample's kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit.dispatch import Kernel, Plan, make_plan
from attnkit.signature import HiddenSig

#: Rows of weight that are made float32 at a time, where torch has no product of 16-bit operands into float32.
BLOCK = 8192


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden @ weight^T in float32."""
    if hidden.dtype == torch.float32:
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    rows, wide = hidden.float(), hidden.new_empty((hidden.shape[0], weight.shape[0]), dtype=torch.float32)
    for v in range(0, weight.shape[0], BLOCK):
        torch.mm(rows, weight[v : v + BLOCK].float().t(), out=wide[:, v : v + BLOCK])
    return wide


def before(kernel: Kernel) -> Kernel:
    """The product, then ``kernel``, which is one of sample's."""

    def supports(sig: HiddenSig) -> str | None:
        return kernel.supports(sig.draw)

    def run(
        plan: Plan, hidden: Tensor, weight: Tensor, seeds: Tensor, options: dict[str, Tensor], tokens: Tensor, valid: Tensor,
        logprobs: Tensor | None, top_ids: Tensor | None,
    ) -> None:  # fmt: skip
        draw = plan.state.get("draw")
        if draw is None:
            draw = plan.state["draw"] = make_plan((kernel,), plan.sig.draw)
        draw.launch(draw, product(hidden, weight), seeds, options, tokens, valid, logprobs, top_ids)

    return Kernel(kernel.name + "_after_product", kernel.impl, supports, run)
