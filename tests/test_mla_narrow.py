"""mla_decode's CUDA kernels for few rows: their options, their schedule, and what they decline."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit import arch, dispatch, workspace
from attnkit.backends.cuda.builds import mla_narrow as builds
from attnkit.configs.mla_narrow_cuda import CUDA, CudaConfig
from tests import latents

NAME = "cuda_sm90_narrow"
LENS = (0, 1, 15, 64, 129, 700)


def call(*args, **options):
    return attnkit.mla_decode(*args, impl=NAME, **options)


OPTIONS = {
    "plain": {},
    "S1": {"S": 1, "lens": (3, 9, 70)},
    "S8": {"S": 8},
    "S64": {"S": 64},
    "S128": {"S": 128},
    "S256": {"S": 256},
    "H1": {"H": 1},
    "H8": {"H": 8},
    "H9": {"H": 9},
    "H24": {"H": 24},
    "H32": {"H": 32},
    "Q2": {"Q": 2},
    "Q5": {"Q": 5, "H": 6},
    "Q16": {"Q": 16, "H": 2},
    "tree": {"Q": 4, "H": 8, "tree": True},
    "window": {"window": 100},
    "window-Q2": {"window": 1, "Q": 2, "S": 64},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "gap": {"gap": 64},
    "large": {"size": 30.0},
    "many": {"lens": tuple(37 * i % 200 for i in range(150)), "H": 8},
}


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options_match_float64(name, fp8):
    latents.compare(call, latents.make(**{"lens": LENS, **OPTIONS[name]}, fp8=fp8, device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize(("C", "dtype"), [(128, torch.bfloat16), (256, torch.float16), (512, torch.float16)])
def test_sizes_and_fp16(C, dtype):
    latents.compare(call, latents.make(LENS, "cuda", C=C, dtype=dtype, size=0.3))


CUTS = {
    "one": CudaConfig(1, 1),
    "even": CudaConfig(100, 1),
    "least": CudaConfig(100, 3),
    "few": CudaConfig(6, 1),
}


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("lens", [(20000,), (5000, 300, 0, 2900), (64,) * 40, (3, 9000, 1) * 4], ids=str)
def test_any_division_of_the_work(lens, cut, fp8):
    latents.compare(call, latents.make(lens, "cuda", S=64, fp8=fp8), config=CUTS[cut])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_repeats_are_bit_equal(fp8):
    x = latents.make((1, 700, 3000, 64, 9000, 0, 130), "cuda", S=64, fp8=fp8)
    first = call(x.q, x.kv, x.table, config=CUTS["even"])
    for _ in range(250):
        assert torch.equal(call(x.q, x.kv, x.table, config=CUTS["even"]), first)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
@pytest.mark.parametrize("lens", [(20000,), (3000, 2900, 40), (2048,) * 16], ids=str)
def test_who_does_not_wait_gets_the_same_bits(lens, fp8):
    """With no patience the last piece to come adds up all; counters are zero again after that."""
    x = latents.make(lens, "cuda", S=64, fp8=fp8)
    first = call(x.q, x.kv, x.table, config=CUTS["even"])
    for _ in range(20):
        assert torch.equal(call(x.q, x.kv, x.table, config=replace(CUTS["even"], patience=0)), first)
    assert all(int(held.count_nonzero()) == 0 for held in workspace._eager_counters.values())


@pytest.mark.gpu
@pytest.mark.parametrize("Q", [1, 2])
@pytest.mark.parametrize("lens", [(6000, 300), (2048,) * 16], ids=len)
def test_sums_that_f16_does_not_hold(lens, Q):
    """Pieces of a bf16 sequence meet as f16; values beyond its range go through it by a power of two a row."""
    x = latents.make(lens, "cuda", S=64, Q=Q)
    x.q[..., : x.C : 7] = 0  # the scores stay as they are
    x.kv[..., : x.C : 7] *= 2.0**20
    latents.compare(call, x)


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_batch_invariance(fp8):
    x = latents.make((5000, 40, 3000, 9000), "cuda", S=64, fp8=fp8)
    pages, lens = x.table
    whole = call(x.q, x.kv, x.table, batch_invariant=True)
    for b in range(4):
        one = call(x.q[b : b + 1], x.kv, attnkit.PageTable(pages[b : b + 1], lens[b : b + 1]), batch_invariant=True)
        assert torch.equal(one[0], whole[b])


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
def test_a_graph_replays_with_other_lengths(fp8):
    latents.check_replays(call, latents.make((3000, 500, 1), "cuda", S=64, fp8=fp8))


@pytest.mark.gpu
def test_nan_of_one_sequence_stays_there():
    latents.check_nan_stays(call, latents.make((700, 300), "cuda", S=64))


@pytest.mark.gpu
def test_offsets_past_four_gigabytes():
    S, P = 64, 60000  # 4.4 GB of pages, the last of which are read
    kv = torch.zeros(P, S, 576, dtype=torch.bfloat16, device="cuda")
    x = latents.make((130,), "cuda", S=S)
    used = x.table.pages[0, :3].long()
    kv[-3:] = x.kv[used]
    pages = torch.arange(P - 3, P, dtype=torch.int32, device="cuda")[None]
    assert torch.equal(call(x.q, kv, attnkit.PageTable(pages, x.table.lens)), call(x.q, x.kv, x.table))


@pytest.mark.gpu
def test_what_it_declines_others_serve():
    for more, reason in (
        ({"H": 33}, "33 heads x 1 query tokens, wanted at most 32 rows"),
        ({"C": 64}, "C is 64 and R 64"),
        ({"fp8": True, "dtype": torch.float16}, "wanted bfloat16 with an fp8 cache"),
    ):
        x = latents.make((5, 70), "cuda", **more)
        with pytest.raises(RuntimeError, match=reason):
            call(x.q, x.kv, x.table, latent=x.C)
        latents.compare(attnkit.mla_decode, x, impl="triton")


def test_builds_fit_shared_memory():
    for rows in (1, 8, 9, 16, 17, 32):
        for C in (128, 256, 512):
            assert (
                2 <= builds.build_for(C, 64, True, rows).stages
                and builds.build_for(C, 64, True, rows).shared_bytes <= builds.SMEM
            )
        assert 3 <= builds.fp8_build_for(rows).stages and builds.fp8_build_for(rows).shared_bytes <= builds.SMEM


def test_configs_are_distinct_and_hold_the_default():
    sig = _sig(B=1, L=8192)
    hopper = arch.Arch(name="h", sm=90, sms=132, smem=232448, l2=60 << 20)
    found = CUDA.candidates(sig, hopper)
    assert len(set(found)) == len(found) and CUDA.default(sig, hopper) in found
    assert CUDA.default(_sig(B=64, L=16384), hopper) == CudaConfig(100, 1)


def _sig(B: int, L: int):
    q = torch.empty(B, 16, 576, dtype=torch.bfloat16)
    kv = torch.empty(1, 64, 576, dtype=torch.bfloat16)
    table = attnkit.PageTable(torch.zeros(B, L // 64, dtype=torch.int32), torch.zeros(B, dtype=torch.int32))
    return dispatch.plan_of(lambda: attnkit.mla_decode(q, kv, table, impl="torch")).sig
