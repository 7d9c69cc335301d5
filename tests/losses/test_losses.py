"""The loss modules and functions: formulas, gradients, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor

import voxfuse
from tests.losses.cases import (
    MODULES,
    batch,
    counts,
    everyone,
)

ANNOTATED = torch.tensor([[1.0, 0.0, 2.0], [0.5, 3.0, 0.0]], dtype=torch.float64)

# --- Formulas ------------------------------------------------------------------------------------


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("gamma", [1.0, 0.75, 2.0])
def test_tversky_is_its_formula(include_background, pooled, gamma):
    logits, labels = batch(dtype=torch.float64)
    tp, fp, fn = (x.sum(0, keepdim=True) if pooled else x for x in counts(logits, labels))
    index = (tp + 1e-5) / (tp + 0.3 * fp + 0.7 * fn + 1e-5)
    terms = (1 - index) ** gamma
    terms = terms if include_background else terms[:, 1:]
    weight = torch.tensor([1.0, 2.0, 0.5])[: terms.shape[1]]
    options = {"include_background": include_background, "batch": pooled, "class_weight": weight}
    for reduction, expected in (
        ("mean", (weight * terms).mean()),
        ("sum", (weight * terms).sum()),
        ("none", (weight * terms)[0] if pooled else weight * terms),
    ):
        loss = voxfuse.TverskyLoss(0.3, 0.7, gamma, reduction=reduction, **options)
        torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-12, atol=1e-14)


def test_alpha_prices_false_positives_and_beta_false_negatives():
    p = torch.tensor([[[0.9, 0.9, 0.9, 0.1]]], dtype=torch.float64)  # one false positive
    g = torch.tensor([[[1, 1, 0, 0]]])

    def loss(alpha, beta):
        return float(
            voxfuse.functional.tversky_loss(p, g, alpha=alpha, beta=beta, activation="none")
        )

    assert loss(0.9, 0.1) > loss(0.1, 0.9)
    assert loss(0.5, 0.5) == pytest.approx(
        float(voxfuse.functional.dice_loss(p, g, activation="none", smooth_nr=2e-5, smooth_dr=2e-5))
    )
    f2 = voxfuse.functional.fbeta_loss(p, g, beta=2.0, activation="none")
    assert float(f2) == pytest.approx(loss(0.2, 0.8))
    assert loss(1, 1) == pytest.approx(
        float(voxfuse.functional.jaccard_loss(p, g, activation="none"))
    )


def test_cross_entropy_equals_torch():
    logits, labels = batch(dtype=torch.float64)
    labels[0, 0] = -100
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    for smoothing in (0.0, 0.1):
        for reduction in ("mean", "sum", "none"):
            ours = voxfuse.functional.cross_entropy_loss(
                logits,
                labels,
                class_weight=weight,
                label_smoothing=smoothing,
                reduction=reduction,
                ignore_index=-100,
            )
            expected = F.cross_entropy(
                logits, labels, weight=weight, label_smoothing=smoothing, reduction=reduction
            )
            torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)
        dense = torch.rand_like(logits)
        ours = voxfuse.functional.cross_entropy_loss(
            logits, dense, class_weight=weight, label_smoothing=smoothing
        )
        expected = F.cross_entropy(logits, dense, weight=weight, label_smoothing=smoothing)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-14)


def test_bce_equals_torch():
    logits, _ = batch(dtype=torch.float64)
    dense = torch.rand_like(logits)
    positive = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    expected = F.binary_cross_entropy_with_logits(
        logits, dense, pos_weight=positive.reshape(3, 1, 1, 1)
    )
    ours = voxfuse.functional.bce_loss(logits, dense, pos_weight=positive)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


def test_smoothed_labels_of_a_sigmoid_are_a_dense_target():
    """What the error of label_smoothing with a sigmoid and the docstrings advise."""
    logits, labels = batch(dtype=torch.float64)
    smoothing = 0.2
    onehot = F.one_hot(labels, 3).movedim(-1, 1).double()
    dense = onehot * (1 - smoothing) + smoothing / 2
    expected = F.binary_cross_entropy_with_logits(logits, dense)
    ours = voxfuse.BCELoss()(logits, dense)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match=r"with a sigmoid pass the smoothed target g \(1 - s\)"):
        voxfuse.CrossEntropyLoss("sigmoid", label_smoothing=smoothing)


def test_compounds_are_the_sums_of_their_parts():
    logits, labels = batch(dtype=torch.float64)
    f = voxfuse.functional
    pairs = (
        (
            f.tversky_ce_loss(logits, labels, alpha=0.3, beta=0.7, lambda_ce=0.5),
            f.tversky_loss(logits, labels, alpha=0.3, beta=0.7)
            + 0.5 * f.cross_entropy_loss(logits, labels),
        ),
        (
            f.dice_ce_loss(logits, labels, lambda_dice=2.0, label_smoothing=0.2),
            2 * f.dice_loss(logits, labels)
            + f.cross_entropy_loss(logits, labels, label_smoothing=0.2),
        ),
        (
            f.tversky_focal_loss(logits, labels, focal_alpha=0.25, include_background=False),
            f.tversky_loss(logits, labels, include_background=False)
            + f.focal_loss(logits, labels, alpha=0.25, include_background=False),
        ),
        (
            f.dice_focal_loss(logits, labels, focal_activation="sigmoid", reduction="sum"),
            f.dice_loss(logits, labels, reduction="sum")
            + f.focal_loss(logits, labels, activation="sigmoid", reduction="sum"),
        ),
    )
    for compound, parts in pairs:
        torch.testing.assert_close(compound, parts, rtol=1e-12, atol=0)


COMPOUNDS = ["tversky + ce", "dice + ce", "tversky + focal", "dice + focal", "unified focal"]


@pytest.mark.parametrize("name", COMPOUNDS)
def test_a_compound_unreduced_is_each_samples_own_loss(name):
    logits, labels = batch(dtype=torch.float64)
    labels[0, 0] = 255
    labels[1, 1:] = 0
    options = {"class_weight": ANNOTATED, "likelihood_weight": [1.0, 2.0, 0.5]}
    for more in ({}, options, {"absent": "ignore", "ignore_index": 255}):
        more = {"ignore_index": 255, **more}
        leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        loss = MODULES[name](reduction="none", **more)
        losses = loss(leaf, labels)
        alone = []
        for b in range(2):
            own = {**more, "class_weight": ANNOTATED[b : b + 1]} if "class_weight" in more else more
            alone.append(MODULES[name](**own)(other[b : b + 1], labels[b : b + 1]))
        expected = torch.stack(alone)
        assert losses.shape == (2,)
        torch.testing.assert_close(losses, expected, rtol=1e-12, atol=0)
        grad = torch.tensor([1.0, 3.0], dtype=torch.float64)
        losses.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-10, atol=1e-15)
        identity = torch.eye(3, dtype=torch.float64)
        fused = voxfuse.head_loss(loss, logits, identity, None, labels)
        torch.testing.assert_close(fused, losses)


@pytest.mark.parametrize("overlap_part", [True, False])
@pytest.mark.parametrize("likelihood_part", [True, False, None])
def test_the_background_of_the_likelihood_is_its_own_option(overlap_part, likelihood_part):
    logits, labels = batch(dtype=torch.float64)
    f = voxfuse.functional
    options = {
        "include_background": overlap_part,
        "likelihood_include_background": likelihood_part,
    }
    dice = f.dice_loss(logits, labels, include_background=overlap_part)
    # By default the background is in the cross-entropy, and in the focal term as in the overlap.
    of_ce = likelihood_part is not False
    of_focal = overlap_part if likelihood_part is None else likelihood_part
    for compound, part in (
        (f.dice_ce_loss, f.cross_entropy_loss(logits, labels, include_background=of_ce)),
        (f.dice_focal_loss, f.focal_loss(logits, labels, include_background=of_focal)),
    ):
        value = compound(logits, labels, **options)
        torch.testing.assert_close(value, dice + part, rtol=1e-12, atol=0)


def test_unified_focal_is_its_formula():
    logits, labels = batch(classes=2, dtype=torch.float64)
    balance, delta, gamma = 0.5, 0.6, 0.5
    tp, fp, fn = counts(logits, labels)
    index = (tp + 1e-5) / (tp + delta * fn + (1 - delta) * fp + 1e-5)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    factor = torch.tensor([1 - delta, delta], dtype=torch.float64)[labels]
    focal = (factor * (1 - p) ** gamma * -p.log()).mean()
    expected = balance * focal + (1 - balance) * ((1 - index) ** (1 - gamma)).mean()
    ours = voxfuse.UnifiedFocalLoss(balance, delta, gamma)(logits, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("pooled", [False, True])
def test_asymmetric_unified_focal_is_its_formula(classes, pooled):
    logits, labels = batch(classes=classes, dtype=torch.float64)
    logits.requires_grad_()
    balance, delta, gamma = 0.3, 0.7, 0.5
    tp, fp, fn = counts(logits, labels)
    if pooled:
        tp, fp, fn = (x.sum(0, keepdim=True) for x in (tp, fp, fn))
    index = (tp + 1e-5) / (tp + delta * fn + (1 - delta) * fp + 1e-5)
    terms = torch.cat([1 - index[:, :1], (1 - index[:, 1:]) ** (1 - gamma)], 1)
    p = logits.softmax(1).gather(1, labels[:, None])[:, 0]
    background = labels == 0
    modulation = torch.where(background, (1 - delta) * (1 - p) ** gamma, delta)
    expected = balance * (modulation * -p.log()).mean() + (1 - balance) * terms.mean()
    for backend in ("auto", "reference"):
        ours = voxfuse.UnifiedFocalLoss(
            balance, delta, gamma, symmetric=False, batch=pooled, backend=backend
        )(logits, labels)
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
        (wanted,) = torch.autograd.grad(expected, logits, retain_graph=True)
        (found,) = torch.autograd.grad(ours, logits)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-15)


def test_asymmetric_unified_focal_names_what_it_needs():
    with pytest.raises(ValueError, match="symmetric: False needs one softmax"):
        voxfuse.UnifiedFocalLoss(symmetric=False, activation="sigmoid")
    loss = voxfuse.UnifiedFocalLoss(symmetric=False, activation="none")
    with pytest.raises(ValueError, match="symmetric: False needs a channel for the background"):
        loss(torch.rand(1, 1, 4), torch.ones(1, 1, 4))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_log_variants(reduction):
    logits, labels = batch(dtype=torch.float64)
    tp, fp, fn = counts(logits, labels)
    expected = -((2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5)).log()
    expected = expected.mean() if reduction == "mean" else expected
    ours = voxfuse.DiceLoss(log=True, reduction=reduction)(logits, labels)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k", [1.0, 10.0, 37.5, 100.0])
def test_top_k_is_the_mean_of_the_worst_voxels(k):
    logits, labels = batch(dtype=torch.float64)
    leaf = logits.requires_grad_()
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    losses = F.cross_entropy(leaf, labels, weight=weight, reduction="none").flatten()
    expected = losses.topk(max(1, int(losses.numel() * k / 100))).values.mean()
    (slopes,) = torch.autograd.grad(expected, leaf)
    ours = voxfuse.TopKLoss(k, class_weight=weight)(leaf, labels)
    (our_slopes,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_slopes, slopes, rtol=1e-10, atol=1e-15)


def lovasz_by_definition(errors: Tensor, foreground: Tensor) -> Tensor:
    """The Lovász extension of the Jaccard set function, step by step."""
    order = errors.argsort(descending=True)
    total, positives = errors.new_zeros(()), float(foreground.sum())
    before = 0.0
    missed, wrong = 0.0, 0.0
    for v in order:
        missed, wrong = missed + float(foreground[v]), wrong + float(~foreground[v])
        jaccard = 1 - (positives - missed) / (positives + wrong)
        total = total + errors[v] * (jaccard - before)
        before = jaccard
    return total


@pytest.mark.parametrize("per_image", [True, False])
@pytest.mark.parametrize("classes", ["present", "all", [0, 2]])
def test_lovasz_softmax_is_its_definition(classes, per_image):
    logits, labels = batch(classes=4, spatial=(4, 3), dtype=torch.float64)
    labels[labels == 1] = 2  # class 1 is absent
    leaf = logits.requires_grad_()
    ignored = torch.zeros_like(labels, dtype=torch.bool)
    ignored[:, 0] = True
    p, g = leaf.softmax(1).flatten(2), labels.flatten(1)
    images = [[0], [1]] if per_image else [[0, 1]]
    means = []
    for image in images:
        kept = ~ignored.flatten(1)[image].flatten()
        terms = []
        for c in range(4) if isinstance(classes, str) else classes:
            foreground = (g[image] == c).flatten()[kept]
            if classes == "present" and not foreground.any():
                continue
            errors = (foreground.double() - p[image, c].flatten()[kept]).abs()
            terms.append(lovasz_by_definition(errors, foreground))
        means.append(torch.stack(terms).mean())
    expected = torch.stack(means).mean()
    (slopes,) = torch.autograd.grad(expected, leaf)
    loss = voxfuse.LovaszLoss(classes, per_image, ignore_index=255)
    ours = loss(leaf, labels.masked_fill(ignored, 255))
    (our_slopes,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(our_slopes, slopes, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("hinge", [False, True])
@pytest.mark.parametrize("classes", ["present", "all", [0, 2]])
def test_lovasz_weighs_the_losses_of_its_classes(classes, hinge):
    logits, labels = batch(classes=4, spatial=(4, 3), dtype=torch.float64)
    labels[labels == 1] = 2  # class 1 is absent
    leaf = logits.requires_grad_()
    make = voxfuse.LovaszHingeLoss if hinge else voxfuse.LovaszLoss
    weight = torch.tensor([1.0, 5.0, 0.5, 3.0], dtype=torch.float64)
    counted = {"present": [0, 2, 3], "all": [0, 1, 2, 3]}.get(str(classes), classes)
    expected = sum(weight[c] * make(classes=[c])(leaf, labels) for c in counted) / len(counted)
    (slopes,) = torch.autograd.grad(expected, leaf)
    loss = make(classes=classes, class_weight=weight)
    ours = loss(leaf, labels)
    (our_slopes,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(our_slopes, slopes, rtol=1e-10, atol=1e-15)
    assert set(loss.state_dict()) == {"class_weight"}
    assert "class_weight=[1.0, 5.0, 0.5, 3.0]" in repr(loss)


def test_lovasz_over_many_blocks_equals_autograd_of_the_sorted_sum():
    """More voxels than the blocks in which the increments are made."""
    logits, labels = batch(classes=2, spatial=(50_000,), dtype=torch.float64)
    leaf = logits.requires_grad_()
    terms = []
    for c in range(2):
        g = (labels == c).double().flatten()
        errors, order = (g - leaf.softmax(1)[:, c].flatten()).abs().sort(descending=True)
        g = g[order]
        jaccard = 1 - (g.sum() - g.cumsum(0)) / (g.sum() + (1 - g).cumsum(0))
        terms.append((errors * jaccard.diff(prepend=jaccard.new_zeros(1))).sum())
    expected = torch.stack(terms).mean()
    (slopes,) = torch.autograd.grad(expected, leaf)
    ours = voxfuse.LovaszLoss()(leaf, labels)
    (our_slopes,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(our_slopes, slopes, rtol=1e-6, atol=1e-13)


def test_lovasz_hinge_is_its_definition():
    logits, _ = batch(classes=2, spatial=(7,), dtype=torch.float64)
    leaf = logits.requires_grad_()
    dense = torch.randint(0, 2, (2, 2, 7), generator=torch.Generator().manual_seed(1))
    terms = []
    for c in range(2):
        z, g = leaf[:, c].flatten(), dense[:, c].flatten().bool()
        errors = (1 - z * torch.where(g, 1.0, -1.0)).clamp(min=0)
        terms.append(lovasz_by_definition(errors, g))
    expected = torch.stack(terms).mean()
    (slopes,) = torch.autograd.grad(expected, leaf)
    ours = voxfuse.LovaszHingeLoss()(leaf, dense.to(torch.uint8))
    (our_slopes,) = torch.autograd.grad(ours, leaf)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(our_slopes, slopes, rtol=1e-8, atol=1e-12)


def test_a_jaccard_surrogate_at_hard_predictions_is_the_jaccard_loss():
    g = torch.tensor([[0, 0, 1, 1, 1, 0]])
    p = F.one_hot(torch.tensor([[0, 1, 1, 1, 0, 0]]), 2).movedim(-1, 1).double()
    loss = voxfuse.LovaszLoss([1], activation="none")(p, g)
    assert float(loss) == pytest.approx(1 - 2 / 4)


def test_deep_supervision_samples_the_target_and_sums():
    outputs = [batch(spatial=s, seed=i)[0] for i, s in enumerate([(8, 6, 4), (4, 3, 2), (2, 2, 1)])]
    labels = batch(spatial=(8, 6, 4))[1][:, None]
    inner = voxfuse.DiceCELoss()
    expected = sum(
        w * inner(o, F.interpolate(labels.float(), o.shape[2:], mode="nearest-exact"))
        for w, o in zip((1.0, 0.5, 0.25), outputs, strict=True)
    )
    loss = voxfuse.DeepSupervisionLoss(inner)
    torch.testing.assert_close(loss(outputs, labels.to(torch.uint8)), expected)
    targets = [
        F.interpolate(labels.float(), o.shape[2:], mode="nearest-exact").long() for o in outputs
    ]
    torch.testing.assert_close(loss(outputs, targets), expected)
    normalised = voxfuse.DeepSupervisionLoss(inner, [4, 2, 0], normalize=True)
    expected = (2 * inner(outputs[0], targets[0]) + inner(outputs[1], targets[1])) / 3
    torch.testing.assert_close(normalised(outputs, labels), expected)


# --- Gradients -----------------------------------------------------------------------------------


@everyone
@pytest.mark.parametrize("activation", ["softmax", "sigmoid", "none"])
def test_gradcheck(name, activation):
    if activation != "softmax" and name in ("bce", "hinge"):
        pytest.skip("has one activation")
    logits, labels = batch(spatial=(4, 2), dtype=torch.float64)
    if activation == "none":
        logits = logits.sigmoid() * 0.9 + 0.05
    loss = MODULES[name](activation=activation)
    assert torch.autograd.gradcheck(
        lambda z: loss(z, labels), logits.requires_grad_(), check_grad_dtypes=True
    )


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("include_background", [True, False])
def test_a_focal_alpha_for_every_class_is_its_formula(reduction, include_background):
    alpha = [0.5, 2.0, 0.0]
    logits, labels = batch(dtype=torch.float64)
    log_p = logits.log_softmax(1).gather(1, labels[:, None])[:, 0]
    terms = torch.tensor(alpha, dtype=torch.float64)[labels] * (1 - log_p.exp()) ** 2 * -log_p
    if not include_background:
        terms = terms * (labels != 0)
    kept = 3 if include_background else 2
    expected = {"none": terms, "mean": terms.mean() / kept, "sum": terms.sum()}[reduction]
    options = dict(reduction=reduction, include_background=include_background)
    for given in (alpha, tuple(alpha), torch.tensor(alpha), np.array(alpha)):
        loss = voxfuse.FocalLoss(alpha=given, **options)
        torch.testing.assert_close(loss(logits, labels), expected)
    dense = F.one_hot(labels, 3).movedim(-1, 1).double()
    torch.testing.assert_close(
        voxfuse.functional.focal_loss(logits, dense, alpha=alpha, **options), expected
    )


def test_an_alpha_for_every_class_in_a_sum_with_a_focal_loss():
    alpha = [0.2, 1.5, 0.7]
    logits, labels = batch(dtype=torch.float64)
    focal = voxfuse.FocalLoss(alpha=alpha)(logits, labels)
    for loss, part in (
        (voxfuse.DiceFocalLoss(focal_alpha=alpha, lambda_focal=2.0), voxfuse.DiceLoss()),
        (voxfuse.TverskyFocalLoss(focal_alpha=alpha, lambda_focal=2.0), voxfuse.TverskyLoss()),
    ):
        torch.testing.assert_close(loss(logits, labels), part(logits, labels) + 2 * focal)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(alpha=[1.0, 2.0]), r"alpha: got 2 numbers, expected 3, one for every class"),
        (dict(alpha=[1.0, -2.0, 1.0]), r"alpha: got -2.0, expected a finite number >= 0"),
        (
            dict(alpha=[0.1, 0.2, 0.3], activation="sigmoid"),
            r"alpha: got \[0.1, 0.2, 0.3\], expected one number in \[0, 1\]; one for every class",
        ),
    ],
)
def test_an_alpha_for_every_class_that_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        voxfuse.FocalLoss(**options)(*batch())


def test_an_alpha_for_every_class_needs_classes():
    loss = voxfuse.FocalLoss(alpha=[1.0], activation="none")
    with pytest.raises(ValueError, match=r"alpha: got \[1.0\], expected one number in \[0, 1\]"):
        loss(torch.full((1, 1, 4), 0.5), torch.ones(1, 1, 4))


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_gradcheck_through_voxelwise_weights(reduction):
    logits, labels = batch(spatial=(4, 2), dtype=torch.float64)
    weight = torch.rand(2, 4, 2, dtype=torch.float64)
    weight[0, 0] = 0
    labels[1, 0] = 9
    for loss in (
        voxfuse.CrossEntropyLoss(reduction=reduction, ignore_index=9, label_smoothing=0.1),
        voxfuse.FocalLoss(reduction=reduction, ignore_index=9, activation="sigmoid", alpha=0.3),
        voxfuse.FocalLoss(reduction=reduction, ignore_index=9, class_weight=[1.0, 2.0, 3.0]),
    ):
        assert torch.autograd.gradcheck(
            lambda z, loss=loss: loss(z, labels, weight), logits.detach().requires_grad_()
        )


@pytest.mark.parametrize("gamma", [0.5, 0.75, 1.5])
@pytest.mark.parametrize("margin", [8.0, 16.0, 30.0])
def test_focal_tversky_gradient_near_a_perfect_prediction(gamma, margin):
    labels = torch.randint(0, 2, (1, 16, 16, 16), generator=torch.Generator().manual_seed(0))
    logits = torch.where(labels[:, None] == torch.arange(2).reshape(1, 2, 1, 1, 1), margin, 0.0)
    loss = voxfuse.FocalTverskyLoss(gamma=gamma)

    def gradient(dtype):
        leaf = logits.to(dtype).requires_grad_()
        return torch.autograd.grad(loss(leaf, labels), leaf)[0].double()

    truth = gradient(torch.float64)
    assert bool((truth != 0).all())
    torch.testing.assert_close(gradient(torch.float32), truth, rtol=2e-6, atol=0)


@everyone
def test_a_second_derivative_is_refused(name):
    logits, labels = batch()
    leaf = logits.requires_grad_()
    (slopes,) = torch.autograd.grad(MODULES[name]()(leaf, labels), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        slopes.square().sum().backward()


@everyone
def test_no_gradient_is_made_where_none_is_wanted(name):
    logits, labels = batch()
    loss = MODULES[name]()
    expected = loss(logits.clone().requires_grad_(), labels)
    assert expected.requires_grad
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(loss(logits, labels), expected.detach(), rtol=0, atol=0)


# --- Bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: voxfuse.TverskyLoss(alpha=-1), ValueError, "alpha: got -1, expected a finite"),
        (lambda: voxfuse.TverskyLoss(beta="x"), TypeError, "beta: got 'x', expected a number"),
        (lambda: voxfuse.TverskyLoss(gamma=0), ValueError, "gamma: got 0, expected a finite"),
        (
            lambda: voxfuse.TverskyLoss(activation="tanh"),
            ValueError,
            "activation: got 'tanh', expected one of 'none', 'sigmoid', 'softmax'",
        ),
        (lambda: voxfuse.DiceLoss(reduction="max"), ValueError, "reduction: got 'max'"),
        (lambda: voxfuse.DiceLoss(smooth_nr=-1), ValueError, "smooth_nr: got -1"),
        (lambda: voxfuse.DiceLoss(absent="drop"), ValueError, "absent: got 'drop'"),
        (lambda: voxfuse.DiceLoss(alpha=1), TypeError, "alpha: not an option of DiceLoss"),
        (
            lambda: voxfuse.DiceCELoss(reduction="none", batch=True),
            ValueError,
            "batch: True pools the samples, of which reduction='none' gives each a loss",
        ),
        (lambda: voxfuse.DiceCELoss(lambda_ce=-1), ValueError, "lambda_ce: got -1"),
        (
            lambda: voxfuse.DiceCELoss(activation="sigmoid", label_smoothing=0.1),
            ValueError,
            "label_smoothing: needs a softmax",
        ),
        (lambda: voxfuse.FocalLoss(alpha=2), ValueError, r"alpha: got 2, expected .* in \[0, 1\]"),
        (lambda: voxfuse.TopKLoss(0), ValueError, r"k: got 0, expected a .* in \(0, 100"),
        (lambda: voxfuse.UnifiedFocalLoss(gamma=1), ValueError, r"gamma: got 1.0, expected"),
        (lambda: voxfuse.GeneralizedDiceLoss("none"), ValueError, "class_pooling: got 'none'"),
        (lambda: voxfuse.LovaszLoss("some"), ValueError, "classes: got 'some', expected one of"),
        (
            lambda: voxfuse.LovaszLoss(backend="cpp"),
            ValueError,
            "backend: got 'cpp', expected one of 'auto', 'reference'",
        ),
        (lambda: voxfuse.DeepSupervisionLoss(3), TypeError, "loss: got int"),
    ],
)
def test_bad_options(make, error, message):
    with pytest.raises(error, match=message):
        make()


@everyone
def test_bad_tensors(name):
    loss = MODULES[name]()
    logits, labels = batch()
    wrong = labels.clone()
    wrong[1, 2, 3, 1] = 5
    cases = (
        ((logits.long(), labels), TypeError, "input: got int64 of shape"),
        ((logits, labels.tolist()), TypeError, "target: expected a torch.Tensor, got list"),
        ((logits, labels[:, 1:]), ValueError, "target: got shape"),
        ((logits, labels, torch.ones(3)), ValueError, "mask: got shape"),
        ((logits, wrong), ValueError, r"target: label 5 is outside \[0, 3\)"),
    )
    for arguments, error, message in cases:
        with pytest.raises(error, match=message):
            loss(*arguments)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", ["tversky", "jaccard", "mcc"])
def test_a_class_weight_for_every_sample_weighs_its_terms(name, backend):
    logits, labels = batch(dtype=torch.float64)
    plain = MODULES[name](reduction="none", backend=backend)(logits, labels)
    for reduction, expected in (
        ("none", ANNOTATED * plain),
        ("mean", (ANNOTATED * plain).mean()),
        ("sum", (ANNOTATED * plain).sum()),
    ):
        loss = MODULES[name](reduction=reduction, class_weight=ANNOTATED, backend=backend)
        torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-12, atol=0)
    loss = MODULES[name](absent="ignore", class_weight=ANNOTATED, backend=backend)
    expected = (ANNOTATED * plain).sum() / 4  # the mean over annotated classes
    torch.testing.assert_close(loss(logits, labels), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["tversky", "mcc"])
def test_a_class_is_pooled_over_the_samples_in_which_it_is_annotated(name):
    logits, labels = batch(dtype=torch.float64)
    terms = []
    for c in range(3):
        own = ANNOTATED[:, c] != 0
        pooled = MODULES[name](reduction="none", batch=True)(logits[own], labels[own])
        terms.append(ANNOTATED[own, c].mean() * pooled[c])
    loss = MODULES[name](reduction="none", batch=True, class_weight=ANNOTATED)
    torch.testing.assert_close(loss(logits, labels), torch.stack(terms), rtol=1e-12, atol=0)
    # What is not annotated gets no gradient, where the classes are on their own.
    leaf = logits.clone().requires_grad_()
    loss = MODULES[name](activation="sigmoid", batch=True, class_weight=ANNOTATED)
    loss(leaf, labels).backward()
    assert torch.equal(leaf.grad.flatten(2).abs().amax(2) != 0, ANNOTATED != 0)


def test_a_class_weight_for_every_sample_of_a_head_and_of_pooled_classes():
    logits, labels = batch(dtype=torch.float64)
    identity = torch.eye(3, dtype=torch.float64)
    for loss in (
        voxfuse.DiceCELoss(class_weight=ANNOTATED),
        voxfuse.GeneralizedDiceLoss(class_weight=ANNOTATED, absent="ignore"),
    ):
        expected = loss(logits, labels)
        fused = voxfuse.head_loss(loss, logits, identity, None, labels)
        torch.testing.assert_close(fused, expected)
        loss.class_weight = ANNOTATED[:1].expand(2, -1)
        by_sample = loss(logits, labels)
        loss.class_weight = ANNOTATED[0]
        if isinstance(loss, voxfuse.DiceCELoss):  # a weight of 0 for all is no annotation
            torch.testing.assert_close(by_sample, loss(logits, labels))
    message = r"class_weight: got shape \(3, 3\), expected \(3,\).*, or \(2, 3\)"
    with pytest.raises(ValueError, match=message):
        voxfuse.DiceLoss(class_weight=torch.ones(3, 3))(logits, labels)
    with pytest.raises(ValueError, match=r"class_weight: got shape \(2, 3\), expected \(3,\)"):
        voxfuse.CrossEntropyLoss(class_weight=ANNOTATED)(logits, labels)


def test_weights_of_the_wrong_length():
    logits, labels = batch()
    with pytest.raises(ValueError, match=r"class_weight: got shape \(3,\), expected \(2,\)"):
        voxfuse.TverskyLoss(include_background=False, class_weight=[1.0] * 3)(logits, labels)
    with pytest.raises(ValueError, match=r"likelihood_weight: got shape \(2,\), expected \(3,\)"):
        voxfuse.DiceCELoss(likelihood_weight=[1.0] * 2)(logits, labels)
    with pytest.raises(ValueError, match=r"class_weight: got shape \(2,\), expected \(3,\)"):
        voxfuse.LovaszLoss(class_weight=[1.0] * 2)(logits, labels)
    with pytest.raises(ValueError, match="pos_weight: needs a sigmoid likelihood"):
        voxfuse.DiceCELoss(pos_weight=2.0)(logits, labels)
    with pytest.raises(ValueError, match="include_background: False leaves no class"):
        voxfuse.DiceLoss(include_background=False, activation="sigmoid")(
            logits[:, :1], (labels[:, None] > 0).to(torch.uint8)
        )


def test_lovasz_goes_back_twice_or_for_several_cotangents_or_raises():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.arange(10).reshape(2, 5) % 3
    compute = voxfuse.LovaszLoss()
    loss = compute(logits, labels)
    (once,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (batched,) = torch.autograd.grad(
        compute(logits, labels), logits, torch.tensor([1.0, 2.0]), is_grads_batched=True
    )
    torch.testing.assert_close(batched, torch.stack([once, 2 * once]), rtol=1e-6, atol=0)
    (again,) = torch.autograd.grad(loss, logits, retain_graph=True)
    assert torch.equal(again, once)
    labels.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("per_image", [False, True])
def test_lovasz_of_an_empty_batch_is_zero(per_image):
    logits = torch.zeros(0, 3, 4, requires_grad=True)
    loss = voxfuse.LovaszLoss(per_image=per_image)(logits, torch.zeros(0, 4, dtype=torch.long))
    loss.backward()
    assert loss == 0


def test_the_losses_of_no_sample_go_back():
    logits = torch.zeros(0, 3, 4, requires_grad=True)
    loss = voxfuse.DiceCELoss(reduction="none")(logits, torch.zeros(0, 4, dtype=torch.long))
    assert loss.shape == (0,)
    loss.sum().backward()
    assert logits.grad.shape == logits.shape
