"""write_latent in Triton: sm_80 and up, and CPU tensors in its interpreter."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit.backends.triton.common import aligned, has_e4m3, why_not
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import WriteLatentSig


def _supports(sig: WriteLatentSig) -> str | None:
    if not sig.aligned:
        return "cache has a pointer or stride that is not a multiple of 16 bytes"
    return why_not(sig.device)


def _bind(sig: WriteLatentSig, reusable: bool) -> Any:
    from attnkit.triton_kernels import latent

    return latent.bind(
        sig.T, sig.P, sig.S, sig.latent_stride[0], sig.rope_stride[0], sig.cache_stride[:2], not has_e4m3(sig.device), reusable
    )


def _launch(plan: Plan, latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor) -> None:
    reusable = aligned(latent, rope, cache, slots)
    key = "reused" if reusable else "fresh"
    held = plan.state.get(key)
    if held is None:
        held = plan.state[key] = _bind(plan.sig, reusable)
    held(latent, rope, cache, slots)


WRITE_LATENT = Kernel("triton", "triton", _supports, _launch)
