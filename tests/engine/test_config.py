"""config.json: what is supported is read as transformers reads it, what is not is refused."""

from __future__ import annotations

import pytest

from attnkit.integrations.engine.config import CheckpointError, read_config

from .checkpoints import write_config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architectures is ['MambaForCausalLM'], supported: LlamaForCausalLM"),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": []}, "architectures is []"),
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64', wanted a whole number, 1 or more"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "wanted a multiple of num_key_value_heads = 3"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"rms_norm_eps": -1}, "rms_norm_eps is -1"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes', wanted true or false"),
        ({"eos_token_id": "0"}, "eos_token_id is '0'"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling has the type 'longrope', supported: default, linear"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling has the type 'linear' but no factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor of rope_scaling is '2'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "has the type 'llama3' but no low_freq_factor"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta of rope_parameters is 0"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is given"),
        ({"head_dim": 15}, "rotated part of a head has 15 elements"),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types is"),
    ],
)
def test_refused(tmp_path, change, message):
    write_config(tmp_path, **({"architecture": "Qwen2ForCausalLM"} | change))
    with pytest.raises(CheckpointError) as caught:
        read_config(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ") and message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc', supported: 'greedy', 'group_limited_greedy'"),
        ({"scoring_func": "sigmoid"}, "scoring_func is 'sigmoid'"),
        ({"norm_topk_prob": True}, "norm_topk_prob is True"),
        ({"moe_layer_freq": 2}, "moe_layer_freq is 2"),
        ({"num_experts_per_tok": 9}, "cannot be chosen"),
        ({"topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 1}, "n_group 3"),
    ],
)
def test_refused_experts(tmp_path, change, message):
    write_config(tmp_path, "DeepseekV2ForCausalLM", **change)
    with pytest.raises(CheckpointError, match="config.json: ") as caught:
        read_config(tmp_path)
    assert message in str(caught.value)


def test_sliding_windows_by_layer(tmp_path):
    change = {"num_hidden_layers": 4, "sliding_window": 100, "max_window_layers": 3}
    assert read_config(write_config(tmp_path, **change)).windows == (None,) * 4
    change["use_sliding_window"] = True
    assert read_config(write_config(tmp_path, **change)).windows == (None, None, None, 100)
    change["layer_types"] = ["sliding_attention", "full_attention"] * 2
    assert read_config(write_config(tmp_path, **change)).windows == (100, None, 100, None)
    assert read_config(write_config(tmp_path, "LlamaForCausalLM", **change)).windows == (None,) * 4


def test_end_of_text_ids_come_from_generation_config_first(tmp_path):
    assert read_config(write_config(tmp_path)).eos == {0}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert read_config(tmp_path).eos == {7, 8}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": null}')
    assert read_config(tmp_path).eos == {0}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [true]}')
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id is"):
        read_config(tmp_path)
