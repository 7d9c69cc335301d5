"""FusionOptions: checked when they are made, the same for a fuser and for the sliding window."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import voxfuse
from voxfuse.fusion.options import FusionOptions

BAD = [
    {"output": "votes"},
    {"output": "probabilities"},
    {"activation": "softmax"},
    {"voting": "hard"},
    {"threshold": float("nan")},
    {"accumulate": torch.int8},
    {"resample_order": 2},
    {"resample_order": 0},
    {"resample_order": (0, 1)},
]


@pytest.mark.parametrize("options", BAD)
def test_a_fuser_and_the_sliding_window_say_what_the_options_say(options):
    def predictor(patch):
        raise AssertionError("predicted")

    calls = (
        lambda: FusionOptions(2, **options),
        lambda: FusionOptions(None, **options),
        lambda: voxfuse.PatchFuser((9, 9), 4, 2, **options),
        lambda: voxfuse.sliding_window_inference(
            torch.zeros(1, 1, 9, 9), 4, 1, predictor, **options
        ),
    )
    texts = set()
    for call in calls:
        with pytest.raises(ValueError, match=next(iter(options))) as error:
            call()
        texts.add(str(error.value))
    assert len(texts) == 1


def test_the_order_of_a_resampling_is_no_boolean():
    for order in (True, (1, False)):
        with pytest.raises(TypeError, match="resample_order: got .*expected integers"):
            FusionOptions(2, "labels", resample_to=(9, 9), resample_order=order)


def test_options_are_frozen_and_checked_again_when_replaced():
    options = FusionOptions(3, "labels", head=(torch.ones(5, 3, 1, 1), None))
    assert (options.classes, options.voting, options.head[0].shape) == (5, "logit", (5, 3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.output = "logits"
    with pytest.raises(ValueError, match="output: 'labels' of one channel"):
        dataclasses.replace(FusionOptions(2, "labels"), channels=1)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, torch.uint8), (256, torch.uint8), (257, torch.uint16), (70000, torch.int32)],
)
def test_labels_take_the_smallest_dtype_that_holds_them(classes, dtype):
    assert FusionOptions(classes, "labels").result_dtype(torch.float16) == dtype
    assert FusionOptions(classes).result_dtype(torch.float16) == torch.float16


def test_a_fuser_is_made_of_the_fields_of_its_options():
    options = FusionOptions(3, "mask", "sigmoid", "logit", 0.3, members=2, backend="reference")
    fuser = voxfuse.PatchFuser((9, 9), 4, **vars(options))
    assert fuser.options == options
