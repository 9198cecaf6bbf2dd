"""Greedy tokens equal transformers' own generate on the same weights, in float32 on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import attnkit
from attnkit.integrations.engine import LLM, SamplingParams
from attnkit.integrations.engine.config import read_config
from attnkit.integrations.engine.rope import cos_sin, halves_from_pairs, rotate

from .checkpoints import byte_tokenizer, write_config

transformers = pytest.importorskip("transformers")

BASE = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "eos_token_id": None,
}
GQA = {"num_key_value_heads": 2}
LATENT = {
    "num_hidden_layers": 3,
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
    "topk_method": "greedy",
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_MSCALE = YARN | {"mscale": 0.707, "mscale_all_dim": 0.9, "beta_fast": 32, "beta_slow": 1}
WINDOWED = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}
GROUPED = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5}

MODELS = {
    "llama-tied": ("Llama", GQA | {"tie_word_embeddings": True}),
    "llama-biases-llama3": ("Llama", {"attention_bias": True, "mlp_bias": True, "rope_parameters": LLAMA3}),
    "llama-mqa-linear": ("Llama", {"num_key_value_heads": 1, "head_dim": 32, "rope_parameters": LINEAR}),
    "llama-dynamic": ("Llama", GQA | {"rope_parameters": DYNAMIC}),
    "qwen2": ("Qwen2", GQA),
    "qwen2-tied-yarn": ("Qwen2", GQA | {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen2-window": ("Qwen2", GQA | WINDOWED),
    "qwen3": ("Qwen3", GQA | {"head_dim": 32}),
    "qwen3-tied-biases": ("Qwen3", GQA | {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
    "deepseek_v2": ("DeepseekV2", LATENT),
    "deepseek_v2-yarn-groups": ("DeepseekV2", LATENT | GROUPED | {"q_lora_rank": 24, "rope_parameters": YARN_MSCALE}),
    "deepseek_v2-biases": ("DeepseekV2", LATENT | {"q_lora_rank": 24, "attention_bias": True, "v_head_dim": 32}),
}
#: How the same prompts are run: at once; in small chunks; in a pool so small that requests are preempted.
RUNS = {
    "at_once": {},
    "chunks": {"max_step_tokens": 8, "max_batch": 8},
    "preempted": {"num_pages": 12, "page_size": 8},
}


def build(name: str, directory: Path):
    """A random model with every parameter off its trivial value, saved; (model, directory)."""
    family, change = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(BASE | change))
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.copy_(torch.randn_like(parameter) * 0.3 + (1 if "norm" in key else 0))
    model.save_pretrained(directory)
    return model


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    """(directory, prompts, what transformers generates for each)"""
    directory = tmp_path_factory.mktemp(request.param)
    reference = build(request.param, directory)
    noise = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 97, (n,), generator=noise).tolist() for n in (1, 5, 17, 40, 33)]
    wanted = [greedy(reference, p, 20) for p in prompts]
    assert len({tuple(w) for w in wanted}) == len(prompts) and all(len(set(w)) > 3 for w in wanted)
    return directory, prompts, wanted


def greedy(reference, prompt, n):
    with torch.no_grad():
        return reference.generate(torch.tensor([prompt]), max_new_tokens=n, do_sample=False)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("how", RUNS)
def test_greedy_tokens_equal_transformers(model, how):
    directory, prompts, wanted = model
    llm = LLM(directory, dtype="float32", device="cpu", tokenizer=False, **RUNS[how])
    llm.cache.fill_(float("nan"))  # CASES.md 5 and 6: what nobody wrote must not matter
    preemptions = count_preemptions(llm)
    outputs = llm.generate(prompts, SamplingParams(max_tokens=20))
    assert [o.token_ids for o in outputs] == wanted
    assert bool(preemptions) == (how == "preempted")
    assert llm.scheduler.pool.available == llm.scheduler.pool.num_pages


def count_preemptions(llm):
    seen = []
    plain = llm.scheduler._preempt
    llm.scheduler._preempt = lambda request: (seen.append(request.id), plain(request))
    return seen


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3"])
@pytest.mark.parametrize("rope", [None, LINEAR, DYNAMIC, LLAMA3, YARN, YARN_MSCALE, YARN | {"truncate": False}])
def test_rope_frequencies_equal_transformers(tmp_path, family, rope):
    config = getattr(transformers, f"{family}Config")(**(BASE | GQA | {"head_dim": 32, "rope_parameters": rope}))
    config.architectures = [f"{family}ForCausalLM"]
    config.save_pretrained(tmp_path)
    module = __import__(f"transformers.models.{family.lower()}.modeling_{family.lower()}", fromlist=["x"])
    theirs = getattr(module, f"{family}RotaryEmbedding")(config)
    inverse, scale = read_config(tmp_path).rope.frequencies()
    torch.testing.assert_close(inverse, theirs.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling, rel=1e-12)


def test_rope_of_old_config_files(tmp_path):
    """rope_theta and rope_scaling with "type", as transformers wrote them before version 5."""
    old = {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k not in ("rope_type", "rope_theta")}}
    old["rope_scaling"]["type"] = "llama3"
    new = {"rope_parameters": LLAMA3, "rope_theta": None}
    ropes = [read_config(write_config(tmp_path, "LlamaForCausalLM", **c)).rope for c in (old, new)]
    assert ropes[0] == ropes[1]


def test_pairs_and_halves_give_the_same_scores():
    """DeepSeek rotates pairs; the engine reorders its weights and rotates halves."""
    q, k = torch.randn(2, 5, 1, 16, dtype=torch.float64)
    angle = torch.arange(5.0, dtype=torch.float64)[:, None] * torch.rand(8, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)[:, None]

    def pairs(x):
        return torch.view_as_real(torch.view_as_complex(x.view(5, 1, 8, 2)) * turn).flatten(2)

    cos = torch.cat((angle.cos(), angle.cos()), -1)[:, None]
    sin = torch.cat((-angle.sin(), angle.sin()), -1)[:, None]
    order = halves_from_pairs(16)
    ours = [rotate(x[..., order], cos, sin) for x in (q, k)]
    torch.testing.assert_close((ours[0] * ours[1]).sum(-1), (pairs(q) * pairs(k)).sum(-1))


def test_cos_and_sin_carry_the_scale():
    cos, sin = cos_sin(torch.tensor([0, 3]), torch.tensor([0.5]), 2.0, torch.float32)
    assert cos.shape == (2, 1, 2) and cos[0, 0].tolist() == [2.0, 2.0] and sin[0, 0].tolist() == [0.0, 0.0]


def test_dynamic_rope_stops_at_max_position_embeddings(tmp_path):
    build("llama-dynamic", tmp_path)
    with pytest.raises(ValueError, match="max_len is 300, wanted at most 256 with dynamic rope"):
        LLM(tmp_path, device="cpu", tokenizer=False, max_len=300)


def test_end_of_text_list_of_generation_config(tmp_path):
    reference = build("qwen2", tmp_path)
    prompt = [5, 6, 7]
    tokens = greedy(reference, prompt, 20)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokens[4], tokens[9]]}))
    output = LLM(tmp_path, device="cpu", tokenizer=False).generate([prompt])[0]
    end = next(i for i, t in enumerate(tokens) if t in (tokens[4], tokens[9]))
    assert output.token_ids == tokens[: end + 1]
    assert (output.finish_reason, output.stopped_by) == ("stop", tokens[end])


BUNDLED = Path(attnkit.integrations.engine.__file__).parent / "checkpoints" / "tiny"


@pytest.mark.skipif(not (BUNDLED / "config.json").exists(), reason="the bundled checkpoint is not there")
def test_the_bundled_checkpoint_equals_transformers():
    reference = transformers.AutoModelForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32).eval()
    texts = ["def ", "import os\n\n", "class Queue:\n    def __init__(self", "for i in range("]
    llm = LLM(BUNDLED, dtype="float32", device="cpu")
    outputs = llm.generate(texts, SamplingParams(max_tokens=48, ignore_eos=True))
    tokenizer = transformers.AutoTokenizer.from_pretrained(BUNDLED)
    for text, output in zip(texts, outputs):
        ids = tokenizer(text)["input_ids"]
        assert output.prompt_token_ids == ids
        assert output.token_ids == greedy(reference, ids, 48)
        assert output.text and output.text in tokenizer.decode(ids + output.token_ids)


def test_a_saved_tokenizer_makes_the_directory_complete(tmp_path):
    build("qwen3", tmp_path)
    byte_tokenizer().save(str(tmp_path / "tokenizer.json"))
    llm = LLM(tmp_path, device="cpu")
    outputs = llm.generate(["AB", "\x05\x06"])  # "A" is token 68; every byte from 94 on lies outside this vocabulary
    assert outputs[0].error is None and outputs[0].prompt_token_ids == [68, 69]
    assert outputs[1].error is None
    assert "token 100, which is outside [0, 97)" in (llm.generate("a")[0].error or "")
