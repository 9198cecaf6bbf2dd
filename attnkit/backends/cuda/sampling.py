"""sample through csrc/cuda/sampling/sample_*_sm90.cu. For the token one launch, or two: the first leaves peaks of groups, and
logits after penalties if those come. One more for log-probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from attnkit import arch
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
WORDS = (*POINTERS, "logits_b", *(f"{name}_b" for name in STRIDES), "offset_value", "top_k_value")
INTS = ("B", "V", "blocks", "columns", "left", "room")
FLOATS = ("temperature_value", "top_p_value", "min_p_value", "repetition_value", "presence_value", "frequency_value")
PARAMS = launch.Fields(maps=(), words=WORDS, ints=INTS, floats=FLOATS)
#: Kernels whose CTAs have blocks of few rows each.
LEADING = ("ring", "flow", "changed")
KINDS = {torch.float32: builds.F32, torch.bfloat16: builds.BF16, torch.float16: builds.F16}


def _supports(sig: SampleSig) -> str | None:
    if sig.device.type != "cuda" or arch.of(sig.device).sm != 90:
        return f"needs an sm_90 device, got {sig.device}"
    if sig.logprobs is not None and sig.logprobs > builds.MOST_LISTED:
        return f"logprobs is {sig.logprobs}, wanted at most {builds.MOST_LISTED}"
    if sig.B * -(-sig.V // builds.TILE) >= 1 << 31:
        return "more than 2^31 tiles of logits"
    rest = "rest" in _ways(sig) or sig.logprobs is not None
    if rest and builds.cluster(sig.V)[1] > builds.MOST_SLICE_TILES:
        return f"V is {sig.V}, filters and logprobs go up to {builds.MOST_SLICE_TILES * builds.MOST_CLUSTER * builds.TILE}"
    reasons = (launch.missing(_variant(read, way)) for way, read in _read_by(sig, _ways(sig)))
    return launch.unavailable() or next((reason for reason in reasons if reason is not None), None)


def _ways(sig: SampleSig) -> tuple[str, ...]:
    """Who draws: "all" tokens, of many rows by a "ring" or a "flow" or where penalties have "changed" them by that; top-p
    alone by "arrival", many bf16 rows of it, with min-p too, by a "tally"; any top-k and min-p "once"; the "rest" of the
    filters. Or by two launches: "peaks", then a row by those that are "given", or the rest."""
    masks, sms = extras(sig), arch.of(sig.device).sms
    if not filtered(sig):
        if masks:
            return ("changed",) if builds.fits_changed(KINDS[sig.dtype], sig.B, sig.V, sms) else ("all",)
        leads = builds.fits_lead(sig.B, sig.V, sms)
        if leads and sig.dtype != torch.float32:
            return ("flow",)
        return ("ring",) if leads and sig.aligned else ("all",)
    top_k, held = sig.top_k is None or 0 < sig.top_k < sig.V, builds.holds_at_once(sig.V)
    weighed = not top_k and sig.top_p != 1.0
    if weighed and _tallied(sig):
        return ("tally",)
    if not top_k and sig.min_p == 0.0 and builds.fits_by_arrival(sig.V):
        return ("arrival",)
    if not held or (top_k and (sig.top_k or 0) > builds.MOST_LONG):
        return ("peaks", "rest") if masks else ("rest",)
    few = builds.few_at_once(KINDS[sig.dtype], bool(masks), sig.B, sig.V, weighed)
    return ("peaks", "given") if few or "logit_bias" in masks else ("once",)


def _tallied(sig: SampleSig) -> bool:
    return sig.dtype == torch.bfloat16 and sig.aligned and not extras(sig) and builds.fits_tally(sig.B, sig.V)


def _variant(sig: SampleSig, way: str) -> Variant:
    kind, penalised = KINDS[sig.dtype], bool(extras(sig))
    if way == "all":
        return builds.draw(kind, penalised, sig.temperature == 0.0)
    if way == "ring":
        return builds.ring()
    if way == "tally":
        return builds.tally(sig.min_p != 0.0)
    if way == "once":
        return builds.once(kind, penalised)
    if way == "given":
        return builds.once(kind, False, True)
    if way == "rest":
        return builds.filters(kind, builds.filter_ctas(builds.cluster(sig.V)[1], builds.held_bytes(kind)))
    if way in ("peaks", "arrival"):
        return (builds.peaks if way == "peaks" else builds.top_p)(kind, penalised)
    return (builds.flow if way == "flow" else builds.changed)(kind)


def _read_by(sig: SampleSig, ways: tuple[str, ...]) -> list[tuple[str, SampleSig]]:
    """Each of ``ways`` and what it reads: after "peaks" with penalties, float32 logits that those are in."""
    if ways[0] != "peaks" or not extras(sig):
        return [(way, sig) for way in ways]
    pitch = -(-sig.V // builds.BLOCK) * builds.BLOCK
    left = replace(
        sig, dtype=torch.float32, logits_stride=(pitch, 1), aligned=True, counts=False, prompt_mask=False, logit_bias=False,
        allowed=False,
    )  # fmt: skip
    return [(ways[0], sig), *((way, left) for way in ways[1:])]


def extras(sig: SampleSig) -> set[str]:
    """The tensors that come and that an option reads: neither counts nor the prompt matter while their penalties are off."""
    given = {name for name in STRIDES if getattr(sig, name)}
    if sig.repetition_penalty == 1.0:
        given.discard("prompt_mask")
        if sig.presence_penalty == 0.0 and sig.frequency_penalty == 0.0:
            given.discard("counts")
    return given


def _left(sig: SampleSig) -> int:
    """What rows want of the first of two launches besides peaks of groups: a bit for those of chunks, and one for masses."""
    chunks = sig.top_k is None or not 0 < sig.top_k <= builds.MOST_LISTED
    masses = chunks and sig.min_p != 0.0 and sig.top_p != 1.0 and (sig.top_k is None or not 0 < sig.top_k < sig.V)
    return chunks + 2 * masses


def values_of(sig: SampleSig, strides: dict[str, int]) -> dict[str, Any]:
    def number(name: str, off: float) -> float:
        value = getattr(sig, name)
        return off if value is None else value

    return {
        "logits_b": sig.logits_stride[0] * sig.dtype.itemsize, "offset_value": int(number("offset", 0)),
        "top_k_value": int(number("top_k", 0)), "B": sig.B, "V": sig.V, "blocks": -(-sig.V // builds.BLOCK),
        "left": _left(sig), "room": 0,
        "temperature_value": number("temperature", 1.0), "top_p_value": number("top_p", 1.0),
        "min_p_value": number("min_p", 0.0), "repetition_value": number("repetition_penalty", 1.0),
        "presence_value": number("presence_penalty", 0.0), "frequency_value": number("frequency_penalty", 0.0),
    } | strides  # fmt: skip


def _made(
    sig: SampleSig, variant: Variant, name: str, grid: int, values: dict[str, Any], pointers: tuple[str, ...], *,
    cluster: int = 1, shared: int = 0, threads: int = builds.THREADS,
) -> Any:  # fmt: skip
    """A launch of ``grid`` CTAs, in clusters unless ``cluster`` is 1; ``pointers`` come with each call, in that order."""
    loaded = launch.kernel(variant, name, launch.index_of(sig.device), shared)
    if cluster > 8:
        loaded.allow_large_clusters()
    return launch.compiled().CudaLaunch(
        loaded, (grid, 1, 1), (threads, 1, 1), (cluster, 1, 1), True, PARAMS.pack(values),
        [PARAMS.offsets[name] for name in pointers],
    )  # fmt: skip


def _prepare(plan: Plan, options: dict[str, Tensor]) -> None:
    """What all calls of a plan have in common."""
    sig, state, ways = plan.sig, plan.state, _ways(plan.sig)
    masks, two = extras(sig), ways[0] == "peaks"
    used = {n: t for n, t in options.items() if n not in STRIDES or n in masks}
    strides = {f"{name}_b": used[name].stride(0) * size for name, size in STRIDES.items() if name in used}
    pointers = ("logits", "seeds", "tokens", "valid", *used, "peaks" if two else "state")
    state["options"] = tuple(used)
    state["index"] = launch.index_of(sig.device)
    state["scratch"] = {}
    state["counters"] = 4 * sig.B if ways[0] in ("all", *LEADING) else 0
    size, logits = builds.left_bytes(KINDS[sig.dtype], bool(masks), sig.B, sig.V)
    state["partial_bytes"] = size if two else 0
    state["left"] = logits if two and masks else None
    state["draw"] = tuple(_launch_by(plan, read, way, strides, pointers) for way, read in _read_by(sig, ways))
    if sig.logprobs is not None:
        state["logprobs"] = _prepare_logprobs(sig, values_of(sig, strides))


def _launch_by(plan: Plan, sig: SampleSig, way: str, strides: dict[str, int], pointers: tuple[str, ...]) -> Any:
    """One of the launches that draw; ``sig`` is what it reads."""
    kind, sms, masks = KINDS[sig.dtype], arch.of(sig.device).sms, extras(sig)
    values = values_of(sig, strides if masks else {})
    name, grid, cluster, shared, threads = f"attnkit_sample_{way}", sig.B, 1, 0, builds.THREADS
    if way in LEADING:
        changed, threads = way == "changed", builds.LEAD_THREADS
        grid = (builds.changed_ctas if changed else builds.lead_ctas)(sig.B, sig.V, sms)
        shared = (builds.changed_bytes if changed else builds.lead_bytes)(kind, sig.B, sig.V, grid)
        values["room"] = sig.B * values["blocks"] // grid
    elif way == "all":
        name, grid = "attnkit_sample_draw", plan.config.ctas
    elif way in ("once", "given"):
        values["room"] = builds.arrive_slot(kind, masks, sig.V, 1)
        shared = max(builds.at_once_bytes(kind, bool(masks), sig.V), builds.arrive_bytes(sig.V, 1, values["room"]))
        name, threads = "attnkit_sample_once", builds.TOPK_THREADS
    elif way == "peaks":
        grid = builds.peaks_ctas(bool(masks), sig.B, sig.V, plan.config.ctas)
        threads = builds.REWRITE_THREADS if masks else threads
    elif way == "arrival":
        cluster = builds.arrive_parts(kind, masks, sig.B, sig.V, sms)
        values["room"] = builds.arrive_slot(kind, masks, sig.V, cluster)
        shared, threads = builds.arrive_bytes(sig.V, cluster, values["room"]), builds.ARRIVE_THREADS
        name = "attnkit_sample_arrive"
    elif way == "tally":
        values["room"] = builds.tally_slots(sig.V)
        shared, threads = builds.tally_bytes(sig.V), builds.TALLY_THREADS
    else:
        cluster, tiles = builds.cluster(sig.V)
        name, shared = "attnkit_sample_filter", builds.slice_bytes(tiles, builds.held_bytes(kind))
    return _made(
        sig, _variant(sig, way), name, grid * cluster, values, pointers, cluster=cluster, shared=shared, threads=threads
    )  # fmt: skip


def _prepare_logprobs(sig: SampleSig, values: dict[str, Any]) -> Any:
    size, tiles = builds.cluster(sig.V)
    kind = KINDS[sig.dtype]
    held = builds.held_bytes(kind)
    return _made(
        sig, builds.logprobs(kind, builds.filter_ctas(tiles, held)), "attnkit_sample_logprobs", sig.B * size,
        values | {"columns": sig.logprobs}, ("logits", "tokens", "chosen", "top_ids"), cluster=size,
        shared=builds.slice_bytes(tiles, held),
    )  # fmt: skip


def _launch(
    plan: Plan, logits: Tensor, seeds: Tensor, options: dict[str, Tensor], tokens: Tensor, valid: Tensor,
    logprobs: Tensor | None, top_ids: Tensor | None,
) -> None:  # fmt: skip
    state = plan.state
    if "draw" not in state:
        _prepare(plan, options)
    stream = launch.stream_of(state["index"])
    partials, counters = launch.scratch(plan, stream)
    given = (options[name] for name in state["options"])
    pointers = (logits, seeds, tokens, valid, *given, counters if state["counters"] else partials)
    state["draw"][0](stream, *pointers)
    for made in state["draw"][1:]:
        made(stream, logits if state["left"] is None else partials + state["left"], *pointers[1:])
    if logprobs is not None:
        state["logprobs"](stream, logits, tokens, logprobs, top_ids)


SAMPLE = Kernel("cuda_sm90", "cuda", _supports, _launch, sampling_cuda.CUDA)
