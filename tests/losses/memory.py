"""Measure the memory of losses in a process of their own; prints {name: bytes} as JSON."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch

import voxfuse
from benchmarks import harness

#: One float channel is 8 MiB and one byte channel 2 MiB, so a hidden volume stands out.
SHAPE = (1, 4, 128, 128, 128)
VOXELS = 128**3
REPETITIONS = 3
#: What a fused loss may take.
MIB = 1 << 20

#: The losses of the two fused operators, each with the options that change what the pass does.
FUSED: dict[str, Callable[[], Any]] = {
    "tversky": lambda: voxfuse.TverskyLoss(0.3, 0.7),
    "tversky, sigmoid, pooled": lambda: voxfuse.TverskyLoss(activation="sigmoid", batch=True),
    "tversky, log": lambda: voxfuse.TverskyLoss(log=True, include_background=False),
    "fbeta": lambda: voxfuse.FBetaLoss(2.0),
    "focal tversky": lambda: voxfuse.FocalTverskyLoss(),
    "dice": lambda: voxfuse.DiceLoss(reduction="none"),
    "dice squared": lambda: voxfuse.DiceLoss(squared=True),
    "dice, ignored voxels": lambda: voxfuse.DiceLoss(ignore_index=3, absent="ignore"),
    "jaccard": lambda: voxfuse.JaccardLoss(),
    "generalised dice": lambda: voxfuse.GeneralizedDiceLoss(),
    "cross-entropy": lambda: voxfuse.CrossEntropyLoss(class_weight=[1.0, 2.0, 3.0, 4.0]),
    "cross-entropy, smoothed": lambda: voxfuse.CrossEntropyLoss(label_smoothing=0.1),
    "bce": lambda: voxfuse.BCELoss(pos_weight=2.0),
    "focal": lambda: voxfuse.FocalLoss(),
    "focal, sigmoid": lambda: voxfuse.FocalLoss(activation="sigmoid", alpha=0.25),
    "tversky + ce": lambda: voxfuse.TverskyCELoss(0.3, 0.7),
    "dice + ce": lambda: voxfuse.DiceCELoss(),
    "dice + ce, smoothed": lambda: voxfuse.DiceCELoss(label_smoothing=0.1, squared=True),
    "dice + bce": lambda: voxfuse.DiceCELoss(activation="sigmoid"),
    "tversky + focal": lambda: voxfuse.TverskyFocalLoss(),
    "dice + focal": lambda: voxfuse.DiceFocalLoss(),
    "softmax dice + sigmoid focal": lambda: voxfuse.DiceFocalLoss(focal_activation="sigmoid"),
    "unified focal": lambda: voxfuse.UnifiedFocalLoss(),
    "unified focal, asymmetric": lambda: voxfuse.UnifiedFocalLoss(symmetric=False),
    "deep supervision": lambda: voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss()),
}

#: Losses that look at single voxels, or sort them.
COMPOSED: dict[str, Callable[[], Any]] = {
    "cross-entropy, no reduction": lambda: voxfuse.CrossEntropyLoss(reduction="none"),
    "focal, no reduction": lambda: voxfuse.FocalLoss(reduction="none", activation="sigmoid"),
    "top k": lambda: voxfuse.TopKLoss(),
    "lovasz": lambda: voxfuse.LovaszLoss(),
    "lovasz hinge": lambda: voxfuse.LovaszHingeLoss(),
}

#: Types of labels, or of a dense target, and of voxel weights.
TYPES: tuple[tuple[str, torch.dtype, torch.dtype], ...] = (
    ("labels", torch.int8, torch.uint8),
    ("labels", torch.uint16, torch.int64),
    ("labels", torch.uint64, torch.uint32),
    ("labels", torch.bfloat16, torch.int8),
    ("labels", torch.float64, torch.uint64),
    ("dense", torch.int64, torch.int16),
)


def name_of(kind: str, target: torch.dtype, weight: torch.dtype) -> str:
    return f"dice + ce, {kind} {target}, weights {weight}".replace("torch.", "")


def extra_bytes(
    loss: Any, logits: torch.Tensor, labels: torch.Tensor, repetitions: int = REPETITIONS
) -> int:
    """Peak of a step above the logits, the labels and the gradient.

    Noise only adds to a high-water mark, hence the least of several, where one is above the bound.
    """

    def step() -> torch.Tensor | None:
        value = loss(logits, labels)
        value.sum().backward()
        gradient, logits.grad = logits.grad, None
        return gradient

    gradient_bytes = logits.numel() * logits.element_size()
    extra = harness.peak_extra_bytes(step, logits.device, warm=1) - gradient_bytes
    for _ in range(repetitions - 1):
        if extra > MIB:
            again = harness.peak_extra_bytes(step, logits.device, warm=0)
            extra = min(extra, again - gradient_bytes)
    return extra


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(SHAPE, generator=generator).requires_grad_()
    labels = torch.randint(0, SHAPE[1], (1, *SHAPE[2:]), generator=generator, dtype=torch.uint8)
    peaks = {name: extra_bytes(make(), logits, labels) for name, make in FUSED.items()}
    # Their bounds are of many volumes: noise does not matter.
    for name, make in COMPOSED.items():
        peaks[name] = extra_bytes(make(), logits, labels, repetitions=1)
    for kind, target_type, weight_type in TYPES:
        target = labels.to(torch.int64)
        if kind == "dense":
            target = torch.nn.functional.one_hot(target, SHAPE[1]).movedim(-1, 1).contiguous()
        target = target.to(target_type)
        weight = torch.ones((1, *SHAPE[2:]), dtype=weight_type)
        loss = functools.partial(voxfuse.DiceCELoss(), mask=weight)
        peaks[name_of(kind, target_type, weight_type)] = extra_bytes(loss, logits, target)
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
