"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): both forms are shapes of kernels that exist.

Absorbed decode is paged decode with one KV head that all query heads share, where V is the first C columns of K: the
tile is loaded once and serves both products. A uint8 cache is an fp8 one of 656 bytes a token. Expanded prefill is
prefill without pages, with D = 192 in two parts (128 + 64) and Dv = 128.
"""

from __future__ import annotations

from . import decode, prefill


def decode_shape(
    B: int, Q: int, H: int, C: int, R: int, S: int, capacity: int, q: tuple[int, int, int], kv: tuple[int, int],
    pages_b: int, out: tuple[int, int, int], scale: float, tree: tuple[int, int, int] | None = None, sinks: int = 0,
    softcap: float = 0.0, window: int = 0, invariant: bool = False,
) -> decode.Shape:  # fmt: skip
    """Strides count elements: q, out of [B, Q, H]; kv of page and slot; pages_b of a row of the table; sinks of [H]."""
    return decode.Shape(
        B=B, Q=Q, HKV=1, G=H, S=S, D=C + R, DV=C, capacity=capacity, q=q, k=(*kv, 0), v=(*kv, 0), pages_b=pages_b, out=out,
        scale=scale, tree=tree, scales=(sinks, 0, 0), softcap=softcap, window=window, shared=True, invariant=invariant,
    )  # fmt: skip


def prefill_shape(
    B: int, T: int, N: int, H: int, Hk: int, D: int, DV: int, q: tuple[int, int], k: tuple[int, int], v: tuple[int, int],
    out: tuple[int, int], scale: float, sinks: int = 0, softcap: float = 0.0, window: int = 0, causal: bool = True,
    invariant: bool = False,
) -> prefill.Shape:  # fmt: skip
    """Strides count elements: q, out of [T, H]; k, v of [N, Hk]; sinks of [H]."""
    return prefill.Shape(
        B=B, T=T, HKV=Hk, G=H // Hk, S=1, D=D, DV=DV, capacity=N, q=q, k=(0, *k), v=(0, *v), pages_b=0, out=out, scale=scale,
        scales=(sinks, 0, 0), softcap=softcap, window=window, causal=causal, paged=False, invariant=invariant,
    )  # fmt: skip


def _decode(H: int, C: int = 512, R: int = 64, S: int = 64) -> decode.Shape:
    return decode_shape(64, 1, H, C, R, S, 8192, (0, 0, 0), (0, 0), 0, (0, 0, 0), 1.0)


def _prefill(D: int, DV: int, H: int = 16) -> prefill.Shape:
    return prefill_shape(4, 8192, 8192, H, H, D, DV, (0, 0), (0, 0), (0, 0), (0, 0), 1.0)


_LARGE = ("cuda:80", "cuda:90", "cuda:100")
_NO_HIP = (*_LARGE, "cuda:89", "cuda:120")
_ROWS16 = decode.Tile(16, 32, 4, 2, 1)
_SWAPPED = decode.Tile(16, 64, 4, 2, 1, swap=True)

SPECIMENS = [
    decode.specimen("mla-decode-H16-bf16", _decode(16), "*bf16", "*bf16", decode.Tile(16, 32, 4, 3, 1), _LARGE),
    decode.specimen(
        "mla-decode-H16-S16-bf16", _decode(16, S=16), "*bf16", "*bf16", decode.Tile(16, 64, 8, 3, 1), ("cuda:90", "cuda:100")
    ),
    decode.specimen("mla-decode-H16-swapped-bf16", _decode(16), "*bf16", "*bf16", _SWAPPED, ("cuda:90",)),
    decode.specimen("mla-decode-H128-bf16", _decode(128), "*bf16", "*bf16", decode.Tile(16, 32, 4, 3, 1), _LARGE, parts=34),
    decode.specimen("mla-decode-C256-bf16", _decode(16, 256), "*bf16", "*bf16", _ROWS16),
    decode.specimen("mla-decode-H16-fp32", _decode(16), "*fp32", "*fp32", decode.Tile(16, 16, 4, 2, 1), _NO_HIP),
    decode.specimen("mla-decode-H16-fp8", _decode(16), "*bf16", "*u8", decode.Tile(16, 64, 8, 3, 1), ("cuda:90", "cuda:100")),
    decode.specimen(
        "mla-decode-H128-fp8", _decode(128), "*bf16", "*u8", decode.Tile(16, 64, 8, 3, 1), ("cuda:90", "cuda:100"), parts=34
    ),
    decode.combine_specimen("mla-combine-H16-bf16", _decode(16), "*bf16", _ROWS16),
    prefill.specimen("mla-prefill-bf16", _prefill(192, 128), "*bf16", "*bf16", prefill.Tile(128, 64, 8, 2, 4), targets=_LARGE),
    prefill.specimen("mla-prefill-M64-bf16", _prefill(192, 128), "*bf16", "*bf16", prefill.Tile(64, 32, 4, 2, 4)),
]
