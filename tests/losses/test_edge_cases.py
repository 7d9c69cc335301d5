"""Every loss of extreme logits and targets, excluded voxels, NaN, a voxel, a class, half types."""

from __future__ import annotations

import math

import pytest
import torch

from tests.losses.cases import MODULES, batch, everyone, finite


@everyone
@pytest.mark.parametrize("scale", [1e4, math.inf])
def test_huge_logits(name, scale):
    logits, labels = batch()
    logits = logits.sign() * scale
    bounded = ("tversky", "fbeta", "focal tversky", "dice", "jaccard", "mcc", "lovasz")
    if math.isinf(scale) and name not in bounded:
        # A log-likelihood of +-inf is as large as the largest float32.
        pytest.skip("the log-likelihood of infinite logits has no finite sum")
    finite(name, logits, labels)


@everyone
@pytest.mark.parametrize("present", [0, 2])
def test_a_single_class_in_the_target(name, present):
    logits, labels = batch()
    finite(name, logits, torch.full_like(labels, present))


@everyone
def test_an_empty_foreground_predicted_right(name):
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    logits = torch.stack([torch.full((2, 4, 4), 100.0), torch.zeros(2, 4, 4)], 1)
    value, _ = finite(name, logits, labels)
    if "tversky" in name or name in ("dice", "jaccard", "fbeta"):
        # The absent class counts as perfect: 1e-5 over 1e-5 and nothing else.
        assert value == pytest.approx(0, abs=1e-6)


@everyone
def test_everything_ignored(name):
    logits, labels = batch()
    logits[:, :, 0] = math.nan
    value, gradient = finite(name, logits, torch.full_like(labels, 7), ignore_index=7)
    assert value == 0
    assert bool((gradient == 0).all())


@everyone
def test_a_mask_of_zeros_excludes_nan(name):
    logits, labels = batch()
    masked = logits.clone()
    masked[:, :, 0] = math.nan
    weight = torch.ones(2, *labels.shape[1:])
    weight[:, 0] = 0
    value, gradient = finite(name, masked, labels, weight)
    assert bool((gradient[:, :, 0] == 0).all())
    if name != "top k":  # k is a percentage of all voxels
        expected, _ = finite(name, logits[:, :, 1:], labels[:, 1:])
        assert value == pytest.approx(expected, rel=1e-6)


@everyone
def test_one_voxel(name):
    finite(name, torch.randn(1, 3, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.long))
    finite(name, torch.randn(2, 3), torch.tensor([0, 2]))  # no spatial axis at all


@everyone
def test_one_class(name):
    logits = torch.randn(2, 1, 4, 4)
    mask = torch.randint(0, 2, (2, 1, 4, 4), dtype=torch.uint8)
    finite(name, logits, mask, activation="sigmoid")
    if name not in ("bce", "hinge"):
        with pytest.raises(ValueError, match="activation: a softmax over one class is constant"):
            MODULES[name]()(logits, mask)


@everyone
def test_nan_logits_give_a_nan_loss(name):
    logits, labels = batch()
    logits[0, 1, 2, 2, 2] = math.nan
    assert bool(MODULES[name]()(logits, labels).isnan())


@everyone
def test_a_nan_weight_gives_a_nan_loss_and_gradient(name):
    logits, labels = batch()
    weight = torch.ones(logits.shape[0], *logits.shape[2:])
    weight[0, 2, 2, 2] = math.nan
    loss = MODULES[name]()
    classes = torch.ones(3)
    for voxels in (weight, None):
        if voxels is None:  # changed in place, after the check of what is given
            loss.class_weight = classes
            classes[1] = math.nan
        leaf = logits.clone().requires_grad_()
        value = loss(leaf, labels, voxels)
        (gradient,) = torch.autograd.grad(value, leaf)
        assert bool(value.isnan())
        assert bool(gradient.isnan().any())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@everyone
def test_half_precision_logits(name, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(1, 4, 64, 64, 64, generator=generator)).to(dtype)
    labels = torch.randint(0, 4, (1, 1, 64, 64, 64), generator=generator, dtype=torch.uint8)
    if name in ("lovasz", "hinge"):
        logits, labels = logits[..., :16, :16, :16], labels[..., :16, :16, :16]
    loss = MODULES[name]()
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    (value * 2.0**16).backward()
    assert value.dtype == torch.float32
    assert leaf.grad.dtype == dtype
    wide = logits.double().requires_grad_()
    truth = loss(wide, labels)
    (truth * 2.0**16).backward()
    assert float(value.detach()) == pytest.approx(float(truth.detach()), abs=1e-3)
    if name in ("top k", "lovasz", "hinge"):
        return  # sorting breaks ties by the last bit, and so chooses another subgradient
    error = (leaf.grad.double() - wide.grad).abs()
    one_rounding = torch.finfo(dtype).eps / 2 * wide.grad.abs()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    slack = 1e-5 * wide.grad.abs().amax()
    assert bool((error <= one_rounding * 1.01 + smallest + slack).all())


@everyone
def test_labels_of_any_type_and_channels_last(name):
    logits, labels = batch()
    loss = MODULES[name]()
    expected = loss(logits, labels)
    last = logits.contiguous(memory_format=torch.channels_last_3d)
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32):
        torch.testing.assert_close(loss(last, labels[:, None].to(dtype)), expected)
