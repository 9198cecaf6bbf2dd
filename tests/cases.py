"""The shapes and options that attention is tested at. Ids are made of the letters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

SHORT = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "int8",
    torch.float8_e4m3fn: "e4m3",
}


@dataclass(frozen=True)
class Case:
    """One attention call. ``q_lens`` are the new tokens of each sequence; decode wants them all equal to Q."""

    lens: tuple[int, ...] = (0, 1, 15, 16, 17, 45)
    Q: int = 1
    q_lens: tuple[int, ...] = ()
    Hq: int = 4
    Hkv: int = 2
    D: int = 64
    Dv: int = 0
    S: int = 16
    dtype: torch.dtype = torch.bfloat16
    kv_dtype: torch.dtype | None = None
    layout: str = "NHD"
    causal: bool = True
    window: int | None = None
    softcap: float = 0.0
    sinks: bool = False
    scales: str = ""  # "", "number", "tensor", "head"
    tree: bool = False
    batch_invariant: bool = False
    strided_q: bool = False

    @property
    def id(self) -> str:
        parts = [
            f"B{len(self.lens)}",
            f"Hq{self.Hq}",
            f"Hkv{self.Hkv}",
            f"D{self.D}",
            f"S{self.S}",
            f"L{max(self.lens, default=0)}",
        ]
        if self.Dv:
            parts.append(f"Dv{self.Dv}")
        if self.Q > 1:
            parts.append(f"Q{self.Q}")
        parts.append(SHORT[self.dtype])
        if self.kv_dtype:
            parts.append(SHORT[self.kv_dtype] + self.scales)
        for flag in ("tree", "sinks", "batch_invariant", "strided_q"):
            if getattr(self, flag):
                parts.append(flag)
        if not self.causal:
            parts.append("full")
        if self.window:
            parts.append(f"w{self.window}")
        if self.softcap:
            parts.append(f"cap{self.softcap:g}")
        if self.layout != "NHD":
            parts.append(self.layout)
        return "-".join(parts)


BASE = Case()
HEADS = [
    replace(BASE, Hq=g * h, Hkv=h, D=d)
    for g, h, d in ((1, 2, 80), (3, 1, 96), (5, 1, 128), (7, 4, 64), (12, 1, 64), (16, 1, 256))
]
OPTIONS = [
    replace(BASE, window=7),
    replace(BASE, softcap=5.0),
    replace(BASE, sinks=True, window=9, softcap=20.0),
    replace(BASE, batch_invariant=True),
    replace(BASE, strided_q=True, layout="HND"),
    replace(BASE, layout="interleaved", D=32, S=8),
    replace(BASE, D=192, Dv=128, layout="pair"),
]
PAGES = [replace(BASE, S=s, lens=(0, 1, max(1, s - 1), s, s + 1, 37)) for s in (1, 2, 64, 256)]
DTYPES = [
    replace(BASE, dtype=torch.float16),
    replace(BASE, dtype=torch.float32),
    replace(BASE, kv_dtype=torch.int8, scales="head"),
    replace(BASE, kv_dtype=torch.float8_e4m3fn, scales="head", D=128),
    replace(BASE, kv_dtype=torch.float8_e4m3fn, scales="tensor", dtype=torch.float16),
    replace(BASE, kv_dtype=torch.int8, scales="number", dtype=torch.float32),
]
QUERIES = [
    replace(BASE, Q=2),
    replace(BASE, Q=5, Hq=3, Hkv=1, window=4),
    replace(BASE, Q=16, Hq=8, Hkv=1),
    replace(BASE, Q=4, tree=True),
    replace(BASE, Q=8, tree=True, window=6, kv_dtype=torch.int8, scales="head"),
]
DECODE = [BASE, *HEADS, *OPTIONS, *PAGES, *DTYPES, *QUERIES]

RAGGED = replace(BASE, lens=(0, 1, 17, 33, 40, 5), q_lens=(0, 1, 17, 4, 33, 9))
PREFILL = [
    RAGGED,
    *(replace(c, lens=(0, 1, 17, 33, 40), q_lens=(0, 1, 17, 4, 33)) for c in [*HEADS, *OPTIONS, *DTYPES]),
    *(replace(RAGGED, S=s) for s in (1, 64, 256)),
    replace(RAGGED, causal=False),
    replace(RAGGED, causal=False, window=5),
    replace(RAGGED, lens=(150, 70), q_lens=(150, 2), Hq=2, Hkv=1),
]

#: Too large for the interpreter; what a GPU adds.
LARGE_DECODE = [
    replace(BASE, lens=(8191, 1, 0, 700, 4096, 333), Hq=hq, Hkv=hkv, D=d, S=s)
    for hq, hkv, d, s in (
        (12, 2, 128, 16),
        (28, 4, 128, 16),
        (32, 8, 128, 64),
        (64, 8, 64, 32),
        (16, 16, 128, 128),
        (32, 1, 128, 16),
        (16, 8, 256, 16),
        (8, 8, 96, 16),
    )
] + [
    replace(BASE, lens=(65536, 1, 0, 700) * 2, Hq=32, Hkv=8, D=128),
    replace(BASE, lens=(2048, 777, 5), Hq=32, Hkv=8, D=128, Q=8),
    replace(BASE, lens=(2048, 777, 5), Hq=64, Hkv=8, D=64, window=128, sinks=True),
    replace(BASE, lens=(2048, 777, 5), Hq=56, Hkv=8, D=64, Q=3, tree=True, window=100, sinks=True),
    replace(BASE, lens=(4000, 777, 5), Hq=32, Hkv=8, D=128, kv_dtype=torch.float8_e4m3fn, scales="head"),
    replace(BASE, lens=(4000, 777, 5), Hq=32, Hkv=8, D=128, kv_dtype=torch.int8, scales="head", Q=4, tree=True),
    replace(BASE, lens=(2000, 777, 5), Hq=16, Hkv=8, D=256, kv_dtype=torch.float8_e4m3fn, scales="head", Q=8),
    *(replace(BASE, lens=(700, 33, 5), Hq=32, Hkv=8, D=128, S=s) for s in (1, 4)),
    *(
        replace(BASE, lens=(777, 64, 5, 0, 1300) * 20, Hq=Hq, Hkv=8, **more)
        for Hq, more in (
            (32, {"D": 128, "kv_dtype": torch.float8_e4m3fn, "scales": "head"}),
            (24, {"D": 128, "kv_dtype": torch.int8, "scales": "head", "Q": 2, "tree": True}),
            (56, {"D": 64, "S": 4, "window": 300, "sinks": True}),
            (8, {"D": 64, "S": 128, "Q": 5, "softcap": 20.0}),
        )
    ),
]
LARGE_PREFILL = [
    replace(BASE, lens=(2048, 777, 5000, 64), q_lens=(2048, 777, 333, 1), Hq=hq, Hkv=hkv, D=d, S=s)
    for hq, hkv, d, s in ((32, 8, 128, 16), (28, 4, 128, 64), (16, 16, 64, 16), (16, 8, 256, 128), (8, 1, 128, 16))
] + [
    replace(BASE, lens=(3000, 2000), q_lens=(3000, 17), Hq=32, Hkv=8, D=128, window=512, softcap=30.0),
    replace(BASE, lens=(3000, 2000), q_lens=(3000, 17), Hq=64, Hkv=8, D=64, sinks=True, window=128),
    replace(BASE, lens=(1500, 2000), q_lens=(1500, 17), Hq=16, Hkv=16, D=192, Dv=128, layout="pair"),
    replace(BASE, lens=(1500, 2000), q_lens=(1500, 17), Hq=32, Hkv=8, D=128, kv_dtype=torch.float8_e4m3fn, scales="head"),
]


def ids(cases: list[Case]) -> list[str]:
    """Unique ids: a repeated one gets a number."""
    seen: dict[str, int] = {}
    names = []
    for case in cases:
        n = seen[case.id] = seen.get(case.id, 0) + 1
        names.append(case.id if n == 1 else f"{case.id}-{n}")
    return names
