"""Configs of the CUDA kernel behind quantize_per_token, rms_norm_quantize and silu_mul_quantize."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from attnkit.arch import Arch
from attnkit.backends.cuda.builds import quantize as builds
from attnkit.configs import Space, pow2
from attnkit.signature import QuantSig, RmsNormQuantSig, SiluMulQuantSig

Sig = QuantSig | RmsNormQuantSig | SiluMulQuantSig
TYPE = {torch.bfloat16: builds.BF16, torch.float16: builds.F16, torch.float32: builds.F32}


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    chunks  pieces of eight values that a thread keeps of a row: a power of two
    warps   that share a row
    rows    that a CTA has side by side
    ctas    a multiprocessor, each with rows one after another; 0: as many as there are rows
    slots   rows of shared memory that such a warp group loads ahead; 0: rows go straight to registers
    """

    chunks: int
    warps: int
    rows: int
    ctas: int
    slots: int = 0


def form_of(sig: Any) -> int:
    if isinstance(sig, RmsNormQuantSig):
        return builds.RMS_NORM
    return builds.SILU_MUL if isinstance(sig, SiluMulQuantSig) else builds.PLAIN


def has_residual(sig: Any) -> bool:
    return getattr(sig, "residual_stride", None) is not None


def holds(sig: Any, config: CudaConfig) -> bool:
    """Whether the registers of ``config`` take a whole row."""
    return sig.K <= config.warps * config.chunks * 32 * builds.CHUNK


def slot_bytes(sig: Any) -> int:
    """What a row brings to shared memory: x, and the residual or the other half."""
    return sig.K * sig.dtype.itemsize * (2 if isinstance(sig, SiluMulQuantSig) or has_residual(sig) else 1)


def shared_bytes(sig: Any, config: CudaConfig) -> int:
    """The rings and their barriers, as csrc/cuda/quantize/quantize_sm90.cuh lays them out."""
    slots = config.rows * config.slots
    return (slots * 8 + 127) // 128 * 128 + slots * slot_bytes(sig)


def why_not(sig: Any, config: CudaConfig) -> str | None:
    """None where ``config`` can run ``sig``, else the reason."""
    kept = builds.chunks(form_of(sig), TYPE[sig.dtype], config.slots > 0)
    if config.chunks not in kept:
        return f"chunks is {config.chunks}, wanted {' or '.join(map(str, kept)) or 'no slots'}"
    most = builds.most_warps(form_of(sig), TYPE[sig.dtype], config.chunks, config.slots > 0)
    if config.rows < 1 or config.warps < 1 or config.rows * config.warps > most or config.rows > 15:
        return f"warps x rows is {config.warps} x {config.rows}, wanted at most {most} warps and 15 rows"
    if config.rows > 1 and config.warps > 1 and not config.slots:
        return f"rows is {config.rows} of several warps, wanted 1 without slots"
    pairs = builds.paired(form_of(sig), TYPE[sig.dtype], config.chunks) and holds(sig, config)
    if pairs and (sig.K % (2 * builds.CHUNK) or config.ctas):
        return f"K is {sig.K} and ctas {config.ctas}, wanted a multiple of {2 * builds.CHUNK} and 0 for plain rows in pairs"
    if not holds(sig, config) and (config.slots or config.chunks != builds.long_chunks(TYPE[sig.dtype])):
        return f"K is {sig.K}, more than {config.warps} warps with {config.chunks} chunks a thread hold"
    return None


def longest(form: int, code: int, chunks: int) -> int:
    """Values of a row that a CTA with so many chunks a thread holds."""
    return builds.most_warps(form, code, chunks) * chunks * 32 * builds.CHUNK


def config_for(sig: Sig, chunks: int, ctas: int = 0, rows: int = 4) -> CudaConfig:
    """As many warps as it takes for threads of ``chunks`` to hold a row, or as many as a CTA may have."""
    form, code = form_of(sig), TYPE[sig.dtype]
    if sig.K > longest(form, code, chunks):
        chunks = builds.long_chunks(code)
    if builds.paired(form, code, chunks) and sig.K % (2 * builds.CHUNK) and sig.K <= longest(form, code, 8):
        chunks = 8
    warps = max(1, min(builds.most_warps(form, code, chunks), -(-sig.K // (builds.CHUNK * chunks * 32))))
    return CudaConfig(chunks, warps, rows if warps == 1 else 1, ctas)


#: Values of a plain row beyond which a thread has two pairs of chunks: with one, too few rows share a multiprocessor.
ONE_PAIR = 8192
#: Bytes read and written above which codes (and a sum) are not to displace what else L2 holds.
PASSING = 24 << 20


def passing(sig: Any) -> bool:
    """Whether a call moves more than L2 would keep until the next kernel reads its codes."""
    x = sig.dtype.itemsize * (2 if isinstance(sig, SiluMulQuantSig) else 1)
    residual = 2 * sig.dtype.itemsize if has_residual(sig) else 0
    return sig.M * sig.K * (x + residual + 1) > PASSING


def default(sig: Sig, arch: Arch) -> CudaConfig:
    """Plain rows: pairs of chunks. Few others: many threads each. Many: more loads in flight a thread; and where a thread
    has more to compute than to wait for (a gate, a norm without a residual to write), a ring that loads ahead."""
    form, code = form_of(sig), TYPE[sig.dtype]
    held = [c for c in (1, 2, 4) if sig.K <= longest(form, code, c)]
    if builds.paired(form, code, 2) and sig.K % (2 * builds.CHUNK) == 0:
        return config_for(sig, 2 if sig.K <= ONE_PAIR else 4 if 4 in held else 8)
    if sig.M <= 2 * arch.sms and 1 in held:
        return config_for(sig, 1)
    if code == builds.F32 or (sig.M <= 12 * arch.sms and 2 in held):
        return config_for(sig, 2)
    if sig.M >= 4 * arch.sms and (form == builds.SILU_MUL or (form == builds.RMS_NORM and not has_residual(sig))):
        found = streamed(sig)
        if found is not None:
            return found
    return config_for(sig, 8 if form == builds.PLAIN and 4 not in held else 4)


def streamed(sig: Any) -> CudaConfig | None:
    """A ring: one CTA a multiprocessor, as many groups as it has threads for; None where none fits."""
    form = form_of(sig)
    for chunks in builds.chunks(form, TYPE[sig.dtype], True):
        warps = -(-sig.K // (builds.CHUNK * chunks * 32))
        groups = min(15, builds.most_warps(form, TYPE[sig.dtype], chunks, True) // warps)
        for slots in (2,) if form == builds.SILU_MUL else (3, 2):
            found = CudaConfig(chunks, warps, groups, 1, slots)
            if groups and shared_bytes(sig, found) <= 220 << 10:
                return found
    return None


def candidates(sig: Sig, arch: Arch) -> list[CudaConfig]:
    found = [default(sig, arch)]
    found += [config_for(sig, c) for c in builds.chunks(form_of(sig), TYPE[sig.dtype])]
    ring = streamed(sig)
    found += [ring] if ring is not None else []
    return list(dict.fromkeys(found))


def bucket(sig: Sig) -> str:
    """By K itself: a config holds rows of so many values, and no longer ones."""
    out = "int8" if sig.out_dtype == torch.int8 else "e4m3"
    extra = "-residual" if has_residual(sig) else ""
    return f"M{pow2(sig.M)}-K{sig.K}-{str(sig.dtype).removeprefix('torch.')}-{out}{extra}"


def _space(op: str) -> Space:
    return Space(
        op, "cuda_sm90", CudaConfig, default, candidates, bucket, sources=("csrc/cuda/quantize/quantize_sm90.cuh",),
        smem=lambda config, sig: shared_bytes(sig, config),
    )  # fmt: skip


QUANTIZE, RMS_NORM, SILU_MUL = (_space(op) for op in ("quantize_per_token", "rms_norm_quantize", "silu_mul_quantize"))
