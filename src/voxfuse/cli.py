"""The command ``voxfuse``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

import torch

from voxfuse import _backends, _library, tuning


def information() -> dict[str, Any]:
    """Collect what ``voxfuse info`` prints: backends, versions, build and machine."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "backends": {
            name: {
                "available": backend.available,
                "devices": list(backend.devices),
                "reason": backend.reason,
            }
            for name, backend in _backends.backends().items()
        },
        "versions": {**_backends.versions(), "python": platform.python_version()},
        "build": _library.build_info(),
        "machine": {
            "cpu_capability": _library.cpu_capability(),
            "threads": torch.get_num_threads(),
            "gpu": gpu,
            "torch_cuda": torch.version.cuda,
        },
        "tuning": tuning.information(),
    }


def _print_information(found: dict[str, Any]) -> None:
    versions, build, machine = found["versions"], found["build"], found["machine"]
    print(f"voxfuse {versions['voxfuse']}")
    print("\nBackends")
    for backend in _backends.backends().values():
        print(f"  {backend}")
    print("\nCPU")
    print(f"  capability  {machine['cpu_capability'] or 'no compiled kernels'}")
    if build:
        print(f"  compiled    {', '.join(build['cpu_instruction_sets'])} by {build['compiler']}")
    print(f"  threads     {machine['threads']}")
    print("\nGPU")
    print(f"  device      {machine['gpu'] or 'none that PyTorch sees'}")
    if build and build["cuda"]:
        architectures = ", ".join(build["cuda_architectures"])
        print(f"  compiled    CUDA {build['cuda']} for {architectures}")
    else:
        print("  compiled    no CUDA kernels")
    print(f"  tuned       {_tuning_line(found['tuning'])}")
    print("\nVersions")
    for name in ("python", "torch", "triton", "numpy"):
        print(f"  {name:<11} {versions[name]}")
    if build:
        print(f"  built with  torch {build['torch']}")


def _tuning_line(found: dict[str, Any]) -> str:
    """Whether a tuned table is in use."""
    if found["error"] is not None:
        return f"no: {found['file']} is damaged or not voxfuse's ({found['error']})"
    if not found["choices"]:
        measured = "; VOXFUSE_TUNE=1 measures" if found["mode"] == "1" else ""
        return f"no: nothing was measured for this GPU and version (`voxfuse tune`){measured}"
    table = f"{found['choices']} launches measured, {found['changed']} not the default"
    if found["mode"] == "0":
        return f"no, by VOXFUSE_TUNE=0 ({table} in {found['file']})"
    return f"yes: {table} ({found['file']})"


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"got {text!r}, expected batch, classes and extents, such as 1,4,128,128,128"
        ) from None


def _tune(options: argparse.Namespace) -> int:
    if options.clear:
        removed = tuning.clear()
        print(f"removed {removed}" if removed else "there was nothing to clear")
        return 0
    dtypes = [getattr(torch, name) for name in options.dtypes]
    try:
        measured = tuning.tune(
            options.shapes,
            dtypes,
            operators=options.operators,
            device=options.device,
            seconds=options.seconds,
        )
    except (RuntimeError, ValueError) as error:
        print(f"voxfuse tune: {error}", file=sys.stderr)
        return 1
    if options.json:
        rows = [{**dataclasses.asdict(one), "speedup": one.speedup} for one in measured]
        json.dump(rows, sys.stdout, indent=2)
        print()
        return 0
    for one in measured:
        print(one)
    changed = sum(one.chosen != 0 for one in measured)
    print(f"{len(measured)} launches measured, {changed} not the default any more")
    return 0


def _add_tune(commands: Any) -> None:
    parser = commands.add_parser(
        "tune",
        help="measure the Triton kernels' launch configurations on this GPU and keep the fastest",
        description="Measure the Triton kernels' launch configurations on this GPU and keep the "
        "fastest. The last bits of sums may differ from those before; --clear undoes it.",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=_shape,
        metavar="B,C,D,H,W",
        help="logits (default: the benchmarks' shapes that fit into the memory)",
    )
    parser.add_argument(
        "--dtypes",
        nargs="+",
        default=["float32", "bfloat16"],
        choices=["float32", "float16", "bfloat16", "float64"],
        metavar="DTYPE",
        help="of the logits (default: float32 bfloat16)",
    )
    names = ["soft_confusion", "overlap_add", "finalize_slab"]
    parser.add_argument(
        "--operators",
        nargs="+",
        default=names,
        choices=names,
        metavar="NAME",
        help=f"default: {' '.join(names)}",
    )
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="begin no further shape after so many (default: no limit)",
    )
    parser.add_argument("--clear", action="store_true", help="forget what was measured")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_tune)


def _info(options: argparse.Namespace) -> int:
    found = information()
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        _print_information(found)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    parser = argparse.ArgumentParser(prog="voxfuse", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="show backends, versions and compiled kernels")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)
    _add_tune(commands)
    options = parser.parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`voxfuse info | head -1`); what is left goes nowhere, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
