"""sample through csrc/cuda/sampling/sample_*_sm90.cu. For the token: one launch, but for a short top-k of few or very many
rows or with a bias two, and three where a tensor leaves open which rows have one. One more for log-probabilities."""

from __future__ import annotations

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
INTS = ("B", "V", "blocks", "columns", "listed", "room")
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
    tiles = builds.cluster(sig.V)[1]
    held = filtered(sig) and _ways(sig) not in (("short",), ("once",))
    if (held or sig.logprobs is not None) and tiles > builds.MOST_SLICE_TILES:
        return f"V is {sig.V}, filters and logprobs go up to {builds.MOST_SLICE_TILES * builds.MOST_CLUSTER * builds.TILE}"
    reasons = (launch.missing(v) for way in _ways(sig) for v in _variants(sig, way, True))
    return launch.unavailable() or next((reason for reason in reasons if reason is not None), None)


def _ways(sig: SampleSig) -> tuple[str, ...]:
    """Who draws: "all" tokens, of many rows by a "ring" or a "flow" or where penalties have "changed" them by that, a "short"
    top-k by two launches or "once", whatever rows' top-k is, top-p without top-k and min-p by "arrival", many bf16 rows of it
    and of min-p by a "tally", other min-p of many rows by a "cut", the "rest" of the filters. Each row is drawn by one."""
    if not filtered(sig):
        sms = arch.of(sig.device).sms
        if extras(sig):
            return ("changed",) if builds.fits_changed(KINDS[sig.dtype], sig.B, sig.V, sms) else ("all",)
        leads = builds.fits_lead(sig.B, sig.V, sms)
        if leads and sig.dtype != torch.float32:
            return ("flow",)
        return ("ring",) if leads and sig.aligned else ("all",)
    k = sig.top_k
    if k is None:
        return ("once",) if _at_once(sig) else ("short", "rest")
    if 0 < k < sig.V:
        if k <= builds.MOST_LONG and _at_once(sig):
            return ("once",)
        return ("short",) if k <= builds.MOST_LISTED else ("rest",)
    if _tallied(sig):
        return ("tally",)
    if sig.min_p == 0.0 and builds.fits_by_arrival(sig.V):
        return ("arrival",)
    if sig.B < builds.LEAST_CUT_ROWS:
        return ("rest",)
    return ("once",) if extras(sig) and _at_once(sig) else ("cut",)


def _variants(sig: SampleSig, way: str, penalised: bool) -> tuple[Variant, ...]:
    kind = KINDS[sig.dtype]
    if way == "all":
        return (builds.draw(kind, penalised, sig.temperature == 0.0),)
    if way == "ring":
        return (builds.ring(),)
    if way == "flow":
        return (builds.flow(kind),)
    if way == "changed":
        return (builds.changed(kind),)
    if way == "short":
        return builds.short_top_k(kind, penalised)
    if way == "once":
        return (builds.once(kind, penalised),)
    if way == "arrival":
        return (builds.top_p(kind, penalised),)
    if way == "tally":
        return (builds.tally(sig.min_p != 0.0),)
    if way == "cut":
        return (builds.cut(kind, penalised),)
    held = builds.held_bytes(kind, penalised)
    return (builds.filters(kind, penalised, builds.filter_ctas(builds.cluster(sig.V)[1], held)),)


def _at_once(sig: SampleSig) -> bool:
    masks, short = extras(sig), sig.top_k is not None and sig.top_k <= builds.MOST_LISTED
    return "logit_bias" not in masks and builds.fits_at_once(
        KINDS[sig.dtype], bool(masks), sig.B, sig.V, arch.of(sig.device).sms, short
    )  # fmt: skip


def _tallied(sig: SampleSig) -> bool:
    """Min-p alone is sooner by a cut where rows are more than multiprocessors."""
    if sig.min_p != 0.0 and sig.top_p == 1.0 and sig.B > arch.of(sig.device).sms:
        return False
    return sig.dtype == torch.bfloat16 and sig.aligned and not extras(sig) and builds.fits_tally(sig.B, sig.V)


def extras(sig: SampleSig) -> set[str]:
    """The tensors that come and that an option reads: neither counts nor the prompt matter while their penalties are off."""
    given = {name for name in STRIDES if getattr(sig, name)}
    if sig.repetition_penalty == 1.0:
        given.discard("prompt_mask")
        if sig.presence_penalty == 0.0 and sig.frequency_penalty == 0.0:
            given.discard("counts")
    return given


def values_of(sig: SampleSig, strides: dict[str, int]) -> dict[str, Any]:
    def number(name: str, off: float) -> float:
        value = getattr(sig, name)
        return off if value is None else value

    return {
        "logits_b": sig.logits_stride[0] * sig.dtype.itemsize, "offset_value": int(number("offset", 0)),
        "top_k_value": int(number("top_k", 0)), "B": sig.B, "V": sig.V, "blocks": -(-sig.V // builds.BLOCK),
        "listed": int(len(_ways(sig)) > 1), "room": builds.CUT_ROOM,
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
    masks = extras(sig)
    used = {n: t for n, t in options.items() if n not in STRIDES or n in masks}
    strides = {f"{name}_b": used[name].stride(0) * size for name, size in STRIDES.items() if name in used}
    values, penalised = values_of(sig, strides), bool(strides)
    scratch = "peaks" if ways[0] == "short" else "state"
    pointers = ("logits", "seeds", "tokens", "valid", *used, scratch)
    state["options"] = tuple(used)
    state["index"] = launch.index_of(sig.device)
    state["scratch"] = {}
    state["counters"] = 4 * sig.B if ways[0] in ("all", *LEADING) else 0
    state["partial_bytes"] = 4 * sig.B * builds.groups(sig.V) if ways[0] == "short" else 0
    made = []
    for way in ways:
        variants = _variants(sig, way, penalised)
        if way in LEADING:
            ctas, bytes_of = builds.lead_ctas, builds.lead_bytes
            if way == "changed":
                ctas, bytes_of = builds.changed_ctas, builds.changed_bytes
            grid, threads = ctas(sig.B, sig.V, arch.of(sig.device).sms), builds.LEAD_THREADS
            shared = bytes_of(KINDS[sig.dtype], sig.B, sig.V, grid)
            dealt = values | {"room": sig.B * values["blocks"] // grid}
            made.append(_made(sig, variants[0], f"attnkit_sample_{way}", grid, dealt, pointers, shared=shared, threads=threads))
        elif way == "all":
            made.append(_made(sig, variants[0], "attnkit_sample_draw", plan.config.ctas, values, pointers))
        elif way == "once":
            slot = builds.arrive_slot(KINDS[sig.dtype], masks, sig.V, 1)
            shared, threads = builds.at_once_bytes(KINDS[sig.dtype], penalised, sig.V), builds.TOPK_THREADS
            shared, copied = max(shared, builds.arrive_bytes(sig.V, 1, slot)), values | {"room": slot}
            made.append(_made(sig, variants[0], "attnkit_sample_once", sig.B, copied, pointers, shared=shared, threads=threads))
        elif way == "short":
            made.append(_peaks(plan, variants[0], values, pointers, penalised))
            made.append(
                _made(sig, variants[1], "attnkit_sample_topk", sig.B, values, pointers, threads=builds.TOPK_THREADS)
            )  # fmt: skip
        elif way == "arrival":
            size = builds.arrive_parts(sig.B, sig.V, arch.of(sig.device).sms)
            slot = builds.arrive_slot(KINDS[sig.dtype], masks, sig.V, size)
            shared, threads = builds.arrive_bytes(sig.V, size, slot), builds.ARRIVE_THREADS
            name, grid, copied = "attnkit_sample_arrive", sig.B * size, values | {"room": slot}
            made.append(_made(sig, variants[0], name, grid, copied, pointers, cluster=size, shared=shared, threads=threads))
        elif way == "tally":
            shared, threads = builds.tally_bytes(sig.V), builds.TALLY_THREADS
            slots = values | {"room": builds.tally_slots(sig.V)}
            made.append(_made(sig, variants[0], "attnkit_sample_tally", sig.B, slots, pointers, shared=shared, threads=threads))
        elif way == "cut":
            size = builds.parts(sig.B, sig.V, arch.of(sig.device).sms, sig.top_p != 1.0)
            shared = builds.CUT_BYTES + 8 * builds.THREADS * builds.CUT_ROOM
            name, grid = "attnkit_sample_cut", sig.B * size
            made.append(_made(sig, variants[0], name, grid, values, pointers, cluster=size, shared=shared))
        else:
            size, tiles = builds.cluster(sig.V)
            shared = builds.slice_bytes(tiles, builds.held_bytes(KINDS[sig.dtype], penalised))
            name, grid = "attnkit_sample_filter", sig.B * size
            made.append(_made(sig, variants[0], name, grid, values, pointers, cluster=size, shared=shared))
    state["draw"] = tuple(made)
    if sig.logprobs is not None:
        state["logprobs"] = _prepare_logprobs(sig, values)


def _peaks(plan: Plan, variant: Variant, values: dict[str, Any], pointers: tuple[str, ...], penalised: bool) -> Any:
    """The first launch of a short top-k."""
    sig, name = plan.sig, "attnkit_sample_peaks"
    if not penalised:
        return _made(sig, variant, name, plan.config.ctas, values, pointers)
    grid, shared = min(arch.of(sig.device).sms, sig.B * values["blocks"]), builds.counted_bytes(KINDS[sig.dtype], True)
    return _made(sig, variant, name, grid, values, pointers, shared=shared, threads=builds.COUNTED_THREADS)


def _prepare_logprobs(sig: SampleSig, values: dict[str, Any]) -> Any:
    size, tiles = builds.cluster(sig.V)
    kind = KINDS[sig.dtype]
    held = builds.held_bytes(kind, False)
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
    for made in state["draw"]:
        made(stream, *pointers)
    if logprobs is not None:
        state["logprobs"](stream, logits, tokens, logprobs, top_ids)


SAMPLE = Kernel("cuda_sm90", "cuda", _supports, _launch, sampling_cuda.CUDA)
