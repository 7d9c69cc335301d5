"""hard_confusion's CUDA kernel, emulated on the host under sanitizers, against the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.emulation import emulator
from tests.emulation.hard_confusion import HardConfusion
from tests.ops.hard_confusion.cases import FLOATS, HardCase, check, random_case
from voxfuse.contract import Decision

pytestmark = [emulator.NEEDED, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def hard_confusion() -> Iterator[Callable[..., Tensor]]:
    operators = HardConfusion()
    yield operators.hard_confusion
    operators.close()


@pytest.mark.parametrize("part", range(4))
def test_random_calls(hard_confusion, part):
    for seed in range(3000 + part, 3240, 4):
        check(random_case(seed, most_voxels=150), hard_confusion)


@pytest.mark.parametrize("decision", list(Decision.__members__))
def test_several_chunks_of_a_block_and_several_blocks(hard_confusion, decision):
    """Whole runs that are read as vectors, and the end of a volume."""
    for classes in (3, 12):
        case = HardCase(decision, classes, batch=1, spatial=(4, 700), mask=torch.bool)
        check(case, hard_confusion)
        for dtype in FLOATS[1:]:
            check(dataclasses.replace(case, dtype=dtype, ignore_index=1), hard_confusion)


def test_a_block_takes_several_chunks_where_there_are_many_samples(hard_confusion):
    check(HardCase("labels", 9, batch=513, spatial=(1030,)), hard_confusion)


@pytest.mark.parametrize("decision", list(Decision.__members__))
def test_more_classes_than_are_counted_at_one_time(hard_confusion, decision):
    for classes in (1024, 1025):
        case = HardCase(decision, classes, batch=2, spatial=(9,), ignore_index=1023)
        check(case, hard_confusion)
    if decision == "argmax":
        check(dataclasses.replace(case, target="dense", batch=1, spatial=(3,)), hard_confusion)
    check(HardCase("labels", 5000, spatial=(900,)), hard_confusion)


def test_labels_without_a_class_do_not_count(hard_confusion):
    """No error on a GPU, where it would have to be waited for."""
    nan = float("nan")
    logits = torch.tensor([[[1.0, 0, 0, 0, 0, 0], [0, 1.0, 1, 1, 1, 1]]])
    labels = torch.tensor([[0, 1, 2, -1, 0.5, nan]])
    expected = torch.tensor([[[1, 0, 0, 1], [1, 0, 0, 1]]])
    assert torch.equal(hard_confusion(logits, labels, None, 0, 0.0, None, None), expected)
    assert torch.equal(hard_confusion(labels, logits.argmax(1), None, 2, 0.0, 2, None), expected)
    # Of a target with a value a class, for that class alone.
    dense = torch.tensor([[[1.0, 0, 7, nan, 0, 0], [0, 1, 1, 1, 1, 0.5]]])
    counts = hard_confusion(logits, dense, None, 0, 0.0, None, None)
    assert torch.equal(counts, torch.tensor([[[1, 0, 0, 3], [4, 0, 0, 1]]]))
