"""The 3D fully convolutional densely connected network of Hashemi et al. 2018."""

from __future__ import annotations

import torch
from torch import Tensor, nn

#: Of every batch normalisation, as released.
EPSILON = 1.1e-5


def _norm_relu(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm3d(channels, eps=EPSILON), nn.ReLU(inplace=True)]


class DenseBlock(nn.Module):
    """Layers of BN-ReLU-1^3 convolution-BN-ReLU-3^3 convolution, each fed all features before."""

    def __init__(self, channels: int, layers: int, growth: int, dropout: float) -> None:
        super().__init__()
        self.new = layers * growth
        self.layers = nn.ModuleList()
        for incoming in range(channels, channels + self.new, growth):
            self.layers.append(
                nn.Sequential(
                    *_norm_relu(incoming),
                    nn.Conv3d(incoming, 4 * growth, 1, bias=False),
                    *_norm_relu(4 * growth),
                    nn.Conv3d(4 * growth, growth, 3, padding=1, bias=False),
                    nn.Dropout(dropout),
                )
            )

    def forward(self, x: Tensor) -> Tensor:
        """What came in and, after it, the new features."""
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class FCDenseNet(nn.Module):
    r"""FC-DenseNet: dense blocks down, below and up (Hashemi et al. 2018, arXiv 1803.11078).

    Stem: three 3^3 convolutions with BN-ReLU between. Down: a block, BN-ReLU-1^3 convolution
    (``compression``), max-pooling. Up: a 3^3 transposed convolution of stride 2 with ReLU, of the
    new features of the block below alone, beside the block of the same level on the way down; then
    a block. Last, a 1^3 convolution without bias of all features of the last block.

    With 4 channels, 2 classes and the defaults the convolutions have 3.18 M parameters, 3.35 M with
    ``compact`` (the released code's default), and the batch normalisations 0.03 M more.

    Args:
        channels: of the input.
        classes: of the output.
        levels: blocks down, and up.
        layers: of a block.
        growth: new features a layer; its 1^3 convolution has 4 times as many.
        features: of the stem.
        compression: share of the features that is passed down.
        dropout: after each layer.
        compact: a 2^3 convolution of stride 2 with ReLU first and a transposed one before the last
            layer, so that the blocks run at half the resolution.

    Shapes: (B, channels, \*spatial), three spatial axes that are multiples of ``factor`` =
    2^levels (2^(levels + 1) with ``compact``), to (B, classes, \*spatial).

    Example:
        >>> import torch
        >>> from voxfuse.training.networks import FCDenseNet
        >>> network = FCDenseNet(1, 2, levels=1, layers=2, growth=4, features=8)
        >>> network(torch.zeros(1, 1, 4, 4, 4)).shape
        torch.Size([1, 2, 4, 4, 4])
    """

    normalised_over = "batch"

    def __init__(
        self,
        channels: int,
        classes: int,
        levels: int = 5,
        layers: int = 5,
        growth: int = 16,
        features: int = 48,
        compression: float = 0.5,
        dropout: float = 0.2,
        compact: bool = False,
    ) -> None:
        super().__init__()
        if not 0 < compression <= 1:
            raise ValueError(f"network.compression: got {compression}, expected more than 0, to 1")
        self.factor = 2 ** (levels + compact)
        first: list[nn.Module] = []
        if compact:
            first = [nn.Conv3d(channels, features, 2, stride=2), nn.ReLU(inplace=True)]
            channels = features
        first.append(nn.Conv3d(channels, features, 3, padding=1, bias=False))
        for _ in range(2):
            first += _norm_relu(features)
            first.append(nn.Conv3d(features, features, 3, padding=1, bias=False))
        self.stem = nn.Sequential(*first)

        self.down, self.transitions = nn.ModuleList(), nn.ModuleList()
        count, skipped = features, []
        for _ in range(levels):
            self.down.append(DenseBlock(count, layers, growth, dropout))
            skipped.append(count + layers * growth)
            count = int(skipped[-1] * compression)
            self.transitions.append(
                nn.Sequential(
                    *_norm_relu(skipped[-1]),
                    nn.Conv3d(skipped[-1], count, 1, bias=False),
                    nn.MaxPool3d(2),
                )
            )
        self.bottom = DenseBlock(count, layers, growth, dropout)
        self.raised, self.up = nn.ModuleList(), nn.ModuleList()
        new = layers * growth
        for beside in reversed(skipped):
            self.raised.append(
                nn.Sequential(
                    nn.ConvTranspose3d(new, new, 3, stride=2, padding=1, output_padding=1),
                    nn.ReLU(inplace=True),
                )
            )
            count = new + beside
            self.up.append(DenseBlock(count, layers, growth, dropout))
        last: list[nn.Module] = []
        count += new
        if compact:
            last = [nn.ConvTranspose3d(count, features, 2, stride=2), nn.ReLU(inplace=True)]
            count = features
        self.head = nn.Sequential(*last, nn.Conv3d(count, classes, 1, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes, \\*spatial)."""
        x = self.stem(x)
        skipped = []
        for block, transition in zip(self.down, self.transitions, strict=True):
            skipped.append(block(x))
            x = transition(skipped[-1])
        x = self.bottom(x)
        new = self.bottom.new
        for raised, block, beside in zip(self.raised, self.up, reversed(skipped), strict=True):
            x = block(torch.cat([raised(x[:, -new:]), beside], 1))
        logits: Tensor = self.head(x)
        return logits
