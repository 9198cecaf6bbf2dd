"""From a directory to a model on a device."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .batch import Batch
from .config import CheckpointError, ModelConfig, read_config
from .deepseek import DeepseekV2
from .llama import Llama
from .weights import Checkpoint, Reader, Source, Wishes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class Model(Protocol):
    """What the runner needs.

    capturable   a decode step reads nothing back to the host
    cache_shape  of the whole KV cache, layers first
    views        the cache cut into what ``forward`` takes, one a layer
    """

    config: ModelConfig

    @property
    def capturable(self) -> bool: ...

    def cache_shape(self, c: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]: ...

    def views(self, cache: Tensor) -> list[Any]: ...

    def forward(self, batch: Batch, caches: list[Any]) -> Tensor: ...


def _construct(config: ModelConfig, source: Source) -> Model:
    return DeepseekV2(config, source) if config.latent else Llama(config, source)


def wanted_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model reads, and its shape. Allocates nothing."""
    wishes = Wishes()
    _construct(config, wishes)
    return wishes.shapes


def load(directory: Path, dtype: str | torch.dtype, device: torch.device) -> tuple[Model, torch.dtype]:
    """The model, and the dtype it has. "auto" is the checkpoint's own.

    Raises CheckpointError before any tensor is allocated.
    """
    config = read_config(directory)
    checkpoint = Checkpoint(directory)
    checkpoint.check(wanted_tensors(config), optional=("lm_head.weight",) if config.tied else ())
    chosen = _dtype(dtype, config, checkpoint)
    return _construct(config, Reader(checkpoint, chosen, device)), chosen


def _dtype(wanted: str | torch.dtype, config: ModelConfig, checkpoint: Checkpoint) -> torch.dtype:
    if isinstance(wanted, torch.dtype):
        wanted = str(wanted).removeprefix("torch.")
    wanted = _SHORT.get(wanted, wanted)
    if wanted == "auto":
        if config.dtype is None:
            return checkpoint.dtype()
        if config.dtype not in DTYPES:
            file = checkpoint.directory / "config.json"
            raise CheckpointError(f"{file}: dtype is {config.dtype!r}, supported: {', '.join(DTYPES)}")
        return DTYPES[config.dtype]
    if wanted not in DTYPES:
        raise ValueError(f"LLM: dtype is {wanted!r}, wanted 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[wanted]
