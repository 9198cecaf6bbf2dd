"""`attnkit demo`: text from the bundled checkpoint, then the roofline table of the five families, in under a minute."""

from __future__ import annotations

import importlib.resources
import time
from pathlib import Path
from typing import Any

import torch

from attnkit import roofline, timing, workload
from attnkit.workload import Case, Gemm, Sample
from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill


def checkpoint() -> Path:
    """The bundled checkpoint's folder; raises RuntimeError where this installation lacks it."""
    path = Path(str(importlib.resources.files("attnkit.integrations.engine"))) / "checkpoints" / "tiny"
    if not (path / "config.json").is_file():
        raise RuntimeError(f"the bundled checkpoint is not in this installation ({path})")
    return path


def cases(device: torch.device) -> list[Case]:
    """A case or two a family, sized for the device."""
    if device.type == "cuda":
        return [
            Prefill(B=4, L=4096, Hq=32, Hkv=8),
            Decode(B=32, L=4096, Hq=32, Hkv=8),
            Decode(B=1, L=4096, Hq=32, Hkv=8),
            MlaDecode(B=32, L=4096, H=128),
            MlaPrefill(B=1, L=8192, H=16),
            Gemm(M=16, N=28672, K=4096),
            Gemm(M=4096, N=28672, K=4096),
            Sample(B=128, V=131072, top_k=50, top_p=0.9),
        ]
    return [
        Prefill(B=1, L=1024, Hq=28, Hkv=4),
        Decode(B=16, L=2048, Hq=28, Hkv=4),
        MlaDecode(B=4, L=1024, H=16),
        MlaPrefill(B=1, L=256, H=16),
        Gemm(M=16, N=18944, K=3584),
        Sample(B=8, V=131072, top_k=50, top_p=0.9),
    ]


def run(prompt: str, max_tokens: int, device: torch.device) -> None:
    """Stream the continuation, then print the table."""
    from rich.console import Console

    from attnkit.integrations.engine import cli

    console = Console(highlight=False)
    cli.generate(
        checkpoint(), [prompt], max_tokens=max_tokens, temperature=0.8, top_p=0.9, seed=3, device=str(device), console=console
    )
    console.print()
    start = time.perf_counter()
    with console.status("measuring the roof") as status:
        roof = roofline.measure_roof(device)
        rows = []
        for case in cases(device):
            status.update(f"{case.op} {case.name}")
            rows.append(measure(case, device, roof))
    console.print(roofline.table(rows, roof, device, console.width))
    console.print(f"[dim]checked against the reference, then timed, in {time.perf_counter() - start:.0f} s[/dim]")


def measure(case: Case, device: torch.device, roof: roofline.Roof) -> roofline.Row:
    """The first kernel that serves, checked and timed; raises RuntimeError where its answer is wrong."""
    x: dict[str, Any] = case.build(device)
    plan = workload.plan(case, x)
    error = workload.checked_error(case, x, case.call(x))
    if error > case.limit:
        raise RuntimeError(f"{case.op} {case.name}: {plan.kernel.name} is off by {error:.1e}, wanted {case.limit:.0e}")
    calls = [case.call(s) for s in workload.rotated(case, x, device)]
    t = timing.measure(calls, device, budget=0.06 if device.type == "cuda" else 1.0)
    config = "" if plan.config is None else str(plan.config)
    return roofline.row(
        case.family, case.name, plan.kernel.name, case.cost(), t, roof, error, config=config, origin=plan.origin
    )
