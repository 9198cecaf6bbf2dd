"""Ahead-of-time compilation: every kernel, for every architecture, on a machine without a GPU.

Each kernel file lists SPECIMENS: one set of argument types and constants for each way of using the kernel that
compiles to something different in kind. ``python -m attnkit.triton_kernels.aot cuda:90 hip:gfx942`` prints one
JSON row for each; it must run without TRITON_INTERPRET, which replaces the compiler.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

#: Bytes of shared memory that one block may have.
SHARED = {"cuda:80": 166912, "cuda:89": 101376, "cuda:90": 232448, "cuda:100": 232448, "cuda:120": 101376, "hip:gfx942": 65536}


@dataclass(frozen=True, slots=True)
class Specimen:
    """One instance of a kernel.

    fn          the jit function
    signature   parameter -> type as Triton spells it ("*bf16", "i32", "fp32"); absent: a constant
    constants   parameter -> value of constexpr parameters, and None for optional pointers that do not come; one
                called PTX is set to whether the target is NVIDIA's
    targets     where it is a default; elsewhere it is not compiled (None: everywhere)
    unaligned   parameters not to be taken as multiples of 16 (bytes for pointers, elements for integers)
    """

    name: str
    fn: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 1
    targets: tuple[str, ...] | None = None
    unaligned: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Compiled:
    """What came out: bytes of shared memory, registers a thread, bytes of spills (-1: the back end does not say)."""

    specimen: str
    target: str
    shared: int
    registers: int
    spills: int


def gpu_target(target: str) -> GPUTarget:
    """ "cuda:90" or "hip:gfx942"."""
    kind, _, name = target.partition(":")
    return GPUTarget("cuda", int(name), 32) if kind == "cuda" else GPUTarget("hip", name, 64)


def _attributes(specimen: Specimen, names: list[str]) -> dict[tuple[int], list[list[Any]]]:
    wanted = [i for i, n in enumerate(names) if n in specimen.signature and n not in specimen.unaligned]
    kinds = {i: specimen.signature[names[i]] for i in wanted}
    return {(i,): [["tt.divisibility", 16]] for i in wanted if kinds[i].startswith("*") or kinds[i] in ("i32", "i64")}


def compile_specimen(specimen: Specimen, target: str) -> Any:
    """Triton's compiled kernel of ``specimen`` for ``target``.

    Raises RuntimeError under TRITON_INTERPRET, and whatever the compiler raises.
    """
    if triton.knobs.runtime.interpret:
        raise RuntimeError("compile_specimen: TRITON_INTERPRET is set, and the interpreter compiles nothing")
    names = specimen.fn.arg_names
    signature = {n: specimen.signature.get(n, "constexpr") for n in names}
    constants = {n: specimen.constants[n] for n in names if signature[n] == "constexpr"}
    if "PTX" in constants:
        constants["PTX"] = target.startswith("cuda")
    source = triton.compiler.ASTSource(specimen.fn, signature, constants, _attributes(specimen, names))
    options = {"num_warps": specimen.num_warps, "num_stages": specimen.num_stages}
    return triton.compile(source, target=gpu_target(target), options=options)


def resources(specimen: Specimen, target: str) -> Compiled:
    """Compile, then read registers and spills off the machine code."""
    kernel = compile_specimen(specimen, target)
    registers, spills = _amd_usage(kernel) if target.startswith("hip") else _nvidia_usage(kernel)
    return Compiled(specimen.name, target, kernel.metadata.shared, registers, spills)


def _nvidia_usage(kernel: Any) -> tuple[int, int]:
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        cubin.write_bytes(kernel.asm["cubin"])
        text = subprocess.run([tool, "-res-usage", str(cubin)], capture_output=True, text=True, check=True).stdout
    match = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if match is None:
        raise RuntimeError(f"cuobjdump: no resource usage in {text!r}")
    return int(match[1]), int(match[2])


def _amd_usage(kernel: Any) -> tuple[int, int]:
    registers = re.search(r"\.vgpr_count:\s*(\d+)", kernel.asm["amdgcn"])
    spills = re.search(r"\.vgpr_spill_count:\s*(\d+)", kernel.asm["amdgcn"])
    return (int(registers[1]) if registers else -1, 4 * int(spills[1]) if spills else -1)


def specimens(files: tuple[str, ...] = ()) -> list[Specimen]:
    """Every specimen of the kernel files named (by default, of every file that has some)."""
    package = __package__ or "attnkit.triton_kernels"
    names = files or sorted(m.name for m in pkgutil.iter_modules([str(Path(__file__).parent)]))
    modules = [importlib.import_module(f"{package}.{name}") for name in names]
    return [s for module in modules for s in getattr(module, "SPECIMENS", ())]


def report(targets: list[str], files: tuple[str, ...] = ()) -> Iterator[Compiled]:
    for target in targets:
        for specimen in specimens(files):
            if specimen.targets is None or target in specimen.targets:
                yield resources(specimen, target)


def main(arguments: list[str]) -> int:
    """Rows for the targets named (all, where none is); exit code 1 where shared memory goes over the limit."""
    bad = 0
    for row in report(arguments or list(SHARED)):
        over = row.shared > SHARED.get(row.target, 1 << 30)
        bad |= over
        values = {"specimen": row.specimen, "target": row.target, "shared": row.shared}
        print(json.dumps(values | {"registers": row.registers, "spills": row.spills, "over": over}), flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
