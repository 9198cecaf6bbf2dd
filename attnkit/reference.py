"""Plain torch truth for every op, written to be read. Also what ``impl="torch"`` runs.

Attention computes in ``compute`` (float64 for tests, float32 as an implementation). Given a 16-bit
``compute`` it rounds where an eager model rounds: scores and probabilities in that dtype, softmax in
float32. These functions read lens on the host, so they synchronise.
"""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


# ---------------------------------------------------------------- attention


def dequantise(x: Tensor, scale: Tensor | None, compute: torch.dtype) -> Tensor:
    """x [N, H, D] times a scale a head [H]."""
    wide = x.to(torch.promote_types(torch.float32, compute) if scale is not None else compute)
    return (wide * scale.to(wide.dtype)[:, None]).to(compute) if scale is not None else wide


def dequantise_latent(rows: Tensor, compute: torch.dtype) -> Tensor:
    """uint8 [..., 656] of an fp8 latent cache as [..., 576]: 512 e4m3 values by a scale a 128 of them, then 64 of rope."""
    rows = rows.contiguous()
    wide = torch.promote_types(torch.float32, compute)
    values = rows[..., :512].view(torch.float8_e4m3fn).to(wide).unflatten(-1, (4, 128))
    scales = rows[..., 512:528].contiguous().view(torch.float32).to(wide)
    latent = (values * scales[..., None]).flatten(-2)
    return torch.cat([latent, rows[..., 528:].contiguous().view(torch.bfloat16).to(wide)], -1).to(compute)


def write_latent(latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor) -> None:
    """latent [T, 512] and rope [T, 64] to rows of an fp8 latent cache uint8 [P, S, 656]; slot -1 skips."""
    keep = (slots >= 0) & (slots < cache.shape[0] * cache.shape[1])
    x = latent[keep].float().unflatten(-1, (4, 128))
    most = x.abs().amax(-1, keepdim=True)
    scale = most / torch.full_like(most, 448.0)  # a number would make it a product on a GPU
    scale = torch.where(scale == 0, 1.0, scale).masked_fill(~torch.isfinite(scale), float("nan"))
    values = (x / scale).clamp(-448.0, 448.0).flatten(-2).to(torch.float8_e4m3fn)
    parts = (values, scale.squeeze(-1), rope[keep].to(torch.bfloat16))
    rows = torch.cat([part.contiguous().view(torch.uint8) for part in parts], -1)
    slot = slots[keep]
    cache[slot // cache.shape[1], slot % cache.shape[1]] = rows


def visible(n: int, L: int, causal: bool, window: int, tree: Tensor | None, device: torch.device) -> Tensor:
    """Which of L keys each of the last n queries may see: bool [n, L]."""
    at = torch.arange(L - n, L, device=device)[:, None]
    key = torch.arange(L, device=device)[None, :]
    seen = (at >= 0).expand(n, L).clone()
    if tree is not None:
        new = key - (L - n)
        inside = tree[:, new[0].clamp(0, n - 1)]
        seen &= torch.where(new < 0, torch.ones_like(inside), inside)
    elif causal:
        seen &= key <= at
    if window and (causal or tree is not None):
        seen &= key > at - window
    elif window:
        seen &= (key - at).abs() < window
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """One sequence: q [n, Hq, D], k [L, Hkv, D], v [L, Hkv, Dv], seen [n, L] -> out [n, Hq, Dv], lse [n, Hq]."""
    soft = torch.promote_types(compute, torch.float32)
    group = q.shape[1] // k.shape[1]
    q, k, v = (t.to(compute).transpose(0, 1) for t in (q, k, v))
    k, v = k.repeat_interleave(group, 0), v.repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)).to(soft) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.to(compute).to(soft).masked_fill(~seen, -INF)
    if sinks is not None:
        sink = sinks.to(soft)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink], -1)
        v = torch.cat([v, torch.zeros_like(v[:, :1]) if v.shape[1] else v.new_zeros(v.shape[0], 1, v.shape[2])], 1)
    lse = torch.logsumexp(scores, -1) if scores.shape[-1] else scores.new_full(scores.shape[:2], -INF)
    p = torch.exp(scores - torch.where(lse == -INF, 0.0, lse)[..., None]).to(compute)
    return (p @ v).transpose(0, 1), lse.transpose(0, 1)


def paged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pages: Tensor,
    lens: Tensor,
    cu_q: Tensor,
    *,
    scale: float,
    out_scale: float = 1.0,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    tree_mask: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """q [T, Hq, D] over pages [P, S, Hkv, D] -> out [T, Hq, Dv] and lse [T, Hq], both in at least ``compute``."""
    soft = torch.promote_types(compute, torch.float32)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[3], dtype=compute, device=q.device)
    lse = torch.full(q.shape[:2], -INF, dtype=soft, device=q.device)
    page_size = k.shape[1]
    starts = cu_q.tolist()
    for b, L in enumerate(lens.tolist()):
        rows = slice(starts[b], starts[b + 1])
        n = starts[b + 1] - starts[b]
        at = torch.arange(L, device=q.device)
        page, slot = pages[b].long()[at // page_size], at % page_size
        seen = visible(n, L, causal, window, None if tree_mask is None else tree_mask[b], q.device)
        keys = dequantise(k[page, slot], k_scale, compute)
        values = dequantise(v[page, slot], v_scale, compute)
        o, lse[rows] = attention(q[rows], keys, values, seen, scale=scale, softcap=softcap, sinks=sinks, compute=compute)
        out[rows] = o * out_scale
    return out, lse


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    compute: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """q [T, H, D], k [N, Hk, D], v [N, Hk, Dv], without pages."""
    soft = torch.promote_types(compute, torch.float32)
    out = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=compute, device=q.device)
    lse = torch.full(q.shape[:2], -INF, dtype=soft, device=q.device)
    starts, ends = cu_q.tolist(), cu_k.tolist()
    for b in range(len(starts) - 1):
        rows, keys = slice(starts[b], starts[b + 1]), slice(ends[b], ends[b + 1])
        seen = visible(starts[b + 1] - starts[b], ends[b + 1] - ends[b], causal, window, None, q.device)
        out[rows], lse[rows] = attention(
            q[rows], k[keys], v[keys], seen, scale=scale, softcap=softcap, sinks=sinks, compute=compute
        )
    return out, lse


def merge_states(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Two partial attentions over disjoint keys as one: out [..., Dv] and lse [...]. A part with lse -inf has no say."""
    lse = torch.logaddexp(lse_a, lse_b)
    base = torch.where(lse == -INF, 0.0, lse)
    parts = []
    for out, part in ((out_a, lse_a), (out_b, lse_b)):
        weight = torch.exp(part - base)[..., None]
        parts.append(torch.where(weight > 0, out.to(lse.dtype), 0.0) * weight)
    return parts[0] + parts[1], lse


# ---------------------------------------------------------------- cache


def quantise_kv(x: Tensor, dtype: torch.dtype, scale: Tensor | None) -> Tensor:
    """x [T, H, D] as a cache of ``dtype`` stores it; scale [H]."""
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        return x.to(dtype)
    x = x.float() if scale is None else x.float() / scale[:, None]
    return x.round().clamp(-127, 127).to(torch.int8) if dtype == torch.int8 else x.clamp(-448, 448).to(dtype)


def write_kv(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    page_size = k_cache.shape[1]
    keep = slots >= 0
    page, slot = slots[keep] // page_size, slots[keep] % page_size
    for x, cache, scale in ((k, k_cache, k_scale), (v, v_cache, v_scale)):
        new = quantise_kv(x[keep], cache.dtype, scale)
        if cache.dtype == torch.float8_e4m3fn:  # indexed writes do not exist for it
            cache.view(torch.uint8)[page, slot] = new.view(torch.uint8)
        else:
            cache[page, slot] = new


# ---------------------------------------------------------------- gemm


def quantize_per_token(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] -> (int8 or e4m3 [M, K], float32 scale [M])."""
    top = 127.0 if dtype == torch.int8 else 448.0
    x = x.float()
    scale = x.abs().amax(1) / x.new_full((), top) if x.shape[1] else x.new_zeros(x.shape[0])
    scale = torch.where(scale == 0, 1.0, scale)
    scaled = x / scale[:, None]
    return (scaled.round() if dtype == torch.int8 else scaled).clamp(-top, top).to(dtype), scale


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, compute: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """(y, h) with h = x, or residual + x rounded to x's dtype, and y = h / sqrt(mean(h^2) + eps) * weight in ``compute``."""
    h = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    wide = h.to(compute)
    return wide * (wide.square().mean(1, keepdim=True) + eps).rsqrt() * weight.to(compute), h


def rms_norm_quantize(
    x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, scale, h): the norm in float32, quantised; h is what the residual becomes."""
    y, h = rms_norm(x, weight, eps, residual, torch.float32)
    return *quantize_per_token(y, dtype), h


def silu_mul(x: Tensor, compute: torch.dtype = torch.float64) -> Tensor:
    """silu(gate) * up of x [M, 2 K] in ``compute``."""
    gate, up = x.to(compute).chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


def silu_mul_quantize(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return quantize_per_token(silu_mul(x, torch.float32), dtype)


def w8a8_gemm(
    a: Tensor, w: Tensor, a_scale: Tensor, w_scale: Tensor, bias: Tensor | None, compute: torch.dtype = torch.float64
) -> Tensor:
    """(a . w^T) * a_scale * w_scale + bias, all in ``compute``; exact for int8 up to K = 2^17 in float32 blocks or float64."""
    product = a.to(compute) @ w.to(compute).t()
    out = product * a_scale.to(compute).reshape(-1, 1) * w_scale.to(compute).reshape(1, -1)
    return out if bias is None else out + bias.to(compute)


# ---------------------------------------------------------------- sampling

_M = (0xD2511F53, 0xCD9E8D57)
_W = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b for b below 2^32, in int64 without overflow."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = high + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(seeds: Tensor, offsets: Tensor, n: int, stream: int) -> Tensor:
    """Philox4x32-10 (Salmon et al. 2011): words uint32 [B, n, 4] in int64. Key: the seed; counter: (i, offset,
    offset >> 32, stream)."""
    k0, k1 = (seeds & _MASK)[:, None], ((seeds >> 32) & _MASK)[:, None]
    c0 = torch.arange(n, device=seeds.device)[None, :].expand(seeds.shape[0], -1)
    c1 = (offsets & _MASK)[:, None].expand_as(c0)
    c2 = ((offsets >> 32) & _MASK)[:, None].expand_as(c0)
    c3 = torch.full_like(c0, stream)
    for _ in range(10):
        hi0, lo0 = _mulhilo(_M[0], c0)
        hi1, lo1 = _mulhilo(_M[1], c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W[0]) & _MASK, (k1 + _W[1]) & _MASK
    return torch.stack([c0, c1, c2, c3], -1)


def _uniform(words: Tensor) -> Tensor:
    return ((words.float() + 0.5) * 2.0**-32).clamp(max=1 - 2.0**-24)


def exponential(words: Tensor) -> Tensor:
    """E ~ Exp(1), float32. Small E keeps all its bits, so two winners hardly ever tie."""
    u = _uniform(words)
    series = u * (1 + u * (1 / 2 + u * (1 / 3 + u * (1 / 4 + u / 5))))
    return torch.where(u < 0.02, series, -torch.log(1 - u))


def gumbel(words: Tensor) -> Tensor:
    return -torch.log(exponential(words))


def processed_logits(logits: Tensor, o: dict[str, Tensor]) -> Tensor:
    """Step 1 and 2: float32 logits after penalties, bias and the allowed mask. ``o`` holds tensors [B] or [B, ...]."""
    x = logits.float().clamp(max=torch.finfo(torch.float32).max)
    counts, prompt = o.get("counts"), o.get("prompt_mask")
    seen = torch.zeros_like(x, dtype=torch.bool)
    if counts is not None:
        seen |= counts > 0
    if prompt is not None:
        seen |= prompt
    r = o["repetition_penalty"][:, None]
    x = torch.where(seen, torch.where(x > 0, x / r, x * r), x)
    if counts is not None:
        x = x - o["frequency_penalty"][:, None] * counts
        x = x - o["presence_penalty"][:, None] * (counts > 0)
    if "logit_bias" in o:
        x = x + o["logit_bias"]
    if "allowed" in o:
        v = torch.arange(x.shape[1], device=x.device)
        x = x.masked_fill((o["allowed"][:, v // 32] >> (v % 32)) & 1 == 0, -INF)
    return x


def survivors(x: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Steps 4 to 6 on x = logits / temperature: bool [B, V]. Order is x descending, id ascending."""
    V = x.shape[1]
    ordered, order = torch.sort(x, dim=1, descending=True, stable=True)
    rank = torch.arange(V, device=x.device)[None, :]
    k = torch.where((top_k <= 0) | (top_k >= V), V, top_k)[:, None]
    keep = (rank < k) & (ordered > -INF)
    p = torch.softmax(ordered.double().masked_fill(~keep, -INF), 1)
    before = torch.cumsum(p, 1) - p
    keep &= (before < top_p[:, None]) | (top_p[:, None] >= 1) | (rank == 0)
    keep &= ordered >= ordered[:, :1] + torch.log(min_p[:, None])
    return torch.zeros_like(keep).scatter(1, order, keep)


#: Words of the noise: of every token; of every group of tokens; for the choice inside a group.
TOKENS, GROUPS, INSIDE = 0, 1, 2


def grouped(x: Tensor) -> Tensor:
    """[B, V] -> [B, groups, 16], -inf past the end: group 32 (v // 512) + v % 128 // 4 holds token v; ids ascend in it."""
    x = torch.nn.functional.pad(x, (0, -x.shape[1] % 2048), value=-INF)
    return x.unflatten(1, (-1, 4, 32, 4)).transpose(2, 3).flatten(3).flatten(1, 2)


def draw_by_arrival(x: Tensor, kept: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """One draw a row from softmax(x) over ``kept``, with noise for a group of tokens instead of every token.

    Tokens arrive at random, each at the rate exp(x): the first of those kept to arrive is token v with its share of their
    softmax. Of a group of 16, whatever is kept, the first arrives at the rate of their sum, and it is each of them with its
    share of that sum: the first whose cumulated exp(x) exceeds a uniform share of it. From then on every other token of the
    group arrives at its own rate, as if nothing had happened before. So only groups that arrive early need noise by token.
    Group g's time has word g // 32 % 4 of counter 32 (g // 128) + g % 32.
    """
    V = x.shape[1]
    top = x.amax(1, keepdim=True)
    rate = torch.exp((grouped(x) - top[..., None]).double())
    mass = rate.cumsum(2)
    words = philox(seeds, offsets, mass.shape[1] // 4, GROUPS)
    words = words.unflatten(1, (-1, 32)).transpose(2, 3).flatten(1)
    time = (exponential(words) / mass[..., -1])[..., None]
    u = _uniform(philox(seeds, offsets, mass.shape[1], INSIDE)[..., :1]).double()
    first = (mass <= u * mass[..., -1:]).sum(2, keepdim=True)
    wait = grouped(exponential(philox(seeds, offsets, (V + 3) // 4, TOKENS).flatten(1)[:, :V])) / rate
    wait = wait.scatter(2, first.clamp(max=15), 0.0)
    earliest, inside = (time + wait).masked_fill(grouped(kept.float()) <= 0, INF).min(2)
    # Compared as numbers of float32: where +inf counts as the largest of them, the first group that has one wins.
    group = _first_argmax((top - torch.log(earliest)).float())[:, None]
    inside = inside.gather(1, group)
    return (group // 32 * 512 + inside // 4 * 128 + group % 32 * 4 + inside % 4)[:, 0].clamp(max=V - 1)


def draw(x: Tensor, kept: Tensor, by_arrival: Tensor, seeds: Tensor, offsets: Tensor) -> Tensor:
    """One draw a row from softmax(x) over ``kept``: Gumbel-max over the kept tokens, but in rows of ``by_arrival`` (neither
    top-k nor min-p holds them back) the first to arrive."""
    V = x.shape[1]
    noise = gumbel(philox(seeds, offsets, (V + 3) // 4, TOKENS).flatten(1)[:, :V])
    tokens = _first_argmax((x + noise).masked_fill(~kept, -INF))
    return torch.where(by_arrival, draw_by_arrival(x, kept, seeds, offsets), tokens)


def sample(
    logits: Tensor, seeds: Tensor, o: dict[str, Tensor], logprobs: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """tokens [B], valid [B], and the logprobs and ids [B, 1 + n]. ``o`` holds every option as a tensor [B]."""
    B, V = logits.shape
    x = processed_logits(logits, o)
    valid = ~torch.isnan(logits).any(1) & (x > -INF).any(1)
    x = torch.where(valid[:, None], x, 0.0)
    t = o["temperature"][:, None]
    warm = (x / torch.where(t == 0, 1.0, t)).clamp(max=torch.finfo(torch.float32).max)
    kept = survivors(warm, o["top_k"], o["top_p"], o["min_p"])
    by_arrival = ((o["top_k"] <= 0) | (o["top_k"] >= V)) & (o["min_p"] <= 0)
    drawn = draw(warm, kept, by_arrival, seeds, o["offset"])
    tokens = torch.where(t[:, 0] == 0, _first_argmax(x), drawn)
    tokens = torch.where(valid, tokens, 0)
    if logprobs is None:
        return tokens, valid, None, None
    raw = torch.log_softmax(logits.float().clamp(max=torch.finfo(torch.float32).max).double(), 1).float()
    values, ids = torch.sort(raw, dim=1, descending=True, stable=True)
    ids = torch.cat([tokens[:, None], ids[:, :logprobs]], 1)
    return tokens, valid, raw.gather(1, ids), ids


def _first_argmax(x: Tensor) -> Tensor:
    """torch.argmax does not promise the lowest id on ties."""
    V = x.shape[1]
    at_top = x == x.amax(1, keepdim=True)
    ids = torch.arange(V, device=x.device)
    return torch.where(at_top, ids, V - 1).amin(1)
