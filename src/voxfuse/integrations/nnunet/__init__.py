"""nnU-Net on the fused operators.

    from voxfuse.integrations.nnunet import DC_and_CE_loss  # instead of nnunetv2...compound_losses
    loss = fused(loss)  # or: convert what nnU-Net has built

The losses need no nnU-Net: same constructors, same numbers, same ``.dc`` and ``.ce`` as those of
nnU-Net 2.8. ``docs/differences.md`` says where the numbers differ; ``docs/nnunet.md`` has the
trainers.
"""

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

__all__ = [
    "DC_and_BCE_loss",
    "DC_and_CE_loss",
    "DC_and_topk_loss",
    "MemoryEfficientSoftDiceLoss",
    "RobustCrossEntropyLoss",
    "SoftDiceLoss",
    "SoftTverskyLoss",
    "TopKLoss",
    "fused",
    "get_tp_fp_fn_tn",
    "softmax_helper_dim1",
    "validation_step",
]
