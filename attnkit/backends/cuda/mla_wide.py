"""mla_decode by csrc/cuda/mla/mla_wide_sm90: more than 32 query rows (heads x query tokens) a sequence, on Hopper."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda.builds import mla_wide as builds
from attnkit.backends.cuda.decode import SINK_TYPE
from attnkit.backends.cuda.images import Variant
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
from attnkit.configs import mla_wide_cuda as configs
from attnkit.dispatch import Kernel
from attnkit.signature import MlaSig

NAME = "attnkit_mla_decode_wide"
EACH_CALL = ("q", "kv", "pages", "lens", "sinks", "out", "lse", "partial", "counters")
#: struct MlaWideParams of csrc/cuda/mla/mla_wide_schedule.cuh
PARAMS = Fields(
    maps=("q_map", "kv_map"),
    words=(*EACH_CALL, "pages_b", "out_b", "out_i", "out_h"),
    ints=(
        "B", "Q", "H", "rows", "q_heads", "page_shift", "box_shift", "capacity", "window", "row_blocks", "groups",
        "least_tiles", "patience", "sink_type",
    ),
    floats=("scale", "softcap"),
)  # fmt: skip
FEW_ROWS = 32
MAX_STRIDE = 1 << 40  # bytes, of a tensor map
CHUNK_BYTES = 64 * 256 * 4 + 64 * 8  # one warpgroup's partial sums


def supports(sig: MlaSig) -> str | None:
    return unsuited_device(sig) or unsuited_cache(sig) or unsuited_call(sig) or missing(_variant(sig))


def unsuited_cache(sig: MlaSig) -> str | None:
    """What is read by tensor maps."""
    if sig.q_dtype not in (torch.bfloat16, torch.float16) or sig.kv_dtype != sig.q_dtype:
        return f"q is {sig.q_dtype} and kv {sig.kv_dtype}, wanted bfloat16 or float16 for both"
    if (sig.C, sig.R) != (builds.C, builds.R):
        return f"C is {sig.C} and R {sig.R}, wanted {builds.C} and {builds.R}"
    if sig.S < 16:
        return f"needs pages of at least 16 tokens, got {sig.S}"
    if max(sig.kv_stride[:2]) * 2 >= MAX_STRIDE:
        return "a stride of kv is too large for a tensor map"
    return None


def unsuited_device(sig: MlaSig) -> str | None:
    if sig.device.type != "cuda":
        return f"runs on CUDA devices, not on {sig.device.type}"
    reason = unavailable()
    if reason is not None:
        return reason
    if arch.of(sig.device).sm != 90:
        return f"built for compute capability 9.0, the device has {arch.of(sig.device).sm / 10}"
    return None


def unsuited_call(sig: MlaSig) -> str | None:
    """What a call may not ask for, whatever the cache's form."""
    rows = sig.H * sig.Q
    if not sig.aligned:
        return "q, kv or out has a pointer or stride that is not a multiple of 16 bytes"
    if sig.tree_mask or sig.batch_invariant:
        return "takes no tree_mask and no batch_invariant"
    if sig.scale <= 0:
        return f"needs a positive scale, got {sig.scale}"
    if rows <= FEW_ROWS:
        return f"{sig.H} heads x {sig.Q} query tokens, wanted more than {FEW_ROWS} rows"
    if not _flat(sig) and sig.H % builds.ROWS:
        return f"q's tokens do not follow one another, and {sig.H} heads are not a multiple of {builds.ROWS}"
    if max(sig.q_stride[:3]) * 2 >= MAX_STRIDE:
        return "a stride of q is too large for a tensor map"
    if sig.B * (sig.W * sig.S // builds.TILE + 2) >= 1 << 31:
        return "more than 2^31 tiles of keys"
    if groups(sig) < 1:
        return f"{rows} rows are more than the device takes at a time"
    return None


def _flat(sig: MlaSig) -> bool:
    """A token's rows follow those of the token before, so that a block of 64 may hold heads of both."""
    return sig.Q == 1 or sig.q_stride[1] == sig.H * sig.q_stride[2]


def ctas(sig: MlaSig) -> int:
    return configs.ctas(sig.H * sig.Q)


def _row_blocks(sig: MlaSig) -> int:
    return -(-sig.H * sig.Q // (builds.ROWS * ctas(sig)))


def groups(sig: MlaSig) -> int:
    """Of CTAs that share keys: as many as run at a time."""
    return arch.of(sig.device).sms // (ctas(sig) * _row_blocks(sig))


def _variant(sig: MlaSig) -> Variant:
    return builds.build(sig.q_dtype == torch.bfloat16, ctas(sig))


def _map(sizes: list[int], strides: list[int], box: list[int]) -> Any:
    """A tensor map's making, strides in elements; a dimension of size 1 may come with any, which the driver would refuse."""
    strides = [2 * s if size > 1 and s > 0 else 16 for size, s in zip(sizes[1:], strides)]
    return compiled().CudaMapSpec(MAP_TYPE[2], sizes, strides, box, MAP_SWIZZLE[128], MAP_PROMOTE_128)


def prepare(plan: Any) -> None:
    set_up(plan, NAME, _variant(plan.sig), builds.SHARED_BYTES, *boxes(plan.sig))


def boxes(sig: MlaSig) -> tuple[int, list[tuple[int, int, Any]]]:
    """log2 of the slots that one load of keys takes, and the keys' map."""
    box = min(sig.S, builds.TILE // ctas(sig))
    kv = _map([sig.C + sig.R, sig.S, sig.P], [sig.kv_stride[1], sig.kv_stride[0]], [64, box, 1])
    return box.bit_length() - 1, [(PARAMS.offsets["kv_map"], EACH_CALL.index("kv"), kv)]


def set_up(
    plan: Any, name: str, variant: Variant, shared_bytes: int, box_shift: int, kv_maps: list[tuple[int, int, Any]]
) -> None:
    """Everything that a signature and a config settle; what is left for a call is its pointers."""
    sig, config = plan.sig, plan.config
    width, row_blocks = ctas(sig), _row_blocks(sig)
    most = max(1, min(groups(sig), sig.B * (-(-sig.W * sig.S // builds.TILE) + 1)))
    cells = most * row_blocks * width * 2
    out = [s * 2 for s in sig.out_stride]
    b, i, h, _ = sig.q_stride
    heads, tokens = (sig.Q * sig.H, 1) if _flat(sig) else (sig.H, sig.Q)
    values = {
        "pages_b": sig.pages_stride, "out_b": out[0], "out_i": out[1], "out_h": out[2], "B": sig.B, "Q": sig.Q, "H": sig.H,
        "rows": sig.Q * sig.H, "q_heads": heads, "page_shift": sig.S.bit_length() - 1, "box_shift": box_shift,
        "capacity": sig.W * sig.S, "window": sig.window, "row_blocks": row_blocks, "groups": most,
        "least_tiles": config.least_tiles, "patience": config.patience, "sink_type": SINK_TYPE[sig.sinks] if sig.sinks else 0,
        "scale": sig.scale, "softcap": sig.softcap,
    }  # fmt: skip
    q = _map([sig.C + sig.R, heads, tokens, sig.B], [h, i, b], [64, builds.ROWS, 1, 1])
    index = index_of(sig.device)
    plan.state["launch"] = compiled().CudaLaunch(
        kernel(variant, name, index, shared_bytes), (width, row_blocks, most), (builds.THREADS, 1, 1), (width, 1, 1), True,
        PARAMS.pack(values), [PARAMS.offsets[name] for name in EACH_CALL],
        [(PARAMS.offsets["q_map"], EACH_CALL.index("q"), q), *kv_maps],
    )  # fmt: skip
    plan.state["index"] = index
    plan.state["scratch"] = {}
    plan.state["partial_bytes"] = 2 * cells * CHUNK_BYTES
    plan.state["counters"] = 3 * cells


def launch(
    plan: Any,
    q: Tensor,
    kv: Tensor,
    pages: Tensor,
    lens: Tensor,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    out: Tensor,
    lse: Tensor | None,
) -> None:
    state = plan.state
    if not state:
        prepare(plan)
    if sinks is not None and sinks.stride(0) != 1:
        sinks = sinks.contiguous()
    stream = stream_of(state["index"])
    state["launch"](stream, q, kv, pages, lens, sinks, out, lse, *scratch(plan, stream))


MLA_DECODE = Kernel("cuda_sm90_wide", "cuda", supports, launch, configs.CUDA)
