"""nnU-Net on the fused operators.

    from voxfuse.integrations.nnunet import DC_and_CE_loss  # instead of nnunetv2...compound_losses

The losses need no nnU-Net: same constructors, same numbers, same ``.dc`` and ``.ce`` as those of
nnU-Net 2.8. ``docs/differences.md`` says where the numbers differ.
"""

from voxfuse.integrations.nnunet.losses import (
    DC_and_BCE_loss,
    DC_and_CE_loss,
    DC_and_topk_loss,
    MemoryEfficientSoftDiceLoss,
    RobustCrossEntropyLoss,
    SoftDiceLoss,
    TopKLoss,
    get_tp_fp_fn_tn,
    softmax_helper_dim1,
)

__all__ = [
    "DC_and_BCE_loss",
    "DC_and_CE_loss",
    "DC_and_topk_loss",
    "MemoryEfficientSoftDiceLoss",
    "RobustCrossEntropyLoss",
    "SoftDiceLoss",
    "TopKLoss",
    "get_tp_fp_fn_tn",
    "softmax_helper_dim1",
]
