"""Configs of sample."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.arch import Arch
from attnkit.configs import Space, pow2
from attnkit.signature import SampleSig


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """
    parts         programs a row is split over (greedy and plain temperature; filters split by blocks of 8192)
    tile          tokens of a program in flight, a power of two of at most 8192
    num_warps     of those programs
    filter_tile   the same for the filters' second read
    filter_warps  of both of the filters' reads
    stages        tiles in flight of a program, the one at hand included
    """

    parts: int
    tile: int
    num_warps: int
    filter_tile: int
    filter_warps: int
    stages: int


def filtered(sig: SampleSig) -> bool:
    """True if top-k, top-p or min-p may leave tokens out (a tensor may; temperature 0 overrides all three)."""
    if sig.temperature == 0.0:
        return False
    k = sig.top_k is None or 0 < sig.top_k < sig.V
    p = sig.top_p is None or sig.top_p < 1.0
    return k or p or sig.min_p is None or sig.min_p > 0.0


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def default(sig: SampleSig, arch: Arch) -> TritonConfig:
    """Enough programs for about four a multiprocessor, each with at least two tiles of its row."""
    tile = 1024
    wanted = _cdiv(4 * max(arch.sms, 1), max(sig.B, 1)) if arch.sm else 2
    return TritonConfig(max(1, min(wanted, _cdiv(sig.V, 2 * tile), 64)), tile, 4, 1024, 4, 1)


def candidates(sig: SampleSig, arch: Arch) -> list[TritonConfig]:
    base = default(sig, arch)
    found = [base]
    if arch.sm == 0:
        return found
    if filtered(sig):
        found += [
            TritonConfig(base.parts, base.tile, 4, *c)
            for c in ((512, 2, 1), (2048, 4, 1), (2048, 8, 1), (1024, 4, 3), (2048, 8, 3))
        ]
    else:
        for tile, warps, stages in ((1024, 4, 1), (2048, 8, 1), (1024, 4, 3), (2048, 8, 3)):
            for waves in (2, 8):
                parts = max(1, min(_cdiv(waves * arch.sms, sig.B), _cdiv(sig.V, tile), 128))
                found.append(TritonConfig(parts, tile, warps, 1024, 4, stages))
    return list(dict.fromkeys(found))


def bucket(sig: SampleSig) -> str:
    kind = {"torch.float32": "fp32", "torch.bfloat16": "bf16", "torch.float16": "fp16"}[str(sig.dtype)]
    how = "filter" if filtered(sig) else "greedy" if sig.temperature == 0.0 else "draw"
    return f"B{pow2(sig.B)}-V{pow2(sig.V)}-{kind}-{how}"


TRITON = Space(
    "sample", "triton", TritonConfig, default, candidates, bucket,
    sources=("triton_kernels/sampling.py", "triton_kernels/filters.py", "triton_kernels/logits.py"),
)  # fmt: skip
