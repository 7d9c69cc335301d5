"""Losses pickled, copied and saved, fresh and in the middle of their work: the same results."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import voxfuse
from voxfuse import functional
from voxfuse.integrations import monai, nnunet, smp

WEIGHTS = [0.5, 1.0, 2.0]
LOSSES = {
    "tversky": lambda: voxfuse.TverskyLoss(0.3, 0.7, 0.75, class_weight=WEIGHTS),
    "generalised dice": voxfuse.GeneralizedDiceLoss,
    "cross-entropy": lambda: voxfuse.CrossEntropyLoss(label_smoothing=0.1, class_weight=WEIGHTS),
    "cross-entropy map": lambda: voxfuse.CrossEntropyLoss(reduction="none"),
    "bce": lambda: voxfuse.BCELoss(pos_weight=WEIGHTS),
    "focal": lambda: voxfuse.FocalLoss(alpha=0.25),
    "top k": lambda: voxfuse.TopKLoss(20.0),
    "dice + ce": lambda: voxfuse.DiceCELoss(likelihood_weight=WEIGHTS),
    "unified focal": lambda: voxfuse.UnifiedFocalLoss(symmetric=False),
    "lovasz": lambda: voxfuse.LovaszLoss(class_weight=WEIGHTS),
    "lovasz hinge": voxfuse.LovaszHingeLoss,
    "deep supervision": lambda: voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss(), [2, 1], True),
    "function": lambda: functools.partial(functional.tversky_loss, alpha=0.3, beta=0.7),
    "lovasz function": lambda: functools.partial(functional.lovasz_softmax_loss, per_image=True),
    "function in deep supervision": lambda: voxfuse.DeepSupervisionLoss(functional.dice_ce_loss),
    "monai dice": lambda: monai.DiceLoss(softmax=True, to_onehot_y=True, weight=2.0),
    "monai dice + ce": lambda: monai.DiceCELoss(
        softmax=True, to_onehot_y=True, weight=torch.tensor(WEIGHTS)
    ),
    "monai focal": lambda: monai.FocalLoss(to_onehot_y=True, weight=WEIGHTS, alpha=0.25),
    "nnunet": lambda: nnunet.DC_and_CE_loss({"ddp": False}, {"weight": torch.tensor(WEIGHTS)}),
    "nnunet top k": lambda: nnunet.DC_and_topk_loss({"ddp": False}, {"k": 50}),
    "smp": lambda: smp.TverskyLoss("multiclass", classes=[1, 2], alpha=0.3, beta=0.7),
    "smp lovasz": lambda: smp.LovaszLoss("multiclass", per_image=True),
}


def saved(thing):
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch.save": saved,
}


def value_and_gradient(loss, logits, labels):
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    value.sum().backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LOSSES)
def test_a_copy_gives_the_same_bits_before_and_in_the_middle_of_the_work(name, way):
    loss = LOSSES[name]()
    logits, labels = torch.randn(2, 3, 4, 4, 6), torch.randint(0, 3, (2, 1, 4, 4, 6))
    others = torch.randn(1, 3, 8, 4), torch.randint(0, 3, (1, 1, 8, 4))
    fresh = WAYS[way](loss)
    expected = value_and_gradient(loss, logits, labels)
    # A step is under way: the forward pass lies behind, the backward pass ahead.
    leaf = logits.clone().requires_grad_()
    value = loss(leaf, labels)
    used = WAYS[way](loss)
    for twin in (fresh, used, WAYS[way](used)):
        for arguments in ((logits, labels), others):
            mine = value_and_gradient(twin, *arguments)
            theirs = value_and_gradient(loss, *arguments)
            assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    value.sum().backward()
    assert torch.equal(value.detach(), expected[0])
    assert torch.equal(leaf.grad, expected[1])


@pytest.mark.parametrize("way", WAYS)
def test_an_option_changed_in_a_copy_stays_in_the_copy(way):
    loss = voxfuse.TverskyLoss()
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    expected = loss(logits, labels)
    twin = WAYS[way](loss)
    twin.alpha, twin.activation = 0.9, "sigmoid"
    changed = voxfuse.TverskyLoss(0.9, activation="sigmoid")(logits, labels)
    assert torch.equal(twin(logits, labels), changed)
    assert torch.equal(loss(logits, labels), expected)


# --- Process groups ------------------------------------------------------------------------------


@pytest.fixture
def group(tmp_path):
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("PyTorch is built without gloo")
    dist.init_process_group("gloo", f"file://{tmp_path}/group", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("make", [voxfuse.DiceCELoss, voxfuse.LovaszLoss])
def test_a_deep_copy_shares_the_process_group(group, make):
    loss = voxfuse.DeepSupervisionLoss(make(process_group=group))
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    expected = loss(logits, labels)
    network = nn.ModuleDict({"loss": loss, "again": loss})
    twin = copy.deepcopy(network)
    assert twin["loss"] is twin["again"]
    assert twin["loss"].loss is not loss.loss
    assert twin["loss"].loss.process_group is group
    assert torch.equal(twin["loss"](logits, labels), expected)


@pytest.mark.parametrize("make", [voxfuse.DiceCELoss, voxfuse.LovaszLoss])
@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_a_process_group_leaves_its_process_by_name_only(group, make, way):
    with pytest.raises(TypeError, match="cannot pickle .*ProcessGroup"):
        WAYS[way](make(process_group=group))
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    loss = make(process_group="world")
    assert torch.equal(WAYS[way](loss)(logits, labels), loss(logits, labels))


# --- Fused heads ---------------------------------------------------------------------------------


class OwnConv(nn.Conv3d):
    """A user's subclass of a convolution."""


class Copied(nn.Sequential):
    """A network with its own way of being copied, as torch.fx's have one."""

    def __deepcopy__(self, memo):
        twin = type(self)(*copy.deepcopy(list(self), memo))
        memo[id(self)] = twin
        return twin


@pytest.mark.parametrize("way", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("network", [nn.Sequential, Copied])
@pytest.mark.parametrize("head", [nn.Conv3d, OwnConv])
def test_a_fused_network_is_copied_in_the_middle_of_the_work(way, network, head):
    model = network(nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), head(4, 3, 1))
    fused = voxfuse.fuse_head(model, voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss()))
    image, labels = torch.randn(1, 1, 4, 4, 4), torch.randint(0, 3, (1, 4, 4, 4))
    loss = fused(image, labels)
    twin = WAYS[way](fused)
    assert isinstance(twin, type(fused))
    assert isinstance(twin.model[2], head)
    assert torch.equal(twin(image, labels), loss)
    assert torch.equal(twin(image), fused(image))
    loss.backward()
    twin(image, labels).backward()
    for mine, theirs in zip(twin.parameters(), fused.parameters(), strict=True):
        assert mine is not theirs
        assert torch.equal(mine.grad, theirs.grad)


@pytest.mark.parametrize("way", WAYS)
def test_a_head_loss_is_copied(way):
    loss = voxfuse.HeadDiceCELoss(include_background=False, chunk_bytes=1 << 10)
    features, head = torch.randn(1, 4, 4, 4, 4), nn.Conv3d(4, 5, 1)
    labels = torch.randint(0, 5, (1, 4, 4, 4))
    expected = loss(features, head.weight, head.bias, labels)
    twin = WAYS[way](loss)
    assert twin.chunk_bytes == 1 << 10
    assert torch.equal(twin(features, head.weight, head.bias, labels), expected)
