"""The trainers, as nnU-Net finds and runs them; losses that it has built, converted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from tests.integrations.nnunet_data import (
    CONFIGURATION,
    DATASET,
    LABELS,
    STUBS,
    dataset_json,
    nnunet_folders,  # noqa: F401
    plans,
    write_preprocessed,
)
from voxfuse import cli
from voxfuse.integrations import nnunet as ours
from voxfuse.integrations.nnunet import compound

reason = "nnunetv2 is not installed, or not what it needs"
lookup = pytest.importorskip("nnunetv2.utilities.find_objects", reason=reason)
nnUNetTrainer = pytest.importorskip(
    "nnunetv2.training.nnUNetTrainer.nnUNetTrainer", reason=reason
).nnUNetTrainer
peer_dice = pytest.importorskip("nnunetv2.training.loss.dice", reason=reason)
peer = pytest.importorskip("nnunetv2.training.loss.compound_losses", reason=reason)

pytestmark = pytest.mark.usefixtures("nnunet_folders")
CPU = torch.device("cpu")
#: nnU-Net's sums in float32.
ROUNDING = dict(rtol=2e-5, atol=2e-6)
#: nnU-Net's trainers with losses of their own, and what each of them can be trained on.
VARIANTS = {
    "nnUNetTrainer": LABELS,
    "nnUNetTrainerDiceCELoss_noSmooth": LABELS,
    "nnUNetTrainerDiceLoss": ("labels", "regions"),
    "nnUNetTrainerCELoss": ("labels", "ignore"),
    "nnUNetTrainerTopk10Loss": ("labels", "ignore"),
    "nnUNetTrainerTopk10LossLS01": ("labels", "ignore"),
    "nnUNetTrainerDiceTopK10Loss": ("labels", "ignore"),
}


@pytest.fixture
def trainers(monkeypatch, capsys) -> None:
    """The folder that the command prints, where nnU-Net looks."""
    assert cli.main(["nnunet-trainer-path"]) == 0
    monkeypatch.setenv("nnUNet_extTrainer", capsys.readouterr().out.strip())


@pytest.fixture
def unnamed(monkeypatch) -> None:
    """No part of a loss that a warning has named."""
    monkeypatch.setattr(compound, "_named", set())


def trainer_of(name: str, kind: str):
    trainer = lookup.recursive_find_trainer_class_by_name(name)
    settings = {**plans(), "continue_training": False}
    return trainer(settings, CONFIGURATION, 0, dataset_json(kind), CPU)


def outputs_and_targets(kind: str) -> tuple[list, list]:
    """What a network of two scales and nnU-Net's data loader give a loss."""
    regions, ignored = "regions" in kind, "ignore" in kind
    outputs, targets = [], []
    for n in (8, 4):
        outputs.append(torch.randn(2, 3 if regions else 4, n, n, n, requires_grad=True))
        if regions:
            targets.append(torch.rand(2, 3 + ignored, n, n, n) > 0.5)
        else:
            targets.append(torch.randint(0, 4 + ignored, (2, 1, n, n, n)).float())
    return outputs, targets


def loss_and_gradients(loss, outputs: list, targets: list) -> list:
    value = loss(outputs, targets)
    needed = [x for x, weight in zip(outputs, loss.weight_factors, strict=True) if weight]
    return [value.detach(), *torch.autograd.grad(value, needed)]


# --- Training as nnU-Net runs it ------------------------------------------------------------------


@pytest.mark.parametrize("kind", LABELS)
def test_steps_are_nnunets(kind, nnunet_folders, trainers):  # noqa: F811
    write_preprocessed(nnunet_folders, kind)
    mine, theirs = trainer_of("nnUNetTrainerVoxfuse", kind), trainer_of("nnUNetTrainer", kind)
    for trainer in (mine, theirs):
        trainer.initialize()
    theirs.network.load_state_dict(mine.network.state_dict())
    training, validation = (next(loader) for loader in mine.get_dataloaders())
    results = []
    for trainer in (mine, theirs):
        trained = trainer.train_step(copy.deepcopy(training))
        trainer.on_validation_epoch_start()
        with torch.no_grad():
            # nnU-Net's writes into the target.
            results.append((trained, trainer.validation_step(copy.deepcopy(validation))))
        trainer.on_validation_epoch_end([results[-1][1]])
    for mine_found, theirs_found in zip(*results, strict=True):
        np.testing.assert_allclose(mine_found["loss"], theirs_found["loss"], **ROUNDING)
    for name in ("tp_hard", "fp_hard", "fn_hard"):
        assert np.array_equal(results[0][1][name], results[1][1][name])
    assert results[0][1]["tp_hard"].sum() > 0
    torch.testing.assert_close(
        mine.network.state_dict(), theirs.network.state_dict(), rtol=1e-4, atol=1e-5
    )
    for key in ("mean_fg_dice", "dice_per_class_or_region", "val_losses"):
        found = [trainer.logger.get_value(key, step=-1) for trainer in (mine, theirs)]
        np.testing.assert_allclose(*found, **ROUNDING)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("compiled", [False, True])
def test_loss_keeps_its_parts_and_weights(kind, compiled, trainers, monkeypatch):
    monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda self: compiled)
    mine, theirs = trainer_of("nnUNetTrainerVoxfuse", kind), trainer_of("nnUNetTrainer", kind)
    for distributed in (False, True):
        mine.is_ddp = theirs.is_ddp = distributed
        loss, built = mine._build_loss(), theirs._build_loss()
        assert type(loss) is type(built)
        assert loss.weight_factors == built.weight_factors
        parts = [compound.unwrapped(part) for part in (loss.loss.dc, built.loss.dc)]
        assert type(parts[0]) is ours.MemoryEfficientSoftDiceLoss
        assert parts[0].ddp == distributed
        for mine_part, theirs_part in (
            parts,
            (loss.loss, built.loss),
            (loss.loss.ce, built.loss.ce),
        ):
            plain = [
                {name: value for name, value in vars(part).items() if name[0] != "_"}
                for part in (mine_part, theirs_part)
            ]
            assert plain[0] == plain[1]


def test_spawned_processes_and_machines_without_voxfuse_find_them(nnunet_folders, trainers):  # noqa: F811
    """A spawned rank looks by the name alone; prediction needs the class, and its network."""
    write_preprocessed(nnunet_folders, "regions")
    trainer = trainer_of("nnUNetTrainerVoxfuseTversky", "regions")
    trainer.initialize()
    folder = nnunet_folders / "results" / DATASET
    folder /= f"nnUNetTrainerVoxfuseTversky__nnUNetPlans__{CONFIGURATION}"
    for name, content in (("plans", plans()), ("dataset", dataset_json("regions"))):
        (folder / f"{name}.json").write_text(json.dumps(content))
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    code = f"""
import os, sys
sys.modules["voxfuse"] = None
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import get_trainer_from_args
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
predictor.initialize_from_trained_model_folder({str(folder)!r}, (0,), "checkpoint_final.pth")
assert predictor.trainer_name == "nnUNetTrainerVoxfuseTversky"
cpu = torch.device("cpu")
for end in ("", "Tversky", "FocalTversky", "FBeta"):
    name = "nnUNetTrainerVoxfuse" + end
    found = get_trainer_from_args({DATASET!r}, {CONFIGURATION!r}, 0, name, device=cpu)
    assert type(found).__name__ == name

# Renamed, it needs no folder of ours.
del os.environ["nnUNet_extTrainer"]
file = {str(folder)!r} + "/fold_0/checkpoint_final.pth"
checkpoint = torch.load(file, weights_only=False)
torch.save({{**checkpoint, "trainer_name": "nnUNetTrainer"}}, file)
predictor.initialize_from_trained_model_folder({str(folder)!r}, (0,), "checkpoint_final.pth")
"""
    environment = {**os.environ, "PYTHONPATH": STUBS}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd="/")


# --- What is converted ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in VARIANTS.items() for kind in kinds]
)
def test_every_loss_that_nnunet_builds_is_converted(name, kind):
    theirs = trainer_of(name, kind)._build_loss()
    mine = copy.deepcopy(theirs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ours.fused(mine) is mine
        assert ours.fused(mine) is mine, "again"
    peers = [x for x in mine.modules() if type(x).__module__.startswith("nnunetv2")]
    assert peers == [mine], "only deep supervision"
    inputs = outputs_and_targets(kind)
    found = [loss_and_gradients(loss, *inputs) for loss in (mine, theirs)]
    torch.testing.assert_close(*found, **ROUNDING)


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize(
    ("name", "alpha", "beta", "gamma"),
    [("Tversky", 0.3, 0.7, 1), ("FocalTversky", 0.3, 0.7, 0.75), ("FBeta", 4 / 13, 9 / 13, 1)],
)
def test_tversky_trainers(name, alpha, beta, gamma, kind, trainers):
    """The Dice term alone changes: into the formula, from soft counts."""
    trainer = trainer_of(f"nnUNetTrainerVoxfuse{name}", kind)
    loss = trainer._build_loss().loss
    dice = trainer_of("nnUNetTrainerVoxfuse", kind)._build_loss().loss
    assert type(loss.dc) is ours.SoftTverskyLoss
    (output, *_), (target, *_) = outputs_and_targets(kind)
    with torch.no_grad():
        if "regions" in kind:
            p, g = output.sigmoid(), target[:, :3].float()
            mask = ~target[:, 3:] if "ignore" in kind else torch.ones_like(g[:, :1])
        else:
            p, mask = output.softmax(1)[:, 1:], (target < 4).float()
            g = torch.cat([(target == c).float() for c in range(1, 4)], 1)
        p, g, mask = p.double(), g.double(), mask.double()
        axes = (0, 2, 3, 4)
        tp = (mask * p * g).sum(axes)
        fp, fn = (mask * p * (1 - g)).sum(axes), (mask * (1 - p) * g).sum(axes)
        wanted = (1 - (2 * tp + 1e-5) / (2 * tp + 2 * alpha * fp + 2 * beta * fn + 1e-5)) ** gamma
        as_dice = 1 - (2 * tp + 1e-5) / (2 * tp + fp + fn + 1e-5)
        change = loss(output, target) - dice(output, target)
    torch.testing.assert_close(change.double(), (wanted - as_dice).mean(), **ROUNDING)


@pytest.mark.usefixtures("unnamed")
def test_what_is_not_nnunets_stays_and_is_named_once():
    class Boundary(nn.Module):
        def forward(self, output, target):
            return output.square().mean()

    class Mine(peer.DC_and_CE_loss):
        """Derived: what it adds must not be lost."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = peer.DC_and_CE_loss({"ddp": False}, {}), Boundary()
            self.c = Mine({"ddp": False}, {})

        def forward(self, output, target):
            return self.a(output, target) + self.b(output, target) + self.c(output, target)

    loss = Sum()
    (output, *_), (target, *_) = outputs_and_targets("labels")
    expected = loss(output, target)
    with pytest.warns(UserWarning, match=r"stays as it is: .*Sum, .*Boundary, .*Mine") as said:
        ours.fused(loss)
    assert len(said) == 1
    assert type(loss.a) is ours.DC_and_CE_loss
    assert type(loss.c) is Mine
    assert type(loss.c.dc) is ours.SoftDiceLoss
    torch.testing.assert_close(loss(output, target), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.fused(loss)


@pytest.mark.usefixtures("unnamed")
def test_a_foreign_dc_is_named_once():
    """Only one of the two names was replaced: right, but two passes and no kernel for one."""
    mine = ours.DC_and_CE_loss({"ddp": False}, {}, dice_class=peer_dice.MemoryEfficientSoftDiceLoss)
    (output, *_), (target, *_) = outputs_and_targets("labels")
    with pytest.warns(UserWarning, match=r"dc is a nnunetv2.*MemoryEfficientSoftDiceLoss") as said:
        before = mine(output, target)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mine(output, target)
    torch.testing.assert_close(ours.fused(mine)(output, target), before)
    assert type(mine.dc) is ours.MemoryEfficientSoftDiceLoss


def test_errors_name_the_argument():
    with pytest.raises(TypeError, match="loss: got function"):
        ours.fused(lambda output, target: 0)
    loss = peer.DC_and_CE_loss({"ddp": False}, {})
    with pytest.raises(ValueError, match="beta: got -1"):
        ours.fused(loss, beta=-1)
    with pytest.raises(ValueError, match="gamma: got 0"):
        ours.fused(loss, gamma=0)
    with pytest.raises(ValueError, match="alpha: the loss has no Dice term"):
        ours.fused(loss.ce, alpha=0.3)


@pytest.mark.parametrize("gamma", [0.75, 2.0])
def test_tversky_by_pytorch_is_the_operators(gamma):
    """What the operators do not read (here: no spatial axis) is computed from counts."""
    options = dict(ddp=False, alpha=0.3, beta=0.7, gamma=gamma, batch_dice=True)
    loss = ours.SoftTverskyLoss(**options)
    input = torch.rand(2, 3, 5, dtype=torch.float64, requires_grad=True)
    target = torch.rand(2, 3, 5).round()
    target[:, 2] = input.detach()[:, 2] = 1  # nothing to gain: slope 0
    results = []
    for points in (lambda x: x, lambda x: x.transpose(1, 2).reshape(10, 3)):
        value = loss(points(input), points(target))
        results.append((value.double(), *torch.autograd.grad(value, input)))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-8)
