"""How much slower the reference is than the compiled CPU kernels.

    python -m benchmarks.reference_benchmark --json benchmarks/results/cpu/reference.json

The package carries this file (src/voxfuse/_reference_cost.json is a link to it): the warning that
no compiled library loads quotes it. Results are compared before they are timed; both run
interleaved, on one thread, and what is taken is the CPU's time, which other work on the machine
hardly changes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import voxfuse
from benchmarks import harness
from benchmarks.losses import draw, own_loss, step

CPU = torch.device("cpu")


class ProcessClock(harness.Clock):
    """The seconds of the CPU, not those on the wall."""

    def time(self, function: Callable[[], Any]) -> float:
        self._evict.sum()
        start = time.process_time()
        result = function()
        seconds = time.process_time() - start
        del result
        return seconds


def loss_of(backend: str) -> Callable[[], Any]:
    """Tversky loss and gradient at (1, 4, 96, 96, 96)."""
    logits, labels = draw((1, 4, 96, 96, 96), torch.float32, CPU)
    return step(own_loss(backend), logits.requires_grad_(), labels)


def fusion_of(backend: str) -> Callable[[], Any]:
    """Fusion of 27 patches of 64^3 of 4 classes into 128^3 voxels."""
    volume = torch.zeros(1, 1, 128, 128, 128)
    patch = torch.randn(1, 4, 64, 64, 64, generator=torch.Generator().manual_seed(0))
    return lambda: voxfuse.sliding_window_inference(
        volume, (64, 64, 64), 1, lambda _: patch, overlap=0.5, backend=backend
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for work, name in (
        (loss_of, "Tversky loss and gradient, (1, 4, 96, 96, 96)"),
        (fusion_of, "fusion of 27 patches of 64^3, 4 classes"),
    ):
        ways = {"compiled": work("cpp"), "reference": work("reference")}
        torch.testing.assert_close(ways["compiled"](), ways["reference"]())
        timings = harness.interleave(ways, ProcessClock(CPU), options.rounds)
        found = {way: timing.summary() for way, timing in timings.items()}
        times = found["reference"]["min_ms"] / found["compiled"]["min_ms"]
        rows[name] = {**found, "times_slower": times}
        print(f"{name}: {times:.1f} times slower, {found}")
    result = {"benchmark": "reference", "machine": harness.machine(CPU), "rows": rows}
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
