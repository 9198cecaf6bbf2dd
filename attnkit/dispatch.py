"""From a signature to a plan: which kernel serves a call, with which config. One bounded cache.

Nothing here knows an op. An op hands over its KERNELS tuple, best first; the first kernel whose
``supports`` returns None serves. A plan is made once a signature and then costs one dictionary look-up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from attnkit import arch, settings
from attnkit.configs import Space, resolve
from attnkit.signature import Sig

#: Signatures differ by shape, so a server that sees every ragged length must not grow without end.
CACHE_SIZE = 4096


@dataclass(frozen=True, slots=True)
class Kernel:
    """One way to run an op.

    name      what receipts and test ids call it, e.g. "cuda_sm90"
    impl      what ``impl=`` selects: "cuda", "triton", "cpu", "torch" or "flashinfer"
    supports  signature -> None, or the reason why not
    launch    launch(plan, *tensors): writes the outputs among ``tensors``
    configs   the space to tune over, or None where there is nothing to tune
    """

    name: str
    impl: str
    supports: Callable[[Any], str | None]
    launch: Callable[..., None]
    configs: Space | None = None


@dataclass(slots=True, eq=False)
class Plan:
    """A chosen kernel and config. ``state`` is the kernel's own: what it prepares once a signature."""

    sig: Any
    kernel: Kernel
    config: Any
    origin: str  # "argument", "user cache", "shipped" or "default"
    launch: Callable[..., None]
    state: dict[str, Any] = field(default_factory=dict)


class PlanCache:
    """One op's plans by call key; forgets the oldest quarter when full."""

    __slots__ = ("plans",)

    def __init__(self) -> None:
        self.plans: dict[Hashable, Plan] = {}
        _CACHES.append(self)

    def get(self, key: Hashable) -> Plan | None:
        return self.plans.get(key)

    def put(self, key: Hashable, plan: Plan) -> Plan:
        if len(self.plans) >= CACHE_SIZE:
            for old in list(self.plans)[: CACHE_SIZE // 4]:
                self.plans.pop(old, None)
        self.plans[key] = plan
        if _watching:
            raise _Planned(plan)
        return plan


class _Planned(BaseException):
    """Carries a plan out of a call that ``plan_of`` watches."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


_CACHES: list[PlanCache] = []
_watching = False


def forget_plans() -> None:
    """Drop every cached plan: after tuning, or when a setting changed."""
    for cache in _CACHES:
        cache.plans.clear()


def plan_of(call: Callable[[], Any]) -> Plan:
    """The plan that ``call``, one call of an op, would run with. It is checked and planned, and not launched."""
    global _watching
    forget_plans()
    _watching = True
    try:
        call()
    except _Planned as planned:
        return planned.plan
    finally:
        _watching = False
        forget_plans()
    raise RuntimeError("plan_of: the call planned nothing, wanted a call of one of attnkit's ops")


def select(kernels: Sequence[Kernel], sig: Sig, impl: str | None = None) -> Kernel:
    """The first kernel that serves ``sig`` (and is of ``impl``, where one is named; a kernel's own name is one too).

    Raises ValueError for an ``impl`` the op does not have and RuntimeError, with every kernel's
    reason, where none serves.
    """
    impl = impl or settings.get().impl
    if impl is not None:
        known = sorted({k.impl for k in kernels})
        if impl not in known and all(k.name != impl for k in kernels):
            raise ValueError(f"{sig.op}: impl is {impl!r}, wanted one of {', '.join(known)}")
    reasons = []
    for kernel in kernels:
        if impl is not None and impl not in (kernel.impl, kernel.name):
            continue
        reason = kernel.supports(sig)
        if reason is None:
            return kernel
        reasons.append(f"  {kernel.name}: {reason}")
    raise RuntimeError(f"{sig.op}: no kernel serves this call on {sig.device}\n" + "\n".join(reasons))


def make_plan(kernels: Sequence[Kernel], sig: Sig, impl: str | None = None, config: Any = None) -> Plan:
    """Choose a kernel and its config for one signature."""
    kernel = select(kernels, sig, impl)
    if kernel.configs is None:
        if config is not None:
            raise ValueError(f"{sig.op}: kernel {kernel.name} takes no config, got {config!r}")
        return Plan(sig, kernel, None, "default", kernel.launch)
    chosen, origin = resolve(kernel.configs, sig, arch.of(sig.device), config)
    return Plan(sig, kernel, chosen, origin, kernel.launch)
