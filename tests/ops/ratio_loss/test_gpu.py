"""ratio_loss on a GPU, against the reference."""

from __future__ import annotations

import pytest
import torch

from tests.ops.gpu import DEVICE, REFERENCE, on_device
from tests.ops.ratio_loss.cases import FORMULA_CASES, statistics

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", FORMULA_CASES, ids=range(len(FORMULA_CASES)))
def test_ratio_loss(case, gpu_operators):
    stats, arguments = statistics(), case.arguments()
    moved = on_device(*arguments)
    actual, slopes = gpu_operators.ratio_loss(stats.to(DEVICE), *moved)
    expected, expected_slopes = REFERENCE.ratio_loss(stats, *arguments)
    # The arithmetic is float64 in both; powers and logarithms may differ in their last bits.
    tolerance = {"rtol": 1e-11 if case.double_loss else 1e-6, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(actual.cpu(), expected, **tolerance)
    close = {"rtol": 1e-10, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(slopes.cpu(), expected_slopes, **close)
    grad = torch.rand(expected.shape, dtype=expected.dtype)
    where = (case.first_class, case.batch, case.class_pooling)
    gradient = gpu_operators.ratio_loss_backward(grad.to(DEVICE), slopes, *where)
    exact = REFERENCE.ratio_loss_backward(grad, slopes.cpu(), *where)
    torch.testing.assert_close(gradient.cpu(), exact, rtol=0, atol=0, equal_nan=True)
