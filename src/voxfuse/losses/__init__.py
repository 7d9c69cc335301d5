"""Losses for segmentation, each one pass over the voxels: modules here, functions in functional."""

from voxfuse.losses.compound import (
    DiceCELoss,
    DiceFocalLoss,
    TverskyCELoss,
    TverskyFocalLoss,
    UnifiedFocalLoss,
)
from voxfuse.losses.deep_supervision import DeepSupervisionLoss
from voxfuse.losses.head import (
    HeadDiceCELoss,
    HeadLoss,
    HeadTverskyLoss,
    fuse_head,
    head_loss,
)
from voxfuse.losses.likelihood import BCELoss, CrossEntropyLoss, FocalLoss, TopKLoss
from voxfuse.losses.lovasz import LovaszHingeLoss, LovaszLoss
from voxfuse.losses.of_sums import SumsLoss
from voxfuse.losses.overlap import (
    DiceLoss,
    FBetaLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    JaccardLoss,
    MCCLoss,
    TverskyLoss,
)
from voxfuse.losses.sums import Sums

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
    "HeadDiceCELoss",
    "HeadLoss",
    "HeadTverskyLoss",
    "JaccardLoss",
    "LovaszHingeLoss",
    "LovaszLoss",
    "MCCLoss",
    "Sums",
    "SumsLoss",
    "TopKLoss",
    "TverskyCELoss",
    "TverskyFocalLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
    "fuse_head",
    "head_loss",
]
