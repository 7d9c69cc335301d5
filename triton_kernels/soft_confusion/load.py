"""Reading a tile of voxels: logits, targets and weights."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from voxfuse.triton_kernels.numerics import NAN, exponential, finite
from voxfuse.triton_kernels.soft_confusion.options import BINARY, DENSE, LABELS


class Tile(NamedTuple):
    """BLOCK voxels, ``start + lane``, and which exist; ``lane`` and ``inside`` are (1, BLOCK)."""

    start: Any
    lane: Any
    inside: Any


class Voxels(NamedTuple):
    """What the voxels of a tile have once, each (1, BLOCK), or (1, 1) where it is constant.

    Labels of excluded voxels are -1, so that no class matches them: ignored, out of range, not
    whole, of weight 0 or past the end. ``value`` is the target where there is one class.
    """

    label: Any
    value: Any
    weight: Any
    included: Any


class Merged(NamedTuple):
    """Of the classes that are merged into the background, at every voxel of a tile: the largest
    logit, the sum of exp(z - largest) over them, and the dense targets of all but the background's
    own. Nothing without O.MERGE.
    """

    largest: Any
    total: Any
    target: Any


class Cotangents(NamedTuple):
    """Of a block of classes: of TP less FN, FP, NLL, OFF, and twice that of P2."""

    hit: Any
    fp: Any
    nll: Any
    off: Any
    square: Any


@triton.jit
def tile_at(start, voxels, O: tl.constexpr):
    """The tile that begins at the voxel ``start``."""
    lane = tl.arange(0, O.BLOCK)[None, :]
    if O.EVEN:
        inside = tl.full([1, O.BLOCK], True, tl.int1)
    else:
        inside = lane < tl.minimum(voxels - start, O.BLOCK).to(tl.int32)
    return Tile(start, lane, inside)


@triton.jit
def offset_of(x, tile):
    """Where the voxels of a tile lie in the view ``x``, from its pointer on."""
    return tile.start * x.voxel + tile.lane * x.voxel


@triton.jit
def class_index(first, O: tl.constexpr):
    """Indices of a block of classes, (CLASSES, 1)."""
    return (first + tl.arange(0, O.CLASSES))[:, None]


@triton.constexpr_function
def padded(t, options):
    """Whether the block ``t`` of a tile may have rows beyond the last class."""
    return options.CLASSES > 1 and t == options.TILES - 1


@triton.jit
def load_values(x, index, tile, mask, classes, PADDED: tl.constexpr, O: tl.constexpr):
    """A (CLASSES, BLOCK) block of the view ``x``, where ``mask``, in the type of the arithmetic."""
    mask = mask & (index < classes) if PADDED else mask
    place = x.pointer + index.to(tl.int64) * x.channel + offset_of(x, tile)
    return tl.load(place, mask=mask, other=0).to(O.DTYPE)


@triton.jit
def store_values(x, index, tile, value, mask):
    """Write a block of classes to the view ``x``."""
    place = x.pointer + index.to(tl.int64) * x.channel
    place = place + tile.start * x.voxel + tile.lane * x.voxel
    tl.store(place, value.to(x.pointer.dtype.element_ty), mask=mask)


@triton.jit
def load_kept(annotated, index, classes, O: tl.constexpr):
    """Whether classes are annotated, and so are what is none. Where the others are merged into the
    background, that is there whatever is said of it.
    """
    inside = (index >= 0) & (index < classes)
    kept = tl.load(annotated + index, mask=inside, other=1) != 0
    if O.MERGE:
        kept = kept | (index == 0)
    return kept


@triton.jit
def load_merged(input, target, annotated, tile, voxels, classes, O: tl.constexpr):
    """The ``Merged`` of a tile, whose classes are read block by block."""
    largest = tl.full([1, O.BLOCK], float("-inf"), O.DTYPE)
    total = tl.full([1, O.BLOCK], 0.0, O.DTYPE)
    theirs = total
    if O.MERGE:
        for c in range(0, classes, O.CLASSES):
            index = class_index(c, O)
            mine = (index == 0) | (load_kept(annotated, index, classes, O) == 0)
            z = finite(load_values(input, index, tile, tile.inside, classes, True, O))
            z = tl.where(mine, z, float("-inf"))
            largest = tl.maximum(largest, tl.max(z, axis=0, keep_dims=True))
            if O.TARGET == DENSE:
                g = load_values(target, index, tile, voxels.included, classes, True, O)
                g = tl.where(mine & (index > 0), g, 0.0)
                theirs += tl.sum(g, axis=0, keep_dims=True)
        for c in range(0, classes, O.CLASSES):
            index = class_index(c, O)
            mine = (index == 0) | (load_kept(annotated, index, classes, O) == 0)
            z = finite(load_values(input, index, tile, tile.inside, classes, True, O))
            e = tl.where(mine, exponential(z - largest), 0.0)
            total += tl.sum(e, axis=0, keep_dims=True)
    return Merged(largest, total, theirs)


@triton.jit
def load_block(input, annotated, merged, index, tile, classes, O: tl.constexpr):
    """The logits of a block of classes as a softmax sees them.

    Classes that are not annotated have the lowest number, all others at least half of that, so that
    their probability is 0 whatever the others' logits are. With O.MERGE the background's logit is
    log-sum-exp of theirs, and all are measured from the largest of these.
    """
    z = load_values(input, index, tile, tile.inside, classes, True, O)
    if O.PARTIAL:
        lowest = -3.4028234663852886e38 if O.DTYPE == tl.float32 else -1.7976931348623157e308
        z = finite(z)
        if O.MERGE:
            z = tl.where(index == 0, tl.log(merged.total), z - merged.largest)
        z = tl.maximum(z, 0.5 * lowest, propagate_nan=NAN)
        z = tl.where(load_kept(annotated, index, classes, O), z, lowest)
    return z


@triton.jit
def load_target_block(
    target, annotated, merged, index, tile, voxels, classes, PADDED: tl.constexpr, O: tl.constexpr
):
    """``load_target`` without the classes that are not annotated."""
    g = load_target(target, index, tile, voxels, classes, PADDED, O)
    if O.PARTIAL and O.TARGET != LABELS:
        g = tl.where(load_kept(annotated, index, classes, O), g, 0.0)
        if O.MERGE and O.TARGET == DENSE:
            g = tl.where(index == 0, g + merged.target, g)
    return g


@triton.jit
def load_logits(input, tile, classes, O: tl.constexpr):
    """All blocks of classes of a tile."""
    zs = ()
    for t in tl.static_range(O.TILES):
        index = class_index(t * O.CLASSES, O)
        zs = zs + (load_values(input, index, tile, tile.inside, classes, padded(t, O), O),)
    return zs


@triton.jit
def load_voxels(target, weight, annotated, tile, classes, ignore, O: tl.constexpr):
    """The ``Voxels`` of a tile; one whose label is not annotated is background, or excluded."""
    included = tile.inside
    label = tl.full([1, 1], -1, tl.int32)
    value = tl.full([1, 1], 0.0, O.DTYPE)
    w = tl.full([1, 1], 1.0, O.DTYPE)
    if weight is not None:
        place = weight.pointer + offset_of(weight, tile)
        w = tl.load(place, mask=tile.inside, other=0).to(O.DTYPE)
        included = included & (w != 0)
    if O.TARGET != DENSE:
        raw = tl.load(target.pointer + offset_of(target, tile), mask=tile.inside, other=0)
        if O.TARGET == LABELS:
            if raw.dtype.is_floating():
                number = raw if raw.dtype == tl.float64 else raw.to(tl.float32)
                # No class has a label that is not whole, and none has NaN.
                included = included & (number >= 0) & (number < classes)
                included = included & (number == tl.floor(number))
            else:
                # What goes beyond the signed type comes out negative, and is no class.
                number = raw.to(tl.int64 if raw.dtype.primitive_bitwidth == 64 else tl.int32)
                included = included & (number >= 0) & (number < classes)
            if O.HAS_IGNORE:
                included = included & (tl.where(included, number, 0).to(tl.int32) != ignore)
            label = tl.where(included, number, -1).to(tl.int32)
            if O.PARTIAL:
                kept = load_kept(annotated, label, classes, O)
                if O.MERGE:
                    label = tl.where(kept, label, 0)
                else:
                    included = included & kept
                    label = tl.where(included, label, -1)
        else:
            if O.HAS_IGNORE:
                # The value itself and not its integer part: 1/2 is not 0.
                if raw.dtype.is_floating():
                    number = raw if raw.dtype == tl.float64 else raw.to(tl.float32)
                else:
                    number = raw.to(tl.int64)
                included = included & (number != ignore)
            if O.TARGET == BINARY:
                included = included & ((raw == 0) | (raw == 1))
            value = raw.to(O.DTYPE)
    return Voxels(label, value, w, included)


@triton.jit
def load_target(target, index, tile, voxels, classes, PADDED: tl.constexpr, O: tl.constexpr):
    """The target g of a block of classes."""
    if O.TARGET == LABELS:
        g = tl.where(voxels.label == index, 1.0, 0.0).to(O.DTYPE)
    elif O.TARGET == DENSE:
        g = load_values(target, index, tile, voxels.included, classes, PADDED, O)
    else:
        g = voxels.value
    return g


@triton.jit
def named(cotangents):
    """The ``Cotangents`` out of a tuple of blocks: Triton 3.6 forgets the names of what is added to
    a tuple.
    """
    c = cotangents
    return Cotangents(c[0], c[1], c[2], c[3], c[4])


@triton.jit
def load_cotangents(grad, index, classes, PADDED: tl.constexpr, O: tl.constexpr):
    """The ``Cotangents`` of a block of classes; OFF and P2 have some with 8 sums alone."""
    place = grad + index.to(tl.int64) * O.STATS
    mask = index < classes if PADDED else index >= 0
    fp = tl.load(place + 1, mask=mask, other=0.0)
    fn = tl.load(place + 2, mask=mask, other=0.0)
    hit = tl.load(place, mask=mask, other=0.0) - fn
    nll = tl.load(place + 3, mask=mask, other=0.0)
    off, square = nll, nll
    if O.STATS == 8:
        off = tl.load(place + 4, mask=mask, other=0.0)
        square = 2.0 * tl.load(place + 5, mask=mask, other=0.0)
    return Cotangents(
        hit.to(O.DTYPE), fp.to(O.DTYPE), nll.to(O.DTYPE), off.to(O.DTYPE), square.to(O.DTYPE)
    )


@triton.jit
def load_cotangents_block(grad, annotated, index, classes, PADDED: tl.constexpr, O: tl.constexpr):
    """``load_cotangents``, 0 for classes that are not annotated."""
    cotangents = load_cotangents(grad, index, classes, PADDED, O)
    if O.PARTIAL:
        kept = load_kept(annotated, index, classes, O)
        result = ()
        for i in tl.static_range(5):
            result = result + (tl.where(kept, cotangents[i], 0.0),)
        cotangents = named(result)
    return cotangents
