"""Tests of attn_implementation="attnkit", on what a user's CPU would run: not on Triton's interpreter."""

from __future__ import annotations

import pytest

from tests.surroundings import without_interpreter as without_interpreter  # a fixture is used by being here

pytest.importorskip("transformers", minversion="5.17", reason="transformers 5.17 or later is not installed")
