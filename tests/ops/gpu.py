"""What the tests on a GPU share: the device, and calls of every operator to repeat or capture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import voxfuse
from tests.ops.head_confusion import cases as head_cases
from tests.ops.soft_confusion import cases as confusion_cases
from tests.ops.soft_confusion.cases import ConfusionCase
from voxfuse.fusion.grids import plan_grid

DEVICE = torch.device("cuda")
REFERENCE = torch.ops.voxfuse_reference
HALF = (torch.float16, torch.bfloat16)


def on_device(*values: Any) -> list[Any]:
    """Tensors, and lists of them, on the GPU; other values as they are."""
    return [
        v.to(DEVICE) if isinstance(v, Tensor) else on_device(*v) if isinstance(v, list) else v
        for v in values
    ]


def synchronize() -> None:
    torch.cuda.synchronize(DEVICE)


def confusion_call(operators: Any, classes: int, dtype: torch.dtype) -> Callable[[], Any]:
    case = ConfusionCase(
        classes=classes, spatial=(40, 41, 42), dtype=dtype, target_dtype=torch.uint8
    )
    input, target, _ = confusion_cases.tensors(case, str(DEVICE))
    arguments = (input, target, None, *confusion_cases.schema_arguments(case))
    grad = torch.randn(2, classes, 4, dtype=torch.float64, device=DEVICE)
    return lambda: (
        operators.soft_confusion(*arguments, False),
        operators.soft_confusion_backward(grad, *arguments),
    )


def fusion_call(operators: Any) -> Callable[[], Any]:
    grid = plan_grid((40, 40, 40), (16, 16, 16), 0.5)
    tables = grid.tables("bspline")
    origins, rows, weights = on_device(tables.origins, tables.rows, tables.weights)
    patches = torch.randn(len(grid), 3, 16, 16, 16, device=DEVICE)
    grad = torch.randn(3, 40, 40, 40, device=DEVICE)
    return lambda: (
        operators.overlap_add(patches, origins, rows, weights, None, [40, 40, 40]),
        operators.overlap_add_backward(grad, origins, rows, weights, None),
    )


def head_call(operators: Any) -> Callable[[], Any]:
    case = ConfusionCase(batch=1, classes=117, spatial=(20, 21, 22), target_dtype=torch.uint8)
    given = head_cases.head_tensors(case, 32, True, str(DEVICE))
    options = confusion_cases.schema_arguments(case)
    grad = torch.randn(1, 117, 4, dtype=torch.float64, device=DEVICE)
    more = (*options, head_cases.CHUNK_BYTES)
    return lambda: (
        operators.head_confusion(*given, *options, False, head_cases.CHUNK_BYTES),
        *operators.head_confusion_backward(grad, *given, *more, True, True),
    )


def loss_call(backend: str) -> Callable[[], Any]:
    logits = torch.randn(2, 4, 24, 25, 26, device=DEVICE, requires_grad=True)
    labels = torch.randint(0, 4, (2, 1, 24, 25, 26), device=DEVICE, dtype=torch.uint8)
    module = voxfuse.TverskyCELoss(backend=backend)

    def call() -> Any:
        logits.grad = None
        value = module(logits, labels)
        value.backward()
        return value.detach(), logits.grad

    return call
