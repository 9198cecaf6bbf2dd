"""Ops as torch custom ops: one schema each, outputs passed in, a fake that has nothing left to do.

Every op writes outputs that its public function allocated. So ``out=`` costs nothing, the op has no
aliasing to explain, and ``torch.compile(fullgraph=True)`` sees one node. In eager mode the public
functions call the implementation directly: the dispatcher would cost a third of a call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_LIBRARY = torch.library.Library("attnkit", "DEF")


def define(schema: str, run: Callable[..., None]) -> Callable[..., None]:
    """Register ``run`` under ``schema`` (mutating its outputs, returning nothing) and return the torch op."""
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"attnkit::{name}", lambda *args, **kwargs: None, lib=_LIBRARY)
    return getattr(torch.ops.attnkit, name)


def traced(t: torch.Tensor) -> bool:
    """True where the call must go through the dispatcher: under torch.compile, or on a tensor subclass."""
    return torch.compiler.is_compiling() or type(t) not in (torch.Tensor, torch.nn.Parameter)
