"""Random calls of every loss, compiled kernels against the reference: run as a script for many.

python -m tests.losses.random_calls 200000
"""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import torch
from torch import Tensor

import voxfuse
from voxfuse import functional

OVERLAP = ("tversky", "fbeta", "focal_tversky", "dice", "jaccard", "generalized_dice")
COMPOUND = ("tversky_ce", "dice_ce", "tversky_focal", "dice_focal")
LOSSES = (*OVERLAP, *COMPOUND, "cross_entropy", "bce", "focal", "unified_focal")


def draw(seed: int) -> tuple[str, Tensor, Tensor, Tensor | None, dict[str, Any]]:
    """A loss's name, float32 logits, target, voxel weight and options."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    name = LOSSES[seed % len(LOSSES)]
    batch, classes = chance.choice((1, 2)), chance.choice((2, 2, 3, 3, 4, 5, 8, 17, 40))
    shape = (batch, classes, chance.choice((1, 2, 6, 17, 64, 300)))
    spread = chance.choice((0.1, 1.0, 3.0, 10.0, 30.0))
    logits = torch.randn(shape, generator=generator) * spread
    labels = torch.randint(0, classes, (batch, shape[2]), generator=generator)
    case = chance.choice(("any", "right", "wrong", "one class", "dense"))
    if case == "right":
        labels = logits.argmax(1)
    elif case == "wrong":
        labels = (logits.argmax(1) + 1) % classes
    elif case == "one class":
        labels.fill_(chance.randrange(classes))
    options: dict[str, Any] = {}
    if name not in ("bce",) and chance.random() < 0.2:
        options["activation"] = "sigmoid"
    if case == "dense":
        labels = torch.rand(shape, generator=generator)
        if chance.random() < 0.5:
            labels = (labels.logit() * spread).softmax(1)
    elif chance.random() < 0.3:
        options["ignore_index"] = 255
        labels[torch.rand(labels.shape, generator=generator) < 0.3] = 255
    weight = None
    if chance.random() < 0.3:
        weight = torch.rand(batch, shape[2], generator=generator)
        weight[weight < 0.25] = 0
    options["reduction"] = chance.choice(("mean", "sum"))
    if name in (*OVERLAP, *COMPOUND):
        options["include_background"] = chance.random() < 0.7
        options["batch"] = chance.random() < 0.3
    if name in ("tversky", "tversky_ce", "tversky_focal"):
        options["alpha"] = chance.choice((0.0, 0.3, 0.5, 1.0))
        options["beta"] = chance.choice((0.3, 0.5, 1.0))
    if name in ("dice", "jaccard", "dice_ce", "dice_focal"):
        options["squared"] = chance.random() < 0.3
    if name == "focal":
        options["gamma"] = chance.choice((0.5, 1.0, 2.0))
    if name == "cross_entropy" and "activation" not in options:
        options["label_smoothing"] = chance.choice((0.0, 0.1))
    return name, logits, labels, weight, options


def value_and_gradient(
    backend: str, logits: Tensor, name: str, target: Tensor, weight: Tensor | None, options: Any
) -> tuple[float, Tensor]:
    leaf = logits.clone().requires_grad_()
    function = getattr(functional, f"{name}_loss")
    loss = function(leaf, target, weight, backend=backend, **options)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient.double()


def complaint(seed: int) -> str | None:
    """What the compiled kernels get wrong in the case, or None.

    A gradient may be wrong, relative to the largest element, by four times what the reference in
    float32 is wrong by and 1e-6.
    """
    name, logits, target, weight, options = draw(seed)
    arguments = (name, target, weight, options)
    truth, slope = value_and_gradient("reference", logits.double(), *arguments)
    plain, plain_slope = value_and_gradient("reference", logits, *arguments)
    value, gradient = value_and_gradient("auto", logits, *arguments)
    if not math.isfinite(truth):
        return None if str(value) == str(truth) else f"value {value}, expected {truth}"
    allowed = 4 * abs(plain - truth) + 3e-6 * max(abs(truth), 1e-3)
    if not abs(value - truth) <= allowed:
        return f"value {value}, expected {truth}"
    largest = max(float(slope.abs().max()), 1e-30)
    error = float((gradient - slope).abs().max()) / largest
    own = float((plain_slope - slope).abs().max()) / largest
    if not error <= 4 * own + 1e-6:
        return f"gradient off by {error:.2e} of {largest:.2e}, plain PyTorch by {own:.2e}"
    return None


def main(count: int, first: int = 0) -> int:
    wrong = 0
    for seed in range(first, first + count):
        found = complaint(seed)
        if found is not None:
            wrong += 1
            name, logits, *_, options = draw(seed)
            print(f"{seed}: {name} {tuple(logits.shape)} {options}: {found}", flush=True)
    print(f"{count} cases, {wrong} wrong ({voxfuse.__version__})", flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])) != 0)
