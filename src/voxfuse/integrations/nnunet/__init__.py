"""nnU-Net on the fused operators.

    from voxfuse.integrations.nnunet import DC_and_CE_loss  # instead of nnunetv2...compound_losses
    loss = fused(loss)  # or: convert what nnU-Net has built

The losses need no nnU-Net: same constructors, same numbers, same ``.dc`` and ``.ce`` as those of
nnU-Net 2.8. ``docs/differences.md`` says where the numbers differ; ``docs/nnunet.md`` has the
trainers and the prediction.

    from voxfuse.integrations.nnunet import Predictor  # instead of nnUNetPredictor
    patch()  # or: of every nnUNetPredictor, whoever builds it
"""

from typing import TYPE_CHECKING, Any

from voxfuse.integrations.nnunet.compound import (
    DC_and_BCE_loss,
    DC_and_CE_loss,
    DC_and_topk_loss,
)
from voxfuse.integrations.nnunet.cross_entropy import RobustCrossEntropyLoss, TopKLoss
from voxfuse.integrations.nnunet.dice import (
    MemoryEfficientSoftDiceLoss,
    SoftDiceLoss,
    SoftTverskyLoss,
    get_tp_fp_fn_tn,
    softmax_helper_dim1,
)
from voxfuse.integrations.nnunet.training import fused, validation_step

if TYPE_CHECKING:
    from voxfuse.integrations.nnunet.predictor import Predictor, patch

__all__ = [
    "DC_and_BCE_loss",
    "DC_and_CE_loss",
    "DC_and_topk_loss",
    "MemoryEfficientSoftDiceLoss",
    "Predictor",
    "RobustCrossEntropyLoss",
    "SoftDiceLoss",
    "SoftTverskyLoss",
    "TopKLoss",
    "fused",
    "get_tp_fp_fn_tn",
    "patch",
    "softmax_helper_dim1",
    "validation_step",
]


def __getattr__(name: str) -> Any:
    # What derives from nnU-Net's classes is imported with nnU-Net, and not before it is asked for.
    if name in ("Predictor", "patch"):
        from voxfuse.integrations.nnunet import predictor

        return getattr(predictor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
