"""write_kv and merge_states on the CPU: csrc/cpu/cache.cpp. Slots are checked before anything is written."""

from __future__ import annotations

from torch import Tensor

from attnkit.backends.cpu import native
from attnkit.dispatch import Kernel, Plan
from attnkit.signature import MergeSig, WriteSig


def _write_supports(sig: WriteSig) -> str | None:
    if sig.dtype not in native.FLOATS:
        return f"k's dtype is {sig.dtype}, wanted float32, bfloat16 or float16"
    if sig.kv_dtype not in (sig.dtype, *native.QUANTISED):
        return f"kv's dtype is {sig.kv_dtype}, wanted {sig.dtype}, int8 or float8_e4m3fn"
    return native.unsupported(sig.device)


def _side(x: Tensor, cache: Tensor, scale: Tensor | None) -> tuple[int, ...]:
    return (
        x.data_ptr(), cache.data_ptr(), x.shape[2], *x.stride()[:2], *cache.stride()[:3],
        native.address(scale), 0 if scale is None else scale.stride(0),
    )  # fmt: skip


def _write(
    plan: Plan,
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    slots: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    sig: WriteSig = plan.sig
    native.module().cpu_write_kv(
        native.CODES[k.dtype], native.CODES[k_cache.dtype], sig.T, sig.Hkv, sig.P, sig.S, slots.data_ptr(),
        _side(k, k_cache, k_scale), _side(v, v_cache, v_scale), native.threads(), native.isa,
    )  # fmt: skip


def _merge_supports(sig: MergeSig) -> str | None:
    if sig.dtype not in native.FLOATS:
        return f"out's dtype is {sig.dtype}, wanted float32, bfloat16 or float16"
    return native.unsupported(sig.device)


def _merge(plan: Plan, out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, out: Tensor, lse: Tensor) -> None:
    sig: MergeSig = plan.sig
    native.module().cpu_merge_states(
        native.CODES[out.dtype], sig.rows, sig.Dv, out_a.data_ptr(), lse_a.data_ptr(), out_b.data_ptr(), lse_b.data_ptr(),
        out.data_ptr(), lse.data_ptr(), native.threads(), native.isa,
    )  # fmt: skip


WRITE_KV = Kernel("cpu", "cpu", _write_supports, _write)
MERGE = Kernel("cpu", "cpu", _merge_supports, _merge)
