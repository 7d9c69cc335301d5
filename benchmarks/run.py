"""Benchmarks of voxfuse: ``python benchmarks/run.py {loss,step,fusion,head} --help``.

A result is checked before it is timed; competitors run interleaved in one process; the table, the
JSON and the plot come from the same measurements. See benchmarks/harness.py for the method.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import loss_benchmark

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def shape(text: str) -> tuple[int, ...]:
    """Parse "1x2x128x128x128", or "1x2x128^3"."""
    sizes: list[int] = []
    try:
        for part in text.split("x"):
            base, _, power = part.partition("^")
            sizes += [int(base)] * (int(power) if power else 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape such as 1x2x128^3") from None
    if len(sizes) < 3:
        raise argparse.ArgumentTypeError(f"{text!r} needs batch, classes and a spatial axis")
    return tuple(sizes)


def names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds (default 15)")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds a shape and mode (default 60)"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the measurements")
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    loss = commands.add_parser("loss", help="time and memory of the losses alone")
    add_common(loss)
    loss.add_argument("--shapes", nargs="+", type=shape, default=None, metavar="BxCxZxYxX")
    loss.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    loss.add_argument(
        "--peers",
        type=names,
        default=["monai", "nnunet", "exacta", "compile", "reference"],
        help="comma-separated: monai,nnunet,exacta,compile,reference",
    )
    loss.add_argument(
        "--sweep", action="store_true", help="over volume sizes at 2 classes and classes at 64^3"
    )
    loss.add_argument(
        "--scaling", action="store_true", help="one thread against all, 192^3 against 384^3 (CPU)"
    )
    loss.add_argument("--extras", action="store_true", help="half types, layouts, full statistics")
    loss.add_argument("--profile", type=Path, metavar="DIR", help="leave torch.profiler traces")
    loss.add_argument(
        "--perf", action="store_true", help="count instructions a voxel with valgrind (slow)"
    )
    step = commands.add_parser("step", help="time and memory of a whole training step")
    add_common(step)
    step.add_argument("--classes", type=int, nargs="+", default=[2, 14, 117])
    step.add_argument("--patch", type=int, default=64, help="cubic patch (default 64)")
    step.add_argument("--limit-gib", type=float, help="also find the largest patch that fits")
    fusion = commands.add_parser("fusion", help="time and memory of the sliding window alone")
    add_common(fusion)
    fusion.add_argument(
        "--classes",
        type=int,
        nargs="+",
        default=[4, 20, 60],
        help="of the memory; times are those of the first (default 4 20 60)",
    )
    fusion.add_argument(
        "--depths",
        type=int,
        nargs="+",
        default=[128, 256, 512],
        help="slices of the volume whose memory is measured (default 128 256 512)",
    )
    fusion.add_argument("--volume", type=int, default=256, help="cubic volume (default 256)")
    fusion.add_argument("--patch", type=int, default=96, help="cubic patch (default 96)")
    fusion.add_argument(
        "--peers",
        type=names,
        default=["monai", "monai-buffered", "torchio", "konfai"],
        help="comma-separated: monai,monai-buffered,torchio,konfai",
    )
    fusion.add_argument(
        "--parts",
        type=names,
        default=["time", "split", "memory"],
        help="comma-separated: time,split,memory (the default); soft, softmax of every patch; "
        "bars, the peaks at 117 classes and at 1024^3; example, examples/many_labels.py "
        "(minutes, gigabytes)",
    )
    head = commands.add_parser("head", help="the last layer and its loss, fused and apart")
    add_common(head)
    head.add_argument("--features", type=int, default=32, help="K (default 32)")
    head.add_argument("--classes", type=int, nargs="+", help="C of the timings (2 14 117)")
    head.add_argument("--batch", type=int, default=1, help="of the timings (default 1)")
    head.add_argument("--edge", type=int, default=96, help="volume of the timings (default 96^3)")
    head.add_argument("--volumes", type=int, nargs="+", help="edges to weigh (64 96 128)")
    head.add_argument("--dtype", choices=sorted(DTYPES), default="float32")
    head.add_argument(
        "--peers",
        type=names,
        default=["eager", "compiled plain"],
        help="comma-separated: eager,compiled plain,compiled (default without the last)",
    )
    head.add_argument(
        "--parts",
        type=names,
        default=["time", "memory", "sweep"],
        help="comma-separated: time,memory,sweep",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.command == "loss":
        results: dict[str, Any] = loss_benchmark.run(options, DTYPES[options.dtype])
    elif options.command == "fusion":
        from benchmarks import fusion_benchmark

        results = fusion_benchmark.run(options)
    elif options.command == "head":
        from benchmarks import head_benchmark

        results = head_benchmark.run(options, DTYPES[options.dtype])
    else:
        from benchmarks import step_benchmark

        results = step_benchmark.run(options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(results, indent=1) + "\n")
        print(f"\nmeasurements: {options.json}")
    if options.plot:
        from benchmarks import plots

        options.plot.parent.mkdir(parents=True, exist_ok=True)
        plots.draw(results, options.plot)
        print(f"plot: {options.plot}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
