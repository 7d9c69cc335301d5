"""Values of a dense target outside [0, 1], in the same words on every backend."""

from __future__ import annotations

import random
import re

import pytest
import torch
from torch import Tensor

import voxfuse
from voxfuse.ops import _checks, soft_confusion

BACKENDS = ["auto", "reference"]
ROOM = 1e-3


def of_head(logits: Tensor, target: Tensor, **options) -> Tensor:
    """The sums of a head that hands its features on as logits."""
    eye = torch.eye(logits.shape[1], dtype=logits.dtype)
    return voxfuse.head_confusion(logits, eye, None, target, **options)


@pytest.mark.parametrize("call", [voxfuse.soft_confusion, of_head])
@pytest.mark.parametrize("seed", range(24))
def test_a_value_outside_is_an_error_where_it_counts_and_nothing_where_it_does_not(call, seed):
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    classes, count = draw.choice([1, 1, 3]), draw.choice([5, 300])
    types = [x for x in _checks.NUMBER_DTYPES if x != torch.bool]
    dtype = draw.choice([x for x in types if classes > 1 or x.is_floating_point])
    wrong = draw.choice([2, 255] if not dtype.is_signed else [2, 100, -1])
    input_dtype = draw.choice([torch.float32, torch.float64, torch.float16])
    logits = torch.randn(2, classes, count, 2, generator=generator).to(input_dtype)
    target = torch.randint(0, 2, logits.shape, generator=generator).to(dtype)
    if draw.random() < 0.3:
        target = target.movedim(1, -1).contiguous().movedim(-1, 1)
    options = {"activation": draw.choice(["softmax", "sigmoid"]), "gamma": draw.choice([0.0, 2.0])}
    options["overlap"] = draw.choice(["product", "min"])
    if draw.random() < 0.5:
        mask = torch.randint(0, 2, (2, count, 2), generator=generator)
        options["mask"] = mask.to(draw.choice([torch.bool, torch.uint8, torch.float32]))
    if classes == 1 and draw.random() < 0.5:
        options["ignore_index"] = 99
    if classes > 1 and draw.random() < 0.5:
        options["annotated"] = torch.tensor([[True, False, True], [True, True, True]])
        options["unlabelled"] = draw.choice(["exclude", "background"])
        if options["unlabelled"] == "background":
            options["activation"] = "softmax"
    mask = options.get("mask", torch.ones(2, count, 2))
    b, c, v = draw.randrange(2), draw.randrange(classes), draw.randrange(2 * count)
    place = (b, c, v // 2, v % 2)
    read = c != 1 or b == 1 or options.get("unlabelled") != "exclude"
    counts = read and bool(mask[b, v // 2, v % 2] != 0)
    expected = [call(logits, target, **options, backend=name) for name in BACKENDS]
    if draw.random() < 0.3 and "ignore_index" in options:
        wrong, counts = 99, False
    target[place] = wrong
    if not counts and wrong != 99:
        clean = [call(logits, target, **options, backend=name) for name in BACKENDS]
        assert all(map(torch.equal, clean, expected))
        return
    if not counts:
        for name in BACKENDS:
            call(logits, target, **options, backend=name)
        return
    listed = ", ".join(map(str, place))
    message = (
        f"target: value {wrong} is outside [0, 1] by more than 0.001, first at target[{listed}]"
    )
    for name in BACKENDS:
        with pytest.raises(ValueError, match=re.escape(message)):
            call(logits, target, **options, backend=name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_has_room_and_nan_goes_through(backend, dtype):
    logits = torch.zeros(1, 2, 40, dtype=dtype)
    target = torch.zeros(1, 2, 40, dtype=dtype)
    for value in (-0.9 * ROOM, 1 + 0.9 * ROOM, -0.0, float("nan")):
        target[0, 1, 33] = value
        sums = voxfuse.soft_confusion(logits, target, backend=backend)
        assert bool(sums[0, 1].isnan().any()) == (value != value)
    for value in (-1.1 * ROOM, 1 + 1.1 * ROOM, float("inf"), -float("inf")):
        target[0, 1, 33] = value
        with pytest.raises(ValueError, match=r"first at target\[0, 1, 33\]"):
            voxfuse.soft_confusion(logits, target, backend=backend)


def test_the_message_says_what_the_values_may_be():
    generator = torch.Generator().manual_seed(0)
    marked = torch.randint(0, 2, (1, 6, 6), generator=generator).double()
    marked[0, 0] = 255
    soft = torch.rand(1, 3, 6, 6, generator=generator)
    logits = torch.randn(1, 3, 6, 6, generator=generator)
    grey = torch.arange(36.0).reshape(1, 6, 6)
    for input, target, hint in (
        (logits[:, :1], marked, r"if 255 marks voxels to ignore, pass ignore_index=255 \(one clas"),
        (logits, 255 * (soft > 0.5), "or a mask; if it is the foreground, divide by it"),
        (logits[:, :1], grey, "labels need an input with a channel for every class, and a grey"),
        (logits, soft * 1.2 - 0.1, r"if it was interpolated, clamp it to \[0, 1\]"),
        (soft, logits, "if these are logits, input and target have changed places"),
    ):
        activation = "softmax" if input.shape[1] > 1 else "sigmoid"
        options = {"activation": activation}
        for backend in BACKENDS:
            with pytest.raises(ValueError, match=hint):
                voxfuse.soft_confusion(input, target, **options, backend=backend)
        for loss in (
            voxfuse.DiceCELoss(**options),
            voxfuse.FocalLoss(**options, reduction="none"),
            voxfuse.TopKLoss() if input.shape[1] > 1 else voxfuse.BCELoss(),
            voxfuse.LovaszLoss(**options),
        ):
            with pytest.raises(ValueError, match=f"target: value .*{hint}"):
                loss(input, target)


def test_an_ignored_value_and_masks_of_0_do_not_count_for_any_loss():
    target = torch.tensor([[[0.0, 1.0, 255.0, 1.0]]])
    logits = torch.tensor([[[0.5, -1.0, 2.0, 3.0]]])
    mask = target[0] != 255
    for loss in (voxfuse.DiceLoss, voxfuse.LovaszLoss):
        by_index = loss(activation="sigmoid", ignore_index=255)(logits, target)
        assert torch.equal(by_index, loss(activation="sigmoid")(logits, target, mask=mask))


def test_elsewhere_values_are_checked_on_demand(monkeypatch):
    """As on a GPU: the interpreter's kernels look at no value."""
    logits, target = torch.zeros(1, 2, 8), torch.zeros(1, 2, 8)
    target[0, 1, 5] = 2

    def call() -> Tensor:
        return voxfuse.soft_confusion(logits, target, backend="triton")

    assert float(call()[0, 1, 0]) == pytest.approx(1)
    monkeypatch.setattr(soft_confusion, "_validates", lambda input: True)
    with pytest.raises(ValueError, match=r"value 2 is outside .* target\[0, 1, 5\]; if 2 marks"):
        call()
    with pytest.raises(ValueError, match=r"value 2 is outside .* target\[0, 1, 5\]; if 2 marks"):
        voxfuse.DiceLoss(backend="triton")(logits, target)
    with pytest.raises(ValueError, match=r"value 2 is outside .* target\[0, 1, 5\]; if 2 marks"):
        of_head(logits, target, backend="triton")
