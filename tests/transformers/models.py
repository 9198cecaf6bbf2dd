"""Tiny random models of the families attnkit serves through transformers."""

from __future__ import annotations

import functools

import torch
from transformers import AutoConfig, AutoModelForCausalLM

COMMON = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "initializer_range": 0.3, "bos_token_id": 1,
    "eos_token_id": None, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen2-window": {"use_sliding_window": True, "sliding_window": 5, "layer_types": MIXED},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 6},
    "gemma2": {"head_dim": 32, "sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 32},
    "gemma3_text": {"head_dim": 32, "sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 32},
    "gpt_oss": {"head_dim": 16, "sliding_window": 5, "layer_types": MIXED, "num_local_experts": 2, "num_experts_per_tok": 1},
    "phi3": {"hidden_size": 192, "num_attention_heads": 2},  # D = 96
    "stablelm": {"hidden_size": 160, "num_attention_heads": 2},  # D = 80
    "deepseek_v2": {
        "num_key_value_heads": 4, "kv_lora_rank": 32, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 16, "first_k_dense_replace": 2, "n_routed_experts": 2, "moe_intermediate_size": 32, "n_group": 1,
    },
}  # fmt: skip


@functools.cache
def tiny(family: str) -> torch.nn.Module:
    """The family's model, in eager attention, float32, with weights large enough that attention decides the tokens."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split("-")[0], **(COMMON | FAMILIES[family]))
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    if family == "gpt_oss":
        with torch.no_grad():
            for name, p in model.named_parameters():
                if name.endswith("sinks"):
                    p.normal_(std=2.0)
    return model


def prompts(batch: int, length: int, pads: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Random prompts, the first ones left-padded."""
    ids = torch.randint(2, 97, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row, pad in enumerate(pads):
        ids[row, :pad] = 0
        mask[row, :pad] = 0
    return {"input_ids": ids, "attention_mask": mask}
