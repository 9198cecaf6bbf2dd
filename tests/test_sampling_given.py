"""Few rows, and rows with a bias, by two launches: the first leaves peaks of groups and, with penalties, logits; the second draws from them."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import dispatch
from attnkit.backends.cuda.builds import sampling as builds
from attnkit.sampling import KERNELS
from tests.kernels import every
from tests.test_sampling_large import both, chooser, in_a_graph, normal, penalties
from tests.test_sampling_once import TYPES, odd_rows, penalty_rates

CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
pytestmark = [pytest.mark.gpu, pytest.mark.parametrize(("impl", "device"), CUDA)]
#: Rows of less than a block, at odd addresses, and the longest that the second launch holds.
VOCABULARIES = [1, 70, 2049, 17000, 33001, 50257, 131072, 256000, 262144]


@pytest.fixture(autouse=True)
def two_launches(monkeypatch):
    """Of any number of rows, so that a batch has rows of all kinds."""
    dispatch.forget_plans()
    monkeypatch.setattr(builds, "few_at_once", lambda *_: True)
    monkeypatch.setattr(builds, "fits_tally", lambda *_: False)
    yield
    dispatch.forget_plans()


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_rows_of_all_kinds(V, dtype, impl, device):
    """Options from tensors, each on or off in a row; a short top-k as a number; min-p with top-p and without."""
    B, one_of = 48, chooser(48)
    x = odd_rows(B, V, dtype)
    o = {"temperature": one_of(1.0, 0.7, 9.0, 0.0), "top_p": one_of(1.0, 0.9, 0.5, 0.1, 0.99, 0.0)}
    for filters in (
        {
            "top_k": one_of(1, 2, 7, 50, 128, 129, 1000, 0, V, 5000, dtype=torch.int64),
            "min_p": one_of(0.0, 0.0, 0.05, 0.3, 1.0),
        },
        {"top_k": 40},
        {"top_k": 2000},
        {"min_p": one_of(0.05, 0.01, 1e-4, 0.0)},
    ):
        got, want = both(x, impl, seed=V, **o, **filters)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("V", [70, 2049, 50257, 131072, 262144])
@pytest.mark.parametrize(
    "given",
    [
        ("output_counts",),
        ("logit_bias",),
        ("prompt_mask", "allowed"),
        ("output_counts", "prompt_mask", "allowed", "logit_bias"),
    ],
    ids="+".join,
)
def test_rows_of_all_kinds_with_penalties(given, V, dtype, impl, device):
    B, one_of = 48, chooser(48)
    extra, x = penalties(B, V), odd_rows(B, V, dtype)
    o = {name: extra[name] for name in given}
    o |= penalty_rates(one_of)
    o |= {"temperature": one_of(1.0, 0.7, 0.0), "top_p": one_of(1.0, 0.9, 0.55)}
    for filters in (
        {"top_k": one_of(1, 2, 50, 128, 129, 1000, 0, dtype=torch.int64), "min_p": one_of(0.0, 0.05)},
        {"min_p": 0.02},
    ):
        got, want = both(x, impl, seed=V, **o, **filters)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= 1


def test_a_top_k_that_no_list_holds(impl, device):
    """With penalties it is drawn from what the first launch leaves, too."""
    x, extra = normal(5, 50257, torch.bfloat16), penalties(5, 50257)
    for k in (5000, 20000):
        got, want = both(x, impl, seed=3, top_k=k, top_p=0.95, **extra)
        assert got.valid.all() and torch.equal(got.tokens, want.tokens)


@pytest.mark.parametrize("filters", [{"top_k": 50}, {"top_k": 1000, "top_p": 0.9}, {"min_p": 0.05, "top_p": 0.9}], ids=str)
def test_seeds_in_whose_place_tokens_go(filters, impl, device):
    """A launch may not leave anything before the one before has drawn from what is there."""
    x, extra = normal(12, 65536, seed=6), penalties(12, 65536)
    draw = lambda seeds, out: attnkit.sample(x, seed=seeds, out=out, impl=impl, **filters, **extra)  # noqa: E731
    in_a_graph(draw, torch.arange(12, device="cuda"))


def test_what_was_left_in_memory_does_not_matter(impl, device):
    """Batches of other sizes, by turns."""
    for V in (131072, 3000, 50257, 131072):
        x, extra = normal(7, V, seed=V), penalties(7, V)
        for filters in ({"top_k": 900}, {"min_p": 0.01, "top_p": 0.8}):
            got, want = both(x, impl, seed=1, **filters, **extra)
            assert torch.equal(got.tokens, want.tokens)
