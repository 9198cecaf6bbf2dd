"""quantize_per_token, rms_norm_quantize and silu_mul_quantize through csrc/cuda/quantize/quantize_sm90.cu."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch
from attnkit.backends.cuda import launch
from attnkit.backends.cuda.builds import quantize as builds
from attnkit.configs import quantize as configs
from attnkit.dispatch import Kernel, Plan

POINTERS = ("x", "weight", "residual", "out", "scale")
#: struct QuantizeParams of csrc/cuda/quantize/quantize_sm90.cuh
PARAMS = launch.Fields(
    maps=(),
    words=(*POINTERS, "x_row", "residual_row", "out_row"),
    ints=("M", "chunks", "slots", "slot_bytes", "passing", "ahead"),
    floats=("eps", "inverse_k"),
)


def _supports(sig: configs.Sig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if not sig.aligned:
        return "needs 16-byte aligned tensors and row strides"
    if sig.K % builds.CHUNK or not sig.K:
        return f"K is {sig.K}, wanted a multiple of {builds.CHUNK}"
    if getattr(sig, "weight_dtype", sig.dtype) != sig.dtype:
        return f"the weight is {sig.weight_dtype}, wanted x's dtype {sig.dtype}"  # type: ignore[union-attr]
    return launch.unavailable() or launch.missing(builds.build(configs.form_of(sig), configs.TYPE[sig.dtype]))


def _prepare(plan: Plan) -> Any:
    sig, config = plan.sig, plan.config
    wrong = configs.why_not(sig, config)
    if wrong is not None:
        raise ValueError(f"{sig.op}: the config's {wrong}")
    item = sig.dtype.itemsize
    build = builds.build(configs.form_of(sig), configs.TYPE[sig.dtype])
    name = builds.kernel_name(sig.out_dtype == torch.int8, config.chunks, configs.holds(sig, config), config.slots > 0)
    kernel = launch.kernel(build, name, launch.index_of(sig.device), configs.shared_bytes(sig, config))
    sms, threads = arch.of(sig.device).sms, 32 * config.warps * config.rows
    grid = -(-sig.M // config.rows)
    if config.ctas:
        grid = min(grid, config.ctas * sms)
    item = sig.dtype.itemsize
    values = {
        "x_row": sig.x_stride[0] * item, "residual_row": (getattr(sig, "residual_stride", None) or (0,))[0] * item,
        "out_row": sig.K, "M": sig.M, "chunks": sig.K // builds.CHUNK, "slots": config.slots,
        "slot_bytes": configs.slot_bytes(sig), "passing": int(configs.passing(sig)),
        "ahead": kernel.blocks_per_sm(threads) * sms, "eps": getattr(sig, "eps", 0.0), "inverse_k": 1 / sig.K,
    }  # fmt: skip
    return launch.compiled().CudaLaunch(
        kernel, (grid, 1, 1), (32 * config.warps, config.rows, 1), (1, 1, 1), True, PARAMS.pack(values),
        [PARAMS.offsets[p] for p in POINTERS],
    )  # fmt: skip


def _launch(plan: Plan, x: Tensor, weight: Tensor | None, residual: Tensor | None, out: Tensor, scale: Tensor) -> None:
    state = plan.state
    if not state:
        state["index"] = launch.index_of(plan.sig.device)
        state["launch"] = _prepare(plan)
    state["launch"](launch.stream_of(state["index"]), x, weight, residual, out, scale)


def _quantize(plan: Plan, x: Tensor, out: Tensor, scale: Tensor) -> None:
    _launch(plan, x, None, None, out, scale)


QUANTIZE = Kernel("cuda_sm90", "cuda", _supports, _quantize, configs.QUANTIZE)
RMS_NORM_QUANTIZE = Kernel("cuda_sm90", "cuda", _supports, _launch, configs.RMS_NORM)
SILU_MUL_QUANTIZE = Kernel("cuda_sm90", "cuda", _supports, _quantize, configs.SILU_MUL)
