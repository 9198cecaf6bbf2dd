"""Rows of min-p that keep more tokens than a list holds: read a second time, and with top-p a third."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.sampling import KERNELS
from tests.kernels import every
from tests.test_sampling_large import both, chooser, normal, penalties

pytestmark = pytest.mark.gpu

CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
INF = float("inf")


def hot_rows(B: int, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal rows of a small spread, of few values, all equal, in order both ways; with one token or a block far above, at the end of
    the row; masked in part; +inf, NaN; far from zero; most of it just below and just above what min-p keeps."""
    x, ids = normal(B, V, torch.float32, seed=V) / 3, torch.arange(V, device="cuda")
    for b in range(B):
        kind = b % 14
        if kind == 1:
            x[b] = (x[b] * 2).round() / 2
        elif kind == 2:
            x[b] = -1.25
        elif kind == 3:
            x[b] = x[b].sort(descending=b % 2 == 0).values
        elif kind == 4:
            x[b, V - 1] = 2.0 + b % 7
        elif kind == 5:
            x[b, V - 3000 :] += 2.5
        elif kind == 6:
            x[b, ids % 3 != 0] = -INF
        elif kind == 7:
            x[b, V // 2] = (INF, float("nan"), -INF)[b // 14 % 3]
        elif kind == 8:
            x[b] += 300
        elif kind == 9:
            x[b] = torch.where(ids % 2 == 0, 0.0, torch.where(ids % 3 == 0, -2.9957, -2.9958))
        elif kind == 10:
            x[b, : V // 3] = -INF
        elif kind == 11:
            x[b] *= 0.02
        elif kind == 12:
            x[b, V // 4 * 3 :] = 3.5 + x[b, V // 4 * 3 :] / 4
    return x.to(dtype)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("V", [32768, 33001, 50257, 131072, 151936, 262144])
@pytest.mark.parametrize("top_p", [False, True])
def test_hot_rows_of_all_kinds(top_p, V, dtype, impl, device):
    """With top-p down to nothing; temperatures that make few tokens count, or all of them alike."""
    B, one_of = 98, chooser(98)
    for seed, (warm, min_p) in enumerate(
        ((1.0, 0.05), (1.0, 0.3), (one_of(1.0, 0.5, 2.0, 1e6, 1e-3), one_of(0.05, 0.001, 0.3, 1.0, 1e-20)))
    ):
        o = {"top_p": one_of(0.9, 0.99, 0.5, 0.1, 0.0)} if top_p else {}
        got, want = both(hot_rows(B, V, dtype), impl, seed=seed, temperature=warm, min_p=min_p, **o)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(
    "given", [("output_counts",), ("prompt_mask", "allowed"), ("output_counts", "allowed", "logit_bias")], ids="+".join
)
@pytest.mark.parametrize("V", [33001, 131072, 262144])
def test_hot_rows_with_penalties(V, given, dtype, impl, device):
    B, one_of = 112, chooser(112)
    extra = penalties(B, V)
    o = {name: extra[name] for name in given}
    o |= {
        "repetition_penalty": one_of(1.2, 0.8),
        "presence_penalty": one_of(0.3, 0.0, -0.5),
        "frequency_penalty": one_of(0.2, -0.1),
    }
    for seed, top_p in enumerate((1.0, one_of(0.9, 0.5, 0.1, 1.0, 0.0))):
        got, want = both(hot_rows(B, V, dtype), impl, seed=seed, min_p=one_of(0.05, 0.3, 0.001), top_p=top_p, **o)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 20, 132, 264])
def test_hot_rows_whatever_the_batch(B, dtype, impl, device):
    """Each row as the reference draws it, seed by seed; at odd addresses too; with penalties or without."""
    x = normal(B, 131075, dtype, seed=B)
    counts = penalties(B, 131075)["output_counts"]
    for seed, (top_p, min_p, warm) in enumerate(((1.0, 0.05, 3.0), (0.9, 0.05, 3.0), (0.5, 0.02, 3.0), (1.0, 0.01, 9.0))):
        for at in (0, 3):
            one = slice(at, at + 131072)
            for extra in ({}, {"output_counts": counts[:, one], "repetition_penalty": 1.1, "presence_penalty": 0.2}):
                got, want = both(x[:, one], impl, seed=seed, top_p=top_p, min_p=min_p, temperature=warm, **extra)
                assert got.valid.all()
                assert (got.tokens != want.tokens).sum() <= B // 64


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_largest_logit_comes_last(dtype, impl, device):
    """It leaves out most of what would be kept without it."""
    B, V = 132, 131072
    x = normal(B, V, torch.float32, seed=1) * (0.83 / 3)
    for more in (0.3, 1.0, 2.0, 5.0, 60.0):
        x[:, V - 7] = x[:, : V - 7].amax(1) + more
        for seed in range(3):
            got, want = both(x.to(dtype), impl, seed=seed, min_p=0.05)
            assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_hot_rows_are_the_same_bit_for_bit(dtype, impl, device):
    x = normal(132, 131072, dtype)
    draws = [attnkit.sample(x, seed=5, min_p=0.05, top_p=0.9, temperature=3.0, impl=impl).tokens for _ in range(100)]
    assert all(torch.equal(draws[0], one) for one in draws)
