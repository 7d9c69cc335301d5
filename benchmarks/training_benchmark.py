"""What a step of training takes beside the network: patches, loss, optimiser, log.

    python -m benchmarks.training_benchmark CONFIG.toml --data FOLDER --json FILE

Steps are those of ``voxfuse train``, taken apart: patches (drawn, augmented, put together), the
network's forward and backward, the loss with its gradient, the optimiser, and what the log and the
checkpoints take of a step. Medians over the steps; a checkpoint's time is divided by its interval.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from voxfuse.training.config import load
from voxfuse.training.trainer import Trainer

#: Sampling, augmentation, loss and log take no more than this share of the network's time.
BAR = 0.1

STAGES = ("patches", "forward", "loss", "backward", "optimiser", "log")


def step_apart(trainer: Trainer, step: int) -> dict[str, float]:
    """Seconds of each stage of one step."""
    times = [time.perf_counter()]

    def lap() -> None:
        times.append(time.perf_counter())

    batch = trainer.batch(step)
    lap()
    trainer.network.train()
    trainer.optimiser.zero_grad(set_to_none=True)
    outputs = trainer.network(batch.image)
    lap()
    loss = trainer.objective(outputs, batch.label, batch.mask)
    (gradient,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    lap()
    outputs.backward(gradient)
    lap()
    trainer.optimiser.step()
    lap()
    trainer.note(loss.detach(), batch.relaxed)
    trainer.after(False)
    lap()
    return {
        name: stop - start for name, start, stop in zip(STAGES, times[:-1], times[1:], strict=True)
    }


def measure(config: Path, data: Path, steps: int) -> dict[str, Any]:
    """The medians, and the share beside the network."""
    with tempfile.TemporaryDirectory() as run:
        trainer = Trainer(load(config), data, Path(run))
        trainer.fit(stop_at=1)  # writes what a run begins with
        found = [step_apart(trainer, step) for step in range(1, steps + 4)][3:]
    seconds = {name: statistics.median(x[name] for x in found) for name in STAGES[:-1]}
    # Rows and checkpoints come once in several steps: their mean counts.
    seconds["log"] = statistics.fmean(x["log"] for x in found)
    network = seconds["forward"] + seconds["backward"]
    beside = seconds["patches"] + seconds["loss"] + seconds["log"]
    return {
        "config": config.name,
        "steps": steps,
        "seconds": seconds,
        "network_seconds": network,
        "share": beside / network,
        "bar": BAR,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    options = parser.parse_args()
    row = measure(options.config, options.data, options.steps)
    for name, seconds in row["seconds"].items():
        print(f"{name:<10} {1e3 * seconds:8.2f} ms")
    print(f"beside the network: {100 * row['share']:.1f} % of its time (bar: {100 * BAR:.0f} %)")
    if options.json is not None:
        found = {"machine": harness.machine(torch.device("cpu")), **row}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
