"""hard_confusion's Triton kernel: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.ops.hard_confusion.cases import FLOATS, HardCase, arguments, check, random_case
from voxfuse.contract import Decision

pytest.importorskip("triton", reason="the package triton is not installed")

pytestmark = pytest.mark.filterwarnings(
    # NumPy, which computes in the interpreter's place of a GPU, warns of NaN and infinities.
    "ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def run(case: HardCase) -> None:
    check(case, torch.ops.voxfuse_triton.hard_confusion, DEVICE)


@pytest.mark.parametrize("part", range(4))
def test_random_calls(part):
    for seed in range(4000 + part, 4100, 4):
        run(random_case(seed, most_voxels=100))


@pytest.mark.parametrize("decision", list(Decision.__members__))
def test_several_blocks_and_tiles_of_classes(decision):
    for classes in (3, 21):
        case = HardCase(decision, classes, spatial=(4, 290), mask=torch.bool, ignore_index=1)
        run(case)
        for dtype in FLOATS:
            run(dataclasses.replace(case, dtype=dtype, spatial=(520,)))


def test_labels_without_a_class_do_not_count():
    """No error on a GPU, where it would have to be waited for."""
    nan = float("nan")
    operator = torch.ops.voxfuse_triton.hard_confusion
    logits = torch.tensor([[[1.0, 0, 0, 0, 0, 0], [0, 1.0, 1, 1, 1, 1]]], device=DEVICE)
    labels = torch.tensor([[0, 1, 2, -1, 0.5, nan]], device=DEVICE)
    expected = [[[1, 0, 0, 1], [1, 0, 0, 1]]]
    assert operator(logits, labels, None, 0, 0.0, None, None).tolist() == expected
    assert operator(labels, logits.argmax(1), None, 2, 0.0, 2, None).tolist() == expected
    dense = torch.tensor([[[1.0, 0, 7, nan, 0, 0], [0, 1, 1, 1, 1, 0.5]]], device=DEVICE)
    counts = operator(logits, dense, None, 0, 0.0, None, None)
    assert counts.tolist() == [[[1, 0, 0, 3], [4, 0, 0, 1]]]


@pytest.mark.skipif(DEVICE == "cuda", reason="the property is the wrapper's, not the device's")
def test_opcheck():
    given = arguments(HardCase(mask=torch.bool, ignore_index=1))
    torch.library.opcheck(torch.ops.voxfuse_triton.hard_confusion.default, given)
