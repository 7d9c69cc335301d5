"""The sums of tiles of features."""

import triton
import triton.language as tl

from voxfuse.triton_kernels.head_confusion.load import logits_of
from voxfuse.triton_kernels.head_confusion.probability import minus_log_of_label, softmax_by_label
from voxfuse.triton_kernels.reduction import finish_rows, row_of_program
from voxfuse.triton_kernels.soft_confusion.forward import confusion_terms
from voxfuse.triton_kernels.soft_confusion.load import (
    class_index,
    load_target,
    load_voxels,
    tile_at,
)
from voxfuse.triton_kernels.soft_confusion.options import BY_LABEL
from voxfuse.triton_kernels.soft_confusion.probability import modulated, softmax_of
from voxfuse.triton_kernels.views import of_sample


@triton.jit
def _terms_by_label(z, voxels, classes, gamma, O: tl.constexpr):
    """The summands of a tile for labels with softmax."""
    s = softmax_by_label(z, voxels.label, classes, O)
    scale = 1.0 / s.total
    p = s.e_label * scale
    other = s.others * scale
    nll = modulated(other, minus_log_of_label(s), gamma, voxels.label, O)
    w = voxels.weight
    # Excluded voxels have no label; theirs are finite numbers of zero features.
    scale = tl.where(voxels.included, scale * w, 0.0)
    return (
        tl.where(s.hit, p * w, 0.0),
        tl.where(s.hit, 0.0, s.e * scale),
        tl.where(s.hit, other * w, 0.0),
        tl.where(s.hit, nll * w, 0.0),
    )


@triton.jit
def _terms(z, target, tile, voxels, classes, gamma, O: tl.constexpr):
    """The summands of a tile of any problem."""
    index = class_index(0, O)
    softmax = softmax_of((z,), classes, O)
    g = load_target(target, index, tile, voxels, classes, True, O)
    terms = confusion_terms(z, softmax, g, gamma, index, O)
    result = ()
    for s in tl.static_range(O.STATS):
        x = tl.broadcast_to(terms[s] * voxels.weight, [O.CLASSES, O.BLOCK])
        result = result + (tl.where(voxels.included, x, 0.0),)
    return result


@triton.jit(do_not_specialize=["group"])
def head_forward(
    features,
    head,
    target,
    voxel_weight,
    rows,
    group,
    voxels,
    classes,
    channels,
    tiles_a_chunk,
    chunks,
    ignore,
    gamma: tl.float64,
    O: tl.constexpr,
    H: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Partial sums of one program's chunks into its row, (class, sum)."""
    slot = tl.program_id(0).to(tl.int64)
    slots = tl.num_programs(0)
    sample = tl.program_id(1).to(tl.int64)
    features, target = of_sample(features, sample), of_sample(target, sample)
    if voxel_weight is not None:
        voxel_weight = of_sample(voxel_weight, sample)
    outer = ()
    for _ in tl.static_range(O.STATS):
        outer = outer + (tl.zeros([O.CLASSES], tl.float64),)
    for chunk in range(slot, chunks, slots):
        sums = ()
        for _ in tl.static_range(O.STATS):
            sums = sums + (tl.zeros([O.CLASSES], tl.float32),)
        first = chunk * tiles_a_chunk * O.BLOCK
        last = tl.minimum(first + tiles_a_chunk * O.BLOCK, voxels)
        for start in range(first, last, O.BLOCK):
            tile = tile_at(start, voxels, O)
            own = load_voxels(target, voxel_weight, None, tile, classes, ignore, O)
            z = logits_of(features, head, tile, own.included, classes, channels, O, H)
            if O.PATH == BY_LABEL:
                terms = _terms_by_label(z, own, classes, gamma, O)
            else:
                terms = _terms(z, target, tile, own, classes, gamma, O)
            new = ()
            for s in tl.static_range(O.STATS):
                new = new + (sums[s] + tl.sum(terms[s], axis=1),)
            sums = new
        new = ()
        for s in tl.static_range(O.STATS):
            new = new + (outer[s] + sums[s].to(tl.float64),)
        outer = new
    row = tl.arange(0, O.CLASSES)
    place = row_of_program(rows, classes * O.STATS) + row * O.STATS
    for s in tl.static_range(O.STATS):
        tl.store(place + s, outer[s], mask=row < classes)
    finish_rows(rows, classes * O.STATS, group, ROWS)
