"""Inputs and the accuracy rule for the head_confusion tests, shared by every backend's file."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.accuracy import assert_accurate, compute_dtype
from tests.ops.soft_confusion.cases import (
    ConfusionCase,
    last_arguments,
    lay_out,
    schema_arguments,
    tensors,
)
from voxfuse.ops._checks import NUMBER_DTYPES
from voxfuse.reference import soft_confusion as reference

CHUNK_BYTES = 64 << 20


def head_tensors(
    case: ConfusionCase, channels: int, bias: bool = True, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None]:
    """Draw features, weight, bias, target and voxel weight; ``case`` describes the logits."""
    _, target, voxel_weight = tensors(case, device)
    generator = torch.Generator().manual_seed(case.seed + 7)
    shape = (case.batch, channels, *case.spatial)
    features = torch.randn(shape, generator=generator, dtype=torch.float64)
    weight = torch.randn(case.classes, channels, generator=generator, dtype=torch.float64)
    weight *= case.spread / channels**0.5
    offset = torch.randn(case.classes, generator=generator, dtype=torch.float64)
    if "none" in (case.activation, case.likelihood):
        # The "logits" are to be probabilities that a half type can hold without becoming 0 or 1.
        features, offset = features.sigmoid(), offset.sigmoid() * 0.1 + 0.05
        weight = weight.sigmoid() * 0.75 / channels
    features = lay_out(features.to(case.dtype).to(device), case.layout)
    made = [x.to(case.dtype).to(device) for x in (weight, offset)]
    return features, made[0], made[1] if bias else None, target, voxel_weight


def unfused(
    grad: Tensor | None,
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    voxel_weight: Tensor | None,
    options: tuple[Any, ...],
    full: bool,
    *last: Any,
) -> tuple[Tensor, ...]:
    """Sums, or with ``grad`` the three gradients, by way of the logits, in the tensors' dtype."""
    logits = torch.einsum("ck,bk...->bc...", weight, features)
    if bias is not None:
        logits = logits + bias.reshape(-1, *[1] * (features.ndim - 2))
    if grad is None:
        return (reference.soft_confusion(logits, target, voxel_weight, *options, full, *last),)
    dz = reference.soft_confusion_backward(grad, logits, target, voxel_weight, *options, *last)
    flat = dz.reshape(*dz.shape[:2], -1)
    return (
        torch.einsum("ck,bc...->bk...", weight, dz),
        torch.einsum("bcv,bkv->ck", flat, features.reshape(*features.shape[:2], -1)),
        flat.sum((0, 2)),
    )


def check(
    case: ConfusionCase,
    channels: int,
    operators: Any,
    *,
    bias: bool = True,
    chunk_bytes: int = CHUNK_BYTES,
    device: str = "cpu",
) -> None:
    """Compare sums and gradients of ``operators`` with the truth under the accuracy rule."""
    given = head_tensors(case, channels, bias, device)
    options = schema_arguments(case)
    compute = compute_dtype(case.dtype)
    on_cpu = [None if x is None else x.cpu() for x in given]
    wide = [None if x is None else x.double() for x in on_cpu[:3]] + on_cpu[3:]
    narrow = [None if x is None else x.to(compute) for x in on_cpu[:3]] + on_cpu[3:]

    last, last_on_cpu = last_arguments(case, device), last_arguments(case)

    actual = operators.head_confusion(*given, *options, case.full, chunk_bytes, *last)
    (truth,) = unfused(None, *wide, options, case.full, *last_on_cpu)
    (plain,) = unfused(None, *narrow, options, case.full, *last_on_cpu)
    assert actual.dtype == torch.float64
    voxels = max(1, wide[0][0, 0].numel())
    # A logit is a sum of K products, wrong by at most (K + 1) / 2 roundings of the sum of their
    # magnitudes. A voxel's terms pass that on, a focal one gamma times as steeply, and -log p of a
    # bare probability, none below 0.05 here, twenty times.
    size = torch.einsum("ck,bk...->bc...", wide[1].abs(), wide[0].abs()).mean().item() + 1
    steepness = size * (1 + case.gamma)
    if "none" in (case.activation, case.likelihood):
        steepness *= 20
    assert_accurate(
        actual,
        plain,
        truth,
        scale=(8 + min(voxels, 128) / 2) * truth.abs() + (channels + 1) / 2 * voxels * steepness,
        dtype=compute,
        allowance=1,
        what=f"sums of {case}, {channels} features",
    )

    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    gradients = operators.head_confusion_backward(
        grad.to(device), *given, *options, chunk_bytes, True, True, *last
    )
    true = unfused(grad, *wide, options, case.full, *last_on_cpu)
    rough = unfused(grad, *narrow, options, case.full, *last_on_cpu)
    if not bias:
        assert gradients[2].numel() == 0
    # dz is of the order of the cotangents; its rounding is multiplied by what it is summed with.
    slope = grad.abs().max() * (1 + steepness)
    magnitude = (
        slope * wide[1].abs().sum(0).max(),
        slope * wide[0].abs().sum() / channels * case.batch,
        slope * voxels * case.batch,
    )
    names = ("features", "weight", "bias")
    for i in range(3 if bias else 2):
        name, gradient = names[i], gradients[i]
        assert gradient.dtype == case.dtype
        if i == 0:
            assert gradient.stride() == torch.empty_like(given[0]).stride()
        # In a half type the result is rounded once more, from a value wrong by `allowance` units.
        allowance = 16 + channels + case.classes
        half = case.dtype != compute
        wrong = allowance * torch.finfo(compute).eps / torch.finfo(case.dtype).eps
        assert_accurate(
            gradient,
            rough[i].to(case.dtype),
            true[i],
            scale=true[i].abs() + magnitude[i] * wrong if half else magnitude[i],
            dtype=case.dtype,
            allowance=1 if half else allowance,
            what=f"gradient of {name} of {case}, {channels} features",
        )


def check_types(operators: Any, device: str = "cpu", step: int = 1) -> None:
    """Targets and voxel weights of every type, whatever the layout, give the bits of int64 and
    float64. Of the pairs of a type and a kind of target, every ``step``-th is looked at."""
    options, last = (2, 2, 0, None, 0.0), (False, CHUNK_BYTES)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(1, 5, 3, 7, generator=generator).to(device)
    weight = torch.randn(3, 5, generator=generator).to(device)
    labels = torch.randint(0, 2, (1, 3, 7), generator=generator).to(device)
    dense = torch.randint(0, 2, (1, 3, 3, 7), generator=generator).to(device)
    kept = torch.randint(0, 2, (1, 3, 7), generator=generator).to(device)
    grad = torch.randn(1, 3, 4, generator=generator, dtype=torch.float64).to(device)

    def results(target: Tensor, voxel_weight: Tensor) -> tuple[Tensor, ...]:
        given = (features, weight, None, target, voxel_weight, *options)
        sums = operators.head_confusion(*given, *last)
        return sums, *operators.head_confusion_backward(grad, *given, CHUNK_BYTES, True, True)

    for k, (target, layout) in enumerate(
        [(labels, ""), (dense, "channels_last"), (dense, "sliced")]
    ):
        expected = results(target, kept.double())
        for i, dtype in enumerate(NUMBER_DTYPES):
            if (i + k) % step:
                continue
            mask = kept.to(NUMBER_DTYPES[i - 5])
            actual = results(lay_out(target.to(dtype), layout), mask)
            assert all(map(torch.equal, actual, expected)), (dtype, mask.dtype, layout)
