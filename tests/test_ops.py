"""The ops as torch sees them: opcheck, fullgraph compilation, fakes, autograd's refusal, import cost."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest
import torch

import attnkit
from attnkit import attention
from tests import cases, inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IMPL = None if torch.cuda.is_available() else "cpu"


def arguments() -> dict[str, tuple]:
    """A call of each op as the dispatcher gets it."""
    x = inputs.make(cases.BASE, DEVICE)
    r = inputs.make(cases.RAGGED, DEVICE)
    k, v = attention.split_kv("test", x.kv, 64)
    rk, rv = attention.split_kv("test", r.kv, 64)
    B = len(cases.BASE.lens)
    a = torch.randint(-127, 127, (4, 64), device=DEVICE, dtype=torch.int8)
    w = torch.randint(-127, 127, (8, 64), device=DEVICE, dtype=torch.int8)
    ones = torch.ones(64, device=DEVICE)
    latent = torch.randn(6, 16, 192, device=DEVICE)
    lq = torch.randn(2, 1, 4, 192, device=DEVICE)
    ltable = attnkit.PageTable.of_lengths([5, 33], 16, DEVICE)
    ragged = torch.randn(9, 2, 64, device=DEVICE)
    cu = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE)
    logits = torch.randn(3, 50, device=DEVICE)
    numbers = [1.0, 0, 1.0, 0.0, 1.0, 0.0, 0.0, 0]
    seeds = torch.arange(3, device=DEVICE)
    lse = torch.randn(3, 2, device=DEVICE)
    part = torch.randn(3, 2, 64, device=DEVICE)
    cache = torch.zeros(2, 8, 2, 64, device=DEVICE)
    return {
        "paged_decode": (x.q, k, v, *x.table, None, None, None, None, x.q.new_zeros(x.q.shape), x.q.new_zeros((B, 1, 4), dtype=torch.float32),
                         0.125, 1.0, 0, 0.0, False, IMPL),
        "paged_prefill": (r.q, rk, rv, *r.table, r.cu_q, None, None, None, r.q.new_zeros(r.q.shape), None, 0.125, 1.0, True, 0, 0.0, False, IMPL),
        "mla_decode": (lq, latent, *ltable, None, None, lq.new_zeros(2, 1, 4, 128), None, 128, 0.07, 0, 0.0, False, IMPL),
        "mla_prefill": (ragged, ragged.clone(), ragged.clone(), cu, cu.clone(), None, ragged.new_zeros(ragged.shape), None, 0.1, True, 0, 0.0, False, IMPL),
        "w8a8_gemm": (a, w, ones[:4].clone(), ones[:8].clone(), None, torch.zeros(4, 8, device=DEVICE), IMPL),
        "quantize_per_token": (torch.randn(4, 64, device=DEVICE), a.clone(), torch.zeros(4, device=DEVICE), IMPL),
        "sample": (logits, seeds, [None] * 8, None, None, None, None, torch.zeros_like(seeds), torch.zeros(3, dtype=torch.bool, device=DEVICE),
                   None, None, numbers, IMPL),
        "sample_from_hidden": (a.float(), w.float(), torch.arange(4, device=DEVICE), [None] * 8, None, None, None, None,
                               torch.zeros(4, dtype=torch.int64, device=DEVICE), torch.zeros(4, dtype=torch.bool, device=DEVICE), None, None,
                               numbers, IMPL),
        "write_kv": (ragged[:, :, :64], ragged.clone(), cache, cache.clone(), torch.arange(9, device=DEVICE), None, None, IMPL),
        "write_latent": (torch.randn(3, 512, device=DEVICE), torch.randn(3, 64, device=DEVICE),
                         torch.zeros(2, 8, 656, dtype=torch.uint8, device=DEVICE), torch.arange(3, device=DEVICE), None),
        "merge_states": (part, lse, part.clone(), lse.clone(), part.new_zeros(part.shape), lse.new_zeros(lse.shape), IMPL),
    }  # fmt: skip


@pytest.mark.parametrize("op", ["paged_decode", "paged_prefill", "mla_decode", "mla_prefill", "w8a8_gemm", "quantize_per_token",
                                "sample", "sample_from_hidden", "write_kv", "write_latent", "merge_states"])  # fmt: skip
def test_opcheck(op):
    # sample's seeds make it deterministic, so every check opcheck has applies to every op.
    torch.library.opcheck(getattr(torch.ops.attnkit, op).default, arguments()[op])


def test_every_op_compiles_into_one_graph():
    """torch.compile(fullgraph=True) over the public functions, also with shapes it has not seen."""
    x, r = inputs.make(cases.BASE, DEVICE), inputs.make(cases.RAGGED, DEVICE)

    def step(q, kv, pages, lens, rq, rpages, rlens, cu, rkv, weight):
        table = attnkit.PageTable(pages, lens)
        attnkit.write_kv(q[:, 0, :2], q[:, 0, :2], kv, torch.full((q.shape[0],), -1, device=q.device))
        o, lse = attnkit.paged_decode(q, kv, table, return_lse=True)
        o, lse = attnkit.merge_states(o, lse, o, lse)
        p = attnkit.paged_prefill(rq, rkv, attnkit.PageTable(rpages, rlens), cu)
        a, scale = attnkit.quantize_per_token(o.flatten(0, 1).flatten(1))
        w, w_scale = attnkit.quantize_weight(weight)
        logits = attnkit.w8a8_gemm(a, w, scale, w_scale)
        tokens = attnkit.sample(logits.float(), seed=7, top_k=5).tokens
        return tokens + attnkit.sample_from_hidden(o.flatten(0, 1).flatten(1), weight.to(o.dtype), seed=7).tokens, p

    weight = torch.randn(32, 256, device=DEVICE)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    args = (x.q, x.kv, *x.table, r.q, *r.table, r.cu_q, r.kv, weight)
    for cut in (None, 3):
        now = (x.q[:cut], x.kv, x.table.pages[:cut], x.table.lens[:cut], *args[4:])
        got, want = compiled(*now), step(*now)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.slow
def test_inductor_runs_decode_in_one_graph():
    x = inputs.make(cases.BASE, DEVICE)
    compiled = torch.compile(lambda q, kv, p, n: attnkit.paged_decode(q, kv, attnkit.PageTable(p, n)) * 2, fullgraph=True)
    want = attnkit.paged_decode(x.q, x.kv, x.table) * 2
    assert torch.equal(compiled(x.q, x.kv, *x.table), want)


def test_fake_tensors_give_shapes_without_running():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(3, 4, 64, dtype=torch.bfloat16)
        kv = torch.empty(5, 2, 16, 2, 64, dtype=torch.bfloat16)
        table = attnkit.PageTable(torch.empty(3, 2, dtype=torch.int32), torch.empty(3, dtype=torch.int32))
        out, lse = attnkit.paged_decode(x, kv, table, return_lse=True)
    assert out.shape == (3, 4, 64) and lse.shape == (3, 4) and lse.dtype == torch.float32


def test_an_input_that_requires_grad_is_refused():
    x = inputs.make(cases.BASE, "cpu")
    with pytest.raises(RuntimeError, match="paged_decode: an input requires grad"):
        attnkit.paged_decode(x.q.requires_grad_(), x.kv, x.table, impl="torch")
    with torch.no_grad():
        attnkit.paged_decode(x.q, x.kv, x.table, impl="torch")


def test_import_is_cheap_and_touches_nothing(tmp_path):
    """At most 0.2 s on top of torch (the median of three, bytecode in place); no triton, transformers or CUDA context."""
    code = (
        "import time, sys, torch; t = time.perf_counter(); import attnkit; d = time.perf_counter() - t;"
        "bad = {'triton', 'transformers', 'cupy', 'matplotlib', 'flashinfer', 'rich', 'typer'} & set(sys.modules);"
        "print(d, sorted(bad), torch.cuda.is_initialized())"
    )
    base = subprocess.run([sys.executable, "-c", "import torch, sys; print(sorted({'triton', 'rich'} & set(sys.modules)))"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    env = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"PYTHONPYCACHEPREFIX": str(tmp_path)}
    runs = [
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env).stdout
        for _ in range(4)
    ]
    times = [float(r.split()[0]) for r in runs[1:]]
    assert statistics.median(times) <= 0.2, times
    brought = set(eval(runs[0].split(" ", 1)[1].rsplit(" ", 1)[0])) - set(eval(base.stdout))
    assert not brought and runs[0].split()[-1] == "False"
