"""Tuned configs on disk: one JSON file a device, in the user's cache and shipped beside this module.

    {"header": {"format": 1, "gpu": "nvidia-h200", "versions": {"attnkit": ..., "torch": ..., "triton": ...},
                "sources": {"paged_decode/triton": "<hash of the kernel's source files>"}},
     "entries": {"paged_decode/triton": {"<bucket>": {"config": {...}, "us": 12.3, "default_us": 14.1}}}}

Reading never raises and never runs code: a file that cannot be used costs one warning that names it, and
the look-up goes on as if it were not there. Writing holds a lock, merges with what others wrote meanwhile,
and renames a complete file into place.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from attnkit import settings
from attnkit.arch import Arch

FORMAT = 1
SHIPPED = Path(__file__).parent / "tuned"
_PACKAGE = Path(__file__).parent.parent

_loaded: dict[Path, tuple[tuple[int, int, int], dict[str, Any] | None]] = {}
_warned: set[Path] = set()


class TunedFileWarning(UserWarning):
    """A file of tuned configs was not used."""


def user_path(arch: Arch) -> Path:
    return settings.get().cache_dir / "tuned" / f"{arch.name}.json"


def shipped_path(arch: Arch) -> Path:
    return SHIPPED / f"{arch.name}.json"


def key(space: Any) -> str:
    return f"{space.op}/{space.kernel}"


@cache
def versions() -> dict[str, str]:
    """What a header records. Read from package metadata, so that nothing is imported for it."""
    found = {}
    for name in ("attnkit", "torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@cache
def source_hash(sources: tuple[str, ...]) -> str | None:
    """Hash of a kernel's source files, or None where they are not installed (a wheel has no csrc/).

    Paths are the repository's; an installed triton_kernels/ lies inside the package.
    """
    digest = hashlib.sha256()
    for source in sorted(sources):
        path = next((base / source for base in (_PACKAGE.parent, _PACKAGE) if (base / source).is_file()), None)
        if path is None:
            return None
        digest.update(source.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _warn(path: Path, why: str) -> None:
    """One warning a file and process, naming the file."""
    if path not in _warned:
        _warned.add(path)
        warnings.warn(f"attnkit: {path}: {why}", TunedFileWarning, stacklevel=2)


def _well_formed(data: Any) -> bool:
    if not isinstance(data, dict):
        return False
    header, entries = data.get("header"), data.get("entries")
    if not isinstance(header, dict) or not isinstance(entries, dict):
        return False
    if not isinstance(header.get("versions"), dict) or not isinstance(header.get("sources"), dict):
        return False
    return all(
        isinstance(buckets, dict) and all(isinstance(e, dict) and isinstance(e.get("config"), dict) for e in buckets.values())
        for buckets in entries.values()
    )


def _set_aside(path: Path, error: str) -> None:
    moved = "ignored"
    if path.parent != SHIPPED:
        aside = path.with_name(path.name + ".corrupt")
        with contextlib.suppress(OSError):
            os.replace(path, aside)
            moved = f"set aside as {aside.name}"
    _warn(path, f"not a file of tuned configs ({error}); {moved}, using defaults")


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino


def read(path: Path) -> dict[str, Any] | None:
    """The file's content, or None where there is none or it cannot be used. Re-read when it changes."""
    stamp = _stamp(path)
    if stamp is None:
        return None
    known = _loaded.get(path)
    if known is not None and known[0] == stamp:
        return known[1]
    data: dict[str, Any] | None = None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not _well_formed(data):
            data = None
            _set_aside(path, "its header or entries are not as expected")
    except OSError as error:
        _warn(path, f"cannot be read ({error.strerror}); using defaults")
    except ValueError as error:  # not UTF-8, or not JSON
        _set_aside(path, str(error))
    _loaded[path] = (stamp, data)
    return data


def mismatch(data: dict[str, Any], space: Any, arch: Arch) -> str | None:
    """Why the file's entries do not belong to this device and kernel, or None."""
    header = data["header"]
    if header.get("format") != FORMAT:
        return f"has format {header.get('format')!r}, wanted {FORMAT}"
    if header.get("gpu") != arch.name:
        return f"was tuned on {header.get('gpu')!r}, this is {arch.name!r}"
    made, here = header["versions"], versions()
    if space.kernel.startswith("triton") and made.get("triton") != here.get("triton"):
        return f"was tuned with Triton {made.get('triton')}, this is {here.get('triton')}"
    source = source_hash(space.sources)
    if source is None:
        if made.get("attnkit") != here.get("attnkit"):
            return f"was tuned with attnkit {made.get('attnkit')}, this is {here.get('attnkit')}"
    elif header["sources"].get(key(space)) != source:
        return f"was tuned for other sources of {key(space)}"
    return None


def lookup(path: Path, space: Any, bucket: Callable[[Any], str], sig: Any, arch: Arch, quiet: bool = False) -> Any | None:
    """The config that ``path`` holds for ``sig``, or None. ``quiet``: a mismatch is expected, say nothing."""
    data = _memory.get(path) or read(path)
    if data is None:
        return None
    buckets = data["entries"].get(key(space))
    if not buckets:
        return None
    why = mismatch(data, space, arch)
    if why is not None:
        if not quiet:
            _warn(path, f"{why}; using defaults (run `attnkit tune`)")
        return None
    entry = buckets.get(bucket(sig))
    if entry is None:
        return None
    try:
        return space.Config(**entry["config"])
    except (TypeError, ValueError) as error:
        _warn(path, f"{key(space)}: {error}; using defaults (run `attnkit tune`)")
        return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    import fcntl

    with open(path.with_name(path.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _merge(old: dict[str, Any] | None, space: Any, new: dict[str, Any], arch: Arch) -> dict[str, Any]:
    name = key(space)
    source = source_hash(space.sources) or "unknown"
    usable = old is not None and old["header"].get("format") == FORMAT and old["header"].get("gpu") == arch.name
    entries: dict[str, Any] = dict(old["entries"]) if old is not None and usable else {}
    sources: dict[str, Any] = dict(old["header"]["sources"]) if old is not None and usable else {}
    if usable and old is not None and old["header"]["versions"].get("triton") != versions().get("triton"):
        entries = {k: v for k, v in entries.items() if "/triton" not in k}
    kept = entries.get(name, {}) if sources.get(name) == source else {}
    entries[name] = dict(sorted({**kept, **new}.items()))
    sources[name] = source
    header = {"format": FORMAT, "gpu": arch.name, "versions": versions(), "sources": dict(sorted(sources.items()))}
    return {"header": header, "entries": dict(sorted(entries.items()))}


def write_json(path: Path, data: Any) -> None:
    """Write to a temporary name in the same folder, then rename: readers see the old file or the new."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(data, file, indent=1)
            file.write("\n")
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def update(path: Path, space: Any, entries: dict[str, Any], arch: Arch) -> bool:
    """Add ``entries`` (bucket -> {"config", ...}) of one kernel. False, with one warning, where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            write_json(path, _merge(read(path), space, entries, arch))
    except OSError as error:
        _warn(path, f"cannot be written ({error.strerror}); tuned configs last until this process ends")
        data = _merge(_memory.get(path), space, entries, arch)
        _memory[path] = data
        return False
    return True


#: What could not be written, by path: still served in this process.
_memory: dict[Path, dict[str, Any]] = {}


def forget() -> None:
    """Drop what was read and what was warned of (tests, and a changed ATTNKIT_CACHE_DIR)."""
    _loaded.clear()
    _warned.clear()
    _memory.clear()
