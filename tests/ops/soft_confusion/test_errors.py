"""Bad arguments of soft_confusion are errors that name them."""

from __future__ import annotations

import copy

import pytest
import torch

import voxfuse
from tests.ops.soft_confusion.cases import (
    ALL,
)
from voxfuse.ops.soft_confusion import validate_labels

# --- Bad input ------------------------------------------------------------------------------------


BAD = [
    (
        dict(input=torch.zeros(2)),
        ValueError,
        r"input: got shape \(2,\), expected \(B, C, \*spatial\)",
    ),
    (dict(input=torch.zeros(2, 0, 3)), ValueError, r"input: got shape \(2, 0, 3\)"),
    (dict(input=torch.zeros(1, 2, 4, dtype=torch.int64)), TypeError, "input: got int64 of shape"),
    (dict(input=[1.0]), TypeError, "input: expected a torch.Tensor, got a list of 1; for the"),
    (
        dict(target=torch.zeros(1, 5, dtype=torch.int64)),
        ValueError,
        r"target: got shape \(1, 5\), expected \(1, 4\) or \(1, 1, 4\) or \(1, 2, 4\)",
    ),
    (dict(target=torch.zeros(1, 4, dtype=torch.complex64)), TypeError, "target: got complex64"),
    (dict(target=torch.zeros(1, 2, 4, dtype=torch.complex64)), TypeError, "target: got complex64"),
    (dict(target=torch.zeros(1, 2, 4, requires_grad=True)), ValueError, "target: requires grad"),
    (dict(target=torch.tensor([[0, 1, 2, 1]])), ValueError, r"target: label 2 is outside \[0, 2\)"),
    (
        dict(target=torch.tensor([[0, 1, -1, 1]])),
        ValueError,
        r"target: label -1 is outside \[0, 2\)",
    ),
    (
        dict(target=torch.tensor([[0, 1, 5, 1]]), ignore_index=255),
        ValueError,
        r"target: label 5 is outside \[0, 2\) or ignore_index 255",
    ),
    (dict(mask=torch.zeros(1, 3)), ValueError, r"mask: got shape \(1, 3\)"),
    (dict(mask=torch.zeros(1, 4, dtype=torch.complex64)), TypeError, "mask: got complex64"),
    (dict(mask=torch.ones(1, 4, requires_grad=True)), ValueError, "mask: requires grad"),
    (
        dict(activation="relu"),
        ValueError,
        "activation: got 'relu', expected one of 'none', 'sigmoid'",
    ),
    (dict(overlap="max"), ValueError, "overlap: got 'max'"),
    (dict(gamma=-1.0), ValueError, "gamma: got -1.0, expected a finite number >= 0"),
    (dict(gamma=float("nan")), ValueError, "gamma: got nan"),
    (dict(focal_classes=-1), ValueError, "focal_classes: got -1, expected an int >= 0 or None"),
    (dict(focal_classes=1.0), TypeError, "focal_classes: got 1.0, expected an int or None"),
    (
        dict(target=torch.rand(1, 2, 4), ignore_index=3),
        ValueError,
        "ignore_index: got 3 with a dense",
    ),
    (dict(ignore_index="x"), TypeError, "ignore_index: got 'x'"),
    (dict(ignore_index=2**63), ValueError, "ignore_index: got 9223372036854775808, exp"),
    (dict(backend="gpu"), ValueError, "backend: got 'gpu', expected one of 'auto'"),
    (dict(backend="cuda"), RuntimeError, "backend: 'cuda' is not available here"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_names_the_argument(change, error, message):
    if change.get("backend") == "cuda" and torch.cuda.is_available():
        pytest.skip("a CUDA device is available")
    arguments = dict(input=torch.zeros(1, 2, 4), target=torch.zeros(1, 4, dtype=torch.int64))
    arguments |= copy.copy(change)
    with pytest.raises(error, match=message):
        voxfuse.soft_confusion(arguments.pop("input"), arguments.pop("target"), **arguments)


WRONG_LABELS = [
    (0.5, "label 0.5 is no integer"),
    (float("nan"), "label nan is no integer"),
    (float("inf"), "label inf is no integer"),
    (-0.25, "label -0.25 is no integer"),
    (3.0, r"label 3 is outside \[0, 3\)"),
    (-1.0, r"label -1 is outside \[0, 3\)"),
]


def wrong_labels(value, dtype, shape=(2, 30, 9), place=(1, 17, 4)):
    """Labels of which one, and a later one, are no class."""
    labels = torch.zeros(shape, dtype=dtype)
    labels[place] = value
    labels[-1, -1, -1] = -7
    return labels


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gamma", [0.0, 1.5])
@pytest.mark.parametrize("ignore_index", [None, 255, 2**40])
@pytest.mark.parametrize(("value", "complaint"), WRONG_LABELS)
def test_a_label_that_is_no_class_is_named_with_its_place(
    backend, dtype, gamma, ignore_index, value, complaint
):
    labels = wrong_labels(value, dtype)
    logits = torch.zeros(2, 3, 30, 9)
    for target, place in ((labels, r"\[1, 17, 4\]"), (labels[:, None], r"\[1, 0, 17, 4\]")):
        with pytest.raises(ValueError, match=f"target: {complaint}.*, first at target{place}"):
            voxfuse.soft_confusion(
                logits, target, gamma=gamma, ignore_index=ignore_index, backend=backend
            )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_an_integer_label_that_is_no_class_is_named_with_its_place(backend, dtype):
    labels = torch.zeros(2, 30, 9, dtype=dtype)
    labels[1, 17, 4], labels[-1, -1, -1] = 3, 4
    message = r"target: label 3 is outside \[0, 3\), first at target\[1, 17, 4\]"
    for input in (torch.zeros(2, 3, 30, 9), torch.zeros(2, 30, 9, 3).movedim(-1, 1)):
        with pytest.raises(ValueError, match=message):
            voxfuse.soft_confusion(input, labels, backend=backend)
    message = r"target: label 3 is outside \[0, 2\), first at target\[1, 17, 4\]"
    with pytest.raises(ValueError, match=message):
        voxfuse.soft_confusion(
            torch.zeros(2, 1, 30, 9), labels, activation="sigmoid", backend=backend
        )


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
def test_a_fraction_is_not_ignored_for_its_integer_part(operators):
    """255.5 is no 255; of one class, 0.5 is a soft indicator even where 0 is ignored."""
    with pytest.raises(RuntimeError, match="target: label 255.5 is no integer"):
        operators.soft_confusion(
            torch.zeros(1, 2, 2), torch.tensor([[0, 255.5]]), None, 2, 2, 0, 255, 0.0, False
        )
    with pytest.raises(RuntimeError, match=r"target: label 1\.00000001 is no integer"):
        operators.soft_confusion(
            torch.zeros(1, 2, 2),
            torch.tensor([[0, 1 + 1e-8]], dtype=torch.float64),
            *(None, 2, 2, 0, 255, 0.0, False),
        )
    sums = operators.soft_confusion(
        torch.zeros(1, 1, 2), torch.tensor([[0, 0.5]]), None, 1, 1, 0, 0, 0.0, False
    )
    torch.testing.assert_close(sums[0, 0, :3], torch.full((3,), 0.25, dtype=torch.float64))


def test_validation_elsewhere_uses_the_same_words():
    for value, complaint in WRONG_LABELS:
        with pytest.raises(ValueError, match=f"{complaint}.*, first at target"):
            validate_labels(wrong_labels(value, torch.float32), 3, None)
    validate_labels(torch.tensor([[0.0, 2.0, 255.0]]), 3, 255)


def test_the_operator_itself_raises_the_same_words():
    with pytest.raises(RuntimeError, match=r"target: label 2 is outside \[0, 2\)"):
        torch.ops.voxfuse.soft_confusion(
            torch.zeros(1, 2, 4), torch.tensor([[0, 1, 2, 1]]), None, 2, 2, 0, None, 0.0, False
        )
    with pytest.raises(RuntimeError, match=r"target: got shape \(1, 5\)"):
        torch.ops.voxfuse.soft_confusion(
            torch.zeros(1, 2, 4), torch.zeros(1, 5), None, 2, 2, 0, None, 0.0, False
        )
