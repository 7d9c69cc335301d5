"""Compile many kernels ahead of time, two processes at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.build.triton_aot import Compilation


def compile_in_parallel(
    cases: tuple[Compilation, ...], directory: Path, disassemble: Collection[str] = ()
) -> dict[str, dict[str, Any]]:
    """Compile ``cases`` in two processes without the interpreter; results by name.

    Those named in ``disassemble`` have their instructions counted.
    """
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(directory / "cache"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "PYTHONWARNINGS": "ignore",
    }
    root = Path(__file__).resolve().parents[2]
    workers = []
    for part in range(2):
        names = json.dumps({case.name: case.name in disassemble for case in cases[part::2]})
        output = directory / f"part{part}.json"
        command = [sys.executable, "-m", "tests.build.triton_aot", names, str(output)]
        process = subprocess.Popen(
            command,
            env=environment,
            cwd=root,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        workers.append((process, output))
    results: dict[str, dict[str, Any]] = {}
    for process, output in workers:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        results |= {entry["name"]: entry for entry in json.loads(output.read_text())}
    return results


def table(results: dict[str, dict[str, Any]]) -> str:
    """The resources of every case, one a line."""
    columns = ("registers", "stack", "shared", "instructions", "loads_128", "stores_128")
    lines = [f"{'kernel':36}" + "".join(f"{column:>13}" for column in columns)]
    for name, entry in results.items():
        cells = (entry.get(column, "") for column in columns)
        lines.append(f"{name:36}" + "".join(f"{cell:>13}" for cell in cells))
    return "\n".join(lines)
