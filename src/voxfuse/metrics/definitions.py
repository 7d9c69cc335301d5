"""What each metric is, which way is better, and what it is worth where a mask is empty."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

NAN = math.nan


@dataclass(frozen=True)
class Metric:
    """One metric of the tables.

    ``empty_truth``, ``empty_prediction`` and ``both_empty`` are its values where only the truth,
    only the prediction or both hold no voxel (for lesion-wise metrics: no lesion that the rule
    counts). NaN means undefined: such a subject is left out of the mean, and the number of subjects
    that a mean is over stands beside it.
    """

    name: str
    title: str
    formula: str
    better: Literal["higher", "lower", "zero", ""] = ""
    unit: str = ""
    empty_truth: float | None = None
    empty_prediction: float | None = None
    both_empty: float | None = None

    def value_if_empty(self, truth_empty: bool, prediction_empty: bool) -> float | None:
        """The value that the policy sets; None where the formula gives it."""
        if truth_empty and prediction_empty:
            return self.both_empty
        if truth_empty:
            return self.empty_truth
        return self.empty_prediction if prediction_empty else None


def _metrics() -> dict[str, Metric]:
    listed = [
        Metric("dice", "Dice", "2 TP / (2 TP + FP + FN)", "higher", "", 0.0, 0.0, 1.0),
        Metric("jaccard", "Jaccard", "TP / (TP + FP + FN)", "higher", "", 0.0, 0.0, 1.0),
        Metric("f2", "F2", "5 TP / (5 TP + 4 FN + FP)", "higher", "", 0.0, 0.0, 1.0),
        Metric("sensitivity", "Sensitivity", "TP / (TP + FN)", "higher", "", NAN, 0.0, NAN),
        Metric("precision", "Precision (PPV)", "TP / (TP + FP)", "higher", "", 0.0, NAN, NAN),
        Metric("specificity", "Specificity", "TN / (TN + FP)", "higher"),
        Metric("npv", "NPV", "TN / (TN + FN)", "higher"),
        Metric(
            "mcc",
            "MCC",
            "(TP TN - FP FN) / sqrt((TP + FP) (TP + FN) (TN + FP) (TN + FN))",
            "higher",
            "",
            NAN,
            NAN,
            NAN,
        ),
        Metric("truth_ml", "True volume", "truth voxels x voxel volume", "", "ml", 0.0, None, 0.0),
        Metric(
            "prediction_ml",
            "Predicted volume",
            "predicted voxels x voxel volume",
            "",
            "ml",
            None,
            0.0,
            0.0,
        ),
        Metric(
            "volume_difference_ml",
            "Volume difference",
            "predicted - true volume",
            "zero",
            "ml",
            None,
            None,
            0.0,
        ),
        Metric(
            "relative_volume_difference",
            "Relative volume difference",
            "(predicted - true volume) / true volume",
            "zero",
            "",
            NAN,
            -1.0,
            0.0,
        ),
        Metric(
            "absolute_volume_difference",
            "|dV| / V",
            "|predicted - true volume| / true volume",
            "lower",
            "",
            NAN,
            1.0,
            0.0,
        ),
        Metric(
            "average_precision",
            "Average precision",
            "sum over thresholds of (R_n - R_n-1) P_n",
            "higher",
            "",
            NAN,
            None,
            NAN,
        ),
        Metric(
            "hd95",
            "HD95",
            "larger of the two 95th percentiles of distances between surfaces",
            "lower",
            "mm",
            NAN,
            NAN,
            0.0,
        ),
        Metric(
            "assd",
            "Average surface distance",
            "mean of the distances between surfaces, both ways",
            "lower",
            "mm",
            NAN,
            NAN,
            0.0,
        ),
        Metric(
            "surface_dice",
            "Surface Dice",
            "share of both surfaces within the tolerance of the other",
            "higher",
            "",
            0.0,
            0.0,
            1.0,
        ),
        Metric("lesions_truth", "True lesions", "components of the truth", "", "", 0.0, None, 0.0),
        Metric(
            "lesions_prediction",
            "Predicted lesions",
            "components of the prediction",
            "",
            "",
            None,
            0.0,
            0.0,
        ),
        Metric("lesions_missed", "Missed lesions", "true, not detected", "lower", "", 0, None, 0),
        Metric(
            "lesions_false", "False lesions", "predicted, matching none", "lower", "", None, 0, 0
        ),
        Metric(
            "lesions_false_ml",
            "Volume of false lesions",
            "volume of predicted lesions that match none",
            "lower",
            "ml",
            None,
            0.0,
            0.0,
        ),
        Metric(
            "lesion_sensitivity",
            "Lesion sensitivity (LTPR)",
            "detected / true lesions",
            "higher",
            "",
            NAN,
            0.0,
            NAN,
        ),
        Metric(
            "lesion_precision",
            "Lesion precision",
            "matching / predicted lesions",
            "higher",
            "",
            0.0,
            NAN,
            NAN,
        ),
        Metric(
            "lesion_f1",
            "Lesion F1",
            "harmonic mean of lesion sensitivity and precision",
            "higher",
            "",
            0.0,
            0.0,
            1.0,
        ),
        Metric(
            "lesion_false_discovery_rate",
            "False lesions / predicted (LFPR)",
            "false / predicted lesions",
            "lower",
            "",
            1.0,
            NAN,
            NAN,
        ),
        Metric(
            "isbi_score",
            "ISBI 2015 score",
            "Dice/8 + PPV/8 + (1 - LFPR)/4 + LTPR/4 + r/4; an undefined term counts as the worst, "
            "for two empty masks as the best; r is the correlation of volumes over subjects",
            "higher",
            "",
            None,
            None,
            None,
        ),
        Metric(
            "wmh_hd95",
            "HD95 (WMH)",
            "HD95 of outlines drawn slice by slice",
            "lower",
            "mm",
            NAN,
            NAN,
            0.0,
        ),
    ]
    return {metric.name: metric for metric in listed}


#: Every metric of the tables, by name.
METRICS = _metrics()


def definition(name: str) -> Metric:
    """The metric of a column: ``msseg.lesion_f1`` is ``lesion_f1`` by the rule ``msseg``."""
    return METRICS[name.rpartition(".")[2]]
