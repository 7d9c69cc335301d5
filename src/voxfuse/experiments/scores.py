"""Scores over thresholds, and thresholds that are chosen without the test subject."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics import SIZE_EDGES, ScoreCounts, VoxelCounts, match_lesions, score_counts
from voxfuse.training.evaluation import thresholds

#: What is scored, by name.
SCORES = ("recall", "precision", "dice", "f2")

#: How the threshold of a row was chosen: 0.5, or where the tuning subjects' mean score is greatest.
TUNED = {"tuned-dice": "dice", "tuned-f2": "f2"}
CHOICES = ("0.5", *TUNED)
#: Of several structures: a voxel is of the class of greatest probability, or of the background.
ARGMAX = "argmax"


@dataclass(frozen=True)
class Curve:
    """A subject's counts of ``p >= threshold`` at every threshold, and the average precision."""

    thresholds: NDArray[np.float64]  #: ascending
    true_positive: NDArray[np.int64]
    false_positive: NDArray[np.int64]
    false_negative: NDArray[np.int64]
    voxels: int
    average_precision: float  #: over every distinct probability, not over the thresholds

    def counts(self, threshold: float) -> VoxelCounts:
        """At one of the thresholds."""
        (found,) = np.flatnonzero(np.isclose(self.thresholds, threshold, rtol=1e-9, atol=0))
        tp, fp, fn = (
            int(counts[found])
            for counts in (self.true_positive, self.false_positive, self.false_negative)
        )
        return VoxelCounts(tp, fp, fn, self.voxels - tp - fp - fn)

    def scores(self, name: str) -> NDArray[np.float64]:
        """A score of :data:`SCORES` at every threshold."""
        return np.array([_scores(self.counts(t))[name] for t in self.thresholds])


def _scores(counts: VoxelCounts) -> dict[str, float]:
    values = (counts.sensitivity, counts.precision, counts.dice, counts.f_beta(2))
    return dict(zip(SCORES, values, strict=True))


def curve(
    probabilities: NDArray[Any],
    truth: NDArray[np.bool_],
    mask: NDArray[np.bool_] | None = None,
    *,
    at: Sequence[float] | None = None,
) -> Curve:
    """Count a subject's voxels, inside ``mask`` alone if there is one.

    Args:
        probabilities: (\\*spatial), of the foreground.
        truth: mask of the same shape.
        mask: voxels that count; None is all.
        at: thresholds in place of :func:`voxfuse.training.evaluation.thresholds`.

    Example:
        >>> import numpy as np
        >>> from voxfuse.experiments.scores import curve, row
        >>> p, truth = np.float32([0.9, 0.8, 0.4, 0.1]), np.array([1, 0, 1, 0], bool)
        >>> found = row(curve(p, truth), 0.5)
        >>> found["tp"], found["fp"], found["fn"], found["dice"], round(found["ap"], 4)
        (1, 1, 1, 0.5, 0.8333)
    """
    if mask is not None:
        probabilities, truth = probabilities[mask], truth[mask]
    p, g = np.asarray(probabilities, np.float32).ravel(), np.asarray(truth, bool).ravel()
    return curve_of_counts(score_counts(p, g), at=at)


def curve_of_counts(counts: ScoreCounts, *, at: Sequence[float] | None = None) -> Curve:
    """The same of voxels that are counted already, by probabilities in float32."""
    levels = thresholds() if at is None else np.sort(np.asarray(at, np.float64))
    # In float32, as `p >= threshold` compares.
    first = np.searchsorted(counts.thresholds.astype(np.float32), levels.astype(np.float32))

    def at_or_above(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        above: NDArray[np.int64] = np.append(np.cumsum(numbers[::-1])[::-1], 0)[first]
        return above

    tp, fp = at_or_above(counts.positives), at_or_above(counts.negatives)
    fn = int(counts.positives.sum()) - tp
    voxels = int(counts.positives.sum() + counts.negatives.sum())
    return Curve(levels, tp, fp, fn, voxels, counts.average_precision())


def tuned_threshold(
    curves: Iterable[Curve], score: str = "dice", patients: Sequence[str] | None = None
) -> float:
    """The threshold at which the mean score of these patients is greatest.

    Of several, the one nearest to 0.5. Give it the subjects of validation, or the other patients of
    the test; never the subject that is then judged.

    Args:
        curves: of the subjects.
        score: of :data:`SCORES`.
        patients: of every subject, whose subjects (scans) are averaged first; None is one each.

    Raises:
        ValueError: no subject, or other thresholds than the first one's.
    """
    curves = list(curves)
    if not curves:
        raise ValueError("curves: got none, expected one a subject")
    levels = curves[0].thresholds
    if any(not np.array_equal(other.thresholds, levels) for other in curves):
        raise ValueError("curves: got different thresholds, expected the same of every subject")
    groups: Sequence[str | int] = range(len(curves)) if patients is None else patients
    of_patients: dict[str | int, list[NDArray[np.float64]]] = {}
    for patient, found in zip(groups, curves, strict=True):
        of_patients.setdefault(patient, []).append(found.scores(score))
    means = np.mean([np.mean(scores, 0) for scores in of_patients.values()], 0)
    best = np.flatnonzero(means == means.max())
    return float(levels[best[np.argmin(np.abs(levels[best] - 0.5))]])


def row(found: Curve, threshold: float) -> dict[str, Any]:
    """The columns level, tp, fp, fn, recall, precision, dice, f2 and ap of a subject."""
    return _row(found.counts(threshold), threshold, found)


def row_of_mask(
    found: Curve, called: NDArray[np.bool_], truth: NDArray[np.bool_]
) -> dict[str, Any]:
    """The same where no threshold decides."""
    tp = int((called & truth).sum())
    fp, fn = int(called.sum()) - tp, int(truth.sum()) - tp
    return _row(VoxelCounts(tp, fp, fn, truth.size - tp - fp - fn), None, found)


def _row(counts: VoxelCounts, level: float | None, found: Curve) -> dict[str, Any]:
    return {
        "level": level,
        "tp": counts.true_positive,
        "fp": counts.false_positive,
        "fn": counts.false_negative,
        **_scores(counts),
        "ap": found.average_precision,
    }


def leave_one_out(
    curves: Mapping[str, Curve], groups: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Rows of every subject at 0.5 and at the thresholds tuned on the other patients.

    Args:
        curves: of every subject.
        groups: the patient of every subject; None is one subject a patient.

    Raises:
        ValueError: one patient alone, for whom there are no others.
    """
    patient = {name: name if groups is None else groups[name] for name in curves}
    rows = []
    for name, found in curves.items():
        others = [other for other in curves if patient[other] != patient[name]]
        known = [curves[other] for other in others], [patient[other] for other in others]
        levels = {"0.5": 0.5}
        levels |= {way: tuned_threshold(known[0], TUNED[way], known[1]) for way in TUNED}
        rows += [{"subject": name, "threshold": way, **row(found, levels[way])} for way in CHOICES]
    return rows


def by_size(
    prediction: NDArray[np.bool_],
    truth: NDArray[np.bool_],
    spacing: float | Sequence[float] = 1.0,
    edges: Sequence[float] = SIZE_EDGES,
) -> list[dict[str, Any]]:
    """True lesions and how many of them were found, by their size in mm3.

    ISBI 2015's rule: 18-connected, one shared voxel. Predicted lesions by their own size, with how
    many of them are none.
    """
    match = match_lesions(prediction, truth, spacing, "isbi")
    return [
        {
            "size": name,
            "lesions": int(part.detected.size),
            "found": int(part.detected.sum()),
            "predicted": int(part.matching.size),
            "false": int((~part.matching).sum()),
        }
        for name, part in match.by_size(edges)
    ]
