"""Segmentations judged as the challenges judge them.

Masks in, numbers out: voxel-wise, lesion-wise by the rules of ISBI 2015, MSSEG 2016 and WMH 2017,
surface distances in mm, and curves of probabilities. ``docs/evaluation.md`` says which rule is for
which comparison. scipy is asked for where it is needed. During training, on the device:
:class:`SegmentationScores`.
"""

from voxfuse.metrics.curves import PrecisionRecall, Reliability, ScoreCounts, score_counts
from voxfuse.metrics.definitions import METRICS, Metric
from voxfuse.metrics.lesions import (
    RULES,
    SIZE_EDGES,
    FreeResponse,
    LesionMatch,
    LesionRule,
    MinimumVolume,
    free_response,
    isbi_score,
    label_lesions,
    match_lesions,
    remove_small_lesions,
    tune_minimum_volume,
)
from voxfuse.metrics.scores import SegmentationScores
from voxfuse.metrics.surface import SurfaceDistances, surface_distances
from voxfuse.metrics.voxelwise import VoxelCounts, correlation, volume_metrics, voxel_counts

__all__ = [
    "METRICS",
    "RULES",
    "SIZE_EDGES",
    "FreeResponse",
    "LesionMatch",
    "LesionRule",
    "Metric",
    "MinimumVolume",
    "PrecisionRecall",
    "Reliability",
    "ScoreCounts",
    "SegmentationScores",
    "SurfaceDistances",
    "VoxelCounts",
    "correlation",
    "free_response",
    "isbi_score",
    "label_lesions",
    "match_lesions",
    "remove_small_lesions",
    "score_counts",
    "surface_distances",
    "tune_minimum_volume",
    "volume_metrics",
    "voxel_counts",
]
