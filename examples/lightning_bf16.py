"""Train a small network with PyTorch Lightning in bf16-mixed precision and a fused loss.

    python examples/lightning_bf16.py [--steps 60]

The task is real and small: the brain in a head MR, from random 24^3 patches of the bundled image.
The only line that voxfuse adds to the module is the loss. Needs the package lightning and the extra
"demo" (nibabel).
"""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning
import nibabel
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

import voxfuse

DATA = Path(__file__).resolve().parents[1] / "data" / "head_mr"
PATCH = 24


class Patches(IterableDataset[tuple[Tensor, Tensor]]):
    """An endless stream of random patches: image (1, 24, 24, 24) in [0, 1], labels uint8."""

    def __init__(self, seed: int = 0) -> None:
        self.image = torch.from_numpy(np.asarray(nibabel.load(DATA / "ch2.nii.gz").dataobj))
        brain = np.asarray(nibabel.load(DATA / "ch2bet.nii.gz").dataobj) > 0
        self.labels = torch.from_numpy(brain.astype(np.uint8))
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self):
        while True:
            at = [
                int(torch.randint(0, n - PATCH, (1,), generator=self.generator))
                for n in self.image.shape
            ]
            window = tuple(slice(a, a + PATCH) for a in at)
            yield self.image[window].float()[None] / 255, self.labels[window][None]


class Segmentation(lightning.LightningModule):
    """A few convolutions under the Tversky loss."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv3d(1, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv3d(8, 8, 3, padding=2, dilation=2),
            nn.ReLU(),
            nn.Conv3d(8, 8, 3, padding=4, dilation=4),
            nn.ReLU(),
            nn.Conv3d(8, 2, 1),
        )
        self.loss = voxfuse.TverskyLoss(alpha=0.3, beta=0.7, batch=True)
        self.history: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        image, labels = batch
        logits = self.network(image)  # bfloat16 under autocast; the loss reads it as it is
        loss = self.loss(logits, labels)
        self.history.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


def main(arguments: Sequence[str] | None = None) -> list[float]:
    """Train; return the loss of every step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args(arguments)
    lightning.seed_everything(0, verbose=False)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    module = Segmentation()
    trainer = lightning.Trainer(
        max_steps=options.steps,
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(Patches(), batch_size=2))
    first, last = np.mean(module.history[:10]), np.mean(module.history[-10:])
    print(
        f"Tversky loss (alpha 0.3, beta 0.7), bf16-mixed, {options.steps} steps: "
        f"{first:.3f} over the first ten, {last:.3f} over the last ten"
    )
    return module.history


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
