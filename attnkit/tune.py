"""Find the best config of each kernel for a shape by measuring, and remember it.

Nothing here runs inside a user's call. Every candidate first has to give the reference's answer on a
poisoned output of its own; only then is it timed. Each finished bucket is saved at once, so an interrupted
sweep goes on where it stopped.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from attnkit import arch, dispatch, settings, timing
from attnkit.configs import store
from attnkit.dispatch import Kernel
from attnkit.workload import Case, Gemm, Inputs, Sample, checked_error, clone, plan, rotated
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill

#: A config has to beat the default by this much: less is noise, and the default is known to be robust.
MARGIN = 0.02
OPS = (
    "paged_prefill", "paged_decode", "mla_decode", "mla_prefill", "w8a8_gemm", "quantize_per_token", "rms_norm_quantize",
    "silu_mul_quantize", "sample", "sample_from_hidden",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tuned:
    """What one bucket of one kernel came to. ``us`` and ``default_us`` were measured in the same run."""

    op: str
    kernel: str
    bucket: str
    config: Any
    us: float
    default_us: float
    tried: int
    wrong: int  # candidates whose answer was not the reference's
    unfit: int  # candidates the device could not run


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """The shapes to sweep: the models people serve, from one sequence to a full batch."""
    if device.type != "cuda":
        shapes: list[Case] = [
            Prefill(B=1, L=1024, Hq=28, Hkv=4),
            Decode(B=8, L=1024, Hq=28, Hkv=4),
            MlaDecode(B=4, L=512, H=16),
            MlaPrefill(B=1, L=256, H=16),
            Gemm(M=8, N=3584, K=3584),
            Sample(B=8, V=131072, top_k=50, top_p=0.9),
        ]
        return shapes
    heads = [(32, 8)] if quick else [(32, 8), (28, 4), (12, 2), (64, 8)]
    out: list[Case] = []
    for Hq, Hkv in heads:
        out += [Prefill(B=B, L=L, Hq=Hq, Hkv=Hkv) for B, L in ((16, 1024), (1, 8192))]
        out += [Decode(B=B, L=L, Hq=Hq, Hkv=Hkv) for B, L in ((1, 1024), (1, 8192), (16, 2048), (64, 4096))]
    out += [Decode(B=64, L=4096, Hq=32, Hkv=8, kv="fp8"), Decode(B=64, L=4096, Hq=32, Hkv=8, Q=4)]
    out += [MlaDecode(B=B, L=L, H=H) for B, L, H in ((1, 8192, 128), (32, 4096, 128), (64, 16384, 16))]
    out += [MlaPrefill(B=4, L=2048, H=16)]
    layers = (
        [(28672, 4096)] if quick else [(28672, 4096), (4096, 14336), (6144, 4096), (37888, 3584), (3584, 18944), (8192, 28672)]
    )
    rows = (1, 16, 64, 256, 4096) if quick else (1, 16, 32, 64, 128, 256, 512, 1024, 4096)
    out += [Gemm(M=M, N=N, K=K, dtype=dtype) for N, K in layers for M in rows for dtype in ("int8", "fp8")]
    out += [Sample(B=B, V=131072, top_k=50, top_p=0.9) for B in ((1, 128) if quick else (1, 32, 128, 256))]
    out += [Sample(B=B, V=131072) for B in ((128,) if quick else (1, 128))]
    return out


def tune(
    op: str | None = None,
    quick: bool = False,
    *,
    shapes: Sequence[Case] | None = None,
    device: torch.device | str | None = None,
    path: Path | None = None,
    force: bool = False,
    progress: bool = False,
) -> list[Tuned]:
    """Sweep the candidates of every tunable kernel over shape buckets and save the best of each.

    op        one op's name; all of them unless given
    quick     fewer shapes
    shapes    the cases to sweep instead of ``cases(device)``
    path      the JSON to write (default: the user cache of this device)
    force     also measure what the file already holds; otherwise an interrupted sweep goes on
    progress  a progress bar with an estimate of the time left, on stderr

    Returns what was measured. Raises RuntimeError while a CUDA graph is being captured, ValueError for an
    unknown op. A file that cannot be written costs one warning; the results then serve this process.
    """
    if _capturing():
        raise RuntimeError("attnkit.tune: a CUDA graph is being captured on this stream; tune before the capture")
    if op is not None and op not in OPS:
        raise ValueError(f"attnkit.tune: op is {op!r}, wanted one of {', '.join(OPS)}")
    where = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    chosen = [c for c in (cases(where, quick) if shapes is None else shapes) if op in (None, c.op)]
    results: list[Tuned] = []
    target = path or store.user_path(arch.of(where))
    with _bar(progress) as step:
        for i, case in enumerate(chosen):
            results += _tune_case(case, where, target, force, lambda part, c=case, i=i: step(i, part, len(chosen), c))
            step(i + 1, 0.0, len(chosen), case)
    dispatch.forget_plans()
    return results


def _capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@contextmanager
def _bar(shown: bool) -> Iterator[Any]:
    """Yields step(index, part, total, case); a rich progress bar behind it where ``shown``."""
    if not shown:
        yield lambda *_: None
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(16),
        progress.TaskProgressColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("tune")

        def step(index: int, part: float, total: int, case: Case) -> None:
            bar.update(task, total=float(total), completed=index + part, description=f"{case.op[:13]} {case.name[:24]}")

        yield step


def _tune_case(case: Case, device: torch.device, path: Path, force: bool, step: Any) -> list[Tuned]:
    found: list[Tuned] = []
    kernels = []
    sketch = case.build(device, empty=True)
    for kernel in case.kernels():
        if kernel.configs is None or (kernel.impl == "triton" and settings.get().interpret):
            continue
        try:
            sig = plan(case, sketch, kernel.name).sig
        except RuntimeError:  # it does not serve this shape here
            continue
        if force or not _held(path, kernel, sig, device):
            kernels.append((kernel, sig))
    del sketch
    if not kernels:
        return found
    x = case.build(device)
    for i, (kernel, sig) in enumerate(kernels):
        result = _sweep(case, x, kernel, sig, device, lambda part, i=i: step((i + part) / len(kernels)))
        if result is None:
            continue
        found.append(result)
        entry = {"config": asdict(result.config), "us": round(result.us, 3), "default_us": round(result.default_us, 3)}
        assert kernel.configs is not None
        store.update(path, kernel.configs, {result.bucket: entry}, arch.of(device))
    return found


def _held(path: Path, kernel: Kernel, sig: Any, device: torch.device) -> bool:
    space = kernel.configs
    return space is not None and store.lookup(path, space, space.bucket, sig, arch.of(device), quiet=True) is not None


def _sweep(case: Case, x: Inputs, kernel: Kernel, sig: Any, device: torch.device, step: Any) -> Tuned | None:
    """Check, then time, one kernel's candidates on one shape. None where not even the default is right."""
    space, here = kernel.configs, arch.of(device)
    assert space is not None
    default = space.default(sig, here)
    candidates = list(dict.fromkeys([default, *space.candidates(sig, here)]))
    fitting = [c for c in candidates if space.smem is None or here.smem == 0 or space.smem(c, sig) <= here.smem]
    case.poison(x)
    case.error(x)  # the reference's answer is kept with x before any candidate has touched a clone of it
    wrong, unfit, right = 0, len(candidates) - len(fitting), []
    for i, config in enumerate(fitting):
        step(0.6 * i / len(fitting))
        verdict = _verdict(case, x, kernel, config)
        right += [config] if verdict == "right" else []
        wrong += verdict == "wrong"
        unfit += verdict == "unfit"
    if default not in right:
        return None
    times = _times(case, x, kernel, right, device, lambda part: step(0.6 + 0.4 * part))
    best = min(times, key=times.__getitem__)
    if times[best] > times[default] * (1 - MARGIN):
        best = default
    return Tuned(case.op, kernel.name, space.bucket(sig), best, times[best], times[default], len(candidates), wrong, unfit)


def _verdict(case: Case, x: Inputs, kernel: Kernel, config: Any) -> str:
    """One of "right", "wrong" or "unfit", from one run on inputs and an output of its own."""
    own = clone(x)
    try:
        error = checked_error(case, own, case.call(own, kernel.name, config))
    except Exception as problem:
        if isinstance(problem, torch.cuda.OutOfMemoryError) or not _is_resource_limit(problem):
            raise
        return "unfit"
    return "right" if error <= case.limit else "wrong"


def _is_resource_limit(problem: Exception) -> bool:
    """Too much shared memory or too many registers for the device: Triton and the driver word it differently."""
    text = f"{type(problem).__name__} {problem}".lower()
    return any(word in text for word in ("outofresources", "out of resource", "shared memory", "too many resources", "ptxas"))


def _times(case: Case, x: Inputs, kernel: Kernel, configs: list[Any], device: torch.device, step: Any) -> dict[Any, float]:
    """Microseconds of each config: a short look at all, then a longer one at the best three and the default."""
    sets = rotated(case, x, device)
    calls = {c: [case.call(s, kernel.name, c) for s in sets] for c in configs}
    if device.type != "cuda":
        names = {str(i): c for i, c in enumerate(configs)}
        measured = timing.paired({name: calls[c] for name, c in names.items()}, budget=0.3 * len(configs)).timings
        step(1.0)
        return {c: measured[name].us for name, c in names.items()}
    times = {}
    for i, c in enumerate(configs):
        times[c] = timing.measure(calls[c], device, budget=0.015).us
        step(0.7 * i / len(configs))
    again = {configs[0], *sorted(times, key=times.__getitem__)[:3]}
    final = {c: timing.measure(calls[c], device, budget=0.05).us for c in again}
    return final


class _Callable(types.ModuleType):
    """``attnkit.tune`` names this module once it is imported; calling it is calling ``tune``."""

    def __call__(self, *args: Any, **kwargs: Any) -> list[Tuned]:
        return tune(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
