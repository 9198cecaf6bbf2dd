"""Tiny random checkpoints, written without transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from attnkit.integrations.engine.config import read_config
from attnkit.integrations.engine.model import wanted_tensors

VOCAB = 259

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
LATENT: dict[str, Any] = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}


def write_config(directory: Path, architecture: str = "Qwen2ForCausalLM", **changes: Any) -> Path:
    config = COMMON | (LATENT if architecture.startswith("Deepseek") else {}) | {"architectures": [architecture]} | changes
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def random_tensors(directory: Path, seed: int = 0) -> dict[str, torch.Tensor]:
    """What the config wants, large enough that greedy choices are clear-cut."""
    noise = torch.Generator().manual_seed(seed)
    out = {}
    for name, shape in wanted_tensors(read_config(directory)).items():
        value = torch.randn(shape, generator=noise) * 0.25
        out[name] = value + 1 if "norm" in name else value
    return out


def write_tiny(directory: Path, architecture: str = "Qwen2ForCausalLM", **changes: Any) -> Path:
    write_config(directory, architecture, **changes)
    save_file(random_tensors(directory), directory / "model.safetensors")
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def byte_tokenizer() -> Tokenizer:
    """Token 3 + b is the byte b; tokens 0, 1 and 2 are special."""
    alphabet = {bytes([b]): c for b, c in _byte_characters().items()}
    vocab = {f"<{i}>": i for i in range(3)} | {c: 3 + b[0] for b, c in alphabet.items()}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.add_special_tokens([f"<{i}>" for i in range(3)])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(rest)}


def tokens_of(text: str | bytes) -> list[int]:
    return [3 + b for b in (text.encode() if isinstance(text, str) else text)]
