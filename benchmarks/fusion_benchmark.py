"""Patch fusion: time and peak memory of the sliding window, without a network.

The predictor is a null one: it cycles through 32 distinct prepared predictions, more than the
last-level cache holds, so that what is left is cutting patches out, fusing and finalising. The peer
is MONAI's sliding window (plain and buffered), with argmax where labels are asked for; values are
checked first. "read" is reading as many predictions once, "copy" writing them to memory too.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import voxfuse
import voxfuse.fusion.windows
from benchmarks import harness
from voxfuse.fusion.grids import plan_grid

DISTINCT = 32


class NullPredictor:
    """Returns prepared predictions, the next ones at every call."""

    def __init__(self, channels: int, patch: tuple[int, ...], distinct: int = DISTINCT) -> None:
        generator = torch.Generator().manual_seed(0)
        self.prepared = torch.randn((2 * distinct, channels, *patch), generator=generator)
        self.prepared[distinct:] = self.prepared[:distinct]
        self.distinct = distinct
        self.next = 0

    def restart(self) -> None:
        self.next = 0

    def __call__(self, batch: Tensor) -> Tensor:
        size = batch.shape[0]
        first = self.next % self.distinct
        self.next += size
        if first + size <= 2 * self.distinct:
            return self.prepared[first : first + size]
        return self.prepared[[(first + i) % self.distinct for i in range(size)]]


def _monai(volume: Tensor, patch: tuple[int, ...], predictor: NullPredictor, **options: Any) -> Any:
    from monai.inferers import sliding_window_inference

    def predict(batch: Tensor) -> Tensor:
        # MONAI multiplies the prediction in place: it needs one of its own.
        return predictor(batch).clone()

    size = options.pop("size", 1)
    predictor.restart()
    return sliding_window_inference(volume, patch, size, predict, 0.5, mode="gaussian", **options)


def _drop_in(volume: Tensor, patch: tuple[int, ...], predictor: NullPredictor, size: int) -> Any:
    from voxfuse.integrations.monai import sliding_window_inference

    predictor.restart()
    return sliding_window_inference(volume, patch, size, predictor, 0.5, mode="gaussian")


def _voxfuse(
    volume: Tensor, patch: tuple[int, ...], predictor: NullPredictor, size: int, **options: Any
) -> Any:
    predictor.restart()
    return voxfuse.sliding_window_inference(
        volume, patch, predictor, 0.5, "gaussian", size, stream_axis=0, **options
    )


def competitors(
    volume: Tensor, patch: tuple[int, ...], predictor: NullPredictor, output: str
) -> tuple[dict[str, Callable[[], Any]], int]:
    """The calls to time, and the number of patches."""
    grid = plan_grid(tuple(volume.shape[2:]), patch, 0.5)
    count, row = len(grid), len(grid.starts[-1])

    def clones() -> None:
        predictor.restart()
        for _ in range(count):
            predictor(volume[:1]).clone()

    def read() -> None:
        predictor.restart()
        for _ in range(count):
            predictor(volume[:1]).sum()

    calls: dict[str, Callable[[], Any]] = {"read": read, "copy": clones}
    if output == "logits":
        calls |= {
            "MONAI": lambda: _monai(volume, patch, predictor),
            "MONAI, buffered": lambda: _monai(
                volume, patch, predictor, buffer_steps=1, buffer_dim=0
            ),
            "voxfuse as MONAI": lambda: _drop_in(volume, patch, predictor, 1),
            "voxfuse": lambda: _voxfuse(volume, patch, predictor, 1),
            "voxfuse, a row a batch": lambda: _voxfuse(volume, patch, predictor, row),
        }
    else:
        calls |= {
            "MONAI": lambda: _monai(volume, patch, predictor).argmax(1, keepdim=True),
            "voxfuse": lambda: _voxfuse(volume, patch, predictor, 1, output="labels"),
            "voxfuse, a row a batch": lambda: _voxfuse(
                volume, patch, predictor, row, output="labels"
            ),
        }
    return calls, count


def check(
    calls: dict[str, Callable[[], Any]],
    volume: Tensor,
    patch: tuple[int, ...],
    predictor: NullPredictor,
    output: str,
) -> None:
    """Raise unless every result is MONAI's, given the same window."""
    window = voxfuse.fusion.windows.gaussian_window(list(patch)).float()
    clamped = _monai(volume, patch, predictor)
    gaussian = _monai(volume, patch, predictor, roi_weight_map=window)
    for name, call in calls.items():
        if name in ("read", "copy", "MONAI"):
            continue
        actual, expected = call(), clamped if "MONAI" in name else gaussian
        if output == "labels":
            differ = float((actual != expected.argmax(1, keepdim=True)).float().mean())
            if differ > 1e-4:
                raise RuntimeError(f"{name}: {differ:.3%} of the labels differ from MONAI's")
        else:
            worst = float((actual - expected).abs().max())
            if worst > 1e-4:
                raise RuntimeError(f"{name}: differs from MONAI by {worst}")


def _time(options: argparse.Namespace, clock: harness.Clock, output: str) -> dict[str, Any]:
    edge, patch = (96, (48,) * 3) if options.quick else (options.volume, (options.patch,) * 3)
    volume = torch.zeros(1, 1, edge, edge, edge)
    predictor = NullPredictor(options.classes, patch)
    calls, count = competitors(volume, patch, predictor, output)
    check(calls, volume, patch, predictor, output)
    rounds = min(options.rounds, 3) if options.quick else options.rounds
    timings = harness.interleave(calls, clock, rounds, options.budget)
    rows = {name: timing.summary() for name, timing in timings.items()}
    print(f"\n{output}: {options.classes} classes, {edge}^3, {count} patches of {patch[0]}^3")
    # The predictions that MONAI overwrites are cloned for it; that is not its own cost.
    cloning = max(rows["copy"]["median_ms"] - rows["read"]["median_ms"], 0)
    own = rows["MONAI"]["median_ms"] - cloning
    for name, row in rows.items():
        median = row["median_ms"]
        row["monai_over_it"] = own / median
        row["over_read"] = median / rows["read"]["median_ms"]
        print(
            f"  {name:24} {median:9.1f} ms   x{row['over_read']:5.2f} of reading"
            f"   MONAI takes {row['monai_over_it']:5.2f} times as long"
        )
    return {"output": output, "volume": edge, "patch": patch[0], "patches": count, "rows": rows}


def _memory(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Peak memory above the inputs over the depth of the volume, the long axis last."""
    edge, patch, classes = (64, 24, 20) if options.quick else (128, 48, 60)
    rows = []
    print(f"\npeak memory: {classes} classes, {patch}^3 patches, {edge}x{edge}xD, labels out")
    predictor = NullPredictor(classes, (patch,) * 3, 2)
    features = NullPredictor(max(classes // 4, 1), (patch,) * 3, 2)
    head = (torch.randn(classes, max(classes // 4, 1)), torch.randn(classes))
    for depth in (edge, 2 * edge, 4 * edge):
        volume = torch.zeros(1, 1, edge, edge, depth)
        plan = voxfuse.PatchFuser(
            (edge, edge, depth), (patch,) * 3, classes, output="labels"
        ).plan()

        def stream(head: Any = None, volume: Tensor = volume) -> Any:
            return voxfuse.sliding_window_inference(
                volume,
                (patch,) * 3,
                predictor if head is None else features,
                0.5,
                output="labels",
                head=head,
            )

        row = {
            "depth": depth,
            "planned": plan.ring_bytes + plan.output_bytes,
            "voxfuse": harness.peak_extra_bytes(stream, torch.device("cpu")),
            "voxfuse, head": harness.peak_extra_bytes(lambda: stream(head), torch.device("cpu")),
        }
        if depth <= 2 * edge:
            row["MONAI"] = harness.peak_extra_bytes(
                lambda volume=volume: _monai(volume, (patch,) * 3, predictor).argmax(1),
                torch.device("cpu"),
            )
        gc.collect()
        rows.append(row)
        listed = ", ".join(
            f"{name} {value / 2**20:.1f} MiB" for name, value in row.items() if name != "depth"
        )
        print(f"  D = {depth:5}: {listed}")
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measure, print, and return everything as data."""
    if options.device != "cpu":
        raise SystemExit("the fusion benchmark runs on the CPU so far")
    clock = harness.Clock(torch.device("cpu"))
    results: dict[str, Any] = {"benchmark": "fusion", "machine": harness.machine(clock.device)}
    if "time" in options.parts:
        results["time"] = [_time(options, clock, output) for output in ("logits", "labels")]
    if "memory" in options.parts:
        results["memory"] = _memory(options)
    return results
