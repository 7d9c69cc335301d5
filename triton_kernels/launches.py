"""What every launch has in common."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

#: Bytes that a thread loads at once.
VECTOR_BYTES = 16

#: Most samples a launch takes: the second axis of a grid has no more programs.
MAX_SAMPLES = 65535

#: Options of every launch. Fused multiply-adds are asked for because Triton 3.10 turns their
#: default off; the results of the kernels should not depend on the version.
LAUNCH_OPTIONS = {"enable_fp_fusion": True}


def most_registers(number: int) -> dict[str, int]:
    """Launch options that let a thread have ``number`` registers on an NVIDIA GPU.

    Left alone, the assembler takes fewer, for more threads at a time, and spills.
    """
    return {} if torch.version.cuda is None else {"maxnreg": number}


def device_guard(tensor: torch.Tensor) -> AbstractContextManager[None]:
    """Context in which Triton launches on ``tensor``'s device."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    if tensor.device.type == "xpu":
        return torch.xpu.device(tensor.device)
    return nullcontext()


def power_of_two(n: int) -> int:
    """Smallest power of two that is at least ``n``."""
    return int(triton.next_power_of_2(max(n, 1)))


def launches_of(*tensors: torch.Tensor | None) -> list[tuple[Any, ...]]:
    """Parts of at most MAX_SAMPLES samples of every tensor; the tensors if they have no more."""
    batch = next(len(x) for x in tensors if x is not None)
    if batch <= MAX_SAMPLES:
        return [tensors]
    parts = [slice(start, start + MAX_SAMPLES) for start in range(0, batch, MAX_SAMPLES)]
    return [tuple(None if x is None else x[part] for x in tensors) for part in parts]
