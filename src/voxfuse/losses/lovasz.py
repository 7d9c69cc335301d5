"""Lovász losses: convex surrogates of the Jaccard index from sorted errors.

Each class is sorted by itself, about 40 bytes a voxel at a time, and no one-hot target is made.
The gradient is found on the way forward, in the one volume that becomes the gradient of the logits;
nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from voxfuse.losses._voxelwise import blocks, flat
from voxfuse.ops import _checks
from voxfuse.ops.ratio_loss import once_differentiable
from voxfuse.ops.soft_confusion import ACTIVATIONS, check_inputs, is_dense

SOFTMAX = ACTIVATIONS["softmax"]
SIGMOID = ACTIVATIONS["sigmoid"]


class _Rows(NamedTuple):
    """(B, C, V) values, the target as it came, and the (B, V) mask of the voxels that count."""

    values: Tensor
    target: Tensor
    dense: bool
    included: Tensor

    def foreground(self, c: int) -> Tensor:
        """The (B, V) indicator of class ``c``."""
        if not self.dense:
            return self.target == c
        return self.target[:, c] > 0.5


def _rows(
    input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None
) -> tuple[Tensor, _Rows]:
    input = _checks.require_tensor("input", input)
    target = _checks.require_tensor("target", target)
    if weight is not None:
        weight = _checks.require_tensor("weight", weight)
    check_inputs(input, target, weight, ignore_index)
    dense = is_dense(input, target)
    batch, classes = input.shape[:2]
    values = flat(input, input)
    flattened = target.reshape(batch, classes, -1) if dense else target.reshape(batch, -1)
    included = torch.ones((), dtype=torch.bool, device=input.device).expand(batch, values.shape[-1])
    if ignore_index is not None:
        labels = flattened[:, 0] if dense else flattened
        included = included & (labels.to(torch.int64) != ignore_index)
    if weight is not None:
        included = included & (weight.reshape(batch, -1) != 0)
    if not dense:
        labels = flattened.to(torch.int64) if flattened.is_floating_point() else flattened
        inside = (labels >= 0) & (labels < classes)
        if (
            input.device.type == "cpu"
            and not torch.compiler.is_compiling()
            and not bool((inside | ~included).all())
        ):
            wrong = int(labels[included & ~inside][0])
            raise ValueError(f"target: label {wrong} is outside [0, {classes})")
        included = included & inside
        flattened = labels
    return input, _Rows(values, flattened, dense, included)


def _jaccard_steps(foreground: Tensor) -> Tensor:
    """Increments of the Jaccard loss along (rows, V) sorted errors, without a difference.

    With P positives in all and k of the first i among them, the loss of the first i is
    ``1 - (P - k) / (P + i - k)``: a positive adds 1 / (P + m), a negative (P - k) / ((P + m) (P +
    m + 1)), where m = i - k. A row without positives has one step, the first.
    """
    seen = foreground.cumsum(-1, dtype=torch.int32)
    positives = seen[..., -1:].clone()
    before = seen - foreground.to(torch.int32)
    position = torch.arange(foreground.shape[-1], dtype=torch.int32, device=foreground.device)
    union = (positives + position - before).to(torch.float64)
    rest = (positives - before).to(torch.float64)
    step = torch.where(foreground, 1 / union, rest / (union * (union + 1)))
    first = (position == 0).to(torch.float64)
    return torch.where(positives == 0, first, step)


def _class_loss(errors: Tensor, foreground: Tensor, included: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (rows,) losses and their (rows, V) slopes at the errors."""
    # Excluded voxels sort behind every error and then have no step of their own.
    ordered, order = errors.masked_fill(~included, -torch.inf).sort(-1, descending=True)
    steps = _jaccard_steps((foreground & included).gather(-1, order))
    # Not "ordered > 0": a NaN must reach the loss.
    dropped = ordered <= 0
    steps = steps.masked_fill(dropped, 0)
    loss = (ordered.masked_fill(dropped, 0).to(torch.float64) * steps).sum(-1)
    slopes = torch.empty_like(errors).scatter_(-1, order, steps.to(errors.dtype))
    return loss, slopes


class _Options(NamedTuple):
    activation: int
    hinge: bool
    classes: str | Sequence[int]
    per_image: bool


class _Lovasz(torch.autograd.Function):
    """Softmax or sigmoid probabilities against each class, or the hinge of the logits."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, rows: _Rows, options: _Options) -> Tensor:
        loss, gradient = _evaluate(rows, options, ctx.needs_input_grad[0])
        ctx.save_for_backward(input)
        ctx.call = rows, options
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (input,) = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second backward pass through a retained graph
            rows, options = ctx.call
            _, gradient = _evaluate(rows, options, True)
            assert gradient is not None
        # Scaled before it is rounded to a half type: a loss scale keeps it from underflowing.
        if gradient.dtype == input.dtype:
            result = gradient.mul_(grad)
        else:
            result = torch.empty_like(gradient, dtype=input.dtype)
            for block in blocks(gradient.shape[2], gradient.shape[1]):
                result[..., block] = gradient[..., block] * grad
        return once_differentiable(result.reshape(input.shape), input), None, None


def _evaluate(rows: _Rows, options: _Options, wants_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the loss and, if wanted, its (B, C, V) gradient."""
    values, _, _, included = rows
    activation, hinge, classes, per_image = options
    batch, channels, count = values.shape
    dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
    device = values.device
    gradient = None
    if wants_gradient:
        gradient = torch.zeros(batch, channels, count, dtype=dtype, device=device)
    lse = _log_sum_exp(values, dtype) if activation == SOFTMAX else None

    def pooled(tensor: Tensor) -> Tensor:
        return tensor if per_image else tensor.reshape(1, -1)

    total = torch.zeros(batch if per_image else 1, dtype=torch.float64, device=device)
    counted = torch.zeros_like(total)
    wanted = range(channels) if isinstance(classes, str) else classes
    for c in wanted if count * batch else ():
        foreground = rows.foreground(c)
        z = _finite(values[:, c].to(dtype))
        if hinge:
            sign = torch.where(foreground, 1.0, -1.0).to(dtype)
            errors, direction = 1 - z * sign, -sign
        else:
            p = z
            if lse is not None:
                p = (z - lse).exp()
            elif activation == SIGMOID:
                p = z.sigmoid()
            errors = torch.where(foreground, 1 - p, p)
            direction = torch.where(foreground, -1.0, 1.0).to(dtype)
        loss, slopes = _class_loss(pooled(errors), pooled(foreground), pooled(included))
        weight = torch.ones_like(loss)
        if classes == "present":
            weight = pooled(foreground & included).any(-1).to(torch.float64)
        # where() keeps the NaN of an absent class out of the mean of the present ones.
        total += torch.where(weight == 0, 0.0, loss)
        counted += weight
        if gradient is not None:
            slopes = (slopes * weight.unsqueeze(-1)).to(dtype).reshape(batch, count)
            gradient[:, c] = slopes * direction
    counted = counted.clamp(min=1)
    loss = (total / counted).mean().to(dtype)
    if gradient is None:
        return loss, None

    scale = (1 / (counted * counted.numel())).to(dtype).reshape(-1, 1, 1)
    for block in blocks(count, channels):
        h = gradient[..., block] * scale
        if lse is not None:
            p = (_finite(values[..., block].to(dtype)) - lse[:, None, block]).exp()
            h = p * (h - (p * h).sum(1, keepdim=True))
        elif activation == SIGMOID:
            z = _finite(values[..., block].to(dtype))
            h = h * z.sigmoid() * (-z).sigmoid()
        gradient[..., block] = h.masked_fill(~included[:, None, block], 0)
    return loss, gradient


def _finite(values: Tensor) -> Tensor:
    """Treat +-inf as the limit of ever larger logits; NaN stays."""
    limit = torch.finfo(values.dtype).max
    return values.clamp(-limit, limit)


def _log_sum_exp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, V) log of the sum over classes, a block of voxels at a time."""
    batch, channels, count = values.shape
    result = torch.empty(batch, count, dtype=dtype, device=values.device)
    for block in blocks(count, channels):
        result[:, block] = _finite(values[..., block].to(dtype)).logsumexp(1)
    return result


def lovasz_softmax(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    classes: str | Sequence[int] = "present",
    per_image: bool = False,
    activation: str = "softmax",
    ignore_index: int | None = None,
) -> Tensor:
    input, rows = _rows(input, target, weight, ignore_index)
    code = _checks.choice("activation", activation, ACTIVATIONS)
    channels = input.shape[1]
    if code == SOFTMAX and channels == 1:
        raise ValueError(
            "activation: a softmax over one class is constant; use 'sigmoid' for an input with one "
            "channel"
        )
    if isinstance(classes, str):
        _checks.choice("classes", classes, {"present": 0, "all": 1})
    else:
        outside = [c for c in classes if not 0 <= c < channels]
        if outside or not len(classes):
            raise ValueError(
                f"classes: got {list(classes)}, expected 'present', 'all' or classes in "
                f"[0, {channels})"
            )
    loss: Tensor = _Lovasz.apply(  # type: ignore[no-untyped-call]
        input, rows, _Options(code, False, classes, per_image)
    )
    return loss


def lovasz_hinge(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    per_image: bool = False,
    ignore_index: int | None = None,
) -> Tensor:
    input, rows = _rows(input, target, weight, ignore_index)
    loss: Tensor = _Lovasz.apply(  # type: ignore[no-untyped-call]
        input, rows, _Options(ACTIVATIONS["none"], True, "all", per_image)
    )
    return loss


class LovaszLoss(nn.Module):
    r"""Lovász-softmax loss (Berman, Triki, Blaschko 2018, arXiv 1705.08790).

    The errors :math:`m_v = |g_v - p_v|` of a class, sorted in descending order, dotted with the
    increments of the Jaccard loss along that order; then the mean over classes.

    Any number of spatial axes. Sorting needs about 40 bytes a voxel, for one class at a time; the
    gradient is the only volume of all classes, and it is found on the way forward.

    Args:
        classes: "present" (classes without a voxel in the target are left out of the mean), "all",
            or a list of classes.
        per_image: mean over the samples' own losses; else all voxels of the batch are one image.
        activation: "softmax", "sigmoid", or "none" for probabilities.
        ignore_index: voxels with this label do not count.

    Shapes: as :class:`voxfuse.TverskyLoss`; a dense target counts where it exceeds 1/2. The
    optional third argument of the call is a mask (weights other than 0 count alike).

    Example:
        >>> import torch, voxfuse
        >>> probabilities = torch.tensor([[[0.9, 0.2], [0.1, 0.8]]])
        >>> loss = voxfuse.LovaszLoss(activation="none")
        >>> loss(probabilities, torch.tensor([[0, 1]]))
        tensor(0.1750)
    """

    def __init__(
        self,
        classes: str | Sequence[int] = "present",
        per_image: bool = False,
        activation: str = "softmax",
        ignore_index: int | None = None,
    ) -> None:
        super().__init__()
        if isinstance(classes, str):
            _checks.choice("classes", classes, {"present": 0, "all": 1})
        _checks.choice("activation", activation, ACTIVATIONS)
        self.classes = classes
        self.per_image = per_image
        self.activation = activation
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return lovasz_softmax(
            input,
            target,
            weight,
            self.classes,
            self.per_image,
            self.activation,
            self.ignore_index,
        )

    def extra_repr(self) -> str:
        return (
            f"classes={self.classes!r}, per_image={self.per_image}, "
            f"activation={self.activation!r}, ignore_index={self.ignore_index}"
        )


class LovaszHingeLoss(nn.Module):
    r"""Lovász hinge loss of every channel's own logits (Berman, Triki, Blaschko 2018).

    As :class:`LovaszLoss` with the hinge errors :math:`\max(0, 1 - z_v (2 g_v - 1))` in place of
    the probabilities' errors, averaged over the channels.

    Args:
        per_image: mean over the samples' own losses.
        ignore_index: voxels with this label do not count.

    Example:
        >>> import torch, voxfuse
        >>> voxfuse.LovaszHingeLoss()(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[1, 0]]]))
        tensor(0.)
    """

    def __init__(self, per_image: bool = False, ignore_index: int | None = None) -> None:
        super().__init__()
        self.per_image = per_image
        self.ignore_index = ignore_index

    def forward(self, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        return lovasz_hinge(input, target, weight, self.per_image, self.ignore_index)

    def extra_repr(self) -> str:
        return f"per_image={self.per_image}, ignore_index={self.ignore_index}"
