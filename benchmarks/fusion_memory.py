"""Peak memory of streaming fusion at full size: 117 classes, and a volume of 1024^3 voxels.

Each case runs in a process of its own, so that nothing else is in the figure. Predictions are one
prepared batch: label l(x, y, z) of a pattern with a period of 16 voxels, which every patch of these
grids sees in the same phase, plus noise. So every label of the result is known, and checked.
"""

from __future__ import annotations

import dataclasses
import json
import math
import multiprocessing
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import voxfuse
from benchmarks import harness

PERIOD = 16
#: Address space for examples/many_labels.py: its ring is 5.5 GiB, MONAI's sums would be 24.8 GiB.
EXAMPLE_LIMIT_GIB = 9


@dataclasses.dataclass(frozen=True)
class Case:
    """One fusion; ``features`` instead of classes are fused where it is not 0."""

    name: str
    shape: tuple[int, int, int]
    patch: int
    classes: int
    features: int = 0
    memmap: bool = False

    @property
    def channels(self) -> int:
        return self.features or self.classes

    @property
    def limit(self) -> int:
        """A ring as deep as a patch over the two shorter axes, and one batch of one patch.

        With a memmap: 2 GiB, to which the anonymous memory of the whole process is held.
        """
        if self.memmap:
            return 2 << 30
        across = math.prod(sorted(self.shape)[:2])
        return 4 * self.channels * (self.patch * across + self.patch**3)


def cases(quick: bool) -> list[Case]:
    edge, patch, classes, features = (64, 32, 20, 5) if quick else (256, 96, 117, 32)
    listed = []
    for count in (0, features):
        what = f"{classes} classes" + (f" from {count} features" if count else "")
        for depth in (edge, 4 * edge):
            ends = {"last": (edge, edge, depth), "first": (depth, edge, edge)}
            if count:
                del ends["first"]
            for where, shape in ends.items():
                name = f"{what}, D = {depth}, long axis {where}"
                listed.append(Case(name, shape, patch, classes, count))
    cube = 128 if quick else 1024
    listed.append(Case(f"4 classes, {cube}^3, into a memmap", (cube,) * 3, patch, 4, memmap=True))
    return listed


def _pattern(classes: int, size: int) -> Tensor:
    """(size, size, size) labels: a fixed random pattern of PERIOD^3 voxels, repeated."""
    generator = torch.Generator().manual_seed(0)
    once = torch.randint(0, classes, (PERIOD,) * 3, generator=generator)
    times = -(-size // PERIOD)
    return once.repeat(times, times, times)[:size, :size, :size]


def _prediction(case: Case) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """One batch of predictions, and the head that goes with features."""
    generator = torch.Generator().manual_seed(1)
    labels = _pattern(case.classes, case.patch)
    if not case.features:
        values = 0.4 * torch.rand((1, case.classes, *labels.shape), generator=generator)
        return values.scatter_add_(1, labels[None, None], torch.ones(1, 1, *labels.shape)), None
    # A class's features are its code; the head compares with every code.
    codes = torch.randn((case.classes, case.features), generator=generator)
    codes = torch.nn.functional.normalize(codes, dim=1)
    values = codes.T[:, labels.flatten()].reshape(1, case.features, *labels.shape).contiguous()
    return values, (codes, torch.zeros(case.classes))


def _anonymous() -> int:
    return harness.status_bytes("RssAnon")


class _Watch:
    """The highest anonymous resident memory, looked at every few milliseconds."""

    def __enter__(self) -> _Watch:
        self.highest = _anonymous()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def _look(self) -> None:
        while not self._stop.wait(0.002):
            self.highest = max(self.highest, _anonymous())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def measure(case: Case) -> dict[str, Any]:
    """Run one case in this process."""
    prediction, head = _prediction(case)
    # Threads and one-time allocations first, on a volume of two patches.
    warm = voxfuse.PatchFuser(
        (case.patch, case.patch, case.patch + PERIOD),
        (case.patch,) * 3,
        case.channels,
        output="labels",
        head=head,
    )
    for origins in warm.batches(1):
        warm.add(prediction, origins)
    warm.result()
    del warm
    # The volume's own values play no part: one voxel, expanded, takes no memory.
    volume = torch.zeros(1, 1, 1, 1, 1).expand(1, 1, *case.shape)
    with tempfile.TemporaryDirectory() as folder:
        out = None
        if case.memmap:
            path = Path(folder) / "labels.dat"
            out = np.memmap(path, dtype=np.uint8, mode="w+", shape=case.shape)
        before = harness.reset_peak()
        started = time.perf_counter()
        with _Watch() as watch:
            labels = voxfuse.sliding_window_inference(
                volume,
                case.patch,
                1,
                lambda batch: prediction,
                0.5,
                output="labels",
                head=head,
                out=out,
            )
        seconds = time.perf_counter() - started
        peak = harness.status_bytes("VmHWM")
        wrong = _wrong(case, labels)
        size = math.prod(case.shape)
        del labels, out
    if wrong:
        raise RuntimeError(f"{case.name}: {wrong} labels are not the pattern's")
    output = 0 if case.memmap else size
    return {
        "name": case.name,
        **dataclasses.asdict(case),
        "seconds": seconds,
        "peak_bytes": peak - before,
        "output_bytes": size,
        "peak_without_output_bytes": peak - before - output,
        "limit_bytes": case.limit,
        "anonymous_bytes": watch.highest,
        "dense_bytes": 4 * case.classes * size,
    }


def _wrong(case: Case, labels: Any) -> int:
    """How many labels differ from the pattern, slice by slice."""
    volume = np.asarray(labels).reshape(case.shape)
    expected = _pattern(case.classes, max(case.shape[1:])).numpy().astype(np.uint8)
    expected = expected[:PERIOD, : case.shape[1], : case.shape[2]]
    return sum(
        int(np.count_nonzero(volume[i] != expected[i % PERIOD])) for i in range(case.shape[0])
    )


def run_example(quick: bool) -> dict[str, Any]:
    """The example with 117 classes in limited address space, where MONAI's call is made too."""
    script = Path(__file__).resolve().parent.parent / "examples" / "many_labels.py"
    print(flush=True)
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures.json"
        command = [sys.executable, str(script), "--json", str(figures)]
        command += ["--quick"] if quick else ["--limit-gib", f"{EXAMPLE_LIMIT_GIB}"]
        subprocess.run(command, check=True)
        return dict(json.loads(figures.read_text()))


def run(quick: bool) -> list[dict[str, Any]]:
    """Measure every case in a fresh process and print it."""
    context = multiprocessing.get_context("spawn")
    print("\npeak memory above the inputs, labels out")
    rows = []
    for case in cases(quick):
        with context.Pool(1) as pool:
            row = pool.apply(measure, (case,))
        rows.append(row)
        what, peak = "", row["peak_bytes"]
        if case.memmap:
            what, peak = " anonymous in the whole process", row["anonymous_bytes"]
        text = f"{peak / 2**20:.0f} MiB{what} (limit {row['limit_bytes'] / 2**20:.0f} MiB)"
        print(
            f"  {case.name:56}{text}; all classes of the volume: "
            f"{row['dense_bytes'] / 2**30:.1f} GiB; {row['seconds']:.0f} s",
            flush=True,
        )
    return rows
