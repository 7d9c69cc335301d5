"""What is in wheels, and whether they may be published.

    python tests/build/inspect_wheel.py WHEEL ...

Prints the size of every compiled file, in the wheel and unpacked, and of the machine code of each
CUDA architecture.
"""

from __future__ import annotations

import collections
import re
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: PyPI takes no larger file without being asked.
LARGEST_MB = 100


def architectures(library: Path) -> dict[str, int]:
    """Bytes of machine code for each architecture, as they lie in the library, compressed."""
    data = library.read_bytes()
    sizes: dict[str, int] = collections.Counter()
    # A "fat binary": 16 bytes of header, then entries with a header each.
    for found in re.finditer(re.escape(struct.pack("<IHH", 0xBA55ED50, 1, 16)), data):
        at = found.end() + 8
        end = at + int.from_bytes(data[at - 8 : at], "little")
        while at < end:
            kind, _, header, size = struct.unpack_from("<HHIQ", data, at)
            (capability,) = struct.unpack_from("<I", data, at + 28)
            sizes[f"{capability / 10}" + ("+PTX" if kind == 1 else "")] += header + size
            at += header + size
    return dict(sorted(sizes.items(), key=lambda item: float(item[0].removesuffix("+PTX"))))


def errors(wheel: Path, folder: Path) -> list[str]:
    """Print what the wheel holds, unpacked in ``folder``; return why it may not be published."""
    found = []
    size = wheel.stat().st_size / 1e6
    print(f"{wheel.name}: {size:.1f} MB")
    if size > LARGEST_MB:
        found.append(f"{size:.0f} MB, more than the {LARGEST_MB} MB that PyPI takes")
    if "-manylinux" not in wheel.name:
        found.append("no manylinux tag")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        members = archive.infolist()
    names = [member.filename for member in members]
    for wanted in ("libvoxfuse_cpu.so", "_host.", "py.typed", "_build_info.json"):
        if not any(name.startswith(f"voxfuse/{wanted}") for name in names):
            found.append(f"no voxfuse/{wanted}")
    for member in members:
        if ".so" not in Path(member.filename).name:
            continue
        if not re.fullmatch(r"voxfuse/(lib)?_?(host|voxfuse_\w+)\.[\w.-]*so", member.filename):
            found.append(f"{member.filename} is none of ours")
        print(
            f"  {member.filename}: {member.compress_size / 1e6:.1f} MB, "
            f"unpacked {member.file_size / 1e6:.1f} MB"
        )
        path = folder / member.filename
        sections = subprocess.run(
            ["readelf", "--sections", "--dynamic", "--wide", path],
            check=True, capture_output=True, text=True,
        ).stdout  # fmt: skip
        if re.search(r"\.symtab|\.debug_", sections):
            found.append(f"{member.filename} is not stripped")
        if "libvoxfuse" in path.name and "$ORIGIN/../torch/lib" not in sections:
            found.append(f"{member.filename} does not look for PyTorch beside it")
        if "cuda" in path.name:
            for name, code in architectures(path).items():
                print(f"    {name}: {code / 1e6:.1f} MB")
    return found


def main(arguments: list[str]) -> int:
    found = []
    for wheel in arguments:
        with tempfile.TemporaryDirectory() as folder:
            found += errors(Path(wheel), Path(folder))
    for error in found:
        print(f"error: {error}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
