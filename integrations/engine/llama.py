"""Llama, Qwen2 and Qwen3: they differ in biases, in the norm of q and k, and in sliding windows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

import attnkit

from .batch import Batch
from .config import ModelConfig
from .layers import Linear, Mlp, RmsNorm, fused, linear, mlp
from .rope import cos_sin, rotate
from .weights import Source

Cache = tuple[Tensor, Tensor]


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
        out=linear(source, f"{attention}.o_proj", c.hidden, c.heads * c.head_dim, c.o_bias).ready(),
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
        self.head = Linear(self.embedding if c.tied else source("lm_head.weight", c.vocab, c.hidden)).ready()
        inverse, self.rope_scale = c.rope.frequencies()
        self.rope = inverse.to(self.embedding.device)
        self.scale = c.head_dim**-0.5

    @staticmethod
    def cache_shape(c: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
        """The whole KV cache, layers first; what a layer gets is [P, 2, S, Hkv, D]."""
        return (c.layers, num_pages, 2, page_size, c.kv_heads, c.head_dim)

    def views(self, cache: Tensor) -> list[Cache]:
        """Each layer's keys and values, [P, S, Hkv, D]."""
        return [(layer[:, 0], layer[:, 1]) for layer in cache]

    def forward(self, batch: Batch, caches: list[Cache]) -> Tensor:
        """Tokens to logits [rows, V]; new keys and values go into ``caches``, one a layer."""
        x = self.embedding[batch.tokens]
        cos, sin = cos_sin(batch.positions, self.rope, self.rope_scale, x.dtype)
        out = x.new_empty((x.shape[0], self.config.heads, self.config.head_dim))  # every layer's in turn
        flat = out.flatten(1)
        for layer, cache in zip(self.layers, caches):
            self._attend(layer, layer.attention_norm(x), cos, sin, batch, cache, out)
            x = layer.out.onto(x, flat)
            x = layer.mlp.onto(x, layer.mlp_norm(x))
        if batch.rows is not None:
            x = x[batch.rows]
        return self.head(self.norm(x))

    def _attend(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: Cache, out: Tensor) -> None:
        """Normed x [T, H] to out [T, Hq, D]."""
        c = self.config
        heads = layer.qkv(x).view(x.shape[0], -1, c.head_dim)
        if layer.q_norm is None or layer.k_norm is None:
            qk, v = heads.split_with_sizes((c.heads + c.kv_heads, c.kv_heads), 1)
            q, k = rotate(qk, cos, sin).split_with_sizes((c.heads, c.kv_heads), 1)
        else:
            q, k, v = heads.split_with_sizes((c.heads, c.kv_heads, c.kv_heads), 1)
            q, k = rotate(layer.q_norm(q), cos, sin), rotate(layer.k_norm(k), cos, sin)
        attnkit.write_kv(k, v, cache, batch.slots)
        n, p, options = batch.n_decode, batch.prefill, {"scale": self.scale, "window": layer.window}
        if p is None and batch.decode is not None:
            attnkit.paged_decode(q, cache, batch.decode, out=out, **options)
        elif p is not None:
            if batch.decode is not None:
                attnkit.paged_decode(q[:n], cache, batch.decode, out=out[:n], **options)
            attnkit.paged_prefill(q[n:], cache, p.table, p.cu_q, out=out[n:], **options)
