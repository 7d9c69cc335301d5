"""Measuring: interleaved timing, peak memory, and a description of the machine.

What makes the figures fair:

* every competitor runs in the same process, on the same tensors, in interleaved rounds, so that a
  noisy neighbour disturbs all of them alike;
* a result is checked before it is timed;
* caches are cold: before every call a buffer larger than the last-level cache is read;
* "fresh" timings let the C library return every large block to the operating system, as it does by
  default, so that the first touch of a result costs page faults; "reused" timings keep freed
  memory, as a caching allocator does, so that results land in memory that has been touched before.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL("libc.so.6")


def allocate_fresh() -> None:
    """Return every block over 1 MiB to the operating system when it is freed."""
    libc = _libc()
    libc.mallopt(_M_MMAP_MAX, 65536)
    libc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
    libc.mallopt(_M_TRIM_THRESHOLD, 1 << 20)
    libc.malloc_trim(0)


def allocate_reused() -> None:
    """Keep freed memory for the next allocation."""
    libc = _libc()
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, ctypes.c_int(2**31 - 1))


def without_huge_pages(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run ``function`` with transparent huge pages switched off for this process."""
    set_thp_disable = 41
    libc = _libc()

    def call() -> Any:
        libc.prctl(set_thp_disable, 1, 0, 0, 0)
        try:
            return function()
        finally:
            libc.prctl(set_thp_disable, 0, 0, 0, 0)

    return call


@dataclasses.dataclass
class Timing:
    """Seconds of the rounds of one competitor."""

    seconds: list[float] = dataclasses.field(default_factory=list)

    def summary(self) -> dict[str, float]:
        """Minimum, median and the 20th and 80th percentiles, in milliseconds."""
        ordered = sorted(1e3 * s for s in self.seconds)
        return {
            "min_ms": ordered[0],
            "median_ms": statistics.median(ordered),
            "p20_ms": ordered[int(0.2 * (len(ordered) - 1))],
            "p80_ms": ordered[round(0.8 * (len(ordered) - 1))],
            "rounds": len(ordered),
        }


class Clock:
    """Times calls on one device, with cold caches."""

    def __init__(self, device: torch.device, cold_bytes: int = 1 << 26) -> None:
        self.device = device
        self._evict = torch.ones(cold_bytes // 4, device=device)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time(self, function: Callable[[], Any]) -> float:
        """Seconds of one call, results freed before the clock stops nothing but the call."""
        self._evict.sum()
        self.synchronize()
        start = time.perf_counter()
        result = function()
        self.synchronize()
        seconds = time.perf_counter() - start
        del result
        return seconds


def interleave(
    functions: dict[str, Callable[[], Any]],
    clock: Clock,
    rounds: int,
    budget_seconds: float = float("inf"),
) -> dict[str, Timing]:
    """Time every function once a round, for ``rounds`` rounds or until the budget is spent.

    Every round has its own order: what the function before left behind (caches, pages that the
    system has just taken back) must not always meet the same one.
    """
    order = random.Random(0)
    timings = {name: Timing() for name in functions}
    for function in functions.values():
        function()
    started = time.perf_counter()
    for done in range(rounds):
        for name in order.sample(list(functions), len(functions)):
            timings[name].seconds.append(clock.time(functions[name]))
        if time.perf_counter() - started > budget_seconds and done >= 2:
            break
    return timings


def status_bytes(field: str) -> int:
    """One of the process's memory counters, such as VmRSS, VmHWM or RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def reset_peak() -> int:
    """Return freed memory to the system, forget the high-water mark; what is resident now."""
    allocate_fresh()
    Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


def peak_extra_bytes(function: Callable[[], Any], device: torch.device, warm: int = 2) -> int:
    """Highest memory during one call above what was in use before it, its result included.

    On the CPU this is the high-water mark of the resident set, which the kernel keeps to within
    some 256 KiB; the function runs ``warm`` times before, so that one-time allocations do not
    count.
    """
    for _ in range(warm):
        function()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = function()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        del result
        return peak - before
    before = reset_peak()
    result = function()
    peak = status_bytes("VmHWM")
    del result
    return peak - before


def machine(device: torch.device) -> dict[str, Any]:
    """Describe hardware, software and commit."""
    import voxfuse
    from voxfuse import _library

    model = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        model = platform.processor()
    described: dict[str, Any] = {
        "device": str(device),
        "cpu": model,
        "cpu_capability": _library.cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "voxfuse": voxfuse.__version__,
        "commit": commit(),
        "transparent_huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    if device.type == "cuda":
        described["gpu"] = torch.cuda.get_device_name(device)
        described["cuda"] = torch.version.cuda
    return described


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return "unknown"


def commit() -> str:
    """The checked-out commit, with a mark if the tree has changes."""
    here = Path(__file__).resolve().parent
    try:
        name = subprocess.run(
            ["git", "-C", str(here), "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("VOXFUSE_COMMIT", "unknown")
    return name
