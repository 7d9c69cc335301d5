"""Losses of samples in which some classes are not annotated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import voxfuse

#: Sample 0 lacks class 2, sample 1 the classes 1 and 3.
ANNOTATED = torch.tensor([[True, True, False, True], [True, False, True, False]])
LOSSES = {
    "tversky": lambda **o: voxfuse.TverskyLoss(0.3, 0.7, **o),
    "focal tversky": lambda **o: voxfuse.FocalTverskyLoss(**o),
    "squared dice of the batch": lambda **o: voxfuse.DiceLoss(squared=True, batch=True, **o),
    "generalised dice": lambda **o: voxfuse.GeneralizedDiceLoss(**o),
    "mcc": lambda **o: voxfuse.MCCLoss(**o),
    "cross-entropy": lambda **o: voxfuse.CrossEntropyLoss(label_smoothing=0.1, **o),
    "focal": lambda **o: voxfuse.FocalLoss(alpha=0.25, **o),
    "dice and cross-entropy": lambda **o: voxfuse.DiceCELoss(include_background=False, **o),
    "unified focal": lambda **o: voxfuse.UnifiedFocalLoss(**o),
}


def example(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(2, 4, 6, 5, 4, generator=generator, dtype=torch.float64).to(dtype)
    return logits.requires_grad_(), torch.randint(0, 4, (2, 6, 5, 4), generator=generator)


def value_and_gradient(loss: Any, logits: Tensor, *rest: Tensor, **call: Any) -> tuple[Tensor, ...]:
    value = loss(logits, *rest, **call)
    (gradient,) = torch.autograd.grad(value, logits)
    return value.detach(), gradient


@pytest.mark.parametrize("unlabelled", ["exclude", "background"])
@pytest.mark.parametrize("name", LOSSES)
def test_backends_agree(name, unlabelled):
    logits, labels = example()
    expected = value_and_gradient(
        LOSSES[name](unlabelled=unlabelled, backend="reference"),
        logits,
        labels,
        annotated=ANNOTATED,
    )
    loss = LOSSES[name](unlabelled=unlabelled)
    actual = value_and_gradient(loss, logits, labels, annotated=ANNOTATED)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    gradient = expected[1]
    assert bool(gradient.flatten(2).abs().amax(2)[ANNOTATED].all())
    excluded = gradient[~ANNOTATED]
    assert bool(excluded.any()) == (unlabelled == "background")


def test_a_compiled_loss_is_one_graph():
    torch.compiler.reset()
    logits, labels = example()
    one_hot = torch.nn.functional.one_hot(labels, 4).movedim(-1, 1).float()
    loss = voxfuse.DiceCELoss(unlabelled="background")
    expected = value_and_gradient(loss, logits, one_hot, annotated=ANNOTATED)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    actual = value_and_gradient(compiled, logits, one_hot, annotated=ANNOTATED)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_marginal_cross_entropy():
    logits, labels = example()
    actual = value_and_gradient(
        voxfuse.CrossEntropyLoss(unlabelled="background"), logits, labels, annotated=ANNOTATED
    )
    terms = []
    for z, y, kept in zip(logits, labels, ANNOTATED, strict=True):
        p = z.softmax(0)
        background = p[0] + p[~kept].sum(0)
        merged = (y == 0) | ~kept[y]
        terms.append(-torch.where(merged, background, p.gather(0, y[None])[0]).log())
    expected = torch.stack(terms).mean()
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(actual[0].double(), expected.detach(), rtol=1e-9, atol=0)
    torch.testing.assert_close(actual[1], gradient, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("target", ["labels", "dense"])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_excluding_is_the_loss_of_fewer_classes(activation, target):
    """Of one sample; a mean over classes is then over the annotated ones."""
    logits, labels = (x[:1] for x in example())
    kept = torch.tensor([[False, True, True, True]])
    fewer = logits[:, 1:]
    renumbered, ignore = labels - 1, {"ignore_index": -1}
    if target == "dense":
        labels = torch.rand(1, 4, 6, 5, 4, dtype=torch.float64)
        renumbered, ignore = labels[:, 1:], {}
    options = dict(activation=activation, absent="ignore")
    for loss in (voxfuse.TverskyLoss, voxfuse.DiceCELoss, voxfuse.GeneralizedDiceLoss):
        actual = value_and_gradient(loss(**options), logits, labels, annotated=kept)
        expected = value_and_gradient(loss(**options, **ignore), fewer, renumbered)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=0)
    likelihood = voxfuse.CrossEntropyLoss if activation == "softmax" else voxfuse.BCELoss
    actual = value_and_gradient(likelihood(), logits, labels, annotated=kept)
    expected = value_and_gradient(likelihood(**ignore), fewer, renumbered)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=0)


def test_terms_of_classes_that_are_not_annotated_are_zero():
    logits, labels = example()
    loss = voxfuse.DiceLoss(reduction="none", smooth_nr=0.0, class_weight=[1.0, 2.0, 3.0, 4.0])
    terms = loss(logits, labels, annotated=ANNOTATED)
    assert bool((terms[ANNOTATED] > 0).all())
    assert not bool(terms[~ANNOTATED].any())
    of_samples = voxfuse.DiceCELoss(reduction="none", smooth_nr=0.0)
    expected = of_samples(logits, labels, annotated=ANNOTATED)
    for sample in range(2):
        alone = (x[sample : sample + 1] for x in (logits, labels, ANNOTATED))
        z, y, kept = alone
        value = voxfuse.DiceCELoss(smooth_nr=0.0)(z, y, annotated=kept)
        torch.testing.assert_close(value, expected[sample])


@pytest.mark.parametrize("unlabelled", ["exclude", "background"])
def test_heads_functions_and_levels(unlabelled):
    generator = torch.Generator().manual_seed(4)
    head = torch.nn.Conv3d(5, 4, 1).double()
    features = torch.randn(2, 5, 6, 5, 4, generator=generator, dtype=torch.float64)
    _, labels = example()
    loss = voxfuse.DiceCELoss(unlabelled=unlabelled)
    expected = loss(head(features), labels, annotated=ANNOTATED)
    for actual in (
        voxfuse.head_loss(loss, features, head.weight, head.bias, labels, annotated=ANNOTATED),
        voxfuse.HeadDiceCELoss(unlabelled=unlabelled)(
            features, head.weight, head.bias, labels, annotated=ANNOTATED
        ),
        voxfuse.fuse_head(torch.nn.Sequential(head), loss)(features, labels, annotated=ANNOTATED),
        voxfuse.functional.dice_ce_loss(
            head(features), labels, annotated=ANNOTATED, unlabelled=unlabelled
        ),
        voxfuse.DeepSupervisionLoss(loss, weights=[0.75, 0.25])(
            [head(features)] * 2, labels, annotated=ANNOTATED
        ),
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "loss",
    [
        voxfuse.LovaszLoss(),
        voxfuse.LovaszHingeLoss(),
        voxfuse.TopKLoss(),
        voxfuse.CrossEntropyLoss(reduction="none"),
    ],
    ids=repr,
)
def test_losses_that_are_no_sums_say_so(loss):
    logits, labels = example()
    with pytest.raises(ValueError, match="annotated: .* no partial labels"):
        loss(logits, labels, annotated=ANNOTATED)


def test_sums_that_a_loss_was_made_of():
    logits, labels = example()
    expected = voxfuse.soft_confusion(logits, labels, annotated=ANNOTATED).detach()
    value, sums = voxfuse.DiceLoss()(logits, labels, annotated=ANNOTATED, return_sums=True)
    assert torch.equal(sums.TP, expected[..., 0])
    same = voxfuse.SumsLoss(lambda s: s.TP.sum(), backend="reference")
    value = same(logits, labels, annotated=ANNOTATED)
    torch.testing.assert_close(value.double(), expected[..., 0].sum(), rtol=1e-6, atol=0)


def test_options_that_do_not_fit():
    logits, labels = example()
    with pytest.raises(ValueError, match="unlabelled: got 'background', which needs a softmax"):
        voxfuse.DiceLoss(activation="sigmoid", unlabelled="background")
    with pytest.raises(ValueError, match="unlabelled: got 'background', which needs a softmax"):
        voxfuse.DiceCELoss(ce_activation="sigmoid", unlabelled="background")
    with pytest.raises(ValueError, match="annotated: class 0 of sample 0 is not annotated"):
        voxfuse.DiceLoss(unlabelled="background")(logits, labels, annotated=~ANNOTATED)
    with pytest.raises(ValueError, match=r"annotated: got shape \(1, 4\)"):
        voxfuse.DiceLoss()(logits, labels, annotated=ANNOTATED[:1])


def test_what_is_annotated_does_not_change_before_the_backward_pass():
    logits, labels = example()
    annotated = ANNOTATED.clone()
    loss = voxfuse.DiceCELoss()(logits, labels, annotated=annotated)
    annotated.logical_not_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
