"""w8a8_gemm for few tokens by csrc/cuda/gemm/gemm_skinny_sm90.cu: says what it serves, picks the build, fills the struct."""

from __future__ import annotations

from typing import Any

import torch

from attnkit import arch
from attnkit.backends.cuda import images, launch, w8a8
from attnkit.backends.cuda.builds import gemm_skinny as builds
from attnkit.configs import gemm_skinny as configs
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import GemmSig

NAME = "attnkit_w8a8_gemm_skinny"
#: struct SkinnyParams of csrc/cuda/gemm/gemm_skinny_sm90.cuh
PARAMS = w8a8.fields(
    "M", "N", "steps", "tiles", "splits", "stages", "a_rows", "ahead", "a_scales", "w_scales", "bias_type", "out_type", "whole"
)


def _supports(sig: GemmSig) -> str | None:
    here = arch.of(sig.device)
    many = f"M is {sig.M}: up to {builds.LOW} tokens fit its one row of tiles, and up to {builds.TALL} where N comes out even"
    reason = w8a8.why_not(sig, many if sig.M > builds.LOW and not configs.fits_tall(sig, here) else None)
    return reason or launch.missing(_variant(sig, configs.default(sig, here)))


def _variant(sig: GemmSig, c: configs.SkinnyConfig) -> images.Variant:
    return builds.build(sig.dtype == torch.int8, c.block_n, c.tall, c.deep)


def _check(sig: GemmSig, c: configs.SkinnyConfig) -> None:
    """Raises ValueError for a config that the kernel has no build for, or no room."""
    widths, splits = builds.widths(sig.dtype == torch.int8, c.tall, c.deep), builds.splits(c.tall)
    if c.block_n not in widths or c.splits not in splits or sig.M > builds.tokens(c.tall):
        most = builds.tokens(c.tall)
        raise ValueError(f"{sig.op}: no build for {c}, wanted block_n one of {widths}, splits one of {splits}, M up to {most}")
    if c.splits > -(-sig.K // builds.slice_bytes(c.deep)):
        raise ValueError(f"{sig.op}: config.splits is {c.splits}, wanted a slice of K for each, and K is {sig.K}")
    if not 1 <= c.ctas <= 2 or configs.stages(c, sig) < 2:
        raise ValueError(f"{sig.op}: {c} leaves no room for two slices in shared memory")


def _prepare(plan: Plan) -> Any:
    sig, c = plan.sig, plan.config
    _check(sig, c)
    a_rows, tiles = builds.rows(sig.M), -(-sig.N // c.block_n)
    own = {
        "steps": -(-sig.K // builds.slice_bytes(c.deep)), "tiles": tiles, "splits": c.splits,
        "stages": configs.stages(c, sig), "a_rows": a_rows, "ahead": c.ahead, "a_scales": int(sig.a_scale_per_token),
        "w_scales": int(sig.w_scale_per_channel), "whole": int(sig.aligned and builds.lines(sig.M, c.ctas)),
    }  # fmt: skip
    kernel = launch.kernel(_variant(sig, c), NAME, launch.index_of(sig.device), configs.smem(c, sig))
    if c.splits == 1:  # a split ends with its one tile
        tiles = min(tiles, arch.of(sig.device).sms)
    return w8a8.prepared(PARAMS, kernel, sig, (a_rows, c.block_n), tiles * c.splits, builds.THREADS, c.splits, own)


W8A8_GEMM = Kernel("cuda_sm90_skinny", "cuda", _supports, w8a8.launcher(_prepare), configs.CUDA)
