"""compute-sanitizer over one small case of every CUDA kernel: `python -m perf.sanitize`.

memcheck, initcheck and synccheck side by side, each over a process of its own; the counts go to
perf/out/sanitizer.json, which the receipt takes up. initcheck follows what kernels and copies wrote, so the
inputs are made on the CPU and copied. It does not follow cp.async.bulk stores: the partials of the ops that write them so
are filled beforehand here, and with NaN in the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from perf.receipt import OUT, ROOT, source_hash

TOOLS = ("memcheck", "initcheck", "synccheck")
RESULT = OUT / "sanitizer.json"
ERRORS = 97
_SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
_WHERE = re.compile(r"^=========     at (\w+)\+0x", re.MULTILINE)


def cases() -> Iterator[tuple[Any, str]]:
    """A case for each CUDA kernel of each op, small, with pieces that meet and tiles that end early."""
    from attnkit.workload import Gemm, Quantize, Sample
    from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill
    from attnkit.workload_cache import Merge, WriteKv, WriteLatent
    from attnkit.workload_hidden import SampleFromHidden
    from attnkit.workload_quantize import RmsNormQuantize, SiluMulQuantize

    lens = (300, 1, 77)
    every = [
        Decode(B=3, L=lens, Hq=8, Hkv=2),
        Decode(B=3, L=lens, Hq=32, Hkv=1),
        Decode(B=3, L=lens, Hq=32, Hkv=1, Q=2),
        *(Decode(B=48, L=40, Hq=16, Hkv=8, kv=kv) for kv in ("", "fp8")),
        Decode(B=9, L=200, Hq=32, Hkv=8, D=64),
        Decode(B=1, L=20000, Hq=12, Hkv=2),  # several CTAs add up
        Decode(B=3, L=lens, Hq=8, Hkv=2, kv="fp8"),
        Decode(B=3, L=lens, Hq=8, Hkv=2, kv="int8", batch_invariant=True),
        Prefill(B=3, L=lens, Hq=8, Hkv=2),
        Prefill(B=2, n=16, L=(1500, 900), Hq=8, Hkv=1),
        Prefill(B=3, L=lens, Hq=4, Hkv=4, D=64, softcap=20.0, sinks=True),
        *(Prefill(B=3, L=lens, Hq=8, Hkv=2, kv=kv) for kv in ("fp8", "int8")),
        *(MlaDecode(B=3, L=lens, H=16, Q=Q) for Q in (1, 2)),
        MlaDecode(B=3, L=lens, H=128),
        *(MlaDecode(B=3, L=lens, H=H, kv="fp8") for H in (16, 64, 128)),
        MlaPrefill(B=2, L=130, H=2),
        *(Gemm(M=M, N=520, K=512, dtype=kind, bias=True) for M in (5, 70, 300) for kind in ("int8", "fp8")),
        *(Gemm(M=64, N=520, K=2048, dtype=kind, bias=True) for kind in ("int8", "fp8")),
        Gemm(M=1500, N=4160, K=256, dtype="fp8"),  # several tiles a CTA, each begun while the one before it is finished
        *(Quantize(M=9, K=1000, dtype=kind) for kind in ("int8", "fp8")),
        *(RmsNormQuantize(M=9, K=1000, residual=residual) for residual in (False, True)),
        SiluMulQuantize(M=9, K=1000),
        Sample(B=3, V=32003, top_k=50, top_p=0.9),
        Sample(B=3, V=32003, top_p=0.9, min_p=0.01, penalties=True),
        # By arrival, rows of a CTA each and rows that several share; flat rows, of which more is kept than lists hold.
        *(Sample(B=70, V=4100, top_k=k, min_p=0.01, dtype=kind) for k in (50, 300) for kind in ("fp32", "bf16")),
        Sample(B=60, V=70001, top_k=40, top_p=0.9),
        # Min-p that keeps more than a list holds.
        *(
            Sample(B=60, V=V, min_p=0.05, temperature=6.0, penalties=p, dtype=d)
            for V, p, d in ((70001, False, "fp32"), (70000, True, "bf16"))
        ),
        Sample(B=60, V=131072, min_p=0.05, top_p=0.5, temperature=6.0, dtype="bf16"),
        # Counted by value; with penalties by one launch, or by two.
        *(Sample(B=60, V=V, top_p=p, dtype="bf16") for V, p in ((4104, 0.9), (4104, 0.1), (131072, 0.9))),
        *(Sample(B=60, V=V, top_p=0.9, min_p=0.05, dtype="bf16") for V in (4104, 131072)),
        *(
            Sample(B=70, V=70001, top_p=0.9, min_p=m, dtype=kind)
            for m, kind in ((0.01, "fp32"), (1e-6, "fp32"), (0.01, "bf16"))
        ),
        *(
            Sample(B=B, V=4100, top_k=k, top_p=0.9, penalties=True, dtype=kind)
            for B in (20, 40)
            for k, kind in ((50, "fp32"), (50, "bf16"), (300, "bf16"), (300, "fp32"))
        ),
        *(Sample(B=B, V=4100, min_p=0.01, top_p=p, penalties=True, dtype="bf16") for B in (20, 40) for p in (1.0, 0.9)),
        *(Sample(B=2, V=100001, top_k=k, top_p=0.9, dtype=kind) for k in (50, 300) for kind in ("fp32", "bf16")),
        *(Sample(B=2, V=100001, min_p=0.01, top_p=0.9, dtype=kind) for kind in ("fp32", "bf16")),
        *(Sample(B=B, V=V, penalties=True, dtype=kind) for B, V, kind in ((20, 4100, "bf16"), (3, 32003, "fp32"))),
        Sample(B=2, V=70001, top_k=50, top_p=0.9, penalties=True, dtype="bf16"),
        *(Sample(B=70, V=4100, top_p=p) for p in (0.9, 0.1)),
        *(Sample(B=16, V=32003, top_p=0.9, min_p=m, temperature=t) for m in (0.0, 1e-6) for t in (1.0, 9.0)),
        *(Sample(B=5, V=32003, top_p=p, penalties=True) for p in (0.9, 0.1)),
        Sample(B=3, V=32003, dtype="bf16"),
        Sample(B=3, V=32003, temperature=0.0),
        *(Sample(B=100, V=32004, temperature=t, dtype=kind) for t in (0.8, 0.0) for kind in ("fp32", "bf16")),
        Sample(B=100, V=32003, dtype="bf16"),
        Sample(B=3, V=32003, top_k=300, logprobs=5),
        # Tiles that two CTAs share, and rows of hidden for each build; with penalties, and logits for another launch.
        *(SampleFromHidden(B=B, V=19000, H=264) for B in (3, 9, 17, 33)),
        SampleFromHidden(B=3, V=19000, H=264, temperature=0.0, penalties=True, dtype="fp16"),
        SampleFromHidden(B=3, V=19000, H=264, top_k=50, top_p=0.9),
        *(WriteKv(T=19, Hkv=3, kv=kv) for kv in ("", "fp8", "int8")),
        WriteLatent(T=19, S=8),
        Merge(T=5, Hq=3),
    ]
    for case in every:
        for kernel in case.kernels():
            # Where cuBLAS multiplies first, initcheck does not see what it writes, and synccheck loses track of its barriers.
            if kernel.impl == "cuda" and not kernel.name.endswith("_after_product"):
                yield case, kernel.name


def run(match: str = "") -> list[str]:
    """Every case that matches once, in this process; the names of those that ran (a kernel declines what is another's)."""
    import torch
    from torch import Tensor

    from attnkit import workspace

    done, partials = [], workspace.partials
    for case, kernel in cases():
        if not re.search(match, f"{case.op} {case.name}"):
            continue
        x = {k: v.to("cuda") if isinstance(v, Tensor) else v for k, v in case.build(torch.device("cpu")).items()}
        call = case.call(x, kernel)
        workspace.partials = _filled if case.op in BULK_STORES else partials
        try:
            call()
        except RuntimeError as error:
            if "no kernel serves this call" not in str(error):
                raise
            continue
        torch.cuda.synchronize()
        done.append(f"{case.op} {case.name} {kernel}")
    return done


#: Ops whose kernels write partials by cp.async.bulk.
BULK_STORES = frozenset({"mla_decode"})


def _filled(device: Any, nbytes: int) -> Any:
    import torch

    return torch.zeros(nbytes, dtype=torch.uint8).to(device)


def start(tool: str, sanitizer: str, match: str) -> subprocess.Popen[str]:
    # Every finding, so that each kernel's can be counted; without stacks, which would fill the log.
    options = ["--print-limit", "0", "--show-backtrace", "no", "--error-exitcode", str(ERRORS)]
    if tool == "synccheck":  # barriers to keep track of: what it detects by itself can be too few, and 64 were once
        options += ["--num-cuda-barriers", "512"]
    command = [sanitizer, "--tool", tool, *options, sys.executable, "-m", "perf.sanitize", "--run", "--match", match]
    log = (OUT / f"{tool}.log").open("w")
    # Without torch's cache every tensor is an allocation of its own, whose ends the tools can see.
    surroundings = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=log, stderr=subprocess.STDOUT, text=True)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m perf.sanitize", description=__doc__.split("\n\n")[0])
    parser.add_argument("--run", action="store_true", help="only run the cases, in this process")
    parser.add_argument("--match", default="", metavar="RE", help="only cases whose op and name match")
    parser.add_argument("--tool", nargs="*", default=list(TOOLS), choices=TOOLS, help="default: all three")
    args = parser.parse_args(argv)
    if args.run:
        print(*run(args.match), sep="\n")
        return 0
    sanitizer = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if sanitizer is None:
        print("sanitize: compute-sanitizer was not found (the CUDA toolkit brings it)", file=sys.stderr)
        return 2
    OUT.mkdir(parents=True, exist_ok=True)
    running = {tool: start(tool, sanitizer, args.match) for tool in args.tool}
    found: dict[str, Any] = {"source": source_hash(), "tools": {}}
    for tool, process in running.items():
        code = process.wait()
        text = (OUT / f"{tool}.log").read_text(encoding="utf-8", errors="replace")
        summary = _SUMMARY.search(text)
        # A run that broke off has checked nothing, whatever its summary says.
        errors = int(summary[1]) if summary and code in (0, ERRORS) else -1
        kernels = dict(Counter(_WHERE.findall(text)))
        ran = sum(" cuda_" in line for line in text.splitlines())
        found["tools"][tool] = {"errors": errors, "cases": ran, "kernels": kernels}
        print(
            f"{tool:10} {'did not finish' if errors < 0 else f'{errors} errors'}  {kernels or ''}  ({OUT / tool}.log)",
            flush=True,
        )
    RESULT.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0 if all(t["errors"] == 0 for t in found["tools"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
