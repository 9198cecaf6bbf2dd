"""The prefill kernel's builds."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant


def build(D: int, Dv: int, bf16: bool, consumers: int, block: int, stages: int) -> Variant:
    """One build of csrc/cuda/prefill_sm90.cu: PrefillShape's parameters."""
    values = {"D": D, "DV": Dv, "BF16": int(bf16), "CONSUMERS": consumers, "BN": block, "STAGES": stages}
    return variant("prefill_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})


def shipped() -> list[Variant]:
    """What configs/prefill_cuda.py's default() asks for."""
    shapes = ((64, 64, 3, 128, 4), (128, 128, 2, 128, 2), (192, 128, 2, 128, 2), (256, 256, 2, 64, 2))
    return [build(D, Dv, bf16, *rest) for D, Dv, *rest in shapes for bf16 in (True, False)]
