"""The builds of the W8A8 kernel for few tokens, and its shared memory."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: Columns of a tile, int8 and e4m3: half of them a warpgroup's.
WIDTHS = {True: (128, 160, 224), False: (64, 96, 128, 160, 224)}
#: Columns of a tall tile, likewise: a warpgroup has 64 of its tokens, and all columns.
TALL_WIDTHS = {True: (64, 80, 96, 112, 128), False: (64, 80, 96)}
#: int8's with deep slices, 256 bytes of K and not 128: of low tiles and tall ones.
DEEP_WIDTHS = {False: (64, 96), True: (64, 80, 96)}
#: Tokens of a tile, and of a tall one.
LOW, TALL = 64, 128
#: Sizes of csrc/cuda/gemm/gemm_skinny_sm90.cuh (SkinnyShape).
THREADS = 288
MOST_STAGES = 32
MOST_SHARED = 227 * 1024


def widths(int8: bool, tall: bool, deep: bool = False) -> tuple[int, ...]:
    if deep:
        return DEEP_WIDTHS[tall] if int8 else ()
    return (TALL_WIDTHS if tall else WIDTHS)[int8]


def splits(tall: bool) -> tuple[int, ...]:
    return (1, 2) if tall else (1, 2, 4)


def tokens(tall: bool) -> int:
    return TALL if tall else LOW


def build(int8: bool, block_n: int, tall: bool = False, deep: bool = False) -> Variant:
    values = {"INT8": int(int8), "BN": block_n, "PLANES": 1 + deep, "TALL": int(tall)}
    return variant("gemm/gemm_skinny_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def most_ctas(int8: bool, block_n: int, tall: bool = False) -> int:
    """CTAs that the registers of a multiprocessor hold (SkinnyShape::PerSm)."""
    wide = block_n if tall else block_n // 2
    return 2 if wide <= (64 if int8 else 32) else 1


def slice_bytes(deep: bool = False) -> int:
    """Bytes of K that a CTA loads and multiplies at a time."""
    return 256 if deep else 128


def rows(M: int) -> int:
    """Rows of a in a slice."""
    return -(-M // 8) * 8


def stage_bytes(M: int, block_n: int, deep: bool = False) -> int:
    return (rows(M) + block_n) * slice_bytes(deep)


def lines(M: int, ctas: int) -> bool:
    """Whether rows leave in whole lines: 2 KB a warp, which costs a slice where two CTAs share a multiprocessor."""
    return ctas == 1 or M > 8


def fixed_bytes(M: int, block_n: int, splits: int, ctas: int, tall: bool = False) -> int:
    """Everything but the ring: what SkinnyShared lays out behind it, and the ring's alignment."""
    half = (block_n if tall else block_n // 2) // 16
    own = (1 if tall else 2) * -(-M // 16) * max(2048 * lines(M, ctas), (splits - 1) * half * 512)
    return 1024 + own + 8 * block_n + 16 * MOST_STAGES + 16


def stages(M: int, block_n: int, splits: int, ctas: int, tall: bool = False, deep: bool = False) -> int:
    """Slices in flight: as many as shared memory holds where ``ctas`` share a multiprocessor (which takes 1 KB of each)."""
    budget = MOST_SHARED if ctas == 1 else 228 * 1024 // ctas - 1024
    return min(MOST_STAGES, (budget - fixed_bytes(M, block_n, splits, ctas, tall)) // stage_bytes(M, block_n, deep))


def shipped() -> list[Variant]:
    kinds = [(int8, tall, deep) for int8 in (True, False) for tall in (False, True) for deep in (False, True)]
    return [build(int8, width, tall, deep) for int8, tall, deep in kinds for width in widths(int8, tall, deep)]
