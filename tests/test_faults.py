"""The rows of CASES: faults that others shipped, one test each, named after the row.

Rows 21 to 23 are the engine's (tests/engine), 24, 25 and 28 the tuner's and launcher's (tests/test_tune.py,
tests/test_launch.py), 17 an error message (tests/test_errors.py).
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit import decode, gemm, mla, prefill, quantize, sampling
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import every, skip_if_declined

GB = 1 << 30
gpu_kernels = [p for p in every(decode.KERNELS) if p.id not in ("cpu", "torch")]


def big_pool(bytes_needed: int, device: str) -> None:
    if device == "cpu":
        pytest.skip("needs a pool of several GB; runs on a GPU")


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(mla.DECODE_KERNELS) if p.id not in ("cpu", "torch")])
def test_fault_01_mla_page_id_times_stride_past_int32(impl, device):
    P, S, D = 66000, 64, 576  # 2.4e9 elements
    kv = torch.empty(P, S, D, dtype=torch.bfloat16, device=device)
    pages = torch.tensor([[P - 1, 3, P - 2]], dtype=torch.int32, device=device)
    kv[pages[0].long()] = torch.randn(3, S, D, device=device).bfloat16()
    small = kv[pages[0].long()].clone()
    q = torch.randn(1, 16, D, device=device).bfloat16()
    lens = torch.tensor([3 * S - 5], dtype=torch.int32, device=device)
    far = skip_if_declined(lambda: attnkit.mla_decode(q, kv, attnkit.PageTable(pages, lens), impl=impl))
    near = attnkit.mla_decode(q, small, attnkit.PageTable(torch.arange(3, device=device).int()[None], lens), impl=impl)
    assert torch.equal(far, near)


@pytest.mark.gpu
@pytest.mark.parametrize("op", ["decode", "prefill"])
@pytest.mark.parametrize(("impl", "device"), gpu_kernels)
def test_fault_02_and_03_offsets_past_2_to_the_31_and_32(op, impl, device):
    """The pages wanted lie beyond 2^32 elements; the ones a wrapped offset would name hold NaN."""
    S, H, D = 16, 8, 128
    P = (1 << 32) // (2 * S * H * D) + 100
    kv = torch.full((P, 2, S, H, D), float("nan"), dtype=torch.bfloat16, device=device)
    pages = torch.tensor([[P - 1, P - 7, P // 2 + 3]], dtype=torch.int32, device=device)
    kv[pages[0].long()] = torch.randn(3, 2, S, H, D, device=device).bfloat16()
    small = kv[pages[0].long()].clone()
    table = attnkit.PageTable(pages, torch.tensor([41], dtype=torch.int32, device=device))
    near_table = attnkit.PageTable(torch.arange(3, device=device).int()[None], table.lens)
    q = torch.randn(1, 32, D, device=device).bfloat16()
    if op == "decode":
        far, near = (
            skip_if_declined(lambda c=c, t=t: attnkit.paged_decode(q, c, t, impl=impl))
            for c, t in ((kv, table), (small, near_table))
        )
    else:
        cu = torch.tensor([0, 1], dtype=torch.int32, device=device)
        far, near = (
            skip_if_declined(lambda c=c, t=t: attnkit.paged_prefill(q, c, t, cu, impl=impl))
            for c, t in ((kv, table), (small, near_table))
        )
    assert torch.equal(far, near) and not far.isnan().any()


@pytest.mark.parametrize(("impl", "device"), every(decode.KERNELS))
def test_fault_04_scores_below_any_finite_sentinel(impl, device):
    """Logits of -1.28e5 are still logits; empty rows give 0 and -inf, not NaN.

    The scores are whole numbers and either equal or far apart, so that float32 holds what matters of them.
    """
    x = inputs.make(cases.Case(lens=(20, 0, 1), dtype=torch.float32), device)
    x.q.mul_(0).add_(1)
    k = x.kv[:, 0]
    low = torch.where(torch.arange(k.shape[1], device=device) % 3 == 1, -2004.0, -2000.0)[:, None, None]
    k.copy_(torch.where(k.isnan(), k, low))
    out, lse = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, scale=1.0, return_lse=True, impl=impl))
    x.clean["scale"] = 1.0
    truth, plain = x.truth(), x.plain()
    assert lse[0].max() < -6e4 and (lse[1] == -torch.inf).all() and (out[1] == 0).all()
    assert_close(out, truth[0], plain[0])


@pytest.mark.parametrize(("impl", "device"), every(prefill.KERNELS))
def test_fault_05_and_06_nan_beyond_l_and_in_a_neighbour(impl, device):
    """NaN in unused slots reaches nobody; NaN inside one sequence reaches that sequence only."""
    x = inputs.make(cases.RAGGED, device)
    call = lambda: attnkit.paged_prefill(x.q, x.kv, x.table, x.cu_q, impl=impl)  # noqa: E731
    clean = skip_if_declined(call)
    assert not clean.isnan().any()
    b = 3
    x.kv[x.table.pages[b, 0].long(), :, 0] = float("nan")
    rows = torch.ones(x.q.shape[0], dtype=torch.bool, device=device)
    rows[x.cu_q[b] : x.cu_q[b + 1]] = False
    got = call()
    assert torch.equal(got[rows], clean[rows]) and got[~rows].isnan().all()


@pytest.mark.parametrize(("impl", "device"), every(decode.KERNELS))
def test_fault_07_a_padded_batch_row_writes_and_reads_nothing(impl, device):
    """Rows padded for a captured graph: lens 0, slots -1, table full of zeros. Page 0 may hold NaN."""
    x = inputs.make(cases.Case(lens=(17, 0, 0)), device)
    unused = [p for p in range(x.kv.shape[0]) if p not in x.table.pages[0, :2].tolist()][0]
    x.table.pages[1:] = unused
    before = x.kv.clone()
    k = torch.randn(3, 2, 64, device=device).bfloat16()
    attnkit.write_kv(k, k, x.kv, torch.full((3,), -1, device=device))
    assert torch.equal(x.kv.view(torch.int16), before.view(torch.int16))
    out = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl=impl))
    assert not out.isnan().any() and (out[1:] == 0).all()


@pytest.mark.parametrize(("impl", "device"), every(quantize.KERNELS))
def test_fault_08_a_stale_row_changes_no_other_rows_scale(impl, device):
    x = torch.randn(3, 128, device=device)
    x[1] = float("nan")
    got, scale = skip_if_declined(lambda: attnkit.quantize_per_token(x, impl=impl))
    alone, alone_scale = attnkit.quantize_per_token(x[2:], impl=impl)
    assert torch.equal(got[2:], alone) and torch.equal(scale[2:], alone_scale)


@pytest.mark.parametrize(("impl", "device"), every(sampling.KERNELS))
def test_fault_10_no_token_at_or_beyond_v(impl, device):
    """V is no multiple of anything; the memory behind each row holds what would win."""
    V = 1021
    wide = torch.full((64, V + 200), 1e9, device=device)
    wide[:, :V] = torch.randn(64, V, device=device)
    for options in ({}, {"temperature": 0.0}, {"top_k": 40, "top_p": 0.9}, {"top_p": 0.5}):
        tokens = skip_if_declined(lambda o=options: attnkit.sample(wide[:, :V], seed=3, impl=impl, **o)).tokens
        assert (tokens >= 0).all() and (tokens < V).all()


@pytest.mark.parametrize(("impl", "device"), every(sampling.KERNELS))
def test_fault_11_top_k_ends_on_rows_of_minus_infinity(impl, device):
    logits = torch.full((3, 500), -float("inf"), device=device)
    logits[1, 3] = 0
    got = skip_if_declined(lambda: attnkit.sample(logits, top_k=50, top_p=0.9, seed=1, impl=impl))
    assert got.tokens.tolist() == [0, 3, 0] and got.valid.tolist() == [False, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), gpu_kernels)
def test_fault_12_ten_thousand_undrained_launches(impl, device):
    x = inputs.make(replace(cases.BASE, lens=(700, 3, 0, 64), Hq=8, Hkv=2), device)
    out = torch.empty_like(x.q)
    first = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl=impl))
    for _ in range(10_000):
        attnkit.paged_decode(x.q, x.kv, x.table, out=out, impl=impl)
    torch.cuda.synchronize()
    assert torch.equal(out, first)


@pytest.mark.parametrize(("impl", "device"), every(prefill.KERNELS))
def test_fault_13_empty_kv(impl, device):
    case = cases.Case(lens=(0, 0), q_lens=(3, 0))
    x = inputs.make(case, device)
    out, lse = skip_if_declined(lambda: attnkit.paged_prefill(x.q, x.kv, x.table, x.cu_q, return_lse=True, impl=impl))
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.parametrize(("impl", "device"), [p for p in every(decode.KERNELS) if p.id != "torch"])
def test_fault_14_lens_beyond_the_table(impl, device):
    """The CPU says which; a GPU kernel treats the table's capacity as the length and reads nothing outside."""
    x = inputs.make(cases.Case(lens=(32, 16)), device)
    x.table.pages[1, 1:] = x.table.pages[0, 0]
    x.table.pages[0, 2:] = x.table.pages[0, 0]
    capacity = x.table.pages.shape[1] * 16
    over = attnkit.PageTable(x.table.pages, torch.tensor([capacity + 100, 16], dtype=torch.int32, device=device))
    full = attnkit.PageTable(x.table.pages, torch.tensor([capacity, 16], dtype=torch.int32, device=device))
    if impl == "cpu":
        with pytest.raises(ValueError, match=r"lens\[0\] = \d+"):
            attnkit.paged_decode(x.q, x.kv, over, impl=impl)
        return
    got = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, over, impl=impl))
    assert torch.equal(got, attnkit.paged_decode(x.q, x.kv, full, impl=impl))


@pytest.mark.parametrize("bad", [-1, 10**6, 2**31 - 1])
def test_fault_14_a_page_outside_the_pool_on_the_cpu(bad):
    x = inputs.make(cases.Case(lens=(32, 16)))
    x.table.pages[0, 1] = bad
    with pytest.raises(ValueError, match=rf"pages\[0, 1\] = {bad}"):
        attnkit.paged_decode(x.q, x.kv, x.table, impl="cpu")


@pytest.mark.parametrize(("impl", "device"), every(prefill.KERNELS))
@pytest.mark.parametrize("S", [4, 32])
def test_fault_15_a_tile_that_spans_pages_at_d256(S, impl, device):
    case = cases.Case(lens=(130, 67), q_lens=(6, 67), Hq=2, Hkv=1, D=256, S=S)
    x = inputs.make(case, device)
    out = skip_if_declined(lambda: attnkit.paged_prefill(x.q, x.kv, x.table, x.cu_q, impl=impl))
    assert_close(out, x.truth()[0], x.plain()[0])


@pytest.mark.parametrize(("impl", "device"), every(gemm.KERNELS))
def test_fault_16_padded_leading_strides(impl, device):
    a, w = (torch.randint(-127, 128, (n, 96), dtype=torch.int8, device=device) for n in (9, 40))
    want = torch.zeros(9, 64, device=device)[:, :40]
    got = skip_if_declined(
        lambda: attnkit.w8a8_gemm(
            a[:, :64], w[:, :64], torch.ones(9, device=device), torch.ones(40, device=device), out=want, impl=impl
        )
    )
    assert torch.equal(got.double(), a[:, :64].double() @ w[:, :64].double().t())


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), gpu_kernels)
def test_fault_18_250_repeats_are_bitwise_equal(impl, device):
    """A missing barrier moves bits under load: many launches in flight, all equal."""
    x = inputs.make(replace(cases.BASE, lens=(3000, 3, 0, 640, 17, 2048), Hq=32, Hkv=8, D=128), device)
    first = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl=impl))
    repeats = [attnkit.paged_decode(x.q, x.kv, x.table, impl=impl) for _ in range(250)]
    assert all(torch.equal(r, first) for r in repeats)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), gpu_kernels)
def test_fault_19_and_20_the_tensors_stream_and_device(impl, device):
    """Work queued on a side stream is seen in order, and the current device is left as it was."""
    x = inputs.make(cases.BASE, device)
    want = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl=impl))
    side, q = torch.cuda.Stream(), torch.zeros_like(x.q)
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        q.copy_(x.q)
        got = attnkit.paged_decode(q, x.kv, x.table, impl=impl)
    side.synchronize()
    assert torch.equal(got, want)
    if torch.cuda.device_count() > 1:
        other = inputs.make(cases.BASE, "cuda:1")
        moved = attnkit.paged_decode(other.q, other.kv, other.table, impl=impl)
        assert torch.cuda.current_device() == 0 and moved.device.index == 1
        assert torch.equal(moved.cpu(), want.cpu())


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), gpu_kernels)
def test_a_captured_graph_replays_over_100_sets_of_lens(impl, device):
    """No plan, no host copy: lengths, pages and queries change under a captured graph."""
    case = replace(cases.BASE, lens=(2048,) * 6, Hq=32, Hkv=8, D=128)
    x = inputs.make(case, device)
    skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl=impl))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attnkit.paged_decode(x.q, x.kv, x.table, return_lse=True, impl=impl)
    g = torch.Generator().manual_seed(0)
    for i in range(100):
        lens = torch.randint(0, 2049, (6,), generator=g).int()
        lens[i % 6] = (0, 1, 2048, 16, 17, 15)[i % 6]
        x.table.lens.copy_(lens)
        x.q.normal_()
        graph.replay()
        want, want_lse = attnkit.paged_decode(x.q, x.kv, x.table, return_lse=True, impl=impl)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    assert_close(out, x.truth()[0], x.plain()[0])


@pytest.mark.parametrize(("impl", "device"), every(decode.KERNELS))
def test_fault_26_several_query_tokens_equal_single_ones(impl, device):
    """Decode of Q tokens is what Q single decodes at their own lengths give."""
    case = cases.Case(lens=(40, 9), Q=4, dtype=torch.float32)
    x = inputs.make(case, device)
    several = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl=impl))
    for t in range(4):
        table = attnkit.PageTable(x.table.pages, x.table.lens - 3 + t)
        single = attnkit.paged_decode(x.q[:, t].contiguous(), x.kv, table, impl=impl)
        assert torch.allclose(several[:, t], single, atol=1e-5)
