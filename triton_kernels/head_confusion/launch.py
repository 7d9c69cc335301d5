"""Which heads stay in registers, with what block shapes, and the launches."""

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse.contract import CORE, FULL, ConfusionOptions, Unlabelled
from voxfuse.reference import head_confusion as chunked
from voxfuse.triton_kernels import soft_confusion as logits_kernels
from voxfuse.triton_kernels.head_confusion.backward import head_backward
from voxfuse.triton_kernels.head_confusion.forward import head_forward
from voxfuse.triton_kernels.head_confusion.load import Head, HeadOptions
from voxfuse.triton_kernels.launches import (
    LAUNCH_OPTIONS,
    device_guard,
    launches_of,
    most_registers,
    power_of_two,
)
from voxfuse.triton_kernels.reduction import Rows
from voxfuse.triton_kernels.soft_confusion.launch import output_view, views_of
from voxfuse.triton_kernels.soft_confusion.options import (
    BY_LABEL,
    GENERAL,
    Options,
    Problem,
    describe,
)
from voxfuse.triton_kernels.views import constexprs, interpreting

#: Most classes whose logits of a tile fit in registers, and with their gradient; forward half as
#: many but for labels, softmax and 4 sums, and half as many again of more than NARROW features.
MOST_CLASSES, MOST_BACKWARD_CLASSES = 256, 128
#: Most numbers in the padded weight whose gradient a program holds in registers, by precision of
#: the products: full float32 leaves the tensor cores idle and takes several times the registers.
MOST_NUMBERS = {"tf32": 1 << 12, "ieee": 1 << 11}
#: Most features of the backward pass, which multiplies all at once, and as many as every product
#: may take at once.
MOST_FEATURES, NARROW = 128, 32
#: Registers that a thread may take: all there are.
REGISTERS = 255
#: Voxels in a chunk: so many are added up in float32.
CHUNK_VOXELS, BACKWARD_CHUNK_VOXELS = 1024, 4096
#: Most bytes of partial sums, if chunk_bytes allows them.
FORWARD_BYTES, BACKWARD_BYTES = 4 << 20, 24 << 20


def in_registers(
    dtype: torch.dtype, classes: int, channels: int, fast: bool, backward: bool
) -> bool:
    """Whether a tile's logits can stay in registers; ``fast``: labels, softmax and 4 sums."""
    if dtype == torch.float64:
        return False
    rows, columns = padded(classes), padded(channels)
    exact = precision(dtype) == "ieee"
    heavy, wide = exact or not fast, columns > NARROW
    if not backward:
        most = MOST_CLASSES if fast else MOST_CLASSES // 2
        return classes <= (most // 2 if heavy and wide else most)
    return (
        classes <= MOST_BACKWARD_CLASSES
        and channels <= MOST_FEATURES
        and rows * columns <= MOST_NUMBERS["ieee" if heavy else "tf32"]
        and (columns <= 64 or (fast and rows == 16))
        and (fast or not wide or rows == 16)
    )


def launch_shape(
    rows: int, columns: int, dtype: torch.dtype, fast: bool, exact: bool, backward: bool
) -> tuple[int, int, int]:
    """Voxels of a tile, warps, and features multiplied at once.

    The widest tiles without spills, read off the compiler.
    """
    few, heavy, wide = rows == 16, exact or not fast, columns > NARROW
    if backward:
        if few and not heavy and columns <= 64:
            return 64, 4, columns
        if rows > 64 and not heavy and dtype.itemsize == 2:
            return 16, 4, columns
        return (16 if heavy or wide else 32), 8, columns
    step = min(columns, 16 if heavy and wide else NARROW)
    if few and not (heavy and wide) and (fast or not exact):
        return 64, 4, step
    narrow_tile = few or rows > 128 or (heavy and (rows > 64 or wide))
    return (16 if narrow_tile else 32), 8, step


def padded(extent: int) -> int:
    """Rows or columns of a product: a power of two, at least the 16 that tensor cores take."""
    return max(16, power_of_two(extent))


def precision(dtype: torch.dtype) -> str:
    """Of float32 products; half types multiply exactly.

    Not every GPU of AMD's has something like tf32, and Triton refuses it for all types there.
    """
    if torch.version.hip is not None:
        return "ieee"
    # Unlike torch.get_float32_matmul_precision, this can be asked however it was set.
    if dtype != torch.float32 or torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"


class Launch(NamedTuple):
    """Compile-time parameters of a kernel, and its warps."""

    options: Options
    head: HeadOptions
    num_warps: int


def plan(
    problem: Problem, channels: int, backward: bool, features: bool = True, head: bool = True
) -> Launch:
    """Choose the block shapes; ``features`` and ``head`` say which gradients are needed."""
    fast, exact = problem.labels_only, precision(problem.dtype) == "ieee"
    rows, columns = padded(problem.classes), padded(channels)
    block, num_warps, step = launch_shape(rows, columns, problem.dtype, fast, exact, backward)
    path = BY_LABEL if fast else GENERAL
    half = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return Launch(
        problem.options(block, CLASSES=rows, PATH=path.value),
        HeadOptions(
            CHANNELS=step,
            ONE_STEP=channels <= step,
            # The interpreter multiplies float32 alone; products of half types are exact in it.
            OPERAND=tl.float32 if interpreting() else half.get(problem.dtype, tl.float32),
            PRECISION=precision(problem.dtype),
            NEED_FEATURES=features,
            NEED_HEAD=head,
        ),
        num_warps,
    )


def reduction_shape(
    voxels: int, batch: int, block: int, chunk_voxels: int, bytes_each: int, most_bytes: int
) -> tuple[int, int, int]:
    """Return (tiles a chunk, chunks a sample, slots a sample): who adds what to what."""
    tiles_a_chunk = chunk_voxels // block
    chunks = triton.cdiv(voxels, chunk_voxels)
    slots = max(1, min(chunks, most_bytes // max(1, batch * bytes_each)))
    # The same number of chunks for every slot, but for the last round.
    return tiles_a_chunk, chunks, triton.cdiv(chunks, triton.cdiv(chunks, slots))


def _launch_options(num_warps: int) -> dict[str, Any]:
    return {"num_warps": num_warps, **LAUNCH_OPTIONS, **most_registers(REGISTERS)}


def head_confusion(
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    full: bool,
    chunk_bytes: int,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return (B, C, 4) or, with ``full``, (B, C, 8) float64 sums."""
    options = ConfusionOptions(activation, likelihood, overlap, ignore_index, gamma, focal_classes)
    batch, channels = features.shape[:2]
    classes, sums = weight.shape[0], FULL if full else CORE
    if features.numel() == 0:
        shape = (batch, classes, sums)
        return torch.zeros(shape, dtype=torch.float64, device=features.device)
    problem = describe(features, classes, target, voxel_weight, sums, False, options)
    resident = in_registers(features.dtype, classes, channels, problem.labels_only, False)
    if not resident or annotated is not None:
        return chunked.head_confusion(
            features, weight, bias, target, voxel_weight,
            *options[:5], full, chunk_bytes, focal_classes, unlabelled, annotated,
            confusion=logits_kernels.soft_confusion,
        )  # fmt: skip
    parts = launches_of(features, target, voxel_weight)
    if len(parts) > 1:
        rest = (*options[:5], full, chunk_bytes, focal_classes)
        return torch.cat([head_confusion(x, weight, bias, *labels, *rest) for x, *labels in parts])
    flat, flat_target, flat_weight = views_of(features, target, voxel_weight)
    chosen = plan(problem, channels, backward=False)
    tiles_a_chunk, chunks, slots = reduction_shape(
        problem.voxels,
        batch,
        chosen.options.BLOCK,
        CHUNK_VOXELS,
        classes * sums * 8,
        min(FORWARD_BYTES, chunk_bytes),
    )
    result = torch.empty((batch, classes, sums), dtype=torch.float64, device=features.device)
    with device_guard(features):
        rows = Rows(result, slots, chosen.num_warps)
        head_forward[(slots, batch)](
            flat,
            Head(weight.contiguous(), None if bias is None else bias.contiguous()),
            flat_target,
            flat_weight,
            rows.views,
            rows.group,
            problem.voxels,
            classes,
            channels,
            tiles_a_chunk,
            chunks,
            ignore_index if problem.has_ignore else 0,
            gamma,
            constexprs(chosen.options),
            constexprs(chosen.head),
            rows.shape,
            **_launch_options(chosen.num_warps),
        )
        rows.finish()
    return result


def head_confusion_backward(
    grad: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    activation: int,
    likelihood: int,
    overlap: int,
    ignore_index: int | None,
    gamma: float,
    chunk_bytes: int,
    need_features: bool,
    need_head: bool,
    focal_classes: int | None = None,
    unlabelled: int = Unlabelled.exclude,
    annotated: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients at features, weight and bias; empty ones for what is not needed."""
    options = ConfusionOptions(activation, likelihood, overlap, ignore_index, gamma, focal_classes)
    channels, (classes, sums) = features.shape[1], grad.shape[1:]
    problem = describe(features, classes, target, voxel_weight, sums, False, options)
    resident = in_registers(features.dtype, classes, channels, problem.labels_only, True)
    if features.numel() == 0 or not resident or annotated is not None:
        return chunked.head_confusion_backward(
            grad, features, weight, bias, target, voxel_weight,
            *options[:5], chunk_bytes, need_features, need_head,
            focal_classes, unlabelled, annotated,
            confusion_backward=logits_kernels.soft_confusion_backward,
        )  # fmt: skip
    gradient = torch.empty_like(features) if need_features else None
    parts = launches_of(gradient, grad, features, target, voxel_weight)
    of_head = [_backward(*part, weight, bias, options, chunk_bytes, need_head) for part in parts]
    of_weight, of_bias = (functools.reduce(torch.add, each) for each in zip(*of_head, strict=True))
    return (
        features.new_empty(0) if gradient is None else gradient,
        of_weight.to(weight.dtype),
        weight.new_empty(0) if bias is None else of_bias.to(bias.dtype),
    )


def _backward(
    gradient: torch.Tensor | None,
    grad: torch.Tensor,
    features: torch.Tensor,
    target: torch.Tensor,
    voxel_weight: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    options: ConfusionOptions,
    chunk_bytes: int,
    need_head: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write the gradient at features, if there is one; return the others in float64, or empty."""
    batch, channels = features.shape[:2]
    classes, sums = grad.shape[1:]
    problem = describe(features, classes, target, voxel_weight, sums, False, options)
    flat, flat_target, flat_weight = views_of(features, target, voxel_weight)
    output = None if gradient is None else output_view(gradient)
    chosen = plan(problem, channels, True, gradient is not None, need_head)
    columns = chosen.head.CHANNELS
    tiles_a_chunk, chunks, slots = reduction_shape(
        problem.voxels,
        batch,
        chosen.options.BLOCK,
        BACKWARD_CHUNK_VOXELS if need_head else CHUNK_VOXELS,
        classes * (columns + 1) * 8 if need_head else 1,
        min(BACKWARD_BYTES, chunk_bytes),
    )
    rows = (slots, batch, classes) if need_head else (0, 0, 0)
    partial = torch.empty(
        math.prod(rows) * (columns + 1), dtype=torch.float64, device=features.device
    )
    with device_guard(features):
        head_backward[(slots, batch)](
            grad.contiguous(),
            flat,
            Head(weight.contiguous(), None if bias is None else bias.contiguous()),
            flat_target,
            flat_weight,
            output,
            partial,
            problem.voxels,
            classes,
            channels,
            tiles_a_chunk,
            chunks,
            options.ignore_index if problem.has_ignore else 0,
            options.gamma,
            constexprs(chosen.options),
            constexprs(chosen.head),
            **_launch_options(chosen.num_warps),
        )
    if gradient is not None and output.pointer is not gradient:
        gradient.copy_(output.pointer)
    if not need_head:
        return partial, partial
    weights, biases = partial.split([math.prod(rows) * columns, math.prod(rows)])
    weights = weights.view(*rows, columns)[..., :channels].sum((0, 1))
    return weights, biases.view(rows).sum((0, 1))
