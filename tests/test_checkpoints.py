"""The bundled checkpoints: what they weigh, what they reached, and a tokenizer that loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

import attnkit.integrations

CHECKPOINTS = Path(attnkit.integrations.__path__[0]) / "engine" / "checkpoints"
NAMES = ("tiny", "draft")
#: Nats a byte on held-out files that a checkpoint must have reached, and its number of parameters.
REACHED = {"tiny": (0.68, 4e6, 6e6), "draft": (0.87, 0.4e6, 0.6e6)}


@pytest.mark.parametrize("name", NAMES)
def test_training_reached_a_useful_loss(name):
    facts = json.loads((CHECKPOINTS / name / "training.json").read_text())
    loss, fewest, most = REACHED[name]
    held_out = facts["held_out_1024"]
    assert held_out["nats_per_byte"] <= loss
    assert math.isclose(held_out["bits_per_byte"], held_out["nats_per_byte"] / math.log(2), abs_tol=1e-3)
    assert fewest <= facts["parameters"] <= most
    with safe_open(CHECKPOINTS / name / "model.safetensors", "pt") as file:
        tensors = [file.get_slice(key) for key in file.keys()]  # noqa: SIM118
        assert {t.get_dtype() for t in tensors} == {"BF16"}
        assert sum(math.prod(t.get_shape()) for t in tensors) == facts["parameters"]


def test_size_and_shared_tokenizer():
    assert sum((CHECKPOINTS / name / "model.safetensors").stat().st_size for name in NAMES) <= 14e6
    assert len({(CHECKPOINTS / name / "tokenizer.json").read_bytes() for name in NAMES}) == 1


@given(st.text())
def test_tokenizer_round_trips_any_text(text):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "tiny" / "tokenizer.json"))
    assert tokenizer.encode(text).ids == list(text.encode()) or "<|endoftext|>" in text
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_end_of_text_is_one_token():
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(CHECKPOINTS / "tiny" / "tokenizer.json"))
    assert tokenizer.encode("a<|endoftext|>").ids == [97, 256]
