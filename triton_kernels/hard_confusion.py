"""Right and wrong voxels counted: one pass over the classes of every voxel.

A program owns a block of voxels. It keeps the greatest class of each, then compares classes and
voxels, CLASSES at a time, and adds what it has counted to the result: whole numbers, so that the
order of the programs does not matter.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from voxfuse import contract
from voxfuse.contract import Decision
from voxfuse.reference.hard_confusion import is_dense
from voxfuse.triton_kernels.launches import LAUNCH_OPTIONS, device_guard, power_of_two
from voxfuse.triton_kernels.views import View, constexprs, of_sample, view_of

#: Classes that a program reads, or counts, at once.
CLASSES = 8
#: Voxels and warps of a program: 16 bytes of float32 a thread.
BLOCK = 512
WARPS = 4


class Options(NamedTuple):
    """What the kernel is compiled for."""

    DECISION: int
    DENSE: bool
    HAS_IGNORE: bool
    REAL: tl.dtype  # that logits are compared in
    CLASSES: int
    BLOCK: int = BLOCK


class Tensors(NamedTuple):
    """Logits or predicted labels, target, mask (or None), and the counts (batch, classes, 4)."""

    input: Any
    target: Any
    mask: Any
    counts: Any


@triton.jit
def _load(x, index, voxel, inside):
    """Values of the view ``x``: of a class a row, or of the voxels alone."""
    place = x.pointer + index.to(tl.int64) * x.channel + voxel * x.voxel
    return tl.load(place, mask=inside, other=0)


@triton.jit
def _classes(raw, classes, ignore, HAS_IGNORE: tl.constexpr):
    """Labels as classes, -1 where they are ignored, out of range or not whole."""
    if raw.dtype.is_floating():
        number = raw if raw.dtype == tl.float64 else raw.to(tl.float32)
        # No class has a label that is not whole, and none has NaN.
        known = (number >= 0) & (number < classes) & (number == tl.floor(number))
    else:
        number = raw.to(tl.int64)
        known = (number >= 0) & (number < classes)
    label = tl.where(known, number, 0).to(tl.int32)
    if HAS_IGNORE:
        known = known & (label != ignore)
    return tl.where(known, label, -1)


@triton.jit
def _choose(input, voxel, inside, classes, O: tl.constexpr):
    """The greatest class of every voxel: ties to the lowest, the first NaN before everything."""
    best = tl.full([1, O.BLOCK], -float("inf"), O.REAL)
    where = tl.zeros([1, O.BLOCK], tl.int32)
    for base in range(0, classes, O.CLASSES):
        for i in tl.static_range(O.CLASSES):
            index = tl.full([1, 1], 0, tl.int32) + (base + i)
            known = index < classes
            z = _load(input, index, voxel, inside & known).to(O.REAL)
            better = ((z > best) | ((z != z) & (best == best))) & known
            best = tl.where(better, z, best)
            where = tl.where(better, index, where)
    return where


@triton.jit
def _column(sums, k: tl.constexpr):
    """One of four sums of 16 bits."""
    return (sums >> (16 * k)) & 0xFFFF


@triton.jit
def count(tensors, classes, voxels, blocks, ignore, least: tl.float32, OPTIONS: tl.constexpr):
    """BLOCK voxels of one sample."""
    O: tl.constexpr = OPTIONS
    program = tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    start = (program % blocks).to(tl.int64) * O.BLOCK
    lane = tl.arange(0, O.BLOCK)[None, :]
    inside = lane < tl.minimum(voxels - start, O.BLOCK).to(tl.int32)
    voxel = start + lane
    input = of_sample(tensors.input, sample)
    target = of_sample(tensors.target, sample)
    zero = tl.full([1, 1], 0, tl.int32)

    counted = inside
    if tensors.mask is not None:
        counted = counted & (_load(of_sample(tensors.mask, sample), zero, voxel, inside) != 0)
    label = tl.full([1, 1], -1, tl.int32)
    if not O.DENSE:
        label = _classes(_load(target, zero, voxel, inside), classes, ignore, O.HAS_IGNORE)
        counted = counted & (label >= 0)
    predicted = tl.full([1, 1], -1, tl.int32)
    if O.DECISION == contract.Decision.argmax:
        predicted = _choose(input, voxel, inside, classes, O)
    elif O.DECISION == contract.Decision.labels:
        predicted = _classes(_load(input, zero, voxel, inside), classes, ignore, False)
        counted = counted & (predicted >= 0)

    row = tensors.counts + sample * classes * 4
    for base in range(0, classes, O.CLASSES):
        index = (base + tl.arange(0, O.CLASSES))[:, None]
        known = index < classes
        every = counted & known
        if O.DECISION == contract.Decision.threshold:
            p = _load(input, index, voxel, inside & known).to(tl.float32) >= least
        else:
            p = predicted == index
        if O.DENSE:
            own = _classes(_load(target, index, voxel, inside & known), 2, ignore, O.HAS_IGNORE)
            every = every & (own >= 0)
            g = own == 1
        else:
            g = label == index
        g = g & every
        p = p & every
        # Four sums at a time: those of a block have 16 bits.
        packed = (p & g).to(tl.int64) + (p.to(tl.int64) << 16)
        packed = packed + (g.to(tl.int64) << 32) + (every.to(tl.int64) << 48)
        sums = tl.sum(packed, axis=1)
        both, predictions, truths = _column(sums, 0), _column(sums, 1), _column(sums, 2)
        everything = _column(sums, 3)
        place = row + (base + tl.arange(0, O.CLASSES)).to(tl.int64) * 4
        mask = base + tl.arange(0, O.CLASSES) < classes
        tl.atomic_add(place, both, mask=mask, sem="relaxed")
        tl.atomic_add(place + 1, predictions - both, mask=mask, sem="relaxed")
        tl.atomic_add(place + 2, truths - both, mask=mask, sem="relaxed")
        rest = everything - predictions - truths + both
        tl.atomic_add(place + 3, rest, mask=mask, sem="relaxed")


# --- launches ------------------------------------------------------------------------------------


def options_for(
    decision: int, dense: bool, has_ignore: bool, dtype: torch.dtype, classes: int
) -> Options:
    """What a launch for so many classes compiles; ``dtype`` is the input's."""
    wide = decision == Decision.argmax and dtype == torch.float64
    tile = min(power_of_two(classes), CLASSES)
    return Options(decision, dense, has_ignore, tl.float64 if wide else tl.float32, tile)


def _view(tensor: torch.Tensor, channels: bool) -> View:
    # 64 unsigned bits as signed ones: what differs is no class.
    return view_of(tensor.view(torch.int64) if tensor.dtype == torch.uint64 else tensor, channels)


def hard_confusion(
    input: torch.Tensor,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    decision: int,
    least: float,
    num_classes: int | None,
    ignore_index: int | None,
) -> torch.Tensor:
    """Return (B, C, 4) int64: TP, FP, FN and TN of every sample and class."""
    batch = input.shape[0]
    labels = decision == Decision.labels
    classes = input.shape[1] if num_classes is None else num_classes
    dense = not labels and is_dense(input, target)
    counts = torch.zeros(batch, classes, 4, dtype=torch.int64, device=input.device)
    voxels = input[0].numel() if labels and batch else (input[0, 0].numel() if batch else 0)
    if voxels == 0:
        return counts
    blocks = triton.cdiv(voxels, BLOCK)
    options = options_for(decision, dense, ignore_index is not None, input.dtype, classes)
    with device_guard(input):
        count[(batch * blocks,)](
            Tensors(
                _view(input, not labels),
                _view(target, dense and target.ndim == input.ndim),
                None if mask is None else _view(mask, False),
                counts,
            ),
            classes,
            voxels,
            blocks,
            ignore_index or 0,
            least,
            constexprs(options),
            num_warps=WARPS,
            **LAUNCH_OPTIONS,
        )
    return counts
