"""mla_decode's CUDA kernel for many query rows over an fp8 cache: options, page sizes, and how a sequence's pieces meet."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import PageTable, workspace
from attnkit.backends.cuda.builds import mla_wide_fp8 as builds
from attnkit.backends.cuda.builds.mla_narrow import FP8_ROW, SMEM
from attnkit.configs.mla_wide_cuda import CudaConfig
from tests import latents

NAME = "cuda_sm90_wide_fp8"
LENS = (700, 0, 1, 64, 65, 129, 1500)


def call(*args, **options):
    return attnkit.mla_decode(*args, impl=NAME, **options)


def make(lens=LENS, **options):
    return latents.make(**{"H": 128, **options, "lens": lens, "fp8": True, "device": "cuda"})


OPTIONS = {
    "plain": {},
    "S1": {"S": 1, "lens": (3, 9, 70)},
    "S8": {"S": 8},
    "S32": {"S": 32},
    "S64": {"S": 64},
    "S256": {"S": 256},
    "gap": {"gap": 64},
    "H33": {"H": 33, "S": 128},
    "H64": {"H": 64, "S": 64},
    "H192": {"H": 192},
    "Q2": {"Q": 2},
    "Q4": {"Q": 4, "lens": (3, 700, 1100)},
    "H40-Q3": {"H": 40, "Q": 3},  # a block of 64 rows holds heads of two tokens, the last is not full
    "window": {"window": 100, "Q": 2},
    "window1": {"window": 1, "S": 64},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "all": {"sinks": True, "window": 70, "softcap": 3.0, "Q": 3, "H": 64},
    "large": {"size": 300.0},
    "many": {"lens": tuple(37 * i % 200 for i in range(150))},  # more sequences than groups of CTAs
    "two": {"lens": (6000, 5900), "S": 64},
    "one": {"lens": (8192,), "S": 64},  # in as many pieces as there are groups
    "even": {"lens": (2048,) * 16, "S": 64},
    "pairs": {"lens": (1024,) * 32, "S": 64},
    "even-64": {"lens": (2048,) * 9, "S": 64, "H": 64},
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_float64(name):
    latents.compare(call, make(**OPTIONS[name]))


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(6000,), (3000, 2900, 40), (4000,) * 9], ids=len)
def test_who_does_not_wait_gets_the_same_bits(lens):
    """With no patience the last piece to come adds up every column; counters are zero again after that."""
    x = make(lens, S=64)
    out, lse = call(x.q, x.kv, x.table, return_lse=True)
    for _ in range(20):
        hurried = call(x.q, x.kv, x.table, return_lse=True, config=CudaConfig(patience=0))
        assert torch.equal(out, hurried[0]) and torch.equal(lse, hurried[1])
    assert all(int(held.count_nonzero()) == 0 for held in workspace._eager_counters.values())


@pytest.mark.gpu
@pytest.mark.parametrize("H", [64, 128])
def test_repeats_are_bit_equal(H):
    latents.check_repeats(call, make((1, 700, 3000, 64, 9000, 0, 130), S=64, H=H))


@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths():
    latents.check_replays(call, make((3000, 500, 1), S=64))


@pytest.mark.gpu
def test_nan_of_one_sequence_stays_there():
    latents.check_nan_stays(call, make((700, 300), S=64))


@pytest.mark.gpu
def test_takes_tokens_apart_in_memory():
    """q [B, Q, H, D] as a view whose tokens do not follow one another, and out likewise."""
    x = make(Q=2)
    B, Q, H, D = x.q.shape
    q = torch.empty(B, H, Q, D, dtype=x.q.dtype, device="cuda").transpose(1, 2).copy_(x.q)
    out = torch.empty(B, H, Q, 512, dtype=x.q.dtype, device="cuda").transpose(1, 2)
    call(q, x.kv, x.table, out=out)
    assert torch.equal(out, call(x.q, x.kv, x.table))


@pytest.mark.gpu
def test_offsets_past_four_gigabytes():
    S, P = 64, 110000  # 4.6 GB of pages, the last of which are read
    x = make((130,), S=S)
    kv = torch.zeros(P, S, FP8_ROW, dtype=torch.uint8, device="cuda")
    kv[-3:] = x.kv[x.table.pages[0, :3].long()]
    pages = torch.arange(P - 3, P, dtype=torch.int32, device="cuda")[None]
    assert torch.equal(call(x.q, kv, PageTable(pages, x.table.lens)), call(x.q, x.kv, x.table))


@pytest.mark.gpu
def test_what_it_declines_others_serve():
    for more, reason in (
        ({"H": 32}, "32 heads x 1 query tokens, wanted more than 32 rows"),
        ({"dtype": torch.float16}, "wanted bfloat16 and an fp8 cache"),
    ):
        x = make((5, 70), **more)
        with pytest.raises(RuntimeError, match=reason):
            call(x.q, x.kv, x.table)
        latents.compare(attnkit.mla_decode, x)


def test_builds_fit_shared_memory():
    assert builds.SHARED_BYTES <= SMEM and builds.ROW_BYTES == FP8_ROW
