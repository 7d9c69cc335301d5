"""A volume in boxes on one and on two workers of one thread each, of Dask distributed.

    python -m benchmarks.cluster_benchmark --json FILE

A generated float32 volume (1280, 32, 64) is predicted by three convolutions of 32 channels in
patches of 32 with overlap 0.5, one a call, in 16 boxes. ``boxes`` are the seconds from workers that
have started, without a model, to the last box; ``whole`` has planning and starting and ending them
too. Both results are compared bit by bit.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks import harness

SHAPE, PATCH, BOXES = (1280, 32, 64), 32, 16


def network() -> nn.Module:
    """What workers load."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in ((1, 32), (32, 32), (32, 32)):
        layers += [nn.Conv3d(*channels, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv3d(32, 3, 1))


def run(folder: Path, workers: int) -> tuple[dict[str, Any], np.ndarray[Any, Any]]:
    """Seconds, and the labels."""
    from voxfuse.inference import cluster
    from voxfuse.inference.request import Request
    from voxfuse.inference.volumes import settle
    from voxfuse.scale import open_destination

    out = folder / f"{workers}_{time.monotonic_ns()}.zarr"
    model = "benchmarks.cluster_benchmark:network"
    request = Request(model, [folder / "volume.zarr"], out, patch=[PATCH], batch=1, device="cpu")
    begun = time.perf_counter()
    with cluster.one_thread():
        _, cost = settle(request, lambda cost: None, shards=BOXES)
    with (
        cluster.local_cluster(workers, sum(cost.memory.values())) as client,
        cluster.Cluster(client, request, threads=1) as started,
    ):
        ready = time.perf_counter()
        started.predict()
        boxes = time.perf_counter() - ready
    labels = open_destination(str(out), labels="segmentation").array[...]
    seconds = {"boxes": boxes, "whole": time.perf_counter() - begun}
    print(f"{workers} workers: {boxes:.1f} s of boxes, {seconds['whole']:.1f} s in all", flush=True)
    size = {"boxes": len(cost.plan), "patches": sum(cost.plan.patches)}
    return {"workers": workers, **size, "seconds": seconds}, np.asarray(labels)


def main() -> None:
    import zarr

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="where runs are added")
    options = parser.parse_args()
    found: dict[str, Any] = {"benchmark": "cluster", "shape": SHAPE, "patch": PATCH, "runs": []}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    with tempfile.TemporaryDirectory() as made:
        volume = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
        zarr.create_array(f"{made}/volume.zarr", data=volume, chunks=(64, 32, 64))
        two, labels = run(Path(made), 2)
        one, others = run(Path(made), 1)
    assert np.array_equal(labels, others)
    times = {name: one["seconds"][name] / two["seconds"][name] for name in ("boxes", "whole")}
    print(", ".join(f"{name}: {value:.2f} times" for name, value in times.items()))
    found["runs"].append({"one": one, "two": two, "times": times})
    found["machine"] = harness.machine(torch.device("cpu"))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
