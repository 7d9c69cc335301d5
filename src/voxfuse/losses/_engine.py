"""Evaluation of a loss: one pass over the voxels, one small epilogue, one pass back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxfuse.contract import Activation
from voxfuse.losses._ranks import Ranks, share_of_rank, sum_over_ranks, total_over_ranks
from voxfuse.losses._recipe import Plan, Recipe
from voxfuse.losses._voxelwise import likelihood_arguments, worst_voxels
from voxfuse.ops import _checks, _registry
from voxfuse.ops.ratio_loss import once_differentiable
from voxfuse.ops.soft_confusion import check_inputs, is_dense

ClassWeights = Tensor | Sequence[float] | float | None

# Below autograd the operators skip a layer of Python: autograd is _Fused's own business.
_below_autograd: Callable[[], Any] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext
)


class Weights(NamedTuple):
    """Weights of the classes: in the ratio's terms, in NLL and in OFF."""

    terms: Tensor | None = None
    on: Tensor | None = None
    off: Tensor | None = None


class Operators(NamedTuple):
    confusion: Any
    confusion_backward: Any
    ratio: Any
    ratio_backward: Any
    likelihood_map: Any


_NAMES = (
    "soft_confusion",
    "soft_confusion_backward",
    "ratio_loss",
    "ratio_loss_backward",
    "likelihood_map",
)
_OPERATORS = {
    namespace: Operators(*(getattr(getattr(torch.ops, namespace), name).default for name in _NAMES))
    for namespace in _registry.NAMESPACES
}


def operators_of(backend: str, device: torch.device) -> Operators:
    if _registry.functorch_active():
        table = _registry.namespace_of(backend, device)
        return Operators(*(getattr(table, name) for name in _NAMES))
    if backend == "auto":
        return _OPERATORS["voxfuse"]
    return _OPERATORS[_registry.namespace_of(backend, device).name]


def evaluate(
    recipe: Recipe,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    class_weight: ClassWeights = None,
    likelihood_weight: ClassWeights = None,
    pos_weight: ClassWeights = None,
    ranks: Ranks | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the loss of ``recipe``; differentiable in ``input``."""
    if type(input) is not Tensor:
        input = _checks.require_logits(input)
    if type(target) is not Tensor:
        target = _checks.require_tensor("target", target)
    if weight is not None and type(weight) is not Tensor:
        weight = _checks.require_tensor("weight", weight)
    check_inputs(input, target, weight, recipe.ignore_index)
    classes = input.shape[1]
    plan = recipe.plan(classes, is_dense(input, target))
    weights = _NO_WEIGHTS
    if class_weight is not None or recipe.likelihood is not None:
        weights = weights_of(
            recipe, classes, input.device, class_weight, likelihood_weight, pos_weight
        )
    operators = operators_of(backend, input.device)
    call = (operators, plan, weights, ranks)
    try:
        if recipe.by_voxel:
            return _by_voxel(recipe, input, target, weight, *call)
        return _differentiable(input, target, weight, *call)
    except RuntimeError as error:
        if torch.compiler.is_compiling():
            raise
        _checks.reraise(error)


def run(
    plan: Plan,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    weights: Weights | None = None,
    backend: str = "auto",
) -> Tensor:
    """Return the loss of a ready ``plan``: for the adapters, whose options no recipe has.

    The tensors are plain, and ``weights`` as the operators take them (:func:`class_weights`).
    """
    check_inputs(input, target, weight, plan.confusion[3])
    operators = operators_of(backend, input.device)
    try:
        return _differentiable(input, target, weight, operators, plan, weights or _NO_WEIGHTS, None)
    except RuntimeError as error:
        if torch.compiler.is_compiling():
            raise
        _checks.reraise(error)


def _differentiable(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    operators: Operators,
    plan: Plan,
    weights: Weights,
    ranks: Ranks | None,
) -> Tensor:
    if torch.compiler.is_compiling() or _registry.functorch_active():
        return _composed(operators, plan, input, target, weight, weights, ranks)
    _checks.refuse_forward_mode(input)
    if torch.is_grad_enabled() and input.requires_grad:
        arguments = (input, target, weight, operators, plan, weights, ranks)
        loss: Tensor = _Fused.apply(*arguments)  # type: ignore[no-untyped-call]
        return loss
    return _forward(operators, plan, input, target, weight, weights, ranks)[0]


def _by_voxel(
    recipe: Recipe,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    operators: Operators,
    plan: Plan,
    weights: Weights,
    ranks: Ranks | None,
) -> Tensor:
    """A map of the voxels, or the mean of the worst of them."""
    percent = recipe.likelihood.top_percent if recipe.likelihood is not None else None
    if percent is None:
        if ranks is not None:
            raise ValueError(
                "process_group: reduction='none' gives every voxel its own loss, to which no other "
                "rank adds; leave process_group at None, or reduce by 'mean' or 'sum'"
            )
        _checks.refuse_forward_mode(input)
        arguments = likelihood_arguments(plan, weights.on, weights.off)
        loss: Tensor = operators.likelihood_map(input, target, weight, *arguments)
        return loss
    weight = worst_voxels(percent, plan, input, target, weight, weights.on, weights.off, ranks)
    return _differentiable(input, target, weight, operators, plan, weights, ranks)


_NO_WEIGHTS = Weights()


def weights_of(
    recipe: Recipe,
    classes: int,
    device: torch.device,
    class_weight: ClassWeights,
    likelihood_weight: ClassWeights,
    pos_weight: ClassWeights,
) -> Weights:
    terms = None
    name = "likelihood_weight"
    if recipe.ratio is None:
        name, likelihood_weight = "class_weight", class_weight
    else:
        first = 0 if recipe.ratio.include_background else 1
        terms = class_weights("class_weight", class_weight, classes - first, device)
    part = recipe.likelihood
    if part is None:
        return Weights(terms)
    on = class_weights(name, likelihood_weight, classes, device)
    off = on
    binary = part.activation == Activation.sigmoid or classes == 1
    if part.alpha is not None and not binary:
        # MONAI's convention: 1 - alpha for the background, alpha for every other class.
        balance = torch.full((classes,), part.alpha, dtype=torch.float64, device=device)
        balance[0] = 1 - part.alpha
        on = balance if on is None else on * balance
    if pos_weight is not None:
        if not binary:
            raise ValueError("pos_weight: needs a sigmoid likelihood; weigh classes instead")
        positive = class_weights("pos_weight", pos_weight, classes, device)
        on = positive if on is None or positive is None else on * positive
    if not part.include_background:
        foreground = torch.ones(classes, dtype=torch.float64, device=device)
        foreground[0] = 0
        on = foreground if on is None else on * foreground
        off = foreground if off is None else off * foreground
    return Weights(terms, on, off)


def class_weights(
    name: str, value: ClassWeights, length: int, device: torch.device
) -> Tensor | None:
    """Return the classes' weights as the operators take them: float64 on ``device``."""
    if value is None:
        return None
    if not isinstance(value, Tensor):
        value = torch.as_tensor(value, dtype=torch.float64)
    value = _checks.plain(value)
    if value.requires_grad:
        raise ValueError(f"{name}: requires grad, but no gradient flows to it; detach it")
    if value.ndim == 0:
        value = value.expand(length)
    if tuple(value.shape) != (length,):
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}, expected ({length},), one weight for every "
            "class that counts"
        )
    if value.dtype != torch.float64 or value.device != device:
        value = value.to(device, torch.float64)
    return value.contiguous()


def _forward(
    operators: Operators,
    plan: Plan,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weights: Weights,
    ranks: Ranks | None,
) -> tuple[Tensor, Tensor]:
    """Return the loss and its slopes at the sums."""
    with _below_autograd():
        stats = operators.confusion(input, target, weight, *plan.confusion, plan.focal_classes)
        if ranks is not None:
            stats = total_over_ranks(stats, plan.batch, ranks)
        result: tuple[Tensor, Tensor] = operators.ratio(
            stats,
            *plan.ratio,
            weights.terms,
            *plan.terms,
            weights.on,
            weights.off,
            *plan.likelihood,
            input.dtype == torch.float64,
            plan.exponent_from,
        )
    return result


class _Fused(torch.autograd.Function):
    """Both operators as one node that keeps the slopes at the sums and nothing volume-sized."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        operators: Operators,
        plan: Plan,
        weights: Weights,
        ranks: Ranks | None,
    ) -> Tensor:
        loss, cotangents = _forward(operators, plan, input, target, weight, weights, ranks)
        ctx.save_for_backward(input, target, weight, cotangents)
        ctx.call = operators, plan, ranks
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> Any:
        input, target, weight, cotangents = ctx.saved_tensors
        operators, plan, ranks = ctx.call
        with _below_autograd():
            grad = operators.ratio_backward(
                grad_loss, cotangents, plan.terms[0], plan.terms[1], plan.terms[2]
            )
            if ranks is not None:
                grad = share_of_rank(grad, input.shape[0], ranks)
            gradient = operators.confusion_backward(
                grad, input, target, weight, *plan.confusion[:5], plan.focal_classes
            )
        return once_differentiable(gradient, input), None, None, None, None, None, None


def _composed(
    operators: Operators,
    plan: Plan,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weights: Weights,
    ranks: Ranks | None,
) -> Tensor:
    """The same from the operators' own autograd, which compilers and torch.func can trace."""
    stats = operators.confusion(input, target, weight, *plan.confusion, plan.focal_classes)
    return loss_of_sums(operators, plan, stats, weights, ranks, input.dtype == torch.float64)


def loss_of_sums(
    operators: Operators,
    plan: Plan,
    stats: Tensor,
    weights: Weights,
    ranks: Ranks | None,
    double_loss: bool,
) -> Tensor:
    """The loss as a function of the sums, with autograd."""
    if ranks is not None:
        stats = sum_over_ranks(stats, plan.batch, ranks)
    loss: Tensor = operators.ratio(
        stats,
        *plan.ratio,
        weights.terms,
        *plan.terms,
        weights.on,
        weights.off,
        *plan.likelihood,
        double_loss,
        plan.exponent_from,
    )[0]
    return loss
