"""write_latent through csrc/cuda/cache/latent_sm90.cu."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda import launch
from attnkit.backends.cuda.builds import cache as builds
from attnkit.backends.cuda.cache import TYPES
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import WriteLatentSig

#: kLatentTokens of csrc/cuda/cache/latent_sm90.cu: a warp each.
TOKENS = 8
#: struct LatentParams
POINTERS = ("latent", "rope", "cache", "slots")
PARAMS = launch.Fields(
    maps=(),
    words=(*POINTERS, "latent_token", "rope_token", "cache_page", "cache_slot", "pool"),
    ints=("T", "page_size"),
    floats=(),
)


def _supports(sig: WriteLatentSig) -> str | None:
    if not (sig.aligned and sig.sources_aligned):
        return "latent, rope or cache has a pointer or stride that is not a multiple of 16 bytes"
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    return launch.unavailable() or launch.missing(builds.latent())


def _prepare(plan: Plan) -> Any:
    s: WriteLatentSig = plan.sig
    kernel = launch.kernel(builds.latent(), f"attnkit_write_latent_{TYPES[s.dtype]}", plan.state["index"], 0)
    values = {
        "latent_token": s.latent_stride[0] * s.dtype.itemsize, "rope_token": s.rope_stride[0] * s.dtype.itemsize,
        "cache_page": s.cache_stride[0], "cache_slot": s.cache_stride[1], "pool": s.P * s.S, "T": s.T, "page_size": s.S,
    }  # fmt: skip
    return launch.compiled().CudaLaunch(
        kernel, (-(-s.T // TOKENS), 1, 1), (32, TOKENS, 1), (1, 1, 1), True, PARAMS.pack(values),
        [PARAMS.offsets[p] for p in POINTERS],
    )  # fmt: skip


def _launch(plan: Plan, latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor) -> None:
    state = plan.state
    if not state:
        state["index"] = launch.index_of(plan.sig.device)
        state["launch"] = _prepare(plan)
    state["launch"](launch.stream_of(state["index"]), latent, rope, cache, slots)


WRITE_LATENT = Kernel("cuda_sm90", "cuda", _supports, _launch)
