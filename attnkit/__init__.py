"""attnkit: paged attention, W8A8 GEMM and sampling kernels for LLM inference.

Importing it touches no GPU and compiles nothing.
"""

from __future__ import annotations

from typing import Any

from attnkit import hook
from attnkit.cache import PageTable, merge_states, write_kv
from attnkit.decode import paged_decode
from attnkit.gemm import w8a8_gemm
from attnkit.hidden import sample_from_hidden
from attnkit.latent import write_latent
from attnkit.mla import mla_decode, mla_prefill
from attnkit.prefill import paged_prefill
from attnkit.quantize import quantize_per_token, quantize_weight, rms_norm_quantize, silu_mul_quantize
from attnkit.sampling import Sampled, sample

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "PageTable",
    "Sampled",
    "SamplingParams",
    "merge_states",
    "mla_decode",
    "mla_prefill",
    "paged_decode",
    "paged_prefill",
    "quantize_per_token",
    "quantize_weight",
    "rms_norm_quantize",
    "sample",
    "sample_from_hidden",
    "silu_mul_quantize",
    "tune",
    "w8a8_gemm",
    "write_kv",
    "write_latent",
]


def __getattr__(name: str) -> Any:
    if name in ("LLM", "SamplingParams"):
        from attnkit.integrations import engine

        return getattr(engine, name)
    if name == "tune":
        from attnkit.tune import tune

        return tune
    raise AttributeError(f"module 'attnkit' has no attribute {name!r}")


hook.install()  # transformers learns of attnkit when, and if, it is imported
