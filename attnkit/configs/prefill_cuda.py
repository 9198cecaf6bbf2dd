"""Configs of the sm_90a prefill kernel, with pages and without."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.arch import Arch
from attnkit.configs import Space, pow2
from attnkit.signature import AttentionSig, RaggedSig

SHARED = 227 * 1024
#: Bytes that stand before and beside the tiles, besides outputs on their way.
FIXED = 1024 + 384 + 256 + 1024 * 6 + 16


@dataclass(frozen=True, slots=True)
class CudaConfig:
    """
    consumers  warpgroups of 64 query rows in a CTA
    block      keys in a tile
    stages     tiles of K, and of V, in flight
    """

    consumers: int
    block: int
    stages: int


def padded(head: int) -> int:
    """The head size a build is made for: whole 64-column boxes, and what wgmma has widths for."""
    return next(n for n in (64, 128, 192, 256) if head <= n)


def staged(rows: int, columns: int) -> int:
    """Outputs on their way: so many columns of all rows."""
    return rows * columns * 2 + 112


def shared_bytes(sig: AttentionSig | RaggedSig, config: CudaConfig) -> int:
    """SharedBytes of csrc/cuda/prefill/prefill_sm90.cuh."""
    D, Dv = padded(sig.D), padded(sig.Dv)
    rows = 64 * config.consumers
    queries = rows * D * 2
    once = FIXED + staged(rows, 32 if D == 192 else 64) + queries + config.stages * config.block * (D + Dv) * 2
    return once + queries if once + queries <= SHARED else once


def default(sig: AttentionSig | RaggedSig, arch: Arch) -> CudaConfig:
    head = padded(sig.D)
    if head == 256:
        return CudaConfig(2, 64, 2)
    return CudaConfig(3, 128, 4) if head == 64 else CudaConfig(2, 128, 2)


def candidates(sig: AttentionSig | RaggedSig, arch: Arch) -> list[CudaConfig]:
    every = [
        default(sig, arch),
        CudaConfig(2, 128, 2),
        CudaConfig(2, 64, 2),
        CudaConfig(2, 64, 3),
        CudaConfig(2, 64, 4),
    ]
    if padded(sig.D) == 64:
        every += [CudaConfig(3, 128, 2), CudaConfig(3, 128, 4), CudaConfig(3, 64, 4)]
    return [c for c in dict.fromkeys(every) if fits(sig, c)]


def fits(sig: AttentionSig | RaggedSig, config: CudaConfig) -> bool:
    """Shared memory, and registers: a thread holds block / 2 scores, block / 4 probabilities and Dv / 2 outputs."""
    registers = config.block // 2 + config.block // 4 + padded(sig.Dv) // 2
    return shared_bytes(sig, config) <= SHARED and registers <= (200 if config.consumers == 2 else 130)


def bucket(sig: AttentionSig) -> str:
    return f"Hq{sig.Hq}-Hkv{sig.Hkv}-D{sig.D}-Dv{sig.Dv}-S{sig.S}-B{pow2(sig.B)}-T{pow2(sig.T)}"


def ragged_bucket(sig: RaggedSig) -> str:
    return f"H{sig.H}-Hk{sig.Hk}-D{sig.D}-Dv{sig.Dv}-B{pow2(sig.B)}-T{pow2(sig.T)}"


PARTS = (
    "prefill/prefill_sm90",
    "prefill/prefill_consumer",
    "prefill/prefill_softmax",
    "prefill/prefill_products",
    "prefill/prefill_load",
    "prefill/prefill_shared",
    "prefill/prefill_items",
    "prefill/prefill_schedule",
    "common/wgmma_sm90",
)
SOURCES = tuple(f"csrc/cuda/{part}.cuh" for part in PARTS)
CUDA = Space("paged_prefill", "cuda_sm90", CudaConfig, default, candidates, bucket, sources=SOURCES)
RAGGED = Space("mla_prefill", "cuda_sm90", CudaConfig, default, candidates, ragged_bucket, sources=SOURCES)
