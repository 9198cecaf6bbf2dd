"""Rows of any top-k that a CTA has to itself: short and long ones, min-p, top-p alone and none side by side; with penalties too."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnkit
from attnkit.backends.cuda.builds import sampling as builds
from attnkit.sampling import KERNELS
from tests.kernels import every
from tests.test_sampling_large import both, chooser, normal, penalties

CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
TYPES = [torch.float32, torch.bfloat16, torch.float16]
gpu = pytest.mark.gpu
#: Rows of less than a block, of one, of one a warp and of several, at odd addresses; the last is nearly the longest that fits.
VOCABULARIES = [1, 70, 2047, 2049, 17000, 32768, 33001, 50257, 131072, 262144]


def test_what_has_room_at_once():
    assert builds.holds_at_once(1 << 18) and not builds.holds_at_once((1 << 18) + 1)
    for kind in (builds.BF16, builds.F32):
        for penalised in (False, True):
            assert all(builds.at_once_bytes(kind, penalised, V) <= 227 * 1024 for V in (1, 131072, 256000, 1 << 18))


@pytest.mark.parametrize(
    ("kind", "penalised", "B", "V", "expected"),
    [
        (builds.F32, False, 16, 131072, True),
        (builds.F32, False, 17, 131072, False),
        (builds.BF16, False, 8, 131072, True),
        (builds.BF16, False, 9, 131072, False),
        (builds.F32, False, 1, 49152, True),
        (builds.F32, False, 1, 49151, False),
        (builds.BF16, False, 1, 98303, False),
        (builds.BF16, True, 39, 32000, True),
        (builds.F32, True, 40, 131072, False),
        (builds.F32, True, 99, 50257, True),
        (builds.F32, True, 100, 50257, False),
    ],
)
def test_how_few_rows_are_sooner_by_two_launches(kind, penalised, B, V, expected):
    """Those of which a multiprocessor would read for too long; at odd addresses more, as copies ahead are slow there."""
    assert builds.few_at_once(kind, penalised, B, V) == expected


def test_how_few_rows_of_top_p_with_min_p_are_sooner_by_two_launches():
    for kind, V in ((builds.F32, 131072), (builds.F32, 50257), (builds.F16, 131072)):
        assert builds.few_at_once(kind, False, 36, V, True) and not builds.few_at_once(kind, False, 37, V, True)
    assert not builds.few_at_once(builds.F32, False, 1, 32000, True)


def penalty_rates(one_of: Any) -> dict[str, torch.Tensor]:
    """Penalties that lower logits, that raise them and that are off, by rows."""
    return {
        "repetition_penalty": one_of(1.2, 1.0, 0.7),
        "presence_penalty": one_of(0.3, 0.0, -0.5),
        "frequency_penalty": one_of(0.2, -0.1),
    }


def odd_rows(B: int, V: int, dtype: torch.dtype) -> torch.Tensor:
    """Normal rows of several spreads; ties, staircases, masks, +inf, NaN, one token alone, none."""
    x = normal(B, V, torch.float32, seed=V)
    for b in range(B):
        kind = b % 12
        if kind == 1:
            x[b] = x[b].round()
        elif kind == 2:
            x[b] = x[b].sort().values
        elif kind == 3:
            x[b] = 0.25
        elif kind == 4:
            x[b, torch.rand(V, device="cuda") < 0.97] = -float("inf")
        elif kind == 5:
            x[b, V // 2] = (float("inf"), float("nan"), 60.0)[b // 12 % 3]
        elif kind == 6:
            x[b, 1:] = -float("inf")
        elif kind == 7 and b // 12 == 1:
            x[b] = -float("inf")
        elif kind == 8:
            x[b] *= 300
        elif kind == 9:
            x[b] = x[b] / 30 + 300
    return x.to(dtype)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_rows_of_all_kinds_side_by_side(V, dtype, impl, device):
    B, one_of = 120, chooser(120)
    o = {
        "temperature": one_of(1.0, 0.7, 1.5, 9.0, 0.0),
        "top_k": one_of(1, 2, 7, 50, 128, 129, 1000, 0, V, 5000, dtype=torch.int64),
        "top_p": one_of(1.0, 0.9, 0.5, 0.1, 0.99, 0.0),
        "min_p": one_of(0.0, 0.0, 0.05, 0.3, 1.0),
    }
    got, want = both(odd_rows(B, V, dtype), impl, seed=V, **o)
    assert torch.equal(got.valid, want.valid)
    assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize(
    "given",
    [("output_counts",), ("prompt_mask", "allowed"), ("output_counts", "prompt_mask", "allowed", "logit_bias")],
    ids="+".join,
)
def test_rows_of_all_kinds_with_penalties(given, V, dtype, impl, device):
    """Counts alone have a loop of their own; a bias takes two launches."""
    B, one_of = 120, chooser(120)
    extra = penalties(B, V)
    o = {name: extra[name] for name in given}
    o |= penalty_rates(one_of)
    o |= {
        "temperature": one_of(1.0, 0.7, 0.0),
        "top_k": one_of(1, 2, 7, 50, 128, 129, 1000, 0, dtype=torch.int64),
        "top_p": one_of(1.0, 0.9, 0.55),
        "min_p": one_of(0.0, 0.0, 0.05),
    }
    got, want = both(odd_rows(B, V, dtype), impl, seed=V, **o)
    assert torch.equal(got.valid, want.valid)
    assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("B", "k"), [(140, 1000), (150, None), (264, 50), (400, 3000)])
def test_more_rows_than_multiprocessors(B, k, dtype, impl, device):
    one_of = chooser(B)
    top_k = one_of(1, 50, 0, 300, 4000, dtype=torch.int64) if k is None else k
    got, want = both(
        odd_rows(B, 32768, dtype), impl, seed=B, top_k=top_k, top_p=one_of(1.0, 0.9, 0.5), temperature=one_of(1.0, 0.0)
    )
    assert torch.equal(got.valid, want.valid)
    assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("B", [1, 30, 132, 140, 264])
def test_penalties_whatever_the_batch(B, impl, device):
    """A row's draw is the same by one launch and by two, at odd addresses too: strided logits, counts and masks."""
    V = 70001
    x = normal(B, V + 3, torch.bfloat16, seed=B)[:, 1 : V + 1]
    extra = penalties(B, V + 1)
    o = {"output_counts": extra["output_counts"][:, 1:], "prompt_mask": extra["prompt_mask"][:, 1:], "repetition_penalty": 1.3}
    o |= {"top_k": 50, "top_p": 0.9, "frequency_penalty": 0.2}
    got, want = both(x, impl, seed=3, **o)
    assert got.valid.all()
    assert (got.tokens != want.tokens).sum() <= B // 64


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("k", [1, 50, 128, 1000, 4096, 4097])
def test_one_top_k_of_many_rows(k, dtype, impl, device):
    """As a tensor, so that a longer one is drawn by the same kernel."""
    x = normal(100, 50257, dtype, seed=k)
    for p in (1.0, 0.6):
        got, want = both(x, impl, seed=3, top_k=torch.full((100,), k, device="cuda"), top_p=p, temperature=0.8)
        assert got.valid.all()
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("k", [129, 4000, 4096])
def test_a_longer_top_k_whose_list_is_nearly_full(k, dtype, impl, device):
    """As a number and as a tensor: one is drawn as the other."""
    x = normal(60, 131072, dtype, seed=k)
    for p in (1.0, 0.9, 0.3):
        got, want = both(x, impl, seed=2, top_k=k, top_p=p)
        assert got.valid.all()
        assert (got.tokens != want.tokens).sum() <= 1
        tensor = attnkit.sample(x, seed=2, top_k=torch.full((60,), k, device="cuda"), top_p=p, impl=impl)
        assert torch.equal(got.tokens, tensor.tokens)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_that_come_in_order(dtype, impl, device):
    """The largest last, and many alike in 16 bits."""
    x = torch.arange(131072, device="cuda").mul(1e-4).to(dtype).expand(64, -1).contiguous()
    for k in (50, 128):
        got, want = both(x, impl, seed=1, top_k=k, top_p=0.9)
        assert torch.equal(got.tokens, want.tokens)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_repeats_are_the_same_bit_for_bit(impl, device):
    x = normal(132, 131072, torch.bfloat16)
    draws = [attnkit.sample(x, seed=5, top_k=50, top_p=0.9, impl=impl).tokens for _ in range(100)]
    assert all(torch.equal(draws[0], one) for one in draws)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("V", [4999, 50257, 131072])
def test_longer_top_k_of_odd_rows(V, dtype, impl, device):
    """A few values, all large ones in one block, one token far above all, wide rows; top-p down to nothing; as a number too."""
    B, one_of = 64, chooser(64)
    x = normal(B, V, torch.float32, seed=V)
    x[::8] = x[::8].round()
    x[1::8] = (x[1::8] > 1).float()
    x[2::8, V // 3 : V // 3 + 2048] += 9
    x[3::8, V // 2] = 1e4
    x[4::8] *= 2e3
    x[5::8] = x[5::8].sort().values
    o = {"top_p": one_of(1.0, 0.9, 0.5, 0.0, 0.01), "temperature": one_of(1.0, 0.6, 3.0)}
    for k in (129, 1000, 4096, one_of(129, 700, 2500, 4096, dtype=torch.int64)):
        got, want = both(x.to(dtype), impl, seed=V, top_k=k, **o)
        assert got.valid.all()
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [98304, 131072, 151936, 262144])
def test_longer_top_k_of_rows_unlike_their_sample(V, dtype, impl, device):
    """16-bit rows are bounded by some blocks of 2048 tokens while they stream by: those lie higher or lower than the rest, logits fall
    with the id, one token or more than k are far above all others, most are masked."""
    B, one_of = 72, chooser(72)
    x, ids = normal(B, V, torch.float32, seed=V), torch.arange(V, device="cuda")
    x[1::9] += 4 * torch.exp(ids / (-0.15 * V))
    x[2::9, : 10 * 2048] += 5
    x[3::9, 20 * 2048 : 24 * 2048] += 6
    x[4::9, 20 * 2048 + 77] = x[4::9].amax(1) + torch.tensor([3.0, 9.0, 14.0, 30.0] * 2, device="cuda")
    x[5::9, 20 * 2048 : 20 * 2048 + 2100] = 40 + (ids[:2100] % 3) * 0.25
    x[6::9, ids % 70 != 0] = -float("inf")
    x[7::9] -= 4 * torch.exp(ids / (-0.15 * V))
    x[8::9, ids // 16 % 40 == 0] += 6
    o = {
        "top_p": one_of(1.0, 0.9, 0.5, 0.99),
        "min_p": one_of(0.0, 0.0, 0.0, 0.05, 0.0),
        "temperature": one_of(1.0, 0.6, 3.0, 1.0, 1.0),
    }
    for k in (1000, one_of(129, 300, 2000, 1500, 700, dtype=torch.int64)):
        got, want = both(x.to(dtype), impl, seed=V, top_k=k, **o)
        assert got.valid.all()
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("given", [("output_counts",), ("output_counts", "prompt_mask", "allowed")], ids="+".join)
@pytest.mark.parametrize("V", [4999, 50257, 131072, 262144])
def test_long_lists_with_penalties(V, given, dtype, impl, device):
    """Longer top-k and min-p of rows of all kinds, with top-p and without; what no list holds; a mask's -inf and its least number."""
    B, one_of = 96, chooser(96)
    x = odd_rows(B, V, torch.float32)
    x[10::24] *= 2e3
    x[11::24, V // 3 : V // 3 + 2048] += 9
    x[22::24] = torch.finfo(torch.float32).min
    x[22::24, V // 7 :: 200] = 1.5
    x[23::24, 300:] = -float("inf")
    extra = penalties(B, V)
    o = {name: extra[name] for name in given}
    o |= {
        "repetition_penalty": one_of(1.2, 0.8),
        "presence_penalty": one_of(0.3, 0.0, -0.5),
        "frequency_penalty": one_of(0.2, -0.1),
        "temperature": one_of(1.0, 0.6, 3.0),
        "top_p": one_of(1.0, 0.9, 0.5, 0.0, 0.01),
    }
    for k, min_p in (
        (129, 0.0),
        (1000, 0.05),
        (4096, 0.0),
        (0, 0.05),
        (0, 0.001),
        (one_of(0, 700, 2500, 4096, dtype=torch.int64), 0.02),
    ):
        got, want = both(x.to(dtype), impl, seed=V, top_k=k, min_p=min_p, **o)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [40, 132, 212, 264])
def test_long_lists_with_penalties_whatever_the_batch(B, dtype, impl, device):
    """Each row as the reference draws it, seed by seed; at odd addresses too."""
    x = normal(B, 131075, dtype, seed=B)
    counts = penalties(B, 131075)["output_counts"]
    o = {"repetition_penalty": 1.1, "presence_penalty": 0.2, "frequency_penalty": 0.1, "temperature": 0.8}
    for seed, (k, top_p, min_p) in enumerate(
        ((1000, 1.0, 0.0), (1000, 0.9, 0.0), (300, 0.9, 0.05), (0, 1.0, 0.05), (0, 0.9, 0.05))
    ):
        for at in (0, 3):
            one = slice(at, at + 131072)
            got, want = both(x[:, one], impl, seed=seed, output_counts=counts[:, one], top_k=k, top_p=top_p, min_p=min_p, **o)
            assert got.valid.all()
            assert (got.tokens != want.tokens).sum() <= B // 64
