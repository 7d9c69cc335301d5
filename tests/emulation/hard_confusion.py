"""hard_confusion on the emulated CUDA kernel."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tests.emulation import emulator


class HardConfusion(emulator.Operators):
    """``hard_confusion`` on the emulated CUDA kernel."""

    NAME = "hard_confusion"
    SOURCES = ("csrc/cuda/hard_confusion.cu", "tests/emulation/hard_confusion_main.cpp")

    def hard_confusion(
        self,
        input: Tensor,
        target: Tensor,
        mask: Tensor | None,
        decision: int,
        least: float,
        num_classes: int | None,
        ignore_index: int | None,
    ) -> Tensor:
        batch = input.shape[0]
        classes = input.shape[1] if num_classes is None else num_classes
        channel = target.ndim == input.ndim and target.shape[1:2] == input.shape[1:2]
        dense = num_classes is None and (classes == 1 or channel)
        voxels = math.prod(input.shape[1 if num_classes else 2 :])
        integers = [batch, classes, voxels, decision, int(dense)]
        integers += [int(ignore_index is not None), ignore_index or 0]
        channels = (num_classes is None, dense and target.ndim == input.ndim, False)
        given = [
            x if x is None else emulator.collapse(x, has_channel)
            for x, has_channel in zip((input, target, mask), channels, strict=True)
        ]
        for x, has_channel in zip(given, channels, strict=True):
            integers += emulator.describe(x, has_channel)
        counts = torch.zeros(batch, classes, 4, dtype=torch.int64)
        buffers = [bytearray() if x is None else emulator.storage_bytes(x) for x in given]
        (result,) = self._program.call(
            integers, [least], [*buffers, emulator.storage_bytes(counts)], 1
        )
        return emulator.from_bytes(result, counts)
