"""The adapters read labels and dense targets of every type, as they read int64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from voxfuse.integrations import nnunet, smp
from voxfuse.ops import _checks

CLASSES = 3


def by_label() -> dict[str, Any]:
    found: dict[str, Any] = {
        "nnU-Net cross-entropy": nnunet.RobustCrossEntropyLoss(ignore_index=2),
        "nnU-Net top-k": nnunet.TopKLoss(k=30),
        "nnU-Net Dice": nnunet.MemoryEfficientSoftDiceLoss(torch.nn.Softmax(1)),
        "nnU-Net Dice, cross-entropy": nnunet.DC_and_CE_loss({}, {}, ignore_label=2),
        "smp Dice": smp.DiceLoss("multiclass", ignore_index=2),
        "smp Jaccard": smp.JaccardLoss("multiclass"),
        "smp focal": smp.FocalLoss("multiclass", ignore_index=2),
        "smp focal, composed": smp.FocalLoss("multiclass", normalized=True),
        "smp Lovász": smp.LovaszLoss("multiclass", ignore_index=2),
    }
    try:
        from voxfuse.integrations import monai
    except ModuleNotFoundError:
        return found
    options: dict[str, Any] = dict(to_onehot_y=True, softmax=True)
    return found | {
        "MONAI Dice": monai.DiceLoss(**options),
        "MONAI Dice, no reduction": monai.DiceLoss(**options, reduction="none"),
        "MONAI Dice, composed": monai.DiceLoss(to_onehot_y=True, other_act=torch.sigmoid),
        "MONAI Tversky": monai.TverskyLoss(**options),
        "MONAI generalised Dice": monai.GeneralizedDiceLoss(**options),
        "MONAI Dice, cross-entropy": monai.DiceCELoss(**options),
        "MONAI Dice, focal": monai.DiceFocalLoss(**options),
        "MONAI focal": monai.FocalLoss(to_onehot_y=True, use_softmax=True),
        "MONAI focal, no background": monai.FocalLoss(
            to_onehot_y=True, use_softmax=True, include_background=False
        ),
    }


def by_class() -> dict[str, Any]:
    found: dict[str, Any] = {
        "nnU-Net Dice, BCE": nnunet.DC_and_BCE_loss({}, {}),
        "nnU-Net Dice": nnunet.MemoryEfficientSoftDiceLoss(torch.nn.Sigmoid()),
        "smp Dice": smp.DiceLoss("multilabel"),
        "smp Dice, ignored": smp.DiceLoss("multilabel", ignore_index=0),
        "smp focal": smp.FocalLoss("multilabel"),
        "smp Lovász": smp.LovaszLoss("multilabel"),
    }
    try:
        from voxfuse.integrations import monai
    except ModuleNotFoundError:
        return found
    return found | {
        "MONAI Dice": monai.DiceLoss(sigmoid=True),
        "MONAI Dice, squared": monai.DiceLoss(sigmoid=True, squared_pred=True),
        "MONAI Dice, cross-entropy": monai.DiceCELoss(sigmoid=True),
        "MONAI Dice, focal": monai.DiceFocalLoss(sigmoid=True),
        "MONAI focal": monai.FocalLoss(gamma=1.5),
        "MONAI focal, no reduction": monai.FocalLoss(reduction="none"),
    }


@pytest.mark.parametrize("name", by_label())
def test_labels(name):
    loss = by_label()[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 6, 6, 6, generator=generator)
    labels = torch.randint(0, CLASSES, (2, 1, 6, 6, 6), generator=generator)
    if name.startswith("smp"):
        labels = labels[:, 0]
    for dtype in _checks.NUMBER_DTYPES:
        given = labels.clamp(max=1) if dtype == torch.bool else labels
        assert torch.equal(loss(logits, given.to(dtype)), loss(logits, given)), dtype


@pytest.mark.parametrize("name", by_class())
def test_dense_targets(name):
    loss = by_class()[name]
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, CLASSES, 6, 6, 6, generator=generator)
    target = torch.randint(0, 2, (2, CLASSES, 6, 6, 6), generator=generator)
    for dtype in _checks.NUMBER_DTYPES:
        assert torch.equal(loss(logits, target.to(dtype)), loss(logits, target)), dtype
