"""Which builds of the CUDA sources exist, a module a kernel family.

Imports no torch: setup.py reads this where torch may be missing.
"""

from __future__ import annotations

from attnkit.backends.cuda.builds import (
    cache,
    decode,
    gemm,
    gemm_skinny,
    hidden,
    mla_narrow,
    mla_short,
    mla_wide,
    mla_wide_fp8,
    prefill,
    quantize,
    sampling,
)
from attnkit.backends.cuda.images import Variant

#: Modules with a shipped() of their own, besides decode's.
FAMILIES = (cache, gemm, gemm_skinny, hidden, mla_narrow, mla_short, mla_wide, mla_wide_fp8, prefill, quantize, sampling)


def shipped() -> list[Variant]:
    """What setup.py compiles where nvcc is found. Everything else is compiled on first use."""
    return [*(build.variant for build in decode.shipped()), *(v for family in FAMILIES for v in family.shipped())]
