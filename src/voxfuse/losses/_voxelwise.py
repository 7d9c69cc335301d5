"""A cross-entropy or focal loss voxel by voxel: ``reduction="none"`` and the choice of the top k.

Only one single-channel volume is made; the classes of a block of voxels exist at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from voxfuse.losses._ranks import Gathering, Ranks
from voxfuse.losses._recipe import Plan
from voxfuse.ops.ratio_loss import once_differentiable
from voxfuse.ops.soft_confusion import is_dense
from voxfuse.reference.soft_confusion import SOFTMAX, label_error, probabilities, voxels

#: Elements (voxels x classes) of a block.
BLOCK_ELEMENTS = 1 << 16


def blocks(count: int, classes: int) -> Iterator[slice]:
    """Slices of the voxels that bound the memory of what is computed with all their classes."""
    step = max(1024, BLOCK_ELEMENTS // classes)
    if torch.compiler.is_compiling():
        step = max(count, 1)  # the compiler fuses it, and a loop would tie the graph to the size
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def flat(tensor: Tensor, input: Tensor) -> Tensor:
    """View or copy (B, [k,] *spatial) as (B, [k,] V)."""
    spatial = input.ndim - 2
    return tensor.flatten(tensor.ndim - spatial) if spatial else tensor.unsqueeze(-1)


def likelihood_map(
    plan: Plan,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    on: Tensor | None,
    off: Tensor | None,
) -> Tensor:
    """Return ``sum_c (on_c nll_scale NLL_c + off_c off_scale OFF_c)`` of every voxel, (B, V)."""
    _, likelihood, _, ignore_index, gamma, _ = plan.confusion
    on_scale, off_scale, _ = plan.likelihood
    batch, classes = input.shape[:2]
    values, g = flat(input, input), flat(target, input)
    w = None if weight is None else flat(weight, input)
    dtype = torch.float64 if input.dtype == torch.float64 else torch.float32
    count = values.shape[-1]
    result = torch.empty(batch, count, dtype=dtype, device=input.device)
    on_weight, off_weight = (
        torch.ones(classes, dtype=dtype, device=input.device) if x is None else x.to(dtype)
        for x in (on, off)
    )
    dense = is_dense(input, target)
    plain = likelihood == SOFTMAX and gamma == 0 and off_scale == 0 and not dense
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
            if likelihood == SOFTMAX:
                other = r.minus_log
            else:
                other = (1.0 if gamma == 0 else r.p**gamma) * r.minus_log_complement
            total = total + _weighted(off_scale * off_weight, 1 - piece.target, other)
        result[:, block] = (total * piece.weight[:, 0]).masked_fill(~piece.included[:, 0], 0)
    return result


def _cross_entropy(
    values: Tensor,
    labels: Tensor,
    weight: Tensor | None,
    class_weight: Tensor,
    ignore_index: int | None,
) -> Tensor:
    """The common case, (B, C, n) logits and labels, at the speed of PyTorch's own."""
    classes = values.shape[1]
    labels = labels.reshape(values.shape[0], -1).to(torch.int64)
    valid = (labels >= 0) & (labels < classes)
    excluded = ~valid if ignore_index is None else ~valid | (labels == ignore_index)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = ~valid if ignore_index is None else ~valid & (labels != ignore_index)
        if bool(wrong.any()):
            raise RuntimeError(label_error(int(labels[wrong][0]), classes, ignore_index))
    limit = torch.finfo(class_weight.dtype).max
    result = torch.nn.functional.cross_entropy(
        values.to(class_weight.dtype).clamp(-limit, limit),
        labels.masked_fill(excluded, -100),
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


class VoxelwiseLikelihood(torch.autograd.Function):
    """The map, differentiated by the fused backward pass with the incoming gradient as weight."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        operators: Any,
        plan: Plan,
        weights: tuple[Tensor | None, ...],
    ) -> Tensor:
        result = likelihood_map(plan, input, target, weight, weights[1], weights[2])
        ctx.save_for_backward(input, target, weight)
        ctx.call = operators, plan, weights
        return result.reshape(input.shape[0], *input.shape[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        input, target, weight = ctx.saved_tensors
        operators, plan, weights = ctx.call
        batch, classes = input.shape[:2]
        cotangents = torch.zeros(batch, classes, 8, dtype=torch.float64, device=input.device)
        for column, factor, scale in zip((3, 4), weights[1:], plan.likelihood, strict=False):
            cotangents[..., column] = scale if factor is None else scale * factor
        share = grad.detach()
        if weight is not None:
            # An excluded voxel keeps its weight of 0 whatever comes in.
            share = share * weight.reshape(share.shape)
        gradient = operators.confusion_backward(
            cotangents, input, target, share, *plan.confusion[:5]
        )
        return once_differentiable(gradient, input), None, None, None, None, None


@torch.no_grad()
def worst_voxels(
    percent: float,
    plan: Plan,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    weights: tuple[Tensor | None, ...],
    ranks: Ranks | None = None,
) -> Tensor:
    """Weights (B, *spatial) that keep the ``percent`` of the batch's voxels of largest loss.

    The batch is that of all ``ranks``.
    """
    losses = likelihood_map(plan, input, target, weight, weights[1], weights[2]).flatten()
    kept = torch.zeros_like(losses, dtype=torch.bool)
    if ranks is not None:
        kept[_worst_of_ranks(losses, percent, ranks)] = True
    elif losses.numel():
        kept[losses.topk(_chosen(losses.numel(), percent), sorted=False).indices] = True
    kept = kept.reshape(input.shape[0], *input.shape[2:])
    return kept if weight is None else kept * weight.reshape(kept.shape)


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
