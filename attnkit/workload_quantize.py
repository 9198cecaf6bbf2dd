"""Cases of the fused quantising ops, and of a product together with the quantising of its left side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from attnkit import gemm, quantize, reference
from attnkit.dispatch import Kernel
from attnkit.roofline import Cost
from attnkit.workload import DTYPES, Case, Inputs, relative_error, sample_rows, sized


@dataclass(frozen=True, kw_only=True)
class Fused(Case):
    """What the two fused forms share: an 8-bit "out", its "scale", and a truth to hold their product against."""

    family: ClassVar[str] = "gemm"
    M: int
    K: int
    dtype: str = "int8"

    def truth(self, x: Inputs, rows: Tensor) -> Tensor:
        """What is quantised, float32, for some rows."""
        raise NotImplementedError

    def error(self, x: Inputs, out: Any = None) -> float:
        """How much further from the truth than the reference's own rounding to 8 bits is. ``out``: a peer's (values, scale)."""
        values, scale = out if isinstance(out, tuple) else (x["out"], x["scale"])
        rows = sample_rows(self.M, 256, x["x"].device)
        truth = self.truth(x, rows)
        plain, plain_scale = reference.quantize_per_token(truth, DTYPES[self.dtype])
        least = relative_error(plain.float() * plain_scale[:, None], truth)
        return max(0.0, relative_error(values[rows].float() * scale[rows].view(-1, 1), truth) - least)

    @property
    def limit(self) -> float:
        return 1e-3

    def poison(self, x: Inputs) -> None:
        x["out"].view(torch.uint8).fill_(0x7F)
        x["scale"].fill_(float("nan"))

    def _outputs(self, device: torch.device) -> Inputs:
        values = torch.empty(self.M, self.K, dtype=DTYPES[self.dtype], device=device)
        return {"out": values, "scale": torch.empty(self.M, device=device)}

    def _normal(self, shape: tuple[int, ...], device: torch.device, empty: bool) -> Tensor:
        x = torch.empty(shape, dtype=torch.bfloat16, device=device)
        return x if empty else x.normal_()


@dataclass(frozen=True, kw_only=True)
class RmsNormQuantize(Fused):
    """rms_norm_quantize, alone or with a residual to add to."""

    op: ClassVar[str] = "rms_norm_quantize"
    residual: bool = False
    eps: ClassVar[float] = 1e-6

    def letters(self) -> list[str]:
        return ["rms_norm", f"M{self.M}", f"K{self.K}", self.dtype, *(["residual"] if self.residual else [])]

    def kernels(self) -> tuple[Kernel, ...]:
        return quantize.RMS_NORM_KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        weight = self._normal((self.K,), device, empty)
        return {
            "x": self._normal((self.M, self.K), device, empty),
            "weight": weight if empty else weight.mul_(0.1).add_(1),
            "residual": self._normal((self.M, self.K), device, empty) if self.residual else None,
            **self._outputs(device),
        }

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        data, weight, residual, out, scale = x["x"], x["weight"], x["residual"], x["out"], x["scale"]
        options = {"residual": residual, "dtype": DTYPES[self.dtype], "impl": impl, "config": config}
        return lambda: quantize.rms_norm_quantize(data, weight, self.eps, out=out, out_scale=scale, **options)

    def cost(self) -> Cost:
        return quantize.rms_norm_cost(self.M, self.K, residual=self.residual)

    def small(self) -> RmsNormQuantize:
        return sized(self, M=min(self.M, 17), K=min(self.K, 200))

    def truth(self, x: Inputs, rows: Tensor) -> Tensor:
        # A residual holds the sum by now: that is what was normalised.
        h = x["x"] if x["residual"] is None else x["residual"]
        return reference.rms_norm(h[rows], x["weight"], self.eps, None, torch.float32)[0]


@dataclass(frozen=True, kw_only=True)
class SiluMulQuantize(Fused):
    """silu_mul_quantize."""

    op: ClassVar[str] = "silu_mul_quantize"

    def letters(self) -> list[str]:
        return ["silu_mul", f"M{self.M}", f"K{self.K}", self.dtype]

    def kernels(self) -> tuple[Kernel, ...]:
        return quantize.SILU_MUL_KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        return {"x": self._normal((self.M, 2 * self.K), device, empty), **self._outputs(device)}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        data, out, scale, dtype = x["x"], x["out"], x["scale"], DTYPES[self.dtype]
        return lambda: quantize.silu_mul_quantize(data, dtype=dtype, out=out, out_scale=scale, impl=impl, config=config)

    def cost(self) -> Cost:
        return quantize.silu_mul_cost(self.M, self.K)

    def small(self) -> SiluMulQuantize:
        return sized(self, M=min(self.M, 17), K=min(self.K, 200))

    def truth(self, x: Inputs, rows: Tensor) -> Tensor:
        return reference.silu_mul(x["x"][rows], torch.float32)


@dataclass(frozen=True, kw_only=True)
class QuantizedLinear(Case):
    """quantize_per_token, then w8a8_gemm: what takes the place of a bf16 linear. Two launches, one time."""

    family: ClassVar[str] = "gemm"
    op: ClassVar[str] = "quantized_linear"
    M: int
    N: int
    K: int
    dtype: str = "int8"

    def letters(self) -> list[str]:
        return ["linear", f"M{self.M}", f"N{self.N}", f"K{self.K}", self.dtype]

    def kernels(self) -> tuple[Kernel, ...]:
        """The quantise kernels: the product is the same implementation's, or the best there is behind a CUDA one."""
        return quantize.KERNELS

    def build(self, device: torch.device, empty: bool = False) -> Inputs:
        x = torch.empty(self.M, self.K, dtype=torch.bfloat16, device=device)
        dense = torch.empty(self.N, self.K, dtype=torch.bfloat16, device=device)
        if not empty:
            x.normal_()
            dense.normal_(0, self.K**-0.5)
        w, w_scale = quantize.quantize_weight(dense, dtype=DTYPES[self.dtype], impl="torch" if empty else None)
        eight_bit = torch.empty(self.M, self.K, dtype=DTYPES[self.dtype], device=device)
        out = torch.empty(self.M, self.N, dtype=torch.bfloat16, device=device)
        return {"x": x, "dense": dense, "w": w, "w_scale": w_scale, "a": eight_bit, "out": out}

    def call(self, x: Inputs, impl: str | None = None, config: Any = None) -> Callable[[], Any]:
        data, w, w_scale, a, out, dtype = x["x"], x["w"], x["w_scale"], x["a"], x["out"], DTYPES[self.dtype]
        product = next((k.impl for k in quantize.KERNELS if impl in (k.name, k.impl) and k.impl != "cuda"), None)

        def run() -> Tensor:
            values, scale = quantize.quantize_per_token(data, dtype=dtype, out=a, impl=impl, config=config)
            return gemm.w8a8_gemm(values, w, scale, w_scale, out=out, impl=product)

        return run

    def cost(self) -> Cost:
        return gemm.cost(self.M, self.N, self.K, kind=self.dtype) + quantize.cost(self.M, self.K)

    def small(self) -> QuantizedLinear:
        return sized(self, M=min(self.M, 17), N=min(self.N, 144), K=min(self.K, 256))

    def error(self, x: Inputs, out: Any = None) -> float:
        out = x["out"] if out is None else out
        rows = sample_rows(self.M, 64, out.device)
        return relative_error(out[rows], x["x"][rows].float() @ x["dense"].float().t())

    @property
    def limit(self) -> float:
        """Rounding both operands: 0.9% each for int8, 2.6% each for e4m3."""
        return 2e-2 if self.dtype == "int8" else 5e-2
