"""Which kernel runs, with what block shapes, and the launches.

Launch parameters come from a table that depends on the shape and the dtype only: another block
shape is another order of summation, that is other bits of the sums.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton

from voxfuse.contract import CORE, FULL, ConfusionOptions, Unlabelled
from voxfuse.triton_kernels.launches import (
    LAUNCH_OPTIONS,
    VECTOR_BYTES,
    device_guard,
    launches_of,
    most_registers,
    power_of_two,
)
from voxfuse.triton_kernels.reduction import Rows
from voxfuse.triton_kernels.soft_confusion.backward import backward_online, backward_resident
from voxfuse.triton_kernels.soft_confusion.forward import forward_online, forward_resident
from voxfuse.triton_kernels.soft_confusion.options import (
    BY_LABEL,
    GENERAL,
    TWO_CLASSES,
    Options,
    Problem,
    describe,
)
from voxfuse.triton_kernels.views import View, constexprs, view_in_place, view_of

#: Most classes with one register block a class; half as many in float64.
FEW_CLASSES = 16
#: Most classes of which a tile fits in registers with labels and softmax; three quarters of that in
#: the backward pass.
RESIDENT_CLASSES = 256
#: Classes in a block of the online kernels.
CLASS_BLOCK = 32
#: Most bytes of partial sums, and with the online kernels.
WORKSPACE_BYTES = 1 << 20
ONLINE_WORKSPACE_BYTES = 8 << 20
#: Most programs that reduce one sample. Enough to fill any GPU several times over.
MAX_SLOTS = 31 * 132
#: Programs come in multiples of this where there are so many: the multiprocessors of the H200,
#: which then finish together. On another GPU the bits are the same and the last round less even.
SLOT_MULTIPLE = 132
#: Tiles of a volume above which chunks grow.
TILES_TO_FILL = 2048
#: Registers that a thread may take, and that the threads of a program may take together.
REGISTERS, REGISTERS_A_PROGRAM = 255, 1 << 16
#: Most tiles in a chunk: so many float32 additions follow each other in a thread.
MAX_TILES = 16
#: Most tiles that a program of the backward pass walks over.
TILES_A_PROGRAM = 8


class Launch(NamedTuple):
    """A kernel with its compile-time parameters."""

    kernel: Any
    options: Options
    num_warps: int
    #: Registers that a thread may take on an NVIDIA GPU; None: as many as the assembler likes.
    registers: int | None = None

    @property
    def launch_options(self) -> dict[str, Any]:
        limit = {} if self.registers is None else most_registers(self.registers)
        return {"num_warps": self.num_warps, **LAUNCH_OPTIONS, **limit}


def _is_online(problem: Problem, backward: bool) -> bool:
    """Whether the classes are too many for a tile of them to be kept in registers, or some may not
    be annotated."""
    if problem.partial:
        return True
    if problem.double:
        most = RESIDENT_CLASSES // 4 if problem.labels_only else FEW_CLASSES // 4
    elif problem.labels_only:
        most = RESIDENT_CLASSES * 3 // 4 if backward else RESIDENT_CLASSES
    else:
        most = RESIDENT_CLASSES * (5 if backward else 6) // 16
    return problem.classes > most


@functools.lru_cache(maxsize=1024)
def plan(problem: Problem, backward: bool) -> Launch:
    """Choose the kernel and its block shapes, from the shape and the dtype alone."""
    vector = VECTOR_BYTES // problem.dtype.itemsize
    if _is_online(problem, backward):
        most = 1 if problem.double and not problem.labels_only else 4
        rows = min(CLASS_BLOCK, power_of_two(problem.classes)) if problem.partial else CLASS_BLOCK
        options = problem.options(
            16 * min(most, vector) * CLASS_BLOCK // rows,
            CLASSES=rows,
            LEVELS=problem.sums.bit_length() - 1,
        )
        return Launch(backward_online if backward else forward_online, options, 4, _registers(4))

    few = problem.classes <= FEW_CLASSES // (2 if problem.double else 1)
    # Beyond FEW_CLASSES every warp has one class of each block.
    num_warps = 4 if few else _warps(problem)
    vector = min(vector, _voxels_a_thread(problem, backward))
    # In the commonest cases the assembler takes what it needs by itself.
    common = problem.labels_only and problem.contiguous and not problem.double
    registers = None if common else _registers(num_warps)
    two = problem.labels_only and problem.classes == 2
    path = TWO_CLASSES if two else BY_LABEL if problem.labels_only else GENERAL
    block_classes = 1 if few else num_warps
    tiles = triton.cdiv(problem.classes, block_classes)
    shape: dict[str, Any] = {"PATH": path.value, "TILES": tiles, "CLASSES": block_classes}
    if not backward:
        # Voxels of a class that lie in one thread are added up before they are accumulated, unless
        # there are registers enough to keep them apart, which saves selections.
        sums = 3 if two else problem.sums
        apart = tiles * sums * vector <= 64 or not (few or problem.contiguous)
        plain = not problem.has_weight and problem.gamma == 0
        logs = few and problem.labels_only and apart and plain
        columns = 8 if two else power_of_two(tiles * sums)
        shape |= {
            "LOGS": logs,
            "FOLD": 1 if apart else vector,
            "CONTIGUOUS": problem.contiguous,
            "SUMS": sums + 1 if logs else sums,
            "LEVELS": columns.bit_length() - 1,
            "COLUMNS": columns,
        }
    options = problem.options(32 * vector * (num_warps if few else 1), **shape)
    return Launch(
        backward_resident if backward else forward_resident, options, num_warps, registers
    )


def _registers(num_warps: int) -> int:
    """Registers that a thread may take where the assembler, left alone, would take fewer."""
    return min(REGISTERS, REGISTERS_A_PROGRAM // (32 * num_warps))


def _warps(problem: Problem) -> int:
    """Warps of a program, and classes of a block, for more than FEW_CLASSES.

    Few warps that hold many classes each: what a thread needs beside its classes it needs once.
    """
    warps = 4 if problem.classes <= 64 else 8
    return 2 * warps if problem.double or not problem.labels_only else warps


def _voxels_a_thread(problem: Problem, backward: bool) -> int:
    """Most voxels of all its classes that a thread has registers for (read off the compiler)."""
    classes, labels_only = problem.classes, problem.labels_only
    if classes <= 2:
        most = 8 if labels_only else 4
    elif classes <= (8 if backward and labels_only else 4):
        most = 4
    elif classes <= 8:
        most = 2
    elif not labels_only or classes > 128:
        most = 1
    else:
        most = 2 if problem.contiguous or classes > FEW_CLASSES else 1
    if classes > 2 and (problem.sums == FULL or (backward and not labels_only)):
        most = max(1, most // 2)
    if problem.double and classes > (8 if backward and labels_only else 4 if labels_only else 2):
        most = 1
    return most


class ReductionShape(NamedTuple):
    """Who adds what to what in the forward pass."""

    tiles_a_chunk: int
    chunks: int  # of a sample
    slots: int  # programs of a sample


def reduction_shape(problem: Problem, chosen: Launch) -> ReductionShape:
    """The order of the sums, from the shape alone."""
    tiles = triton.cdiv(problem.voxels, chosen.options.BLOCK)
    online = chosen.kernel is forward_online
    tiles_a_chunk = 1
    while not online and tiles_a_chunk < MAX_TILES:
        if tiles * problem.batch < TILES_TO_FILL * tiles_a_chunk:
            break
        tiles_a_chunk *= 2
    chunks = triton.cdiv(tiles, tiles_a_chunk)
    allowed = ONLINE_WORKSPACE_BYTES if online else WORKSPACE_BYTES
    slots = allowed // (problem.batch * problem.classes * problem.sums * 8)
    slots = max(1, min(chunks, MAX_SLOTS, slots))
    if slots < chunks and slots > SLOT_MULTIPLE:
        slots -= slots % SLOT_MULTIPLE
    # The same number of chunks for every slot, but for the last round.
    slots = triton.cdiv(chunks, triton.cdiv(chunks, slots))
    return ReductionShape(tiles_a_chunk, chunks, slots)


def views_of(
    input: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None
) -> tuple[View, View, View | None]:
    """The three tensors as the kernels take them."""
    axes = input.ndim
    weights = None if weight is None else view_of(weight, weight.ndim == axes)
    return view_of(input), view_of(target, target.ndim == axes), weights


def bytes_of(annotated: torch.Tensor | None) -> torch.Tensor | None:
    """(B, C) bool as the kernels read it."""
    return None if annotated is None else annotated.contiguous().view(torch.uint8)


def output_view(gradient: torch.Tensor) -> View:
    """Where a kernel writes ``gradient``: in place, or to be copied."""
    in_place = view_in_place(gradient)
    contiguous = torch.contiguous_format
    return in_place or view_of(torch.empty_like(gradient, memory_format=contiguous))


def soft_confusion(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    full: bool,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: torch.Tensor | None = None,
    any_target: bool = False,
) -> torch.Tensor:
    """Return (B, C, 4) or, with ``full``, (B, C, 8) float64 sums; see voxfuse.soft_confusion."""
    sums = FULL if full else CORE
    shape = (*input.shape[:2], sums)
    if input.numel() == 0:
        return torch.zeros(shape, dtype=torch.float64, device=input.device)
    options = ConfusionOptions(
        activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled
    )
    parts = launches_of(input, target, weight, annotated)
    if len(parts) > 1:
        rest = (*options[:5], full, *options[5:])
        return torch.cat([soft_confusion(*x, *rest, which) for *x, which in parts])
    views = views_of(input, target, weight)
    problem = describe(
        input, shape[1], target, weight, sums, views[0].voxel == 1, options, annotated
    )
    result = torch.empty(shape, dtype=torch.float64, device=input.device)
    chosen = plan(problem, backward=False)
    tiles_a_chunk, chunks, slots = reduction_shape(problem, chosen)
    work = (chunks,) if chosen.kernel is forward_online else (tiles_a_chunk, chunks)
    with device_guard(input):
        rows = Rows(result, slots, chosen.num_warps)
        chosen.kernel[(slots, problem.batch)](
            *views,
            bytes_of(annotated),
            rows.views,
            rows.group,
            problem.voxels,
            problem.classes,
            *work,
            ignore_index if problem.has_ignore else 0,
            gamma,
            constexprs(chosen.options),
            rows.shape,
            **chosen.launch_options,
        )
        rows.finish()
    return result


def soft_confusion_backward(
    grad: torch.Tensor,
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient at ``input``, in its dtype and layout."""
    gradient = torch.empty_like(input)
    if input.numel() == 0:
        return gradient
    options = ConfusionOptions(
        activation, likelihood, overlap, ignore_index, gamma, focal_classes, unlabelled
    )
    parts = launches_of(gradient, grad, input, target, weight, annotated)
    if len(parts) > 1:
        for output, *part, which in parts:
            output.copy_(soft_confusion_backward(*part, *options, which))
        return gradient
    views, output = views_of(input, target, weight), output_view(gradient)
    classes, sums = grad.shape[1:]
    problem = describe(
        input, classes, target, weight, sums, views[0].voxel == 1, options, annotated
    )
    chosen = plan(problem, backward=True)
    tiles = triton.cdiv(problem.voxels, chosen.options.BLOCK)
    # Several tiles a program share the reading of the cotangents.
    tiles_a_program = max(1, min(TILES_A_PROGRAM, tiles * problem.batch // TILES_TO_FILL))
    with device_guard(input):
        chosen.kernel[(triton.cdiv(tiles, tiles_a_program), problem.batch)](
            grad.contiguous(),
            *views,
            bytes_of(annotated),
            output,
            problem.voxels,
            problem.classes,
            tiles_a_program,
            ignore_index if problem.has_ignore else 0,
            gamma,
            constexprs(chosen.options),
            **chosen.launch_options,
        )
    if output.pointer is not gradient:
        gradient.copy_(output.pointer)
    return gradient
