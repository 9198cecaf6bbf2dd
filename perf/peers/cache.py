"""torch's indexed writes and its merging of partial results."""

from __future__ import annotations

from attnkit import reference
from attnkit.workload import Inputs
from attnkit.workload_cache import Merge, WriteKv
from perf.peers.base import Call, need


def torch_write(case: WriteKv, x: Inputs) -> Call:
    """An indexed write of keys and one of values."""
    need(not case.kv)
    k, v, kv, at = x["k"], x["v"], x["out"], (x["slots"] // case.S, x["slots"] % case.S)

    def run() -> None:
        kv[:, 0][at] = k
        kv[:, 1][at] = v

    return run


def torch_merge(case: Merge, x: Inputs) -> Call:
    parts = (x["a"], x["lse_a"], x["b"], x["lse_b"])
    return lambda: reference.merge_states(*parts)[0].to(x["a"].dtype)
