"""Inputs and options that the tests of MONAI's replacements share."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from torch import Tensor

from tests.integrations.parity import assert_parity
from voxfuse.integrations import monai as ours

peer = pytest.importorskip("monai.losses", reason="MONAI is not installed")

flag = st.booleans()
positive = st.sampled_from([1e-5, 0.1, 1.0])
reductions = st.sampled_from(["none", "mean", "sum"])
factor = st.sampled_from([0.5, 1.0])

#: Messages of MONAI for what works here.
LENIENT = (
    "with a bool tensor is not supported",
    "the derivative for 'target' is not implemented",
    "Expected a floating point or complex tensor",
)


@st.composite
def problems(draw, soft=True):
    """Logits and a target: labels, one value a class (hard or soft), or something misshapen."""
    channels = draw(st.integers(1, 4))
    batch = draw(st.integers(1, 3))
    spatial = tuple(draw(st.lists(st.integers(1, 4), min_size=0, max_size=3)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    shape = (batch, channels, *spatial)
    logits = torch.randn(shape, generator=generator, dtype=torch.float64) * 2
    kind = draw(st.sampled_from(["labels", "labels", "hard", "soft" if soft else "hard", "wrong"]))
    if kind == "labels":
        # Not every class is there.
        most = draw(st.integers(1, channels))
        target = torch.randint(0, most, (batch, 1, *spatial), generator=generator)
        kinds = [torch.float32, torch.int64, torch.uint8, torch.int32]
        target = target.to(draw(st.sampled_from(kinds)))
    elif kind == "wrong":
        wrong = draw(st.sampled_from(["channels", "batch", "spatial"]))
        extra = [int(wrong == "batch"), int(wrong == "channels"), *[int(wrong == "spatial")] * 3]
        shape = tuple(n + k for n, k in zip(shape, extra, strict=False))
        target = torch.rand(shape, generator=generator)
    else:
        target = torch.rand(shape, generator=generator, dtype=torch.float64).to(dtype)
        if kind == "hard":
            kinds = [dtype, torch.float32, torch.uint8, torch.bool, torch.int64]
            target = (target > draw(st.sampled_from([0.5, 0.9, 2.0]))).to(
                draw(st.sampled_from(kinds))
            )
    return logits.to(dtype), target


def weights_for(classes: int):
    several = st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=classes, max_size=classes)
    return st.one_of(st.none(), st.sampled_from([0.5, 2]), several)


@st.composite
def activations(draw):
    kind = draw(st.sampled_from(["none", "sigmoid", "softmax", "softmax", "other"]))
    return {
        "sigmoid": kind == "sigmoid",
        "softmax": kind == "softmax",
        "other_act": torch.tanh if kind == "other" else None,
    }


def overlap_options(**more):
    return {
        "include_background": flag,
        "reduction": reductions,
        "smooth_nr": positive,
        "smooth_dr": positive,
        "batch": flag,
        **more,
    }


def draw_options(data, logits: Tensor, options: dict) -> dict:
    drawn = {**data.draw(activations()), **data.draw(st.fixed_dictionaries(options))}
    # Labels need to_onehot_y; now and then it is wrong.
    drawn["to_onehot_y"] = data.draw(st.sampled_from([True, True, False]))
    return drawn


def matched(target: Tensor, logits: Tensor, options: dict, data) -> dict:
    """Mostly options that go with the target."""
    if target.shape == logits.shape or data.draw(st.integers(0, 5)):
        is_label = target.shape[1] == 1 and logits.shape[1] > 1
        options["to_onehot_y"] = is_label
    return options


def computed_in(name: str, logits: Tensor, target: Tensor) -> torch.dtype:
    """MONAI computes its focal losses in float32, and the others if the target is not double."""
    always_float = "Focal" in name or "Generalized" in name
    return torch.float32 if always_float or target.dtype != torch.float64 else logits.dtype


def check(name, options, logits, target, *arguments) -> None:
    assert_parity(
        lambda: getattr(ours, name)(**copy.deepcopy(options)),
        lambda: getattr(peer, name)(**copy.deepcopy(options)),
        logits,
        target,
        *arguments,
        dtype=computed_in(name, logits, target),
        lenient=LENIENT,
    )


def ignore_indices(channels: int):
    return st.sampled_from([None, None, 0, channels - 1, -1, 255])


def with_ignored(target: Tensor, ignore_index: int | None) -> Tensor:
    """Put a sentinel into every third voxel of a label target."""
    if ignore_index is None or target.shape[1] != 1 or target.dtype == torch.bool:
        return target
    if ignore_index < 0 and target.dtype == torch.uint8:
        return target
    target = target.clone()
    target.view(-1)[::3] = ignore_index
    return target
