"""Losses for segmentation, each one pass over the voxels: modules here, functions in functional."""

from voxfuse.losses.compound import (
    DiceCELoss,
    DiceFocalLoss,
    TverskyCELoss,
    TverskyFocalLoss,
    UnifiedFocalLoss,
)
from voxfuse.losses.deep_supervision import DeepSupervisionLoss
from voxfuse.losses.likelihood import BCELoss, CrossEntropyLoss, FocalLoss, TopKLoss
from voxfuse.losses.lovasz import LovaszHingeLoss, LovaszLoss
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
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FBetaLoss",
    "FocalLoss",
    "FocalTverskyLoss",
    "GeneralizedDiceLoss",
    "JaccardLoss",
    "LovaszHingeLoss",
    "LovaszLoss",
    "TopKLoss",
    "TverskyCELoss",
    "TverskyFocalLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
]
