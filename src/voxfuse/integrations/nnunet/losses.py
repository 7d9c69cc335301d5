"""nnU-Net's losses: same constructors, same numbers, same ``.dc``, ``.ce``.

Semantics are those of nnU-Net 2.8. Labels are read in the dtype they come in. In a compound loss
both terms come from one pass over the voxels; a ``dc`` wrapped by ``torch.compile`` counts as the
loss it wraps, and one that was replaced by something else is called as it is. What the kernels
cannot do (another ``apply_nonlin``, ``square``, sums over some axes only) is left to PyTorch, in
part or in whole.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from voxfuse._ranks import Ranks, sum_over_ranks
from voxfuse.contract import Activation, Normaliser, RatioOptions, Sum
from voxfuse.integrations.lowering import (
    Voxels,
    activated,
    fused_loss,
    ignored,
    plain,
    ratio_of,
    smoothed_cross_entropy,
    sums,
    whole_labels,
    with_peers_errors,
)
from voxfuse.losses.declared import Declared, declared
from voxfuse.losses.functional import cross_entropy_loss
from voxfuse.losses.plan import Likelihood

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

Nonlinearity = Callable[[Tensor], Tensor]


def softmax_helper_dim1(x: Tensor) -> Tensor:
    """The softmax over the channels, as nnU-Net's losses name it."""
    return torch.softmax(x, 1)


def _activation(nonlinearity: Nonlinearity | None) -> int | None:
    """The operators' code for ``nonlinearity``, if they have one."""
    if nonlinearity is None:
        return Activation.none
    if nonlinearity in (torch.sigmoid, torch.nn.functional.sigmoid, torch.special.expit):
        return Activation.sigmoid
    if isinstance(nonlinearity, nn.Sigmoid):
        return Activation.sigmoid
    # nnU-Net's own function, or the one above.
    softmax = getattr(nonlinearity, "__name__", None) == "softmax_helper_dim1"
    if isinstance(nonlinearity, nn.Softmax):
        softmax = nonlinearity.dim == 1
    return Activation.softmax if softmax else None


def _with_channel(target: Tensor, input: Tensor) -> Tensor:
    return target if target.ndim == input.ndim else target.unsqueeze(1)


def _readable_as_voxels(input: Tensor, target: Tensor, mask: Tensor | None) -> bool:
    """Whether the operators take these shapes."""
    single = torch.Size((input.shape[0], 1, *input.shape[2:]))
    return (
        input.ndim > 2
        and (target.shape == input.shape or target.shape == single)
        and (mask is None or mask.shape == single)
    )


def _products(
    input: Tensor, target: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """TP, FP, FN and TN voxel by voxel, where PyTorch has to do it.

    nnU-Net scatters into, and multiplies by, whatever fits into the predictions' shape; here every
    voxel must have its own label, and the mask one value for it.
    """
    batch, classes, *spatial = input.shape
    if target.shape not in (input.shape, torch.Size((batch, 1, *spatial))):
        raise ValueError(
            f"gt: got shape {tuple(target.shape)}, expected {(batch, 1, *spatial)} or "
            f"{(batch, classes, *spatial)} to go with net_output of shape {tuple(input.shape)}"
        )
    if mask is not None:
        leading = [(b, c) for b in (batch, 1) for c in (1, classes)]
        if tuple(mask.shape) not in [(*axes, *spatial) for axes in leading]:
            raise ValueError(
                f"mask: got shape {tuple(mask.shape)}, expected {(batch, 1, *spatial)} to go with "
                f"net_output of shape {tuple(input.shape)}"
            )
    if target.shape == input.shape:
        g = target.to(torch.float32)
    else:
        g = torch.zeros(input.shape, device=input.device).scatter_(1, whole_labels(target), 1)
    factors = (input, g), (input, 1 - g), (1 - input, g), (1 - input, 1 - g)
    weight = 1 if mask is None else mask
    tp, fp, fn, tn = (a * b * weight for a, b in factors)
    return tp, fp, fn, tn


def get_tp_fp_fn_tn(
    net_output: Tensor,
    gt: Tensor,
    axes: Sequence[int] | None = None,
    mask: Tensor | None = None,
    square: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Soft true positives, false positives, false negatives and true negatives, in one pass.

    Args:
        net_output: probabilities (b, c, x, y(, z)).
        gt: labels (b, [1,] x, y(, z)), or one value a class (b, c, x, y(, z)).
        axes: axes to sum over; None means the spatial ones, () none. One pass does the spatial
            axes with or without the batch; PyTorch does other selections.
        mask: (b, 1, x, y(, z)), 1 where a voxel counts.
        square: square before the sum (PyTorch).

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import get_tp_fp_fn_tn
        >>> p = torch.full((1, 2, 2, 2), 0.5)
        >>> tp, fp, fn, tn = get_tp_fp_fn_tn(p, torch.tensor([[[0, 0], [0, 1]]]))
        >>> tp, fp
        (tensor([[1.5000, 0.5000]]), tensor([[0.5000, 1.5000]]))
    """
    net_output, gt = plain(net_output), plain(gt)
    mask = None if mask is None else plain(mask)
    spatial = list(range(2, net_output.ndim))
    wanted = spatial if axes is None else sorted(a % net_output.ndim for a in axes)
    gt = _with_channel(gt, net_output)
    if square or wanted not in (spatial, [0, *spatial]) or not wanted:
        return _summed_products(net_output, gt, mask, axes, square)
    if not _readable_as_voxels(net_output, gt, mask):
        return _summed_products(net_output, gt, mask, wanted, square)
    if not net_output.is_floating_point():
        net_output = net_output.float()
    stats = sums(Voxels(net_output, gt, mask))
    if 0 in wanted:
        stats = stats.sum(0)
    tp, fp, fn = stats[..., Sum.TP], stats[..., Sum.FP], stats[..., Sum.FN]
    tn = stats[..., Sum.W] - tp - fp - fn
    return tp.float(), fp.float(), fn.float(), tn.float()


def _summed_products(
    input: Tensor, target: Tensor, mask: Tensor | None, axes: Sequence[int] | None, square: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    counts = _products(input, target, mask)
    if square:
        counts = tuple(x**2 for x in counts)  # type: ignore[assignment]
    if axes is None:
        axes = list(range(2, input.ndim))
    if len(axes) == 0:
        return counts
    tp, fp, fn, tn = (x.sum(dim=list(axes), dtype=torch.float32) for x in counts)
    return tp, fp, fn, tn


class _SoftDice(Declared):
    """What both of nnU-Net's Dice losses compute, in different orders."""

    apply_nonlin: Nonlinearity | None
    batch_dice: bool
    do_bg: bool
    smooth: float
    ddp: bool
    clip_tp: float | None = None

    def forward(self, x: Tensor, y: Tensor, loss_mask: Tensor | None = None) -> Tensor:
        """Return minus the mean Dice.

        Args:
            x: logits (b, c, x, y(, z)), or probabilities without ``apply_nonlin``.
            y: labels (b, [1,] x, y(, z)), or one value a class (b, c, x, y(, z)).
            loss_mask: (b, 1, x, y(, z)), 1 where a voxel counts.
        """
        return self._loss(x, y, loss_mask, None)

    def _loss(self, x: Tensor, y: Tensor, mask: Tensor | None, ignore_index: int | None) -> Tensor:
        voxels = self._voxels(x, y, mask, ignore_index)
        input, target, mask = voxels.input, voxels.target, voxels.weight
        if not _readable_as_voxels(input, target, mask):
            axes = list(range(2, input.ndim))
            input = activated(input, voxels.activation)
            return self._from_counts(_summed_products(input, target, mask, axes, False)[:3])
        ratio = self._ratio(input.shape[1])
        if ratio is not None:
            return fused_loss(voxels, ratio, ranks=self._ranks()) - 1
        stats = sums(voxels)
        result = self._from_counts((stats[..., Sum.TP], stats[..., Sum.FP], stats[..., Sum.FN]))
        return result.to(torch.promote_types(input.dtype, torch.float32))

    def _voxels(
        self, x: Tensor, y: Tensor, mask: Tensor | None, ignore_index: int | None
    ) -> Voxels:
        x, y = plain(x), plain(y)
        activation = _activation(self.apply_nonlin)
        if activation is None or (activation == Activation.softmax and x.shape[1] == 1):
            assert self.apply_nonlin is not None
            x, activation = plain(self.apply_nonlin(x)), Activation.none
        y = _with_channel(y, x)
        if mask is not None:
            mask = plain(mask)
            if mask.shape[1] == 1 and mask.shape[0] == 1:
                mask = mask.expand(x.shape[0], *mask.shape[1:])
        return Voxels(x, y, mask, activation, ignore_index=ignore_index)

    def _ratio(self, classes: int) -> RatioOptions | None:
        """The terms ``1 - Dice``; None where PyTorch has to evaluate them from the sums."""
        if self.clip_tp is not None or (not self.do_bg and classes == 1):
            return None
        return ratio_of(
            (2.0,),
            (2.0, 1.0, 1.0),
            float(self.smooth),
            float(self.smooth),
            min_denominator=1e-8,
            first_class=0 if self.do_bg else 1,
            batch=self.batch_dice,
        )

    def _ranks(self) -> Ranks | None:
        if not (self.ddp and self.batch_dice):
            return None
        import torch.distributed

        torch.distributed.get_world_size()  # says so if there is no process group
        # nnU-Net's gather sums the gradients of all ranks, which DDP's average undoes.
        return Ranks(torch.distributed.group.WORLD, True)

    def _from_counts(self, tp_fp_fn: tuple[Tensor, ...]) -> Tensor:
        """The loss from (b, c) counts."""
        counts = torch.stack(tp_fp_fn, -1)
        if self.batch_dice:
            ranks = self._ranks()
            if ranks is not None:
                counts = sum_over_ranks(counts, True, ranks)
            counts = counts.sum(0, keepdim=True)
        if not self.do_bg:
            counts = counts[:, 1:]
        tp, fp, fn = counts.unbind(-1)
        if self.clip_tp is not None:
            tp = tp.clamp(min=self.clip_tp)
        dice = (2 * tp + self.smooth) / (2 * tp + fp + fn + self.smooth).clamp(min=1e-8)
        return -dice.mean()


@declared
class SoftDiceLoss(_SoftDice):
    r"""nnU-Net's SoftDiceLoss in one pass over the voxels.

    .. math::
        loss = -\mathrm{mean}_{b,c}\; \frac{2 TP + s}{\max(2 TP + FP + FN + s,\; 10^{-8})}

    Args:
        apply_nonlin: activation of the network's output; a sigmoid and nnU-Net's softmax helper
            are fused.
        batch_dice: sum over the batch before the ratio.
        do_bg: whether channel 0 counts.
        smooth: s.
        ddp: with ``batch_dice``, sum over the ranks of the default process group as well.
        clip_tp: smallest TP.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import SoftDiceLoss, softmax_helper_dim1
        >>> loss = SoftDiceLoss(softmax_helper_dim1, do_bg=False, smooth=0.0, ddp=False)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(-0.6667)
    """

    apply_nonlin: Nonlinearity | None = None
    batch_dice: bool = False
    do_bg: bool = True
    smooth: float = 1.0
    ddp: bool = True
    clip_tp: float | None = None


@declared
class MemoryEfficientSoftDiceLoss(_SoftDice):
    """nnU-Net's MemoryEfficientSoftDiceLoss: the numbers of :class:`SoftDiceLoss`.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import MemoryEfficientSoftDiceLoss
        >>> loss = MemoryEfficientSoftDiceLoss(torch.sigmoid, smooth=0.0, ddp=False)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8))
        tensor(-0.6667)
    """

    apply_nonlin: Nonlinearity | None = None
    batch_dice: bool = False
    do_bg: bool = True
    smooth: float = 1.0
    ddp: bool = True


class RobustCrossEntropyLoss(nn.CrossEntropyLoss):
    """nnU-Net's RobustCrossEntropyLoss: labels of any dtype, with or without a channel axis.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import RobustCrossEntropyLoss
        >>> RobustCrossEntropyLoss()(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Return the cross-entropy of logits (b, c, x, y(, z)) and labels (b, [1,] x, y(, z))."""
        if target.ndim == input.ndim:
            assert target.shape[1] == 1
            target = target[:, 0]
        input, target = plain(input), plain(target)
        likelihood = self._likelihood(input)
        if likelihood is None or target.shape != input.shape[:1] + input.shape[2:]:
            result: Tensor = super().forward(input, whole_labels(target))
            return result
        voxels = Voxels(
            input, target, activation=Activation.softmax, ignore_index=self.ignore_index
        )
        if self.reduction == "none":
            return self._map(voxels)
        return fused_loss(voxels, None, likelihood)

    @with_peers_errors
    def _map(self, voxels: Voxels) -> Tensor:
        """The loss of every voxel."""
        return cross_entropy_loss(
            voxels.input,
            voxels.target,
            class_weight=self.weight,
            label_smoothing=max(self.label_smoothing, 0.0),
            reduction="none",
            ignore_index=ignored(voxels),
        )

    def _likelihood(self, input: Tensor) -> Likelihood | None:
        """The loss for the operators; None where PyTorch has to compute it."""
        classes = input.shape[1]
        weight = self.weight
        if input.ndim < 3 or classes == 1 or not input.is_floating_point():
            return None
        if weight is not None and tuple(weight.shape) != (classes,):
            return None
        smoothing = max(self.label_smoothing, 0.0)  # PyTorch takes a negative one for none
        if smoothing > 1 or self.reduction not in ("none", "mean", "sum"):
            return None
        if type(self.ignore_index) is bool or not isinstance(self.ignore_index, numbers.Integral):
            return None
        normaliser = Normaliser.target if self.reduction == "mean" else Normaliser.one
        return smoothed_cross_entropy(smoothing, classes, normaliser, weight)


class TopKLoss(RobustCrossEntropyLoss):
    """nnU-Net's TopKLoss: the mean cross-entropy of the worst ``k`` percent of the voxels.

    Keeps one single-channel volume, of the voxels' losses.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import TopKLoss
        >>> TopKLoss(k=50)(torch.zeros(1, 4, 8, 8), torch.ones(1, 1, 8, 8))
        tensor(1.3863)
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        k: float = 10,
        label_smoothing: float = 0,
    ) -> None:
        self.k = k
        super().__init__(weight, False, ignore_index, reduce=False, label_smoothing=label_smoothing)

    def forward(self, inp: Tensor, target: Tensor) -> Tensor:
        """Return the loss of logits (b, c, x, y(, z)) and labels (b, 1, x, y(, z))."""
        _check_labels(inp, target)
        losses = super().forward(inp, target[:, 0]).reshape(-1)
        return losses.topk(int(losses.numel() * self.k / 100), sorted=False).values.mean()


def _check_labels(input: Tensor, target: Tensor) -> None:
    """nnU-Net takes the first channel for labels, whatever the others hold."""
    if target.ndim != input.ndim or target.shape[1] != 1:
        raise ValueError(
            f"target: got shape {tuple(target.shape)}, expected labels "
            f"{(input.shape[0], 1, *input.shape[2:])} to go with input of shape "
            f"{tuple(input.shape)}"
        )


def _unwrapped(module: Any) -> Any:
    """The loss inside of what ``torch.compile`` makes of it."""
    return getattr(module, "_orig_mod", module)


class _Compound(Declared):
    dc: Any
    ce: Any
    weight_ce: float
    weight_dice: float

    def _dice(self, activation: int) -> _SoftDice | None:
        """The Dice loss, if it is one of this module whose ratio the operators take."""
        dice = _unwrapped(self.dc)
        if type(dice) not in (SoftDiceLoss, MemoryEfficientSoftDiceLoss):
            return None
        fits = _activation(dice.apply_nonlin) == activation and dice.clip_tp is None
        return dice if fits else None

    def _together(self, dice: _SoftDice, voxels: Voxels, likelihood: Likelihood) -> Tensor:
        """Both terms from one pass: 1 - Dice, less the 1."""
        ratio = dice._ratio(voxels.input.shape[1])
        assert ratio is not None
        ratio = ratio._replace(ratio_scale=float(self.weight_dice))
        likelihood = likelihood.scaled(float(self.weight_ce))
        return fused_loss(voxels, ratio, likelihood, ranks=dice._ranks()) - self.weight_dice


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
        _check_labels(net_output, target)

    def _dice_term(self, net_output: Tensor, target: Tensor) -> Tensor | float:
        if self.weight_dice == 0:
            return 0.0
        own = isinstance(_unwrapped(self.dc), _SoftDice)
        if self.ignore_label is None:
            dice: Tensor = self.dc(net_output, target, loss_mask=None)
        elif own and net_output.shape[1] > 1:
            dice = _unwrapped(self.dc)._loss(net_output, target, None, self.ignore_label)
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
        if self.weight_ce == 0 or self.weight_dice == 0 or input.shape[1] == 1:
            return None
        if target.shape[1:2] != (1,) or not _readable_as_voxels(input, target, None):
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
