"""The pretrained 3D U-Net for brain extraction whose weights are in data/skull_strip_unet.

A network that others trained and released (deepbrain 0.1, MIT licence; see the notice beside the
weights), rebuilt in PyTorch. Input: (B, 1, *spatial), intensities scaled to [0, 1], spatial sizes
divisible by 8; it was trained on whole heads resampled to 128x128x128. Output: (B, 1, *spatial)
logits of "brain". A ReLU follows every hidden convolution, but not the transposed ones.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn


def _convolutions(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv3d(outputs, outputs, 3, padding=1),
        nn.ReLU(inplace=True),
    )


class _Up(nn.Module):
    """Double the resolution, join the skip connection, convolve once."""

    def __init__(self, inputs: int, skip: int) -> None:
        super().__init__()
        self.grow = nn.ConvTranspose3d(inputs, skip, 3, stride=2, bias=False)
        self.fuse = nn.Sequential(nn.Conv3d(2 * skip, skip, 3, padding=1), nn.ReLU(inplace=True))

    def forward(self, coarse: Tensor, skip: Tensor) -> Tensor:
        depth, height, width = skip.shape[2:]
        # A transposed convolution of width 3 gives one voxel more than twice the input.
        grown = self.grow(coarse)[..., :depth, :height, :width]
        return self.fuse(torch.cat((grown, skip), dim=1))


class SkullStripUNet(nn.Module):
    """3D U-Net with three levels below the full resolution; 171,465 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.level0 = _convolutions(1, 8)
        self.level1 = _convolutions(8, 16)
        self.level2 = _convolutions(16, 32)
        self.pool = nn.MaxPool3d(2)
        self.up2 = _Up(32, 32)
        self.up1 = _Up(32, 16)
        self.up0 = _Up(16, 8)
        self.head = nn.Conv3d(8, 1, 1)

    def forward(self, volume: Tensor) -> Tensor:
        if volume.ndim != 5 or volume.shape[1] != 1 or any(n % 8 for n in volume.shape[2:]):
            raise ValueError(
                f"volume: got shape {tuple(volume.shape)}, expected (B, 1, *spatial) with three "
                "spatial sizes divisible by 8"
            )
        full = self.level0(volume)
        half = self.level1(self.pool(full))
        quarter = self.level2(self.pool(half))
        eighth = self.pool(quarter)
        decoded = self.up0(self.up1(self.up2(eighth, quarter), half), full)
        return self.head(decoded)


# Module of this network -> name of the layer in the weights file.
_LAYERS = {
    "level0.0": "conv3d",
    "level0.2": "conv3d_1",
    "level1.0": "conv3d_2",
    "level1.2": "conv3d_3",
    "level2.0": "conv3d_4",
    "level2.2": "conv3d_5",
    "up2.grow": "conv3d_transpose",
    "up2.fuse.0": "conv3d_6",
    "up1.grow": "conv3d_transpose_1",
    "up1.fuse.0": "conv3d_7",
    "up0.grow": "conv3d_transpose_2",
    "up0.fuse.0": "conv3d_8",
    "head": "conv3d_9",
}


def load_skull_strip_unet(weights: str | Path) -> SkullStripUNet:
    """Build the network from ``weights`` (.npz), in evaluation mode.

    The file holds plain arrays: it is read with ``allow_pickle=False``, so it can run no code.
    Kernels are stored channels-last: (kz, ky, kx, in, out), and (kz, ky, kx, out, in) for the
    transposed convolutions; the same permutation gives PyTorch's order in both cases.
    """
    network = SkullStripUNet()
    state: dict[str, Tensor] = {}
    with np.load(weights, allow_pickle=False) as arrays:
        for module, layer in _LAYERS.items():
            kernel = torch.from_numpy(arrays[f"{layer}.kernel"])
            state[f"{module}.weight"] = kernel.permute(4, 3, 0, 1, 2).contiguous()
            if f"{layer}.bias" in arrays:
                state[f"{module}.bias"] = torch.from_numpy(arrays[f"{layer}.bias"])
    network.load_state_dict(state, strict=True)
    return network.eval().requires_grad_(False)


def bundled() -> SkullStripUNet:
    """The network with the bundled weights: ``voxfuse predict --model`` takes it by this name."""
    folder = Path(__file__).resolve().parents[1] / "data" / "skull_strip_unet"
    return load_skull_strip_unet(folder / "weights.npz")
