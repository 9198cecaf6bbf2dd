"""A small inference engine over attnkit's kernels: paged KV, continuous batching, streaming.

One request's path: add -> schedule -> build Batch -> forward (or graph replay) -> sample -> append.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "LLM": "llm",
    "SamplingParams": "sampling_params",
    "RequestOutput": "request",
    "RequestError": "request",
    "StepOutput": "request",
    "CheckpointError": "config",
}

__all__ = ["LLM", "CheckpointError", "RequestError", "RequestOutput", "SamplingParams", "StepOutput"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
