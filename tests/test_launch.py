"""The CUDA launcher's host side, without a GPU: images and their cache, parameter structs, and every build's resources."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import struct
import subprocess
import warnings
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from attnkit import settings, workspace
from attnkit.backends.cuda import decode, images, launch, nvrtc
from attnkit.backends.cuda.builds import decode as builds
from attnkit.configs import decode_cuda

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc was not found")
BUILDS = builds.shipped()
#: Made on first use only: head sizes that no power of two of columns fills, and 8-bit rows beyond q's registers.
RARE = [
    builds.build_for(96, 96, builds.BF16, 8, 1, 2),
    builds.build_for(80, 80, builds.F16, 32, 4, 2),
    builds.build_for(256, 256, builds.E4M3, 16, 2, 1),
    builds.build_for(128, 128, builds.INT8, 32, 4, 1),
    builds.build_for(192, 128, builds.BF16, 16, 2, 1),
    builds.build_for(64, 64, builds.BF16, 8, 1, 1, heads=2),
]


def ptxas_report(v: images.Variant, folder) -> str:
    """What the compiler says of a build: registers, stack, spills, and products it had to put in order."""
    command = [NVCC, "-cubin", *images.options(v), "-gencode", "arch=compute_90a,code=sm_90a", "-Xptxas", "-v",
               str(images.source_dir() / v.source), "-o", str(folder / "kernel.cubin")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def label(build: builds.Build) -> str:
    return build.variant.label


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty user cache, no shipped cubins, and a stand-in for the compiler that counts its calls."""
    monkeypatch.setenv("ATTNKIT_CACHE_DIR", str(tmp_path))
    settings.reload()
    calls = []

    def compile_cubin(source, name, options):
        calls.append((name, tuple(options)))
        return b"\x7fELF" + name.encode()

    monkeypatch.setattr(images, "PREBUILT", tmp_path / "none")
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "compile_cubin", compile_cubin)
    images.image.cache_clear()
    images._warned.clear()
    yield calls
    images.image.cache_clear()
    monkeypatch.undo()
    settings.reload()


VARIANT = BUILDS[0].variant


def again() -> bytes:
    """What the next process would get."""
    images.image.cache_clear()
    return images.image(VARIANT)


def test_an_image_is_compiled_once_and_then_cached(cache):
    first = images.image(VARIANT)
    assert first == again() == b"\x7fELF" + f"{VARIANT.label}.cu".encode()
    assert len(cache) == 1
    assert "--gpu-architecture=sm_90a" in cache[0][1]
    assert images.cached_path(VARIANT).is_file()


def test_a_prebuilt_image_comes_first(cache):
    path = images.prebuilt_path(VARIANT)
    path.parent.mkdir()
    path.write_bytes(b"shipped")
    assert images.image(VARIANT) == b"shipped"
    assert cache == []


def test_the_key_follows_source_macros_and_compiler(cache, monkeypatch):
    other = BUILDS[1].variant
    before = images.key(VARIANT)
    path = images.cached_path(VARIANT)
    assert before != images.key(other)
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    assert images.cached_path(VARIANT) != path
    monkeypatch.setattr(images, "_flat", lambda source: "another text")
    assert images.key(VARIANT) != before


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "foreign"])
def test_a_damaged_entry_is_set_aside_with_one_warning(cache, damage):
    good = images.image(VARIANT)
    path = images.cached_path(VARIANT)
    data = path.read_bytes()
    spoilt = {"truncated": data[:-3], "flipped": data[:-1] + b"!", "empty": b"", "foreign": b"#!/bin/sh\n"}[damage]
    path.write_bytes(spoilt)
    with pytest.warns(RuntimeWarning, match=re.escape(path.name)) as seen:
        assert again() == good
    assert len(seen) == 1
    assert path.with_suffix(".corrupt").read_bytes() == spoilt
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert again() == good
    assert len(cache) == 2


def test_a_cache_that_cannot_be_written_costs_one_warning(cache, tmp_path):
    (tmp_path / "cubins").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot") as seen:
        assert images.image(VARIANT).startswith(b"\x7fELF")
    assert all(str(tmp_path / "cubins") in str(w.message) for w in seen)


def _write(folder: str, worker: int, rounds: int) -> None:
    from pathlib import Path

    body = b"image" * 20000
    for _ in range(rounds):
        path = Path(folder) / "kernel.cubin"
        images.write_entry(path, body)
        assert images.read_entry(path) == body


def test_eight_processes_write_one_entry(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write, args=(str(tmp_path), i, 20)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [w.exitcode for w in workers] == [0] * 8
    assert sorted(os.listdir(tmp_path)) == ["kernel.cubin"]


def test_no_compiler_is_said_with_its_reason(cache, monkeypatch):
    def absent():
        raise RuntimeError("NVRTC was not found (pip install nvidia-cuda-nvrtc)")

    monkeypatch.setattr(nvrtc, "version", absent)
    with pytest.raises(RuntimeError, match=r"no prebuilt cubin in .*none can be compiled: NVRTC was not found"):
        images.image(VARIANT)
    launch.missing.cache_clear()
    reason = launch.missing(VARIANT)
    launch.missing.cache_clear()
    assert reason is not None and "NVRTC was not found" in reason


def test_without_a_gpu_the_reason_is_the_drivers():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    _C = pytest.importorskip("attnkit._C")
    assert "CUDA" in _C.cuda_unavailable() or "device" in _C.cuda_unavailable()
    with pytest.raises(RuntimeError, match="CUDA"):
        _C.CudaKernel(b"", "none", 0, 0)


def test_flattened_source_has_every_header_once():
    for source in {b.source for b in BUILDS}:
        text = images.flatten(images.source_dir() / source)
        assert '#include "' not in text and "#pragma once" not in text
        assert text.count("struct DecodeParams {") == 1


def struct_of(source: str, name: str) -> list[str]:
    """Member names of a struct in a CUDA source, in order."""
    body = re.search(rf"struct {name} \{{(.*?)\n\}};", images.flatten(images.source_dir() / source), re.DOTALL)[1]
    code = re.sub(r"//[^\n]*", "", body)
    return [re.sub(r".*[ *]", "", member.strip()) for line in code.split(";") for member in line.split(",") if member.strip()]


def test_params_mirror_the_struct():
    """A member added on one side only would shift all behind it."""
    maps = [name for name in decode.PARAMS.offsets if name.endswith("_map")]
    assert struct_of("decode/decode_sm90.cu", "DecodeParams") == [*maps, *decode.PARAMS.names]


def test_fields_pack_at_their_offsets():
    data = decode.PARAMS.pack({"out": 7, "B": 3, "scale": 0.5})
    assert struct.unpack_from("<q", data, decode.PARAMS.offsets["out"]) == (7,)
    ints = decode.PARAMS.offsets["tree_j"] + 8
    assert struct.unpack_from("<i", data, ints) == (3,)
    with pytest.raises(KeyError, match="no such parameter: nonsense"):
        decode.PARAMS.pack({"nonsense": 1})


def test_tiles_follow_from_the_shape_not_the_config():
    """Batch invariance: a config may not change how many keys a tile has."""
    for D in (64, 128, 256):
        for kv in range(4):
            for rows in (1, 8, 16, 64):
                assert len({builds.build_for(D, D, kv, rows, 1, ctas).tile for ctas in (1, 2)}) == 1


def test_every_build_fits_shared_memory():
    for build in [*BUILDS, *RARE]:
        used = build.fixed_bytes + build.stages * build.stage_bytes
        assert build.stages >= 2
        assert build.ctas_per_sm * (used + 1024) <= 228 * 1024
    assert decode_cuda.CUDA.Config is decode_cuda.CudaConfig


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("build", [*BUILDS, *RARE], ids=label)
def test_builds_compile_for_sm_90a_without_spills(build, tmp_path):
    report = ptxas_report(build.variant, tmp_path)
    stack, stores, loads = map(
        int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report).groups()
    )
    assert (stack, stores, loads) == (0, 0, 0)
    registers = int(re.search(r"Used (\d+) registers", report)[1])
    # registers are given out by warp, in steps of 8 a thread, and each quarter of a multiprocessor has 512 x 32
    warps_a_quarter = -(-build.threads // 32 * build.ctas_per_sm // 4)
    assert -(-registers // 8) * 8 * warps_a_quarter <= 512
    assert "smem" not in report  # all of it dynamic: what Build.fixed_bytes and stage_bytes say


@needs_nvcc
@pytest.mark.slow
def test_prebuild_makes_what_is_missing_and_drops_the_rest(tmp_path):
    old = tmp_path / "decode_sm90-0.cubin"
    old.write_bytes(b"of an older source")
    made = images.prebuild([VARIANT], NVCC, into=tmp_path)
    assert [p.name for p in made] == [images.prebuilt_path(VARIANT).name]
    assert made[0].read_bytes().startswith(b"\x7fELF") and not old.exists()
    assert images.prebuild([VARIANT], NVCC, into=tmp_path) == []


@needs_nvcc
@pytest.mark.slow
def test_a_source_that_does_not_compile_says_so(tmp_path, monkeypatch):
    (tmp_path / "broken.cu").write_text("this is no CUDA\n")
    monkeypatch.setattr(images, "source_dir", lambda: tmp_path)
    images._flat.cache_clear()
    with pytest.raises(RuntimeError, match=r"nvcc could not compile broken"):
        images.prebuild([images.Variant("broken.cu")], NVCC, into=tmp_path / "out")
    images._flat.cache_clear()


def test_nvrtc_reports_its_log():
    try:
        nvrtc.version()
    except RuntimeError as error:
        pytest.skip(str(error))
    with pytest.raises(RuntimeError, match="could not compile broken.cu"):
        nvrtc.compile_cubin("this is no CUDA", "broken.cu", ["--gpu-architecture=sm_90a"])


def test_scratch_is_kept_a_stream_and_made_anew_in_a_capture(monkeypatch):
    """On CPU memory, with the driver's answer given by hand."""
    capturing = 0
    monkeypatch.setattr(launch, "compiled", lambda: SimpleNamespace(cuda_capture_id=lambda stream: capturing))
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    asked = []
    real = workspace.counters
    monkeypatch.setattr(workspace, "counters", lambda device, n: asked.append(n) or real(device, n))
    sig = SimpleNamespace(device=torch.device("cpu"))
    plan = SimpleNamespace(sig=sig, state={"index": 0, "scratch": {}, "partial_bytes": 4096, "counters": 12})
    first = launch.scratch(plan, 1)
    assert all(first) and launch.scratch(plan, 1) == first and asked == [12]
    launch.scratch(plan, 2)
    assert asked == [12, 12] and set(plan.state["scratch"]) == {1, 2}
    capturing = 7
    launch.scratch(plan, 1)
    assert asked == [12, 12, 12]
    plan.state["partial_bytes"] = 0
    assert launch.scratch(plan, 3)[0] == 0 and 3 not in plan.state["scratch"]
