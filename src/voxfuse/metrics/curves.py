"""Curves over the threshold: precision and recall, F_b, reliability."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import Floats, as_mask, as_probabilities, same_shape
from voxfuse.metrics.definitions import METRICS

Integers = NDArray[np.int64]


@dataclass(frozen=True)
class PrecisionRecall:
    """Precision and recall of ``p >= threshold``, from the highest threshold to the lowest."""

    thresholds: Floats
    precision: Floats
    recall: Floats


@dataclass(frozen=True)
class Reliability:
    """Probabilities in bins: what was predicted, and how often it came true."""

    predicted: Floats  #: mean probability of a bin's voxels; NaN for an empty bin
    observed: Floats  #: share of them in the truth; NaN for an empty bin
    voxels: Integers

    @property
    def calibration_error(self) -> float:
        """The expected calibration error: mean of ``|observed - predicted|`` over voxels."""
        gaps = np.abs(np.nan_to_num(self.observed - self.predicted))
        return float(gaps @ self.voxels / self.voxels.sum()) if self.voxels.sum() else np.nan


@dataclass(frozen=True)
class ScoreCounts:
    """How many voxels of the truth, and outside it, have which probability.

    It is all that the curves need, and that of several subjects adds up. Thresholds ascend.
    """

    thresholds: Floats
    positives: Integers
    negatives: Integers
    totals: Floats  #: sum of the probabilities, for the reliability curve
    bins: int | None = None

    def __add__(self, other: ScoreCounts) -> ScoreCounts:
        if self.bins != other.bins:
            raise ValueError(f"bins: got {self.bins} and {other.bins}, expected the same")
        levels = np.concatenate([self.thresholds, other.thresholds])
        thresholds, index = np.unique(levels, return_inverse=True)

        def added(first: Any, second: Any) -> Any:
            total = np.bincount(index, np.concatenate([first, second]), thresholds.size)
            return total.astype(first.dtype)

        return ScoreCounts(
            thresholds,
            added(self.positives, other.positives),
            added(self.negatives, other.negatives),
            added(self.totals, other.totals),
            self.bins,
        )

    def precision_recall(self) -> PrecisionRecall:
        """``P = TP / (TP + FP)`` and ``R = TP / (TP + FN)`` at each distinct threshold.

        Scikit-learn's, without its last point (1, 0). Recall is NaN where the truth is empty.
        """
        seen = (self.positives + self.negatives)[::-1] > 0
        true = np.cumsum(self.positives[::-1])[seen]
        called = np.cumsum((self.positives + self.negatives)[::-1])[seen]
        total = self.positives.sum()
        recall = true / total if total else np.full(true.size, np.nan)
        return PrecisionRecall(self.thresholds[::-1][seen], true / called, recall)

    def average_precision(self) -> float:
        """``AP = sum_n (R_n - R_n-1) P_n``: the area under the steps, not under chords."""
        if self.positives.sum() == 0:
            both = not self.thresholds[(self.positives + self.negatives) > 0].any()
            return METRICS["average_precision"].value_if_empty(True, both) or np.nan
        curve = self.precision_recall()
        return float(np.diff(curve.recall, prepend=0.0) @ curve.precision)

    def f_beta(self, beta: float = 1.0) -> tuple[Floats, Floats]:
        """Thresholds, descending, and ``F_b = (1 + b^2) P R / (b^2 P + R)`` at each."""
        if not beta > 0:
            raise ValueError(f"beta: got {beta}, expected a positive number")
        curve = self.precision_recall()
        hits = (1 + beta**2) * curve.precision * curve.recall
        with np.errstate(invalid="ignore"):
            values = hits / (beta**2 * curve.precision + curve.recall)
        return curve.thresholds, np.where(hits == 0, 0.0, values)

    def reliability(self, bins: int = 10) -> Reliability:
        """The reliability curve on ``bins`` intervals of equal width, the last one closed."""
        if bins < 1 or (self.bins is not None and self.bins % bins):
            raise ValueError(f"bins: got {bins}, expected 1 or more, and a divisor of {self.bins}")
        # Compared, as 0.29 * 100 is less than 29.
        place = np.searchsorted(np.arange(1, bins) / bins, self.thresholds, side="right")
        positives = np.bincount(place, self.positives, bins)
        voxels = positives + np.bincount(place, self.negatives, bins)
        with np.errstate(invalid="ignore", divide="ignore"):
            predicted = np.bincount(place, self.totals, bins) / voxels
            observed = positives / voxels
        return Reliability(predicted, observed, voxels.astype(np.int64))


def score_counts(
    probabilities: Any, truth: Any, *, bins: int | None = None, ignore: Any = None
) -> ScoreCounts:
    """Count the voxels of each probability.

    Args:
        probabilities: (\\*spatial), floating-point numbers in [0, 1], give or take 0.001.
        truth: mask of the same shape.
        bins: None is exact: every distinct probability is a threshold. A number rounds
            probabilities **down** to multiples of ``1 / bins`` first (1 into the last bin), for
            large volumes and many subjects: the curves are then exactly those of the rounded
            probabilities.
        ignore: mask of voxels that count as nothing.

    Raises:
        TypeError, ValueError: no probabilities, another shape.

    >>> counts = score_counts([[0.9, 0.8, 0.4, 0.1]], [[1, 0, 1, 0]])
    >>> round(counts.average_precision(), 4)
    0.8333
    """
    p, g = as_probabilities(probabilities), as_mask("truth", truth)
    same_shape("probabilities", p, g)
    if ignore is not None:
        kept = ~as_mask("ignore", ignore)
        same_shape("ignore", kept, g)
        p, g = p[kept], g[kept]
    p, g = p.ravel(), g.ravel()
    if bins is None:
        thresholds, place = np.unique(p, return_inverse=True)
        size = thresholds.size
        thresholds = thresholds.astype(np.float64)
    else:
        if bins < 1:
            raise ValueError(f"bins: got {bins}, expected None or a positive number")
        place = np.minimum((p * p.dtype.type(bins)).astype(np.int32), bins - 1)
        size, thresholds = bins, np.arange(bins) / bins
    voxels = np.bincount(place, minlength=size)
    positives = np.bincount(place[g], minlength=size)
    totals = np.bincount(place, p, size).astype(np.float64)
    return ScoreCounts(thresholds, positives, voxels - positives, totals, bins)
