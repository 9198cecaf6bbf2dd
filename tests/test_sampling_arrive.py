"""Top-p without top-k and min-p: the first token to arrive that is kept, as the reference finds it, of rows of any kind."""

from __future__ import annotations

import math

import pytest
import torch

from attnkit.backends.cuda.builds import sampling as builds
from attnkit.sampling import KERNELS
from tests.kernels import every
from tests.test_sampling_large import both, chooser, normal, penalties

pytestmark = pytest.mark.gpu

CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
#: Tokens of the longest row that one CTA holds.
ALONE = builds.MOST_LOCAL * builds.GROUP


def odd_rows(B: int, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal logits, +inf in one row, NaN in one, and one of which no token is possible."""
    x = normal(B, V, dtype, seed=B)
    x[B // 5, 777] = float("inf")
    x[B // 3, V - 1] = float("nan")
    x[B // 2] = -float("inf")
    return x


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("B", [1, 7, 8, 15, 16, 33, 64, 100, 140, 270])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_top_p_alone_of_any_batch(dtype, B, impl, device):
    """Kept from one token to all; greedy rows and rows without a filter, NaN, nothing and +inf among them."""
    V, one_of = 40001, chooser(B)
    o = {"temperature": one_of(1.0, 0.7, 1.5, 9.0, 0.0), "top_p": one_of(1.0, 0.9, 0.5, 0.1, 0.99, 0.001)}
    x = odd_rows(B, V, dtype)
    for seed in range(2):
        got, want = both(x, impl, seed=seed, **o)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= max(1, B // 64)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("B", "V"), [(1, 50257), (20, 40001), (50, 131072), (7, 32768), (24, 70)], ids=str)
@pytest.mark.parametrize("p", [0.9, 0.1, 0.01])
def test_penalties_under_top_p_alone(p, B, V, dtype, impl, device):
    """Few rows and many, and a p so small that most early tokens are refused; each tensor alone, and all."""
    more = penalties(B, V)
    x = normal(B, V, dtype, seed=B)
    for names in (
        (*more,),
        ("output_counts", "repetition_penalty", "presence_penalty", "frequency_penalty"),
        ("logit_bias",),
        ("allowed",),
    ):
        got, want = both(x, impl, seed=3, top_p=p, temperature=0.8, **{n: more[n] for n in names})
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= max(1, B // 64)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("B", [1, 16, 32, 64])
@pytest.mark.parametrize("p", [0.02, 0.1, 0.3])
def test_small_p_of_rows_that_many_share(p, B, impl, device):
    """Most tokens that arrive early are refused, and each of the CTAs of a row has room for few of them."""
    for seed in range(3):
        got, want = both(normal(B, 131072, seed=seed), impl, seed=seed, top_p=p, temperature=0.8)
        assert (got.tokens != want.tokens).sum() <= max(1, B // 16)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("far", [0.0, 1e4], ids=["near", "far"])
def test_what_precedes_a_token_is_all_but_p(far, impl, device):
    """Too close for sums of floats; and logits so large that a product and a sum would lose digits."""
    V, B = 5000, 256
    row = torch.full((V,), 0.25 / (V - 5), device="cuda").log()
    row[0], row[1:5] = -math.log(2.0), -math.log(16.0)
    # At 10000 a float's steps are of 0.001: the shares are others, the order is the same.
    got, want = both((row + far).expand(B, V), impl, seed=9, top_p=0.5001)
    assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("B", [7, 16, 61, 140])
def test_penalties_under_a_tensor_of_p(B, dtype, impl, device):
    """Every row its own p and temperature; cold rows, NaN and rows without a token among them."""
    V, one_of = 40001, chooser(B)
    o = {"temperature": one_of(1.0, 0.7, 9.0, 0.0), "top_p": one_of(0.1, 0.5, 0.59, 0.6, 0.9, 1.0)}
    x = odd_rows(B, V, dtype)
    counts = torch.randint(0, 64, (B, V), device="cuda", dtype=torch.int32).sub_(60).clamp_(min=0)
    for seed in range(3):
        got, want = both(x, impl, seed=seed, output_counts=counts, frequency_penalty=0.2, presence_penalty=0.3, **o)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= max(1, B // 64)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("V", [1, 5, 2047, 2049, 17000])
def test_top_p_alone_of_short_rows(V, impl, device):
    """A row of less than a block, of one, and of a few."""
    for dtype in (torch.float32, torch.bfloat16):
        got, want = both(normal(33, V, dtype), impl, seed=4, top_p=0.9)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("V", [ALONE, ALONE + 1, 300000], ids=str)
def test_top_p_alone_of_long_rows(V, impl, device):
    """The longest that one CTA holds, and those that a cluster shares whatever the batch."""
    x = normal(3, V)
    for p in (0.05, 0.9):
        got, want = both(x, impl, seed=8, top_p=p)
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("B", [4, 100], ids=["shared", "alone"])
@pytest.mark.parametrize("p", [0.02, 0.3, 0.5, 0.9, 0.99, 1 - 1e-6])
def test_what_levels_do_not_tell(p, B, impl, device):
    """Counts by level span 48 powers of two below a reference that a sample of the row gives. Rows beyond them: one token, or half
    a row, far above; all far apart; all alike, at temperatures that make them more so; of a few values; in order."""
    V = 33001
    x = normal(B, V, seed=2)
    x[0::8, 20011] += 60.0
    x[1::8, V // 2 :] += 90.0
    x[2::8] *= 40.0
    x[3::8] *= 1e-3
    x[4::8] = x[4::8].round()
    x[5::8] = x[5::8].sort(1).values
    x[6::8] = 0.25
    for dtype in (torch.float32, torch.bfloat16):
        for temperature in (0.05, 1.0, 50.0):
            got, want = both(x.to(dtype), impl, seed=6, top_p=p, temperature=temperature)
            assert got.valid.all()
            assert (got.tokens != want.tokens).sum() <= max(1, B // 50)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("p", [0.05, 0.3, 0.9])
def test_what_a_mask_leaves_lies_below_all_levels(p, impl, device):
    """Levels go by the logits as they come: here those that are allowed lie 60 below the others."""
    B, V = 100, 33001
    x = normal(B, V, seed=3)
    x[:, ::2] += 60.0
    odd = torch.full((B, -(-V // 32)), 0xAAAAAAAA - 2**32, device=device, dtype=torch.int32)
    got, want = both(x, impl, seed=5, top_p=p, allowed=odd)
    assert got.valid.all() and (got.tokens % 2 == 1).all()
    assert (got.tokens != want.tokens).sum() <= 1
