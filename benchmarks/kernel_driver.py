"""Calls every kernel of a device once, small: what compute-sanitizer and the profilers watch.

python benchmarks/kernel_driver.py --device cuda              # once each, for a sanitizer
python benchmarks/kernel_driver.py --device cuda --profile F  # summary of a torch.profiler trace
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

import voxfuse
from voxfuse.contract import Activation, Resampled
from voxfuse.ops.finalize_slab import finalize_slab
from voxfuse.ops.resample_argmax import axis_table

NONE, SIGMOID, SOFTMAX = Activation


def backends_on(device: torch.device) -> dict[str, Any]:
    """The operator tables of the compiled backends that run on ``device``."""
    available = voxfuse.backends()
    wanted = {"cuda": ("cuda", "triton"), "cpu": ("cpp",)}[device.type]
    return {
        name: torch.ops.voxfuse_triton if name == "triton" else torch.ops.voxfuse
        for name in wanted
        if available[name].available
    }


def _confusion(
    operators: Any,
    device: torch.device,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    activation: int = SOFTMAX,
    dense: bool = False,
) -> Callable[[], Any]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(shape, generator=generator).to(dtype).to(device)
    if dense:
        target = torch.rand(shape, generator=generator).to(device)
    else:
        labels = torch.randint(0, shape[1], (shape[0], *shape[2:]), generator=generator)
        target = labels.to(torch.uint8).to(device)
    cotangent = torch.rand(*shape[:2], 4, dtype=torch.float64, generator=generator).to(device)
    options = (activation, activation, 0, None, 0.0)

    def call() -> Any:
        operators.soft_confusion(logits, target, None, *options, False)
        return operators.soft_confusion_backward(cotangent, logits, target, None, *options)

    return call


def _epilogue(backend: str, device: torch.device) -> Callable[[], Any]:
    logits = torch.randn(2, 3, 12, 10, 9, device=device, requires_grad=True)
    labels = torch.randint(0, 3, (2, 1, 12, 10, 9), device=device, dtype=torch.uint8)
    module = voxfuse.DiceCELoss(backend=backend)
    return lambda: module(logits, labels).backward()


def _fusion(operators: Any, device: torch.device, edge: int, patch: int) -> Callable[[], Any]:
    starts = list(range(0, edge - patch + 1, patch // 2))
    # The operators take their tables on the device; only the Python wrappers move them there.
    grid = torch.cartesian_prod(*[torch.tensor(starts)] * 3).to(device)
    rows = torch.zeros_like(grid)
    weights = [(torch.rand(1, patch, dtype=torch.float64) + 0.5).to(device)] * 3
    patches = torch.randn(len(grid), 5, patch, patch, patch, device=device)
    volume = [edge] * 3

    def call() -> Any:
        fused = operators.overlap_add(patches, grid, rows, weights, None, volume)
        operators.overlap_add_backward(fused, grid, rows, weights, None)
        total = torch.zeros(volume, dtype=torch.float64, device=device)
        operators.overlap_weights_(total, grid, rows, weights, 0, 0, edge)
        ring = torch.zeros(5, *volume, device=device)
        operators.overlap_add_(ring, patches, grid, rows, weights, total, 0, 0, edge)
        return ring

    return call


def _finalize(backend: str, device: torch.device) -> Callable[[], Any]:
    ring = torch.randn(5, 12, 10, 9, device=device)

    def call() -> Any:
        for mode, channels, dtype in (("labels", 1, torch.uint8), ("values", 5, torch.float32)):
            out = torch.empty(channels, 4, 10, 9, dtype=dtype, device=device)
            finalize_slab(ring.clone(), out, mode, ring_axis=0, start=3, stop=7, backend=backend)

    return call


def _resample(operators: Any, device: torch.device, channels: int) -> Callable[[], Any]:
    logits = torch.randn(channels, 9, 10, 11, device=device)
    tables = [
        axis_table(n, m, order, device=device)
        for n, m, order in ((9, 4, 0), (10, 17, 1), (11, 20, 1))
    ]
    index, weight = (list(x) for x in zip(*tables, strict=True))
    labels = list(range(1, channels + 1))

    def call() -> Any:
        out = torch.empty(channels, 4, 17, 20, dtype=torch.uint8, device=device)
        operators.resample_argmax(out[:1], logits, index, weight, Resampled.labels, 0.0, [], False)
        operators.resample_argmax(
            out[:1], logits, index, weight, Resampled.regions, 0.0, labels, True
        )
        mask = out.view(torch.bool)
        operators.resample_argmax(mask, logits, index, weight, Resampled.mask, 0.0, [], False)
        return out

    return call


def _head(operators: Any, device: torch.device, dtype: torch.dtype) -> Callable[[], Any]:
    features = torch.randn(2, 32, 12, 11, 10, device=device).to(dtype)
    weight, bias = torch.randn(117, 32, device=device).to(dtype), torch.zeros(117, device=device)
    labels = torch.randint(0, 117, (2, 12, 11, 10), device=device, dtype=torch.uint8)
    cotangent = torch.rand(2, 117, 4, dtype=torch.float64, device=device)
    arguments = (features, weight, bias.to(dtype), labels, None)
    options = (SOFTMAX, SOFTMAX, 0, None, 0.0)

    def call() -> Any:
        operators.head_confusion(*arguments, *options, False, 1 << 22)
        return operators.head_confusion_backward(
            cotangent, *arguments, *options, 1 << 22, True, True
        )

    return call


def calls(device: torch.device, scale: int = 1) -> dict[str, Callable[[], Any]]:
    """One call for every kind of kernel; ``scale`` multiplies the edges of the volumes."""
    result: dict[str, Callable[[], Any]] = {}
    spatial = (12 * scale, 11 * scale, 9 * scale)
    for name, operators in backends_on(device).items():
        for classes in (2, 4, 16, 20, 150, 300):  # every path by number of classes
            dtype = torch.bfloat16 if classes in (4, 150) else torch.float32
            shape = (1 if classes > 100 else 2, classes, *spatial)
            result[f"{name}: soft_confusion, {classes} classes"] = _confusion(
                operators, device, shape, dtype
            )
        result[f"{name}: soft_confusion, sigmoid"] = _confusion(
            operators, device, (2, 3, *spatial), torch.float32, SIGMOID, dense=True
        )
        result[f"{name}: soft_confusion, dense"] = _confusion(
            operators, device, (2, 3, *spatial), torch.float32, SOFTMAX, dense=True
        )
        result[f"{name}: DiceCELoss"] = _epilogue(name, device)
        result[f"{name}: overlap_add"] = _fusion(operators, device, 24 * scale, 8 * scale)
        result[f"{name}: finalize_slab"] = _finalize(name, device)
        result[f"{name}: resample_argmax"] = _resample(operators, device, 5)
        result[f"{name}: head_confusion"] = _head(operators, device, torch.float32)
    return result


def profile(device: torch.device, path: Path, scale: int) -> None:
    """Write the kernels of one round, with their device time, as a small JSON file."""
    cuda = device.type == "cuda"
    named = calls(device, scale)
    for call in named.values():
        call()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        torch.cuda.synchronize()
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    summaries = {}
    for name, call in named.items():
        with torch.profiler.profile(activities=activities) as profiler:
            call()
            if cuda:
                torch.cuda.synchronize()
        on_device = [
            event
            for event in profiler.events()
            if not cuda or event.device_type == torch.autograd.DeviceType.CUDA
        ]
        rows: dict[str, list[float]] = {}
        for event in on_device:
            elapsed = event.time_range.elapsed_us()
            rows.setdefault(event.name[:120], []).append(elapsed)
        longest = sorted(rows.items(), key=lambda item: -sum(item[1]))[:8]
        summaries[name] = [
            {"name": kernel, "calls": len(times), "total_us": round(sum(times), 2)}
            for kernel, times in longest
        ]
    path.write_text(json.dumps(summaries, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--profile", type=Path, metavar="FILE")
    parser.add_argument("--only", default="", help="only the calls whose name contains this")
    parser.add_argument(
        "--turn",
        type=float,
        default=0.0,
        metavar="PART",
        help="begin after this part of the calls: drivers side by side then share what Triton "
        "compiles, instead of all compiling the same kernel at the same time",
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    if options.profile:
        profile(device, options.profile, options.scale)
        return 0
    torch.manual_seed(0)
    selected = {k: v for k, v in calls(device, options.scale).items() if options.only in k}
    if not selected:
        print(f"no kernel runs on {device}")
        return 1
    names = list(selected)
    first = int(options.turn * len(names))
    failed = 0
    for name in (*names[first:], *names[:first]):
        try:
            selected[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
        except Exception:  # the others are to be watched all the same
            failed += 1
            traceback.print_exc()
            print(f"FAILED: {name}", flush=True)
        else:
            print(name, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
