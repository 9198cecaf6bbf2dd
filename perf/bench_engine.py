"""The engine end to end on the bundled checkpoint: tokens a second, beside transformers' own generate.

With --benchmark both run in turn, greedy, on the same prompts and in the same dtype; without it the engine
only has to give transformers' tokens for a few steps.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import pytest
import torch

from attnkit.demo import checkpoint

engine = pytest.importorskip("attnkit.integrations.engine", reason="attnkit is not installed (pip install -e .)")

PROMPT, ROUNDS = 64, 3
#: Tokens a request generates, enough for decoding to be nearly all of the time; and the batches.
OUTPUT = 128
BATCHES = (1, 8, 32) if torch.cuda.is_available() else (1, 8)


@pytest.fixture(scope="module")
def llm():
    try:
        where = checkpoint()
    except RuntimeError as missing:
        pytest.skip(str(missing))
    return engine.LLM(where, max_batch=32)


@pytest.fixture(scope="module")
def theirs(llm):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=llm.dtype)
    return model.to(llm.device).eval()


def prompts(batch: int, length: int) -> list[list[int]]:
    """Pieces of this file, as bytes: text of the kind the checkpoint knows."""
    text = Path(__file__).read_bytes() * 8
    return [list(text[97 * i : 97 * i + length]) for i in range(batch)]


def ours(llm, ids: list[list[int]], output: int) -> list[list[int]]:
    params = engine.SamplingParams(max_tokens=output, ignore_eos=True)
    return [list(o.token_ids) for o in llm.generate(ids, params)]


def transformers_generate(model, ids: list[list[int]], output: int) -> list[list[int]]:
    x = torch.tensor(ids, device=model.device)
    with torch.inference_mode():
        out = model.generate(
            x, attention_mask=torch.ones_like(x), max_new_tokens=output, min_new_tokens=output, do_sample=False, pad_token_id=0
        )
    return out[:, x.shape[1] :].tolist()


def test_engine_tokens(bench, llm, theirs):
    """The gate: greedy tokens are transformers' own, but for near ties of a 16-bit model."""
    ids = prompts(3, 20)
    a, b = ours(llm, ids, 8), transformers_generate(theirs, ids, 8)
    same = sum(x == y for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True))
    assert same >= (24 if llm.dtype == torch.float32 else 18), (a, b)


@pytest.mark.parametrize("batch", BATCHES)
def test_engine_decode(batch, bench, llm, theirs, request):
    if not bench.timed:
        pytest.skip("timed with --benchmark only")
    ids = prompts(batch, PROMPT)
    times: dict[str, list[float]] = {"attnkit": [], "transformers": []}
    runs = {"attnkit": lambda: ours(llm, ids, OUTPUT), "transformers": lambda: transformers_generate(theirs, ids, OUTPUT)}
    ours(llm, ids, OUTPUT)  # compiles and captures
    transformers_generate(theirs, ids, 8)
    for _ in range(ROUNDS):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    rate = {name: batch * OUTPUT / statistics.median(t) for name, t in times.items()}
    ratio = statistics.median(b / a for a, b in zip(times["attnkit"], times["transformers"], strict=True))
    row = {
        "case": f"tiny-B{batch}-prompt{PROMPT}-output{OUTPUT}",
        "dtype": str(llm.dtype).removeprefix("torch."),
        "tokens_per_s": rate["attnkit"],
        "transformers_tokens_per_s": rate["transformers"],
        "ratio": ratio,
    }
    bench.engine.append(row)
    benchmark = request.getfixturevalue("benchmark")
    benchmark.pedantic(runs["attnkit"], rounds=1, iterations=1)
    benchmark.extra_info.update(row)
