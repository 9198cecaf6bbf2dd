"""What a GPU kernel owes under load: equal bits in many launches, other lengths at replay, offsets beyond 2^31."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import PageTable, reference, workload, workspace
from attnkit.workload import Case, Gemm, Quantize, Sample
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill
from attnkit.workload_cache import Merge, WriteKv, WriteLatent
from attnkit.workload_hidden import SampleFromHidden
from tests.close import assert_close
from tests.kernels import device_of, skip_if_declined

pytestmark = pytest.mark.gpu

UNEVEN = (3000, 3, 1, 640, 17, 2048)
#: Work that several CTAs share a row or a tile of, which is where a missing barrier shows.
CASES: list[Case] = [
    Decode(B=6, L=UNEVEN, Hq=32, Hkv=8, label="decode"),
    Decode(B=6, L=(3000, 9, 8, 640, 17, 2048), Hq=32, Hkv=1, Q=2, label="decode-wide"),
    Decode(B=6, L=UNEVEN, Hq=32, Hkv=1, label="decode-32-rows"),
    Decode(B=6, L=UNEVEN, Hq=32, Hkv=8, kv="fp8", label="decode-fp8"),
    Decode(B=48, L=UNEVEN * 8, Hq=32, Hkv=8, kv="fp8", label="decode-fp8-by-twos"),
    Decode(B=2, L=(2000, 700), Hq=12, Hkv=2, label="decode-cluster"),
    Decode(B=48, L=UNEVEN * 8, Hq=32, Hkv=8, label="decode-charged"),
    Decode(B=1, L=60000, Hq=12, Hkv=2, label="decode-share"),
    Decode(B=1, L=60000, Hq=32, Hkv=1, label="decode-share-32-rows"),
    Prefill(B=6, L=UNEVEN, Hq=8, Hkv=2, label="prefill"),
    Prefill(B=2, n=64, L=(9000, 4100), Hq=8, Hkv=1, label="prefill-chunk"),
    Prefill(B=6, L=UNEVEN, Hq=8, Hkv=2, kv="fp8", label="prefill-fp8"),
    Prefill(B=2, n=64, L=(9000, 4100), Hq=8, Hkv=1, kv="int8", label="prefill-chunk-int8"),
    MlaDecode(B=6, L=UNEVEN, H=16),
    MlaDecode(B=6, L=UNEVEN, H=128),
    MlaPrefill(B=3, L=500, H=4),
    Gemm(M=17, N=4608, K=3584),
    Gemm(M=9, N=3584, K=18944, dtype="fp8"),
    Gemm(M=64, N=4096, K=14336),
    Gemm(M=200, N=4608, K=3584, dtype="fp8", bias=True),
    Quantize(M=300, K=4096),
    Sample(B=5, V=131072, top_k=50, top_p=0.9),
    Sample(B=5, V=50257, top_p=0.95, dtype="bf16"),
    Sample(B=5, V=50257, top_p=0.1, penalties=True),
    Sample(B=5, V=151936),
    Sample(B=5, V=131072, top_k=1000, min_p=0.01, penalties=True),
    SampleFromHidden(B=5, V=50257, H=768),
    SampleFromHidden(B=32, V=20000, H=1032, temperature=0.0),
    SampleFromHidden(B=9, V=20000, H=1032, top_k=50, top_p=0.9),
    WriteKv(T=300, Hkv=8, kv="fp8"),
    WriteLatent(T=300),
    Merge(T=70, Hq=32),
]


def gpu_pairs(cases: list[Case]) -> list:
    return [
        pytest.param(case, kernel.name, id=f"{kernel.name}-{case.name}")
        for case in cases
        for kernel in case.kernels()
        if device_of(kernel) == "cuda" and kernel.impl != "flashinfer"
    ]


def right(case: Case, x: dict, run) -> torch.Tensor:
    """The output of one call on a poisoned one, held against the reference."""
    error = skip_if_declined(lambda: workload.checked_error(case, x, run))
    assert error <= case.limit
    return x["out"].clone()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize(("case", "kernel"), gpu_pairs(CASES))
def test_250_repeats_and_10000_undrained_launches(case, kernel):
    x = case.build(torch.device("cuda"))
    run = case.call(x, kernel)
    first = right(case, x, run)
    for _ in range(250):
        case.poison(x)
        run()
        assert same_bits(x["out"], first)
    case.poison(x)
    for _ in range(10_000):
        run()
    torch.cuda.synchronize()
    assert same_bits(x["out"], first)
    assert all(int(held.count_nonzero()) == 0 for held in workspace._eager_counters.values())


@pytest.mark.parametrize(
    ("case", "kernel"),
    gpu_pairs(
        [
            Decode(B=4, L=1024, Hq=8, Hkv=2, label="decode-cluster"),
            Decode(B=2, L=30000, Hq=12, Hkv=2, label="decode-share"),
            Prefill(B=4, n=96, L=1024, Hq=8, Hkv=2),
            Prefill(B=2, n=64, L=8192, Hq=8, Hkv=1),
            MlaDecode(B=4, L=2048, H=16),
            MlaDecode(B=4, L=2048, H=128, Q=2),
        ]
    ),
)
def test_a_captured_graph_replays_over_100_sets_of_lens(case, kernel):
    """Lengths (and for prefill the queries' bounds) change under a captured graph; decode's other forms are in test_faults.py."""
    x = case.build(torch.device("cuda"))
    run = case.call(x, kernel)
    right(case, x, run)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    g = torch.Generator().manual_seed(0)
    for i in range(100):
        lens = torch.randint(0, case.L + 1, (case.B,), generator=g)
        lens[i % case.B] = (0, 1, case.L, 16, 17, 15)[i % 6]
        if isinstance(case, Prefill):
            counts = torch.minimum(lens, torch.randint(0, case.n + 1, (case.B,), generator=g))
            x["cu_q"].copy_(torch.tensor([0, *counts.cumsum(0)]))
        x["lens"].copy_(lens)
        case.poison(x)
        graph.replay()
        replayed = x["out"].clone()
        case.poison(x)
        run()
        assert same_bits(replayed, x["out"])


def far_pool(used: int, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 pool of more than 2^31 elements of which only the last ``used`` pages hold anything, and those pages."""
    page = torch.Size(shape).numel()
    P = 2**31 // page + used + 2
    pool = torch.empty(P, *shape, dtype=torch.bfloat16, device="cuda")
    pool[-used:].normal_()
    return pool, torch.arange(P - used, P, dtype=torch.int32, device="cuda")


@pytest.mark.parametrize("kernel", [p.values[1] for p in gpu_pairs([Decode(B=1, L=8, Hq=8, Hkv=2)])])
def test_decode_and_prefill_read_pages_beyond_2_31_elements(kernel):
    k, pages = far_pool(4, (16, 8, 128))
    v = torch.empty_like(k)
    v[-4:].normal_()
    table = PageTable(pages[None], torch.tensor([61], dtype=torch.int32, device="cuda"))
    near = PageTable(torch.arange(4, dtype=torch.int32, device="cuda")[None], table.lens)
    q = torch.randn(1, 32, 128, dtype=torch.bfloat16, device="cuda")
    cu_q = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    for op, rest in ((attnkit.paged_decode, ()), (attnkit.paged_prefill, (cu_q,))):
        far = skip_if_declined(lambda op=op, rest=rest: op(q, (k, v), table, *rest, impl=kernel))
        assert same_bits(far, op(q, (k[-4:].clone(), v[-4:].clone()), near, *rest, impl=kernel))


@pytest.mark.parametrize("kernel", [p.values[1] for p in gpu_pairs([WriteKv(T=1, Hkv=1)])])
def test_write_kv_reaches_slots_beyond_2_31_elements(kernel):
    pool, pages = far_pool(4, (2, 16, 8, 128))
    near = pool[-4:].clone()
    k, v = torch.randn(2, 37, 8, 128, dtype=torch.bfloat16, device="cuda")
    at = torch.randperm(64, device="cuda")[:37]
    skip_if_declined(lambda: attnkit.write_kv(k, v, pool, pages[0] * 16 + at, impl=kernel))
    attnkit.write_kv(k, v, near, at, impl=kernel)
    assert same_bits(pool[-4:], near)


@pytest.mark.parametrize("H", [16, 128])
@pytest.mark.parametrize("kernel", [p.values[1] for p in gpu_pairs([MlaDecode(B=1, L=8, H=16)])])
def test_mla_decode_reads_pages_beyond_2_31_elements(kernel, H):
    kv, pages = far_pool(4, (64, 576))
    table = PageTable(pages[None], torch.tensor([250], dtype=torch.int32, device="cuda"))
    near = PageTable(torch.arange(4, dtype=torch.int32, device="cuda")[None], table.lens)
    q = torch.randn(1, H, 576, dtype=torch.bfloat16, device="cuda")
    far = skip_if_declined(lambda: attnkit.mla_decode(q, kv, table, impl=kernel))
    assert same_bits(far, attnkit.mla_decode(q, kv[-4:].clone(), near, impl=kernel))


@pytest.mark.parametrize("M", [3, 70])
@pytest.mark.parametrize("kernel", [p.values[1] for p in gpu_pairs([Gemm(M=1, N=8, K=16)])])
def test_gemm_weights_beyond_2_31_elements(kernel, M):
    N, K = 2**31 // 8192 + 256, 8192
    w = torch.empty(N, K, dtype=torch.int8, device="cuda")
    w[-128:].random_(-127, 128)
    a = torch.randint(-127, 128, (M, K), dtype=torch.int8, device="cuda")
    scales = torch.rand(M, device="cuda"), torch.rand(N, device="cuda")
    out = skip_if_declined(lambda: attnkit.w8a8_gemm(a, w, *scales, impl=kernel))
    truth = reference.w8a8_gemm(a, w[-128:], scales[0], scales[1][-128:], None, torch.float64)
    assert_close(out[:, -128:], truth, truth.to(out.dtype))


@pytest.mark.parametrize("kernel", [p.values[1] for p in gpu_pairs([Sample(B=1, V=8)])])
def test_sample_reads_rows_beyond_2_31_elements(kernel):
    V = 131072
    B = 2**31 // V + 3
    logits = torch.empty(B, V, dtype=torch.bfloat16, device="cuda").fill_(-1.0)
    logits[-3:].normal_(0, 3)
    seed = torch.arange(B, device="cuda")
    tokens = skip_if_declined(lambda: attnkit.sample(logits, seed=seed, top_k=50, impl=kernel)).tokens
    near = attnkit.sample(logits[-3:].clone(), seed=seed[-3:].clone(), top_k=50, impl=kernel).tokens
    assert torch.equal(tokens[-3:], near)
