"""A small call of every op, and how long the first takes on empty caches: `python -m perf.calls [--nvrtc]` prints JSON.

One process calls every op once, in turn, each a kernel nobody has loaded yet; torch, the device and attnkit's import are
paid before. --nvrtc hides the shipped cubins, as on a machine that got attnkit without them.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attnkit.workload import Case


def cases() -> dict[str, Case]:
    """The ops that have cases, small, in the form that most models call them in."""
    from attnkit.workload import Gemm, Quantize, Sample
    from attnkit.workload_attention import Decode, MlaDecode, MlaPrefill, Prefill
    from attnkit.workload_hidden import SampleFromHidden
    from attnkit.workload_quantize import RmsNormQuantize, SiluMulQuantize

    return {
        "paged_prefill": Prefill(B=2, L=300, Hq=32, Hkv=8),
        "paged_decode": Decode(B=2, L=300, Hq=32, Hkv=8),
        "paged_decode fp8 cache": Decode(B=2, L=300, Hq=32, Hkv=8, kv="fp8"),
        "mla_decode 16 heads": MlaDecode(B=2, L=300, H=16),
        "mla_decode 128 heads": MlaDecode(B=2, L=300, H=128),
        "mla_prefill": MlaPrefill(B=2, L=130, H=4),
        "w8a8_gemm M=16": Gemm(M=16, N=512, K=512),
        "w8a8_gemm M=256": Gemm(M=256, N=512, K=512),
        "quantize_per_token": Quantize(M=16, K=512),
        "rms_norm_quantize": RmsNormQuantize(M=16, K=512, residual=True),
        "silu_mul_quantize": SiluMulQuantize(M=16, K=512),
        "sample top-k top-p": Sample(B=2, V=32000, top_k=50, top_p=0.9),
        "sample temperature": Sample(B=2, V=32000),
        "sample_from_hidden": SampleFromHidden(B=2, V=32000, H=512),
    }


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """A call of every op, those of ``cases`` first."""
    import torch

    import attnkit

    device = torch.device("cuda")
    built = {name: (case, case.build(device)) for name, case in cases().items()}
    kv = torch.zeros(8, 2, 16, 8, 128, device=device, dtype=torch.bfloat16)
    k, v = torch.randn(2, 5, 8, 128, device=device, dtype=torch.bfloat16)
    latent, rope = (torch.randn(5, n, device=device, dtype=torch.bfloat16) for n in (512, 64))
    packed = torch.zeros(8, 64, 656, device=device, dtype=torch.uint8)
    slots = torch.arange(5, device=device)
    out, lse = torch.randn(2, 4, 32, 128, device=device, dtype=torch.bfloat16), torch.randn(2, 4, 32, device=device)
    for name, (case, x) in built.items():
        yield name, case.call(x)
    yield "write_kv", lambda: attnkit.write_kv(k, v, kv, slots)
    yield "write_latent", lambda: attnkit.write_latent(latent, rope, packed, slots)
    yield "merge_states", lambda: attnkit.merge_states(out[0], lse[0], out[1], lse[1])


def first_calls(nvrtc: bool) -> dict[str, float]:
    """Seconds of each op's first call, until the device is done."""
    import torch

    if nvrtc:
        from attnkit.backends.cuda import images

        images.PREBUILT = Path(os.devnull)
    torch.randn(8, device="cuda").sum().item()
    seconds = {}
    for name, call in calls():
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        seconds[name] = time.perf_counter() - start
        print(f"{name}: {seconds[name]:.2f} s", file=sys.stderr, flush=True)
    return seconds


def main() -> int:
    with tempfile.TemporaryDirectory() as empty:
        for name in ("ATTNKIT_CACHE_DIR", "TRITON_CACHE_DIR", "CUPY_CACHE_DIR", "CUDA_CACHE_PATH"):
            os.environ[name] = f"{empty}/{name.lower()}"
        print(json.dumps(first_calls("--nvrtc" in sys.argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
