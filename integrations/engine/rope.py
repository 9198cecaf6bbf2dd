"""Rotary position embeddings: the frequencies of each variant, and the rotation.

Variants: default (Su et al. 2021), linear (position interpolation), dynamic (NTK-aware), llama3 (by wavelength),
yarn (Peng et al. 2023).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Rope:
    """
    kind           one of TYPES
    theta          the base wavelength
    dim            elements of a head that rotate
    max_positions  max_position_embeddings
    options        the other keys of rope_parameters (or rope_scaling)
    """

    kind: str
    theta: float
    dim: int
    max_positions: int
    options: dict[str, Any]

    @property
    def longest(self) -> int | None:
        """Tokens up to which one table of frequencies serves; None: any number.

        dynamic changes its base with the length from max_positions on, which would move keys already cached.
        """
        return self.max_positions if self.kind == "dynamic" else None

    def frequencies(self) -> tuple[Tensor, float]:
        """Inverse frequencies float32 [dim / 2], and the factor on cos and sin."""
        steps = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        inverse = 1.0 / self.theta**steps
        if self.kind == "linear":
            return inverse / self.options["factor"], 1.0
        if self.kind == "llama3":
            return self._llama3(inverse), 1.0
        if self.kind == "yarn":
            return self._yarn(self.theta**steps)
        return inverse, 1.0  # dynamic is the same up to max_positions

    def softmax_factor(self) -> float:
        """What DeepSeek multiplies the softmax scale by: yarn's mscale_all_dim, squared."""
        all_dim = self.options.get("mscale_all_dim")
        if self.kind == "default" or not all_dim:
            return 1.0
        return _mscale(self._factor(), all_dim) ** 2

    def _factor(self) -> float:
        return self.options.get("factor") or self.max_positions / self.options["original_max_position_embeddings"]

    def _llama3(self, inverse: Tensor) -> Tensor:
        """Long wavelengths are stretched by factor, short ones kept, those between blended."""
        o = self.options
        factor, low, high = o["factor"], o["low_freq_factor"], o["high_freq_factor"]
        original = o["original_max_position_embeddings"]
        wavelength = 2 * math.pi / inverse
        smooth = (original / wavelength - low) / (high - low)
        blended = (1 - smooth) * inverse / factor + smooth * inverse
        out = torch.where(wavelength > original / low, inverse / factor, inverse)
        between = (wavelength >= original / high) & (wavelength <= original / low)
        return torch.where(between, blended, out)

    def _yarn(self, periods: Tensor) -> tuple[Tensor, float]:
        """Dimensions that turn often keep their frequency, those that turn rarely are interpolated."""
        o = self.options
        original = o["original_max_position_embeddings"]
        factor = self._factor()
        scale = o.get("attention_factor")
        if scale is None:
            m, all_dim = o.get("mscale"), o.get("mscale_all_dim")
            scale = _mscale(factor, m) / _mscale(factor, all_dim) if m and all_dim else _mscale(factor, 1.0)

        def dimension(turns: float) -> float:
            return self.dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = dimension(o.get("beta_fast") or 32), dimension(o.get("beta_slow") or 1)
        if o.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        span = high - low if high != low else 0.001
        kept = 1 - ((torch.arange(self.dim // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
        return (1.0 / (factor * periods)) * (1 - kept) + (1.0 / periods) * kept, float(scale)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def cos_sin(positions: Tensor, inverse: Tensor, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """positions [T] -> cos and sin [T, 1, dim], a head axis to broadcast over. sin's first half is negative: see rotate."""
    angle = positions.to(torch.float32)[:, None, None] * inverse
    cos, sin = angle.cos(), angle.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, dim] rotated by halves: element i pairs with i + dim / 2."""
    first, second = x.chunk(2, -1)
    return torch.addcmul(x * cos, torch.cat((second, first), -1), sin)


def halves_from_pairs(dim: int) -> Tensor:
    """The order that turns rows stored as pairs (2i, 2i + 1) into halves (i, i + dim / 2)."""
    return torch.cat((torch.arange(0, dim, 2), torch.arange(1, dim, 2)))
