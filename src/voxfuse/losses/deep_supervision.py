"""A loss over the outputs of several resolutions."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from voxfuse.losses.options import held, refuse_arguments
from voxfuse.losses.pooling import pool_dense, pool_labels, pool_max, pool_one_class, pool_regions
from voxfuse.ops import _checks

#: The weight of an output by its level, the finest being 0.
SCHEMES: dict[str, Callable[[int], float]] = {
    "same": lambda level: 1.0,
    "exp": lambda level: max(0.5**level, 0.0625),
    "two": lambda level: 1.0 if level == 0 else 0.5,
}


def resample_nearest(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """Sample the trailing axes of ``tensor`` at the nearest of its own voxel centres.

    The values keep their type: labels are never turned into floats. Equals
    ``torch.nn.functional.interpolate(mode="nearest-exact")``.
    """
    for axis, length in zip(range(-len(size), 0), size, strict=True):
        own = tensor.shape[axis]
        if own != length:
            centres = torch.arange(length, device=tensor.device) * 2 + 1
            index = torch.div(centres * own, 2 * length, rounding_mode="floor")
            tensor = tensor.index_select(axis, index)
    return tensor


def require_reaching(name: str, tensor: Tensor, output: Tensor) -> Tensor:
    r"""Return (B, [k,] \*spatial) as a plain tensor with no fewer voxels than ``output``.

    Raises:
        ValueError: other samples or axes, or fewer voxels along an axis.
    """
    tensor = _checks.require_tensor(name, tensor)
    if not _reaches(tensor, output):
        batch, _, *size = output.shape
        raise ValueError(
            f"{name}: got shape {tuple(tensor.shape)}, expected (B, [k,] *spatial) with B = "
            f"{batch} and at least {tuple(size)} voxels, to go with an output of shape "
            f"{tuple(output.shape)}; nothing is sampled up"
        )
    return tensor


def _reaches(tensor: Tensor, output: Tensor) -> bool:
    """Whether ``tensor`` has the axes of a target of ``output`` and no fewer voxels."""
    size = output.shape[2:]
    own = tensor.shape[tensor.ndim - len(size) :]
    return (
        tensor.ndim in (output.ndim - 1, output.ndim)
        and tensor.shape[0] == output.shape[0]
        and all(a >= b for a, b in zip(own, size, strict=True))
    )


def _ignored_by(loss: Any) -> int | None:
    """The label that ``loss`` ignores, by its own name or nnU-Net's, a keyword of a partial
    function, or that of a loss which it holds as ``loss``."""
    while loss is not None:
        partial = isinstance(loss, functools.partial)
        for name in ("ignore_index", "ignore_label"):
            own = loss.keywords.get(name) if partial else getattr(loss, name, None)
            if own is not None:
                return _checks.ignored_label(own)
        loss = loss.func if partial else getattr(loss, "loss", None)
    return None


def outputs_of(input: Tensor | Sequence[Tensor], target: Tensor) -> list[Tensor]:
    r"""The outputs as a list, finest first; ``target`` is the first one's.

    One tensor is one output (B, C, \*spatial), or a stack of them (B, S, C, \*spatial) where the
    target has one spatial axis less.

    Raises:
        ValueError: it could be either.
    """
    if not isinstance(input, Tensor):
        return list(input)
    if input.ndim < 4 or target.ndim not in (input.ndim - 1, input.ndim - 2):
        return [input]
    heads = list(input.unbind(1))
    if not heads or not _reaches(target, heads[0]):
        return [input]
    channels = input.shape[2]
    with_channel = target.ndim == input.ndim - 1
    # One more than the classes: nnU-Net's regions with a channel of the ignored voxels.
    if with_channel and target.shape[1] not in (1, channels, channels + 1):
        return [input]
    if not _reaches(target, input):
        return heads
    # Labels without a channel axis, whose first spatial axis is as long as a channel axis may be.
    labels = target.shape[1] == channels > 1 and not target.is_floating_point()
    if labels and input.ndim <= 5:
        return [input]
    raise ValueError(
        f"input: got one tensor of shape {tuple(input.shape)} with a target of shape "
        f"{tuple(target.shape)}, which may be one output (B, C, *spatial) with labels "
        "(B, *spatial), or a stack of outputs (B, S, C, *spatial) with a target (B, k, *spatial); "
        "pass [input] for the one, input.unbind(1) for the other"
    )


class DeepSupervisionLoss(nn.Module):
    r"""Weighted sum of one loss over the outputs of a deeply supervised network.

    .. math:: loss = \sum_i w_i\; L(output_i, target_i)

    The target is given once, at the finest resolution or above, and brought down to each output (by
    ``downsample``, in its own type; no logits are resampled, no target is sampled up), or as one
    target an output, as nnU-Net does. The outputs are a list, finest first, or a stack
    (B, S, C, \*spatial), as MONAI's DynUNet returns it: a target with one spatial axis less tells.
    The defaults equal ``monai.losses.DeepSupervisionLoss``; ``weights=[1, 1/2, 1/4, ..., 0]`` with
    ``normalize`` are nnU-Net's. Ranks and the backend are options of the loss inside
    (``process_group``, ``ddp_average``, ``backend``) and hold at every output.

    Args:
        loss: any loss of this package, or another callable of (input, target[, mask]).
        weights: "exp" (1, 1/2, 1/4, ... not below 1/16), "same", "two" (1, 1/2, 1/2, ...), the
            three of ``monai.losses.DeepSupervisionLoss``; or a number for every output (an output
            of weight 0 is not looked at).
        normalize: divide the weights by their sum, as nnU-Net does.
        downsample: "nearest"; or "max", in which a lesion of one voxel survives: of the voxels that
            an output's voxel covers (as adaptive max pooling has it) the rarest class wins, the one
            with the fewest voxels in that sample at full resolution, and of two the higher one; it
            is ignored only if all of them are. The label to ignore is the loss's attribute
            ``ignore_index`` (or ``ignore_label``), which a function around a loss must be given. Of
            a dense target the maximum of each channel. Of a mask the maximum too, and voxels of
            weight 0 do not count as covered.

    Example:
        >>> import torch, voxfuse
        >>> loss = voxfuse.DeepSupervisionLoss(voxfuse.CrossEntropyLoss())
        >>> outputs = [torch.zeros(1, 2, 8, 8, 8), torch.zeros(1, 2, 4, 4, 4)]
        >>> loss(outputs, torch.ones(1, 1, 8, 8, 8, dtype=torch.uint8))  # 1.5 log 2
        tensor(1.0397)
    """

    def __init__(
        self,
        loss: nn.Module | Callable[..., Tensor],
        weights: str | Sequence[float] = "exp",
        normalize: bool = False,
        downsample: str = "nearest",
    ) -> None:
        super().__init__()
        if isinstance(loss, type):
            name = loss.__name__
            raise TypeError(f"loss: got the class {name}, expected a loss to call, {name}()")
        if not callable(loss):
            raise TypeError(f"loss: got {type(loss).__name__}, expected a loss to call")
        if isinstance(weights, str):
            _checks.choice("weights", weights, dict.fromkeys(SCHEMES, 0))
        self.loss = loss
        given = held("weights", weights, None)
        self.weights = given if isinstance(weights, str) else [float(x) for x in given]
        self.normalize = normalize
        _checks.choice("downsample", downsample, {"nearest": 0, "max": 1})
        self.downsample = downsample

    def at_level(
        self, target: Tensor, mask: Tensor | None, output: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        r"""Target and mask at the voxels of ``output`` (B, C, \*spatial).

        Raises:
            ValueError: they have other samples or axes, or fewer voxels along an axis.
        """
        _, classes, *size = output.shape
        target = require_reaching("target", target, output)
        if mask is not None:
            mask = require_reaching("mask", mask, output)
        if self.downsample == "nearest" or list(target.shape[-len(size) :]) == size:
            target = resample_nearest(target, size)
            return target, mask if mask is None else resample_nearest(mask, size)
        covered = mask
        if covered is not None and covered.shape[-len(size) :] != target.shape[-len(size) :]:
            raise ValueError(
                f"mask: got shape {tuple(covered.shape)}, expected the voxels of the target "
                f"{tuple(target.shape)}, which are pooled where the mask is not 0"
            )
        if covered is not None and covered.ndim != target.ndim:
            covered = covered[:, 0] if covered.ndim > target.ndim else covered[:, None]
        ignore_index = _ignored_by(self.loss)
        channels = target.shape[1] if target.ndim == output.ndim else None
        try:
            if channels == classes + 1:
                target = pool_regions(target, size, covered)
            elif classes == 1:
                target = pool_one_class(target, size, ignore_index, covered)
            elif channels == classes:
                target = pool_dense(target, size, None, covered)
            else:
                target = pool_labels(target, size, classes, ignore_index, covered)
        except ValueError as error:
            if ignore_index is not None or hasattr(self.loss, "ignore_index"):
                raise
            raise ValueError(
                f"{error}; downsample='max' finds the label to ignore as the attribute "
                "ignore_index of the loss (or of its attribute loss); a function can be given one"
            ) from None
        return target, mask if mask is None else pool_max(mask, size)

    def level_weights(self, levels: int) -> list[float]:
        """The weights of ``levels`` outputs, finest first."""
        if isinstance(self.weights, str):
            weights = [SCHEMES[self.weights](level) for level in range(levels)]
        else:
            weights = list(self.weights[:levels])
            if len(weights) < levels:
                raise ValueError(f"weights: got {len(weights)} numbers for {levels} outputs")
        total = sum(weights) if self.normalize else 1.0
        if total == 0:
            raise ValueError(f"weights: got {weights}, which add up to 0 and cannot be normalized")
        return [weight / total for weight in weights]

    def forward(
        self,
        input: Tensor | Sequence[Tensor],
        target: Tensor | Sequence[Tensor],
        mask: Tensor | None = None,
        *,
        annotated: Tensor | None = None,
        return_sums: bool = False,
        **others: Any,
    ) -> Any:
        r"""Return the weighted sum.

        Args:
            input: the outputs, (B, C, \*spatial) each, finest first; one of them; or all in a stack
                (B, S, C, \*spatial), which is taken apart if the target has the axes and voxels of
                one of its parts.
            target: (B, [k,] \*spatial), or a list of one an output.
            mask: mask or voxel weights (B, [1,] \*spatial), sampled like the target.
            annotated: which classes are annotated in which sample, bool (B, C), for every output.
            return_sums: return a pair with the :class:`voxfuse.Sums` of the finest output that
                counts.

        Raises:
            ValueError: a target or mask has other axes than an output, or fewer voxels along one;
                or one tensor could be one output as well as a stack: pass a list then.
        """
        refuse_arguments(self, others)
        one_target = isinstance(target, Tensor)
        if not one_target and not len(target):
            raise ValueError("target: got no target at all")
        outputs = outputs_of(input, target if isinstance(target, Tensor) else target[0])
        if not outputs:
            raise ValueError("input: got no output at all")
        if not one_target and len(target) < len(outputs):
            raise ValueError(f"target: got {len(target)} targets for {len(outputs)} outputs")
        partial = {} if annotated is None else {"annotated": annotated}
        total: Tensor | None = None
        for level, factor in enumerate(self.level_weights(len(outputs))):
            if factor == 0:
                continue
            output = outputs[level]
            own = target if isinstance(target, Tensor) else target[level]
            own, own_mask = self.at_level(own, mask, output)
            arguments = [output, own] if own_mask is None else [output, own, own_mask]
            if total is None and return_sums:
                term, sums = self.loss(*arguments, return_sums=True, **partial)
            else:
                term = self.loss(*arguments, **partial)
            total = factor * term if total is None else total + factor * term
        if total is None:
            raise ValueError("weights: every output has weight 0")
        return (total, sums) if return_sums else total

    def extra_repr(self) -> str:
        more = "" if self.downsample == "nearest" else f", downsample={self.downsample!r}"
        return f"weights={self.weights!r}, normalize={self.normalize}{more}"
