"""finalize_slab on a GPU, against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.ops.finalize_slab.cases import MODES, finalized
from tests.ops.gpu import DEVICE
from voxfuse.ops.finalize_slab import finalize_slab

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("activation", ["identity", "softmax"])
@pytest.mark.parametrize("mode", MODES)
def test_finalize_slab(mode, activation, gpu_backend):
    if mode == "entropy" and activation == "identity":
        ring = torch.randn(5, 12, 9, 17).softmax(0)
    else:
        ring = torch.randn(5, 12, 9, 17, generator=torch.Generator().manual_seed(0))
    options = {"activation": activation, "applied": False}
    arguments = (mode, 0, 10, 15, 5, torch.float32)
    expected, cleared = finalized("reference", ring, *arguments, **options)
    out = torch.full(expected.shape, 77, dtype=expected.dtype, device=DEVICE)
    left = ring.to(DEVICE)
    finalize_slab(left, out, mode, ring_axis=0, start=10, stop=15, backend=gpu_backend, **options)
    torch.testing.assert_close(left.cpu(), cleared, rtol=0, atol=0)
    exact = out.dtype == torch.uint8
    tolerance = {"rtol": 0, "atol": 0} if exact else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(out.cpu(), expected, **tolerance)
