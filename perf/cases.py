"""Every shape that perf/ times, in one place. Letters as everywhere; a new kernel needs no line here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from attnkit.workload import Case, Gemm, Quantize, Sample
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill
from attnkit.workload_cache import Merge, WriteKv, WriteLatent
from attnkit.workload_hidden import SampleFromHidden
from attnkit.workload_quantize import QuantizedLinear, RmsNormQuantize, SiluMulQuantize

FAMILIES = ("prefill", "decode", "mla", "gemm", "sampling", "hidden", "cache")

#: A batch whose bytes sit in one sequence: 63 of about 700 tokens and one of 64k.
SKEWED = (65536, *(700 + (37 * i) % 61 - 30 for i in range(63)))
EVEN = (sum(SKEWED) // 64,) * 64
#: Prompts as they come: 1 to 8192 tokens.
RAGGED = (1, 17, 60, 129, 333, 512, 777, 1024, 1500, 2048, 2500, 4096, 8192, 3, 250, 640)


def _prefill() -> list[Case]:
    long = [Prefill(B=1, L=L, Hq=Hq, Hkv=8) for L in (8192, 32768) for Hq in (32, 64)]
    short = [Prefill(B=32, L=512, Hq=32, Hkv=8), Prefill(B=16, L=1024, Hq=32, Hkv=8)]
    ragged = [Prefill(B=16, L=RAGGED, Hq=32, Hkv=8, label="B16-L1..8192-Hq32-Hkv8-D128-S16-bf16")]
    heads = [
        Prefill(B=4, L=4096, Hq=32, Hkv=8, D=64),
        Prefill(B=4, L=4096, Hq=16, Hkv=8, D=256),
        Prefill(B=4, L=4096, Hq=16, Hkv=16),
        Prefill(B=4, L=4096, Hq=16, Hkv=16, D=192, Dv=128),
        Prefill(B=4, L=2048, Hq=28, Hkv=4, S=64),
        Prefill(B=4, L=2048, Hq=32, Hkv=8, S=256),
    ]
    chunks = [
        Prefill(B=2, n=256, L=131072, Hq=32, Hkv=8),
        Prefill(B=4, n=512, L=8192, Hq=32, Hkv=8),
        Prefill(B=8, n=2048, L=8192, Hq=32, Hkv=8),
        Prefill(B=1, n=256, L=65536, Hq=8, Hkv=1),
    ]
    options = [
        Prefill(B=1, L=32768, Hq=32, Hkv=8, window=4096),
        Prefill(B=4, L=4096, Hq=32, Hkv=8, softcap=30.0),
        Prefill(B=4, L=4096, Hq=32, Hkv=8, sinks=True),
        Prefill(B=4, L=4096, Hq=32, Hkv=8),
        Prefill(B=4, n=512, L=8192, Hq=32, Hkv=8, kv="fp8"),
        Prefill(B=16, L=1024, Hq=32, Hkv=8, kv="fp8"),
        Prefill(B=4, L=4096, Hq=32, Hkv=8, D=64, kv="fp8"),
    ]
    return [*long, *short, *ragged, *heads, *chunks, *options]


def _decode() -> list[Case]:
    pairs = ((12, 2), (28, 4), (32, 8), (64, 8), (16, 16), (32, 1))
    # 128 MB of keys and values or more, whatever the heads.
    full = [Decode(B=32, L=max(2048, 16384 // Hkv), Hq=Hq, Hkv=Hkv) for Hq, Hkv in pairs]
    full += [Decode(B=16, L=16384 // Hkv, Hq=Hq, Hkv=Hkv) for Hq, Hkv in pairs]
    pages = [Decode(B=32, L=4096, Hq=32, Hkv=8, S=S) for S in (16, 32, 64, 128)]
    sizes = [
        Decode(B=64, L=4096, Hq=32, Hkv=8, D=64),
        Decode(B=32, L=4096, Hq=32, Hkv=8, D=64),
        Decode(B=32, L=4096, Hq=16, Hkv=8, D=256),
    ]
    one = [Decode(B=1, L=L, Hq=Hq, Hkv=Hkv) for Hq, Hkv in ((12, 2), (32, 8)) for L in (1024, 4096, 131072)]
    # A long one of few heads, whose pieces are many.
    one += [
        Decode(B=1, L=L, Hq=Hq, Hkv=Hkv) for Hq, Hkv, L in ((12, 2, 32768), (32, 8, 32768), (8, 1, 131072), (32, 1, 131072))
    ]
    skew = [
        Decode(B=64, L=SKEWED, Hq=32, Hkv=8, label="B64-L64k+63x700-Hq32-Hkv8-D128-S16-bf16"),
        Decode(B=64, L=EVEN, Hq=32, Hkv=8, label=f"B64-L{EVEN[0]}-Hq32-Hkv8-D128-S16-bf16-even"),
    ]
    quantised = [Decode(B=64, L=4096, Hq=32, Hkv=8, kv=kv) for kv in ("", "fp8", "int8")]
    several = [Decode(B=32, L=4096, Hq=32, Hkv=8, Q=Q) for Q in (2, 4, 8)]
    several += [Decode(B=32, L=4096, Hq=32, Hkv=8, Q=8, tree=True)]
    several += [Decode(B=32, L=4096, Hq=64, Hkv=8, Q=8), Decode(B=32, L=8192, Hq=12, Hkv=2, Q=8)]
    options = [
        Decode(B=32, L=4096, Hq=32, Hkv=8, batch_invariant=True),
        Decode(B=16, L=16384, Hq=32, Hkv=8, window=4096),
        Decode(B=16, L=2048, Hq=28, Hkv=4),
    ]
    return [*full, *pages, *sizes, *one, *skew, *quantised, *several, *options]


def _mla() -> list[Case]:
    decode: list[Case] = [
        MlaDecode(B=1, L=8192, H=128),
        MlaDecode(B=64, L=16384, H=16),
        MlaDecode(B=32, L=4096, H=128),
        MlaDecode(B=128, L=4096, H=128),
        MlaDecode(B=64, L=8192, H=128, Q=2),
        MlaDecode(B=32, L=4096, H=128, Q=4),
        MlaDecode(B=32, L=4096, H=64),
        MlaDecode(B=32, L=4096, H=128, S=16),
        MlaDecode(B=32, L=4096, H=128, S=128),
        MlaDecode(B=32, L=4096, H=16, C=256),
    ]
    decode += [
        MlaDecode(B=B, L=L, H=H, Q=Q, kv="fp8") for B, L, H, Q in ((64, 8192, 128, 2), (1, 8192, 128, 1), (32, 4096, 64, 1))
    ]
    return [*decode, MlaPrefill(B=1, L=8192, H=16), MlaPrefill(B=16, L=1024, H=16)]


def _mla_narrow() -> list[Case]:
    """Few query rows: sizes that a serving step has, and the fp8 latent cache against the 16-bit one."""
    small: list[Case] = [MlaDecode(B=B, L=L, H=16) for B, L in ((1, 8192), (4, 4096), (16, 512), (16, 2048), (1, 131072))]
    pages: list[Case] = [MlaDecode(B=64, L=4096, H=16, S=S) for S in (16, 64, 128)]
    rows: list[Case] = [MlaDecode(B=32, L=4096, H=8), MlaDecode(B=32, L=4096, H=16, Q=2)]
    sizes = ((64, 16384, 16, 1), (1, 8192, 16, 1), (16, 2048, 16, 1), (32, 4096, 8, 1), (32, 4096, 16, 2), (32, 4096, 128, 1))
    fp8: list[Case] = [MlaDecode(B=B, L=L, H=H, Q=Q, kv="fp8") for B, L, H, Q in sizes]
    return [*small, *pages, *rows, *fp8, MlaDecode(B=64, L=4096, H=16, S=16, kv="fp8")]


#: N, K of one layer's products: qkv, o, gate and up, down.
QWEN_7B = ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944))
LLAMA_8B = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
LLAMA_70B = ((10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672))
ROWS = (1, 2, 4, 8, 16, 17, 32, 64, 100, 128, 256, 512, 1024, 2048, 4096, 8192)


def _gemm() -> list[Case]:
    sweep = [Gemm(M=M, N=28672, K=4096) for M in ROWS]
    # Every layer of every model, with rows that together are all of ROWS.
    rows = {QWEN_7B: (1, 16, 64, 128, 512, 4096), LLAMA_8B: (2, 17, 64, 100, 256, 1024), LLAMA_70B: (4, 8, 32, 256, 512, 2048)}
    layers = [Gemm(M=M, N=N, K=K) for model, some in rows.items() for N, K in model if (N, K) != (28672, 4096) for M in some]
    fp8 = [Gemm(M=M, N=28672, K=4096, dtype="fp8") for M in (1, 16, 64, 128, 256, 512, 2048, 8192)]
    fp8 += [Gemm(M=M, N=N, K=K, dtype="fp8") for N, K in ((4608, 3584), (3584, 18944), (10240, 8192)) for M in (16, 256, 4096)]
    bias = [Gemm(M=M, N=4608, K=3584, bias=True) for M in (64, 256)]
    return [*sweep, *layers, *fp8, *bias]


def _quantize() -> list[Case]:
    """Quantising alone and fused with what comes before it; and a linear quantised on the way in against bf16."""
    alone: list[Case] = [Quantize(M=M, K=4096) for M in (1, 16, 64, 4096, 32768)]
    alone += [Quantize(M=4096, K=4096, dtype="fp8"), Quantize(M=4096, K=14336)]
    fused: list[Case] = [RmsNormQuantize(M=M, K=4096, residual=True) for M in (1, 64, 4096)]
    fused += [RmsNormQuantize(M=4096, K=8192), SiluMulQuantize(M=4096, K=14336, dtype="fp8")]
    fused += [SiluMulQuantize(M=M, K=14336) for M in (1, 64, 4096)]
    pairs: list[Case] = [QuantizedLinear(M=M, N=28672, K=4096) for M in (1, 16, 64, 512, 2048, 4096)]
    return [*alone, *fused, *pairs, QuantizedLinear(M=16, N=4096, K=14336), QuantizedLinear(M=64, N=28672, K=4096, dtype="fp8")]


def _sampling() -> list[Case]:
    usual = [Sample(B=B, V=131072, top_k=50, top_p=0.9) for B in (1, 32, 128, 256)]
    others = [
        Sample(B=128, V=151936, top_k=50, top_p=0.9, min_p=0.05),
        Sample(B=256, V=151936, top_p=0.9),
        *(Sample(B=128, V=131072, top_p=p) for p in (0.1, 0.5, 0.9, 0.99)),
        *(Sample(B=128, V=131072, top_p=0.9, temperature=t) for t in (5.0, 25.0)),
        *(Sample(B=128, V=131072, top_p=p, penalties=True) for p in (0.1, 0.9)),
        *(Sample(B=128, V=131072, min_p=0.05, dtype=dtype) for dtype in ("fp32", "bf16")),
        # More than 20000 tokens of a row are kept.
        *(Sample(B=128, V=131072, min_p=0.05, top_p=p, temperature=3.0, dtype=d) for p in (1.0, 0.9) for d in ("fp32", "bf16")),
        *(Sample(B=128, V=131072, min_p=0.05, temperature=3.0, penalties=True, dtype=dtype) for dtype in ("fp32", "bf16")),
        *(Sample(B=128, V=131072, top_k=50, top_p=0.9, penalties=True, dtype=dtype) for dtype in ("fp32", "bf16")),
        *(Sample(B=128, V=131072, top_k=k, top_p=0.9, dtype="bf16") for k in (50, 0)),
        *(Sample(B=128, V=131072, top_p=p, dtype="bf16") for p in (0.1, 0.5, 0.99)),
        Sample(B=256, V=131072, top_p=0.9, dtype="bf16"),
        *(Sample(B=B, V=131072, top_k=1000, top_p=0.9, dtype=dtype) for B in (128, 256) for dtype in ("fp32", "bf16")),
        *(Sample(B=B, V=131072, top_p=0.9, min_p=0.05, dtype=d) for d in ("fp32", "bf16") for B in (128, 256)),
        Sample(B=128, V=32000, top_k=50, top_p=0.9),
        Sample(B=64, V=256000, top_k=50, top_p=0.9),
        Sample(B=128, V=262144, top_k=1000, top_p=0.9),
        Sample(B=128, V=256000, top_p=0.9, dtype="bf16"),
        Sample(B=32, V=131072, top_k=50, top_p=0.9, logprobs=5),
    ]
    filters: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_p": 0.9, "min_p": 0.05}, {"top_k": 1000, "top_p": 0.9}]
    changed = [Sample(B=B, V=131072, penalties=True, dtype="bf16", **f) for f in filters for B in (128, 256)]
    changed += [Sample(B=128, V=131072, penalties=True, **f) for f in (filters[0], filters[3])]
    few = [Sample(B=B, V=131072, top_k=k, top_p=0.9, min_p=m) for B in (1, 32) for k, m in ((1000, 0.0), (0, 0.05))]
    few += [replace(case, penalties=True) for case in few]
    few += [
        Sample(B=1, V=131072, top_p=0.9, penalties=penalties, dtype=d) for penalties in (False, True) for d in ("fp32", "bf16")
    ]
    plain = [Sample(B=B, V=131072, temperature=t) for t in (0.8, 0.0) for B in (1, 128, 256)]
    half = [Sample(B=B, V=131072, temperature=t, dtype="bf16") for t in (0.8, 0.0) for B in (128, 256)]
    return [*usual, *others, *changed, *few, *plain, *half]


def _hidden() -> list[Case]:
    """The product with a model's output embedding, and a draw from it."""
    usual = [SampleFromHidden(B=B, V=131072, H=4096, temperature=t) for t in (0.8, 0.0) for B in (1, 8, 32, 64)]
    others = [SampleFromHidden(B=B, V=151936, H=3584) for B in (1, 8, 32)]
    some = [SampleFromHidden(B=B, V=131072, H=4096, top_k=k, top_p=0.9) for k in (50, 0) for B in (1, 32)]
    return [*usual, *others, *some, SampleFromHidden(B=32, V=131072, H=4096, penalties=True)]


def _cache() -> list[Case]:
    write: list[Case] = [WriteKv(T=T, Hkv=8, kv=kv) for T, kv in ((1, ""), (64, ""), (8192, ""), (64, "fp8"), (8192, "fp8"))]
    return [*write, *(WriteLatent(T=T) for T in (64, 8192)), Merge(T=64, Hq=32), Merge(T=4096, Hq=32)]


_GPU = {
    "prefill": _prefill,
    "decode": _decode,
    "mla": lambda: [*_mla(), *_mla_narrow()],
    "gemm": lambda: [*_gemm(), *_quantize()],
    "sampling": _sampling,
    "hidden": _hidden,
    "cache": _cache,
}

#: What two cores can time in a minute; the first of each family is the one README's ratios are about.
_CPU: dict[str, list[Case]] = {
    "prefill": [Prefill(B=1, L=2048, Hq=28, Hkv=4), Prefill(B=4, n=64, L=2048, Hq=28, Hkv=4)],
    "decode": [
        Decode(B=16, L=2048, Hq=28, Hkv=4),
        Decode(B=1, L=8192, Hq=32, Hkv=8),
        Decode(B=16, L=2048, Hq=28, Hkv=4, kv="int8"),
        Decode(B=16, L=2048, Hq=28, Hkv=4, Q=4),
    ],
    "mla": [MlaDecode(B=8, L=2048, H=16), MlaDecode(B=8, L=2048, H=16, kv="fp8"), MlaPrefill(B=1, L=512, H=16)],
    "gemm": [*(Gemm(M=M, N=18944, K=3584) for M in (16, 1, 4, 8)), Gemm(M=128, N=3584, K=3584), Quantize(M=256, K=4096)],
    "sampling": [
        Sample(B=32, V=131072, top_k=50, top_p=0.9),
        Sample(B=32, V=131072),
        Sample(B=32, V=131072, temperature=0.0),
    ],
    "hidden": [SampleFromHidden(B=8, V=32000, H=1024)],
    "cache": [WriteKv(T=64, Hkv=8), WriteKv(T=2048, Hkv=8, kv="int8"), WriteLatent(T=64), Merge(T=64, Hq=32)],
}


def cases(family: str, device_type: str, small: bool = False) -> list[Case]:
    """A family's cases on a kind of device; ``small``: the same options, each once, at sizes that are only checked."""
    chosen = _GPU[family]() if device_type == "cuda" or small else _CPU[family]
    return list(dict.fromkeys(c.small() for c in chosen)) if small else list(dict.fromkeys(chosen))
