"""paged_decode by csrc/cuda/decode/decode*_sm90: one launch on Hopper, split over KV on the device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda.builds.decode import Build, swizzle
from attnkit.backends.cuda.launch import (
    MAP_PROMOTE_128,
    MAP_SWIZZLE,
    MAP_TYPE,
    Fields,
    compiled,
    index_of,
    kernel,
    missing,
    scratch,
    stream_of,
    unavailable,
)
from attnkit.configs.decode_cuda import CUDA, build_of
from attnkit.dispatch import Kernel
from attnkit.signature import AttentionSig

#: Mirrors DecodeParams in csrc/cuda/decode/decode_schedule.cuh.
PARAMS = Fields(
    maps=("k_map", "v_map", "q_map"),
    words=(
        "q", "k", "v", "pages", "lens", "sinks", "k_scale", "v_scale", "tree", "out", "lse", "partial", "counters",
        "q_b", "q_i", "q_h", "out_b", "out_i", "out_h", "pages_b", "k_scale_h", "v_scale_h", "tree_b", "tree_i", "tree_j",
    ),
    ints=(
        "B", "Q", "Hkv", "G", "heads", "page_shift", "table_width", "capacity", "window", "block_rows", "row_blocks", "g_magic",
        "slots", "stages", "ahead", "late", "least_tiles", "invariant", "chunk_least", "chunk_most", "io_bf16", "sink_type",
    ),
    floats=("scale", "out_scale", "softcap", "softcap_inverse"),
)  # fmt: skip
#: What comes with each call; strides of options that the signature does not hold among them.
EACH_CALL = (
    "q", "k", "v", "pages", "lens", "sinks", "k_scale", "v_scale", "tree", "out", "lse", "partial", "counters",
    "k_scale_h", "v_scale_h", "tree_b", "tree_i", "tree_j",
)  # fmt: skip
SINK_TYPE = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 4}

# Batch-invariant calls cut a sequence into chunks, at most CHUNKS of them: of at least 512 keys, or of 1024 where a model has
# MANY_HEADS KV heads or more, so that one sequence has work for many CTAs in any case.
CHUNK_KEYS = 512
MANY_HEADS = 8
CHUNKS = 64

#: How often a CTA that shares the adding up of a head looks whether all its pieces have come (some 0.7 us each) before it
#: leaves its share to the last of them.
PATIENCE = 200


def _least_tiles_of_chunk(sig: AttentionSig, build: Build) -> int:
    return max(1, CHUNK_KEYS * (2 if sig.Hkv >= MANY_HEADS else 1) // build.tile)


def supports(sig: AttentionSig) -> str | None:
    if sig.device.type != "cuda":
        return f"runs on CUDA devices, not on {sig.device.type}"
    reason = unavailable()
    if reason is not None:
        return reason
    if arch.of(sig.device).sm != 90:
        return f"built for compute capability 9.0, the device has {arch.of(sig.device).sm / 10}"
    if sig.q_dtype not in (torch.bfloat16, torch.float16):
        return f"q is {sig.q_dtype}, wanted bfloat16 or float16"
    if not sig.aligned:
        return "q, kv or out has a pointer or stride that is not a multiple of 16 bytes"
    step = 16 if sig.kv_dtype.itemsize == 2 else 32
    if sig.D % step or sig.Dv % step or max(sig.D, sig.Dv) > 256:
        return f"D is {sig.D} and Dv {sig.Dv}, wanted multiples of {step} up to 256 for {sig.kv_dtype} caches"
    build = build_of(sig, CUDA.default(sig, arch.of(sig.device)))
    if build.stages < 2:
        return f"D is {sig.D} and Dv {sig.Dv}: two tiles do not fit shared memory"
    if any(build.heads * min(sig.S, build.tile) * d * sig.kv_dtype.itemsize % 128 for d in (sig.D, sig.Dv)):
        return f"pages of {sig.S} tokens with D {sig.D} and Dv {sig.Dv} are no multiple of 128 bytes"
    if build.wide and max(sig.q_stride[0], 1) * sig.q_dtype.itemsize >= 1 << 40:
        return "q's stride is too large for a tensor map"
    if max(sig.k_stride[:3] + sig.v_stride[:3]) * sig.kv_dtype.itemsize >= 1 << 40:
        return "kv's stride is too large for a tensor map"
    if sig.B * sig.Hkv * _row_blocks(sig, build)[1] * (sig.W * sig.S // build.tile + 2) >= 1 << 31:
        return "more than 2^31 tiles of keys"
    return missing(build.variant)


def _row_blocks(sig: AttentionSig, build: Build) -> tuple[int, int]:
    """Rows that a CTA takes together, and how many such blocks a KV head has. A wide block holds whole tokens."""
    if build.heads > 1:
        return build.heads * sig.G * sig.Q, 1
    rows = build.rows // sig.G * sig.G if build.wide else build.rows
    return rows, -(-sig.G * sig.Q // rows)


def _map(type_bytes: int, sizes: list[int], strides: list[int], box: list[int], plane: int) -> Any:
    """A tensor map's making; a dimension of size 1 may come with any stride, which the driver would refuse."""
    strides = [s if size > 1 and s > 0 else 16 for size, s in zip(sizes[1:], strides)]
    return compiled().CudaMapSpec(
        MAP_TYPE[type_bytes], sizes, strides, box, MAP_SWIZZLE[plane], MAP_PROMOTE_128 if plane >= 128 else 0
    )


def _maps(sig: AttentionSig, build: Build, block_rows: int) -> list[tuple[int, int, Any]]:
    item, maps = sig.kv_dtype.itemsize, []
    for name, argument, d, stride in (("k_map", "k", sig.D, sig.k_stride), ("v_map", "v", sig.Dv, sig.v_stride)):
        plane = swizzle(d * item)
        page, slot, head = (s * item for s in stride[:3])
        planes = d * item // plane
        box = [plane // item, build.heads, min(sig.S, build.tile), 1, 1 if build.wide else planes]
        spec = _map(item, [plane // item, sig.Hkv, sig.S, sig.P, planes], [head, slot, page, plane], box, plane)
        maps.append((PARAMS.offsets[name], EACH_CALL.index(argument), spec))
    if build.wide:
        b, i, h = (s * 2 for s in sig.q_stride[:3])
        spec = _map(2, [sig.D, sig.Hq, sig.Q, sig.B], [h, i, b], [64, sig.G, block_rows // sig.G, 1], 128)
        maps.append((PARAMS.offsets["q_map"], EACH_CALL.index("q"), spec))
    return maps


def _even(ctas: int, heads: int) -> int:
    """A few CTAs fewer than ``ctas`` where that cuts heads of equal length alike, so that fewer pieces have to meet."""
    even = ctas // heads * heads if heads <= ctas else -(-heads // -(-heads // ctas))
    return even if even * 10 >= ctas * 9 else ctas


def prepare(plan: Any) -> None:
    """Everything that a signature and a config settle; what is left for a call is its pointers."""
    sig, config = plan.sig, plan.config
    build = build_of(sig, config)
    block_rows, row_blocks = _row_blocks(sig, build)
    index, stages = index_of(sig.device), min(build.stages, config.stages or build.stages)
    loaded = kernel(build.variant, build.kernel, index, build.fixed_bytes + stages * build.stage_bytes)
    heads, G = sig.Hkv // build.heads * row_blocks, sig.G * build.heads
    most_tiles = sig.B * heads * (-(-sig.W * sig.S // build.tile) + 1)
    fits = arch.of(sig.device).sms * build.ctas_per_sm
    grid = max(1, min(_even(fits * config.grid // 100, sig.B * heads), most_tiles))
    slots = sig.B * heads * CHUNKS if sig.batch_invariant else 2 * grid + 2
    if build.cluster > 1:  # a head each, and nothing in the workspace
        grid, slots = sig.B * heads * build.cluster, 0
    if build.cluster > 8:
        loaded.allow_large_clusters()
    q, out = ([s * 2 for s in stride] for stride in (sig.q_stride, sig.out_stride))
    values = {
        "q_b": q[0], "q_i": q[1], "q_h": q[2], "out_b": out[0], "out_i": out[1], "out_h": out[2], "pages_b": sig.pages_stride,
        "B": sig.B, "Q": sig.Q, "Hkv": sig.Hkv // build.heads, "G": G, "heads": build.heads,
        "page_shift": sig.S.bit_length() - 1, "table_width": sig.W, "capacity": sig.W * sig.S,
        "window": sig.window, "block_rows": block_rows, "row_blocks": row_blocks, "g_magic": -(-(1 << 20) // G),
        "slots": slots, "stages": stages, "ahead": config.ahead, "late": config.late or -1,
        "least_tiles": config.min_tiles,
        "invariant": int(sig.batch_invariant),
        "chunk_least": config.share if build.share else _least_tiles_of_chunk(sig, build),
        "chunk_most": PATIENCE if build.share else CHUNKS,
        "io_bf16": int(sig.q_dtype == torch.bfloat16), "sink_type": SINK_TYPE[sig.sinks] if sig.sinks else 0,
        "scale": sig.scale, "out_scale": sig.out_scale, "softcap": sig.softcap,
        "softcap_inverse": 1 / sig.softcap if sig.softcap else 0.0,
    }  # fmt: skip
    plan.state["launch"] = compiled().CudaLaunch(
        loaded, (grid, 1, 1), (build.threads, 1, 1), (build.cluster, 1, 1), True, PARAMS.pack(values),
        [PARAMS.offsets[name] for name in EACH_CALL], _maps(sig, build, block_rows),
    )  # fmt: skip
    plan.state["index"] = index
    plan.state["scratch"] = {}
    plan.state["partial_bytes"] = slots * build.rows * (sig.Dv + 4) * 4
    plan.state["counters"] = 2 * slots * build.counter_words


def launch(
    plan: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    pages: Tensor,
    lens: Tensor,
    sinks: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    tree_mask: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    """``v`` is None where ``k`` is a cache [P, 2, S, Hkv, D] that holds both."""
    state = plan.state
    if not state:
        prepare(plan)
        state["v_offset"] = k.stride(1) * k.element_size() if v is None else 0
    if sinks is not None and sinks.stride(0) != 1:
        sinks = sinks.contiguous()
    stream = stream_of(state["index"])
    state["launch"](
        stream, q, k, k.data_ptr() + state["v_offset"] if v is None else v, pages, lens, sinks, k_scale, v_scale, tree_mask,
        out, lse, *scratch(plan, stream),
        0 if k_scale is None else k_scale.stride(0) * 4,
        0 if v_scale is None else v_scale.stride(0) * 4,
        *((0, 0, 0) if tree_mask is None else tree_mask.stride()),
    )  # fmt: skip


PAGED_DECODE = Kernel("cuda_sm90", "cuda", supports, launch, CUDA)
