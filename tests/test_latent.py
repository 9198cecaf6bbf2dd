"""The fp8 latent cache: write_latent, and mla_decode on it by every kernel."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import reference, settings
from attnkit.latent import KERNELS
from attnkit.mla import DECODE_KERNELS
from tests import latents
from tests.kernels import every, skip_if_declined

P, S = 3, 8


def written(impl: str | None, device: str, latent: torch.Tensor, slots: torch.Tensor, gap: int = 0):
    """The cache after a call, and as the reference leaves it."""
    g = torch.Generator(device=device).manual_seed(1)
    rope = torch.randn(latent.shape[0], 64, generator=g, device=device).to(latent.dtype)
    flat = torch.full((2, P * (S * 656 + gap)), 77, dtype=torch.uint8, device=device)
    kv, want = (f.as_strided((P, S, 656), (S * 656 + gap, 656, 1), f.storage_offset()) for f in flat)
    skip_if_declined(lambda: attnkit.write_latent(latent, rope, kv, slots, impl=impl))
    reference.write_latent(latent, rope, want, slots)
    return flat[0], flat[1], kv


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
def test_write_is_bit_equal_and_touches_nothing_else(dtype, impl, device):
    g = torch.Generator(device=device).manual_seed(0)
    latent = (torch.randn(13, 600, generator=g, device=device) * torch.logspace(-4, 3, 13, device=device)[:, None]).to(dtype)
    latent[3, :128] = 0
    slots = torch.randperm(P * S, generator=g, device=device)[:13]
    slots[[2, 7]] = torch.tensor([-1, P * S], device=device)
    got, want, _ = written(impl, device, latent[:, :512], slots, gap=32)
    assert torch.equal(got, want)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_block_that_is_not_finite_becomes_nan_and_no_other(value, impl, device):
    latent = torch.randn(2, 512, device=device)
    latent[1, 200] = value
    _, _, kv = written(impl, device, latent, torch.tensor([4, 9], device=device))
    back = reference.dequantise_latent(kv.flatten(0, 1)[[4, 9]], torch.float32)
    bad = back[:, :512].unflatten(1, (4, 128)).isnan()
    assert bad[1, 1].all() and bad.sum() == 128


def test_round_trip_keeps_e4m3s_three_bits():
    x = torch.randn(50, 512, generator=torch.Generator().manual_seed(0)) * 3
    _, _, kv = written("torch", "cpu", x[: P * S], torch.arange(P * S))
    back = reference.dequantise_latent(kv.flatten(0, 1), torch.float64)[:, :512]
    block = x[: P * S].double().unflatten(1, (4, 128))
    error = (back.unflatten(1, (4, 128)) - block).abs()
    limit = block.abs() * 2.0**-4 + block.abs().amax(-1, keepdim=True) * 2.0**-18
    assert (error <= limit).all()


def test_write_checks_its_arguments():
    x, rope, kv, slots = (
        torch.randn(2, 512),
        torch.randn(2, 64),
        torch.zeros(P, S, 656, dtype=torch.uint8),
        torch.tensor([0, 1]),
    )
    with pytest.raises(ValueError, match=r"write_latent: dim 1 of latent is 511, wanted 512"):
        attnkit.write_latent(x[:, :511], rope, kv, slots)
    with pytest.raises(ValueError, match=r"write_latent: dim 2 of cache is 640, wanted 656"):
        attnkit.write_latent(x, rope, kv[..., :640], slots)
    with pytest.raises(ValueError, match=r"write_latent: cache's dtype is torch.int8, wanted torch.uint8"):
        attnkit.write_latent(x, rope, kv.view(torch.int8), slots)
    with pytest.raises(ValueError, match=r"write_latent: rope's dtype is torch.float16"):
        attnkit.write_latent(x, rope.half(), kv, slots)


def test_debug_names_a_slot_outside_the_pool(monkeypatch):
    monkeypatch.setenv("ATTNKIT_DEBUG", "1")
    settings.reload()
    try:
        x, rope, kv = torch.randn(2, 512), torch.randn(2, 64), torch.zeros(P, S, 656, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"write_latent: slots\[1\] = 99 is outside \[-1, 24\)"):
            attnkit.write_latent(x, rope, kv, torch.tensor([0, 99]))
    finally:
        monkeypatch.undo()
        settings.reload()


DECODE = {
    "plain": {},
    "H1": {"H": 1, "S": 1, "lens": (3, 9, 17, 30, 44, 5, 70, 61)},
    "Q2-sinks": {"Q": 2, "H": 5, "sinks": True},
    "tree": {"Q": 3, "H": 4, "tree": True},
    "window": {"window": 20, "S": 8},
    "softcap": {"softcap": 5.0},
    "gap": {"gap": 48, "S": 32},
    "small": {"size": 1e-4},
    "large": {"size": 300.0},
    "fp16": {"dtype": torch.float16},
    "fp32": {"dtype": torch.float32, "H": 2},
}


@pytest.mark.parametrize(("impl", "device"), every(DECODE_KERNELS))
@pytest.mark.parametrize("name", DECODE)
def test_decode_matches_float64_on_the_dequantised_cache(name, impl, device):
    x = latents.make(**{"lens": (0, 1, 17, 70), **DECODE[name]}, fp8=True, device=device)
    skip_if_declined(lambda: latents.compare(attnkit.mla_decode, x, impl=impl))


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(DECODE_KERNELS) if p.id not in ("cpu", "torch")])
@pytest.mark.parametrize("H", [16, 128])
def test_large_decode_on_an_fp8_cache(H, impl, device):
    x = latents.make((8192, 1, 0, 777), device, H=H, S=64, fp8=True)
    skip_if_declined(lambda: latents.compare(attnkit.mla_decode, x, impl=impl))


def test_decode_checks_the_fp8_form():
    x = latents.make((5,), "cpu", fp8=True)
    with pytest.raises(ValueError, match=r"mla_decode: dim 2 of kv is 640, wanted 656"):
        attnkit.mla_decode(x.q, x.kv[..., :640], x.table)
    with pytest.raises(ValueError, match=r"mla_decode: latent and rope sizes is 256 \+ 64, wanted 512 \+ 64 with an fp8 cache"):
        attnkit.mla_decode(x.q[..., :320], x.kv, x.table, latent=256)


def test_what_write_latent_wrote_is_what_mla_decode_reads():
    table = attnkit.PageTable.of_lengths([20], S)
    g = torch.Generator().manual_seed(0)
    latent, rope = torch.randn(20, 512, generator=g), torch.randn(20, 64, generator=g)
    kv = torch.zeros(P, S, 656, dtype=torch.uint8)
    attnkit.write_latent(latent, rope, kv, torch.arange(20))
    q = torch.randn(1, 4, 576, generator=g)
    wide = torch.zeros(P, S, 576)
    wide.view(-1, 576)[:20] = torch.cat([latent, rope], 1)
    out, exact = (attnkit.mla_decode(q, c, table) for c in (kv, wide))
    assert (out - exact).norm() / exact.norm() < 0.1
