"""What every operator promises on a GPU: equal bits, capture in a graph, no waiting for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.ops.gpu import (
    DEVICE,
    confusion_call,
    fusion_call,
    head_call,
    loss_call,
    on_device,
    synchronize,
)
from tests.ops.head_confusion import cases as head_cases
from tests.ops.overlap_add.cases import make_case
from tests.ops.ratio_loss.cases import FORMULA_CASES, statistics
from tests.ops.soft_confusion import cases as confusion_cases
from tests.ops.soft_confusion.cases import ConfusionCase

pytestmark = pytest.mark.gpu


def test_a_compiler_may_believe_the_fakes_of_the_others(gpu_operators):
    arguments = FORMULA_CASES[1].arguments()
    stats = statistics().to(DEVICE)
    torch.library.opcheck(gpu_operators.ratio_loss.default, (stats, *on_device(*arguments)))
    case = make_case((21, 18, 37), (8, 7, 16), 12)
    patches, *tables = on_device(case.patches, case.origins, case.rows, case.weights, None)
    torch.library.opcheck(gpu_operators.overlap_add.default, (patches, *tables, list(case.volume)))
    head = ConfusionCase(classes=3, spatial=(9, 8, 7), layout="channels_last")
    given = head_cases.head_tensors(head, 5, True, str(DEVICE))
    options = (*confusion_cases.schema_arguments(head), False, head_cases.CHUNK_BYTES)
    torch.library.opcheck(gpu_operators.head_confusion.default, (*given, *options))


def make_call(kind: str, operators: Any, backend: str) -> Callable[[], Any]:
    if kind == "loss":
        return loss_call(backend)
    if kind == "fusion":
        return fusion_call(operators)
    if kind == "head":
        return head_call(operators)
    classes, dtype = kind.split()
    return confusion_call(operators, int(classes), getattr(torch, dtype))


KINDS = [
    *(f"{classes} {dtype}" for classes in (2, 4, 16, 40, 150) for dtype in ("float32", "bfloat16")),
    "300 float32",
    "loss",
    "fusion",
    "head",
]


@pytest.mark.parametrize("kind", KINDS)
def test_same_bits_in_20_runs(kind, gpu_operators, gpu_backend):
    call = make_call(kind, gpu_operators, gpu_backend)
    first = [x.clone() for x in call()]
    for _ in range(19):
        assert all(torch.equal(a, b) for a, b in zip(first, call(), strict=True))


@pytest.mark.parametrize("kind", ["2 float32", "4 bfloat16", "40 float32", "loss", "fusion"])
def test_a_captured_graph_replays_the_same_bits(kind, gpu_operators, gpu_backend):
    call = make_call(kind, gpu_operators, gpu_backend)
    expected = [x.clone() for x in call()]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for _ in range(2):
        for x in captured:
            x.detach().fill_(77)
        graph.replay()
        synchronize()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("kind", ["2 float32", "40 float32", "300 float32", "loss", "fusion"])
def test_nothing_waits_for_the_device(kind, gpu_operators, gpu_backend):
    call = make_call(kind, gpu_operators, gpu_backend)
    call()
    synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
