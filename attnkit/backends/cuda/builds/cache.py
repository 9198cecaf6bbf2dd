"""The builds of the cache kernels, all dtypes by name in each: write_kv with merge_states, and write_latent."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant


def build() -> Variant:
    return variant("cache/cache_sm90.cu", {})


def latent() -> Variant:
    return variant("cache/latent_sm90.cu", {})


def shipped() -> list[Variant]:
    return [build(), latent()]
