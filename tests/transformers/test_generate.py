"""attn_implementation="attnkit" generates eager's tokens: every family, cache and padding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import attnkit.integrations
from tests.transformers.models import FAMILIES, prompts, tiny

transformers = pytest.importorskip("transformers")
integration = pytest.importorskip("attnkit.integrations.transformers")
CHECKPOINT = Path(attnkit.integrations.__path__[0]) / "engine" / "checkpoints" / "tiny"


@pytest.fixture
def calls(monkeypatch):
    """How often a call went through attnkit's ops, and how often densely."""
    seen = {"attend": 0, "dense": 0}
    for name, key in (("_attend", "attend"), ("dense", "dense")):
        real = getattr(integration, name)

        def counting(*args, real=real, key=key, **kwargs):
            seen[key] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(integration, name, counting)
    return seen


def generate(model, implementation, new=10, **kwargs):
    model.set_attn_implementation(implementation)
    return model.generate(**kwargs, max_new_tokens=new, do_sample=False, pad_token_id=0)


def same_tokens(model, **kwargs):
    want = generate(model, "eager", **kwargs)
    got = generate(model, "attnkit", **kwargs)
    assert torch.equal(got, want)
    assert len(want[:, -10:].unique()) > 3, "the model repeats itself: such tokens prove nothing"


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_batch(family, calls):
    same_tokens(tiny(family), **prompts(3, 11, pads=(4, 0, 9)))
    assert calls["attend"] and not calls["dense"]


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gpt_oss"])
def test_without_padding(family, calls):
    same_tokens(tiny(family), **prompts(2, 7))
    assert calls["attend"] and not calls["dense"]


@pytest.mark.parametrize("pads", [(), (0, 5)], ids=["unpadded", "left-padded"])
@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3", "mistral"])
def test_static_cache(family, pads, calls):
    same_tokens(tiny(family), **prompts(2, 9, pads), cache_implementation="static")
    assert calls["attend"] and not calls["dense"]


def test_static_cache_decodes_in_pages(monkeypatch, calls):
    """A static cache of a multiple of 16 tokens is read as a paged cache, in place."""
    model, inputs = tiny("llama"), prompts(2, 8)
    want = generate(model, "eager", **inputs)
    sizes = []
    real = attnkit.paged_decode
    monkeypatch.setattr(attnkit, "paged_decode", lambda q, kv, *a, **k: sizes.append(kv[0].shape[1]) or real(q, kv, *a, **k))
    cache = transformers.StaticCache(config=model.config, max_cache_len=48)
    assert torch.equal(generate(model, "attnkit", **inputs, past_key_values=cache), want)
    assert sizes == [16] * (2 * 10) or sizes == [16] * (2 * 9)  # the prompt's 8 tokens may count as a decode, too


def test_no_cache(calls):
    same_tokens(tiny("qwen2"), **prompts(2, 6, (3,)), use_cache=False)
    assert not calls["dense"]


def test_beam_search_and_chunked_prefill(calls):
    same_tokens(tiny("llama"), **prompts(2, 20, (7,)), num_beams=2)
    same_tokens(tiny("qwen2-window"), **prompts(2, 20, (7,)), prefill_chunk_size=6)
    assert not calls["dense"]


def continuous(model, rows, **kwargs):
    """Greedy tokens of every row by generate_batch, which must leave the model's implementation as it was."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    model.set_attn_implementation("attnkit")
    results = model.generate_batch(
        rows,
        generation_config=GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=16, **kwargs),
        progress_bar=False,
    )
    assert model.config._attn_implementation == "attnkit"
    by_prompt = {tuple(r.prompt_ids): r.generated_tokens for r in results.values()}
    return [by_prompt[tuple(row)] for row in rows]


def ragged_rows(model, device="cpu"):
    """Prompts of three lengths, and eager's tokens for each alone."""
    ids = prompts(3, 14)["input_ids"].tolist()
    rows = [ids[0], ids[1][:3], ids[2][:9]]
    return rows, [generate(model, "eager", input_ids=torch.tensor([r], device=device))[0, len(r) :].tolist() for r in rows]


@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_generate_batch(family):
    rows, want = ragged_rows(tiny(family))
    assert continuous(tiny(family), rows) == want


def test_bundled_checkpoint():
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINT, padding_side="left")
    inputs = dict(tokenizer(["def ", "class Reader:\n    def "], return_tensors="pt", padding=True))
    model = transformers.AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32, attn_implementation="attnkit")
    want, got = (generate(model, name, new=14, **inputs) for name in ("eager", "attnkit"))
    assert torch.equal(got, want)
    assert "__init__" in tokenizer.decode(got[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_eager(dtype):
    model, inputs = tiny("qwen2"), prompts(2, 24, (5,))
    real = inputs["attention_mask"].bool()
    logits = {}
    with torch.no_grad():
        model.set_attn_implementation("eager")
        exact = model(**inputs).logits[real]
        for name in ("eager", "attnkit"):
            model.set_attn_implementation(name)
            half = transformers.AutoModelForCausalLM.from_config(model.config, attn_implementation=name, dtype=dtype).eval()
            half.load_state_dict(model.state_dict())
            logits[name] = half(**inputs).logits[real].float()
    error = {name: (got - exact).abs().mean() for name, got in logits.items()}
    assert error["attnkit"] <= 1.1 * error["eager"]


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llama", "qwen2-window", "gpt_oss"])
@pytest.mark.parametrize("implementation", ["static", "dynamic"])
def test_on_a_gpu(family, implementation):
    model = tiny(family).to("cuda")
    inputs = {k: v.cuda() for k, v in prompts(3, 16, (4,)).items()}
    try:
        want = generate(model, "eager", **inputs)
        got = generate(model, "attnkit", **inputs, cache_implementation=implementation)  # a static cache compiles here
        assert torch.equal(got, want)
    finally:
        model.to("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("family", ["llama", "qwen2-window", "qwen3"])
def test_generate_batch_on_a_gpu(family, graphs, monkeypatch):
    """Through the block table where every layer sees all keys; with and without CUDA graphs."""
    from attnkit.integrations import transformers_paged

    steps = []
    real = transformers_paged._decode
    monkeypatch.setattr(transformers_paged, "_decode", lambda *args: steps.append(1) or real(*args))
    model = tiny(family).to("cuda")
    try:
        rows, want = ragged_rows(model, "cuda")
        got = continuous(model, rows, use_cuda_graph=graphs)
        assert got == want
        assert steps or family == "qwen2-window"
    finally:
        model.to("cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_generate_batch_waits_for_its_inputs(graphs, monkeypatch):
    """The stream that fills the manager's inputs is late: those for copies and for the model must not overtake it."""
    from transformers.generation.continuous_batching import input_outputs

    IOs, partial = input_outputs.ContinuousBatchingIOs, input_outputs.partial
    reset = IOs._reset_static_tensors

    def late_reset(self, full_reset=False):
        if full_reset and self.device.type == "cuda":
            torch.cuda._sleep(400_000_000)  # 0.2 s
        reset(self, full_reset)

    def late_tensors(make, **given):
        def made(data):
            tensor = partial(make, **given)(data)
            if tensor.is_cuda:
                torch.cuda._sleep(20_000_000)
            return tensor

        return made

    monkeypatch.setattr(IOs, "_reset_static_tensors", late_reset)
    monkeypatch.setattr(input_outputs, "partial", late_tensors)
    model = tiny("llama").to("cuda")
    try:
        rows, want = ragged_rows(model, "cuda")
        assert continuous(model, rows, use_cuda_graph=graphs) == want
    finally:
        model.to("cpu")
