"""The options that the losses share: their defaults, and their types for type checkers.

What they mean is said once, in :mod:`voxfuse.losses`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    from voxfuse.losses._engine import ClassWeights

#: Of every loss with a ratio of sums.
OVERLAP_DEFAULTS: Mapping[str, Any] = {
    "activation": "softmax",
    "include_background": True,
    "smooth_nr": 1e-5,
    "smooth_dr": 1e-5,
    "batch": False,
    "reduction": "mean",
    "ignore_index": None,
    "absent": "keep",
    "log": False,
    "overlap": "product",
}
#: Weights of the classes; buffers of the modules.
WEIGHT_NAMES = ("class_weight", "likelihood_weight", "pos_weight")
#: What a call needs besides the recipe.
CALL_DEFAULTS: Mapping[str, Any] = {
    "process_group": None,
    "ddp_average": False,
    "backend": "auto",
}


class CallOptions(TypedDict, total=False):
    class_weight: ClassWeights
    process_group: Any
    ddp_average: bool
    backend: str


class BinaryOptions(CallOptions, total=False):
    pos_weight: ClassWeights


class OverlapOptions(CallOptions, total=False):
    activation: str
    include_background: bool
    smooth_nr: float
    smooth_dr: float
    batch: bool
    reduction: str
    ignore_index: int | None
    absent: str
    log: bool
    overlap: str


class CompoundOptions(OverlapOptions, BinaryOptions, total=False):
    likelihood_weight: ClassWeights
