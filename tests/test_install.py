"""A wheel and an editable install both import, with triton_kernels and integrations inside attnkit."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IMPORTS = (
    "import pathlib, attnkit, attnkit._C, attnkit.triton_kernels, attnkit.integrations.engine;"
    "print(pathlib.Path(attnkit.__file__).parent);"
    "print(pathlib.Path(attnkit.integrations.__file__).parent)"
)


def run(*args: str, cwd: Path, **env: str) -> str:
    done = subprocess.run(args, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_editable_install_imports_from_the_tree(tmp_path):
    """From another folder, so that only the installed mapping can find it."""
    package, integrations = run(sys.executable, "-c", IMPORTS, cwd=tmp_path).split()
    if not Path(package).is_relative_to(ROOT):
        pytest.skip("attnkit is not installed in editable mode here")
    assert Path(integrations) == ROOT / "integrations"


@pytest.mark.slow
def test_wheel_holds_and_imports_everything(tmp_path):
    """Cubins aside, which take minutes: their sources are what it can do without them."""
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "-w", str(tmp_path), cwd=tmp_path, ATTNKIT_NVCC="")
    (wheel,) = tmp_path.glob("attnkit-*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for wanted in (
        "attnkit/triton_kernels/decode.py",
        "attnkit/integrations/transformers.py",
        "attnkit/integrations/engine/checkpoints/tiny/model.safetensors",
        "attnkit/integrations/engine/checkpoints/draft/model.safetensors",
        "attnkit/py.typed",
        "attnkit/cuda_source/decode/decode_sm90.cu",
    ):
        assert wanted in names
    assert not any(n.split("/")[0] in ("tests", "perf", "triton_kernels", "integrations") for n in names)
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel), cwd=tmp_path)
    package, integrations = run(sys.executable, "-c", IMPORTS, cwd=tmp_path, PYTHONPATH=str(site)).split()
    assert Path(package) == site / "attnkit" and Path(integrations) == site / "attnkit/integrations"
