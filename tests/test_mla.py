"""mla_decode and mla_prefill: every kernel against float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import attnkit
from attnkit import reference
from attnkit.mla import DECODE_KERNELS, PREFILL_KERNELS
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import every, skip_if_declined


@dataclass(frozen=True)
class Latent:
    lens: tuple[int, ...] = (0, 1, 15, 17, 40)
    Q: int = 1
    H: int = 16
    C: int = 128
    R: int = 64
    S: int = 16
    dtype: torch.dtype = torch.bfloat16
    tree: bool = False
    batch_invariant: bool = False

    @property
    def id(self) -> str:
        flags = "-tree" * self.tree + "-invariant" * self.batch_invariant
        return f"B{len(self.lens)}-Q{self.Q}-H{self.H}-C{self.C}-R{self.R}-S{self.S}-{cases.SHORT[self.dtype]}{flags}"


DECODE = [
    Latent(),
    Latent(C=512, lens=(0, 33)),
    Latent(C=256, lens=(5, 33), S=64),
    Latent(H=1),
    Latent(H=5, Q=2),
    Latent(H=32, Q=4, tree=True, lens=(4, 40)),
    Latent(dtype=torch.float16, S=1, lens=(3, 9)),
    Latent(dtype=torch.float32),
    Latent(batch_invariant=True),
]
LARGE = [
    Latent(H=128, C=512, S=64, lens=(8192, 1, 0, 777)),
    Latent(H=16, C=512, S=16, lens=(16384, 300)),
    Latent(H=128, C=512, S=64, Q=2, lens=(4096, 300)),
]


def make(case: Latent, device: str):
    """Reuses the paged pool: one latent head whose values are its first C columns."""
    D = case.C + case.R
    paged = cases.Case(
        lens=case.lens, Q=case.Q, Hq=case.H, Hkv=1, D=D, S=case.S, dtype=case.dtype, layout="pair", tree=case.tree
    )
    x = inputs.make(paged, device)
    kv = x.kv[0][:, :, 0]
    scale = (128 + case.R) ** -0.5

    def truth(compute):
        k = x.kv[0]
        clean = {**x.clean, "scale": scale}
        out, lse = reference.paged_attention(x.q.flatten(0, 1), k, k[..., : case.C], *x.table, x.cu_q, compute=compute, **clean)
        return out.view(*x.q.shape[:-1], case.C), lse.view(x.q.shape[:-1])

    return x, kv, truth


@pytest.mark.parametrize(("impl", "device"), every(DECODE_KERNELS))
@pytest.mark.parametrize("case", DECODE, ids=lambda c: c.id)
def test_decode_matches_float64(case, impl, device):
    x, kv, truth = make(case, device)
    options = {"tree_mask": x.options["tree_mask"]} if case.tree else {}
    out, lse = skip_if_declined(
        lambda: attnkit.mla_decode(
            x.q, kv, x.table, latent=case.C, return_lse=True, impl=impl, batch_invariant=case.batch_invariant, **options
        )
    )
    want, plain = truth(torch.float64), truth(case.dtype)
    assert_close(out, want[0], plain[0])
    assert_close(lse, want[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(DECODE_KERNELS) if p.id not in ("cpu", "torch")])
@pytest.mark.parametrize("case", LARGE, ids=lambda c: c.id)
def test_large_decode_matches_float64(case, impl, device):
    test_decode_matches_float64(case, impl, device)


@dataclass(frozen=True)
class Ragged:
    q_lens: tuple[int, ...] = (0, 1, 17, 33, 4)
    k_lens: tuple[int, ...] = (0, 5, 17, 33, 40)
    H: int = 2
    Hk: int = 2
    D: int = 192
    Dv: int = 128
    dtype: torch.dtype = torch.bfloat16
    causal: bool = True
    window: int | None = None


PREFILL = [
    Ragged(),
    Ragged(causal=False),
    Ragged(D=64, Dv=64, H=6, window=9),
    Ragged(D=128, Dv=128, dtype=torch.float16),
    Ragged(D=96, Dv=96, dtype=torch.float32),
]
LARGE_PREFILL = [
    Ragged(q_lens=(2000, 1, 513), k_lens=(2000, 700, 513), H=16, Hk=16),
    Ragged(q_lens=(1024,), k_lens=(4096,), H=32, Hk=8, D=128, Dv=128),
]


@pytest.mark.parametrize(("impl", "device"), every(PREFILL_KERNELS))
@pytest.mark.parametrize("case", PREFILL, ids=repr)
def test_prefill_matches_float64(case, impl, device):
    g = torch.Generator(device=device).manual_seed(0)
    T, N = sum(case.q_lens), sum(case.k_lens)
    q, k, v = (
        torch.randn(n, h, d, generator=g, device=device).to(case.dtype)
        for n, h, d in ((T, case.H, case.D), (N, case.Hk, case.D), (N, case.Hk, case.Dv))
    )
    cu_q, cu_k = (torch.tensor([0, *n], device=device).cumsum(0).int() for n in (case.q_lens, case.k_lens))
    out, lse = skip_if_declined(
        lambda: attnkit.mla_prefill(q, k, v, cu_q, cu_k, causal=case.causal, window=case.window, return_lse=True, impl=impl)
    )
    options = {"scale": case.D**-0.5, "causal": case.causal, "window": case.window or 0}
    truth = reference.ragged_attention(q, k, v, cu_q, cu_k, **options)
    plain = reference.ragged_attention(q, k, v, cu_q, cu_k, compute=case.dtype, **options)
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(PREFILL_KERNELS) if p.id not in ("cpu", "torch")])
@pytest.mark.parametrize("case", LARGE_PREFILL, ids=repr)
def test_large_prefill_matches_float64(case, impl, device):
    test_prefill_matches_float64(case, impl, device)
