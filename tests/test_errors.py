"""Every error message names the op, the argument, what came and what was wanted, before anything is written."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import PageTable, dispatch, settings
from tests import cases, inputs


@pytest.fixture
def x():
    return inputs.make(cases.Case(lens=(5, 33), Hq=4, Hkv=2, D=64))


def decode(x, **change):
    given = {"q": x.q, "kv": x.kv, "table": x.table, "impl": "torch", **change}
    return attnkit.paged_decode(given.pop("q"), given.pop("kv"), given.pop("table"), **given)


def half(t):
    return t[..., :32]


DECODE = {
    "head size": (lambda x: {"q": half(x.q)}, ValueError, r"paged_decode: D is 32 in q but 64 in kv \(dim 4\)"),
    "head size, pair": (lambda x: {"q": half(x.q), "kv": (x.kv[:, 0], x.kv[:, 1])}, ValueError, r"D is 32 in q but 64 in kv \(dim 3\)"),
    "q rank": (lambda x: {"q": x.q[0, 0]}, ValueError, r"paged_decode: q's shape is \[4, 64\], wanted \[B, Hq, D\]"),
    "kv rank": (lambda x: {"kv": x.kv[:, 0]}, ValueError, r"kv's shape is .*, wanted \[P, 2, S, Hkv, D\]"),
    "kv type": (lambda x: {"kv": 3}, TypeError, "paged_decode: kv is int, wanted a tensor"),
    "kv dtype": (lambda x: {"kv": x.kv.float()}, ValueError, "kv's dtype is torch.float32, wanted torch.bfloat16 or torch.int8"),
    "q dtype": (lambda x: {"q": x.q.double()}, ValueError, "q's dtype is torch.float64, wanted torch.bfloat16 or"),
    "batch": (lambda x: {"table": PageTable(x.table.pages[:1], x.table.lens)}, ValueError, "B is 2 in q but 1 in table.pages"),
    "lens dtype": (lambda x: {"table": PageTable(x.table.pages, x.table.lens.long())}, ValueError, "table.lens's dtype is torch.int64"),
    "lens type": (lambda x: {"table": PageTable(x.table.pages, [5, 33])}, (TypeError, AttributeError), "list"),
    "groups": (lambda x: {"q": x.q[:, :, :3]}, ValueError, "Hq is 3, wanted a multiple of Hkv = 2"),
    "page size": (lambda x: {"kv": x.kv[:, :, :12]}, ValueError, "S .tokens in a page. is 12, wanted a power of two from 1 to 256"),
    "last stride": (lambda x: {"q": x.q.transpose(2, 3).contiguous().transpose(2, 3)}, ValueError, "q's last stride is 4, wanted 1"),
    "query tokens": (lambda x: {"q": x.q.expand(2, 17, 4, 64)}, ValueError, "Q is 17 in q, wanted 1 to 16"),
    "window": (lambda x: {"window": 0}, ValueError, "paged_decode: window is 0, wanted None or at least 1"),
    "softcap": (lambda x: {"softcap": -1.0}, ValueError, "softcap is -1.0, wanted 0"),
    "scale": (lambda x: {"scale": float("nan")}, ValueError, "scale is nan, wanted a finite"),
    "sinks": (lambda x: {"sinks": torch.zeros(3)}, ValueError, "Hq is 4 in q but 3 in sinks"),
    "sinks dtype": (lambda x: {"sinks": torch.zeros(4, dtype=torch.float64)}, ValueError, "sinks's dtype is torch.float64"),
    "k_scale on bf16": (lambda x: {"k_scale": torch.ones(2)}, ValueError, "k_scale is given but kv's dtype is torch.bfloat16"),
    "k_scale dtype (CASES 17)": (lambda x: {"k_scale": torch.ones(2).bfloat16()}, ValueError, "k_scale's dtype is torch.bfloat16, wanted torch.float32"),
    "v_scale shape": (lambda x: {"v_scale": torch.ones(3)}, ValueError, r"v_scale's shape is \[3\], wanted \[\] or \[Hkv\] = \[2\]"),
    "tree shape": (lambda x: {"tree_mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, "Q is 1 in q but 2 in tree_mask"),
    "tree rank": (lambda x: {"tree_mask": torch.ones(1, dtype=torch.bool)}, ValueError, r"tree_mask's shape is \[1\]"),
    "out shape": (lambda x: {"out": x.q.new_empty(2, 1, 4, 32)}, ValueError, "Dv is 64 in kv but 32 in out"),
    "out dtype": (lambda x: {"out": x.q.float()}, ValueError, "out's dtype is torch.float32, wanted torch.bfloat16"),
    "device": (lambda x: {"table": PageTable(x.table.pages.to("meta"), x.table.lens)}, ValueError, "table.pages is on meta but the call runs on cpu"),
    "impl": (lambda x: {"impl": "fast"}, ValueError, "impl is 'fast', wanted one of"),
    "config": (lambda x: {"config": 3}, ValueError, "kernel torch takes no config, got 3"),
}  # fmt: skip


@pytest.mark.parametrize("name", DECODE)
def test_decode(name, x):
    change, kind, message = DECODE[name]
    with pytest.raises(kind, match=message):
        decode(x, **change(x))


def test_no_kernel_lists_every_reason(x):
    with pytest.raises(RuntimeError, match=r"paged_decode: no kernel serves this call on cpu\n  cuda\w*: .+"):
        decode(x, impl="cuda")


def test_prefill(x):
    q = x.q[:, 0]
    with pytest.raises(ValueError, match=r"B is 2 in table.pages but 3 in cu_q"):
        attnkit.paged_prefill(q, x.kv, x.table, torch.zeros(4, dtype=torch.int32), impl="torch")
    with pytest.raises(ValueError, match="cu_q's dtype is torch.int64, wanted torch.int32"):
        attnkit.paged_prefill(q, x.kv, x.table, torch.zeros(3, dtype=torch.int64), impl="torch")


def test_mla(x):
    table, kv = x.table, torch.zeros(9, 16, 576, dtype=torch.bfloat16)
    q = torch.zeros(2, 4, 576, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"mla_decode: C\+R is 576 in q but 320 in kv"):
        attnkit.mla_decode(q, kv[..., :320], table)
    with pytest.raises(ValueError, match="latent is 500, wanted a multiple of 16"):
        attnkit.mla_decode(q, kv, table, latent=500)
    with pytest.raises(ValueError, match=r"C\+R is 576, wanted latent = 256 plus"):
        attnkit.mla_decode(q, kv, table, latent=256)
    cu = torch.tensor([0, 2], dtype=torch.int32)
    k = torch.zeros(2, 3, 64)
    with pytest.raises(ValueError, match="mla_prefill: H is 4, wanted a multiple of Hk = 3"):
        attnkit.mla_prefill(torch.zeros(2, 4, 64), k, k, cu, cu)


GEMM = {
    "K": (lambda a, w, s: ((a, w[:, :8], s, s), {}), "K is 16 in a but 8 in w"),
    "dtype": (lambda a, w, s: ((a.float(), w, s, s), {}), "a's dtype is torch.float32, wanted torch.int8 or torch.float8_e4m3fn"),
    "mixed": (lambda a, w, s: ((a, w.to(torch.float8_e4m3fn), s, s), {}), "w's dtype is torch.float8_e4m3fn, wanted torch.int8"),
    "scale dtype": (lambda a, w, s: ((a, w, s.bfloat16(), s), {}), "a_scale's dtype is torch.bfloat16, wanted torch.float32"),
    "scale shape": (lambda a, w, s: ((a, w, s[:2], s), {}), "M is 4 in a but 2 in a_scale"),
    "bias": (lambda a, w, s: ((a, w, s, s), {"bias": torch.zeros(3)}), "N is 4 in w but 3 in bias"),
    "rank": (lambda a, w, s: ((a[0], w, s, s), {}), r"a's shape is \[16\]"),
    "out dtype": (lambda a, w, s: ((a, w, s, s), {"out_dtype": torch.int8}), "out's dtype is torch.int8"),
    "column stride": (lambda a, w, s: ((a[:, ::2], w[:, :8], s, s), {}), "a's last stride is 2, wanted 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", GEMM)
def test_gemm(name):
    make, message = GEMM[name]
    a = w = torch.ones(4, 16, dtype=torch.int8)
    args, options = make(a, w, torch.ones(4))
    with pytest.raises(ValueError, match=f"w8a8_gemm: {message}"):
        attnkit.w8a8_gemm(*args, **options)


def test_a_k_that_could_wrap_int32_is_refused():
    """Bad input 2: the limit is named."""
    a = torch.ones(1, (1 << 17) + 1, dtype=torch.int8)
    with pytest.raises(ValueError, match="K is 131073, wanted at most 131072"):
        attnkit.w8a8_gemm(a, a, torch.ones(1), torch.ones(1))


SAMPLE = {
    "temperature": ({"temperature": -1.0}, ValueError, "temperature is -1.0, wanted at least 0"),
    "nan": ({"temperature": float("nan")}, ValueError, "temperature is nan"),
    "top_p": ({"top_p": 1.5}, ValueError, "top_p is 1.5, wanted 0 to 1"),
    "top_k": ({"top_k": 2.5}, TypeError, "top_k is 2.5, wanted a whole number"),
    "top_k dtype": (
        {"top_k": torch.ones(2, dtype=torch.int32)},
        ValueError,
        "top_k's dtype is torch.int32, wanted torch.int64",
    ),
    "repetition": ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty is 0.0, wanted a number above 0"),
    "seed": ({"seed": "x"}, TypeError, "seed is 'x'"),
    "seeds": ({"seed": torch.zeros(3, dtype=torch.int64)}, ValueError, "B is 2 in logits but 3 in seed"),
    "allowed": ({"allowed": torch.zeros(2, 3, dtype=torch.int32)}, ValueError, "dim 1 of allowed is 3, wanted 1"),
    "counts": (
        {"output_counts": torch.zeros(2, 9, dtype=torch.int32)},
        ValueError,
        "V is 10 in logits but 9 in output_counts",
    ),
    "logprobs": ({"logprobs": 11}, ValueError, "logprobs is 11, wanted 0 to V = 10"),
}


@pytest.mark.parametrize("name", SAMPLE)
def test_sample(name):
    options, kind, message = SAMPLE[name]
    with pytest.raises(kind, match=f"sample: {message}"):
        attnkit.sample(torch.zeros(2, 10), **{"seed": 1, **options})


HIDDEN = {
    "shape": (lambda h, w: ((h[0], w), {}), ValueError, r"hidden's shape is \[16\] and weight's \[10, 16\], wanted \[B, H\]"),
    "letters": (lambda h, w: ((h, w[:, :8]), {}), ValueError, "H is 16 in hidden but 8 in weight"),
    "dtype": (lambda h, w: ((h, w.half()), {}), ValueError, "weight's dtype is torch.float16, wanted torch.bfloat16"),
    "int8": (lambda h, w: ((h.to(torch.int8), w.to(torch.int8)), {}), ValueError, "hidden's dtype is torch.int8"),
    "stride": (lambda h, w: ((h, w.t().contiguous().t()), {}), ValueError, "weight's last stride is 10, wanted 1"),
    "device": (lambda h, w: ((h, w.to("meta")), {}), ValueError, "weight is on meta but the call runs on cpu"),
    "vocabulary": (lambda h, w: ((h, w[:0]), {}), ValueError, "V is 0, wanted at least 1"),
    "temperature": (lambda h, w: ((h, w), {"temperature": -1.0}), ValueError, "temperature is -1.0, wanted at least 0"),
    "seeds": (lambda h, w: ((h, w), {"seed": torch.zeros(3, dtype=torch.int64)}), ValueError, "B is 2 in hidden but 3 in seed"),
    "counts": (
        lambda h, w: ((h, w), {"output_counts": torch.zeros(2, 9, dtype=torch.int32)}),
        ValueError,
        "V is 10 in weight but 9 in output_counts",
    ),
    "out": (lambda h, w: ((h, w), {"out": torch.zeros(2)}), ValueError, "out's dtype is torch.float32, wanted torch.int64"),
    "impl": (lambda h, w: ((h, w), {"impl": "x"}), ValueError, "impl is 'x', wanted one of cpu, cuda, torch, triton"),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_sample_from_hidden(name):
    make, kind, message = HIDDEN[name]
    args, options = make(torch.zeros(2, 16, dtype=torch.bfloat16), torch.zeros(10, 16, dtype=torch.bfloat16))
    with pytest.raises(kind, match=f"sample_from_hidden: {message}"):
        attnkit.sample_from_hidden(*args, **{"seed": 1, **options})


def test_sample_needs_a_vocabulary():
    with pytest.raises(ValueError, match="V is 0, wanted at least 1"):
        attnkit.sample(torch.zeros(2, 0), seed=1)


def test_write_and_merge(x):
    k = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="write_kv: slots's dtype is torch.int32, wanted torch.int64"):
        attnkit.write_kv(k, k, x.kv, torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="write_kv: T is 3 in k but 2 in slots"):
        attnkit.write_kv(k, k, x.kv, torch.zeros(2, dtype=torch.int64))
    out, lse = torch.zeros(2, 3, 8), torch.zeros(2, 3)
    with pytest.raises(ValueError, match="merge_states: H is 3 in out_a but 2 in lse_b"):
        attnkit.merge_states(out, lse, out, lse[:, :2])


@pytest.fixture
def debug(monkeypatch):
    monkeypatch.setenv("ATTNKIT_DEBUG", "1")
    settings.reload()
    yield
    monkeypatch.undo()
    settings.reload()


def test_debug_names_the_place(x, debug):
    """Bad input 3: a page outside the pool, a length beyond the table."""
    x.table.pages[1, 2] = 912
    with pytest.raises(ValueError, match=r"paged_decode: pages\[1, 2\] = 912 is outside \[0, \d+\)"):
        decode(x)
    x.table.lens[0] = 999
    with pytest.raises(ValueError, match=r"lens\[0\] = 999 is outside \[0, 64\]"):
        decode(x)
    k = torch.zeros(3, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"write_kv: slots\[1\] = 4000 is outside"):
        attnkit.write_kv(k, k, x.kv, torch.tensor([0, 4000, 1]))
    cu = torch.tensor([0, 3, 2], dtype=torch.int32)
    x.table.lens[0] = 5
    x.table.pages[1, 2] = 0
    with pytest.raises(ValueError, match=r"paged_prefill: cu_q\[2\] = 2 is below cu_q\[1\] = 3"):
        attnkit.paged_prefill(x.q[:, 0], x.kv, x.table, cu)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("ATTNKIT_IMPL", "fast", "ATTNKIT_IMPL is 'fast', wanted one of cuda"),
    ("ATTNKIT_DEBUG", "yes", "ATTNKIT_DEBUG is 'yes', wanted 0 or 1"),
    ("ATTNKIT_THREADS", "-2", "ATTNKIT_THREADS is '-2', wanted a whole number"),
])  # fmt: skip
def test_a_bad_setting_raises(monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        settings.reload()
    monkeypatch.undo()
    settings.reload()


def test_the_plan_cache_is_bounded(x, monkeypatch):
    monkeypatch.setattr(dispatch, "CACHE_SIZE", 8)
    cache = dispatch.PlanCache()
    for i in range(100):
        cache.put(i, None)
    assert len(cache.plans) <= 8 and 99 in cache.plans
    dispatch._CACHES.remove(cache)
