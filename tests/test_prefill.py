"""paged_prefill: every kernel, every case, against float64."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit.prefill import KERNELS, visible_pairs
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import every, skip_if_declined


def run(case, impl, device, **more):
    x = inputs.make(case, device)
    out = torch.full((*x.q.shape[:-1], case.Dv or case.D), float("nan"), dtype=case.dtype, device=device)
    options = {"causal": case.causal, **x.options}
    got, lse = skip_if_declined(
        lambda: attnkit.paged_prefill(x.q, x.kv, x.table, x.cu_q, **options, out=out, return_lse=True, impl=impl, **more)
    )
    assert got is out
    return x, got, lse


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("case", cases.PREFILL, ids=cases.ids(cases.PREFILL))
def test_matches_float64(case, impl, device):
    x, out, lse = run(case, impl, device)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id not in ("cpu", "torch")])
@pytest.mark.parametrize("case", cases.LARGE_PREFILL, ids=cases.ids(cases.LARGE_PREFILL))
def test_large_matches_float64(case, impl, device):
    test_matches_float64(case, impl, device)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_rows_beyond_the_last_sequence_are_zero(impl, device):
    """The padded rows of a captured batch are written, so nothing stale is left in them (CASES 8)."""
    x = inputs.make(cases.RAGGED, device)
    T = x.q.shape[0]
    q = torch.cat([x.q, torch.full_like(x.q[:7], float("nan"))])
    out = torch.full_like(q, float("nan"))
    got, lse = skip_if_declined(lambda: attnkit.paged_prefill(q, x.kv, x.table, x.cu_q, out=out, return_lse=True, impl=impl))
    assert not got[:T].isnan().any()
    assert (got[T:] == 0).all() and (lse[T:] == -torch.inf).all()


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_chunks_equal_the_whole(impl, device):
    """A prompt in two chunks gives what it gives in one: causal is aligned to the end."""
    case = cases.Case(lens=(50,), q_lens=(50,), dtype=torch.float32)
    x = inputs.make(case, device)
    whole = skip_if_declined(lambda: attnkit.paged_prefill(x.q, x.kv, x.table, x.cu_q, impl=impl))
    parts = []
    for lo, hi in ((0, 19), (19, 50)):
        table = attnkit.PageTable(x.table.pages, torch.tensor([hi], dtype=torch.int32, device=device))
        cu = torch.tensor([0, hi - lo], dtype=torch.int32, device=device)
        parts.append(attnkit.paged_prefill(x.q[lo:hi], x.kv, table, cu, impl=impl))
    assert torch.allclose(torch.cat(parts), whole, atol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 3, 7, 50])
@pytest.mark.parametrize(("n", "L"), [(1, 1), (5, 5), (3, 20), (20, 20)])
def test_cost_counts_what_the_mask_shows(n, L, causal, window):
    if window and not causal:
        pytest.skip("cost takes a two-sided window as its causal half")
    seen = attnkit.reference.visible(n, L, causal, window, None, torch.device("cpu"))
    assert visible_pairs(n, L, causal, window) == int(seen.sum())
