"""Plain draws of many rows of float32, which the ring kernel takes: the reference's tokens, and nothing left behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import attnkit
from attnkit.backends.cuda.builds import sampling as builds
from attnkit.sampling import KERNELS
from tests.kernels import every, skip_if_declined
from tests.test_sampling_large import chooser, normal

gpu = pytest.mark.gpu
CUDA = [p for p in every(KERNELS) if p.id == "cuda_sm90"]
#: (B, V, V with what lies between rows). One row a CTA and many; rows that end in a block, and in four tokens.
SHAPES = [
    (32, 131072, 131072),
    (128, 131072, 131072),
    (270, 33000, 33000),
    (160, 32003, 32012),
    (64, 100001, 100004),
    (2000, 2500, 2500),
    (30, 1048576, 1048576),
]


def test_what_goes_to_the_ring():
    assert all(builds.fits_lead(B, V, 132) for B, V, _ in SHAPES)
    assert not builds.fits_lead(1, 131072, 132) and not builds.fits_lead(16, 131072, 132)  # few blocks
    assert not builds.fits_lead(20, 1000000, 132)  # many CTAs a row
    assert not builds.fits_lead(64, 1048577, 132) and not builds.fits_lead(200000, 2048, 132)  # long ids, many rows a CTA
    assert builds.lead_bytes(builds.F32, 128, 131072, 132) == builds.LEAD_ALONE
    assert builds.lead_bytes(builds.F32, 132 * builds.LEAD_ROWS, 2048, 132) <= 227 * 1024


def compare(shape: tuple[int, int, int], impl: str, device: str, dtype: torch.dtype = torch.float32, **more: Any) -> None:
    """Rows of every temperature side by side, greedy ones too; NaN, +inf once and twice, nothing at all among them."""
    B, V, pitch = shape
    one_of = chooser(B)
    wide = torch.full((B, pitch), float("nan"), device=device, dtype=dtype)
    x = wide[:, :V]
    x.copy_(normal(B, V, dtype, seed=B))
    x[B // 5, V // 3] = float("inf")
    x[B // 4, [5, V - 1]] = float("inf")
    x[B // 3, V - 1] = float("nan")
    x[B // 2] = -float("inf")
    x[B - 1, 1:] = -float("inf")
    x[B - 2] = 0.5
    for temperature in (one_of(1.0, 0.7, 1.5, 9.0, 0.0), 0.8, 0.0):
        o = {"seed": torch.arange(B, device=device) * 977, "offset": 3, "temperature": temperature} | more
        want = attnkit.sample(x, impl="torch", **o)
        for _ in range(3):
            out = torch.full((B,), -7, device=device)
            got = skip_if_declined(lambda o=o, out=out: attnkit.sample(x, impl=impl, out=out, **o))
            assert torch.equal(got.valid, want.valid)
            assert (got.tokens != want.tokens).sum() <= B // 64


def repeat(
    impl: str, device: str, dtype: torch.dtype = torch.float32, more: Callable[[int, int], dict[str, Any]] = lambda B, V: {}
) -> None:  # fmt: skip
    """The next grid starts while one ends: each finds what CTAs meet in as it was at first."""
    x, o = normal(128, 131072, dtype), {"seed": 5, "temperature": torch.full((128,), 0.8, device=device)} | more(128, 131072)
    small, p = normal(40, 131072, dtype), {"seed": 5, "temperature": 0.8} | more(40, 131072)
    want, fewer = attnkit.sample(x, impl="torch", **o).tokens, attnkit.sample(small, impl="torch", **p).tokens
    found = []
    for _ in range(200):
        found.append((skip_if_declined(lambda: attnkit.sample(x, impl=impl, **o)).tokens, want))
        found.append((attnkit.sample(small, impl=impl, **p).tokens, fewer))
    for got, expected in found:
        assert torch.equal(got, found[0][0] if expected is want else found[1][0])
        assert (got != expected).sum() <= 2


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_tokens_as_the_reference(shape, impl, device):
    compare(shape, impl, device)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_launches_after_one_another(impl, device):
    repeat(impl, device)
