"""What every step of benchmarks/gpu_bars.py shares: its options, clock and bars."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import voxfuse
from benchmarks import harness
from benchmarks.kernel_driver import backends_on

Call = Callable[[], Any]

#: Cycles that a GPU waits before a call that is timed: 2 ms, in which even a step of training is
#: launched.
PAUSE = 4_000_000


class WrongResult(Exception):
    """A kernel of this package computed something else than it should."""


@dataclasses.dataclass
class Bar:
    """One sentence to hold: ``measured`` at least or at most ``limit``."""

    bar: str
    case: str
    limit: float
    measured: float | None
    at_least: bool = True
    note: str = ""

    def as_row(self) -> dict[str, Any]:
        met = None
        if self.measured is not None:
            met = self.measured >= self.limit if self.at_least else self.measured <= self.limit
        sign = ">=" if self.at_least else "<="
        return {**dataclasses.asdict(self), "sign": sign, "met": met}


class Run:
    """What one step collects, and the options it runs under."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.cuda = self.device.type == "cuda"
        self.bars: list[Bar] = []
        self.results: list[dict[str, Any]] = []
        self.missing: dict[str, str] = {}
        self.failed: dict[str, str] = {}
        self.started = time.monotonic()
        self.rounds = 25 if self.cuda else 3
        self.backends = backends_on(self.device)
        if self.cuda:
            for name in ("cuda", "triton"):
                if name not in self.backends:
                    self.missing[name] = voxfuse.backends()[name].reason
        if not self.backends:
            raise SystemExit(f"no kernel of this package runs on {self.device}: {self.missing}")

    @contextlib.contextmanager
    def alone(self, what: str) -> Iterator[None]:
        """Let what fails here cost itself alone; a wrong result ends the step all the same."""
        try:
            yield
        except WrongResult:
            raise
        except Exception as error:  # whatever it is, it is named, and the step has failed
            traceback.print_exc()
            lines = str(error).strip().splitlines() or [""]
            self.failed[what] = f"{type(error).__name__}: {lines[0]}"[:300]

    def out_of_time(self) -> bool:
        return time.monotonic() - self.started > self.options.budget

    def clock(self) -> harness.Clock:
        return EventClock(self.device) if self.cuda else harness.Clock(self.device, 1 << 20)

    def write(self, wrong: str | None = None) -> None:
        results = {
            "bars": [bar.as_row() for bar in self.bars],
            "results": self.results,
            "missing": self.missing,
            "failed": self.failed,
            "wrong": wrong,
        }
        self.options.json.write_text(json.dumps(results, indent=1) + "\n")


class EventClock(harness.Clock):
    """Device time of a call: the launches hide behind the read that empties the caches and a pause.

    After a write the caches would be full of what the call itself has to write back first: 50 MB,
    more than some calls move.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(device, cold_bytes=1 << 30)

    def time(self, function: Call) -> float:
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        self._evict.sum()
        torch.cuda._sleep(PAUSE)
        start.record()
        result = function()
        end.record()
        torch.cuda.synchronize(self.device)
        del result
        return start.elapsed_time(end) / 1e3


def median_ms(timings: dict[str, harness.Timing]) -> dict[str, dict[str, float]]:
    return {name: timing.summary() for name, timing in timings.items()}


def free(run: Run) -> None:
    gc.collect()
    if run.cuda:
        torch.cuda.empty_cache()


def copy_ceiling(run: Run) -> float:
    """Bytes a second, read plus written, of a large copy on the device."""
    size = 1 << (32 if run.cuda else 22)
    if run.cuda:
        size = min(size, torch.cuda.mem_get_info(run.device)[0] // 8)
    source = torch.empty(size // 4, device=run.device).normal_()
    target = torch.empty_like(source)
    clock = run.clock()
    timings = harness.interleave({"copy": lambda: target.copy_(source)}, clock, run.rounds)
    size = source.numel() * source.element_size()
    return 2 * size / (timings["copy"].summary()["median_ms"] / 1e3)


def wall_seconds(call: Call, run: Run) -> float:
    if run.cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if run.cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    del result
    return seconds
