"""sample_from_hidden: the token that sample draws from the same product, whatever takes both steps."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import reference
from attnkit.backends.cuda import hidden as cuda_hidden
from attnkit.backends.cuda.builds import hidden as builds
from attnkit.hidden import KERNELS
from attnkit.workload_hidden import SampleFromHidden, logits_of
from tests import inputs
from tests.kernels import every, skip_if_declined
from tests.test_launch import struct_of

SETTINGS = {
    "plain": {},
    "greedy": {"temperature": 0.0},
    "warm": {"temperature": 0.7},
    "top_k": {"top_k": 20, "temperature": 1.3},
    "top_p": {"top_p": 0.8},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.01, "temperature": 0.8},
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def operands(B: int, V: int, H: int, device: str, dtype=torch.bfloat16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Small whole numbers: every order of adding gives the same logits, exactly."""
    g = torch.Generator(device=device).manual_seed(seed)
    rows = torch.randint(-2, 3, (B, H), generator=g, device=device)
    weight = torch.randint(-4, 5, (V, H), generator=g, device=device)
    return rows.to(dtype) / 4, weight.to(dtype) / 8


def draw(hidden, weight, impl, **options):
    return skip_if_declined(lambda: attnkit.sample_from_hidden(hidden, weight, impl=impl, **options))


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_same_tokens_as_sample(options, dtype, impl, device):
    interpreted = impl.startswith("triton") and device == "cpu"
    if interpreted and dtype != torch.float32:
        pytest.skip("long in Triton's interpreter")
    hidden, weight = operands(6, 1003, 72, device, dtype)
    logits = logits_of(hidden, weight)
    for seed in range(1 if interpreted else 3):
        got = draw(hidden, weight, impl, seed=seed * 1000, offset=seed, **options)
        want = attnkit.sample(logits, impl="torch", seed=seed * 1000, offset=seed, **options)
        assert torch.equal(got.tokens, want.tokens)
        assert got.valid.all() and got.logprobs is None


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize(
    ("B", "V", "H"), [(1, 1, 8), (3, 17, 8), (2, 129, 200), (9, 600, 64), (32, 2049, 40), (64, 700, 72), (17, 5000, 264)]
)
def test_odd_sizes(B, V, H, impl, device):
    if device == "cpu" and B * V > 10_000:
        pytest.skip("long without a GPU")
    hidden, weight = operands(B, V, H, device)
    for options in ({}, {"temperature": 0.0}, {"top_p": 0.9}):
        got = draw(hidden, weight, impl, seed=3, **options)
        want = attnkit.sample(logits_of(hidden, weight), impl="torch", seed=3, **options)
        assert torch.equal(got.tokens, want.tokens)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("filters", [False, True], ids=["drawn from all", "filtered"])
def test_every_option_as_a_tensor(filters, impl, device):
    B, V = 8, 517
    hidden, weight = operands(B, V, 64, device)
    options = inputs.of_a_draw(B, V, device) | {"logprobs": 3}
    if not filters:
        for name in ("top_k", "top_p", "min_p", "logprobs"):
            del options[name]
    got, want = draw(hidden, weight, impl, **options), attnkit.sample(logits_of(hidden, weight), impl="torch", **options)
    assert torch.equal(got.tokens, want.tokens)
    if filters:
        assert torch.equal(got.top_ids, want.top_ids) and torch.allclose(got.logprobs, want.logprobs, atol=1e-5)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_a_row_with_nan_is_not_valid(impl, device):
    hidden, weight = operands(4, 700, 64, device)
    hidden[1, 3] = float("nan")
    for temperature in (0.0, 1.0):
        got = draw(hidden, weight, impl, seed=0, temperature=temperature)
        assert got.valid.tolist() == [True, False, True, True] and got.tokens[1] == 0


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_equal_logits_go_to_the_lowest_id(impl, device):
    hidden = torch.ones(2, 64, device=device, dtype=torch.bfloat16)
    weight = torch.zeros(3000, 64, device=device, dtype=torch.bfloat16)
    weight[[700, 830, 1990, 2999]] = 1.0
    assert draw(hidden, weight, impl, temperature=0.0).tokens.tolist() == [700, 700]


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_statistics(impl, device):
    """4096 draws of one row over 40 tokens: chi-square at 39 degrees of freedom, beyond 80 once in 10 000 times."""
    if impl.startswith("triton") and device == "cpu":
        pytest.skip("long in Triton's interpreter")
    rows = {"cuda": 32, "cpu": 512}[device]
    hidden, weight = operands(1, 40, 16, device)
    p = torch.softmax(logits_of(hidden, weight).double(), 1)[0]
    draws = [draw(hidden.expand(rows, -1).contiguous(), weight, impl, seed=rows * i).tokens for i in range(4096 // rows)]
    counts = torch.cat(draws).bincount(minlength=40).double()
    assert float(((counts - 4096 * p) ** 2 / (4096 * p)).sum()) < 80


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_rows_of_wider_tensors(impl, device):
    hidden, weight = operands(5, 900, 128, device)
    wide, high = hidden.new_full((5, 200), float("nan")), weight.new_full((900, 136), float("nan"))
    wide[:, :128], high[:, :128] = hidden, weight
    got, want = draw(wide[:, :128], high[:, :128], impl, seed=9), draw(hidden, weight, impl, seed=9)
    assert torch.equal(got.tokens, want.tokens)


def test_the_reference_is_the_product_and_the_draw():
    hidden, weight = operands(3, 300, 24, "cpu")
    options = {name: torch.full((3,), float(value)) for name, value in (("temperature", 1.0), ("repetition_penalty", 1.0))}
    options |= {name: torch.zeros(3) for name in ("presence_penalty", "frequency_penalty", "min_p")} | {"top_p": torch.ones(3)}
    options |= {name: torch.zeros(3, dtype=torch.int64) for name in ("top_k", "offset")}
    want = reference.sample(logits_of(hidden, weight), torch.arange(3), options)[0]
    assert torch.equal(attnkit.sample_from_hidden(hidden, weight, seed=0, impl="torch").tokens, want)


def test_out_and_no_rows():
    hidden, weight = operands(3, 100, 16, "cpu")
    out = torch.empty(3, dtype=torch.int64)
    assert attnkit.sample_from_hidden(hidden, weight, seed=1, out=out).tokens is out
    empty = attnkit.sample_from_hidden(hidden[:0], weight, seed=1)
    assert empty.tokens.shape == (0,) and empty.valid.shape == (0,)


def test_params_mirror_the_struct():
    assert struct_of("hidden/hidden_sm90.cu", "HiddenParams") == ["hidden_map", "w_map", *cuda_hidden.OWN, "sample"]
    maps = 2 * 128
    assert cuda_hidden.PARAMS.offsets["logits"] == maps + 8 * len(cuda_hidden.OWN)


@pytest.mark.parametrize("B", [1, 8, 9, 32, 33, 64])
def test_shared_memory_holds_the_ring(B):
    assert builds.stages(B) >= 4 and builds.shared_bytes(B) <= builds.MOST_SHARED
    assert builds.shared_bytes(B, 2) > builds.MOST_SHARED // 2  # one CTA a multiprocessor
    assert builds.build(True, B) in builds.shipped()


@pytest.mark.parametrize("V", [1, 17, 32, 33, 128, 511, 512, 513, 700, 2049, 151936])
def test_tiles_hold_every_token_once(V):
    """A tile's four stretches: one in each chunk of a piece where it is drawn from, neighbours where logits are written."""
    for draws in (True, False):
        seen = []
        for tile in range(builds.tiles(V, draws)):
            first, apart = (tile // 4 * 512 + tile % 4 * 32, 128) if draws else (tile * 128, 32)
            held = [v for c in range(4) for v in range(first + c * apart, first + c * apart + 32) if v < V]
            assert held, "a tile of nothing"
            seen += held
        assert sorted(seen) == list(range(V))


LARGE = [(1, 131072, 4096, torch.bfloat16), (8, 151936, 3584, torch.bfloat16), (16, 128256, 5120, torch.float16),
         (32, 129280, 7168, torch.bfloat16), (20, 50257, 768, torch.bfloat16), (32, 131072, 8192, torch.float16), (64, 151936, 1024, torch.bfloat16)]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(("B", "V", "H", "dtype"), LARGE)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.9}], ids=str)
def test_models_sizes(options, B, V, H, dtype):
    """Against float64's product; where the token is another, it has to be a tie."""
    case = SampleFromHidden(B=B, V=V, H=H, dtype="bf16" if dtype == torch.bfloat16 else "fp16",
                            **{"temperature": 1.0, **options})  # fmt: skip
    x = case.build(torch.device("cuda"))
    for _ in range(3):
        case.poison(x)
        case.call(x, "cuda_sm90")()
        assert case.error(x) <= case.limit
