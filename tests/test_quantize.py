"""quantize_per_token is bit-equal to its formula; its fused forms stay within the tolerance of float64."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch

import attnkit
from attnkit import arch, reference
from attnkit.configs import quantize as configs
from attnkit.quantize import KERNELS, RMS_NORM_KERNELS, SILU_MUL_KERNELS
from attnkit.signature import QuantSig, RmsNormQuantSig, SiluMulQuantSig
from tests.close import assert_close
from tests.kernels import every, skip_if_declined

OUT = pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=["int8", "e4m3"])
IN = pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
#: M, K, and what a row has in memory beyond K. On the GPU the last rows exceed what one CTA's registers hold.
SHAPES = [(1, 8, 0), (9, 275, 25), (5, 264, 8), (3, 1024, 0), (2, 20000, 16)]
LARGE = [(4096, 4096, 0), (300, 14336, 0), (257, 3584, 64), (9, 24576, 16), (64, 53248, 0), (7, 40008, 8)]
NAN = float("nan")


def rows(shape: tuple[int, int, int], dtype: torch.dtype, device: str, seed: int = 0, columns: int = 1) -> torch.Tensor:
    """[M, K * columns], rows of unlike size, one of zeros; what lies behind a row in memory is NaN."""
    M, K, pad = shape
    K *= columns
    g = torch.Generator(device=device).manual_seed(seed)
    wide = torch.full((M, K + pad), NAN, device=device)
    wide[:, :K] = torch.randn(M, K, generator=g, device=device) * torch.rand(M, 1, generator=g, device=device) * 4
    if M > 1:
        wide[1, :K] = 0
    return wide.to(dtype)[:, :K]


def poisoned(M: int, K: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full((M, K), 0x7F, dtype=torch.uint8, device=device).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------- quantize_per_token


def check_plain(x: torch.Tensor, dtype: torch.dtype, impl: str) -> None:
    out = poisoned(*x.shape, dtype, x.device)
    got, scale = skip_if_declined(lambda: attnkit.quantize_per_token(x, dtype=dtype, out=out, impl=impl))
    want, want_scale = reference.quantize_per_token(x, dtype)
    assert got is out and torch.equal(scale, want_scale) and same_bits(got, want)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@OUT
@IN
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_quantize_is_bit_equal(shape, x_dtype, dtype, impl, device):
    x = rows(shape, x_dtype, device)
    if shape[1] >= 20 and shape[0] > 2:
        x[2, :20] = torch.arange(20, device=device) - 9.5  # ties of round-half-even once scaled
        x[2, 20:] = 0
        x[2, 0] = 127
    check_plain(x, dtype, impl)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id not in ("cpu", "torch")])
@OUT
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_large_is_bit_equal(shape, dtype, impl, device):
    check_plain(rows(shape, torch.bfloat16, device), dtype, impl)


@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id != "triton" or torch.cuda.is_available()])
@OUT
@pytest.mark.parametrize(("x_dtype", "mantissa"), [(torch.bfloat16, 7), (torch.float16, 10)], ids=["bf16", "fp16"])
def test_every_quotient_of_16_bit_values(x_dtype, mantissa, dtype, impl, device):
    """All pairs (x, amax) but for a common power of two, down to where x rounds to zero: no division is off by a bit."""
    if impl in ("cpu", "torch") and mantissa > 7:
        pytest.skip("a division instruction: tried with bf16")
    tops = 4096 + torch.arange(2**mantissa, device=device) * 2.0 ** (12 - mantissa)
    values = torch.cat([tops * 2.0**-e for e in range(24)] + [tops.new_zeros(8)])
    values[::3] *= -1  # and a zero keeps its sign
    for top in tops.split(128):
        x = torch.where(values.abs() <= top[:, None], values, -0.0).to(x_dtype)
        check_plain(torch.cat([x, top[:, None].to(x_dtype).expand(-1, 8)], 1), dtype, impl)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@OUT
@pytest.mark.parametrize("size", [1e-45, 3e-44, 1e-40, 1e-36, 1e-20, 1e20, 1e36, 3e38])
def test_scales_at_the_ends_of_float32(size, dtype, impl, device):
    x = torch.linspace(-1, 1, 64, device=device).mul(size).expand(3, 64).contiguous()
    for x_dtype in (torch.float32, torch.bfloat16):
        check_plain(x.to(x_dtype), dtype, impl)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@OUT
def test_a_nan_stays_in_its_row(dtype, impl, device):
    x = torch.randn(4, 64, device=device)
    clean, clean_scale = skip_if_declined(lambda: attnkit.quantize_per_token(x, dtype=dtype, impl=impl))
    x[2, 5] = NAN
    got, scale = attnkit.quantize_per_token(x, dtype=dtype, impl=impl)
    others = [0, 1, 3]
    assert same_bits(got[others], clean[others]) and torch.equal(scale[others], clean_scale[others])
    assert scale[2].isnan()


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_an_infinity_stays_in_its_row(impl, device):
    x = torch.randn(3, 64, device=device)
    x[1, 5] = -float("inf")
    got, scale = skip_if_declined(lambda: attnkit.quantize_per_token(x, impl=impl))
    assert scale[1] == float("inf") and (got[1] == 0).all() and scale[[0, 2]].isfinite().all()


# ---------------------------------------------------------------- the fused forms


def close_to(y: torch.Tensor, got: torch.Tensor, scale: torch.Tensor) -> None:
    """values * scale against the float64 y, held to the error of quantising y itself."""
    plain, plain_scale = reference.quantize_per_token(y.float(), got.dtype)
    assert_close(got.float() * scale[:, None], y, plain.float() * plain_scale[:, None])
    assert_close(scale, plain_scale.double(), plain_scale, "scale")


def check_rms_norm(shape, x_dtype, dtype, impl, device, residual: bool, weight_dtype=None) -> None:
    M, K, pad = shape
    x, eps = rows(shape, x_dtype, device), 1e-5
    before = rows((M, K, 2 * pad), x_dtype, device, 1) if residual else None
    r = None if before is None else torch.full((M, K + pad), NAN, dtype=x_dtype, device=device)[:, :K].copy_(before)
    w = (1 + 0.2 * torch.randn(K, generator=torch.Generator(device).manual_seed(2), device=device)).to(weight_dtype or x_dtype)
    kept, out = x.clone(), poisoned(M, K, dtype, device)
    got, scale = skip_if_declined(lambda: attnkit.rms_norm_quantize(x, w, eps, residual=r, dtype=dtype, out=out, impl=impl))
    y, h = reference.rms_norm(x, w, eps, before)
    assert got is out and torch.equal(x, kept)
    if r is not None:
        assert torch.equal(r, h)
    close_to(y, got, scale)
    if M > 1:
        assert scale[1] == 1 and (got[1].float() == 0).all()


@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
@OUT
@IN
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_rms_norm_matches_float64(shape, residual, x_dtype, dtype, impl, device):
    check_rms_norm(shape, x_dtype, dtype, impl, device, residual)


@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
def test_rms_norm_takes_a_float32_weight(impl, device):
    check_rms_norm((5, 264, 8), torch.bfloat16, torch.int8, impl, device, True, torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(RMS_NORM_KERNELS) if p.id not in ("cpu", "torch")])
@OUT
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_large_rms_norm_matches_float64(shape, dtype, impl, device):
    check_rms_norm(shape, torch.bfloat16, dtype, impl, device, True)


def check_silu_mul(shape, x_dtype, dtype, impl, device) -> None:
    M, K, pad = shape
    x = rows(shape, x_dtype, device, columns=2)
    if M > 2:
        x[2, : min(K, 4)] = torch.tensor([-200.0, -90.0, 90.0, 200.0], device=device)[:K]  # where exp leaves float32
    out = poisoned(M, K, dtype, device)
    got, scale = skip_if_declined(lambda: attnkit.silu_mul_quantize(x, dtype=dtype, out=out, impl=impl))
    assert got is out
    close_to(reference.silu_mul(x), got, scale)
    if M > 1:
        assert scale[1] == 1 and (got[1].float() == 0).all()


@pytest.mark.parametrize(("impl", "device"), every(SILU_MUL_KERNELS))
@OUT
@IN
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_silu_mul_matches_float64(shape, x_dtype, dtype, impl, device):
    check_silu_mul(shape, x_dtype, dtype, impl, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(SILU_MUL_KERNELS) if p.id not in ("cpu", "torch")])
@OUT
@pytest.mark.parametrize("shape", LARGE, ids=lambda s: "M{}-K{}-pad{}".format(*s))
def test_large_silu_mul_matches_float64(shape, dtype, impl, device):
    check_silu_mul(shape, torch.bfloat16, dtype, impl, device)


@pytest.mark.parametrize("value", [NAN, float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
@OUT
def test_rms_norm_keeps_a_bad_row_to_itself(dtype, impl, device, value):
    x, w = torch.randn(4, 64, device=device), torch.ones(64, device=device)
    run = lambda: attnkit.rms_norm_quantize(x, w, 1e-6, dtype=dtype, impl=impl)  # noqa: E731
    clean, clean_scale = skip_if_declined(run)
    x[2, 5] = value
    got, scale = run()
    others = [0, 1, 3]
    assert same_bits(got[others], clean[others]) and torch.equal(scale[others], clean_scale[others])
    assert scale[2].isnan() and (got[2] == 0 if dtype == torch.int8 else got[2].float().isnan()).all()


@pytest.mark.parametrize(("impl", "device"), every(SILU_MUL_KERNELS))
@OUT
@pytest.mark.parametrize("column", [5, 64 + 5], ids=["gate", "up"])
def test_silu_mul_keeps_a_bad_row_to_itself(column, dtype, impl, device):
    x = torch.randn(4, 128, device=device)
    run = lambda: attnkit.silu_mul_quantize(x, dtype=dtype, impl=impl)  # noqa: E731
    clean, clean_scale = skip_if_declined(run)
    x[2, column] = NAN
    got, scale = run()
    others = [0, 1, 3]
    assert same_bits(got[others], clean[others]) and torch.equal(scale[others], clean_scale[others])
    assert scale[2].isnan()


@pytest.mark.parametrize(("impl", "device"), every(RMS_NORM_KERNELS))
def test_a_rows_bits_do_not_depend_on_its_place(impl, device):
    """Alone, in a short batch and in a long one: the same codes, scale and residual. So many rows that sums in another order,
    which one row in seven shows, cannot pass."""
    g = torch.Generator(device=device).manual_seed(0)
    x, r = (torch.randn(300, 1024, generator=g, device=device).bfloat16() for _ in range(2))
    w = torch.randn(1024, generator=g, device=device).bfloat16()
    if impl == "triton" and device == "cpu":
        x, r = x[:20], r[:20]
    runs = []
    several, one = slice(3, 203), slice(5, 6)
    for part in (slice(None), several, one):
        mine = r[part].clone()
        runs.append(
            (*skip_if_declined(lambda p=part, m=mine: attnkit.rms_norm_quantize(x[p], w, 1e-6, residual=m, impl=impl)), mine)
        )
    for among_all, among_several, alone in zip(*runs):
        assert torch.equal(among_all[one], alone)
        assert torch.equal(among_all[several], among_several)


@pytest.mark.parametrize("M", [0, 3])
def test_empty(M):
    x = torch.randn(M, 0) if M else torch.randn(0, 64)
    values, scale = attnkit.quantize_per_token(x)
    assert values.shape == x.shape and (scale == 1).all() and scale.shape == (M,)
    values, scale = attnkit.silu_mul_quantize(x)
    assert values.shape == (M, x.shape[1] // 2) and (scale == 1).all()
    values, scale = attnkit.rms_norm_quantize(x, torch.ones(x.shape[1]), 1e-6)
    assert values.shape == x.shape and scale.shape == (M,)


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
    "eps nan": (lambda: (X, X[0], NAN, {}), "eps is nan, wanted a finite number"),
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
