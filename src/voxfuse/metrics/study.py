"""Scores of many subjects: one at a time, pooled, and two methods side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import Any, Literal

import numpy as np

from voxfuse.metrics._arrays import Floats, as_pair, as_probabilities, optional
from voxfuse.metrics.curves import ScoreCounts, score_counts
from voxfuse.metrics.definitions import definition
from voxfuse.metrics.lesions import (
    LesionMatch,
    LesionRule,
    as_rule,
    free_response_counts,
    isbi_score,
    match_lesions,
    remove_small_lesions,
)
from voxfuse.metrics.surface import surface_distances
from voxfuse.metrics.voxelwise import VoxelCounts, correlation, volume_metrics, voxel_counts

#: Thresholds of the free-response curves.
LEVELS = np.arange(1, 20) / 20
VOXELWISE = ("dice", "jaccard", "sensitivity", "precision", "specificity", "npv", "mcc")


@dataclass(frozen=True)
class Options:
    """What is computed for every subject.

    Args:
        rules: of the lesion-wise metrics.
        tolerance: mm, of the surface Dice.
        outline: see :func:`voxfuse.metrics.surface_distances`; None leaves surfaces out.
        slice_axis: for WMH 2017's outlines.
        threshold: of probabilities; ``p >= threshold`` is the mask.
        bins: of probabilities' curves; None is exact.
        minimum_volume: mm3; predicted lesions of so much or less are removed first, at every
            threshold of the free-response curves, too. Average precision and the other curves
            are of all voxels.
    """

    rules: tuple[LesionRule, ...] = (as_rule("isbi"),)
    tolerance: float = 1.0
    outline: Literal["voxels", "areas"] | None = "voxels"
    slice_axis: int = -1
    threshold: float = 0.5
    bins: int | None = 1000
    minimum_volume: float = 0.0


@dataclass(frozen=True)
class SubjectScores:
    """One label of one subject."""

    subject: str
    label: str
    values: dict[str, float]
    counts: VoxelCounts
    matches: dict[str, LesionMatch]
    scores: ScoreCounts | None = None
    free_response: dict[str, Floats] = field(default_factory=dict)


def score_subject(
    prediction: Any,
    truth: Any,
    spacing: float | Sequence[float] = 1.0,
    options: Options | None = None,
    *,
    subject: str = "",
    label: str = "foreground",
    ignore: Any = None,
) -> SubjectScores:
    """All metrics of one subject.

    Args:
        prediction: mask, or probabilities (floating-point numbers in [0, 1]).
        truth: mask of the same shape.
        spacing: voxel size in mm.
        options: see :class:`Options`.
        subject, label: names in the tables.
        ignore: mask of voxels that count as nothing.

    >>> scores = score_subject([[[1, 1, 0, 0]]], [[[1, 0, 0, 0]]])
    >>> round(scores.values["dice"], 3), scores.values["isbi.lesion_f1"], scores.values["hd95"]
    (0.667, 1.0, 0.95)
    """
    options = options or Options()
    probabilities = _probabilities(prediction)
    scores = None
    if probabilities is not None:
        scores = score_counts(probabilities, truth, bins=options.bins, ignore=ignore)
        # A NumPy float64 would have float32 probabilities compared in float64.
        prediction = probabilities >= float(options.threshold)
    prediction, truth = as_pair(prediction, truth, ignore)
    connectivity = options.rules[0].connectivity if options.rules else 18
    if options.minimum_volume:
        prediction = remove_small_lesions(prediction, options.minimum_volume, spacing, connectivity)
    counts = voxel_counts(prediction, truth, ignore=ignore)
    values = {name: getattr(counts, name) for name in VOXELWISE}
    values["f2"] = counts.f_beta(2)
    values |= volume_metrics(counts, spacing, truth.ndim)
    if scores is not None:
        values["average_precision"] = scores.average_precision()
    if options.outline is not None:
        distances = surface_distances(prediction, truth, spacing, outline=options.outline)
        values["hd95"] = distances.hausdorff(95)
        values["assd"] = distances.average()
        values["surface_dice"] = distances.surface_dice(options.tolerance)
    matches: dict[str, LesionMatch] = {}
    free: dict[str, Floats] = {}
    for rule in options.rules:
        match = match_lesions(prediction, truth, spacing, rule)
        matches[rule.name] = match
        values |= {f"{rule.name}.{name}": value for name, value in match.values.items()}
        if probabilities is not None:
            kept = probabilities if ignore is None else np.where(ignore, 0, probabilities)
            free[rule.name] = free_response_counts(
                kept, truth, spacing, rule, LEVELS, options.minimum_volume, connectivity
            )
        if rule.name == "wmh" and options.outline is not None:
            slices = surface_distances(
                prediction, truth, spacing, outline="slices", slice_axis=options.slice_axis
            )
            values["wmh.wmh_hd95"] = slices.hausdorff(95)
    return SubjectScores(subject, label, values, counts, matches, scores, free)


def _probabilities(prediction: Any) -> Any:
    kind = getattr(prediction, "dtype", None)
    if "float" not in str(kind):
        return None
    return as_probabilities(prediction)


def without_volumes(scores: SubjectScores) -> SubjectScores:
    """The same without the numbered lesions, which are as large as the images."""
    matches = {
        name: replace(match, truth_numbers=None, prediction_numbers=None)
        for name, match in scores.matches.items()
    }
    return replace(scores, matches=matches)


@dataclass(frozen=True)
class Summary:
    """One metric over subjects; NaN values are left out, and ``subjects`` says how many were not.

    ``pooled`` is the metric of all voxels or lesions taken as one subject's; NaN where that has no
    meaning.
    """

    subjects: int
    mean: float
    sd: float
    median: float
    low: float
    high: float
    pooled: float


@dataclass(frozen=True)
class Study:
    """All subjects of one label, pooled."""

    label: str
    scores: list[SubjectScores]
    columns: dict[str, Summary]
    volume_correlation: float
    matches: dict[str, LesionMatch]
    curves: ScoreCounts | None
    free_response: dict[str, Floats]


def pool(scores: Sequence[SubjectScores]) -> Study:
    """Pool the subjects of one label, and add what only several subjects have.

    The ISBI score needs the correlation of volumes over subjects; it joins each subject's values.

    >>> one = score_subject([[[1, 1, 0, 0]]], [[[1, 0, 0, 0]]], subject="a")
    >>> two = score_subject([[[0, 0, 1, 1]]], [[[0, 0, 1, 1]]], subject="b")
    >>> study = pool([one, two])
    >>> round(study.columns["dice"].mean, 3), round(study.columns["dice"].pooled, 3)
    (0.833, 0.857)
    """
    if not scores or len({one.label for one in scores}) != 1:
        raise ValueError("scores: expected one or more subjects of one label")
    over_subjects = correlation(
        [one.values["prediction_ml"] for one in scores], [one.values["truth_ml"] for one in scores]
    )
    rows = [_with_isbi_score(one, over_subjects) for one in scores]
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    rules = list(rows[0].matches)
    matches = {
        rule: reduce(LesionMatch.__add__, (row.matches[rule] for row in rows), LesionMatch.none())
        for rule in rules
    }
    counts = reduce(VoxelCounts.__add__, (row.counts for row in rows))
    found = [row.scores for row in rows if row.scores is not None]
    curves = reduce(ScoreCounts.__add__, found) if found else None
    free = {rule: sum(row.free_response[rule] for row in rows) for rule in rows[0].free_response}
    pooled = {name: float(getattr(counts, name)) for name in VOXELWISE}
    pooled["f2"] = counts.f_beta(2)
    if curves is not None:
        pooled["average_precision"] = curves.average_precision()
    for rule, match in matches.items():
        pooled |= {f"{rule}.{name}": value for name, value in match.values.items()}
    columns = {
        name: _summary([row.values.get(name, math.nan) for row in rows], pooled.get(name, math.nan))
        for name in names
    }
    return Study(rows[0].label, rows, columns, over_subjects, matches, curves, free)  # type: ignore[arg-type]


def _with_isbi_score(one: SubjectScores, over_subjects: float) -> SubjectScores:
    if "isbi" not in one.matches:
        return one
    match = one.matches["isbi"]
    score = isbi_score(
        one.counts.dice,
        one.counts.precision,
        match.false_discovery_rate,
        match.sensitivity,
        over_subjects,
    )
    return replace(one, values={**one.values, "isbi.isbi_score": score})


def _summary(values: list[float], pooled: float) -> Summary:
    known = np.asarray([value for value in values if not math.isnan(value)])
    if not known.size:
        return Summary(0, math.nan, math.nan, math.nan, math.nan, math.nan, pooled)
    sd = float(known.std(ddof=1)) if known.size > 1 else math.nan
    return Summary(
        int(known.size),
        float(known.mean()),
        sd,
        float(np.median(known)),
        float(known.min()),
        float(known.max()),
        pooled,
    )


@dataclass(frozen=True)
class Comparison:
    """One metric of two methods on the same subjects.

    ``difference`` is the mean of first minus second (of their magnitudes, for metrics whose best
    value is 0 from both sides), with the 95 % interval of Student's t. ``winners`` says who is
    better on which subject: ``"first"``, ``"second"`` or ``"tie"``.
    """

    column: str
    difference: float
    low: float
    high: float
    differences: dict[str, float]
    winners: dict[str, str]

    def count(self, winner: str) -> int:
        """On how many subjects this one wins."""
        return sum(found == winner for found in self.winners.values())


def compare(first: Study, second: Study) -> list[Comparison]:
    """Compare two methods, metric by metric, on the subjects where both are defined.

    >>> def study(*predictions):
    ...     truth = [[[1, 1, 0, 0]]]
    ...     return pool([score_subject(p, truth, subject=f"{n}")
    ...                  for n, p in enumerate(predictions)])
    >>> better = study([[[1, 1, 0, 0]]], [[[1, 1, 1, 0]]])
    >>> worse = study([[[1, 0, 0, 0]]], [[[1, 1, 1, 1]]])
    >>> dice = compare(better, worse)[0]
    >>> dice.column, round(dice.difference, 3), dice.count("first")
    ('dice', 0.233, 2)
    """
    others = {one.subject: one for one in second.scores}
    unknown = [one.subject for one in first.scores if one.subject not in others]
    if unknown or len(others) != len(first.scores):
        raise ValueError(f"second: expected the same subjects as first; differing: {unknown}")
    rows = []
    for column in first.columns:
        better = definition(column).better
        if not better:
            continue
        differences, winners = {}, {}
        for one in first.scores:
            a, b = (
                one.values.get(column, math.nan),
                others[one.subject].values.get(column, math.nan),
            )
            if math.isnan(a) or math.isnan(b):
                continue
            if better == "zero":
                a, b = abs(a), abs(b)
            differences[one.subject] = a - b
            gain = a - b if better == "higher" else b - a
            winners[one.subject] = "first" if gain > 0 else "second" if gain < 0 else "tie"
        if differences:
            mean, half = _interval(list(differences.values()))
            rows.append(Comparison(column, mean, mean - half, mean + half, differences, winners))
    return rows


def _interval(values: list[float]) -> tuple[float, float]:
    """Mean and half the width of the 95 % interval of Student's t."""
    array, count = np.asarray(values), len(values)
    if count < 2:
        return float(array.mean()), math.nan
    quantile = optional("scipy.special", "The t interval").stdtrit(count - 1, 0.975)
    return float(array.mean()), float(quantile * array.std(ddof=1) / math.sqrt(count))
