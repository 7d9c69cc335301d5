"""Finished slabs on their way from the accelerator to the host, behind the computation."""

from __future__ import annotations

from collections import deque
from typing import NoReturn, Protocol

import torch
from torch import Tensor

#: Slabs that may be under way; each has a pinned buffer of its own.
BUFFERS = 2


class Ticket(Protocol):
    """A copy under way; a ``torch.cuda.Event`` is one."""

    def query(self) -> bool:
        """Whether it has arrived."""

    def synchronize(self) -> None:
        """Wait for it."""


class Transfer(Protocol):
    """How slabs get to the host."""

    def allocate(self, size: int) -> Tensor:
        """Bytes of host memory to copy to."""

    def start(self, slab: Tensor, staging: Tensor) -> Ticket:
        """Begin to copy ``slab`` to ``staging``, host memory of its shape and dtype."""


class CudaTransfer:
    """Copies to pinned memory on a stream of its own, so that the network need not wait."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def allocate(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def start(self, slab: Tensor, staging: Tensor) -> Ticket:
        # What fills the slab is on the current stream.
        self._stream.wait_stream(torch.cuda.current_stream(slab.device))
        with torch.cuda.stream(self._stream):
            staging.copy_(slab, non_blocking=True)
            # The allocator may give the slab's memory away only after the copy.
            slab.record_stream(self._stream)
            event = torch.cuda.Event()
            event.record(self._stream)
        return event


class Delivery:
    """Writes slabs to where the result is: at once, or through pinned memory from a GPU.

    Copies from a GPU to the host are started and finished later: when the buffers are needed
    again, at :meth:`collect` if they have arrived, and at :meth:`flush` in any case. Slabs are
    written in the order in which they were sent.

    Args:
        transfer: how to get a slab to the host. None: CUDA's way for slabs on a GPU and a place on
            the host, and a plain copy for all others.
    """

    def __init__(self, transfer: Transfer | None = None) -> None:
        self._transfer = transfer
        self._free: list[Tensor] = []
        self._under_way: deque[tuple[Ticket, Tensor, Tensor, Tensor]] = deque()

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "Delivery: what is under way cannot be copied; flush it and make another, or copy a "
            "voxfuse.PatchFuser"
        )

    def __len__(self) -> int:
        """How many slabs are under way."""
        return len(self._under_way)

    def send(self, slab: Tensor, place: Tensor) -> None:
        """Write ``slab`` to ``place``, now or later; ``slab`` must not be changed."""
        if self._transfer is None and slab.is_cuda and place.device.type == "cpu":
            self._transfer = CudaTransfer(slab.device)
        if self._transfer is None:
            place.copy_(slab)
            return
        if len(self._under_way) >= BUFFERS:
            self._write()
        size = slab.numel() * slab.element_size()
        buffer = self._free.pop() if self._free else self._transfer.allocate(size)
        if buffer.numel() < size:
            buffer = self._transfer.allocate(size)
        staging = buffer[:size].view(slab.dtype).view(slab.shape)
        self._under_way.append((self._transfer.start(slab, staging), staging, place, buffer))

    def collect(self) -> None:
        """Write what has arrived, without waiting."""
        while self._under_way and self._under_way[0][0].query():
            self._write()

    def flush(self) -> None:
        """Write everything, waiting for it."""
        while self._under_way:
            self._write()

    def _write(self) -> None:
        ticket, staging, place, buffer = self._under_way.popleft()
        ticket.synchronize()
        place.copy_(staging)
        self._free.append(buffer)
