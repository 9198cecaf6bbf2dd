"""paged_decode by clusters of CTAs that meet in shared memory, whatever the default config would take."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import attnkit
from attnkit.backends.cuda.builds import decode as builds
from attnkit.configs import decode_cuda
from attnkit.configs.decode_cuda import CudaConfig
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import skip_if_declined
from tests.test_decode import run

BASE = replace(cases.BASE, lens=(0, 1, 64, 65, 513, 3000), Hq=8, D=128)
CASES = [
    BASE,
    replace(BASE, Hq=6, dtype=torch.float16, S=64),
    replace(BASE, Hq=4, Q=4, tree=True, lens=(4, 5, 70, 2000)),
    replace(BASE, window=100, softcap=20.0, sinks=True),
    replace(BASE, Hq=2, Q=4, window=33),
]
CLUSTERS = list(dict.fromkeys(config for _, *ways in decode_cuda.CLUSTERS for _, config in ways))
#: Compiled on first use.
RARE = [
    replace(BASE, D=64, Hq=14),
    replace(BASE, D=256, Hq=2),
    replace(BASE, kv_dtype=torch.int8, scales="head"),
    replace(BASE, kv_dtype=torch.float8_e4m3fn, scales="head"),
]


def config_id(config: CudaConfig) -> str:
    return f"{config.cluster}x{config.ctas_per_sm}" + (f"-late{config.late}" if config.late else "")


@pytest.mark.gpu
@pytest.mark.parametrize("config", CLUSTERS, ids=config_id)
@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_matches_float64(case, config):
    x, out, lse = run(case, "cuda_sm90", "cuda", config=config)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")
    for _ in range(3):
        again = run(case, "cuda_sm90", "cuda", config=config)
        assert torch.equal(again[1], out) and torch.equal(again[2], lse)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [CudaConfig(2, 100, 1, cluster=3), CudaConfig(1, 100, 1, cluster=16)], ids=config_id)
@pytest.mark.parametrize("case", RARE, ids=cases.ids(RARE))
def test_rare_shapes_match_float64(case, config):
    test_matches_float64(case, config)


def check_overlap(case: cases.Case, config: CudaConfig, plain: CudaConfig, lengths: list[tuple[int, ...]]) -> None:
    """One captured graph of launches that overlap, replayed with other lengths: all alike, and close to ``plain``'s."""
    x = inputs.make(case, "cuda")
    outs = [torch.empty_like(x.q) for _ in range(20)]
    calls = [lambda out=out: attnkit.paged_decode(x.q, x.kv, x.table, out=out, config=config, impl="cuda_sm90") for out in outs]
    skip_if_declined(calls[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for lens in (case.lens, *lengths):
        x.table.lens.copy_(torch.tensor(lens, device="cuda"))
        for out in outs:
            out.fill_(float("nan"))
        graph.replay()
        graph.replay()
        want = attnkit.paged_decode(x.q, x.kv, x.table, impl="cuda_sm90", config=plain)
        assert torch.allclose(outs[0].float(), want.float(), atol=0.02)
        assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("ahead", [1, 3])
@pytest.mark.parametrize("late", [0, 1])
def test_many_launches_with_changing_lengths(late, ahead):
    config = CudaConfig(2, 100, 1, late=late, ahead=ahead, cluster=8)
    check_overlap(replace(BASE, lens=(3000, 2000)), config, CudaConfig(2, 100, 1), [(1, 0), (64, 1999), (513, 7)])


@pytest.mark.gpu
def test_batch_invariant_calls_take_no_clusters():
    case = replace(BASE, batch_invariant=True)
    x, out, _ = run(case, "cuda_sm90", "cuda", config=CudaConfig(2, 100, 1, cluster=8))
    assert torch.equal(run(case, "cuda_sm90", "cuda")[1], out)


def signature(B, Hkv, W, G=4, **more):
    usual = {"Q": 1, "D": 128, "Dv": 128, "S": 16, "kv_dtype": torch.bfloat16, "batch_invariant": False}
    D = more.get("D", 128)
    strides = {"k_stride": (0, 0, D, 1), "v_stride": (0, 0, D, 1)}
    return SimpleNamespace(**{"B": B, "Hkv": Hkv, "W": W, "G": G, **usual, **strides, **more})


def test_default_configs_take_shipped_builds():
    shipped, seen = builds.shipped(), set()
    for B, Hkv, W, G in product((1, 2, 4, 8, 16, 64), (1, 2, 4, 8), (4, 64, 128, 256, 512, 1024, 8192), (1, 4, 8)):
        sig = signature(B, Hkv, W, G)
        build = decode_cuda.build_of(sig, decode_cuda.default(sig, SimpleNamespace(sms=132)))
        assert build in shipped
        seen.add((build.cluster, build.charge))
    assert {cluster for cluster, _ in seen} > {1, 2, 8} and (1, 1) in seen


@pytest.mark.parametrize("more", [{"batch_invariant": True}, {"G": 12}, {"Q": 3}], ids=str)
def test_no_clusters_for_many_rows_or_invariant_bits(more):
    for B, W in product((1, 8), (64, 256)):
        sig = signature(B, 8, W, **more)
        assert decode_cuda.build_of(sig, decode_cuda.default(sig, SimpleNamespace(sms=132))).cluster == 1
        assert decode_cuda.build_of(sig, CudaConfig(2, 100, 1, cluster=8)).cluster == 1
