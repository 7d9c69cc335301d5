"""What is made of predictions: the options of a fusion, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from voxfuse.ops import _checks
from voxfuse.ops.finalize_slab import ACTIVATIONS, check_threshold
from voxfuse.ops.resample_argmax import check_regions

#: What comes out, and what it is called by the finalisation.
OUTPUTS = {
    "logits": "values",
    "probabilities": "values",
    "labels": "labels",
    "mask": "mask",
    "regions": "labels",
    "foreground": "foreground",
    "entropy": "entropy",
}
#: Of these, what can be decided at another resolution than the predictions'.
RESAMPLED = ("labels", "mask", "regions")
VOTINGS = {"soft": 0, "logit": 1}
#: The logit of voxels under no patch, where logits are interpolated before they are activated: its
#: sigmoid is 0, but a weight of a rounding error leaves a voxel beside them what it is.
ABSENT_LOGIT = -1e4
#: What ``accumulate=`` accepts beside None.
ACCUMULATORS = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FusionOptions:
    """The options of :class:`voxfuse.PatchFuser` that are not about places.

    ``channels`` is None where no prediction has been seen yet. ``head`` is kept as tensors (C, K)
    and (C,), ``voting`` as one of the two.

    Raises:
        TypeError: ``head`` is no pair of tensors.
        ValueError: options do not fit.
    """

    channels: int | None
    output: str = "logits"
    activation: str = "none"
    voting: str | None = None
    threshold: float | None = None
    head: tuple[Tensor, Tensor] | None = None
    members: int = 1
    fill: float = 0.0
    dtype: torch.dtype | None = None
    accumulate: torch.dtype | None = None
    backend: str = "auto"
    result_channels: Sequence[int] | None = None
    resample_to: Sequence[int] | None = None
    resample_order: int | Sequence[int] = 1
    regions: Sequence[int] | None = None
    finite: bool = False

    def __post_init__(self) -> None:
        if self.accumulate is not None and self.accumulate not in ACCUMULATORS:
            raise ValueError(
                f"accumulate: got {self.accumulate}, expected None, torch.float16 or torch.bfloat16"
            )
        for name in ("channels", "members"):
            count = getattr(self, name)
            if name == "channels" and count is None:
                continue
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}: got {count!r}, expected an integer >= 1")
        if self.head is not None:
            object.__setattr__(self, "head", checked_head(self.head, self.channels))
        voting = checked_voting(self.voting, self.head is not None)
        object.__setattr__(self, "voting", voting)
        _checks.choice("output", self.output, dict.fromkeys(OUTPUTS, 0))
        _checks.choice("activation", self.activation, ACTIVATIONS)
        if self.threshold is not None and self.output not in ("mask", "regions"):
            raise ValueError(
                f"threshold: got {_checks.given(self.threshold)} with output {self.output!r}, "
                "expected None; it is of 'mask' and 'regions'"
            )
        check_threshold(self.bound)
        if self.output not in ("logits", "labels") and self.activation == "none":
            raise ValueError(
                f"activation: got 'none' with output {self.output!r}, which needs probabilities; "
                "use 'softmax' or 'sigmoid', or 'identity' where predictions are probabilities"
            )
        if self.head is not None and voting == "soft" and self.activates:
            raise ValueError("voting: got 'soft', expected 'logit' with head")
        if self.output == "labels" and self.classes == 1:
            raise ValueError("output: 'labels' of one channel are all 0; use 'mask'")
        if self.result_channels is not None:
            given = ("result_channels", self.result_channels, self.output, self.classes)
            object.__setattr__(self, "result_channels", checked_channels(*given))
        if self.output == "logits" and self.activation != "none":
            raise ValueError(
                f"activation: got {self.activation!r} with output 'logits'; use 'probabilities'"
            )
        if self.regions is not None or self.output == "regions":
            # Without a prediction the number of channels is not known yet.
            count = self.classes or len(self.regions or ())
            object.__setattr__(self, "regions", check_regions(self.regions, self.output, count))
        if self.resample_to is not None:
            sizes = _checks.integers("resample_to", self.resample_to)
            object.__setattr__(self, "resample_to", sizes)
        self._check_resampling()

    def _check_resampling(self) -> None:
        order = self.resample_order
        given = tuple(order) if isinstance(order, Iterable) else (order,)
        orders = set(_checks.integers("resample_order", given))
        if not orders <= {0, 1}:
            raise ValueError(
                f"resample_order: got {order!r}, expected 0 or 1, for all axes or one an axis"
            )
        if self.resample_to is None and orders != {1}:
            raise ValueError(f"resample_order: got {order!r} without resample_to, which it is of")
        if self.resamples and self.output not in RESAMPLED:
            raise ValueError(
                f"resample_to: given with output {self.output!r}, expected one of "
                + ", ".join(map(repr, RESAMPLED))
            )
        if self.finite and not self.resamples:
            raise ValueError("finite: given without resample_to")
        if self.resamples and self.fill != 0:
            raise ValueError(
                f"fill: got {self.fill} with resample_to or regions, expected 0, the background, "
                "which voxels under no patch are"
            )
        late = self.activation == "softmax" and self.voting == "logit"
        if self.resamples and late and self.output != "labels":
            raise ValueError(
                f"activation: got 'softmax' of averaged logits with output {self.output!r} and "
                "resample_to or regions; use 'sigmoid', or voting 'soft'"
            )

    def of(
        self, channels: int, head: tuple[Tensor, Tensor] | None, predictions: torch.dtype
    ) -> FusionOptions:
        """The same for predictions that have been seen; floating results have their dtype."""
        dtype = self.dtype or predictions
        floating = self.mode not in ("labels", "mask")
        return replace(self, channels=channels, head=head, dtype=dtype if floating else None)

    @property
    def classes(self) -> int | None:
        """Channels of a prediction after the head."""
        return self.channels if self.head is None else self.head[0].shape[0]

    @property
    def bound(self) -> float:
        """The threshold of a mask or of regions."""
        return 0.5 if self.threshold is None else self.threshold

    @property
    def mode(self) -> str:
        """What the finalisation calls the output."""
        return OUTPUTS[self.output]

    @property
    def resamples(self) -> bool:
        """Whether values leave the ring, of which the result is decided afterwards."""
        return self.resample_to is not None or self.output == "regions"

    @property
    def finish(self) -> str:
        """What the finalisation of slices makes."""
        return "values" if self.resamples else self.mode

    @property
    def final_activation(self) -> str:
        """What the finalisation of slices applies, where patches were not activated."""
        return "none" if self.resamples else self.activation

    @property
    def decided_by(self) -> tuple[str | None, float | None]:
        """The activation and threshold of a resampled mask or regions; labels need none."""
        if self.output == "labels":
            return None, None
        late = self.activates and self.voting == "logit"
        return self.activation if late else "none", self.bound

    @property
    def finished_fill(self) -> float:
        """What the finalisation of slices makes of voxels under no patch."""
        late = self.resamples and self.decided_by[0] == "sigmoid"
        return ABSENT_LOGIT if late else self.fill

    @property
    def activates(self) -> bool:
        """Whether predictions are turned into probabilities here."""
        return self.activation not in ("none", "identity")

    @property
    def patch_activation(self) -> str:
        """What is made of a patch before it is added."""
        return self.activation if self.voting == "soft" and self.activates else "none"

    @property
    def divisor(self) -> int:
        """What the sums are divided by; half accumulators sum the mean of the members."""
        return self.members if self.accumulate is None else 1

    @property
    def sums_are_result(self) -> bool:
        """Whether the float32 sums of normalised patches are the result."""
        return (
            self.mode == "values"
            and (self.voting == "soft" or not self.activates)
            and self.head is None
            and self.members == 1
            and self.accumulate is None
            and self.result_channels is None
        )

    def result_shape(self, volume: Sequence[int]) -> tuple[int, ...]:
        """Shape of the result, with its channel axis."""
        volume = self.resample_to or volume
        if self.result_channels is not None:
            return (len(self.result_channels), *volume)
        return self._shape(self.mode, volume)

    def finished_shape(self, volume: Sequence[int]) -> tuple[int, ...]:
        """Shape of what is finalised, of which the result may be some channels."""
        return self._shape(self.finish, volume)

    def _shape(self, mode: str, volume: Sequence[int]) -> tuple[int, ...]:
        channels = self.classes if mode in ("values", "mask") else 1
        assert channels is not None
        return (channels, *volume)

    def result_dtype(self, patches: torch.dtype) -> torch.dtype:
        """The dtype of a result of patches of a dtype, where the caller gives no memory for it."""
        if self.dtype is not None:
            return self.dtype
        if self.mode != "labels":
            return torch.uint8 if self.mode == "mask" else patches
        for dtype in (torch.uint8, torch.uint16):
            if self.greatest_label <= torch.iinfo(dtype).max:
                return dtype
        return torch.int32

    @property
    def greatest_label(self) -> int:
        """The greatest number that labels or regions can have."""
        assert self.classes is not None
        return max(self.regions) if self.regions else self.classes - 1


def checked_channels(
    name: str, channels: Sequence[int], output: str, classes: int | None
) -> tuple[int, ...]:
    """The channels of a result, which has ``classes`` of them as far as is known."""
    chosen = _checks.integers(name, channels)
    if OUTPUTS[output] not in ("values", "mask"):
        raise ValueError(f"{name}: got {chosen} with output {output!r}, which has one channel")
    if not chosen or min(chosen) < 0 or (classes is not None and max(chosen) >= classes):
        expected = "channels >= 0" if classes is None else f"channels in [0, {classes})"
        raise ValueError(f"{name}: got {chosen}, expected {expected}")
    return chosen


def checked_voting(voting: str | None, head: bool) -> str:
    """The voting, or its default with or without a head."""
    if voting is None:
        return "logit" if head else "soft"
    _checks.choice("voting", voting, VOTINGS)
    return voting


def checked_head(head: object, channels: int | None) -> tuple[Tensor, Tensor]:
    """Check a head; the kernel of a convolution of extent 1 loses its spatial axes."""
    if not isinstance(head, Sequence) or len(head) != 2:
        raise TypeError(f"head: got {type(head).__name__}, expected (weight, bias)")
    weight = _checks.require_tensor("head's weight", head[0]).detach()
    bias = head[1]
    if weight.ndim < 2 or math.prod(weight.shape[2:]) != 1 or weight.shape[1] != channels:
        raise ValueError(f"head: got weight {tuple(weight.shape)}, expected (C, {channels})")
    weight = weight.reshape(weight.shape[:2])
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    bias = _checks.require_tensor("head's bias", bias).detach()
    if tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"head: got bias {tuple(bias.shape)}, expected ({weight.shape[0]},)")
    return weight, bias
