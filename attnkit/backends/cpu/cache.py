# PLACEHOLDER until the real file of this room is written: overwrite it.
from attnkit.dispatch import Kernel


def _no(sig):
    return "not written yet"


def _launch(plan, *t):
    raise RuntimeError("not written yet")


WRITE_KV = Kernel("cpu", "cpu", _no, _launch)
MERGE = Kernel("cpu", "cpu", _no, _launch)
