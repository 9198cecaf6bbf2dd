"""paged_decode: every kernel, every case, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import attnkit
from attnkit.decode import KERNELS
from tests import cases, inputs
from tests.close import assert_close
from tests.kernels import every, skip_if_declined


def run(case, impl, device, seed=0, **more):
    x = inputs.make(case, device, seed)
    out = torch.full((*x.q.shape[:-1], case.Dv or case.D), float("nan"), dtype=case.dtype, device=device)
    got, lse = skip_if_declined(
        lambda: attnkit.paged_decode(x.q, x.kv, x.table, **x.options, out=out, return_lse=True, impl=impl, **more)
    )
    assert got is out
    return x, got, lse


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
@pytest.mark.parametrize("case", cases.DECODE, ids=cases.ids(cases.DECODE))
def test_matches_float64(case, impl, device):
    x, out, lse = run(case, impl, device)
    truth, plain = x.truth(), x.plain()
    assert_close(out, truth[0], plain[0])
    assert_close(lse, truth[1], plain[1].float(), "lse")


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id not in ("cpu", "torch")])
@pytest.mark.parametrize("case", cases.LARGE_DECODE, ids=cases.ids(cases.LARGE_DECODE))
def test_large_matches_float64(case, impl, device):
    test_matches_float64(case, impl, device)


@pytest.mark.gpu
@pytest.mark.parametrize(("impl", "device"), [p for p in every(KERNELS) if p.id not in ("cpu", "torch")])
@pytest.mark.parametrize("last", [300, 200])
def test_more_sequences_than_lanes(last, impl, device):
    """With equal lengths no head is cut."""
    test_matches_float64(replace(cases.BASE, lens=(*[300] * 63, last), Hq=32, Hkv=8, D=128), impl, device)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_three_dimensional_q(impl, device):
    x = inputs.make(cases.BASE, device)
    four = skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl=impl))
    three = attnkit.paged_decode(x.q[:, 0], x.kv, x.table, impl=impl)
    assert three.shape == x.q[:, 0].shape
    assert torch.equal(three, four[:, 0])


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_empty_batch(impl, device):
    x = inputs.make(cases.BASE, device)
    table = attnkit.PageTable(x.table.pages[:0], x.table.lens[:0])
    out, lse = skip_if_declined(lambda: attnkit.paged_decode(x.q[:0], x.kv, table, return_lse=True, impl=impl))
    assert out.shape[0] == lse.shape[0] == 0


INVARIANT = replace(cases.BASE, lens=(200, 37, 129, 64, 1), batch_invariant=True, Hq=8, Hkv=2)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_batch_invariant_bits(impl, device):
    """A sequence alone, and last in a batch, has the bits it has in the middle of another."""
    x, out, lse = run(INVARIANT, impl, device)
    for b in range(len(INVARIANT.lens)):
        alone = attnkit.PageTable(x.table.pages[b : b + 1], x.table.lens[b : b + 1])
        o, l = attnkit.paged_decode(x.q[b : b + 1], x.kv, alone, return_lse=True, batch_invariant=True, impl=impl)
        assert torch.equal(o[0], out[b]) and torch.equal(l[0], lse[b])
    order = torch.tensor([4, 2, 0, 1, 3], device=device)
    table = attnkit.PageTable(x.table.pages[order], x.table.lens[order])
    shuffled = attnkit.paged_decode(x.q[order], x.kv, table, batch_invariant=True, impl=impl)
    assert torch.equal(shuffled, out[order])


@pytest.mark.gpu
@pytest.mark.parametrize("Hq", [1, 4, 12, 32, 64])
def test_batch_invariant_bits_in_a_large_batch(Hq):
    """A hundred sequences fill the GPU, one does not: the same bits by other configs and other numbers of CTAs."""
    case = replace(INVARIANT, lens=(200, 37, 1129, 64, 1) * 20, Hq=Hq, Hkv=1)
    x, out, lse = run(case, "cuda_sm90", "cuda")
    for b in range(5):
        alone = attnkit.PageTable(x.table.pages[b : b + 1], x.table.lens[b : b + 1])
        o, l = attnkit.paged_decode(x.q[b : b + 1], x.kv, alone, return_lse=True, batch_invariant=True, impl="cuda_sm90")
        assert torch.equal(o[0], out[b]) and torch.equal(l[0], lse[b])


@pytest.mark.gpu
@pytest.mark.parametrize(("Hq", "Q"), [(1, 1), (12, 1), (32, 1), (12, 4)])
def test_many_pieces_meet(Hq, Q):
    """One long sequence over all CTAs: pieces meet in groups, and those again; the counters are zero for the next call."""
    x = inputs.make(replace(cases.BASE, lens=(60000,), Hq=Hq, Hkv=1, D=128, Q=Q), "cuda")
    truth, plain = x.truth(), x.plain()
    for _ in range(3):
        out = torch.full_like(x.q, float("nan"))
        skip_if_declined(lambda out=out: attnkit.paged_decode(x.q, x.kv, x.table, out=out, impl="cuda_sm90"))
        assert_close(out, truth[0], plain[0])


@pytest.mark.gpu
@pytest.mark.parametrize("Hq", [4, 12, 20, 32, 64])
def test_scores_far_apart(Hq):
    """What a row's weights count from rises many times on the way."""
    x = inputs.make(replace(cases.BASE, lens=(1500, 3, 700), Hq=Hq, Hkv=1, D=128), "cuda")
    x.q.mul_(50)
    truth, plain = x.truth(), x.plain()
    out = torch.full_like(x.q, float("nan"))
    skip_if_declined(lambda: attnkit.paged_decode(x.q, x.kv, x.table, out=out, impl="cuda_sm90"))
    assert_close(out, truth[0], plain[0])


def test_batch_invariance_has_a_negative_control():
    """Splitting a row's keys elsewhere changes its bits: the comparison above can fail."""
    x = inputs.make(replace(INVARIANT, lens=(200,), dtype=torch.float32))
    whole = x.truth(torch.float32)[0]
    k, v = x.kv[:, 0], x.kv[:, 1]
    parts = []
    for lo, hi in ((0, 112), (112, 200)):
        at = torch.arange(lo, hi)
        page, slot = x.table.pages[0].long()[at // 16], at % 16
        seen = torch.ones(1, hi - lo, dtype=torch.bool)
        parts += attnkit.reference.attention(x.q[0], k[page, slot], v[page, slot], seen, scale=64**-0.5, compute=torch.float32)
    merged = attnkit.merge_states(parts[0], parts[1].contiguous(), parts[2], parts[3].contiguous(), impl="torch")[0]
    assert not torch.equal(merged, whole[0])
    assert torch.allclose(merged, whole[0], atol=1e-5)


@pytest.mark.parametrize(("impl", "device"), every(KERNELS))
def test_shared_prefix_given_once(impl, device):
    """One prefix for the whole batch through paged_prefill, each tail through paged_decode, joined by merge_states."""
    B, S, prefix, tails = 3, 16, 32, (5, 17, 1)
    case = replace(cases.BASE, lens=(prefix, *(prefix + n for n in tails)))
    x = inputs.make(case, device)
    shared = x.table.pages[:1]
    pages = torch.cat([shared[:, : prefix // S].expand(B, -1), x.table.pages[1:, prefix // S :]], 1).contiguous()
    whole = attnkit.PageTable(pages, x.table.lens[1:].contiguous())
    q = x.q[1:, 0].contiguous()
    want = attnkit.paged_decode(q, x.kv, whole, impl="torch")
    once = attnkit.PageTable(shared, torch.tensor([prefix], dtype=torch.int32, device=device))
    tail = attnkit.PageTable(pages[:, prefix // S :].contiguous(), whole.lens - prefix)
    cu = torch.tensor([0, B], dtype=torch.int32, device=device)
    a = skip_if_declined(lambda: attnkit.paged_prefill(q, x.kv, once, cu, causal=False, return_lse=True))
    b = skip_if_declined(lambda: attnkit.paged_decode(q, x.kv, tail, return_lse=True, impl=impl))
    merged, _ = attnkit.merge_states(*a, *b)
    assert torch.allclose(merged.float(), want.float(), atol=0.02)


LATE = r"""
struct Copies { int* to[4]; const int* from[4]; long long words[4]; };

extern "C" __global__ void late(const __grid_constant__ Copies c) {
  asm volatile("griddepcontrol.launch_dependents;");
  const long long until = clock64() + 100000;
  while (clock64() < until) {
  }
  for (int i = 0; i < 4; ++i) {
    for (long long j = threadIdx.x; j < c.words[i]; j += blockDim.x) c.to[i][j] = c.from[i][j];
  }
}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("B", [1, 3, 40, 300])
def test_inputs_that_the_kernel_before_writes_at_its_end(B):
    """The CUDA kernel starts while its predecessor runs, and may only guess what that will have written."""
    from attnkit.backends.cuda import images, launch, nvrtc

    case = replace(cases.BASE, lens=tuple(37 * i % 500 + 1 for i in range(B)), Hq=8, D=128)
    x = inputs.make(case, "cuda")
    call = lambda: attnkit.paged_decode(x.q, x.kv, x.table, impl="cuda_sm90")  # noqa: E731
    want = skip_if_declined(call)
    written = [t.view(torch.int32) for t in (x.q, x.kv, *x.table)]
    good = [t.clone() for t in written]
    addresses = [t.data_ptr() for t in (*written, *good)]
    sizes = [t.numel() for t in written]
    image = nvrtc.compile_cubin(LATE, "late.cu", [*images.FLAGS, f"--gpu-architecture={images.ARCH}"])
    late = launch.compiled().CudaKernel(image, "late", 0, 0)
    run = launch.compiled().CudaLaunch(
        late, (1, 1, 1), (1024, 1, 1), (1, 1, 1), False, bytes(96), [8 * i for i in range(12)]
    )  # fmt: skip
    for stale in (0, 1, 1 << 30, -1):
        written[0].fill_(-1)  # NaN
        written[1].fill_(-1)
        written[2].fill_(stale)
        written[3].fill_(case.S * x.table.pages.shape[1] if stale else 1)
        torch.cuda.synchronize()
        run(launch.stream_of(0), *addresses, *sizes)
        assert torch.equal(call(), want)
