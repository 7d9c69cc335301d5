"""The Matthews correlation loss: its formula, its precision, and where it is 0/0."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import voxfuse


def value_and_gradient(loss, logits: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, *arguments)
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def terms_of(p: Tensor, g: Tensor, weight: Tensor | float, pooled: bool, nr=0.0, dr=1e-5) -> Tensor:
    """The terms (B, C), every count added up over the voxels (B, C, V)."""
    axes = (0, 2) if pooled else (2,)
    pairs = ((p, g), (p, 1 - g), (1 - p, g), (1 - p, 1 - g))
    tp, fp, fn, tn = ((weight * a * b).sum(axes) for a, b in pairs)
    root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn) + dr).sqrt()
    return 1 - (tp * tn - fp * fn + nr) / root


@pytest.mark.parametrize("seed", range(24))
def test_it_is_its_formula(seed):
    """Labels, hard and soft dense targets, voxel weights and masks, both activations, pooled."""
    generator = torch.Generator().manual_seed(seed)
    classes, pooled, sigmoid = 2 + seed % 3, seed % 2 == 1, seed % 5 == 0
    logits = 2 * torch.randn(2, classes, 40, generator=generator, dtype=torch.float64)
    target = torch.randint(0, classes, (2, 40), generator=generator)
    g = F.one_hot(target, classes).movedim(-1, 1).double()
    if seed % 4 == 2:
        target = g
    elif seed % 4 == 3:
        target = g = torch.rand(2, classes, 40, generator=generator, dtype=torch.float64)
    weight = None
    if seed % 3 == 1:
        weight = torch.rand(2, 40, generator=generator) > 0.3
    elif seed % 3 == 2:
        weight = torch.rand(2, 40, generator=generator, dtype=torch.float64)
    options = {"smooth_nr": 0.5, "smooth_dr": 2.0} if seed % 7 == 0 else {}
    factor = torch.linspace(0.5, 2, classes, dtype=torch.float64)

    def expected(z, *_):
        p = z.sigmoid() if sigmoid else z.softmax(1)
        w = 1.0 if weight is None else weight.double()[:, None]
        return (factor * terms_of(p, g, w, pooled, *options.values())).mean()

    loss = voxfuse.MCCLoss(
        activation="sigmoid" if sigmoid else "softmax",
        batch=pooled,
        class_weight=factor,
        backend="reference" if seed % 2 else "auto",
        **options,
    )
    value, gradient = value_and_gradient(loss, logits, target, weight)
    wanted, slope = value_and_gradient(expected, logits)
    torch.testing.assert_close(value, wanted, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradient, slope, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("spread", [1.0, 10.0])
@pytest.mark.parametrize("dense", [False, True])
def test_the_few_voxels_outside_a_class_keep_their_precision(spread, dense):
    """TN of the background is 9 voxels of 32,768: a difference of large float32 sums loses it."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.zeros(1, 32, 32, 32, dtype=torch.uint8)
    labels[0, :3, 5, 7:10] = 1
    logits = torch.randn(1, 2, 32, 32, 32, generator=generator)
    logits[:, 0] += spread * (1 - 2.0 * labels)
    g = F.one_hot(labels.long(), 2).movedim(-1, 1)
    target = g.float() if dense else labels

    def plain(z, *_):
        return terms_of(z.softmax(1).flatten(2), g.to(z.dtype).flatten(2), 1.0, False).mean()

    value, gradient = value_and_gradient(voxfuse.MCCLoss(), logits, target)
    rounded, rounded_slope = value_and_gradient(plain, logits)
    truth, slope = value_and_gradient(plain, logits.double())
    eps = torch.finfo(torch.float32).eps
    assert abs(value - truth) <= 2 * abs(rounded - truth) + 4 * eps * truth
    largest = slope.abs().max()
    error = (gradient - slope).abs().max()
    assert error <= 2 * (rounded_slope - slope).abs().max() + 16 * eps * largest


def test_a_nearly_perfect_prediction_keeps_its_small_loss():
    p = torch.tensor([[[1 - 1e-11, 1 - 3e-11, 2e-11, 5e-12, 1e-12]]], dtype=torch.float64)
    g = torch.tensor([[[1, 1, 0, 0, 0]]], dtype=torch.uint8)
    exact = [Fraction(x) for x in p.flatten().tolist()]
    tp, fp = sum(exact[:2]), sum(exact[2:])
    fn, tn = 2 - tp, 3 - fp
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    # 1 - x = (1 - x^2) / (1 + x), of which 1 + x is 2 to eleven digits.
    expected = float((1 - (tp * tn - fp * fn) ** 2 / product) / 2)
    value = voxfuse.MCCLoss(activation="none", smooth_dr=0)(p, g)
    assert expected < 1e-10
    # 1 - p and the sums of it are rounded once more each.
    assert float(value) == pytest.approx(expected, rel=1e-5)
    difference = float(terms_of(p, g, 1.0, False, dr=0.0))
    assert abs(difference - expected) > 10 * abs(float(value) - expected)


ONE_SIDED = {"absent": 0, "fills the sample": 1}


@pytest.mark.parametrize("truth", ONE_SIDED)
@pytest.mark.parametrize("kind", ["integers", "floats"])
@pytest.mark.parametrize("smooth_dr", [0.0, 1e-5])
@pytest.mark.parametrize("spread", [0.0, 3.0, 30.0, 200.0])
def test_a_class_that_is_everywhere_or_nowhere(truth, kind, smooth_dr, spread):
    """Chance, without a gradient, or agreement where no voxel at all is wrong; never NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn(1, 1, 500, generator=generator)
    if spread > 100:
        logits = torch.full_like(logits, -spread if truth == "absent" else spread)
    target = torch.full((1, 1, 500), ONE_SIDED[truth], dtype=torch.uint8)
    target = target if kind == "integers" else target.float()
    loss = voxfuse.MCCLoss(activation="sigmoid", smooth_dr=smooth_dr)
    value, gradient = value_and_gradient(loss, logits, target)
    assert float(value) == (0 if spread > 100 else 1)
    assert not bool(gradient.any())
    loss.absent = "ignore"
    assert float(loss(logits, target)) == 0


@pytest.mark.parametrize("absent", ["keep", "zero", "ignore"])
def test_absent_leaves_out_what_has_no_correlation(absent):
    """Two samples: in the second one class fills the sample, and the other two are not there."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 60, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 60), generator=generator)
    labels[1] = 1
    terms = voxfuse.MCCLoss(reduction="none", absent=absent)(logits, labels)
    expected = terms_of(logits.softmax(1), F.one_hot(labels, 3).movedim(-1, 1), 1.0, False)
    torch.testing.assert_close(terms[0], expected[0], rtol=1e-12, atol=0)
    assert terms[1].tolist() == [float(absent == "keep")] * 3
    mean = terms.sum() / (3 if absent == "ignore" else 6)
    torch.testing.assert_close(voxfuse.MCCLoss(absent=absent)(logits, labels), mean)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("size", [1e-3, 16.0, 20.0, 90.0, 1e4])
@pytest.mark.parametrize("smooth_dr", [0.0, 1e-5])
@pytest.mark.parametrize("weighted", [0, 1, 2, 3])
def test_one_prediction_for_all_voxels_is_chance(sign, size, smooth_dr, weighted):
    """Sure as it may be: TN is then as small as the rounding of the sums it is a difference of."""
    logits = torch.full((1, 1, 5000), sign * size)
    target = (torch.arange(5000) % 3 == 0).to(torch.uint8).reshape(1, 1, -1)
    mask = torch.rand(1, 5000, generator=torch.Generator().manual_seed(weighted))
    loss = voxfuse.MCCLoss(activation="sigmoid", smooth_dr=smooth_dr)
    value, gradient = value_and_gradient(loss, logits, target, mask if weighted else None)
    assert float(value) == pytest.approx(1, abs=2e-3)
    assert bool(gradient.isfinite().all())


def test_half_precision_counts_do_not_overflow():
    logits = torch.zeros(1, 2, 64, 64, 64, dtype=torch.float16)
    logits[:, 1, :32] = 2
    labels = torch.zeros(1, 64, 64, 64, dtype=torch.uint8)
    labels[:, :40] = 1
    expected = voxfuse.MCCLoss()(logits.double(), labels)
    value = voxfuse.MCCLoss()(logits, labels)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=0)


def test_there_is_no_logarithm_of_a_correlation():
    with pytest.raises(ValueError, match="log: got True, expected False"):
        voxfuse.MCCLoss(log=True)


def test_a_linear_head_has_the_loss_of_its_logits():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 6, 5, 4, 3, generator=generator, dtype=torch.float64)
    weight = torch.randn(9, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 5, 4, 3), generator=generator)
    loss = voxfuse.MCCLoss()
    fused = voxfuse.head_loss(loss, features, weight, None, labels)
    expected = loss(torch.einsum("ck,bk...->bc...", weight, features), labels)
    assert math.isclose(float(fused), float(expected), rel_tol=1e-12)
