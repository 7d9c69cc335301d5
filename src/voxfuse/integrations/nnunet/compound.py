"""nnU-Net's compound losses: both terms from one pass over the voxels.

A ``dc`` wrapped by ``torch.compile`` counts as the loss it wraps, and one that was replaced by
something else is called as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from voxfuse.contract import Activation, Normaliser
from voxfuse.integrations.lowering import Voxels, fused_loss, plain, requires_grad
from voxfuse.integrations.nnunet.cross_entropy import (
    RobustCrossEntropyLoss,
    TopKLoss,
    check_labels,
)
from voxfuse.integrations.nnunet.dice import (
    MemoryEfficientSoftDiceLoss,
    SoftDice,
    SoftDiceLoss,
    SoftTverskyLoss,
    activation_of,
    readable_as_voxels,
    softmax_helper_dim1,
)
from voxfuse.losses.declared import Declared, declared
from voxfuse.losses.plan import Likelihood

#: Parts of a loss that a warning has named.
_named: set[type] = set()


def named_before(part: Any) -> bool:
    """Whether a warning has named the class of ``part``; from now on one has."""
    before = type(part) in _named
    _named.add(type(part))
    return before


def unwrapped(module: Any) -> Any:
    """The loss inside of what ``torch.compile`` makes of it."""
    return getattr(module, "_orig_mod", module)


class _Compound(Declared):
    dc: Any
    ce: Any
    weight_ce: float
    weight_dice: float

    def _dice(self, activation: int) -> SoftDice | None:
        """The Dice loss, if it is one of this package whose ratio the operators take."""
        dice = unwrapped(self.dc)
        if type(dice) not in (SoftDiceLoss, MemoryEfficientSoftDiceLoss, SoftTverskyLoss):
            if not torch.compiler.is_compiling():
                self._name(dice)
            return None
        fits = activation_of(dice.apply_nonlin) == activation and dice.clip_tp is None
        return dice if fits else None

    def _name(self, dice: Any) -> None:
        if not isinstance(dice, SoftDice) and not named_before(dice):
            kind = type(dice)
            warnings.warn(
                f"{type(self).__name__}: dc is a {kind.__module__}.{kind.__qualname__}, which is "
                "computed apart from the cross-entropy and much slower than both together; "
                "voxfuse.integrations.nnunet.fused(loss) replaces nnU-Net's own",
                stacklevel=6,
            )

    def _together(self, dice: SoftDice, voxels: Voxels, likelihood: Likelihood) -> Tensor:
        """Both terms from one pass: 1 - Dice, less the 1."""
        ratio = dice._ratio(voxels.input.shape[1])
        assert ratio is not None
        scale = float(self.weight_dice)
        ratio = ratio._replace(ratio_scale=scale)
        likelihood = likelihood.scaled(float(self.weight_ce))
        return fused_loss(voxels, ratio, likelihood, ranks=dice._ranks()) - scale


class _LabelCompound(_Compound):
    """Dice and a cross-entropy of labels, without the voxels of ``ignore_label``."""

    ignore_label: int | None
    _entropy: type[RobustCrossEntropyLoss]

    def set_up(
        self,
        soft_dice_kwargs: dict[str, Any],
        ce_kwargs: dict[str, Any],
        dice_class: Callable[..., nn.Module] = SoftDiceLoss,
        **options: Any,
    ) -> None:
        super().set_up(**options)
        if self.ignore_label is not None:
            ce_kwargs["ignore_index"] = self.ignore_label
        self.ce = self._entropy(**ce_kwargs)
        self.dc = dice_class(apply_nonlin=softmax_helper_dim1, **soft_dice_kwargs)

    def _check_target(self, net_output: Tensor, target: Tensor) -> None:
        if self.ignore_label is not None:
            assert target.shape[1] == 1, (
                "ignore label is not implemented for one hot encoded target variables "
                "(DC_and_CE_loss)"
            )
        check_labels(net_output, target)

    def _dice_term(self, net_output: Tensor, target: Tensor) -> Tensor | float:
        if self.weight_dice == 0:
            return 0.0
        own = isinstance(unwrapped(self.dc), SoftDice)
        if self.ignore_label is None:
            dice: Tensor = self.dc(net_output, target, loss_mask=None)
        elif own and net_output.shape[1] > 1:
            dice = unwrapped(self.dc)._loss(net_output, target, None, self.ignore_label)
        else:
            mask = target != self.ignore_label
            dice = self.dc(net_output, torch.where(mask, target, 0), loss_mask=mask)
        return self.weight_dice * dice

    def _entropy_term(self, net_output: Tensor, target: Tensor) -> Tensor | float:
        """The cross-entropy; PyTorch's would be NaN if all voxels are ignored."""
        if self.weight_ce == 0:
            return 0.0
        entropy: Tensor = self.ce(net_output, target)
        if self.ignore_label is not None:
            empty = (plain(target) == self.ignore_label).all()
            entropy = torch.where(empty, torch.zeros_like(entropy), entropy)
        return self.weight_ce * entropy


@declared
class DC_and_CE_loss(_LabelCompound):
    """nnU-Net's DC_and_CE_loss: Dice and cross-entropy from one pass over the voxels.

    Args:
        soft_dice_kwargs: options of ``dice_class``, but for its ``apply_nonlin``.
        ce_kwargs: options of :class:`RobustCrossEntropyLoss`; ``ignore_label`` is added to them.
        weight_ce, weight_dice: factors of the terms.
        ignore_label: voxels with this label do not count.
        dice_class: class of ``.dc``.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import DC_and_CE_loss
        >>> loss = DC_and_CE_loss({"smooth": 0.0, "do_bg": False, "ddp": False}, {})
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))  # log 2 - 2/3
        tensor(0.0265)
    """

    soft_dice_kwargs: dict[str, Any]
    ce_kwargs: dict[str, Any]
    weight_ce: float = 1
    weight_dice: float = 1
    ignore_label: int | None = None
    dice_class: Callable[..., nn.Module] = SoftDiceLoss

    _entropy = RobustCrossEntropyLoss

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (b, c, x, y(, z)) and labels (b, 1, x, y(, z))."""
        self._check_target(net_output, target)
        dice = self._dice(Activation.softmax)
        likelihood = self._likelihood(net_output, target)
        if dice is not None and likelihood is not None:
            voxels = dice._voxels(net_output, target, None, self.ignore_label)
            return self._together(dice, voxels, likelihood)
        entropy = self._entropy_term(net_output, target[:, 0])
        return entropy + self._dice_term(net_output, target)  # type: ignore[return-value]

    def _likelihood(self, input: Tensor, target: Tensor) -> Likelihood | None:
        """The cross-entropy, if it is about the same voxels as the Dice."""
        entropy = self.ce
        if type(entropy) is not RobustCrossEntropyLoss or entropy.reduction == "none":
            return None
        if requires_grad(self.weight_ce, self.weight_dice):
            return None
        if self.weight_ce == 0 or self.weight_dice == 0 or input.shape[1] == 1:
            return None
        if target.shape[1:2] != (1,) or not readable_as_voxels(input, target, None):
            return None
        ignored = entropy.ignore_index
        shared = ignored == self.ignore_label
        if self.ignore_label is None:
            shared = not 0 <= ignored < input.shape[1]
        return entropy._likelihood(input) if shared else None


@declared
class DC_and_BCE_loss(_Compound):
    """nnU-Net's DC_and_BCE_loss, for regions: both terms from one pass over the voxels.

    Args:
        bce_kwargs: options of ``torch.nn.BCEWithLogitsLoss``.
        soft_dice_kwargs: options of ``dice_class``, but for its ``apply_nonlin``.
        weight_ce, weight_dice: factors of the terms.
        use_ignore_label: the target has one more channel, which is 1 where a voxel does not count.
        dice_class: class of ``.dc``.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import DC_and_BCE_loss
        >>> loss = DC_and_BCE_loss({}, {"smooth": 0.0, "ddp": False})
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8))  # log 2 - 2/3
        tensor(0.0265)
    """

    bce_kwargs: dict[str, Any]
    soft_dice_kwargs: dict[str, Any]
    weight_ce: float = 1
    weight_dice: float = 1
    use_ignore_label: bool = False
    dice_class: Callable[..., nn.Module] = MemoryEfficientSoftDiceLoss

    def set_up(
        self,
        bce_kwargs: dict[str, Any],
        soft_dice_kwargs: dict[str, Any],
        dice_class: Callable[..., nn.Module],
        **options: Any,
    ) -> None:
        super().set_up(**options)
        if self.use_ignore_label:
            bce_kwargs["reduction"] = "none"
        self.ce = nn.BCEWithLogitsLoss(**bce_kwargs)
        self.dc = dice_class(apply_nonlin=torch.sigmoid, **soft_dice_kwargs)

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (b, c, x, y(, z)) and regions (b, c or c + 1, x, y(, z))."""
        input, target = plain(net_output), plain(target)
        mask = None
        if self.use_ignore_label:
            ignored = target[:, -1:]
            # nnU-Net's ``(1 - ignored).bool()``.
            mask = ~ignored if ignored.dtype == torch.bool else ignored != 1
            target = target[:, :-1]
        dice = self._dice(Activation.sigmoid)
        likelihood = self._likelihood(input, target)
        ratio = None if dice is None else dice._ratio(input.shape[1])
        if dice is not None and likelihood is not None and ratio is not None:
            return self._together(dice, dice._voxels(input, target, mask, None), likelihood)
        dice_loss = self.dc(net_output, target, loss_mask=mask)
        entropy = self.ce(input, target.float())
        if mask is not None:
            entropy = (entropy * mask).sum() / mask.sum().clamp(min=1e-8)
        result: Tensor = self.weight_ce * entropy + self.weight_dice * dice_loss
        return result

    def _likelihood(self, input: Tensor, target: Tensor) -> Likelihood | None:
        entropy = self.ce
        if type(entropy) is not nn.BCEWithLogitsLoss or entropy.weight is not None:
            return None
        if target.shape != input.shape or input.ndim < 3:
            return None
        if requires_grad(self.weight_ce, self.weight_dice):
            return None
        normalisers = {"mean": Normaliser.elements, "sum": Normaliser.one}
        if self.use_ignore_label:
            normalisers = {"none": Normaliser.voxels}
        normaliser = normalisers.get(entropy.reduction)
        positive = entropy.pos_weight
        if positive is not None and positive.numel() != 1:
            # PyTorch broadcasts: a weight a channel has the spatial axes, of length 1.
            by_channel = (input.shape[1], *[1] * (input.ndim - 2))
            if tuple(positive.shape) not in (by_channel, (1, *by_channel)):
                return None
        if normaliser is None:
            return None
        if positive is not None:
            positive = positive.reshape(-1).expand(input.shape[1])
        return Likelihood(Activation.sigmoid, 1.0, 1.0, normaliser, on_weight=positive)


@declared
class DC_and_topk_loss(_LabelCompound):
    """nnU-Net's DC_and_topk_loss: Dice, and the cross-entropy of the worst voxels.

    The Dice is one pass over the voxels; finding the worst is a second one and keeps one
    single-channel volume. Arguments as in :class:`DC_and_CE_loss`, ``ce_kwargs`` those of
    :class:`TopKLoss`.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import DC_and_topk_loss
        >>> loss = DC_and_topk_loss({"smooth": 0.0, "do_bg": False, "ddp": False}, {"k": 50})
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))  # log 2 - 2/3
        tensor(0.0265)
    """

    soft_dice_kwargs: dict[str, Any]
    ce_kwargs: dict[str, Any]
    weight_ce: float = 1
    weight_dice: float = 1
    ignore_label: int | None = None

    _entropy = TopKLoss

    def forward(self, net_output: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (b, c, x, y(, z)) and labels (b, 1, x, y(, z))."""
        self._check_target(net_output, target)
        entropy = self._entropy_term(net_output, target)
        return entropy + self._dice_term(net_output, target)  # type: ignore[return-value]
