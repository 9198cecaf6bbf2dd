"""What a peer's file needs: an optional module, and the way to decline a case."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache
from typing import Any

from attnkit.workload import Inputs

Call = Callable[[], Any]
Maker = Callable[[Any, Inputs], Call]


class Unsuited(Exception):
    """The peer does not do this case."""


@cache
def module(name: str) -> Any:
    """An optional module, or None."""
    os.environ.setdefault("FLASHINFER_DISABLE_JIT", "1")
    try:
        return importlib.import_module(name)
    except Exception:  # a peer built for another torch fails in its own ways
        return None


def need(holds: bool) -> None:
    if not holds:
        raise Unsuited
