"""The sm_90a W8A8 kernel for many rows: its configs, its builds, and every kind of cluster on the GPU."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit import arch, dispatch, gemm, reference
from attnkit.arch import Arch
from attnkit.backends.cuda import gemm as cuda_gemm
from attnkit.backends.cuda.builds import gemm as builds
from attnkit.configs import gemm_cuda
from attnkit.configs.gemm_cuda import CLUSTERS, CudaConfig
from attnkit.signature import GemmSig
from perf.cases import LLAMA_8B, LLAMA_70B, QWEN_7B
from tests.close import assert_close
from tests.test_gemm import operand
from tests.test_launch import needs_nvcc, ptxas_report, struct_of

H200 = Arch("nvidia-h200", 90, 132, 227 * 1024, 60 << 20)
DTYPES = (torch.int8, torch.float8_e4m3fn)


def signature(M: int, N: int, K: int, dtype: torch.dtype = torch.int8) -> GemmSig:
    return GemmSig(
        op="w8a8_gemm", device=torch.device("cpu"), dtype=dtype, out_dtype=torch.bfloat16, M=M, N=N, K=K, a_stride=(K, 1),
        w_stride=(K, 1), out_stride=(N, 1), operands_aligned=True, aligned=True, a_scale_per_token=True,
        w_scale_per_channel=True, bias=None,
    )  # fmt: skip


def test_params_mirror_the_struct():
    assert struct_of("gemm/gemm_sm90.cu", "GemmParams") == [*cuda_gemm.PARAMS.offsets][:2] + [*cuda_gemm.PARAMS.names]


@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
@pytest.mark.parametrize("shape", [*QWEN_7B, *LLAMA_8B, *LLAMA_70B, (1, 16), (4097, 1008), (33, 144), (16, 200)])
def test_every_config_fits(shape, dtype):
    """Shared memory, slices of whole swizzle groups, a stretch of K for each split, a build for the width."""
    for M in (1, 65, 128, 129, 500, 4096, 100_000):
        sig = signature(M, *shape, dtype)
        for c in gemm_cuda.candidates(sig, H200):
            stages = builds.stages(c.block_m, c.block_n)
            assert 3 <= stages and gemm_cuda.smem(c, sig) <= H200.smem
            assert c.block_m // c.cluster_n % 8 == 0 and c.block_n // c.cluster_m % 8 == 0
            assert c.splits <= -(-sig.K // 128) and 1 <= c.group <= gemm_cuda.cluster_tiles(sig, c)[0]
            box = cuda_gemm.a_box(M, c)
            assert box % 8 == 0 and min(M, c.block_m) <= box * c.cluster_n <= c.block_m
            assert builds.build(dtype == torch.int8, c.block_m, c.block_n, c.turns) in builds.shipped()
        assert gemm_cuda.default(sig, H200) == gemm_cuda.candidates(sig, H200)[0]


@pytest.mark.parametrize("shape", [*QWEN_7B, *LLAMA_8B, *LLAMA_70B])
def test_more_rows_are_never_expected_to_be_cheaper(shape):
    """A config that serves M rows serves fewer as well: the choice has no cliff that a neighbour would have avoided."""
    before = 0.0
    for M in range(65, 1025, 15):
        sig = signature(M, *shape)
        now = gemm_cuda.cycles(sig, gemm_cuda.default(sig, H200), H200)
        assert now >= 0.97 * before
        before = now


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("build", builds.shipped(), ids=lambda v: v.label)
def test_builds_compile_without_spills_or_serialised_products(build, tmp_path):
    report = ptxas_report(build, tmp_path)
    assert "C7510" not in report and "C7508" not in report, report
    # the widest keep a few words of a tile's bookkeeping on the stack, outside the loop over K
    assert int(re.search(r"(\d+) bytes stack frame", report)[1]) <= (
        32 if "BN256" in build.label or "TURNS1" in build.label else 0
    )


def close(a, w, a_scale, w_scale, bias, got) -> None:
    truth = reference.w8a8_gemm(a, w, a_scale, w_scale, bias)
    plain = reference.w8a8_gemm(a, w, a_scale, w_scale, bias, torch.float32).to(got.dtype)
    assert_close(got, truth, plain)


def run(a, w, a_scale, w_scale, config, bias=None, out_dtype=torch.bfloat16):
    out = torch.full((a.shape[0], w.shape[0]), float("nan"), dtype=out_dtype, device=a.device)
    return attnkit.w8a8_gemm(a, w, a_scale, w_scale, bias=bias, out=out, impl="cuda_sm90", config=config)


def inputs(M, N, K, dtype):
    a, w = operand(M, K, dtype, "cuda", 0, 1), operand(N, K, dtype, "cuda", 0, 2)
    return a, w, torch.rand(M, device="cuda") / 100, torch.rand(N, device="cuda") / 100


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
@pytest.mark.parametrize("shape", [(520, 2000, 2048, 176), (300, 1001, 1104, 144), (1000, 9000, 640, 64)], ids=str)
def test_every_cluster_matches_float64(shape, cluster, dtype):
    """Rows, columns and K that end inside tiles; more tiles than CTAs; an odd N, whose rows do not start aligned."""
    M, N, K, width = shape
    if dtype != torch.int8:
        width = -(-width // 32) * 32
    config = CudaConfig(128, width, *cluster, 3)
    a, w, a_scale, w_scale = inputs(M, N, K, dtype)
    bias = torch.randn(N, device="cuda").to(torch.float16)
    close(a, w, a_scale, w_scale, bias, run(a, w, a_scale, w_scale, config, bias))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
@pytest.mark.parametrize("cluster", CLUSTERS, ids=str)
@pytest.mark.parametrize(
    "shape", [(100, 1008, 640), (65, 1001, 2000), (192, 4104, 1040), (33, 160, 1104), (130, 144, 4096)], ids=str
)
def test_tiles_that_would_end_outside_match_float64(shape, cluster, dtype):
    """They are moved back inside, and a load of a brings no more rows than there are."""
    M, N, K = shape
    a, w, a_scale, w_scale = inputs(M, N, K, dtype)
    for width in (64, 128, 192):
        config = CudaConfig(128, width, *cluster, 1)
        first = run(a, w, a_scale, w_scale, config)
        close(a, w, a_scale, w_scale, None, first)
        assert torch.equal(first, run(a, w, a_scale, w_scale, config))


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "width"), [(d, n) for d in DTYPES for n in builds.WIDTHS[d == torch.int8]])
def test_every_width_matches_float64(dtype, width):
    a, w, a_scale, w_scale = inputs(257, 1500, 1000 // 16 * 16, dtype)
    config = CudaConfig(128, width, 2, 1, 1, 2)
    close(a, w, a_scale, w_scale, None, run(a, w, a_scale, w_scale, config, out_dtype=torch.float16))


@pytest.mark.gpu
@pytest.mark.parametrize("width", builds.TURN_WIDTHS)
@pytest.mark.parametrize("cluster", gemm_cuda.TURN_CLUSTERS, ids=str)
def test_turns_match_float64_and_repeat(cluster, width):
    """Fewer tiles than CTAs, a few for each, and K of less than a round of the ring."""
    for M, N, K in ((200, 300, 1024), (1000, 9001, 2000), (1100, 5000, 208)):
        config = CudaConfig(128, width, *cluster, 3, turns=True)
        a, w, a_scale, w_scale = inputs(M, N, K, torch.int8)
        bias = torch.randn(N, device="cuda")
        first = run(a, w, a_scale, w_scale, config, bias)
        close(a, w, a_scale, w_scale, bias, first)
        assert all(torch.equal(first, run(a, w, a_scale, w_scale, config, bias)) for _ in range(80))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=["int8", "e4m3"])
@pytest.mark.parametrize("splits", [1, 2, 4])
def test_repeats_are_bitwise_equal(splits, dtype):
    a, w, a_scale, w_scale = inputs(130, 3584, 3584, dtype)
    config = CudaConfig(128, 128, 1, 1, splits, 2)
    first = run(a, w, a_scale, w_scale, config)
    assert all(torch.equal(first, run(a, w, a_scale, w_scale, config)) for _ in range(250))


@pytest.mark.gpu
@pytest.mark.parametrize("width", [n for n in builds.WIDTHS[False] if builds.parts(False, n) == 2])
@pytest.mark.parametrize("slices", [1, 2, 3, 4, 5, 8])
def test_two_sets_of_sums_over_several_tiles(slices, width):
    """Odd and even numbers of slices, one tile a CTA and several: the next tile's first product is in flight by the end of one."""
    for M, N, clusters in ((100, 1000, (1, 1, 1)), (700, 9001, (2, 1, 1)), (1000, 9000, (1, 1, 1)), (600, 9000, (2, 2, 1))):
        a, w, a_scale, w_scale = inputs(M, N, slices * 128 - 16, torch.float8_e4m3fn)
        config = CudaConfig(128, width, *clusters, 3)
        first = run(a, w, a_scale, w_scale, config)
        close(a, w, a_scale, w_scale, None, first)
        assert all(torch.equal(first, run(a, w, a_scale, w_scale, config)) for _ in range(20))


@pytest.mark.gpu
def test_nothing_beyond_the_output_is_written():
    a, w, a_scale, w_scale = inputs(130, 1001, 256, torch.int8)
    for out_dtype in (torch.bfloat16, torch.float32):
        wide = torch.full((132, 1040), 7.0, dtype=out_dtype, device="cuda")
        for columns in (1001, 1000):
            attnkit.w8a8_gemm(
                a, w[:columns], a_scale, w_scale[:columns], out=wide[1:131, :columns], impl="cuda_sm90",
                config=CudaConfig(128, 96, 2, 1, 1, 1),
            )  # fmt: skip
            assert (wide[:, columns + 1 :] == 7).all() and (wide[0] == 7).all() and (wide[131] == 7).all()


@pytest.mark.gpu
def test_a_graph_replays_with_other_values():
    """Launches overlap their starts: each must still see all that the one before it wrote."""
    a, w, a_scale, w_scale = inputs(256, 4096, 4096, torch.int8)
    out, second = torch.empty(256, 4096, dtype=torch.bfloat16, device="cuda"), torch.empty(256, 256, device="cuda")
    small = w[:256].contiguous()

    def both():
        attnkit.w8a8_gemm(a, w, a_scale, w_scale, out=out, impl="cuda_sm90")
        attnkit.w8a8_gemm(a, out.view(torch.int8)[:, :4096], a_scale, a_scale, out=second, impl="cuda_sm90")
        a[:, :256].copy_(small[:, :256])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            both()
    torch.cuda.synchronize()
    for seed in range(3):
        a.copy_(operand(256, 4096, torch.int8, "cuda", 0, 10 + seed))
        kept = a.clone()
        graph.replay()
        torch.cuda.synchronize()
        close(kept, w, a_scale, w_scale, None, out)
        close(kept, out.view(torch.int8)[:, :4096], a_scale, a_scale, None, second)


@pytest.mark.gpu
def test_it_serves_many_rows():
    if arch.of(torch.device("cuda")).sm != 90:
        pytest.skip("needs an sm_90 device")
    sig = replace(signature(512, 4096, 4096), device=torch.device("cuda"))
    assert dispatch.select(gemm.KERNELS, sig).name == "cuda_sm90"
    assert "16-byte" in str(cuda_gemm.W8A8_GEMM.supports(replace(sig, operands_aligned=False)))
