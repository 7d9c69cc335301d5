"""segmentation-models-pytorch's losses and their replacements: same values, gradients, errors.

The package itself imports torchvision and timm, which do not load beside a PyTorch without CUDA.
Its losses need neither: a bare module in the package's place keeps its ``__init__`` from running.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pickle
import subprocess
import sys
import types

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from tests.integrations.parity import Passes, assert_compiles_for_any_size, assert_parity
from voxfuse.integrations import smp as ours

PACKAGE = "segmentation_models_pytorch"


def load_losses() -> types.ModuleType:
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None:
        pytest.skip(f"{PACKAGE} is not installed", allow_module_level=True)
    bare = types.ModuleType(PACKAGE)
    bare.__path__ = list(spec.submodule_search_locations or [])
    before = sys.modules.get(PACKAGE)
    sys.modules[PACKAGE] = bare
    try:
        return importlib.import_module(f"{PACKAGE}.losses")
    finally:
        if before is None:
            del sys.modules[PACKAGE]
        else:
            sys.modules[PACKAGE] = before


peer = load_losses()
SINCE_06 = "class_weights" in inspect.signature(peer.DiceLoss).parameters

flag = st.booleans()
MODES = ["binary", "multiclass", "multilabel"]
#: Messages of smp for what works here.
LENIENT = (
    "one_hot is only applicable to index",
    "view size is not compatible",
    "too many indices for tensor",  # of a multilabel focal loss with ignore_index, in smp 0.6
)


def test_the_adapter_is_that_of_the_installed_version():
    assert SINCE_06 == ours.SINCE_06


@st.composite
def problems(draw, soft=True, wrong=True, dtypes=(torch.float64, torch.float32)):
    """Mode, logits and a target of one of the kinds that the mode takes; seldom a misshapen one."""
    mode = draw(st.sampled_from(MODES))
    channels = 1 if mode == "binary" else draw(st.integers(1, 4))
    batch = draw(st.integers(1, 3))
    spatial = tuple(draw(st.lists(st.integers(1, 4), min_size=2, max_size=3)))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    logits = 2 * torch.randn((batch, channels, *spatial), generator=generator, dtype=dtype)
    if wrong and draw(st.integers(0, 9)) == 0:
        spatial = (*spatial[:-1], spatial[-1] + 1)
    if mode == "multiclass":
        most = draw(st.integers(1, channels))
        target = torch.randint(0, most, (batch, *spatial), generator=generator)
        return mode, logits, target
    with_channel = mode == "multilabel" or draw(flag)
    shape = (batch, channels, *spatial) if with_channel else (batch, *spatial)
    target = torch.rand(shape, generator=generator, dtype=dtype)
    kinds = [torch.int64, torch.uint8, torch.float32, *([None] if soft else [])]
    kind = draw(st.sampled_from(kinds))
    if kind is not None:
        target = (target > draw(st.sampled_from([0.5, 2.0]))).to(kind)
    return mode, logits, target


def with_ignored(target: Tensor, ignore_index: int | None) -> Tensor:
    """Put the ignored value into every third voxel, or leave the target without it."""
    if ignore_index is None or (ignore_index < 0 and target.dtype == torch.uint8):
        return target
    target = target.clone()
    target.view(-1)[::3] = ignore_index
    return target


def check(name, options, logits, target) -> None:
    assert_parity(
        lambda: getattr(ours, name)(**options),
        lambda: getattr(peer, name)(**options),
        logits,
        target,
        dtype=logits.dtype,
        lenient=LENIENT,
    )


def subsets(channels: int):
    several = st.lists(st.integers(-1, channels - 1), min_size=1, max_size=4)
    as_array = several.map(np.array)
    return st.one_of(st.none(), several, several.map(tuple), as_array)


def weightings(channels: int):
    """The option ``class_weights``, where smp has it."""
    one = st.sampled_from([0.25, 0.5, 1.0, 3.0])
    several = st.lists(one, min_size=channels, max_size=channels)
    some = several.map(lambda weights: {"class_weights": weights})
    return st.one_of(st.just({}), some) if SINCE_06 else st.just({})


@given(problem=problems(), data=st.data())
@settings(max_examples=150)
def test_overlap_losses(problem, data):
    mode, logits, target = problem
    name = data.draw(st.sampled_from(["TverskyLoss", "DiceLoss", "JaccardLoss"]))
    options = {
        "mode": mode,
        "log_loss": data.draw(flag),
        "from_logits": data.draw(st.sampled_from([True, True, False])),
        "smooth": data.draw(st.sampled_from([0.0, 1e-3, 1.0])),
        "eps": data.draw(st.sampled_from([1e-7, 1e-3, 2.0])),
    }
    if name != "JaccardLoss" or SINCE_06:
        options["ignore_index"] = data.draw(st.sampled_from([None, None, 0, 1, 255, -1]))
    if name == "TverskyLoss":
        options["alpha"] = data.draw(st.sampled_from([0.3, 0.5, 1.0]))
        options["beta"] = data.draw(st.sampled_from([0.7, 0.5, 0.0]))
        options["gamma"] = data.draw(st.sampled_from([1.0, 0.75, 2.0]))
    if mode != "binary":
        options["classes"] = data.draw(subsets(logits.shape[1]))
        options |= data.draw(weightings(logits.shape[1]))
    if not options["from_logits"]:
        logits = logits.sigmoid()
    check(name, options, logits, with_ignored(target, options.get("ignore_index")))


@given(problem=problems(), data=st.data())
@settings(max_examples=120)
def test_focal(problem, data):
    mode, logits, target = problem
    options = {
        "mode": mode,
        "alpha": data.draw(st.sampled_from([None, 0.25, 1.0])),
        "gamma": data.draw(st.sampled_from([0.0, 1.0, 2.0, 2.5])),
        "ignore_index": data.draw(st.sampled_from([None, None, 0, 1, 255])),
        "reduction": data.draw(st.sampled_from(["mean", "mean", "sum", "batchwise_mean", "none"])),
        "normalized": data.draw(st.sampled_from([False, False, True])),
        "reduced_threshold": data.draw(st.sampled_from([None, None, 0.5])),
    }
    if SINCE_06:
        options["from_logits"] = data.draw(st.sampled_from([True, True, False]))
        options["eps"] = data.draw(st.sampled_from([1e-7, 1e-2]))
        if not options["from_logits"]:
            logits = logits.sigmoid()
        if mode != "binary" and options["reduction"] in ("mean", "sum"):
            options |= data.draw(weightings(logits.shape[1]))
    check("FocalLoss", options, logits, with_ignored(target, options["ignore_index"]))


# smp's Lovász losses fail for float64 logits.
@given(problem=problems(soft=False, wrong=False, dtypes=[torch.float32]), data=st.data())
@settings(max_examples=100)
def test_lovasz(problem, data):
    mode, logits, target = problem
    options = {
        "mode": mode,
        "per_image": data.draw(flag),
        "ignore_index": data.draw(st.sampled_from([None, None, 0, 255])),
    }
    target = with_ignored(target, options["ignore_index"])
    if options["ignore_index"] is not None:
        kept = (target != options["ignore_index"]).flatten(1).any(1)
        if not kept.all():
            return  # smp has no loss of an image without a voxel
    if mode == "multiclass" and logits.shape[1] == 1:
        return  # smp raises for one class, and only where it is there
    check("LovaszLoss", options, logits, target)


# --- Errors, constructors, modules ---------------------------------------------------------------


@pytest.mark.parametrize("name", ours.__all__)
def test_constructor_is_the_peers(name):
    def plain(cls):
        return [(p.name, p.kind, p.default) for p in inspect.signature(cls).parameters.values()]

    assert plain(getattr(ours, name)) == plain(getattr(peer, name))


@pytest.mark.parametrize("name", ours.__all__)
def test_unknown_modes_are_an_assertion_error(name):
    for library in (ours, peer):
        with pytest.raises(AssertionError):
            getattr(library, name)("regression")


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "JaccardLoss"])
def test_classes_of_a_binary_loss_and_wrong_batches_are_assertion_errors(name):
    logits, target = torch.randn(2, 1, 4, 4), torch.zeros(3, 4, 4)
    check(name, {"mode": "binary", "classes": [0]}, logits, target)
    check(name, {"mode": "binary"}, logits, target)
    check(
        name, {"mode": "multiclass", "classes": [3]}, logits.expand(2, 2, 4, 4), target[:2].long()
    )


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "JaccardLoss"])
@pytest.mark.parametrize("channels", [1, 3])
def test_labels_without_a_class_are_an_error_as_in_the_peer(name, channels):
    logits, labels = torch.randn(1, channels, 4, 4), torch.full((1, 4, 4), channels)
    for library in (ours, peer):
        with pytest.raises(RuntimeError):
            getattr(library, name)("multiclass")(logits, labels)


def test_labels_without_a_class_are_of_no_class_to_the_focal_loss():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(-1, 5, (2, 4, 4))
    for options in ({}, {"ignore_index": -1}, {"reduction": "sum", "alpha": 0.25}):
        check("FocalLoss", {"mode": "multiclass", **options}, logits, labels)


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "JaccardLoss"])
def test_a_batch_without_spatial_axes(name):
    check(name, {"mode": "multiclass"}, torch.randn(5, 3), torch.randint(0, 3, (5,)))
    check(name, {"mode": "multilabel"}, torch.randn(5, 3), torch.randint(0, 2, (5, 3)))


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "FocalLoss", "LovaszLoss"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("index", [np.int64(1), 1.0, -1, 255])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_any_number_may_be_the_ignored_label(name, mode, index, dtype):
    """Compared in the labels' own type, in which -1 is 255 to a byte."""
    shape = (2, 1 if mode == "binary" else 3, 4, 4)
    labels = torch.randint(0, 3 if mode == "multiclass" else 2, shape)
    labels[..., 0] = int(index)
    if mode == "multiclass":
        labels = labels[:, 0].contiguous()
    if dtype == torch.uint8 and mode == "multiclass" and name in ("TverskyLoss", "DiceLoss"):
        dtype = torch.int64  # smp's one-hot takes no other
    check(name, {"mode": mode, "ignore_index": index}, torch.randn(shape), labels.to(dtype))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.float64, torch.bfloat16])
def test_lovasz_reads_labels_of_any_dtype(dtype):
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    check("LovaszLoss", {"mode": "multiclass"}, logits, labels.to(dtype))
    check("LovaszLoss", {"mode": "binary"}, logits[:, :1], (labels > 1).to(dtype))


@pytest.mark.parametrize("name", ours.__all__)
def test_no_state_and_pickles(name):
    loss = getattr(ours, name)("multiclass")
    assert loss.state_dict() == {}
    loss.load_state_dict(getattr(peer, name)("multiclass").state_dict(), strict=True)
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    assert torch.equal(pickle.loads(pickle.dumps(loss))(logits, labels), loss(logits, labels))


def test_imports_without_smp():
    code = (
        f"import sys; sys.modules['{PACKAGE}'] = None\n"
        "import voxfuse.integrations.smp as m, torch\n"
        "print(float(m.DiceLoss('binary')(torch.zeros(1, 1, 4, 4), torch.ones(1, 4, 4))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(1 / 3)


# --- One pass, and where smp is wrong ------------------------------------------------------------


@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "FocalLoss"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ignore_index", [None, 255])
def test_the_batch_is_read_once_and_as_it_is(name, mode, ignore_index):
    channels = 1 if mode == "binary" else 3
    logits = torch.randn(2, channels, 40, 40)
    target = torch.randint(0, channels if mode == "multiclass" else 2, (2, channels, 40, 40))
    if mode != "multilabel":
        target = target[:, 0].contiguous()
    loss = getattr(ours, name)(mode, ignore_index=ignore_index)
    with Passes() as passes:
        loss(logits, target)
    if SINCE_06 and (name, mode, ignore_index) == ("FocalLoss", "multilabel", 255):
        # Each class has voxels of its own that are ignored, and is read by itself.
        for c, (input, read) in enumerate(passes.seen):
            assert input.data_ptr() == logits[:, c].data_ptr()
            assert read.data_ptr() == target[:, c].data_ptr()
        assert len(passes.seen) == channels
        assert passes.volumes == 0
        return
    ((input, read),) = passes.seen
    assert input.data_ptr() == logits.data_ptr()
    if not (name == "FocalLoss" and mode == "multilabel"):
        assert read.data_ptr() == target.data_ptr()
        assert passes.volumes == 0


since_06 = pytest.mark.skipif(not SINCE_06, reason="smp 0.6 has these options")


@since_06
@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"class_weights": [0.5, 0.0, 2.0]}])
@pytest.mark.parametrize("soft", [False, True])
def test_every_class_of_a_multilabel_focal_loss_ignores_its_own_voxels(options, soft):
    """smp 0.6: IndexError, as the mask has the classes' axis and what it is to choose from not."""
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    target = torch.rand(2, 3, 4, 5, dtype=torch.float64)
    target = target if soft else (target > 0.5).double()
    target[:, 0, :2] = 255
    target[1, 2] = 255
    single = {k: v for k, v in options.items() if k != "class_weights"}
    means = [
        peer.FocalLoss("binary", alpha=0.3, ignore_index=255, **single)(logits[:, c], target[:, c])
        for c in range(3)
    ]
    weights = torch.tensor(options.get("class_weights", [1.0] * 3))
    expected = (torch.stack(means) * weights).sum() / weights.sum()
    loss = ours.FocalLoss("multilabel", alpha=0.3, ignore_index=255, **options)
    torch.testing.assert_close(loss(logits, target), expected)


@since_06
@pytest.mark.parametrize("name", ["TverskyLoss", "DiceLoss", "JaccardLoss", "FocalLoss"])
def test_class_weights_that_do_not_fit_are_an_error(name):
    make, logits = getattr(ours, name), torch.zeros(1, 3, 4, 4)
    labels = torch.zeros(1, 4, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="class_weights are not supported with mode=binary"):
        make("binary", class_weights=[1.0])
    with pytest.raises(ValueError, match=r"class_weights: got shape \(2,\), expected \(3,\)"):
        make("multiclass", class_weights=[1.0, 2.0])(logits, labels)
    with pytest.raises(ValueError, match="class_weights: those of the classes add up to 0"):
        make("multiclass", class_weights=[0.0, 0.0, 0.0])(logits, labels)


@since_06
def test_probabilities_in_half_precision_have_a_finite_focal_loss():
    target = torch.tensor([[[[0.0, 1.0]]]])
    p = torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float16)
    loss = ours.FocalLoss("binary", from_logits=False)
    torch.testing.assert_close(loss(p, target), loss(p.float(), target))
    assert torch.isfinite(loss(p, target))


def test_a_perfect_prediction_has_a_finite_gradient_for_any_gamma():
    """smp: the slope of x ** 0.5 at 0 is infinite."""
    target = torch.ones(1, 1, 4, 4)
    p = target.clone().requires_grad_()
    ours.TverskyLoss("binary", from_logits=False, gamma=0.5)(p, target).backward()
    assert torch.isfinite(p.grad).all()


def test_labels_of_any_dtype_are_read():
    logits, labels = torch.randn(2, 3, 4, 4), torch.randint(0, 3, (2, 4, 4))
    loss = ours.DiceLoss("multiclass")
    for dtype in (torch.uint8, torch.int16, torch.int32, torch.float32):
        assert torch.equal(loss(logits, labels.to(dtype)), loss(logits, labels))


@pytest.mark.parametrize("name", ours.__all__)
@pytest.mark.parametrize("mode", MODES)
def test_compiles_for_any_size(name, mode):
    channels = 1 if mode == "binary" else 3

    def batch(samples, extent):
        shape = (samples, extent, extent + 1)
        logits = torch.randn(samples, channels, *shape[1:])
        if mode == "multiclass":
            return logits, torch.randint(0, 3, shape)
        return logits, torch.randint(0, 2, logits.shape, dtype=torch.uint8)

    assert_compiles_for_any_size(getattr(ours, name)(mode), batch)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", ["DiceLoss", "LovaszLoss"])
def test_a_label_that_is_no_integer_is_an_error_in_every_dtype(name, dtype):
    target = torch.ones(1, 3, 3, dtype=dtype)
    target[0, 1, 2] = 1.5
    loss = getattr(ours, name)("multiclass")
    with pytest.raises(ValueError, match=r"label 1.5 is no integer, first at target\[0, "):
        loss(torch.zeros(1, 3, 3, 3), target)


@pytest.mark.parametrize("name", ["DiceLoss", "JaccardLoss", "FocalLoss"])
def test_a_target_of_any_numbers_is_what_it_is_to_the_peer(name):
    logits, target = torch.randn(2, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    check(name, {"mode": "multilabel"}, logits, 255 * (target > 0).float())


def test_numbers_that_are_learnt_have_the_peers_gradient_or_are_an_error():
    with pytest.raises(ValueError, match="alpha: requires grad, but no gradient flows to it"):
        ours.TverskyLoss("binary", alpha=torch.nn.Parameter(torch.tensor(0.3)))
    logits, target = torch.linspace(-2, 3, 12).reshape(1, 1, 12), torch.arange(12)[None, None] % 2
    gradients = []
    for module in (ours, peer):
        learnt = torch.nn.Parameter(torch.tensor(0.3))
        module.FocalLoss("binary", alpha=learnt)(logits, target).backward()
        gradients.append(learnt.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=0)
