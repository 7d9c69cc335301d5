"""Lesion-wise metrics, by the rules of the challenges."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import (
    ROUNDING,
    Floats,
    Mask,
    as_mask,
    as_pair,
    as_probabilities,
    as_spacing,
    bounding_box,
    optional,
    same_shape,
)
from voxfuse.metrics.definitions import METRICS

Integers = NDArray[np.int64]

#: Bounds of the strata in mm3: a lesion of exactly 10 mm3 is in the second.
SIZE_EDGES = (10.0, 50.0, 500.0)


@dataclass(frozen=True)
class LesionRule:
    """When a lesion counts as detected.

    Lesions are connected components. Those of ``minimum_volume`` mm3 or less (to 5 digits, as voxel
    sizes are rounded) are dropped from the prediction and the truth. With ``matching="voxel"`` a
    true lesion is detected if one predicted lesion shares a voxel with it. With
    ``matching="coverage"`` (the Anima tool's rule, of MSSEG 2016), it is if predicted lesions cover
    more than ``alpha`` of it, and, taking them by decreasing overlap until ``gamma`` of the covered
    part is explained, none lies by more than ``beta`` outside all true lesions. With the roles
    swapped, the same says whether a predicted lesion is a true one.

    Args:
        name: what tables call it.
        connectivity: 6 (faces), 18 (and edges) or 26 (and corners); 4 and 8 neighbours in 2D.
        minimum_volume: mm3; 0 keeps all.
        matching: see above.
        alpha, beta, gamma: see above; shares in [0, 1].
    """

    name: str
    connectivity: Literal[6, 18, 26]
    minimum_volume: float = 0.0
    matching: Literal["voxel", "coverage"] = "voxel"
    alpha: float = 0.10
    beta: float = 0.70
    gamma: float = 0.65

    def __post_init__(self) -> None:
        if self.connectivity not in (6, 18, 26):
            raise ValueError(f"connectivity: got {self.connectivity}, expected 6, 18 or 26")
        if not self.minimum_volume >= 0:
            raise ValueError(f"minimum_volume: got {self.minimum_volume}, expected 0 or more mm3")
        if self.matching not in ("voxel", "coverage"):
            raise ValueError(f"matching: got {self.matching!r}, expected 'voxel' or 'coverage'")
        for name in ("alpha", "beta", "gamma"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected a share in [0, 1]")

    def __str__(self) -> str:
        small = f", {self.minimum_volume:g} mm3 or less dropped" if self.minimum_volume else ""
        match = (
            "one shared voxel"
            if self.matching == "voxel"
            else f"alpha {self.alpha:.0%}, beta {self.beta:.0%}, gamma {self.gamma:.0%}"
        )
        return f"{self.name}: {self.connectivity}-connected, {match}{small}"


#: ISBI 2015 (Carass et al. 2017), MSSEG 2016 (Commowick et al. 2018) and WMH 2017 (Kuijf et al.
#: 2019), by name.
RULES = {
    rule.name: rule
    for rule in (
        LesionRule("isbi", 18),
        LesionRule("msseg", 6, minimum_volume=3.0, matching="coverage"),
        LesionRule("wmh", 26),
    )
}


def as_rule(rule: str | LesionRule) -> LesionRule:
    if isinstance(rule, LesionRule):
        return rule
    if rule not in RULES:
        raise ValueError(f"rule: got {rule!r}, expected a LesionRule or one of {', '.join(RULES)}")
    return RULES[rule]


def as_edges(edges: Sequence[float], name: str = "edges") -> Floats:
    bounds = np.asarray(edges, dtype=np.float64)
    ascending = bounds.ndim == 1 and bounds.size and (np.diff(bounds) > 0).all()
    if not ascending or not np.isfinite(bounds).all():
        raise ValueError(f"{name}: got {edges!r}, expected ascending volumes in mm3")
    return bounds


def label_lesions(
    mask: Any,
    connectivity: int = 26,
    *,
    minimum_volume: float = 0.0,
    spacing: float | Sequence[float] = 1.0,
) -> tuple[NDArray[np.int32], Floats]:
    """Number the connected components of a mask.

    Args:
        mask: (\\*spatial), booleans or 0 and 1.
        connectivity: 6, 18 or 26; in 2D, 6 means 4 and the others 8 neighbours.
        minimum_volume: components of so many mm3 or less, to 5 digits, are dropped.
        spacing: voxel size in mm.

    Returns:
        The numbers from 1 on, 0 for background; and each component's volume in mm3.

    >>> corners = [[1, 0, 0], [0, 1, 0], [0, 0, 0]]
    >>> label_lesions(corners, 6)[1], label_lesions(corners, 26)[1]
    (array([1., 1.]), array([2.]))
    """
    mask = as_mask("mask", mask)
    voxel = float(np.prod(as_spacing(spacing, mask.ndim)))
    ranks = {6: 1, 18: 2, 26: 3}
    if connectivity not in ranks:
        raise ValueError(f"connectivity: got {connectivity}, expected 6, 18 or 26")
    ndimage = optional("scipy.ndimage", "Finding lesions")
    numbers: NDArray[np.int32] = np.zeros(mask.shape, np.int32)
    box = bounding_box(mask)
    structure = ndimage.generate_binary_structure(mask.ndim, min(ranks[connectivity], mask.ndim))
    numbers[box], count = ndimage.label(mask[box], structure, output=np.int32)
    voxels = np.bincount(numbers[box].ravel(), minlength=count + 1)[1:]
    # 3 voxels of 1 mm3 are 3 mm3 however their sizes were rounded.
    kept = voxels * voxel > minimum_volume * (1 + ROUNDING)
    if not kept.all():
        renumber = np.zeros(count + 1, np.int32)
        renumber[1:][kept] = np.arange(1, kept.sum() + 1)
        numbers[box] = renumber[numbers[box]]
    return numbers, (voxels[kept] * voxel).astype(np.float64)


@dataclass(frozen=True)
class LesionMatch:
    """The lesions of one subject, or of several, and which of them have a counterpart.

    Matches of several subjects add up: ``sum(matches, LesionMatch.none())`` pools their lesions.

    The policy for empty masks is one for whole subjects. In a stratum of :meth:`by_size` a rate
    without lesions is undefined, and so is F1 without both rates.
    """

    truth_volumes: Floats  #: mm3, one a true lesion
    detected: Mask  #: one a true lesion
    prediction_volumes: Floats  #: mm3, one a predicted lesion
    matching: Mask  #: one a predicted lesion: whether it is a true one
    truth_numbers: NDArray[np.int32] | None = field(default=None, repr=False)
    prediction_numbers: NDArray[np.int32] | None = field(default=None, repr=False)
    stratum: bool = field(default=False, repr=False)  #: one of :meth:`by_size`

    @classmethod
    def none(cls) -> LesionMatch:
        """No lesions at all."""
        return cls(np.zeros(0), np.zeros(0, bool), np.zeros(0), np.zeros(0, bool))

    def __add__(self, other: LesionMatch) -> LesionMatch:
        return LesionMatch(
            np.concatenate([self.truth_volumes, other.truth_volumes]),
            np.concatenate([self.detected, other.detected]),
            np.concatenate([self.prediction_volumes, other.prediction_volumes]),
            np.concatenate([self.matching, other.matching]),
            stratum=self.stratum and other.stratum,
        )

    def _of_nothing(self, name: str) -> float:
        """A rate without what it is a share of, by the policy for empty masks."""
        if self.stratum:  # there, one side alone may be empty though the lesions have counterparts
            return np.nan
        settled = METRICS[name].value_if_empty(self.detected.size == 0, self.matching.size == 0)
        return np.nan if settled is None else settled

    @property
    def sensitivity(self) -> float:
        """Detected over true lesions, the LTPR."""
        if not self.detected.size:
            return self._of_nothing("lesion_sensitivity")
        return float(self.detected.mean())

    @property
    def precision(self) -> float:
        """Matching over predicted lesions."""
        if not self.matching.size:
            return self._of_nothing("lesion_precision")
        return float(self.matching.mean())

    @property
    def false_discovery_rate(self) -> float:
        """False over predicted lesions: what ISBI 2015 calls LFPR."""
        if not self.matching.size:
            return self._of_nothing("lesion_false_discovery_rate")
        return float((~self.matching).mean())

    @property
    def f1(self) -> float:
        """Harmonic mean of sensitivity and precision."""
        if not self.detected.size or not self.matching.size:
            return self._of_nothing("lesion_f1")
        total = self.sensitivity + self.precision
        return 2 * self.sensitivity * self.precision / total if total else 0.0

    @cached_property
    def values(self) -> dict[str, float]:
        """The columns of the tables."""
        return {
            "lesions_truth": float(self.detected.size),
            "lesions_prediction": float(self.matching.size),
            "lesions_missed": float((~self.detected).sum()),
            "lesions_false": float((~self.matching).sum()),
            "lesions_false_ml": float(self.prediction_volumes[~self.matching].sum()) / 1000,
            "lesion_sensitivity": self.sensitivity,
            "lesion_precision": self.precision,
            "lesion_f1": self.f1,
            "lesion_false_discovery_rate": self.false_discovery_rate,
        }

    def by_size(self, edges: Sequence[float] = SIZE_EDGES) -> list[tuple[str, LesionMatch]]:
        """The lesions of each stratum: true ones by their volume, predicted ones by theirs.

        Args:
            edges: bounds in mm3, ascending. A stratum holds its lower bound, to 5 digits, not its
                upper one.

        >>> match = match_lesions([[1, 1, 1, 0, 0]], [[1, 1, 0, 0, 1]], spacing=2)
        >>> [(name, part.sensitivity) for name, part in match.by_size([5])]
        [('< 5', 0.0), ('>= 5', 1.0)]
        """
        bounds = as_edges(edges)
        names = [f"< {bounds[0]:g}"]
        names += [f"{a:g} to {b:g}" for a, b in itertools.pairwise(bounds)]
        names.append(f">= {bounds[-1]:g}")
        true = np.digitize(self.truth_volumes * (1 + ROUNDING), bounds)
        predicted = np.digitize(self.prediction_volumes * (1 + ROUNDING), bounds)
        return [
            (
                name,
                LesionMatch(
                    self.truth_volumes[true == stratum],
                    self.detected[true == stratum],
                    self.prediction_volumes[predicted == stratum],
                    self.matching[predicted == stratum],
                    stratum=True,
                ),
            )
            for stratum, name in enumerate(names)
        ]


def match_lesions(
    prediction: Any,
    truth: Any,
    spacing: float | Sequence[float] = 1.0,
    rule: str | LesionRule = "isbi",
    *,
    ignore: Any = None,
) -> LesionMatch:
    """Find the lesions of two masks, and which of them have a counterpart.

    Args:
        prediction, truth: masks (\\*spatial) of one shape.
        spacing: voxel size in mm.
        rule: a name in :data:`voxfuse.metrics.RULES`, or a rule of one's own.
        ignore: mask of voxels that are taken out of both (label 2 of WMH 2017).

    Raises:
        TypeError, ValueError: no masks, another shape, an unknown rule.
        ModuleNotFoundError: scipy is not installed.

    >>> match = match_lesions([[1, 1, 1, 0, 1]], [[1, 0, 1, 0, 0]])  # one over two, one false
    >>> match.sensitivity, match.precision
    (1.0, 0.5)
    """
    rule = as_rule(rule)
    prediction, truth = as_pair(prediction, truth, ignore)
    options = {"minimum_volume": rule.minimum_volume, "spacing": spacing}
    true, true_volumes = label_lesions(truth, rule.connectivity, **options)  # type: ignore[arg-type]
    predicted, predicted_volumes = label_lesions(prediction, rule.connectivity, **options)  # type: ignore[arg-type]
    shared = (true > 0) & (predicted > 0)
    codes = true[shared].astype(np.int64) * (predicted_volumes.size + 1) + predicted[shared]
    pairs, voxels = np.unique(codes, return_counts=True)
    rows, columns = np.divmod(pairs, predicted_volumes.size + 1)
    rows, columns = rows - 1, columns - 1
    voxel = float(np.prod(as_spacing(spacing, truth.ndim)))
    sizes = [
        np.rint(volumes / voxel).astype(np.int64) for volumes in (true_volumes, predicted_volumes)
    ]
    return LesionMatch(
        true_volumes,
        _found(rows, columns, voxels, sizes[0], sizes[1], rule),
        predicted_volumes,
        _found(columns, rows, voxels, sizes[1], sizes[0], rule),
        true,
        predicted,
    )


def _found(
    lesions: Integers,
    others: Integers,
    voxels: Integers,
    sizes: Integers,
    other_sizes: Integers,
    rule: LesionRule,
) -> Mask:
    """Which lesions have a counterpart, from the pairs that overlap and by how many voxels."""
    covered = np.bincount(lesions, voxels, sizes.size).astype(np.int64)
    if rule.matching == "voxel":
        return covered > 0
    found = covered > rule.alpha * sizes
    inside = np.bincount(others, voxels, other_sizes.size)
    outside = 1 - inside / np.maximum(other_sizes, 1)
    order = np.lexsort((others, -voxels, lesions))
    starts = np.searchsorted(lesions[order], np.arange(sizes.size + 1))
    for lesion in np.flatnonzero(found):
        explained = 0
        for pair in order[starts[lesion] : starts[lesion + 1]]:
            if explained >= rule.gamma * covered[lesion]:
                break
            if outside[others[pair]] > rule.beta:
                found[lesion] = False
                break
            explained += voxels[pair]
    return found


def isbi_score(
    dice: float,
    precision: float,
    false_discovery_rate: float,
    sensitivity: float,
    correlation: float,
) -> float:
    """The ISBI 2015 score of a subject: ``Dice/8 + PPV/8 + (1 - LFPR)/4 + LTPR/4 + r/4``.

    Args:
        dice, precision: of voxels.
        false_discovery_rate, sensitivity: of lesions (LFPR and LTPR).
        correlation: of predicted with true volumes, over subjects.

    A rate that is undefined for an empty mask (NaN) counts as the worst one. Two empty masks, which
    have ``dice`` 1 and no rates, get all of them. A correlation of NaN (one subject) gives NaN. The
    challenge's website rescales the score so that 90 is about a human rater; this one is in [0, 1]
    (with r = 1). Source: Carass et al., NeuroImage 2017.

    >>> round(isbi_score(0.6, 0.8, 0.2, 0.5, 0.9), 3)
    0.725
    """
    both_empty = dice == 1 and np.isnan(precision)
    worst = 1.0 if both_empty else 0.0
    precision = worst if np.isnan(precision) else precision
    sensitivity = worst if np.isnan(sensitivity) else sensitivity
    discovery = 1 - worst if np.isnan(false_discovery_rate) else false_discovery_rate
    return dice / 8 + precision / 8 + (1 - discovery) / 4 + sensitivity / 4 + correlation / 4


@dataclass(frozen=True)
class FreeResponse:
    """Lesion sensitivity over false lesions a scan, threshold by threshold."""

    thresholds: Floats
    sensitivity: Floats  #: over the lesions of all subjects; NaN if there are none
    false_lesions: Floats  #: mean number a subject


def free_response(
    probabilities: Iterable[Any],
    truths: Iterable[Any],
    spacings: Iterable[float | Sequence[float]],
    rule: str | LesionRule = "isbi",
    *,
    thresholds: Sequence[float] | None = None,
) -> FreeResponse:
    """The free-response curve of several subjects.

    At each threshold t, in the dtype of p, the prediction is ``p >= t``; its lesions are matched by
    the rule.

    Args:
        probabilities, truths, spacings: one a subject; they may be generators.
        rule: see :func:`match_lesions`.
        thresholds: default 0.05, 0.1, ... 0.95.

    >>> curve = free_response([[[0.9, 0.0, 0.4]]], [[[1, 0, 0]]], [1.0], thresholds=[0.3, 0.5])
    >>> curve.sensitivity, curve.false_lesions
    (array([1., 1.]), array([1., 0.]))
    """
    levels = np.arange(1, 20) / 20 if thresholds is None else np.asarray(thresholds, np.float64)
    if levels.ndim != 1 or not levels.size:
        raise ValueError(f"thresholds: got {thresholds!r}, expected a list of numbers")
    counts = np.zeros((levels.size, 3))
    subjects = 0
    for p, g, spacing in zip(probabilities, truths, spacings, strict=True):
        counts += free_response_counts(p, g, spacing, rule, levels)
        subjects += 1
    if not subjects:
        raise ValueError("probabilities: got no subject, expected one or more")
    return free_response_of_counts(levels, counts, subjects)


def free_response_of_counts(levels: Floats, counts: Floats, subjects: int) -> FreeResponse:
    """The curve from detected, true and false lesions, summed over subjects."""
    with np.errstate(invalid="ignore"):
        sensitivity = counts[:, 0] / counts[:, 1]
    return FreeResponse(levels, sensitivity, counts[:, 2] / subjects)


def free_response_counts(
    probabilities: Any,
    truth: Any,
    spacing: float | Sequence[float],
    rule: str | LesionRule,
    levels: Floats,
    minimum_volume: float = 0.0,
    connectivity: int = 18,
) -> Floats:
    """One subject's detected, true and false lesions, a row a threshold.

    Predicted lesions of ``minimum_volume`` mm3 or less, by this connectivity, are removed first.
    """
    p, g = as_probabilities(probabilities), as_mask("truth", truth)
    same_shape("probabilities", p, g)
    reached = levels.astype(p.dtype)  # else 0.7 in float32 would be below a threshold of 0.7
    box = bounding_box(p >= reached.min(), g)
    p, g = p[box], g[box]
    rows = []
    for level in reached:
        prediction = p >= level
        if minimum_volume:
            prediction = remove_small_lesions(prediction, minimum_volume, spacing, connectivity)
        match = match_lesions(prediction, g, spacing, rule)
        rows.append((match.detected.sum(), match.detected.size, (~match.matching).sum()))
    return np.asarray(rows, dtype=np.float64)


def remove_small_lesions(
    mask: Any,
    volume: float,
    spacing: float | Sequence[float] = 1.0,
    connectivity: int = 18,
) -> Mask:
    """A mask without its lesions of ``volume`` mm3 or less.

    >>> remove_small_lesions([[1, 1, 0, 1]], volume=1).astype(int)
    array([[1, 1, 0, 0]])
    """
    numbers, _ = label_lesions(mask, connectivity, minimum_volume=volume, spacing=spacing)
    return numbers > 0


@dataclass(frozen=True)
class MinimumVolume:
    """The outcome of :func:`tune_minimum_volume`."""

    volume: float  #: mm3: lesions of so much or less go
    candidates: tuple[float, ...]
    scores: tuple[float, ...]  #: the mean over subjects, one a candidate


def tune_minimum_volume(
    predictions: Sequence[Any],
    truths: Sequence[Any],
    spacings: Sequence[float | Sequence[float]],
    *,
    metric: Literal["lesion_f1", "dice"] = "lesion_f1",
    rule: str | LesionRule = "isbi",
    candidates: Sequence[float] = (0, 1, 2, 3, 5, 8, 10, 15, 20, 30, 50),
) -> MinimumVolume:
    """The minimum lesion size that gives the best mean score on the given subjects.

    Choose it on other subjects than those it is judged on. Of equal scores the smallest size wins.

    Args:
        predictions, truths, spacings: one a subject.
        metric: ``"lesion_f1"`` or ``"dice"``.
        rule: of ``lesion_f1``, and whose connectivity the lesions have.
        candidates: volumes in mm3.

    >>> tune_minimum_volume([[[1, 1, 0, 1]]], [[[1, 1, 0, 0]]], [1.0]).volume
    1.0
    """
    from voxfuse.metrics.voxelwise import voxel_counts

    rule = as_rule(rule)
    if metric not in ("lesion_f1", "dice"):
        raise ValueError(f"metric: got {metric!r}, expected 'lesion_f1' or 'dice'")
    volumes = sorted({float(candidate) for candidate in candidates})
    if not volumes or volumes[0] < 0 or not len(predictions):
        raise ValueError("candidates, predictions: expected one volume of 0 or more, one subject")
    scores = []
    for volume in volumes:
        values = []
        for prediction, truth, spacing in zip(predictions, truths, spacings, strict=True):
            kept = remove_small_lesions(prediction, volume, spacing, rule.connectivity)
            if metric == "dice":
                values.append(voxel_counts(kept, truth).dice)
            else:
                values.append(match_lesions(kept, truth, spacing, rule).f1)
        scores.append(float(np.mean(values)))
    return MinimumVolume(volumes[int(np.argmax(scores))], tuple(volumes), tuple(scores))
