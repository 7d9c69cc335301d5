"""Bad arguments of hard_confusion are errors that name them, in the same words on every backend."""

from __future__ import annotations

import pytest
import torch

import voxfuse

BACKENDS = ["reference", "auto"]
LABELS = torch.tensor([[0, 1, 1, 0]])
BAD = [
    (dict(input=[1.0]), TypeError, "input: expected a torch.Tensor, got a list of 1; for the"),
    (
        dict(input=torch.zeros(2)),
        ValueError,
        r"input: got shape \(2,\), expected \(B, C, \*spatial",
    ),
    (dict(input=LABELS[None]), TypeError, "input: got int64 of shape .*; of labels, mode='labels'"),
    (dict(input=torch.zeros(1, 1, 4)), ValueError, "input: got one class.*use mode='threshold'"),
    (
        dict(mode="softmax"),
        ValueError,
        "mode: got 'softmax', expected one of 'argmax', 'threshold'",
    ),
    (dict(target=torch.zeros(1, 5)), ValueError, r"target: got shape \(1, 5\), expected \(1, 4\)"),
    (dict(target=torch.zeros(1, 4).cfloat()), TypeError, "target: got complex64"),
    (dict(mask=torch.ones(1, 3)), ValueError, r"mask: got shape \(1, 3\)"),
    (dict(mask=torch.ones(1, 2, 4)), ValueError, r"mask: got shape \(1, 2, 4\)"),
    (dict(ignore_index=1.5), TypeError, "ignore_index: got 1.5"),
    (dict(num_classes=3), ValueError, "num_classes: got 3, but input has 2 classes"),
    (
        dict(mode="threshold", activation="softmax"),
        ValueError,
        "activation: got 'softmax' with mode 'threshold', expected 'sigmoid' or 'none'",
    ),
    (dict(mode="threshold", threshold=float("nan")), ValueError, "threshold: got nan"),
    (
        dict(threshold=0.5),
        ValueError,
        "threshold: got 0.5 with mode 'argmax', expected None; it is of 'threshold'",
    ),
    (
        dict(input=LABELS, mode="labels", num_classes=2, activation="none"),
        ValueError,
        "activation: got 'none' with mode 'labels', expected None",
    ),
    (
        dict(input=LABELS, mode="labels"),
        ValueError,
        "num_classes: got None, expected the number of",
    ),
    (dict(input=LABELS, mode="labels", num_classes=0), ValueError, "num_classes: got 0, expected"),
    (dict(input=LABELS, mode="labels", num_classes=2.0), TypeError, "num_classes: got 2.0"),
    (
        dict(input=torch.zeros(1, 3, 4), mode="labels", num_classes=2),
        ValueError,
        r"target: got shape \(1, 4\), expected \(1, 3, 4\) or \(1, 1, 3, 4\)",
    ),
    (
        dict(input=torch.zeros(1, 300, 4), target=LABELS.bfloat16()),
        TypeError,
        "target: got bfloat16.*integers up to 256 only, for 300 classes; use an integer type",
    ),
    (
        dict(input=torch.zeros(1, 4).half(), mode="labels", num_classes=2050),
        TypeError,
        "input: got float16.*integers up to 2048 only, for 2050 classes",
    ),
    (dict(backend="gpu"), ValueError, "backend: got 'gpu', expected one of 'auto'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_names_the_argument(change, error, message):
    given = dict(input=torch.zeros(1, 2, 4), target=LABELS) | change
    with pytest.raises(error, match=message):
        voxfuse.hard_confusion(given.pop("input"), given.pop("target"), **given)


WRONG = [
    (0.5, torch.float32, "label 0.5 is no integer"),
    (float("nan"), torch.float16, "label nan is no integer"),
    (float("inf"), torch.float64, "label inf is no integer"),
    (2, torch.int8, r"label 2 is outside \[0, 2\)"),
    (-1, torch.int8, r"label -1 is outside \[0, 2\)"),
    (255, torch.uint8, r"label 255 is outside \[0, 2\)"),
    (65535, torch.uint16, r"label 65535 is outside \[0, 2\)"),
    (2**32 - 1, torch.uint32, r"label 4294967295 is outside \[0, 2\)"),
    (2**40, torch.int64, r"label 1099511627776 is outside \[0, 2\)"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value", "dtype", "complaint"), WRONG)
def test_a_label_that_is_no_class_is_named_with_its_place(value, dtype, complaint, backend):
    labels = torch.zeros(2, 5, 700, dtype=torch.float64)
    labels[1, 4, 600] = value
    labels = labels.to(dtype)
    logits = torch.zeros(2, 2, 5, 700)
    with pytest.raises(ValueError, match=rf"target: {complaint}.*, first at target\[1, 4, 600\]"):
        voxfuse.hard_confusion(logits, labels, ignore_index=300, backend=backend)
    right = torch.zeros(2, 5, 700)
    with pytest.raises(
        ValueError,
        match=rf"input: {complaint}.*, first at input\[1, 4, 600\](?!.*pass ignore_index)",
    ):
        voxfuse.hard_confusion(labels, right, "labels", num_classes=2, backend=backend)
    both = torch.stack([right.to(dtype), labels], 1)
    with pytest.raises(
        ValueError, match=rf"target: {complaint}.*, first at target\[1, 1, 4, 600\]"
    ):
        voxfuse.hard_confusion(logits, both, "threshold", backend=backend)


def test_the_operator_itself_keeps_memory_safe():
    """Callers of torch.ops have no wrapper before them."""
    logits, labels = torch.zeros(1, 2, 4), torch.zeros(1, 4)
    for given, message in (
        ((logits, torch.zeros(1, 5), None, 0), r"target: got shape \(1, 5\)"),
        ((logits, labels, torch.zeros(1, 3), 0), r"mask: got shape \(1, 3\)"),
        ((logits, labels, None, 7), "decision: got 7"),
        ((labels, labels, None, 2), "num_classes: expected"),
        ((logits.long(), labels, None, 0), "input: got Long"),
        ((logits, labels.cfloat(), None, 0), "target: got ComplexFloat, expected bool"),
        ((logits, labels + 2, None, 0), r"a label is outside \[0, 2\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.voxfuse.hard_confusion(*given, 0.0, None, None)


def test_a_mask_of_another_shape_says_nothing_of_stacked_outputs():
    stacked, labels = torch.zeros(2, 3, 2, 8, 8), torch.zeros(2, 8, 8)
    with pytest.raises(ValueError, match="target: got .* as MONAI's DynUNet returns"):
        voxfuse.hard_confusion(stacked, labels)
    with pytest.raises(ValueError, match=r"mask: got shape \(2, 8, 8\), expected(?!.*DynUNet)"):
        voxfuse.hard_confusion(stacked, torch.zeros(2, 2, 8, 8), mask=labels)
