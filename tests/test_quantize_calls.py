"""The quantising ops as they are called: in graphs, behind other kernels, with configs, with bad input, by torch."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import attnkit
from attnkit import arch
from attnkit.configs import quantize as configs
from attnkit.signature import QuantSig, RmsNormQuantSig, SiluMulQuantSig


@pytest.mark.gpu
def test_a_captured_graph_replays_with_other_values():
    x, r = (torch.randn(33, 4096, device="cuda").bfloat16() for _ in range(2))
    g, w = torch.randn(33, 8192, device="cuda").bfloat16(), torch.ones(4096, device="cuda").bfloat16()

    def run():
        plain, normed = attnkit.quantize_per_token(x), attnkit.rms_norm_quantize(x, w, 1e-6, residual=r)
        return (*plain, *normed, *attnkit.silu_mul_quantize(g))

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for t in (x, r, g):
        t.normal_()
    before = r.clone()
    graph.replay()
    after = r.clone()
    r.copy_(before)
    for got, want in zip(captured, run()):
        assert torch.equal(got, want)
    assert torch.equal(r, after)


@pytest.mark.gpu
@pytest.mark.parametrize("M", [1, 64, 256])
def test_rows_are_read_when_the_kernel_before_has_written_them(M):
    """A product lets what follows start before it has stored anything: no form may load a row before its wait."""
    g = torch.Generator(device="cuda").manual_seed(M)
    a, w = (torch.randint(-127, 128, (rows, 4096), generator=g, dtype=torch.int8, device="cuda") for rows in (M, 8192))
    a_scale, w_scale = torch.rand(M, generator=g, device="cuda"), torch.rand(8192, generator=g, device="cuda")
    weight = torch.randn(8192, generator=g, device="cuda").bfloat16()
    forms = (attnkit.quantize_per_token, lambda y: attnkit.rms_norm_quantize(y, weight, 1e-6), attnkit.silu_mul_quantize)

    def run():
        products, quantised = [], []
        for form in forms:
            products.append(attnkit.w8a8_gemm(a, w, a_scale, w_scale))
            quantised.append(form(products[-1]))
        return products, quantised

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        products, quantised = run()
    for _ in range(3):
        a.random_(-127, 128, generator=g)
        graph.replay()
        torch.cuda.synchronize()
        for form, y, got in zip(forms, products, quantised):
            want = form(y)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.gpu
def test_250_runs_give_the_same_bits():
    x, w = torch.randn(512, 4096, device="cuda").bfloat16(), torch.randn(4096, device="cuda").bfloat16()
    first = attnkit.rms_norm_quantize(x, w, 1e-6)
    for _ in range(250):
        again = attnkit.rms_norm_quantize(x, w, 1e-6)
        assert torch.equal(again[0], first[0]) and torch.equal(again[1], first[1])


# ---------------------------------------------------------------- configs of the CUDA kernel


def signatures(M: int, K: int, dtype: torch.dtype):
    device, out = torch.device("cuda"), torch.int8
    yield QuantSig("quantize_per_token", device, dtype, out, M, K, (K, 1), True)
    yield SiluMulQuantSig("silu_mul_quantize", device, dtype, out, M, K, (2 * K, 1), True)
    for residual in (None, (K, 1)):
        yield RmsNormQuantSig("rms_norm_quantize", device, dtype, dtype, out, M, K, (K, 1), residual, 1e-6, True)


@pytest.mark.parametrize("K", [8, 256, 264, 3584, 4096, 5120, 8192, 14336, 18944, 28672, 53248, 131072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_every_config_holds_its_rows(K, dtype):
    """What default() and candidates() give can be launched: registers or memory take the row, shared memory the ring."""
    h200 = arch.Arch(**{**dataclasses.asdict(arch.of(torch.device("cpu"))), "sms": 132})
    for M in (1, 64, 300, 1024, 2048, 32768):
        for sig in signatures(M, K, dtype):
            for config in configs.candidates(sig, h200):
                assert configs.why_not(sig, config) is None, (sig.op, M, K, config)
                assert configs.shared_bytes(sig, config) <= 227 * 1024 - 512
                assert configs.bucket(sig)


@pytest.mark.parametrize(("config", "reason"), [
    (configs.CudaConfig(8, 1, 1, 0), "K is 4096, more than 1 warps with 8 chunks a thread hold"),
    (configs.CudaConfig(3, 8, 1, 0), "chunks is 3, wanted 1 or 2 or 4 or 8"),
    (configs.CudaConfig(4, 4, 4, 1, 3), "chunks is 4, wanted no slots"),
    (configs.CudaConfig(1, 33, 1, 0), "warps x rows is 33 x 1, wanted at most 32 warps"),
    (configs.CudaConfig(2, 8, 2, 0), "rows is 2 of several warps"),
    (configs.CudaConfig(2, 8, 1, 4), "ctas 4, wanted a multiple of 16 and 0"),
])  # fmt: skip
def test_a_config_that_cannot_run_says_why(config, reason):
    sig = next(signatures(64, 4096, torch.bfloat16))
    assert re.search(reason, configs.why_not(sig, config))


# ---------------------------------------------------------------- bad input

X = torch.zeros(4, 16)
BAD_NORM = {
    "rank": (lambda: (X[0], X[0], 1e-6, {}), r"x's shape is \[16\], wanted \[M, K\]"),
    "weight": (lambda: (X, X[0, :8], 1e-6, {}), "K is 16 in x but 8 in weight"),
    "weight dtype": (lambda: (X.bfloat16(), X[0].half(), 1e-6, {}), "weight's dtype is torch.float16, wanted torch.bfloat16 or torch.float32"),
    "weight rank": (lambda: (X, X, 1e-6, {}), r"weight's shape is \[4, 16\], wanted \[K\]"),
    "eps": (lambda: (X, X[0], -1.0, {}), "eps is -1.0, wanted a finite number"),
    "eps nan": (lambda: (X, X[0], float("nan"), {}), "eps is nan, wanted a finite number"),
    "residual": (lambda: (X, X[0], 1e-6, {"residual": X[:3].clone()}), "M is 4 in x but 3 in residual"),
    "residual dtype": (lambda: (X, X[0], 1e-6, {"residual": X.half()}), "residual's dtype is torch.float16, wanted torch.float32"),
    "residual rows": (lambda: (X, X[0], 1e-6, {"residual": X[:1].clone().expand(4, 16)}), "residual's row stride is 0, wanted at least K"),
    "residual is x": (lambda: (X, X[0], 1e-6, {"residual": X}), "residual is x's memory, wanted memory of its own"),
    "dtype": (lambda: (X, X[0], 1e-6, {"dtype": torch.int32}), "out's dtype is torch.int32, wanted torch.int8 or torch.float8_e4m3fn"),
    "x dtype": (lambda: (X.double(), X[0], 1e-6, {}), "x's dtype is torch.float64"),
    "column stride": (lambda: (X[:, ::2], X[0, :8], 1e-6, {}), "x's last stride is 2, wanted 1"),
    "out": (lambda: (X, X[0], 1e-6, {"out": torch.zeros(4, 8, dtype=torch.int8)}), "K is 16 in x but 8 in out"),
    "impl": (lambda: (X, X[0], 1e-6, {"impl": "fast"}), "impl is 'fast', wanted one of"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_NORM)
def test_bad_rms_norm(name):
    make, message = BAD_NORM[name]
    x, weight, eps, options = make()
    with pytest.raises(ValueError, match=f"rms_norm_quantize: {message}"):
        attnkit.rms_norm_quantize(x, weight, eps, **options)


#: The three ops over x alone.
OPS = {
    "quantize_per_token": attnkit.quantize_per_token,
    "rms_norm_quantize": lambda x, **options: attnkit.rms_norm_quantize(x, torch.ones(x.shape[1]), 1e-6, **options),
    "silu_mul_quantize": attnkit.silu_mul_quantize,
}

BAD_SILU = {
    "rank": (lambda: (X[0], {}), r"x's shape is \[16\], wanted \[M, 2 K\]"),
    "odd": (lambda: (X[:, :15], {}), r"x's shape is \[4, 15\], wanted \[M, 2 K\]"),
    "dtype": (lambda: (X, {"dtype": torch.uint8}), "out's dtype is torch.uint8"),
    "out": (lambda: (X, {"out": torch.zeros(4, 16, dtype=torch.int8)}), "K is 8 in half of x but 16 in out"),
    "out layout": (lambda: (X, {"out": torch.zeros(4, 16, dtype=torch.int8)[:, :8]}), r"out's layout is strides \(16, 1\), wanted contiguous"),
    "config": (lambda: (X, {"impl": "torch", "config": 3}), "kernel torch takes no config, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_SILU)
def test_bad_silu_mul(name):
    make, message = BAD_SILU[name]
    x, options = make()
    with pytest.raises(ValueError, match=f"silu_mul_quantize: {message}"):
        attnkit.silu_mul_quantize(x, **options)


def test_bad_quantize():
    with pytest.raises(ValueError, match=r"quantize_per_token: x's shape is \[16\], wanted \[M, K\]"):
        attnkit.quantize_per_token(X[0])
    with pytest.raises(ValueError, match="quantize_per_token: out's layout is strides"):
        attnkit.quantize_per_token(X, out=torch.zeros(4, 32, dtype=torch.int8)[:, :16])


BAD_SCALE = {
    "length": (torch.zeros(3), "M is 4 in x but 3 in out_scale"),
    "rank": (torch.zeros(4, 1), r"out_scale's shape is \[4, 1\], wanted \[M\]"),
    "dtype": (torch.zeros(4, dtype=torch.bfloat16), "out_scale's dtype is torch.bfloat16, wanted torch.float32"),
    "layout": (torch.zeros(8)[::2], "out_scale's last stride is 2, wanted 1"),
}


@pytest.mark.parametrize("name", BAD_SCALE)
@pytest.mark.parametrize("op", OPS)
def test_bad_out_scale(op, name):
    scale, message = BAD_SCALE[name]
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        OPS[op](X, out_scale=scale)


@pytest.mark.parametrize("op", OPS)
def test_outputs_that_are_given_are_written(op):
    values, scale = OPS[op](X)
    out, out_scale = torch.zeros_like(values), torch.full_like(scale, float("nan"))
    got = OPS[op](X, out=out, out_scale=out_scale)
    assert got[0] is out and got[1] is out_scale
    assert torch.equal(out, values) and torch.equal(out_scale, scale)


# ---------------------------------------------------------------- as torch sees them


def test_opcheck():
    r, scale = torch.randn(4, 16), torch.zeros(4)
    x, out = torch.randn(4, 16), torch.zeros(4, 16, dtype=torch.int8)
    impl = "cpu"
    ops = torch.ops.attnkit
    torch.library.opcheck(ops.rms_norm_quantize.default, (x, x[0].clone(), r, out, scale, 1e-6, impl))
    torch.library.opcheck(ops.rms_norm_quantize.default, (x, x[0].clone(), None, out, scale, 1e-6, impl))
    torch.library.opcheck(ops.silu_mul_quantize.default, (torch.randn(4, 32), out, scale, impl))


def test_both_compile_into_one_graph():
    """A block's tail: norm, product, gate, product; the residual's new value is seen outside of the graph."""

    def block(x, residual, weight, w1, s1, w2, s2):
        a, scale = attnkit.rms_norm_quantize(x, weight, 1e-6, residual=residual)
        a, scale = attnkit.silu_mul_quantize(attnkit.w8a8_gemm(a, w1, scale, s1))
        return attnkit.w8a8_gemm(a, w2, scale, s2)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, residual = (torch.randn(5, 64, device=device).bfloat16() for _ in range(2))
    w1, s1 = attnkit.quantize_weight(torch.randn(96, 64, device=device))
    w2, s2 = attnkit.quantize_weight(torch.randn(64, 48, device=device))
    compiled = torch.compile(block, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (5, 3):
        mine, theirs = residual[:rows].clone(), residual[:rows].clone()
        args = (torch.ones(64, device=device).bfloat16(), w1, s1, w2, s2)
        assert torch.equal(compiled(x[:rows], mine, *args), block(x[:rows], theirs, *args))
        assert torch.equal(mine, theirs) and not torch.equal(mine, residual[:rows])


def test_an_input_that_requires_grad_is_refused():
    x = torch.randn(2, 16, requires_grad=True)
    for call in (lambda: attnkit.quantize_per_token(x), lambda: attnkit.silu_mul_quantize(x),
                 lambda: attnkit.rms_norm_quantize(x, X[0], 1e-6)):  # fmt: skip
        with pytest.raises(RuntimeError, match="an input requires grad"):
            call()
