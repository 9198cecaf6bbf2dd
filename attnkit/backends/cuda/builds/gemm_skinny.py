"""The builds of the W8A8 kernel for few tokens, and its shared memory."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: Columns of a tile, and the 128 bytes of K that a CTA loads and multiplies at a time.
PLANES = {64: 2, 96: 2, 128: 2, 160: 1, 224: 1}
WIDTHS = tuple(PLANES)
MOST_TOKENS = 64
#: Sizes of csrc/cuda/gemm/gemm_skinny_sm90.cuh (SkinnyShape).
THREADS = 288
MOST_STAGES = 32
MOST_SHARED = 227 * 1024


def build(int8: bool, block_n: int) -> Variant:
    return variant(
        "gemm/gemm_skinny_sm90.cu", {"ATTNKIT_INT8": int(int8), "ATTNKIT_BN": block_n, "ATTNKIT_PLANES": PLANES[block_n]}
    )


def most_ctas(int8: bool, block_n: int) -> int:
    """CTAs that the registers of a multiprocessor hold (SkinnyShape::PerSm)."""
    return 2 if block_n <= (160 if int8 else 128) else 1


def slice_bytes(block_n: int) -> int:
    """Bytes of K that a CTA loads and multiplies at a time."""
    return 128 * PLANES[block_n]


def rows(M: int) -> int:
    """Rows of a in a slice."""
    return -(-M // 8) * 8


def stage_bytes(M: int, block_n: int) -> int:
    return (rows(M) + block_n) * slice_bytes(block_n)


def fixed_bytes(M: int, block_n: int, splits: int) -> int:
    """Everything but the ring: what SkinnyShared lays out behind it, and the ring's alignment."""
    share = -(-(block_n // 8) // splits)
    return 1024 + splits * M * 32 * (share | 1) + (2 * block_n + 64) * 4 + 16 * MOST_STAGES + 16


def stages(M: int, block_n: int, splits: int, ctas: int) -> int:
    """Slices in flight: as many as shared memory holds where ``ctas`` share a multiprocessor (which takes 1 KB of each)."""
    budget = MOST_SHARED if ctas == 1 else 228 * 1024 // ctas - 1024
    return min(MOST_STAGES, (budget - fixed_bytes(M, block_n, splits)) // stage_bytes(M, block_n))


def shipped() -> list[Variant]:
    return [build(int8, width) for int8 in (True, False) for width in WIDTHS]
