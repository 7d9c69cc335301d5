"""Losses under torch.func and torch.compile, and how often they read the voxels."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

import voxfuse
from tests.losses.cases import (
    EVERY_LOSS,
    MODULES,
    batch,
    every_loss,
)
from voxfuse.losses.plan import Recipe
from voxfuse.ops.ratio_loss import ratio_loss

# --- What is kept, and how often the voxels are read ---------------------------------------------


@pytest.mark.parametrize("name", ["tversky", "dice + ce", "tversky + focal", "unified focal"])
def test_a_compound_is_one_pass_and_keeps_no_volume(name, monkeypatch):
    logits, labels = batch(spatial=(16, 16, 16))
    leaf = logits.requires_grad_()
    kept: list[Tensor] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with keep, torch.profiler.profile() as profile:
        loss = MODULES[name]()(leaf, labels)
        loss.backward()
    ours = [e.name for e in profile.events() if e.name.startswith("voxfuse::")]
    assert sorted(set(ours)) == [
        "voxfuse::ratio_loss",
        "voxfuse::ratio_loss_backward",
        "voxfuse::soft_confusion",
        "voxfuse::soft_confusion_backward",
    ]
    assert len(ours) == 4
    volumes = [t for t in kept if t.numel() >= labels.numel()]
    assert {t.data_ptr() for t in volumes} <= {leaf.data_ptr(), labels.data_ptr()}


# --- Function transforms -------------------------------------------------------------------------


@every_loss
def test_function_transforms_equal_autograd(name):
    """torch.func.grad, and vmap with and without it, over logits, labels and a voxel weight."""
    loss = EVERY_LOSS[name]()
    generator = torch.Generator().manual_seed(3)
    logits, labels = batch(spatial=(4, 3))
    logits = torch.stack([logits, 2 - logits, 3 * logits], 1)  # mapped over axis 1
    labels = torch.stack([labels, labels.flip(1), labels.flip(0)])
    weight = torch.randint(0, 3, (2, 4, 3), generator=generator).float()

    def value(z, y, w):
        return loss(z, y, w).sum()

    expected, slopes = [], []
    for k in range(3):
        leaf = logits[:, k].clone().requires_grad_()
        expected.append(value(leaf, labels[k], weight))
        slopes += torch.autograd.grad(expected[-1], leaf)
    got = torch.func.grad(value)(logits[:, 0], labels[0], weight)
    torch.testing.assert_close(got, slopes[0], rtol=0, atol=0)
    dims = (1, 0, None)
    got = torch.func.vmap(value, dims)(logits, labels, weight)
    torch.testing.assert_close(got, torch.stack(expected).detach(), rtol=1e-6, atol=0)
    got = torch.func.vmap(torch.func.grad(value), dims)(logits, labels, weight)
    torch.testing.assert_close(got, torch.stack(slopes), rtol=1e-6, atol=1e-9)
    got = torch.func.grad(lambda z: torch.func.vmap(value, dims)(z, labels, weight).sum())(logits)
    torch.testing.assert_close(got, torch.stack(slopes, 1), rtol=1e-6, atol=1e-9)
    got = torch.func.jacrev(value)(logits[:, 0], labels[0], weight)
    torch.testing.assert_close(got, slopes[0], rtol=0, atol=0)


def test_vmap_without_a_warning():
    """PyTorch warns of operators that have no rule, on the standard error of the process."""
    code = (
        "import torch, voxfuse\n"
        "z, y = torch.randn(4, 2, 3, 5), torch.randint(0, 3, (4, 2, 5))\n"
        "for make in (voxfuse.DiceCELoss, voxfuse.TopKLoss, voxfuse.LovaszLoss):\n"
        "    torch.func.vmap(torch.func.grad(make()))(z, y)\n"
        "    torch.func.vmap(make())(z, y)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert "batching rule" not in done.stderr


def test_labels_are_checked_under_transforms():
    logits, labels = batch()
    for name in ("tversky", "top k", "lovasz"):
        loss = MODULES[name]()
        with pytest.raises(ValueError, match=r"target: label \d is outside \[0, 3\)"):
            torch.func.grad(lambda z, loss=loss: loss(z, labels + 5))(logits)
    with pytest.raises(ValueError, match="in_dims: .* no result for a mapped axis of length 0"):
        torch.func.vmap(voxfuse.DiceLoss())(logits[None][:0], labels[None][:0])


@every_loss
def test_forward_mode_and_second_derivatives_are_refused(name):
    """A tangent must not be dropped, nor a second derivative be 0."""
    logits, labels = batch()
    loss = EVERY_LOSS[name]()

    def value(z):
        return loss(z, labels).sum()

    with pytest.raises(RuntimeError, match="forward-mode derivatives .* are not implemented"):
        torch.func.jvp(value, (logits,), (logits,))
    with forward_ad.dual_level():
        with pytest.raises(RuntimeError, match="forward-mode derivatives .* are not implemented"):
            value(forward_ad.make_dual(logits, logits))
        value(logits)
    with pytest.raises(RuntimeError, match="second derivatives .*not implemented"):
        torch.func.grad(lambda z: torch.func.grad(value)(z).square().sum())(logits)


def test_operators_refuse_forward_mode():
    """A tangent that an operator drops would count as 0."""
    logits, labels = batch()
    stats = voxfuse.soft_confusion(logits, labels)
    calls = (
        (lambda z: voxfuse.soft_confusion(z, labels), logits),
        (ratio_loss, stats),
        (lambda p: voxfuse.overlap_add(p, [[0, 2]], (6,), "hann"), torch.randn(2, 1, 4)),
    )
    for call, value in calls:
        with forward_ad.dual_level():
            with pytest.raises(RuntimeError, match="forward-mode derivatives .* not implemented"):
                call(forward_ad.make_dual(value, value))
            call(value)


def test_a_module_with_a_loss_exports():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Conv3d(3, 3, 1)
            self.loss = voxfuse.DiceCELoss(class_weight=[1.0, 2.0, 3.0])

        def forward(self, x, y):
            return self.loss(self.head(x), y)

    net = Net()
    depth = torch.export.Dim("depth", min=2, max=64)
    program = torch.export.export(net, batch(), dynamic_shapes=({2: depth}, {1: depth}))
    other = batch(spatial=(9, 4, 3))
    torch.testing.assert_close(program.module()(*other), net(*other), rtol=0, atol=0)


@pytest.mark.parametrize("spatial", [(4, 3), (0,), (1, 1, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_of_the_composed_operators(spatial, masked):
    """Schema, fake, autograd and dynamic shapes of what looks at single voxels."""
    logits, labels = batch(spatial=spatial)
    weight = torch.rand(2, *spatial) if masked else None
    classes = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    leaf = logits.requires_grad_()
    likelihood = (classes, None, 2, 7 if masked else None, 0.0, 1.0, 0.1)
    operators = torch.ops.voxfuse
    check = torch.library.opcheck
    check(operators.likelihood_map.default, (leaf, labels, weight, *likelihood))
    check(operators.worst_voxels.default, (logits.detach(), labels, weight, *likelihood, 10.0))
    sort = (2, False, [0, 2], True, masked, None, classes)
    check(operators.lovasz.default, (leaf, labels, weight, *sort, True))
    check(operators.lovasz.default, (logits.detach(), labels, weight, *sort, False))


@every_loss
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_batch_without_samples(name, backend):
    logits, labels = torch.zeros(0, 3, 4, 5), torch.zeros(0, 4, 5, dtype=torch.int64)
    loss = EVERY_LOSS[name]()
    getattr(loss, "loss", loss).backend = backend
    leaf = logits.requires_grad_()
    value = loss(leaf, labels)
    value.sum().backward()
    assert leaf.grad.shape == leaf.shape
    assert bool(value.isfinite().all())


def test_recipes_are_made_once():
    loss = voxfuse.DiceCELoss()
    logits, labels = batch()
    loss(logits, labels)
    recipe = loss._recipe
    assert isinstance(recipe, Recipe)
    plan = recipe.plan(3, False)
    loss(logits, labels)
    assert loss._recipe is recipe
    assert recipe.plan(3, False) is plan


# --- Compilation ---------------------------------------------------------------------------------


@every_loss
def test_a_step_compiles_into_one_graph(name):
    """One graph for the first size and one for any, whatever changes: the patch or the batch."""
    loss = EVERY_LOSS[name]()
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(loss, fullgraph=True, backend=graphs)
    for extent, samples in ((5, 2), (6, 3), (7, 5), (8, 4), (9, 7)):
        logits, labels = batch(spatial=(extent, extent + 1, extent + 2))
        logits = logits.repeat(4, 1, 1, 1, 1)[:samples]
        labels = labels.repeat(4, 1, 1, 1)[:samples]
        mine, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        value, expected = step(mine, labels), loss(other, labels)
        slope = torch.randn(expected.shape)
        value.backward(slope)
        expected.backward(slope)
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)
    assert graphs.frame_count <= 2


def test_a_loss_can_be_made_inside_a_compiled_function():
    logits, labels = torch.randn(1, 3, 6, 5), torch.randint(0, 3, (1, 6, 5))

    def made(input, target):
        return voxfuse.DiceCELoss(class_weight=[1.0, 2.0, 3.0])(input, target)

    compiled = torch.compile(made, backend="eager", fullgraph=True)
    assert torch.equal(compiled(logits, labels), made(logits, labels))


@every_loss
def test_a_compiled_step_of_half_precision_logits_and_a_mask(name):
    dtype = torch.bfloat16
    loss = EVERY_LOSS[name]()
    logits, labels = batch(dtype=dtype)
    mask = torch.rand(2, 5, 4, 3, generator=torch.Generator().manual_seed(0)) < 0.7
    torch._dynamo.reset()
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, expected = step(mine, labels, mask), loss(other, labels, mask)
    value.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    assert mine.grad.dtype == dtype
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_step_on_a_chosen_backend_compiles_into_one_graph(backend):
    if not voxfuse.backends()[backend].available:
        pytest.skip(f"the {backend} backend is not available: {voxfuse.backends()[backend].reason}")
    logits, labels = batch()
    loss = voxfuse.TverskyCELoss(backend=backend)
    torch._dynamo.reset()
    step = torch.compile(loss, fullgraph=True, backend="aot_eager")
    mine, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    value, expected = step(mine, labels), loss(other, labels)
    value.backward()
    expected.backward()
    torch.testing.assert_close(value, expected, rtol=0, atol=0)
    torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=0)


def test_a_compiled_step_on_a_missing_backend_says_why():
    logits, labels = batch()
    torch._dynamo.reset()
    step = torch.compile(voxfuse.DiceLoss(backend="cuda"), fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="backend: 'cuda'"):
        step(logits, labels)


@pytest.mark.parametrize("name", ["top k", "lovasz"])
def test_the_default_compiler_generates_working_code(name):
    logits, labels = batch()
    loss = EVERY_LOSS[name]()
    torch._dynamo.reset()
    step = torch.compile(lambda z, y: loss(2 * z, y).sum(), fullgraph=True)
    mine, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    step(mine, labels).backward()
    loss(2 * other, labels).sum().backward()
    torch.testing.assert_close(mine.grad, other.grad)
