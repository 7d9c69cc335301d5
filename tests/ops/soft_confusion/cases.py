"""Inputs for the soft confusion tests, shared by every backend's test file."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import torch
from torch import Tensor

from tests.accuracy import assert_accurate, compute_dtype
from voxfuse.contract import CORE, FULL, Activation, Overlap, Sum, Unlabelled
from voxfuse.reference import soft_confusion as reference

ALL = (torch.ops.voxfuse, torch.ops.voxfuse_reference)

ACTIVATIONS = ("none", "sigmoid", "softmax")


@dataclasses.dataclass(frozen=True)
class ConfusionCase:
    """One call of the operator, without its tensors."""

    batch: int = 2
    classes: int = 3
    spatial: tuple[int, ...] = (5, 4, 3)
    dtype: torch.dtype = torch.float32
    target: str = "labels"  # "labels", "labels_channel", "dense" or "shares" (dense, sum 1)
    target_dtype: torch.dtype = torch.int64
    weight: torch.dtype | None = None
    activation: str = "softmax"
    likelihood: str | None = None
    overlap: str = "product"
    ignore_index: int | None = None
    gamma: float = 0.0
    focal_classes: int | None = None
    full: bool = False
    layout: str = "contiguous"  # "channels_last", "sliced" or "permuted"
    spread: float = 3.0
    unlabelled: str | None = None  # what becomes of classes that are not annotated, if any is
    wrong: bool = False  # no label is the class with the greatest logit
    seed: int = 0


def tensors(case: ConfusionCase, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw logits (or probabilities), target and weight for ``case``."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.classes, *case.spatial)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * case.spread
    if "none" in (case.activation, case.likelihood):
        # Probabilities that a half type can hold without becoming 0 or 1.
        logits = logits.sigmoid() * 0.98 + 0.01
    limit = torch.finfo(case.dtype).max
    logits = logits.clamp(-limit, limit).to(case.dtype)
    greatest = logits.argmax(1)
    # Moved first: a copy to another device fills the gaps of a layout.
    logits = lay_out(logits.to(device), case.layout)
    if case.target == "shares":
        values = (torch.randn(shape, generator=generator) * case.spread).softmax(1)
    elif case.target == "dense" or case.classes == 1:
        target_shape = shape
        if not case.target_dtype.is_floating_point:
            values = torch.randint(0, 2, target_shape, generator=generator)
        else:
            values = torch.rand(target_shape, generator=generator)
    else:
        channel = (1,) if case.target == "labels_channel" else ()
        target_shape = (case.batch, *channel, *case.spatial)
        if case.wrong:
            away = torch.randint(1, case.classes, greatest.shape, generator=generator)
            values = ((greatest + away) % case.classes).reshape(target_shape)
        else:
            most = {torch.int8: 128, torch.uint8: 256, torch.bfloat16: 257}.get(case.target_dtype)
            named = case.classes if most is None else min(case.classes, most)
            values = torch.randint(0, named, target_shape, generator=generator)
    if case.ignore_index is not None:
        ignored = torch.rand(values.shape, generator=generator) < 0.3
        values = values.masked_fill(ignored, case.ignore_index)
    values = values.to(case.target_dtype).to(device)
    target = lay_out(values, case.layout if values.ndim == len(shape) else "")
    weight = None
    if case.weight is not None:
        drawn = torch.rand((case.batch, *case.spatial), generator=generator)
        drawn = drawn * (drawn > 0.25)
        if not case.weight.is_floating_point:
            drawn = (4 * drawn).ceil()
        weight = drawn.to(case.weight)
        weight = weight.to(device)
    return logits, target, weight


def lay_out(tensor: Tensor, layout: str) -> Tensor:
    """Return the same values in another memory layout."""
    if layout == "channels_last":
        axes = (0, *range(2, tensor.ndim), 1)
        back = (0, tensor.ndim - 1, *range(1, tensor.ndim - 1))
        return tensor.permute(axes).contiguous().permute(back)
    if layout == "sliced":
        wide = tensor.new_ones((tensor.shape[0], tensor.shape[1] + 2, *tensor.shape[2:]))
        wide[:, 1:-1] = tensor
        return wide[:, 1:-1]
    if layout == "permuted" and tensor.ndim > 3:
        return tensor.transpose(-1, -2).contiguous().transpose(-1, -2)
    return tensor


def schema_arguments(case: ConfusionCase) -> tuple[Any, ...]:
    """The operator's arguments after the tensors, without ``full``."""
    likelihood = case.likelihood or case.activation
    return (
        Activation[case.activation],
        Activation[likelihood],
        Overlap[case.overlap],
        case.ignore_index,
        case.gamma,
    )


def annotated(case: ConfusionCase) -> Tensor:
    """Which classes are annotated in which sample, (B, C): some, but in the last sample all."""
    generator = torch.Generator().manual_seed(case.seed + 3)
    drawn = torch.rand(case.batch, case.classes, generator=generator)
    kept = drawn < 0.6
    kept[drawn == drawn.amin(1, keepdim=True)] = True
    kept[-1] = True
    if case.unlabelled == "background":
        kept[:, 0] = True
    return kept


def last_arguments(case: ConfusionCase, device: str = "cpu") -> tuple[Any, ...]:
    """The operator's arguments from ``focal_classes`` on, without what has its default."""
    if case.unlabelled is None:
        return (case.focal_classes,)
    return case.focal_classes, Unlabelled[case.unlabelled], annotated(case).to(device)


def check(case: ConfusionCase, operators: Any, device: str = "cpu") -> None:
    """Compare forward and backward of ``operators`` with the truth under the accuracy rule."""
    input, target, weight = tensors(case, device)
    arguments = schema_arguments(case)
    compute = compute_dtype(case.dtype)
    on_cpu = [None if x is None else x.cpu() for x in (input, target, weight)]
    wide = [on_cpu[0].double(), *on_cpu[1:]]
    narrow = [on_cpu[0].to(compute), *on_cpu[1:]]

    last, last_on_cpu = last_arguments(case, device), last_arguments(case)

    actual = operators.soft_confusion(input, target, weight, *arguments, case.full, *last)
    truth = reference.soft_confusion(*wide, *arguments, case.full, *last_on_cpu)
    plain = reference.soft_confusion(*narrow, *arguments, case.full, *last_on_cpu)
    assert actual.dtype == torch.float64
    scale = truth.abs() + 1e-30
    if case.overlap == "min" and case.dtype == torch.float64:
        # p - min(p, g) and g - min(p, g) round as p and g do, and the truth is of the same type.
        scale[..., [Sum.FP, Sum.FN]] += truth[..., [Sum.TP]]
    voxels = max(1, input[0, 0].numel())
    # Inside a chunk a lane adds at most 128 terms one by one, each addition rounding by half an
    # ulp of the partial sum; the elementary functions lose a few ulp more.
    sum_allowance = 8 + min(voxels, 128) / 2
    assert_accurate(
        actual,
        plain,
        truth,
        scale=scale,
        dtype=compute,
        allowance=sum_allowance,
        what=f"statistics of {case}",
    )

    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randn(truth.shape, generator=generator, dtype=torch.float64)
    gradient = operators.soft_confusion_backward(
        grad.to(device), input, target, weight, *arguments, *last
    )
    true_gradient = reference.soft_confusion_backward(grad, *wide, *arguments, *last_on_cpu)
    plain_gradient = reference.soft_confusion_backward(grad, *narrow, *arguments, *last_on_cpu)
    if case.unlabelled is not None:
        left_out = ~last_on_cpu[-1]
        assert not bool(actual.cpu()[left_out].any())
        if case.unlabelled == "exclude":
            assert not bool(gradient.cpu()[left_out].any())
    assert gradient.dtype == input.dtype
    assert gradient.stride() == torch.empty_like(input).stride()
    # The cotangents are of order 1; what a gradient is made of (h, its mean, the focal slope) is of
    # the order of their largest, times the slope of the logarithm for a bare probability.
    size = grad.abs().amax() * (1 + true_gradient.abs())
    assert_accurate(
        gradient,
        plain_gradient.to(case.dtype) if case.dtype != compute else plain_gradient,
        true_gradient,
        scale=size,
        dtype=compute if case.dtype == compute else case.dtype,
        allowance=16 if case.dtype == compute else 1,
        what=f"gradient of {case}",
    )


def _sure_and_wrong() -> dict[str, tuple[ConfusionCase, str]]:
    """Where the gradient is all small differences: by name, a case and its kind of cotangents."""
    base = ConfusionCase(batch=40, spatial=(6,), spread=10.0, wrong=True)
    f32, f16, bf16 = torch.float32, torch.float16, torch.bfloat16
    found = {}
    for classes in (3, 4, 8, 17, 100, 300):
        case = dataclasses.replace(base, classes=classes)
        for kind in ("overlap", "equal"):
            found[f"{classes} classes, {kind} cotangents"] = case, kind
    for classes in (3, 17):
        extreme = dataclasses.replace(base, classes=classes, spread=60.0)
        found[f"{classes} classes, gradients near 1e-21"] = extreme, "overlap"
        one = dataclasses.replace(base, classes=classes, spatial=(1,))
        found[f"{classes} classes, one voxel"] = one, "overlap"
        found[f"{classes} classes, likelihood too"] = one, "all"
        right = dataclasses.replace(base, classes=classes, wrong=False)
        found[f"{classes} classes, any label"] = right, "equal"
        wide = dataclasses.replace(base, classes=classes, batch=8, spatial=(70,))
        found[f"{classes} classes, ignored and weighted"] = (
            dataclasses.replace(wide, ignore_index=255, weight=f32),
            "equal",
        )
        found[f"{classes} classes, full"] = dataclasses.replace(wide, full=True), "overlap"
        found[f"{classes} classes, overlap min"] = dataclasses.replace(wide, overlap="min"), "equal"
        for dtype, name in ((f16, "float16"), (bf16, "bfloat16")):
            saturated = dataclasses.replace(wide, dtype=dtype, spread=4e4)
            found[f"{classes} classes, saturated {name}"] = saturated, "overlap"
            sure = dataclasses.replace(wide, dtype=dtype)
            found[f"{classes} classes, sure {name}"] = sure, "equal"
    for classes in (4, 100):
        for target in ("dense", "shares"):
            soft = dataclasses.replace(
                base, classes=classes, target=target, target_dtype=f32, wrong=False
            )
            for kind in ("overlap", "equal"):
                found[f"{classes} classes, {target} target, {kind} cotangents"] = soft, kind
    return found


SURE_AND_WRONG = _sure_and_wrong()


def partial_cases(
    seed: int = 0, count: int = 12, spatial: tuple[int, ...] = (5, 4, 3)
) -> list[ConfusionCase]:
    """Samples in which some classes are not annotated: ``count`` cases drawn from all kinds."""
    draw = random.Random(seed)
    cases = []
    for index in range(count):
        unlabelled = ("exclude", "background")[index % 2]
        activations = ACTIVATIONS if unlabelled == "exclude" and index % 4 else ("softmax",)
        target = draw.choice(["labels", "labels_channel", "dense"])
        label_types = [torch.uint8, torch.int64, torch.float32]
        cases.append(
            ConfusionCase(
                batch=3,
                classes=draw.choice([2, 3, 5, 20, 40]),
                spatial=spatial,
                dtype=draw.choice([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
                target=target,
                target_dtype=torch.float32 if target == "dense" else draw.choice(label_types),
                weight=draw.choice([None, torch.bool, torch.float32]),
                activation=draw.choice(activations),
                likelihood=draw.choice(activations),
                overlap=draw.choice(["product", "product", "min"]),
                ignore_index=None if target == "dense" else draw.choice([None, 1, 99]),
                gamma=draw.choice([0.0, 0.0, 2.0]),
                focal_classes=draw.choice([None, 1]),
                full=draw.choice([False, True]),
                layout=draw.choice(["contiguous", "channels_last", "sliced", "permuted"]),
                unlabelled=unlabelled,
                seed=seed + index,
            )
        )
    return cases


def on_interpreter(case: ConfusionCase) -> ConfusionCase:
    """Eight samples of a case for Triton's interpreter, which takes a tenth of a second for each.

    Kernels that add the classes up before they form differences still fail with them, at 100 and
    300 classes.
    """
    return dataclasses.replace(case, batch=min(case.batch, 8))


def cotangents(case: ConfusionCase, kind: str) -> Tensor:
    """Draw (B, C, 4 or 8) cotangents: "all", "overlap" (those of TP, FP and FN, and of P2 where
    there is one) or "equal" (the same of TP, FP and FN for all classes of a sample)."""
    generator = torch.Generator().manual_seed(case.seed + 2)
    classes = 1 if kind == "equal" else case.classes
    shape = (case.batch, classes, FULL if case.full else CORE)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    if kind != "all":
        grad[..., 3:5] = 0
    return grad.expand(-1, case.classes, -1).contiguous()


def check_gradient_of_sure(
    case: ConfusionCase, kind: str, operators: Any, device: str = "cpu"
) -> None:
    """The gradient of each sample may be wrong, relative to its largest element, by four times what
    plain PyTorch in the kernel's compute type is at most wrong by, and 1e-6."""
    given = tensors(case, device)
    arguments = schema_arguments(case)
    compute = compute_dtype(case.dtype)
    on_cpu = [None if x is None else x.cpu() for x in given]
    grad = cotangents(case, kind)

    def reference_in(dtype: torch.dtype) -> Tensor:
        gradient = reference.soft_confusion_backward(
            grad, on_cpu[0].to(dtype), *on_cpu[1:], *arguments, case.focal_classes
        )
        return gradient.to(case.dtype).double() if dtype == compute else gradient

    truth, plain = reference_in(torch.float64), reference_in(compute)
    actual = operators.soft_confusion_backward(
        grad.to(device), *given, *arguments, case.focal_classes
    )

    # What the gradient's type cannot hold, or an exponential in float32, is no error.
    least = max(torch.finfo(case.dtype).tiny, 1e-30) * grad.abs().amax((1, 2)).clamp(min=1)
    largest = torch.maximum(truth.flatten(1).abs().amax(1), least)
    error = (actual.double().cpu() - truth).flatten(1).abs().amax(1) / largest
    own = ((plain - truth).flatten(1).abs().amax(1) / largest).max()
    rounding = 0.0 if case.dtype == compute else torch.finfo(case.dtype).eps
    allowed = 4 * own + 1e-6 + rounding
    assert bool((error <= allowed).all()), (
        f"gradient off by {error.max():.3e} of its largest element, in sample "
        f"{int(error.argmax())}; allowed {allowed:.3e} (plain PyTorch is off by {own:.3e}): {case}"
    )


def certain_probabilities(operators: Any, gamma: float, device: str) -> None:
    """Check the gradient of FP - TP at probabilities of exactly 0 and 1, without an activation."""
    p = torch.tensor([[[0.0, 1.0, 0.5], [1.0, 0.0, 0.5]]], device=device)
    g = torch.tensor([[[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]], device=device)
    labels = torch.tensor([[0, 1, 0]], device=device)
    for target in (g, labels):
        one_hot = g if target is g else torch.stack([labels == 0, labels == 1], 1).to(p.dtype)
        for sums in (CORE, FULL):
            grad = torch.zeros(1, 2, sums, dtype=torch.float64, device=device)
            grad[..., 0], grad[..., 1] = -1, 1
            gradient = operators.soft_confusion_backward(
                grad, p, target, None, 0, 0, 0, None, gamma
            )
            assert torch.equal(gradient, 1 - 2 * one_hot)
