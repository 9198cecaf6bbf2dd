"""The builds of sample_from_hidden's kernel, and its shared memory."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: Rows of hidden that the builds multiply.
ROWS = (8, 16, 32, 64)
#: Sizes of csrc/cuda/hidden/hidden_sm90.cuh: tokens of a tile, of its four stretches, and elements of H in a slice.
TILE, STRETCH, SLICE = 128, 32, 128
THREADS = 288
MOST_STAGES = 32
MOST_SHARED = 227 * 1024
#: Tokens of a piece, whose groups tiles take eight at a time (csrc/cuda/sampling/sample_group_sm90.cuh).
PIECE = 512


def rows(B: int) -> int:
    """The build that takes B rows."""
    return next(n for n in ROWS if B <= n)


def build(bf16: bool, B: int) -> Variant:
    values = {"BF16": int(bf16), "ROWS": rows(B)}
    return variant("hidden/hidden_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def tiles(V: int, draws: bool = True) -> int:
    """Tiles that have a token of the row. One that is drawn from lies in a piece, whose last may have fewer than four."""
    return V // PIECE * 4 + min(4, -(-(V % PIECE) // STRETCH)) if draws else -(-V // TILE)


def pitch(V: int) -> int:
    """From row to row of logits: they leave four at a time."""
    return -(-V // 4) * 4


def _stage_bytes(B: int) -> int:
    return (TILE + rows(B)) * SLICE * 2


def _fixed_bytes(B: int) -> int:
    """Everything but the ring: what HiddenShared lays out behind it, and the ring's alignment."""
    return 1024 + rows(B) * (TILE + 4) * 4 + 16 * MOST_STAGES + 16


def stages(B: int, wanted: int = MOST_STAGES) -> int:
    """Slices in flight: as many as shared memory holds, and no more than ``wanted``."""
    return min(wanted, MOST_STAGES, (MOST_SHARED - _fixed_bytes(B)) // _stage_bytes(B))


def shared_bytes(B: int, wanted: int = MOST_STAGES) -> int:
    """So much that no two CTAs share a multiprocessor."""
    return max(_fixed_bytes(B) + stages(B, wanted) * _stage_bytes(B), MOST_SHARED // 2 + 1024)


def partial_bytes(B: int) -> int:
    """A CTA's two parts of tiles that it shares."""
    return 2 * TILE * rows(B) * 4


def shipped() -> list[Variant]:
    return [build(bf16, n) for bf16 in (True, False) for n in ROWS]
