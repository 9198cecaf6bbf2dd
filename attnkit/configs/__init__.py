"""Which config a kernel gets for a shape, and where it came from.

Look-up order: the ``config=`` argument, the user cache, the shipped JSON, the kernel's ``default()``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from attnkit.arch import Arch
from attnkit.configs import store


@dataclass(frozen=True, slots=True, eq=False)
class Space:
    """What one kernel can be tuned over.

    op, kernel   what the tuned files call it
    Config       frozen dataclass of plain numbers and strings
    default      (sig, arch) -> Config that works for any signature the kernel supports
    candidates   (sig, arch) -> configs worth measuring, the default among them
    bucket       sig -> text key; sizes are rounded up to powers of two
    sources      files whose hash says whether tuned numbers still belong to the kernel
    smem         (config, sig) -> bytes of shared memory, where it is known before compiling:
                 the tuner drops what the device does not have
    """

    op: str
    kernel: str
    Config: type
    default: Callable[[Any, Arch], Any]
    candidates: Callable[[Any, Arch], list[Any]]
    bucket: Callable[[Any], str]
    sources: tuple[str, ...]
    smem: Callable[[Any, Any], int] | None = None


def pow2(n: int) -> int:
    """The smallest power of two that is at least ``n`` (1 for n < 2)."""
    return 1 << max(0, n - 1).bit_length()


def resolve(space: Space, sig: Any, arch: Arch, config: Any = None) -> tuple[Any, str]:
    """The config for ``sig`` and its origin: "argument", "user cache", "shipped" or "default"."""
    if config is not None:
        if not isinstance(config, space.Config):
            raise ValueError(
                f"{sig.op}: config is {type(config).__name__}, kernel {space.kernel} wants {space.Config.__name__}"
            )
        return config, "argument"
    for path, origin in ((store.user_path(arch), "user cache"), (store.shipped_path(arch), "shipped")):
        found = store.lookup(path, space, space.bucket, sig, arch)
        if found is not None:
            return found, origin
    return space.default(sig, arch), "default"
