"""How many kernels a loss is: Triton's counted in its interpreter, CUDA's in the emulation."""

from __future__ import annotations

import pytest
import torch

from tests.emulation import emulator
from tests.ops.ratio_loss.cases import RatioCase
from tests.ops.soft_confusion.cases import ConfusionCase, schema_arguments, tensors

OPERATORS = torch.ops.voxfuse_triton


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    pytest.importorskip("triton", reason="the package triton is not installed")
    if torch.cuda.is_available():
        pytest.skip("on a GPU test_gpu.py counts the launches")
    from triton.runtime import interpreter

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
    case = ConfusionCase(classes=3, spatial=spatial, target_dtype=torch.uint8)
    input, target, _ = tensors(case)
    arguments = schema_arguments(case)
    sums = OPERATORS.soft_confusion(input, target, None, *arguments, False)
    _, cotangents = OPERATORS.ratio_loss(sums, *RatioCase().arguments())
    assert launches == ["forward_resident", "forward"]
    launches.clear()
    grad = OPERATORS.ratio_loss_backward(
        torch.ones((), dtype=torch.float64), cotangents, 0, False, 0
    )
    OPERATORS.soft_confusion_backward(grad, input, target, None, *arguments)
    assert launches == ["backward", "backward_resident"]


@emulator.NEEDED
@pytest.mark.usefixtures("one_thread")
def test_a_loss_is_two_launches_forward_and_two_backward(tmp_path):
    logs = [tmp_path / name for name in ("confusion", "ratio")]
    confusion = emulator.SoftConfusion(EMULATION_LOG=str(logs[0]))
    ratio = emulator.RatioLoss(EMULATION_LOG=str(logs[1]))
    for classes in (2, 9, 20, 300):
        input, target, _ = tensors(ConfusionCase(classes=classes, spatial=(3000,)))
        arguments = schema_arguments(ConfusionCase())
        before = sum(map(len, (confusion.launched(logs[0]), ratio.launched(logs[1]))))
        sums = confusion.soft_confusion(input, target, None, *arguments, False)
        _, cotangents = ratio.ratio_loss(sums, *RatioCase(denominator=(1.0, 0.3, 0.7)).arguments())
        forward = sum(map(len, (confusion.launched(logs[0]), ratio.launched(logs[1]))))
        grad = ratio.ratio_loss_backward(torch.ones(()), cotangents, 0, False, 0)
        confusion.soft_confusion_backward(grad, input, target, None, *arguments)
        backward = sum(map(len, (confusion.launched(logs[0]), ratio.launched(logs[1]))))
        assert (forward - before, backward - forward) == (2, 2)
    confusion.close()
    ratio.close()
