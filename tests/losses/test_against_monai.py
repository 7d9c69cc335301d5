"""The losses equal MONAI's, values and gradients, wherever the option sets coincide."""

from __future__ import annotations

import inspect
import re

import pytest
import torch

import voxfuse

losses = pytest.importorskip("monai.losses", reason="MONAI is not installed")

SOFTMAX = {"softmax": True, "to_onehot_y": True}
SIGMOID = {"sigmoid": True, "to_onehot_y": True}
WEIGHT = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64)

PAIRS = {
    "tversky": (lambda: voxfuse.TverskyLoss(), lambda: losses.TverskyLoss(**SOFTMAX)),
    "tversky .3 .7": (
        lambda: voxfuse.TverskyLoss(0.3, 0.7),
        lambda: losses.TverskyLoss(alpha=0.3, beta=0.7, **SOFTMAX),
    ),
    "tversky sigmoid": (
        lambda: voxfuse.TverskyLoss(0.3, 0.7, activation="sigmoid", include_background=False),
        lambda: losses.TverskyLoss(alpha=0.3, beta=0.7, include_background=False, **SIGMOID),
    ),
    "tversky batch, none": (
        lambda: voxfuse.TverskyLoss(0.3, 0.7, batch=True, reduction="none"),
        lambda: losses.TverskyLoss(alpha=0.3, beta=0.7, batch=True, reduction="none", **SOFTMAX),
    ),
    "tversky none": (
        lambda: voxfuse.TverskyLoss(reduction="none", include_background=False),
        lambda: losses.TverskyLoss(reduction="none", include_background=False, **SOFTMAX),
    ),
    "tversky smooth": (
        lambda: voxfuse.TverskyLoss(smooth_nr=1.0, smooth_dr=2.0, reduction="sum"),
        lambda: losses.TverskyLoss(smooth_nr=1.0, smooth_dr=2.0, reduction="sum", **SOFTMAX),
    ),
    "tversky + ce": (
        lambda: voxfuse.TverskyCELoss(),
        lambda: losses.DiceCELoss(smooth_nr=2e-5, smooth_dr=2e-5, **SOFTMAX),
    ),
    "tversky + focal": (
        lambda: voxfuse.TverskyFocalLoss(focal_activation="sigmoid"),
        lambda: losses.DiceFocalLoss(smooth_nr=2e-5, smooth_dr=2e-5, **SOFTMAX),
    ),
    "dice": (lambda: voxfuse.DiceLoss(), lambda: losses.DiceLoss(**SOFTMAX)),
    "dice weighted": (
        lambda: voxfuse.DiceLoss(class_weight=WEIGHT[1:], include_background=False),
        lambda: losses.DiceLoss(weight=WEIGHT[1:], include_background=False, **SOFTMAX),
    ),
    "dice squared": (
        lambda: voxfuse.DiceLoss(squared=True, reduction="sum"),
        lambda: losses.DiceLoss(squared_pred=True, reduction="sum", **SOFTMAX),
    ),
    "jaccard": (
        lambda: voxfuse.JaccardLoss(smooth_nr=5e-6, smooth_dr=5e-6),
        lambda: losses.DiceLoss(jaccard=True, **SOFTMAX),
    ),
    "jaccard squared": (
        lambda: voxfuse.JaccardLoss(squared=True, smooth_nr=5e-6, smooth_dr=5e-6, batch=True),
        lambda: losses.DiceLoss(jaccard=True, squared_pred=True, batch=True, **SOFTMAX),
    ),
    **{
        f"generalised dice {kind} {batch}": (
            lambda kind=kind, batch=batch: voxfuse.GeneralizedDiceLoss(kind, batch=batch),
            lambda kind=kind, batch=batch: losses.GeneralizedDiceLoss(
                w_type=kind, batch=batch, **SOFTMAX
            ),
        )
        for kind in ("square", "simple", "uniform")
        for batch in (False, True)
    },
    "mcc": (lambda: voxfuse.MCCLoss(), lambda: losses.MCCLoss(**SOFTMAX)),
    "mcc sigmoid batch, none": (
        lambda: voxfuse.MCCLoss(
            activation="sigmoid", include_background=False, batch=True, reduction="none"
        ),
        lambda: losses.MCCLoss(include_background=False, batch=True, reduction="none", **SIGMOID),
    ),
    "mcc smooth": (
        lambda: voxfuse.MCCLoss(smooth_nr=1.0, smooth_dr=2.0, reduction="sum"),
        lambda: losses.MCCLoss(smooth_nr=1.0, smooth_dr=2.0, reduction="sum", **SOFTMAX),
    ),
    "dice + ce": (lambda: voxfuse.DiceCELoss(), lambda: losses.DiceCELoss(**SOFTMAX)),
    "dice + ce weighted": (
        lambda: voxfuse.DiceCELoss(
            class_weight=WEIGHT[1:],
            likelihood_weight=WEIGHT,
            include_background=False,
            label_smoothing=0.1,
            lambda_ce=0.5,
        ),
        lambda: losses.DiceCELoss(
            weight=WEIGHT, include_background=False, label_smoothing=0.1, lambda_ce=0.5, **SOFTMAX
        ),
    ),
    "sigmoid dice + softmax ce": (
        lambda: voxfuse.DiceCELoss(activation="sigmoid", ce_activation="softmax"),
        lambda: losses.DiceCELoss(**SIGMOID),
    ),
    "focal": (
        lambda: voxfuse.FocalLoss(activation="sigmoid"),
        lambda: losses.FocalLoss(to_onehot_y=True),
    ),
    "focal balanced": (
        lambda: voxfuse.FocalLoss(
            1.5,
            0.25,
            activation="sigmoid",
            include_background=False,
            class_weight=WEIGHT * (1 - torch.eye(4, dtype=torch.float64)[0]),
        ),
        lambda: losses.FocalLoss(
            to_onehot_y=True, gamma=1.5, alpha=0.25, include_background=False, weight=WEIGHT[1:]
        ),
    ),
    "focal softmax": (
        lambda: voxfuse.FocalLoss(alpha=0.25),
        lambda: losses.FocalLoss(to_onehot_y=True, use_softmax=True, alpha=0.25),
    ),
    "focal softmax, an alpha a class": (
        lambda: voxfuse.FocalLoss(1.5, WEIGHT.tolist()),
        lambda: losses.FocalLoss(
            to_onehot_y=True, use_softmax=True, gamma=1.5, alpha=WEIGHT.tolist()
        ),
    ),
    "dice + focal": (
        lambda: voxfuse.DiceFocalLoss(focal_activation="sigmoid", focal_alpha=0.3),
        lambda: losses.DiceFocalLoss(alpha=0.3, **SOFTMAX),
    ),
}


@pytest.mark.parametrize(
    "name",
    ["DiceLoss", "DiceCELoss", "DiceFocalLoss", "FocalLoss", "GeneralizedDiceLoss", "TverskyLoss"],
)
def test_monais_arguments_are_ours_or_the_error_names_ours(name):
    """Of the losses of the same name; what ours are worth is what PAIRS compare."""
    ours = getattr(voxfuse, name)
    known = inspect.signature(ours).parameters
    for argument in inspect.signature(getattr(losses, name)).parameters:
        if argument in known:
            continue
        with pytest.raises(TypeError, match=rf"{argument}: not an option of {name}; ") as raised:
            ours(**{argument: True})
        named = re.findall(r"(\w+)=", str(raised.value))
        if argument == "to_onehot_y":
            assert "not needed: labels are read as they are" in str(raised.value)
        elif argument == "jaccard":
            assert "voxfuse.JaccardLoss" in str(raised.value)
        else:
            assert named
            assert set(named) - {"mask"} <= set(known)


def test_monais_weight_is_two_of_ours():
    """Either one alone leaves the other term unweighted; both together are MONAI's one."""
    message = "MONAI's one weight is two here: class_weight= .* likelihood_weight= .* mask="
    with pytest.raises(TypeError, match=message):
        voxfuse.DiceCELoss(weight=WEIGHT)
    logits, labels = torch.randn(2, 4, 6, 5), torch.randint(0, 4, (2, 1, 6, 5))
    with pytest.raises(TypeError, match=message):
        voxfuse.functional.dice_ce_loss(logits, labels, weight=WEIGHT)
    with pytest.raises(TypeError, match="weight: .* class_weight=; weights of voxels are mask="):
        voxfuse.CrossEntropyLoss(weight=WEIGHT)
    loss = voxfuse.DiceCELoss(class_weight=WEIGHT, likelihood_weight=WEIGHT)
    peer = losses.DiceCELoss(weight=WEIGHT, **SOFTMAX)
    torch.testing.assert_close(loss(logits, labels), peer(logits.double(), labels).float())
    alone = voxfuse.DiceLoss(class_weight=WEIGHT)(logits, labels)
    unweighted = voxfuse.CrossEntropyLoss()(logits, labels)
    one = voxfuse.DiceCELoss(class_weight=WEIGHT)
    torch.testing.assert_close(one(logits, labels), alone + unweighted)


def compare(ours, theirs, logits, ours_target, theirs_target):
    """Ours in float32 against theirs in float64, under a random cotangent."""
    mine = logits.float().requires_grad_()
    other = logits.float().double().requires_grad_()
    loss = ours(mine, ours_target)
    expected = theirs(other, theirs_target)
    cotangent = torch.rand_like(expected)
    # MONAI's focal losses compute in float32 whatever they are given.
    (gradient,) = torch.autograd.grad(loss, mine, cotangent.reshape(loss.shape).float())
    (expected_gradient,) = torch.autograd.grad(expected, other, cotangent)
    # Sums of a few hundred float32 terms: a few ulp of the loss, and of the largest gradient.
    torch.testing.assert_close(
        loss.double(), expected.double().reshape(loss.shape), rtol=1e-6, atol=1e-7
    )
    largest = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=0, atol=5e-6 * largest)


@pytest.mark.parametrize("name", PAIRS)
def test_labels(name):
    ours, theirs = PAIRS[name]
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, 6, 5)
    labels = torch.randint(0, 4, (2, 1, 7, 6, 5), dtype=torch.uint8)
    compare(ours(), theirs(), logits, labels, labels.double())


@pytest.mark.parametrize("name", [n for n in PAIRS if "generalised" not in n])
def test_dense_targets(name):
    ours, theirs = PAIRS[name]
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, 5)
    dense = torch.rand(2, 4, 7, 5).softmax(1)
    if "focal" in name:
        # MONAI's focal losses interpolate the modulation of soft targets; ours mixes the terms.
        dense = torch.nn.functional.one_hot(dense.argmax(1), 4).movedim(-1, 1).float()
    peer = theirs()
    for part in (peer, getattr(peer, "dice", None)):
        if part is not None:
            part.to_onehot_y = False
    compare(ours(), peer, logits, dense, dense.double())


@pytest.mark.parametrize("name", ["tversky", "dice"])
def test_soft_labels(name):
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, 5)
    dense = torch.rand(2, 4, 7, 5)
    ours = {"tversky": voxfuse.TverskyLoss, "dice": voxfuse.DiceLoss}[name](overlap="min")
    theirs = {"tversky": losses.TverskyLoss, "dice": losses.DiceLoss}[name](
        softmax=True, soft_label=True
    )
    compare(ours, theirs, logits, dense, dense.double())


def test_one_channel():
    torch.manual_seed(0)
    logits = torch.randn(2, 1, 7, 6, 5)
    mask = torch.randint(0, 2, (2, 1, 7, 6, 5), dtype=torch.uint8)
    compare(
        voxfuse.DiceCELoss(activation="sigmoid", pos_weight=2.0),
        losses.DiceCELoss(sigmoid=True, weight=torch.tensor([2.0], dtype=torch.float64)),
        logits,
        mask,
        mask.double(),
    )
    compare(
        voxfuse.TverskyLoss(0.3, 0.7, activation="sigmoid"),
        losses.TverskyLoss(sigmoid=True, alpha=0.3, beta=0.7),
        logits,
        mask,
        mask.double(),
    )


def test_metatensors_of_a_standard_batch():
    data = pytest.importorskip("monai.data")
    torch.manual_seed(0)
    plain = torch.randn(2, 3, 5, 5, 5)
    labels = torch.randint(0, 3, (2, 1, 5, 5, 5)).float()
    logits = data.MetaTensor(plain).requires_grad_()
    loss = voxfuse.DiceCELoss()(logits, data.MetaTensor(labels))
    loss.backward()
    twin = plain.clone().requires_grad_()
    expected = voxfuse.DiceCELoss()(twin, labels)
    expected.backward()
    assert type(loss) is torch.Tensor
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)
    torch.testing.assert_close(logits.grad.as_subclass(torch.Tensor), twin.grad, rtol=0, atol=0)


@pytest.mark.parametrize(("weight", "delta", "gamma"), [(0.5, 0.7, 0.5), (0.3, 0.6, 0.2)])
def test_what_differs_from_the_asymmetric_unified_focal_loss(weight, delta, gamma):
    """MONAI's likelihood is half of the paper's: its mean runs over the two classes as well."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 5, 4, 3, dtype=torch.float64, generator=generator).requires_grad_()
    labels = torch.randint(0, 2, (2, 1, 5, 4, 3), generator=generator)
    peer = losses.AsymmetricUnifiedFocalLoss(
        to_onehot_y=True, weight=weight, delta=delta, gamma=gamma
    )
    expected = peer(logits.softmax(1), labels)
    ours = voxfuse.UnifiedFocalLoss(
        weight / (2 - weight), delta, gamma, symmetric=False, smooth_nr=1e-7, smooth_dr=1e-7
    )
    value = (1 - weight / 2) * ours(logits, labels)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    (wanted,) = torch.autograd.grad(expected, logits)
    (found,) = torch.autograd.grad(value, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-15)


def test_deep_supervision_equals_monai():
    generator = torch.Generator().manual_seed(0)
    outputs = [
        torch.randn(2, 3, *size, dtype=torch.float64, generator=generator)
        for size in ((8, 6, 4), (4, 3, 2), (2, 2, 1))
    ]
    labels = torch.randint(0, 3, (2, 1, 8, 6, 4), generator=generator)
    for weights in ("exp", "same", "two"):
        peer = losses.DeepSupervisionLoss(losses.DiceLoss(**SOFTMAX), weights)
        ours = voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), weights)
        expected = peer(outputs, labels.double())
        # MONAI adds the levels up in float32.
        torch.testing.assert_close(ours(outputs, labels).float(), expected, rtol=1e-6, atol=0)
