"""Evaluation of a loss: one pass over the voxels, one small epilogue, one pass back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from voxfuse._ranks import Ranks, ranks_of, share_of_rank, sum_over_ranks, total_over_ranks
from voxfuse.contract import Normaliser, Sum
from voxfuse.losses.matthews import MatthewsOptions
from voxfuse.losses.plan import NO_WEIGHTS, Plan, Recipe, TermWeights
from voxfuse.losses.sums import Sums, sums_of
from voxfuse.losses.voxelwise import likelihood_arguments, worst_voxels
from voxfuse.ops import _checks, _registry
from voxfuse.ops.ratio_loss import once_differentiable
from voxfuse.ops.soft_confusion import check_annotated, check_inputs, is_dense, validate_range

# Below autograd the operators skip a layer of Python: autograd is _Fused's own business.
_below_autograd: Callable[[], Any] = getattr(
    torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext
)


NO_SUMS = (
    "return_sums: a loss that sorts or chooses voxels, or has a value for every one, is not made "
    "of sums; voxfuse.soft_confusion computes them"
)


class Operators(NamedTuple):
    soft_confusion: Any
    soft_confusion_backward: Any
    ratio_loss: Any
    ratio_loss_backward: Any
    matthews_loss: Any
    likelihood_map: Any


_OPERATORS = {
    namespace: Operators(
        *(getattr(getattr(torch.ops, namespace), name).default for name in Operators._fields)
    )
    for namespace in _registry.NAMESPACES
}


def operators_of(backend: str, device: torch.device) -> Operators:
    if _registry.functorch_active():
        table = _registry.namespace_of(backend, device)
        return Operators(*(getattr(table, name) for name in Operators._fields))
    if backend == "auto":
        _registry.check_device(device)
        return _OPERATORS["voxfuse"]
    return _OPERATORS[_registry.namespace_of(backend, device).name]


class Call(NamedTuple):
    """What a loss does to its tensors."""

    operators: Operators
    plan: Plan
    weights: TermWeights = NO_WEIGHTS
    ranks: Ranks | None = None
    function: Callable[[Sums], Tensor] | None = None
    by_sample: bool = False
    annotated: Tensor | None = None
    #: Whether a dense target's values may be outside [0, 1], as the adapters' peers allow.
    any_target: bool = False


def evaluate(
    recipe: Recipe,
    input: Tensor,
    target: Tensor,
    mask: Tensor | None,
    options: Any,
    return_sums: bool = False,
    annotated: Tensor | None = None,
) -> Any:
    """Return the loss of ``recipe``, differentiable in ``input``, or a pair with its sums.

    ``options`` has what a call needs besides: the weights of the classes, ``process_group``,
    ``ddp_average`` and ``backend``.
    """
    group = options.process_group
    ranks = None if group is None else ranks_of(group, options.ddp_average)
    if type(input) is not Tensor:
        input = _checks.require_logits(input)
    if type(target) is not Tensor:
        target = _checks.require_tensor("target", target)
    if mask is not None and type(mask) is not Tensor:
        mask = _checks.require_tensor("mask", mask)
    check_inputs(input, target, mask, recipe.ignore_index)
    call = call_of(recipe, input, input.shape[1], is_dense(input, target), options, ranks)
    if annotated is not None:
        call = partial_call(recipe, call, input, input.shape[1], annotated)
    validate_range(input, target, mask, recipe.ignore_index, call.annotated, recipe.unlabelled)
    try:
        if recipe.by_voxel:
            if return_sums:
                raise TypeError(NO_SUMS)
            return _by_voxel(recipe, input, target, mask, call)
        loss, stats = _differentiable(input, target, mask, call)
    except RuntimeError as error:
        reraise(error, target, recipe.ignore_index)
    return (loss, sums_of(stats)) if return_sums else loss


def call_of(
    recipe: Recipe, input: Tensor, classes: int, dense: bool, options: Any, ranks: Ranks | None
) -> Call:
    """Everything but the tensors, for ``classes`` classes on the device of ``input``."""
    plan = recipe.plan(classes, dense)
    class_weight = options.class_weight
    weights = NO_WEIGHTS
    if class_weight is not None or recipe.likelihood is not None:
        likelihood_weight, pos_weight = options.likelihood_weight, options.pos_weight
        given = (class_weight, likelihood_weight, pos_weight)
        weights = recipe.weights(input.shape[0], classes, input.device, *given)
        by_sample = weights.class_weight is not None and weights.class_weight.ndim == 2
        if by_sample and ranks is not None and plan.ratio.batch:
            raise ValueError(
                "class_weight: one for every sample cannot be pooled over ranks; leave batch at "
                "False, or process_group at None"
            )
    return Call(
        operators_of(options.backend, input.device),
        plan,
        weights,
        ranks,
        recipe.function,
        recipe.by_sample,
    )


def partial_call(
    recipe: Recipe, call: Call, input: Tensor, classes: int, annotated: Tensor
) -> Call:
    """``call`` for samples in which only the ``annotated`` classes are."""
    if recipe.by_voxel:
        raise ValueError(
            "annotated: a loss of single voxels (reduction='none', or the worst k percent) has no "
            "partial labels; reduce by 'mean' or 'sum' over all voxels"
        )
    annotated = check_annotated(annotated, input, classes, recipe.unlabelled)
    weights, ratio = call.weights, call.plan.ratio
    # Over the ranks the sums are pooled, and 0 where a class is not annotated, before any weight.
    if recipe.ratio is not None and not (ratio.batch and call.ranks is not None):
        terms = annotated[:, ratio.first_class :].to(torch.float64).contiguous()
        if weights.class_weight is not None:
            terms = terms * weights.class_weight
        weights = weights._replace(class_weight=terms)
    return call._replace(annotated=annotated, weights=weights)


def reraise(
    error: RuntimeError, target: Tensor | None = None, ignore_index: int | None = None
) -> NoReturn:
    """Raise a kernel's complaint as the error it is, where nothing is being compiled."""
    if torch.compiler.is_compiling():
        raise error
    _checks.reraise(error, target, ignore_index)


def run(
    plan: Plan,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    weights: TermWeights = NO_WEIGHTS,
) -> Tensor:
    """Return the loss of a ready ``plan``: for the adapters, whose options no recipe has.

    The tensors are plain, and ``weights`` as the operators take them.
    """
    check_inputs(input, target, weight, plan.confusion.ignore_index)
    call = Call(operators_of("auto", input.device), plan, weights, any_target=True)
    try:
        return _differentiable(input, target, weight, call)[0]
    except RuntimeError as error:
        reraise(error)


def _differentiable(
    input: Tensor, target: Tensor, weight: Tensor | None, call: Call
) -> tuple[Tensor, Tensor]:
    """The loss, and the sums that it is made of (of all ranks)."""
    traced = torch.compiler.is_compiling() or _registry.functorch_active()
    if traced or call.function is not None or call.by_sample:
        # The operators' own autograd, which compilers and torch.func can trace.
        _checks.refuse_forward_mode(input)
        stats = _sums(input, target, weight, call)
        return loss_of_call(call, stats, input.dtype == torch.float64)
    _checks.refuse_forward_mode(input)
    if torch.is_grad_enabled() and input.requires_grad:
        both: tuple[Tensor, Tensor] = _Fused.apply(  # type: ignore[no-untyped-call]
            input, target, weight, call
        )
        return both
    loss, stats, _ = _forward(input, target, weight, call)
    return loss, stats


def _by_voxel(
    recipe: Recipe, input: Tensor, target: Tensor, weight: Tensor | None, call: Call
) -> Tensor:
    """A map of the voxels, or the mean of the worst of them."""
    arguments = likelihood_arguments(call.plan, call.weights)
    percent = recipe.likelihood.top_percent if recipe.likelihood is not None else None
    if percent is None:
        if call.ranks is not None:
            raise ValueError(
                "process_group: reduction='none' gives every voxel its own loss, to which no other "
                "rank adds; leave process_group at None, or reduce by 'mean' or 'sum'"
            )
        _checks.refuse_forward_mode(input)
        loss: Tensor = call.operators.likelihood_map(input, target, weight, **arguments)
        return loss
    weight = worst_voxels(percent, input, target, weight, arguments, call.ranks)
    return _differentiable(input, target, weight, call)[0]


def _sums(input: Tensor, target: Tensor, weight: Tensor | None, call: Call) -> Tensor:
    plan = call.plan
    stats: Tensor = call.operators.soft_confusion(
        input,
        target,
        weight,
        full=plan.full,
        **plan.confusion._asdict(),
        annotated=call.annotated,
        any_target=call.any_target,
    )
    return with_voxels(stats, call)


def with_voxels(stats: Tensor, call: Call) -> Tensor:
    """``stats`` in which class 0 has the voxels of its sample, annotated or not: a mean over the
    voxels divides by them."""
    if call.annotated is None or call.plan.ratio.normaliser != Normaliser.voxels:
        return stats
    voxels = stats[:, :, Sum.W].amax(1)
    columns = torch.arange(stats.shape[2], device=stats.device) == Sum.W
    first = torch.arange(stats.shape[1], device=stats.device) == 0
    return torch.where(first[:, None] & columns, voxels[:, None, None], stats)


def _loss_and_slopes(call: Call, stats: Tensor, double_loss: bool) -> tuple[Tensor, Tensor]:
    weights, ratio = call.weights, call.plan.ratio
    result: tuple[Tensor, Tensor]
    if isinstance(ratio, MatthewsOptions):
        result = call.operators.matthews_loss(
            stats,
            weights.class_weight,
            ratio.smooth_nr,
            ratio.smooth_dr,
            ratio.first_class,
            ratio.batch,
            ratio.absent,
            ratio.reduction,
            double_loss,
        )
        return result
    result = call.operators.ratio_loss(
        stats,
        **ratio._asdict(),
        class_weight=weights.class_weight,
        nll_weight=weights.nll_weight,
        off_weight=weights.off_weight,
        double_loss=double_loss,
    )
    return result


def _forward(
    input: Tensor, target: Tensor, weight: Tensor | None, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss, the sums and the loss's slopes at them."""
    with _below_autograd():
        stats = _sums(input, target, weight, call)
        if call.ranks is not None:
            stats = total_over_ranks(stats, call.plan.ratio.batch, call.ranks)
        loss, slopes = _loss_and_slopes(call, stats, input.dtype == torch.float64)
    return loss, stats, slopes


class _Fused(torch.autograd.Function):
    """Both operators as one node that keeps the slopes at the sums and nothing volume-sized."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, target: Tensor, weight: Tensor | None, call: Call
    ) -> tuple[Tensor, Tensor]:
        loss, stats, cotangents = _forward(input, target, weight, call)
        ctx.save_for_backward(input, target, weight, cotangents, call.annotated)
        ctx.call = call
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return loss, stats

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> Any:
        if grad_loss is None:
            return None, None, None, None
        input, target, weight, cotangents, annotated = ctx.saved_tensors
        call: Call = ctx.call
        ratio = call.plan.ratio
        with _below_autograd():
            grad = call.operators.ratio_loss_backward(
                grad_loss,
                cotangents,
                first_class=ratio.first_class,
                batch=ratio.batch,
                class_pooling=ratio.class_pooling,
            )
            if call.ranks is not None:
                grad = share_of_rank(grad, input.shape[0], call.ranks)
            gradient = call.operators.soft_confusion_backward(
                grad,
                input,
                target,
                weight,
                **call.plan.confusion._asdict(),
                annotated=annotated,
            )
        return once_differentiable(gradient, input), None, None, None


def sums(plan: Plan, input: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The sums that ``plan`` is about, with autograd."""
    check_inputs(input, target, weight, plan.confusion.ignore_index)
    _checks.refuse_forward_mode(input)
    try:
        call = Call(operators_of("auto", input.device), plan, any_target=True)
        return _sums(input, target, weight, call)
    except RuntimeError as error:
        reraise(error)


def loss_of_sums(plan: Plan, stats: Tensor, weights: TermWeights, double_loss: bool) -> Tensor:
    """The loss as a function of the sums, with autograd."""
    call = Call(operators_of("auto", stats.device), plan, weights)
    return _loss_and_slopes(call, stats, double_loss)[0]


def _losses_of_samples(call: Call, stats: Tensor, double_loss: bool) -> Tensor:
    """(B,): the loss of every sample alone."""
    losses = []
    for b in range(stats.shape[0]):
        weight = call.weights.class_weight
        if weight is not None and weight.ndim == 2:
            weight = weight[b]
        own = call._replace(weights=call.weights._replace(class_weight=weight))
        losses.append(_loss_and_slopes(own, stats[b : b + 1], double_loss)[0])
    if not losses:
        none = stats.sum((1, 2))  # with a graph, so that a step of no sample goes back
        return none.to(torch.float64 if double_loss else torch.float32)
    return torch.stack(losses)


def loss_of_call(call: Call, stats: Tensor, double_loss: bool) -> tuple[Tensor, Tensor]:
    """The same for the sums of one of several ranks, and the sums of all."""
    if call.ranks is not None:
        stats = sum_over_ranks(stats, call.plan.ratio.batch, call.ranks)
    if call.by_sample:
        return _losses_of_samples(call, stats, double_loss), stats
    if call.function is None:
        return _loss_and_slopes(call, stats, double_loss)[0], stats
    loss = call.function(Sums(*stats.unbind(-1)))
    if not isinstance(loss, Tensor):
        raise TypeError(f"function: returned a {type(loss).__name__}, expected a torch.Tensor")
    return loss.to(torch.float64 if double_loss else torch.float32), stats
