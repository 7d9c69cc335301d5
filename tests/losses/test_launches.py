"""How many kernels a loss is on Triton, counted in its interpreter."""

from __future__ import annotations

import pytest
import torch

from tests.ops.ratio_loss.test_cpu import Case as Ratio
from tests.ops.soft_confusion.cases import Case, schema_arguments, tensors

pytest.importorskip("triton", reason="the package triton is not installed")
interpreter = pytest.importorskip("triton.runtime.interpreter")
if torch.cuda.is_available():
    pytest.skip("on a GPU test_gpu.py counts the launches", allow_module_level=True)

OPERATORS = torch.ops.voxfuse_triton


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    names: list[str] = []
    call = interpreter.GridExecutor.__call__

    def counted(self, *arguments, **options):
        names.append(self.fn.__name__)
        return call(self, *arguments, **options)

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", counted)
    return names


# One program sums a whole sample; several do, and the last of them adds up.
@pytest.mark.parametrize("spatial", [(200,), (30_000,)])
def test_launches_of_a_loss(launches, spatial):
    case = Case(classes=3, spatial=spatial, target_dtype=torch.uint8)
    input, target, _ = tensors(case)
    arguments = schema_arguments(case)
    sums = OPERATORS.soft_confusion(input, target, None, *arguments, False)
    _, cotangents = OPERATORS.ratio_loss(sums, *Ratio().arguments())
    assert launches == ["_forward_resident", "_forward"]
    launches.clear()
    grad = OPERATORS.ratio_loss_backward(
        torch.ones((), dtype=torch.float64), cotangents, 0, False, 0
    )
    OPERATORS.soft_confusion_backward(grad, input, target, None, *arguments)
    assert launches == ["_backward", "_backward_resident"]
