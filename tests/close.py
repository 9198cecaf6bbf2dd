"""The only tolerances: twice (max) and 1.1 times (mean) the error plain torch makes in the same dtype."""

from __future__ import annotations

import torch
from torch import Tensor

#: A kernel may not be asked to beat the rounding of its own output: units in the last place of the largest value.
FLOOR_ULPS = {torch.float32: 16.0, torch.float16: 1.0, torch.bfloat16: 1.0}


def assert_close(got: Tensor, truth: Tensor, plain: Tensor, what: str = "out") -> None:
    """got against a float64 truth, held to the error of ``plain`` (the same formula in got's dtype)."""
    got64, plain64 = got.double().cpu(), plain.double().cpu()
    truth = truth.double().cpu()
    assert got.shape == truth.shape, f"{what}: shape {list(got.shape)}, wanted {list(truth.shape)}"
    for name, mask in (("NaN", torch.isnan), ("inf", torch.isinf)):
        wrong = mask(got64) != mask(truth)
        assert not wrong.any(), (
            f"{what}: {name} differs at {wrong.nonzero()[0].tolist()}: got {got64[wrong][0]}, wanted {truth[wrong][0]}"
        )
    finite = torch.isfinite(truth)
    if not finite.any():
        return
    error = torch.where(finite, (got64 - truth).abs(), 0.0)
    allowed = torch.where(torch.isfinite(plain64) & finite, (plain64 - truth).abs(), 0.0)
    ulp = torch.finfo(got.dtype).eps * truth[finite].abs().max().item()
    floor = FLOOR_ULPS[got.dtype] * ulp
    worst, limit = error.max().item(), max(2.0 * allowed.max().item(), floor)
    place = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    assert worst <= limit, (
        f"{what}: error {worst:.3g} at {place} (got {got64[tuple(place)]:.6g}, wanted {truth[tuple(place)]:.6g}), limit {limit:.3g}"
    )
    mean, mean_limit = error.mean().item(), max(1.1 * allowed.mean().item(), floor / 4)
    assert mean <= mean_limit, f"{what}: mean error {mean:.3g}, limit {mean_limit:.3g} (worst at {place})"
