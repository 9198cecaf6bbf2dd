"""``attn_implementation="attnkit"`` for transformers 5.17 to 5.23.

``register`` puts an attention function and a mask function under that name. The mask function does not build a mask: where
the 2-D padding mask is a run of ones in each row and the pattern is causal, perhaps with a sliding window, it returns a
*span*, int32 [B, 1, w, 2] or [B, 1, w, 1]: the first key and the number of keys (or the latter alone: nothing is padded)
each sequence sees, queries aligned to the end; w is the window, which so survives torch.compile as a shape, and 1 where
there is none. Everything else (packed sequences, custom and bidirectional masks, holes, gradients, dropout) is computed
densely, by transformers' own sdpa function where that can, and below where it cannot (softcap, sinks, returned weights).

The cache is never copied: keys [B, Hkv, K, D] of any strides are read as rows [N, Hkv, D] of a ragged batch whose gaps are
sequences without queries, or as pages of a paged cache. Continuous batching (``generate_batch``) is in transformers_paged.py.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import attnkit
from attnkit.integrations import transformers_paged

NAME = "attnkit"
MAX_DECODE_QUERIES = 16
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def register() -> None:
    """Make "attnkit" known to transformers (again, if need be: it costs four dictionary entries)."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, span_mask)
    for name in transformers_paged.NAMES:
        AttentionInterface.register(name, transformers_paged.attention)
        AttentionMaskInterface.register(name, transformers_paged.no_mask)
    transformers_paged.open_continuous_batching()


def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None, softcap: float | None = None,
    s_aux: Tensor | None = None, is_causal: bool | None = None, cache: Any = None, **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """transformers' attention function: query [B, H, S, D], key [B, Hkv, K, D], value [B, Hkv, K, Dv] -> [B, S, H, Dv]."""
    if cache is not None:
        return transformers_paged.attention(
            module, query, key, value, attention_mask, scaling=scaling, softcap=softcap, s_aux=s_aux, cache=cache, **kwargs
        )
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    span, window = None, sliding_window or 0
    if attention_mask is not None and attention_mask.dtype == torch.int32:
        span, causal = _checked_span(attention_mask, query), True
        window = span.shape[2] if span.shape[2] > 1 else 0
    if (
        (attention_mask is not None and span is None)
        or dropout
        or kwargs.get("output_attentions")
        or kwargs.get("position_bias") is not None
        or _needs_dense(query, key, value)
    ):
        mask = attention_mask if span is None else visible(span, query.shape[2], key.shape[2])
        options: dict[str, Any] = {"scaling": scale, "dropout": dropout, "softcap": softcap, "s_aux": s_aux}
        return dense(module, query, key, value, mask, causal=causal, window=window, **options, **kwargs)
    cu_q, cu_k = kwargs.get("cu_seq_lens_q"), kwargs.get("cu_seq_lens_k")
    if span is None and cu_q is not None and cu_k is not None and query.shape[0] == 1:
        ragged = _packed if not torch.compiler.is_compiling() else torch.compiler.disable(_packed)
        return ragged(query, key, value, cu_q, cu_k, s_aux, scale, softcap or 0.0, window, causal), None
    attend = _attend_op if torch.compiler.is_compiling() else _attend
    return attend(query, key, value, span, s_aux, scale, float(softcap or 0.0), window, causal), None


def _checked_span(mask: Tensor, query: Tensor) -> Tensor:
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] not in (1, 2) or mask.shape[0] not in (1, query.shape[0]):
        raise ValueError(
            f"attnkit: attention_mask is int32 {list(mask.shape)}, wanted the span [B, 1, w, 1 or 2] that attnkit's mask"
            " function returns (the model changed it), or a bool or float mask"
        )
    return mask


def _needs_dense(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """What attnkit's ops do not do: gradients, and unusual dtypes and head sizes."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return True
    if q.dtype not in DTYPES or k.dtype != q.dtype or v.dtype != q.dtype or q.shape[1] % k.shape[1]:
        return True
    return any(d % 8 or not 8 <= d <= 576 for d in (q.shape[-1], v.shape[-1]))


# --- the mask function


def span_mask(
    batch_size: int, q_length: int, kv_length: int, q_offset: Any = 0, kv_offset: int = 0,
    mask_function: Callable = causal_mask_function, attention_mask: Tensor | None = None, **kwargs: Any,
) -> Tensor | None:  # fmt: skip
    """transformers' mask function: a span, None (all K keys, aligned to the end), or else sdpa's dense bool mask."""
    window = None if kwargs.get("use_vmap") else _window_of(mask_function)
    if window is not None:
        fits = _span_of(batch_size, q_length, q_offset, kv_offset, attention_mask, kwargs.get("device", "cpu"))
        if fits is not None:
            start, end = fits
            must = isinstance(end, Tensor) or not kwargs.get("allow_is_causal_skip", True)
            if start is None and not must and end == kv_length and not 0 < window < kv_length:
                return None
            return _span(batch_size, start, end, window or 1, kwargs.get("device", "cpu"))
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    return sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, **kwargs,
    )  # fmt: skip


def _window_of(mask_function: Any) -> int | None:
    """0 for the causal pattern, w > 1 for a causal sliding window of w keys, None for any other."""
    if mask_function is causal_mask_function:
        return 0
    if torch.compiler.is_compiling() or not _is(mask_function, "and_masks.<locals>.and_mask"):
        return None
    parts = _closed_over(mask_function).get("mask_functions")
    if not isinstance(parts, tuple) or len(parts) != 2 or parts[1] is not causal_mask_function:
        return None
    window = _closed_over(parts[0]).get("sliding_window") if _is(parts[0], "sliding_window_overlay.<locals>.inner_mask") else 0
    return window if isinstance(window, int) and window > 1 else None


def _is(function: Any, name: str) -> bool:
    here = getattr(function, "__module__", None) == causal_mask_function.__module__
    return here and getattr(function, "__qualname__", None) == name


def _closed_over(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, (cell.cell_contents for cell in function.__closure__ or ())))


def _span_of(
    batch: int, q_length: int, q_offset: Any, kv_offset: int, padding: Tensor | None, device: Any
) -> tuple[Tensor | None, Any] | None:
    """(first visible key [B] or None for 0, end) in the cache's own indices; None where rows are not runs of ones.

    Zeros behind a run are right padding: the queries there are padding too, and earlier ones cannot see them. A row of zeros
    (the first chunk of a padded prompt) holds padding only.
    """
    end = q_offset + q_length
    if padding is None:
        return None, end - kv_offset
    if torch.compiler.is_compiling() or (padding.is_cuda and torch.cuda.is_current_stream_capturing()):
        return None  # its values cannot be looked at now
    if padding.dim() != 2 or padding.shape[0] != batch:
        return None
    width = padding.shape[1]
    seen = padding.bool() & (torch.arange(width, device=padding.device) < end)
    first = seen.int().argmax(1)
    last = width - 1 - seen.flip(1).int().argmax(1)
    count = seen.sum(1)
    runs = (count == last - first + 1) | (count == 0)
    start = (torch.where(count > 0, first, end) - kv_offset).clamp(min=0)
    ok, padded, end_at = torch.stack([runs.all(), (start > 0).any(), torch.as_tensor(end, device=runs.device)]).tolist()
    if not ok or end_at > width:
        return None
    return start if padded else None, end - kv_offset


def _span(batch: int, start: Tensor | None, end: Any, width: int, device: Any) -> Tensor:
    if isinstance(end, Tensor):
        ends = end.reshape(1, 1, 1, 1).to(device=device, dtype=torch.int32)
    else:
        ends = torch.full((1, 1, 1, 1), end, dtype=torch.int32, device=device)
    ends = ends.expand(batch, 1, 1, 1)
    if start is not None:
        ends = torch.cat([start.to(device=device, dtype=torch.int32).view(-1, 1, 1, 1), ends], -1)
    return ends.expand(-1, -1, width, -1)


def visible(span: Tensor, S: int, K: int) -> Tensor:
    """The dense mask a span stands for: bool [B, 1, S, K]."""
    window = span.shape[2]
    end = span[:, :, :1, -1:]
    position = end - S + torch.arange(S, device=span.device).view(1, 1, S, 1)
    key = torch.arange(K, device=span.device).view(1, 1, 1, K)
    mask = key <= position
    if window > 1:
        mask = mask & (key > position - window)
    return mask & (key >= span[:, :, :1, :1]) if span.shape[3] == 2 else mask


# --- attention through attnkit's ops


def _attend(
    q: Tensor, k: Tensor, v: Tensor, span: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, window: int,
    causal: bool, keep: bool = True,
) -> Tensor:  # fmt: skip
    """q [B, H, S, D] over the cache k, v [B, Hkv, K, D or Dv], unpadded or as span says -> [B, S, H, Dv].

    keep: index tensors may outlive the call. Not so in compiled code, whose memory may belong to a CUDA graph.
    """
    B, H, S, D = q.shape
    K, Dv = k.shape[2], v.shape[3]
    if B == 0 or S == 0 or K == 0:
        return q.new_zeros(B, S, H, Dv)
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": _sinks(sinks, q), "window": window or None}
    queries = q.transpose(1, 2)
    if span is not None and span.shape[3] == 1 and S <= MAX_DECODE_QUERIES:
        paged = _pages(k, v, keep)
        if paged is not None:
            kv, pages = paged
            table = attnkit.PageTable(pages, _memo(keep, span, ("lens", B), lambda: span[:, 0, 0, 0].expand(B).contiguous()))
            return cast(Tensor, attnkit.paged_decode(queries, kv, table, **options))
    rows = _row_count(k)
    if not rows or rows != _row_count(v):
        k, v = k.contiguous(), v.contiguous()
        rows = _row_count(k)
    k, v = _as_rows(k, rows), _as_rows(v, rows)
    if span is None:
        cu_q, cu_k = _constant(keep, _uniform, q.device, B, S, K, rows)
    else:
        cu_q, cu_k = _memo(keep, span, (B, S, rows), lambda: _bounds(span, B, S, rows))
    out = cast(Tensor, attnkit.mla_prefill(queries.reshape(B * S, H, D), k, v, cu_q, cu_k, causal=causal, **options))
    return out.view(B, S, H, Dv)


@torch.library.custom_op("attnkit_transformers::attend", mutates_args=())
def _attend_op(
    q: Tensor, k: Tensor, v: Tensor, span: Tensor | None, sinks: Tensor | None, scale: float, softcap: float, window: int,
    causal: bool,
) -> Tensor:  # fmt: skip
    """_attend as one node of a compiled graph."""
    return _attend(q, k, v, span, sinks, scale, softcap, window, causal, keep=False)


@_attend_op.register_fake
def _(q, k, v, span, sinks, scale, softcap, window, causal):
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


def _sinks(sinks: Tensor | None, q: Tensor) -> Tensor | None:
    if sinks is None:
        return None
    sinks = sinks.detach().reshape(-1)
    return sinks if sinks.dtype in (torch.float32, q.dtype) else sinks.float()


def _row_count(x: Tensor) -> int:
    """How many rows of x's token stride lie between sequences of x [B, Hkv, K, D]; 0 where that is no whole number."""
    B, _, K, _ = x.shape
    sb, _, sk, sd = x.stride()
    if sd != 1:
        return 0
    if K == 1 or B == 1:
        return K
    return sb // sk if sk > 0 and sb % sk == 0 and sb >= K * sk else 0


def _as_rows(x: Tensor, rows: int) -> Tensor:
    """x [B, Hkv, K, D] as [N, Hkv, D], in place: sequence b's tokens are rows b * rows to b * rows + K."""
    B, heads, K, D = x.shape
    step = x.stride(0) if K == 1 else x.stride(2)
    return x.as_strided(((B - 1) * rows + K, heads, D), (step, x.stride(1), 1))


def _pages(k: Tensor, v: Tensor, keep: bool) -> tuple[tuple[Tensor, Tensor], Tensor] | None:
    """The cache as a pool of pages in place, and its table [B, W]; None where K is no multiple of 16 or strides forbid it."""
    B, _, K, _ = k.shape
    page = min(K & -K, 256)
    rows = _row_count(k)
    if page < 16 or not rows or rows % page or rows != _row_count(v):
        return None
    pools = []
    for x in (k, v):
        count, step = (B - 1) * (rows // page) + K // page, x.stride(2)
        pools.append(x.as_strided((count, page, x.shape[1], x.shape[3]), (page * step, step, x.stride(1), 1)))
    return (pools[0], pools[1]), _constant(keep, _page_table, k.device, B, K // page, rows // page)


def _bounds(span: Tensor, B: int, S: int, rows: int) -> tuple[Tensor, Tensor]:
    """cu_q and cu_k of 2B sequences: before each real one a gap, which owns keys and no queries."""
    span = span[:, 0, 0, :].expand(B, -1)
    if span.shape[1] == 1:
        span = torch.cat([torch.zeros_like(span), span], 1)
    keys = span + torch.arange(B, dtype=torch.int32, device=span.device).unsqueeze(1) * rows
    queries = torch.arange(B + 1, dtype=torch.int32, device=span.device).repeat_interleave(2) * S
    return queries[:-1], torch.cat([keys.new_zeros(1), keys.flatten()])


def _arange(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=torch.int32, device=device)


def _uniform(device: torch.device, B: int, S: int, K: int, rows: int) -> tuple[Tensor, Tensor]:
    """cu_q and cu_k where every sequence sees K keys; gaps between sequences only where there are any."""
    ends = _arange(B + 1, device)
    if rows == K or B == 1:
        return ends * S, ends * K
    starts = ends[:-1] * rows
    return ends.repeat_interleave(2)[1:-1] * S, torch.stack([starts, starts + K], 1).flatten()


def _page_table(device: torch.device, B: int, W: int, step: int) -> Tensor:
    return _arange(B, device).unsqueeze(1) * step + _arange(W, device)


@functools.lru_cache(maxsize=64)
def _kept(make: Callable[..., Any], stream: int, *args: Any) -> Any:
    return make(*args)


def _constant(keep: bool, make: Callable[..., Any], device: torch.device, *args: int) -> Any:
    """make(device, *args), kept for the stream it was made on."""
    if not keep or _capturing(device):
        return make(device, *args)
    return _kept(make, torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0, device, *args)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


_last: tuple[Any, ...] = (lambda: None, {})


def _memo(keep: bool, span: Tensor, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """One computation a forward pass, not one a layer: the layers share the span."""
    global _last
    if not keep or _capturing(span.device):
        return make()
    owner, kept = _last
    if owner() is not span:
        kept = {}
        _last = (weakref.ref(span), kept)
    key = (*key, span._version)
    if key not in kept:
        kept[key] = make()
    return kept[key]


def _packed(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, sinks: Tensor | None, scale: float, softcap: float,
    window: int, causal: bool,
) -> Tensor:  # fmt: skip
    """Sequences packed into one batch row, as vision towers send them: q [1, H, T, D] -> [1, T, H, Dv]."""
    rows = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (q, k, v))
    bounds = (cu.to(device=q.device, dtype=torch.int32) for cu in (cu_q, cu_k))
    options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": _sinks(sinks, q), "window": window or None}
    return cast(Tensor, attnkit.mla_prefill(*rows, *bounds, causal=causal, **options)).unsqueeze(0)


# --- what attnkit's ops do not do


def dense(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, scaling: float,
    dropout: float = 0.0, softcap: float | None = None, s_aux: Tensor | None = None, causal: bool = True, window: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention over the whole matrix of scores, differentiable; by transformers' sdpa function where that has the options."""
    S, K = query.shape[2], key.shape[2]
    wanted = kwargs.get("output_attentions")
    if mask is None and causal and (S > 1 or window) and (S != K or window or softcap or s_aux is not None or wanted):
        end = torch.full((1, 1, 1, 1), K, dtype=torch.int32, device=query.device)
        mask = visible(end.expand(1, 1, window or 1, 1), S, K)
    if not softcap and s_aux is None and not wanted:
        options: dict[str, Any] = {"dropout": dropout, "scaling": scaling, "is_causal": causal and mask is None}
        bias = {"position_bias": kwargs["position_bias"]} if kwargs.get("position_bias") is not None else {}
        return sdpa_attention_forward(module, query, key, value, mask, **options, **bias)
    if kwargs.get("position_bias") is not None:
        raise ValueError("attnkit: position_bias together with softcap, sinks or output_attentions is not supported")
    G = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, G).transpose(2, 3) * scaling
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        low = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, low) if mask.dtype == torch.bool else scores + mask
    if s_aux is not None:
        column = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, S, 1).to(scores.dtype)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(query.dtype)[..., :K]
    weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
    return (weights @ repeat_kv(value, G)).transpose(1, 2).contiguous(), weights


register()
