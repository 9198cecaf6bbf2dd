"""A call's key: what must tell two calls apart does, and nothing else; read through the exchange table or attribute by attribute."""

from __future__ import annotations

import pytest
import torch

from attnkit import keys

X = torch.zeros(4, 6, 16, dtype=torch.bfloat16)
READERS = [keys._by_attributes]
if keys._describe is not keys._by_attributes:
    READERS.append(keys._describe)


@pytest.fixture(params=READERS, ids=["attributes", "table"][: len(READERS)])
def described(request, monkeypatch):
    monkeypatch.setattr(keys, "_describe", request.param)
    return lambda *tensors: keys.call_key(tensors, (1.0, None))


def test_what_tells_calls_apart(described):
    others = {
        "shape": X[:3],
        "dimensions": X[0],
        "dtype": X.half(),
        "quantised": X.to(torch.float8_e4m3fn),
        "integers of a float's size": X.view(torch.int16),
        "stride": torch.zeros(4, 6, 32, dtype=torch.bfloat16)[..., :16],
        "transposed": torch.zeros(6, 4, 16, dtype=torch.bfloat16).transpose(0, 1),
        "broken alignment": torch.zeros(4 * 6 * 16 + 1, dtype=torch.bfloat16)[1:].view(4, 6, 16),
        "empty": X[:0],
    }
    seen = {described(X, None): "itself"}
    for what, other in others.items():
        assert seen.setdefault(described(other, None), what) == what
    assert described(None, X) != described(X, None) != described(X, X)
    assert keys.call_key((X,), (1,)) != keys.call_key((X,), (2,))


def test_what_does_not(described):
    filled = torch.full_like(X, float("nan"))
    shifted = torch.zeros(4 * 6 * 16 + 8, dtype=torch.bfloat16)[8:].view(4, 6, 16)
    assert described(X, None) == described(filled, None) == described(shifted, None)
    assert described(torch.nn.Parameter(X), None) == described(X, None)


def test_two_tensors_do_not_run_together(described):
    """[2, 3] beside [4] is not [2] beside [3, 4], whatever stands where in the key."""
    a, b, c, d = (torch.zeros(*shape) for shape in ((2, 3), (4,), (2,), (3, 4)))
    assert described(a, b) != described(c, d)


@pytest.mark.gpu
def test_devices_are_told_apart(described):
    assert described(X) != described(X.cuda()) == described(torch.empty_like(X, device="cuda"))


class Marked(torch.Tensor):
    pass


def test_what_the_table_does_not_know_is_read_by_attributes():
    for other in (X.as_subclass(Marked), [1, 2]):
        assert keys.call_key((other,), ()) == (keys._by_attributes(other), ())
    many = [torch.zeros([1] * 20) for _ in range(12)]
    assert keys.call_key(tuple(many), ()) == (keys._by_attributes(*many), ())
    meta = torch.zeros(4, device="meta")
    assert keys.call_key((meta,), ()) != keys.call_key((torch.zeros(4),), ())
