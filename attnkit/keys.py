"""What tells one call from another: its options, and its tensors' shapes, strides, dtypes, devices and alignment.

The compiled part reads tensors through DLPack's exchange table, which torch has since 2.10: 0.4 us for a call's, where
attributes asked for one by one take 2.5.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor


def _by_attributes(*tensors: Any) -> Hashable:
    """The same in Python; what is no tensor is told by its type, and left to the op's check."""
    return tuple(
        (t.shape, t.stride(), t.dtype, t.device, t.data_ptr() & 15 == 0) if isinstance(t, Tensor) else type(t) for t in tensors
    )


def _reader() -> Callable[..., Hashable]:
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    try:
        from attnkit import _C

        compiled: Any = _C
        compiled.use_tensor_table(capsule, (Tensor, torch.nn.Parameter))
    except (ImportError, TypeError, ValueError):  # not built, no such table in this torch, or one of another version
        return _by_attributes
    return compiled.tensor_key


_describe = _reader()


def call_key(tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> Hashable:
    """A key for the op's plans; tensors differ where a kernel may be chosen differently, and never by what they hold."""
    described = _describe(*tensors)
    return (_by_attributes(*tensors) if described is None else described), rest
