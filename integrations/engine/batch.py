"""A step's tensors. Decoding rows live in arrays that persist and change by what changed; prompts are laid out anew."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnkit import PageTable

from .request import Request
from .scheduler import Schedule


@dataclass(frozen=True, slots=True)
class Prefill:
    """The prompt part of a batch: B sequences, T tokens.

    table    pages and lens of the B sequences
    cu_q     int32 [B + 1], where each one's tokens start
    cu_k     int32 [B + 1], the same for all its keys, those in the cache included
    context  int64 [cu_k[-1]]: the cache slots of those keys; None where the T tokens themselves are all of them
    """

    table: PageTable
    cu_q: Tensor
    cu_k: Tensor
    context: Tensor | None


@dataclass(frozen=True, slots=True)
class Batch:
    """
    tokens, positions, slots   int64 [T]: what goes in, where it stands in its text, where its KV goes (-1: nowhere)
    n_decode                   the first rows are one newest token of as many sequences; the rest is prefill
    decode, prefill            how to reach the cache; None where there are no such rows
    rows                       int64: the rows whose logits are wanted; None means all
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    n_decode: int
    decode: PageTable | None
    prefill: Prefill | None
    rows: Tensor | None


class DecodeRows:
    """The decoding requests' rows, in arrays on the host and (on a GPU) in fixed device buffers.

    Rows beyond the last request are idle: token 0, slot -1, length 0, so a padded batch writes and reads nothing.
    """

    def __init__(self, max_batch: int, width: int, page_size: int, device: torch.device) -> None:
        self.page_size = page_size
        self._remote = device.type != "cpu"
        host_ints = torch.zeros((3, max_batch), dtype=torch.int64, pin_memory=self._remote)
        host_ints[2] = -1
        host_lens = torch.zeros(max_batch, dtype=torch.int32, pin_memory=self._remote)
        host_pages = torch.zeros((max_batch, width), dtype=torch.int32)
        self._host = host_ints, host_lens
        self.ints, self.lens, self.pages = host_ints.to(device), host_lens.to(device), host_pages.to(device)
        self._tokens, self._positions, self._slots = host_ints.numpy()
        self._lengths, self._table = host_lens.numpy(), host_pages.numpy()
        self._lists: list[list[int]] = []  # whose pages a row of the table holds

    def update(self, requests: list[Request]) -> int:
        """Bring the rows to ``requests``, one token each. Returns the columns of the table in use."""
        n, S = len(requests), self.page_size
        moved = self._move([r.pages for r in requests])
        if not n:
            return 0
        self._tokens[:n] = [r.output[-1] for r in requests]
        self._lengths[:n] = [r.length for r in requests]
        positions = np.subtract(self._lengths[:n], 1, out=self._positions[:n], dtype=np.int64)
        columns, offsets = np.divmod(positions, S)
        entered = np.flatnonzero(offsets == 0)  # rows that enter a new page
        for row in entered:
            self._table[row, columns[row]] = requests[row].pages[columns[row]]
        self._slots[:n] = self._table[np.arange(n), columns] * np.int64(S) + offsets
        if self._remote:
            for device, host in zip((self.ints, self.lens), self._host):
                device.copy_(host, non_blocking=True)
            self._send(moved + [(int(row), int(columns[row]), int(columns[row]) + 1) for row in entered])
        return int(columns.max()) + 1

    def _move(self, lists: list[list[int]]) -> list[tuple[int, int, int]]:
        """Fill the rows of the table that do not hold the same request as before; idle the rows beyond.

        Returns the parts of the table that changed: (row, first column, column after the last).
        """
        n, before = len(lists), self._lists
        self._lists = lists
        if len(before) > n:
            self._tokens[n:], self._positions[n:], self._slots[n:], self._lengths[n:] = 0, 0, -1, 0
        moved = []
        for row, pages in enumerate(lists):
            if row >= len(before) or before[row] is not pages:  # a preempted request comes back with a new list
                self._table[row, : len(pages)] = pages
                moved.append((row, 0, len(pages)))
        return moved

    def _send(self, parts: list[tuple[int, int, int]]) -> None:
        """Bring changed parts of the table to the device: the whole would be megabytes at long contexts."""
        if not parts:
            return
        width = self._table.shape[1]
        at = np.concatenate([np.arange(row * width + a, row * width + b) for row, a, b in parts])
        both = torch.from_numpy(np.stack((at, self._table.reshape(-1)[at]))).to(self.pages.device)
        self.pages.view(-1)[both[0]] = both[1].to(torch.int32)

    def width_for(self, columns: int) -> int:
        """Table widths go in powers of two: a kernel's plan, or a captured graph, serves until the next one."""
        return min(max(8, 1 << (columns - 1).bit_length() if columns else 0), self.pages.shape[1])

    def batch(self, size: int, width: int) -> Batch:
        """The first ``size`` rows, with ``width`` columns of the table: views of the same memory every time."""
        tokens, positions, slots = self.ints[:, :size]
        table = PageTable(self.pages[:size, :width], self.lens[:size])
        return Batch(tokens, positions, slots, size, table, None, None)


def build(step: Schedule, rows: DecodeRows, device: torch.device) -> Batch:
    """The batch of one step. Decoding rows come first."""
    n = len(step.decode)
    decode = rows.batch(n, rows.width_for(rows.update(step.decode)))
    if not step.prefill:
        return decode
    S = rows.page_size
    starts = np.array([r.computed for r, _ in step.prefill])
    counts = np.array([count for _, count in step.prefill])
    ends = starts + counts
    table = np.zeros((len(counts), max(len(r.pages) for r, _ in step.prefill)), dtype=np.int32)
    for row, (request, _) in enumerate(step.prefill):
        table[row, : len(request.pages)] = request.pages
    tokens = np.concatenate([np.array(r.known(r.computed, r.computed + c), dtype=np.int64) for r, c in step.prefill])
    positions = np.concatenate([np.arange(a, b) for a, b in zip(starts, ends)])
    slots = np.concatenate([_slots(table[i], a, b, S) for i, (a, b) in enumerate(zip(starts, ends))])
    context = None
    if starts.any():
        context = np.concatenate([_slots(table[i], 0, b, S) for i, b in enumerate(ends)])
    last = np.cumsum(counts) - 1 + n
    done = [i for i, (r, c) in enumerate(step.prefill) if r.computed + c == r.length]
    wanted = np.concatenate((np.arange(n), last[done]))

    def put(array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(array).to(device, dtype)

    prefill = Prefill(
        PageTable(put(table, torch.int32), put(ends, torch.int32)),
        put(np.concatenate(([0], np.cumsum(counts))), torch.int32),
        put(np.concatenate(([0], np.cumsum(ends))), torch.int32),
        None if context is None else put(context, torch.int64),
    )
    ints = put(np.stack((tokens, positions, slots)), torch.int64)
    all_tokens, all_positions, all_slots = torch.cat((rows.ints[:, :n], ints), 1)
    return Batch(all_tokens, all_positions, all_slots, n, decode.decode if n else None, prefill, put(wanted, torch.int64))


def _slots(pages: np.ndarray, start: int, stop: int, page_size: int) -> np.ndarray:
    """Cache slots of the tokens start .. stop - 1 of a sequence."""
    at = np.arange(start, stop)
    return pages[at // page_size].astype(np.int64) * page_size + at % page_size
