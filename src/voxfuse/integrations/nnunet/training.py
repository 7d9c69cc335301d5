"""nnU-Net's training: its losses converted, its validation counted without a one-hot volume."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from voxfuse.integrations.nnunet import compound, cross_entropy, dice
from voxfuse.ops.hard_confusion import hard_confusion

#: The folder for ``nnUNet_extTrainer``.
TRAINERS = Path(__file__).resolve().parent / "trainers"

#: nnU-Net's classes, by their module and name, and what they become.
REPLACED: dict[tuple[str, str], type[nn.Module]] = {
    (f"nnunetv2.training.loss.{module}", kind.__name__): kind
    for module, kinds in {
        "dice": (dice.SoftDiceLoss, dice.MemoryEfficientSoftDiceLoss),
        "robust_ce_loss": (cross_entropy.RobustCrossEntropyLoss, cross_entropy.TopKLoss),
        "compound_losses": (
            compound.DC_and_CE_loss,
            compound.DC_and_BCE_loss,
            compound.DC_and_topk_loss,
        ),
    }.items()
    for kind in kinds
}

#: Packages whose modules are parts of the above, or wrap them.
_NEUTRAL = ("torch.", "voxfuse.", "nnunetv2.training.loss.deep_supervision")


def fused(
    loss: nn.Module,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    gamma: float | None = None,
) -> nn.Module:
    """Put the losses of this package in the place of nnU-Net's, wherever ``loss`` holds them.

    The loss is converted in place and returned: deep supervision with its weights, what
    ``torch.compile`` wraps, ``.dc``, ``.ce`` and all options stay. What is not nnU-Net's own (a
    class that derives from one of its losses, too) stays as it is, and a warning names it, once.

    Args:
        loss: what a trainer's ``_build_loss`` has built.
        alpha, beta, gamma: any of them makes every Dice term a
            :class:`~voxfuse.integrations.nnunet.SoftTverskyLoss`, whose defaults the others have.

    Returns:
        ``loss``.

    Raises:
        TypeError: ``loss`` is no module.
        ValueError: ``alpha``, ``beta`` or ``gamma`` is out of range, or there is no Dice term.

    Example:
        A trainer of your own, in a file in the folder that ``nnUNet_extTrainer`` names:

        >>> def _build_loss(self):
        ...     from voxfuse.integrations.nnunet import fused
        ...     return fused(super()._build_loss(), alpha=0.3, beta=0.7)
    """
    if not isinstance(loss, nn.Module):
        raise TypeError(f"loss: got {type(loss).__name__}, expected a torch.nn.Module")
    foreign = []
    for module in loss.modules():
        kind = type(module)
        ours = REPLACED.get((kind.__module__, kind.__name__))
        if ours is not None:
            # Ours hold the same attributes; whoever holds the module now holds ours.
            module.__class__ = ours
        elif not f"{kind.__module__}.".startswith(_NEUTRAL) and not compound.named_before(module):
            foreign.append(f"{kind.__module__}.{kind.__qualname__}")
    if foreign:
        warnings.warn(
            f"fused: not a loss of nnU-Net, stays as it is: {', '.join(foreign)}", stacklevel=2
        )
    options = {"alpha": alpha, "beta": beta, "gamma": gamma}
    given = {name: value for name, value in options.items() if value is not None}
    if given:
        _make_tversky(loss, given)
    return loss


def _make_tversky(loss: nn.Module, options: dict[str, float]) -> None:
    terms = [module for module in loss.modules() if isinstance(module, dice.SoftDice)]
    if not terms:
        raise ValueError(f"{next(iter(options))}: the loss has no Dice term of nnU-Net")
    for term in terms:
        made = {name: options.get(name, getattr(term, name)) for name in ("alpha", "beta", "gamma")}
        dice.check_tversky(**made)
        term.__class__ = dice.SoftTverskyLoss
        for name, value in made.items():
            setattr(term, name, value)


def validation_step(trainer: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """``nnUNetTrainer.validation_step`` with the counts of one pass over the logits.

    Args:
        trainer: an initialised nnUNetTrainer.
        batch: as its data loader gives it.

    Returns:
        nnU-Net's dictionary: ``loss``, and ``tp_hard``, ``fp_hard``, ``fn_hard`` by class without
        the background, or by region. nnU-Net rounds its counts to float32; these are exact.
    """
    data, target = _moved(batch["data"], trainer.device), _moved(batch["target"], trainer.device)
    # As nnU-Net: only CUDA's autocast.
    with torch.autocast(trainer.device.type, enabled=trainer.device.type == "cuda"):
        output = trainer.network(data)
        loss = trainer.loss(output, target)
    if trainer.enable_deep_supervision:
        output, target = output[0], target[0]
    labels = trainer.label_manager
    if labels.has_regions:
        ignored = None
        if labels.has_ignore_label:
            target, ignored = target[:, :-1], target[:, -1:]
            ignored = ~ignored if ignored.dtype == torch.bool else 1 - ignored
        counts = hard_confusion(output, target, "threshold", mask=ignored)
    else:
        counts = hard_confusion(output, target, ignore_index=labels.ignore_label)[:, 1:]
    tp, fp, fn, _ = counts.sum(0).cpu().numpy().astype(np.float64).T
    return {"loss": loss.detach().cpu().numpy(), "tp_hard": tp, "fp_hard": fp, "fn_hard": fn}


def _moved(tensors: Any, device: torch.device) -> Any:
    if isinstance(tensors, list):
        return [tensor.to(device, non_blocking=True) for tensor in tensors]
    return tensors.to(device, non_blocking=True)
