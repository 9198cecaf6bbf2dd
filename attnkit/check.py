"""Binds shape letters to sizes and raises where two disagree. Runs once a signature, before any launch.

Every message names the op, the argument, what came and what was wanted:
``paged_decode: D is 128 in q but 64 in kv (dim 4)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
QUANTISED = (torch.int8, torch.float8_e4m3fn)
MAX_INT32 = 2**31 - 1


class Letters:
    """The sizes seen so far in one call, and where each was first seen."""

    def __init__(self, op: str, device: torch.device) -> None:
        self.op = op
        self.device = device
        self.size: dict[str, int] = {}
        self.where: dict[str, str] = {}

    def fail(self, argument: str, got: object, wanted: object) -> ValueError:
        return ValueError(f"{self.op}: {argument} is {got}, wanted {wanted}")

    def bind(self, letter: str, size: int, where: str, dim: int | None = None) -> None:
        known = self.size.setdefault(letter, size)
        first = self.where.setdefault(letter, where)
        if known != size:
            place = "" if dim is None else f" (dim {dim})"
            raise ValueError(f"{self.op}: {letter} is {known} in {first} but {size} in {where}{place}")

    def tensor(
        self,
        name: str,
        t: object,
        shape: str,
        dtypes: Sequence[torch.dtype],
        *,
        dense_last: bool = True,
        first_dim: int = 0,
    ) -> None:
        """Check ``t`` against letters ("B Q Hq D"; digits stand for themselves).

        ``first_dim`` shifts the dimension a message names, where ``t`` is a view of what the caller gave.
        """
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{self.op}: {name} is {type(t).__name__}, wanted a tensor [{', '.join(shape.split())}]")
        letters = shape.split()
        if t.device != self.device:
            raise ValueError(f"{self.op}: {name} is on {t.device} but the call runs on {self.device}")
        if t.dtype not in dtypes:
            raise self.fail(f"{name}'s dtype", t.dtype, " or ".join(str(d) for d in dtypes))
        if t.dim() != len(letters):
            raise self.fail(f"{name}'s shape", list(t.shape), f"[{', '.join(letters)}]")
        for i, (letter, size) in enumerate(zip(letters, t.shape)):
            if letter.isdecimal():
                if size != int(letter):
                    raise self.fail(f"dim {i} of {name}", size, letter)
            else:
                self.bind(letter, size, name, i + first_dim)
        if dense_last and t.dim() and t.shape[-1] > 1 and t.stride(-1) != 1:
            raise self.fail(f"{name}'s last stride", t.stride(-1), "1 (contiguous last dimension)")
        if t.is_complex() or t.layout != torch.strided:
            raise self.fail(f"{name}'s layout", t.layout, "torch.strided")

    def fits(self, letter: str, limit: int = MAX_INT32) -> None:
        if self.size[letter] > limit:
            raise self.fail(letter, self.size[letter], f"at most {limit}")


def is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def aligned16(*tensors: torch.Tensor | None) -> bool:
    """True if every base pointer and every stride but the last is a multiple of 16 bytes."""
    return multiples(16, *tensors)


def multiples(size: int, *tensors: torch.Tensor | None) -> bool:
    """True if every base pointer and every stride but the last is a multiple of ``size`` bytes."""
    for t in tensors:
        if t is None:
            continue
        if t.data_ptr() % size:
            return False
        item = t.element_size()
        if any(n > 1 and s * item % size for n, s in zip(t.shape[:-1], t.stride()[:-1])):
            return False
    return True


def table_values(op: str, pages: torch.Tensor, lens: torch.Tensor, pool: int, page_size: int) -> None:
    """ATTNKIT_DEBUG: lens within the table, and every page id in use within the pool. Synchronises."""
    capacity = pages.shape[1] * page_size
    bad = ((lens < 0) | (lens > capacity)).nonzero()
    if bad.numel():
        b = int(bad[0])
        raise ValueError(
            f"{op}: lens[{b}] = {int(lens[b])} is outside [0, {capacity}] (W x S = {pages.shape[1]} x {page_size})"
        )
    used = torch.arange(pages.shape[1], device=pages.device) < ((lens + page_size - 1) // page_size)[:, None]
    bad = (used & ((pages < 0) | (pages >= pool))).nonzero()
    if bad.numel():
        b, w = bad[0].tolist()
        raise ValueError(f"{op}: pages[{b}, {w}] = {int(pages[b, w])} is outside [0, {pool})")


def cumulative_values(op: str, name: str, cu: torch.Tensor, total: int) -> None:
    """ATTNKIT_DEBUG: cu starts at 0, never falls, and ends at the number of rows. Synchronises."""
    values = cu.tolist()
    if values[0] != 0 or values[-1] > total:
        raise ValueError(f"{op}: {name} runs from {values[0]} to {values[-1]}, wanted 0 to at most {total}")
    for i, (a, b) in enumerate(pairwise(values)):
        if b < a:
            raise ValueError(f"{op}: {name}[{i + 1}] = {b} is below {name}[{i}] = {a}")


def slot_values(op: str, slots: torch.Tensor, capacity: int) -> None:
    """ATTNKIT_DEBUG: every slot is -1 or within the pool. Synchronises."""
    bad = ((slots < -1) | (slots >= capacity)).nonzero()
    if bad.numel():
        t = int(bad[0])
        raise ValueError(f"{op}: slots[{t}] = {int(slots[t])} is outside [-1, {capacity})")


def inference_only(op: str, *tensors: torch.Tensor | None) -> None:
    if not torch.is_grad_enabled():
        return
    for t in tensors:
        if t is not None and t.requires_grad:
            raise RuntimeError(
                f"{op}: an input requires grad, and attnkit's ops have no backward; call them under torch.no_grad()"
            )
