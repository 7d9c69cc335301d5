"""The sums behind a loss, handed out with it."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import voxfuse
from tests.losses.cases import MODULES, batch, counts

NOT_OF_SUMS = ("top k", "lovasz", "hinge")
OF_SUMS = [name for name in MODULES if name not in NOT_OF_SUMS]


class Calls(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", OF_SUMS)
def test_a_loss_returns_the_sums_that_it_is_made_of(name):
    """The same bits of loss and gradient, and no second pass over the voxels."""
    logits, labels = batch()
    mask = torch.rand(2, 5, 4, 3) > 0.2
    loss = MODULES[name]()
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    with Calls() as calls:
        value, sums = loss(leaf, labels, mask, return_sums=True)
    assert calls.names.count("voxfuse::soft_confusion") == 1
    expected = loss(other, labels, mask)
    assert torch.equal(value, expected)
    value.backward()
    expected.backward()
    assert torch.equal(leaf.grad, other.grad)
    activation = getattr(loss, "activation", "sigmoid")
    truth = voxfuse.soft_confusion(logits, labels, mask=mask, activation=activation)
    for own, column in zip(sums, truth.unbind(-1)[:3], strict=False):
        assert not own.requires_grad
        torch.testing.assert_close(own, column, rtol=1e-6, atol=0)
    with torch.no_grad():
        assert torch.equal(loss(logits, labels, mask, return_sums=True)[1].TP, sums.TP)


def test_scores_of_the_sums_are_their_formulas():
    logits, labels = batch(dtype=torch.float64)
    tp, fp, fn = counts(logits, labels)
    _, sums = voxfuse.functional.dice_loss(logits, labels, return_sums=True)
    for score, expected in (
        (sums.dice(), 2 * tp / (2 * tp + fp + fn)),
        (sums.jaccard(), tp / (tp + fp + fn)),
        (sums.precision(), tp / (tp + fp)),
        (sums.recall(), tp / (tp + fn)),
        (sums.pooled().dice()[0], 2 * tp.sum(0) / (2 * tp + fp + fn).sum(0)),
    ):
        torch.testing.assert_close(score, expected, rtol=1e-12, atol=0)
    assert sums.W is None
    assert voxfuse.FocalLoss()(logits, labels, return_sums=True)[1].W is None
    squared = voxfuse.DiceLoss(squared=True)(logits, labels, return_sums=True)[1]
    torch.testing.assert_close(squared.W, torch.full((2, 3), 60.0, dtype=torch.float64))


@pytest.mark.parametrize("name", ["top k", "lovasz", "hinge", "a map"])
def test_a_loss_that_is_not_made_of_sums_says_so(name):
    logits, labels = batch()
    loss = voxfuse.FocalLoss(reduction="none") if name == "a map" else MODULES[name]()
    with pytest.raises(TypeError, match="return_sums: .* voxfuse.soft_confusion computes them"):
        loss(logits, labels, return_sums=True)


def test_heads_networks_and_deep_supervision_return_sums():
    logits, labels = batch()
    loss = voxfuse.DiceCELoss()
    _, expected = loss(logits, labels, return_sums=True)
    network = torch.nn.Sequential(torch.nn.Conv3d(3, 3, 1))
    torch.nn.init.dirac_(network[0].weight)
    torch.nn.init.zeros_(network[0].bias)
    head = (logits, network[0].weight, network[0].bias, labels)
    coarse = logits[..., ::2, ::2, ::2]
    levels = voxfuse.DeepSupervisionLoss(loss, [0.0, 1.0])
    _, small = loss(coarse, levels_target(labels, coarse), return_sums=True)
    fused = voxfuse.fuse_head(network, loss)
    for (value, sums), truth in (
        (voxfuse.head_loss(loss, *head, return_sums=True), expected),
        (voxfuse.HeadDiceCELoss()(*head, return_sums=True), expected),
        (fused(logits, labels, return_sums=True), expected),
        (voxfuse.DeepSupervisionLoss(loss)([logits, coarse], labels, return_sums=True), expected),
        (levels([logits, coarse], labels, return_sums=True), small),  # the finest that counts
    ):
        assert value.ndim == 0
        for a, b in zip(sums[:4], truth[:4], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)


def levels_target(labels, output):
    return voxfuse.losses.deep_supervision.resample_nearest(labels, output.shape[2:])


def test_compiled_losses_return_sums():
    """As modules, as functions, and as fused networks; each in one graph."""
    torch._dynamo.reset()
    logits, labels = batch()
    network = torch.nn.Sequential(torch.nn.Conv3d(3, 3, 1))
    calls = (
        voxfuse.DiceCELoss(),
        voxfuse.functional.dice_ce_loss,
        voxfuse.fuse_head(network, lambda sums: 1 - sums.dice().mean()),
    )
    for loss in calls:

        def step(x, loss=loss):
            value, sums = loss(x, labels, return_sums=True)
            return value, sums, sums.dice()

        leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        value, sums, dice = torch.compile(step, fullgraph=True, backend="aot_eager")(leaf)
        assert isinstance(sums, voxfuse.Sums)
        expected = step(other)
        torch.testing.assert_close((value, dice), (expected[0], expected[2]))
        value.backward()
        expected[0].backward()
        torch.testing.assert_close(leaf.grad, other.grad)
