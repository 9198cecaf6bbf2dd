"""write_latent: new latents into an fp8 latent cache, which mla_decode reads."""

from __future__ import annotations

import torch
from torch import Tensor

from attnkit import attention, check, registry, settings
from attnkit.backends import torch_ref
from attnkit.backends.cuda import latent as cuda_latent
from attnkit.backends.triton import latent as triton_latent
from attnkit.dispatch import PlanCache, make_plan
from attnkit.keys import call_key
from attnkit.signature import WriteLatentSig

OP = "write_latent"
KERNELS = (cuda_latent.WRITE_LATENT, triton_latent.WRITE_LATENT, torch_ref.WRITE_LATENT)
_PLANS = PlanCache()


def write_latent(latent: Tensor, rope: Tensor, cache: Tensor, slots: Tensor, *, impl: str | None = None) -> None:
    """Quantise new latents into the cache, 656 bytes a token, as vLLM lays out its fp8 cache for DeepSeek's MLA.

    latent  [T, 512]; bf16, fp16 or fp32
    rope    [T, 64]: the shared rope key, latent's dtype; kept as bf16
    cache   uint8 [P, S, 656]: 512 e4m3 values, a float32 scale for each 128 of them, 64 bf16 of rope
    slots   [T] int64: page * S + offset; -1 skips a row (a padded row of a captured batch)

    A scale is the block's largest magnitude / 448, and 1 for zeros; values are divided by it and rounded half to even. A
    block that holds NaN or infinity is NaN. A slot outside the pool raises under ATTNKIT_DEBUG=1 and is skipped otherwise;
    one given twice holds one of the two rows.
    """
    (_write_op if registry.traced(latent) else _run)(latent, rope, cache, slots, impl)


def _run(latent, rope, cache, slots, impl) -> None:
    tensors = (latent, rope, cache, slots)
    key = call_key(tensors, (impl,))
    plan = _PLANS.get(key)
    if plan is None:
        plan = _PLANS.put(key, make_plan(KERNELS, _signature(*tensors), impl))
    if settings.get().debug:
        check.slot_values(OP, slots, cache.shape[0] * cache.shape[1])
    if slots.numel():
        plan.launch(plan, *tensors)


def _signature(latent, rope, cache, slots) -> WriteLatentSig:
    a = check.Letters(OP, latent.device)
    a.tensor("latent", latent, f"T {attention.LATENT}", check.FLOATS)
    a.tensor("rope", rope, f"T {attention.LATENT_ROPE}", (latent.dtype,))
    a.tensor("cache", cache, f"P S {attention.LATENT_ROW}", (torch.uint8,))
    a.tensor("slots", slots, "T", (torch.int64,))
    n = a.size
    return WriteLatentSig(
        op=OP, device=latent.device, dtype=latent.dtype, T=n["T"], P=n["P"], S=n["S"], latent_stride=latent.stride(),
        rope_stride=rope.stride(), cache_stride=cache.stride(), aligned=check.aligned16(cache),
        sources_aligned=check.aligned16(latent, rope),
    )  # fmt: skip


_write_op = registry.define("write_latent(Tensor latent, Tensor rope, Tensor(a!) cache, Tensor slots, str? impl) -> ()", _run)
