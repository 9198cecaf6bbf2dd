"""Min-p without top-k over bf16, a multiprocessor a row: groups that are listed, top-p with it, rows without min-p in the same batch."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.sampling import KERNELS
from tests.kernels import every
from tests.test_sampling_large import both, chooser, in_a_graph, normal
from tests.test_sampling_once import odd_rows

CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize(("impl", "device"), CUDA)]
BF16 = torch.bfloat16


@pytest.mark.parametrize("V", [8, 2048, 32000, 50264, 131072, 151936, 262144])
def test_rows_of_all_kinds(V, impl, device):
    """Ties, staircases, masks, +inf, NaN, one token alone, none, wide and far rows; options from tensors, each on or off."""
    B, one_of = 180, chooser(180)
    o = {
        "temperature": one_of(1.0, 0.7, 1.5, 9.0, 0.0, 0.05),
        "top_p": one_of(1.0, 0.9, 0.5, 0.1, 0.99),
        "min_p": one_of(0.0, 0.01, 0.2, 0.0, 1.0, 1e-6, 1e-30),
    }
    got, want = both(odd_rows(B, V, BF16), impl, seed=V, **o)
    assert torch.equal(got.valid, want.valid)
    assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(
    "options", [{"min_p": 0.05}, {"min_p": 1e-4}, {"min_p": 1.0}, {"min_p": 0.02, "top_p": 0.7}, {"min_p": 1e-3, "top_p": 0.05}]
)
def test_normal_rows(options, impl, device):
    for seed, spread in enumerate((0.1, 0.5, 3.0, 8.0)):
        for shift in (-30.0, 0.0, 30.0):
            x = (normal(70, 131072, torch.float32, seed=seed) * (spread / 3) + shift).to(BF16)
            got, want = both(x, impl, seed=seed, **options)
            assert torch.equal(got.valid, want.valid) and (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize("many", [1, 40, 500, 5000])
def test_masked_rows(many, impl, device):
    """Few tokens wherever they are and however far apart: a sample of the row may see none."""
    V, B, g = 131072, 64, torch.Generator(device="cuda").manual_seed(many)
    x = torch.full((B, V), -float("inf"), device="cuda")
    for rows, spread in ((slice(0, B, 2), 1.0), (slice(1, B, 2), 60.0)):
        ids = torch.rand(B // 2, V, generator=g, device="cuda").topk(many, dim=1).indices
        x[rows] = x[rows].scatter(1, ids, torch.randn(B // 2, many, generator=g, device="cuda") * spread)
    for options in ({}, {"top_p": 0.9}, {"top_p": chooser(B)(0.2, 0.5, 1.0), "temperature": chooser(B)(1.0, 0.0, 60.0)}):
        got, want = both(x.to(BF16), impl, seed=many, min_p=0.05, **options)
        assert got.valid.all() and (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize("p", [0.3, 0.5, 0.7, 0.9])
def test_equals_at_the_end_of_top_p(p, impl, device):
    """Which of many equal tokens top-p keeps is a matter of ids."""
    V, g = 131072, torch.Generator(device="cuda").manual_seed(5)
    for values in ((2.0, 1.0), (5.0, 3.0, 0.0), (-1.0, -2.0, -8.0), (0.0, -0.0)):
        x = torch.tensor(values, device="cuda")[torch.randint(0, len(values), (66, V), generator=g, device="cuda")]
        got, want = both(x.to(BF16), impl, seed=2, top_p=p, min_p=0.01)
        assert (got.tokens != want.tokens).sum() <= 1


def test_seeds_in_whose_place_tokens_go(impl, device):
    x = normal(100, 65536, BF16, seed=6)
    first = torch.arange(100, device="cuda")
    in_a_graph(lambda seeds, out: attnkit.sample(x, seed=seeds, top_p=0.9, min_p=0.01, out=out, impl=impl), first)
