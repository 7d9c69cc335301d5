"""3D U-Nets of two convolutions a level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

NORMS = ("instance", "batch", "none")


def _norm(kind: str, channels: int) -> nn.Module:
    if kind == "instance":
        # Instance norm as PyTorch computes it leaves the channels-last layout; a group a channel is
        # the same and keeps it.
        return nn.GroupNorm(channels, channels)
    return nn.BatchNorm3d(channels) if kind == "batch" else nn.Identity()


class UNet(nn.Module):
    r"""3D U-Net: two padded 3^3 convolutions a level, max-pooling down, transposed 2^3 up.

    A convolution is followed by its normalisation and by LeakyReLU. The defaults are a small
    network, which a CPU trains in minutes. With ``norm="none"`` and ``negative_slope=0`` it is the
    U-Net of Salehi, Erdogmus, Gholipour 2017 (arXiv 1706.05721), whose features double from level
    to level; ``"unet_salehi2017"`` has the 8 to 256 of the group's released code.

    Args:
        channels: of the input.
        classes: of the output.
        features: of each level, the finest first.
        norm: "instance" (affine), "batch" or "none".
        negative_slope: of LeakyReLU; 0 is ReLU.
        dropout: share of channels that are set to 0 after a level, while it trains.
        deep_supervision: while it trains, return logits of every level but the coarsest: a list,
            the finest first.

    Shapes: (B, channels, \*spatial), three spatial axes that are multiples of ``factor`` =
    2^(levels - 1), to (B, classes, \*spatial).

    Raises:
        ValueError: options that do not fit.

    Example:
        >>> import torch
        >>> from voxfuse.training.networks import UNet
        >>> UNet(2, 3, features=(4, 8))(torch.zeros(1, 2, 8, 8, 8)).shape
        torch.Size([1, 3, 8, 8, 8])
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        features: Sequence[int] = (8, 16, 32, 64),
        norm: str = "instance",
        negative_slope: float = 0.01,
        dropout: float = 0.0,
        deep_supervision: bool = False,
    ) -> None:
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f"network.norm: got {norm!r}, expected one of {', '.join(NORMS)}")
        if len(features) < 2 or any(n < 1 for n in features):
            raise ValueError(
                f"network.features: got {list(features)}, expected two positive numbers or more"
            )
        self.factor = 2 ** (len(features) - 1)
        self.normalised_over = {"instance": "patch", "batch": "batch", "none": "none"}[norm]
        self.deep_supervision = deep_supervision

        def level(incoming: int, outgoing: int) -> nn.Sequential:
            layers: list[nn.Module] = []
            for n in (incoming, outgoing):
                layers += [
                    nn.Conv3d(n, outgoing, 3, padding=1, bias=norm == "none"),
                    _norm(norm, outgoing),
                    nn.LeakyReLU(negative_slope, inplace=True),
                ]
            return nn.Sequential(*layers, *([nn.Dropout3d(dropout)] if dropout else []))

        finer = list(features[:-1])
        incoming = [channels, *finer]
        self.down = nn.ModuleList(map(level, incoming, features))
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(a, b, 2, 2) for a, b in zip(features[1:], finer, strict=True)
        )
        self.merge = nn.ModuleList(level(2 * n, n) for n in finer)
        heads = finer if deep_supervision else finer[:1]
        self.heads = nn.ModuleList(nn.Conv3d(n, classes, 1) for n in heads)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, \\*spatial); a list of them with deep supervision while it trains."""
        skipped = []
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else nn.functional.max_pool3d(x, 2))
            skipped.append(x)
        every = self.deep_supervision and self.training
        outputs: list[Tensor] = []
        for level in reversed(range(len(self.up))):
            x = self.merge[level](torch.cat([skipped[level], self.up[level](x)], 1))
            if level == 0 or every:
                outputs.insert(0, self.heads[level](x))
        return outputs if every else outputs[0]
