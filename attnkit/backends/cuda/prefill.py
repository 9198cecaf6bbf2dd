"""paged_prefill through csrc/cuda/prefill_sm90.cu: fills the parameter struct, picks the build, launches."""

from __future__ import annotations

from typing import Any

import torch

from attnkit import arch, workspace
from attnkit.backends.cuda import images, launch
from attnkit.backends.cuda.builds import prefill as builds
from attnkit.configs import prefill_cuda
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import AttentionSig

NAME = "attnkit_paged_prefill"
MOST_SEQUENCES = 1024
POINTERS = ("q", "k", "v", "pages", "lens", "cu_q", "sinks", "out", "lse", "counters")
#: struct PrefillParams of csrc/cuda/prefill_schedule.cuh
PARAMS = launch.Fields(
    maps=("q_map", "k_map", "v_map"),
    words=(*POINTERS, "pages_b", "out_t", "out_h"),
    ints=("B", "T", "Hkv", "G", "Dv", "tile_tokens", "page_shift", "capacity", "window", "causal", "sink_type"),
    floats=("scale", "out_scale", "softcap"),
)
SINK_TYPES = {None: 0, torch.bfloat16: 0, torch.float16: 1, torch.float32: 4}
BUILDS = ((64, 64), (128, 128), (192, 128), (256, 256))
DTYPES = (torch.bfloat16, torch.float16)


def _supports(sig: AttentionSig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if sig.q_dtype not in DTYPES or sig.kv_dtype != sig.q_dtype:
        return f"needs bf16 or fp16 for q and kv alike, got {sig.q_dtype} and {sig.kv_dtype}"
    if max(sig.D, sig.Dv) > 256 or _padded(sig) not in BUILDS:
        return f"has no build for D = {sig.D} with Dv = {sig.Dv}"
    if sig.S < 8:
        return f"needs pages of at least 8 tokens, got {sig.S}"
    if not sig.aligned:
        return "needs 16-byte aligned tensors and strides"
    if sig.G > 64:
        return f"packs at most 64 heads a KV head, got {sig.G}"
    if sig.B > MOST_SEQUENCES:
        return f"keeps at most {MOST_SEQUENCES} sequences, got {sig.B}"
    if sig.scale <= 0:
        return f"needs a positive scale, got {sig.scale}"
    return launch.unavailable() or launch.missing(_variant(sig, prefill_cuda.default(sig, arch.of(sig.device))))


def _padded(sig: AttentionSig) -> tuple[int, int]:
    return prefill_cuda.padded(sig.D), prefill_cuda.padded(sig.Dv)


def _variant(sig: AttentionSig, config: prefill_cuda.CudaConfig) -> images.Variant:
    D, Dv = _padded(sig)
    return builds.build(D, Dv, sig.q_dtype == torch.bfloat16, config.consumers, config.block, config.stages)


def _map(sizes: list[int], strides: list[int], box: list[int]) -> Any:
    """A map of 16-bit elements in swizzled columns of 64; strides in elements."""
    return launch.compiled().CudaMapSpec(
        launch.MAP_TYPE[2], sizes, [2 * s for s in strides], box, launch.MAP_SWIZZLE[128], launch.MAP_PROMOTE_128
    )


def _prepare(plan: Plan) -> Any:
    sig, config = plan.sig, plan.config
    tokens = 64 * config.consumers // sig.G
    rows = min(sig.S, config.block)
    maps = [
        ("q", _map([sig.D, sig.Hq, max(sig.T, 1)], [sig.q_stride[1], sig.q_stride[0]], [64, sig.G, tokens])),
        *(
            (name, _map([head, sig.Hkv, sig.S, sig.P], [stride[2], stride[1], stride[0]], [64, 1, rows, 1]))
            for name, head, stride in (("k", sig.D, sig.k_stride), ("v", sig.Dv, sig.v_stride))
        ),
    ]
    values = {
        "pages_b": sig.pages_stride, "out_t": sig.out_stride[0] * 2, "out_h": sig.out_stride[1] * 2, "B": sig.B, "T": sig.T,
        "Hkv": sig.Hkv, "G": sig.G, "Dv": sig.Dv, "tile_tokens": tokens, "page_shift": sig.S.bit_length() - 1,
        "capacity": sig.W * sig.S, "window": sig.window, "causal": int(sig.causal), "sink_type": SINK_TYPES[sig.sinks],
        "scale": sig.scale, "out_scale": sig.out_scale, "softcap": sig.softcap,
    }  # fmt: skip
    kernel = launch.kernel(_variant(sig, config), NAME, launch.index_of(sig.device), prefill_cuda.shared_bytes(sig, config))
    most_tiles = (sig.T // tokens + sig.B) * sig.Hkv
    grid = max(1, min(arch.of(sig.device).sms, most_tiles))
    return launch.compiled().CudaLaunch(
        kernel, (grid, 1, 1), (128 * (config.consumers + 1), 1, 1), (1, 1, 1), False,
        PARAMS.pack(values), [PARAMS.offsets[name] for name in POINTERS],
        [(PARAMS.offsets[f"{name}_map"], POINTERS.index(name), spec) for name, spec in maps],
    )  # fmt: skip


def _launch(plan: Plan, q, k, v, pages, lens, cu_q, sinks, k_scale, v_scale, out, lse) -> None:
    run = plan.state.get("launch")
    if run is None:
        run = plan.state["launch"] = _prepare(plan)
    device = plan.sig.device
    pointers = (q, k, v, pages, lens, cu_q, sinks, out, lse, workspace.counters(device, 2))
    run(launch.stream_of(launch.index_of(device)), *(launch.pointer(t) for t in pointers))


PAGED_PREFILL = Kernel("cuda_sm90", "cuda", _supports, _launch, prefill_cuda.CUDA)
