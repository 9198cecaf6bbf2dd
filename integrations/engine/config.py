"""config.json and generation_config.json, read into one typed record. What the engine cannot do is an error here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .rope import TYPES as ROPE_TYPES
from .rope import Rope

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "DeepseekV2ForCausalLM")
_REQUIRED: Any = object()
_ROPE_NUMBERS = (
    "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
)  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded: names the file and what is wrong in it."""


@dataclass(frozen=True, slots=True)
class Latent:
    """DeepSeek's latent attention: ranks of the down-projections and the parts of a head."""

    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: layers from ``first`` on route each token to ``chosen`` of ``count`` experts."""

    first: int
    count: int
    chosen: int
    intermediate: int
    shared: int
    scale: float
    groups: int  # 1: any expert may be chosen
    chosen_groups: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """
    windows   keys a layer's queries see, one entry a layer (None: all)
    eos       token ids that end a text
    dtype     the checkpoint's own, as config.json names it
    """

    architecture: str
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    eps: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    windows: tuple[int | None, ...]
    rope: Rope
    max_positions: int
    eos: frozenset[int]
    dtype: str | None
    latent: Latent | None = None
    experts: Experts | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}, wanted a JSON object")
    return value


class _Fields:
    """config.json with typed access: every complaint names the file and the key."""

    def __init__(self, path: Path) -> None:
        self.path, self.raw = path, read_json(path)

    def fail(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {text}")

    def whole(self, key: str, default: Any = _REQUIRED, low: int = 1) -> Any:
        value = self.raw.get(key)
        if value is None:
            if default is _REQUIRED:
                raise self.fail(f"{key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise self.fail(f"{key} is {value!r}, wanted a whole number, {low} or more")
        return value

    def real(self, key: str, default: float) -> float:
        value = self.raw.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
            raise self.fail(f"{key} is {value!r}, wanted a number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self.fail(f"{key} is {value!r}, wanted true or false")
        return bool(value)

    def only(self, key: str, *wanted: Any) -> None:
        """The engine computes one form of this; another would silently give wrong tokens."""
        if key in self.raw and self.raw[key] not in wanted:
            raise self.fail(f"{key} is {self.raw[key]!r}, supported: {', '.join(map(repr, wanted))}")


def read_config(directory: Path) -> ModelConfig:
    """Raises CheckpointError for a missing or malformed file and for what the engine does not support."""
    f = _Fields(directory / "config.json")
    names = f.raw.get("architectures")
    architecture = names[0] if isinstance(names, list) and len(names) == 1 else names
    if architecture not in ARCHITECTURES:
        raise f.fail(f"architectures is {names!r}, supported: {', '.join(ARCHITECTURES)}")
    f.only("hidden_act", "silu")
    f.only("quantization_config", None)
    hidden, heads, layers = f.whole("hidden_size"), f.whole("num_attention_heads"), f.whole("num_hidden_layers")
    deepseek, qwen = architecture == "DeepseekV2ForCausalLM", architecture.startswith("Qwen")
    kv_heads = f.whole("num_key_value_heads", heads)
    if heads % kv_heads:
        raise f.fail(f"num_attention_heads is {heads}, wanted a multiple of num_key_value_heads = {kv_heads}")
    default_dim = 128 if architecture == "Qwen3ForCausalLM" else hidden // heads
    head_dim = f.whole("head_dim", default_dim)
    latent = _latent(f) if deepseek else None
    bias = f.flag("attention_bias")
    max_positions = f.whole("max_position_embeddings", 32768 if qwen else 2048)
    return ModelConfig(
        architecture=architecture,
        vocab=f.whole("vocab_size"),
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=f.whole("intermediate_size"),
        eps=f.real("rms_norm_eps", 1e-6),
        tied=f.flag("tie_word_embeddings"),
        qkv_bias=True if architecture == "Qwen2ForCausalLM" else bias,
        o_bias=False if architecture == "Qwen2ForCausalLM" else bias,
        mlp_bias=False if qwen else f.flag("mlp_bias"),
        qk_norm=architecture == "Qwen3ForCausalLM",
        windows=_windows(f, layers) if qwen else (None,) * layers,
        rope=_rope(f, latent.rope if latent else head_dim, max_positions),
        max_positions=max_positions,
        eos=_eos(f, directory),
        dtype=f.raw.get("dtype", f.raw.get("torch_dtype")),
        latent=latent,
        experts=_experts(f, layers) if deepseek else None,
    )


def _windows(f: _Fields, layers: int) -> tuple[int | None, ...]:
    """Qwen's sliding-window layers: by layer_types, else those from max_window_layers on."""
    window = f.whole("sliding_window", 4096) if f.flag("use_sliding_window") else None
    if "sliding_window" in f.raw and f.raw["sliding_window"] is None:
        window = None
    kinds = f.raw.get("layer_types")
    if kinds is None:
        first = f.whole("max_window_layers", 28, low=0)
        return tuple(window if i >= first else None for i in range(layers))
    if not isinstance(kinds, list) or len(kinds) != layers or not set(kinds) <= {"full_attention", "sliding_attention"}:
        raise f.fail(f"layer_types is {kinds!r}, wanted {layers} of 'full_attention' and 'sliding_attention'")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _rope(f: _Fields, dim: int, max_positions: int) -> Rope:
    """From rope_parameters (transformers 5) or rope_theta and rope_scaling (before)."""
    key = "rope_scaling" if f.raw.get("rope_scaling") else "rope_parameters"
    given = f.raw.get(key) or {}
    if not isinstance(given, dict):
        raise f.fail(f"{key} is {given!r}, wanted an object")
    options = dict(given)
    kind = options.pop("rope_type", None) or options.pop("type", None) or "default"
    options.pop("type", None)
    if kind not in ROPE_TYPES:
        raise f.fail(f"{key} has the type {kind!r}, supported: {', '.join(ROPE_TYPES)}")
    theta = options.pop("rope_theta", None)
    theta = f.real("rope_theta", 10000.0) if theta is None else theta
    if options.pop("partial_rotary_factor", f.raw.get("partial_rotary_factor", 1.0)) not in (None, 1, 1.0):
        raise f.fail("partial_rotary_factor is given, supported: 1.0")
    if kind in ("llama3", "yarn"):
        name = "original_max_position_embeddings"
        options[name] = f.raw.get(name) or options.get(name) or max_positions
    needed = {"linear": ("factor",), "dynamic": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor")}
    for name in needed.get(kind, ()):
        if name not in options:
            raise f.fail(f"{key} has the type {kind!r} but no {name}")
    for name in _ROPE_NUMBERS:
        value = theta if name == "rope_theta" else options.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value <= 0):
            raise f.fail(f"{name} of {key} is {value!r}, wanted a number above 0")
    if dim % 2:
        raise f.fail(f"the rotated part of a head has {dim} elements, wanted an even number")
    return Rope(kind, float(theta), dim, max_positions, options)


def _latent(f: _Fields) -> Latent:
    rank = f.whole("q_lora_rank", None)
    rope = f.whole("qk_rope_head_dim", 64)
    return Latent(rank, f.whole("kv_lora_rank", 512), f.whole("qk_nope_head_dim", 128), rope, f.whole("v_head_dim", 128))


def _experts(f: _Fields, layers: int) -> Experts | None:
    f.only("moe_layer_freq", 1, None)
    f.only("scoring_func", "softmax", None)
    f.only("topk_method", "greedy", "group_limited_greedy", None)
    f.only("norm_topk_prob", False, None)
    first = f.whole("first_k_dense_replace", 0, low=0)
    if first >= layers or ("n_routed_experts" in f.raw and f.raw["n_routed_experts"] is None):
        return None
    count, chosen = f.whole("n_routed_experts", 64), f.whole("num_experts_per_tok")
    groups = chosen_groups = 1
    if f.raw.get("topk_method") == "group_limited_greedy":
        groups, chosen_groups = f.whole("n_group"), f.whole("topk_group")
    if count % groups or chosen_groups > groups or chosen > chosen_groups * (count // groups):
        raise f.fail(
            f"n_routed_experts is {count}, n_group {groups}, topk_group {chosen_groups}: "
            f"num_experts_per_tok = {chosen} experts cannot be chosen from them"
        )
    scale = f.real("routed_scaling_factor", 1.0)
    intermediate, shared = f.whole("moe_intermediate_size", 1407), f.whole("n_shared_experts", 0, low=0)
    return Experts(first, count, chosen, intermediate, shared, scale, groups, chosen_groups)


def _eos(f: _Fields, directory: Path) -> frozenset[int]:
    """generation_config.json's eos_token_id (a number or a list) comes before config.json's."""
    source, given = f.path, f.raw.get("eos_token_id")
    generation = directory / "generation_config.json"
    if generation.exists():
        other = read_json(generation).get("eos_token_id")
        if other is not None:
            source, given = generation, other
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise CheckpointError(f"{source}: eos_token_id is {given!r}, wanted a token id or a list of them")
    return frozenset(ids)
