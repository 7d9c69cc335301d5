"""MONAI's masked losses: values and target become 0 outside the mask."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.modules.loss import _Loss

from voxfuse.contract import Activation
from voxfuse.integrations.lowering import LabelError, activated, is_binary, plain
from voxfuse.integrations.monai._common import (
    CustomActivation,
    FusedLoss,
    refuse_others,
    warn_ignored,
)
from voxfuse.integrations.monai._overlap import DiceLoss
from voxfuse.losses.declared import declared


def check_mask(input: Tensor, target: Tensor, mask: Tensor) -> None:
    if input.dim() != mask.dim():
        warnings.warn(
            f"Dim of input ({input.shape}) is different from mask ({mask.shape}).", stacklevel=3
        )
    if input.shape[0] != mask.shape[0] and mask.shape[0] != 1:
        raise ValueError(
            f"Batch size of mask ({mask.shape}) must be one or equal to input ({input.shape})."
        )
    if target.dim() > 1:
        if mask.shape[1] != 1:
            raise ValueError(f"Mask ({mask.shape}) must have only one channel.")
        if input.shape[2:] != mask.shape[2:]:
            warnings.warn(
                f"Spatial size of input ({input.shape}) is different from mask ({mask.shape}).",
                stacklevel=3,
            )


def check_labels_mask(input: Tensor, target: Tensor, mask: Tensor) -> None:
    """Raise for labels under a mask by which they cannot be multiplied.

    MONAI does: half of label 1 is class 0 to it, twice label 1 is class 2.
    """
    labels = target.ndim == input.ndim and target.shape[1] == 1 < input.shape[1]
    if not labels or torch.compiler.is_compiling():
        return
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    if not is_binary(plain(mask)):
        raise ValueError(
            "mask: got values other than 0 and 1 beside labels, expected a mask of zeros and ones, "
            "or a target with one channel for each class"
        )


def voxel_mask(input: Tensor, target: Tensor, mask: Tensor) -> Tensor | None:
    """The mask as the operators take it; None where they cannot."""
    if input.ndim < 3 or mask.dim() != input.dim() or mask.shape[2:] != input.shape[2:]:
        return None
    if target.shape[:1] != input.shape[:1] or target.shape[2:] != input.shape[2:]:
        return None  # an error, which the product raises
    if not input.is_floating_point() or mask.requires_grad or mask.shape[1] != 1:
        return None
    # A product of label and mask would be a label only if the mask holds zeros and ones.
    mask = plain(mask)
    if not is_binary(mask):
        return None
    if not (mask.is_floating_point() or mask.dtype == torch.bool):
        mask = mask != 0
    return mask.expand(input.shape[0], *mask.shape[1:])


class MaskedLoss(_Loss):
    """``monai.losses.MaskedLoss``: input and target are 0 outside the mask, before the activation.

    A loss of this package takes a mask of zeros and ones as it is, without masked copies; any other
    loss gets the products.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import DiceLoss, MaskedLoss
        >>> loss = MaskedLoss(DiceLoss, sigmoid=True)
        >>> mask = torch.ones(1, 1, 8, 8)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8), mask)
        tensor(0.3333)
    """

    loss: Callable[[Tensor, Tensor], Tensor]

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor] | _Loss | type[_Loss],
        *loss_args: Any,
        **loss_kwargs: Any,
    ) -> None:
        super().__init__()
        made: Any = loss(*loss_args, **loss_kwargs) if inspect.isclass(loss) else loss
        self.loss = made
        if not callable(self.loss):
            raise ValueError("The loss function is not callable.")

    def forward(self, input: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the masked loss; ``mask`` is (B or 1) x 1 x spatial."""
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            return self.loss(input, target)
        check_mask(input, target, mask)
        loss: Any = self.loss
        if isinstance(loss, FusedLoss):
            check_labels_mask(input, target, mask)
        voxels = voxel_mask(input, target, mask) if _is_own(loss) else None
        if voxels is not None:
            try:
                result: Tensor = loss._forward(input, target, voxels)
            except LabelError:  # outside the mask any label will do
                result = loss._forward(input, target * mask, voxels)
            return result
        return self.loss(input * mask, target * mask)


def _is_own(loss: Any) -> bool:
    """Whether ``loss`` is one of this package (and no subclass with a forward of its own)."""
    return (
        isinstance(loss, FusedLoss)
        and type(loss).__module__.startswith(__package__ or "")
        and loss._takes_mask()
    )


@declared
class MaskedDiceLoss(DiceLoss):
    """``monai.losses.MaskedDiceLoss``: predictions and target are 0 outside the mask.

    Unlike :class:`MaskedLoss` it masks after the activation. With ``to_onehot_y`` the voxels
    outside the mask count as background, as in MONAI.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import MaskedDiceLoss
        >>> loss = MaskedDiceLoss(sigmoid=True)
        >>> mask = torch.ones(1, 1, 8, 8)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8), mask)
        tensor(0.3333)
    """

    ignore_index: ClassVar[int | None] = None  # type: ignore[misc]  # no option of this loss

    def set_up(
        self, sigmoid: bool, softmax: bool, other_act: CustomActivation | None, **options: Any
    ) -> None:
        if other_act is not None and not callable(other_act):
            raise TypeError(
                f"other_act must be None or callable but is {type(other_act).__name__}."
            )
        if sigmoid and softmax:
            raise ValueError("Incompatible values: sigmoid=True and softmax=True.")
        if other_act is not None and (sigmoid or softmax):
            raise ValueError(
                "Incompatible values: other_act is not None and sigmoid=True or softmax=True."
            )
        super().set_up(sigmoid=False, softmax=False, other_act=None, **options)
        self.pre_sigmoid = sigmoid
        self.pre_softmax = softmax
        self.pre_other_act = other_act

    def forward(
        self, input: Tensor, target: Tensor, mask: Tensor | None = None, **others: Any
    ) -> Tensor:
        """Return the masked loss; ``mask`` is (B or 1) x 1 x spatial."""
        refuse_others(self, others)
        activation = Activation.sigmoid if self.pre_sigmoid else Activation.none
        if self.pre_softmax:
            if input.shape[1] == 1:
                warn_ignored("softmax=True")
            else:
                activation = Activation.softmax
        if self.pre_other_act is not None:
            input = self.pre_other_act(input)
        if mask is None:
            warnings.warn("No mask value specified for the MaskedLoss.", stacklevel=2)
            return self._evaluate(self._case(input, target, activation=activation))
        check_mask(input, target, mask)
        check_labels_mask(input, target, mask)
        voxels = voxel_mask(input, target, mask)
        if voxels is None:
            products = activated(input, activation) * mask, target * mask
            return self._evaluate(self._case(*products, activation=Activation.none))
        labels = self.to_onehot_y and input.shape[1] > 1
        blank = Activation.none if labels and self.include_background else None
        case = self._case(input, target, voxels, activation=activation, blank=blank)
        try:
            return self._evaluate(case)
        except LabelError:  # outside the mask any label will do
            masked = case.voxels._replace(target=case.voxels.target * plain(mask))
            return self._evaluate(case._replace(voxels=masked))

    def _takes_mask(self) -> bool:
        return False
