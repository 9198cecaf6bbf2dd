"""What SamplingParams promises, seen on generated tokens."""

from __future__ import annotations

import math

import pytest
import torch

from attnkit.integrations.engine import LLM, SamplingParams

from .checkpoints import tokens_of

PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def llm(tiny):
    return LLM(tiny, device="cpu", max_batch=8)


def run(llm, prompt=PROMPT, **params):
    output = llm.generate(prompt, SamplingParams(**({"max_tokens": 24, "ignore_eos": True} | params)))[0]
    assert output.error is None
    return output


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_tokens": 0}, "max_tokens is 0, wanted at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5, wanted a whole number"),
        ({"max_tokens": 3, "min_tokens": 4}, "min_tokens is 4, wanted 0 to 3"),
        ({"temperature": -0.1}, "temperature is -0.1, wanted at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot', wanted a number"),
        ({"temperature": True}, "temperature is True, wanted a number"),
        ({"top_k": -1}, "top_k is -1, wanted at least 0"),
        ({"top_p": 1.5}, "top_p is 1.5, wanted 0 to 1"),
        ({"min_p": -1}, "min_p is -1, wanted 0 to 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0, wanted a number above 0"),
        ({"presence_penalty": math.inf}, "presence_penalty is inf, wanted a finite number"),
        ({"seed": 2**63}, "seed is 9223372036854775808, wanted"),
        ({"logprobs": -1}, "logprobs is -1, wanted at least 0"),
        ({"stop": ["a", ""]}, "stop holds an empty string"),
        ({"stop": [1]}, "stop holds 1, wanted strings"),
        ({"stop_token_ids": "12"}, "stop_token_ids is '12', wanted a list of whole numbers"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"logit_bias": [1]}, "logit_bias is [1], wanted a dict"),
        ({"logit_bias": {"a": 1}}, "logit_bias has the key 'a'"),
        ({"logit_bias": {1: "a"}}, "logit_bias[1] is 'a', wanted a number"),
        ({"ignore_eos": 1}, "ignore_eos is 1, wanted True or False"),
    ],
)
def test_bad_params(params, message):
    with pytest.raises((ValueError, TypeError), match="SamplingParams: ") as caught:
        SamplingParams(**params)
    assert message in str(caught.value)


def test_a_seed_draws_the_same_tokens_in_any_company(llm):
    params = SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=7)
    alone = llm.generate(PROMPT, params)[0].token_ids
    others = [SamplingParams(max_tokens=30, temperature=2.0, ignore_eos=True)] * 3
    for place in range(4):
        company = [*others[:place], params, *others[place:]]
        outputs = llm.generate(["abc"] * place + [PROMPT] + ["xyz"] * (3 - place), company)
        assert outputs[place].token_ids == alone
    assert run(llm, temperature=1.0, seed=8).token_ids != alone
    assert run(llm, temperature=1.0).token_ids != run(llm, temperature=1.0).token_ids


def test_a_seed_survives_preemption(tiny):
    params = [SamplingParams(max_tokens=24, ignore_eos=True, temperature=1.0, seed=i) for i in range(5)]
    roomy = LLM(tiny, device="cpu").generate([PROMPT] * 5, params)
    tight = LLM(tiny, device="cpu", num_pages=6, page_size=8).generate([PROMPT] * 5, params)
    assert [o.token_ids for o in roomy] == [o.token_ids for o in tight]
    assert len({tuple(o.token_ids) for o in roomy}) == 5


def test_top_k_of_one_and_low_temperature_are_greedy(llm):
    greedy = run(llm).token_ids
    assert run(llm, temperature=3.0, top_k=1).token_ids == greedy
    assert run(llm, temperature=3.0, top_p=0.0).token_ids == greedy
    assert run(llm, temperature=3.0, min_p=1.0).token_ids == greedy
    assert run(llm, temperature=1e-3).token_ids == greedy
    assert run(llm, temperature=3.0).token_ids != greedy


def test_max_and_min_tokens_and_end_of_text(tiny, llm):
    greedy = run(llm, max_tokens=24).token_ids
    assert run(llm, max_tokens=5).token_ids == greedy[:5]
    stop = greedy[3]
    at = greedy.index(stop)
    ended = run(llm, stop_token_ids=[stop])
    assert (ended.token_ids, ended.finish_reason, ended.stopped_by) == (greedy[: at + 1], "stop", stop)
    assert ended.text == llm.tokenizer.decode(greedy[:at])
    late = run(llm, stop_token_ids=[stop], min_tokens=10)
    assert late.token_ids[:at] == greedy[:at] and stop not in late.token_ids[:10]
    assert len(late.token_ids) >= 10


def test_end_of_text_is_not_drawn_before_min_tokens_and_not_at_all_where_ignored(llm):
    likely = {"logit_bias": {0: 1000.0}, "max_tokens": 12}
    ended = llm.generate(PROMPT, SamplingParams(**likely))[0]
    assert (ended.token_ids, ended.finish_reason, ended.text) == ([0], "stop", "")
    later = llm.generate(PROMPT, SamplingParams(**likely, min_tokens=6))[0]
    assert len(later.token_ids) == 7 and later.token_ids[-1] == 0 and 0 not in later.token_ids[:-1]
    assert llm.generate(PROMPT, SamplingParams(**likely, ignore_eos=True))[0].token_ids == [0] * 12


def test_stop_strings(llm):
    whole = run(llm, max_tokens=60).text
    stop = whole[20:23]
    at = whole.index(stop)
    output = run(llm, max_tokens=60, stop=["never in it", stop])
    assert (output.text, output.finish_reason, output.stopped_by) == (whole[:at], "stop", stop)
    assert len(output.token_ids) < 60
    streamed = "".join(llm.stream(PROMPT, SamplingParams(max_tokens=60, ignore_eos=True, stop=stop)))
    assert streamed == whole[:at]
    late = run(llm, max_tokens=60, stop=stop, min_tokens=len(output.token_ids) + 1)
    assert len(late.token_ids) > len(output.token_ids) and late.text.startswith(whole[: at + 3])


def test_logprobs_are_those_of_the_model(llm):
    output = run(llm, max_tokens=6, logprobs=4, temperature=1.0, seed=3)
    assert len(output.logprobs) == 6
    for i, (token, row) in enumerate(zip(output.token_ids, output.logprobs)):
        assert next(iter(row)) == token and 4 <= len(row) <= 5
        prompt = output.prompt_token_ids + output.token_ids[:i]
        full = run(llm, prompt, max_tokens=1, logprobs=259).logprobs[0]
        assert sum(math.exp(v) for v in full.values()) == pytest.approx(1.0, abs=1e-4)
        best = sorted(full.values(), reverse=True)[:4]
        assert sorted(row.values(), reverse=True)[:4] == pytest.approx(best, abs=1e-3)
        assert row[token] == pytest.approx(full[token], abs=1e-3)
    mixed = llm.generate(["a", "b", "c"], [SamplingParams(max_tokens=2, logprobs=n) for n in (None, 0, 2)])
    assert mixed[0].logprobs is None and [len(r) for r in mixed[1].logprobs] == [1, 1]
    assert all(len(r) == 2 for r in mixed[2].logprobs)  # greedy: the drawn token is the most likely one


def test_penalties_against_repetition(llm):
    ids = tokens_of("abc")
    assert len(set(run(llm, frequency_penalty=1000.0).token_ids)) == 24
    assert len(set(run(llm, presence_penalty=1000.0).token_ids)) == 24
    strict = run(llm, ids, repetition_penalty=1e6, max_tokens=40).token_ids
    assert not set(strict) & set(ids) and len(set(strict)) == 40
    assert len(set(run(llm, logit_bias={5: 50.0}).token_ids)) == 1  # without a penalty nothing keeps it from repeating


def test_penalties_follow_the_model_step_by_step(llm):
    """The counts kept from step to step give what counting anew gives."""
    params = {"frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.3}
    output = run(llm, max_tokens=12, **params)
    for i, token in enumerate(output.token_ids):
        prompt = output.prompt_token_ids + output.token_ids[:i]
        row = run(llm, prompt, max_tokens=1, logprobs=259).logprobs[0]
        logits = torch.tensor([row[t] for t in range(259)])
        shift = _shift(llm, prompt)
        logits = logits + shift
        for t in set(prompt):
            logits[t] = logits[t] / 1.3 if logits[t] > 0 else logits[t] * 1.3
        for t in output.token_ids[:i]:
            logits[t] -= 0.7
        for t in set(output.token_ids[:i]):
            logits[t] -= 0.3
        assert int(logits.argmax()) == token


def _shift(llm, prompt):
    """log-probabilities plus this are the raw logits."""
    seen = []
    plain = llm.runner.logits
    llm.runner.logits = lambda step: seen.append(plain(step)) or seen[-1]
    try:
        run(llm, prompt, max_tokens=1)
    finally:
        llm.runner.logits = plain
    return torch.logsumexp(seen[0][0].float(), 0)


def test_logit_bias_and_allowed_tokens(llm):
    assert set(run(llm, logit_bias={9: 1000.0}).token_ids) == {9}
    greedy = run(llm).token_ids
    assert greedy[0] not in run(llm, logit_bias={greedy[0]: -1000.0}).token_ids
    allowed = [4, 33, 64, 258]
    assert set(run(llm, allowed_token_ids=allowed, temperature=5.0).token_ids) <= set(allowed)
    outputs = llm.generate([PROMPT] * 2, [SamplingParams(max_tokens=8, allowed_token_ids=[7]), SamplingParams(max_tokens=8)])
    assert outputs[0].token_ids == [7] * 8 and outputs[1].token_ids == greedy[:8]


def test_nothing_to_draw_from_fails_alone(llm):
    impossible = SamplingParams(max_tokens=4, allowed_token_ids=[0], min_tokens=2)
    outputs = llm.generate([PROMPT] * 2, [impossible, SamplingParams(max_tokens=4)])
    assert outputs[0].finish_reason == "error" and "no token is allowed" in outputs[0].error
    assert outputs[1].error is None
