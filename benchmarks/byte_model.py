"""The bytes that each GPU kernel moves, against the fewest that could move.

The *floor* of a kernel is its inputs read once and its results written once. What it *moves* adds
what its own design costs: partial sums, the second reading of a tensor, ring slices that are read
before they are added to. Both come from the code's own constants: those of the CUDA kernels are
read from their sources, those of the Triton kernels from the modules that launch them.

``python benchmarks/byte_model.py`` prints the table for the shapes of docs/kernels.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from voxfuse.contract import Activation, Overlap, TargetKind

CUDA_SOURCES = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
DOUBLE = 8


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of one call of one kernel (and of the small one that finishes its sums)."""

    kernel: str
    backend: str
    floor: int
    moved: int
    #: Bytes that exist during the call beside inputs and results.
    workspace: int = 0

    @property
    def ratio(self) -> float:
        return self.moved / self.floor

    def as_row(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "moved_over_floor": round(self.ratio, 4)}


# --- constants of the CUDA kernels ---------------------------------------------------------------

_DECLARATION = re.compile(r"^constexpr (?:int|int64_t) (k\w+ = [^;]+);", re.MULTILINE)
_ALLOWED = re.compile(r"[\w\s()+*/<-]+")


@functools.cache
def cuda_constants(file: str) -> dict[str, int]:
    """The integer constants at namespace scope of one CUDA source, by name."""
    found: dict[str, int] = {}
    for declaration in _DECLARATION.findall((CUDA_SOURCES / file).read_text()):
        for item in declaration.split(","):
            name, _, expression = item.strip().partition(" = ")
            expression = expression.replace("sizeof(double)", str(DOUBLE)).replace("/", "//")
            names = set(re.findall(r"[A-Za-z_]\w*", expression))
            if _ALLOWED.fullmatch(expression) and names <= found.keys():
                # Digits, operators and names found before: nothing else can be evaluated.
                found[name] = int(eval(expression, {"__builtins__": {}}, dict(found)))
    return found


def cuda_rows(batch: int, classes: int, voxels: int, statistics: int = 4) -> int:
    """Rows of partial sums of one sample: what ``plan`` in soft_confusion.cu chooses."""
    c = cuda_constants("soft_confusion.cu")
    chunk = c["kChunk"]
    while chunk < c["kLargestChunk"] and batch * voxels // (2 * chunk) >= 8 * c["kRowsAtLeast"]:
        chunk *= 2
    most = min(c["kWorkspace"] // (classes * statistics), c["kRowsAtMost"])
    most = max(most // c["kRowsAtLeast"], 1) * c["kRowsAtLeast"]
    most = max(most // batch, 1)
    chunks = -(-voxels // chunk)
    chunks_per_row = -(-chunks // most)
    return -(-chunks // chunks_per_row)


def cuda_groups(batch: int, rows: int) -> int:
    """Groups of rows of one sample that a block adds up: what ``plan_groups`` chooses."""
    most = cuda_constants("soft_confusion.cu")["kCountersOfStream"]
    size = rows if rows <= 32 else math.isqrt(rows - 1) + 1
    while size < rows and batch * (-(-rows // size) + 1) > most:
        size *= 2
    return -(-rows // min(size, rows))


# --- soft_confusion ------------------------------------------------------------------------------


def _triton_slots(
    batch: int, classes: int, voxels: int, dtype: torch.dtype, statistics: int
) -> int:
    from voxfuse.triton_kernels.soft_confusion import launch as kernels
    from voxfuse.triton_kernels.soft_confusion.options import Problem

    problem = Problem(
        dtype=dtype,
        batch=batch,
        classes=classes,
        voxels=voxels,
        target_kind=TargetKind.labels,
        activation=Activation.softmax,
        likelihood=Activation.softmax,
        overlap=Overlap.product,
        has_ignore=False,
        has_weight=False,
        gamma=0.0,
        sums=statistics,
        contiguous=True,
    )
    _, _, slots = kernels.reduction_shape(problem, kernels.plan(problem, backward=False))
    return int(slots)


def soft_confusion(
    shape: Sequence[int],
    dtype: torch.dtype,
    backend: str,
    label_bytes: int = 1,
    statistics: int = 4,
) -> list[Traffic]:
    """Forward and backward with labels and softmax, up to 256 classes."""
    batch, classes, *spatial = shape
    voxels = math.prod(spatial)
    logits, labels = batch * classes * voxels * dtype.itemsize, batch * voxels * label_bytes
    sums = batch * classes * statistics * DOUBLE
    if backend == "cuda":
        rows = cuda_rows(batch, classes, voxels, statistics)
    else:
        rows = _triton_slots(batch, classes, voxels, dtype, statistics)
    partial = rows * sums
    # Triton's single program writes the result itself; CUDA's rows are always added up, and where
    # they form groups, so are the groups.
    through_memory = 2 * partial if backend == "cuda" or rows > 1 else 0
    if backend == "cuda" and (groups := cuda_groups(batch, rows)) > 1:
        through_memory += 2 * groups * sums
    forward, backward = logits + labels + sums, 2 * logits + labels + sums
    workspace = partial if through_memory else 0
    return [
        Traffic("soft_confusion", backend, forward, forward + through_memory, workspace),
        Traffic("soft_confusion_backward", backend, backward, backward),
    ]


def ratio_loss(batch: int, classes: int, backend: str, statistics: int = 4) -> list[Traffic]:
    """The epilogue: sums in, loss and cotangents out; backward, cotangents in and out."""
    sums = batch * classes * statistics * DOUBLE
    # The sums are read for the number of terms, for the terms, and by the likelihood.
    return [
        Traffic("ratio_loss", backend, 2 * sums + 4, 4 * sums + 4),
        Traffic("ratio_loss_backward", backend, 2 * sums + 4, 2 * sums + 4),
    ]


def tversky_floor(shape: Sequence[int], dtype: torch.dtype, label_bytes: int = 1) -> int:
    """Bytes of forward + backward: logits and labels twice, the gradient once."""
    batch, classes, *spatial = shape
    voxels = batch * math.prod(spatial)
    return voxels * (3 * classes * dtype.itemsize + 2 * label_bytes)


# --- fusion --------------------------------------------------------------------------------------


def overlap_add(
    patches: int,
    channels: int,
    patch: Sequence[int],
    volume: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Traffic]:
    """Gather form and its backward; the tables of origins and weights stay in the caches."""
    read = patches * channels * math.prod(patch) * dtype.itemsize
    written = channels * math.prod(volume) * dtype.itemsize
    tables = patches * 2 * 3 * DOUBLE + sum(patch) * DOUBLE
    # Backward, every patch reads its own part of the gradient: what the caches do not keep of the
    # overlap is read again, up to once a patch.
    return [
        Traffic("overlap_add", backend, read + written, read + written + tables),
        Traffic("overlap_add_backward", backend, read + written, 2 * read + tables),
    ]


def few_channels(dtype: torch.dtype, backend: str) -> int:
    """Channels up to which a softmax is worked out anew, from what the caches hold."""
    if backend == "triton":
        from voxfuse.triton_kernels.overlap_add import launch

        return int(launch.FEW)
    source = (CUDA_SOURCES / "overlap_add_patch.cuh").read_text()
    found = re.search(r"kChannels = sizeof\(T\) == 2 \? (\d+) : (\d+);", source)
    assert found, "overlap_add_patch.cuh does not say how many channels a thread adds up"
    half, other = map(int, found.groups())
    groups = cuda_constants("overlap_add_patch.cuh")["kFewGroups"]
    return groups * (half if dtype.itemsize == 2 else other)


def overlap_add_softmax(
    patches: int,
    channels: int,
    patch: Sequence[int],
    volume: Sequence[int],
    dtype: torch.dtype,
    backend: str,
) -> list[Traffic]:
    """As ``overlap_add``, of the patches' softmax: the patches are read again with many channels,
    and two numbers a voxel kept; backward, patches and gradient are both read again."""
    plain, backward = overlap_add(patches, channels, patch, volume, dtype, backend)
    voxels = patches * math.prod(patch)
    read = voxels * channels * dtype.itemsize
    if channels <= few_channels(dtype, backend):
        kept, again = 0, 0
    else:
        kept, again = 2 * voxels * max(dtype.itemsize, 4), read
    return [
        Traffic("overlap_add, softmax", backend, plain.floor, plain.moved + again + 2 * kept, kept),
        Traffic(
            "overlap_add_backward, softmax",
            backend,
            backward.floor + read,
            backward.moved + read + 2 * again,
        ),
    ]


def overlap_add_ring(
    patches: int, channels: int, patch: Sequence[int], dtype: torch.dtype, backend: str
) -> Traffic:
    """A batch of patches side by side: they are read, and what lies under them is added to."""
    accumulator = max(dtype.itemsize, 4)
    voxels = patches * channels * math.prod(patch)
    total = voxels * (dtype.itemsize + 2 * accumulator)
    return Traffic("overlap_add_", backend, total, total)


def finalize_slab(
    channels: int,
    slab: Sequence[int],
    out_bytes: int,
    backend: str,
    accumulator: int = 4,
    clear: bool = False,
) -> Traffic:
    """Labels (or the like, ``out_bytes`` a voxel) from the finished slices of a ring.

    With ``clear`` the slices are also set to 0 for those that take their place.
    """
    voxels = math.prod(slab)
    total = voxels * (channels * accumulator * (2 if clear else 1) + out_bytes)
    return Traffic("finalize_slab", backend, total, total)


def resample_argmax(
    channels: int,
    source: Sequence[int],
    target: Sequence[int],
    out_bytes: int,
    backend: str,
    element: int = 4,
) -> Traffic:
    """Labels at another size, where the caches hold the source slices that are worked on: every
    program reads its part of the tables (an index, two weights) from there too.
    """
    tables = sum(target) * (8 + 2 * 4)
    total = channels * math.prod(source) * element + math.prod(target) * out_bytes + tables
    return Traffic("resample_argmax", backend, total, total)


# --- head_confusion ------------------------------------------------------------------------------


def head_confusion(
    batch: int,
    channels: int,
    classes: int,
    spatial: Sequence[int],
    dtype: torch.dtype,
    backend: str = "triton",
    label_bytes: int = 1,
    statistics: int = 4,
    chunk_bytes: int = 64 << 20,
) -> list[Traffic]:
    """The sums and the three gradients from the features, logits in registers."""
    from voxfuse.triton_kernels.head_confusion import launch as kernels

    voxels = math.prod(spatial)
    inputs = batch * voxels * (channels * dtype.itemsize + label_bytes)
    head = classes * (channels + 1) * dtype.itemsize
    sums = batch * classes * statistics * DOUBLE
    fast = statistics == 4
    exact = kernels.precision(dtype) == "ieee"
    rows, columns = kernels.padded(classes), kernels.padded(channels)
    _, _, slots = kernels.reduction_shape(
        voxels,
        batch,
        kernels.launch_shape(rows, columns, dtype, fast, exact, False)[0],
        kernels.CHUNK_VOXELS,
        classes * statistics * DOUBLE,
        min(kernels.FORWARD_BYTES, chunk_bytes),
    )
    forward = Traffic(
        "head_confusion", backend, inputs + head + sums, inputs + head + 2 * slots * sums + sums,
        slots * sums,
    )  # fmt: skip
    floor = inputs + head + sums + batch * voxels * channels * dtype.itemsize + head
    if not kernels.in_registers(dtype, classes, channels, fast, backward=True):
        # Chunk by chunk through memory: logits and their gradient written and read, the features
        # read again for the weight's gradient.
        logits = batch * voxels * classes * max(dtype.itemsize, 4)
        moved = floor + inputs + 5 * logits
        return [forward, Traffic("head_confusion_backward", backend, floor, moved, chunk_bytes)]
    each = classes * (columns + 1) * DOUBLE
    _, chunks, slots = kernels.reduction_shape(
        voxels,
        batch,
        kernels.launch_shape(rows, columns, dtype, fast, exact, True)[0],
        kernels.BACKWARD_CHUNK_VOXELS,
        each,
        min(kernels.BACKWARD_BYTES, chunk_bytes),
    )
    # A program adds every chunk to its own float64 sums in memory; the first only writes.
    partial = batch * each * (2 * chunks - slots + slots)
    return [
        forward,
        Traffic("head_confusion_backward", backend, floor, floor + partial, batch * slots * each),
    ]


# --- the table -----------------------------------------------------------------------------------

LOSS_SHAPES = [
    (1, 2, 512, 512, 512),
    (2, 4, 256, 256, 256),
    (1, 16, 256, 256, 256),
    (1, 117, 128, 128, 128),
]


def table(backends: Sequence[str] = ("cuda", "triton")) -> list[dict[str, object]]:
    """Every kernel at the shapes that docs/kernels.md speaks of."""
    rows: list[dict[str, object]] = []

    def add(what: str, traffic: Sequence[Traffic]) -> None:
        rows.extend({"case": what, **item.as_row()} for item in traffic)

    for backend in backends:
        for shape in LOSS_SHAPES:
            for dtype in (torch.float32, torch.bfloat16):
                name = f"{'x'.join(map(str, shape))} {str(dtype).split('.')[-1]}"
                add(name, soft_confusion(shape, dtype, backend))
        add("1x4", ratio_loss(1, 4, backend))
        for channels, edge in ((4, 384), (117, 192)):
            count = ((edge - 96) // 48 + 1) ** 3
            what = f"{count} patches of {channels}x96^3 float32"
            add(
                what,
                overlap_add(count, channels, (96,) * 3, (edge,) * 3, torch.float32, backend),
            )
            for dtype in (torch.float32, torch.bfloat16):
                what = f"{count} patches of {channels}x96^3 {str(dtype).split('.')[-1]}"
                add(
                    what,
                    overlap_add_softmax(count, channels, (96,) * 3, (edge,) * 3, dtype, backend),
                )
            add(
                f"1 patch of {channels}x96^3 float32",
                [overlap_add_ring(1, channels, (96,) * 3, torch.float32, backend)],
            )
        slab = (48, 512, 512)
        add("117x48x512x512 labels", [finalize_slab(117, slab, 1, backend)])
        add("the same, cleared", [finalize_slab(117, slab, 1, backend, clear=True)])
        add("117x96^3 to 160^3 labels", [resample_argmax(117, (96,) * 3, (160,) * 3, 1, backend)])
        add("4x128^3 to 512^3 labels", [resample_argmax(4, (128,) * 3, (512,) * 3, 1, backend)])
    add("K=32 C=117 2x128^3 bfloat16", head_confusion(2, 32, 117, (128,) * 3, torch.bfloat16))
    return rows


def print_table(rows: Sequence[dict[str, object]]) -> None:
    print(
        f"{'kernel':<31}{'backend':<9}{'case':<38}{'floor MB':>11}{'moved/floor':>13}{'kept':>12}"
    )
    for row in rows:
        print(
            f"{row['kernel']:<31}{row['backend']:<9}{row['case']:<38}"
            f"{int(row['floor']) / 1e6:>11.2f}{row['moved_over_floor']:>13}"  # type: ignore[call-overload]
            f"{int(row['workspace']) / 2**20:>8.2f} MiB"  # type: ignore[call-overload]
        )


if __name__ == "__main__":
    print_table(table())
