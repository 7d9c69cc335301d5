"""head_confusion's Triton kernels: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.ops.head_confusion.cases import CHUNK_BYTES, check, check_types, head_tensors
from tests.ops.soft_confusion.cases import (
    ACTIVATIONS,
    SURE_AND_WRONG,
    ConfusionCase,
    check_gradient_of_sure,
    on_interpreter,
    partial_cases,
)
from voxfuse.contract import ConfusionOptions

triton = pytest.importorskip("triton", reason="the package triton is not installed")
from voxfuse.triton_kernels import launches  # noqa: E402
from voxfuse.triton_kernels.head_confusion import launch as kernels  # noqa: E402
from voxfuse.triton_kernels.soft_confusion.options import describe  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = torch.ops.voxfuse_triton
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OPTIONS = (2, 2, 0, None, 0.0)


def test_every_type_of_targets_and_masks_gives_the_same_bits():
    check_types(OPERATORS, DEVICE, step=3)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("classes", "channels"), [(1, 3), (2, 32), (3, 7), (17, 20), (117, 5), (30, 150)]
)
@pytest.mark.parametrize("full", [False, True])
def test_any_number_of_classes_and_features(classes, channels, dtype, full):
    case = ConfusionCase(
        batch=1 if classes > 17 else 2,
        classes=classes,
        spatial=(3, 5, 9),
        dtype=dtype,
        target_dtype=torch.uint8,
        weight=torch.float32 if full else None,
        activation="sigmoid" if classes == 1 else "softmax",
        full=full,
    )
    check(case, channels, OPERATORS, device=DEVICE, bias=not full)


@pytest.mark.parametrize(
    ("activation", "likelihood", "gamma"), list(itertools.product(ACTIVATIONS, ACTIVATIONS, [0, 2]))
)
@pytest.mark.parametrize("target", ["labels", "dense"])
def test_any_option(activation, likelihood, gamma, target):
    case = ConfusionCase(
        batch=1,
        spatial=(50,),
        target=target,
        target_dtype=torch.uint8 if target == "labels" else torch.float32,
        activation=activation,
        likelihood=likelihood,
        overlap="min" if target == "dense" else "product",
        gamma=float(gamma),
        full=True,
    )
    check(case, 6, OPERATORS, device=DEVICE)


class LogitsAsFeatures:
    """soft_confusion_backward as the gradient of the features of a head that hands them on."""

    @staticmethod
    def soft_confusion_backward(grad, logits, target, weight, *options):
        *options, focal_classes = options
        head = torch.eye(logits.shape[1], device=logits.device)
        gradient, _, _ = OPERATORS.head_confusion_backward(
            grad,
            logits,
            head,
            None,
            target,
            weight,
            *options,
            CHUNK_BYTES,
            True,
            False,
            focal_classes,
        )
        return gradient


@pytest.mark.parametrize(
    "name",
    [
        "3 classes, overlap cotangents",
        "8 classes, equal cotangents",
        "17 classes, overlap cotangents",
        "17 classes, likelihood too",
        "17 classes, full",
        "17 classes, overlap min",
        "4 classes, shares target, equal cotangents",
    ],
)
def test_the_gradient_of_the_sure_and_wrong(name):
    case, kind = SURE_AND_WRONG[name]
    case = on_interpreter(case) if DEVICE == "cpu" else case
    assert kernels.in_registers(torch.float32, *[case.classes] * 2, not case.full, True)
    check_gradient_of_sure(case, kind, LogitsAsFeatures, DEVICE)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("weight", [None, torch.bool])
def test_labels_with_softmax(gamma, weight):
    for focal_classes, full in ((None, False), (1, False), (1, True)):
        case = ConfusionCase(
            classes=5,
            spatial=(90,),
            gamma=gamma,
            focal_classes=focal_classes,
            ignore_index=3,
            weight=weight,
            full=full,
        )
        check(case, 6, OPERATORS, device=DEVICE)


# The interpreter's products are exact, whichever precision the shape is chosen for.
@pytest.mark.parametrize("precision", ["highest"] if DEVICE == "cuda" else ["highest", "high"])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("channels", [6, 70])
@pytest.mark.parametrize("classes", [3, 20, 70, 130])
def test_every_launch_shape(classes, channels, full, precision):
    """Of the forward pass, which multiplies some features at a time, and of the backward pass."""
    case = ConfusionCase(classes=classes, batch=1, spatial=(150,), gamma=0.5, full=full)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        check(case, channels, OPERATORS, device=DEVICE)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
def test_any_layout(layout):
    check(ConfusionCase(spatial=(4, 5, 6), layout=layout), 6, OPERATORS, device=DEVICE)


def test_chunks_and_slots(monkeypatch):
    """Small sizes make a small input take several chunks a slot and several slots."""
    monkeypatch.setattr(kernels, "CHUNK_VOXELS", 64)
    monkeypatch.setattr(kernels, "BACKWARD_CHUNK_VOXELS", 128)
    for chunk_bytes in (1, 1000, CHUNK_BYTES):
        case = ConfusionCase(spatial=(1000,), weight=torch.float32)
        check(case, 6, OPERATORS, chunk_bytes=chunk_bytes, device=DEVICE)


def test_large_heads_go_through_memory(monkeypatch):
    monkeypatch.setattr(kernels, "MOST_CLASSES", 16)
    check(ConfusionCase(classes=20, spatial=(60,)), 6, OPERATORS, chunk_bytes=3000, device=DEVICE)
    monkeypatch.setattr(kernels, "MOST_CLASSES", 256)
    monkeypatch.setattr(kernels, "MOST_NUMBERS", dict.fromkeys(kernels.MOST_NUMBERS, 1))
    check(ConfusionCase(classes=20, spatial=(60,)), 6, OPERATORS, chunk_bytes=3000, device=DEVICE)


@pytest.mark.parametrize("in_registers", [True, False])
def test_excluded_voxels_contribute_nothing_even_if_nan(in_registers, monkeypatch):
    if not in_registers:
        monkeypatch.setattr(kernels, "MOST_CLASSES", 0)
        monkeypatch.setattr(kernels, "MOST_BACKWARD_CLASSES", 0)
    case = ConfusionCase(spatial=(150,), target_dtype=torch.uint8)
    features, weight, bias, target, _ = (
        x if x is None else x.to(DEVICE) for x in head_tensors(case, 6)
    )
    keep = (torch.rand(2, 150) < 0.5).to(DEVICE)
    poisoned = features.masked_fill(~keep.unsqueeze(1), float("nan"))
    clean = features.masked_fill(~keep.unsqueeze(1), 0)
    grad = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE)
    outside = target.masked_fill(~keep, 77)  # on a GPU ignored, like every label without a class
    calls = [(target, keep)] + [(outside, None)] * (in_registers or DEVICE == "cuda")
    for labels, mask in calls:
        tail = (weight, bias, labels, mask, *OPTIONS)
        sums = OPERATORS.head_confusion(poisoned, *tail, False, CHUNK_BYTES)
        assert torch.equal(sums, OPERATORS.head_confusion(clean, *tail, False, CHUNK_BYTES))
        tail = (*tail, CHUNK_BYTES, True, True)
        actual = OPERATORS.head_confusion_backward(grad, poisoned, *tail)
        for a, b in zip(actual, OPERATORS.head_confusion_backward(grad, clean, *tail), strict=True):
            assert torch.equal(a, b)
        hidden = actual[0].masked_select(~keep.unsqueeze(1))
        assert torch.equal(hidden, torch.zeros_like(hidden))


@pytest.mark.parametrize("where", [0, 1, 2])
def test_nan_gives_nan(where):
    given = list(head_tensors(ConfusionCase(spatial=(70,)), 4, device=DEVICE))
    given[where].view(-1)[1] = float("nan")
    sums = OPERATORS.head_confusion(*given, *OPTIONS, False, CHUNK_BYTES)
    assert sums[0].isnan().any()


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_wanted_gradients_are_made(wanted):
    given = head_tensors(ConfusionCase(spatial=(70,)), 4, device=DEVICE)
    grad = torch.randn(2, 3, 4, dtype=torch.float64, device=DEVICE)
    all_of_them = OPERATORS.head_confusion_backward(grad, *given, *OPTIONS, CHUNK_BYTES, True, True)
    some = OPERATORS.head_confusion_backward(grad, *given, *OPTIONS, CHUNK_BYTES, *wanted)
    for i, needed in enumerate((wanted[0], wanted[1], wanted[1])):
        assert torch.equal(some[i], all_of_them[i]) if needed else some[i].numel() == 0


@pytest.mark.parametrize("setting", ["highest", "high", "medium", "ieee", "tf32"])
def test_tf32_only_where_torch_allows_it(setting):
    """By the setting of all backends, and by that of one, after which the other cannot be asked."""
    target = torch.empty(1, 64, dtype=torch.uint8)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        if setting in ("ieee", "tf32"):
            matmul.fp32_precision = setting
        else:
            torch.set_float32_matmul_precision(setting)
        for dtype in DTYPES[:3]:
            features = torch.empty(1, 32, 64, dtype=dtype)
            options = ConfusionOptions(*OPTIONS)
            problem = describe(features, 117, target, None, 4, False, options)
            chosen = kernels.plan(problem, 32, backward=False).head
            # Half types lose nothing in TF32, which holds their numbers.
            exact = dtype == torch.float32 and setting in ("highest", "ieee")
            assert ("ieee" if exact else "tf32") == chosen.PRECISION
    finally:
        torch.set_float32_matmul_precision("highest")
        matmul.fp32_precision = before


@pytest.mark.parametrize("bias", [False, True])
def test_more_samples_than_a_launch_takes(monkeypatch, bias):
    monkeypatch.setattr(launches, "MAX_SAMPLES", 2)
    for layout in ("contiguous", "channels_last"):
        for dtype in (torch.float32, torch.bfloat16):
            case = ConfusionCase(
                batch=5, spatial=(2, 3), weight=torch.float32, layout=layout, dtype=dtype
            )
            check(case, 6, OPERATORS, device=DEVICE, bias=bias)


def test_every_output_is_written(poisoned_memory):
    check(ConfusionCase(spatial=(3, 5, 7), weight=torch.bool), 3, OPERATORS, device=DEVICE)


def test_same_bits_in_every_run():
    given = head_tensors(ConfusionCase(classes=20, spatial=(700,)), 9, device=DEVICE)
    grad = torch.randn(2, 20, 4, dtype=torch.float64, device=DEVICE)

    def run():
        sums = OPERATORS.head_confusion(*given, *OPTIONS, False, CHUNK_BYTES)
        back = OPERATORS.head_confusion_backward(grad, *given, *OPTIONS, CHUNK_BYTES, True, True)
        return (sums, *back)

    first = run()
    for _ in range(20 if DEVICE == "cuda" else 1):
        assert all(torch.equal(a, b) for a, b in zip(run(), first, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (1, 3)])
def test_empty_and_tiny_shapes(shape):
    features = torch.randn(shape, device=DEVICE)
    head = (torch.randn(5, 3, device=DEVICE), torch.randn(5, device=DEVICE))
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=DEVICE)
    call = (features, *head, labels, None, *OPTIONS)
    sums = OPERATORS.head_confusion(*call, False, CHUNK_BYTES)
    assert sums.shape == (shape[0], 5, 4)
    gradients = OPERATORS.head_confusion_backward(
        torch.ones_like(sums), *call, CHUNK_BYTES, True, True
    )
    for gradient, tensor in zip(gradients, (features, *head), strict=True):
        assert gradient.shape == tensor.shape
        assert torch.isfinite(gradient).all()


@pytest.mark.skipif(DEVICE == "cuda", reason="the property is the wrapper's, not the device's")
def test_opcheck():
    features, weight, bias, *companions = head_tensors(ConfusionCase(spatial=(5, 2), batch=1), 4)
    head = [x.requires_grad_() for x in (features, weight, bias)]
    call = (*head, *companions, *OPTIONS, False, CHUNK_BYTES)
    torch.library.opcheck(OPERATORS.head_confusion.default, call)


@pytest.mark.parametrize("classes", [2, 16, 117, 256])
@pytest.mark.parametrize("channels", [1, 32, 64])
def test_the_workspace_is_bounded(classes, channels):
    for batch, voxels in ((1, 512**3), (2, 128**3), (7, 1)):
        each = classes * (channels + 1) * 8
        tiles, chunks, slots = kernels.reduction_shape(voxels, batch, 64, 4096, each, 24 << 20)
        assert slots * batch * each <= max(24 << 20, batch * each)
        assert tiles * 64 == 4096
        assert 1 <= slots <= chunks


def test_samples_in_which_classes_are_not_annotated():
    for case in partial_cases(seed=50, count=4, spatial=(3, 5, 9)):
        check(case, 7, OPERATORS, device=DEVICE, chunk_bytes=8192)
