"""Top-p alone over bf16, a multiprocessor a row: tokens counted by value, rows partly in shared memory, equals at top-p's end."""

from __future__ import annotations

import itertools

import pytest
import torch

import attnkit
from attnkit.backends.cuda.builds import sampling as builds
from attnkit.sampling import KERNELS
from tests.kernels import every
from tests.test_sampling_large import both, chooser, in_a_graph, normal
from tests.test_sampling_once import odd_rows

CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
gpu = pytest.mark.gpu
BF16 = torch.bfloat16
#: Less than a piece, ends in a piece and in a slot, rows that stay in shared memory and rows of which a part does; nearly the longest.
VOCABULARIES = [8, 520, 4096, 32000, 50264, 90112, 131072, 151936, 256000, 262144]


def test_what_is_tallied():
    least = builds.LEAST_TALLIED
    assert [builds.fits_tally(B, 131072) for B in (1, least - 1, least, 300)] == [False, False, True, True]
    assert not builds.fits_tally(100, 50257) and not builds.fits_tally(100, 262152)
    for V in VOCABULARIES:
        assert builds.fits_tally(100, V) and builds.tally_bytes(V) <= 227 * 1024
        slots = max(-(-2 * V // builds.SLOT_BYTES), builds.LEAST_SLOTS)
        assert builds.tally_slots(V) == slots or builds.tally_slots(V) > 16  # more than are on their way (kAheadSlots)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("V", VOCABULARIES)
def test_rows_of_all_kinds(V, impl, device):
    """Ties, staircases, masks, +inf, NaN, one token alone, none, wide and far rows; options from tensors, p from next to none to all."""
    B, one_of = 120, chooser(120)
    o = {"temperature": one_of(1.0, 0.7, 1.5, 9.0, 0.0, 0.05), "top_p": one_of(1.0, 0.9, 0.5, 0.1, 0.99, 0.05, 0.02, 0.0)}
    got, want = both(odd_rows(B, V, BF16), impl, seed=V, **o)
    assert torch.equal(got.valid, want.valid)
    assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("p", [0.06, 0.1, 0.35, 0.5, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("spread", [0.1, 1.0, 3.1, 10.0])
def test_normal_rows(spread, p, impl, device):
    for seed, shift in enumerate((0.0, -40.0, 40.0)):
        x = (normal(70, 131072, torch.float32, seed=seed) * (spread / 3) + shift).to(BF16)
        got, want = both(x, impl, seed=seed, top_p=p)
        assert got.valid.all()
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("V", [32000, 131072, 151936])
def test_equals_at_the_end_of_top_p(V, impl, device):
    """Which of many equal tokens are kept is a matter of ids: in what stayed in shared memory, and in what did not."""
    g = torch.Generator(device="cuda").manual_seed(V)
    for values in ((2.0, 1.0), (5.0, 3.0, 0.0), (-1.0, -2.0, -8.0), (0.0, -0.0)):
        x = torch.tensor(values, device="cuda")[torch.randint(0, len(values), (66, V), generator=g, device="cuda")].to(BF16)
        got, want = both(x, impl, seed=V, top_p=chooser(66)(0.3, 0.5, 0.7, 0.9))
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("many", [2, 3, 9, 32, 33, 200])
def test_few_equals_at_the_end_of_a_small_p(many, impl, device):
    """Who are listed while others are noted, up to 32: top-p ends among the largest, which are anywhere."""
    V, B, g = 131072, 96, torch.Generator(device="cuda").manual_seed(many)
    x = normal(B, V, torch.float32, seed=many)
    ids = torch.rand(B, V, generator=g, device="cuda").topk(many, dim=1).indices
    # They are the largest and weigh a third of the row: less of it is kept.
    peak = x.exp().sum(1, keepdim=True).mul(0.5 / many).log().to(BF16)
    x.scatter_(1, ids, peak.float().expand(B, many))
    got, want = both(x.clamp(max=peak.float()).to(BF16), impl, seed=many, top_p=chooser(B)(0.06, 0.1, 0.15, 0.2, 0.24))
    assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("off", [-2e-6, -8e-7, 8e-7, 2e-6, 6e-6])
def test_ends_that_floats_cannot_tell(off, impl, device):
    """Top-p ends within millionths of the row from the fourth of forty equals, or the eighteenth."""
    V, g = 131072, torch.Generator(device="cuda").manual_seed(7)
    for temperature in (1.0, 0.7):
        x = torch.full((64, V), -float("inf"), device="cuda")
        x.scatter_(1, torch.rand(64, V, generator=g, device="cuda").topk(40, dim=1).indices, 3.0)
        p = chooser(64)(0.1, 0.45) * (1 + off)
        got, want = both(x.to(BF16), impl, seed=3, top_p=p, temperature=temperature)
        assert torch.equal(got.tokens, want.tokens)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_few_large_logits_anywhere(impl, device):
    """A warp's first tokens say nothing of those to come: masked, low, or far below a few in one place."""
    V = 131072
    for seed in range(4):
        x = normal(80, V, torch.float32, seed=seed) - 4
        x[::4, : V // 2] = -float("inf")
        x[1::4, : 7 * V // 8] = -1e4
        x[2::4, V - 300 :] += 14
        x[3::4, 60_000 + seed] = 19
        got, want = both(x.to(BF16), impl, seed=seed, top_p=0.9)
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_logits_beyond_the_counters(impl, device):
    """Where what they reach is not all of the row: large logits at a temperature as large."""
    x = (normal(64, 131072, torch.float32, seed=4) * 100).to(BF16)
    got, want = both(x, impl, seed=4, top_p=0.3, temperature=300.0)
    assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("live", [1, 3, 40, 700, 9000])
def test_rows_that_are_masked_but_for_few(live, impl, device):
    """A sample that sees next to nothing of a row bounds it badly: what has no counter is weighed, or the row goes by arrival."""
    V, g = 131072, torch.Generator(device="cuda").manual_seed(live)
    for spread in (0.0, 0.2, 4.0):
        x = torch.full((64, V), -float("inf"), device="cuda")
        ids = torch.rand(64, V, generator=g, device="cuda").topk(live, dim=1).indices
        x.scatter_(1, ids, torch.randn(64, live, generator=g, device="cuda") * spread)
        got, want = both(x.to(BF16), impl, seed=live, top_p=chooser(64)(0.1, 0.3, 0.5, 0.9))
        assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("p", [0.3, 0.5, 0.9])
def test_a_sample_of_what_is_larger_than_the_rest(p, impl, device):
    """All that a row is sampled at lies far above the others, which together weigh more: none of these has a counter."""
    V = 131072
    x = normal(64, V, torch.float32, seed=8) * 0.01 - 6
    x[:, 0 : V : V // 128] = 0.0
    got, want = both(x.to(BF16), impl, seed=8, top_p=p)
    assert (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_options_of_one_launch_after_another(impl, device):
    """Seeds and options that the kernel before has just written: the row goes by what they are now. Rows that lie apart; replays."""
    x = normal(80, 65536 + 64, BF16, seed=5)[:, :65536]
    seeds, p, t = (torch.zeros(80, dtype=kind, device="cuda") for kind in (torch.int64, torch.float32, torch.float32))
    outs, wants = [], []
    for i in range(30):
        seeds.copy_(torch.arange(80, device="cuda") + 1000 * i), p.fill_(0.9 if i % 2 else 0.5), t.fill_(1.0 + i % 3)
        outs.append(attnkit.sample(x, seed=seeds, top_p=p, temperature=t, impl=impl).tokens)
        wants.append(attnkit.sample(x, seed=seeds, top_p=p, temperature=t, impl="torch").tokens)
    assert (torch.stack(outs) != torch.stack(wants)).sum() <= 2
    again = [attnkit.sample(x, seed=seeds, top_p=p, temperature=t, impl=impl).tokens for _ in range(50)]
    assert all(torch.equal(one, outs[-1]) for one in again)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_logits_that_temperature_lifts_beyond_all_floats(dtype, impl, device):
    """Many are equal then, and weigh nothing beside the largest as this kernel weighs them: it ends, with one of them."""
    x = (normal(48, 33000, torch.float32, seed=2) * 1e36).to(dtype)
    got = attnkit.sample(x, seed=1, top_p=0.01, temperature=1e-3, impl=impl)
    assert got.valid.all()
    assert (x.gather(1, got.tokens[:, None]) > 1e35).all()


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_seeds_that_the_launch_before_writes(impl, device):
    """They are read before it has ended, too: its tokens are the next launch's seeds."""
    x = normal(100, 65536, BF16, seed=6)
    steps = [torch.arange(100, device="cuda"), *(torch.empty(100, dtype=torch.int64, device="cuda") for _ in range(10))]
    for seeds, out in itertools.pairwise(steps):
        attnkit.sample(x, seed=seeds, top_p=0.9, out=out, impl=impl)
    wants = [attnkit.sample(x, seed=seeds, top_p=0.9, impl="torch").tokens for seeds in steps[:-1]]
    assert (torch.stack(wants) != torch.stack(steps[1:])).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("p", [0.1, 0.9])
def test_seeds_that_the_launch_before_writes_in_place(p, impl, device):
    """While a launch starts its seeds change, for some of its warps before they read them and for others after that."""
    x = normal(100, 65536, BF16, seed=6)
    in_a_graph(lambda seeds, out: attnkit.sample(x, seed=seeds, top_p=p, out=out, impl=impl), torch.arange(100, device="cuda"))


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_logits_that_the_launch_before_writes(impl, device):
    """A row is sampled before they are there, too, when they are NaN yet, or large: it is drawn all the same."""
    B, V, K = 64, 32768, 256
    g = torch.Generator(device="cuda").manual_seed(3)
    a, w = (torch.randint(-127, 128, (n, K), generator=g, device="cuda", dtype=torch.int8) for n in (B, V))
    scale_a, scale_w = torch.full((B,), 0.02, device="cuda"), torch.full((V,), 0.001, device="cuda")
    logits = attnkit.w8a8_gemm(a, w, scale_a, scale_w)
    want = attnkit.sample(logits, seed=1, top_p=0.8, impl="torch").tokens
    for before in (float("nan"), 1e30, -float("inf"), 0.0):
        out = torch.full_like(logits, before)
        torch.cuda.synchronize()
        attnkit.w8a8_gemm(a, w, scale_a, scale_w, out=out)
        got = attnkit.sample(out, seed=1, top_p=0.8, impl=impl).tokens
        assert (got != want).sum() <= 1
