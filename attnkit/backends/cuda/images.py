"""Cubins: prebuilt ones shipped with the package, others compiled once by NVRTC into the user's cache.

A build is named by what it is made of: the source with its includes pasted in, the macros and the
architecture. So a shipped cubin serves only the very source it was built from, and nothing has to be
told when a file changes.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from attnkit import settings
from attnkit.backends.cuda import nvrtc

ARCH = "sm_90a"
FLAGS = ("-std=c++17",)
_PACKAGE = Path(__file__).resolve().parents[2]
PREBUILT = _PACKAGE / "cubins"
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"\s*$', re.MULTILINE)
#: A cache entry is this line, the SHA-256 of the image in hex, a newline, and the image.
_MAGIC = b"attnkit cubin 1\n"


@dataclass(frozen=True, slots=True)
class Variant:
    """One build of one source file: ``macros`` are (name, value) pairs."""

    source: str  # file name under csrc/cuda
    macros: tuple[tuple[str, int], ...] = ()

    @property
    def label(self) -> str:
        return "-".join([Path(self.source).stem, *(f"{name.removeprefix('ATTNKIT_')}{value}" for name, value in self.macros)])


def variant(source: str, macros: Mapping[str, int]) -> Variant:
    return Variant(source, tuple(sorted(macros.items())))


def source_dir() -> Path:
    """Where the .cu files are: csrc/cuda of a checkout, or the copy a wheel carries."""
    for folder in (_PACKAGE.parent / "csrc" / "cuda", _PACKAGE / "cuda_source"):
        if folder.is_dir():
            return folder
    raise RuntimeError(
        f"attnkit's CUDA sources are in neither {_PACKAGE.parent / 'csrc' / 'cuda'} nor {_PACKAGE / 'cuda_source'}"
    )


def flatten(path: Path, seen: set[Path] | None = None) -> str:
    """The file with each local include pasted in at its first mention (every header has #pragma once)."""
    seen = set() if seen is None else seen
    seen.add(path.resolve())

    def paste(match: re.Match[str]) -> str:
        included = (path.parent / match[1]).resolve()
        return "" if included in seen else flatten(included, seen)

    text = path.read_text(encoding="utf-8").replace("#pragma once\n", "")
    return _INCLUDE.sub(paste, text)


@cache
def _flat(source: str) -> str:
    return flatten(source_dir() / source)


def options(v: Variant) -> list[str]:
    return [*FLAGS, *(f"-D{name}={value}" for name, value in v.macros)]


def key(v: Variant) -> str:
    """What the build is made of, as 32 hex digits."""
    parts = [ARCH, *options(v), _flat(v.source)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def prebuilt_path(v: Variant) -> Path:
    return PREBUILT / f"{Path(v.source).stem}-{key(v)}.cubin"


def cached_path(v: Variant) -> Path:
    version = ".".join(map(str, nvrtc.version()))
    return settings.get().cache_dir / "cubins" / f"{Path(v.source).stem}-{key(v)}-nvrtc{version}.cubin"


@cache
def image(v: Variant) -> bytes:
    """The cubin of ``v``: shipped, cached, or compiled now (about a second, once a machine).

    Raises RuntimeError where there is none and none can be made, with the reason.
    """
    shipped = prebuilt_path(v)
    if shipped.is_file():
        return shipped.read_bytes()
    try:
        path = cached_path(v)
    except RuntimeError as error:
        raise RuntimeError(f"{v.label}: no prebuilt cubin in {PREBUILT}, and none can be compiled: {error}") from error
    found = read_entry(path)
    if found is None:
        found = nvrtc.compile_cubin(_flat(v.source), f"{v.label}.cu", [*options(v), f"--gpu-architecture={ARCH}"])
        write_entry(path, found)
    return found


def read_entry(path: Path) -> bytes | None:
    """A cached image, or None. A damaged file is renamed to ``.corrupt`` with one warning."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn(f"attnkit: cannot read the cached kernel {path} ({error}); compiling again")
        return None
    digest, _, body = data[len(_MAGIC) :].partition(b"\n")
    if data.startswith(_MAGIC) and hashlib.sha256(body).hexdigest().encode() == digest:
        return body
    aside = path.with_suffix(".corrupt")
    try:
        path.replace(aside)
        _warn(f"attnkit: the cached kernel {path} is damaged; moved to {aside.name} and compiling again")
    except OSError as error:
        _warn(f"attnkit: the cached kernel {path} is damaged and cannot be moved ({error}); compiling again")
    return None


def write_entry(path: Path, body: bytes) -> None:
    """Write and rename, so that other processes see a whole file or none. A read-only cache costs one warning."""
    data = _MAGIC + hashlib.sha256(body).hexdigest().encode() + b"\n" + body
    name = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.replace(name, path)
    except OSError as error:
        _warn(f"attnkit: cannot keep the compiled kernel in {path} ({error}); it will be compiled again next time")
        if name is not None:
            Path(name).unlink(missing_ok=True)


_warned: set[str] = set()


def _warn(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=3)


def prebuild(variants: Iterable[Variant], nvcc: str, jobs: int = 2, into: Path = PREBUILT) -> list[Path]:
    """Compile what is missing with nvcc, ``jobs`` at a time, and drop cubins of older sources (setup.py calls this).

    Raises RuntimeError with nvcc's words where a file does not compile.
    """
    import subprocess
    from concurrent.futures import ThreadPoolExecutor

    wanted = {into / prebuilt_path(v).name: v for v in variants}
    into.mkdir(parents=True, exist_ok=True)
    number = ARCH.removeprefix("sm_")

    def build(path: Path, v: Variant) -> None:
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        command = [nvcc, "-cubin", *options(v), "-gencode", f"arch=compute_{number},code={ARCH}",
                   str(source_dir() / v.source), "-o", str(temporary)]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            temporary.unlink(missing_ok=True)
            raise RuntimeError(f"nvcc could not compile {v.label}:\n{done.stderr or done.stdout}")
        os.replace(temporary, path)

    missing = [(path, v) for path, v in wanted.items() if not path.is_file()]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda pair: build(*pair), missing))
    for old in into.glob("*.cubin"):
        if old not in wanted:
            old.unlink()
    return [path for path, _ in missing]
