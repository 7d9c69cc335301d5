"""Every loss takes labels, dense targets and weights of every type, and says the same of each."""

from __future__ import annotations

import pytest
import torch

import voxfuse
from tests.losses import memory
from voxfuse.ops import _checks

LOSSES = {**memory.FUSED, **memory.COMPOSED}
#: Of one class: its indicator is the target.
BINARY = ("lovasz hinge",)


@pytest.mark.parametrize("name", LOSSES)
def test_labels_and_weights_of_every_type(name):
    loss = LOSSES[name]()
    classes = 1 if name in BINARY else 4
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, classes, 6, 6, 6, generator=generator)
    labels, weights = (torch.randint(0, 2, (2, 1, 6, 6, 6), generator=generator) for _ in range(2))
    found = []
    for target, weight in (
        (labels, weights.to(torch.float64)),
        *((labels.to(dtype), weights.to(dtype)) for dtype in _checks.NUMBER_DTYPES),
    ):
        input = logits.clone().requires_grad_()
        value = loss(input, target, weight)
        value.sum().backward()
        found.append((value.detach(), input.grad))
    for dtype, (value, gradient) in zip(_checks.NUMBER_DTYPES, found[1:], strict=True):
        assert torch.equal(value, found[0][0]), dtype
        assert torch.equal(gradient, found[0][1]), dtype


@pytest.mark.parametrize("name", LOSSES)
def test_dense_targets_of_every_type(name):
    loss = LOSSES[name]()
    if getattr(loss, "ignore_index", None) is not None:
        loss.ignore_index = None  # a dense target has no labels
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 4, 6, 6, 6, generator=generator)
    labels = torch.randint(0, 4, (2, 6, 6, 6), generator=generator)
    one_hot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1)
    if name in BINARY:
        logits, one_hot = logits[:, :1], one_hot[:, :1]
    expected = loss(logits, one_hot.to(torch.float32))
    for dtype in _checks.NUMBER_DTYPES:
        assert torch.equal(loss(logits, one_hot.to(dtype)), expected), dtype


def test_heads_take_every_type():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 5, 6, 6, 6, generator=generator)
    head = torch.nn.Conv3d(5, 3, 1)
    labels, weights = (torch.randint(0, 2, (1, 6, 6, 6), generator=generator) for _ in range(2))
    loss = voxfuse.HeadLoss(voxfuse.DiceCELoss())
    expected = loss(features, head.weight, head.bias, labels, weights.double())
    for dtype in _checks.NUMBER_DTYPES:
        typed = loss(features, head.weight, head.bias, labels.to(dtype), weights.to(dtype))
        assert torch.equal(typed, expected), dtype
