"""README's table of measurements, from the receipt: `python -m perf.readme` writes it anew; a test holds README to it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from perf.peers import LIBRARIES
from perf.receipt import RESULTS, ROOT

README = ROOT / "README.md"
BEGIN, END = "<!-- table:begin -->\n", "<!-- table:end -->\n"
#: Case -> what a reader calls it; in this order.
SHOWN = {
    ("prefill", "B1-L8192-Hq32-Hkv8-D128-S16-bf16"): "Prefill, 1 x 8k, 32/8 heads",
    ("prefill", "B1-L32768-Hq32-Hkv8-D128-S16-bf16"): "Prefill, 1 x 32k, 32/8",
    ("prefill", "B16-L1024-Hq32-Hkv8-D128-S16-bf16"): "Prefill, 16 x 1k, 32/8",
    ("prefill", "B32-L512-Hq32-Hkv8-D128-S16-bf16"): "Prefill, 32 x 512, 32/8",
    ("prefill", "B4-n512-L8192-Hq32-Hkv8-D128-S16-bf16"): "Prefill, 4 x 512 tokens on 8k",
    ("prefill", "B4-n512-L8192-Hq32-Hkv8-D128-S16-bf16-fp8kv"): "Prefill, the same, e4m3 cache",
    ("prefill", "B1-n256-L65536-Hq8-Hkv1-D128-S16-bf16"): "Prefill, 256 tokens on 64k, 8/1",
    ("decode", "B64-L4096-Hq32-Hkv8-D128-S16-bf16"): "Decode, 64 x 4k, 32/8",
    ("decode", "B64-L4096-Hq32-Hkv8-D128-S16-bf16-fp8kv"): "Decode, the same, e4m3 cache",
    ("decode", "B1-L1024-Hq32-Hkv8-D128-S16-bf16"): "Decode, 1 x 1k, 32/8",
    ("decode", "B64-L64k+63x700-Hq32-Hkv8-D128-S16-bf16"): "Decode, one 64k among 63 of 700",
    ("decode", "B32-L4096-Hq32-Hkv8-D128-S16-bf16-Q4"): "Decode, 4 query tokens, 32 x 4k",
    ("mla", "B64-L16384-H16-S64-bf16"): "MLA decode, 64 x 16k, 16 heads",
    ("mla", "B32-L4096-H128-S64-bf16"): "MLA decode, 32 x 4k, 128 heads",
    ("mla", "B1-L8192-H128-S64-bf16"): "MLA decode, 1 x 8k, 128 heads",
    ("gemm", "M1-N28672-K4096-int8"): "W8A8, M=1, 28672 x 4096",
    ("gemm", "M64-N28672-K4096-int8"): "W8A8, M=64",
    ("gemm", "M256-N28672-K4096-int8"): "W8A8, M=256",
    ("gemm", "M4096-N28672-K4096-int8"): "W8A8, M=4096",
    ("gemm", "linear-M16-N28672-K4096-int8"): "Quantise + W8A8, M=16",
    ("sampling", "B32-V131072-k50-p0.9-fp32"): "Sample, top-k + top-p, 32 x 131k",
    ("sampling", "B128-V131072-k50-p0.9-fp32"): "Sample, top-k + top-p, 128 x 131k",
    ("sampling", "B128-V131072-p0.9-fp32"): "Sample, top-p 0.9, 128 x 131k",
    ("sampling", "B256-V131072-temperature-fp32"): "Sample, temperature, 256 x 131k",
    ("sampling", "B128-V131072-greedy-fp32"): "Sample, greedy, 128 x 131k",
    ("hidden", "B32-V131072-H4096-temperature-bf16"): "Product and draw, 32 x 131k x 4096",
}
FAMILIES = {
    "prefill": "prefill",
    "decode": "decode",
    "mla": "MLA",
    "gemm": "GEMM and quantising",
    "sampling": "sampling",
    "hidden": "product and draw",
}


def first_rows(receipt: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Each case, by family and name, by the kernel that serves it (the first that was timed)."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in receipt["rows"]:
        rows.setdefault((row["family"], row["case"]), row)
    return rows


def _line(label: str, row: dict[str, Any]) -> str:
    us = f"{row['us']:.0f}" if row["us"] >= 100 else f"{row['us']:.1f}"
    rate = f"{row['gbs'] / 1e3:.2f} TB/s" if row["bound"] == "memory" else f"{row['tflops']:.0f} TFLOP/s"
    if not row["peers"]:
        return f"| {label} | {row['impl']} | {us} | {rate} | {row['roof_pct']:.0f}% | - | - |"
    peer, theirs = min(row["peers"].items(), key=lambda p: p[1])
    them = f"{theirs:.0f}" if theirs >= 100 else f"{theirs:.1f}"
    return f"| {label} | {row['impl']} | {us} | {rate} | {row['roof_pct']:.0f}% | {peer} {them} us | {theirs / row['us']:.2f} |"


def _means(rows: dict[tuple[str, str], dict[str, Any]]) -> str:
    parts = []
    for family, name in FAMILIES.items():
        ratios = []
        for row in rows.values():
            theirs = [us for peer, us in row["peers"].items() if peer in LIBRARIES]
            if row["family"] == family and theirs:
                ratios.append(min(theirs) / row["us"])
        if ratios:
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
            parts.append(f"{mean:.2f} in {name} ({len(ratios)} cases, {sum(r < 1 for r in ratios)} below 1)")
    return "; ".join(parts)


def _roofs(roofs: dict[str, float]) -> str:
    return f"{roofs['read_gbs'] / 1e3:.2f} TB/s read, {roofs['bf16_tflops']:.0f} TFLOP/s bf16, {roofs['int8_tflops']:.0f} TOP/s int8"


def _earlier(receipt: dict[str, Any]) -> list[str]:
    """Of which families rows are of earlier runs, with other roofs."""
    runs: dict[str, list[str]] = {}
    for family, of in receipt.get("families", {}).items():
        if of["roofs"] != receipt["roofs"]:
            runs.setdefault(_roofs(of["roofs"]), []).append(FAMILIES.get(family, family))
    return [f"Rows of {', '.join(names)} are of an earlier run: {roofs}." for roofs, names in runs.items()]


def table(receipt: dict[str, Any]) -> str:
    roofs, rows = receipt["roofs"], first_rows(receipt)
    gpu = receipt["gpu"].removeprefix("nvidia-").split("-")[0].upper()
    lines = [
        f"One {gpu}, each case in turn with the best peer that was there (FlashAttention-3, FlashInfer, FlashMLA, vLLM's",
        "CUTLASS and quantising kernels, torch), by CUDA-graph replay over rotated buffers; roofs measured in the same run:",
        f"{_roofs(roofs)}. `x` above 1 is faster than every peer.",
        *_earlier(receipt),
        f"All {len(receipt['rows'])} rows: [perf/results](perf/results/{receipt['gpu']}.json).",
        "",
        "| case | kernel | us | rate | of the roof | best peer | x |",
        "|---|---|---|---|---|---|---|",
        *(_line(label, rows[case]) for case, label in SHOWN.items() if case in rows),
        "",
        f"Geometric means of `x` over all cases that a kernel library was timed at: {_means(rows)}.",
        *_around(receipt),
    ]
    return "\n".join(lines) + "\n"


def _around(receipt: dict[str, Any]) -> list[str]:
    """What is no kernel's time: first calls, the host's share, the engine."""
    lines, calls = [], receipt.get("calls", {})
    first, host = calls.get("first call, s (cubins)"), calls.get("host time of a call, us")
    if first and host:
        op, seconds = max(first.items(), key=lambda p: p[1])
        theirs = calls.get("of the quickest library's, us", {}).get("paged_decode")
        beside = f" (the quickest peer's, planned before: {theirs:.0f} us)" if theirs else ""
        lines.append(
            f"On empty caches the slowest first call of {len(first)} ops takes {seconds * 1e3:.0f} ms ({op});"
            f" an eager `paged_decode` costs the host {host['paged_decode']:.0f} us{beside}."
        )
    batch = next((e for e in receipt["engine"] if "-B8-" in e["case"]), None)
    if batch:
        lines.append(
            f"The engine decodes the bundled checkpoint at {batch['tokens_per_s'] / 1e3:.0f}k tokens/s at batch 8,"
            f" {batch['ratio']:.0f} times transformers' `generate`."
        )
    return lines


def rewritten(text: str, receipt: dict[str, Any]) -> str:
    head, rest = text.split(BEGIN)
    return head + BEGIN + table(receipt) + END + rest.split(END)[1]


def receipt_file() -> Path:
    """The one GPU's receipt that README shows: the first by name."""
    return sorted(RESULTS.glob("*.json"))[0]


def main() -> int:
    receipt = json.loads(receipt_file().read_text(encoding="utf-8"))
    README.write_text(rewritten(README.read_text(encoding="utf-8"), receipt), encoding="utf-8")
    print(table(receipt))
    return 0


if __name__ == "__main__":
    sys.exit(main())
