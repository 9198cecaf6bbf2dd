"""Who else computes the same: each peer is used where it imports, and only after its answer was compared.

A maker takes a case and one set of inputs and returns a call that gives the case's output (or raises
Unsuited). What a peer must prepare on the host (FlashInfer's plan, FlashAttention's schedule) is prepared
here, outside of the time: it is the peer at its best. FlashInfer is kept from compiling anything.
"""

from __future__ import annotations

import torch

from attnkit.workload import Case, Inputs, Sample
from attnkit.workload_hidden import SampleFromHidden
from perf.peers import attention, cache, gemm, hidden, sampling
from perf.peers.base import Call, Maker, Unsuited, module
from perf.peers.gemm import better_products

__all__ = ["LIBRARIES", "PEERS", "PEER_LIMIT", "Unsuited", "better_products", "makers", "module", "right"]

#: (op, device type, name shown, module it needs, maker)
PEERS: tuple[tuple[str, str, str, str | None, Maker], ...] = (
    ("paged_prefill", "cuda", "FA3", "flash_attn_interface", attention.fa3),
    ("paged_prefill", "cuda", "FlashInfer", "flashinfer", attention.flashinfer_prefill),
    ("paged_prefill", "cpu", "SDPA", None, attention.sdpa_prefill),
    ("paged_decode", "cuda", "FA3", "flash_attn_interface", attention.fa3),
    ("paged_decode", "cuda", "FlashInfer", "flashinfer", attention.flashinfer_decode),
    ("paged_decode", "cuda", "FlashInfer", "flashinfer", attention.flashinfer_prefill),
    ("paged_decode", "cpu", "SDPA", None, attention.sdpa_decode),
    ("mla_decode", "cuda", "FlashMLA", "flash_mla", attention.flashmla),
    ("mla_decode", "cuda", "FlashInfer", "flashinfer", attention.flashinfer_mla),
    ("mla_prefill", "any", "SDPA", None, attention.sdpa_expanded),
    ("w8a8_gemm", "cuda", "CUTLASS", "vllm._custom_ops", gemm.cutlass),
    ("w8a8_gemm", "any", "_int_mm", None, gemm.torch_int_mm),
    ("w8a8_gemm", "cuda", "_scaled_mm", None, gemm.torch_scaled_mm),
    ("w8a8_gemm", "any", "bf16 linear", None, gemm.torch_linear),
    ("quantize_per_token", "cuda", "vLLM", "vllm._custom_ops", gemm.cutlass_quant),
    ("rms_norm_quantize", "cuda", "vLLM", "vllm._custom_ops", gemm.vllm_rms_norm_quant),
    ("rms_norm_quantize", "any", "torch", None, gemm.torch_fused),
    ("silu_mul_quantize", "cuda", "vLLM", "vllm._custom_ops", gemm.vllm_silu_mul_quant),
    ("silu_mul_quantize", "any", "torch", None, gemm.torch_fused),
    ("quantized_linear", "any", "bf16 linear", None, gemm.bf16_linear),
    ("sample", "cuda", "FlashInfer", "flashinfer", sampling.flashinfer_sampling),
    ("sample", "any", "torch sort", None, sampling.torch_sort),
    ("sample", "any", "torch argmax", None, sampling.torch_argmax),
    ("sample_from_hidden", "cuda", "FlashInfer", "flashinfer", hidden.flashinfer_two_steps),
    ("sample_from_hidden", "any", "two steps", None, hidden.two_steps),
    ("sample_from_hidden", "any", "torch argmax", None, hidden.torch_argmax),
    ("write_kv", "any", "torch", None, cache.torch_write),
    ("merge_states", "any", "torch", None, cache.torch_merge),
)

#: Peers that are kernel libraries; torch's own operations are no measure.
LIBRARIES = ("FA3", "FlashInfer", "FlashMLA", "CUTLASS", "vLLM", "_scaled_mm")


def makers(case: Case, device: torch.device) -> dict[str, Maker]:
    """The peers that can be tried on this case here, by name."""
    found: dict[str, Maker] = {}
    for op, kind, name, needs, maker in PEERS:
        if op != case.op or kind not in ("any", device.type) or (needs is not None and module(needs) is None):
            continue
        if name in found:  # two forms of one peer: the first that suits
            first = found[name]
            found[name] = lambda c, x, first=first, second=maker: _either(c, x, first, second)
        else:
            found[name] = maker
    return found


def _either(case: Case, x: Inputs, first: Maker, second: Maker) -> Call:
    try:
        return first(case, x)
    except Unsuited:
        return second(case, x)


#: Peers round where attnkit does not (fp8 queries, bf16 weights), so they may be further off and still count.
PEER_LIMIT = 0.08


def right(case: Case, x: Inputs, call: Call) -> bool:
    """True if a peer's answer is the case's. A sampler draws its own noise: its tokens need only be in range."""
    out = call()
    if isinstance(case, Sample | SampleFromHidden):
        return bool(((out >= 0) & (out < case.V)).all())
    return case.error(x, out) <= PEER_LIMIT
