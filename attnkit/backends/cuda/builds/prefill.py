"""The prefill kernel's builds."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant


def build(D: int, Dv: int, bf16: bool, consumers: int, block: int, stages: int) -> Variant:
    """One build of csrc/cuda/prefill/prefill_sm90.cu: PrefillShape's parameters."""
    values = {"D": D, "DV": Dv, "BF16": int(bf16), "CONSUMERS": consumers, "BN": block, "STAGES": stages}
    return variant("prefill/prefill_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def build_q8(D: int, Dv: int, bf16: bool, int8: bool, stages: int, raw: int) -> Variant:
    """One build of csrc/cuda/prefill/prefill_q8_sm90.cu: PrefillQ8Shape's parameters (KV as in convert.cuh)."""
    values = {"D": D, "DV": Dv, "BF16": int(bf16), "KV": 3 if int8 else 2, "STAGES": stages, "RAW": raw}
    return variant("prefill/prefill_q8_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


#: Head sizes an 8-bit cache is served at, with stages of widened tiles and of raw ones.
Q8_STAGES = {(64, 64): (2, 6), (128, 128): (2, 3)}


def shipped() -> list[Variant]:
    """What configs/prefill_cuda.py's default() asks for, and all of prefill_q8.py's."""
    shapes = (
        (64, 64, 3, 128, 4),
        (128, 128, 2, 128, 2),
        (192, 128, 2, 128, 2),
        (256, 256, 2, 64, 2),
    )
    both = (True, False)
    wide = [build_q8(*heads, bf16, int8, *rest) for heads, rest in Q8_STAGES.items() for bf16 in both for int8 in both]
    return [build(D, Dv, bf16, *rest) for D, Dv, *rest in shapes for bf16 in both] + wide
