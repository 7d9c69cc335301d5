"""Seconds and peak memory of a piece of work, on the CPU and on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class Peak:
    """Result of :func:`peak_memory`; ``extra_bytes`` is None where it cannot be measured."""

    extra_bytes: int | None = None


def how_memory_is_measured(device: torch.device) -> str:
    """One sentence for the reader of a figure that :func:`peak_memory` gave."""
    if device.type == "cuda":
        return (
            "growth of the live tensors' total: torch.cuda.max_memory_allocated minus what was "
            "allocated before"
        )
    if _can_reset_high_water_mark():
        return (
            "growth of the process's resident set, from the kernel's high-water mark (VmHWM, reset "
            "before the work, freed memory having been returned to the system)"
        )
    return "not measured: needs Linux with a writable /proc/self/clear_refs"


@contextlib.contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measure the highest extra memory within the block, above what was in use at its start.

    >>> with peak_memory(torch.device("cpu")) as peak:
    ...     size = torch.ones(20_000_000).numel()
    >>> peak.extra_bytes is None or 70_000_000 < peak.extra_bytes < 110_000_000
    True
    """
    peak = Peak()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        torch.cuda.synchronize(device)
        peak.extra_bytes = torch.cuda.max_memory_allocated(device) - before
        return
    if not _can_reset_high_water_mark():
        yield peak
        return
    _return_freed_memory()
    _CLEAR_REFS.write_text("5")  # resets VmHWM to the present resident set
    before = _status("VmRSS")
    yield peak
    peak.extra_bytes = max(0, _status("VmHWM") - before)


class Stopwatch:
    """Adds up the seconds spent in ``with`` blocks; waits for the GPU before reading the clock.

    >>> watch = Stopwatch(torch.device("cpu"))
    >>> with watch:
    ...     pass
    >>> 0 <= watch.seconds < 1
    True
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds = 0.0
        self._device = device
        self._start = 0.0

    def __enter__(self) -> Stopwatch:
        self._start = self._now()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += self._now() - self._start

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _can_reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return "VmHWM" in _STATUS.read_text()


def return_large_blocks() -> None:
    """Have the C library return every block over 1 MiB to the system as soon as it is freed.

    By default it learns to keep blocks up to 32 MiB, and what is kept blurs a resident set of some
    hundred MiB.
    """
    mmap_threshold = -3
    if sys.platform == "linux":
        # Other C libraries than glibc have no mallopt.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").mallopt(mmap_threshold, 1 << 20)


def _return_freed_memory() -> None:
    if sys.platform == "linux":
        # Other C libraries than glibc have no malloc_trim.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _status(field: str) -> int:
    """Read one of the process's memory counters in bytes."""
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"{_STATUS} has no {field}")
    return 1024 * int(found[1])
