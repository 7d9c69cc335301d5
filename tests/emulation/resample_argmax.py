"""resample_argmax on the emulated CUDA kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.emulation import emulator


class ResampleArgmax(emulator.Operators):
    """``resample_argmax`` on the emulated CUDA kernel."""

    NAME = "resample_argmax"
    SOURCES = ("csrc/cuda/resample_argmax.cu", "tests/emulation/resample_argmax_main.cpp")

    def resample_argmax(
        self,
        out: Tensor,
        input: Tensor,
        index: list[Tensor],
        weight: list[Tensor],
        kept: int,
        least: float,
        regions: list[int],
        round_to_half: bool,
    ) -> None:
        missing = 4 - input.ndim
        channels, *source = input.shape
        offset = input.storage_offset() * input.element_size()
        types = (emulator.ELEMENTS[input.dtype], emulator.ELEMENTS[out.dtype])
        integers = [channels, input.stride(0), *types, kept, int(round_to_half), offset]
        integers += [1, 1, 0] * missing
        for extent, table, stride in zip(source, index, input.stride()[1:], strict=True):
            integers += [extent, table.numel(), stride]
        buffers = [emulator.storage_bytes(x) for x in (out, input, torch.tensor(regions))]
        for tables in (index, weight):
            buffers += [bytearray()] * missing
            buffers += [emulator.storage_bytes(x.clone()) for x in tables]
        (result,) = self._program.call(integers, [least], buffers, 1)
        out.copy_(emulator.from_bytes(result, out))
