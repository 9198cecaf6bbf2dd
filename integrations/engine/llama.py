"""Llama, Qwen2 and Qwen3: they differ in biases, in the norm of q and k, and in sliding windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import attnkit

from .batch import Batch
from .config import ModelConfig
from .layers import Linear, Mlp, RmsNorm, fused, linear, mlp
from .rope import cos_sin, rotate
from .weights import Source


@dataclass(frozen=True, slots=True)
class Layer:
    """qkv and gate_up are one linear each; q_norm and k_norm are Qwen3's."""

    attention_norm: RmsNorm
    qkv: Linear
    q_norm: RmsNorm | None
    k_norm: RmsNorm | None
    out: Linear
    mlp_norm: RmsNorm
    mlp: Mlp
    window: int | None


def _layer(c: ModelConfig, source: Source, index: int) -> Layer:
    name = f"model.layers.{index}"
    attention = f"{name}.self_attn"
    q = linear(source, f"{attention}.q_proj", c.heads * c.head_dim, c.hidden, c.qkv_bias)
    k = linear(source, f"{attention}.k_proj", c.kv_heads * c.head_dim, c.hidden, c.qkv_bias)
    v = linear(source, f"{attention}.v_proj", c.kv_heads * c.head_dim, c.hidden, c.qkv_bias)
    norms = [RmsNorm(source(f"{attention}.{n}_norm.weight", c.head_dim), c.eps) if c.qk_norm else None for n in "qk"]
    return Layer(
        attention_norm=RmsNorm(source(f"{name}.input_layernorm.weight", c.hidden), c.eps),
        qkv=fused(q, k, v),
        q_norm=norms[0],
        k_norm=norms[1],
        out=linear(source, f"{attention}.o_proj", c.hidden, c.heads * c.head_dim, c.o_bias),
        mlp_norm=RmsNorm(source(f"{name}.post_attention_layernorm.weight", c.hidden), c.eps),
        mlp=mlp(source, f"{name}.mlp", c.hidden, c.intermediate, c.mlp_bias),
        window=c.windows[index],
    )


class Llama:
    """The decoder. ``source`` gives the tensors, by name and shape (weights.py)."""

    capturable = True

    def __init__(self, config: ModelConfig, source: Source) -> None:
        c = self.config = config
        self.embedding = source("model.embed_tokens.weight", c.vocab, c.hidden)
        self.layers = [_layer(c, source, i) for i in range(c.layers)]
        self.norm = RmsNorm(source("model.norm.weight", c.hidden), c.eps)
        self.head = Linear(self.embedding if c.tied else source("lm_head.weight", c.vocab, c.hidden))
        inverse, self.rope_scale = c.rope.frequencies()
        self.rope = inverse.to(self.embedding.device)
        self.scale = c.head_dim**-0.5

    @staticmethod
    def cache_shape(c: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
        """The whole KV cache, layers first; what a layer gets is [P, 2, S, Hkv, D]."""
        return (c.layers, num_pages, 2, page_size, c.kv_heads, c.head_dim)

    def forward(self, batch: Batch, caches: list[Tensor]) -> Tensor:
        """Tokens to logits [rows, V]; new keys and values go into ``caches``, one a layer."""
        x = self.embedding[batch.tokens]
        cos, sin = cos_sin(batch.positions, self.rope, self.rope_scale, x.dtype)
        for layer, cache in zip(self.layers, caches):
            x = x + layer.out(self._attend(layer, layer.attention_norm(x), cos, sin, batch, cache))
            x = x + layer.mlp(layer.mlp_norm(x))
        if batch.rows is not None:
            x = x[batch.rows]
        return self.head(self.norm(x))

    def _attend(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        c = self.config
        heads = layer.qkv(x).view(x.shape[0], c.heads + 2 * c.kv_heads, c.head_dim)
        v = heads[:, c.heads + c.kv_heads :]
        if layer.q_norm is None or layer.k_norm is None:
            qk = rotate(heads[:, : c.heads + c.kv_heads], cos, sin)
            q, k = qk[:, : c.heads], qk[:, c.heads :]
        else:
            q = rotate(layer.q_norm(heads[:, : c.heads]), cos, sin)
            k = rotate(layer.k_norm(heads[:, c.heads : c.heads + c.kv_heads]), cos, sin)
        attnkit.write_kv(k, v, cache, batch.slots)
        out = torch.empty((x.shape[0], c.heads, c.head_dim), dtype=x.dtype, device=x.device)
        n = batch.n_decode
        if batch.decode is not None:
            attnkit.paged_decode(q[:n], cache, batch.decode, scale=self.scale, window=layer.window, out=out[:n])
        if batch.prefill is not None:
            p = batch.prefill
            attnkit.paged_prefill(q[n:], cache, p.table, p.cu_q, scale=self.scale, window=layer.window, out=out[n:])
        return out.flatten(1)
