"""hard_confusion on a GPU, against the reference."""

from __future__ import annotations

import pytest

from tests.ops.gpu import DEVICE
from tests.ops.hard_confusion.cases import HardCase, check, random_case
from voxfuse.contract import Decision

pytestmark = pytest.mark.gpu


def test_random_calls(gpu_operators):
    for seed in range(5000, 5300):
        check(random_case(seed), gpu_operators.hard_confusion, str(DEVICE))


@pytest.mark.parametrize("decision", list(Decision.__members__))
def test_many_blocks(gpu_operators, decision):
    for classes in (4, 117, 1500):
        case = HardCase(decision, classes, batch=1, spatial=(61, 50, 41 if classes < 200 else 1))
        check(case, gpu_operators.hard_confusion, str(DEVICE))
