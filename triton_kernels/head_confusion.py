"""Soft confusion of a linear head: logits live in registers, a tile of voxels at a time.

A *tile* is BLOCK voxels. Its logits are one product of the weight (CLASSES, K) and the features
(K, BLOCK), both padded to powers of two, accumulated in float32; they are reduced, or turned into
their gradient, where they are. Nothing volume-sized is written but the features' gradient.

Reduction. A *chunk* is a fixed number of consecutive tiles, summed in float32; a program takes
every slots-th chunk and adds it in float64 to a partial sum of its own. Which program adds what
depends on the shape alone, and the partial sums are added in a fixed order, forward by the programs
that come last (see reduction): the same bits in every run.

Larger heads (see in_registers) and float64 go through memory chunk by chunk: the platform's matrix
product and the soft confusion kernels.
"""

import math

import torch
import triton
import triton.language as tl

from voxfuse.contract import CORE, FULL, Activation, Overlap, TargetKind
from voxfuse.reference import head_confusion as chunked
from voxfuse.triton_kernels import soft_confusion as logits_kernels
from voxfuse.triton_kernels.launches import (
    LAUNCH_OPTIONS,
    device_guard,
    most_registers,
    power_of_two,
)
from voxfuse.triton_kernels.numerics import finite
from voxfuse.triton_kernels.reduction import Rows, finish_rows, row_of_program
from voxfuse.triton_kernels.soft_confusion import (
    DENSE,
    LABELS,
    SOFTMAX,
    _choose,
    _class_index,
    _combine,
    _greatest,
    _inside,
    _is_largest,
    _load_cotangents,
    _load_target,
    _load_voxels,
    _modulated,
    _parts_of_largest,
    _shares,
    _slope,
    _slopes,
    _softmax_logits,
    _softmax_state,
    _terms,
)
from voxfuse.triton_kernels.views import view_in_place, view_of

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


@triton.jit
def _load_weight(weight, start, classes, channels, CLASSES: tl.constexpr, CHANNELS: tl.constexpr):
    """The weight's columns from ``start`` on, (CLASSES, CHANNELS)."""
    index = tl.arange(0, CLASSES)[:, None]
    k = start + tl.arange(0, CHANNELS)[None, :]
    return tl.load(
        weight + index * channels + k, mask=(index < classes) & (k < channels), other=0.0
    )


@triton.jit
def _load_features(features, start_k, offset, stride_c, included, channels, CHANNELS: tl.constexpr):
    """(CHANNELS, BLOCK) features, 0 where the voxel is excluded (its own may be NaN)."""
    k = start_k + tl.arange(0, CHANNELS)[:, None]
    place = features + k.to(tl.int64) * stride_c + offset
    return tl.load(place, mask=included & (k < channels), other=0.0)


@triton.jit
def _logits(
    features,
    weight,
    bias,
    offset,
    stride_c,
    included,
    classes,
    channels,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ONE_STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(CLASSES, BLOCK) float32 logits of a tile."""
    z = tl.zeros([CLASSES, BLOCK], tl.float32)
    if bias is not None:
        index = _class_index(0, CLASSES)
        z += tl.load(bias + index, mask=index < classes, other=0.0).to(tl.float32)
    if ONE_STEP:
        w = _load_weight(weight, 0, classes, channels, CLASSES, CHANNELS)
        f = _load_features(features, 0, offset, stride_c, included, channels, CHANNELS)
        z = tl.dot(w.to(OPERAND), f.to(OPERAND), z, input_precision=PRECISION)
    else:
        for k in range(0, channels, CHANNELS):
            w = _load_weight(weight, k, classes, channels, CLASSES, CHANNELS)
            f = _load_features(features, k, offset, stride_c, included, channels, CHANNELS)
            z = tl.dot(w.to(OPERAND), f.to(OPERAND), z, input_precision=PRECISION)
    return z


@triton.jit
def _label_softmax(z, label, classes, CLASSES: tl.constexpr):
    """exp(z - largest), and of the label's class z - largest and the sum over the others."""
    z = finite(z)
    index = _class_index(0, CLASSES)
    z = tl.where(index < classes, z, float("-inf"))
    d = z - tl.max(z, axis=0, keep_dims=True)
    e = tl.exp(d)
    hit = label == index
    d_label = tl.sum(tl.where(hit, d, 0.0), axis=0, keep_dims=True)
    others = tl.sum(tl.where(hit, 0.0, e), axis=0, keep_dims=True)
    return e, hit, d_label, others


@triton.jit(do_not_specialize=["group"])
def _head_forward(
    features,
    weight,
    bias,
    target,
    voxel_weight,
    rows,
    group,
    voxels,
    classes,
    channels,
    features_b,
    features_c,
    features_v,
    target_b,
    target_c,
    target_v,
    weight_b,
    weight_v,
    tiles_a_chunk,
    chunks,
    ignore,
    gamma: tl.float64,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    FAST: tl.constexpr,
    SUMS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Partial sums of one program's chunks into partial[slot, sample, class, sum]."""
    slot = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    FULL: tl.constexpr = SUMS == 8
    features += sample * features_b
    target += sample * target_b
    if voxel_weight is not None:
        voxel_weight += sample * weight_b
    row = tl.arange(0, CLASSES)
    outer = ()
    for _ in tl.static_range(SUMS):
        outer = outer + (tl.zeros([CLASSES], tl.float64),)
    for chunk in range(slot, chunks, slots):
        sums = ()
        for _ in tl.static_range(SUMS):
            sums = sums + (tl.zeros([CLASSES], tl.float32),)
        first = chunk * tiles_a_chunk * BLOCK
        last = tl.minimum(first + tiles_a_chunk * BLOCK, voxels)
        for start in range(first, last, BLOCK):
            lane = tl.arange(0, BLOCK)[None, :]
            inside = _inside(start, voxels, BLOCK, EVEN)
            target_offset = start * target_v + lane * target_v
            label, value, w, included = _load_voxels(
                target,
                target_offset,
                voxel_weight,
                start * weight_v + lane * weight_v,
                inside,
                classes,
                ignore,
                TARGET,
                HAS_IGNORE,
                tl.float32,
            )
            z = _logits(
                features,
                weight,
                bias,
                start * features_v + lane * features_v,
                features_c,
                included,
                classes,
                channels,
                CLASSES,
                CHANNELS,
                BLOCK,
                ONE_STEP,
                OPERAND,
                PRECISION,
            )
            if FAST:
                e, hit, d_label, others = _label_softmax(z, label, classes, CLASSES)
                e_label = tl.exp(d_label)
                total = e_label + others
                scale = 1.0 / total
                p = e_label * scale
                other = others * scale
                nll = _log_of_sum(e_label, others, total) - d_label
                nll = _modulated(p, other, nll, gamma, label, GAMMA, FOCAL, tl.float32)
                # Excluded voxels have no label; theirs are finite numbers of zero features.
                scale = tl.where(included, scale * w, 0.0)
                terms = (
                    tl.where(hit, p * w, 0.0),
                    tl.where(hit, 0.0, e * scale),
                    tl.where(hit, other * w, 0.0),
                    tl.where(hit, nll * w, 0.0),
                )
            else:
                m = tl.full([1, 1], 0.0, tl.float32)
                rest, count = m, m
                if ACTIVATION == SOFTMAX or LIKELIHOOD == SOFTMAX:
                    finite = _softmax_logits((z,), classes, 1, CLASSES, tl.float32)
                    m, rest, count = _softmax_state(finite, 1, CLASSES, tl.float32)
                index = _class_index(0, CLASSES)
                g = _load_target(
                    target,
                    index,
                    target_c,
                    target_offset,
                    included,
                    classes,
                    label,
                    value,
                    TARGET,
                    True,
                    tl.float32,
                )
                raw = _terms(
                    z,
                    m,
                    rest,
                    count,
                    g,
                    gamma,
                    index,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    FOCAL,
                    FULL,
                    tl.float32,
                )
                terms = ()
                for s in tl.static_range(SUMS):
                    wide = tl.broadcast_to(raw[s] * w, [CLASSES, BLOCK])
                    terms = terms + (tl.where(included, wide, 0.0),)
            new = ()
            for s in tl.static_range(SUMS):
                new = new + (sums[s] + tl.sum(terms[s], axis=1),)
            sums = new
        new = ()
        for s in tl.static_range(SUMS):
            new = new + (outer[s] + sums[s].to(tl.float64),)
        outer = new
    place = row_of_program(rows, classes * SUMS) + row * SUMS
    for s in tl.static_range(SUMS):
        tl.store(place + s, outer[s], mask=row < classes)
    finish_rows(rows, classes * SUMS, group, ROWS)


@triton.jit
def _log_of_sum(a, b, total):
    """``log(a + b)`` given the rounded ``total``; accurate near 1 to relative precision."""
    return tl.log(total) + (b - (total - a)) / total


@triton.jit
def _head_backward(
    grad,
    features,
    weight,
    bias,
    target,
    voxel_weight,
    output,
    partial,
    voxels,
    classes,
    channels,
    features_b,
    features_c,
    features_v,
    target_b,
    target_c,
    target_v,
    weight_b,
    weight_v,
    output_b,
    output_c,
    output_v,
    tiles_a_chunk,
    chunks,
    ignore,
    gamma: tl.float64,
    ACTIVATION: tl.constexpr,
    LIKELIHOOD: tl.constexpr,
    MIN: tl.constexpr,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    TARGET: tl.constexpr,
    HAS_IGNORE: tl.constexpr,
    FAST: tl.constexpr,
    SUMS: tl.constexpr,
    CLASSES: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_STEP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    GRADIENT_PRECISION: tl.constexpr,
    NEED_FEATURES: tl.constexpr,
    NEED_HEAD: tl.constexpr,
):
    """The features' gradient, and sums for weight and bias in partial[slot, sample, class, feature]
    and behind it partial[slot, sample, class]; features of the padding are left as they are.
    """
    slot = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    samples = tl.num_programs(1)
    features += sample * features_b
    target += sample * target_b
    output += sample * output_b
    grad += sample * classes * SUMS
    if voxel_weight is not None:
        voxel_weight += sample * weight_b
    index = _class_index(0, CLASSES)
    cotangents = _load_cotangents(grad, index, classes, SUMS, True, tl.float32)
    k = tl.arange(0, CHANNELS)
    if NEED_FEATURES:
        w_transposed = tl.trans(
            _load_weight(weight, 0, classes, channels, CLASSES, CHANNELS).to(tl.float32)
        )
    # A stride that the compiler knows: else it would keep every address in registers.
    row = (slot * samples + sample) * classes
    place = partial + row * CHANNELS + index * CHANNELS
    bias_place = partial + slots * samples * classes * CHANNELS + row + index
    for chunk in range(slot, chunks, slots):
        weight_sum = tl.zeros([CLASSES, CHANNELS], tl.float32)
        bias_sum = tl.zeros([CLASSES, 1], tl.float32)
        first = chunk * tiles_a_chunk * BLOCK
        last = tl.minimum(first + tiles_a_chunk * BLOCK, voxels)
        for start in range(first, last, BLOCK):
            lane = tl.arange(0, BLOCK)[None, :]
            inside = _inside(start, voxels, BLOCK, EVEN)
            target_offset = start * target_v + lane * target_v
            offset = start * features_v + lane * features_v
            label, value, w, included = _load_voxels(
                target,
                target_offset,
                voxel_weight,
                start * weight_v + lane * weight_v,
                inside,
                classes,
                ignore,
                TARGET,
                HAS_IGNORE,
                tl.float32,
            )
            z = _logits(
                features,
                weight,
                bias,
                offset,
                features_c,
                included,
                classes,
                channels,
                CLASSES,
                CHANNELS,
                BLOCK,
                ONE_STEP,
                OPERAND,
                PRECISION,
            )
            if FAST:
                dz = _label_gradient(
                    grad, z, label, cotangents, classes, gamma, GAMMA, FOCAL, CLASSES
                )
            else:
                m = tl.full([1, 1], 0.0, tl.float32)
                rest, count = m, m
                if ACTIVATION == SOFTMAX or LIKELIHOOD == SOFTMAX:
                    finite = _softmax_logits((z,), classes, 1, CLASSES, tl.float32)
                    m, rest, count = _softmax_state(finite, 1, CLASSES, tl.float32)
                g = _load_target(
                    target,
                    index,
                    target_c,
                    target_offset,
                    included,
                    classes,
                    label,
                    value,
                    TARGET,
                    True,
                    tl.float32,
                )
                best = (m, m, m, m)
                if ACTIVATION == SOFTMAX:
                    largest = _is_largest(z, m, tl.float32) & (index < classes)
                    parts = _parts_of_largest(
                        rest, count, g, cotangents, MIN, TARGET, SUMS, tl.float32
                    )
                    best = _greatest(_choose(best, parts, largest, True, CLASSES))
                p, h, r, u, direct = _slopes(
                    z,
                    m,
                    rest,
                    count,
                    g,
                    cotangents,
                    best,
                    gamma,
                    index,
                    ACTIVATION,
                    LIKELIHOOD,
                    MIN,
                    GAMMA,
                    FOCAL,
                    TARGET,
                    SUMS,
                    tl.float32,
                )
                mean, top, low = _shares(
                    z,
                    m,
                    p,
                    h,
                    u,
                    index < classes,
                    ACTIVATION,
                    LIKELIHOOD,
                    True,
                    tl.float32,
                )
                if ACTIVATION == SOFTMAX:
                    mean = tl.sum(mean, axis=0, keep_dims=True)
                if LIKELIHOOD == SOFTMAX:
                    top = tl.sum(top, axis=0, keep_dims=True)
                    low = tl.sum(low, axis=0, keep_dims=True)
                dz = _combine(
                    z,
                    m,
                    p,
                    h,
                    r,
                    u,
                    direct,
                    mean,
                    top,
                    low,
                    ACTIVATION,
                    LIKELIHOOD,
                    tl.float32,
                )
            if voxel_weight is not None:
                dz = dz * w
            dz = tl.where(included & (index < classes), dz, 0.0)
            if NEED_FEATURES:
                df = tl.dot(w_transposed, dz, input_precision=GRADIENT_PRECISION)
                df = tl.where(included, df, 0.0).to(output.dtype.element_ty)
                rows = output + k[:, None].to(tl.int64) * output_c + start * output_v
                tl.store(rows + lane * output_v, df, mask=inside & (k[:, None] < channels))
            if NEED_HEAD:
                f = _load_features(
                    features, 0, offset, features_c, included, channels, CHANNELS
                ).to(tl.float32)
                weight_sum = tl.dot(dz, tl.trans(f), weight_sum, input_precision=GRADIENT_PRECISION)
                bias_sum += tl.sum(dz, axis=1, keep_dims=True)
        if NEED_HEAD:
            # The float64 sums live in memory, where this program alone touches them.
            later = tl.full([1, 1], chunk, tl.int64) >= slots
            inner = (index < classes) & (k[None, :] < channels)
            before = tl.load(place + k[None, :], mask=inner & later, other=0.0)
            tl.store(place + k[None, :], before + weight_sum.to(tl.float64), mask=inner)
            before = tl.load(bias_place, mask=(index < classes) & later, other=0.0)
            tl.store(bias_place, before + bias_sum.to(tl.float64), mask=index < classes)
            tl.debug_barrier()


@triton.jit
def _label_gradient(
    grad,
    z,
    label,
    cotangents,
    classes,
    gamma,
    GAMMA: tl.constexpr,
    FOCAL: tl.constexpr,
    CLASSES: tl.constexpr,
):
    """Labels with softmax throughout.

    With h measured from that of a class with the largest logit, D = sum of p h and K the
    likelihood's slope: p (h - D + K) off the label and p (h - D) - (1 - p) K on it. Nothing large
    cancels where the prediction is nearly certain, right or wrong.
    """
    e, hit, d_label, others = _label_softmax(z, label, classes, CLASSES)
    e_label = tl.exp(d_label)
    total = e_label + others
    scale = 1.0 / total
    other = others * scale
    # Read again, one a voxel: of all classes they would take registers.
    place = grad + label.to(tl.int64) * 4 + 3
    slope = tl.load(place, mask=label >= 0, other=0.0).to(tl.float32)
    if GAMMA != 0:
        minus_log = _log_of_sum(e_label, others, total) - d_label
        slope = -slope * _slope(
            e_label * scale, other, minus_log, gamma, label, GAMMA, FOCAL, tl.float32
        )
    h = tl.where(hit, cotangents[0], cotangents[1])
    # A class whose exponential cannot be told from the largest one's serves as well.
    near = h - tl.max(tl.where(e == 1.0, h, float("-inf")), axis=0, keep_dims=True)
    mean = tl.sum(e * near, axis=0, keep_dims=True) * scale
    return e * scale * (near - mean + tl.where(hit, 0.0, slope)) - tl.where(hit, other * slope, 0.0)


# --- launches ------------------------------------------------------------------------------------


def is_fast(features, classes, target, options, sums):
    """Whether labels and softmax are all there is, with 4 sums."""
    activation, likelihood, overlap, *_ = options
    labels = classes > 1 and target_kind(features, classes, target) == int(LABELS.value)
    return (
        labels
        and activation == likelihood == Activation.softmax
        and overlap == Overlap.product
        and sums == CORE
    )


def target_kind(features, classes, target):
    """What the target is, as the kernels count it."""
    if classes == 1:
        strict = not target.is_floating_point() and target.dtype != torch.bool
        return TargetKind.binary if strict else TargetKind.indicator
    dense = target.ndim == features.ndim and target.shape[1] == classes
    return int(DENSE.value) if dense else int(LABELS.value)


def in_registers(features, classes, fast, backward):
    """Whether a tile's logits can stay in registers."""
    if features.dtype == torch.float64:
        return False
    channels = features.shape[1]
    rows, columns = padded(classes), padded(channels)
    exact = precision(features.dtype) == "ieee"
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


def launch_shape(rows, columns, dtype, fast, exact, backward):
    """Voxels of a tile, warps, and features multiplied at once.

    The widest tiles that keep no word in memory, read off the compiler.
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


def padded(extent):
    """Rows or columns of a product: a power of two, at least the 16 that tensor cores take."""
    return max(16, power_of_two(extent))


def precision(dtype):
    """Of float32 products; half types multiply exactly.

    Not every GPU of AMD's has something like tf32, and Triton refuses it for all types there.
    """
    if torch.version.hip is not None:
        return "ieee"
    if dtype != torch.float32 or torch.get_float32_matmul_precision() != "highest":
        return "tf32"
    return "ieee"


def constants(
    features, classes, target, options, sums, focal_classes=None, *, backward, interpreting
):
    """Compile-time parameters that forward and backward share, and the number of warps."""
    activation, likelihood, overlap, ignore_index, gamma = options
    channels = features.shape[1]
    kind = target_kind(features, classes, target)
    fast = is_fast(features, classes, target, options, sums)
    has_ignore = ignore_index is not None
    if kind == int(LABELS.value):
        # A label outside [0, C) is excluded anyway.
        has_ignore = has_ignore and 0 <= ignore_index < classes
    exact = precision(features.dtype) == "ieee"
    block, num_warps, step = launch_shape(
        padded(classes), padded(channels), features.dtype, fast, exact, backward
    )
    half = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
    return {
        "ACTIVATION": activation,
        "LIKELIHOOD": likelihood,
        "MIN": overlap == Overlap.min,
        "GAMMA": int(gamma) if gamma in (0, 1, 2) else 3,
        "FOCAL": -1 if focal_classes is None else focal_classes,
        "TARGET": kind,
        "HAS_IGNORE": has_ignore and kind != int(DENSE.value),
        "FAST": fast,
        "SUMS": sums,
        "CLASSES": padded(classes),
        "CHANNELS": step,
        "BLOCK": block,
        "EVEN": math.prod(features.shape[2:]) % block == 0,
        "ONE_STEP": channels <= step,
        # The interpreter multiplies float32 alone; products of half types are exact in it.
        "OPERAND": tl.float32 if interpreting else half.get(features.dtype, tl.float32),
        "PRECISION": precision(features.dtype),
    }, num_warps


def reduction_shape(voxels, batch, block, chunk_voxels, bytes_each, most_bytes):
    """Return (tiles a chunk, chunks a sample, slots a sample): who adds what to what."""
    tiles_a_chunk = chunk_voxels // block
    chunks = triton.cdiv(voxels, chunk_voxels)
    slots = max(1, min(chunks, most_bytes // max(1, batch * bytes_each)))
    # The same number of chunks for every slot, but for the last round.
    return tiles_a_chunk, chunks, triton.cdiv(chunks, triton.cdiv(chunks, slots))


def _interpreting():
    return not isinstance(_head_forward, triton.JITFunction)


def _prepare(features, weight, bias, target, voxel_weight):
    """Flattened tensors and their strides in the order of the kernels' parameters."""
    axes = features.ndim
    flat, *strides = view_of(features)
    flat_target, *target_strides = view_of(target, channels=target.ndim == axes)
    weight_strides = [0, 0, 0]
    if voxel_weight is not None:
        voxel_weight, *weight_strides = view_of(voxel_weight, channels=voxel_weight.ndim == axes)
    strides = (*strides, *target_strides, weight_strides[0], weight_strides[2])
    head = (weight.contiguous(), None if bias is None else bias.contiguous())
    return (flat, *head, flat_target, voxel_weight), strides


def head_confusion(
    features,
    weight,
    bias,
    target,
    voxel_weight,
    activation,
    likelihood,
    overlap,
    ignore_index,
    gamma,
    full,
    chunk_bytes,
    focal_classes=None,
):
    """Return (B, C, 4) or, with ``full``, (B, C, 8) float64 sums."""
    options = (activation, likelihood, overlap, ignore_index, gamma)
    arguments = (features, weight, bias, target, voxel_weight)
    batch, channels = features.shape[:2]
    classes, sums = weight.shape[0], FULL if full else CORE
    if features.numel() == 0:
        shape = (batch, classes, sums)
        return torch.zeros(shape, dtype=torch.float64, device=features.device)
    fast = is_fast(features, classes, target, options, sums)
    if not in_registers(features, classes, fast, backward=False):
        return chunked.head_confusion(
            *arguments,
            *options,
            full,
            chunk_bytes,
            focal_classes,
            confusion=logits_kernels.soft_confusion,
        )
    tensors, strides = _prepare(*arguments)
    chosen, num_warps = constants(
        features,
        classes,
        target,
        options,
        sums,
        focal_classes,
        backward=False,
        interpreting=_interpreting(),
    )
    voxels = math.prod(features.shape[2:])
    tiles_a_chunk, chunks, slots = reduction_shape(
        voxels,
        batch,
        chosen["BLOCK"],
        CHUNK_VOXELS,
        classes * sums * 8,
        min(FORWARD_BYTES, chunk_bytes),
    )
    result = torch.empty((batch, classes, sums), dtype=torch.float64, device=features.device)
    with device_guard(features):
        rows = Rows(result, slots, num_warps)
        _head_forward[(slots, batch)](
            *tensors,
            rows.views,
            rows.group,
            voxels,
            classes,
            channels,
            *strides,
            tiles_a_chunk,
            chunks,
            ignore_index if chosen["HAS_IGNORE"] else 0,
            gamma,
            **chosen,
            ROWS=rows.shape,
            num_warps=num_warps,
            **LAUNCH_OPTIONS,
            **most_registers(REGISTERS),
        )
        rows.finish()
    return result


def head_confusion_backward(
    grad,
    features,
    weight,
    bias,
    target,
    voxel_weight,
    activation,
    likelihood,
    overlap,
    ignore_index,
    gamma,
    chunk_bytes,
    need_features,
    need_head,
    focal_classes=None,
):
    """Return the gradients at features, weight and bias; empty ones for what is not needed."""
    options = (activation, likelihood, overlap, ignore_index, gamma)
    arguments = (features, weight, bias, target, voxel_weight)
    batch, channels = features.shape[:2]
    classes, sums = weight.shape[0], grad.shape[2]
    fast = is_fast(features, classes, target, options, sums)
    if features.numel() == 0 or not in_registers(features, classes, fast, backward=True):
        return chunked.head_confusion_backward(
            grad,
            *arguments,
            *options,
            chunk_bytes,
            need_features,
            need_head,
            focal_classes,
            confusion_backward=logits_kernels.soft_confusion_backward,
        )
    tensors, strides = _prepare(*arguments)
    gradient = torch.empty_like(features) if need_features else features.new_empty(0)
    output, output_strides = gradient, (0, 0, 0)
    if need_features:
        view = view_in_place(gradient)
        if view is None:
            view = view_of(torch.empty_like(features, memory_format=torch.contiguous_format))
        output, *output_strides = view
    chosen, num_warps = constants(
        features,
        classes,
        target,
        options,
        sums,
        focal_classes,
        backward=True,
        interpreting=_interpreting(),
    )
    voxels = math.prod(features.shape[2:])
    tiles_a_chunk, chunks, slots = reduction_shape(
        voxels,
        batch,
        chosen["BLOCK"],
        BACKWARD_CHUNK_VOXELS if need_head else CHUNK_VOXELS,
        classes * (chosen["CHANNELS"] + 1) * 8 if need_head else 1,
        min(BACKWARD_BYTES, chunk_bytes),
    )
    rows = (slots, batch, classes) if need_head else (0, 0, 0)
    columns = chosen["CHANNELS"]
    partial = torch.empty(
        math.prod(rows) * (columns + 1), dtype=torch.float64, device=features.device
    )
    with device_guard(features):
        _head_backward[(slots, batch)](
            grad.contiguous(),
            *tensors,
            output,
            partial,
            voxels,
            classes,
            channels,
            *strides,
            *output_strides,
            tiles_a_chunk,
            chunks,
            ignore_index if chosen["HAS_IGNORE"] else 0,
            gamma,
            **chosen,
            GRADIENT_PRECISION=chosen["PRECISION"],
            NEED_FEATURES=need_features,
            NEED_HEAD=need_head,
            num_warps=num_warps,
            **LAUNCH_OPTIONS,
            **most_registers(REGISTERS),
        )
    if output is not gradient:
        gradient.copy_(output)
    if not need_head:
        return gradient, weight.new_empty(0), weight.new_empty(0)
    weights, biases = partial.split([math.prod(rows) * columns, math.prod(rows)])
    weights = weights.view(*rows, columns)[..., :channels].sum((0, 1)).to(weight.dtype)
    if bias is None:
        return gradient, weights, weight.new_empty(0)
    return gradient, weights, biases.view(rows).sum((0, 1)).to(bias.dtype)
