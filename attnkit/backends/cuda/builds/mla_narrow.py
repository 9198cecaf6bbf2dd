"""The latent decode kernels for few rows: their builds and shared memory."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.backends.cuda.images import Variant, variant

SMEM = 227 * 1024
TILE = 64
MAX_STAGES = 5
MAX_ROWS = 32
FP8_ROW = 656  # bytes of a token in an fp8 cache


def _output_bytes(rows: int, at_once: int, C: int) -> int:
    """Room for the output on its way: ``at_once`` rows as float32, or all as f16 and two numbers of each."""
    return max(at_once * (C + 4) * 4, rows * (2 * C + 16 + 8))


@dataclass(frozen=True, slots=True)
class Build:
    """One build of csrc/cuda/mla/mla_narrow_sm90.cu; mirrors MlaShape."""

    C: int
    R: int
    bf16: bool
    NR: int  # 8-row groups: 1, 2 or 4

    @property
    def rows(self) -> int:
        return 8 * self.NR

    @property
    def threads(self) -> int:
        return 128 + 64

    @property
    def stages(self) -> int:
        return min(MAX_STAGES, (SMEM - self._fixed_bytes) // (TILE * 2 * (self.C + self.R)))

    @property
    def _fixed_bytes(self) -> int:
        q, weights = self.rows * 2 * (self.C + self.R), 2 * self.rows * 128
        return q + weights + _output_bytes(self.rows, min(self.rows, 16), self.C) + 1280

    @property
    def shared_bytes(self) -> int:
        return self._fixed_bytes + self.stages * TILE * 2 * (self.C + self.R)

    @property
    def variant(self) -> Variant:
        values = {"C": self.C, "R": self.R, "BF16": int(self.bf16), "NR": self.NR, "STAGES": self.stages}
        values["ROPES"] = self.stages
        return variant("mla/mla_narrow_sm90.cu", {f"ATTNKIT_{n}": v for n, v in values.items()})

    @property
    def kernel(self) -> str:
        return "attnkit_mla_narrow"


@dataclass(frozen=True, slots=True)
class Fp8Build:
    """One build of csrc/cuda/mla/mla_narrow_fp8_sm90.cu; mirrors MlaFp8Shape."""

    NR: int

    @property
    def rows(self) -> int:
        return 8 * self.NR

    @property
    def threads(self) -> int:
        return 384

    @property
    def _fixed_bytes(self) -> int:
        q, q_rope, weights = 4 * 2 * self.rows * 128, self.rows * 128, 2 * 4 * self.rows * 128
        return q + q_rope + weights + _output_bytes(self.rows, 8, 512) + 1664

    @property
    def stages(self) -> int:
        return (SMEM - self._fixed_bytes) // (TILE * FP8_ROW)

    @property
    def shared_bytes(self) -> int:
        return self._fixed_bytes + self.stages * TILE * FP8_ROW

    @property
    def variant(self) -> Variant:
        return variant("mla/mla_narrow_fp8_sm90.cu", {"ATTNKIT_NR": self.NR, "ATTNKIT_STAGES": self.stages})

    @property
    def kernel(self) -> str:
        return "attnkit_mla_narrow_fp8"


def _groups(rows: int) -> int:
    return 1 if rows <= 8 else 2 if rows <= 16 else 4


def build_for(C: int, R: int, bf16: bool, rows: int) -> Build:
    return Build(C, R, bf16, _groups(rows))


def fp8_build_for(rows: int) -> Fp8Build:
    return Fp8Build(_groups(rows))


def shipped() -> list[Variant]:
    """DeepSeek's sizes in bf16 and fp8."""
    rows = (8, 16, 32)
    return [*(build_for(512, 64, True, n).variant for n in rows), *(fp8_build_for(n).variant for n in rows)]
