"""The quantise kernels' builds: one a form and a type, each with a kernel for every number of chunks a thread."""

from __future__ import annotations

from attnkit.backends.cuda.images import Variant, variant

#: enum Form of csrc/cuda/quantize/quantize_sm90.cuh, and enum Type of convert.cuh.
PLAIN, RMS_NORM, SILU_MUL = 0, 1, 2
BF16, F16, F32 = 0, 1, 4
#: Values that are loaded, kept and stored together.
CHUNK = 8


def build(form: int, type_code: int) -> Variant:
    return variant("quantize/quantize_sm90.cu", {"ATTNKIT_FORM": form, "ATTNKIT_X": type_code})


def chunks(form: int, type_code: int, streamed: bool = False) -> tuple[int, ...]:
    """How many chunks a thread may keep: which kernels of a build exist."""
    if type_code == F32:
        return () if streamed else (1, 2)
    if streamed:
        return {PLAIN: (), RMS_NORM: (4,), SILU_MUL: (2, 4)}[form]
    return (1, 2, 4, 8) if form == PLAIN else (1, 2, 4)


def long_chunks(type_code: int) -> int:
    """What a thread keeps of a row that does not fit the registers of a CTA."""
    return 2 if type_code == F32 else 4


def kernel_name(int8: bool, kept: int, held: bool, streamed: bool) -> str:
    """``held``: threads that keep so many chunks hold a row."""
    way = "_streamed" if streamed else "" if held else "_long"
    return f"attnkit_quantize_{'int8' if int8 else 'e4m3'}_{kept}{way}"


def paired(form: int, type_code: int, kept: int) -> bool:
    """Whether chunks stand in pairs, whose codes are one store (quantize_pairs): plain 16-bit rows that a CTA holds."""
    return form == PLAIN and type_code != F32 and kept in (2, 4)


def most_warps(form: int, type_code: int, kept: int, streamed: bool = False) -> int:
    """Warps that a CTA may have: the launch bounds."""
    if streamed:
        return 32 if kept == 2 else 20 if form == SILU_MUL else 16
    if paired(form, type_code, kept):
        return 32 if kept == 2 else 24
    return 32 if kept == 1 else 16


def shipped() -> list[Variant]:
    return [build(form, code) for form in (PLAIN, RMS_NORM, SILU_MUL) for code in (BF16, F16)]
