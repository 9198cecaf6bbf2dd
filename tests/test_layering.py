"""Who may import whom, read off the sources."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OPS = {"prefill", "decode", "mla", "gemm", "quantize", "sampling", "hidden", "cache"}
STDLIB_FREE = {"__future__"}


def imports(path: Path, lazy: bool = True) -> set[str]:
    """Modules a file imports; without ``lazy`` only those at its top level (outside functions)."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if lazy else _outside_functions(tree)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return found


def _outside_functions(node):
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from _outside_functions(child)


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def roots(names: set[str]) -> set[str]:
    return {n.split(".")[0] for n in names}


@pytest.mark.parametrize("path", files("triton_kernels"), ids=lambda p: p.name)
def test_triton_kernels_import_torch_and_triton_only(path):
    import sys

    other = roots(imports(path)) - set(sys.stdlib_module_names) - STDLIB_FREE
    named = {n for n in imports(path) if n.startswith("attnkit")}
    assert other <= {"torch", "triton", "attnkit"}
    assert all(n.startswith("attnkit.triton_kernels") for n in named)


@pytest.mark.parametrize("path", files("attnkit"), ids=lambda p: str(p.relative_to(ROOT)))
def test_attnkit_imports_no_tests_perf_or_integrations_at_the_top(path):
    names = imports(path, lazy=False)
    assert not roots(names) & {"tests", "perf", "integrations", "transformers", "triton", "cupy", "flashinfer"}
    assert not any(n.startswith("attnkit.integrations") for n in names)


LAZY_DOORS = {"attnkit/__init__.py", "attnkit/cli.py", "attnkit/hook.py", "attnkit/demo.py"}


@pytest.mark.parametrize("path", files("attnkit"), ids=lambda p: str(p.relative_to(ROOT)))
def test_only_the_lazy_doors_reach_integrations(path):
    if str(path.relative_to(ROOT)) in LAZY_DOORS:
        return
    assert not any("integrations" in n for n in imports(path))


@pytest.mark.parametrize("op", sorted(OPS))
def test_an_op_imports_no_other_op(op):
    named = {
        n.split(".")[1] for n in imports(ROOT / "attnkit" / f"{op}.py") if n.startswith("attnkit.") and len(n.split(".")) > 1
    }
    assert not named & (OPS - {op, "cache"}), "PageTable's home is the one op file that others may import"


def test_dispatch_imports_no_op():
    named = {n.split(".")[1] for n in imports(ROOT / "attnkit/dispatch.py") if n.startswith("attnkit.")}
    assert not named & OPS


PUBLIC = {"PageTable", "Sampled", "merge_states", "mla_decode", "mla_prefill", "paged_decode", "paged_prefill",
          "quantize_per_token", "quantize_weight", "rms_norm_quantize", "sample", "sample_from_hidden", "silu_mul_quantize", "w8a8_gemm", "write_kv"}  # fmt: skip


@pytest.mark.parametrize("path", files("integrations"), ids=lambda p: str(p.relative_to(ROOT)))
def test_integrations_use_public_names_only(path):
    named = {n for n in imports(path) if n.startswith("attnkit.") and not n.startswith("attnkit.integrations")}
    assert {n.split(".", 1)[1] for n in named} <= PUBLIC


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda").rglob("*.cu*")), ids=lambda p: p.name)
def test_cuda_sources_know_no_torch_or_python(path):
    includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
    assert not any(word in line for line in includes for word in ("torch", "ATen", "c10", "Python.h", "pybind"))


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda").rglob("*.cu*")), ids=lambda p: p.name)
def test_cuda_sources_want_no_headers(path):
    """NVRTC has none but its own: what nvcc takes from the standard library compiles there alone."""
    code = re.sub(r"//.*", "", path.read_text())
    assert "std::" not in code and not re.search(r"#include\s*<", code)


@pytest.mark.parametrize("path", sorted((ROOT / "csrc/cuda").rglob("*.cu*")), ids=lambda p: p.name)
def test_no_load_may_pass_the_wait_for_the_grid_before(path):
    """ptxas moved loads that are declared constant to before griddepcontrol.wait: what they read was not yet written."""
    code = re.sub(r"//.*", "", path.read_text())
    assert not re.search(r"\.global(\.\w+)*\.nc\b|__ldg\b|__restrict__", code)
