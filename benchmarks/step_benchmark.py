"""A whole training step of a MONAI UNet: what a user feels of the loss in time and memory."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.losses import draw


def competitors() -> tuple[dict[str, Callable[[Tensor, Tensor], Tensor]], dict[str, str]]:
    """The Dice + cross-entropy losses of a training script, and why one is missing."""
    import voxfuse

    found: dict[str, Any] = {"voxfuse DiceCE": voxfuse.DiceCELoss()}
    missing = {}
    from monai.losses import DiceCELoss

    found["monai DiceCE"] = DiceCELoss(softmax=True, to_onehot_y=True)
    if importlib.util.find_spec("nnunetv2") is None:
        missing["nnunet DC_and_CE, compiled"] = "the package nnunetv2 is not installed"
    else:
        from nnunetv2.training.loss.compound_losses import DC_and_CE_loss
        from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

        loss = DC_and_CE_loss(
            {"batch_dice": True, "smooth": 1e-5, "do_bg": False, "ddp": False},
            {},
            dice_class=MemoryEfficientSoftDiceLoss,
        )
        # As nnU-Net's trainer does.
        loss.dc = torch.compile(loss.dc)
        found["nnunet DC_and_CE, compiled"] = loss
    return found, missing


def network(classes: int) -> torch.nn.Module:
    from monai.networks.nets import UNet

    torch.manual_seed(0)
    return UNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=classes,
        channels=(16, 32, 64, 128),
        strides=(2, 2, 2),
        num_res_units=1,
    )


def step(
    net: torch.nn.Module, loss: Callable[[Tensor, Tensor], Tensor], image: Tensor, labels: Tensor
) -> Callable[[], Any]:
    def call() -> Any:
        net.zero_grad(set_to_none=True)
        loss(net(image), labels).backward()

    return call


def largest_patch(
    classes: int, loss: Callable[[Tensor, Tensor], Tensor], limit: int, device: torch.device
) -> dict[str, int]:
    """Grow the cubic patch by 16 until a step's peak exceeds ``limit`` bytes."""
    net = network(classes).to(device)
    best = {"patch": 0, "peak_bytes": 0}
    size = 48
    while True:
        image = torch.randn(1, 1, size, size, size, device=device)
        _, labels = draw((1, classes, size, size, size), torch.float32, device)
        peak = harness.peak_extra_bytes(step(net, loss, image, labels), device)
        if peak > limit:
            return best
        best = {"patch": size, "peak_bytes": peak}
        size += 16


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Time and weigh steps at every number of classes."""
    if importlib.util.find_spec("monai") is None:
        raise SystemExit("the step benchmark trains a MONAI UNet: pip install monai")
    device = torch.device(options.device)
    size = 32 if options.quick else options.patch
    losses, missing = competitors()
    for name, why in missing.items():
        print(f"{name} left out: {why}")
    results: dict[str, Any] = {
        "benchmark": "step",
        "machine": harness.machine(device),
        "patch": size,
        "classes": [],
    }
    clock = harness.Clock(device)
    for classes in options.classes:
        net = network(classes).to(device)
        image = torch.randn(1, 1, size, size, size, device=device)
        _, labels = draw((1, classes, size, size, size), torch.float32, device)
        functions = {name: step(net, loss, image, labels) for name, loss in losses.items()}
        harness.allocate_fresh()
        timings = harness.interleave(functions, clock, options.rounds, options.budget)
        row: dict[str, Any] = {"classes": classes, "losses": {}}
        print(f"\n{classes} classes, {size}^3 patch, batch 1: one training step of a MONAI UNet")
        for name, function in functions.items():
            summary: dict[str, Any] = timings[name].summary()
            summary["peak_extra_bytes"] = harness.peak_extra_bytes(function, device)
            line = (
                f"  {name:<28}{summary['min_ms']:>10.1f} ms"
                f"{summary['peak_extra_bytes'] / 2**20:>10.0f} MiB at the peak"
            )
            if options.limit_gib:
                found = largest_patch(classes, losses[name], int(options.limit_gib * 2**30), device)
                summary["largest"] = {**found, "limit_gib": options.limit_gib}
                line += f"   largest patch in {options.limit_gib:g} GiB: {found['patch']}^3"
            print(line)
            row["losses"][name] = summary
        results["classes"].append(row)
    return results
