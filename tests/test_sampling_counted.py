"""Rows with penalties, bias or a mask, copied ahead into shared memory: the reference's tokens, and nothing left behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import attnkit
from attnkit.backends.cuda.builds import sampling as builds
from tests.test_sampling_large import both, chooser, in_a_graph, normal, penalties
from tests.test_sampling_ring import CUDA, compare, gpu, repeat

COUNTS = ("output_counts", "repetition_penalty", "presence_penalty", "frequency_penalty")
GIVEN = {
    "all": None,
    "counts": COUNTS,
    "prompt": ("prompt_mask", "repetition_penalty"),
    "mask": ("allowed",),
    "bias": ("logit_bias",),
    "seen": (*COUNTS, "prompt_mask"),
    "masked": (*COUNTS, "allowed"),
}
#: (B, V, V with what lies between rows). One row a CTA and many; rows that end in a block, in four tokens, at odd addresses.
SHAPES = [
    (12, 131072, 131072),
    (32, 131072, 131072),
    (128, 131072, 131072),
    (270, 33000, 33000),
    (160, 32003, 32012),
    (70, 50257, 50257),
    (1500, 2500, 2500),
    (30, 1048576, 1048576),
]
#: Of a cluster a row and of one CTA; the longest of float32 finds no room to be copied ahead.
ARRIVING = [
    (12, 131072, 131072),
    (100, 131072, 131072),
    (140, 33000, 33000),
    (66, 50257, 50257),
    (70, 151936, 151936),
    (100, 32003, 32012),
]


def given(names: tuple[str, ...] | None, B: int, V: int) -> dict[str, Any]:
    more = penalties(B, V)
    return {n: more[n] for n in names or more}


def test_what_is_changed():
    for kind in (builds.BF16, builds.F32):
        assert all(builds.fits_changed(kind, B, V, 132) for B, V, _ in SHAPES)
        assert all(builds.fits_changed(kind, B, V, 132) for B, V in ((1, 131072), (3, 16384), (6, 50257)))
        assert not builds.fits_changed(kind, 1, 2048, 132) and not builds.fits_changed(kind, 64, 1048577, 132)
        assert builds.changed_bytes(kind, 2500, 2048, 132) <= 227 * 1024
    assert not builds.fits_changed(builds.F32, 132 * builds.LEAD_ROWS, 2048, 132)  # no room for as many rows


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_plain_draws_as_the_reference(shape, dtype, impl, device):
    for names in (GIVEN["all"], GIVEN["counts"]):
        compare(shape, impl, device, dtype, **given(names, *shape[:2]))


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [GIVEN[n] for n in ("prompt", "mask", "bias")], ids=str)
def test_one_of_them_alone(names, dtype, impl, device):
    shape = (100, 40001, 40001)
    compare(shape, impl, device, dtype, **given(names, *shape[:2]))


def test_few_rows_are_shared_by_few_ctas():
    assert [builds.changed_ctas(B, 131072, 132) for B in (1, 4, 16, 17, 64, 128, 256)] == [8, 32, 128, 132, 128, 128, 132]


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("B", [1, 3, 9])
def test_few_rows(B, dtype, impl, device):
    for V in (16384, 50257, 131072):
        for names in (GIVEN["all"], GIVEN["counts"]):
            for options in ({"temperature": 0.9}, {"temperature": 0.0}, {"top_p": 0.9}):
                got, want = both(normal(B, V, dtype, seed=V), impl, seed=8, **given(names, B, V), **options)
                assert torch.equal(got.valid, want.valid) and torch.equal(got.tokens, want.tokens)


def test_what_is_copied_for_arrival():
    for kind, least in ((builds.BF16, 3072), (builds.F32, 4096)):
        assert builds.arrive_slot(kind, {"counts"}, 131072, 1) == least
        assert builds.arrive_slot(kind, {"counts", "prompt_mask"}, 131072, 1) == least + 512
        assert builds.arrive_slot(kind, {"allowed"}, 33000, 1) == least + 1024
        assert builds.arrive_slot(kind, {"counts", "logit_bias"}, 33000, 1) == 0 == builds.arrive_slot(kind, set(), 33000, 1)
    assert builds.arrive_slot(builds.F32, {"counts", "allowed"}, 151936, 1) == 0  # no room
    for kind in (builds.BF16, builds.F32):
        for masks in ({"counts"}, {"prompt_mask"}, {"counts", "prompt_mask", "allowed"}):
            for V in range(2048, builds.MOST_LOCAL * builds.GROUP, 2048):
                assert builds.arrive_bytes(V, 1, builds.arrive_slot(kind, masks, V, 1)) <= 227 * 1024


def test_how_many_share_a_row_for_arrival():
    """As many as find room at the same time, seven clusters of twelve; with penalties so many that copies have room."""
    parts = {B: builds.arrive_parts(builds.F32, set(), B, 131072, 132) for B in (1, 7, 8, 16, 64, 128)}
    assert parts == {1: 12, 7: 12, 8: 8, 16: 6, 64: 2, 128: 1}
    for masks, V, expected in (
        ({"counts"}, 151936, 1),
        ({"counts", "allowed"}, 151936, 2),
        ({"counts"}, 256000, 2),
        (set(), 256000, 1),
    ):
        assert builds.arrive_parts(builds.F32, masks, 128, V, 132) == expected
        assert not masks or builds.arrive_slot(builds.F32, masks, V, expected)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("names", [GIVEN[n] for n in ("all", "counts", "seen", "masked", "mask")], ids=str)
@pytest.mark.parametrize("shape", ARRIVING, ids=str)
def test_top_p_as_the_reference(shape, names, dtype, impl, device):
    one_of = chooser(shape[0] + 1)
    compare(shape, impl, device, dtype, **given(names, *shape[:2]), top_p=one_of(0.9, 0.99, 0.5, 0.1, 1.0)[: shape[0]])


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_all_tokens_have_counts(dtype, impl, device):
    """Penalties that lift tokens, counts below zero, and counts at odd addresses."""
    B, V = 64, 66001
    wide = torch.randint(-2, 5, (B, V + 3), device=device, dtype=torch.int32)
    for options in ({"temperature": 0.9}, {"temperature": 0.0}, {"top_p": 0.8}):
        o = {"output_counts": wide[:, 3:], "repetition_penalty": 0.8, "presence_penalty": -0.4, "frequency_penalty": -0.3}
        got, want = both(normal(B, V, dtype), impl, seed=6, **o, **options)
        assert got.valid.all() and (got.tokens != want.tokens).sum() <= 1


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_after_one_another(dtype, impl, device):
    repeat(impl, device, dtype, lambda B, V: given(COUNTS, B, V))
    repeat(impl, device, dtype, lambda B, V: given(COUNTS, B, V) | {"top_p": 0.9})


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_seeds_in_whose_place_tokens_go(impl, device):
    B, V = 100, 40000
    x, o = normal(B, V, torch.bfloat16), given(COUNTS, B, V)
    in_a_graph(lambda seeds, out: attnkit.sample(x, seed=seeds, out=out, impl=impl, **o), torch.arange(B, device=device), 20)
