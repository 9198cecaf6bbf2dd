"""Configs of sample_from_hidden's sm_90a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from attnkit.arch import Arch
from attnkit.backends.cuda.builds import hidden as builds
from attnkit.configs import Space, pow2
from attnkit.signature import HiddenSig


@dataclass(frozen=True, slots=True)
class HiddenConfig:
    """
    stages  slices in flight, if there is room
    ahead   slices that L2 is asked for while the previous launch still runs
    """

    stages: int
    ahead: int


def default(sig: HiddenSig, arch: Arch) -> HiddenConfig:
    return HiddenConfig(builds.stages(sig.B), 4)


def candidates(sig: HiddenSig, arch: Arch) -> list[HiddenConfig]:
    base = default(sig, arch)
    return list(dict.fromkeys([base, *(HiddenConfig(n, a) for n in (base.stages, base.stages - 1) for a in (0, 2, 4))]))


def bucket(sig: HiddenSig) -> str:
    return f"B{pow2(sig.B)}-V{pow2(sig.V)}-H{pow2(sig.H)}"


CUDA = Space(
    "sample_from_hidden", "cuda_sm90", HiddenConfig, default, candidates, bucket,
    sources=("csrc/cuda/hidden/hidden_sm90.cuh", "csrc/cuda/hidden/hidden_draw_sm90.cuh"),
    smem=lambda c, sig: builds.shared_bytes(sig.B, c.stages),
)  # fmt: skip
