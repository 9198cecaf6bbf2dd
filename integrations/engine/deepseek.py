"""DeepSeek-V2: latent attention and, from some layer on, a mixture of experts.

The cache holds one latent row (and one rope key) a token, shared by all heads. Decoding rows use it as it is: the
up-projection of keys is absorbed into the query, that of values into the output (DeepSeek-V2, section 2.1).
Prompts expand it to keys and values of each head, which costs fewer flops when there are many queries.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import attnkit

from .batch import Batch, Prefill
from .config import Latent, ModelConfig
from .layers import Linear, MixtureOfExperts, Mlp, RmsNorm, grouped_mm_works, linear, mixture, mlp
from .rope import cos_sin, halves_from_pairs, rotate
from .weights import Source

#: The norms inside the attention have transformers' own default, whatever rms_norm_eps says.
_INNER_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class Layer:
    """up is [Hq, nope + value, C]: a head's rows for keys, then those for values."""

    attention_norm: RmsNorm
    q_down: Linear | None
    q_norm: RmsNorm | None
    q_up: Linear
    kv_down: Linear
    kv_norm: RmsNorm
    up: Tensor
    out: Linear
    mlp_norm: RmsNorm
    mlp: Mlp | MixtureOfExperts


def _layer(c: ModelConfig, m: Latent, source: Source, index: int) -> Layer:
    name = f"model.layers.{index}"
    attention = f"{name}.self_attn"
    head = m.nope + m.rope
    q_rank = c.hidden if m.q_rank is None else m.q_rank
    q_up = linear(source, f"{attention}.{'q_proj' if m.q_rank is None else 'q_b_proj'}", c.heads * head, q_rank)
    kv_down = linear(source, f"{attention}.kv_a_proj_with_mqa", m.kv_rank + m.rope, c.hidden, c.qkv_bias)
    up = source(f"{attention}.kv_b_proj.weight", c.heads * (m.nope + m.value), m.kv_rank)
    experts = c.experts if c.experts is not None and index >= c.experts.first else None
    return Layer(
        attention_norm=RmsNorm(source(f"{name}.input_layernorm.weight", c.hidden), c.eps),
        q_down=None if m.q_rank is None else linear(source, f"{attention}.q_a_proj", q_rank, c.hidden, c.qkv_bias).ready(),
        q_norm=None if m.q_rank is None else RmsNorm(source(f"{attention}.q_a_layernorm.weight", q_rank), _INNER_EPS),
        q_up=_rope_rows_to_halves(q_up, c.heads, m.nope, m.rope),
        kv_down=_rope_rows_to_halves(kv_down, 1, m.kv_rank, m.rope),
        kv_norm=RmsNorm(source(f"{attention}.kv_a_layernorm.weight", m.kv_rank), _INNER_EPS),
        up=up.view(c.heads, m.nope + m.value, m.kv_rank),
        out=linear(source, f"{attention}.o_proj", c.hidden, c.heads * m.value, c.o_bias).ready(),
        mlp_norm=RmsNorm(source(f"{name}.post_attention_layernorm.weight", c.hidden), c.eps),
        mlp=mlp(source, f"{name}.mlp", c.hidden, c.intermediate, c.mlp_bias)
        if experts is None
        else mixture(source, f"{name}.mlp", c.hidden, experts),
    )


def _rope_rows_to_halves(part: Linear, heads: int, plain: int, rope: int) -> Linear:
    """DeepSeek rotates pairs (2i, 2i + 1). Reordering q's and k's rows alike lets it rotate halves, as the others do."""
    order = torch.cat((torch.arange(plain), plain + halves_from_pairs(rope)))
    rows = (torch.arange(heads)[:, None] * (plain + rope) + order).flatten().to(part.weight.device)
    return Linear(part.weight[rows], None if part.bias is None else part.bias[rows]).ready()


class DeepseekV2:
    """The decoder. ``source`` gives the tensors, by name and shape (weights.py)."""

    def __init__(self, config: ModelConfig, source: Source) -> None:
        c = self.config = config
        if c.latent is None:
            raise ValueError("DeepseekV2: the config has no latent attention")
        m = self.latent = c.latent
        self.embedding = source("model.embed_tokens.weight", c.vocab, c.hidden)
        self.layers = [_layer(c, m, source, i) for i in range(c.layers)]
        self.norm = RmsNorm(source("model.norm.weight", c.hidden), c.eps)
        self.head = Linear(self.embedding if c.tied else source("lm_head.weight", c.vocab, c.hidden)).ready()
        inverse, self.rope_scale = c.rope.frequencies()
        self.rope = inverse.to(self.embedding.device)
        self.scale = (m.nope + m.rope) ** -0.5 * c.rope.softmax_factor()

    @property
    def capturable(self) -> bool:
        """Routing in a Python loop has to read the routes, which a graph cannot."""
        return self.config.experts is None or grouped_mm_works(self.embedding)

    @staticmethod
    def cache_shape(c: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
        """The whole cache, layers first; what a layer gets is [P, S, C + R]."""
        width = c.latent.kv_rank + c.latent.rope if c.latent else 0
        return (c.layers, num_pages, page_size, width)

    def views(self, cache: Tensor) -> list[Tensor]:
        """Each layer's latent rows, [P, S, C + R]."""
        return list(cache)

    def forward(self, batch: Batch, caches: list[Tensor]) -> Tensor:
        """Tokens to logits [rows, V]; new latent rows go into ``caches``, one a layer."""
        x = self.embedding[batch.tokens]
        cos, sin = cos_sin(batch.positions, self.rope, self.rope_scale, torch.float32)
        for layer, cache in zip(self.layers, caches):
            x = layer.out.onto(x, self._attend(layer, layer.attention_norm(x), cos, sin, batch, cache))
            x = layer.mlp.onto(x, layer.mlp_norm(x))
        if batch.rows is not None:
            x = x[batch.rows]
        return self.head(self.norm(x))

    def _attend(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, batch: Batch, cache: Tensor) -> Tensor:
        c, m, T = self.config, self.latent, x.shape[0]
        compressed = x if layer.q_down is None or layer.q_norm is None else layer.q_norm(layer.q_down(x))
        q = layer.q_up(compressed).view(T, c.heads, m.nope + m.rope)
        q_nope, q_rope = q[..., : m.nope], rotate(q[..., m.nope :], cos, sin).to(x.dtype)
        down = layer.kv_down(x)[:, None]
        latent = layer.kv_norm(down[..., : m.kv_rank])
        k_rope = rotate(down[..., m.kv_rank :], cos, sin).to(x.dtype)
        pair = cache[:, :, None, : m.kv_rank], cache[:, :, None, m.kv_rank :]
        attnkit.write_kv(latent, k_rope, pair, batch.slots)

        n, parts = batch.n_decode, []
        if batch.decode is not None:
            absorbed = torch.bmm(q_nope[:n].transpose(0, 1), layer.up[:, : m.nope]).transpose(0, 1)
            query = torch.cat((absorbed, q_rope[:n]), -1)
            out = query.new_empty((n, c.heads, m.kv_rank))
            attnkit.mla_decode(query, cache, batch.decode, latent=m.kv_rank, scale=self.scale, out=out)
            parts.append(torch.bmm(out.transpose(0, 1), layer.up[:, m.nope :].transpose(1, 2)).transpose(0, 1))
        if batch.prefill is not None:
            query = torch.cat((q_nope[n:], q_rope[n:]), -1)
            parts.append(self._expanded(layer, query, latent[n:, 0], k_rope[n:], batch.prefill, cache))
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)

    def _expanded(self, layer: Layer, q: Tensor, latent: Tensor, k_rope: Tensor, p: Prefill, cache: Tensor) -> Tensor:
        """Attention over keys and values of each head; where some are in the cache already, all come from there."""
        c, m = self.config, self.latent
        if p.context is not None:
            rows = cache.flatten(0, 1)[p.context]
            latent, k_rope = rows[:, : m.kv_rank], rows[:, None, m.kv_rank :]
        kv = torch.mm(latent, layer.up.flatten(0, 1).t()).view(-1, c.heads, m.nope + m.value)
        k = torch.cat((kv[..., : m.nope], k_rope.expand(-1, c.heads, -1)), -1)
        out = q.new_empty((q.shape[0], c.heads, m.value))
        attnkit.mla_prefill(q, k, kv[..., m.nope :], p.cu_q, p.cu_k, scale=self.scale, out=out)
        return out
