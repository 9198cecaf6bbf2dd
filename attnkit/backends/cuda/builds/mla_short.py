"""The builds of the latent decode for many query rows where a CTA has two tiles of keys at most."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: Sizes of csrc/cuda/mla/mla_short_sm90.cuh (MlaShortShape).
TILES = 2
SHARED_BYTES = 3 * 64 * (512 + 64) * 2 + 2048 + 1024


def build(ctas: int, fp8: bool) -> Variant:
    """``ctas`` in a cluster (1 or 2): 64 query rows each, one KV tile for both. ``fp8``: the cache of 656 bytes a token."""
    return variant("mla/mla_short_sm90.cu", {"ATTNKIT_CTAS": ctas, "ATTNKIT_FP8": int(fp8)})


def shipped() -> list[Variant]:
    return [build(ctas, fp8) for ctas in (2, 1) for fp8 in (False, True)]
