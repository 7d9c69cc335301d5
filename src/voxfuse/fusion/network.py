"""The networks of a sliding window: how they are called, and what of their results is fused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from voxfuse.fusion._memory import overlapping, span
from voxfuse.fusion.heads import HeadLike, Heads
from voxfuse.fusion.importance import Importance, dense, held, processed
from voxfuse.fusion.orientations import Augmentation, flips, turned
from voxfuse.fusion.padded_volume import Batch, PaddedVolume
from voxfuse.ops import _checks

#: What a network returns: one prediction, several, or several by name.
Predictor = Callable[..., Tensor | Sequence[Tensor] | Mapping[Any, Tensor]]


class Member(NamedTuple):
    """A prediction of a batch: how it is mirrored, the names of its outputs, and the outputs."""

    flip: tuple[int, ...]
    keys: list[Any] | None
    outputs: list[Tensor]


class Network:
    """One network or an ensemble; see :func:`voxfuse.sliding_window_inference`.

    Raises:
        TypeError: ``predictor`` or ``head`` has a wrong type.
        ValueError: options do not fit.
    """

    def __init__(
        self,
        predictor: Predictor | Sequence[Predictor],
        volume: PaddedVolume,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        *,
        tta: Augmentation,
        head: HeadLike,
        activation: str,
        voting: str | None,
        process_fn: Callable[..., Any] | None,
        with_coord: bool,
        sw_device: torch.device | str | None,
        device: torch.device | str | None,
    ) -> None:
        self._predictors = _predictors(predictor)
        self._flips = flips(tta, len(volume.spatial))
        self.heads = Heads(head, len(self._predictors), activation, voting)
        #: Predictions of every patch that are averaged.
        self.members = len(self._flips) * (1 if self.heads.late else len(self._predictors))
        #: Where the networks run.
        self.device = torch.device(volume.source.device if sw_device is None else sw_device)
        self._fusion_device = torch.device(volume.source.device if device is None else device)
        self._roi, self._dtype = volume.roi, volume.source.dtype
        self.process_fn, self._with_coord = process_fn, with_coord
        self._args, self._kwargs = args, kwargs

    def predict(self, batch: Batch, importance: Importance) -> tuple[list[Member], Importance]:
        """The predictions of a batch to average, and their weights."""
        members: list[Member] = []
        weights = importance
        for flip in self._flips:
            returned: list[list[Tensor]] = []
            for number in range(len(self._predictors)):
                keys, tensors = flat(self._called(number, batch, flip))
                _check_kept(tensors, chain(*(member.outputs for member in members), *returned))
                if self.process_fn is not None:
                    tensors, weights = self._processed(tensors, batch, flip, importance)
                tensors = [_prediction(t, batch.patches).to(self._fusion_device) for t in tensors]
                returned.append([self.heads.apply(number, tensor) for tensor in tensors])
            members += [Member(flip, keys, outputs) for outputs in self.heads.joined(returned)]
        return members, weights

    def _called(self, number: int, batch: Batch, flip: tuple[int, ...]) -> Any:
        """What a network returns of patches that are mirrored along ``flip``."""
        calls = len(self._flips) * len(self._predictors)
        # Joined patches are a copy that one call may do with as it likes; otherwise a network that
        # works in its input changes no other's, nor the volume.
        alone = len(batch.slices) > 1 and calls == 1 and self.process_fn is None
        given = [
            turned(tensor, flip)
            for tensor in (batch.patches, batch.condition)
            if tensor is not None
        ]
        patches, *condition = given if alone else [tensor.clone() for tensor in given]
        coordinates = [batch.slices] if self._with_coord else []
        keywords = dict(self._kwargs) | dict(zip(["condition"], condition, strict=False))
        return self._predictors[number](patches, *coordinates, *self._args, **keywords)

    def _processed(
        self, tensors: list[Any], batch: Batch, flip: tuple[int, ...], importance: Importance
    ) -> tuple[list[Any], Importance]:
        """What ``process_fn`` makes of predictions and weights; it sees them turned back."""
        assert self.process_fn is not None
        weight = held(dense(importance), self._dtype).to(self.device)
        predictions = tuple(turned(tensor, flip) for tensor in tensors)
        results, weights = self.process_fn(predictions, batch.patches, weight)
        results = [turned(tensor, flip) for tensor in results]
        return results, Importance([processed(weights, self._roi)])


def _predictors(predictor: Predictor | Sequence[Predictor]) -> list[Predictor]:
    if callable(predictor):
        return [predictor]
    if isinstance(predictor, Sequence) and predictor and all(map(callable, predictor)):
        return list(predictor)
    raise TypeError(
        f"predictor: got {type(predictor).__name__}, expected a callable, or a list of them (it "
        "comes fourth, after sw_batch_size, as in MONAI)"
    )


def flat(outputs: Any) -> tuple[list[Any] | None, list[Any]]:
    """The outputs of a network one by one, and their names if they have any, in MONAI's order."""
    if isinstance(outputs, Mapping):
        keys = sorted(outputs)
        return keys, [outputs[key] for key in keys]
    if isinstance(outputs, (tuple, list)):
        return None, list(outputs)
    return None, [outputs]


def _prediction(prediction: object, patches: Tensor) -> Tensor:
    """Check a prediction of patches; integers become float32."""
    prediction = _checks.require_tensor("predictor's result", prediction)
    shape = tuple(prediction.shape)
    if len(shape) != patches.ndim or shape[0] != len(patches) or 0 in shape:
        raise ValueError(
            f"predictor: returned shape {shape}, expected ({len(patches)}, C, *patch) with "
            f"{patches.ndim - 2} spatial axes"
        )
    if prediction.is_complex():
        raise TypeError(
            f"predictor: returned {_checks.describe(prediction)}, expected real numbers"
        )
    return prediction if prediction.is_floating_point() else prediction.to(torch.float32)


def _check_kept(tensors: Sequence[object], kept: Iterable[Tensor]) -> None:
    """Raise ValueError if a prediction lies where one that is still to be added does."""
    spans = [span(tensor) for tensor in tensors if isinstance(tensor, Tensor)]
    if any(overlapping(span(earlier), each) for earlier in kept for each in spans):
        raise ValueError(
            "predictor: returned memory that holds an earlier prediction of the same patches, "
            "which is overwritten by that; return a copy (.clone())"
        )
