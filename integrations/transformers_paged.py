"""transformers' continuous batching (``model.generate_batch``) through attnkit.

Its manager accepts flash implementations only (5.19 on), or silently swaps others for them (before).
``open_continuous_batching`` makes it accept attnkit under a name of its own, and gives it what flash gets: no dense masks,
CUDA graphs, and on a GPU the decode path that reads the pool through a block table. Prompts go through the cache's own
read-back, then a ragged attention.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

import attnkit

NAME = "attnkit_paged"
#: What transformers 5.17 and 5.18 make of "attnkit" themselves.
NAMES = (NAME, "paged|attnkit")


@torch.compiler.disable
def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, softcap: float | None = None, s_aux: Tensor | None = None, cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """query [1, H, T, D], key, value [1, Hkv, T, D]: the new tokens of all requests, one after another -> [1, T, H, D]."""
    if cache is None:
        raise ValueError(f"{NAME}: called without a paged cache; it serves generate_batch, use attnkit for a plain forward")
    if attention_mask is not None:
        raise ValueError(f"{NAME}: got a dense attention mask, wanted the packed inputs of continuous batching")
    window = getattr(module, "sliding_window", None) or None
    options: dict[str, Any] = {
        "scale": query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        "softcap": float(softcap or 0.0),
        "sinks": None if s_aux is None else s_aux.detach().to(query.dtype),
        "window": window,
    }
    cu_k = kwargs["cu_seq_lens_k"]
    if isinstance(cu_k, dict):
        kind = "full_attention" if window is None else "sliding_attention"
        cu_k = cu_k[kind] if kind in cu_k else next(iter(cu_k.values()))
    if kwargs.get("block_table") is not None:
        k_cache, v_cache, pages = _pool(module, query, key, value, cache, kwargs)
        return _decode(query, key, value, k_cache, v_cache, pages, cu_k, options), None
    key, value = _update(module, key, value, cache, kwargs)
    bounds = _int32(kwargs["cu_seq_lens_q"]), _int32(cu_k)
    out = attnkit.mla_prefill(query[0].transpose(0, 1), key, value, *bounds, **options)
    return cast(Tensor, out).unsqueeze(0), None


def no_mask(*args: Any, **kwargs: Any) -> None:
    """Continuous batching sends no padding: the lengths are in cu_seq_lens."""


def _int32(cu: Tensor) -> Tensor:
    return cu.to(torch.int32)


def _is_old(cache: Any) -> bool:
    """The cache of 5.17 and 5.18: layers in groups, lists of index tensors."""
    return hasattr(cache, "layer_index_to_group_indices")


def _update(module: Any, key: Tensor, value: Tensor, cache: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Write the new tokens and read every key the queries see, as rows [N, Hkv, D]."""
    if _is_old(cache):
        return cache.update(key, value, module.layer_idx, read_index=kwargs["read_index"], write_index=kwargs["write_index"])
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=dict(kwargs))
    return key[0].transpose(0, 1), value[0].transpose(0, 1)


def _pool(module: Any, query: Tensor, key: Tensor, value: Tensor, cache: Any, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """This layer's pages of keys and of values [P, S, Hkv, D], and the block table [B, W]."""
    if _is_old(cache):
        group, layer = cache.layer_index_to_group_indices[module.layer_idx]
        shape = (-1, cache.block_size, cache.num_key_value_heads, cache.head_dim)
        return cache.key_cache[layer].view(shape), cache.value_cache[layer].view(shape), kwargs["block_table"][group]
    given = dict(kwargs)
    cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=given)
    return given["k_cache"], given["v_cache"], given["block_table"]


def _decode(
    query: Tensor, key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, pages: Tensor, cu_k: Tensor,
    options: dict[str, Any],
) -> Tensor:  # fmt: skip
    """One new token a request: write it behind the others, then attend. A padded row has length 0 and does neither."""
    B = query.shape[2]
    k_cache, v_cache, pages = _smaller_pages(k_cache, v_cache, pages)
    S = k_cache.shape[1]
    cu_k = _int32(cu_k)
    lens = cu_k[1 : B + 1] - cu_k[:B]
    at = (lens - 1).clamp(min=0)
    page = pages.gather(1, (at // S).long().unsqueeze(1)).squeeze(1).long()
    slots = torch.where(lens > 0, page * S + at % S, -1)
    attnkit.write_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), (k_cache, v_cache), slots)
    table = attnkit.PageTable(pages.contiguous(), lens)
    out = attnkit.paged_decode(query[0].transpose(0, 1), (k_cache, v_cache), table, **options)
    return cast(Tensor, out).unsqueeze(0)


def _smaller_pages(k_cache: Tensor, v_cache: Tensor, pages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pages of any size as pages of a power of two up to 256, in place."""
    size = k_cache.shape[1]
    S = min(size & -size, 256)
    if S == size:
        return k_cache, v_cache, pages
    parts = torch.arange(size // S, dtype=torch.int32, device=pages.device)
    pages = (pages.unsqueeze(2) * (size // S) + parts).flatten(1)
    return k_cache.view(-1, S, *k_cache.shape[2:]), v_cache.view(-1, S, *v_cache.shape[2:]), pages


def open_continuous_batching() -> None:
    """Let the continuous-batching manager take attnkit. Idempotent; does nothing where transformers has no such manager."""
    try:
        from transformers.generation.continuous_batching import cache, continuous_api, initialization, input_outputs
    except ImportError:
        return
    _wrap(continuous_api.ContinuousBatchingManager, "switch_to_cb_friendly_attn", _switch)
    for module in (cache, initialization):
        _wrap(module, "is_flash_attention_requested", _counts_as_flash)
    for name in ("lazy_import_flash_attention", "lazy_import_paged_flash_attention"):
        _wrap(initialization, name, _has_block_tables)
    _wrap(input_outputs.ContinuousBatchingIOs, "_reset_static_tensors", _reset)
    _wrap(input_outputs.ContinuousBatchingIOs, "prepare_batch_tensors", _prepare)


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Put ``wrapper(original, ...)`` in the place of owner.name, once."""
    original = getattr(owner, name, None)
    if original is None or getattr(original, "of_attnkit", False):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    wrapped.of_attnkit = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def _switch(original: Callable[..., Any], manager: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    name = model.config._attn_implementation
    if name == "attnkit" or name in NAMES:
        if name != NAME:
            model.set_attn_implementation(NAME)
            manager._original_attn_impl = name
        return None
    return original(manager, model, *args, **kwargs)


def _counts_as_flash(
    original: Callable[..., Any], config: Any = None, requested_attention_implementation: str | None = None, **kwargs: Any
) -> bool:
    name = requested_attention_implementation if config is None else getattr(config, "_attn_implementation", None)
    return name in NAMES or original(config, requested_attention_implementation, **kwargs)


def _has_block_tables(original: Callable[..., Any], implementation: str | None, *args: Any, **kwargs: Any) -> Any:
    """The manager asks only whether there is a function that reads block tables (at [0][2], in 5.17 at [1])."""
    return ((_decode,) * 4, _decode) if implementation in NAMES else original(implementation, *args, **kwargs)


# The manager fills its inputs on the current stream and copies to or computes from them on streams of its own, with no event
# between (5.17 to 5.23). Where the GPU is shared the current stream may be the later one: zeros of a reset then arrive after
# the first batch, or a step reads the inputs of the one before. sdpa's tokens are wrong in the same way.


def _reset(original: Callable[..., Any], inputs: Any, full_reset: bool = False) -> None:
    original(inputs, full_reset)
    if full_reset and inputs.device.type == "cuda":
        torch.cuda.current_stream(inputs.device).synchronize()


def _prepare(original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> None:
    original(inputs, *args, **kwargs)
    if inputs.compute_stream is not None:
        inputs.compute_stream.wait_stream(torch.cuda.current_stream(inputs.device))
