"""impl="flashinfer" gives what attnkit's own kernels give, on inputs without poison."""

from __future__ import annotations

import pytest
import torch

import attnkit
from tests import cases, inputs

pytest.importorskip("flashinfer")
pytestmark = pytest.mark.gpu


def clean(case):
    x = inputs.make(case, "cuda")
    return x, x.kv.nan_to_num(0)


def test_decode():
    x, kv = clean(cases.Case(lens=(100, 1, 33), Hq=8, Hkv=2, D=128))
    got, lse = attnkit.paged_decode(x.q, kv, x.table, return_lse=True, impl="flashinfer")
    want, want_lse = attnkit.paged_decode(x.q, kv, x.table, return_lse=True)
    assert torch.allclose(got.float(), want.float(), atol=0.02) and torch.allclose(lse, want_lse, atol=0.01)


def test_prefill():
    x, kv = clean(cases.Case(lens=(100, 1, 33), q_lens=(50, 1, 33), Hq=8, Hkv=2, D=128))
    got, lse = attnkit.paged_prefill(x.q, kv, x.table, x.cu_q, return_lse=True, impl="flashinfer")
    want, want_lse = attnkit.paged_prefill(x.q, kv, x.table, x.cu_q, return_lse=True)
    assert torch.allclose(got.float(), want.float(), atol=0.02) and torch.allclose(lse, want_lse, atol=0.01)
