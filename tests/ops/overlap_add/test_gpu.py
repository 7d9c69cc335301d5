"""overlap_add on a GPU, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.gpu import DEVICE, HALF, REFERENCE, on_device
from tests.ops.overlap_add.cases import make_case

pytestmark = pytest.mark.gpu


FUSION = [
    dict(volume=(21, 18, 37), patch=(8, 7, 16), count=12, channels=5),
    dict(volume=(21, 18, 37), patch=(8, 7, 16), count=12, general=True),
    dict(volume=(21, 18, 37), patch=(8, 7, 15), count=12, dense=True, general=True),
    dict(volume=(40, 33), patch=(9, 16), count=9, channels=3),
    dict(volume=(200,), patch=(33,), count=9),
    dict(volume=(12, 12, 12), patch=(3, 3, 3), count=400),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF, torch.float64])
@pytest.mark.parametrize("options", FUSION, ids=range(len(FUSION)))
def test_overlap_add(options, dtype, gpu_operators, poisoned_memory):
    case = make_case(dtype=dtype, **options)
    tables = (case.origins, case.rows, case.weights, case.total)
    moved = on_device(*tables)
    volume = list(case.volume)
    wide = case.patches.double()
    magnitude = REFERENCE.overlap_add(wide.abs(), *tables, volume)
    expected = REFERENCE.overlap_add(wide, *tables, volume)
    actual = gpu_operators.overlap_add(case.patches.to(DEVICE), *moved, volume)
    assert actual.dtype == dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # Each of at most `count` terms and additions rounds once in the compute type, four times with
    # the weights; the result is rounded to its own type at the end.
    allowed = (4 + case.patches.shape[0]) * torch.finfo(compute).eps * magnitude
    allowed += torch.finfo(dtype).eps * expected.abs()
    # Half types have subnormal numbers where their relative precision ends.
    smallest = torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert bool(((actual.cpu().double() - expected).abs() <= allowed + smallest).all())

    grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    true = REFERENCE.overlap_add_backward(grad.double(), *tables)
    gradient = gpu_operators.overlap_add_backward(grad.to(DEVICE), *moved)
    allowed = 6 * torch.finfo(compute).eps * true.abs() + torch.finfo(dtype).eps * true.abs()
    assert bool(((gradient.cpu().double() - true).abs() <= allowed + smallest).all())


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_rings(axis, gpu_operators):
    case = make_case((9, 8, 20), (4, 5, 9), 10, channels=3)
    extent = list(case.volume)
    start, stop = 5, 5 + extent[axis] - 2
    tables = (case.origins + (axis == 0) * 3, case.rows, case.weights)
    rings = []
    for namespace, move in ((REFERENCE, list), (gpu_operators, lambda values: on_device(*values))):
        origins, rows, weights, patches = move([*tables, case.patches])
        device = patches.device
        total = torch.zeros(extent, dtype=torch.float64, device=device)
        namespace.overlap_weights_(total, origins, rows, weights, axis, start, stop)
        ring = torch.zeros(3, *extent, device=device)
        namespace.overlap_add_(ring, patches, origins, rows, weights, total, axis, start, stop)
        rings.append((total.cpu(), ring.cpu()))
    (true_total, expected), (total, actual) = rings
    assert true_total.count_nonzero() > 0
    torch.testing.assert_close(total, true_total, rtol=1e-13, atol=0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
