"""Random calls of every loss, a backend against the reference: run as a script for many.

python -m tests.losses.random_calls 200000
python -m tests.losses.random_calls 2000 --backend triton --largest 200
python -m tests.losses.random_calls 2000 --backend emulated --largest 200

Of 200,000 on the CPU 23 are beyond the bar of :func:`complaint`, all of them as far as plain
float32 is in a neighbour of the case (:func:`is_rounding`): one or two voxels whose gradient all
but cancels (generalised Dice among them, whose cotangents are nearly those of any class), and
values with ``squared``, which cancel down to a rounding of the sums. Of the kernels before they
formed the differences of the classes first, the first 4,000 cases find 71, none of them as plain
float32 beside it.

Of 2,000 with at most 200 logits none is beyond the bar on the emulated CUDA kernels. Of 1,500 in
Triton's interpreter two are as plain float32 beside them, and one is not: Triton's exponential is a
power of 2 whose exponent is rounded, which costs 1.5e-6 where logits differ by 30 and more. With
that exponential, PyTorch errs as much.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import voxfuse
from voxfuse import functional

OVERLAP = ("tversky", "fbeta", "focal_tversky", "dice", "jaccard", "generalized_dice")
COMPOUND = ("tversky_ce", "dice_ce", "tversky_focal", "dice_focal")
LOSSES = (*OVERLAP, *COMPOUND, "cross_entropy", "bce", "focal", "unified_focal")

#: A gradient that may be missing where a probability is below float32's normal range.
FLUSHED = torch.finfo(torch.float32).tiny / 1e-5
NEIGHBOURS = 32


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


class Answers(TorchDispatchMode):
    """Operators of the reference, answered by other functions."""

    def __init__(self, answers: dict[str, Callable[..., Any]]) -> None:
        super().__init__()
        self.answers = {f"voxfuse_reference::{name}": f for name, f in answers.items()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.answers.get(func.name(), func)(*args, **(kwargs or {}))


def value_and_gradient(
    backend: str, logits: Tensor, name: str, target: Tensor, weight: Tensor | None, options: Any
) -> tuple[float, Tensor]:
    leaf = logits.clone().requires_grad_()
    function = getattr(functional, f"{name}_loss")
    with emulated_operators() if backend == "emulated" else contextlib.nullcontext():
        backend = "reference" if backend == "emulated" else backend
        loss = function(leaf, target, weight, backend=backend, **options)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return float(loss.detach()), gradient.double()


@functools.cache
def _emulators() -> dict[str, Callable[..., Any]]:
    from tests.emulation import emulator

    sums, ratio = emulator.SoftConfusion(), emulator.RatioLoss()
    return {
        "soft_confusion": sums.soft_confusion,
        "soft_confusion_backward": sums.soft_confusion_backward,
        "ratio_loss": ratio.ratio_loss,
        "ratio_loss_backward": ratio.ratio_loss_backward,
    }


def emulated_operators() -> Answers:
    """The CUDA kernels in the host emulation, called as the reference is."""
    return Answers(_emulators())


class Errors(NamedTuple):
    """How far a value is off, and a gradient (its worst element)."""

    value: float
    gradient: float


class Truth(NamedTuple):
    value: float
    gradient: Tensor

    def errors(self, value: float, gradient: Tensor) -> Errors:
        return Errors(abs(value - self.value), float((gradient - self.gradient).abs().max()))


def truth_of(logits: Tensor, *arguments: Any) -> Truth:
    return Truth(*value_and_gradient("reference", logits.double(), *arguments))


def complaint(seed: int, backend: str = "auto") -> str | None:
    """What ``backend`` gets wrong in the case, or None.

    A gradient may be wrong by four times what the reference in float32 is wrong by, and 1e-6 of its
    largest element; a value by four times what the reference's is wrong by, and 3e-6 of it (or of
    1e-3). What the kernels flush to 0, a probability below float32's normal range, is allowed as
    well, times the largest slope that a smoothing of 1e-5 leaves.
    """
    name, logits, target, weight, options = draw(seed)
    arguments = (name, target, weight, options)
    truth = truth_of(logits, *arguments)
    value, gradient = value_and_gradient(backend, logits, *arguments)
    if not math.isfinite(truth.value):
        right = str(value) == str(truth.value)
        return None if right else f"value {value}, expected {truth.value}"
    plain = truth.errors(*value_and_gradient("reference", logits, *arguments))
    error = truth.errors(value, gradient)
    if not error.value <= 4 * plain.value + 3e-6 * max(abs(truth.value), 1e-3):
        return f"value {value:.9g}, expected {truth.value:.9g}, plain off by {plain.value:.2e}"
    largest = float(truth.gradient.abs().max())
    if not error.gradient <= 4 * plain.gradient + 1e-6 * largest + FLUSHED:
        relative, own = (x.gradient / largest for x in (error, plain))
        return f"gradient off by {relative:.2e} of {largest:.2e}, plain PyTorch by {own:.2e}"
    return None


def is_rounding(seed: int, backend: str = "auto") -> bool:
    """Whether plain float32 loses a quarter as much as ``backend`` beside the case.

    One or two voxels have too few roundings to speak of a reference's own error: it may be right by
    luck. Here its error is the worst of the case and its neighbours, logits within 2^-18 of the
    case's; and as much may go wrong as does in float64 when the sums alone are rounded to float32.
    """
    name, logits, target, weight, options = draw(seed)
    arguments = (name, target, weight, options)
    truth = truth_of(logits, *arguments)
    error = truth.errors(*value_and_gradient(backend, logits, *arguments))
    generator = torch.Generator().manual_seed(seed)
    worst = [0.0, 0.0]

    def rounded_sums(*call: Any) -> Tensor:
        sums = torch.ops.voxfuse_reference.soft_confusion(*call)
        noise = torch.rand(sums.shape, generator=generator, dtype=torch.float64)
        return sums * (1 + (noise - 0.5) * 2**-23)

    for _ in range(NEIGHBOURS):
        near = logits * (1 + (torch.rand(logits.shape, generator=generator) - 0.5) * 2**-17)
        plain = value_and_gradient("reference", near, *arguments)
        losses = [truth_of(near, *arguments).errors(*plain)]
        with Answers({"soft_confusion": rounded_sums}):
            losses.append(truth.errors(*truth_of(logits, *arguments)))
        for lost in losses:
            worst = [max(pair) for pair in zip(worst, lost, strict=True)]
    return all(mine <= 4 * own for mine, own in zip(error, worst, strict=True))


def main(count: int, first: int = 0, backend: str = "auto", largest: float = math.inf) -> int:
    """Run seeds until ``count`` cases of at most ``largest`` logits are through."""
    run, wrong, off = 0, 0, 0
    for seed in itertools.count(first):
        if run == count:
            break
        name, logits, *_, options = draw(seed)
        if logits.numel() > largest:
            continue
        run += 1
        found = complaint(seed, backend)
        if found is not None:
            rounding = is_rounding(seed, backend)
            wrong += not rounding
            off += 1
            kind = "as plain float32 beside it" if rounding else "WRONG"
            print(f"{seed}: {name} {tuple(logits.shape)} {options}: {found}: {kind}", flush=True)
    print(
        f"{backend}: {run} cases from {first} on, {off} beyond the bar, {wrong} of them by more "
        f"than rounding ({voxfuse.__version__})",
        flush=True,
    )
    return wrong


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--first", type=int, default=0, help="the first case's seed")
    parser.add_argument("--backend", choices=("auto", "triton", "emulated"), default="auto")
    parser.add_argument("--largest", type=float, default=math.inf, help="most logits of a case")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    options = parse(sys.argv[1:])
    if options.backend == "triton":
        os.environ.setdefault("TRITON_INTERPRET", "1")
    torch.set_num_threads(1)
    sys.exit(main(**vars(options)) != 0)
