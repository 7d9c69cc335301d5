"""Cases of ratio_loss and its sums, shared by the tests of all backends."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from voxfuse.contract import ClassPooling, Normaliser, Reduction
from voxfuse.reference import ratio_loss as reference


@dataclasses.dataclass(frozen=True)
class RatioCase:
    """Arguments of the operator's schema after the statistics; weights as tuples."""

    numerator: tuple[float, ...] = (1.0,)
    denominator: tuple[float, ...] = (1.0, 0.5, 0.5)
    smooth_nr: float = 1e-5
    smooth_dr: float = 1e-5
    min_denominator: float = 0.0
    exponent: float = 1.0
    log: bool = False
    class_weight: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    first_class: int = 0
    batch: bool = False
    class_pooling: int = 0
    absent: int = 0
    reduction: int = 1
    ratio_scale: float = 1.0
    nll_weight: tuple[float, ...] | None = None
    off_weight: tuple[float, ...] | None = None
    nll_scale: float = 0.0
    off_scale: float = 0.0
    normaliser: int = 0
    double_loss: bool = True
    exponent_from: int = 0

    def arguments(self) -> tuple[Any, ...]:
        values = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name.endswith("_weight") and value is not None:
                value = torch.tensor(value, dtype=torch.float64)
            values.append(list(value) if isinstance(value, tuple) else value)
        return tuple(values)

    def options(self) -> dict[str, Any]:
        """Keyword arguments of the Python wrapper."""
        names = [field.name for field in dataclasses.fields(self)]
        options = dict(zip(names, self.arguments(), strict=True))
        options["class_pooling"] = ClassPooling(self.class_pooling).name
        options["absent"] = ("keep", "ignore", "zero")[self.absent]
        options["reduction"] = Reduction(self.reduction).name
        options["normaliser"] = Normaliser(self.normaliser).name
        return options


def statistics(samples: int = 2, classes: int = 3, sums: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, classes, sums, generator=generator, dtype=torch.float64) * 10 + 0.1


#: Weights of three classes in two samples.
BY_SAMPLE = ((1.0, 0.0, 2.0), (0.5, 3.0, 0.0))

FORMULA_CASES = (
    RatioCase(),
    RatioCase(denominator=(1.0, 0.3, 0.7), exponent=0.75, class_weight=(1.0, 2.0, 0.5)),
    RatioCase(exponent=0.5, exponent_from=1),
    RatioCase(exponent=2.0, exponent_from=2, first_class=1, reduction=0),
    RatioCase(exponent=0.5, exponent_from=9, batch=True),
    RatioCase(numerator=(2.0,), denominator=(0.0,) * 5 + (1.0, 1.0), reduction=2),
    RatioCase(numerator=(2.0,), denominator=(2.0, 1.0, 1.0), min_denominator=25.0),
    RatioCase(first_class=1, batch=True, class_weight=(3.0, 1.0), smooth_nr=1.0, smooth_dr=2.0),
    RatioCase(log=True, min_denominator=1e-7),
    RatioCase(log=True, batch=True, min_denominator=22.0, reduction=0),
    RatioCase(reduction=0),
    RatioCase(reduction=0, batch=True, first_class=1, ratio_scale=2.0),
    *(RatioCase(class_pooling=k, class_weight=(1.0, 2.0, 0.5)) for k in (1, 2, 3)),
    *(
        RatioCase(exponent=0.75, class_weight=BY_SAMPLE, batch=batch, absent=absent, reduction=r)
        for batch, absent, r in ((False, 0, 1), (False, 1, 1), (True, 0, 0), (True, 1, 1))
    ),
    RatioCase(class_pooling=2, class_weight=BY_SAMPLE, absent=1, nll_scale=0.5),
    RatioCase(first_class=1, class_weight=((0.0, 2.0), (0.0, 0.0)), batch=True, nll_scale=0.5),
    RatioCase(class_pooling=3, reduction=0, batch=True, exponent=0.5),
    *(RatioCase(nll_scale=0.7, nll_weight=(1.0, 0.0, 2.0), normaliser=k) for k in range(5)),
    RatioCase(
        nll_scale=0.7, off_scale=0.2, off_weight=(1.0, 0.5, 2.0), normaliser=3, ratio_scale=0.5
    ),
    RatioCase(ratio_scale=0.0, nll_scale=1.0, off_scale=0.1, normaliser=2),
)


some_weights = st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3)
weights = st.none() | some_weights


@st.composite
def cases(draw: Any) -> tuple[RatioCase, Tensor]:
    sums = draw(st.sampled_from([4, 8]))
    first = draw(st.sampled_from([0, 0, 1]))
    smooth = draw(st.sampled_from([(1e-5, 1e-5), (0.0, 0.0), (1.0, 1.0), (1e-5, 0.0)]))

    samples = draw(st.integers(0, 3))

    def tuple_of(length: int, by_sample: bool = False) -> Any:
        values = draw(weights)
        if values is None or not by_sample:
            return None if values is None else tuple(values[:length])
        return tuple(tuple(draw(some_weights)[:length]) for _ in range(samples))

    case = RatioCase(
        numerator=draw(st.sampled_from([(1.0,), (2.0, 0.0)])),
        denominator=draw(st.sampled_from([(1.0, 0.3, 0.7), (2.0, 1.0, 1.0, 0.0)])),
        smooth_nr=smooth[0],
        smooth_dr=smooth[1],
        min_denominator=draw(st.sampled_from([0.0, 1e-7, 5.0])),
        exponent=draw(st.sampled_from([1.0, 0.75, 2.0])),
        log=draw(st.booleans()),
        class_weight=tuple_of(3 - first, samples > 0 and draw(st.booleans())),
        first_class=first,
        batch=draw(st.booleans()),
        class_pooling=draw(st.integers(0, 3)),
        absent=draw(st.integers(0, 2)),
        reduction=draw(st.integers(0, 2)),
        ratio_scale=draw(st.sampled_from([0.0, 1.0, 0.5])),
        nll_weight=tuple_of(3),
        off_weight=tuple_of(3),
        nll_scale=draw(st.sampled_from([0.0, 1.0])),
        off_scale=draw(st.sampled_from([0.0, 0.3])) if sums == 8 else 0.0,
        normaliser=draw(st.sampled_from(range(5) if sums == 8 else (0, 1, 4))),
        double_loss=draw(st.booleans()),
    )
    stats = statistics(samples, 3, sums, draw(st.integers(0, 99)))
    stats = stats * draw(st.sampled_from([1e-3, 1.0, 1e6]))
    for row in stats:
        if draw(st.booleans()):
            row[draw(st.integers(0, 2)), :3] = 0  # absent and not predicted
        kind = draw(st.integers(0, 7))
        if kind == 0:
            row[:, :] = 0  # every voxel ignored
        elif kind == 1:
            row[:, 1:3] = 0  # a perfect prediction
        elif kind == 2:
            row[0, draw(st.integers(0, sums - 1))] = float("nan")
    return case, stats


def check_ratio(operators: Any, stats: Tensor, **changes: Any) -> None:
    """Compare an emulated kernel with the reference; ``True`` for a weight is a weight a class, "by
    sample" one for every sample, of which every third is 0."""
    weights = tuple(torch.linspace(0.5, 2, stats.shape[1], dtype=torch.float64).tolist())
    first = changes.get("first_class", 0)
    by_sample = tuple(
        tuple(0.0 if (b + c) % 3 == 0 else w for c, w in enumerate(weights[first:]))
        for b in range(stats.shape[0])
    )
    for name in ("class_weight", "nll_weight", "off_weight"):
        wanted = weights[first:] if name == "class_weight" else weights
        wanted = by_sample if changes.get(name) == "by sample" else wanted
        changes[name] = wanted if changes.get(name) else None
    case = RatioCase(denominator=(1.0, 0.3, 0.7), **changes)
    expected = reference.ratio_loss(stats, *case.arguments())
    actual = operators.ratio_loss(stats, *case.arguments())
    # Nothing here is larger than some thousands, and the sums have a handful of terms.
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        rtol = 1e-12 if a.dtype == torch.float64 else 1e-7
        torch.testing.assert_close(a, e, rtol=rtol, atol=1e-13, equal_nan=True)
    loss, cotangents = expected
    grad = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    rest = (first, case.batch, case.class_pooling)
    torch.testing.assert_close(
        operators.ratio_loss_backward(grad, cotangents, *rest),
        reference.ratio_loss_backward(grad, cotangents, *rest),
        rtol=1e-15,
        atol=0,
    )


def with_absent_class(samples: int, classes: int, sums: int) -> Tensor:
    """Sums among which one class is absent and one predicted perfectly."""
    generator = torch.Generator().manual_seed(samples * classes)
    stats = torch.rand(samples, classes, sums, generator=generator, dtype=torch.float64) * 10
    stats[0, 0, :4] = 0  # an absent class
    stats[-1, -1, 1:3] = 0  # a perfect one
    return stats
