"""paged_decode where several CTAs share the adding up of a head's pieces, whatever the default config would take."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import attnkit
from attnkit import workspace
from attnkit.backends.cuda import decode as host
from attnkit.backends.cuda.builds import decode as builds
from attnkit.configs import decode_cuda
from attnkit.configs.decode_cuda import CudaConfig
from attnkit.dispatch import forget_plans
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import skip_if_declined
from tests.test_decode import run
from tests.test_decode_cluster import check_overlap, config_id, signature

BASE = replace(cases.BASE, D=128)
UNEVEN = (0, 1, 64, 65, 513, 3000)
CASES = [
    replace(BASE, lens=UNEVEN, Hq=8),
    replace(BASE, lens=UNEVEN, Hq=64),
    replace(BASE, lens=(3000,), Hq=6, Hkv=1, S=64, dtype=torch.float16),
    replace(BASE, lens=(4, 5, 70, 2000), Hq=4, Q=2, tree=True),
    replace(BASE, lens=UNEVEN, Hq=8, window=100, softcap=20.0, sinks=True),
    replace(BASE, lens=tuple(i * 97 % 1500 for i in range(30)), Hq=7, Hkv=1),
    replace(BASE, lens=(20000, 9000, 3), Hq=12),
    *(replace(BASE, lens=(60000,), Hq=Hq, Hkv=1) for Hq in (1, 6, 8, 20, 32)),
]
CONFIGS = [
    *(CudaConfig(2, 100, 1, ahead=3, stages=2, share=n) for n in (1, 2, 4, 8, 32, 512)),
    CudaConfig(2, 50, 2, late=3, share=4),
    CudaConfig(1, 100, 1, share=8),
    CudaConfig(2, 100, 1, ahead=3, stages=2),  # the control: many pieces meet in groups
]


def share_id(config: CudaConfig) -> str:
    return f"{config_id(config)}-grid{config.grid}-share{config.share}"


@pytest.fixture(params=[200, 0, 2], ids="patience{}".format)
def patience(request, monkeypatch):
    """With none, every CTA that does not come last leaves its share to the one that does."""
    monkeypatch.setattr(host, "PATIENCE", request.param)
    forget_plans()  # which hold what it was when they were made
    yield request.param
    forget_plans()


def counters_are_zero() -> bool:
    torch.cuda.synchronize()
    return all(int(held.count_nonzero()) == 0 for held in workspace._eager_counters.values())


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=share_id)
@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_matches_float64(case, config, patience):
    x, out, lse = run(case, "cuda_sm90", "cuda", config=config)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")
    for _ in range(3):
        for held in workspace._partials.values():
            held.fill_(255)  # NaN
        again = run(case, "cuda_sm90", "cuda", config=config)
        assert torch.equal(again[1], out) and torch.equal(again[2], lse)
    assert counters_are_zero()


@pytest.mark.gpu
def test_bits_do_not_depend_on_who_adds_up(monkeypatch):
    case, config, outs = replace(BASE, lens=(30000, 20000), Hq=12), CONFIGS[2], []
    for patience in (200, 0):
        monkeypatch.setattr(host, "PATIENCE", patience)
        forget_plans()
        outs += [run(case, "cuda_sm90", "cuda", config=config)[1] for _ in range(20)]
    forget_plans()
    assert all(torch.equal(out, outs[0]) for out in outs)


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS[2:7:2], ids=share_id)
def test_many_launches_with_changing_lengths(config):
    case = replace(BASE, lens=(30000, 20000), Hq=12)
    check_overlap(case, config, replace(config, share=0), [(1, 0), (64, 19999), (513, 7), (30000, 3)])


@pytest.mark.gpu
@pytest.mark.parametrize("patience", [200, 3], indirect=True)
def test_launches_of_several_streams_do_not_wait_for_one_another(patience):
    """CTAs of one launch wait in multiprocessors that another needs."""
    x = inputs.make(replace(BASE, lens=(30000, 20000), Hq=12), "cuda")
    call = lambda out: attnkit.paged_decode(x.q, x.kv, x.table, out=out, config=CONFIGS[2], impl="cuda_sm90")  # noqa: E731
    want = skip_if_declined(lambda: call(torch.empty_like(x.q)))
    streams = [torch.cuda.Stream(priority=-(i % 2)) for i in range(4)]
    outs = [torch.full_like(x.q, float("nan")) for _ in streams]
    torch.cuda.synchronize()
    for _ in range(150):
        for stream, out in zip(streams, outs):
            with torch.cuda.stream(stream):
                call(out)
    assert counters_are_zero()
    assert all(torch.equal(out, want) for out in outs)


def chosen(B, Hkv, W, G, **more):
    sig, arch = signature(B, Hkv, W, G, **more), SimpleNamespace(sms=132)
    config = decode_cuda.default(sig, arch)
    return config, decode_cuda.build_of(sig, config)


@pytest.mark.parametrize(("Hkv", "G", "share"), [(2, 6, 4), (1, 8, 4), (1, 32, 8), (4, 7, 8), (8, 4, 8)])
def test_long_sequences_of_few_heads_are_shared(Hkv, G, share):
    config, build = chosen(1, Hkv, 8192, G)
    assert config.share == share and build.share == 1 and build in builds.shipped()


@pytest.mark.parametrize(
    ("B", "Hkv", "W", "G"),
    [(16, 2, 512, 6), (16, 4, 256, 7), (16, 1, 1024, 32), (64, 8, 256, 4), (1, 2, 64, 6), (1, 8, 256, 4)],
)
def test_where_few_pieces_meet_nothing_changes(B, Hkv, W, G):
    config, build = chosen(B, Hkv, W, G)
    assert config.share == 0 and build.share == 0


@pytest.mark.parametrize("more", [{"batch_invariant": True}, {"kv_dtype": torch.int8}, {"D": 64, "Dv": 64}, {"G": 12}], ids=str)
def test_not_where_bits_are_invariant_or_shapes_unusual(more):
    config, build = chosen(1, 2, 8192, more.pop("G", 6), **more)
    assert config.share == 0 and build.share == 0
    assert decode_cuda.build_of(signature(1, 2, 8192, 6, batch_invariant=True), CudaConfig(2, 100, 1, share=4)).share == 0
