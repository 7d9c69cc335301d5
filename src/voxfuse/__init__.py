"""voxfuse: fused overlap losses and patch fusion for 3D medical image segmentation."""

from voxfuse import _library

_library.load()

from voxfuse import functional  # noqa: E402
from voxfuse._backends import Backend, backends  # noqa: E402
from voxfuse.fusion.fuser import PatchFuser  # noqa: E402
from voxfuse.fusion.overlap import overlap_add  # noqa: E402
from voxfuse.fusion.sliding_window import sliding_window_inference  # noqa: E402
from voxfuse.fusion.windows import bspline_window  # noqa: E402
from voxfuse.losses import (  # noqa: E402
    BCELoss,
    CrossEntropyLoss,
    DeepSupervisionLoss,
    DiceCELoss,
    DiceFocalLoss,
    DiceLoss,
    FBetaLoss,
    FocalLoss,
    FocalTverskyLoss,
    GeneralizedDiceLoss,
    HeadDiceCELoss,
    HeadLoss,
    HeadTverskyLoss,
    JaccardLoss,
    LovaszHingeLoss,
    LovaszLoss,
    MCCLoss,
    Sums,
    SumsLoss,
    TopKLoss,
    TverskyCELoss,
    TverskyFocalLoss,
    TverskyLoss,
    UnifiedFocalLoss,
    fuse_head,
    head_loss,
)
from voxfuse.ops.hard_confusion import hard_confusion  # noqa: E402
from voxfuse.ops.head_confusion import head_confusion  # noqa: E402
from voxfuse.ops.resample_argmax import resample_argmax  # noqa: E402
from voxfuse.ops.soft_confusion import soft_confusion  # noqa: E402

__version__ = "0.1.0"

__all__ = [
    "BCELoss",
    "Backend",
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
    "PatchFuser",
    "Sums",
    "SumsLoss",
    "TopKLoss",
    "TverskyCELoss",
    "TverskyFocalLoss",
    "TverskyLoss",
    "UnifiedFocalLoss",
    "backends",
    "bspline_window",
    "functional",
    "fuse_head",
    "hard_confusion",
    "head_confusion",
    "head_loss",
    "overlap_add",
    "resample_argmax",
    "sliding_window_inference",
    "soft_confusion",
]
