"""Samples in which some classes are not annotated: what that means, on the CPU's backends."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import voxfuse
from tests.ops.soft_confusion.cases import ALL, ConfusionCase, check, partial_cases, tensors
from voxfuse.contract import FULL, Sum

BACKENDS = ("auto", "reference")
#: Sample 0 lacks the classes 1 and 3, sample 1 lacks none.
ANNOTATED = torch.tensor([[True, False, True, False, True], [True] * 5])
OTHERS = ~ANNOTATED[0]


def example(dtype: torch.dtype = torch.float64, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(2, 5, 37, generator=generator, dtype=torch.float64) * spread
    return logits.to(dtype), torch.randint(0, 5, (2, 37), generator=generator)


def sums_and_gradient(logits: Tensor, target: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    logits = logits.clone().requires_grad_()
    sums = voxfuse.soft_confusion(logits, target, full=True, **options)
    grad = torch.randn(sums.shape, generator=torch.Generator().manual_seed(6), dtype=sums.dtype)
    (gradient,) = torch.autograd.grad(sums, logits, grad)
    return sums.detach(), gradient


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
@pytest.mark.parametrize("spatial", [(5, 4, 3), (700,)], ids=["few voxels", "several blocks"])
def test_any_kind_of_call(operators, spatial):
    for case in partial_cases(seed=len(spatial), count=40, spatial=spatial):
        check(case, operators)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("kind", ["labels", "dense"])
def test_excluding_is_removing_the_class(backend, activation, kind):
    """Its voxels are ignored; of a dense target its values are not read."""
    logits, labels = example()
    target = torch.rand(2, 5, 37, dtype=torch.float64) if kind == "dense" else labels
    options = dict(activation=activation, gamma=1.5, backend=backend)
    sums, gradient = sums_and_gradient(logits, target, annotated=ANNOTATED, **options)
    whole, whole_gradient = sums_and_gradient(logits, target, **options)
    assert torch.equal(sums[1], whole[1])
    assert torch.equal(gradient[1], whole_gradient[1])

    kept = ANNOTATED[0].nonzero()[:, 0]
    ignore = {}
    if kind == "labels":
        renumbered = torch.full((5,), -1).index_copy(0, kept, torch.arange(3))
        rest, ignore = renumbered[labels[:1]], {"ignore_index": -1}
    else:
        rest = target[:1, kept]
    fewer = logits[:1, kept].clone().requires_grad_()
    expected = voxfuse.soft_confusion(fewer, rest, full=True, **options, **ignore)
    torch.testing.assert_close(sums[:1, kept], expected.detach(), rtol=1e-12, atol=1e-12)
    grad = torch.randn(sums.shape, generator=torch.Generator().manual_seed(6), dtype=sums.dtype)
    (wanted,) = torch.autograd.grad(expected, fewer, grad[:1, kept])
    torch.testing.assert_close(gradient[:1, kept], wanted, rtol=1e-10, atol=1e-12)
    assert not sums[0, OTHERS].any()
    assert not gradient[0, OTHERS].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["labels", "dense"])
def test_background_is_merging_the_probabilities(backend, kind):
    logits, labels = example()
    one_hot = torch.nn.functional.one_hot(labels, 5).movedim(-1, 1).double()
    target = torch.rand(2, 5, 37, dtype=torch.float64) if kind == "dense" else labels
    options = dict(annotated=ANNOTATED, unlabelled="background", backend=backend)
    sums, gradient = sums_and_gradient(logits, target, **options)

    z = logits.clone().requires_grad_()
    merged = OTHERS.clone()
    merged[0] = True
    background = torch.logsumexp(z[:1, merged], 1, keepdim=True)
    z0 = torch.cat([background, z[:1, ~merged]], 1)
    g = target[:1] if kind == "dense" else one_hot[:1]
    g = torch.cat([g[:, merged].sum(1, keepdim=True), g[:, ~merged]], 1)
    p, log_p = z0.softmax(1), z0.log_softmax(1)
    terms = [p * g, p * (1 - g), (1 - p) * g, -g * log_p, -(1 - g) * log_p]
    expected = torch.stack([*terms, p * p, g * g, torch.ones_like(p)], -1).sum(2)
    at = torch.tensor([0, *(~merged).nonzero()[:, 0].tolist()])
    torch.testing.assert_close(sums[:1, at], expected.detach(), rtol=1e-12, atol=1e-12)
    assert not sums[0, OTHERS].any()

    grad = torch.randn(sums.shape, generator=torch.Generator().manual_seed(6), dtype=sums.dtype)
    (wanted,) = torch.autograd.grad(expected, z, grad[:1, at])
    torch.testing.assert_close(gradient[:1], wanted[:1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unlabelled", ["exclude", "background"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradcheck(backend, unlabelled):
    logits, labels = example()
    logits = logits[..., :4].requires_grad_()

    def sums(x: Tensor) -> Tensor:
        return voxfuse.soft_confusion(
            x,
            labels[..., :4],
            gamma=2.0,
            full=True,
            annotated=ANNOTATED,
            unlabelled=unlabelled,
            backend=backend,
        )

    assert torch.autograd.gradcheck(sums, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_class_that_is_left_is_certain(backend, dtype):
    only = torch.zeros(2, 5, dtype=torch.bool)
    only[:, 0] = True
    for extreme in (0.0, 1e4, float("inf"), float("-inf")):
        logits, labels = example(dtype)
        logits[:, 1:] += extreme
        logits[0, 0, :9] = -extreme
        for unlabelled in ("exclude", "background"):
            sums, gradient = sums_and_gradient(
                logits, labels, annotated=only, unlabelled=unlabelled, backend=backend
            )
            voxels = (labels == 0).sum(1) if unlabelled == "exclude" else torch.full((2,), 37)
            assert torch.equal(sums[:, 0, Sum.TP], voxels.double())
            assert not sums[:, 0, [Sum.FP, Sum.FN, Sum.NLL]].any()
            assert not sums[:, 1:].any()
            assert not gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_that_are_excluded_are_not_read(backend):
    logits, labels = example(torch.float32)
    expected = sums_and_gradient(logits, labels, annotated=ANNOTATED, backend=backend)
    for value in (float("nan"), float("inf"), 3e38):
        logits[0, OTHERS] = value
        actual = sums_and_gradient(logits, labels, annotated=ANNOTATED, backend=backend)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_in_what_is_merged_stays(backend):
    logits, labels = example(torch.float32)
    options = dict(annotated=ANNOTATED, unlabelled="background", backend=backend)
    mask = torch.ones(2, 37)
    mask[0, 3] = 0
    logits[0, 1, 3] = float("nan")
    sums, gradient = sums_and_gradient(logits, labels, mask=mask, **options)
    assert not sums.isnan().any()
    assert not gradient[..., 3][0].any()
    sums, gradient = sums_and_gradient(logits, labels, **options)
    assert sums[0].isnan().any()
    assert not sums[1].isnan().any()
    assert gradient[0, :, 3].isnan().all()
    assert not gradient[1].isnan().any()


@pytest.mark.parametrize("unlabelled", ["exclude", "background"])
@pytest.mark.parametrize("classes", [2, 5, 20])
def test_samples_with_every_class_keep_their_bits(classes, unlabelled):
    case = ConfusionCase(classes=classes, spatial=(700,), full=True)
    input, target, _ = tensors(case)
    every = torch.ones(2, classes, dtype=torch.bool)
    expected = sums_and_gradient(input, target)
    actual = sums_and_gradient(input, target, annotated=every, unlabelled=unlabelled)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_vmap_and_compile():
    logits, labels = example(torch.float32)
    options = dict(annotated=ANNOTATED, unlabelled="background")
    expected, gradient = sums_and_gradient(logits, labels, **options)

    def of_one(z: Tensor, y: Tensor, kept: Tensor) -> Tensor:
        sums = voxfuse.soft_confusion(
            z[None], y[None], full=True, annotated=kept[None], unlabelled="background"
        )
        return sums[0]

    torch.testing.assert_close(torch.vmap(of_one)(logits, labels, ANNOTATED), expected)
    compiled = torch.compile(voxfuse.soft_confusion, backend="aot_eager", fullgraph=True)
    logits.requires_grad_()
    sums = compiled(logits, labels, full=True, **options)
    assert torch.equal(sums.detach(), expected)
    grad = torch.randn(sums.shape, generator=torch.Generator().manual_seed(6), dtype=sums.dtype)
    assert torch.equal(torch.autograd.grad(sums, logits, grad)[0], gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_errors_name_the_sample(backend):
    logits, labels = example()
    lacking = ANNOTATED.clone()
    lacking[1, 0] = False
    call = dict(backend=backend)
    with pytest.raises(ValueError, match="annotated: class 0 of sample 1 is not annotated"):
        voxfuse.soft_confusion(logits, labels, annotated=lacking, unlabelled="background", **call)
    lacking[1] = False
    with pytest.raises(ValueError, match="annotated: no class of sample 1 is annotated"):
        voxfuse.soft_confusion(logits, labels, annotated=lacking, **call)
    for activation in ("sigmoid", "none"):
        with pytest.raises(ValueError, match="unlabelled: got 'background', which needs a softmax"):
            voxfuse.soft_confusion(
                logits, labels, activation=activation, unlabelled="background", **call
            )
    with pytest.raises(ValueError, match="unlabelled: got 'drop', expected one of 'exclude'"):
        voxfuse.soft_confusion(logits, labels, unlabelled="drop", **call)
    with pytest.raises(TypeError, match="annotated: got float32"):
        voxfuse.soft_confusion(logits, labels, annotated=ANNOTATED.float(), **call)
    with pytest.raises(ValueError, match=r"annotated: got shape \(2, 4\), expected .* \(2, 5\)"):
        voxfuse.soft_confusion(logits, labels, annotated=ANNOTATED[:, :4], **call)


def test_the_bare_operator_refuses_what_it_cannot_read():
    logits, labels = example(torch.float32)
    options = (2, 2, 0, None, 0.0)
    for wrong in (ANNOTATED[:1], ANNOTATED.int(), ANNOTATED[..., None]):
        with pytest.raises(RuntimeError, match="annotated: got"):
            torch.ops.voxfuse.soft_confusion(logits, labels, None, *options, False, None, 0, wrong)
        grad = torch.zeros(2, 5, FULL, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="annotated: got"):
            torch.ops.voxfuse.soft_confusion_backward(
                grad, logits, labels, None, *options, None, 0, wrong
            )


def test_samples_in_any_memory_layout_of_annotated():
    case = ConfusionCase(classes=5, unlabelled="exclude", full=True)
    input, target, _ = tensors(dataclasses.replace(case, seed=3))
    expected = sums_and_gradient(input, target, annotated=ANNOTATED)
    strided = ANNOTATED.t().contiguous().t()
    actual = sums_and_gradient(input, target, annotated=strided)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
