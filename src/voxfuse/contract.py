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
    """What finalize_slab makes of the sums in a ring (its ``mode``)."""

    values = 0
    labels = 1
    mask = 2
    foreground = 3
    entropy = 4


class ConfusionOptions(NamedTuple):
    """The options of soft_confusion that its backward pass shares."""

    activation: int = Activation.softmax
    likelihood: int = Activation.softmax
    overlap: int = Overlap.product
    ignore_index: int | None = None
    gamma: float = 0.0
    focal_classes: int | None = None


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
