"""mla_prefill (ragged attention without pages) through the sm_90a prefill kernel."""

from __future__ import annotations

from attnkit.backends.cuda import launch
from attnkit.backends.cuda.prefill import NO_PAGES, Keys, prepare, unsupported
from attnkit.configs import prefill_cuda
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import RaggedSig


def _supports(sig: RaggedSig) -> str | None:
    if not 1 <= sig.N < 1 << NO_PAGES:
        return f"needs 1 to 2^{NO_PAGES} keys, got {sig.N}"
    return unsupported(sig, sig.dtype, sig.H // sig.Hk)


def _launch(plan: Plan, q, k, v, cu_q, cu_k, sinks, out, lse) -> None:
    state = plan.state
    if not state:
        sig = plan.sig
        strides = ((0, *sig.k_stride[:2]), (0, *sig.v_stride[:2]))
        prepare(plan, sig.dtype, sig.H, sig.Hk, Keys((sig.N, 1), *strides, NO_PAGES, sig.N, 0))
    if sinks is not None and sinks.stride(0) != 1:
        sinks = sinks.contiguous()
    stream = launch.stream_of(state["index"])
    state["launch"](stream, q, k, v, None, None, cu_q, cu_k, sinks, out, lse, *launch.scratch(plan, stream))


MLA_PREFILL = Kernel("cuda_sm90", "cuda", _supports, _launch, prefill_cuda.RAGGED)
