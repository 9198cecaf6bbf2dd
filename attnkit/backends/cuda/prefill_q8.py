"""paged_prefill over an 8-bit cache through csrc/cuda/prefill/prefill_q8_sm90.cu: the 16-bit kernel behind warps that widen."""

from __future__ import annotations

import torch

from attnkit.backends.cuda import images, launch
from attnkit.backends.cuda.builds import prefill as builds
from attnkit.backends.cuda.prefill import POINTERS, Keys, Program, declined, padded, prepare_program
from attnkit.check import QUANTISED
from attnkit.configs import prefill_cuda
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import AttentionSig

NAME = "attnkit_paged_prefill_q8"
CONSUMERS, BLOCK = 2, 128
RAW_BYTES = 128 * 128


def _supports(sig: AttentionSig) -> str | None:
    if sig.kv_dtype not in QUANTISED:
        return f"needs an int8 or e4m3 cache, got {sig.kv_dtype}"
    if sig.S < 8:
        return f"needs pages of at least 8 tokens, got {sig.S}"
    return declined(sig, sig.q_dtype, sig.G, builds.Q8_STAGES) or launch.missing(_variant(sig))


def _variant(sig: AttentionSig) -> images.Variant:
    heads = padded(sig)
    return builds.build_q8(*heads, sig.q_dtype == torch.bfloat16, sig.kv_dtype == torch.int8, *builds.Q8_STAGES[heads])


def shared_bytes(D: int, Dv: int) -> int:
    """What csrc/cuda/prefill/prefill_q8_sm90.cuh's SharedBytes says."""
    stages, raw = builds.Q8_STAGES[D, Dv]
    rows = 64 * CONSUMERS
    fixed = prefill_cuda.FIXED + prefill_cuda.staged(rows, 32) + 2 * rows * 4
    return fixed + rows * D * 2 + stages * BLOCK * (D + Dv) * 2 + raw * RAW_BYTES


def _launch(plan: Plan, q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse) -> None:
    state = plan.state
    if not state:
        sig = plan.sig
        pointers = (*POINTERS, "k_scale", "v_scale")
        shared = shared_bytes(*padded(sig))
        program = Program(_variant(sig), shared, CONSUMERS, BLOCK, CONSUMERS + 2, name=NAME, kv_bytes=1, pointers=pointers)
        strides = {f"{n}_h": 4 * t.stride(0) for n, t in (("k_scale", k_scale), ("v_scale", v_scale)) if t is not None}
        prepare_program(plan, program, sig.Hq, sig.Hkv, Keys.paged(sig), strides)
    if sinks is not None and sinks.stride(0) != 1:
        sinks = sinks.contiguous()
    stream = launch.stream_of(state["index"])
    scratch = launch.scratch(plan, stream)
    state["launch"](stream, q, k, v, pages, lens, cu_q, None, sinks, out, lse, *scratch, k_scale, v_scale)


PAGED_PREFILL = Kernel("cuda_sm90_q8", "cuda", _supports, _launch)
