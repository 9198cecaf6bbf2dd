"""Builds attnkit._C and, where nvcc is found, the cubins of csrc/cuda.

An editable install where no NVIDIA driver is leaves the cubins out: nothing there could load them, and they take
minutes. A wheel and `build_ext --inplace` have them wherever nvcc is. ATTNKIT_NVCC names an nvcc, which every install
uses then, and says if empty that none is to be used.

Files named *_avx2.cpp and *_avx512.cpp get their instruction set's flags; every other file is built for
the baseline, so the module loads on any x86-64 (or other) machine and picks at run time.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import platform
import shutil
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86 = platform.machine() in ("x86_64", "AMD64")
ISA_FLAGS = {
    "_avx2": ["-mavx2", "-mfma", "-mf16c"],
    "_avx512": [
        "-mavx512f",
        "-mavx512bw",
        "-mavx512dq",
        "-mavx512vl",
        "-mavx512vnni",
        "-mavx512bf16",
        "-mfma",
        "-mf16c",
    ],
}


def _flags(source: str) -> list[str]:
    for suffix, flags in ISA_FLAGS.items():
        if Path(source).stem.endswith(suffix):
            return flags
    return []


class BuildExt(build_ext):
    """Compiles each file with its own flags, two at a time, skipping what has not changed."""

    def finalize_options(self) -> None:
        # One place for objects, whoever builds (pip, a wheel, build_ext --inplace), so that nothing is compiled twice.
        self.build_temp = str(ROOT / "build" / f"temp-{sys.implementation.cache_tag}-{platform.machine()}")
        super().finalize_options()

    def build_extension(self, ext: Pybind11Extension) -> None:
        compiler = self.compiler
        compile_one = compiler._compile

        def with_isa(obj, src, suffix, cc_args, extra, pp_opts):
            newest = max(p.stat().st_mtime for p in [Path(src), *(ROOT / "csrc").rglob("*.h")])
            if not (Path(obj).exists() and Path(obj).stat().st_mtime > newest):
                compile_one(obj, src, suffix, cc_args, [*extra, *_flags(src)], pp_opts)

        def compile_all(
            sources,
            output_dir=None,
            macros=None,
            include_dirs=None,
            debug=0,
            extra_preargs=None,
            extra_postargs=None,
            depends=None,
        ):
            macros, objects, post, pp_opts, build = compiler._setup_compile(
                output_dir, macros, include_dirs, sources, depends, extra_postargs
            )
            cc_args = compiler._get_cc_args(pp_opts, debug, extra_preargs)
            with ThreadPoolExecutor(os.cpu_count() or 2) as pool:
                list(pool.map(lambda o: with_isa(o, *build[o], cc_args, post, pp_opts), build))
            return objects

        compiler.compile = compile_all
        super().build_extension(ext)

    def run(self) -> None:
        super().run()
        if self.editable_mode and not has_driver() and not os.environ.get("ATTNKIT_NVCC"):
            print("CUDA kernels are left out: no NVIDIA driver was found (python setup.py build_ext --inplace compiles them)")
            return
        built = prebuild_cubins()
        if not self.inplace and not self.editable_mode:
            package = Path(self.build_lib) / "attnkit"
            self.copy_tree(str(ROOT / "csrc" / "cuda"), str(package / "cuda_source"))
            if built.is_dir():
                self.copy_tree(str(built), str(package / "cubins"))


def has_driver() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def prebuild_cubins() -> Path:
    """Compile the shipped CUDA builds into attnkit/cubins where nvcc is found; what is up to date is left.

    Without nvcc, and where a file fails to compile, the install goes on: NVRTC compiles on first use.
    The package is entered beside its __init__, which would import torch.
    """
    found = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    nvcc = os.environ.get("ATTNKIT_NVCC", found)
    package = types.ModuleType("attnkit")
    package.__path__ = [str(ROOT / "attnkit")]
    sys.modules["attnkit"] = package
    try:
        images = importlib.import_module("attnkit.backends.cuda.images")
        builds = importlib.import_module("attnkit.backends.cuda.builds")
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "attnkit"]:
            del sys.modules[name]
    if not nvcc:
        print("no nvcc: CUDA kernels will be compiled on first use")
        return images.PREBUILT
    try:
        made = images.prebuild(builds.shipped(), nvcc, jobs=os.cpu_count() or 2)
        print(f"CUDA kernels: {len(made)} compiled into {images.PREBUILT}")
    except RuntimeError as error:
        print(f"CUDA kernels will be compiled on first use: {error}")
    return images.PREBUILT


def sources() -> list[str]:
    found = [
        ROOT / "csrc/bindings.cpp",
        *sorted((ROOT / "csrc/cpu").glob("*.cpp")),
        *sorted((ROOT / "csrc/launch").glob("*.cpp")),
    ]
    return [str(p.relative_to(ROOT)) for p in found if X86 or not _flags(str(p))]


macos = sys.platform == "darwin"
extension = Pybind11Extension(
    "attnkit._C",
    sources(),
    cxx_std=17,
    include_dirs=["csrc"],
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", *([] if macos else ["-fopenmp"])],
    extra_link_args=[] if macos else ["-fopenmp", "-ldl"],
)

setup(ext_modules=[extension], cmdclass={"build_ext": BuildExt})
