"""One request's fate never touches another's: bad requests, cancels, preemption, a full pool, NaN."""

from __future__ import annotations

import itertools
import random

import pytest

import attnkit
from attnkit.integrations.engine import LLM, RequestError, SamplingParams

from .checkpoints import tokens_of

TEXTS = ["def f(x):", "a", "Some longer text, of more than one page of tokens.", "0123456789abcdef", "x = "]


def make(directory, **options):
    llm = LLM(directory, **({"device": "cpu", "max_batch": 8} | options))
    llm.cache.fill_(float("nan"))
    return llm


def free_pages(llm):
    return llm.scheduler.pool.available == llm.scheduler.pool.num_pages


@pytest.fixture(scope="module", params=["tiny", "tiny_latent"])
def alone(request):
    """(directory, what each text gives on its own)"""
    directory = request.getfixturevalue(request.param)
    llm = make(directory)
    return directory, [llm.generate(t, params(24))[0].token_ids for t in TEXTS]


def params(n=24, **changes):
    return SamplingParams(**({"max_tokens": n, "ignore_eos": True} | changes))


def drive(llm, wanted, at_step=lambda step: None, limit=2000):
    """Step until all of ``wanted`` ended: {id: output}. Asserts that each ends once."""
    done, streamed = {}, {}
    for step in range(limit):
        if not llm.busy:
            break
        at_step(step)
        for out in llm.step():
            assert out.request_id not in done, "something came after the end"
            ids, text = streamed.get(out.request_id, ([], ""))
            streamed[out.request_id] = (ids + out.token_ids, text + out.text)
            if out.output is not None:
                done[out.request_id] = out.output
    assert not llm.busy and set(wanted) <= set(done)
    for name, output in done.items():
        assert streamed[name] == (output.token_ids, output.text)
    return done


def test_together_as_alone(alone):
    directory, wanted = alone
    assert [o.token_ids for o in make(directory).generate(TEXTS, params())] == wanted


def test_arrivals_in_the_middle_change_nothing(alone):
    directory, wanted = alone
    llm = make(directory, max_batch=3, max_step_tokens=16)
    queue = dict(enumerate(TEXTS))
    names = {}

    def arrive(step):
        if step % 4 == 1 and queue:
            i = min(queue)
            names[i] = llm.add(queue.pop(i), params())

    names[0] = llm.add(queue.pop(0), params())
    done = drive(llm, [], arrive)
    while queue:
        arrive(1)
        done |= drive(llm, [])
    assert [done[names[i]].token_ids for i in range(len(TEXTS))] == wanted
    assert free_pages(llm)


@pytest.mark.parametrize("prefix_cache", [False, True])
def test_a_full_pool_and_preemption_change_nothing(alone, prefix_cache):
    directory, wanted = alone
    llm = make(directory, num_pages=12, page_size=8, prefix_cache=prefix_cache)
    names = [llm.add(t, params()) for t in TEXTS]
    requests = [llm._requests[n] for n in names]
    done = drive(llm, names)
    assert [done[n].token_ids for n in names] == wanted
    assert sum(r.preemptions for r in requests) > 0
    assert free_pages(llm)


@pytest.mark.parametrize("seed", range(6))
def test_fault_22_cancels_change_nobody_else(alone, seed):
    """CASES.md 22: requests that share a prefix, cancelled at any step, in a pool that is full."""
    directory, wanted = alone
    dice = random.Random(seed)
    llm = make(directory, num_pages=20, page_size=8, prefix_cache=True, max_step_tokens=24)
    keep = [llm.add(t, params()) for t in TEXTS]
    doomed = [llm.add(TEXTS[2] + "!" * i, params(60)) for i in range(4)]
    when = {name: dice.randrange(1, 12) for name in doomed}

    def cancel(step):
        for name in doomed:
            if when[name] == step:
                assert llm.cancel(name)

    done = drive(llm, keep + doomed, cancel)
    assert [done[n].token_ids for n in keep] == wanted
    assert {done[n].finish_reason for n in doomed} == {"cancel"}
    assert not llm.cancel(keep[0]) and not llm.cancel("nobody")
    assert free_pages(llm)


def test_prefix_cache_gives_the_same_tokens_from_fewer(alone):
    directory, wanted = alone
    llm = make(directory, prefix_cache=True, page_size=8)
    for round_number in range(2):
        outputs = llm.generate(TEXTS, params())
        assert [o.token_ids for o in outputs] == wanted
        assert (outputs[2].cached_tokens > 0) == bool(round_number)


def test_fault_06_nan_in_one_requests_pages_fails_it_alone(alone):
    """CASES.md 6: and whoever gets those pages next is not touched either."""
    directory, wanted = alone
    llm = make(directory, num_pages=40, page_size=8)
    names = [llm.add(t, params()) for t in TEXTS]

    def poison(step):
        if step == 5:
            llm.cache[:, llm._requests[names[2]].pages] = float("nan")

    done = drive(llm, names, poison)
    assert done[names[2]].finish_reason == "error" and "NaN" in done[names[2]].error
    assert done[names[2]].token_ids == wanted[2][:5]
    for i in (0, 1, 3, 4):
        assert done[names[i]].token_ids == wanted[i]
    assert free_pages(llm)
    assert [o.token_ids for o in llm.generate(TEXTS, params())] == wanted


BAD = {
    "empty text": ("", "the prompt has no tokens"),
    "no tokens": ([], "the prompt has no tokens"),
    "too long": ([5] * 256, "the prompt has 256 tokens, at most 255 leave room to generate"),
    "out of vocabulary": ([5, 259], "token 259, which is outside [0, 259)"),
    "negative": ([5, -1], "token -1, which is outside [0, 259)"),
    "not a number": ([5, "6"], "holds '6', wanted token ids"),
    "true": ([5, True], "holds True, wanted token ids"),
    "bytes": (b"abc", "the prompt is a bytes, wanted text or token ids"),
    "nothing": (None, "the prompt is a NoneType, wanted text or token ids"),
    "half a surrogate": ("a\ud800", "the prompt is not valid text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_prompt_fails_alone(tiny, kind):
    prompt, message = BAD[kind]
    llm = make(tiny)
    outputs = llm.generate([TEXTS[0], prompt, TEXTS[1]], params())
    assert [o.finish_reason for o in outputs] == ["length", "error", "length"]
    assert message in outputs[1].error and outputs[1].token_ids == []
    assert [outputs[i].token_ids for i in (0, 2)] == [o.token_ids for o in llm.generate(TEXTS[:2], params())]
    with pytest.raises(RequestError) as caught:
        llm.add(prompt, params())
    assert message in str(caught.value)
    assert not llm.busy and free_pages(llm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop_token_ids": [259]}, "stop_token_ids holds token 259, which is outside [0, 259)"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids holds token -1"),
        ({"logit_bias": {300: 1.0}}, "logit_bias holds token 300"),
        ({"logprobs": 260}, "logprobs is 260, wanted at most V = 259"),
    ],
)
def test_params_that_do_not_fit_the_vocabulary_fail_alone(tiny, change, message):
    llm = make(tiny)
    outputs = llm.generate(TEXTS[:2], [params(), params(**change)])
    assert outputs[0].error is None and message in outputs[1].error


def test_params_of_another_type_and_names_used_twice(tiny):
    llm = make(tiny)
    assert "params is a dict, wanted SamplingParams" in llm.generate(["a"], [{"max_tokens": 3}])[0].error
    llm.add("a", params(), request_id="same")
    with pytest.raises(RequestError, match="'same': there is one with this id already"):
        llm.add("b", params(), request_id="same")
    assert drive(llm, ["same"])["same"].finish_reason == "length"
    with pytest.raises(ValueError, match="2 params for 1 prompts"):
        llm.generate(["a"], [params(), params()])


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"page_size": 12}, "page_size is 12, wanted a power of two from 1 to 256"),
        ({"page_size": 512}, "page_size is 512"),
        ({"max_batch": 0}, "max_batch is 0, wanted a whole number, 1 or more"),
        ({"num_pages": -3}, "num_pages is -3"),
        ({"max_len": 2.5}, "max_len is 2.5"),
    ],
)
def test_bad_options(tiny, option, message):
    with pytest.raises(ValueError, match="LLM: ") as caught:
        LLM(tiny, device="cpu", **option)
    assert message in str(caught.value)


def test_a_text_ends_where_the_pool_or_the_context_does(tiny):
    by_pool = make(tiny, num_pages=3, page_size=8).generate("abcd", params(None))[0]
    assert (len(by_pool.token_ids), by_pool.finish_reason) == (20, "length")
    by_context = make(tiny, max_len=10).generate("abcd", params(None))[0]
    assert by_context.token_ids == by_pool.token_ids[:6]


@pytest.mark.parametrize("page_size", [1, 2, 64, 256])
def test_page_sizes(alone, page_size):
    directory, wanted = alone
    assert [o.token_ids for o in make(directory, page_size=page_size).generate(TEXTS, params())] == wanted


def test_streams_are_the_text_and_run_together(tiny):
    llm = make(tiny)
    wanted = [o.text for o in llm.generate(TEXTS[:3], params(40))]
    streams = [llm.stream(t, params(40)) for t in TEXTS[:3]]
    pieces = [[] for _ in streams]
    for turn in itertools.zip_longest(*streams):
        for box, piece in zip(pieces, turn):
            box.append(piece or "")
    assert ["".join(p) for p in pieces] == wanted
    assert all(len([x for x in p if x]) > 10 for p in pieces)
    assert free_pages(llm)


def test_a_closed_stream_ends_its_request_and_no_other(tiny):
    llm = make(tiny)
    wanted = llm.generate(TEXTS[0], params(60))[0].text
    other = llm.stream(TEXTS[0], params(60))
    closing = llm.stream(TEXTS[1], params(200))
    first = next(other)
    next(closing)
    closing.close()
    assert first + "".join(other) == wanted
    assert not llm.busy and free_pages(llm) and not llm._requests and not llm._dropped


def test_step_is_not_robbed_by_generate(tiny):
    """Outputs that came while generate was stepping wait for their reader."""
    llm = make(tiny)
    name = llm.add(TEXTS[0], params(5))
    llm.generate(TEXTS[1], params(30))
    assert llm.busy
    outputs = llm.step()
    assert [o.request_id for o in outputs] == [name] * 5 and outputs[-1].output.finish_reason == "length"
    assert not llm.busy


def test_an_interrupted_generate_leaves_a_working_engine(tiny, monkeypatch):
    llm = make(tiny)
    wanted = [o.token_ids for o in llm.generate(TEXTS, params())]
    plain, calls = llm.runner.logits, itertools.count()

    def interrupted(step):
        if next(calls) == 7:
            raise KeyboardInterrupt
        return plain(step)

    monkeypatch.setattr(llm.runner, "logits", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(TEXTS, params())
    assert [o.token_ids for o in llm.generate(TEXTS, params())] == wanted
    assert free_pages(llm) and not llm._requests


def test_a_step_that_failed_can_be_repeated(tiny, monkeypatch):
    llm = make(tiny)
    wanted = [o.token_ids for o in llm.generate(TEXTS, params())]
    names = [llm.add(t, params()) for t in TEXTS]
    plain, calls = llm.runner.model.forward, itertools.count()

    def failing(batch, caches):
        if next(calls) % 5 == 3:
            raise RuntimeError("out of memory")
        return plain(batch, caches)

    monkeypatch.setattr(llm.runner.model, "forward", failing)
    done = {}
    while llm.busy:
        try:
            done |= {o.request_id: o.output for o in llm.step() if o.output}
        except RuntimeError as error:
            assert str(error) == "out of memory"
    assert [done[n].token_ids for n in names] == wanted


def test_the_public_names_are_the_engines():
    assert attnkit.LLM is LLM and attnkit.SamplingParams is SamplingParams


def test_token_ids_as_one_prompt_and_as_many(tiny):
    llm = make(tiny)
    ids = tokens_of(TEXTS[0])
    same = [llm.generate(p, params())[0].token_ids for p in (TEXTS[0], ids, [ids], tuple(ids))]
    assert all(s == same[0] for s in same) and llm.generate([]) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_and_stays_close(tiny, dtype):
    exact, half = (LLM(tiny, device="cpu", dtype=d).generate(TEXTS, params(8, logprobs=0)) for d in ("float32", dtype))
    for a, b in zip(exact, half):
        if a.token_ids[0] == b.token_ids[0]:
            first = a.token_ids[0]
            assert a.logprobs[0][first] == pytest.approx(b.logprobs[0][first], abs=0.3)
    assert sum(a.token_ids[0] == b.token_ids[0] for a, b in zip(exact, half)) >= len(TEXTS) - 1
