"""The sm_90a W8A8 kernel for few tokens: its configs, its builds, and every kind of tile and split on the GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit import arch, dispatch, gemm
from attnkit.backends.cuda import gemm_skinny
from attnkit.backends.cuda.builds import gemm_skinny as builds
from attnkit.configs import gemm_skinny as configs
from attnkit.configs.gemm_skinny import SkinnyConfig
from perf.cases import LLAMA_8B, LLAMA_70B, QWEN_7B
from tests.test_gemm_cuda import DTYPES, H200, close, inputs, signature
from tests.test_launch import needs_nvcc, ptxas_report, struct_of

NAME = "cuda_sm90_skinny"
LAYERS = [*QWEN_7B, *LLAMA_8B, *LLAMA_70B]
TOKENS = (1, 2, 4, 8, 16, 17, 32, 64)


def test_params_mirror_the_struct():
    fields = gemm_skinny.PARAMS
    assert struct_of("gemm/gemm_skinny_sm90.cu", "SkinnyParams") == [*fields.offsets][:2] + [*fields.names]


@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
@pytest.mark.parametrize("shape", [*LAYERS, (1, 1), (4097, 1008), (33, 144), (16, 200), (151936, 3584)])
def test_every_config_fits(shape, dtype):
    """Shared memory for as many CTAs as are asked for, a slice of K for each split, a build for the width."""
    for M in (*TOKENS, 65, 100, 128):
        sig = signature(M, *shape, dtype)
        if M > builds.LOW and not configs.fits_tall(sig, H200):
            continue
        for c in configs.candidates(sig, H200):
            gemm_skinny._check(sig, c)
            assert builds.stages(M, c.block_n, c.splits, c.ctas, c.tall, c.deep) >= 3
            assert c.ctas * (configs.smem(c, sig) + 1024) <= 228 * 1024 and configs.smem(c, sig) <= H200.smem
            assert c.ctas <= builds.most_ctas(dtype == torch.int8, c.block_n, c.tall)
            assert builds.build(dtype == torch.int8, c.block_n, c.tall, c.deep) in builds.shipped()
        assert configs.default(sig, H200) == configs.candidates(sig, H200)[0]


@pytest.mark.parametrize("shape", LAYERS)
def test_the_layers_of_models_fill_their_rounds(shape):
    """One round of tiles, or whole ones: a last round of a few would find most of the multiprocessors idle."""
    for M in TOKENS:
        c = configs.default(signature(M, *shape), H200)
        tiles, rounds = -(-shape[0] // c.block_n), configs._rounds(signature(M, *shape), c.block_n, c.splits, H200)
        assert rounds == 1 or (c.splits == 1 and tiles > 0.9 * rounds * H200.sms)


@pytest.mark.parametrize("shape", LAYERS)
def test_more_tokens_are_never_expected_to_be_cheaper(shape):
    before = 0.0
    for M in range(1, 65):
        sig = signature(M, *shape)
        now = configs.time(sig, configs._every(sig, H200)[0], H200)
        assert now >= before
        before = now


def test_more_tokens_take_tall_tiles_where_they_come_out_even():
    """Two CTAs a tile, all at one time, or even rounds of whole tiles; the rest is left to the other kernel."""
    for N, K, width, splits in (
        (3584, 18944, 64, 2), (4096, 4096, 64, 2), (4608, 3584, 80, 2), (5280, 512, 80, 2), (6144, 4096, 96, 2),
        (8192, 8192, 64, 1), (28672, 4096, 112, 1),
    ):  # fmt: skip
        chosen = [configs.default(signature(M, N, K), H200) for M in (65, 100, 128)]
        assert all((c.block_n, c.splits, c.tall) == (width, splits, True) for c in chosen)
    for M, N, K in ((64, 4096, 4096), (129, 4096, 4096), (100, 8449, 4096), (100, 4096, 256), (128, 37888, 3584)):
        assert not configs.fits_tall(signature(M, N, K), H200)
    assert not configs.fits_tall(signature(100, 28672, 4096, torch.float8_e4m3fn), H200)


def test_a_config_without_a_build_or_room_is_refused():
    sig = signature(64, 4096, 4096)
    for c in (
        SkinnyConfig(80, 1, 1, 6, 0),
        SkinnyConfig(64, 3, 1, 6, 0),
        SkinnyConfig(224, 4, 2, 6, 0),
        SkinnyConfig(64, 1, 3, 6, 0),
        SkinnyConfig(64, 4, 1, 6, 0, tall=True),
        SkinnyConfig(144, 1, 1, 6, 0, tall=True),
        SkinnyConfig(112, 2, 1, 6, 0, tall=True, deep=True),
        SkinnyConfig(128, 2, 1, 6, 0, deep=True),
    ):
        with pytest.raises(ValueError, match="w8a8_gemm: "):
            gemm_skinny._check(sig, c)
    with pytest.raises(ValueError, match="M up to 64"):
        gemm_skinny._check(signature(65, 4096, 4096), SkinnyConfig(128, 2, 1, 6, 0))
    with pytest.raises(ValueError, match="splits is 4"):
        gemm_skinny._check(signature(1, 4096, 100), SkinnyConfig(128, 4, 1, 6, 0))


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("build", builds.shipped(), ids=lambda v: v.label)
def test_builds_compile_without_spills_or_serialised_products(build, tmp_path):
    report = ptxas_report(build, tmp_path)
    assert "C7510" not in report and "C7508" not in report, report
    assert re.search(r"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads", report), report
    macros = dict(build.macros)
    ctas = builds.most_ctas(bool(macros["ATTNKIT_INT8"]), macros["ATTNKIT_BN"], bool(macros["ATTNKIT_TALL"]))
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    # registers are given out by warp, in steps of 8 a thread, and each quarter of a multiprocessor has 512 x 32
    assert -(-registers // 8) * 8 * -(-builds.THREADS // 32 * ctas // 4) <= 512


def run(a, w, a_scale, w_scale, config=None, bias=None, out_dtype=torch.bfloat16):
    out = torch.full((a.shape[0], w.shape[0]), float("nan"), dtype=out_dtype, device=a.device)
    return attnkit.w8a8_gemm(a, w, a_scale, w_scale, bias=bias, out=out, impl=NAME, config=config)


def room(M, width, splits, ctas, tall=False, deep=False):
    return builds.stages(M, width, splits, ctas, tall, deep) >= 2


#: Columns of a tile, tall, deep: of either type.
TILES = [
    (width, tall, deep)
    for tall in (False, True)
    for deep in (False, True)
    for width in sorted({*builds.widths(True, tall, deep), *builds.widths(False, tall, deep)})
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize(("width", "tall", "deep"), TILES)
def test_every_tile_and_split_matches_float64(width, tall, deep, splits, dtype):
    """Rows that end inside every group, tiles that end early, an odd N, K that ends inside a slice; rings short and long."""
    if splits not in builds.splits(tall) or width not in builds.widths(dtype == torch.int8, tall, deep):
        pytest.skip("no such tile")
    for M, N, K, stages, ahead in (
        (1, 777, 1104, 2, 0),
        (17, 1001, 2000, 3, 3),
        (40, 300, 4112, 32, 2),
        (64, 1000, 1024, 5, 8),
        (65, 1001, 2000, 3, 3),
        (100, 777, 1104, 32, 2),
        (128, 1000, 1024, 5, 8),
    ):
        if M > builds.tokens(tall):
            continue
        a, w, a_scale, w_scale = inputs(M, N, K, dtype)
        bias = torch.randn(N, device="cuda").to(torch.float16)
        for ctas in range(1, builds.most_ctas(dtype == torch.int8, width, tall) + 1):
            if not room(M, width, splits, ctas, tall, deep):
                continue
            config = SkinnyConfig(width, splits, ctas, stages, ahead, tall, deep)
            first = run(a, w, a_scale, w_scale, config, bias)
            close(a, w, a_scale, w_scale, bias, first)
            assert all(torch.equal(first, run(a, w, a_scale, w_scale, config, bias)) for _ in range(20))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
def test_several_tiles_a_cta(dtype):
    """More tiles than multiprocessors: the ring goes on into the next. So many columns that tall tiles of 96 come out even."""
    int8 = dtype == torch.int8
    for M, width, tall, deep in (
        (1, 64, True, int8), (33, 96, True, int8), (64, 128, False, False), (64, 64, True, False), (100, 96, True, False),
    ):  # fmt: skip
        if M > builds.LOW and not int8:
            continue
        a, w, a_scale, w_scale = inputs(M, 264 * 96 - 59, 784, dtype)
        config = SkinnyConfig(width, 1, 1, 4, 2, tall, deep)
        close(a, w, a_scale, w_scale, None, run(a, w, a_scale, w_scale, config, out_dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1, 1, 16), (5, 33, 1), (64, 64, 128), (8, 200, 272)], ids=str)
def test_small_products(shape):
    M, N, K = shape
    wide = torch.randint(-127, 128, (M + N, -(-K // 16) * 16), device="cuda").to(torch.int8)
    a, w = wide[:M, :K], wide[M:, :K]
    scale = torch.full((1,), 0.01, device="cuda")
    close(a, w, scale, scale, None, run(a, w, scale, scale, out_dtype=torch.float32))


@pytest.mark.gpu
def test_nothing_beyond_the_output_is_written():
    a, w, a_scale, w_scale = inputs(30, 1001, 256, torch.int8)
    for out_dtype in (torch.bfloat16, torch.float32):
        wide = torch.full((32, 1040), 7.0, dtype=out_dtype, device="cuda")
        for columns in (1001, 1000):
            for config in (SkinnyConfig(128, 1, 1, 4, 0), SkinnyConfig(64, 1, 2, 6, 2, True, True)):
                attnkit.w8a8_gemm(
                    a, w[:columns], a_scale, w_scale[:columns], out=wide[1:31, :columns], impl=NAME, config=config
                )  # fmt: skip
            assert (wide[:, columns + 1 :] == 7).all() and (wide[0] == 7).all() and (wide[31] == 7).all()


@pytest.mark.gpu
def test_a_graph_replays_with_other_values():
    """Launches overlap: each must still see all that the one before it wrote, weights too (they are prefetched early)."""
    a, w, a_scale, w_scale = inputs(16, 4096, 4096, torch.int8)
    out, second = torch.empty(16, 4096, dtype=torch.bfloat16, device="cuda"), torch.empty(16, 4096, device="cuda")
    fresh = w.clone()

    def all_three():
        attnkit.w8a8_gemm(a, w, a_scale, w_scale, out=out, impl=NAME)
        torch.neg(fresh, out=w)
        attnkit.w8a8_gemm(out.view(torch.int8)[:, :4096], w, a_scale, w_scale, out=second, impl=NAME)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        all_three()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            all_three()
    torch.cuda.synchronize()
    for _ in range(3):
        old, new = (torch.randint(-127, 128, (4096, 4096), device="cuda").to(torch.int8) for _ in range(2))
        w.copy_(old)
        fresh.copy_(new)
        graph.replay()
        torch.cuda.synchronize()
        close(a, old, a_scale, w_scale, None, out)
        close(out.view(torch.int8)[:, :4096], -new, a_scale, w_scale, None, second)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
def test_thousands_of_launches_in_flight(dtype):
    """Nothing waits between them; the shapes and configs in which an earlier kernel of this kind once failed among them."""
    shapes = [(64, 4096, 14336), (64, 4096, 4096), (17, 6144, 4096), (1, 4608, 3584), (64, 3584, 3584), (100, 4608, 3584)]
    ways = [(64, 1, 1, True), (64, 2, 1, True), (160, 4, 1, False), (128, 4, 1, False), (96, 4, 1, False, dtype == torch.int8)]
    if dtype == torch.int8:
        ways += [(64, 1, 1, True, True), (64, 2, 2, True, True), (80, 2, 1, True, True)]
    sets = []
    for i, (M, N, K) in enumerate(shapes):
        x = inputs(M, N, K, dtype)
        fit = [way for way in ways if builds.tokens(way[3]) >= M and room(M, *way)]
        for config in (None, *(SkinnyConfig(*way[:3], stages, i, *way[3:]) for way in fit for stages in (2, 32))):
            sets.append((x, config, run(*x, config), torch.empty((M, N), dtype=torch.bfloat16, device="cuda")))
    order = torch.randint(len(sets), (3000,), generator=torch.Generator().manual_seed(3)).tolist()
    for i in order:
        x, config, _, out = sets[i]
        attnkit.w8a8_gemm(*x, out=out, impl=NAME, config=config)
    torch.cuda.synchronize()
    assert all(torch.equal(sets[i][2], sets[i][3]) for i in set(order))


@pytest.mark.gpu
def test_it_serves_few_tokens():
    if arch.of(torch.device("cuda")).sm != 90:
        pytest.skip("needs an sm_90 device")
    sig = replace(signature(64, 4096, 4096), device=torch.device("cuda"))
    assert dispatch.select(gemm.KERNELS, sig).name == NAME
    assert dispatch.select(gemm.KERNELS, replace(sig, M=65)).name == NAME
    assert "up to 64 tokens" in str(gemm_skinny.W8A8_GEMM.supports(replace(sig, M=65, N=9000)))
    assert "16-byte" in str(gemm_skinny.W8A8_GEMM.supports(replace(sig, operands_aligned=False)))
    assert "14 bits" in str(gemm_skinny.W8A8_GEMM.supports(replace(sig, dtype=torch.float8_e4m3fn, out_dtype=torch.float32)))
