"""What a device is: the few facts that configs and roofs need, read once a device."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True, slots=True)
class Arch:
    """
    name   the tuned file's stem and the receipt's name, e.g. "nvidia-h200" or "cpu-avx512"
    sm     compute capability times ten (90 for Hopper); 0 on a CPU
    sms    multiprocessors; on a CPU, threads
    smem   bytes of shared memory one block may have; 0 on a CPU
    l2     bytes of the last shared cache
    """

    name: str
    sm: int
    sms: int
    smem: int
    l2: int


@cache
def _cuda(index: int) -> Arch:
    p = torch.cuda.get_device_properties(index)
    smem = getattr(p, "shared_memory_per_block_optin", 0) or 99 * 1024
    name = p.name.lower().replace(" ", "-")
    return Arch(name, p.major * 10 + p.minor, p.multi_processor_count, smem, p.L2_cache_size)


@cache
def _cpu() -> Arch:
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return Arch(f"cpu-{capability}", 0, os.cpu_count() or 1, 0, 32 << 20)


def of(device: torch.device) -> Arch:
    if device.type == "cuda":
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)
    return _cpu()
