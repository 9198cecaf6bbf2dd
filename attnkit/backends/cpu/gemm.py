# PLACEHOLDER until the real file of this room is written: overwrite it.
from attnkit.dispatch import Kernel


def _no(sig):
    return "not written yet"


def _launch(plan, *t):
    raise RuntimeError("not written yet")


W8A8_GEMM = Kernel("cpu", "cpu", _no, _launch)
QUANTIZE = Kernel("cpu", "cpu", _no, _launch)
