"""Resources and instructions of compiled Triton kernels, read off PTX and machine code."""

from __future__ import annotations

import collections
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any


def ptx_atomics(ptx: str) -> dict[str, int]:
    """Integer additions that every GPU thread sees, which count, and all other atomics."""
    found = re.findall(r"^\s*(?:@!?%\w+\s+)?((?:atom|red)\.[\w.:]+)", ptx, re.M)
    integers = re.compile(r"(?:atom|red)\.[\w.:]*\.add\.[us](?:32|64)")
    counters = [name for name in found if integers.fullmatch(name)]
    return {"counters": len(counters), "atomics": len(found) - len(counters)}


def _tool(name: str, option: str, cubin: bytes) -> str:
    """What a tool of Triton's package says about machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def resources(cubin: bytes) -> dict[str, Any]:
    usage = _tool("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, f"cuobjdump reports no resources: {usage}"
    registers, stack, shared, local = map(int, found.groups())
    return {"registers": registers, "stack": stack, "shared": shared, "local": local}


def amd_resources(assembly: str) -> dict[str, Any]:
    """What the assembler's notes say; bytes in memory are those of a thread of its own."""

    def note(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s*(\d+)", assembly, re.M)
        return int(found[1]) if found else 0

    return {
        "registers": note("vgpr_count"),
        "stack": note("private_segment_fixed_size"),
        "shared": note("group_segment_fixed_size"),
        "atomics": len(re.findall(r"^\s*\w+_atomic_(?!add(?:_u32|_u64|_x2)? )\w+", assembly, re.M)),
        "counters": len(re.findall(r"^\s*\w+_atomic_add(?:_u32|_u64|_x2)? ", assembly, re.M)),
    }


def instructions(cubin: bytes) -> dict[str, int]:
    """Counts of the machine code; takes a third as long as compiling it."""
    code = _tool("nvdisasm", "-c", cubin)
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z0-9.]+)", code, re.M)
    counts = collections.Counter(instructions)
    return {
        "instructions": len(instructions),
        "loads_128": sum(n for name, n in counts.items() if re.match(r"LDG.*\.128", name)),
        "stores_128": sum(n for name, n in counts.items() if re.match(r"STG.*\.128", name)),
        **_atomics(counts),
        "fences": sum(n for name, n in counts.items() if re.match(r"MEMBAR\..*GPU", name)),
    }


def _atomics(counts: dict[str, int]) -> dict[str, int]:
    """Integer additions that every GPU thread sees, which count, and all other atomics."""
    found = {"machine_counters": 0, "machine_atomics": 0}
    for name, n in counts.items():
        if re.fullmatch(r"(ATOMG?|REDG?)\.E\.ADD(\.S32|\.64)?\.STRONG\.GPU", name):
            found["machine_counters"] += n
        # On sm_100 bits in shared memory say which tensor memory is taken: they add nothing up.
        elif re.match(r"(RED|ATOM)[GS]?\.", name) and name not in ("ATOMS.OR", "ATOMS.AND"):
            found["machine_atomics"] += n
    return found
