"""The builds of the latent decode for many query rows over an fp8 cache."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: Sizes of csrc/cuda/mla/mla_wide_fp8_shared.cuh (MlaWideFp8Shape).
PLANE = 64 * 64 * 2
ROW_BYTES = 656  # of a token in the cache
SHARED_BYTES = (5 * 4 + 2 + 5) * PLANE + 4 * (2048 + 256) + 1280


def build(ctas: int) -> Variant:
    """``ctas`` in a cluster (1 or 2): 64 query rows each, one KV tile for both."""
    return variant("mla/mla_wide_fp8_sm90.cu", {"ATTNKIT_CTAS": ctas})


def shipped() -> list[Variant]:
    return [build(2), build(1)]
