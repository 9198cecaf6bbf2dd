"""What attnkit's mask function cannot say, it must not say: spans against sdpa's masks, and every way back to them."""

from __future__ import annotations

import pytest
import torch

from tests.transformers.models import prompts, tiny

pytest.importorskip("transformers")
integration = pytest.importorskip("attnkit.integrations.transformers")
from transformers import masking_utils  # noqa: E402


def logits(model, implementation, **inputs):
    model.set_attn_implementation(implementation)
    return model(**inputs).logits


def agree(model, keep=None, **inputs):
    with torch.no_grad():
        want, got = (logits(model, name, **inputs) for name in ("eager", "attnkit"))
    if keep is not None:
        want, got = want[keep], got[keep]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [0, 3, 40])
@pytest.mark.parametrize(
    "q_length, q_offset, kv_length, kv_offset",
    [(5, 0, 5, 0), (1, 9, 10, 0), (4, 6, 16, 0), (1, 9, 3, 7), (5, torch.tensor(4), 16, 0)],
)
@pytest.mark.parametrize("pads", [None, (0, 0), (3, 0), (0, 5)])
def test_spans_mean_what_sdpa_masks_mean(window, q_length, q_offset, kv_length, kv_offset, pads):
    pattern = masking_utils.sliding_window_causal_mask_function(window) if window else masking_utils.causal_mask_function
    end = int(q_offset) + q_length
    padding = None if pads is None else torch.arange(end) >= torch.tensor(pads).unsqueeze(1)
    sizes = {"batch_size": 2, "q_length": q_length, "kv_length": kv_length, "q_offset": q_offset, "kv_offset": kv_offset}
    span = integration.span_mask(**sizes, mask_function=pattern, attention_mask=padding)
    want = masking_utils.sdpa_mask(**sizes, mask_function=pattern, attention_mask=padding, allow_is_causal_skip=False)
    want = want.expand(2, 1, -1, -1)
    if span is None:
        assert kv_length == end - kv_offset
        span = torch.full((1, 1, 1, 1), kv_length, dtype=torch.int32)
    assert span.dtype == torch.int32
    got = integration.visible(span, q_length, kv_length).expand(2, 1, -1, -1)
    assert torch.equal(got, want)


def test_masks_that_are_no_span_stay_dense():
    sizes = {"batch_size": 1, "q_length": 4, "kv_length": 4}
    either = masking_utils.or_masks(masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function)
    both = masking_utils.and_masks(masking_utils.bidirectional_mask_function, masking_utils.causal_mask_function)
    chunked = masking_utils.chunked_causal_mask_function(2, torch.zeros(1, dtype=torch.int64))
    for pattern in (masking_utils.bidirectional_mask_function, either, both, chunked):
        mask = integration.span_mask(**sizes, mask_function=pattern, allow_is_bidirectional_skip=True)
        assert mask.dtype == torch.bool and mask.shape == (1, 1, 4, 4)
    for padding in ([[True, False, True, True]], [[False, True, False, True]]):
        assert integration.span_mask(**sizes, attention_mask=torch.tensor(padding)).dtype == torch.bool


def test_right_padding():
    inputs = prompts(2, 9)
    inputs["attention_mask"][0, 6:] = 0
    agree(tiny("qwen2"), keep=inputs["attention_mask"].bool(), **inputs)


@pytest.mark.parametrize("family", ["qwen2", "gpt_oss", "gemma2"])
def test_hole_in_the_padding(family):
    inputs = prompts(2, 9)
    inputs["attention_mask"][0, 3:5] = 0
    agree(tiny(family), keep=inputs["attention_mask"].bool(), **inputs)


def test_packed_sequences():
    inputs = prompts(1, 10)
    del inputs["attention_mask"]
    agree(tiny("llama"), **inputs, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]]), use_cache=False)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_custom_4d_mask(dtype):
    inputs = prompts(1, 6)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[4, 1] = mask[5, 0] = False
    mask = mask[None, None] if dtype == torch.bool else torch.zeros(1, 1, 6, 6).masked_fill(~mask, torch.finfo(dtype).min)
    with torch.no_grad():
        want = logits(tiny("llama"), "sdpa", input_ids=inputs["input_ids"], attention_mask=mask)
        got = logits(tiny("llama"), "attnkit", input_ids=inputs["input_ids"], attention_mask=mask)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2-window", "gemma2", "gpt_oss"])
def test_gradients_are_eagers(family):
    model, inputs = tiny(family), prompts(2, 9, (3,))
    keep = inputs["attention_mask"].bool()
    grads = {}
    for name in ("eager", "attnkit"):
        model.zero_grad()
        logits(model, name, **inputs)[keep].square().mean().backward()
        grads[name] = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    torch.testing.assert_close(grads["attnkit"], grads["eager"], rtol=1e-3, atol=1e-5)


def test_dropout_is_applied():
    model = tiny("llama")
    q, k = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    layer = model.model.layers[0].self_attn
    kept, _ = integration.attention(layer, q, k, k, None)
    torch.manual_seed(0)
    dropped, _ = integration.attention(layer, q, k, k, None, dropout=0.5)
    assert not torch.allclose(kept, dropped)


def test_returned_weights():
    layer = tiny("llama").model.layers[0].self_attn
    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    span = torch.tensor([[1, 5], [0, 5]], dtype=torch.int32).view(2, 1, 1, 2)
    want, _ = integration.attention(layer, q, k, k, span)
    got, weights = integration.attention(layer, q, k, k, span, output_attentions=True)
    torch.testing.assert_close(got[1], want[1])
    torch.testing.assert_close(got[0, 1:], want[0, 1:])
    assert weights.shape == (2, 4, 5, 5) and weights[0, :, 1:, 0].abs().max() == 0


def test_a_span_that_a_model_changed_raises():
    layer = tiny("llama").model.layers[0].self_attn
    q = torch.randn(2, 4, 5, 16)
    with pytest.raises(ValueError, match=r"attention_mask is int32 \[2, 1, 5, 5\]"):
        integration.attention(layer, q, q, q, torch.zeros(2, 1, 5, 5, dtype=torch.int32))


@pytest.mark.parametrize("kind", ["cache", "packed", "copy"])
def test_any_layout_of_keys_and_values(kind):
    """Caches [B, Hkv, K, D], projections [B, K, Hkv, D], one fused tensor of both, and layouts that differ."""
    torch.manual_seed(0)
    B, H, heads, S, K, D = 3, 4, 2, 4, 9, 16
    if kind == "cache":
        k, v = torch.randn(B, heads, K, D), torch.randn(B, heads, K, 24)
    elif kind == "packed":
        k, v = torch.randn(B, K, 2 * heads, D).transpose(1, 2).split(heads, 1)
    else:
        k, v = torch.randn(B, heads, K, D), torch.randn(B, K, heads, D).transpose(1, 2)
    q = torch.randn(B, S, H, D).transpose(1, 2)
    span = torch.tensor([[0, 9], [4, 8], [2, 4]], dtype=torch.int32).view(B, 1, 1, 2)
    layer = tiny("llama").model.layers[0].self_attn
    want, _ = integration.dense(layer, q, k, v, integration.visible(span, S, K), scaling=0.3)
    got, _ = integration.attention(layer, q, k, v, span, scaling=0.3)
    seen = integration.visible(span, S, K).any(-1)[:, 0]
    torch.testing.assert_close(got[seen], want[seen], rtol=1e-4, atol=1e-5)
    assert got[~seen].abs().sum() == 0
    whole, _ = integration.attention(layer, q, k, v, None, scaling=0.3, is_causal=False)
    torch.testing.assert_close(
        whole, integration.dense(layer, q, k, v, None, scaling=0.3, causal=False)[0], rtol=1e-4, atol=1e-5
    )


def test_vision_towers_pack_by_cu_seq_lens():
    layer = tiny("llama").model.layers[0].self_attn
    q, k = torch.randn(1, 4, 9, 16), torch.randn(1, 2, 9, 16)
    cu = torch.tensor([0, 4, 9])
    got, _ = integration.attention(layer, q, k, k, None, is_causal=False, cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=5)
    for a, b in ((0, 4), (4, 9)):
        want, _ = integration.dense(layer, q[:, :, a:b], k[:, :, a:b], k[:, :, a:b], None, scaling=0.25, causal=False)
        torch.testing.assert_close(got[:, a:b], want, rtol=1e-4, atol=1e-5)
