"""Lovász losses: convex surrogates of the Jaccard index from sorted errors.

Each class is sorted by itself, at most 48 bytes a voxel at a time, and no one-hot target is made.
The gradient is found on the way forward, in the one volume that becomes the gradient of the logits;
nothing else is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from voxfuse._ranks import Gathering, Ranks, ranks_of, refuse_tracing
from voxfuse.contract import Activation
from voxfuse.losses.declared import declared
from voxfuse.losses.engine import NO_SUMS
from voxfuse.losses.module import Loss
from voxfuse.losses.plan import class_weights
from voxfuse.losses.voxelwise import blocks, compute_dtype, flat
from voxfuse.ops import _checks, _registry
from voxfuse.ops.ratio_loss import once_differentiable
from voxfuse.ops.soft_confusion import check_inputs, is_dense, require_range, validate_range
from voxfuse.reference.soft_confusion import (
    classes_of,
    finite,
    is_ignored,
    label_complaint,
)


class _Rows(NamedTuple):
    """(B, C, V) values, the target as it came, and (B, V) masks: of the voxels that count, and of
    those of weight NaN, if there can be any."""

    values: Tensor
    target: Tensor
    dense: bool
    included: Tensor
    unknown: Tensor | None

    def foreground(self, c: int) -> Tensor:
        """The (B, V) indicator of class ``c``."""
        if not self.dense:
            return self.target == c
        g = self.target[:, c]
        return g > 0.5 if g.dtype.is_signed else g != 0  # PyTorch does not order unsigned integers


def _rows(input: Tensor, target: Tensor, weight: Tensor | None, ignore_index: int | None) -> _Rows:
    dense = is_dense(input, target)
    batch, classes = input.shape[:2]
    values = flat(input, input)
    count = values.shape[-1]
    flattened = target.reshape(batch, classes, count) if dense else target.reshape(batch, count)
    included = torch.ones((), dtype=torch.bool, device=input.device).expand(batch, count)
    if ignore_index is not None:
        labels = flattened[:, 0] if dense else flattened
        included = included & ~is_ignored(labels, ignore_index)
    unknown = None
    if weight is not None:
        weight = weight.reshape(batch, count)
        included = included & (weight != 0)
        unknown = weight.isnan() if weight.is_floating_point() else None
    if dense and input.device.type == "cpu":
        require_range(target, classes, weight, ignore_index)
    if not dense:
        labels, known = classes_of(flattened, classes, ignore_index)
        if input.device.type == "cpu" and not bool((known | ~included).all()):
            raise ValueError(label_complaint(target, classes, ignore_index, included))
        included = included & known
        flattened = labels if flattened.is_floating_point() else flattened
    return _Rows(values, flattened, dense, included, unknown)


def _class_loss(errors: Tensor, foreground: Tensor, included: Tensor) -> tuple[Tensor, Tensor]:
    """Return the (rows,) losses and their (rows, V) slopes at the errors, which are overwritten.

    With P positives in all and k of the first i among them, the Jaccard loss of the first i is
    ``1 - (P - k) / (P + i - k)``. Its increments come without a difference: a positive adds
    1 / (P + m), a negative (P - k) / ((P + m) (P + m + 1)), where m = i - k. A row without
    positives has one step, the first.
    """
    # Excluded voxels sort behind every error and then have no step of their own.
    ordered, order = errors.masked_fill_(~included, -torch.inf).sort(-1, descending=True)
    foreground = (foreground & included).gather(-1, order)
    positives = foreground.sum(-1, keepdim=True)
    loss = torch.zeros(errors.shape[0], dtype=torch.float64, device=errors.device)
    before = torch.zeros_like(positives)
    for block in blocks(errors.shape[1], 4 * errors.shape[0]):
        own = foreground[:, block]
        seen = before + own.cumsum(-1)
        before, seen = seen[:, -1:], seen - own.to(torch.int64)
        position = torch.arange(block.start, block.stop, device=errors.device)
        union = (positives + position - seen).to(torch.float64)
        rest = (positives - seen).to(torch.float64)
        steps = torch.where(own, 1 / union, rest / (union * (union + 1)))
        steps = torch.where(positives == 0, (position == 0).to(torch.float64), steps)
        # Not "> 0": a NaN must reach the loss.
        dropped = ordered[:, block] <= 0
        steps = steps.masked_fill(dropped, 0)
        loss = loss + (ordered[:, block].masked_fill(dropped, 0).to(torch.float64) * steps).sum(-1)
        ordered[:, block] = steps.to(ordered.dtype)
    return loss, errors.scatter_(-1, order, ordered)


class _Options(NamedTuple):
    """What the sums are about; in the order of the operator's schema."""

    activation: int
    hinge: bool
    classes: list[int]
    present: bool
    per_image: bool
    ignore_index: int | None
    class_weight: Tensor | None


class _Images:
    """Brings together the voxels that are sorted together: a sample's or the batch's, of all ranks.

    Called with (B, V) values of this rank, it returns them as (images, voxels of an image).
    """

    def __init__(
        self, batch: int, count: int, per_image: bool, device: torch.device, ranks: Ranks | None
    ) -> None:
        self.number = batch if per_image else 1
        self.own_size = self.size = count if per_image else batch * count
        self.own = slice(0, self.own_size)
        self.gathered = None
        if ranks is not None:
            self.gathered = Gathering(self.number, self.own_size, device, ranks)
            if len(set(self.gathered.rows)) > 1:
                raise ValueError(
                    f"process_group: with per_image the ranks hold parts of the same samples, but "
                    f"got batches of {self.gathered.rows}"
                )
            self.own = self.gathered.own
            self.size = sum(self.gathered.counts)

    def __call__(self, values: Tensor) -> Tensor:
        values = values.reshape(self.number, self.own_size)
        return values if self.gathered is None else self.gathered(values)


def _evaluate(
    rows: _Rows, options: _Options, ranks: Ranks | None, wants_gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss and, if wanted, its (B, C, V) gradient."""
    values, included, unknown = rows.values, rows.included, rows.unknown
    batch, channels, count = values.shape
    dtype = compute_dtype(values)
    device = values.device
    gradient = None
    if wants_gradient:
        gradient = torch.zeros(batch, channels, count, dtype=dtype, device=device)
    lse = _log_sum_exp(values, dtype) if options.activation == Activation.softmax else None
    images = _Images(batch, count, options.per_image, device, ranks)
    total = torch.zeros(images.number, dtype=torch.float64, device=device)
    counted = torch.zeros_like(total)
    counting = images(included)
    for c in options.classes if images.number * images.size else ():
        foreground = rows.foreground(c)
        errors = _errors(values[:, c].to(dtype), foreground, lse, options.activation, options.hinge)
        if unknown is not None:
            errors.masked_fill_(unknown, torch.nan)
        rising = ~foreground  # where the error grows with the logit or the probability
        foreground = images(foreground)
        loss, slopes = _class_loss(images(errors), foreground, counting)
        factor = torch.ones_like(loss)
        if options.present:
            factor = (foreground & counting).any(-1).to(torch.float64)
        counted += factor
        if options.class_weight is not None:
            factor = factor * options.class_weight[c]
        # where() keeps the NaN of an absent class out of the mean of the present ones.
        total += torch.where(factor == 0, 0.0, factor * loss)
        if gradient is not None:
            slopes = slopes[:, images.own].mul_(factor.to(dtype).unsqueeze(-1))
            slopes = slopes.reshape(batch, count)
            gradient[:, c] = torch.where(rising, slopes, -slopes)
    counted = counted.clamp(min=1)
    loss = ((total / counted).sum() / max(images.number, 1)).to(dtype)
    if gradient is not None:
        scale = (1 / (counted * counted.numel())).to(dtype).reshape(-1, 1, 1)
        if ranks is not None and ranks.average:
            scale = scale * ranks.size
        _through_activation(gradient, scale, rows, lse, options.activation)
    return loss, gradient


def _through_activation(
    gradient: Tensor, scale: Tensor, rows: _Rows, lse: Tensor | None, activation: int
) -> None:
    """Turn the slopes at the predictions into ``scale`` times those at the values, in place."""
    _, channels, count = gradient.shape
    for block in blocks(count, channels):
        h = gradient[..., block] * scale
        z = rows.values[..., block]
        if lse is not None:
            p = (finite(z.to(h.dtype)) - lse[:, None, block]).exp()
            h = p * (h - (p * h).sum(1, keepdim=True))
        elif activation == Activation.sigmoid:
            z = finite(z.to(h.dtype))
            h = h * z.sigmoid() * (-z).sigmoid()
        if rows.unknown is not None:
            h = h.masked_fill(rows.unknown[:, None, block], torch.nan)
        gradient[..., block] = h.masked_fill(~rows.included[:, None, block], 0)


def _errors(
    values: Tensor, foreground: Tensor, lse: Tensor | None, activation: int, hinge: bool
) -> Tensor:
    """The (B, V) errors of one class, in memory of their own."""
    z = finite(values)
    if hinge:
        return 1 - torch.where(foreground, z, -z)
    p = z
    if lse is not None:
        p = (z - lse).exp()
    elif activation == Activation.sigmoid:
        p = z.sigmoid()
    return torch.where(foreground, 1 - p, p)


def _log_sum_exp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, V) log of the sum over classes, a block of voxels at a time."""
    batch, channels, count = values.shape
    result = torch.empty(batch, count, dtype=dtype, device=values.device)
    for block in blocks(count, channels):
        result[:, block] = finite(values[..., block].to(dtype)).logsumexp(1)
    return result


def _batched(cotangent: Tensor) -> bool:
    """Whether it stands for several, of ``is_grads_batched`` or of ``torch.func.vmap``."""
    kinds = torch._C._functorch
    return kinds.is_legacy_batchedtensor(cotangent) or kinds.is_batchedtensor(cotangent)


class _Lovasz(torch.autograd.Function):
    """The loss where nothing traces it: the volume of the gradient is used again."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, rows: _Rows, options: _Options, ranks: Ranks | None
    ) -> Tensor:
        loss, gradient = _evaluate(rows, options, ranks, ctx.needs_input_grad[0])
        # What the rows are views of, so that a change in place is PyTorch's error.
        ctx.save_for_backward(input, rows.target, options.class_weight)
        ctx.call = rows, options, ranks
        ctx.gradient = gradient
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, *_ = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:  # a second backward pass through a retained graph
            rows, options, ranks = ctx.call
            _, gradient = _evaluate(rows, options, ranks, True)
            assert gradient is not None
        # Scaled before it is rounded to a half type: a loss scale keeps it from underflowing.
        if _batched(grad):  # several gradients have no room in the volume of one
            result = (gradient * grad).to(input.dtype)
        elif gradient.dtype == input.dtype:
            result = gradient.mul_(grad)
        else:
            result = torch.empty_like(gradient, dtype=input.dtype)
            for block in blocks(gradient.shape[2], gradient.shape[1]):
                result[..., block] = gradient[..., block] * grad
        return once_differentiable(result.reshape(input.shape), input), None, None, None


def _loss_and_gradient(
    input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    *given, wants_gradient = rest
    options = _Options(*given)
    rows = _rows(input, target, weight, options.ignore_index)
    loss, gradient = _evaluate(rows, options, None, wants_gradient)
    return loss, loss.new_empty(0) if gradient is None else gradient.reshape(input.shape)


def _fake(x: Any) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.input)
    shape = x.input.shape if x.wants_gradient else (0,)
    return x.input.new_empty((), dtype=dtype), x.input.new_empty(shape, dtype=dtype)


def _setup_context(ctx: Any, x: Any, output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x.input, output[1])


def _backward(operators: Any, ctx: Any, grad: Tensor, _: Tensor | None) -> dict[str, Tensor]:
    input, gradient = ctx.saved_tensors
    return {"input": (once_differentiable(gradient, input) * grad).to(input.dtype)}


_registry.register_composed(
    "lovasz",
    "(Tensor input, Tensor target, Tensor? weight, int activation, bool hinge, int[] classes, "
    "bool present, bool per_image, int? ignore_index, Tensor? class_weight, bool wants_gradient) "
    "-> (Tensor loss, Tensor gradient)",
    _loss_and_gradient,
    _fake,
)
_registry.register_autograd("lovasz", _setup_context, _backward)


#: The sorts are PyTorch's own on every device, which is what the reference backend is.
_BACKENDS = {"auto": 0, "reference": 1}


def _check_classes(classes: str | Sequence[int], channels: int | None = None) -> None:
    if isinstance(classes, str):
        _checks.choice("classes", classes, {"present": 0, "all": 1})
    elif channels is not None:
        outside = [c for c in classes if not 0 <= c < channels]
        if outside or not len(classes):
            raise ValueError(
                f"classes: got {list(classes)}, expected 'present', 'all' or classes in "
                f"[0, {channels})"
            )


class _LovaszModule(Loss):
    classes: str | Sequence[int]
    per_image: bool
    ignore_index: int | None
    hinge: ClassVar[bool] = False

    def validate(self) -> None:
        _check_classes(self.classes)
        _checks.ignored_label(self.ignore_index)
        _checks.choice("backend", self.backend, _BACKENDS)

    @classmethod
    def of(
        cls,
        options: Any,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None,
        return_sums: bool = False,
        annotated: Tensor | None = None,
    ) -> Tensor:
        if return_sums:
            raise TypeError(NO_SUMS)
        if annotated is not None:
            raise ValueError(
                f"annotated: {cls.__name__} has no partial labels; the losses that are made of "
                "sums over the voxels have, such as JaccardLoss"
            )
        activation: int = Activation.none
        if not cls.hinge:
            activation = _checks.choice("activation", options.activation, Activation)
        _checks.choice("backend", options.backend, _BACKENDS)
        input = _checks.require_logits(input)
        target = _checks.require_tensor("target", target)
        if mask is not None:
            mask = _checks.require_tensor("mask", mask)
        ignore_index = _checks.ignored_label(options.ignore_index)
        check_inputs(input, target, mask, ignore_index)
        validate_range(input, target, mask, ignore_index)
        channels = input.shape[1]
        if activation == Activation.softmax and channels == 1:
            raise ValueError(
                "activation: a softmax over one class is constant; use 'sigmoid' for an input with "
                "one channel"
            )
        classes = options.classes
        _check_classes(classes, channels)
        call = _Options(
            activation,
            cls.hinge,
            list(range(channels) if isinstance(classes, str) else classes),
            classes == "present",
            options.per_image,
            ignore_index,
            class_weights("class_weight", options.class_weight, channels, input.device),
        )
        ranks = ranks_of(options.process_group, options.ddp_average)
        transformed = _registry.functorch_active()
        if transformed or torch.compiler.is_compiling():
            if ranks is not None:
                refuse_tracing()
            wants = torch.is_grad_enabled() and (transformed or input.requires_grad)
            operator = _registry.namespace_of("auto", input.device).lovasz
            traced: Tensor = operator(input, target, mask, **call._asdict(), wants_gradient=wants)[
                0
            ]
            return traced
        rows = _rows(input, target, mask, ignore_index)
        loss: Tensor = _Lovasz.apply(input, rows, call, ranks)  # type: ignore[no-untyped-call]
        return loss


@declared
class LovaszLoss(_LovaszModule):
    r"""Lovász-softmax loss (Berman, Triki, Blaschko 2018, arXiv 1705.08790).

    The errors :math:`m_v = |g_v - p_v|` of a class, sorted in descending order, dotted with the
    increments of the Jaccard loss along that order; then the mean over classes. The defaults equal
    the authors' ``lovasz_softmax`` on a softmax, and
    ``segmentation_models_pytorch.losses.LovaszLoss("multiclass")``.

    Any number of spatial axes. A sort needs all errors of a class in one place: above the logits
    and their gradient the loss takes at most 48 bytes a voxel of the batch (float32 logits on the
    CPU), one class at a time and so whatever their number. The gradient is found on the way
    forward and held until the backward pass.

    Args:
        classes: "present" (classes without a voxel in the target are left out of the mean), "all",
            or a list of classes.
        per_image: mean over the samples' own losses; else all voxels of the batch are one image.
        activation: "softmax", "sigmoid", or "none" for probabilities.
        ignore_index: voxels with this label do not count.
        class_weight: (C,), a weight for every channel, or one number. The mean stays the plain mean
            of the weighted losses of the classes that count.
        process_group: None, "world" (resolved at the first forward) or a process group: the loss
            of the global batch. Every rank gathers the errors of all ranks, class by class, and
            sorts them, so memory and time of the sort are those of the global batch. With
            ``per_image`` the ranks hold parts of the same samples (volumes split along space). Not
            under torch.compile: the ranks' numbers of voxels travel through the host.
        ddp_average: multiply the gradient by the number of ranks, which undoes the averaging of
            DistributedDataParallel.
        backend: "auto" or "reference", which are the same here: the sort is PyTorch's own.

    Shapes: as :class:`voxfuse.TverskyLoss`; a dense target counts where it exceeds 1/2. The
    optional third argument of the call, ``mask``, is a mask (weights other than 0 count alike).

    Example:
        >>> import torch, voxfuse
        >>> probabilities = torch.tensor([[[0.9, 0.2], [0.1, 0.8]]])
        >>> loss = voxfuse.LovaszLoss(activation="none")
        >>> loss(probabilities, torch.tensor([[0, 1]]))
        tensor(0.1750)
    """

    classes: str | Sequence[int] = "present"
    per_image: bool = False
    activation: str = "softmax"
    ignore_index: int | None = None

    shown = ("classes", "per_image", "activation", "ignore_index")

    def validate(self) -> None:
        super().validate()
        _checks.choice("activation", self.activation, Activation)


@declared
class LovaszHingeLoss(_LovaszModule):
    r"""Lovász hinge loss of every channel's own logits (Berman, Triki, Blaschko 2018).

    As :class:`LovaszLoss` with the hinge errors :math:`\max(0, 1 - z_v (2 g_v - 1))` in place of
    the probabilities' errors, averaged over the channels. With one channel the defaults equal
    ``segmentation_models_pytorch.losses.LovaszLoss("binary")``.

    Args:
        classes: "all", "present" or a list of channels, as in :class:`LovaszLoss`.
        per_image, ignore_index, class_weight, process_group, ddp_average, backend: as in
            :class:`LovaszLoss`.

    Example:
        >>> import torch, voxfuse
        >>> voxfuse.LovaszHingeLoss()(torch.tensor([[[2.0, -2.0]]]), torch.tensor([[[1, 0]]]))
        tensor(0.)
    """

    per_image: bool = False
    ignore_index: int | None = None
    classes: str | Sequence[int] = "all"

    shown = ("classes", "per_image", "ignore_index")
    hinge = True
