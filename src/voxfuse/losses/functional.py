"""The losses as functions. Options and formulas are those of the modules of the same names.

Every function takes ``input`` (logits, or probabilities with ``activation="none"``) of shape
(B, C, *spatial), ``target`` (labels or dense), an optional ``mask`` or voxel weights, and by
keyword the module's options, and ``annotated`` and ``return_sums`` of its call; ``class_weight``
may be a sequence, a tensor or one number.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal, ParamSpec, Protocol, overload

from torch import Tensor, nn

from voxfuse.losses.compound import (
    DiceCELoss,
    DiceFocalLoss,
    TverskyCELoss,
    TverskyFocalLoss,
    UnifiedFocalLoss,
)
from voxfuse.losses.declared import did_you_mean
from voxfuse.losses.likelihood import BCELoss, CrossEntropyLoss, FocalLoss, TopKLoss
from voxfuse.losses.lovasz import LovaszHingeLoss, LovaszLoss
from voxfuse.losses.options import WEIGHT_NAMES, check_flag, weights_of
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
    "mcc_loss",
    "top_k_loss",
    "tversky_ce_loss",
    "tversky_focal_loss",
    "tversky_loss",
    "unified_focal_loss",
]


Options = ParamSpec("Options")


class LossFunction(Protocol[Options]):
    """A loss as a function. At run time its options are by keyword only."""

    @overload
    def __call__(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        annotated: Tensor | None = None,
        return_sums: Literal[False] = False,
        *args: Options.args,
        **options: Options.kwargs,
    ) -> Tensor: ...

    @overload
    def __call__(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        annotated: Tensor | None = None,
        return_sums: Literal[True] = ...,
        *args: Options.args,
        **options: Options.kwargs,
    ) -> tuple[Tensor, Sums]: ...


class Given:
    """The options of one call as attributes. (A compiler cannot trace that a module is made.)"""

    def __init__(self, options: dict[str, Any]) -> None:
        self.__dict__.update(options)


def function_of(
    module: Callable[Options, nn.Module], name: str, formula: str
) -> LossFunction[Options]:
    """The loss that ``module`` declares as the function ``name``, with the same options."""
    kind: Any = module
    defaults = {**dict.fromkeys(WEIGHT_NAMES), **kind.defaults}

    def loss(
        input: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        return_sums: bool = False,
        **given: Any,
    ) -> Any:
        for key in given:
            if key not in kind.defaults:
                hint = kind.hint(key)
                more = f"; {hint}" if hint else did_you_mean(key, kind.defaults)
                raise TypeError(f"{name}() got an unexpected keyword argument {key!r}{more}")
            if key in WEIGHT_NAMES:
                weights_of(key, given[key])
            check_flag(key, given[key], kind.defaults[key])
        return kind.of(Given({**defaults, **given}), input, target, mask, return_sums, annotated)

    own = inspect.signature(loss)
    tensors = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [p.replace(kind=p.KEYWORD_ONLY) for p in inspect.signature(kind).parameters.values()]
    first, blank, example = formula.partition("\n\n")
    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = f"{first}; see :class:`voxfuse.{kind.__name__}`.{blank}{example}"
    signature = own.replace(parameters=[*tensors, *keywords])
    loss.__signature__ = signature  # type: ignore[attr-defined]
    return loss  # type: ignore[return-value]


tversky_loss = function_of(
    TverskyLoss,
    "tversky_loss",
    """Tversky loss, (1 - TP / (TP + alpha FP + beta FN))^gamma

Example:
    >>> import torch, voxfuse
    >>> logits, labels = torch.zeros(1, 2, 8), torch.ones(1, 8, dtype=torch.uint8)
    >>> voxfuse.functional.tversky_loss(logits, labels, alpha=0.3, beta=0.7)
    tensor(0.7059)""",
)
fbeta_loss = function_of(FBetaLoss, "fbeta_loss", "One minus F_beta")
focal_tversky_loss = function_of(FocalTverskyLoss, "focal_tversky_loss", "Focal Tversky loss")
dice_loss = function_of(DiceLoss, "dice_loss", "Soft Dice loss, 1 - 2 TP / (2 TP + FP + FN)")
jaccard_loss = function_of(
    JaccardLoss, "jaccard_loss", "Soft Jaccard loss, 1 - TP / (TP + FP + FN)"
)
generalized_dice_loss = function_of(
    GeneralizedDiceLoss, "generalized_dice_loss", "Generalised Dice loss"
)
mcc_loss = function_of(MCCLoss, "mcc_loss", "One minus the Matthews correlation")
cross_entropy_loss = function_of(CrossEntropyLoss, "cross_entropy_loss", "Cross-entropy")
bce_loss = function_of(BCELoss, "bce_loss", "Binary cross-entropy of every class")
focal_loss = function_of(FocalLoss, "focal_loss", "Focal loss")
tversky_ce_loss = function_of(TverskyCELoss, "tversky_ce_loss", "Tversky loss plus cross-entropy")
dice_ce_loss = function_of(DiceCELoss, "dice_ce_loss", "Dice loss plus cross-entropy")
tversky_focal_loss = function_of(
    TverskyFocalLoss, "tversky_focal_loss", "Tversky loss plus focal loss"
)
dice_focal_loss = function_of(DiceFocalLoss, "dice_focal_loss", "Dice loss plus focal loss")
unified_focal_loss = function_of(UnifiedFocalLoss, "unified_focal_loss", "Unified focal loss")
top_k_loss = function_of(
    TopKLoss, "top_k_loss", "Cross-entropy over the worst ``k`` percent of the voxels"
)
lovasz_softmax_loss = function_of(
    LovaszLoss, "lovasz_softmax_loss", "Lovász extension of the Jaccard loss"
)
lovasz_hinge_loss = function_of(
    LovaszHingeLoss, "lovasz_hinge_loss", "Lovász hinge of the Jaccard loss"
)
