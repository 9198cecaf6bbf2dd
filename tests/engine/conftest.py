"""Engine tests run on what a user's CPU would run: not on Triton's interpreter, which the kernel tests switch on."""

from __future__ import annotations

import pytest
import torch

from tests.surroundings import without_interpreter as without_interpreter  # a fixture is used by being here

from .checkpoints import write_tiny


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
