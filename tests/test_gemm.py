"""w8a8_gemm is exact up to its one rounding."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import reference
from attnkit.gemm import KERNELS
from tests.close import assert_close
from tests.kernels import every, skip_if_declined

SHAPES = [(1, 16, 32), (3, 33, 70), (16, 64, 128), (17, 130, 257), (64, 48, 96), (5, 1, 1)]
LARGE = [(1, 4096, 4096), (16, 3584, 18944), (100, 4608, 3584), (257, 4097, 1000), (2048, 1024, 4096)]


def operand(rows: int, K: int, dtype: torch.dtype, device: str, pad: int, seed: int) -> torch.Tensor:
    """[rows, K] inside wider rows whose padding would spoil the sum if read."""
    g = torch.Generator(device=device).manual_seed(seed)
    wide = torch.randint(-127, 128, (rows, K + pad), generator=g, device=device)
    if dtype == torch.int8:
        return wide.to(dtype)[:, :K]
    values = (wide / 127).to(dtype)
    if pad:
        values[:, K:] = torch.tensor(float("nan"), device=device).to(dtype)
    return values[:, :K]


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("pad", [0, 16, 5], ids=["dense", "padded", "odd-stride"])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-N{}-K{}".format(*s))
def test_matches_float64(shape, dtype, pad, impl, device):
    M, N, K = shape
    a, w = operand(M, K, dtype, device, pad, 1), operand(N, K, dtype, device, pad, 2)
    per_token, out_dtype, bias_dtype = M % 2 == 1, (torch.bfloat16, torch.float16, torch.float32)[N % 3], torch.bfloat16
    a_scale = torch.rand(M if per_token else 1, device=device) / 100
    w_scale = torch.rand(N if K % 2 == 0 else 1, device=device) / 100
    bias = torch.randn(N, device=device).to(bias_dtype) if M != 16 else None
    out = torch.full((M, N), float("nan"), dtype=out_dtype, device=device)
    got = skip_if_declined(lambda: attnkit.w8a8_gemm(a, w, a_scale, w_scale, bias=bias, out=out, impl=impl))
    assert got is out
    truth = reference.w8a8_gemm(a, w, a_scale, w_scale, bias)
    plain = reference.w8a8_gemm(a, w, a_scale, w_scale, bias, torch.float32).to(out_dtype)
    assert_close(got, truth, plain)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id not in ("cpu", "torch")])
@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "M{}-N{}-K{}".format(*s))
def test_large_matches_float64(shape, dtype, impl, device):
    test_matches_float64(shape, dtype, 0, impl, device)
