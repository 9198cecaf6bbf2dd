"""sample at vocabularies that take several blocks a row: the reference's tokens, ties, odd rows, repeats, replays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnkit
from attnkit import reference
from attnkit.sampling import KERNELS
from tests.kernels import every, skip_if_declined
from tests.test_sampling import chi_square_z

pytestmark = pytest.mark.gpu

GPU = [p for p in every(KERNELS) if p.id in ("cuda_sm90", "triton")]
CUDA = [p for p in GPU if p.id == "cuda_sm90"]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.8},
    "greedy": {"temperature": 0.0},
    "k50p": {"top_k": 50, "top_p": 0.9},
    "k1": {"top_k": 1},
    "k128": {"top_k": 128, "temperature": 1.7},
    "k900p": {"top_k": 900, "top_p": 0.9},
    "k900": {"top_k": 900},
    "p90": {"top_p": 0.9, "temperature": 0.8},
    "p10": {"top_p": 0.1},
    "p50": {"top_p": 0.5, "temperature": 1.5},
    "p999": {"top_p": 0.999},
    "min_p": {"min_p": 0.05},
    "p_min_p": {"top_p": 0.9, "min_p": 0.02},
    "all": {"top_k": 60, "top_p": 0.95, "min_p": 0.01, "temperature": 0.7},
}
#: 50257 in rows of 16-bit or of odd length: nothing is aligned.
SHAPES = [
    (131072, torch.float32),
    (131072, torch.bfloat16),
    (151936, torch.float32),
    (128256, torch.float16),
    (50257, torch.float32),
    (50257, torch.bfloat16),
    (16385, torch.float32),
    (262144, torch.float32),
]


def normal(B: int, V: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator(device="cuda").manual_seed(seed)
    return (torch.randn(B, V, generator=g, device="cuda") * 3).to(dtype)


def penalties(B: int, V: int) -> dict[str, Any]:
    """Every tensor and number that changes logits before they are drawn from."""
    g = torch.Generator(device="cuda").manual_seed(V)
    return {
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.2,
        "output_counts": torch.randint(0, 64, (B, V), generator=g, device="cuda", dtype=torch.int32).sub_(60).clamp_(min=0),
        "prompt_mask": torch.rand(B, V, generator=g, device="cuda") < 0.1,
        "logit_bias": torch.randn(V, generator=g, device="cuda"),
        "allowed": torch.randint(-(2**31), 2**31 - 1, (B, (V + 31) // 32), generator=g, device="cuda", dtype=torch.int32),
    }  # fmt: skip


def both(logits: torch.Tensor, impl: str, **options):
    got = skip_if_declined(lambda: attnkit.sample(logits, impl=impl, **options))
    return got, attnkit.sample(logits, impl="torch", **options)


def in_a_graph(draw: Callable[[torch.Tensor, torch.Tensor], Any], first: torch.Tensor, launches: int = 60) -> None:
    """Draws with seeds that are the tokens of the launch before, written in their place, are those of one launch at a time."""
    seeds = torch.empty_like(first)
    for start in (first, first + 1000, first + 5000):
        want = start
        for _ in range(launches):
            want, old = torch.empty_like(want), want
            draw(old, want)
            torch.cuda.synchronize()
        if start is first:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(launches):
                    draw(seeds, seeds)
        seeds.copy_(start)
        graph.replay()
        assert torch.equal(seeds, want)


@pytest.mark.parametrize(("impl", "device"), GPU)
@pytest.mark.parametrize(("V", "dtype"), SHAPES, ids=str)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_same_tokens_as_the_reference_at_large_V(options, V, dtype, impl, device):
    """One row in 16 may differ: two noisy logits within a rounding of each other."""
    got, want = both(normal(16, V, dtype), impl, seed=31, offset=7, **options)
    assert got.valid.all()
    assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), GPU)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_rows_that_no_list_of_candidates_fits(options, impl, device):
    """All equal; all that counts in one tile; ten values; a staircase; one token far above."""
    V = 40000
    x = torch.zeros(6, V, device="cuda")
    x[1, 4096:4296] = 9 + torch.rand(200, device="cuda")
    x[2] = torch.randint(0, 10, (V,), device="cuda").float()
    x[3] = torch.arange(V, device="cuda") * -1e-3
    x[4, 39999] = 60.0
    x[5] = -float("inf")
    x[5, 123:140] = -2.0
    x = x.repeat(3, 1)
    for seed in range(4):
        got, want = both(x, impl, seed=seed, **options)
        assert torch.equal(got.valid, want.valid)
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), GPU)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_rows_in_order_of_logit(options, impl, device):
    """A part of a row says nothing about the rest of it: rising, falling, a few large ones at either end, wide apart."""
    V = 50257
    x = normal(6, V)
    x[0] = x[0].sort().values
    x[1] = x[1].sort(descending=True).values
    x[2, :40] = 30 + torch.rand(40, device="cuda")
    x[3, -40:] = 30 + torch.rand(40, device="cuda")
    x[4] *= 1000
    x[5] *= 0.1
    x = x.repeat(3, 1)
    for seed in range(3):
        got, want = both(x, impl, seed=seed, **options)
        assert got.valid.all()
        assert (got.tokens != want.tokens).sum() <= 1


def chooser(B: int):
    """A function that gives each of ``B`` rows one of several values, by chance."""
    g = torch.Generator(device="cuda").manual_seed(B)

    def one_of(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.tensor(values, device="cuda", dtype=dtype)[torch.randint(0, len(values), (B,), generator=g, device="cuda")]

    return one_of


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("B", [1, 15, 16, 30, 40, 50, 64, 100, 140, 270])
@pytest.mark.parametrize("k", [True, False], ids=["k", "no-k"])
def test_a_batch_of_any_size(k, B, impl, device):
    """Which kernel draws, and how many CTAs share a row, depends on it; rows of every kind side by side."""
    V, one_of = 33000, chooser(B)
    o = {"temperature": one_of(1.0, 0.7, 1.5, 9.0, 0.0), "top_p": one_of(1.0, 0.9, 0.5, 0.99), "min_p": one_of(0.0, 0.0, 0.05)}
    if k:
        o["top_k"] = one_of(0, 0, 0, 1, 50, 200, dtype=torch.int64)
    x = normal(B, V, seed=B)
    x[B // 3, V - 1] = float("nan")
    x[B // 2] = -float("inf")
    got, want = both(x, impl, seed=11, **o)
    assert torch.equal(got.valid, want.valid)
    assert (got.tokens != want.tokens).sum() <= B // 64


@pytest.mark.parametrize(("impl", "device"), GPU)
@pytest.mark.parametrize(
    "options",
    [{"top_p": 0.02}, {"top_p": 0.9}, {"top_p": 0.999}, {"min_p": 1e-3}, {"min_p": 1e-3, "top_p": 0.7}],
    ids=str,
)
def test_rows_that_what_is_listed_does_not_decide(options, impl, device):
    """Many tokens that hardly differ, in any order; +inf once and twice; a row of two values."""
    V = 70001
    x = normal(6, V) * 0.1
    x[1] = x[1].sort().values
    x[2, 60000] = float("inf")
    x[3, [777, 40000]] = float("inf")
    x[4] = 0.0
    x[4, ::2] = -0.5
    x = x.repeat(4, 1)
    for dtype in (torch.float32, torch.bfloat16):
        for seed in range(2):
            got, want = both(x.to(dtype), impl, seed=seed, **options)
            assert got.valid.all()
            assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), GPU)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_nan_and_infinity_in_any_part_of_a_row(options, impl, device):
    V = 33000
    x = normal(8, V)
    for b, v in enumerate((0, 1023, 16400, V - 1)):
        x[b, v] = float("nan")
        x[4 + b, v] = float("inf")
    got = skip_if_declined(lambda: attnkit.sample(x, impl=impl, seed=1, **options))
    assert got.valid.tolist() == [False] * 4 + [True] * 4
    assert got.tokens.tolist() == [0] * 4 + [0, 1023, 16400, V - 1]


@pytest.mark.parametrize(("impl", "device"), GPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("V", [32768, 50257])
@pytest.mark.parametrize("options", [SETTINGS["k50p"], SETTINGS["p90"], SETTINGS["plain"], SETTINGS["greedy"]], ids=str)
def test_penalties_at_large_V(options, V, dtype, impl, device):
    B = 6
    more = penalties(B, V)
    for names in ((*more,), ("output_counts", "repetition_penalty", "presence_penalty", "frequency_penalty"), ("allowed",)):
        got, want = both(normal(B, V, dtype), impl, seed=3, **options, **{n: more[n] for n in names})
        assert (got.tokens != want.tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), GPU)
@pytest.mark.parametrize("columns", [0, 1, 7, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logprobs_at_large_V(dtype, columns, impl, device):
    """Ties (16-bit logits are full of them) in the reference's order; impossible tokens last, by id."""
    x = normal(5, 33001, dtype)
    x[1] = -float("inf")
    x[1, [5, 32999]] = 1.5
    x[2] = 0.25
    got, want = both(x, impl, seed=9, logprobs=columns, temperature=0.7)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.top_ids, want.top_ids)
    assert torch.allclose(got.logprobs, want.logprobs, atol=2e-5)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_250_repeats_and_every_row_alone(options, impl, device):
    x = normal(20, 70001)
    seeds = torch.arange(20, device="cuda") * 1000 + 1
    first = attnkit.sample(x, seed=seeds, impl=impl, logprobs=5, **options)
    for _ in range(250):
        again = attnkit.sample(x, seed=seeds, impl=impl, logprobs=5, **options)
        assert torch.equal(again.tokens, first.tokens)
        assert torch.equal(again.logprobs.view(torch.int32), first.logprobs.view(torch.int32))
    for b in range(20):
        assert attnkit.sample(x[b : b + 1], seed=seeds[b : b + 1], impl=impl, **options).tokens[0] == first.tokens[b]


@pytest.mark.parametrize(("impl", "device"), GPU)
def test_a_replayed_graph_follows_its_tensors(impl, device):
    B, V = 9, 50000
    x, seeds = normal(B, V), torch.arange(B, device="cuda")
    o = {
        "temperature": torch.full((B,), 0.8, device="cuda"), "top_p": torch.full((B,), 0.9, device="cuda"),
        "top_k": torch.full((B,), 50, device="cuda"), "min_p": torch.zeros(B, device="cuda"),
    }  # fmt: skip
    out = torch.empty(B, dtype=torch.int64, device="cuda")
    plain = torch.empty(B, dtype=torch.int64, device="cuda")

    def call():
        skip_if_declined(lambda: attnkit.sample(x, seed=seeds, out=out, impl=impl, **o))
        attnkit.sample(x, seed=seeds, out=plain, impl=impl, temperature=o["temperature"])

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for turn in range(4):
        x.copy_(normal(B, V, seed=turn))
        seeds += 100
        o["temperature"][turn] = 0.0
        o["top_k"].copy_(torch.tensor([0, 1, 50, 500, 0, 128, 129, V, 3], device="cuda").roll(turn))
        o["top_p"][turn + 4] = 1.0
        o["min_p"][turn] = 0.05
        graph.replay()
        want = attnkit.sample(x, seed=seeds, impl="torch", **o)
        assert (out != want.tokens).sum() <= 1
        assert (plain != attnkit.sample(x, seed=seeds, impl="torch", temperature=o["temperature"]).tokens).sum() <= 1


@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_rows_at_odd_addresses(impl, device):
    for dtype in (torch.float32, torch.bfloat16):
        wide = torch.full((4, 20011), float("nan"), device="cuda", dtype=dtype)
        wide[:, 1:20002] = normal(4, 20001, dtype)
        for options in (SETTINGS["k50p"], SETTINGS["p90"], SETTINGS["plain"], SETTINGS["greedy"]):
            got, want = both(wide[:, 1:20002], impl, seed=4, logprobs=3, **options)
            assert got.valid.all() and torch.equal(got.tokens, want.tokens) and torch.equal(got.top_ids, want.top_ids)


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize(
    "options", [{}, {"top_k": 100}, {"top_p": 0.9}, {"top_p": 0.4}, {"top_k": 1000}, {"min_p": 0.2}], ids=str
)
def test_chi_square_over_several_blocks(options, impl, device):
    """A million draws over 33000 tokens, 3000 of which share nearly all of the mass."""
    V, rows, rounds = 33000, 2048, 512
    row = torch.full((V,), -4.0)
    row[::11] = 4 - torch.log(torch.arange(1, V // 11 + 1).float() + 50)
    x = row.cuda()
    one = {k: torch.tensor([options.get(k, off)], device="cuda") for k, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))}
    kept = reference.survivors(x[None], one["top_k"], one["top_p"], one["min_p"])[0]
    p = torch.softmax(x.double().masked_fill(~kept, -torch.inf), 0).cpu()
    logits = x.expand(rows, V)
    tokens = torch.cat([attnkit.sample(logits, impl=impl, seed=77, offset=r, **options).tokens for r in range(rounds)])
    assert abs(chi_square_z(tokens.cpu(), p)) < 5


@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("B", [3, 100])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_seeds_in_whose_place_tokens_go(options, B, dtype, impl, device):
    """In a graph a launch begins before the one before it has ended."""
    x = normal(B, 32768, dtype, seed=B)
    in_a_graph(
        lambda seeds, out: attnkit.sample(x, seed=seeds, out=out, impl=impl, **options), torch.arange(B, device="cuda"), 20
    )
