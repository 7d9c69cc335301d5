"""What Python, Triton and C++ agree on: codes, the columns of the sums, tuples of options.

``csrc/contract/codes.h`` has the same enumerations under the same names; a test compares the two.
A member's name is the string that a user passes, its value what travels through an operator's
schema. This module imports nothing of voxfuse.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final, NamedTuple


class Code(IntEnum):
    """A named integer that prints as the integer: Triton names kernels by their constants."""

    __repr__ = __str__ = int.__repr__


class Activation(Code):
    """What makes predictions of logits."""

    none = 0
    sigmoid = 1
    softmax = 2


class Overlap(Code):
    """What prediction p and target g have in common: p g, or min(p, g)."""

    product = 0
    min = 1


class Unlabelled(Code):
    """What becomes of the classes that are not annotated in a sample: they leave it, or are counted
    as background."""

    exclude = 0
    background = 1


class TargetKind(Code):
    """How a target is stored: one label a voxel; one value a class; the foreground's indicator
    where there is one class, as a float or as an integer, of which only 0 and 1 count."""

    labels = 0
    dense = 1
    indicator = 2
    binary = 3


class Sum(Code):
    """Columns of the sums of a sample and class, the last axis of what soft_confusion returns."""

    TP = 0
    FP = 1
    FN = 2
    NLL = 3
    OFF = 4
    P2 = 5
    G2 = 6
    W = 7


#: How many of the columns there are: TP to NLL, or all.
CORE: Final = 4
FULL: Final = 8


#: What the message of a kernel's error begins with that a value in the data is the reason of; the
#: stable ABI knows no ValueError.
VALUE_ERROR: Final = "ValueError: "

#: How far dense targets and scored probabilities may lie outside [0, 1], for rounding's sake.
TARGET_ROOM: Final = 1e-3


class ClassPooling(Code):
    """Weights of the classes that are summed before the ratio; none: each has its own."""

    none = 0
    uniform = 1
    simple = 2
    square = 3


class Absent(Code):
    """What becomes of the term of a class without target volume."""

    keep = 0
    ignore = 1
    zero = 2


class Reduction(Code):
    """How terms become a loss."""

    none = 0
    mean = 1
    sum = 2


class Normaliser(Code):
    """What the log-likelihood is divided by."""

    one = 0
    target = 1
    voxels = 2
    elements = 3
    volume = 4


class Finish(Code):
    """What finalize_slab makes of the sums in a ring: ``finish`` in the schema."""

    values = 0
    labels = 1
    mask = 2
    foreground = 3
    entropy = 4


class Decision(Code):
    """What hard_confusion takes for a prediction: the greatest logit, every logit at or above a
    bound, or the input itself. ``decision`` in the schema."""

    argmax = 0
    threshold = 1
    labels = 2


class Resampled(Code):
    """What resample_argmax keeps of a voxel's interpolated channels: ``kept`` in the schema."""

    labels = 0
    mask = 1
    regions = 2
    values = 3


class ConfusionOptions(NamedTuple):
    """The options of soft_confusion that its backward pass shares."""

    activation: int = Activation.softmax
    likelihood: int = Activation.softmax
    overlap: int = Overlap.product
    ignore_index: int | None = None
    gamma: float = 0.0
    focal_classes: int | None = None
    unlabelled: int = Unlabelled.exclude


class RatioOptions(NamedTuple):
    """The options of ratio_loss beside its tensors; the defaults are a loss of 0."""

    numerator: list[float]
    denominator: list[float]
    smooth_nr: float = 0.0
    smooth_dr: float = 0.0
    min_denominator: float = 0.0
    exponent: float = 1.0
    exponent_from: int = 0
    log: bool = False
    first_class: int = 0
    batch: bool = False
    class_pooling: int = ClassPooling.none
    absent: int = Absent.keep
    reduction: int = Reduction.sum
    ratio_scale: float = 0.0
    nll_scale: float = 0.0
    off_scale: float = 0.0
    normaliser: int = Normaliser.one


_CONFUSION = (
    "int activation, int likelihood, int overlap, int? ignore_index, float gamma, {}"
    "int? focal_classes=None, int unlabelled=0, Tensor? annotated=None"
)
_HEAD = (
    "Tensor features, Tensor weight, Tensor? bias, Tensor target, Tensor? voxel_weight, "
    + _CONFUSION
)

#: The operators' schemas. C++ declares them in ``csrc/ops``; a test compares the two.
SCHEMAS: Final = {
    "soft_confusion": "(Tensor input, Tensor target, Tensor? weight, "
    + _CONFUSION.format("bool full, ")
    + ", bool any_target=False) -> Tensor",
    "soft_confusion_backward": "(Tensor grad, Tensor input, Tensor target, Tensor? weight, "
    + _CONFUSION.format("")
    + ") -> Tensor",
    "head_confusion": f"({_HEAD.format('bool full, int chunk_bytes, ')}) -> Tensor",
    "head_confusion_backward": "(Tensor grad, "
    + _HEAD.format("int chunk_bytes, bool need_features, bool need_head, ")
    + ") -> (Tensor, Tensor, Tensor)",
    # The threshold travels as the least float32 logit above it, so that backends agree on it.
    "hard_confusion": "(Tensor input, Tensor target, Tensor? mask, int decision, float least, "
    "int? num_classes, int? ignore_index) -> Tensor",
    "ratio_loss": "(Tensor stats, float[] numerator, float[] denominator, float smooth_nr, "
    "float smooth_dr, float min_denominator, float exponent, bool log, Tensor? class_weight, "
    "int first_class, bool batch, int class_pooling, int absent, int reduction, float ratio_scale, "
    "Tensor? nll_weight, Tensor? off_weight, float nll_scale, float off_scale, int normaliser, "
    "bool double_loss, int exponent_from=0) -> (Tensor loss, Tensor cotangents)",
    "ratio_loss_backward": "(Tensor grad_loss, Tensor cotangents, int first_class, bool batch, "
    "int class_pooling) -> Tensor",
    "overlap_add": "(Tensor patches, Tensor origins, Tensor rows, Tensor[] weights, Tensor? total, "
    "int[] volume_shape, int activation=0) -> Tensor",
    "overlap_add_backward": "(Tensor grad, Tensor origins, Tensor rows, Tensor[] weights, "
    "Tensor? total, Tensor? patches=None, int activation=0) -> Tensor",
    "overlap_add_": "(Tensor(a!) ring, Tensor patches, Tensor origins, Tensor rows, "
    "Tensor[] weights, Tensor? total, int ring_axis, int start, int stop, int flip=0, "
    "float floor=0.0, int activation=0, Tensor[]? cover=None) -> ()",
    "overlap_weights_": "(Tensor(a!) total, Tensor origins, Tensor rows, Tensor[] weights, "
    "int ring_axis, int start, int stop) -> ()",
    "resample_argmax": "(Tensor(a!) out, Tensor input, Tensor[] index, Tensor[] weight, "
    "int kept, float least, int[] regions, bool round_to_half) -> ()",
    # Not "mode": PyTorch's functionalisation calls by name, and has a "mode" of its own.
    "finalize_slab": "(Tensor(a!) ring, Tensor(b!) out, Tensor? total, Tensor? weight, "
    "Tensor? bias, int ring_axis, int start, int stop, int activation, bool applied, int finish, "
    "float divisor, float threshold, float fill, bool clear) -> ()",
}
