"""117 classes: the largest patch that trains within a memory budget, with and without logits.

A small 3D U-Net learns the 116 brain regions of data/head_mr. Its patch grows until one training
step (forward, Dice + cross-entropy, backward) takes more memory than the budget: once with the
last 1x1x1 convolution and the loss apart, with MONAI's loss (where MONAI is installed) and with
this package's, and once with the two fused by voxfuse.fuse_head, which never makes the logits.

    python examples/many_classes.py                  # 2 GiB; some minutes
    python examples/many_classes.py --budget-gib 6
    python examples/many_classes.py --quick          # 0.125 GiB; seconds
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import many_labels
import measure
import nibabel
import torch
from torch import Tensor, nn

import voxfuse

IMAGE = Path(__file__).resolve().parent.parent / "data" / "head_mr" / "ch2.nii.gz"
CLASSES = many_labels.CLASSES

Step = Callable[[Tensor, Tensor], Tensor]


def block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, stride=stride, padding=1),
        nn.InstanceNorm3d(outputs, affine=True),
        nn.LeakyReLU(inplace=True),
    )


class SmallUNet(nn.Module):
    """Two resolutions, ``width`` features before the last layer."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.fine = block(1, width)
        self.coarse = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))
        self.up = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.merge = block(2 * width, width)
        self.head = nn.Conv3d(width, classes, 1)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.fine(image)
        merged = self.merge(torch.cat([self.up(self.coarse(fine)), fine], 1))
        logits: Tensor = self.head(merged)
        return logits


def training_steps() -> dict[str, Step]:
    """What computes the loss from image and labels; all start from the same parameters."""

    def network() -> SmallUNet:
        torch.manual_seed(0)
        return SmallUNet(CLASSES)

    def apart(loss: Step) -> Step:
        net = network()
        return lambda image, labels: loss(net(image), labels)

    steps: dict[str, Step] = {}
    if importlib.util.find_spec("monai") is not None:
        from monai.losses import DiceCELoss

        steps["convolution, MONAI's loss"] = apart(DiceCELoss(softmax=True, to_onehot_y=True))
    steps["convolution, voxfuse's loss"] = apart(voxfuse.DiceCELoss())
    steps["fused"] = voxfuse.fuse_head(network(), voxfuse.DiceCELoss())
    return steps


def centre(volume: Tensor, edge: int) -> Tensor:
    """(1, 1, edge, edge, edge) around the middle of the volume."""
    for axis, extent in enumerate(volume.shape):
        volume = volume.narrow(axis, (extent - edge) // 2, edge)
    return volume.contiguous()[None, None]


@dataclass
class Measured:
    """One training step."""

    edge: int
    bytes: int
    seconds: float
    loss: float


def train(step: Step, image: Tensor, regions: Tensor, edge: int) -> Measured:
    """One forward and backward pass on the patch of this edge."""
    patch, labels = centre(image, edge), centre(regions, edge)
    cpu = torch.device("cpu")
    watch = measure.Stopwatch(cpu)
    with measure.peak_memory(cpu) as peak, watch:
        loss = step(patch, labels)
        loss.backward()
    if peak.extra_bytes is None:
        raise SystemExit(f"memory: {measure.how_memory_is_measured(cpu)}")
    return Measured(edge, peak.extra_bytes, watch.seconds, loss.item())


def largest(
    step: Step, image: Tensor, regions: Tensor, budget: int, first: int, grow: int
) -> tuple[Measured, Measured | None]:
    """The last patch within ``budget`` bytes, and the first beyond it (None: the whole image).

    Raises:
        SystemExit: the first patch is beyond the budget already.
    """
    train(step, image, regions, first)  # threads, libraries, gradients of the parameters
    best = train(step, image, regions, first)
    if best.bytes > budget:
        raise SystemExit(
            f"--budget-gib: a patch of {first}^3 takes {best.bytes / 2**30:.2f} GiB already"
        )
    while best.edge + grow <= min(image.shape):
        tried = train(step, image, regions, best.edge + grow)
        if tried.bytes > budget:
            return best, tried
        best = tried
    return best, None


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-gib", type=float, help="for one training step (default 2)")
    parser.add_argument("--quick", action="store_true", help="a small budget, coarse steps")
    options = parser.parse_args(arguments)
    gib = options.budget_gib or (0.125 if options.quick else 2.0)
    first, grow = (16, 8) if options.quick else (32, 8)
    measure.return_large_blocks()
    image = torch.from_numpy(nibabel.load(IMAGE).get_fdata(dtype="float32")) / 255
    regions = many_labels.read_regions().to(torch.uint8)
    print(
        f"{CLASSES} classes, {gib:g} GiB for a training step beyond image, labels and parameters\n"
        f"{'':<30}{'largest patch':>14}{'voxels':>12}{'peak':>12}{'step':>9}{'next patch':>26}"
    )
    for name, step in training_steps().items():
        best, beyond = largest(step, image, regions, int(gib * 2**30), first, grow)
        after = (
            f"{beyond.edge}^3 takes {beyond.bytes / 2**20:.0f} MiB" if beyond else "the whole image"
        )
        print(
            f"{name:<30}{f'{best.edge}^3':>14}{best.edge**3:>12,}{best.bytes / 2**20:>8.0f} MiB"
            f"{best.seconds:>7.1f} s{after:>26}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
