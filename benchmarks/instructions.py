"""Instructions that the kernels of the loss issue for a logit, counted in their machine code.

A GPU multiprocessor issues four instructions of a warp a cycle, whatever memory delivers: at 16
to 17 instructions a logit a bfloat16 forward pass is bound by them. No GPU is needed::

    python benchmarks/instructions.py                  # a table
    python benchmarks/instructions.py OUT.json         # the numbers

Counted is the shortest way around the smallest loop that reads the logits as vectors: the way of
aligned, contiguous logits, byte labels, no voxel weights, no focal modulation and finite logits. A
kernel without such a loop is counted from its entry to its exit. Instructions under a predicate
count like others. Loops within that way count once: from 17 classes on, where CUDA's warps exchange
maxima and sums, the number is a lower bound.
"""

from __future__ import annotations

import argparse
import dataclasses
import heapq
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = Path(sysconfig.get_path("purelib")) / "triton" / "backends" / "nvidia" / "bin"
CLASSES = (2, 4, 16, 117)
#: With more, Triton deals the classes of a tile out to threads, and what one loop of one thread
#: reads does not say how many logits it turns over.
TRITON_CLASSES = (2, 4)
BYTES = {"float32": 4, "bfloat16": 2}
CUDA_NAMES = {"float32": "f", "bfloat16": "13__nv_bfloat16"}
LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z0-9_.]+)\s*([^;]*);", re.M)


@dataclasses.dataclass
class Instruction:
    address: int
    predicated: bool
    name: str
    operands: str

    @property
    def target(self) -> int | None:
        found = re.search(r"0x([0-9a-f]+)\s*$", self.operands.strip())
        return int(found[1], 16) if found else None

    @property
    def load_bits(self) -> int:
        """Bits a thread reads from global memory, but for what other blocks have written."""
        return 0 if "STRONG" in self.name else self._bits("LDG")

    @property
    def store_bits(self) -> int:
        return self._bits("STG")

    def _bits(self, kind: str) -> int:
        parts = self.name.split(".")
        if parts[0] != kind:
            return 0
        sizes = {"64": 64, "128": 128, "256": 256, "U8": 8, "S8": 8, "U16": 16, "S16": 16}
        return next((sizes[part] for part in parts if part in sizes), 32)


@dataclasses.dataclass
class Block:
    instructions: list[Instruction]
    successors: list[int]


def parse(sass: str) -> list[Instruction]:
    """The instructions of one function, without the padding after its end."""
    return [
        Instruction(int(m[1], 16), m[2] is not None and m[2] != "@PT", m[3], m[4])
        for m in LINE.finditer(sass)
        if m[3] != "NOP"
    ]


def blocks_of(code: list[Instruction]) -> dict[int, Block]:
    """The basic blocks by their first address."""
    reconvergence: dict[str, int] = {}
    jumps: dict[int, int] = {}
    leaders = {code[0].address}
    for i, x in enumerate(code):
        operation = x.name.split(".")[0]
        ends = operation in ("BRA", "EXIT", "BSYNC", "RET", "BRX", "BREAK", "JMP")
        if operation == "BSSY" and x.target is not None:
            reconvergence[x.operands.split(",")[0].strip()] = x.target
        if operation in ("BRA", "JMP") and x.target is not None:
            jumps[x.address] = x.target
        elif operation == "BSYNC":
            jumps[x.address] = reconvergence[x.operands.split(",")[0].strip()]
        if x.address in jumps:
            leaders.add(jumps[x.address])
        if ends and i + 1 < len(code):
            leaders.add(code[i + 1].address)
    blocks: dict[int, Block] = {}
    start = 0
    for i, x in enumerate(code):
        last = i + 1 == len(code)
        if not last and code[i + 1].address not in leaders:
            continue
        operation = x.name.split(".")[0]
        successors = [jumps[x.address]] if x.address in jumps else []
        falls = operation not in ("BRA", "EXIT", "BSYNC", "RET", "BRX", "JMP")
        # A conditional branch may name its condition among its operands: "BRA P0, `(.L)`".
        conditional = x.predicated or bool(re.match(r"!?U?P\d", x.operands.strip()))
        if (falls or conditional or operation == "BREAK") and not last:
            successors.append(code[i + 1].address)
        blocks[code[start].address] = Block(code[start : i + 1], successors)
        start = i + 1
    return blocks


def loops_of(blocks: dict[int, Block]) -> Iterable[tuple[int, set[int]]]:
    """(header, blocks) of every loop that a jump backwards closes, smallest first."""
    before: dict[int, set[int]] = {address: set() for address in blocks}
    for address, block in blocks.items():
        for successor in block.successors:
            if successor in before:
                before[successor].add(address)
    loops: dict[int, set[int]] = {}
    for address, block in blocks.items():
        for header in block.successors:
            if header > address or header not in blocks:
                continue
            body, waiting = {header, address}, [address]
            while waiting:
                here = waiting.pop()
                if here == header:
                    continue
                for previous in before[here] - body:
                    # Code that the compiler moved behind the loop belongs to it too.
                    body.add(previous)
                    waiting.append(previous)
            loops.setdefault(header, set()).update(body)
    return sorted(loops.items(), key=lambda item: sum(len(blocks[a].instructions) for a in item[1]))


def shortest(
    blocks: dict[int, Block], start: int, body: set[int], closed: bool, bits: int, wanted: int
) -> list[Instruction] | None:
    """The fewest instructions from ``start`` around the loop (or to the exit) that contain
    ``wanted`` loads of ``bits``."""
    queue: list[tuple[int, int, int, tuple[int, ...]]] = [(0, start, 0, ())]
    done: set[tuple[int, int]] = set()
    while queue:
        cost, address, loads, path = heapq.heappop(queue)
        if path and ((closed and address == start) or address < 0):
            if loads >= wanted:
                return [x for a in path for x in blocks[a].instructions]
            continue
        if (address, loads) in done:
            continue
        done.add((address, loads))
        block = blocks[address]
        found = min(loads + sum(x.load_bits == bits for x in block.instructions), wanted)
        cost += len(block.instructions)
        onwards = [s for s in block.successors if s in body]
        if not closed and block.instructions[-1].name.startswith("EXIT"):
            onwards.append(-1)
        for successor in onwards:
            heapq.heappush(queue, (cost, successor, found, (*path, address)))
    return None


def main_loop(
    code: list[Instruction], bits: int, wanted: int | None, backward: bool
) -> tuple[list[Instruction], bool]:
    """The way around the innermost loop with ``wanted`` loads of ``bits`` (None: all it has)."""
    blocks = blocks_of(code)
    candidates: list[tuple[int, set[int], bool]] = [(h, b, True) for h, b in loops_of(blocks)]
    candidates.append((code[0].address, set(blocks), False))
    for header, body, closed in candidates:
        inside = [x for a in body for x in blocks[a].instructions]
        loads = sum(x.load_bits == bits for x in inside)
        if loads < (wanted or 1) or (backward and not any(x.store_bits for x in inside)):
            continue
        # Not all that the loop holds need lie on one way around it.
        for least in [wanted] if wanted else range(loads, 0, -1):
            path = shortest(blocks, header, body, closed, bits, least)
            if path is not None:
                return path, closed
    raise ValueError(f"no loop reads the logits as vectors of {bits} bits")


def entry(path: list[Instruction], looped: bool, logits: int, **labels: Any) -> dict[str, Any]:
    return {
        **labels,
        "instructions": len(path),
        "logits": logits,
        "per_logit": round(len(path) / logits, 2),
        "loop": looped,
    }


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def cuda(library: Path) -> Iterable[dict[str, Any]]:
    """Counts for the kernels in ``library``, for every architecture in it."""
    architectures = re.findall(r"arch = sm_(\d+)", output(TOOLS / "cuobjdump", "-elf", library))
    symbols = re.findall(
        r"Function (\S+):", output(TOOLS / "cuobjdump", "--dump-resource-usage", library)
    )
    for architecture in sorted(set(map(int, architectures))):
        for classes in CLASSES:
            for dtype, backward in ((d, b) for d in BYTES for b in (False, True)):
                # The shapes of FewForward, FewBackward and ManyShape.
                held, voxels = (8, 4) if classes > 16 else (classes, 4)
                if classes == 2:
                    voxels = 16 // BYTES[dtype] if backward else 8
                elif backward and 8 < classes <= 16:
                    voxels = 2
                kind = "few" if classes <= 16 else "many"
                name = f"{kind}_{'backward' if backward else 'forward'}"
                rest = "ELb0" if kind == "few" and not backward else ""
                mangled = f"{name}I{CUDA_NAMES[dtype]}Li{held}{rest}EE"
                symbol = next(s for s in symbols if mangled in s)
                sass = output(
                    TOOLS / "cuobjdump", "--dump-sass", "--gpu-architecture",
                    f"sm_{architecture}", "--function", symbol, library,
                )  # fmt: skip
                size = voxels * BYTES[dtype] * 8
                bits = min(size, 128)
                path, looped = main_loop(parse(sass), bits, held * size // bits, backward)
                labels = {"backend": "cuda", "kernel": name, "classes": classes, "dtype": dtype}
                yield entry(path, looped, voxels * held, **labels, architecture=architecture)


def triton(architectures: Iterable[int]) -> Iterable[dict[str, Any]]:
    """Counts for the Triton kernels compiled ahead of time."""
    sys.path.insert(0, str(ROOT))
    from tests.build import triton_aot

    for architecture in architectures:
        for classes in TRITON_CLASSES:
            for dtype, backward in ((d, b) for d in BYTES for b in (False, True)):
                case = triton_aot.soft_confusion(
                    "count", architecture, classes=classes, dtype=dtype, backward=backward
                )
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(triton_aot.compile_cubin(case))
                    file.flush()
                    code = parse(output(TOOLS / "cuobjdump", "--dump-sass", file.name))
                bits = max(x.load_bits for x in code)
                path, looped = main_loop(code, bits, None, backward)
                read = sum(x.load_bits == bits for x in path) * bits // 8 // BYTES[dtype]
                labels = {"backend": "triton", "classes": classes, "dtype": dtype}
                name = "backward" if backward else "forward"
                yield entry(path, looped, read, **labels, kernel=name, architecture=architecture)


def table(entries: list[dict[str, Any]]) -> str:
    columns = ("backend", "architecture", "kernel", "classes", "dtype")
    columns += ("instructions", "logits", "per_logit")
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(str(e[column]) for column in columns) for e in entries]
    return "\n".join(f"| {line} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", nargs="?", type=Path, help="where to write the numbers as JSON")
    parser.add_argument("--backend", choices=("cuda", "triton"), help="default: both")
    options = parser.parse_args()
    import voxfuse

    library = Path(voxfuse.__file__).parent / "libvoxfuse_cuda.so"
    entries: list[dict[str, Any]] = []
    if options.backend != "triton":
        if not library.exists():
            parser.error("libvoxfuse_cuda.so was not built; --backend triton does without")
        entries += cuda(library)
    if options.backend != "cuda":
        entries += triton(sorted({e["architecture"] for e in entries}) or (90,))
    print(table(entries))
    if options.out is not None:
        from importlib.metadata import version

        info = library.with_name("_build_info.json")
        tools = {
            "triton": version("triton") if options.backend != "cuda" else None,
            "nvcc": json.loads(info.read_text())["cuda"] if options.backend != "triton" else None,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(
            json.dumps({"compilers": tools, "kernels": entries}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
