"""Networks for ``voxfuse predict --model tests/inference/networks.py:NAME``."""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn


class Linear(nn.Module):
    """A convolution of extent 1, after one that copies the channels."""

    def __init__(self, weight: list[list[float]], bias: list[float]) -> None:
        super().__init__()
        classes, inputs = len(weight), len(weight[0])
        self.copy = nn.Conv3d(inputs, inputs, 1, bias=False)
        self.last = nn.Conv3d(inputs, classes, 1)
        with torch.no_grad():
            self.copy.weight.copy_(torch.eye(inputs).reshape(inputs, inputs, 1, 1, 1))
            self.last.weight.copy_(torch.tensor(weight).reshape(classes, inputs, 1, 1, 1))
            self.last.bias.copy_(torch.tensor(bias))

    def forward(self, patches: Tensor) -> Tensor:
        return self.last(self.copy(patches))


def above_half() -> nn.Module:
    """One channel: above 1/2 is foreground."""
    return Linear([[8.0]], [-4.0])


def three_classes() -> nn.Module:
    """Of intensities 0, 1, 2: the classes 0, 1, 2."""
    return Linear([[0.0], [8.0], [16.0]], [0.0, -4.0, -16.0])


def of_a_run(channels: int, classes: int) -> nn.Module:
    """The same, for ``package.module:name`` of a run's configuration."""
    assert (channels, classes) == (1, 3)
    return three_classes()


def sure_of_three() -> nn.Module:
    """The same, far above the logits of which a sigmoid is below 1."""
    return Linear([[0.0], [80.0], [160.0]], [0.0, -40.0, -160.0])


def many_classes() -> nn.Module:
    torch.manual_seed(0)
    return nn.Conv3d(1, 48, 1)


def two_regions() -> nn.Module:
    """Of intensities 0, 1, 2: both regions above their bounds."""
    return Linear([[8.0], [8.0]], [-4.0, -12.0])


def of_two_channels() -> nn.Module:
    """The second channel's intensity less the first's, above 1/2."""
    return Linear([[-8.0, 8.0]], [-4.0])


class Positional(nn.Module):
    """Neither pointwise nor the same in mirrored patches."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Conv3d(1, 3, 3, padding=1)
        self.last = nn.Conv3d(3, 4, 1)

    def forward(self, patches: Tensor) -> Tensor:
        return self.last(torch.relu(self.body(patches)))


class Sleeping(nn.Module):
    """Takes its time; says no more than that intensities are above 1/2."""

    seconds = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.inner = above_half()

    def forward(self, patches: Tensor) -> Tensor:
        time.sleep(type(self).seconds)
        return self.inner(patches)


def positional() -> nn.Module:
    return Positional()


def softmaxed() -> nn.Module:
    """Its convolution of extent 1 is not the last layer."""
    return nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.Conv3d(4, 3, 1), nn.Softmax(1))


def probabilities() -> nn.Module:
    return nn.Sequential(above_half(), nn.Sigmoid())


class Interrupted(nn.Module):
    """Ctrl-C is pressed while it predicts what is not 0."""

    def forward(self, patches: Tensor) -> Tensor:
        if patches.any():
            raise KeyboardInterrupt
        return patches - 0.5


def interrupted() -> nn.Module:
    return Interrupted()


class Failing(nn.Module):
    """Raises an error for all but zeros."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def forward(self, patches: Tensor) -> Tensor:
        if patches.any():
            raise self.error
        return patches - 0.5


class NoSuchLayer(ValueError):
    """Is known in this file alone."""

    def __init__(self, name: str, number: int) -> None:  # pickles have no number
        super().__init__(name)


def failing() -> nn.Module:
    return Failing(NoSuchLayer("deep", 3))


def lacking() -> nn.Module:
    return Failing(KeyError("deep"))


def not_finite() -> nn.Module:
    return Linear([[float("nan")]], [0.0])


def halving() -> nn.Module:
    return nn.MaxPool3d(2)


class Plain:
    """No module: has no state to take a digest of."""

    def __call__(self, patches: Tensor) -> Tensor:
        return patches - 0.5


def exiting() -> nn.Module:
    """A program's, whose end is not the command's."""
    raise SystemExit(3)


number = 3


def raising() -> nn.Module:
    raise RuntimeError("no weights here")


def slow() -> nn.Module:
    """Has a kernel, so that patches matter, and takes 10 ms a call."""
    network = Sleeping()
    network.inner, Sleeping.seconds = Positional(), 0.01
    return network
