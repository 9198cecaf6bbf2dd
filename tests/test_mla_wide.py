"""The latent decode for many query rows: options, page sizes, and how a sequence's pieces meet."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit import PageTable, reference, workspace
from attnkit.configs import mla_wide_cuda
from attnkit.configs.mla_wide_cuda import CudaConfig
from tests import cases, inputs
from tests.close import assert_close

KERNEL = "cuda_sm90_wide"
C, R = 512, 64
BASE = cases.Case(lens=(700, 0, 1, 64, 65, 129, 3000), Hq=128, Hkv=1, D=C + R, S=64, layout="pair")
CASES = [
    BASE,
    replace(BASE, Q=2),
    replace(BASE, Q=4, lens=(3, 700, 2000), S=32),
    replace(BASE, Hq=64, S=16),
    replace(BASE, Hq=40, Q=3),  # a block of 64 rows holds heads of two tokens, the last is not full
    replace(BASE, Hq=33, S=128),
    replace(BASE, Hq=192, S=256),
    replace(BASE, dtype=torch.float16, S=16),
    replace(BASE, window=100, Q=2),
    replace(BASE, window=1),
    replace(BASE, softcap=5.0),
    replace(BASE, sinks=True),
    replace(BASE, sinks=True, window=70, softcap=3.0, Q=3, Hq=64),
    replace(BASE, lens=(200,) * 150),  # more sequences than groups of CTAs
    replace(BASE, lens=(6000, 5900)),  # fewer
    replace(BASE, lens=(8192,)),  # one in as many pieces as there are groups
    replace(BASE, lens=(2048,) * 16),  # four groups a sequence
    replace(BASE, lens=(1024,) * 32),  # two
    replace(BASE, lens=(1024,) * 32, dtype=torch.float16),
    replace(BASE, lens=(6000, 300), dtype=torch.float16),  # pieces meet in float32
    replace(BASE, lens=(2000,) * 9, dtype=torch.float16),
    replace(BASE, lens=(8192,), dtype=torch.float16),
    replace(BASE, Hq=64, lens=(9000,)),  # more pieces than rows to share
    replace(BASE, Hq=40, Q=3, lens=(6000, 100)),  # rows that nobody has among those to share
    replace(BASE, lens=(2900, 1500, 1200, 700), sinks=True),  # from 5 to 30 pieces a sequence
]


def attend(x: inputs.Inputs, kernel: str = KERNEL, **options):
    kv = x.kv[0][:, :, 0]
    return attnkit.mla_decode(x.q, kv, x.table, latent=C, return_lse=True, impl=kernel, **x.options, **options)


def compare(x: inputs.Inputs, kernel: str = KERNEL) -> None:
    out, lse = attend(x, kernel)
    k = x.kv[0]
    truths = [
        reference.paged_attention(
            x.q.flatten(0, 1), k, k[..., :C], *x.table, x.cu_q, compute=compute, **{**x.clean, "scale": (128 + R) ** -0.5}
        )
        for compute in (torch.float64, x.q.dtype)
    ]
    assert_close(out.flatten(0, 1), truths[0][0], truths[1][0])
    assert_close(lse.flatten(0, 1), truths[0][1], truths[1][1].float(), "lse")


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def check_impatient(x, kernel: str = KERNEL) -> None:
    """With no patience the last piece to come adds up all the sums; counters are zero again after that."""
    out, lse = attend(x, kernel)
    for _ in range(20):
        hurried = attend(x, kernel, config=CudaConfig(patience=0))
        assert same_bits(out, hurried[0]) and same_bits(lse, hurried[1])
    assert all(int(held.count_nonzero()) == 0 for held in workspace._eager_counters.values())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_matches_float64(case):
    compare(inputs.make(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(6000, 300), (2048,) * 16], ids=len)
def test_sums_that_f16_does_not_hold(lens):
    """Pieces of a bf16 sequence meet as f16; values beyond its range go through it by a power of two a row."""
    x = inputs.make(replace(BASE, lens=lens), "cuda")
    x.q[..., :C:7] = 0  # the scores stay as they are
    x.kv[0][..., :C:7] *= 2.0**20
    compare(x)


@pytest.mark.gpu
@pytest.mark.parametrize("lens", [(6000,), (3000, 2900, 40), (4000,) * 9], ids=len)
def test_who_does_not_wait_gets_the_same_bits(lens):
    check_impatient(inputs.make(replace(BASE, lens=lens), "cuda"))


@pytest.mark.gpu
def test_takes_tokens_apart_in_memory():
    """q [B, Q, H, D] as a view whose tokens do not follow one another, and out likewise."""
    x = inputs.make(replace(BASE, Q=2), "cuda")
    want, _ = attend(x)
    B, Q, H, D = x.q.shape
    q = torch.empty(B, H, Q, D, dtype=x.q.dtype, device="cuda").transpose(1, 2).copy_(x.q)
    out = torch.empty(B, H, Q, C, dtype=x.q.dtype, device="cuda").transpose(1, 2)
    attnkit.mla_decode(q, x.kv[0][:, :, 0], x.table, latent=C, out=out, impl=KERNEL)
    assert same_bits(out.contiguous(), want)


@pytest.mark.gpu
def test_declines_with_a_reason():
    q = torch.randn(1, 128, C + R, device="cuda", dtype=torch.bfloat16)
    kv = torch.randn(4, 8, C + R, device="cuda", dtype=torch.bfloat16)
    lens = torch.tensor([9], device="cuda", dtype=torch.int32)
    table = PageTable(torch.arange(4, device="cuda", dtype=torch.int32)[None], lens)
    with pytest.raises(RuntimeError, match="pages of at least 16 tokens"):
        attnkit.mla_decode(q, kv, table, impl=KERNEL)
    with pytest.raises(RuntimeError, match="wanted more than 32 rows"):
        attnkit.mla_decode(q[:, :32], kv.view(2, 16, C + R), table, impl=KERNEL)


def test_a_cluster_is_never_half_idle():
    for rows, ctas in ((33, 1), (64, 1), (65, 2), (128, 2), (192, 1), (193, 2), (512, 2)):
        assert mla_wide_cuda.ctas(rows) == ctas
