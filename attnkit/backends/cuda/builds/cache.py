"""The one build of write_kv and merge_states: all of their kernels, by name."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant


def build() -> Variant:
    return variant("cache/cache_sm90.cu", {})


def shipped() -> list[Variant]:
    return [build()]
