"""Metrics of voxels: counts, overlaps and volumes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxfuse.metrics._arrays import as_pair, as_spacing
from voxfuse.metrics.definitions import METRICS


@dataclass(frozen=True)
class VoxelCounts:
    """Numbers of voxels, and the metrics that follow from them.

    Those of several subjects add up: ``a + b`` is both as one volume. Where a mask is empty, see
    :data:`voxfuse.metrics.METRICS`.
    """

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    def __add__(self, other: VoxelCounts) -> VoxelCounts:
        return VoxelCounts(
            self.true_positive + other.true_positive,
            self.false_positive + other.false_positive,
            self.false_negative + other.false_negative,
            self.true_negative + other.true_negative,
        )

    @property
    def truth(self) -> int:
        """Voxels of the truth."""
        return self.true_positive + self.false_negative

    @property
    def prediction(self) -> int:
        """Voxels of the prediction."""
        return self.true_positive + self.false_positive

    def _ratio(self, name: str, beta: float = 1.0) -> float:
        settled = METRICS[name].value_if_empty(self.truth == 0, self.prediction == 0)
        if settled is not None:
            return settled
        numerator, denominator = fraction(name, self, beta)
        return float(numerator / denominator) if denominator else np.nan

    @property
    def dice(self) -> float:
        """``2 TP / (2 TP + FP + FN)``."""
        return self.f_beta(1.0)

    @property
    def jaccard(self) -> float:
        """``TP / (TP + FP + FN)``."""
        return self._ratio("jaccard")

    def f_beta(self, beta: float) -> float:
        """``(1 + b^2) TP / ((1 + b^2) TP + b^2 FN + FP)``; b > 1 asks for sensitivity."""
        check_beta(beta)
        return self._ratio("dice", beta)

    @property
    def sensitivity(self) -> float:
        """``TP / (TP + FN)``, the recall."""
        return self._ratio("sensitivity")

    @property
    def precision(self) -> float:
        """``TP / (TP + FP)``, the positive predictive value."""
        return self._ratio("precision")

    @property
    def specificity(self) -> float:
        """``TN / (TN + FP)``."""
        return self._ratio("specificity")

    @property
    def npv(self) -> float:
        """``TN / (TN + FN)``, the negative predictive value."""
        return self._ratio("npv")

    @property
    def mcc(self) -> float:
        """``(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))``, of Matthews."""
        return self._ratio("mcc")


def fraction(name: str, counts: VoxelCounts, beta: float = 1.0) -> tuple[Any, Any]:
    """Numerator and denominator of a metric of counts, which may be arrays or tensors."""
    tp, fp = counts.true_positive, counts.false_positive
    fn, tn = counts.false_negative, counts.true_negative
    if name == "dice":
        hits = (1 + beta**2) * tp
        return hits, hits + beta**2 * fn + fp
    if name == "mcc":
        sides = (tp + fp, tp + fn, tn + fp, tn + fn)
        # Root by root: the product of four counts of a volume is beyond 64 bits.
        return tp * tn - fp * fn, math.prod(side**0.5 for side in sides)
    if name == "relative_volume_difference":
        return fp - fn, counts.truth
    part, rest = {
        "jaccard": (tp, fp + fn),
        "sensitivity": (tp, fn),
        "precision": (tp, fp),
        "specificity": (tn, fp),
        "npv": (tn, fn),
    }[name]
    return part, part + rest


def check_beta(beta: float) -> None:
    if not beta > 0:
        raise ValueError(f"beta: got {beta}, expected a positive number")


def voxel_counts(prediction: Any, truth: Any, *, ignore: Any = None) -> VoxelCounts:
    """Count true and false, positive and negative voxels.

    Args:
        prediction, truth: masks (\\*spatial) of one shape: booleans, or numbers 0 and 1; arrays or
            tensors.
        ignore: mask of voxels that count as nothing.

    Raises:
        TypeError, ValueError: no mask, or another shape.

    >>> counts = voxel_counts([[1, 1, 0, 0]], [[1, 0, 1, 0]])
    >>> counts.true_positive, counts.dice, counts.f_beta(2)
    (1, 0.5, 0.5)
    """
    prediction, truth = as_pair(prediction, truth, ignore)
    both = int(np.count_nonzero(prediction & truth))
    predicted, true = int(np.count_nonzero(prediction)), int(np.count_nonzero(truth))
    ignored = 0 if ignore is None else int(np.count_nonzero(np.asarray(ignore)))
    total = truth.size - ignored
    return VoxelCounts(both, predicted - both, true - both, total - predicted - true + both)


def volume_metrics(
    counts: VoxelCounts, spacing: float | Sequence[float], dimensions: int = 3
) -> dict[str, float]:
    """True and predicted volume in ml, their difference in ml and relative to the true volume.

    Args:
        counts: see :func:`voxel_counts`.
        spacing: voxel size in mm, one an axis, or one for all.
        dimensions: number of spatial axes.

    >>> volume_metrics(VoxelCounts(500, 250, 0, 0), (1, 1, 2))["relative_volume_difference"]
    0.5
    """
    millilitres = float(np.prod(as_spacing(spacing, dimensions))) / 1000
    difference = counts.prediction - counts.truth
    relative = counts._ratio("relative_volume_difference")
    values = {
        "truth_ml": counts.truth * millilitres,
        "prediction_ml": counts.prediction * millilitres,
        "volume_difference_ml": difference * millilitres,
        "relative_volume_difference": relative,
        "absolute_volume_difference": abs(relative),
    }
    for name in values:
        settled = METRICS[name].value_if_empty(counts.truth == 0, counts.prediction == 0)
        if settled is not None:
            values[name] = settled
    return values


def correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Pearson's correlation, of volumes over subjects; NaN for fewer than two or constant ones.

    >>> round(correlation([1.0, 2.0, 4.0], [2.0, 4.0, 8.0]), 12)
    1.0
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"second: got shape {b.shape}, expected one number a subject, {a.shape}")
    # Constant ones are not quite their mean in floating point.
    if a.size < 2 or not np.ptp(a) or not np.ptp(b):
        return np.nan
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / scale if scale > 0 else np.nan
