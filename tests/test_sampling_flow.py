"""Plain draws of many rows of 16-bit logits, which the flow kernel takes: the reference's tokens, and nothing left behind."""

from __future__ import annotations

import pytest
import torch

from attnkit.backends.cuda.builds import sampling as builds
from tests.test_sampling_ring import CUDA, compare, gpu, repeat

#: (B, V, V with what lies between rows). One row a CTA and many; rows that end in a block, in four tokens, at odd addresses.
SHAPES = [
    (32, 131072, 131072),
    (128, 131072, 131072),
    (128, 151936, 151936),
    (270, 33000, 33000),
    (160, 32003, 32012),
    (128, 50257, 50257),
    (2000, 2500, 2500),
    (30, 1048576, 1048576),
]
TYPES = [torch.bfloat16, torch.float16]


def test_what_flows():
    assert all(builds.fits_lead(B, V, 132) for B, V, _ in SHAPES)
    assert builds.lead_bytes(builds.BF16, 132 * builds.LEAD_ROWS, 2048, 132) <= 227 * 1024


def test_ctas_have_whole_rows_or_parts_of_one():
    assert [builds.lead_ctas(B, 131072, 132) for B in (32, 64, 128, 132)] == [128, 128, 128, 132]
    assert builds.lead_ctas(128, 100352, 132) == 132  # a warp had four blocks instead of three
    assert builds.lead_ctas(100, 131072, 132) == 132 and builds.lead_ctas(256, 131072, 132) == 132  # few CTAs, many rows


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_same_tokens_as_the_reference(shape, dtype, impl, device):
    compare(shape, impl, device, dtype)


@gpu
@pytest.mark.parametrize(("impl", "device"), CUDA)
def test_launches_after_one_another(impl, device):
    repeat(impl, device, torch.bfloat16)
