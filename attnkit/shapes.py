"""A shape written in letters, as a case: "B64-L4096-Hq32-Hkv8-D128-S16-bf16" for `attnkit info` and `attnkit tune`."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields

from attnkit.workload import DTYPES, Case, Gemm, Quantize, Sample
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill
from attnkit.workload_hidden import SampleFromHidden
from attnkit.workload_quantize import RmsNormQuantize, SiluMulQuantize

CASES: dict[str, type[Case]] = {
    c.op: c
    for c in (
        Prefill,
        Decode,
        MlaDecode,
        MlaPrefill,
        Gemm,
        Quantize,
        RmsNormQuantize,
        SiluMulQuantize,
        Sample,
        SampleFromHidden,
    )  # type: ignore[type-abstract]
}
#: A shape of each op that every kernel of it should serve: what `attnkit info` asks about.
TYPICAL = {
    "paged_prefill": "B1-L256-Hq8-Hkv2",
    "paged_decode": "B4-L256-Hq8-Hkv2",
    "mla_decode": "B2-L128-H16",
    "mla_prefill": "B1-L64-H8",
    "w8a8_gemm": "M16-N256-K256",
    "quantize_per_token": "M16-K256",
    "rms_norm_quantize": "M16-K256",
    "silu_mul_quantize": "M16-K256",
    "sample": "B4-V1024-k50-p0.9",
    "sample_from_hidden": "B4-V1024-H64",
}
_WORDS: dict[str, tuple[str, object]] = {
    "tree": ("tree", True),
    "invariant": ("batch_invariant", True),
    "sinks": ("sinks", True),
    "softcap": ("softcap", 30.0),
    "penalties": ("penalties", True),
    "bias": ("bias", True),
    "residual": ("residual", True),
    "greedy": ("temperature", 0.0),
    "temperature": ("temperature", 0.8),
}
_LETTERS = {"win": "window", "k": "top_k", "p": "top_p", "minp": "min_p"}


def parse(op: str, text: str) -> Case:
    """The case that ``text`` names; letters in any order, "B64" or "B=64", between dashes, commas or spaces.

    Raises ValueError naming the op, the part it cannot place and what it takes.
    """
    if op not in CASES:
        raise ValueError(f"op is {op!r}, wanted one of {', '.join(CASES)}")
    kind = CASES[op]
    known = {f.name for f in fields(kind)}
    values: dict[str, object] = {}
    for part in re.split(r"[-,\s]+", text.strip()):
        name, value = _part(op, part, known)
        values[name] = value
    missing = [f.name for f in fields(kind) if f.default is MISSING and f.name not in values]
    if missing:
        raise ValueError(f"{op}: shape {text!r} lacks {', '.join(missing)} (such as {TYPICAL[op]})")
    return kind(**values)  # type: ignore[arg-type]


def _part(op: str, part: str, known: set[str]) -> tuple[str, object]:
    if part in DTYPES:
        return "dtype", part
    if part.endswith("kv") and part[:-2] in DTYPES:
        return "kv", part[:-2]
    if part in _WORDS and _WORDS[part][0] in known:
        return _WORDS[part]
    match = re.fullmatch(r"([A-Za-z]+)=?([0-9.]+)(?:/([0-9]+))?", part)
    if match:
        name = _LETTERS.get(match[1], match[1])
        if name in known:
            try:
                return name, float(match[2]) if name in ("top_p", "min_p", "temperature") else int(match[2])
            except ValueError:
                pass
    letters = sorted(k for k in known if len(k) <= 3 or k in ("window", "top_k", "top_p", "min_p"))
    raise ValueError(f"{op}: {part!r} in the shape is no letter with a number, wanted {', '.join(letters)} or a dtype")
