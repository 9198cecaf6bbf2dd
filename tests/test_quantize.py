"""quantize_per_token is bit-equal to its formula; its fused forms stay within the tolerance of float64."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import reference
from attnkit.quantize import KERNELS, RMS_NORM_KERNELS, SILU_MUL_KERNELS
from tests.close import assert_close
from tests.kernels import every, skip_if_declined

OUT = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
IN = pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
#: M, K, and what a row has in memory beyond K. On the GPU the last rows exceed what one CTA's registers hold.
SHAPES = [(1, 8, 0), (9, 275, 25), (5, 264, 8), (3, 1024, 0), (2, 20000, 16)]
LARGE = [(4096, 4096, 0), (300, 14336, 0), (257, 3584, 64), (9, 24576, 16), (64, 53248, 0), (7, 40008, 8)]
NAN = float("nan")


def rows(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0, columns: int = 1) -> torch.Tensor:
    """[M, K * columns], rows of unlike size, one of zeros; what lies behind a row in memory is NaN."""
    M, K, pad = shape
    K *= columns
    g = torch.Generator(device=device).manual_seed(seed)
    wide = torch.full((M, K + pad), NAN, device=device)
    wide[:, :K] = torch.randn(M, K, generator=g, device=device) * torch.rand(M, 1, generator=g, device=device) * 4
    if M > 1:
        wide[1, :K] = 0
    return wide.to(dtype)[:, :K]


def poisoned(M: int, K: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full((M, K), 0x7F, dtype=torch.uint8, device=device).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------- quantize_per_token


def check_plain(x: torch.Tensor, dtype: torch.dtype, impl: str) -> None:
    out = poisoned(*x.shape, dtype, x.device)
    got, scale = skip_if_declined(lambda: attnkit.quantize_per_token(x, dtype=dtype, out=out, impl=impl))
    want, want_scale = reference.quantize_per_token(x, dtype)
    assert got is out and torch.equal(scale, want_scale) and same_bits(got, want)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@OUT
@IN
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_quantize_is_bit_equal(shape, x_dtype, dtype, impl, device):
    x = rows(shape, x_dtype, device)
    if shape[1] >= 20 and shape[0] > 2:
        x[2, :20] = torch.arange(20, device=device) - 9.5  # ties of round-half-even once scaled
        x[2, 20:] = 0
        x[2, 0] = 127
    check_plain(x, dtype, impl)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id not in ("cpu", "torch")])
@OUT
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_large_is_bit_equal(shape, dtype, impl, device):
    check_plain(rows(shape, torch.bfloat16, device), dtype, impl)


@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id != "triton" or torch.cuda.is_available()])
@OUT
@pytest.mark.parametrize(("x_dtype", "mantissa"), [(torch.bfloat16, 7), (torch.float16, 10)], ids=["bf16", "fp16"])
def test_every_quotient_of_16_bit_values(x_dtype, mantissa, dtype, impl, device):
    """All pairs (x, amax) but for a common power of two, down to where x rounds to zero: no division is off by a bit."""
    if impl in ("cpu", "torch") and mantissa > 7:
        pytest.skip("a division instruction: tried with bf16")
    tops = 4096 + torch.arange(2**mantissa, device=device) * 2.0 ** (12 - mantissa)
    values = torch.cat([tops * 2.0**-e for e in range(24)] + [tops.new_zeros(8)])
    values[::3] *= -1  # and a zero keeps its sign
    for top in tops.split(128):
        x = torch.where(values.abs() <= top[:, None], values, -0.0).to(x_dtype)
        check_plain(torch.cat([x, top[:, None].to(x_dtype).expand(-1, 8)], 1), dtype, impl)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@OUT
@pytest.mark.parametrize("size", [1e-45, 3e-44, 1e-40, 1e-36, 1e-20, 1e20, 1e36, 3e38])
def test_scales_at_the_ends_of_float32(size, dtype, impl, device):
    x = torch.linspace(-1, 1, 64, device=device).mul(size).expand(3, 64).contiguous()
    for x_dtype in (torch.float32, torch.bfloat16):
        check_plain(x.to(x_dtype), dtype, impl)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@OUT
def test_a_nan_stays_in_its_row(dtype, impl, device):
    x = torch.randn(4, 64, device=device)
    clean, clean_scale = skip_if_declined(lambda: attnkit.quantize_per_token(x, dtype=dtype, impl=impl))
    x[2, 5] = NAN
    got, scale = attnkit.quantize_per_token(x, dtype=dtype, impl=impl)
    others = [0, 1, 3]
    assert same_bits(got[others], clean[others]) and torch.equal(scale[others], clean_scale[others])
    assert scale[2].isnan()


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_an_infinity_stays_in_its_row(impl, device):
    x = torch.randn(3, 64, device=device)
    x[1, 5] = -float("inf")
    got, scale = skip_if_declined(lambda: attnkit.quantize_per_token(x, impl=impl))
    assert scale[1] == float("inf") and (got[1] == 0).all() and scale[[0, 2]].isfinite().all()


# ---------------------------------------------------------------- the fused forms


def close_to(y: torch.Tensor, got: torch.Tensor, scale: torch.Tensor) -> None:
    """values * scale against the float64 y, held to the error of quantising y itself."""
    plain, plain_scale = reference.quantize_per_token(y.float(), got.dtype)
    assert_close(got.float() * scale[:, None], y, plain.float() * plain_scale[:, None])
    assert_close(scale, plain_scale.double(), plain_scale, "scale")


def check_rms_norm(shape, x_dtype, dtype, impl, device, residual: bool, weight_dtype=None) -> None:
    M, K, pad = shape
    x, eps = rows(shape, x_dtype, device), 1e-5
    before = rows((M, K, 2 * pad), x_dtype, device, 1) if residual else None
    r = None if before is None else torch.full((M, K + pad), NAN, dtype=x_dtype, device=device)[:, :K].copy_(before)
    w = (1 + 0.2 * torch.randn(K, generator=torch.Generator(device).manual_seed(2), device=device)).to(weight_dtype or x_dtype)
    kept, out = x.clone(), poisoned(M, K, dtype, device)
    got, scale = skip_if_declined(lambda: attnkit.rms_norm_quantize(x, w, eps, residual=r, dtype=dtype, out=out, impl=impl))
    y, h = reference.rms_norm(x, w, eps, before)
    assert got is out and torch.equal(x, kept)
    if r is not None:
        assert torch.equal(r, h)
    close_to(y, got, scale)
    if M > 1:
        assert scale[1] == 1 and (got[1].float() == 0).all()


@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
@OUT
@IN
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_rms_norm_matches_float64(shape, residual, x_dtype, dtype, impl, device):
    check_rms_norm(shape, x_dtype, dtype, impl, device, residual)


@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
def test_rms_norm_takes_a_float32_weight(impl, device):
    check_rms_norm((5, 264, 8), torch.bfloat16, torch.int8, impl, device, True, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(RMS_NORM_KERNELS) if p.id not in ("cpu", "torch")])
@OUT
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_large_rms_norm_matches_float64(shape, dtype, impl, device):
    check_rms_norm(shape, torch.bfloat16, dtype, impl, device, True)


def check_silu_mul(shape, x_dtype, dtype, impl, device) -> None:
    M, K, pad = shape
    x = rows(shape, x_dtype, device, columns=2)
    if M > 2:
        x[2, : min(K, 4)] = torch.tensor([-200.0, -90.0, 90.0, 200.0], device=device)[:K]  # where exp leaves float32
    out = poisoned(M, K, dtype, device)
    got, scale = skip_if_declined(lambda: attnkit.silu_mul_quantize(x, dtype=dtype, out=out, impl=impl))
    assert got is out
    close_to(reference.silu_mul(x), got, scale)
    if M > 1:
        assert scale[1] == 1 and (got[1].float() == 0).all()


@pytest.mark.parametrize(("impl", "device"), every(SILU_MUL_KERNELS))
@OUT
@IN
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_silu_mul_matches_float64(shape, x_dtype, dtype, impl, device):
    check_silu_mul(shape, x_dtype, dtype, impl, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(SILU_MUL_KERNELS) if p.id not in ("cpu", "torch")])
@OUT
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_large_silu_mul_matches_float64(shape, dtype, impl, device):
    check_silu_mul(shape, torch.bfloat16, dtype, impl, device)


@pytest.mark.parametrize("value", [NAN, float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
@OUT
def test_rms_norm_keeps_a_bad_row_to_itself(dtype, impl, device, value):
    x, w = torch.randn(4, 64, device=device), torch.ones(64, device=device)
    run = lambda: attnkit.rms_norm_quantize(x, w, 1e-6, dtype=dtype, impl=impl)  # noqa: E731
    clean, clean_scale = skip_if_declined(run)
    x[2, 5] = value
    got, scale = run()
    others = [0, 1, 3]
    assert same_bits(got[others], clean[others]) and torch.equal(scale[others], clean_scale[others])
    assert scale[2].isnan() and (got[2] == 0 if dtype == torch.int8 else got[2].float().isnan()).all()


@pytest.mark.parametrize(("impl", "device"), every(SILU_MUL_KERNELS))
@OUT
@pytest.mark.parametrize("column", [5, 64 + 5], ids=["gate", "up"])
def test_silu_mul_keeps_a_bad_row_to_itself(column, dtype, impl, device):
    x = torch.randn(4, 128, device=device)
    run = lambda: attnkit.silu_mul_quantize(x, dtype=dtype, impl=impl)  # noqa: E731
    clean, clean_scale = skip_if_declined(run)
    x[2, column] = NAN
    got, scale = run()
    others = [0, 1, 3]
    assert same_bits(got[others], clean[others]) and torch.equal(scale[others], clean_scale[others])
    assert scale[2].isnan()


@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
def test_a_rows_bits_do_not_depend_on_its_place(impl, device):
    """Alone, in a short batch and in a long one: the same codes, scale and residual. So many rows that sums in another order,
    which one row in seven shows, cannot pass."""
    g = torch.Generator(device=device).manual_seed(0)
    x, r = (torch.randn(300, 1024, generator=g, device=device).bfloat16() for _ in range(2))
    w = torch.randn(1024, generator=g, device=device).bfloat16()
    if impl == "triton" and device == "cpu":
        x, r = x[:20], r[:20]
    runs = []
    several, one = slice(3, 203), slice(5, 6)
    for part in (slice(None), several, one):
        mine = r[part].clone()
        runs.append(
            (*skip_if_declined(lambda p=part, m=mine: attnkit.rms_norm_quantize(x[p], w, 1e-6, residual=m, impl=impl)), mine)
        )
    for among_all, among_several, alone in zip(*runs):
        assert torch.equal(among_all[one], alone)
        assert torch.equal(among_all[several], among_several)


@pytest.mark.parametrize("M", [0, 3])
def test_empty(M):
    x = torch.randn(M, 0) if M else torch.randn(0, 64)
    values, scale = attnkit.quantize_per_token(x)
    assert values.shape == x.shape and (scale == 1).all() and scale.shape == (M,)
    values, scale = attnkit.silu_mul_quantize(x)
    assert values.shape == (M, x.shape[1] // 2) and (scale == 1).all()
    values, scale = attnkit.rms_norm_quantize(x, torch.ones(x.shape[1]), 1e-6)
    assert values.shape == x.shape and scale.shape == (M,)
