"""Engine tests run on what a user's CPU would run: not on Triton's interpreter, which the kernel tests switch on."""

from __future__ import annotations

import os

import pytest
import torch

from attnkit import dispatch, settings

from .checkpoints import write_tiny


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


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A Qwen2 of two layers over bytes, with a tokenizer. Its end-of-text id is 0."""
    return write_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_latent(tmp_path_factory):
    """A DeepSeek-V2 of three layers, the first dense."""
    return write_tiny(tmp_path_factory.mktemp("tiny_latent"), architecture="DeepseekV2ForCausalLM")
