"""write_kv and merge_states through csrc/cuda/cache/cache_sm90.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda import launch
from attnkit.backends.cuda.builds import cache as builds
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import MergeSig, WriteSig

THREADS = 256
#: struct WriteParams and struct MergeParams of csrc/cuda/cache/cache_sm90.cu
WRITE_POINTERS = ("k", "v", "k_cache", "v_cache", "slots", "k_scale", "v_scale")
WRITE_PARAMS = launch.Fields(
    maps=(),
    words=(
        *WRITE_POINTERS, "k_token", "k_head", "v_token", "v_head", "kc_page", "kc_slot", "kc_head", "vc_page", "vc_slot",
        "vc_head", "pool",
    ),
    ints=("T", "heads", "k_chunks", "v_chunks", "page_size", "k_scale_head", "v_scale_head"),
    floats=(),
)  # fmt: skip
MERGE_POINTERS = ("out_a", "lse_a", "out_b", "lse_b", "out", "lse")
MERGE_PARAMS = launch.Fields(maps=(), words=(*MERGE_POINTERS, "rows"), ints=("chunks",), floats=())
TYPES = {torch.bfloat16: "bf16", torch.float16: "f16", torch.float32: "f32"}
CODES = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3"}


def _device(sig: WriteSig | MergeSig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    return launch.unavailable() or launch.missing(builds.build())


def _write_supports(sig: WriteSig) -> str | None:
    if sig.dtype == torch.float32:
        return "takes 16-bit keys and values, got float32"
    if not sig.aligned:
        return "needs rows of whole chunks of 8 values, 16 bytes (8 in an 8-bit cache), at aligned addresses and strides"
    return _device(sig)


def _prepare_write(plan: Plan, k_scale: Tensor | None, v_scale: Tensor | None) -> Any:
    s: WriteSig = plan.sig
    new, kept = s.dtype.itemsize, s.kv_dtype.itemsize
    code = CODES.get(s.kv_dtype)
    name = f"attnkit_write_kv_{code}_{TYPES[s.dtype]}" if code else "attnkit_write_kv_copy"
    kernel = launch.kernel(builds.build(), name, plan.state["index"], 0)
    values = {
        "k_token": s.k_in_stride[0] * new, "k_head": s.k_in_stride[1] * new, "v_token": s.v_in_stride[0] * new,
        "v_head": s.v_in_stride[1] * new, "kc_page": s.k_stride[0] * kept, "kc_slot": s.k_stride[1] * kept,
        "kc_head": s.k_stride[2] * kept, "vc_page": s.v_stride[0] * kept, "vc_slot": s.v_stride[1] * kept,
        "vc_head": s.v_stride[2] * kept, "pool": s.P * s.S, "T": s.T, "heads": s.Hkv, "k_chunks": s.D // 8,
        "v_chunks": s.Dv // 8, "page_size": s.S, "k_scale_head": 0 if k_scale is None else k_scale.stride(0),
        "v_scale_head": 0 if v_scale is None else v_scale.stride(0),
    }  # fmt: skip
    width = min(THREADS, -(-s.Hkv * (s.D + s.Dv) // 8 // 32) * 32)
    tokens = THREADS // width
    return launch.compiled().CudaLaunch(
        kernel, (-(-s.T // tokens), 1, 1), (width, tokens, 1), (1, 1, 1), True, WRITE_PARAMS.pack(values),
        [WRITE_PARAMS.offsets[p] for p in WRITE_POINTERS],
    )  # fmt: skip


def _write(
    plan: Plan, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor,
    k_scale: Tensor | None, v_scale: Tensor | None,
) -> None:  # fmt: skip
    state = plan.state
    if not state:
        state["index"] = launch.index_of(plan.sig.device)
        state["launch"] = _prepare_write(plan, k_scale, v_scale)
    state["launch"](launch.stream_of(state["index"]), k, v, k_cache, v_cache, slots, k_scale, v_scale)


def _merge_supports(sig: MergeSig) -> str | None:
    if not sig.aligned or sig.Dv * sig.dtype.itemsize % 16:
        return f"needs rows of whole 16 bytes at 16-byte aligned addresses, got Dv = {sig.Dv}"
    return _device(sig)


def _prepare_merge(plan: Plan) -> Any:
    s: MergeSig = plan.sig
    kernel = launch.kernel(builds.build(), f"attnkit_merge_{TYPES[s.dtype]}", plan.state["index"], 0)
    chunks = s.Dv * s.dtype.itemsize // 16
    return launch.compiled().CudaLaunch(
        kernel, (-(-s.rows * chunks // THREADS), 1, 1), (THREADS, 1, 1), (1, 1, 1), True,
        MERGE_PARAMS.pack({"rows": s.rows, "chunks": chunks}), [MERGE_PARAMS.offsets[p] for p in MERGE_POINTERS],
    )  # fmt: skip


def _merge(plan: Plan, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    state = plan.state
    if not state:
        state["index"] = launch.index_of(plan.sig.device)
        state["launch"] = _prepare_merge(plan)
    state["launch"](launch.stream_of(state["index"]), out_a, lse_a, out_b, lse_b, out, lse)


WRITE_KV = Kernel("cuda_sm90", "cuda", _write_supports, _write)
MERGE = Kernel("cuda_sm90", "cuda", _merge_supports, _merge)
