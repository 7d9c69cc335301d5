"""What a launch depends on, and what of it the kernels know at compile time."""

import math
from typing import Any, NamedTuple

import torch
import triton.language as tl

from voxfuse.contract import (
    CORE,
    Activation,
    ConfusionOptions,
    Overlap,
    TargetKind,
    Unlabelled,
)

NONE: tl.constexpr = tl.constexpr(int(Activation.none))
SIGMOID: tl.constexpr = tl.constexpr(int(Activation.sigmoid))
SOFTMAX: tl.constexpr = tl.constexpr(int(Activation.softmax))
LABELS: tl.constexpr = tl.constexpr(int(TargetKind.labels))
DENSE: tl.constexpr = tl.constexpr(int(TargetKind.dense))
BINARY: tl.constexpr = tl.constexpr(int(TargetKind.binary))
GENERAL: tl.constexpr = tl.constexpr(0)
BY_LABEL: tl.constexpr = tl.constexpr(1)
TWO_CLASSES: tl.constexpr = tl.constexpr(2)


class Options(NamedTuple):
    """Compile-time parameters of the kernels."""

    ACTIVATION: int
    LIKELIHOOD: int
    MIN: bool  # min(p, g) takes the place of p g
    GAMMA: int  # the exponent if it is 0, 1 or 2; else 3
    FOCAL: int  # classes with the exponent, the first ones; -1: all
    TARGET: int
    HAS_IGNORE: bool
    STATS: int  # sums a class in the result, 4 or 8
    DTYPE: Any  # of the arithmetic
    CLASSES: int  # of a block
    BLOCK: int  # voxels of a tile
    EVEN: bool  # whether tiles fill the volume
    PARTIAL: bool = False  # whether classes may not be annotated, in the online kernels
    MERGE: bool = False  # whether these are background
    PATH: int = 0  # GENERAL, or BY_LABEL or TWO_CLASSES for labels with softmax throughout
    TILES: int = 1  # blocks of all classes, where a tile is kept in registers
    # Forward, where a tile is kept in registers:
    LOGS: bool = False  # whether the logarithms of a chunk are taken as one of their product
    FOLD: int = 1  # voxels of a class that a thread adds up before they are accumulated
    CONTIGUOUS: bool = False  # whether these lie next to each other
    SUMS: int = 4  # accumulators of a block
    LEVELS: int = 0  # 2 ** LEVELS, or COLUMNS, accumulators of a tile, with what only pads them
    COLUMNS: int = 1


class Problem(NamedTuple):
    """What the choice of kernel and block shapes depends on."""

    dtype: torch.dtype
    batch: int
    classes: int
    voxels: int
    target_kind: int
    activation: int
    likelihood: int
    overlap: int
    has_ignore: bool
    has_weight: bool
    gamma: float
    sums: int
    contiguous: bool
    focal: int = -1  # classes with the exponent gamma; -1: all
    unlabelled: int = -1  # what becomes of classes that are not annotated; -1: all are

    @property
    def labels_only(self) -> bool:
        """Whether labels and softmax are all there is, with 4 sums."""
        return (
            self.target_kind == TargetKind.labels
            and self.activation == self.likelihood == Activation.softmax
            and self.overlap == Overlap.product
            and self.sums == CORE
            and not self.partial
        )

    @property
    def partial(self) -> bool:
        return self.unlabelled >= 0

    @property
    def double(self) -> bool:
        return self.dtype == torch.float64

    def options(self, block: int, **more: Any) -> Options:
        """Compile-time parameters for tiles of ``block`` voxels, with ``more`` of them."""
        return Options(
            ACTIVATION=int(self.activation),
            LIKELIHOOD=int(self.likelihood),
            MIN=self.overlap == Overlap.min,
            GAMMA=int(self.gamma) if self.gamma in (0, 1, 2) else 3,
            FOCAL=self.focal,
            TARGET=int(self.target_kind),
            HAS_IGNORE=self.has_ignore,
            STATS=self.sums,
            DTYPE=tl.float64 if self.double else tl.float32,
            BLOCK=block,
            EVEN=self.voxels % block == 0,
            PARTIAL=self.partial,
            MERGE=self.unlabelled == Unlabelled.background,
            **more,
        )


def describe(
    input: torch.Tensor,
    classes: int,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    sums: int,
    contiguous: bool,
    options: ConfusionOptions,
    annotated: torch.Tensor | None = None,
) -> Problem:
    """The problem of ``input``, which are logits of ``classes`` classes or the features of a head.

    ``contiguous`` says whether a voxel's neighbour in memory is the next voxel of its channel.
    """
    ignored = options.ignore_index
    if classes > 1:
        dense = target.ndim == input.ndim and target.shape[1] == classes
        kind = TargetKind.dense if dense else TargetKind.labels
        # A label outside [0, C) is excluded anyway, and a dense target has no labels.
        has_ignore = not dense and ignored is not None and 0 <= ignored < classes
    else:
        strict = not target.is_floating_point() and target.dtype != torch.bool
        kind = TargetKind.binary if strict else TargetKind.indicator
        has_ignore = ignored is not None
    return Problem(
        dtype=input.dtype,
        batch=len(input),
        classes=classes,
        voxels=math.prod(input.shape[2:]),
        target_kind=kind,
        activation=options.activation,
        likelihood=options.likelihood,
        overlap=options.overlap,
        has_ignore=has_ignore,
        has_weight=weight is not None,
        gamma=options.gamma,
        sums=sums,
        contiguous=contiguous,
        focal=-1 if options.focal_classes is None else options.focal_classes,
        unlabelled=-1 if annotated is None else options.unlabelled,
    )
