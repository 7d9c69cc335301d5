"""nnU-Net's Dice losses and the Tversky losses beside them, and its soft counts.

Labels are read in the dtype they come in. What the kernels cannot do (another ``apply_nonlin``,
``square``, sums over some axes only) is left to PyTorch, in part or in whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from voxfuse._ranks import Ranks, sum_over_ranks
from voxfuse.contract import Activation, RatioOptions, Sum
from voxfuse.integrations.lowering import (
    Voxels,
    activated,
    fused_loss,
    plain,
    ratio_of,
    sums,
    whole_labels,
)
from voxfuse.losses.declared import Declared, declared
from voxfuse.losses.options import exponent, number

Nonlinearity = Callable[[Tensor], Tensor]


def softmax_helper_dim1(x: Tensor) -> Tensor:
    """The softmax over the channels, as nnU-Net's losses name it."""
    return torch.softmax(x, 1)


def activation_of(nonlinearity: Nonlinearity | None) -> int | None:
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


def readable_as_voxels(input: Tensor, target: Tensor, mask: Tensor | None) -> bool:
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
    if not readable_as_voxels(net_output, gt, mask):
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


class SoftDice(Declared):
    """What nnU-Net's Dice losses compute, in different orders, and the Tversky loss."""

    apply_nonlin: Nonlinearity | None
    batch_dice: bool
    do_bg: bool
    smooth: float
    ddp: bool
    clip_tp: float | None = None
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0

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
        if not readable_as_voxels(input, target, mask):
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
        activation = activation_of(self.apply_nonlin)
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
            (2.0, 2.0 * self.alpha, 2.0 * self.beta),
            float(self.smooth),
            float(self.smooth),
            min_denominator=1e-8,
            first_class=0 if self.do_bg else 1,
            batch=self.batch_dice,
            exponent=float(self.gamma),
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
        wrong = 2 * self.alpha * fp + 2 * self.beta * fn
        overlap = (2 * tp + self.smooth) / (2 * tp + wrong + self.smooth).clamp(min=1e-8)
        if self.gamma == 1:
            return -overlap.mean()
        # As the operator: slope 0 at a perfect prediction, where a gamma below 1 has none.
        miss = 1 - overlap
        return torch.where(miss > 0, torch.where(miss > 0, miss, 1) ** self.gamma, 0).mean() - 1


@declared
class SoftDiceLoss(SoftDice):
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
class MemoryEfficientSoftDiceLoss(SoftDice):
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


@declared
class SoftTverskyLoss(SoftDice):
    r"""A Tversky loss in the place of nnU-Net's Dice losses; nnU-Net has none itself.

    .. math::
        TI = \frac{2 TP + s}{\max(2 TP + 2 \alpha FP + 2 \beta FN + s,\; 10^{-8})}, \qquad
        loss = \mathrm{mean}_{b,c}\; (1 - TI)^\gamma - 1

    which is :class:`SoftDiceLoss` for :math:`\alpha = \beta = 1/2` and :math:`\gamma = 1`, and
    like it from -1 (all right) to 0. :func:`fused` puts it into a loss that nnU-Net has built.

    Args:
        apply_nonlin, batch_dice, do_bg, smooth, ddp: as in :class:`SoftDiceLoss`.
        alpha: weight of the false positives.
        beta: weight of the false negatives.
        gamma: exponent of the term (focal Tversky).

    Example:
        >>> import torch
        >>> from voxfuse.integrations.nnunet import SoftTverskyLoss
        >>> loss = SoftTverskyLoss(torch.sigmoid, smooth=0.0, ddp=False, alpha=0.3, beta=0.7)
        >>> loss(torch.zeros(1, 2, 8, 8), torch.ones(1, 2, 8, 8))  # -0.5 / (0.5 + 0.7 * 0.5)
        tensor(-0.5882)
    """

    apply_nonlin: Nonlinearity | None = None
    batch_dice: bool = False
    do_bg: bool = True
    smooth: float = 1.0
    ddp: bool = True
    alpha: float = 0.5
    beta: float = 0.5
    gamma: float = 1.0

    def set_up(self, **options: Any) -> None:
        check_tversky(options["alpha"], options["beta"], options["gamma"])
        super().set_up(**options)


def check_tversky(alpha: float, beta: float, gamma: float) -> None:
    number("alpha", alpha)
    number("beta", beta)
    exponent("gamma", gamma)
