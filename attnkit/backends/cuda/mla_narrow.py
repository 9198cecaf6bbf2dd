"""mla_decode by csrc/cuda/mla/mla_narrow_sm90: up to 32 query rows (heads x query tokens) a sequence, on Hopper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda.builds.mla_narrow import FP8_ROW, MAX_ROWS, TILE, Build, Fp8Build, build_for, fp8_build_for
from attnkit.backends.cuda.decode import EACH_CALL, PARAMS, SINK_TYPE
from attnkit.backends.cuda.launch import (
    MAP_PROMOTE_128,
    MAP_SWIZZLE,
    MAP_TYPE,
    compiled,
    index_of,
    kernel,
    missing,
    scratch,
    stream_of,
    unavailable,
)
from attnkit.configs.mla_narrow_cuda import CUDA
from attnkit.dispatch import Kernel
from attnkit.signature import MlaSig

# Batch-invariant calls cut a sequence into chunks of at least 1024 keys (a piece costs 32 KB of partial sums), at most
# CHUNKS of them.
CHUNK_KEYS = 1024
CHUNKS = 64
MAX_STRIDE = 1 << 40  # bytes, of a tensor map


def build_of(sig: MlaSig) -> Build | Fp8Build:
    if sig.kv_dtype == torch.uint8:
        return fp8_build_for(sig.Q * sig.H)
    return build_for(sig.C, sig.R, sig.q_dtype == torch.bfloat16, sig.Q * sig.H)


def supports(sig: MlaSig) -> str | None:
    if sig.device.type != "cuda":
        return f"runs on CUDA devices, not on {sig.device.type}"
    reason = unavailable()
    if reason is not None:
        return reason
    if arch.of(sig.device).sm != 90:
        return f"built for compute capability 9.0, the device has {arch.of(sig.device).sm / 10}"
    if sig.kv_dtype == torch.uint8:
        if sig.q_dtype != torch.bfloat16:
            return f"q is {sig.q_dtype}, wanted bfloat16 with an fp8 cache"
        if sig.S > 1 and sig.kv_stride[1] != FP8_ROW:
            return f"kv's stride from slot to slot is {sig.kv_stride[1]} bytes, wanted {FP8_ROW}"
    elif sig.q_dtype not in (torch.bfloat16, torch.float16):
        return f"q is {sig.q_dtype}, wanted bfloat16 or float16"
    if not sig.aligned:
        return "q, kv or out has a pointer or stride that is not a multiple of 16 bytes"
    if sig.C not in (128, 256, 512) or sig.R != 64:
        return f"C is {sig.C} and R {sig.R}, wanted C = 128, 256 or 512 and R = 64"
    if sig.H * sig.Q > MAX_ROWS:
        return f"{sig.H} heads x {sig.Q} query tokens, wanted at most {MAX_ROWS} rows"
    if max(*sig.kv_stride[:2], *sig.q_stride[:3]) * 2 >= MAX_STRIDE:
        return "a stride of q or kv is too large for a tensor map"
    if sig.B * (sig.W * sig.S // TILE + 2) >= 1 << 31:
        return "more than 2^31 tiles of keys"
    return missing(build_of(sig).variant)


def _map(item: int, sizes: list[int], strides: list[int], box: list[int], plane: int) -> Any:
    """A tensor map's making; a dimension of size 1 may come with any stride, which the driver would refuse."""
    strides = [s if size > 1 and s > 0 else 16 for size, s in zip(sizes[1:], strides)]
    return compiled().CudaMapSpec(MAP_TYPE[item], sizes, strides, box, MAP_SWIZZLE[plane], MAP_PROMOTE_128)


def _maps(sig: MlaSig) -> list[tuple[int, int, Any]]:
    """The latent rows as (C+R, S, 1, P), a box one plane of up to 64 tokens; q as (C+R, H, Q, B). None for an fp8 cache."""
    if sig.kv_dtype == torch.uint8:
        return []
    D = sig.C + sig.R
    page, slot = (s * 2 for s in sig.kv_stride[:2])
    b, i, h = (s * 2 for s in sig.q_stride[:3])
    kv = _map(2, [D, sig.S, 1, sig.P], [slot, 16, page], [64, min(sig.S, TILE), 1, 1], 128)
    q = _map(2, [D, sig.H, sig.Q, sig.B], [h, i, b], [64, sig.H, sig.Q, 1], 128)
    return [(PARAMS.offsets["k_map"], EACH_CALL.index("k"), kv), (PARAMS.offsets["q_map"], EACH_CALL.index("q"), q)]


def _grid(ctas: int, B: int, most_tiles: int) -> int:
    """CTAs of a launch: a few fewer than ``ctas`` where that cuts sequences of one length alike, so that fewer pieces meet."""
    even = ctas // B * B if B <= ctas else -(-B // -(-B // ctas))
    return max(1, min(even if even * 10 >= ctas * 9 else ctas, most_tiles))


def prepare(plan: Any) -> None:
    """Everything that a signature and a config settle; what is left for a call is its pointers."""
    sig, config = plan.sig, plan.config
    build = build_of(sig)
    index = index_of(sig.device)
    loaded = kernel(build.variant, build.kernel, index, build.shared_bytes)
    most_tiles = sig.B * (-(-sig.W * sig.S // TILE) + 1)
    grid = _grid(arch.of(sig.device).sms * config.grid // 100, sig.B, most_tiles)
    slots = sig.B * CHUNKS if sig.batch_invariant else 2 * grid + 2
    q, out = ([s * 2 for s in stride] for stride in (sig.q_stride, sig.out_stride))
    # "late" carries the patience: these kernels have no other use for it.
    values = {
        "q_b": q[0], "q_i": q[1], "q_h": q[2], "out_b": out[0], "out_i": out[1], "out_h": out[2], "pages_b": sig.pages_stride,
        "B": sig.B, "Q": sig.Q, "Hkv": 1, "heads": 1, "G": sig.H, "page_shift": sig.S.bit_length() - 1, "table_width": sig.W,
        "capacity": sig.W * sig.S, "window": sig.window, "block_rows": sig.H * sig.Q, "row_blocks": 1,
        "g_magic": -(-(1 << 20) // sig.H), "slots": slots, "late": config.patience, "least_tiles": config.min_tiles,
        "invariant": int(sig.batch_invariant), "chunk_least": CHUNK_KEYS // TILE, "chunk_most": CHUNKS,
        "io_bf16": int(sig.q_dtype == torch.bfloat16), "sink_type": SINK_TYPE[sig.sinks] if sig.sinks else 0,
        "scale": sig.scale, "out_scale": 1.0, "softcap": sig.softcap,
        "softcap_inverse": 1 / sig.softcap if sig.softcap else 0.0,
    }  # fmt: skip
    plan.state["launch"] = compiled().CudaLaunch(
        loaded, (grid, 1, 1), (build.threads, 1, 1), (1, 1, 1), True, PARAMS.pack(values),
        [PARAMS.offsets[name] for name in EACH_CALL], _maps(sig),
    )  # fmt: skip
    plan.state["index"] = index
    plan.state["page_bytes"] = sig.kv_stride[0] * sig.kv_dtype.itemsize  # in k_scale_h, which MLA has no other use for
    plan.state["scratch"] = {}
    plan.state["partial_bytes"] = slots * build.rows * (sig.C + 4) * 4
    plan.state["counters"] = 2 * slots


def launch(
    plan: Any, q: Tensor, kv: Tensor, pages: Tensor, lens: Tensor, sinks: Tensor | None, tree_mask: Tensor | None,
    out: Tensor, lse: Tensor | None,
) -> None:  # fmt: skip
    state = plan.state
    if not state:
        prepare(plan)
    if sinks is not None and sinks.stride(0) != 1:
        sinks = sinks.contiguous()
    stream = stream_of(state["index"])
    state["launch"](
        stream, q, kv, kv, pages, lens, sinks, 0, 0, tree_mask, out, lse, *scratch(plan, stream),
        state["page_bytes"], 0, *((0, 0, 0) if tree_mask is None else tree_mask.stride()),
    )  # fmt: skip


MLA_DECODE = Kernel("cuda_sm90_narrow", "cuda", supports, launch, CUDA)
