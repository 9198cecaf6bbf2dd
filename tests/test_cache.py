"""PageTable, write_kv and merge_states."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import reference
from attnkit.cache import KERNELS, MERGE_KERNELS
from tests.close import assert_close
from tests.kernels import every, skip_if_declined

LAYOUTS = {
    "NHD": lambda P, S, H, D, **k: torch.empty(P, 2, S, H, D, **k),
    "HND": lambda P, S, H, D, **k: torch.empty(P, 2, H, S, D, **k).transpose(2, 3),
}


def test_of_lengths():
    table = attnkit.PageTable.of_lengths([5, 0, 33], 16)
    assert table.pages.tolist() == [[0, -1, -1], [-1, -1, -1], [1, 2, 3]]
    assert table.lens.tolist() == [5, 0, 33]


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scales", ["none", "number", "tensor", "head"])
@pytest.mark.parametrize("kv_dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=["bf16", "int8", "e4m3"])
def test_write_is_bit_equal_and_touches_nothing_else(kv_dtype, scales, layout, impl, device):
    if kv_dtype == torch.bfloat16 and scales != "none":
        pytest.skip("a 16-bit cache takes no scales")
    P, S, H, D, T = 5, 8, 3, 40, 13
    g = torch.Generator(device=device).manual_seed(0)
    k, v = (torch.randn(T, H, 2 * D, generator=g, device=device).to(torch.bfloat16)[..., ::1][..., :D] for _ in range(2))
    if kv_dtype == torch.int8:
        k, v = k * 50, v * 50
    slots = torch.randperm(P * S, generator=g, device=device)[:T]
    slots[[2, 7]] = -1
    options = {}
    if scales != "none":
        heads = torch.rand(H, generator=g, device=device) + 0.5
        one = {"number": float(heads[0]), "tensor": heads[:1], "head": heads}[scales]
        options = {"k_scale": one, "v_scale": one}
    kv, want = (LAYOUTS[layout](P, S, H, D, dtype=kv_dtype, device=device) for _ in range(2))
    for cache in (kv, want):
        cache.copy_(torch.full((), 33.0))
    skip_if_declined(lambda: attnkit.write_kv(k, v, kv, slots, impl=impl, **options))
    expanded = {"number": lambda: heads[:1].expand(H), "tensor": lambda: heads[:1].expand(H), "head": lambda: heads}
    scale = expanded[scales]() if scales != "none" else None
    reference.write_kv(k, v, want[:, 0], want[:, 1], slots, scale, scale)
    raw = torch.int16 if kv_dtype == torch.bfloat16 else torch.uint8
    assert torch.equal(kv.contiguous().view(raw), want.contiguous().view(raw))


@pytest.mark.parametrize(("impl", "device"), every(MERGE_KERNELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=["bf16", "fp32", "fp16"])
def test_merge_matches_float64(dtype, impl, device):
    g = torch.Generator(device=device).manual_seed(0)
    a, b = (torch.randn(5, 3, 72, generator=g, device=device).to(dtype) for _ in range(2))
    la, lb = (torch.randn(5, 3, generator=g, device=device) * 5 for _ in range(2))
    la[0], lb[1], la[2], lb[2] = -torch.inf, -torch.inf, -torch.inf, -torch.inf
    a[0], b[1] = float("nan"), float("nan")  # what an unwritten part may hold
    out, lse = skip_if_declined(lambda: attnkit.merge_states(a, la, b, lb, impl=impl))
    truth = reference.merge_states(a.double(), la.double(), b.double(), lb.double())
    plain = reference.merge_states(a, la, b, lb)
    assert_close(out, truth[0], plain[0].to(dtype))
    assert_close(lse, truth[1], plain[1], "lse")
    assert torch.equal(out[0], b[0]) and torch.equal(out[1], a[1]) and (out[2] == 0).all()


def test_written_keys_are_what_attention_reads():
    """write_kv, then paged_decode: the cache's own round trip, quantised."""
    B, H, D, S, L = 2, 2, 64, 16, 20
    k, v = torch.randn(B * L, H, D), torch.randn(B * L, H, D)
    table = attnkit.PageTable.of_lengths([L] * B, S)
    at = torch.arange(L)
    slots = torch.cat([table.pages[b].long()[at // S] * S + at % S for b in range(B)])
    scale = torch.full((H,), float(max(k.abs().max(), v.abs().max())) / 127)
    whole, small = torch.zeros(4, 2, S, H, D), torch.zeros(4, 2, S, H, D, dtype=torch.int8)
    attnkit.write_kv(k, v, whole, slots)
    attnkit.write_kv(k, v, small, slots, k_scale=scale, v_scale=scale)
    q = torch.randn(B, 4, D)
    exact = attnkit.paged_decode(q, whole, table)
    assert torch.allclose(attnkit.paged_decode(q, small, table, k_scale=scale, v_scale=scale), exact, atol=0.05)
