"""sample: the same token as the float64 reference for the same seed, and the right statistics."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import attnkit
from attnkit import reference
from attnkit.backends.cuda import sampling as cuda_sampling
from attnkit.sampling import KERNELS
from attnkit.signature import SampleSig
from tests import inputs
from tests.kernels import every, skip_if_declined

SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7},
    "top_k": {"top_k": 20, "temperature": 1.3},
    "top_k1": {"top_k": 1},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.05},
    "top_p_min_p": {"top_p": 0.9, "min_p": 0.02},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
}


def logits_of(B: int, V: int, device: str, dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    g = torch.Generator(device=device).manual_seed(seed)
    return (torch.randn(B, V, generator=g, device=device) * 3).to(dtype)


def draw(logits, impl, **options):
    return skip_if_declined(lambda: attnkit.sample(logits, impl=impl, **options))


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_same_tokens_as_the_reference(options, dtype, impl, device):
    """16-bit logits are full of ties, so this is also the test of their order."""
    logits = logits_of(6, 1003, device, dtype)
    for seed in range(3):
        got = draw(logits, impl, seed=seed * 1000, offset=seed, **options)
        want = attnkit.sample(logits, impl="torch", seed=seed * 1000, offset=seed, **options)
        assert torch.equal(got.tokens, want.tokens)
        assert got.valid.all()


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("p", [0.02, 0.3, 0.7, 0.99])
def test_the_first_kept_to_arrive(p, impl, device):
    """Top-p alone, over several blocks: often the first token to arrive is not kept."""
    for dtype, spread in ((torch.float32, 1.0), (torch.bfloat16, 0.3)):
        logits = logits_of(8, 5003, device, dtype) * spread
        for seed in range(2):
            got, want = (draw(logits, i, seed=seed, offset=7, top_p=p).tokens for i in (impl, "torch"))
            assert torch.equal(got, want)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_every_option_as_a_tensor(impl, device):
    B, V = 8, 517
    logits, options = logits_of(B, V, device), inputs.of_a_draw(B, V, device) | {"logprobs": 3}
    got, want = draw(logits, impl, **options), attnkit.sample(logits, impl="torch", **options)
    assert torch.equal(got.tokens, want.tokens) and torch.equal(got.top_ids, want.top_ids)
    assert torch.allclose(got.logprobs, want.logprobs, atol=1e-5)
    bit = (options["allowed"].gather(1, (got.tokens // 32)[:, None])[:, 0] >> (got.tokens % 32)) & 1
    assert (bit == 1).all()


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_a_seed_is_a_row_whatever_the_batch(impl, device):
    logits = logits_of(7, 300, device)
    seeds = torch.arange(7, device=device) * 17 + 5
    whole = draw(logits, impl, seed=seeds, top_p=0.95)
    for b in (0, 3, 6):
        assert draw(logits[b : b + 1], impl, seed=seeds[b : b + 1], top_p=0.95).tokens[0] == whole.tokens[b]
    number = draw(logits, impl, seed=5)
    rows = draw(logits, impl, seed=torch.arange(7, device=device) + 5)
    assert torch.equal(number.tokens, rows.tokens)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_how_a_row_draws_depends_on_its_own_options(impl, device):
    """Rows of every kind side by side, options as tensors: the tokens of each kind alone, options as numbers."""
    logits, seeds = logits_of(len(SETTINGS), 700, device), torch.arange(len(SETTINGS), device=device) + 50
    off = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    mixed = {n: torch.tensor([o.get(n, x) for o in SETTINGS.values()], device=device) for n, x in off.items()}
    tokens = draw(logits, impl, seed=seeds, **mixed).tokens
    for b, options in enumerate(SETTINGS.values()):
        assert draw(logits[b : b + 1], impl, seed=seeds[b : b + 1], **options).tokens[0] == tokens[b]


def test_groups_are_a_partition_in_order():
    """Every token lies in one group of 16, in ascending order, and that is where the reference draws it."""
    V = 2500
    groups = reference.grouped(torch.arange(V).float()[None])[0]
    held = groups[groups >= 0].long()
    assert torch.equal(held.sort().values, torch.arange(V))
    assert (groups.where(groups >= 0, torch.inf).diff(dim=1).nan_to_num(1.0) > 0).all()
    g = torch.arange(groups.shape[0])
    first = g // 32 * 512 + g % 32 * 4
    assert torch.equal(groups[:, 0][first < V].long(), first[first < V])
    for v in (0, 3, 4, 127, 128, 511, 512, 2047, 2048, 2499):
        x = torch.full((1, V), -torch.inf)
        x[0, v] = -3.0
        assert reference.draw_by_arrival(x, x > -torch.inf, torch.tensor([v]), torch.tensor([0])).tolist() == [v]


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_rows_of_nan_and_of_nothing(options, impl, device):
    """CASES 9, 11 and bad input 5: id 0 and valid=False; the other rows as if they were alone."""
    logits = logits_of(6, 259, device)
    clean = draw(logits, impl, seed=3, **options)
    logits[1, 7] = float("nan")
    logits[2] = -float("inf")
    logits[4] = -float("inf")
    logits[4, 258] = -1e30
    got = draw(logits, impl, seed=3, **options)
    assert got.valid.tolist() == [True, False, False, True, True, True]
    assert got.tokens[1] == got.tokens[2] == 0
    assert got.tokens[4] == 258
    assert torch.equal(got.tokens[[0, 3, 5]], clean.tokens[[0, 3, 5]])


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_ties_and_infinity(impl, device):
    """CASES 27: top_k=1 is argmax, ties go to the lowest id; +inf wins over everything."""
    logits = torch.zeros(3, 100, device=device)
    logits[0, [7, 50, 99]] = 2.0
    logits[2, 41] = float("inf")
    for options in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 1e-9}):
        assert draw(logits, impl, seed=1, **options).tokens.tolist() == [7, 0, 41]
    assert draw(logits, impl, seed=1).tokens[2] == 41
    kept = {int(t) for s in range(40) for t in draw(logits[:1], impl, seed=s, top_k=5).tokens}
    assert kept <= {7, 50, 99, 0, 1} and len(kept) > 2


DISTRIBUTIONS = {
    "flat": lambda V: torch.zeros(V),
    "peaked": lambda V: torch.cat([torch.tensor([4.0, 3.0, 2.5]), torch.full((V - 3,), -2.0)]),
    "heavy": lambda V: -torch.log(torch.arange(1, V + 1).float()),
}


def chi_square_z(tokens: torch.Tensor, p: torch.Tensor) -> float:
    """z of a chi-square over bins of at least 10 expected draws."""
    n = tokens.numel()
    counts = torch.bincount(tokens, minlength=p.numel()).double()
    assert counts[p == 0].sum() == 0, "a token outside the allowed set was drawn"
    expected = p.double() * n
    big = expected >= 10
    seen = torch.cat([counts[big], counts[~big].sum()[None]])
    want = torch.cat([expected[big], expected[~big].sum()[None]])
    seen, want = seen[want > 0], want[want > 0]
    chi = ((seen - want) ** 2 / want).sum().item()
    freedom = max(1, want.numel() - 1)
    return (chi - freedom) / (2 * freedom) ** 0.5


def statistics(impl, device, options, name, V=128, rows=4096, rounds=256):
    """rows x rounds >= 1e6 draws, unless fewer are asked for."""
    x = DISTRIBUTIONS[name](V).to(device)
    t = options.get("temperature", 1.0)
    one = {k: torch.tensor([options.get(k, off)], device=device) for k, off in (("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))}
    kept = reference.survivors((x / t)[None], one["top_k"], one["top_p"], one["min_p"])[0]
    p = torch.softmax((x / t).double().masked_fill(~kept, -torch.inf), 0).cpu()
    logits = x.expand(rows, V)
    tokens = torch.cat([draw(logits, impl, seed=123456789, offset=r, **options).tokens for r in range(rounds)])
    return chi_square_z(tokens.cpu(), p)


STATISTICS = [
    ("flat", {}),
    ("peaked", {"temperature": 1.5}),
    ("heavy", {}),
    ("flat", {"top_p": 0.5}),
    ("flat", {"top_p": 0.05}),
    ("peaked", {"top_p": 0.93}),
    ("heavy", {"min_p": 0.02}),
    ("heavy", {"top_k": 40}),
    ("heavy", {"top_p": 0.7, "temperature": 0.9}),
    ("peaked", {"top_k": 30, "top_p": 0.95, "min_p": 0.001}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id in ("cpu", "cuda_sm90")] or every(KERNELS))
@pytest.mark.parametrize(("name", "options"), STATISTICS, ids=str)
def test_chi_square_over_a_million_draws(name, options, impl, device):
    assert abs(statistics(impl, device, options, name)) < 5


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id in ("triton", "cuda_sm90")])
@pytest.mark.parametrize(("name", "options"), STATISTICS, ids=str)
def test_chi_square_on_the_gpu(name, options, impl, device):
    assert abs(statistics(impl, device, options, name)) < 5


def test_the_statistics_see_a_wrong_temperature():
    """Negative control: draws at a temperature 10% off fail by far."""
    x = DISTRIBUTIONS["peaked"](128)
    draws = (attnkit.sample(x.expand(4096, 128), seed=9, offset=r, temperature=1.1, impl="cpu").tokens for r in range(256))
    tokens = torch.cat(list(draws))
    assert abs(chi_square_z(tokens, torch.softmax(x.double(), 0))) > 50


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_strided_rows_and_out(impl, device):
    wide = torch.full((4, 400), float("nan"), device=device)
    wide[:, :333] = logits_of(4, 333, device)
    out = torch.full((4,), -7, dtype=torch.int64, device=device)
    got = draw(wide[:, :333], impl, seed=1, out=out)
    assert got.tokens is out
    assert torch.equal(out, attnkit.sample(wide[:, :333].contiguous(), seed=1, impl="torch").tokens)


def test_no_seed_draws_anew():
    torch.manual_seed(0)
    logits = torch.zeros(16, 4096)
    assert not torch.equal(attnkit.sample(logits).tokens, attnkit.sample(logits).tokens)


def ways(**changes: Any) -> tuple[str, ...]:
    """Who draws of float32 logits on a device of 132 multiprocessors."""
    usual = dict(
        op="sample", device=torch.device("cuda", 0), dtype=torch.float32, B=64, V=131072, logits_stride=(131072, 1), aligned=True,
        temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0,
        offset=0, counts=False, prompt_mask=False, logit_bias=False, allowed=False, logprobs=None,
    )  # fmt: skip
    return cuda_sampling._ways(SampleSig(**{**usual, **changes}))


@pytest.mark.parametrize(
    ("B", "top_p", "min_p", "counts", "expected"),
    [
        (128, 0.9, 0.0, False, ("arrival",)),
        (128, None, 0.0, False, ("arrival",)),
        (15, None, 0.0, True, ("arrival",)),
        (16, 0.6, 0.0, True, ("arrival",)),
        (16, None, 0.0, True, ("arrival",)),
        (39, 0.1, None, True, ("peaks", "given")),
        (40, 0.1, None, True, ("once",)),
        (133, 0.9, 0.05, True, ("once",)),
        (128, 0.9, 0.05, False, ("once",)),
        (37, 0.9, 0.05, False, ("once",)),
        (36, 0.1, 0.05, False, ("peaks", "given")),
        (128, 1.0, None, False, ("once",)),
    ],
)
def test_who_draws_under_top_p(B, top_p, min_p, counts, expected, monkeypatch):
    monkeypatch.setattr(cuda_sampling.arch, "of", lambda device: SimpleNamespace(sms=132, sm=90))
    assert ways(B=B, top_p=top_p, min_p=min_p, counts=counts, repetition_penalty=1.2) == expected


@pytest.mark.parametrize(
    ("expected", "changes"),
    [
        (("once",), {"top_k": 128}),
        (("once",), {"top_k": 129}),
        (("once",), {"top_k": 4096, "top_p": 0.9, "min_p": None}),
        (("once",), {"top_k": None}),
        (("once",), {"top_k": 1000, "B": 24, "dtype": torch.bfloat16}),
        (("rest",), {"top_k": 4097}),
        (("peaks", "rest"), {"top_k": 4097, "allowed": True}),
        (("peaks", "given"), {"top_k": 1000, "B": 16}),
        (("once",), {"top_k": 1000, "B": 17}),
        (("once",), {"top_k": 50, "B": 1, "V": 32000}),
        (("peaks", "given"), {"top_k": None, "B": 8, "dtype": torch.bfloat16}),
        (("once",), {"top_k": None, "B": 9, "dtype": torch.bfloat16}),
        (("once",), {"top_k": 1000, "B": 133}),
        (("once",), {"top_k": None, "B": 133}),
        (("once",), {"top_k": 1000, "counts": True, "frequency_penalty": 0.1}),
        (("once",), {"top_k": 50, "counts": True, "frequency_penalty": 0.1, "B": 40}),
        (("peaks", "given"), {"top_k": 50, "counts": True, "frequency_penalty": 0.1, "B": 39}),
        (("peaks", "given"), {"top_k": 50, "counts": True, "frequency_penalty": 0.1, "B": 99, "V": 50257}),
        (("once",), {"top_k": None, "allowed": True, "B": 264}),
        (("peaks", "given"), {"top_k": 1000, "logit_bias": True}),
        (("once",), {"top_k": 128, "B": 133}),
        (("once",), {"top_k": 1000, "V": 262144}),
        (("rest",), {"top_k": 50, "V": 262145}),
        (("rest",), {"min_p": 0.1, "top_p": 0.9, "V": 300000}),
        (("peaks", "rest"), {"min_p": 0.1, "V": 300000, "allowed": True}),
        (("once",), {"min_p": 0.1, "top_p": 0.9, "V": 32000, "B": 1}),
        (("tally",), {"dtype": torch.bfloat16, "min_p": 0.05, "top_p": 0.9}),
        (("once",), {"dtype": torch.float16, "min_p": 0.05, "top_p": 0.9}),
        (("once",), {"dtype": torch.bfloat16, "min_p": 0.05, "top_p": 0.9, "V": 50257}),
        (("peaks", "given"), {"dtype": torch.bfloat16, "min_p": 0.05, "top_p": 0.9, "B": 23}),
        (("once",), {"dtype": torch.bfloat16, "min_p": 0.05}),
        (("tally",), {"dtype": torch.bfloat16, "min_p": None, "top_p": 0.9, "B": 133}),
        (("tally",), {"dtype": torch.bfloat16, "top_p": None, "B": 24}),
        (("arrival",), {"dtype": torch.bfloat16, "top_p": 0.9, "B": 23}),
        (("peaks", "given"), {"top_k": None, "logit_bias": True}),
    ],
    ids=str,
)
def test_who_draws(expected, changes, monkeypatch):
    """A number up to what a list has room for as a tensor is; beyond that the filter kernel."""
    monkeypatch.setattr(cuda_sampling.arch, "of", lambda device: SimpleNamespace(sms=132, sm=90))
    assert ways(**changes) == expected


@pytest.mark.parametrize("B", [1, 16, 32, 64, 128, 133, 200, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_combination_goes_to_the_filter_kernel(dtype, B, monkeypatch):
    """Which takes ten times as long and more."""
    monkeypatch.setattr(cuda_sampling.arch, "of", lambda device: SimpleNamespace(sms=132, sm=90))
    for top_k, top_p, min_p in itertools.product((0, 50, 1000, None), (1.0, 0.9, None), (0.0, 0.05, None)):
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "B": B, "dtype": dtype}
        assert "rest" not in ways(**filters), filters
        assert "rest" not in ways(**filters, counts=True, repetition_penalty=None), filters
