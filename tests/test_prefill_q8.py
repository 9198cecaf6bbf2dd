"""The CUDA prefill kernel for 8-bit caches: widened keys and values, scaled queries, and what it tells Python."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit.backends.cuda import prefill_q8
from attnkit.backends.cuda.builds import prefill as builds
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import skip_if_declined

E4M3 = torch.float8_e4m3fn
LENS = {"lens": (1000, 1, 0, 129, 64, 700), "q_lens": (1000, 1, 0, 100, 64, 3)}
FEW = {"lens": (20000, 300), "q_lens": (40, 7), "Hq": 8, "Hkv": 1}
SHAPES = [
    replace(cases.BASE, kv_dtype=kv, scales="head", dtype=dtype, D=D, Hq=8, Hkv=2, **LENS)
    for kv, dtype, D in itertools.product((E4M3, torch.int8), (torch.bfloat16, torch.float16), (64, 128))
]
PLAIN = replace(SHAPES[1], q_lens=(300, 1, 0, 100, 64, 3))
CASES = [
    *SHAPES,
    *(replace(PLAIN, S=S) for S in (8, 64, 128, 256)),
    *(replace(PLAIN, Hq=g * h, Hkv=h) for g, h in ((1, 3), (3, 1), (7, 2), (64, 1))),
    *(replace(PLAIN, D=D) for D in (32, 80, 96)),
    replace(PLAIN, kv_dtype=torch.int8, scales="tensor"),
    replace(PLAIN, scales="number", layout="HND", strided_q=True),
    replace(PLAIN, scales=""),
    replace(PLAIN, layout="interleaved"),
    replace(PLAIN, window=200),
    replace(PLAIN, causal=False),
    replace(PLAIN, causal=False, window=33),
    replace(PLAIN, softcap=30.0),
    replace(PLAIN, softcap=100.0, kv_dtype=torch.int8),
    replace(PLAIN, softcap=20.0, sinks=True, window=70),
    replace(PLAIN, sinks=True),
    replace(PLAIN, batch_invariant=True),
    replace(PLAIN, **FEW),
    replace(PLAIN, **FEW, kv_dtype=torch.int8, D=64, sinks=True),
    replace(PLAIN, **FEW, softcap=30.0),
    replace(PLAIN, lens=(2500, 4000), q_lens=(2500, 900), Hq=4, Hkv=1),
]


def check(x: inputs.Inputs) -> None:
    case = x.case
    out = torch.full(x.q.shape, float("nan"), dtype=x.q.dtype, device=x.q.device)
    call = lambda: attnkit.paged_prefill(  # noqa: E731
        x.q,
        x.kv,
        x.table,
        x.cu_q,
        causal=case.causal,
        return_lse=True,
        impl=prefill_q8.PAGED_PREFILL.name,
        out=out,
        **x.options,
    )
    _, lse = skip_if_declined(call)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")
    again, again_lse = attnkit.paged_prefill(
        x.q, x.kv, x.table, x.cu_q, causal=case.causal, return_lse=True, impl=prefill_q8.PAGED_PREFILL.name, **x.options
    )
    assert torch.equal(again, out) and torch.equal(again_lse, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=cases.ids(CASES))
def test_matches_float64(case):
    check(inputs.make(case, "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("D", [64, 128])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 191, 192, 193, 320])
def test_last_blocks_of_any_width(length, D):
    """A last block of up to 64 keys is taken half as wide; NaN stands behind it in the pool."""
    check(inputs.make(replace(PLAIN, lens=(length, length + 1000), q_lens=(length, 5), D=D), "cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("power", [-90, -20, 20, 90])
def test_queries_of_any_size(power):
    """f16 reaches from 2^-24 to 2^16, bf16 queries from 2^-133 to 2^128: each row is scaled by itself."""
    x = inputs.make(replace(PLAIN, kv_dtype=torch.int8), "cuda")
    x.q[::2] *= 2.0**power
    if power < 0:
        x.q[1::2] = 0
    x.options["scale"] = x.clean["scale"] = x.q.shape[-1] ** -0.5 * 2.0**-power
    check(x)


@pytest.mark.gpu
def test_scales_of_zero_and_below():
    """A head of zeros may come with scale 0: its keys all weigh alike."""
    x = inputs.make(replace(PLAIN, Hkv=4), "cuda")
    scale = torch.tensor([0.0, -1.0, 1.0, 0.5], device="cuda")
    x.options["k_scale"] = x.clean["k_scale"] = scale
    check(x)


@pytest.mark.gpu
@pytest.mark.parametrize("grows", [1.5, 6.0, 60.0])
@pytest.mark.parametrize("D", [64, 128])
def test_maxima_that_grow_from_block_to_block(D, grows):
    """Blocks come from the last to the first; logits that grow by up to 180 a block are more than a weight can hold."""
    case = replace(PLAIN, lens=(1100, 400), q_lens=(300, 400), D=D, scales="")
    x = inputs.make(case, "cuda")
    for b, n in enumerate(case.lens):
        at = torch.arange(n, device="cuda")
        values = 0.1 * torch.randn(n, case.Hkv, D, device="cuda") + (grows * (n - at) / 128)[:, None, None] / D**0.5
        inputs.fill(x.kv[:, 0], values, x.table.pages[b].long()[at // case.S], at % case.S)
    x.q[:] = 0.1 * x.q + 3 * (torch.arange(len(x.q), device="cuda") % 3 > 0)[:, None, None]
    check(x)


@pytest.mark.gpu
@pytest.mark.parametrize("logit", [-36.0, -3.0, 3.6, 36.0])
@pytest.mark.parametrize("kv", [E4M3, torch.int8])
def test_maxima_near_zero_and_far_from_it(kv, logit):
    """Weights are relative to 2^0 where a row's maximum is near it, to the maximum elsewhere; a warp may have both."""
    case = replace(PLAIN, lens=(700, 400), q_lens=(300, 400), D=64, kv_dtype=kv, scales="")
    x = inputs.make(case, "cuda")
    unit = 8.0 if kv == torch.int8 else 1.0
    for b, n in enumerate(case.lens):
        at = torch.arange(n, device="cuda")
        values = unit * (0.1 * torch.randn(n, case.Hkv, case.D, device="cuda") + logit / case.D**0.5)
        inputs.fill(x.kv[:, 0], values, x.table.pages[b].long()[at // case.S], at % case.S)
    x.q[:] = (0.1 * x.q + (torch.arange(len(x.q), device="cuda") % 3 > 0)[:, None, None]) / unit
    check(x)


def test_the_stages_fit_shared_memory():
    for heads in builds.Q8_STAGES:
        assert 100 * 1024 < prefill_q8.shared_bytes(*heads) <= 227 * 1024


def test_every_cache_and_query_type_has_a_shipped_build():
    labels = {v.label for v in builds.shipped() if "q8" in v.source}
    assert len(labels) == 4 * len(builds.Q8_STAGES)


def test_a_16_bit_cache_is_left_to_the_other_kernel():
    x = inputs.make(cases.BASE)
    with pytest.raises(RuntimeError, match="cuda_sm90_q8: needs an int8 or e4m3 cache, got torch.bfloat16"):
        attnkit.paged_prefill(x.q.flatten(0, 1), x.kv, x.table, x.cu_q, impl="cuda_sm90_q8")
