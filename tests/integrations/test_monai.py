"""MONAI's losses and their replacements: same values, gradients, warnings, errors, state_dict."""

from __future__ import annotations

import copy
import inspect
import pickle
import subprocess
import sys

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor, nn

import voxfuse
from tests.integrations.monai_cases import (
    LENIENT,
    activations,
    check,
    computed_in,
    draw_options,
    factor,
    flag,
    ignore_indices,
    matched,
    overlap_options,
    problems,
    reductions,
    weights_for,
    with_ignored,
)
from tests.integrations.parity import Passes, assert_compiles_for_any_size, assert_parity
from voxfuse.integrations import monai as ours

peer = pytest.importorskip("monai.losses", reason="MONAI is not installed")

NAMES = sorted(name for name in ours.__all__ if name.endswith("Loss"))


# --- Parity --------------------------------------------------------------------------------------


@given(problem=problems(), data=st.data())
@settings(max_examples=80)
def test_tversky(problem, data):
    logits, target = problem
    options = draw_options(
        data,
        logits,
        overlap_options(
            alpha=st.sampled_from([0.3, 0.5, 1.0]),
            beta=st.sampled_from([0.7, 0.5, 0.0]),
            soft_label=flag,
            ignore_index=ignore_indices(logits.shape[1]),
        ),
    )
    options = matched(target, logits, options, data)
    check("TverskyLoss", options, logits, with_ignored(target, options["ignore_index"]))


def dice_options(classes: int, **more):
    return overlap_options(
        squared_pred=flag, jaccard=flag, weight=weights_for(max(classes, 1)), **more
    )


@given(problem=problems(), data=st.data())
@settings(max_examples=100)
def test_dice(problem, data):
    logits, target = problem
    classes = logits.shape[1] - data.draw(st.integers(0, 1))
    options = draw_options(
        data,
        logits,
        dice_options(classes, soft_label=flag, ignore_index=ignore_indices(logits.shape[1])),
    )
    options = matched(target, logits, options, data)
    check("DiceLoss", options, logits, with_ignored(target, options["ignore_index"]))


@given(problem=problems(), data=st.data())
@settings(max_examples=80)
def test_mcc(problem, data):
    """A term is 1 where the truth is one-sided, in both."""
    logits, target = problem
    options = draw_options(data, logits, overlap_options(smooth_nr=st.sampled_from([0.0, 0.5])))
    options = matched(target, logits, options, data)
    check("MCCLoss", options, logits, target)


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_generalized_dice(problem, data):
    logits, target = problem
    kinds = st.sampled_from(["square", "simple", "uniform"])
    options = draw_options(data, logits, overlap_options(w_type=kinds, soft_label=flag))
    options = matched(target, logits, options, data)
    check("GeneralizedDiceLoss", options, logits, target)


def alphas(classes: int):
    several = st.lists(st.sampled_from([0.1, 0.5, 1.0]), min_size=classes, max_size=classes)
    return st.one_of(st.none(), st.sampled_from([0, 0.25, 0.9]), several)


gammas = st.sampled_from([0.0, 0.5, 1.0, 2.0, 2.5])


@given(problem=problems(), data=st.data())
@settings(max_examples=100)
def test_focal(problem, data):
    logits, target = problem
    classes = max(logits.shape[1] - data.draw(st.integers(0, 1)), 1)
    options = data.draw(
        st.fixed_dictionaries(
            {
                "include_background": flag,
                "to_onehot_y": flag,
                "gamma": gammas,
                "alpha": alphas(classes),
                "weight": weights_for(classes),
                "reduction": reductions,
                "use_softmax": flag,
                "ignore_index": ignore_indices(logits.shape[1]),
            }
        )
    )
    options = matched(target, logits, options, data)
    target = with_ignored(target, options["ignore_index"])
    check("FocalLoss", options, logits, target)


@given(problem=problems(), data=st.data())
@settings(max_examples=80)
def test_dice_ce(problem, data):
    logits, target = problem
    classes = logits.shape[1]
    options = draw_options(
        data,
        logits,
        overlap_options(
            reduction=st.sampled_from(["mean", "sum"]),
            squared_pred=flag,
            jaccard=flag,
            lambda_dice=factor,
            lambda_ce=factor,
            label_smoothing=st.sampled_from([0.0, 0.1]),
        ),
    )
    options = matched(target, logits, options, data)
    weight = data.draw(st.one_of(st.none(), weights_for(classes)))
    if isinstance(weight, list):
        options["weight"] = torch.tensor(weight, dtype=logits.dtype)
    check("DiceCELoss", options, logits, target)


@given(problem=problems(), data=st.data())
@settings(max_examples=80)
def test_dice_focal(problem, data):
    logits, target = problem
    options = draw_options(
        data,
        logits,
        dice_options(
            logits.shape[1],
            gamma=gammas,
            lambda_dice=factor,
            lambda_focal=factor,
            alpha=st.sampled_from([None, 0.25]),
        ),
    )
    options = matched(target, logits, options, data)
    if not options["include_background"] and isinstance(options["weight"], list):
        options["weight"] = options["weight"][1:] or None
    check("DiceFocalLoss", options, logits, target)


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_generalized_dice_focal(problem, data):
    logits, target = problem
    kinds = st.sampled_from(["square", "simple", "uniform"])
    more = {"w_type": kinds, "gamma": gammas, "lambda_gdl": factor, "lambda_focal": factor}
    options = draw_options(data, logits, overlap_options(**more))
    options = matched(target, logits, options, data)
    check("GeneralizedDiceFocalLoss", options, logits, target)


@st.composite
def masks(draw, logits: Tensor, target: Tensor):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    batch = draw(st.sampled_from([1, logits.shape[0]]))
    labels = target.shape[1] == 1 < logits.shape[1]
    kinds = ["binary", "binary", "binary" if labels else "soft", "none", "wrong"]
    kind = draw(st.sampled_from(kinds))
    if kind == "none":
        return None
    channels = 2 if kind == "wrong" else 1
    mask = torch.rand((batch, channels, *logits.shape[2:]), generator=generator)
    if kind == "binary":
        mask = (mask > 0.4).to(draw(st.sampled_from([torch.float32, torch.bool, torch.uint8])))
    return mask


@given(problem=problems(), data=st.data())
@settings(max_examples=80)
def test_masked_dice(problem, data):
    logits, target = problem
    options = draw_options(data, logits, dice_options(logits.shape[1], soft_label=flag))
    options = matched(target, logits, options, data)
    check("MaskedDiceLoss", options, logits, target, data.draw(masks(logits, target)))


@given(problem=problems(), data=st.data())
@settings(max_examples=80)
def test_masked_loss_around_every_loss(problem, data):
    """MONAI masks the logits, so that a masked voxel still has its activation's value."""
    logits, target = problem
    name = data.draw(
        st.sampled_from(
            [
                "TverskyLoss",
                "DiceLoss",
                "GeneralizedDiceLoss",
                "MCCLoss",
                "DiceCELoss",
                "DiceFocalLoss",
                "GeneralizedDiceFocalLoss",
                "FocalLoss",
            ]
        )
    )
    options = {
        "include_background": data.draw(flag),
        "to_onehot_y": data.draw(flag),
        "reduction": data.draw(st.sampled_from(["mean", "sum"])),
    }
    if name != "FocalLoss":
        options.update(data.draw(activations()), batch=data.draw(flag))
    options = matched(target, logits, options, data)

    def wrapped(library):
        return lambda: library.MaskedLoss(getattr(library, name), **options)

    assert_parity(
        wrapped(ours),
        wrapped(peer),
        logits,
        target,
        data.draw(masks(logits, target)),
        dtype=computed_in(name, logits, target),
        lenient=LENIENT,
    )


@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bool])
def test_labels_outside_the_mask_may_be_anything(mask_dtype):
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))
    mask = (torch.rand(2, 1, 4, 4) > 0.5).to(mask_dtype)
    labels = torch.where(mask != 0, labels, 255)
    options = {"softmax": True, "to_onehot_y": True}
    check("MaskedDiceLoss", options, logits, labels, mask)
    assert_parity(
        lambda: ours.MaskedLoss(ours.DiceCELoss, **options),
        lambda: peer.MaskedLoss(peer.DiceCELoss, **options),
        logits,
        labels,
        mask,
    )
    with pytest.raises(ValueError, match="label 3"):
        ours.MaskedLoss(ours.DiceLoss, **options)(logits, torch.full_like(labels, 3), mask)


@pytest.mark.parametrize("value", [0.5, 2.0])
def test_labels_are_not_multiplied_by_a_soft_mask(value):
    """MONAI makes class 0 of half of label 1 and class 2 of twice label 1."""
    logits, labels = torch.randn(2, 3, 4, 4), torch.ones(2, 1, 4, 4)
    mask = torch.full((2, 1, 4, 4), value)
    options = {"softmax": True, "to_onehot_y": True}
    for loss in (ours.MaskedLoss(ours.DiceCELoss, **options), ours.MaskedDiceLoss(**options)):
        with pytest.raises(ValueError, match="mask: got values other than 0 and 1 beside labels"):
            loss(logits, labels, mask)


def test_masked_loss_takes_any_callable():
    logits, mask = torch.randn(2, 1, 4, 4), (torch.rand(2, 1, 4, 4) > 0.5).float()
    target = torch.rand(2, 1, 4, 4)
    assert_parity(
        lambda: ours.MaskedLoss(nn.MSELoss, reduction="sum"),
        lambda: peer.MaskedLoss(nn.MSELoss, reduction="sum"),
        logits,
        target,
        mask,
    )
    with pytest.raises(ValueError, match="not callable"):
        ours.MaskedLoss(3)


@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss", "FocalLoss", "MaskedDiceLoss"])
def test_a_loss_of_the_adapter_says_that_it_returns_no_sums(name):
    logits = torch.zeros(1, 2, 4, 4)
    loss = getattr(ours, name)()
    message = f"return_sums: not an argument of the call of {name}, .* voxfuse's own losses"
    with pytest.raises(TypeError, match=message):
        loss(logits, logits, return_sums=True)
    network = nn.Sequential(nn.Conv2d(1, 2, 1))
    message = rf"loss: got voxfuse.integrations.monai.{name}, .*made of sums.* voxfuse.DiceCELoss"
    with pytest.raises(TypeError, match=message):
        voxfuse.fuse_head(network, loss)


# --- Constructors --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_constructor_is_the_peers(name):
    theirs = inspect.signature(getattr(peer, name)).parameters.values()
    mine = inspect.signature(getattr(ours, name)).parameters.values()

    def plain(parameters):
        return [(p.name, p.kind, getattr(p.default, "value", p.default)) for p in parameters]

    assert plain(mine) == plain(theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("TverskyLoss", {"sigmoid": True, "softmax": True}),
        ("TverskyLoss", {"other_act": 3}),
        ("TverskyLoss", {"reduction": "median"}),
        ("DiceLoss", {"softmax": True, "other_act": torch.tanh}),
        ("DiceLoss", {"other_act": "tanh"}),
        ("MCCLoss", {"sigmoid": True, "softmax": True}),
        ("MCCLoss", {"other_act": 3}),
        ("GeneralizedDiceLoss", {"w_type": "cubic"}),
        ("GeneralizedDiceLoss", {"sigmoid": True, "softmax": True}),
        ("DiceCELoss", {"reduction": "none"}),
        ("DiceCELoss", {"lambda_dice": -1.0}),
        ("DiceCELoss", {"lambda_ce": -1.0}),
        ("DiceCELoss", {"weight": [1.0, 2.0]}),
        ("DiceFocalLoss", {"lambda_dice": -1.0}),
        ("DiceFocalLoss", {"lambda_focal": -1.0}),
        ("GeneralizedDiceFocalLoss", {"lambda_gdl": -1.0}),
        ("MaskedDiceLoss", {"sigmoid": True, "softmax": True}),
        ("MaskedDiceLoss", {"softmax": True, "other_act": torch.tanh}),
        ("MaskedDiceLoss", {"other_act": 1}),
        ("FocalLoss", {"reduction": "median"}),
        ("AsymmetricUnifiedFocalLoss", {"reduction": "median"}),
    ],
)
def test_constructor_rejects_what_the_peer_rejects(name, options):
    with pytest.raises(Exception) as theirs:  # noqa: PT011
        getattr(peer, name)(**options)
    with pytest.raises(type(theirs.value)) as mine:
        getattr(ours, name)(**options)
    if "Available options" not in str(theirs.value):
        assert str(mine.value) == str(theirs.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiceLoss", {"weight": [1.0, -1.0, 1.0]}),
        ("DiceLoss", {"weight": [1.0, 1.0]}),
        ("DiceLoss", {"weight": -2.0}),
        ("FocalLoss", {"weight": [1.0, -1.0, 1.0]}),
        ("FocalLoss", {"weight": [1.0, 1.0]}),
        ("FocalLoss", {"weight": -2.0}),
        ("FocalLoss", {"alpha": [1.0, 1.0]}),
        ("FocalLoss", {"alpha": [1.0, 1.0], "use_softmax": True}),
        ("DiceCELoss", {"weight": torch.ones(2)}),
        ("DiceFocalLoss", {"weight": [1.0, 1.0]}),
        ("DiceFocalLoss", {"weight": [1.0, 1.0, 1.0], "include_background": False}),
        ("DiceFocalLoss", {"weight": -1.0}),
    ],
)
def test_wrong_weights_are_the_peers_errors(name, options):
    logits, labels = torch.randn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    check(name, {"to_onehot_y": True, **options}, logits, labels)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiceCELoss", {"label_smoothing": 1.5}),
        ("DiceCELoss", {"label_smoothing": -0.1}),
        ("FocalLoss", {"gamma": float("inf")}),
        ("DiceFocalLoss", {"gamma": float("inf")}),
    ],
)
def test_numbers_out_of_range_are_taken_or_refused_as_in_the_peer(name, options):
    logits, labels = torch.randn(1, 3, 4, 4), torch.randint(0, 3, (1, 1, 4, 4))
    check(name, {"to_onehot_y": True, **options}, logits, labels)


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "FocalLoss"])
@pytest.mark.parametrize("index", [np.int64(1), 1.0, True, -1, -100, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_any_number_may_be_the_ignored_label(name, index, dtype):
    """Compared in the labels' own type, in which -1 is 255 to a byte."""
    # Not negative: without an activation the peer's denominators would cancel, and its digits go.
    predictions, labels = torch.rand(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))
    labels[:, :, 0] = int(index)
    check(name, {"to_onehot_y": True, "ignore_index": index}, predictions, labels.to(dtype))


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "FocalLoss", "DiceFocalLoss"])
def test_labels_without_a_class_are_an_error_as_in_the_peer(name):
    logits, labels = torch.randn(1, 3, 4, 4), torch.full((1, 1, 4, 4), 3)
    with pytest.raises(RuntimeError):
        getattr(peer, name)(to_onehot_y=True)(logits, labels)
    with pytest.raises(RuntimeError, match="label 3") as raised:
        getattr(ours, name)(to_onehot_y=True)(logits, labels)
    assert isinstance(raised.value, ValueError)


# --- Modules -------------------------------------------------------------------------------------

WEIGHTED = {
    "TverskyLoss": {},
    "DiceLoss": {"weight": [1.0, 2.0, 3.0]},
    "GeneralizedDiceLoss": {},
    "MCCLoss": {"sigmoid": True},
    "DiceCELoss": {"weight": torch.tensor([1.0, 2.0, 3.0])},
    "DiceFocalLoss": {"weight": [1.0, 2.0, 3.0]},
    "GeneralizedDiceFocalLoss": {"weight": [1.0, 2.0, 3.0]},
    "FocalLoss": {"weight": [1.0, 2.0, 3.0]},
    "MaskedDiceLoss": {"weight": [1.0, 2.0, 3.0]},
}


@pytest.mark.parametrize("name", WEIGHTED)
@pytest.mark.parametrize("weighted", [True, False])
def test_state_dict_goes_both_ways(name, weighted):
    options = WEIGHTED[name] if weighted else {}
    mine, theirs = (getattr(library, name)(**options) for library in (ours, peer))
    assert {k: v.shape for k, v in mine.state_dict().items()} == {
        k: v.shape for k, v in theirs.state_dict().items()
    }
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)


def test_one_weight_becomes_one_a_class_in_the_state_as_in_the_peer():
    logits, labels = torch.randn(1, 3, 4, 4), torch.zeros(1, 1, 4, 4)
    losses = [library.DiceLoss(to_onehot_y=True, weight=2.0) for library in (ours, peer)]
    for loss in losses:
        loss(logits, labels)
    mine, theirs = (loss.state_dict()["class_weight"] for loss in losses)
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("name", WEIGHTED)
def test_modules_pickle_and_copy(name):
    loss = getattr(ours, name)(**WEIGHTED[name])
    logits, target = torch.randn(1, 3, 4, 4), torch.rand(1, 3, 4, 4).round()
    arguments = (torch.ones(1, 1, 4, 4),) if name == "MaskedDiceLoss" else ()
    expected = loss(logits, target, *arguments)
    for other in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert torch.equal(other(logits, target, *arguments), expected)


def test_imports_without_monai():
    code = (
        "import sys; sys.modules['monai'] = None\n"
        "import voxfuse.integrations.monai as m\n"
        "import torch\n"
        "print(float(m.DiceLoss(sigmoid=True)(torch.zeros(1, 1, 4), torch.ones(1, 1, 4))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1 / 3, abs=1e-5)


# --- One pass, no copies -------------------------------------------------------------------------


FUSED = [
    ("TverskyLoss", {"softmax": True, "include_background": False}),
    ("DiceLoss", {"softmax": True, "squared_pred": True}),
    ("DiceLoss", {"softmax": True, "soft_label": True, "ignore_index": 255}),
    ("GeneralizedDiceLoss", {"softmax": True}),
    ("MCCLoss", {"softmax": True, "include_background": False}),
    ("DiceCELoss", {"softmax": True, "include_background": False}),
    ("DiceCELoss", {"sigmoid": True, "label_smoothing": 0.1}),
    ("DiceFocalLoss", {"softmax": True, "include_background": False}),
    ("GeneralizedDiceFocalLoss", {"softmax": True}),
    ("FocalLoss", {}),
    ("FocalLoss", {"use_softmax": True, "alpha": 0.25}),
]


@pytest.mark.parametrize(("name", "options"), FUSED)
def test_a_metatensor_batch_is_read_once_and_as_it_is(name, options):
    """MetaTensor float32 logits and float32 index labels, MONAI's standard batch."""
    meta = pytest.importorskip("monai.data").MetaTensor
    logits, labels = torch.randn(2, 3, 10, 10, 10), torch.randint(0, 3, (2, 1, 10, 10, 10)).float()
    loss = getattr(ours, name)(to_onehot_y=True, **options)
    with Passes() as passes:
        result = loss(meta(logits), meta(labels))
    (call,) = passes.seen
    assert type(result) is Tensor
    assert call[0].data_ptr() == logits.data_ptr()
    assert call[1].data_ptr() == labels.data_ptr()
    assert passes.volumes == 0


@pytest.mark.parametrize("name", ["DiceLoss", "DiceCELoss", "DiceFocalLoss"])
def test_a_masked_loss_makes_no_masked_copy(name):
    logits, labels = torch.randn(2, 3, 10, 10, 10), torch.randint(0, 3, (2, 1, 10, 10, 10))
    loss = ours.MaskedLoss(getattr(ours, name), softmax=True, to_onehot_y=True)
    mask = torch.rand(2, 1, 10, 10, 10) > 0.5
    with Passes() as passes:
        loss(logits, labels, mask)
    (call,) = passes.seen
    assert call[0].data_ptr() == logits.data_ptr()
    assert passes.volumes == 0


def test_float_one_hot_targets_are_read_as_they_are():
    logits, target = torch.randn(2, 3, 10, 10, 10), torch.rand(2, 3, 10, 10, 10).round()
    with Passes() as passes:
        ours.DiceCELoss(sigmoid=True)(logits, target)
    (call,) = passes.seen
    assert call[1].data_ptr() == target.data_ptr()
    assert passes.volumes == 0


def test_half_precision_is_computed_in_float32():
    logits, labels = torch.randn(1, 4, 16, 16, 16), torch.randint(0, 4, (1, 1, 16, 16, 16))
    loss = ours.DiceCELoss(softmax=True, to_onehot_y=True)
    for dtype in (torch.float16, torch.bfloat16):
        half = logits.to(dtype)
        assert loss(half, labels).dtype == torch.float32
        torch.testing.assert_close(
            loss(half, labels), loss(half.double(), labels).float(), rtol=1e-6, atol=0
        )


def test_two_empty_sets_agree():
    """MONAI: 0/0, NaN."""
    loss = ours.DiceLoss(smooth_nr=0.0, smooth_dr=0.0)
    assert loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        *FUSED,
        ("DiceFocalLoss", {"softmax": True, "reduction": "sum"}),
        ("FocalLoss", {"use_softmax": True, "include_background": False}),
        ("FocalLoss", {"reduction": "sum", "ignore_index": 1}),
        ("MaskedDiceLoss", {"softmax": True}),
        ("DiceLoss", {"other_act": torch.tanh}),
    ],
)
def test_compiles_for_any_size(name, options):
    def batch(samples, extent):
        logits = torch.randn(samples, 3, extent, extent + 1)
        labels = torch.randint(0, 3, (samples, 1, extent, extent + 1)).float()
        mask = torch.rand(labels.shape) > 0.5
        return (logits, labels, mask) if name.startswith("Masked") else (logits, labels)

    assert_compiles_for_any_size(getattr(ours, name)(to_onehot_y=True, **options), batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "loss",
    [
        lambda: ours.DiceLoss(softmax=True, to_onehot_y=True),
        lambda: ours.DiceLoss(softmax=True, to_onehot_y=True, soft_label=True, ignore_index=9),
        lambda: ours.DiceLoss(to_onehot_y=True, soft_label=True),  # PyTorch computes it
        lambda: ours.DiceCELoss(softmax=True, to_onehot_y=True),
        lambda: ours.FocalLoss(to_onehot_y=True, use_softmax=True),
        lambda: ours.FocalLoss(to_onehot_y=True, reduction="none"),  # PyTorch computes it
    ],
)
def test_a_label_that_is_no_integer_is_an_error_in_every_dtype(loss, dtype):
    """MONAI truncates it."""
    target = torch.ones(1, 1, 3, 3, dtype=dtype)
    target[0, 0, 1, 2] = 1.5
    with pytest.raises(ValueError, match=r"label 1.5 is no integer, first at target\[0, 0, 1, 2\]"):
        loss()(torch.zeros(1, 3, 3, 3).softmax(1), target)
    target[0, 0, 1, 2] = 2
    assert bool(loss()(torch.zeros(1, 3, 3, 3).softmax(1), target).isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_numbers_are_not_rounded_to_a_half_default_dtype(dtype):
    default = torch.get_default_dtype()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 3, 5, 5, generator=generator)
    labels = torch.randint(0, 3, (1, 1, 5, 5), generator=generator)
    weight = [0.3, 0.7, 1.1]
    makes = (
        lambda: ours.DiceLoss(softmax=True, to_onehot_y=True, weight=weight),
        lambda: ours.DiceFocalLoss(softmax=True, to_onehot_y=True, weight=weight),
        lambda: ours.FocalLoss(to_onehot_y=True, alpha=weight, weight=weight),
        lambda: ours.FocalLoss(to_onehot_y=True, use_softmax=True, alpha=0.3),
    )
    for make in makes:
        expected = make()(logits, labels)
        torch.set_default_dtype(dtype)
        try:
            actual = make()(logits, labels)
        finally:
            torch.set_default_dtype(default)
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DiceLoss", {"sigmoid": True, "squared_pred": True}),
        ("DiceCELoss", {"softmax": True}),
        ("FocalLoss", {"gamma": 1.5}),
    ],
)
def test_a_target_of_any_numbers_is_what_it_is_to_the_peer(name, options):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 2, 3, 5, 4, 4, generator=generator)
    for numbers in (255 * (target > 0).float(), target):
        assert_parity(
            lambda: getattr(ours, name)(**options),
            lambda: getattr(peer, name)(**options),
            logits,
            numbers,
            dtype=torch.float32,
        )


# --- What is learnt ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "number", "options"),
    [
        ("DiceCELoss", "lambda_dice", dict(softmax=True)),
        ("DiceCELoss", "lambda_ce", dict(softmax=True)),
        ("DiceFocalLoss", "lambda_focal", dict(softmax=True)),
        ("GeneralizedDiceFocalLoss", "lambda_gdl", dict(softmax=True)),
        ("TverskyLoss", "alpha", dict(softmax=True)),
        ("TverskyLoss", "beta", dict(sigmoid=True, batch=True)),
        ("FocalLoss", "gamma", dict(use_softmax=True)),
        ("FocalLoss", "alpha", dict()),
    ],
)
def test_a_number_that_is_learnt_has_the_peers_gradient(name, number, options):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4))
    results = []
    for module in (ours, peer):
        learnt = nn.Parameter(torch.tensor(0.3))
        input = logits.clone().requires_grad_()
        loss = getattr(module, name)(to_onehot_y=True, **{number: learnt}, **options)
        value = loss(input, labels)
        value.backward()
        results.append((value.detach(), learnt.grad, input.grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MCCLoss", dict(sigmoid=True)),
        ("MCCLoss", dict(softmax=True, batch=True, include_background=False, smooth_nr=0.1)),
        ("GeneralizedDiceLoss", dict(sigmoid=True)),
        ("GeneralizedDiceLoss", dict(softmax=True, w_type="simple", batch=True)),
    ],
)
def test_targets_and_masks_have_the_derivative(name, options):
    generator = torch.Generator().manual_seed(0)
    logits, target = torch.rand(2, 2, 3, 2, 3, 2, generator=generator, dtype=torch.float64)
    mask = torch.rand(2, 1, 2, 3, 2, generator=generator, dtype=torch.float64)
    loss = getattr(ours, name)(**options)
    volumes = [x.requires_grad_() for x in (logits, target)]
    assert torch.autograd.gradcheck(loss, volumes)
    assert torch.autograd.gradcheck(
        lambda mask: ours.MaskedLoss(loss)(logits.detach(), target.detach(), mask),
        mask.requires_grad_(),
    )
