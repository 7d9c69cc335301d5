"""Calls of resample_argmax for the tests of every backend, drawn at random."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.ops.soft_confusion.cases import lay_out
from voxfuse.contract import Activation, Resampled
from voxfuse.ops._checks import NUMBER_DTYPES
from voxfuse.ops.resample_argmax import axis_table
from voxfuse.reference import resample_argmax as reference
from voxfuse.reference.hard_confusion import least_above

LABELS = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)
LAYOUTS = ("contiguous", "channels_last", "sliced", "permuted")
SPECIAL = (float("nan"), float("inf"), -float("inf"), -0.0)


@dataclasses.dataclass(frozen=True)
class ResampleCase:
    """One call of the operator, without its tensors."""

    mode: str = "labels"
    channels: int = 3
    source: tuple[int, ...] = (5, 4, 6)
    target: tuple[int, ...] = (8, 7, 11)
    order: tuple[int, ...] = (1, 1, 1)
    align_corners: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    out_dtype: torch.dtype = torch.uint8  # of labels
    threshold: float = 0.5
    round_to_half: bool = False
    special: bool = False
    seed: int = 0


def random_case(seed: int, most: int = 20) -> ResampleCase:
    """Any mode, types, layouts and extents up to ``most``, of a single axis three times as many."""
    draw = random.Random(seed)
    axes = draw.choice([1, 2, 3, 3])
    extents = range(1, (3 * most if axes == 1 else most) + 1)
    source = tuple(draw.choice(extents) for _ in range(axes))
    target = tuple(draw.choice(extents) for _ in range(axes))
    if draw.random() < 0.3:
        target = (*target[:-1], source[-1])
    mode = draw.choice(["labels", "labels", *Resampled.__members__])
    return ResampleCase(
        mode=mode,
        channels=1 if mode == "values" else draw.choice([1, 2, 3, 4, 5, 9]),
        source=source,
        target=target,
        order=tuple(draw.choice([0, 1, 1]) for _ in range(axes)),
        align_corners=draw.random() < 0.2,
        dtype=draw.choice((torch.float32, *NUMBER_DTYPES)),
        layout=draw.choice(LAYOUTS),
        out_dtype=draw.choice(LABELS),
        threshold=draw.choice([0.5, 0.3]),
        round_to_half=draw.random() < 0.3,
        special=draw.random() < 0.3,
        seed=seed,
    )


def arguments(case: ResampleCase, device: str = "cpu") -> tuple[Any, ...]:
    """The operator's arguments; the result is filled with what it has to overwrite."""
    generator = torch.Generator().manual_seed(case.seed)
    input = 8 * torch.randn(case.channels, *case.source, generator=generator)
    if not case.dtype.is_signed:
        # A negative number would become a huge one, of which the bounds below know nothing.
        input = input.abs()
    if case.special and case.dtype.is_floating_point:
        kinds = torch.randint(0, 60, input.shape, generator=generator)
        for kind, value in enumerate(SPECIAL):
            input = input.masked_fill(kinds == kind, value)
    input = lay_out(input.to(case.dtype)[None].to(device), case.layout)[0]
    pairs = [
        axis_table(n, m, order, align_corners=case.align_corners)
        for n, m, order in zip(case.source, case.target, case.order, strict=True)
    ]
    fixed = {"mask": torch.bool, "values": torch.float32}
    channels = case.channels if case.mode in fixed else 1
    out = torch.ones(channels, *case.target, dtype=fixed.get(case.mode, case.out_dtype))
    labels = list(range(1, case.channels + 1)) if case.mode == "regions" else []
    random.Random(case.seed).shuffle(labels)
    return (
        out.to(device),
        input,
        [index.to(device) for index, _ in pairs],
        [weight.to(device) for _, weight in pairs],
        Resampled[case.mode],
        least_above(Activation.sigmoid, case.threshold)
        if case.mode in ("mask", "regions")
        else 0.0,
        labels,
        case.round_to_half,
    )


def check(case: ResampleCase, operator: Callable[..., None], device: str = "cpu") -> Tensor:
    """A kernel's result, on the CPU: the reference's but for what rounds otherwise.

    Decisions differ between values that are as good as equal, and nowhere else.
    """
    given = arguments(case, device)
    operator(*given)
    actual = given[0].cpu()
    expected, input, index, weight, _, least, _, _ = given = arguments(case)
    reference.resample_argmax(*given)
    # Three means of at most 2^6, each rounded twice; or neighbours on float16's grid.
    step = 2**-10 if case.round_to_half else 8 * 2**-24
    if case.mode == "values":
        torch.testing.assert_close(
            actual, expected, rtol=step, atol=64 * 8 * 2**-24, equal_nan=True
        )
        return actual
    differs = actual != expected
    if differs.any():
        exact = reference.interpolated(input.double(), index, [w.double() for w in weight])
        bound = 64 * step
        if case.mode == "labels":
            near = exact.gather(0, actual.long()) - exact.gather(0, expected.long())
            near = near.abs() <= bound
        else:
            near = (exact - least).abs() <= bound
            near = near if case.mode == "mask" else near.any(0, keepdim=True)
        assert bool(near[differs].all()), f"{case}: {int((differs & ~near).sum())} voxels"
    return actual
