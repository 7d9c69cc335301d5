"""Losses for segmentation, each one pass over the voxels: modules here, functions in functional."""

from voxfuse.losses.compound import (
    DiceCELoss,
    DiceFocalLoss,
    TverskyCELoss,
    TverskyFocalLoss,
    UnifiedFocalLoss,
)
from voxfuse.losses.likelihood import BCELoss, CrossEntropyLoss, FocalLoss
from voxfuse.losses.overlap import (
    DiceLoss,
    FBetaLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    TverskyLoss,
)

__all__ = [
    "BCELoss",
    "CrossEntropyLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FBetaLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "TverskyCELoss",
    "TverskyFocalLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
]
