"""head_confusion on a GPU, against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from tests.ops.gpu import DEVICE, HALF
from tests.ops.head_confusion import cases as head_cases
from tests.ops.soft_confusion.cases import ConfusionCase

pytestmark = pytest.mark.gpu


HEADS = [
    (ConfusionCase(classes=3, spatial=(9, 8, 7)), 5),
    (ConfusionCase(classes=14, spatial=(9, 8, 7), weight=torch.float32, gamma=2.0), 32),
    (ConfusionCase(batch=1, classes=117, spatial=(12, 11, 10), target_dtype=torch.uint8), 32),
    (ConfusionCase(batch=1, classes=200, spatial=(9, 8, 7)), 24),
    (ConfusionCase(batch=1, classes=300, spatial=(6, 5, 4)), 8),
    (
        ConfusionCase(classes=5, activation="sigmoid", target="dense", target_dtype=torch.float32),
        16,
    ),
    (ConfusionCase(classes=5, layout="channels_last", spatial=(9, 8, 7), full=True), 16),
    (ConfusionCase(dtype=torch.float64), 4),
    *((ConfusionCase(batch=1, classes=40, spatial=(9, 8, 7), dtype=d), 32) for d in HALF),
]


@pytest.mark.parametrize(("case", "channels"), HEADS, ids=range(len(HEADS)))
def test_head_confusion(case, channels, gpu_operators):
    head_cases.check(case, channels, gpu_operators, device=str(DEVICE))
