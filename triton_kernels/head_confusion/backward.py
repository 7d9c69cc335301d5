"""The gradients of tiles of features, of the weight and of the bias."""

import triton
import triton.language as tl

from voxfuse.triton_kernels.head_confusion.load import load_features, load_weight, logits_of
from voxfuse.triton_kernels.head_confusion.probability import minus_log_of_label, softmax_by_label
from voxfuse.triton_kernels.soft_confusion.backward import gradient
from voxfuse.triton_kernels.soft_confusion.load import (
    class_index,
    load_cotangents,
    load_voxels,
    store_values,
    tile_at,
)
from voxfuse.triton_kernels.soft_confusion.options import BY_LABEL
from voxfuse.triton_kernels.soft_confusion.probability import modulated_slope
from voxfuse.triton_kernels.views import of_sample


@triton.jit
def _gradient_by_label(grad, z, label, cotangents, classes, gamma, O: tl.constexpr):
    """Labels with softmax throughout.

    With h measured from that of a class with the largest logit, D = sum of p h and K the
    likelihood's slope: p (h - D + K) off the label and p (h - D) - (1 - p) K on it. Nothing large
    cancels where the prediction is nearly certain, right or wrong.
    """
    s = softmax_by_label(z, label, classes, O)
    scale = 1.0 / s.total
    other = s.others * scale
    # Read again, one a voxel: of all classes they would take registers.
    place = grad + label.to(tl.int64) * 4 + 3
    slope = tl.load(place, mask=label >= 0, other=0.0).to(tl.float32)
    if O.GAMMA != 0:
        p = s.e_label * scale
        slope = -slope * modulated_slope(p, other, minus_log_of_label(s), gamma, label, O)
    h = tl.where(s.hit, cotangents.hit, cotangents.fp)
    # A class whose exponential cannot be told from the largest one's serves as well.
    near = h - tl.max(tl.where(s.e == 1.0, h, float("-inf")), axis=0, keep_dims=True)
    mean = tl.sum(s.e * near, axis=0, keep_dims=True) * scale
    near = near - mean + tl.where(s.hit, 0.0, slope)
    return s.e * scale * near - tl.where(s.hit, other * slope, 0.0)


@triton.jit
def head_backward(
    grad,
    features,
    head,
    target,
    voxel_weight,
    output,
    partial,
    voxels,
    classes,
    channels,
    tiles_a_chunk,
    chunks,
    ignore,
    gamma: tl.float64,
    O: tl.constexpr,
    H: tl.constexpr,
):
    """The features' gradient, and sums for weight and bias in partial[slot, sample, class, feature]
    and behind it partial[slot, sample, class]; features of the padding are left as they are.
    """
    slot = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1).to(tl.int64)
    slots = tl.num_programs(0)
    samples = tl.num_programs(1)
    features, target = of_sample(features, sample), of_sample(target, sample)
    grad += sample * classes * O.STATS
    if voxel_weight is not None:
        voxel_weight = of_sample(voxel_weight, sample)
    index = class_index(0, O)
    cotangents = load_cotangents(grad, index, classes, True, O)
    k = tl.arange(0, H.CHANNELS)
    if H.NEED_FEATURES:
        output = of_sample(output, sample)
        w_transposed = tl.trans(load_weight(head.weight, 0, classes, channels, O, H).to(tl.float32))
    # A stride that the compiler knows: else it would keep every address in registers.
    row = (slot * samples + sample) * classes
    place = partial + row * H.CHANNELS + index * H.CHANNELS
    bias_place = partial + slots * samples * classes * H.CHANNELS + row + index
    for chunk in range(slot, chunks, slots):
        weight_sum = tl.zeros([O.CLASSES, H.CHANNELS], tl.float32)
        bias_sum = tl.zeros([O.CLASSES, 1], tl.float32)
        first = chunk * tiles_a_chunk * O.BLOCK
        last = tl.minimum(first + tiles_a_chunk * O.BLOCK, voxels)
        for start in range(first, last, O.BLOCK):
            tile = tile_at(start, voxels, O)
            own = load_voxels(target, voxel_weight, None, tile, classes, ignore, O)
            z = logits_of(features, head, tile, own.included, classes, channels, O, H)
            if O.PATH == BY_LABEL:
                dz = _gradient_by_label(grad, z, own.label, cotangents, classes, gamma, O)
                dz = dz * own.weight
            else:
                dz = gradient((z,), target, tile, own, (cotangents,), classes, gamma, O)[0]
            dz = tl.where(own.included & (index < classes), dz, 0.0)
            if H.NEED_FEATURES:
                df = tl.dot(w_transposed, dz, input_precision=H.PRECISION)
                df = tl.where(own.included, df, 0.0)
                store_values(output, k[:, None], tile, df, tile.inside & (k[:, None] < channels))
            if H.NEED_HEAD:
                f = load_features(features, 0, tile, own.included, channels, H).to(tl.float32)
                weight_sum = tl.dot(dz, tl.trans(f), weight_sum, input_precision=H.PRECISION)
                bias_sum += tl.sum(dz, axis=1, keep_dims=True)
        if H.NEED_HEAD:
            # The float64 sums live in memory, where this program alone touches them.
            later = tl.full([1, 1], chunk, tl.int64) >= slots
            inner = (index < classes) & (k[None, :] < channels)
            before = tl.load(place + k[None, :], mask=inner & later, other=0.0)
            tl.store(place + k[None, :], before + weight_sum.to(tl.float64), mask=inner)
            before = tl.load(bias_place, mask=(index < classes) & later, other=0.0)
            tl.store(bias_place, before + bias_sum.to(tl.float64), mask=index < classes)
            tl.debug_barrier()
