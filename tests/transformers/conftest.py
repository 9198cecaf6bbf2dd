"""Tests of attn_implementation="attnkit", on what a user's CPU would run: not on Triton's interpreter."""

from __future__ import annotations

import os

import pytest

from attnkit import dispatch, settings

pytest.importorskip("transformers", minversion="5.17", reason="transformers 5.17 or later is not installed")


@pytest.fixture(scope="package", autouse=True)
def without_interpreter():
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "0"
    settings.reload()
    dispatch.forget_plans()
    yield
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before
    settings.reload()
    dispatch.forget_plans()
