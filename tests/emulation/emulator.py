"""Builds the emulated CUDA kernels as sanitized host programs and calls them like operators.

A program is compiled once for each content of its sources (build/emulation/<hash>) and runs as a
process that is fed one record a call, see records.h.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import functools
import hashlib
import itertools
import math
import os
import re
import shutil
import struct
import subprocess
import sysconfig
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
EMULATION = ROOT / "tests" / "emulation"
FLAGS = [
    "-std=c++20",
    "-Og",  # half of -O1's time to compile, and the programs are as fast
    "-g1",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fno-omit-frame-pointer",
    "-DVOXFUSE_EMULATE_CUDA",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-Wno-unused-function",
]

#: Fibers under AddressSanitizer and UndefinedBehaviorSanitizer, or threads under ThreadSanitizer.
#: Null pointers and what lies beyond an object are AddressSanitizer's to find.
VARIANTS = {
    "fibers": (
        "tests/emulation/cuda_emulation.cpp",
        "-fsanitize=address,undefined -fno-sanitize=null,object-size -fno-sanitize-recover=all",
    ),
    "threads": (
        "tests/emulation/cuda_emulation_threads.cpp",
        "-fsanitize=thread -DVOXFUSE_EMULATE_THREADS -pthread",
    ),
}
#: The first report ends the program, so that the call that caused it fails.
SANITIZERS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}

#: Element codes of csrc/math/layout.h.
ELEMENTS = {
    torch.float32: 0,
    torch.float16: 1,
    torch.bfloat16: 2,
    torch.float64: 3,
    torch.bool: 4,
    torch.uint8: 5,
    torch.int16: 6,
    torch.int32: 7,
    torch.int64: 8,
    torch.int8: 9,
    torch.uint16: 10,
    torch.uint32: 11,
    torch.uint64: 12,
}


class EmulationFailed(AssertionError):
    """An emulation program ended early: a sanitizer or the emulation itself found an error."""


def cuda_include() -> Path | None:
    """CUDA's headers: the toolkit's, or the ones that Triton's package carries."""
    candidates = sorted(Path("/usr/local").glob("cuda*/include"), reverse=True)
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        candidates.append(Path(nvcc).resolve().parents[1] / "include")
    candidates.append(Path(sysconfig.get_path("purelib")) / "triton/backends/nvidia/include")
    for path in candidates:
        if (path / "cuda_fp16.h").exists() and (path / "vector_types.h").exists():
            return path
    return None


def missing() -> str | None:
    """Why the emulation cannot be built here, or None."""
    if shutil.which("g++") is None:
        return "g++ is not installed"
    if cuda_include() is None:
        return "no CUDA headers (install Triton or the CUDA toolkit)"
    return None


@functools.cache
def fixed_addresses() -> list[str]:
    """A command that runs another one without address randomisation, where that is allowed.

    Some versions of ThreadSanitizer cannot start where a kernel randomises addresses widely.
    """
    setarch = shutil.which("setarch")
    if setarch is None:
        return []
    command = [setarch, "-R"]
    works = subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0
    return command if works else []


@functools.cache
def _digest() -> str:
    """Identifies everything that an emulation program is made of."""
    digest = hashlib.sha256()
    for folder in ("csrc/cuda", "csrc/math", "csrc/contract", "tests/emulation"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
                digest.update(path.name.encode() + b"\0" + path.read_bytes())
    version = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    digest.update(version + f"{FLAGS}{VARIANTS}".encode() + str(cuda_include()).encode())
    return digest.hexdigest()[:16]


@functools.cache
def build(name: str, sources: tuple[str, ...], variant: str = "fibers") -> Path:
    """Compile ``sources`` (relative to the root) with the emulation into the program ``name``."""
    folder = ROOT / "build" / "emulation" / _digest() / variant
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    with (folder / f"{name}.lock").open("w") as lock:
        # Several processes of a test run want a program: the first compiles it, the others wait.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            _compile(program, sources, variant)
    return program


def _compile(program: Path, sources: tuple[str, ...], variant: str) -> None:
    emulation, sanitizers = VARIANTS[variant]
    flags = [*FLAGS, *sanitizers.split()]
    include = cuda_include()
    assert include is not None
    includes = ["-isystem", str(include), "-idirafter", str(EMULATION / "fallback")]
    includes += [f"-I{ROOT / 'csrc'}", f"-I{EMULATION}"]

    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:

        def compile_one(source: str) -> Path:
            name = f"{Path(source).stem}.o"
            # Programs share the emulation, but not what a test wrote itself.
            shared = program.parent / name if not Path(source).is_absolute() else None
            if shared is not None and shared.exists():
                return shared
            output = Path(scratch) / name
            command = ["g++", *flags, *includes, "-x", "c++", "-c", str(ROOT / source)]
            subprocess.run([*command, "-o", str(output)], check=True)
            return output if shared is None else output.replace(shared)

        every = [*sources, emulation, "tests/emulation/launch_log.cpp"]
        with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            objects = [str(path) for path in pool.map(compile_one, every)]
        linked = Path(scratch) / program.name
        subprocess.run(["g++", *flags, *objects, "-o", str(linked)], check=True)
        linked.replace(program)


#: Kernels in the sources: their instances are told by these names in a program or a library.
KERNEL = re.compile(
    r"__global__\s+void\s+(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\("
)


#: What a test module that runs emulated kernels is marked with.
NEEDED = pytest.mark.skipif(missing() is not None, reason=f"no CUDA emulation: {missing()}")


def kernel_names() -> set[str]:
    """The names of all CUDA kernels of csrc/cuda, without template arguments."""
    names: set[str] = set()
    for path in sorted((ROOT / "csrc" / "cuda").iterdir()):
        if path.suffix in (".cu", ".cuh"):
            text = path.read_text()
            found = KERNEL.findall(text)
            assert len(found) == len(re.findall(r"^\s*__global__", text, re.M)), path
            names.update(found)
    return names


def readable(symbol: str) -> str:
    """``few_forward<float, 2, false>`` of a demangled symbol."""
    name = re.sub(r"voxfuse::cuda::|voxfuse::|\(anonymous namespace\)::|^void ", "", symbol)
    return re.sub(r"(>|^\w+)\(\w.*", r"\1", name)


def instances(program: Path) -> dict[int, str]:
    """Kernels in an emulation program by their place: what its dispatch can start."""
    table = subprocess.run(["nm", "-C", str(program)], capture_output=True, text=True, check=True)
    names = kernel_names()
    found = {}
    for line in table.stdout.splitlines():
        place, kind, symbol = line[:16].strip(), line[17:18], line[19:]
        name = readable(symbol)
        is_kernel = "voxfuse::cuda" in symbol and re.split(r"[<(]", name)[0] in names
        if place and kind in "tTwW" and is_kernel and "lambda" not in symbol:
            found[int(place, 16)] = name
    return found


class Program:
    """A running emulation program."""

    def __init__(self, path: Path, **environment: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (lives as long as the process)
        self._process = subprocess.Popen(
            [*fixed_addresses(), str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**os.environ, **SANITIZERS, **environment},
        )

    def call(
        self,
        integers: Sequence[int],
        doubles: Sequence[float],
        buffers: Sequence[bytes | bytearray],
        results: int,
    ) -> list[bytes]:
        """Send one record and return the resulting buffers."""
        head = struct.pack(
            f"<3q{len(integers)}q{len(doubles)}d",
            len(integers),
            len(doubles),
            len(buffers),
            *integers,
            *doubles,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(head)
            for buffer in buffers:
                self._process.stdin.write(struct.pack("<q", len(buffer)))
                self._process.stdin.write(buffer)
            self._process.stdin.flush()
            return [self._read(self._read_size()) for _ in range(results)]
        except (BrokenPipeError, EOFError):
            self._process.wait()
            self._errors.seek(0)
            raise EmulationFailed(self._errors.read().decode(errors="replace")) from None

    def _read_size(self) -> int:
        (size,) = struct.unpack("<q", self._read(8))
        return int(size)

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) != size:
            raise EOFError
        return data

    def close(self) -> None:
        """End the program; an error that it has met since its last answer fails here."""
        self._process.communicate()
        if self._process.returncode != 0:
            self._errors.seek(0)
            raise EmulationFailed(self._errors.read().decode(errors="replace"))


def storage_bytes(tensor: Tensor) -> bytearray:
    """The whole memory behind ``tensor``, so that its strides keep their meaning."""
    storage = torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage())
    return bytearray(storage.numpy().tobytes())


def from_bytes(data: bytes, like: Tensor) -> Tensor:
    """A tensor with ``like``'s dtype, shape and strides over ``data``."""
    if like.numel() == 0:
        return torch.empty_like(like)
    flat = torch.frombuffer(bytearray(data), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride(), like.storage_offset())


def collapse(tensor: Tensor, has_channel: bool) -> Tensor:
    """``tensor``, or a contiguous copy if its spatial axes cannot be walked as one."""
    return tensor if _voxel_stride(tensor, 2 if has_channel else 1) else tensor.contiguous()


def _voxel_stride(tensor: Tensor, first: int) -> int | None:
    axes = [
        (size, stride)
        for size, stride in zip(tensor.shape[first:], tensor.stride()[first:], strict=True)
        if size != 1
    ]
    if not axes:
        return 1
    for (_, outer), (size, inner) in itertools.pairwise(axes):
        if outer != size * inner:
            return None
    return axes[-1][1]


def describe(tensor: Tensor | None, has_channel: bool) -> list[int]:
    """Element type, offset in bytes and (batch, class, voxel) strides, as programs read them."""
    if tensor is None:
        return [0, -1, 0, 0, 0]
    voxel = _voxel_stride(tensor, 2 if has_channel else 1)
    assert voxel is not None
    channel = tensor.stride(1) if has_channel else 0
    offset = tensor.storage_offset() * tensor.element_size()
    return [ELEMENTS[tensor.dtype], offset, tensor.stride(0), channel, voxel]


class Operators:
    """Operators on one emulation program."""

    NAME: str
    SOURCES: tuple[str, ...]

    def __init__(self, variant: str = "fibers", **environment: str) -> None:
        self._program = Program(build(self.NAME, self.SOURCES, variant), **environment)

    def close(self) -> None:
        self._program.close()

    @classmethod
    def instances(cls, variant: str = "fibers") -> dict[int, str]:
        """Kernels of the program by their place."""
        return instances(build(cls.NAME, cls.SOURCES, variant))

    @classmethod
    def launched(cls, log: Path) -> list[tuple[str, dict[str, int]]]:
        """Kernel and features of every launch in a file that was given as EMULATION_LOG."""
        kernels = cls.instances()
        result = []
        for line in log.read_text().splitlines() if log.exists() else ():
            place, *words = line.split()
            pairs = (word.split("=") for word in words)
            result.append((kernels[int(place, 16)], {name: int(x) for name, x in pairs}))
        return result


class SoftConfusion(Operators):
    """``soft_confusion`` and ``soft_confusion_backward`` on the emulated CUDA kernels."""

    NAME = "soft_confusion"
    SOURCES = (
        "csrc/cuda/soft_confusion_float.cu",
        "csrc/cuda/soft_confusion_float_backward.cu",
        "csrc/cuda/soft_confusion_bfloat16.cu",
        "csrc/cuda/soft_confusion_bfloat16_backward.cu",
        "csrc/cuda/soft_confusion_half.cu",
        "csrc/cuda/soft_confusion_half_backward.cu",
        "csrc/cuda/soft_confusion_double.cu",
        "csrc/cuda/soft_confusion_double_backward.cu",
        "csrc/cuda/soft_confusion.cu",
        "tests/emulation/soft_confusion_main.cpp",
    )

    def _call(
        self,
        grad: Tensor | None,
        input: Tensor,
        target: Tensor,
        weight: Tensor | None,
        activation: int,
        likelihood: int,
        overlap: int,
        ignore_index: int | None,
        gamma: float,
        statistics: int,
        focal_classes: int | None = None,
        unlabelled: int = 0,
        annotated: Tensor | None = None,
    ) -> bytes:
        batch, classes = input.shape[:2]
        channel = target.ndim == input.ndim
        dense = classes == 1 or (channel and target.shape[1] == classes)
        target = collapse(target, channel)
        weight_channel = weight is not None and weight.ndim == input.ndim
        weight = None if weight is None else collapse(weight, weight_channel)
        input = collapse(input, True)
        integers = [
            int(grad is not None),
            batch,
            classes,
            input[0, 0].numel(),
            int(dense),
            activation,
            likelihood,
            overlap,
            int(ignore_index is not None),
            ignore_index or 0,
            statistics,
            unlabelled,
            int(annotated is not None),
            *describe(input, True),
            *describe(target, channel),
            *describe(weight, weight_channel),
        ]
        focal = float(classes if focal_classes is None else focal_classes)
        empty = bytearray()
        buffers = [storage_bytes(input), storage_bytes(target)]
        buffers.append(empty if weight is None else storage_bytes(weight))
        buffers.append(empty if annotated is None else storage_bytes(annotated.contiguous()))
        if grad is not None:
            gradient = self._gradient(input)
            integers += describe(gradient, True)
            buffers += [storage_bytes(grad.contiguous()), storage_bytes(gradient)]
        (result,) = self._program.call(integers, [gamma, focal], buffers, 1)
        return result

    @staticmethod
    def _gradient(input: Tensor) -> Tensor:
        return torch.full_like(input, float("nan"))

    def soft_confusion(
        self, input: Tensor, target: Tensor, weight: Any, *rest: Any, any_target: bool = False
    ) -> Tensor:
        *options, full = rest[:6]
        statistics = 8 if full else 4
        result = self._call(None, input, target, weight, *options, statistics, *rest[6:])
        like = torch.empty(*input.shape[:2], statistics, dtype=torch.float64)
        return from_bytes(result, like)

    def soft_confusion_backward(
        self, grad: Tensor, input: Tensor, target: Tensor, weight: Any, *options: Any
    ) -> Tensor:
        sums = grad.shape[2]
        result = self._call(grad, input, target, weight, *options[:5], sums, *options[5:])
        gradient = from_bytes(result, self._gradient(collapse(input, True)))
        return torch.empty_like(input).copy_(gradient)


class RatioLoss(Operators):
    """``ratio_loss`` and ``ratio_loss_backward`` on the emulated CUDA kernels."""

    NAME = "ratio_loss"
    SOURCES = ("csrc/cuda/ratio_loss.cu", "tests/emulation/ratio_loss_main.cpp")

    def ratio_loss(
        self,
        stats: Tensor,
        numerator: Sequence[float],
        denominator: Sequence[float],
        smooth_nr: float,
        smooth_dr: float,
        min_denominator: float,
        exponent: float,
        log: bool,
        class_weight: Tensor | None,
        first_class: int,
        batch: bool,
        class_pooling: int,
        absent: int,
        reduction: int,
        ratio_scale: float,
        nll_weight: Tensor | None,
        off_weight: Tensor | None,
        nll_scale: float,
        off_scale: float,
        normaliser: int,
        double_loss: bool,
        exponent_from: int = 0,
    ) -> tuple[Tensor, Tensor]:
        samples, classes, sums = stats.shape
        shape: list[int] = []
        if reduction == 0:
            shape = [] if batch else [samples]
            shape += [] if class_pooling else [classes - first_class]
        loss = torch.empty(shape, dtype=torch.float64 if double_loss else torch.float32)
        integers = [0, samples, classes, sums, first_class, class_pooling, absent, reduction]
        integers += [normaliser, int(log), int(batch), int(double_loss), loss.numel()]
        by_sample = class_weight is not None and class_weight.ndim == 2
        integers.append(classes - first_class if by_sample else 0)
        doubles = [smooth_nr, smooth_dr, min_denominator, exponent, ratio_scale]
        doubles += [nll_scale, off_scale]
        for coefficients in (numerator, denominator):
            doubles += [*coefficients, *[0.0] * (8 - len(coefficients))]
        doubles.append(exponent_from)
        weights = (class_weight, nll_weight, off_weight)
        buffers = [storage_bytes(stats.contiguous().clone())]
        buffers += [bytearray() if w is None else storage_bytes(w.clone()) for w in weights]
        values, cotangents = self._program.call(integers, doubles, buffers, 2)
        return from_bytes(values, loss), from_bytes(cotangents, torch.empty_like(stats))

    def ratio_loss_backward(
        self,
        grad_loss: Tensor,
        cotangents: Tensor,
        first_class: int,
        batch: bool,
        class_pooling: int,
    ) -> Tensor:
        samples, classes, sums = cotangents.shape
        strides = [0, 0, 0]
        if grad_loss.ndim > 0:
            row = 1 if class_pooling else classes - first_class
            strides = [0 if batch else row, int(not class_pooling), first_class]
            strides[2] = 0 if class_pooling else first_class
        integers = [1, samples, classes, sums, int(grad_loss.dtype == torch.float64), *strides]
        buffers = [storage_bytes(x.contiguous().clone()) for x in (grad_loss, cotangents)]
        (result,) = self._program.call(integers, [], buffers, 1)
        return from_bytes(result, torch.empty_like(cotangents))


class OverlapAdd(Operators):
    """The patch fusion operators on the emulated CUDA kernels."""

    NAME = "overlap_add"
    SOURCES = ("csrc/cuda/overlap_add.cu", "tests/emulation/overlap_add_main.cpp")
    FORWARD, RING, WEIGHTS, BACKWARD = range(4)

    def _call(
        self,
        operation: int,
        source: Tensor,
        target: Tensor,
        origins: Tensor,
        rows: Tensor,
        weights: Sequence[Tensor],
        total: Tensor | None,
        extent: Sequence[int],
        ring: tuple[int, int, int] | None = None,
        flip: int = 0,
        floor: float = 0.0,
        activation: int = 0,
        cover: Sequence[Tensor] | None = None,
        patches: Tensor | None = None,
    ) -> Tensor:
        axes = len(extent)
        cover = cover or []
        separable = len(weights) == axes
        shape = [w.shape[1] for w in weights] if separable else list(weights[0].shape[1:])
        lead = [1] * (3 - axes)
        begin, end = [0, 0, 0], [*lead, *extent]
        ring_axis = -1
        if ring is not None:
            ring_axis = ring[0] + 3 - axes
            begin[ring_axis], end[ring_axis] = ring[1], ring[2]
        tables = [bytearray()] * (3 - axes) if separable else []
        tables = tables + [storage_bytes(w.contiguous().clone()) for w in weights]
        tables += [bytearray()] * (3 - len(tables))
        counts = [*lead, *[w.shape[0] for w in weights]] if separable else [1, 1, 1]
        channels = target.shape[0] if operation in (self.FORWARD, self.RING) else 1
        if operation == self.BACKWARD:
            channels = target.shape[1]
        element = torch.float64 if operation == self.WEIGHTS else source.dtype
        integers = [operation, origins.shape[0], channels, axes, int(separable), ELEMENTS[element]]
        integers += [ring_axis, *lead, *shape, *lead, *extent, *begin, *end, *counts]
        integers += [flip << (3 - axes)]
        sizes = [(1, 1)] * (3 - len(cover)) + [tuple(table.shape) for table in cover]
        integers += [count for count, _ in sizes] + [size for _, size in sizes]
        integers += [activation]
        buffers = [
            *(storage_bytes(x.contiguous().clone()) for x in (source, target, origins, rows)),
            *tables,
            bytearray() if total is None else storage_bytes(total.contiguous().clone()),
            *[bytearray()] * (3 - len(cover)),
            *(storage_bytes(table.contiguous().clone()) for table in cover),
            bytearray() if patches is None else storage_bytes(patches.contiguous().clone()),
        ]
        (result,) = self._program.call(integers, [floor], buffers, 1)
        return from_bytes(result, target)

    def overlap_add(
        self,
        patches: Tensor,
        origins: Tensor,
        rows: Tensor,
        weights: Sequence[Tensor],
        total: Tensor | None,
        volume_shape: Sequence[int],
        activation: int = 0,
    ) -> Tensor:
        target = patches.new_full((patches.shape[1], *volume_shape), float("nan"))
        tables = (origins, rows, weights, total, volume_shape)
        return self._call(self.FORWARD, patches, target, *tables, activation=activation)

    def overlap_add_backward(
        self,
        grad: Tensor,
        origins: Tensor,
        rows: Tensor,
        weights: Sequence[Tensor],
        total: Tensor | None,
        patches: Tensor | None = None,
        activation: int = 0,
    ) -> Tensor:
        extent = grad.shape[1:]
        separable = len(weights) == len(extent)
        shape = [w.shape[1] for w in weights] if separable else list(weights[0].shape[1:])
        target = grad.new_full((origins.shape[0], grad.shape[0], *shape), float("nan"))
        tables = (origins, rows, weights, total, extent)
        options = {"activation": activation, "patches": patches}
        return self._call(self.BACKWARD, grad, target, *tables, **options)

    def overlap_add_(
        self,
        ring: Tensor,
        patches: Tensor,
        origins: Tensor,
        rows: Tensor,
        weights: Sequence[Tensor],
        total: Tensor | None,
        ring_axis: int,
        start: int,
        stop: int,
        flip: int = 0,
        floor: float = 0.0,
        activation: int = 0,
        cover: Sequence[Tensor] | None = None,
    ) -> None:
        place = (ring_axis, start, stop)
        tables = (origins, rows, weights, total, ring.shape[1:])
        options = (flip, floor, activation, cover)
        result = self._call(self.RING, patches, ring, *tables, place, *options)
        ring.copy_(result)

    def overlap_weights_(
        self,
        total: Tensor,
        origins: Tensor,
        rows: Tensor,
        weights: Sequence[Tensor],
        ring_axis: int,
        start: int,
        stop: int,
    ) -> None:
        place = (ring_axis, start, stop)
        result = self._call(
            self.WEIGHTS, total[:0], total, origins, rows, weights, None, total.shape, place
        )
        total.copy_(result)


class FinalizeSlab(Operators):
    """``finalize_slab`` on the emulated CUDA kernel."""

    NAME = "finalize_slab"
    SOURCES = ("csrc/cuda/finalize_slab.cu", "tests/emulation/finalize_slab_main.cpp")

    def finalize_slab(
        self,
        ring: Tensor,
        out: Tensor,
        total: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        ring_axis: int,
        start: int,
        stop: int,
        activation: int,
        applied: bool,
        mode: int,
        divisor: float,
        threshold: float,
        fill: float,
        clear: bool,
    ) -> None:
        channels, *extent = ring.shape
        inner = math.prod(extent[ring_axis + 1 :])
        outer_axes = [axis for axis in range(1, ring_axis + 1) if out.shape[axis] != 1]
        element = torch.int16 if out.dtype == torch.uint16 else out.dtype
        integers = [
            channels,
            channels if weight is None else weight.shape[0],
            math.prod(extent[:ring_axis]),
            extent[ring_axis] * inner,
            start % extent[ring_axis] * inner,
            (stop - start) * inner,
            int(ring.dtype == torch.float64),
            ELEMENTS[element],
            out.stride(0),
            out.stride(outer_axes[-1]) if outer_axes else 0,
            out.storage_offset() * out.element_size(),
            activation,
            int(applied),
            mode,
            int(clear),
        ]
        optional = (total, weight, bias)
        buffers = [storage_bytes(ring), storage_bytes(out)]
        buffers += [bytearray() if x is None else storage_bytes(x) for x in optional]
        doubles = [divisor, threshold, fill]
        left, result = self._program.call(integers, doubles, buffers, 2)
        ring.copy_(from_bytes(left, ring))
        if not result:
            return
        storage = torch.tensor([], dtype=torch.uint8).set_(out.untyped_storage())
        storage.copy_(torch.frombuffer(bytearray(result), dtype=torch.uint8))
