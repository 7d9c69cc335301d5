"""Competitors of the loss benchmark: every implementation of the same Tversky or Dice+CE loss.

Each entry builds a function of (logits, labels) that returns a scalar loss. Labels arrive as uint8
(B, 1, *spatial), as a loader hands them over; a competitor that needs another type converts them
inside its call, as a training script would have to.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ALPHA, BETA, SMOOTH = 0.3, 0.7, 1e-5

Loss = Callable[[Tensor, Tensor], Tensor]


def plain_one_hot(logits: Tensor, labels: Tensor) -> Tensor:
    """Tversky in plain PyTorch, by one-hot encoding."""
    p = logits.softmax(1)
    g = torch.zeros_like(p).scatter_(1, labels.long(), 1)
    return _tversky(p, g)


def plain_comparison(logits: Tensor, labels: Tensor) -> Tensor:
    """Tversky in plain PyTorch with ``labels == arange(C)``, the form that compiles best."""
    p = logits.softmax(1)
    shape = (1, logits.shape[1]) + (1,) * (logits.ndim - 2)
    index = torch.arange(logits.shape[1], device=logits.device, dtype=labels.dtype).reshape(shape)
    g = (labels == index).to(p.dtype)
    return _tversky(p, g)


def plain_unbind(logits: Tensor, labels: Tensor) -> Tensor:
    """Tversky in plain PyTorch, class by class."""
    p = logits.softmax(1)
    axes = tuple(range(1, logits.ndim - 1))
    total = logits.new_zeros(())
    for c, pc in enumerate(p.unbind(1)):
        g = labels[:, 0] == c
        tp = torch.where(g, pc, 0).sum(axes)
        fp = torch.where(g, 0, pc).sum(axes)
        fn = torch.where(g, 1 - pc, 0).sum(axes)
        total = total + (1 - (tp + SMOOTH) / (tp + ALPHA * fp + BETA * fn + SMOOTH)).mean()
    return total / logits.shape[1]


def _tversky(p: Tensor, g: Tensor) -> Tensor:
    axes = tuple(range(2, p.ndim))
    tp = (p * g).sum(axes)
    fp = (p * (1 - g)).sum(axes)
    fn = ((1 - p) * g).sum(axes)
    return (1 - (tp + SMOOTH) / (tp + ALPHA * fp + BETA * fn + SMOOTH)).mean()


def tversky_competitors(wanted: set[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the competitors for the Tversky loss, and why a wanted one is missing."""
    import voxfuse

    found: dict[str, Loss] = {
        "voxfuse": voxfuse.TverskyLoss(
            alpha=ALPHA, beta=BETA, smooth_nr=SMOOTH, smooth_dr=SMOOTH, activation="softmax"
        )
    }
    missing: dict[str, str] = {}
    if "reference" in wanted:
        found["plain"] = plain_one_hot
    if "monai" in wanted:
        if importlib.util.find_spec("monai") is None:
            missing["monai"] = "the package monai is not installed"
        else:
            from monai.losses import TverskyLoss

            found["monai"] = TverskyLoss(
                softmax=True,
                to_onehot_y=True,
                alpha=ALPHA,
                beta=BETA,
                smooth_nr=SMOOTH,
                smooth_dr=SMOOTH,
            )
    if "nnunet" in wanted:
        if importlib.util.find_spec("nnunetv2") is None:
            missing["nnunet"] = "the package nnunetv2 is not installed"
        else:
            found["nnunet"] = _nnunet_dice(compiled=False)
    if "compile-best" in wanted:  # the form that is nearly always the fastest, to save time
        found["compile-comparison"] = torch.compile(plain_comparison, dynamic=False)
    if "compile" in wanted:
        torch._dynamo.config.cache_size_limit = 64
        found["compile-one-hot"] = torch.compile(plain_one_hot)
        found["compile-comparison"] = torch.compile(plain_comparison)
        found["compile-unbind"] = torch.compile(plain_unbind)
        if importlib.util.find_spec("nnunetv2") is not None:
            found["compile-nnunet"] = _nnunet_dice(compiled=True)
    return found, missing


def _nnunet_dice(*, compiled: bool) -> Loss:
    """nnU-Net's memory-efficient soft Dice (alpha = beta = 1/2: the same sums to read)."""
    from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss
    from nnunetv2.utilities.helpers import softmax_helper_dim1

    loss: Any = MemoryEfficientSoftDiceLoss(
        apply_nonlin=softmax_helper_dim1, batch_dice=False, do_bg=True, smooth=SMOOTH, ddp=False
    )
    return torch.compile(loss) if compiled else loss


def compound_competitors(wanted: set[str]) -> tuple[dict[str, Loss], dict[str, str]]:
    """Return the competitors for Dice + cross-entropy."""
    import voxfuse

    found: dict[str, Loss] = {"voxfuse DiceCE": voxfuse.DiceCELoss()}
    missing: dict[str, str] = {}
    if "monai" in wanted:
        if importlib.util.find_spec("monai") is None:
            missing["monai"] = "the package monai is not installed"
        else:
            from monai.losses import DiceCELoss

            found["monai DiceCE"] = DiceCELoss(softmax=True, to_onehot_y=True)
    return found, missing


def is_tversky(name: str) -> bool:
    """Whether competitor ``name`` computes the Tversky loss itself (and not nnU-Net's Dice)."""
    return "nnunet" not in name
