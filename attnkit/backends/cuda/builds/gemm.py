"""The W8A8 kernel's builds for more than a few rows."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: Columns of a tile, int8 and e4m3 (which keeps a second set of sums, and so stops earlier).
WIDTHS = {True: (64, 80, 96, 112, 128, 144, 160, 176, 192, 224, 256), False: (64, 96, 128, 160, 192)}
#: Where warpgroups take tiles in turn, each holds 128 rows of int32 sums.
TURN_WIDTHS = (128, 144, 160, 176)
MOST_STAGES = 8
MOST_SHARED = 227 * 1024


def shared_bytes(block_m: int, block_n: int, stages: int) -> int:
    """What csrc/cuda/gemm/gemm_sm90.cuh's SharedBytes says."""
    staging, scales = 128 * block_m, 16 * block_n
    return 1024 + stages * (block_m + block_n) * 128 + staging + scales + 256


def stages(block_m: int, block_n: int) -> int:
    """Slices in flight: as many as shared memory holds."""
    return min(MOST_STAGES, (MOST_SHARED - shared_bytes(block_m, block_n, 0)) // ((block_m + block_n) * 128))


def parts(int8: bool, block_n: int) -> int:
    """Sets of e4m3 sums beside the float32 ones: a second one, where registers hold it, keeps the tensor cores busy."""
    return 2 if not int8 and block_n <= 128 else 1


def build(int8: bool, block_m: int, block_n: int, turns: bool = False) -> Variant:
    """One build of csrc/cuda/gemm/gemm_sm90.cu: GemmShape's parameters."""
    values = {
        "INT8": int(int8),
        "CONSUMERS": block_m // 64,
        "BN": block_n,
        "STAGES": stages(block_m, block_n),
        "TURNS": int(turns),
        "PARTS": parts(int8, block_n),
    }
    return variant("gemm/gemm_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def shipped() -> list[Variant]:
    """All of them: configs/gemm_cuda.py's default() fits the width to M, N and the multiprocessors."""
    together = [build(int8, 128, width) for int8, widths in WIDTHS.items() for width in widths]
    return [*together, *(build(True, 128, width, turns=True) for width in TURN_WIDTHS)]
