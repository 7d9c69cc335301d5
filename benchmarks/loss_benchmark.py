"""The loss alone: forward and backward, with and without allocation, against its peers."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import harness, losses

DEFAULT_SHAPES = [
    (1, 2, 128, 128, 128),
    (1, 4, 128, 128, 128),
    (1, 16, 96, 96, 96),
    (1, 2, 192, 192, 192),
    (1, 4, 192, 192, 192),
]
SWEEP_VOLUMES = [(1, 2, n, n, n) for n in (48, 64, 96, 128, 160, 192)]
SWEEP_CLASSES = [(1, c, 64, 64, 64) for c in (2, 4, 8, 16, 32, 64)]
QUICK_SHAPES = [(1, 2, 64, 64, 64), (1, 4, 64, 64, 64)]


def gate(name: str, loss: losses.Loss, logits: Tensor, labels: Tensor, truth: Any) -> None:
    """Refuse to time a loss whose value or gradient is wrong."""
    value, gradient = losses.value_and_gradient(loss, logits, labels)
    true_value, true_gradient = truth
    if abs(value.item() - true_value.item()) > 2e-3 * max(1.0, abs(true_value.item())):
        raise SystemExit(f"{name}: loss {value.item():.6f}, expected {true_value.item():.6f}")
    error = (gradient.double() - true_gradient).abs().max() / true_gradient.abs().max()
    limit = 1e-3 if logits.dtype == torch.float32 else 1e-2
    if error > limit:
        raise SystemExit(f"{name}: the gradient is off by {error:.2e} of its largest value")


def forward_only(loss: losses.Loss, logits: Tensor, labels: Tensor) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return loss(logits, labels)

    return call


def operator_alone(logits: Tensor, labels: Tensor, *, full: bool = False) -> Callable[[], Any]:
    """Both passes of the operator without autograd or epilogue."""
    operators = torch.ops.voxfuse
    cotangent = torch.rand(logits.shape[0], logits.shape[1], 8 if full else 4, dtype=torch.float64)
    if full:
        cotangent[..., 4:6] = 0
    cotangent = cotangent.to(logits.device)

    def call() -> Any:
        operators.soft_confusion(logits, labels, None, 2, 2, 0, None, 0.0, full)
        return operators.soft_confusion_backward(
            cotangent, logits, labels, None, 2, 2, 0, None, 0.0
        )

    return call


def floor(logits: Tensor) -> Callable[[], Any]:
    """What the machine needs to read the logits once, and to read them again and write as much."""
    gradient = torch.empty_like(logits)

    def call() -> Any:
        logits.sum()
        gradient.copy_(logits)

    return call


def measure_shape(
    shape: tuple[int, ...], dtype: torch.dtype, options: argparse.Namespace
) -> dict[str, Any]:
    """Gate, time and weigh every competitor at one shape."""
    device = torch.device(options.device)
    logits, labels = losses.draw(shape, dtype, device)
    wanted = set(options.peers)
    if "compile-best" in wanted:  # the form that is nearly always the fastest, to save time
        peers, missing = losses.tversky_peers(
            wanted | {"compile"}, forms=("comparison",), dynamic=False
        )
    else:
        peers, missing = losses.tversky_peers(wanted)
    competitors = {"voxfuse": losses.own_loss(), **peers}
    compound, also_missing = losses.compound_competitors(wanted)
    for name, why in {**missing, **also_missing}.items():
        print(f"  {name} left out: {why}")

    tversky_truth = losses.value_and_gradient(losses.plain_one_hot, logits.double(), labels)
    for name, loss in competitors.items():
        if losses.is_tversky(name):
            gate(name, loss, logits, labels, tversky_truth)
    del tversky_truth

    leaf = logits.detach().requires_grad_()
    clock = harness.Clock(device)
    result: dict[str, Any] = {"shape": list(shape), "dtype": str(dtype).split(".")[-1]}
    everyone = {**competitors, **compound}
    modes = {"fresh": harness.allocate_fresh, "reused": harness.allocate_reused}
    for mode, prepare in modes.items():
        prepare()
        functions = {name: losses.step(loss, leaf, labels) for name, loss in everyone.items()}
        if mode == "reused":
            functions["operator"] = operator_alone(logits, labels)
            functions["floor"] = floor(logits)
            functions["voxfuse forward"] = forward_only(everyone["voxfuse"], logits, labels)
            if "monai" in everyone:
                functions["monai forward"] = forward_only(everyone["monai"], logits, labels)
        if options.extras and device.type == "cpu" and mode == "fresh":
            functions["voxfuse, 4 KiB pages"] = harness.without_huge_pages(functions["voxfuse"])
        if options.extras and dtype == torch.float32 and mode == "reused":
            functions |= extras(logits, labels)
        timings = harness.interleave(functions, clock, options.rounds, options.budget)
        result[mode] = {name: timing.summary() for name, timing in timings.items()}
    harness.allocate_fresh()
    gradient_bytes = logits.numel() * logits.element_size()
    result["gradient_bytes"] = gradient_bytes
    result["peak_extra_bytes"] = {
        # Noise only adds to a high-water mark.
        name: min(
            harness.peak_extra_bytes(losses.step(loss, leaf, labels), device) for _ in range(3)
        )
        for name, loss in everyone.items()
    }
    return result


def extras(logits: Tensor, labels: Tensor) -> dict[str, Callable[[], Any]]:
    """Variants of the operator whose cost is compared with the plain one."""
    axes = (0, *range(2, logits.ndim), 1)
    back = (0, logits.ndim - 1, *range(1, logits.ndim - 1))
    channels_last = logits.permute(axes).contiguous().permute(back)
    return {
        "operator bfloat16": operator_alone(logits.bfloat16(), labels),
        "operator float16": operator_alone(logits.half(), labels),
        "operator channels-last": operator_alone(channels_last, labels),
        "operator full": operator_alone(logits, labels, full=True),
    }


def best_compiled(row: dict[str, Any]) -> str | None:
    """The fastest of the compiled competitors."""
    compiled = [name for name in row if name.startswith("compile")]
    return min(compiled, key=lambda name: row[name]["min_ms"]) if compiled else None


def print_shape(result: dict[str, Any]) -> None:
    """Print one shape's table: times, memory, and ratios to voxfuse."""
    shape = "x".join(map(str, result["shape"]))
    print(f"\n({shape}) {result['dtype']}: milliseconds, forward + backward")
    print(
        f"  {'':<24}{'fresh':>9}{'(x)':>7}{'reused':>10}{'(x)':>7}{'p20-p80':>16}"
        f"{'memory beyond gradient':>24}"
    )
    fresh, reused = result["fresh"], result["reused"]
    for name, row in {**reused, **{n: fresh[n] for n in fresh if n not in reused}}.items():
        own = "voxfuse DiceCE" if name.endswith("DiceCE") else "voxfuse"
        cells = f"  {name:<24}"
        if name in fresh:
            ratio = fresh[name]["min_ms"] / fresh[own]["min_ms"]
            cells += f"{fresh[name]['min_ms']:>9.2f}{ratio:>7.1f}"
        else:
            cells += f"{'':>16}"
        if name in reused:
            cells += f"{row['min_ms']:>10.2f}{row['min_ms'] / reused[own]['min_ms']:>7.1f}"
        else:
            cells += f"{'':>17}"
        cells += f"{row['p20_ms']:>8.1f}-{row['p80_ms']:<7.1f}"
        if name in result["peak_extra_bytes"]:
            beyond = result["peak_extra_bytes"][name] - result["gradient_bytes"]
            cells += f"{max(0, beyond) / 2**20:>15.2f} MiB"
        print(cells)
    best = best_compiled(fresh)
    if "monai" in fresh:
        print(
            f"  against MONAI: {fresh['monai']['min_ms'] / fresh['voxfuse']['min_ms']:.1f}x; "
            "operator against MONAI, memory reused: "
            f"{reused['monai']['min_ms'] / reused['operator']['min_ms']:.1f}x; "
            "operator with its gradient at hand against MONAI that allocates: "
            f"{fresh['monai']['min_ms'] / reused['operator']['min_ms']:.1f}x"
        )
    if best:
        print(
            f"  against the best compiled ({best}): "
            f"{fresh[best]['min_ms'] / fresh['voxfuse']['min_ms']:.1f}x"
        )
    print(
        "  operator against reading once plus copying once: "
        f"{reused['operator']['min_ms'] / reused['floor']['min_ms']:.2f}x"
    )


def run(options: argparse.Namespace, dtype: torch.dtype) -> dict[str, Any]:
    """Run the whole benchmark and return what --json writes."""
    shapes = options.shapes or (QUICK_SHAPES if options.quick else DEFAULT_SHAPES)
    if options.sweep:
        shapes = list(dict.fromkeys(SWEEP_VOLUMES + SWEEP_CLASSES))
        options.peers = [peer for peer in options.peers if peer != "compile"] + ["compile-best"]
        options.budget = min(options.budget, 12.0)
    if options.quick:
        options.rounds = min(options.rounds, 5)
    device = torch.device(options.device)
    results: dict[str, Any] = {
        "benchmark": "sweep" if options.sweep else "loss",
        "machine": harness.machine(device),
        "shapes": [],
        "small_step": small_step(device),
    }
    print(f"machine: {results['machine']}")
    print(f"a (1,2,32^3) step: {results['small_step']}")
    if options.scaling and device.type == "cpu":
        results["scaling"] = scaling(dtype, options)
        print(f"scaling of the operator, memory reused: {results['scaling']}")
    for shape in shapes:
        measured = measure_shape(shape, dtype, options)
        print_shape(measured)
        results["shapes"].append(measured)
        if options.profile:
            profile(shape, dtype, device, options.profile)
        if options.perf:
            measured["instructions_per_voxel"] = instructions_per_voxel(shape)
            print(f"  instructions a voxel: {measured['instructions_per_voxel']}")
    return results


def scaling(dtype: torch.dtype, options: argparse.Namespace) -> dict[str, float]:
    """The operator over threads and over volume size, two classes, memory reused."""
    device = torch.device("cpu")
    threads = torch.get_num_threads()

    def with_threads(count: int, function: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            torch.set_num_threads(count)
            return function()

        return call

    edges = (192, 384)
    operators = {n: operator_alone(*losses.draw((1, 2, n, n, n), dtype, device)) for n in edges}
    functions = {f"{n}^3": with_threads(threads, operators[n]) for n in edges}
    functions["192^3, one thread"] = with_threads(1, operators[192])
    harness.allocate_reused()
    timings = harness.interleave(functions, harness.Clock(device), options.rounds, options.budget)
    harness.allocate_fresh()
    torch.set_num_threads(threads)
    least = {name: timing.summary()["min_ms"] for name, timing in timings.items()}
    result = {f"{name}, ms": ms for name, ms in least.items()}
    result["threads"] = threads
    result["speedup over one thread"] = least["192^3, one thread"] / least["192^3"]
    result["ns a voxel, 384^3 over 192^3"] = least["384^3"] / least["192^3"] / 8
    return result


def small_step(device: torch.device) -> dict[str, float]:
    """Overhead: a step on a 32^3 patch through the public module against a trivial one."""
    import voxfuse

    leaf = torch.randn(1, 2, 32, 32, 32, device=device, requires_grad=True)
    labels = torch.randint(0, 2, (1, 1, 32, 32, 32), device=device, dtype=torch.uint8)
    module = voxfuse.TverskyLoss(activation="softmax")
    functions = {
        "trivial": lambda: (leaf * 2).sum().backward(),
        "voxfuse": lambda: module(leaf, labels).backward(),
    }
    clock = harness.Clock(device, cold_bytes=4)
    harness.allocate_reused()
    timings = harness.interleave(functions, clock, rounds=400)
    harness.allocate_fresh()
    medians = {name: timing.summary()["median_ms"] * 1e3 for name, timing in timings.items()}
    return {
        "trivial_us": medians["trivial"],
        "voxfuse_us": medians["voxfuse"],
        "ratio": medians["voxfuse"] / medians["trivial"],
    }


def profile(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, directory: Path
) -> None:
    """Leave a torch.profiler trace of one step of the fused loss."""
    import voxfuse

    logits, labels = losses.draw(shape, dtype, device)
    leaf = logits.requires_grad_()
    module = voxfuse.TverskyLoss(activation="softmax")
    module(leaf, labels).backward()
    with torch.profiler.profile(profile_memory=True) as profiler:
        module(leaf, labels).backward()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"trace_{'x'.join(map(str, shape))}.json"
    profiler.export_chrome_trace(str(path))
    print(f"  trace: {path}")


_COUNTED = """
import torch
torch.set_num_threads(1)
import voxfuse
from benchmarks.loss_benchmark import operator_alone
from benchmarks.losses import draw
logits, labels = draw({shape}, torch.float32, torch.device("cpu"))
call = operator_alone(logits, labels)
for _ in range({repeats}):
    call()
"""


def instructions_per_voxel(shape: tuple[int, ...]) -> float | str:
    """Instructions a voxel of both passes, by callgrind: the difference of two run lengths."""
    if shutil.which("valgrind") is None:
        return "valgrind is not installed"
    small = (shape[0], shape[1], 32, 32, 32)
    counts = []
    for repeats in (1, 5):
        with tempfile.NamedTemporaryFile(suffix=".out") as out:
            code = _COUNTED.format(shape=small, repeats=repeats)
            done = subprocess.run(
                [
                    "valgrind",
                    "--tool=callgrind",
                    f"--callgrind-out-file={out.name}",
                    sys.executable,
                    "-c",
                    code,
                ],
                capture_output=True,
                text=True,
                check=False,
                cwd=Path(__file__).resolve().parent.parent,
            )
            totals = [line for line in Path(out.name).read_text().splitlines() if "totals:" in line]
            if done.returncode != 0 or not totals:
                return f"valgrind failed: {done.stderr.strip().splitlines()[-1]}"
            counts.append(int(totals[0].split()[1]))
    return (counts[1] - counts[0]) / (4 * small[0] * 32**3)
