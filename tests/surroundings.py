"""Fixtures that several folders of tests import."""

from __future__ import annotations

import os

import pytest

from attnkit import dispatch, settings


@pytest.fixture(scope="package", autouse=True)
def without_interpreter():
    """A user's CPU does not run Triton's interpreter, which the kernel tests switch on."""
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
