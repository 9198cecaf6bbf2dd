"""Every environment variable attnkit reads, typed. A bad value raises; nothing else reads os.environ."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

IMPLS = ("cuda", "triton", "cpu", "torch", "flashinfer")


@dataclass(frozen=True, slots=True)
class Settings:
    """
    impl       ATTNKIT_IMPL: force one implementation for every op (as ``impl=`` does for one call)
    debug      ATTNKIT_DEBUG=1: check values that live on the device (page ids, lens); synchronises
    cache_dir  ATTNKIT_CACHE_DIR: where tuned configs and compiled kernels are kept
               (default ~/.cache/attnkit, or $XDG_CACHE_HOME/attnkit)
    threads    ATTNKIT_THREADS: threads of the CPU kernels; 0 follows torch.get_num_threads()
    interpret  TRITON_INTERPRET=1: Triton kernels run in its interpreter, on the CPU
    """

    impl: str | None
    debug: bool
    cache_dir: Path
    threads: int
    interpret: bool


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"{name} is {value!r}, wanted 0 or 1")
    return value == "1"


def _read() -> Settings:
    impl = os.environ.get("ATTNKIT_IMPL") or None
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"ATTNKIT_IMPL is {impl!r}, wanted one of {', '.join(IMPLS)}")
    threads = os.environ.get("ATTNKIT_THREADS", "0")
    if not threads.isdecimal():
        raise ValueError(f"ATTNKIT_THREADS is {threads!r}, wanted a whole number, 0 or more")
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    cache_dir = Path(os.environ.get("ATTNKIT_CACHE_DIR") or Path(base) / "attnkit")
    interpret = os.environ.get("TRITON_INTERPRET", "0") == "1"
    return Settings(impl, _flag("ATTNKIT_DEBUG"), cache_dir, int(threads), interpret)


@cache
def get() -> Settings:
    """The settings, read once. ``reload()`` reads them again."""
    return _read()


def reload() -> Settings:
    get.cache_clear()
    return get()
