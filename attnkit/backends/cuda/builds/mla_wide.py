"""The builds of the latent decode for many query rows."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: Sizes of csrc/cuda/mla/mla_wide_sm90.cuh (MlaWideShape).
C, R, ROWS, TILE = 512, 64, 64, 64
THREADS = 512
SHARED_BYTES = (3 * TILE * C + 4 * TILE * 64 + ROWS * 16) * 2 + 1024


def build(bf16: bool, ctas: int) -> Variant:
    """``ctas`` in a cluster (1 or 2): 64 query rows each, one KV tile for both."""
    return variant("mla/mla_wide_sm90.cu", {"ATTNKIT_BF16": int(bf16), "ATTNKIT_CTAS": ctas})


def shipped() -> list[Variant]:
    """bf16, and fp16 where a sequence has 128 rows or more."""
    return [build(True, 2), build(True, 1), build(False, 2)]
