"""process_group=: the loss and the gradients of one process that holds the whole batch."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

import voxfuse
from tests.ranks import Check, launch

pytestmark = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch is built without gloo"
)
SAMPLES = 5
LOSSES = {
    "tversky": lambda **k: voxfuse.TverskyLoss(0.3, 0.7, 0.75, batch=True, **k),
    "tversky terms": lambda **k: voxfuse.TverskyLoss(batch=True, reduction="none", **k),
    "generalised dice": lambda **k: voxfuse.GeneralizedDiceLoss(batch=True, **k),
    "mcc": lambda **k: voxfuse.MCCLoss(batch=True, **k),
    "dice + ce": lambda **k: voxfuse.DiceCELoss(batch=True, include_background=False, **k),
    "cross-entropy": lambda **k: voxfuse.CrossEntropyLoss(class_weight=[1.0, 2.0, 3.0], **k),
    "focal": lambda **k: voxfuse.FocalLoss(activation="sigmoid", **k),
    "bce": lambda **k: voxfuse.BCELoss(pos_weight=[1.0, 2.0, 3.0], **k),
    "summed cross-entropy": lambda **k: voxfuse.CrossEntropyLoss(reduction="sum", **k),
    "a function of sums": lambda **k: voxfuse.SumsLoss(lambda s: 1 - s.pooled().dice().mean(), **k),
    "top k": lambda **k: voxfuse.TopKLoss(20.0, class_weight=[1.0, 2.0, 3.0], **k),
    "top k of most": lambda **k: voxfuse.TopKLoss(90.0, label_smoothing=0.1, **k),
    "lovasz": lambda **k: voxfuse.LovaszLoss(class_weight=[1.0, 2.0, 3.0], **k),
    "lovasz hinge": lambda **k: voxfuse.LovaszHingeLoss(classes="present", **k),
}


def whole_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SAMPLES, 3, 6, 4, 4, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 3, (SAMPLES, 6, 4, 4), generator=generator)


def value_and_gradient(loss: Any, logits: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    value.backward(torch.arange(1.0, 1 + value.numel(), dtype=value.dtype).reshape(value.shape))
    return value.detach(), leaf.grad


def ranks_equal_one_process(rank: int, world: int) -> None:
    """Every rank has some of the samples, not equally many."""
    logits, labels = whole_batch()
    bounds = [round(SAMPLES * r / world) for r in range(world + 1)]
    own = slice(bounds[rank], bounds[rank + 1])
    for name, make in LOSSES.items():
        expected, gradient = value_and_gradient(make(), logits, labels)
        for group in ("world", dist.group.WORLD):
            value, mine = value_and_gradient(make(process_group=group), logits[own], labels[own])
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=0, msg=name)
            torch.testing.assert_close(mine, gradient[own], rtol=1e-10, atol=1e-18, msg=name)
        averaged = make(process_group="world", ddp_average=True)
        _, mine = value_and_gradient(averaged, logits[own], labels[own])
        torch.testing.assert_close(mine, world * gradient[own], rtol=1e-10, atol=1e-18, msg=name)


def sums_of_all_ranks(rank: int, world: int) -> None:
    """What return_sums hands out is what the loss was computed from."""
    logits, labels = whole_batch()
    own = slice(0, 2) if rank == 0 else slice(2 * rank, SAMPLES)
    _, whole = voxfuse.DiceCELoss(batch=True)(logits, labels, return_sums=True)
    loss = voxfuse.DiceCELoss(batch=True, process_group="world")
    _, sums = loss(logits[own].requires_grad_(), labels[own], return_sums=True)
    for a, b in zip(sums[:4], whole.pooled()[:4], strict=True):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    certain = voxfuse.SumsLoss(
        lambda sums: sums.NLL.sum(), activation="none", process_group="world"
    )
    probabilities = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).double()
    assert certain(1 - probabilities[own].requires_grad_(), labels[own]) == torch.inf
    loss.class_weight = torch.ones(len(labels[own]), 3)
    with pytest.raises(ValueError, match="class_weight: one for every sample cannot be pooled"):
        loss(logits[own], labels[own])


def a_volume_split_along_space(rank: int, world: int) -> None:
    logits, labels = whole_batch()
    extent = logits.shape[2] // world
    own = slice(rank * extent, (rank + 1) * extent)
    losses = (
        voxfuse.TverskyLoss,
        voxfuse.DiceCELoss,
        voxfuse.GeneralizedDiceLoss,
        functools.partial(voxfuse.LovaszLoss, per_image=True),
    )
    for make in losses:
        expected, gradient = value_and_gradient(make(), logits, labels)
        loss = make(process_group="world")
        value, mine = value_and_gradient(loss, logits[:, :, own], labels[:, own])
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(mine, gradient[:, :, own], rtol=1e-10, atol=1e-18)


def deep_supervision(rank: int, world: int) -> None:
    """process_group and backend of the loss inside count at every level."""
    logits, labels = whole_batch()
    own = slice(0, 2) if rank == 0 else slice(2 * rank, SAMPLES)
    outputs = [logits, logits[..., ::2, ::2, ::2]]

    def value_and_gradients(inner: Any, part: slice) -> tuple[Any, ...]:
        leaves = [x[part].clone().requires_grad_() for x in outputs]
        value = voxfuse.DeepSupervisionLoss(inner)(leaves, labels[part])
        return value.detach(), *torch.autograd.grad(value, leaves)

    expected, *gradients = value_and_gradients(voxfuse.DiceCELoss(batch=True), slice(None))
    for backend in ("auto", "reference"):
        inner = voxfuse.DiceCELoss(batch=True, process_group="world", backend=backend)
        value, *mine = value_and_gradients(inner, own)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
        for a, b in zip(mine, gradients, strict=True):
            torch.testing.assert_close(a, b[own], rtol=1e-10, atol=1e-18)


def refusals(rank: int, world: int) -> None:
    """What ranks cannot do together is an error on every one of them, not a hang."""
    logits, labels = whole_batch()
    own = slice(0, 1 + rank)
    with pytest.raises(ValueError, match=r"process_group: with per_image .* batches of \[1, 2\]"):
        voxfuse.LovaszLoss(per_image=True, process_group="world")(logits[own], labels[own])
    step = torch.compile(
        voxfuse.LovaszLoss(process_group="world"), fullgraph=True, backend="aot_eager"
    )
    for loss in (voxfuse.CrossEntropyLoss, voxfuse.BCELoss, voxfuse.FocalLoss):
        with pytest.raises(ValueError, match="process_group: reduction='none' gives every voxel"):
            loss(reduction="none", process_group="world")(logits, labels)
    with pytest.raises(RuntimeError, match="which torch.compile cannot trace"):
        step(logits, labels)
    for make in (voxfuse.DiceLoss, voxfuse.TopKLoss, voxfuse.LovaszLoss):
        loss = make(process_group="world")
        with pytest.raises(RuntimeError, match="process_group: .* inside torch.func transforms"):
            torch.func.grad(loss)(logits, labels)


def parameters_under_ddp(rank: int, world: int) -> None:
    """ddp_average undoes the averaging of DistributedDataParallel."""
    logits, labels = whole_batch()
    logits, labels = logits[:4].float(), labels[:4]

    def network() -> torch.nn.Module:
        torch.manual_seed(0)
        return torch.nn.Conv3d(3, 3, 1)

    single = network()
    voxfuse.DiceCELoss(batch=True)(single(logits), labels).backward()
    model = torch.nn.parallel.DistributedDataParallel(network())
    own = slice(rank * 4 // world, (rank + 1) * 4 // world)
    loss = voxfuse.DiceCELoss(batch=True, process_group="world", ddp_average=True)
    loss(model(logits[own]), labels[own]).backward()
    for mine, expected in zip(model.parameters(), single.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, expected.grad, rtol=1e-5, atol=1e-8)


def a_compiled_step(rank: int, world: int) -> None:
    logits, labels = whole_batch()
    own = slice(2 * rank, 2 * rank + 2)
    loss = voxfuse.DiceCELoss(batch=True, process_group="world", ddp_average=True)
    expected, gradient = value_and_gradient(loss, logits[own], labels[own])
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    value, mine = value_and_gradient(step, logits[own], labels[own])
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(mine, gradient, rtol=1e-12, atol=0)


CHECKS: tuple[Check, ...] = (
    ranks_equal_one_process,
    a_volume_split_along_space,
    parameters_under_ddp,
)


def test_two_ranks(tmp_path):
    launch(2, tmp_path, (*CHECKS, sums_of_all_ranks, deep_supervision, refusals, a_compiled_step))


@pytest.mark.slow
def test_four_ranks(tmp_path):
    launch(4, tmp_path, (ranks_equal_one_process, parameters_under_ddp))


def test_modules_are_made_and_pickled_before_the_group_exists():
    loss = pickle.loads(pickle.dumps(voxfuse.TverskyLoss(process_group="world", batch=True)))
    logits, labels = whole_batch()
    with pytest.raises(RuntimeError, match="process_group: 'world' needs torch.distributed"):
        loss(logits, labels)


def test_bad_groups():
    logits, labels = whole_batch()
    with pytest.raises(ValueError, match="process_group: got 'all', expected None, 'world'"):
        voxfuse.TverskyLoss(process_group="all")(logits, labels)
