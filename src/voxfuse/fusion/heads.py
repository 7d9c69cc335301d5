"""The last, linear layer of one network or of an ensemble: before the fusion or after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from voxfuse.fusion.options import checked_head, checked_voting
from voxfuse.ops import _checks
from voxfuse.reference.overlap_add import accumulation_dtype

#: (weight, bias), or a list of them, one a network.
HeadLike = tuple[Tensor, Tensor | None] | Sequence[tuple[Tensor, Tensor | None]] | None


class Heads:
    r"""Decides whether features are fused or logits.

    A mean of logits with weights that sum to 1 is the layer applied to the mean of the features.
    Fusing features is right with ``voting="logit"`` (or without an activation), and chosen where
    the K features of all networks together are fewer than the C classes. The features of M
    networks lie side by side in one accumulator: their layers become one, ``[W_1 ... W_M] / M``.

    Args:
        head: see :data:`HeadLike`.
        networks: how many there are.
        activation, voting: see :class:`voxfuse.PatchFuser`.

    Raises:
        TypeError: ``head`` is no pair of tensors, or no list of them.
        ValueError: not one a network, or of different numbers of classes.
    """

    def __init__(self, head: HeadLike, networks: int, activation: str, voting: str | None) -> None:
        self.voting = checked_voting(voting, head is not None)
        self._layers = _layers(head, networks)
        #: Classes of the layers; None without them.
        self.classes = self._layers[0][0].shape[0] if self._layers else None
        features = sum(weight.shape[1] for weight, _ in self._layers)
        logits = self.voting == "logit" or activation in ("none", "identity")
        #: Whether features are fused.
        self.late = self.classes is not None and logits and features < self.classes
        #: The dtype of the features, once there were any.
        self.kind: torch.dtype | None = None

    @property
    def merged(self) -> tuple[Tensor, Tensor] | None:
        """The layer that comes after the fusion, if features are fused."""
        if not self.late:
            return None
        weights, biases = zip(*self._layers, strict=True)
        count = len(weights)
        return torch.cat(weights, 1) / count, torch.stack(biases).mean(0)

    def apply(self, network: int, features: Tensor) -> Tensor:
        """What is fused of a network's result (N, K, \\*patch)."""
        if not self._layers:
            return features
        weight, bias = self._layers[network]
        if features.shape[1] != weight.shape[1]:
            raise ValueError(
                f"predictor: returned {features.shape[1]} channels, but head takes "
                f"{weight.shape[1]}"
            )
        self.kind = features.dtype
        if self.late:
            return features
        dtype = accumulation_dtype(features.dtype)
        weight, bias = (t.to(features.device, dtype) for t in (weight, bias))
        logits = torch.matmul(weight, features.to(dtype).flatten(2)) + bias[:, None]
        shaped: Tensor = logits.unflatten(2, features.shape[2:])
        return shaped

    def joined(self, results: list[list[Tensor]]) -> list[list[Tensor]]:
        """The members to average, each with its outputs, of every network's outputs."""
        if self.late and len(results) > 1:
            return [[torch.cat(outputs, 1) for outputs in zip(*results, strict=True)]]
        return results


def _layers(head: HeadLike, networks: int) -> list[tuple[Tensor, Tensor]]:
    if head is None:
        return []
    if not isinstance(head, Sequence) or len(head) == 0:
        raise TypeError(f"head: got {type(head).__name__}, expected (weight, bias)")
    single = isinstance(head[0], Tensor)
    given: list[Any] = [head] if single else list(head)
    if len(given) != networks:
        got = "one" if single else len(given)
        raise ValueError(f"head: got {got} for {networks} predictors, expected a list, one each")
    layers = []
    for layer in given:
        weight = layer[0] if isinstance(layer, Sequence) and len(layer) == 2 else None
        if not isinstance(weight, Tensor) or weight.ndim < 2:
            raise TypeError("head: expected (weight (C, K), bias (C,)), or a list of them")
        layers.append(checked_head((weight, layer[1]), weight.shape[1]))
    classes = {weight.shape[0] for weight, _ in layers}
    if len(classes) > 1:
        raise ValueError(f"head: got layers of {sorted(classes)} classes, expected one number")
    return [(_checks.plain(weight), _checks.plain(bias)) for weight, bias in layers]
