"""Min-p with top-p of many rows, a multiprocessor a row: over bf16 by a list of groups, else by peaks and what is summed while the row
streams by; rows without either in the same batch."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.sampling import KERNELS
from tests.kernels import every
from tests.test_sampling_large import both, chooser, in_a_graph, normal
from tests.test_sampling_once import TYPES, odd_rows

CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize(("impl", "device"), CUDA)]
BF16 = torch.bfloat16
#: More rows than are read by two launches.
MANY = 80
kinds = pytest.mark.parametrize("dtype", TYPES, ids=str)


@kinds
@pytest.mark.parametrize("V", [1, 8, 2048, 32000, 50257, 50264, 131072, 151936, 262144])
def test_rows_of_all_kinds(V, dtype, impl, device):
    """Ties, staircases, masks, +inf, NaN, one token alone, none, wide and far rows; options from tensors, each on or off."""
    B, one_of = 180, chooser(180)
    o = {
        "temperature": one_of(1.0, 0.7, 1.5, 9.0, 0.0, 0.05),
        "top_p": one_of(1.0, 0.9, 0.5, 0.1, 0.99),
        "min_p": one_of(0.0, 0.01, 0.2, 0.0, 1.0, 1e-6, 1e-30),
    }
    got, want = both(odd_rows(B, V, dtype), impl, seed=V, **o)
    assert torch.equal(got.valid, want.valid)
    assert (got.tokens != want.tokens).sum() <= 1


@kinds
@pytest.mark.parametrize(
    "options", [{"min_p": 0.05}, {"min_p": 1e-4}, {"min_p": 1.0}, {"min_p": 0.02, "top_p": 0.7}, {"min_p": 1e-3, "top_p": 0.05}]
)
def test_normal_rows(options, dtype, impl, device):
    """More within min-p than any list holds, too."""
    for seed, spread in enumerate((0.1, 0.5, 3.0, 8.0)):
        for shift in (-30.0, 0.0, 30.0):
            x = (normal(MANY, 131072, torch.float32, seed=seed) * (spread / 3) + shift).to(dtype)
            got, want = both(x, impl, seed=seed, **options)
            assert torch.equal(got.valid, want.valid) and (got.tokens != want.tokens).sum() <= 1


@kinds
@pytest.mark.parametrize("many", [1, 40, 500, 5000])
def test_masked_rows(many, dtype, impl, device):
    """Few tokens wherever they are and however far apart: a sample of the row, or what a lane reads of it, may have none."""
    V, B, g = 131072, MANY, torch.Generator(device="cuda").manual_seed(many)
    x = torch.full((B, V), -float("inf"), device="cuda")
    for rows, spread in ((slice(0, B, 2), 1.0), (slice(1, B, 2), 60.0)):
        ids = torch.rand(B // 2, V, generator=g, device="cuda").topk(many, dim=1).indices
        x[rows] = x[rows].scatter(1, ids, torch.randn(B // 2, many, generator=g, device="cuda") * spread)
    for options in ({}, {"top_p": 0.9}, {"top_p": chooser(B)(0.2, 0.5, 1.0), "temperature": chooser(B)(1.0, 0.0, 60.0)}):
        got, want = both(x.to(dtype), impl, seed=many, min_p=0.05, **options)
        assert got.valid.all() and (got.tokens != want.tokens).sum() <= 1


@kinds
@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.9])
def test_equals_at_the_end_of_top_p(p, dtype, impl, device):
    """Which of many equal tokens top-p keeps is a matter of ids."""
    V, g = 131072, torch.Generator(device="cuda").manual_seed(5)
    for values in ((2.0, 1.0), (5.0, 3.0, 0.0), (-1.0, -2.0, -8.0), (0.0, -0.0)):
        x = torch.tensor(values, device="cuda")[torch.randint(0, len(values), (MANY, V), generator=g, device="cuda")]
        got, want = both(x.to(dtype), impl, seed=2, top_p=p, min_p=0.01)
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize("spread", [1e-3, 1.0, 20.0])
@pytest.mark.parametrize("B", [1, 24, 60, 67, 132, 140, 400])
def test_a_row_is_drawn_the_same_whatever_the_batch(B, spread, impl, device):
    """By two launches, by one, by several rows a multiprocessor; at odd addresses too. Heavy tails and rows that no list holds."""
    V, one_of = 50304, chooser(B)
    u = torch.rand(B, V, generator=torch.Generator(device="cuda").manual_seed(B), device="cuda")
    x = -spread * torch.log(u + 1e-6)  # exponential: the tail falls slowly
    o = {"top_p": one_of(0.9, 0.5, 0.99), "min_p": one_of(0.05, 1e-3, 1e-5), "temperature": one_of(1.0, 0.7)}
    for dtype in (torch.float32, BF16):
        for v in (V, V - 1):
            got, want = both(x[:, :v].to(dtype), impl, seed=B, **o)
            assert got.valid.all() and (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize("far", [0.0, 200.0, 1e4, -1e4, 3e7])
def test_logits_far_from_zero(far, impl, device):
    """What floats know of a row's mass is less there, down to nothing."""
    x = (normal(MANY, 33000) / 3).round(decimals=2)
    for t in (1.0, 0.3):
        got, want = both(x + far, impl, seed=3, top_p=0.8, min_p=0.01, temperature=t)
        assert got.valid.all() and (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize("B", [3, MANY])
def test_rows_longer_than_one_multiprocessor_holds(B, impl, device):
    """The filter kernel draws them."""
    for dtype in (torch.float32, BF16):
        x = normal(B, 300000, dtype, seed=8)
        for options in ({}, {"top_p": 0.9}):
            got, want = both(x, impl, seed=4, min_p=chooser(B)(0.05, 1e-3), **options)
            assert got.valid.all() and (got.tokens != want.tokens).sum() <= 1


@kinds
def test_seeds_in_whose_place_tokens_go(dtype, impl, device):
    x = normal(100, 65536, dtype, seed=6)
    first = torch.arange(100, device="cuda")
    in_a_graph(lambda seeds, out: attnkit.sample(x, seed=seeds, top_p=0.9, min_p=0.01, out=out, impl=impl), first)
