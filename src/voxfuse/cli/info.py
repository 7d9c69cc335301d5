"""``voxfuse info``: backends, versions, build and machine."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from typing import Any

import torch

from voxfuse import _backends, _library


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
    print("  others      xpu (Intel): the reference; mps (Apple): none, as it has no float64")
    print("\nVersions")
    for name in ("python", "torch", "triton", "numpy"):
        print(f"  {name:<11} {versions[name]}")
    if build:
        print(f"  built with  torch {build['torch']}")


def _info(options: argparse.Namespace) -> int:
    found = information()
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        print()
    else:
        _print_information(found)
    return 0


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser("info", help="show backends, versions and compiled kernels")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_info)
