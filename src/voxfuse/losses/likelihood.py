"""Losses from the log-likelihood: cross-entropy, focal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY

from voxfuse.losses.declared import declared
from voxfuse.losses.module import LossModule
from voxfuse.losses.options import ClassWeights, likelihood_options, number
from voxfuse.losses.plan import Recipe, likelihood_recipe


@declared
class CrossEntropyLoss(LossModule):
    r"""Cross-entropy over voxels, with the weighted mean of ``torch.nn.CrossEntropyLoss``.

    .. math::
        loss = \frac{\sum_v w_{y_v} (-\log p_{v,y_v})}{\sum_v w_{y_v}}

    and with a dense target :math:`\sum_v \sum_c w_c g_{v,c} (-\log p_{v,c})` over the number of
    voxels. The defaults equal ``torch.nn.CrossEntropyLoss()``; if no voxel counts, the loss is 0
    (PyTorch: NaN).

    Args:
        activation: "softmax"; "sigmoid" for :class:`BCELoss`; "none" for probabilities.
        label_smoothing: in [0, 1], as in PyTorch; needs the softmax.
        include_background: whether voxels of class 0 count.
        reduction: "mean", "sum", or "none" for one value a voxel, (B, \*spatial), the sum over the
            classes; that needs one single-channel volume and what a block of voxels needs.
        ignore_index: voxels with this label do not count.
        class_weight: (C,), or one number.
        unlabelled: as in :class:`TverskyLoss`.
        process_group, ddp_average, backend: as in :class:`TverskyLoss`; the mean is over the voxels
            of all ranks. Not with ``reduction="none"``, to which no other rank adds.

    Example:
        >>> import torch, voxfuse
        >>> voxfuse.CrossEntropyLoss()(torch.zeros(1, 4, 8), torch.zeros(1, 8, dtype=torch.long))
        tensor(1.3863)
    """

    activation: str = "softmax"
    label_smoothing: float = 0.0
    include_background: bool = True
    reduction: str = "mean"
    ignore_index: int | None = None
    unlabelled: str = "exclude"

    def make_recipe(self) -> Recipe:
        part = likelihood_options(
            self.activation,
            label_smoothing=self.label_smoothing,
            include_background=self.include_background,
            reduction=self.reduction,
        )
        return likelihood_recipe(part, self.ignore_index, self.unlabelled)


@declared
class BCELoss(LossModule):
    r"""Binary cross-entropy of every class on its own (sigmoid of the logits).

    .. math::
        loss = \mathrm{mean}_{b,c,v}\; w_c (\rho_c\, g (-\log p) + (1 - g)(-\log(1 - p)))

    Equals ``torch.nn.BCEWithLogitsLoss(pos_weight=rho)`` on the one-hot target. For smoothed labels
    pass the dense target g (1 - s) + s/2.

    Args:
        include_background: whether class 0 counts.
        reduction: "mean", "sum", or "none" for one value a voxel, (B, \*spatial), the sum over the
            classes; that needs one single-channel volume and what a block of voxels needs.
        ignore_index: voxels with this label do not count.
        class_weight: (C,), or one number.
        pos_weight: (C,), or one number: further weight of the positives.
        process_group, ddp_average, backend: as in :class:`TverskyLoss`; the mean is over the voxels
            of all ranks. Not with ``reduction="none"``, to which no other rank adds.

    Example:
        >>> import torch, voxfuse
        >>> voxfuse.BCELoss()(torch.zeros(1, 1, 8), torch.zeros(1, 1, 8))
        tensor(0.6931)
    """

    _: KW_ONLY
    include_background: bool = True
    reduction: str = "mean"
    ignore_index: int | None = None
    pos_weight: ClassWeights = None

    def make_recipe(self) -> Recipe:
        part = likelihood_options(
            "sigmoid", include_background=self.include_background, reduction=self.reduction
        )
        return likelihood_recipe(part, self.ignore_index)


@declared
class FocalLoss(LossModule):
    r"""Focal loss (Lin et al. 2017, arXiv 1708.02002).

    .. math::
        loss = \mathrm{mean}_{b,c,v}\; \alpha\, g\, (1-p)^\gamma (-\log p)
            \;[\, + (1-\alpha)(1-g)\, p^\gamma (-\log(1-p)) \text{ for a sigmoid}]

    The mean is over voxels and classes. The defaults equal ``monai.losses.FocalLoss`` with
    ``use_softmax=True``: the activation is a softmax here, as in the other losses of this package,
    and a sigmoid by default in MONAI, which is ``activation="sigmoid"`` here.

    Args:
        gamma: focusing exponent, >= 0.
        alpha: None, or a balance in [0, 1]: positives against negatives for a sigmoid, and for a
            softmax foreground classes (alpha) against the background (1 - alpha). A softmax takes
            a sequence too: C numbers >= 0, one for every class, the background included, as
            ``monai.losses.FocalLoss(use_softmax=True, alpha=...)`` does. The mean stays the plain
            mean of the weighted terms.
        activation: "softmax", "sigmoid" or "none".
        include_background: whether class 0 counts.
        reduction: "mean", "sum", or "none" for one value a voxel, (B, \*spatial), the sum over the
            classes; that needs one single-channel volume and what a block of voxels needs.
        ignore_index: voxels with this label do not count.
        class_weight: (C,), or one number.
        unlabelled: as in :class:`TverskyLoss`.
        process_group, ddp_average, backend: as in :class:`TverskyLoss`; the mean is over the voxels
            of all ranks. Not with ``reduction="none"``, to which no other rank adds.

    Example:
        >>> import voxfuse
        >>> voxfuse.FocalLoss(alpha=0.25)
        FocalLoss(gamma=2.0, alpha=0.25)
    """

    gamma: float = 2.0
    alpha: float | Sequence[float] | None = None
    activation: str = "softmax"
    include_background: bool = True
    reduction: str = "mean"
    ignore_index: int | None = None
    unlabelled: str = "exclude"

    shown = ("gamma",)

    def make_recipe(self) -> Recipe:
        part = likelihood_options(
            self.activation,
            gamma=self.gamma,
            alpha=self.alpha,
            include_background=self.include_background,
            mean="elements",
            reduction=self.reduction,
        )
        return likelihood_recipe(part, self.ignore_index, self.unlabelled)


@declared
class TopKLoss(LossModule):
    r"""Cross-entropy over the worst ``k`` percent of the voxels (nnU-Net's TopKLoss).

    .. math::
        loss = \frac{1}{n} \sum_{v \in top_k} w_{y_v} (-\log p_{v,y_v}), \qquad
        top_k \text{ the } \lfloor k V / 100 \rfloor \text{ voxels of largest loss in the batch}

    over those n of them that count. The defaults equal nnU-Net's ``TopKLoss()``, which is
    ``torch.nn.CrossEntropyLoss(weight, reduction="none")`` and the mean of its largest values.
    Reads the logits twice: once to choose, keeping one single-channel volume, and once to sum.

    Args:
        k: percentage in (0, 100].
        activation, label_smoothing, ignore_index, class_weight, backend: as in
            :class:`CrossEntropyLoss`.
        reduction: "mean" or "sum" over the chosen voxels.
        process_group: None, "world" or a process group: the worst voxels of the global batch.
            Every rank sends the losses of its worst voxels, at most as many as are chosen in all.
            Not under torch.compile: the ranks' numbers of voxels travel through the host.
        ddp_average: as in :class:`TverskyLoss`.

    Example:
        >>> import torch, voxfuse
        >>> logits = torch.tensor([[[0.0, 9.0, 9.0, 9.0], [0.0, 0.0, 0.0, 0.0]]])
        >>> voxfuse.TopKLoss(k=25)(logits, torch.zeros(1, 4, dtype=torch.long))  # log 2
        tensor(0.6931)
    """

    k: float = 10.0
    activation: str = "softmax"
    label_smoothing: float = 0.0
    reduction: str = "mean"
    ignore_index: int | None = None

    shown = ("k",)

    def make_recipe(self) -> Recipe:
        percent = number("k", self.k, 0.0, 100.0, above=True)
        part = likelihood_options(
            self.activation,
            label_smoothing=self.label_smoothing,
            mean="voxels",
            reduction=self.reduction,
            top_percent=percent,
        )
        return likelihood_recipe(part, self.ignore_index)
