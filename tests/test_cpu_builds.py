"""The CPU kernels' other builds: what a machine without AVX-512, or without AVX2, would run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit import dispatch
from attnkit.backends.cpu import attention, native
from tests import cases, inputs, test_quantize
from tests.close import assert_close

ATTENTION = ["base", "avx2", "avx512"]
CASES = [
    cases.BASE,
    replace(cases.BASE, dtype=torch.float32, window=7, sinks=True),
    replace(cases.BASE, kv_dtype=torch.int8, scales="head", D=128, Q=3),
    replace(cases.BASE, dtype=torch.float16, kv_dtype=torch.float8_e4m3fn, scales="tensor", softcap=5.0),
]


@pytest.fixture(params=ATTENTION)
def build(request, monkeypatch):
    if request.param not in native.module().cpu_attention_isas():
        pytest.skip(f"this machine has no {request.param}")
    monkeypatch.setattr(attention, "isa", request.param)
    dispatch.forget_plans()
    yield request.param
    dispatch.forget_plans()


@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_attention(build, case):
    x = inputs.make(case)
    out, lse = attnkit.paged_decode(x.q, x.kv, x.table, **x.options, return_lse=True, impl="cpu")
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.fixture(params=[0, 1, 2], ids=ATTENTION)
def level(request, monkeypatch):
    if ATTENTION[request.param] not in native.module().cpu_attention_isas():
        pytest.skip(f"this machine has no {ATTENTION[request.param]}")
    monkeypatch.setattr(native, "isa", request.param)
    dispatch.forget_plans()
    yield request.param
    dispatch.forget_plans()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
def test_gemm_and_quantize(level, dtype):
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(19, 203, generator=g), torch.randn(37, 203, generator=g)
    a, a_scale = attnkit.quantize_per_token(x, dtype=dtype, impl="cpu")
    b, b_scale = attnkit.quantize_weight(w, dtype=dtype, impl="cpu")
    want = attnkit.quantize_per_token(x, dtype=dtype, impl="torch")
    assert torch.equal(a.view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(a_scale, want[1])
    out = attnkit.w8a8_gemm(a, b, a_scale, b_scale, out_dtype=torch.float32, impl="cpu")
    truth = attnkit.reference.w8a8_gemm(a, b, a_scale, b_scale, None)
    assert_close(out, truth, attnkit.reference.w8a8_gemm(a, b, a_scale, b_scale, None, torch.float32))


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_fused_quantize(level, x_dtype, dtype):
    test_quantize.check_rms_norm((5, 275, 8), x_dtype, dtype, "cpu", "cpu", residual=True)
    test_quantize.check_silu_mul((5, 275, 8), x_dtype, dtype, "cpu", "cpu")


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.0}, {"top_k": 20, "top_p": 0.9}, {"top_p": 0.7, "min_p": 0.01}], ids=str
)
def test_sampling(level, options):
    logits = torch.randn(6, 1003, generator=torch.Generator().manual_seed(0)) * 3
    got = attnkit.sample(logits, seed=5, impl="cpu", **options).tokens
    assert torch.equal(got, attnkit.sample(logits, seed=5, impl="torch", **options).tokens)
