from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from attnkit.integrations.engine import LLM, SamplingParams, cli


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=80, highlight=False)


def shown(screen):
    return screen.file.getvalue()


def test_generate_prints_prompt_and_continuation(tiny, screen):
    cli.generate(tiny, ["def f(x):", "[red]abc"], max_tokens=12, device="cpu", console=screen)
    text = shown(screen)
    for output in LLM(tiny, device="cpu").generate(["def f(x):", "[red]abc"], SamplingParams(max_tokens=12)):
        assert output.text in text
    assert "def f(x):" in text and "[red]abc" in text  # a prompt is text, never markup
    assert "1 of 2" in text and "tokens/s (float32 on cpu)" in text


def test_a_notice_amid_the_text_is_printed_after_it(screen):
    notes = cli._Notes(screen)
    notes("before")
    with notes.after_the_text():
        screen.print("one ", end="")
        notes("amid")
        screen.print("text")
    notes("after")
    assert shown(screen) == "before\none text\namid\nafter\n"


def test_generate_goes_on_after_a_bad_prompt_and_exits_with_1(tiny, screen):
    with pytest.raises(SystemExit) as caught:
        cli.generate(tiny, ["", "abc"], max_tokens=4, device="cpu", console=screen)
    assert caught.value.code == 1
    assert "error: request '0': the prompt has no tokens" in shown(screen) and "4 tokens in" in shown(screen)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_dir": "/nowhere"}, "error: /nowhere/tokenizer.json: no such file"),
        ({"temperature": -1.0}, "error: SamplingParams: temperature is -1.0"),
        ({"dtype": "int3"}, "error: LLM: dtype is 'int3'"),
    ],
)
def test_generate_says_what_is_wrong_in_one_line(tiny, screen, change, message):
    from pathlib import Path

    arguments = {"model_dir": tiny, "prompts": ["a"], "device": "cpu", "console": screen} | change
    arguments["model_dir"] = Path(arguments["model_dir"])
    with pytest.raises(SystemExit):
        cli.generate(**arguments)
    assert shown(screen).startswith(message) and shown(screen).count("\n") == 1


def test_bench_prints_a_table_that_fits_and_writes_json(tiny, screen, tmp_path):
    rows = cli.bench(tiny, [1, 3], [5], [4, 6], device="cpu", json_path=tmp_path / "out.json", console=screen)
    assert [(r["batch"], r["prompt"], r["output"]) for r in rows] == [(1, 5, 4), (1, 5, 6), (3, 5, 4), (3, 5, 6)]
    assert all(r["tokens_per_s"] > 0 and 0 < r["itl_ms"] <= r["itl_p99_ms"] and r["ttft_ms"] > 0 for r in rows)
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["rows"] == rows and written["where"] == "float32 on cpu"
    assert max(len(line) for line in shown(screen).splitlines()) <= 80
    assert "tokens/s" in shown(screen)


def test_bench_says_what_is_wrong(tiny, screen):
    with pytest.raises(SystemExit):
        cli.bench(tiny, [1], [400], [4], device="cpu", console=screen)
    assert "the prompt has 400 tokens" in shown(screen)
