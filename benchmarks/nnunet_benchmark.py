"""From a preprocessed image to labels at the image's size, by nnU-Net's predictor and by ours.

    python -m benchmarks.nnunet_benchmark --part peer ours check --json FILE
    python -m benchmarks.nnunet_benchmark --part ct memory --json FILE --plot build/nnunet.png

Both predict with the same generated model folder (117 classes, one fold, no mirroring, a network of
two small convolutions) and the same tiles; reading, preprocessing and writing of files, which are
nnU-Net's in either case, are left out. Every run is a process of its own. Its seconds are split
into the network, the fusion of tiles, and the export (all that comes after a voxel's sum is
complete); its peak is the resident memory above what was there before.

``check`` compares labels: with the float64 fusion, interpolated in float64 at the positions of
nnU-Net's function (two channels of which are compared with that function's own result), and with
nnU-Net's, whose sums are half precision. Where labels differ, it reports by how much the two
greatest true logits do.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness

CLASSES = 117
CASES: dict[str, tuple[tuple[int, int, int], int]] = {
    "peer": ((128, 128, 128), 64),
    "ours": ((128, 128, 128), 64),
    "ct": ((240, 240, 200), 128),
}
#: Depths of a volume of MEMORY_EDGE^2, in tiles of MEMORY_TILE^3; nnU-Net at the first two only.
DEPTHS, PEER_DEPTHS, MEMORY_EDGE, MEMORY_TILE = (64, 128, 256, 512), (64, 128), 64, 32


class Network(nn.Module):
    """Two convolutions: a network whose time is known and small."""

    def __init__(self, input_channels: int, num_classes: int, deep_supervision: bool = False):
        super().__init__()
        self.body = nn.Conv3d(input_channels, 8, 3, padding=1)
        self.last = nn.Conv3d(8, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.last(self.body(x).relu_())
        return logits


def predictor_of(kind: str, tile: int, folder: Path) -> Any:
    """A predictor of a generated model folder."""
    from tests.integrations import nnunet_model

    plan = nnunet_model.model_plans(
        patch_size=[tile] * 3,
        architecture={
            "network_class_name": "benchmarks.nnunet_benchmark.Network",
            "arch_kwargs": {},
            "_kw_requires_import": [],
        },
    )
    plan |= {"transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2]}
    labels = {"background": 0} | {f"organ {n}": n for n in range(1, CLASSES)}
    nnunet_model.write_model(folder, plan, labels)
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    from voxfuse.integrations.nnunet import Predictor

    made = (nnUNetPredictor if kind == "peer" else Predictor)(
        device=torch.device("cpu"), allow_tqdm=False
    )
    made.initialize_from_trained_model_folder(str(folder), (0,))
    made.network.load_state_dict(made.list_of_parameters[0])
    return made


def case_of(shape: Sequence[int]) -> tuple[Tensor, dict[str, Any]]:
    """A preprocessed image of blobs, and what nnU-Net notes of one of twice its extent."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 1, *(max(n // 8, 2) for n in shape), generator=generator)
    image = 3 * nn.functional.interpolate(coarse, tuple(shape), mode="trilinear")[0]
    native = tuple(2 * n for n in shape)
    return image.contiguous(), {
        "spacing": (0.5, 0.5, 0.5),
        "shape_before_cropping": native,
        "shape_after_cropping_and_before_resampling": native,
        "bbox_used_for_cropping": [[0, n] for n in native],
    }


class Clock:
    """Seconds spent in functions, each without those of the others that it calls."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self.seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(name)
            try:
                return function(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return call

    def patched(self, name: str, owner: Any, attribute: str) -> AbstractContextManager[Any]:
        return mock.patch.object(owner, attribute, self.timed(name, getattr(owner, attribute)))

    def _switch(self) -> None:
        now = self._now()
        if self._running:
            running = self._running[-1]
            self.seconds[running] = self.seconds.get(running, 0.0) + now - self._since
        self._since = now


def run(kind: str, shape: Sequence[int], tile: int, labels_to: Path | None) -> dict[str, Any]:
    """Predict one case; seconds by stage, peak memory."""
    from nnunetv2.inference.export_prediction import (
        convert_predicted_logits_to_segmentation_with_correct_shape as peer_export,
    )

    from voxfuse.fusion.resampling import ResamplingSink
    from voxfuse.integrations.nnunet import inference

    with tempfile.TemporaryDirectory() as folder:
        predictor = predictor_of(kind, tile, Path(folder))
    clock = Clock()

    def peer(data: Tensor, properties: dict[str, Any]) -> Any:
        logits = predictor.predict_logits_from_preprocessed_data(data)
        managers = predictor.plans_manager, predictor.configuration_manager
        return clock.timed("export", peer_export)(
            logits, *managers, predictor.label_manager, properties
        )

    def ours(data: Tensor, properties: dict[str, Any]) -> Any:
        with clock.patched("export", ResamplingSink, "write"):
            return inference.predicted_labels(predictor, data, properties)

    with clock.patched("network", type(predictor.network), "forward"):
        call = clock.timed("fusion", peer if kind == "peer" else ours)
        call(*case_of([tile] * 3))  # what happens once
        clock.seconds.clear()
        image, properties = case_of(shape)
        before = harness.reset_peak()
        labels = call(image, properties)
        peak = harness.status_bytes("VmHWM") - before
    if labels_to is not None:
        np.save(labels_to, labels)
    return {
        "shape": list(shape),
        "target": list(labels.shape),
        "tile": tile,
        "seconds": {name: clock.seconds[name] for name in ("network", "fusion", "export")},
        "peak_bytes": peak,
    }


def in_a_process(
    kind: str, shape: Sequence[int], tile: int, labels_to: Path | None = None
) -> dict[str, Any]:
    """The same in a process of its own."""
    job = json.dumps([kind, list(shape), tile, None if labels_to is None else str(labels_to)])
    command = [sys.executable, "-m", "benchmarks.nnunet_benchmark", "--run", job]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(text.splitlines()[-1])
    times = ", ".join(f"{name} {value:.1f} s" for name, value in found["seconds"].items())
    print(f"{kind} {tuple(shape)}: {times}; {found['peak_bytes'] / 2**20:.0f} MiB", flush=True)
    return found


def check(folder: Path) -> dict[str, Any]:
    """Labels of both against the float64 truth, and against each other."""
    from nnunetv2.preprocessing.resampling.default_resampling import resample_data_or_seg

    from tests.integrations import nnunet_model
    from voxfuse.ops.resample_argmax import axis_table
    from voxfuse.reference.resample_argmax import interpolated

    shape, tile = CASES["ours"]
    image, properties = case_of(shape)
    target = properties["shape_before_cropping"]
    with tempfile.TemporaryDirectory() as made, torch.inference_mode():
        logits = torch.from_numpy(
            nnunet_model.true_logits(predictor_of("ours", tile, Path(made)), image)
        )
    tables = []
    for n, m in zip(shape, target, strict=True):
        x = ((n / m) * (torch.arange(m, dtype=torch.float64) + 0.5) - 0.5).clamp(0, n - 1)
        upper = x - x.floor()
        assert torch.equal(axis_table(n, m)[0], x.floor().long())
        tables.append((x.floor().long(), torch.stack([1 - upper, upper])))
    labels = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("ours", "peer")}
    own = resample_data_or_seg(logits[:2].numpy(), target, order=1)
    worst = 0.0
    gaps: dict[str, list[Tensor]] = {"ours": [], "peer": []}
    for first in range(0, target[0], 4):
        part = slice(first, first + 4)
        index, weight = tables[0]
        values = interpolated(
            logits,
            [index[part], *(index for index, _ in tables[1:])],
            [weight[:, part], *(weight for _, weight in tables[1:])],
        )
        worst = max(worst, float((values[:2] - torch.from_numpy(own[:, part])).abs().max()))
        truth = values.argmax(0)
        for name, found in labels.items():
            where = truth != torch.from_numpy(found[part].astype(np.int64))
            best = values[:, where].topk(2, 0).values
            gaps[name].append(best[0] - best[1])
    voxels = float(np.prod(target))
    result: dict[str, Any] = {
        "greatest_logit": float(logits.abs().max()),
        "positions_differ_by": worst,
        "labels_that_differ_from_nnunets": float(np.mean(labels["ours"] != labels["peer"])),
    }
    for name, pieces in gaps.items():
        gap = torch.cat(pieces)
        result[name] = {"voxels": len(gap), "share": len(gap) / voxels}
        if len(gap):
            result[name] |= {"median_gap": float(gap.median()), "greatest_gap": float(gap.max())}
    print(json.dumps(result, indent=1), flush=True)
    return result


def memory() -> list[dict[str, Any]]:
    """Peaks over the depth of the volume."""
    rows = []
    for depth in DEPTHS:
        kinds = ("ours", "peer") if depth in PEER_DEPTHS else ("ours",)
        shape = (depth, MEMORY_EDGE, MEMORY_EDGE)
        peaks = {kind: in_a_process(kind, shape, MEMORY_TILE)["peak_bytes"] for kind in kinds}
        labels = int(np.prod([2 * n for n in shape]))
        rows.append({"depth": depth, "label_bytes": labels, "peaks": peaks})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = (*CASES, "check", "memory")
    parser.add_argument("--part", nargs="+", choices=parts, default=[], help="what to measure")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where parts are added")
    parser.add_argument("--labels", type=Path, default=Path("build"), help="where labels are kept")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw all parts of the JSON")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        kind, shape, tile, labels_to = json.loads(options.run)
        print(json.dumps(run(kind, shape, tile, labels_to and Path(labels_to))))
        return
    found: dict[str, Any] = {"benchmark": "nnunet", "classes": CLASSES, "parts": {}}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    for part in options.part:
        if part == "memory":
            found["parts"][part] = memory()
        elif part == "check":
            found["parts"][part] = check(options.labels)
        else:
            shape, tile = CASES[part]
            kind = "peer" if part == "peer" else "ours"
            labels_to = None if part == "ct" else options.labels / f"{part}.npy"
            found["parts"][part] = in_a_process(kind, shape, tile, labels_to)
    if options.json and options.part:
        found["machine"] = harness.machine(torch.device("cpu"))
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        from benchmarks import plots

        plots.draw(found, options.plot)


if __name__ == "__main__":
    main()
