"""paged_prefill through csrc/cuda/prefill/prefill_sm90.cu: fills the parameter struct, picks the build, launches.

mla_prefill.py beside this describes keys without pages to the same kernel; prefill_q8.py is the kernel's for 8-bit caches.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import astuple, dataclass
from typing import Any

import torch

from attnkit import arch
from attnkit.backends.cuda import images, launch
from attnkit.backends.cuda.builds import prefill as builds
from attnkit.configs import prefill_cuda
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import AttentionSig, RaggedSig

NAME = "attnkit_paged_prefill"
MOST_SEQUENCES = 1024
POINTERS = ("q", "k", "v", "pages", "lens", "cu_q", "cu_k", "sinks", "out", "lse", "partial", "counters")
#: struct PrefillParams of csrc/cuda/prefill/prefill_schedule.cuh
PARAMS = launch.Fields(
    maps=("q_map", "k_map", "v_map"),
    words=(*POINTERS, "k_scale", "v_scale", "pages_b", "out_t", "out_h", "k_scale_h", "v_scale_h"),
    ints=(
        "B", "T", "Hkv", "G", "Dv", "tile_tokens", "g_magic", "page_shift", "capacity", "window", "causal", "sink_type",
        "key_bytes", "slots",
    ),
    floats=("scale", "out_scale", "softcap"),
)  # fmt: skip
SINK_TYPES = {None: 0, torch.bfloat16: 0, torch.float16: 1, torch.float32: 4}
BUILDS = ((64, 64), (128, 128), (192, 128), (256, 256))
DTYPES = (torch.bfloat16, torch.float16)
#: Without pages: so large that a sequence is a part of one.
NO_PAGES = 30
#: Where a CTA gets more tiles than this, cutting tiles gains nothing. A workspace has room for so many pieces a CTA.
MOST_TILES, PIECES = 16, 3


@dataclass(frozen=True, slots=True)
class Keys:
    """Keys and values as the kernel reads them: rows of ``sizes`` (slots of a page, pages), strides page, slot, head."""

    sizes: tuple[int, int]
    k_stride: tuple[int, int, int]
    v_stride: tuple[int, int, int]
    page_shift: int
    capacity: int
    pages_stride: int

    @classmethod
    def paged(cls, sig: AttentionSig) -> Keys:
        (kp, ks, kh, _), (vp, vs, vh, _) = sig.k_stride, sig.v_stride
        return cls((sig.S, sig.P), (kp, ks, kh), (vp, vs, vh), sig.S.bit_length() - 1, sig.W * sig.S, sig.pages_stride)


@dataclass(frozen=True, slots=True)
class Program:
    """A build and how it is launched."""

    variant: images.Variant
    shared_bytes: int
    consumers: int
    block: int
    warpgroups: int
    name: str = NAME
    kv_bytes: int = 2
    pointers: tuple[str, ...] = POINTERS  # what comes with each call


def declined(sig: AttentionSig | RaggedSig, dtype: torch.dtype, G: int, built: Collection[tuple[int, int]]) -> str | None:
    """Why a prefill kernel with ``built`` head sizes does not serve this, whatever the keys stand in; None where it does."""
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if dtype not in DTYPES:
        return f"needs bf16 or fp16, got {dtype}"
    if max(sig.D, sig.Dv) > 256 or padded(sig) not in built:
        return f"has no build for D = {sig.D} with Dv = {sig.Dv}"
    if not sig.aligned:
        return "needs 16-byte aligned tensors and strides"
    if G > 64:
        return f"packs at most 64 heads a KV head, got {G}"
    if sig.B > MOST_SEQUENCES:
        return f"keeps at most {MOST_SEQUENCES} sequences, got {sig.B}"
    if sig.scale <= 0:
        return f"needs a positive scale, got {sig.scale}"
    return launch.unavailable()


def unsupported(sig: AttentionSig | RaggedSig, dtype: torch.dtype, G: int) -> str | None:
    """Why the kernel for 16-bit keys does not serve this; None where it does."""
    reason = declined(sig, dtype, G, BUILDS)
    return reason or launch.missing(_variant(sig, dtype, prefill_cuda.default(sig, arch.of(sig.device))))


def _supports(sig: AttentionSig) -> str | None:
    if sig.kv_dtype != sig.q_dtype:
        return f"needs q and kv alike, got {sig.q_dtype} and {sig.kv_dtype}"
    if sig.S < 8:
        return f"needs pages of at least 8 tokens, got {sig.S}"
    return unsupported(sig, sig.q_dtype, sig.G)


def padded(sig: AttentionSig | RaggedSig) -> tuple[int, int]:
    return prefill_cuda.padded(sig.D), prefill_cuda.padded(sig.Dv)


def _variant(sig: AttentionSig | RaggedSig, dtype: torch.dtype, config: prefill_cuda.CudaConfig) -> images.Variant:
    D, Dv = padded(sig)
    return builds.build(D, Dv, dtype == torch.bfloat16, *astuple(config))


def _map(sizes: list[int], strides: list[int], box: list[int], item: int = 2) -> Any:
    """A map of elements of ``item`` bytes, a box's rows swizzled; strides in elements. Of one element, any stride will do."""
    bytes_of = [item * s if size > 1 else 16 for size, s in zip(sizes[1:], strides, strict=True)]
    swizzle = launch.MAP_SWIZZLE[box[0] * item]
    return launch.compiled().CudaMapSpec(launch.MAP_TYPE[item], sizes, bytes_of, box, swizzle, launch.MAP_PROMOTE_128)


def slots(T: int, tile_tokens: int, Hkv: int, sms: int, capacity: int, invariant: bool) -> int:
    """Pieces of cut tiles that the workspace gets room for. The choice goes by shapes, what is cut by the lengths."""
    few = -(-T // tile_tokens) * Hkv <= MOST_TILES * sms
    return PIECES * sms if few and not invariant and capacity > 2048 else 0


def prepare(plan: Plan, dtype: torch.dtype, Hq: int, Hkv: int, keys: Keys) -> None:
    """The launch for 16-bit keys, left in plan.state."""
    sig, config = plan.sig, plan.config
    shared = prefill_cuda.shared_bytes(sig, config)
    program = Program(_variant(sig, dtype, config), shared, config.consumers, config.block, config.consumers + 1)
    prepare_program(plan, program, Hq, Hkv, keys, {})


def prepare_program(plan: Plan, program: Program, Hq: int, Hkv: int, keys: Keys, more: dict[str, Any]) -> None:
    """Leaves the launch, and how much scratch it wants, in plan.state; ``more`` parameters are the program's own."""
    sig, state = plan.sig, plan.state
    G, sms = Hq // Hkv, arch.of(sig.device).sms
    tokens = 64 * program.consumers // G
    (S, P), rows = keys.sizes, min(1 << keys.page_shift, program.block)
    D, Dv = padded(sig)
    item, columns = program.kv_bytes, [64, 64] if program.kv_bytes == 2 else [D, Dv]
    maps = [
        ("q", _map([sig.D, Hq, max(sig.T, 1)], [sig.q_stride[1], sig.q_stride[0]], [64, G, tokens])),
        *(
            (name, _map([head, Hkv, S, P], [stride[2], stride[1], stride[0]], [width, 1, rows, 1], item))
            for name, head, stride, width in zip("kv", (sig.D, sig.Dv), (keys.k_stride, keys.v_stride), columns)
        ),
    ]
    room = slots(sig.T, tokens, Hkv, sms, keys.capacity, sig.batch_invariant)
    values = {
        "pages_b": keys.pages_stride, "out_t": sig.out_stride[0] * 2, "out_h": sig.out_stride[1] * 2, "B": sig.B, "T": sig.T,
        "Hkv": Hkv, "G": G, "Dv": sig.Dv, "tile_tokens": tokens, "g_magic": -(-(1 << 20) // G), "page_shift": keys.page_shift,
        "capacity": keys.capacity, "window": sig.window, "causal": int(sig.causal), "sink_type": SINK_TYPES[sig.sinks],
        "key_bytes": (sig.D + sig.Dv) * item, "slots": room, "scale": sig.scale,
        "out_scale": getattr(sig, "out_scale", 1.0), "softcap": sig.softcap, **more,
    }  # fmt: skip
    index = launch.index_of(sig.device)
    kernel = launch.kernel(program.variant, program.name, index, program.shared_bytes)
    most_tiles = (sig.T // tokens + sig.B) * Hkv
    grid = max(1, min(sms, most_tiles if room == 0 else sms))
    state["launch"] = launch.compiled().CudaLaunch(
        kernel, (grid, 1, 1), (128 * program.warpgroups, 1, 1), (1, 1, 1), True,
        PARAMS.pack(values), [PARAMS.offsets[name] for name in program.pointers],
        [(PARAMS.offsets[f"{name}_map"], program.pointers.index(name), spec) for name, spec in maps],
    )  # fmt: skip
    state["index"] = index
    state["scratch"] = {}
    state["partial_bytes"] = room * program.consumers * 128 * 16 * (Dv // 8 + 1)
    state["counters"] = 2 + room * program.consumers


def _launch(plan: Plan, q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse) -> None:
    state = plan.state
    if not state:
        sig = plan.sig
        prepare(plan, sig.q_dtype, sig.Hq, sig.Hkv, Keys.paged(sig))
    if sinks is not None and sinks.stride(0) != 1:
        sinks = sinks.contiguous()
    stream = launch.stream_of(state["index"])
    state["launch"](stream, q, k, v, pages, lens, cu_q, None, sinks, out, lse, *launch.scratch(plan, stream))


PAGED_PREFILL = Kernel("cuda_sm90", "cuda", _supports, _launch, prefill_cuda.CUDA)
