"""A loss that is a function of the caller's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from voxfuse.contract import Activation, Overlap
from voxfuse.losses.declared import declared
from voxfuse.losses.module import LossModule
from voxfuse.losses.plan import Recipe
from voxfuse.losses.sums import Sums
from voxfuse.ops import _checks
from voxfuse.ops.soft_confusion import check_unlabelled


@declared
class SumsLoss(LossModule):
    """A function of yours of the soft counts, with the library's one pass over the voxels.

    Args:
        function: from :class:`voxfuse.Sums`, float64 and with autograd, to a loss. It has to weigh
            and reduce the classes itself.
        activation, overlap, ignore_index, unlabelled: as in :class:`TverskyLoss`.
        full: also count OFF, P2, G2 and W.
        process_group: None, "world" or a process group: the function gets the sums of all ranks'
            samples together, (1, C) each.
        ddp_average, backend: as in :class:`TverskyLoss`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.SumsLoss(lambda sums: 1 - sums.pooled().dice()[:, 1:].mean())
        >>> logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
        >>> same = voxfuse.DiceLoss(batch=True, include_background=False)
        >>> torch.allclose(loss(logits, labels), same(logits, labels), atol=1e-5)
        True
    """

    function: Callable[[Sums], Tensor]
    activation: str = "softmax"
    overlap: str = "product"
    ignore_index: int | None = None
    full: bool = False
    unlabelled: str = "exclude"

    shown = ("function",)

    def make_recipe(self) -> Recipe:
        if not callable(self.function):
            raise TypeError(f"function: got {self.function!r}, expected a function of the sums")
        if isinstance(self.function, type):
            name = self.function.__name__
            raise TypeError(f"function: got the class {name}, expected a function of the sums")
        if self.class_weight is not None:
            raise ValueError("class_weight: not of this loss, whose function weighs the classes")
        activation = _checks.choice("activation", self.activation, Activation)
        return Recipe(
            activation,
            _checks.choice("overlap", self.overlap, Overlap),
            _checks.ignored_label(self.ignore_index),
            None,
            None,
            function=self.function,
            full=bool(self.full),
            unlabelled=check_unlabelled(self.unlabelled, activation),
        )
