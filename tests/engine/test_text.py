"""Text comes piece by piece, never with half a character and never with the beginning of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnkit.integrations.engine.text import TextStream

from .checkpoints import byte_tokenizer, tokens_of

TOKENIZER = byte_tokenizer()


def run(data, stop=(), prompt="def f"):
    stream = TextStream(TOKENIZER, tokens_of(prompt), stop)
    pieces = [stream.push(token) for token in tokens_of(data)]
    return stream, [*pieces, stream.finish()]


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_pieces_join_to_the_text_and_are_whole_characters(text):
    stream, pieces = run(text)
    assert "".join(pieces) == stream.text == text
    if "\ufffd" not in text:
        at = 0
        for character, end in zip(text, [sum(len(c.encode()) for c in text[: i + 1]) for i in range(len(text))]):
            assert "".join(pieces[at:end]) == character  # it comes with its last byte, no earlier and no later
            at = end


def test_a_character_of_four_bytes_comes_in_one_piece():
    assert run("a\U0001f600b")[1] == ["a", "", "", "", "\U0001f600", "b", ""]


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40))
def test_bytes_that_are_no_text_do_not_hold_the_rest_back(data):
    stream, pieces = run(data + b"tail of plain text")
    assert "".join(pieces) == stream.text == (data + b"tail of plain text").decode(errors="replace")
    assert pieces[-2:] == ["t", ""]


def test_endless_garbage_flows():
    pieces = run(b"\xff" * 50)[1]
    assert sum(len(p) for p in pieces[:-1]) >= 40


def test_text_decoded_at_once_is_the_same():
    text = "größer \U0001f600 Σ"
    stream = TextStream(TOKENIZER, tokens_of("def f"))
    assert stream.finish(tokens_of(text)) == stream.text == text


def test_special_tokens_are_not_text():
    stream = TextStream(TOKENIZER, tokens_of("x"))
    assert [stream.push(t) for t in [3 + ord("a"), 1, 2, 3 + ord("b")]] == ["a", "", "", "b"]


@pytest.mark.parametrize(
    ("stop", "text", "shown", "hit"),
    [
        (("END",), "before ENDafter", "before ", "END"),
        (("END",), "EN EN ENE", "EN EN ENE", None),
        (("abc", "b"), "xabc", "xa", "b"),
        (("\n\n",), "a\nb\n\nc", "a\nb", "\n\n"),
        (("aab",), "aaab", "a", "aab"),
        (("é!",), "café!x", "caf", "é!"),
    ],
)
def test_stop_strings(stop, text, shown, hit):
    stream = TextStream(TOKENIZER, tokens_of("p"), stop)
    seen = ""
    for token in tokens_of(text):
        seen += stream.push(token)
        assert shown.startswith(seen)
        if stream.stopped_by:
            break
    seen += stream.finish()
    assert (seen, stream.text, stream.stopped_by) == (shown, shown, hit)
