"""The losses as functions. Options and formulas are those of the modules of the same names.

Every function takes ``input`` (logits, or probabilities with ``activation="none"``) of shape
(B, C, *spatial), ``target`` (labels or dense), an optional voxel ``weight`` or mask, and the
module's options by keyword; ``class_weight`` may be a sequence, a tensor or one number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from voxfuse.losses import _recipe
from voxfuse.losses._engine import evaluate
from voxfuse.losses._ranks import ranks_of
from voxfuse.losses.lovasz import lovasz_hinge, lovasz_softmax

if TYPE_CHECKING:
    from typing import Unpack

    from voxfuse.losses._engine import ClassWeights
    from voxfuse.losses._options import CallOptions, CompoundOptions, OverlapOptions

__all__ = [
    "bce_loss",
    "cross_entropy_loss",
    "dice_ce_loss",
    "dice_focal_loss",
    "dice_loss",
    "fbeta_loss",
    "focal_loss",
    "focal_tversky_loss",
    "generalized_dice_loss",
    "jaccard_loss",
    "lovasz_hinge_loss",
    "lovasz_softmax_loss",
    "top_k_loss",
    "tversky_ce_loss",
    "tversky_focal_loss",
    "tversky_loss",
    "unified_focal_loss",
]


def _loss(
    recipe_from: Callable[..., _recipe.Recipe],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    *,
    class_weight: ClassWeights = None,
    likelihood_weight: ClassWeights = None,
    pos_weight: ClassWeights = None,
    process_group: Any = None,
    ddp_average: bool = False,
    backend: str = "auto",
    **options: Any,
) -> Tensor:
    return evaluate(
        recipe_from(**options),
        input,
        target,
        weight,
        class_weight,
        likelihood_weight,
        pos_weight,
        ranks_of(process_group, ddp_average),
        backend,
    )


def tversky_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    **options: Unpack[OverlapOptions],
) -> Tensor:
    """Tversky loss, (1 - TP / (TP + alpha FP + beta FN))^gamma; see :class:`voxfuse.TverskyLoss`.

    Example:
        >>> import torch, voxfuse
        >>> logits, labels = torch.zeros(1, 2, 8), torch.ones(1, 8, dtype=torch.uint8)
        >>> voxfuse.functional.tversky_loss(logits, labels, alpha=0.3, beta=0.7)
        tensor(0.7059)
    """
    return _loss(
        _recipe.tversky,
        input,
        target,
        weight,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        **options,
    )


def fbeta_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    beta: float = 1.5,
    gamma: float = 1.0,
    **options: Unpack[OverlapOptions],
) -> Tensor:
    """One minus F_beta; see :class:`voxfuse.FBetaLoss`."""
    return _loss(
        _recipe.fbeta,
        input,
        target,
        weight,
        beta=beta,
        gamma=gamma,
        **options,
    )


def focal_tversky_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    gamma: float = 0.75,
    **options: Unpack[OverlapOptions],
) -> Tensor:
    """Focal Tversky loss; see :class:`voxfuse.FocalTverskyLoss`."""
    return _loss(
        _recipe.focal_tversky,
        input,
        target,
        weight,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        **options,
    )


def dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    squared: bool = False,
    **options: Unpack[OverlapOptions],
) -> Tensor:
    """Soft Dice loss, 1 - 2 TP / (2 TP + FP + FN); see :class:`voxfuse.DiceLoss`."""
    return _loss(
        _recipe.dice,
        input,
        target,
        weight,
        squared=squared,
        **options,
    )


def jaccard_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    squared: bool = False,
    **options: Unpack[OverlapOptions],
) -> Tensor:
    """Soft Jaccard loss, 1 - TP / (TP + FP + FN); see :class:`voxfuse.JaccardLoss`."""
    return _loss(
        _recipe.jaccard,
        input,
        target,
        weight,
        squared=squared,
        **options,
    )


def generalized_dice_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    class_pooling: str = "square",
    **options: Unpack[OverlapOptions],
) -> Tensor:
    """Generalised Dice loss; see :class:`voxfuse.GeneralizedDiceLoss`."""
    return _loss(
        _recipe.generalized_dice,
        input,
        target,
        weight,
        class_pooling=class_pooling,
        **options,
    )


def cross_entropy_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    activation: str = "softmax",
    label_smoothing: float = 0.0,
    include_background: bool = True,
    reduction: str = "mean",
    ignore_index: int | None = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Cross-entropy; see :class:`voxfuse.CrossEntropyLoss`."""
    return _loss(
        _recipe.cross_entropy,
        input,
        target,
        weight,
        activation=activation,
        label_smoothing=label_smoothing,
        include_background=include_background,
        reduction=reduction,
        ignore_index=ignore_index,
        **options,
    )


def bce_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    include_background: bool = True,
    reduction: str = "mean",
    ignore_index: int | None = None,
    pos_weight: ClassWeights = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Binary cross-entropy of every class; see :class:`voxfuse.BCELoss`."""
    return _loss(
        _recipe.binary_cross_entropy,
        input,
        target,
        weight,
        include_background=include_background,
        reduction=reduction,
        ignore_index=ignore_index,
        pos_weight=pos_weight,
        **options,
    )


def focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    activation: str = "softmax",
    include_background: bool = True,
    reduction: str = "mean",
    ignore_index: int | None = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Focal loss; see :class:`voxfuse.FocalLoss`."""
    return _loss(
        _recipe.focal,
        input,
        target,
        weight,
        gamma=gamma,
        alpha=alpha,
        activation=activation,
        include_background=include_background,
        reduction=reduction,
        ignore_index=ignore_index,
        **options,
    )


def tversky_ce_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    lambda_tversky: float = 1.0,
    lambda_ce: float = 1.0,
    label_smoothing: float = 0.0,
    ce_activation: str | None = None,
    **options: Unpack[CompoundOptions],
) -> Tensor:
    """Tversky loss plus cross-entropy; see :class:`voxfuse.TverskyCELoss`."""
    return _loss(
        _recipe.tversky_ce,
        input,
        target,
        weight,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        lambda_tversky=lambda_tversky,
        lambda_ce=lambda_ce,
        label_smoothing=label_smoothing,
        ce_activation=ce_activation,
        **options,
    )


def dice_ce_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    lambda_dice: float = 1.0,
    lambda_ce: float = 1.0,
    squared: bool = False,
    label_smoothing: float = 0.0,
    ce_activation: str | None = None,
    **options: Unpack[CompoundOptions],
) -> Tensor:
    """Dice loss plus cross-entropy; see :class:`voxfuse.DiceCELoss`."""
    return _loss(
        _recipe.dice_ce,
        input,
        target,
        weight,
        lambda_dice=lambda_dice,
        lambda_ce=lambda_ce,
        squared=squared,
        label_smoothing=label_smoothing,
        ce_activation=ce_activation,
        **options,
    )


def tversky_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    alpha: float = 0.5,
    beta: float = 0.5,
    gamma: float = 1.0,
    focal_gamma: float = 2.0,
    focal_alpha: float | None = None,
    lambda_tversky: float = 1.0,
    lambda_focal: float = 1.0,
    focal_activation: str | None = None,
    **options: Unpack[CompoundOptions],
) -> Tensor:
    """Tversky loss plus focal loss; see :class:`voxfuse.TverskyFocalLoss`."""
    return _loss(
        _recipe.tversky_focal,
        input,
        target,
        weight,
        alpha=alpha,
        beta=beta,
        gamma=gamma,
        focal_gamma=focal_gamma,
        focal_alpha=focal_alpha,
        lambda_tversky=lambda_tversky,
        lambda_focal=lambda_focal,
        focal_activation=focal_activation,
        **options,
    )


def dice_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    focal_gamma: float = 2.0,
    focal_alpha: float | None = None,
    lambda_dice: float = 1.0,
    lambda_focal: float = 1.0,
    squared: bool = False,
    focal_activation: str | None = None,
    **options: Unpack[CompoundOptions],
) -> Tensor:
    """Dice loss plus focal loss; see :class:`voxfuse.DiceFocalLoss`."""
    return _loss(
        _recipe.dice_focal,
        input,
        target,
        weight,
        focal_gamma=focal_gamma,
        focal_alpha=focal_alpha,
        lambda_dice=lambda_dice,
        lambda_focal=lambda_focal,
        squared=squared,
        focal_activation=focal_activation,
        **options,
    )


def unified_focal_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    balance: float = 0.5,
    delta: float = 0.6,
    gamma: float = 0.5,
    symmetric: bool = True,
    **options: Unpack[CompoundOptions],
) -> Tensor:
    """Unified focal loss; see :class:`voxfuse.UnifiedFocalLoss`."""
    return _loss(
        _recipe.unified_focal,
        input,
        target,
        weight,
        balance=balance,
        delta=delta,
        gamma=gamma,
        symmetric=symmetric,
        **options,
    )


def top_k_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    k: float = 10.0,
    activation: str = "softmax",
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    ignore_index: int | None = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Cross-entropy over the worst ``k`` percent of the voxels; see :class:`voxfuse.TopKLoss`."""
    return _loss(
        _recipe.top_k,
        input,
        target,
        weight,
        k=k,
        activation=activation,
        label_smoothing=label_smoothing,
        reduction=reduction,
        ignore_index=ignore_index,
        **options,
    )


def lovasz_softmax_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    classes: str | Sequence[int] = "present",
    per_image: bool = False,
    activation: str = "softmax",
    ignore_index: int | None = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Lovász extension of the Jaccard loss; see :class:`voxfuse.LovaszLoss`."""
    return lovasz_softmax(
        input, target, weight, classes, per_image, activation, ignore_index, **options
    )


def lovasz_hinge_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    classes: str | Sequence[int] = "all",
    per_image: bool = False,
    ignore_index: int | None = None,
    **options: Unpack[CallOptions],
) -> Tensor:
    """Lovász hinge of the Jaccard loss; see :class:`voxfuse.LovaszHingeLoss`."""
    return lovasz_hinge(input, target, weight, classes, per_image, ignore_index, **options)
