"""nnU-Net's losses and their replacements: same values, gradients, errors, and one pass."""

from __future__ import annotations

import copy
import inspect
import os
import pickle
import subprocess
import sys
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch import Tensor, nn

from tests.integrations.parity import Passes, assert_compiles_for_any_size, assert_parity
from voxfuse.integrations import nnunet as ours

reason = "nnunetv2 is not installed"
peer_dice = pytest.importorskip("nnunetv2.training.loss.dice", reason=reason)
peer = pytest.importorskip("nnunetv2.training.loss.compound_losses", reason=reason)
peer_ce = pytest.importorskip("nnunetv2.training.loss.robust_ce_loss", reason=reason)
peer_softmax = pytest.importorskip("nnunetv2.utilities.helpers", reason=reason).softmax_helper_dim1

flag = st.booleans()
smooths = st.sampled_from([1e-5, 1.0])
factors = st.sampled_from([0, 0.5, 1])
#: nnU-Net sums in float32 whatever comes in.
FLOAT = torch.float32
THEIRS = {
    **{name: getattr(peer_dice, name) for name in ("SoftDiceLoss", "MemoryEfficientSoftDiceLoss")},
    **{name: getattr(peer, name) for name in ours.__all__ if name.startswith("DC_")},
    "RobustCrossEntropyLoss": peer_ce.RobustCrossEntropyLoss,
    "TopKLoss": peer_ce.TopKLoss,
    "get_tp_fp_fn_tn": peer_dice.get_tp_fp_fn_tn,
}


# --- Inputs --------------------------------------------------------------------------------------


class Problem:
    def __init__(self, logits: Tensor, labels: Tensor, regions: Tensor, mask: Tensor) -> None:
        self.logits, self.labels, self.regions, self.mask = logits, labels, regions, mask


@st.composite
def problems(draw, least_channels=1):
    channels = draw(st.integers(least_channels, 4))
    batch = draw(st.integers(1, 3))
    spatial = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = 2 * torch.randn((batch, channels, *spatial), generator=generator, dtype=dtype)
    most = draw(st.integers(1, channels))
    labels = torch.randint(0, most, (batch, 1, *spatial), generator=generator)
    labels = labels.to(
        draw(st.sampled_from([torch.int16, torch.float32, torch.int64, torch.uint8]))
    )
    regions = torch.rand((batch, channels, *spatial), generator=generator)
    kinds = [torch.bool, torch.uint8, torch.float32, torch.int16, None]
    kind = draw(st.sampled_from(kinds))
    if kind is not None:
        regions = (regions > draw(st.sampled_from([0.5, 2.0]))).to(kind)
    mask = torch.rand((batch, 1, *spatial), generator=generator)
    kind = draw(st.sampled_from([torch.bool, torch.uint8, torch.float32, None]))
    mask = mask if kind is None else (mask > 0.4).to(kind)
    return Problem(logits, labels, regions, mask)


def check(ours_made, theirs_made, problem: Problem, *arguments) -> None:
    assert_parity(ours_made, theirs_made, problem.logits, *arguments, dtype=FLOAT)


def built(name: str, *arguments, **options):
    """The two constructors; nnU-Net's write into the dictionaries that they get."""

    def make(library):
        return lambda: library(*copy.deepcopy(arguments), **copy.deepcopy(options))

    return make(getattr(ours, name)), make(THEIRS[name])


# --- Parity --------------------------------------------------------------------------------------


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_get_tp_fp_fn_tn(problem, data):
    target = data.draw(
        st.sampled_from([problem.labels, problem.labels[:, 0], problem.regions]), label="target"
    )
    if problem.logits.shape[1] == 1 and target is not problem.regions:
        target = target.clamp(max=1)
    spatial = list(range(2, problem.logits.ndim))
    options = {
        "axes": data.draw(st.sampled_from([None, spatial, (0, *spatial), [0], (), spatial[:1]])),
        "mask": data.draw(st.sampled_from([None, problem.mask])),
        "square": data.draw(st.sampled_from([False, False, True])),
    }
    problem.logits = problem.logits.sigmoid()

    def stacked(library):
        return lambda: lambda p, g: torch.stack(library(p, g, **options))

    check(stacked(ours.get_tp_fp_fn_tn), stacked(peer_dice.get_tp_fp_fn_tn), problem, target)


nonlinearities = st.sampled_from(
    [None, torch.sigmoid, peer_softmax, ours.softmax_helper_dim1, torch.tanh, nn.Softmax(1)]
)


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_dice(problem, data):
    name = data.draw(st.sampled_from(["SoftDiceLoss", "MemoryEfficientSoftDiceLoss"]))
    options = {
        "apply_nonlin": data.draw(nonlinearities),
        "batch_dice": data.draw(flag),
        "do_bg": data.draw(flag),
        "smooth": data.draw(smooths),
        "ddp": False,
    }
    if name == "SoftDiceLoss":
        options["clip_tp"] = data.draw(st.sampled_from([None, 0.5, 3.0]))
    if options["apply_nonlin"] is None:
        problem.logits = problem.logits.sigmoid()
    target = data.draw(st.sampled_from([problem.labels, problem.labels[:, 0], problem.regions]))
    check(
        *built(name, **options), problem, target, data.draw(st.sampled_from([None, problem.mask]))
    )


def dice_kwargs(data) -> dict:
    return {
        "batch_dice": data.draw(flag),
        "do_bg": data.draw(flag),
        "smooth": data.draw(smooths),
        "ddp": False,
    }


def class_weights(channels: int):
    weights = st.lists(st.sampled_from([0.5, 1.0, 3.0]), min_size=channels, max_size=channels)
    return st.one_of(st.none(), weights.map(torch.tensor))


def with_ignored(labels: Tensor, ignore_label: int | None, everywhere: bool) -> Tensor:
    if ignore_label is None:
        return labels
    labels = labels.clone()
    labels.view(-1)[:: 1 if everywhere else 3] = ignore_label
    return labels


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_dc_and_ce(problem, data):
    channels = problem.logits.shape[1]
    ignore_label = data.draw(st.sampled_from([None, None, channels, 0]))
    ce_kwargs = {"label_smoothing": data.draw(st.sampled_from([0.0, 0.1]))}
    weight = data.draw(class_weights(channels))
    if weight is not None:
        ce_kwargs["weight"] = weight.to(problem.logits)
    if ignore_label is None and data.draw(st.integers(0, 4)) == 0:
        ce_kwargs["ignore_index"] = 0
    name = data.draw(st.sampled_from(["SoftDiceLoss", "MemoryEfficientSoftDiceLoss"]))
    options = {
        "weight_ce": data.draw(factors),
        "weight_dice": data.draw(factors),
        "ignore_label": ignore_label,
    }
    if not (options["weight_ce"] or options["weight_dice"]):
        options["weight_ce"] = 1
    soft_dice_kwargs = dice_kwargs(data)

    def make(library, dice):
        return lambda: library.DC_and_CE_loss(
            dict(soft_dice_kwargs), dict(ce_kwargs), dice_class=getattr(dice, name), **options
        )

    labels = with_ignored(problem.labels, ignore_label, data.draw(st.integers(0, 4)) == 0)
    check(make(ours, ours), make(peer, peer_dice), problem, labels)


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_dc_and_bce(problem, data):
    channels = problem.logits.shape[1]
    ignored = data.draw(flag)
    bce_kwargs = {"reduction": data.draw(st.sampled_from(["mean", "sum"]))}
    weight = data.draw(class_weights(channels))
    if weight is not None:
        bce_kwargs["pos_weight"] = weight.view(-1, *[1] * (problem.logits.ndim - 2))
    options = {
        "weight_ce": data.draw(factors),
        "weight_dice": data.draw(factors),
        "use_ignore_label": ignored,
    }
    target = problem.regions
    if ignored:
        last = problem.mask > data.draw(st.sampled_from([0, -1]))
        target = torch.cat([target, last.to(target.dtype)], 1)
    check(*built("DC_and_BCE_loss", bce_kwargs, dice_kwargs(data), **options), problem, target)


@given(problem=problems(least_channels=2), data=st.data())
@settings(max_examples=60)
def test_dc_and_topk(problem, data):
    channels = problem.logits.shape[1]
    ignore_label = data.draw(st.sampled_from([None, channels, 0]))
    ce_kwargs = {"k": data.draw(st.sampled_from([10, 30, 100])), "label_smoothing": 0.1}
    weight = data.draw(class_weights(channels))
    if weight is not None:
        ce_kwargs["weight"] = weight.to(problem.logits)
    options = {"weight_ce": 0.5, "ignore_label": ignore_label}
    labels = with_ignored(problem.labels, ignore_label, data.draw(st.integers(0, 4)) == 0)
    check(*built("DC_and_topk_loss", dice_kwargs(data), ce_kwargs, **options), problem, labels)


@given(problem=problems(), data=st.data())
@settings(max_examples=60)
def test_robust_cross_entropy(problem, data):
    options = {
        "reduction": data.draw(st.sampled_from(["mean", "sum", "none"])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.2])),
        "ignore_index": data.draw(st.sampled_from([-100, 1])),
    }
    weight = data.draw(class_weights(problem.logits.shape[1]))
    if weight is not None:
        options["weight"] = weight.to(problem.logits)
    labels = data.draw(st.sampled_from([problem.labels, problem.labels[:, 0]]))
    check(*built("RobustCrossEntropyLoss", **options), problem, labels)


# --- Errors, constructors, modules ---------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ours.__all__ if name in THEIRS])
def test_signature_is_the_peers(name):
    def plain(function):
        return [
            (p.name, p.kind, getattr(p.default, "__name__", p.default))
            for p in inspect.signature(function).parameters.values()
        ]

    assert plain(getattr(ours, name)) == plain(THEIRS[name])


@pytest.mark.parametrize("name", ["DC_and_CE_loss", "DC_and_topk_loss"])
def test_one_hot_targets_with_an_ignore_label_are_an_assertion_error(name):
    mine, theirs = built(name, {"ddp": False}, {}, ignore_label=3)
    logits = torch.randn(1, 3, 4, 4)
    assert_parity(mine, theirs, logits, torch.rand(1, 3, 4, 4).round())


def test_labels_without_a_class_are_an_error_as_in_the_peer():
    mine, theirs = built("DC_and_CE_loss", {"ddp": False}, {})
    logits, labels = torch.randn(1, 3, 4, 4), torch.full((1, 1, 4, 4), 3)
    with pytest.raises(RuntimeError):
        theirs()(logits, labels)
    with pytest.raises(RuntimeError, match="label 3"):
        mine()(logits, labels)


@pytest.mark.parametrize("name", ["RobustCrossEntropyLoss", "TopKLoss"])
@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, torch.uint8, torch.bfloat16, torch.float16, torch.float64]
)
def test_labels_of_any_dtype_are_read(name, dtype):
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 2, (2, 1, 4, 4)).to(dtype)
    assert_parity(*built(name), logits, labels)


@pytest.mark.parametrize("name", ["RobustCrossEntropyLoss", "TopKLoss"])
@pytest.mark.parametrize(
    "options",
    [{"label_smoothing": 1.5}, {"label_smoothing": -0.1}, {"ignore_index": 1.0}],
)
def test_options_that_pytorch_refuses_or_takes(name, options):
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 1, 4, 4))
    assert_parity(*built(name, **options), logits, labels)
    for wrong in (labels - 1, labels + 1):
        assert_parity(*built(name), logits, wrong)
    assert_parity(*built("RobustCrossEntropyLoss", reduction="median"), logits, labels)


def test_an_ignored_label_of_numpy():
    labels = torch.randint(0, 3, (2, 1, 4, 4))
    for name in ("DC_and_CE_loss", "DC_and_topk_loss"):
        made = built(name, {"ddp": False}, {}, ignore_label=np.int64(1))
        assert_parity(*made, torch.randn(2, 3, 4, 4), labels)


def test_a_mask_with_the_classes_channels_goes_through_the_activation():
    """The operators take one mask for all classes; PyTorch does the rest."""
    logits, target = torch.randn(2, 3, 4, 4), torch.rand(2, 3, 4, 4).round()
    mask = torch.rand(2, 3, 4, 4).round()
    made = built("MemoryEfficientSoftDiceLoss", apply_nonlin=torch.sigmoid, ddp=False)
    assert_parity(*made, logits, target, mask)


def test_ddp_without_a_process_group_is_the_peers_error():
    for options in ({"batch_dice": True}, {"batch_dice": True, "ddp": True}):
        mine, theirs = built("MemoryEfficientSoftDiceLoss", **options)
        logits, labels = torch.rand(1, 2, 4, 4), torch.zeros(1, 1, 4, 4)
        with pytest.raises(ValueError, match="Default process group") as raised:
            theirs()(logits, labels)
        with pytest.raises(type(raised.value), match="Default process group"):
            mine()(logits, labels)


def test_constructor_writes_the_ignore_label_as_the_peer_does():
    ce_kwargs: dict = {}
    loss = ours.DC_and_CE_loss({"ddp": False}, ce_kwargs, ignore_label=4)
    assert ce_kwargs == {"ignore_index": 4}
    assert loss.ce.ignore_index == 4


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("DC_and_CE_loss", ({}, {"weight": torch.ones(3)})),
        ("DC_and_topk_loss", ({}, {"weight": torch.ones(3)})),
        ("DC_and_BCE_loss", ({"pos_weight": torch.ones(3, 1, 1)}, {})),
    ],
)
def test_state_dict_goes_both_ways_and_modules_pickle(name, arguments):
    mine, theirs = (make() for make in built(name, *arguments))
    mine.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert pickle.loads(pickle.dumps(mine)).state_dict().keys() == mine.state_dict().keys()


def test_imports_without_nnunet():
    code = "import sys; sys.modules['nnunetv2'] = None; import voxfuse.integrations.nnunet"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- One pass ------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignore_label", [None, 3])
def test_labels_are_read_once_and_as_they_are(ignore_label):
    logits, labels = torch.randn(2, 3, 10, 10, 10), torch.randint(0, 3, (2, 1, 10, 10, 10)).short()
    loss = ours.DC_and_CE_loss({"ddp": False}, {}, ignore_label=ignore_label)
    with Passes() as passes:
        loss(logits, labels)
    ((input, target),) = passes.seen
    assert input.data_ptr() == logits.data_ptr()
    assert target.data_ptr() == labels.data_ptr()
    assert passes.volumes == 0


def test_regions_are_read_from_the_slice():
    logits, target = torch.randn(2, 3, 10, 10, 10), torch.rand(2, 4, 10, 10, 10) > 0.5
    loss = ours.DC_and_BCE_loss({}, {"ddp": False}, use_ignore_label=True)
    with Passes() as passes:
        loss(logits, target)
    ((_, read),) = passes.seen
    assert read.data_ptr() == target.data_ptr()
    assert passes.volumes == 1, "only the mask of valid voxels"


def test_a_compiled_dc_still_shares_the_pass():
    """nnU-Net wraps ``.dc`` in torch.compile; anything else in its place is called."""
    logits, labels = torch.randn(2, 3, 10, 10, 10), torch.randint(0, 3, (2, 1, 10, 10, 10))
    loss = ours.DC_and_CE_loss({"ddp": False}, {})
    expected = loss(logits, labels)
    loss.dc = torch.compile(loss.dc)
    with Passes() as passes:
        assert torch.equal(loss(logits, labels), expected)
    assert len(passes.seen) == 1

    class Replaced(nn.Module):
        def forward(self, x, y, loss_mask=None):
            return x.sum() * 0 + 5

    loss.dc = Replaced()
    torch.testing.assert_close(loss(logits, labels), 5 + F.cross_entropy(logits, labels[:, 0]))


def test_works_in_the_deep_supervision_wrapper():
    wrapper = pytest.importorskip("nnunetv2.training.loss.deep_supervision").DeepSupervisionWrapper
    outputs = [torch.randn(2, 3, n, n) for n in (8, 4, 2)]
    targets = [torch.randint(0, 3, (2, 1, n, n)).float() for n in (8, 4, 2)]
    mine, theirs = built("DC_and_CE_loss", {"ddp": False}, {})
    losses = [wrapper(make(), [1.0, 0.5, 0.0])(outputs, targets) for make in (mine, theirs)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "name", [name for name in ours.__all__ if "Loss" in name or "loss" in name]
)
def test_compiles_for_any_size(name):
    arguments = {
        "DC_and_CE_loss": ({"ddp": False}, {}),
        "DC_and_topk_loss": ({"ddp": False}, {"k": 10}),
        "DC_and_BCE_loss": ({}, {"ddp": False}),
    }
    options = {"apply_nonlin": torch.sigmoid, "ddp": False} if "Dice" in name else {}
    loss = getattr(ours, name)(*arguments.get(name, ()), **options)

    def batch(samples, extent):
        logits = torch.randn(samples, 3, extent, extent + 1)
        if name == "DC_and_BCE_loss":
            return logits, torch.rand(logits.shape).round()
        return logits, torch.randint(0, 3, (samples, 1, extent, extent + 1)).float()

    assert_compiles_for_any_size(loss, batch)


# --- Ranks ---------------------------------------------------------------------------------------


def _rank(rank: int, file: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=2
    )
    generator = torch.Generator().manual_seed(rank)
    logits = torch.randn(2, 3, 6, 6, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 1, 6, 6), generator=generator)
    for name in ("SoftDiceLoss", "MemoryEfficientSoftDiceLoss"):
        for ignore_label in (None, 2):
            results = []
            for library, dice in ((ours, ours), (peer, peer_dice)):
                leaf = logits.clone().requires_grad_()
                loss = library.DC_and_CE_loss(
                    {"batch_dice": True, "do_bg": False, "smooth": 1e-5, "ddp": True},
                    {},
                    ignore_label=ignore_label,
                    dice_class=getattr(dice, name),
                )(leaf, labels)
                results.append((loss, torch.autograd.grad(loss, leaf)[0]))
            for mine, theirs in zip(*results, strict=True):
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7)
    torch.distributed.destroy_process_group()


def test_ddp_equals_the_peer_on_two_ranks(tmp_path):
    """The Dice is that of the global batch, the cross-entropy that of the rank."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("PyTorch was built without gloo")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    code = (
        "import sys; from tests.integrations.test_nnunet_losses import _rank; "
        "_rank(int(sys.argv[1]), sys.argv[2])"
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(rank), str(tmp_path / "group")],
            env=environment,
            cwd=Path(__file__).parents[2],
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in ranks] == [0, 0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "call",
    [
        lambda z, y: ours.SoftDiceLoss(ours.softmax_helper_dim1, ddp=False)(z, y),
        lambda z, y: ours.RobustCrossEntropyLoss()(z, y),
        # PyTorch computes these two.
        lambda z, y: ours.RobustCrossEntropyLoss()(z[0].flatten(1).T, y.flatten()),
        lambda z, y: ours.DC_and_CE_loss({"ddp": False}, {})(z, y),
        lambda z, y: ours.get_tp_fp_fn_tn(z.softmax(1), y, square=True)[0],
    ],
)
def test_a_label_that_is_no_integer_is_an_error_in_every_dtype(call, dtype):
    """nnU-Net truncates it."""
    target = torch.ones(1, 1, 3, 3, dtype=dtype)
    target[0, 0, 1, 2] = 1.5
    with pytest.raises(
        ValueError, match=r"label 1.5 is no integer, first at target\[(0, .*1, 2|5)\]"
    ):
        call(torch.zeros(1, 3, 3, 3), target)
    target[0, 0, 1, 2] = 2
    call(torch.zeros(1, 3, 3, 3), target)


def test_regions_of_any_numbers_are_what_they_are_to_the_peer():
    logits, target = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert_parity(*built("DC_and_BCE_loss", {}, {}), logits, 255 * (target > 0).float())


@pytest.mark.parametrize("name", ["weight_ce", "weight_dice"])
def test_a_weight_that_is_learnt_has_the_peers_gradient(name):
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 3, 4, 4, 4), torch.randint(0, 3, (2, 1, 4, 4, 4))
    regions = torch.randint(0, 2, (2, 3, 4, 4, 4))
    for kind, target in (("DC_and_CE_loss", labels), ("DC_and_BCE_loss", regions)):
        results = []
        for make in (getattr(ours, kind), THEIRS[kind]):
            learnt = torch.nn.Parameter(torch.tensor(0.7))
            dice = dict(batch_dice=True, smooth=1e-5, do_bg=True, ddp=False)
            dicts = (dice, {}) if kind == "DC_and_CE_loss" else ({}, dice)
            input = logits.clone().requires_grad_()
            value = make(*dicts, **{name: learnt})(input, target)
            value.backward()
            results.append((value.detach(), learnt.grad, input.grad))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
