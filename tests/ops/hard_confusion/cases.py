"""Calls of hard_confusion for the tests of every backend, drawn at random."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.soft_confusion.cases import lay_out
from voxfuse.contract import Activation, Decision
from voxfuse.ops._checks import INTEGER_DTYPES
from voxfuse.reference import hard_confusion as reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTEGERS = tuple(dtype for dtype in INTEGER_DTYPES if dtype != torch.bool)
LABELS = (*INTEGERS, *FLOATS)
MASKS = (torch.bool, *LABELS)
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0)


@dataclasses.dataclass(frozen=True)
class HardCase:
    """One call of the operator, without its tensors."""

    decision: str = "argmax"
    classes: int = 3
    batch: int = 2
    spatial: tuple[int, ...] = (5, 4, 3)
    dtype: torch.dtype = torch.float32  # of the logits
    layout: str = "contiguous"
    target: str = "labels"  # "labels", "labels_channel" or "dense"
    target_dtype: torch.dtype = torch.int64
    predicted_dtype: torch.dtype = torch.int64  # of predicted labels
    mask: torch.dtype | None = None
    ignore_index: int | None = None
    activation: str = "sigmoid"
    threshold: float = 0.5
    seed: int = 0


def random_case(seed: int, most_voxels: int = 300) -> HardCase:
    """Any decision, types, layouts and extents."""
    draw = random.Random(seed)
    decision = draw.choice(list(Decision.__members__))
    classes = draw.choice([2, 3, 4, 5, 8, 9, 13, 16, 17, 40])
    if decision != "argmax" and draw.random() < 0.2:
        classes = 1
    dense = decision != "labels" and (classes == 1 or draw.random() < 0.3)
    axes = draw.choice([0, 1, 2, 3])
    edge = max(1, round(most_voxels ** (1 / max(axes, 1))))
    label_dtype = draw.choice(LABELS)
    ignored = [None, 255, 0, classes - 1, 1, -1, 300, 2**40]
    ignore_index = draw.choice(ignored)
    if ignore_index is not None and not holds(label_dtype, ignore_index):
        # Nothing is ignored then, which is a case of its own.
        ignore_index = draw.choice([ignore_index, 0])
    return HardCase(
        decision=decision,
        classes=classes,
        batch=draw.choice([1, 2, 3]),
        spatial=tuple(draw.randint(1, edge) for _ in range(axes)),
        dtype=draw.choice(FLOATS),
        layout=draw.choice(LAYOUTS),
        target="dense" if dense else draw.choice(["labels", "labels_channel"]),
        target_dtype=draw.choice(MASKS) if dense else label_dtype,
        predicted_dtype=draw.choice(LABELS),
        mask=draw.choice([None, None, *MASKS]),
        ignore_index=ignore_index,
        activation=draw.choice(["sigmoid", "none"]),
        threshold=draw.choice([0.5, 0.3, 0.0, 1.0, -1.0, 2.0]),
        seed=seed,
    )


def holds(dtype: torch.dtype, value: int) -> bool:
    """Whether a label of this type can be ``value``."""
    if dtype.is_floating_point:
        return torch.tensor(value, dtype=torch.float64).to(dtype).item() == value
    low, high = (0, 1) if dtype == torch.bool else (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
    return low <= value <= high


def arguments(case: HardCase, device: str = "cpu") -> tuple[Any, ...]:
    """The operator's arguments: logits with ties, NaN and infinities."""
    generator = torch.Generator().manual_seed(case.seed)
    shape = (case.batch, case.classes, *case.spatial)
    voxels = (case.batch, *case.spatial)
    ignore = case.ignore_index
    if case.decision == "labels":
        input = torch.randint(0, case.classes, voxels, generator=generator)
        input = lay_out(input.to(case.predicted_dtype).to(device), "permuted")
        num_classes: int | None = case.classes
    else:
        logits = torch.randn(shape, generator=generator)
        logits = torch.where(logits > 1.2, logits, logits.round())  # ties
        kinds = torch.randint(0, 40, shape, generator=generator)
        for kind, value in enumerate(SPECIAL):
            logits = logits.masked_fill(kinds == kind, value)
        input = lay_out(logits.to(case.dtype).to(device), case.layout)
        num_classes = None
    if case.target == "dense":
        values = torch.randint(0, 2, shape, generator=generator)
    else:
        channel = (1,) if case.target == "labels_channel" else ()
        values = torch.randint(0, case.classes, (case.batch, *channel, *case.spatial))
        values = torch.randint(0, case.classes, values.shape, generator=generator)
    if ignore is not None and holds(case.target_dtype, ignore):
        ignored = torch.rand(values.shape, generator=generator) < 0.3
        values = values.masked_fill(ignored, ignore)
    target = values.to(case.target_dtype).to(device)
    if target.ndim == len(shape) and len(shape) > 2:
        target = lay_out(target, case.layout)
    mask = None
    if case.mask is not None:
        drawn = torch.randint(0, 4, voxels, generator=generator)
        mask = drawn.to(case.mask).to(device)
        if case.mask.is_floating_point and bool((drawn == 3).any()):
            mask = torch.where(mask == 3, torch.nan, mask)
    least = reference.least_above(Activation[case.activation], case.threshold)
    return input, target, mask, Decision[case.decision], least, num_classes, ignore


def check(case: HardCase, operator: Callable[..., Tensor], device: str = "cpu") -> None:
    """A kernel's counts are the reference's, exactly."""
    given = arguments(case, device)
    on_cpu = [x.cpu() if isinstance(x, Tensor) else x for x in given]
    expected = reference.hard_confusion(*on_cpu)
    actual = operator(*given)
    assert actual.dtype == torch.int64
    assert torch.equal(actual.cpu(), expected), (
        f"{case}: {(actual.cpu() - expected).abs().max()} voxels"
    )
