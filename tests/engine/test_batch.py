"""A step's tensors: rows that change by what changed equal rows laid out anew, and idle rows touch nothing."""

from __future__ import annotations

import random

import pytest
import torch

from attnkit.integrations.engine import LLM, SamplingParams
from attnkit.integrations.engine.batch import DecodeRows, build
from attnkit.integrations.engine.request import Request
from attnkit.integrations.engine.scheduler import Schedule

CPU = torch.device("cpu")


def decoding(name: str, length: int, page_size: int, dice: random.Random) -> Request:
    request = Request(name, [5] * (length - 1), SamplingParams(), limit=200, output=[dice.randrange(100)])
    request.computed = length - 1
    request.pages = dice.sample(range(1000), -(-length // page_size))
    return request


@pytest.mark.parametrize("seed", range(5))
def test_rows_kept_equal_rows_anew(seed):
    dice = random.Random(seed)
    S = 4
    kept = DecodeRows(6, 50, S, CPU)
    requests = [decoding(str(i), dice.randrange(1, 30), S, dice) for i in range(6)]
    chosen = requests
    for _ in range(60):
        if dice.random() < 0.3:
            chosen = dice.sample(requests, dice.randrange(1, 7))
        width = kept.update(chosen)
        anew = DecodeRows(6, 50, S, CPU)
        assert anew.update(chosen) == width
        assert torch.equal(kept.ints, anew.ints) and torch.equal(kept.lens, anew.lens)
        for row, request in enumerate(chosen):
            used = len(request.pages)
            assert torch.equal(kept.pages[row, :used], anew.pages[row, :used])
            assert kept.pages[row, :used].tolist() == request.pages
        for request in chosen:
            request.computed += 1
            request.output.append(dice.randrange(100))
            if len(request.pages) * S < request.length:
                request.pages.append(dice.randrange(1000))
            if dice.random() < 0.05:  # preempted: it comes back on other pages
                request.pages = [dice.randrange(1000) for _ in request.pages]


def test_layout_of_a_mixed_step():
    rows = DecodeRows(4, 8, 4, CPU)
    dice = random.Random(0)
    old = decoding("old", 6, 4, dice)
    fresh = Request("fresh", [11, 12, 13], SamplingParams(), 100, pages=[7])
    middle = Request("middle", list(range(20, 30)), SamplingParams(), 100, pages=[3, 1, 2], computed=4)
    batch = build(Schedule([old], [(fresh, 3), (middle, 5)]), rows, CPU)
    assert batch.tokens.tolist() == [old.output[-1], 11, 12, 13, 24, 25, 26, 27, 28]
    assert batch.positions.tolist() == [5, 0, 1, 2, 4, 5, 6, 7, 8]
    assert batch.slots.tolist() == [old.pages[1] * 4 + 1, 28, 29, 30, 4, 5, 6, 7, 8]
    assert batch.n_decode == 1 and batch.decode.lens.tolist() == [6]
    assert batch.prefill.cu_q.tolist() == [0, 3, 8] and batch.prefill.cu_k.tolist() == [0, 3, 12]
    assert batch.prefill.table.lens.tolist() == [3, 9]
    assert batch.prefill.context.tolist() == [28, 29, 30, 12, 13, 14, 15, 4, 5, 6, 7, 8]
    assert batch.rows.tolist() == [0, 3]  # the middle of a prompt draws nothing
    first = build(Schedule([], [(fresh, 3)]), rows, CPU)
    assert first.n_decode == 0 and first.decode is None and first.prefill.context is None
    assert rows.lens.tolist() == [0] * 4 and rows.ints[2].tolist() == [-1] * 4


@pytest.mark.parametrize("directory", ["tiny", "tiny_latent"])
def test_fault_07_idle_rows_write_nothing_and_read_nothing(directory, request):
    """CASES.md 7 and 8: the rows that pad a captured batch, in a cache full of NaN."""
    llm = LLM(request.getfixturevalue(directory), device="cpu", max_batch=8, num_pages=48)
    llm.cache.fill_(float("nan"))
    seen = []
    plain = llm.runner.logits

    def padded(step):
        if not step.prefill:
            n = len(step.decode)
            batch = build(step, llm.runner.rows, CPU)
            wide = llm.runner.rows.batch(8, 16)
            before = llm.cache.clone()
            exact = llm.model.forward(batch, llm.runner.caches)
            after = llm.cache.clone()
            seen.append(n)
            llm.cache.copy_(before)
            logits = llm.model.forward(wide, llm.runner.caches)
            assert torch.isfinite(logits).all()
            torch.testing.assert_close(logits[:n], exact, rtol=1e-4, atol=1e-4)
            assert torch.equal(llm.cache.isnan(), after.isnan())
            torch.testing.assert_close(llm.cache, after, equal_nan=True, rtol=1e-4, atol=1e-4)
        return plain(step)

    llm.runner.logits = padded
    with torch.inference_mode():
        llm.generate(
            ["abc", "a longer text than that", "x"], [SamplingParams(max_tokens=n, ignore_eos=True) for n in (4, 9, 30)]
        )
    assert set(seen) == {1, 2, 3}
