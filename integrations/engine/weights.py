"""safetensors on disk: found, checked against what the model wants, then read. Nothing is ever unpickled.

The model's own constructor says what it wants: run with ``Wishes`` it allocates nothing and leaves the
list of names and shapes; run with ``Reader`` it gets the tensors. Between the two, ``Checkpoint.check`` compares
that list with the files' headers, so a bad checkpoint costs no memory.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from torch import Tensor

from .config import CheckpointError, read_json

_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8, "C64": 64,
}  # fmt: skip
_HEADER_LIMIT = 100_000_000
#: Buffers that old checkpoints carry and no model reads.
_IGNORED = (".rotary_emb.inv_freq", ".rotary_emb.cos_cached", ".rotary_emb.sin_cached")


class Source(Protocol):
    """What a model's constructor takes its tensors from."""

    def __call__(self, name: str, *shape: int) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Entry:
    file: Path
    dtype: str
    shape: tuple[int, ...]


class Wishes:
    """A Source that allocates nothing and notes what was asked for."""

    def __init__(self) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        self.shapes[name] = shape
        return torch.empty(shape, device="meta")


class Reader:
    """A Source that reads from a checked checkpoint, converting to one dtype on one device."""

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> None:
        self.entries, self.dtype, self.device = checkpoint.entries, dtype, device
        self._open: dict[Path, Any] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        path = self.entries[name].file
        if path not in self._open:
            self._open[path] = safe_open(path, framework="pt", device="cpu")
        return self._open[path].get_tensor(name).to(self.device, self.dtype)


class Checkpoint:
    """The safetensors files of one directory, by their headers alone.

    Raises CheckpointError for files that are missing, truncated, or whose header does not describe them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.entries: dict[str, Entry] = {}
        index = directory / "model.safetensors.index.json"
        if index.exists():
            self._read_index(index)
            return
        single = directory / "model.safetensors"
        if not single.exists():
            raise CheckpointError(_missing(directory))
        self.entries = read_header(single)

    def _read_index(self, index: Path) -> None:
        wanted = read_json(index).get("weight_map")
        if not isinstance(wanted, dict) or not wanted:
            raise CheckpointError(f"{index}: weight_map is missing or empty")
        headers: dict[str, dict[str, Entry]] = {}
        for tensor, file in wanted.items():
            plain = isinstance(file, str) and file not in ("", ".", "..") and not any(c in file for c in "/\\:\0")
            if not plain or not file.endswith(".safetensors"):
                wish = "wanted a .safetensors file in the same directory"
                raise CheckpointError(f"{index}: {tensor} is said to be in {file!r}, {wish}")
            if file not in headers:
                if not (self.directory / file).exists():
                    raise CheckpointError(f"{index}: {tensor} is said to be in {file}, which does not exist")
                headers[file] = read_header(self.directory / file)
            if tensor not in headers[file]:
                raise CheckpointError(f"{self.directory / file}: {tensor} is not in it, though {index.name} says so")
        for entries in headers.values():
            for tensor, entry in entries.items():
                if tensor in self.entries:
                    raise CheckpointError(f"{entry.file}: {tensor} is also in {self.entries[tensor].file.name}")
                self.entries[tensor] = entry

    def check(self, shapes: dict[str, tuple[int, ...]], optional: tuple[str, ...] = ()) -> None:
        """Compare with what the model wants; ``optional`` names may be there and are not read."""
        for name, shape in shapes.items():
            entry = self.entries.get(name)
            if entry is None:
                raise CheckpointError(f"{self._files()}: {name} {list(shape)} is missing")
            if entry.shape != shape:
                raise CheckpointError(f"{entry.file}: {name} has shape {list(entry.shape)}, config.json wants {list(shape)}")
            if entry.dtype not in _FLOATS:
                raise CheckpointError(f"{entry.file}: {name} has dtype {entry.dtype}, supported: {', '.join(_FLOATS)}")
        for name, entry in self.entries.items():
            if name not in shapes and name not in optional and not name.endswith(_IGNORED):
                raise CheckpointError(f"{entry.file}: {name} {list(entry.shape)} is not part of this model")

    def dtype(self) -> torch.dtype:
        """The dtype most of the elements have."""
        count = dict.fromkeys(_FLOATS, 0)
        for entry in self.entries.values():
            if entry.dtype in count:
                count[entry.dtype] += math.prod(entry.shape)
        return _FLOATS[max(count, key=lambda d: count[d])]

    def _files(self) -> str:
        files = sorted({e.file for e in self.entries.values()})
        return str(files[0]) if len(files) == 1 else f"{self.directory}: {len(files)} safetensors files"


def read_header(path: Path) -> dict[str, Entry]:
    """A safetensors file's tensors, with every claim of its header checked against the file's size."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if len(head) < 8 or length > size - 8 or length > _HEADER_LIMIT:
            raise CheckpointError(f"{path}: truncated or no safetensors file ({size} bytes; the header claims {length})")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not readable: {error}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is a {type(header).__name__}, wanted an object")
    header.pop("__metadata__", None)
    entries, spans = {}, []
    for name, claim in header.items():
        entry, start, stop = _entry(path, name, claim)
        if stop > size - 8 - length:
            raise CheckpointError(f"{path}: truncated: {name} ends at byte {stop} of {size - 8 - length} bytes of data")
        entries[name] = entry
        spans.append((start, stop, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise CheckpointError(f"{path}: {name} begins at byte {start} of the data, the tensor before it ends at {end}")
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(f"{path}: {size - 8 - length - end} bytes behind the last tensor belong to none")
    return entries


def _entry(path: Path, name: str, claim: Any) -> tuple[Entry, int, int]:
    try:
        dtype, shape, (start, stop) = claim["dtype"], tuple(claim["shape"]), claim["data_offsets"]
        whole = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in (*shape, start, stop))
        bits = _BITS[dtype] * math.prod(shape)
    except (TypeError, KeyError, ValueError):
        raise CheckpointError(f"{path}: the header's entry of {name} is malformed: {str(claim)[:200]}") from None
    if not whole or stop - start != -(-bits // 8):
        raise CheckpointError(f"{path}: {name} is {dtype} {list(shape)} but has bytes {start} to {stop}")
    return Entry(path, dtype, shape), start, stop


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)} appears twice")
    return out


def _missing(directory: Path) -> str:
    """Why there is nothing to load; pickled weights are refused by name."""
    if not directory.is_dir():
        return f"{directory}: no such directory"
    pickled = sorted(p.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(suffix))
    if pickled:
        return (
            f"{directory / pickled[0]}: pickled weights are not loaded, because unpickling runs code; "
            "convert them with save_pretrained(..., safe_serialization=True)"
        )
    return f"{directory / 'model.safetensors'}: no such file (and no model.safetensors.index.json)"
