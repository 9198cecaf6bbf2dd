"""The CUDA prefill kernel's schedule: tiles cut over their keys, sequences in any number and order, and what it tells Python."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit.backends.cuda import prefill as cuda_prefill
from attnkit.configs import prefill_cuda
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import skip_if_declined

H200 = 132
FEW = replace(cases.BASE, Hq=8, Hkv=1, D=128, lens=(20000, 300), q_lens=(40, 7))
CUT = [
    FEW,
    replace(FEW, Hq=32, Hkv=8, lens=(9000, 1, 0, 4100, 17), q_lens=(33, 1, 0, 64, 17)),
    replace(FEW, dtype=torch.float16, lens=(12345,), q_lens=(129,)),
    replace(FEW, window=3000, lens=(20000, 8000), q_lens=(40, 100)),
    replace(FEW, causal=False),
    replace(FEW, softcap=30.0, sinks=True),
    replace(FEW, softcap=100.0),
    replace(FEW, D=64, Hq=8, Hkv=2),
    replace(FEW, D=256, Hq=4, Hkv=2),
    replace(FEW, D=192, Dv=128, Hq=4, Hkv=4, layout="pair"),
    replace(FEW, batch_invariant=True),
]


def run(case: cases.Case) -> tuple[inputs.Inputs, torch.Tensor, torch.Tensor]:
    x = inputs.make(case, "cuda")
    call = lambda: attnkit.paged_prefill(  # noqa: E731
        x.q, x.kv, x.table, x.cu_q, causal=case.causal, return_lse=True, impl="cuda_sm90", **x.options
    )
    out, lse = skip_if_declined(call)
    return x, out, lse


@pytest.mark.gpu
@pytest.mark.parametrize("case", CUT, ids=cases.ids(CUT))
def test_cut_tiles_match_float64(case):
    """Few queries on many keys: every tile's keys are shared out, and the pieces' sums meet."""
    x, out, lse = run(case)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize("B", [40, 256, 300, 1024])
def test_many_sequences_in_any_order(B):
    """Sorted by length up to 256 sequences, as they come beyond that."""
    g = torch.Generator().manual_seed(B)
    lens = torch.randint(0, 400, (B,), generator=g)
    counts = torch.minimum(lens, torch.randint(0, 60, (B,), generator=g))
    case = replace(cases.BASE, lens=tuple(lens.tolist()), q_lens=tuple(counts.tolist()), Hq=4, Hkv=2, D=64)
    x, out, lse = run(case)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320])
def test_last_blocks_of_any_width(length, D):
    """A last block of up to 64 keys is taken half as wide; NaN stands behind it in the pool."""
    case = replace(cases.BASE, lens=(length, length + 1000), q_lens=(length, 5), Hq=8, Hkv=2, D=D)
    x, out, lse = run(case)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [0.0, 30.0])
@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_batch_invariant_rows_do_not_know_their_neighbours(loud, softcap):
    """A tile's last rows are the next sequence's queries: large logits there change nothing here."""
    case = replace(FEW, batch_invariant=True, lens=(20000, 300, 5000), q_lens=(40, 7, 100), softcap=softcap)
    x = inputs.make(case, "cuda")
    x.q[40:] *= loud
    call = lambda q, table, cu: attnkit.paged_prefill(  # noqa: E731
        q, x.kv, table, cu, batch_invariant=True, softcap=softcap, impl="cuda_sm90"
    )
    out = skip_if_declined(lambda: call(x.q, x.table, x.cu_q))
    start = 0
    for b, n in enumerate(case.q_lens):
        table = attnkit.PageTable(x.table.pages[b : b + 1], x.table.lens[b : b + 1])
        cu = torch.tensor([0, n], dtype=torch.int32, device="cuda")
        assert torch.equal(call(x.q[start : start + n].clone(), table, cu), out[start : start + n])
        start += n


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("scale", [1.0, 3.0, 40.0])
def test_softcap_of_small_and_large_logits(scale, D):
    """Small logits go by a polynomial, large ones by the exact form; a batch may hold both."""
    case = replace(cases.BASE, lens=(700, 300), q_lens=(700, 300), Hq=8, Hkv=2, D=D, softcap=20.0)
    x = inputs.make(case, "cuda")
    x.q[::3] *= scale
    out, lse = skip_if_declined(
        lambda: attnkit.paged_prefill(x.q, x.kv, x.table, x.cu_q, return_lse=True, impl="cuda_sm90", **x.options)
    )
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize("grows", [1.5, 6.0, 60.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("D", "Dv"), [(64, 0), (128, 0), (192, 128), (256, 0)])
def test_maxima_that_grow_from_block_to_block(D, Dv, dtype, grows):
    """Blocks come from the last to the first. Logits that grow by up to 180 a block overflow weights relative to the maximum so far."""
    layout = "pair" if Dv else "NHD"
    case = replace(cases.BASE, lens=(1100, 400), q_lens=(300, 400), Hq=8, Hkv=2, D=D, Dv=Dv, dtype=dtype, layout=layout)
    x = inputs.make(case, "cuda")
    k = x.kv[0] if isinstance(x.kv, tuple) else x.kv[:, 0]
    for b, n in enumerate(case.lens):
        at = torch.arange(n, device="cuda")
        place = x.table.pages[b].long()[at // case.S], at % case.S
        k[place] = (0.1 * k[place].float() + (grows * (n - at) / 128)[:, None, None] / D**0.5).to(dtype)
    x.q[:] = (0.1 * x.q.float() + 3 * (torch.arange(len(x.q), device="cuda") % 3 > 0)[:, None, None]).to(dtype)
    call = lambda: attnkit.paged_prefill(x.q, x.kv, x.table, x.cu_q, return_lse=True, impl="cuda_sm90")  # noqa: E731
    out, lse = skip_if_declined(call)
    truth, exact = x.truth(), x.truth(torch.float32)
    assert_close(out, truth[0], exact[0].to(dtype))
    assert_close(lse, truth[1], exact[1], "lse")


def test_room_for_pieces_goes_by_shapes():
    few = {"tile_tokens": 32, "Hkv": 8, "sms": H200, "capacity": 65536}
    assert cuda_prefill.slots(256, invariant=False, **few) == cuda_prefill.PIECES * H200
    assert cuda_prefill.slots(256, invariant=True, **few) == 0
    assert cuda_prefill.slots(32768, invariant=False, **few) == 0, "many tiles need no cutting"
    assert cuda_prefill.slots(256, invariant=False, **few | {"capacity": 2048}) == 0, "short sequences are not worth it"


@pytest.mark.parametrize(
    ("D", "Dv", "config", "queries"),
    [
        (128, 128, prefill_cuda.CudaConfig(2, 128, 2), 2),
        (64, 64, prefill_cuda.CudaConfig(3, 128, 4), 2),
        (192, 128, prefill_cuda.CudaConfig(2, 128, 2), 1),
        (256, 256, prefill_cuda.CudaConfig(2, 64, 2), 1),
    ],
)
def test_shared_memory_holds_the_next_queries_where_they_fit(D, Dv, config, queries):
    class Sig:
        pass

    Sig.D, Sig.Dv = D, Dv
    tiles = queries * 64 * config.consumers * D * 2 + config.stages * config.block * (D + Dv) * 2
    rest = prefill_cuda.shared_bytes(Sig, config) - tiles
    assert 0 < rest < 34 * 1024
    assert prefill_cuda.shared_bytes(Sig, config) <= 227 * 1024


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "L"), [(64, 64), (1024, 1024), (700, 3000), (4, 20000)])
def test_items_are_taken_when_the_last_is_nearly_done(n, L):
    """Items of one block to many, more of them than multiprocessors: every one is found, and none twice."""
    case = replace(cases.BASE, lens=(L,) * 9 + (1, 0), q_lens=(n,) * 9 + (1, 0), Hq=16, Hkv=16, D=128)
    x, out, lse = run(case)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")
