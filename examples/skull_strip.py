"""Brain extraction from a real head MR, patch by patch: why the fusion window matters.

    python examples/skull_strip.py                          # the bundled head
    python examples/skull_strip.py --image head.nii.gz      # your own head MR

A pretrained 3D U-Net predicts overlapping patches; voxfuse fuses them. The script prints two
tables and a comparison of the Tversky loss, and writes report.json, two pictures and the brain
mask (NIfTI) into a folder. It needs the extra "demo" (matplotlib, nibabel).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import head_image
import skull_strip_pictures as pictures
import torch
import torch.nn.functional as F
from head_image import Grid, Head, ImageError, is_brain
from measure import Stopwatch, how_memory_is_measured, peak_memory
from skull_strip_unet import SkullStripUNet, load_skull_strip_unet
from torch import Tensor

import voxfuse
from voxfuse.fusion.windows import resolve_window

DATA = Path(__file__).resolve().parents[1] / "data"
NATIVE_PATCH = 128
NATIVE_WINDOWS = ("constant", "gaussian", "bspline5")
TRAINING_PATCHES = (96, 80, 64)
TRAINING_WINDOWS = (
    "constant",
    "gaussian",
    "hashemi",
    "bspline1",
    "bspline2",
    "bspline3",
    "bspline5",
    "bspline7",
)
ALPHA, BETA = 0.3, 0.7

PROBLEM = """\
The problem
  A 3D scan at full resolution is often too large for the GPU that has to segment it, so it is cut
  into overlapping patches, the network predicts each patch, and the predictions are put together
  again. Near the border of its patch the network sees only half of its surroundings, and what it
  says there is poor. Where patches overlap, the window decides how much each voxel of each patch
  counts: a constant window takes the plain mean and lets the poor borders in; a smooth window
  trusts the centres.

  Here is that effect on a real head MR and a real network, neither of them made for this demo:
  which voxels are brain? Dice is the agreement with the brain mask, 1 is perfect.
"""


@dataclass(frozen=True)
class Run:
    """One way to a brain mask, and what it cost."""

    grid: str
    patch: int
    window: str | None
    probability: Tensor
    dice: float | None
    dice_to_whole: float
    network_seconds: float
    fuse_seconds: float
    peak_extra_bytes: int | None

    def record(self) -> dict[str, Any]:
        keys = ("grid", "patch", "window", "dice", "dice_to_whole", "network_seconds")
        values = {key: getattr(self, key) for key in keys}
        return values | {
            "fuse_seconds": self.fuse_seconds,
            "peak_extra_bytes": self.peak_extra_bytes,
        }


class Predictor:
    """The network as the sliding window calls it; counts patches and seconds."""

    def __init__(self, network: SkullStripUNet, device: torch.device) -> None:
        self.watch = Stopwatch(device)
        self.patches = 0
        self._network = network

    def __call__(self, patches: Tensor) -> Tensor:
        with self.watch:
            self.patches += patches.shape[0]
            return torch.sigmoid(self._network(patches))


class Replay:
    """Records a predictor's outputs in the first sliding-window run, repeats them afterwards.

    Every run visits the same patches in the same order, so that windows can be compared on the
    very same predictions, and the network runs once.
    """

    def __init__(self, predictor: Callable[[Tensor], Tensor]) -> None:
        self._predictor = predictor
        self._outputs: list[Tensor] = []
        self._next = -1  # recording

    def rewind(self) -> None:
        self._next = 0

    def __call__(self, patches: Tensor) -> Tensor:
        if self._next < 0:
            self._outputs.append(self._predictor(patches))
            return self._outputs[-1]
        self._next += 1
        return self._outputs[self._next - 1]


def dice(first: Tensor, second: Tensor) -> float:
    """Dice overlap of two bool masks; 1 if both are empty."""
    total = int(first.sum()) + int(second.sum())
    return 2 * int((first & second).sum()) / total if total else 1.0


def predict_whole(network: SkullStripUNet, grid: Grid, device: torch.device) -> tuple[Run, Tensor]:
    """The whole volume in one pass of the network, without patches; also returns its logits."""
    sizes = grid.image.shape
    # The network halves the resolution three times: its input is padded to multiples of 8.
    padding = [amount for size in reversed(sizes) for amount in (0, -size % 8)]
    volume = F.pad(grid.image, padding)[None, None].to(device)
    watch = Stopwatch(device)
    with peak_memory(device) as peak, watch:
        logits = network(volume)[..., : sizes[0], : sizes[1], : sizes[2]]
        probability = torch.sigmoid(logits)
    probability = probability[0, 0].cpu()
    accuracy = None if grid.mask is None else dice(is_brain(probability), grid.mask)
    run = Run(grid.name, 0, None, probability, accuracy, 1.0, watch.seconds, 0.0, peak.extra_bytes)
    return run, logits.cpu()


def predict_patches(
    predictor: Callable[[Tensor], Tensor],
    network_watch: Stopwatch,
    grid: Grid,
    whole: Run,
    patch: int,
    window: str,
    device: torch.device,
    backend: str,
) -> Run:
    """Patches of ``patch`` voxels at overlap 0.5, fused with ``window``."""
    volume = grid.image[None, None].to(device)
    before = network_watch.seconds
    total = Stopwatch(device)
    with peak_memory(device) as peak, total:
        fused = voxfuse.sliding_window_inference(
            volume,
            (patch,) * 3,
            1,
            predictor,
            overlap=0.5,
            window=window,
            backend=backend,
        )
    probability = fused[0, 0].cpu()
    network_seconds = network_watch.seconds - before
    return Run(
        grid.name,
        patch,
        window,
        probability,
        None if grid.mask is None else dice(is_brain(probability), grid.mask),
        dice(is_brain(probability), is_brain(whole.probability)),
        network_seconds,
        total.seconds - network_seconds,
        peak.extra_bytes,
    )


def native_table(
    network: SkullStripUNet, grid: Grid, device: torch.device, backend: str
) -> list[Run]:
    """Full resolution: every row is a complete run of the network and the fusion."""
    print(
        f"\nFull resolution: {shape_of(grid)} voxels of 1 mm, {NATIVE_PATCH}^3 patches, overlap 0.5"
    )
    table = Table(
        ("", 26, "<"),
        ("Dice", 7, ">"),
        ("Dice to whole", 15, ">"),
        ("network s", 11, ">"),
        ("fusion s", 10, ">"),
        ("peak memory", 13, ">"),
    )
    whole, _ = predict_whole(network, grid, device)
    runs = [whole]

    def show(name: str, run: Run) -> None:
        table.row(
            name,
            number(run.dice, 3),
            number(run.dice_to_whole, 3),
            number(run.network_seconds, 1),
            number(run.fuse_seconds if run.patch else None, 2),
            megabytes(run.peak_extra_bytes),
        )

    show("whole volume, one pass", whole)
    for window in NATIVE_WINDOWS:
        predictor = Predictor(network, device)
        run = predict_patches(
            predictor, predictor.watch, grid, whole, NATIVE_PATCH, window, device, backend
        )
        runs.append(run)
        show(f"patches, {window}", run)
    return runs


def training_table(
    network: SkullStripUNet,
    grid: Grid,
    whole: Run,
    patch_sizes: Sequence[int],
    device: torch.device,
    backend: str,
) -> list[Run]:
    """The grid the network was trained on: patch size against window, same predictions a row."""
    print(
        f"\nThe grid the network was trained on: {shape_of(grid)} voxels, overlap 0.5, Dice of "
        f"patch size x window\n(whole volume in one pass: {number(whole.dice, 3)}; every window "
        "of a row fuses the same predictions)"
    )
    table = Table(
        ("patch", 9, "<"),
        *((window, 10, ">") for window in TRAINING_WINDOWS),
        ("network s", 11, ">"),
    )
    runs = []
    for patch in patch_sizes:
        predictor = Predictor(network, device)
        replay = Replay(predictor)
        volume = grid.image[None, None].to(device)
        # One run beforehand fills the cache, so that the timed runs are the fusion alone.
        voxfuse.sliding_window_inference(
            volume, (patch,) * 3, 1, replay, overlap=0.5, window="constant", backend=backend
        )
        row = []
        for window in TRAINING_WINDOWS:
            replay.rewind()
            run = predict_patches(
                replay, predictor.watch, grid, whole, patch, window, device, backend
            )
            row.append(Run(**{**run.__dict__, "network_seconds": predictor.watch.seconds}))
        runs += row
        accuracies = [run.dice if run.dice is not None else run.dice_to_whole for run in row]
        table.row(
            f"{patch}^3",
            *(number(accuracy, 3) for accuracy in accuracies),
            number(predictor.watch.seconds, 1),
        )
    table.row("width", *(number(effective_width(w), 3) for w in TRAINING_WINDOWS), "")
    print(
        "  width: standard deviation of the window over the patch size. It is what matters most: "
        "at equal\n  width a Gaussian and a B-spline give the same Dice. The smaller the patch, "
        "the narrower it should be."
    )
    return runs


def effective_width(window: str, size: int = 96) -> float:
    """Standard deviation of ``window`` as a distribution over the patch, as a part of its size."""
    weights = torch.from_numpy(resolve_window(window, [size])[0])
    position = (torch.arange(size, dtype=torch.float64) + 0.5) / size - 0.5
    return float(((weights * position**2).sum() / weights.sum()).sqrt())


def compare_losses(
    logits: Tensor, target: Tensor, backend: str, repeats: int
) -> list[dict[str, Any]]:
    """Value, gradient, time and memory of the Tversky loss, one row an implementation.

    The truth is the formula in float64, differentiated by PyTorch.
    """
    device = logits.device
    exact = logits.double().requires_grad_()
    exact_tversky(exact, target).backward()
    truth = exact.grad
    assert truth is not None
    losses: dict[str, Callable[[Tensor], Tensor]] = {}
    name = backend if backend != "auto" else automatic_backend(device)
    options = {"alpha": ALPHA, "beta": BETA, "activation": "sigmoid"}
    fused = voxfuse.TverskyLoss(**options, backend=backend)
    losses[f"voxfuse {name}"] = lambda z: fused(z, target)
    if name != "reference":
        reference = voxfuse.TverskyLoss(**options, backend="reference")
        losses["voxfuse reference"] = lambda z: reference(z, target)
    if importlib.util.find_spec("monai") is not None:
        from monai.losses import TverskyLoss

        peer = TverskyLoss(sigmoid=True, alpha=ALPHA, beta=BETA)
        as_monai_wants_it = target.float()
        version = importlib.metadata.version("monai")
        losses[f"MONAI {version}"] = lambda z: peer(z, as_monai_wants_it)

    def forward_backward(loss: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        inputs = logits.detach().requires_grad_()
        value = loss(inputs)
        value.backward()
        assert inputs.grad is not None
        return value, inputs.grad

    records: dict[str, dict[str, Any]] = {}
    for label, loss in losses.items():
        forward_backward(loss)  # warm up
        with peak_memory(device) as peak:
            value, gradient = forward_backward(loss)
        error = (gradient.double() - truth).abs().max() / truth.abs().max()
        records[label] = {
            "implementation": label,
            "value": float(value.detach()),
            "max_grad_error": float(error),
            "forward_backward_ms": 0.0,
            "peak_extra_bytes": peak.extra_bytes,
        }
        del value, gradient
    times: dict[str, list[float]] = {label: [] for label in losses}
    for _ in range(repeats):  # interleaved: a busy moment of the machine hits all alike
        for label, loss in losses.items():
            watch = Stopwatch(device)
            with watch:
                forward_backward(loss)
            times[label].append(1000 * watch.seconds)
    for label, record in records.items():
        record["forward_backward_ms"] = statistics.median(times[label])
    return list(records.values())


def exact_tversky(logits: Tensor, target: Tensor, smooth: float = 1e-5) -> Tensor:
    """The Tversky loss written out, in the dtype of ``logits``."""
    p, g = torch.sigmoid(logits), target.to(logits.dtype)
    tp, fp, fn = (p * g).sum(), (p * (1 - g)).sum(), ((1 - p) * g).sum()
    return 1 - (tp + smooth) / (tp + ALPHA * fp + BETA * fn + smooth)


def loss_table(records: list[dict[str, Any]], logits: Tensor, against: str) -> None:
    size = logits.numel() * logits.element_size()
    print(
        f"\nThe Tversky loss (alpha {ALPHA} on false positives, beta {BETA} on false negatives) "
        f"and its gradient,\non the network's logits ({shape_text(logits.shape[2:])}, "
        f"{size / 2**20:.0f} MiB) against {against}"
    )
    table = Table(
        ("", 22, "<"),
        ("loss", 12, ">"),
        ("gradient error", 16, ">"),
        ("forward+backward ms", 21, ">"),
        ("peak memory", 13, ">"),
    )
    for record in records:
        table.row(
            record["implementation"],
            f"{record['value']:.7f}",
            f"{record['max_grad_error']:.1e}",
            f"{record['forward_backward_ms']:.1f}",
            megabytes(record["peak_extra_bytes"]),
        )
    print(
        "  gradient error: largest deviation from float64, relative to the largest gradient. The "
        "memory\n  includes the gradient itself, which is as large as the logits."
    )


class Table:
    """Prints rows as they come, under a heading."""

    def __init__(self, *columns: tuple[str, int, str]) -> None:
        self._columns = columns
        heading = "".join(f"{name:{side}{width}}" for name, width, side in columns)
        print(f"  {heading}\n  {'-' * len(heading)}")

    def row(self, *cells: str) -> None:
        pairs = zip(self._columns, cells, strict=True)
        line = "".join(f"{cell:{side}{width}}" for (_, width, side), cell in pairs)
        print(f"  {line}".rstrip(), flush=True)


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def megabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.0f} MiB"


def shape_text(shape: Sequence[int]) -> str:
    return "x".join(str(size) for size in shape)


def shape_of(grid: Grid) -> str:
    return shape_text(grid.image.shape)


def automatic_backend(device: torch.device) -> str:
    """The backend that "auto" stands for on ``device``."""
    order = ("cuda", "triton") if device.type == "cuda" else ("cpp",)
    known = voxfuse.backends()
    return next((name for name in order if known[name].available), "reference")


def describe_machine(device: torch.device, backend: str) -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        processor = names[0].split(":", 1)[1].strip() if names else processor
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": processor,
        "cores": usable,
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "device": str(device),
        "backend": backend if backend != "auto" else automatic_backend(device),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "voxfuse": voxfuse.__version__,
        "peak_extra_bytes": how_memory_is_measured(device),
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Brain extraction from a head MR, patch by patch: why the fusion window "
        "matters."
    )
    parser.add_argument(
        "--image", type=Path, metavar="FILE.nii.gz", help="your own T1 head MR with its skull"
    )
    parser.add_argument(
        "--mask", type=Path, metavar="FILE.nii.gz", help="its brain mask (> 0), to compare with"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("build/demo"), metavar="DIR", help="default: build/demo"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, ...")
    parser.add_argument(
        "--backend",
        default="auto",
        choices=("auto", "cpp", "cuda", "triton", "reference"),
        help="voxfuse backend for fusion and loss (default: the fastest that is available)",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="only the 128x128x128 grid and 96^3 patches: seconds instead of minutes",
    )
    options = parser.parse_args(arguments)
    if options.mask is not None and options.image is None:
        parser.error("--mask goes with --image")
    return options


def choose_device(name: str, backend: str) -> torch.device:
    """Check ``--device`` and ``--backend`` before any work is done."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ImageError(f"--device: {name!r} is no device: {error}") from error
    if device.type not in ("cpu", "cuda"):
        raise ImageError(f"--device: got {name!r}, expected cpu or cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ImageError(f"--device: got {name!r}, but PyTorch sees no GPU here")
    if backend != "auto":
        known = voxfuse.backends()[backend]
        if not known.available:
            raise ImageError(f"--backend: {backend} is not available here: {known.reason}")
        if device.type not in known.devices:
            raise ImageError(
                f"--backend: {backend} runs on {' or '.join(known.devices)}, not on {device.type}"
            )
    return device


def read(options: argparse.Namespace) -> Head:
    if options.image is not None:
        return head_image.read_head(options.image, options.mask, clip=True)
    folder = DATA / "head_mr"
    return head_image.read_head(folder / "ch2.nii.gz", folder / "ch2bet.nii.gz", clip=False)


@torch.no_grad()
def segment(
    head: Head, device: torch.device, backend: str, quick: bool
) -> tuple[list[Run], Grid, Tensor]:
    """Both tables. Returns their rows, the 128^3 grid and the network's logits on it."""
    network = load_skull_strip_unet(DATA / "skull_strip_unet" / "weights.npz").to(device)
    network(torch.zeros(1, 1, 16, 16, 16, device=device))  # start-up costs are not the network's
    training = head.training()
    whole, logits = predict_whole(network, training, device)
    sizes = TRAINING_PATCHES[:1] if quick else TRAINING_PATCHES
    runs = [whole, *training_table(network, training, whole, sizes, device, backend)]
    if not quick:
        runs += native_table(network, head.native(), device, backend)
    return runs, training, logits


def find(runs: list[Run], grid: str, patch: int, window: str | None) -> Run:
    return next(run for run in runs if (run.grid, run.patch, run.window) == (grid, patch, window))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    start = time.perf_counter()
    try:
        device = choose_device(options.device, options.backend)
        head = read(options)
    except ImageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device, options.backend)
    print(PROBLEM)
    print(f"Image    {head.path}" + "".join(f"\n         {note}" for note in head.notes))
    print(
        f"Machine  {machine['gpu'] or machine['processor']}, {machine['threads']} threads, PyTorch "
        f"{machine['torch']}, voxfuse {machine['voxfuse']} on backend {machine['backend']}"
    )
    print(textwrap.fill(f"Memory   {machine['peak_extra_bytes']}", 98, subsequent_indent=" " * 9))

    runs, training, logits = segment(head, device, options.backend, options.quick)
    whole = find(runs, "128", 0, None)
    target = training.mask if training.mask is not None else is_brain(whole.probability)
    losses = compare_losses(
        logits.to(device),
        target[None, None].to(device),
        options.backend,
        repeats=3 if options.quick else 5,
    )
    against = "the brain mask" if head.mask is not None else "its own thresholded prediction"
    loss_table(losses, logits, against)

    grid, patch = (
        (training, TRAINING_PATCHES[0]) if options.quick else (head.native(), NATIVE_PATCH)
    )
    shown = {name: find(runs, grid.name, patch, name) for name in pictures.TITLES}
    outputs = {
        "fusion.png": "the head, the masks of three windows and the difference they make",
        "windows.png": "the windows in one and two dimensions",
        "brain_mask.nii.gz": f"the mask (patches {patch}^3, bspline5) on the image's own grid",
        "report.json": "all figures",
    }
    pictures.draw_fusion(
        options.out / "fusion.png",
        grid,
        patch,
        {name: run.probability for name, run in shown.items()},
        {name: run.dice for name, run in shown.items()},
    )
    pictures.draw_windows(options.out / "windows.png", TRAINING_WINDOWS)
    head.save_mask(shown["bspline5"].probability, options.out / "brain_mask.nii.gz")
    report = {
        "machine": machine,
        "image": head.path.name,
        "preparation": list(head.notes),
        "seconds": time.perf_counter() - start,
        "fusion": [run.record() for run in runs],
        "loss": losses,
    }
    (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    print("\nWritten")
    for name, what in outputs.items():
        print(f"  {options.out / name!s:<34} {what}")
    print(f"in {report['seconds']:.0f} seconds.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
