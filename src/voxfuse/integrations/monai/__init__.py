"""MONAI's losses on the fused operators: same constructors, same numbers, same state_dict keys.

    from voxfuse.integrations.monai import DiceCELoss  # instead of monai.losses

Semantics are those of MONAI 1.6. MetaTensors and float32 index labels are read as they are. What
the kernels cannot do (``other_act``, voxel-wise results, soft targets in a focal loss) is computed
by PyTorch, in part or in whole. ``docs/differences.md`` says where the numbers differ, and which of
MONAI's losses are replaced.

:func:`sliding_window_inference`, ``SlidingWindowInferer`` and ``SlidingWindowInfererAdapt`` replace
those of ``monai.inferers``; the two classes derive from MONAI's, which is imported at their first
use.
"""

from typing import Any

from voxfuse.integrations.monai._compound import (
    DiceCELoss,
    DiceFocalLoss,
    GeneralizedDiceFocalLoss,
)
from voxfuse.integrations.monai._focal import FocalLoss
from voxfuse.integrations.monai._inference import sliding_window_inference
from voxfuse.integrations.monai._masked import MaskedDiceLoss, MaskedLoss
from voxfuse.integrations.monai._overlap import (
    DiceLoss,
    GeneralizedDiceLoss,
    MCCLoss,
    TverskyLoss,
)
from voxfuse.integrations.monai._supervised import DeepSupervisionLoss
from voxfuse.integrations.monai._unified import AsymmetricUnifiedFocalLoss

__all__ = [
    "AsymmetricUnifiedFocalLoss",
    "DeepSupervisionLoss",
    "DiceCELoss",
    "DiceFocalLoss",
    "DiceLoss",
    "FocalLoss",
    "GeneralizedDiceFocalLoss",
    "GeneralizedDiceLoss",
    "MCCLoss",
    "MaskedDiceLoss",
    "MaskedLoss",
    "TverskyLoss",
    "sliding_window_inference",
]

_INFERERS = ("SlidingWindowInferer", "SlidingWindowInfererAdapt")


def __getattr__(name: str) -> Any:
    if name in _INFERERS:
        from voxfuse.integrations.monai import _inferers

        return getattr(_inferers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
