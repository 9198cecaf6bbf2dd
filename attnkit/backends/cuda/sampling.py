"""sample through csrc/cuda/sampling/sample_*_sm90.cu. For the token: one launch without filters; two for a short top-k, one for
other filters, three where tensors leave that open. One more for log-probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnkit import arch, workspace
from attnkit.backends.cuda import launch
from attnkit.backends.cuda.builds import sampling as builds
from attnkit.backends.cuda.images import Variant
from attnkit.configs import sampling_cuda
from attnkit.configs.sampling import filtered
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import SampleSig

POINTERS = (
    "logits", "seeds", "counts", "prompt_mask", "logit_bias", "allowed", "temperature", "top_k", "top_p", "min_p",
    "repetition_penalty", "presence_penalty", "frequency_penalty", "offset", "tokens", "valid", "state", "peaks",
    "chosen", "top_ids",
)  # fmt: skip
STRIDES = {"counts": 4, "prompt_mask": 1, "logit_bias": 4, "allowed": 4}
#: struct SampleParams of csrc/cuda/sampling/sample_row_sm90.cuh
PARAMS = launch.Fields(
    maps=(),
    words=(*POINTERS, "logits_b", *(f"{name}_b" for name in STRIDES), "offset_value", "top_k_value"),
    ints=("B", "V", "blocks", "columns", "listed"),
    floats=("temperature_value", "top_p_value", "min_p_value", "repetition_value", "presence_value", "frequency_value"),
)
EACH_CALL = (*POINTERS, *(f"{name}_b" for name in STRIDES))
KINDS = {torch.float32: builds.F32, torch.bfloat16: builds.BF16, torch.float16: builds.F16}


def _supports(sig: SampleSig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if sig.logprobs is not None and sig.logprobs > builds.MOST_LISTED:
        return f"logprobs is {sig.logprobs}, wanted at most {builds.MOST_LISTED}"
    if sig.B * -(-sig.V // builds.TILE) >= 1 << 31:
        return "more than 2^31 tiles of logits"
    tiles = builds.cluster(sig.V)[1]
    if ((filtered(sig) and _ways(sig) != ("short",)) or sig.logprobs is not None) and tiles > builds.MOST_SLICE_TILES:
        return f"V is {sig.V}, filters and logprobs go up to {builds.MOST_SLICE_TILES * builds.MOST_CLUSTER * builds.TILE}"
    reasons = (launch.missing(v) for way in _ways(sig) for v in _variants(sig, way, True))
    return launch.unavailable() or next((reason for reason in reasons if reason is not None), None)


def _ways(sig: SampleSig) -> tuple[str, ...]:
    """Who draws: "all" tokens, a "short" top-k, the "rest" of the filters. Each row is drawn by one."""
    if not filtered(sig):
        return ("all",)
    k = sig.top_k
    if k is not None and 0 < k < sig.V and k <= builds.MOST_LISTED:
        return ("short",)
    return ("rest",) if k is not None else ("short", "rest")


def _variants(sig: SampleSig, way: str, penalised: bool) -> tuple[Variant, ...]:
    kind = KINDS[sig.dtype]
    if way == "all":
        return (builds.draw(kind, penalised, sig.temperature == 0.0),)
    if way == "short":
        return builds.short_top_k(kind, penalised)
    held = builds.held_bytes(kind, penalised)
    return (builds.filters(kind, penalised, builds.filter_ctas(builds.cluster(sig.V)[1], held)),)


def _used(sig: SampleSig, options: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without tensors that no option reads: neither counts nor the prompt matter while their penalties are off."""
    idle = set()
    if sig.repetition_penalty == 1.0:
        idle.add("prompt_mask")
        if sig.presence_penalty == 0.0 and sig.frequency_penalty == 0.0:
            idle.add("counts")
    return {n: t for n, t in options.items() if n not in idle}


def _values(sig: SampleSig) -> dict[str, Any]:
    def number(name: str, off: float) -> float:
        value = getattr(sig, name)
        return off if value is None else value

    return {
        "logits_b": sig.logits_stride[0] * sig.dtype.itemsize, "offset_value": int(number("offset", 0)),
        "top_k_value": int(number("top_k", 0)), "B": sig.B, "V": sig.V, "blocks": -(-sig.V // builds.BLOCK),
        "listed": int(len(_ways(sig)) > 1),
        "temperature_value": number("temperature", 1.0), "top_p_value": number("top_p", 1.0),
        "min_p_value": number("min_p", 0.0), "repetition_value": number("repetition_penalty", 1.0),
        "presence_value": number("presence_penalty", 0.0), "frequency_value": number("frequency_penalty", 0.0),
    }  # fmt: skip


def _made(
    sig: SampleSig, variant: Variant, name: str, grid: int, values: dict[str, Any], *, cluster: int = 1, shared: int = 0,
    threads: int = builds.THREADS,
) -> Any:  # fmt: skip
    """A launch of ``grid`` CTAs, in clusters unless ``cluster`` is 1."""
    loaded = launch.kernel(variant, name, launch.index_of(sig.device), shared)
    if cluster > 8:
        loaded.allow_large_clusters()
    return launch.compiled().CudaLaunch(
        loaded, (grid, 1, 1), (threads, 1, 1), (cluster, 1, 1), True, PARAMS.pack(values),
        [PARAMS.offsets[name] for name in EACH_CALL],
    )  # fmt: skip


def _prepare(plan: Plan, penalised: bool) -> list[Any]:
    """The launches that draw, in order."""
    sig, values, made = plan.sig, _values(plan.sig), []
    for way in _ways(sig):
        variants = _variants(sig, way, penalised)
        if way == "all":
            made.append(_made(sig, variants[0], "attnkit_sample_draw", plan.config.ctas, values))
        elif way == "short":
            made.append(_made(sig, variants[0], "attnkit_sample_peaks", plan.config.ctas, values))
            made.append(_made(sig, variants[1], "attnkit_sample_topk", sig.B, values, threads=builds.TOPK_THREADS))
        else:
            size, tiles = builds.cluster(sig.V)
            shared = builds.slice_bytes(tiles, builds.held_bytes(KINDS[sig.dtype], penalised))
            made.append(_made(sig, variants[0], "attnkit_sample_filter", sig.B * size, values, cluster=size, shared=shared))
    return made


def _prepare_logprobs(sig: SampleSig) -> Any:
    size, tiles = builds.cluster(sig.V)
    kind, values = KINDS[sig.dtype], _values(sig) | {"columns": sig.logprobs}
    held = builds.held_bytes(kind, False)
    variant = builds.logprobs(kind, builds.filter_ctas(tiles, held))
    shared = builds.slice_bytes(tiles, held)
    return _made(sig, variant, "attnkit_sample_logprobs", sig.B * size, values, cluster=size, shared=shared)


def _launch(
    plan: Plan, logits: Tensor, seeds: Tensor, options: dict[str, Tensor], tokens: Tensor, valid: Tensor,
    logprobs: Tensor | None, top_ids: Tensor | None,
) -> None:  # fmt: skip
    sig, state = plan.sig, plan.state
    used = _used(sig, options)
    draw = "penalised" if any(name in used for name in STRIDES) else "plain"
    if draw not in state:
        state[draw] = _prepare(plan, draw == "penalised")
    ways = _ways(sig)
    counters = workspace.counters(sig.device, 4 * sig.B) if "all" in ways else None
    peaks = workspace.partials(sig.device, builds.peak_bytes(sig.B, sig.V)) if "short" in ways else None
    own = {"logits": logits, "seeds": seeds, "tokens": tokens, "valid": valid, "state": counters, "peaks": peaks}
    own |= {"chosen": logprobs, "top_ids": top_ids} | used
    arguments = (
        launch.stream_of(launch.index_of(sig.device)),
        *(launch.pointer(own.get(name)) for name in POINTERS),
        *(used[name].stride(0) * size if name in used else 0 for name, size in STRIDES.items()),
    )
    for made in state[draw]:
        made(*arguments)
    if logprobs is not None:
        if "logprobs" not in state:
            state["logprobs"] = _prepare_logprobs(sig)
        state["logprobs"](*arguments)


SAMPLE = Kernel("cuda_sm90", "cuda", _supports, _launch, sampling_cuda.CUDA)
