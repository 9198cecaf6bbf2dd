"""The latent decode for many query rows and few keys: options, how tiles are given to CTAs, and how pieces meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit import PageTable
from attnkit.backends.cuda.builds import mla_short as builds
from attnkit.backends.cuda.builds.mla_narrow import SMEM
from tests import inputs, latents
from tests.test_mla_wide import BASE as WIDE
from tests.test_mla_wide import C, R, check_impatient, compare

KERNEL = "cuda_sm90_short"
BASE = replace(WIDE, lens=(700, 0, 1, 64, 65, 129, 1000))
CASES = [
    BASE,
    replace(BASE, S=16),
    replace(BASE, S=128),
    replace(BASE, lens=(8192,)),  # as many pieces as there are groups, of two tiles each
    replace(BASE, lens=(4200,)),  # of one tile or two
    replace(BASE, lens=(4224,)),  # one tile a group
    replace(BASE, lens=(4300,)),
    replace(BASE, lens=(100,)),
    replace(BASE, lens=(64,) * 66),
    replace(BASE, lens=(128, 1, 0, 127, 65, 64) * 5),
    replace(BASE, lens=(4000, 3900)),
    replace(BASE, Q=2, lens=(3, 700, 1000)),
    replace(BASE, Q=4, lens=(900, 600), S=32),
    replace(BASE, Hq=64, S=16),
    replace(BASE, Hq=64, lens=(16000,)),  # more pieces than rows to share
    replace(BASE, Hq=64, lens=(64,) * 130),
    replace(BASE, Hq=40, Q=3, lens=(3000, 100)),  # a block of 64 rows holds heads of two tokens, the last is not full
    replace(BASE, Hq=33, S=128),
    replace(BASE, Hq=192, S=256, lens=(2000,)),
    replace(BASE, window=100, Q=2, lens=(3, 700, 1000)),
    replace(BASE, window=1),
    replace(BASE, window=1000, lens=(4000,)),
    replace(BASE, sinks=True),
    replace(BASE, sinks=True, window=70, Q=3, Hq=64, lens=(700, 1, 300)),
    replace(BASE, sinks=True, lens=(2600, 1200, 700)),
]
#: Over the fp8 cache.
LENS = (700, 0, 1, 64, 65, 129, 900)
FP8 = {
    "plain": {},
    "S1": {"S": 1, "lens": (3, 9, 70)},
    "S8": {"S": 8},
    "S32": {"S": 32},
    "S256": {"S": 256, "lens": (700, 0, 1, 64)},
    "gap": {"gap": 64},
    "H33": {"H": 33, "S": 128},
    "H64": {"H": 64, "S": 64},
    "H192": {"H": 192, "lens": (700, 65, 130)},
    "Q2": {"Q": 2, "lens": (3, 700, 1000)},
    "H40-Q3": {"H": 40, "Q": 3},
    "window": {"window": 100, "Q": 2, "lens": (3, 700, 1000)},
    "window1": {"window": 1, "S": 64, "lens": (700, 0, 1, 64, 65)},
    "sinks": {"sinks": True},
    "large": {"size": 300.0},
    "two": {"lens": (4000, 3900), "S": 64},
    "one": {"lens": (8192,), "S": 64},
}


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_matches_float64(case):
    compare(inputs.make(case, "cuda"), KERNEL)


def call(*args, **options):
    return attnkit.mla_decode(*args, impl=KERNEL, **options)


def make_fp8(**options):
    return latents.make(**{"H": 128, "lens": LENS, **options, "fp8": True, "device": "cuda"})


@pytest.mark.gpu
@pytest.mark.parametrize("name", FP8)
def test_fp8_matches_float64(name):
    latents.compare(call, make_fp8(**FP8[name]))


@pytest.mark.gpu
def test_fp8_nan_of_one_sequence_stays_there():
    latents.check_nan_stays(call, make_fp8(lens=(700, 300), S=64))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_a_graph_replays_with_other_lengths(fp8):
    latents.check_replays(call, latents.make(H=128, lens=(2600, 500, 1), S=64, fp8=fp8, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True])
def test_repeats_are_bit_equal(fp8):
    latents.check_repeats(call, latents.make(H=128, lens=(1, 700, 1200, 64, 0, 130), S=64, fp8=fp8, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(8000,), (2000, 150)], ids=len)
def test_sums_that_f16_does_not_hold(lens):
    """Pieces meet as f16; values beyond its range go through it by a power of two a row."""
    x = inputs.make(replace(BASE, lens=lens), "cuda")
    x.q[..., :C:7] = 0  # the scores stay as they are
    x.kv[0][..., :C:7] *= 2.0**20
    compare(x, KERNEL)


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(8192,), (6000,), (2600, 140, 40)], ids=len)
def test_who_does_not_wait_gets_the_same_bits(lens):
    check_impatient(inputs.make(replace(BASE, lens=lens), "cuda"), KERNEL)


@pytest.mark.gpu
def test_the_second_tile_is_far_ahead_of_the_first():
    """Sums of a CTA's first tile shrink when the second's scores are 2^8 ahead."""
    x = inputs.make(replace(BASE, lens=(8192,)), "cuda")
    for page in x.table.pages[0, 1::2].tolist():
        x.kv[0][page, ::3] *= 30
    compare(x, KERNEL)


@pytest.mark.gpu
def test_declines_with_a_reason():
    q = torch.randn(1, 128, C + R, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(200, 64, C + R, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor([9], device="cuda", dtype=torch.int32)
    table = PageTable(torch.arange(200, device="cuda", dtype=torch.int32)[None], lens)
    with pytest.raises(RuntimeError, match="pieces, wanted at most"):
        attnkit.mla_decode(q, kv, table, impl=KERNEL)
    with pytest.raises(RuntimeError, match="takes no softcap"):
        attnkit.mla_decode(q, kv[:9], PageTable(table.pages[:, :9], lens), impl=KERNEL, softcap=3.0)


def test_builds_fit_shared_memory():
    assert builds.SHARED_BYTES <= SMEM
