"""A cross-entropy or focal loss voxel by voxel: ``reduction="none"`` and the choice of the top k.

Only one single-channel volume is made; the classes of a block of voxels exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from voxfuse._ranks import Gathering, Ranks, refuse_tracing
from voxfuse.contract import FULL, Activation, ConfusionOptions, Sum
from voxfuse.losses.plan import Plan, TermWeights
from voxfuse.ops import _registry
from voxfuse.ops.soft_confusion import is_dense
from voxfuse.reference.soft_confusion import (
    check_labels,
    check_range,
    classes_of,
    finite,
    probabilities,
    voxels,
)

#: Elements (voxels x classes) of a block.
BLOCK_ELEMENTS = 1 << 16


def blocks(count: int, classes: int) -> Iterator[slice]:
    """Slices of the voxels that bound the memory of what is computed with all their classes."""
    step = max(1024, BLOCK_ELEMENTS // classes)
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def flat(tensor: Tensor, input: Tensor) -> Tensor:
    """View or copy (B, [k,] *spatial) as (B, [k,] V)."""
    spatial = input.ndim - 2
    return tensor.flatten(tensor.ndim - spatial) if spatial else tensor.unsqueeze(-1)


def likelihood_map(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    on: Tensor | None,
    off: Tensor | None,
    likelihood: int,
    ignore_index: int | None,
    gamma: float,
    on_scale: float,
    off_scale: float,
) -> Tensor:
    """``sum_c (on_c on_scale NLL_c + off_c off_scale OFF_c)`` of every voxel, (B, *spatial)."""
    batch, classes = input.shape[:2]
    values, g = flat(input, input), flat(target, input)
    w = None if weight is None else flat(weight, input)
    dtype = compute_dtype(input)
    count = values.shape[-1]
    result = torch.empty(batch, count, dtype=dtype, device=input.device)
    on_weight, off_weight = (
        torch.ones(classes, dtype=dtype, device=input.device) if x is None else x.to(dtype)
        for x in (on, off)
    )
    dense = is_dense(input, target)
    if not dense:
        check_labels(target, classes, ignore_index)  # whole, to know the place
    else:
        check_range(target, classes, weight, ignore_index)
    plain = likelihood == Activation.softmax and gamma == 0 and off_scale == 0 and not dense
    for block in blocks(count, classes):
        x, t = values[..., block], g[..., block]
        u = None if w is None else w[..., block]
        if plain:
            result[:, block] = _cross_entropy(x, t, u, on_scale * on_weight, ignore_index)
            continue
        piece = voxels(x, t, u, ignore_index)
        r = probabilities(piece.values, likelihood)
        modulation = 1.0 if gamma == 0 else r.complement**gamma
        total = _weighted(on_scale * on_weight, piece.target, modulation * r.minus_log)
        if off_scale:
            if likelihood == Activation.softmax:
                other = r.minus_log
            else:
                other = (1.0 if gamma == 0 else r.p**gamma) * r.minus_log_complement
            total = total + _weighted(off_scale * off_weight, 1 - piece.target, other)
        result[:, block] = (total * piece.weight[:, 0]).masked_fill(~piece.included[:, 0], 0)
    return result.reshape(batch, *input.shape[2:])


def compute_dtype(input: Tensor) -> torch.dtype:
    return torch.float64 if input.dtype == torch.float64 else torch.float32


def _cross_entropy(
    values: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    class_weight: Tensor,
    ignore_index: int | None,
) -> Tensor:
    """The common case, (B, C, n) logits and labels, at the speed of PyTorch's own."""
    classes = values.shape[1]
    labels = labels.reshape(values.shape[0], values.shape[2])
    labels, known = classes_of(labels, classes, ignore_index)
    result = torch.nn.functional.cross_entropy(
        finite(values.to(class_weight.dtype)),
        labels.masked_fill(~known, -100),
        weight=class_weight,
        ignore_index=-100,
        reduction="none",
    )
    if weight is None:
        return result
    weight = weight.reshape(labels.shape).to(result.dtype)
    return (result * weight).masked_fill(weight == 0, 0)


def _weighted(class_weight: Tensor, g: Tensor, value: Tensor) -> Tensor:
    """``sum_c w_c g_c value_c`` in which ``0 * inf`` is 0."""
    factor = class_weight[:, None] * g
    return (factor * value.masked_fill(factor == 0, 0)).sum(1)


def likelihood_arguments(plan: Plan, weights: TermWeights) -> dict[str, Any]:
    """The arguments of ``likelihood_map`` after the voxel weight."""
    confusion, ratio = plan.confusion, plan.ratio
    return {
        "on": weights.nll_weight,
        "off": weights.off_weight,
        "likelihood": confusion.likelihood,
        "ignore_index": confusion.ignore_index,
        "gamma": confusion.gamma,
        "on_scale": ratio.nll_scale,
        "off_scale": ratio.off_scale,
    }


def _fake_map(x: Any) -> Tensor:
    shape = (x.input.shape[0], *x.input.shape[2:])
    result: Tensor = x.input.new_empty(shape, dtype=compute_dtype(x.input))
    return result


def _setup_context(ctx: Any, x: Any, output: Tensor) -> None:
    ctx.save_for_backward(x.input, x.target, x.weight, x.on, x.off)
    ctx.options = ConfusionOptions(
        x.likelihood, x.likelihood, ignore_index=x.ignore_index, gamma=x.gamma
    )
    ctx.scales = (x.on_scale, x.off_scale)


def _backward(operators: Any, ctx: Any, grad: Tensor) -> dict[str, Tensor]:
    """The fused backward pass, with the incoming gradient as the voxels' weight."""
    input, target, weight, on, off = ctx.saved_tensors
    cotangents = input.new_zeros(*input.shape[:2], FULL, dtype=torch.float64)
    columns = (Sum.NLL, Sum.OFF)
    for column, factor, scale in zip(columns, (on, off), ctx.scales, strict=True):
        cotangents[..., column] = scale if factor is None else scale * factor
    if weight is not None:
        # An excluded voxel keeps its weight of 0 whatever comes in.
        grad = grad * weight.reshape(grad.shape)
    gradient = operators.soft_confusion_backward(cotangents, input, target, grad, *ctx.options)
    return {"input": gradient}


_registry.register_composed(
    "likelihood_map",
    "(Tensor input, Tensor target, Tensor? weight, Tensor? on, Tensor? off, int likelihood, "
    "int? ignore_index, float gamma, float on_scale, float off_scale) -> Tensor",
    likelihood_map,
    _fake_map,
)
_registry.register_autograd("likelihood_map", _setup_context, _backward)


def _keep_worst(input: Tensor, target: Tensor, weight: Tensor | None, *rest: Any) -> Tensor:
    *options, percent = rest
    losses = likelihood_map(input, target, weight, *options).flatten()
    indices = torch.empty(0, dtype=torch.int64, device=losses.device)
    if losses.numel():
        indices = losses.topk(_chosen(losses.numel(), percent), sorted=False).indices
    return _weights_of(indices, input, weight)


def _weights_of(indices: Tensor, input: Tensor, weight: Tensor | None) -> Tensor:
    """(B, *spatial) weights that keep the voxels at ``indices``."""
    shape = (input.shape[0], *input.shape[2:])
    kept = torch.zeros(shape, dtype=torch.bool, device=input.device)
    kept.view(-1)[indices] = True
    return kept if weight is None else kept.to(weight.dtype) * weight.reshape(shape)


def _fake_worst(x: Any) -> Tensor:
    dtype = torch.bool if x.weight is None else x.weight.dtype
    result: Tensor = x.input.new_empty((x.input.shape[0], *x.input.shape[2:]), dtype=dtype)
    return result


_registry.register_composed(
    "worst_voxels",
    "(Tensor input, Tensor target, Tensor? weight, Tensor? on, Tensor? off, int likelihood, "
    "int? ignore_index, float gamma, float on_scale, float off_scale, float percent) -> Tensor",
    _keep_worst,
    _fake_worst,
)


@torch.no_grad()
def worst_voxels(
    percent: float,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    arguments: dict[str, Any],
    ranks: Ranks | None = None,
) -> Tensor:
    """Weights (B, *spatial) that keep the ``percent`` of the batch's voxels of largest loss.

    The batch is that of all ``ranks``; ``arguments`` are those of ``likelihood_map``.
    """
    tensors = (input.detach(), target, weight)
    if ranks is None:
        result: Tensor = torch.ops.voxfuse.worst_voxels(*tensors, **arguments, percent=percent)
        return result
    refuse_tracing()
    losses = likelihood_map(*tensors, **arguments).flatten()
    return _weights_of(_worst_of_ranks(losses, percent, ranks), input, weight)


def _chosen(voxels: int, percent: float) -> int:
    return max(1, int(voxels * percent / 100))


def _worst_of_ranks(losses: Tensor, percent: float, ranks: Ranks) -> Tensor:
    """Indices of those of this rank's voxels that are among the worst of all ranks'.

    No rank has more of them than are chosen in all, so only that many travel.
    """
    voxels = Gathering(1, losses.numel(), losses.device, ranks)
    total = sum(voxels.counts)
    if total == 0:
        return torch.empty(0, dtype=torch.int64, device=losses.device)
    chosen = _chosen(total, percent)
    own = losses.topk(min(chosen, losses.numel()))
    candidates = voxels.with_counts([min(chosen, count) for count in voxels.counts])
    worst = candidates(own.values[None])[0].topk(chosen, sorted=False).indices
    worst = worst[(worst >= candidates.own.start) & (worst < candidates.own.stop)]
    return own.indices[worst - candidates.own.start]
