"""soft_confusion's Triton kernels: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from tests.ops.soft_confusion.cases import (
    ACTIVATIONS,
    SURE_AND_WRONG,
    ConfusionCase,
    certain_probabilities,
    check,
    check_gradient_of_sure,
    on_interpreter,
    partial_cases,
    schema_arguments,
    tensors,
)
from voxfuse.contract import Activation
from voxfuse.reference import soft_confusion as reference

triton = pytest.importorskip("triton", reason="the package triton is not installed")
from voxfuse.triton_kernels import launches  # noqa: E402
from voxfuse.triton_kernels.soft_confusion import launch as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = torch.ops.voxfuse_triton
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
LABEL_TYPES = (
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.float32,
)
DENSE_TYPES = (
    torch.bool,
    torch.uint8,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


@pytest.fixture
def tiny_blocks(monkeypatch):
    """Shrink every size that decides between paths, so that small inputs take all of them."""
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", 2048)
    monkeypatch.setattr(kernels, "ONLINE_WORKSPACE_BYTES", 8192)
    monkeypatch.setattr(kernels, "RESIDENT_CLASSES", 16)
    monkeypatch.setattr(kernels, "FEW_CLASSES", 8)
    monkeypatch.setattr(kernels, "CLASS_BLOCK", 8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [1, 2, 3, 5, 17])
@pytest.mark.parametrize("full", [False, True])
def test_class_paths(classes, dtype, full):
    case = ConfusionCase(
        batch=1 if classes > 5 else 2,
        classes=classes,
        spatial=(3, 5, 9),
        dtype=dtype,
        target_dtype=torch.uint8,
        weight=torch.float32 if full else None,
        activation="sigmoid" if classes == 1 else "softmax",
        full=full,
    )
    check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("target_dtype", LABEL_TYPES)
def test_label_types(target_dtype):
    target = "labels_channel" if target_dtype == torch.int32 else "labels"
    classes = 2 if target_dtype == torch.bool else 3
    case = ConfusionCase(classes=classes, spatial=(7,), target=target, target_dtype=target_dtype)
    if target_dtype == torch.bool:
        input, labels, _ = tensors(ConfusionCase(classes=2, spatial=(7,), target_dtype=torch.uint8))
        arguments = (None, *schema_arguments(case), False)
        expected = OPERATORS.soft_confusion(input.to(DEVICE), labels.to(DEVICE), *arguments)
        actual = OPERATORS.soft_confusion(input.to(DEVICE), labels.bool().to(DEVICE), *arguments)
        assert torch.equal(actual, expected)
    else:
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("ignore_index", [255, -1, 1])
@pytest.mark.parametrize("classes", [2, 3])
def test_ignored_labels(ignore_index, classes):
    target_dtype = torch.int16 if ignore_index < 0 else torch.uint8
    check(
        ConfusionCase(
            classes=classes, spatial=(33,), target_dtype=target_dtype, ignore_index=ignore_index
        ),
        OPERATORS,
        DEVICE,
    )


@pytest.mark.parametrize("target_dtype", DENSE_TYPES)
@pytest.mark.parametrize("classes", [1, 3])
def test_dense_target_types(target_dtype, classes):
    case = ConfusionCase(
        batch=1,
        classes=classes,
        spatial=(29,),
        target="dense",
        target_dtype=target_dtype,
        activation="sigmoid" if classes == 1 else "softmax",
        full=True,
    )
    check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("target_dtype", LABEL_TYPES[1:5])
def test_integer_indicator_of_one_class(target_dtype):
    case = ConfusionCase(
        classes=1, spatial=(31,), target_dtype=target_dtype, activation="sigmoid", ignore_index=9
    )
    check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize(
    ("activation", "likelihood"), list(itertools.product(ACTIVATIONS, ACTIVATIONS))
)
@pytest.mark.parametrize("target", ["labels", "dense"])
def test_activation_pairs(activation, likelihood, target):
    case = ConfusionCase(
        batch=1,
        spatial=(50,),
        target=target,
        target_dtype=torch.uint8 if target == "labels" else torch.float32,
        activation=activation,
        likelihood=likelihood,
        overlap="min" if target == "dense" else "product",
        gamma=2.0,
        full=True,
    )
    check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize(
    ("gamma", "classes"),
    [(0.5, 1), (0.5, 2), (0.5, 4), (0.5, 17), (1.0, 1), (1.0, 3), (2.0, 2), (2.0, 17), (3.0, 3)],
)
def test_focal_modulation(gamma, classes):
    for full in (False, True):
        case = ConfusionCase(
            batch=1,
            classes=classes,
            spatial=(40,),
            target_dtype=torch.uint8,
            activation="sigmoid" if classes == 1 else "softmax",
            gamma=gamma,
            full=full,
        )
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("classes", [2, 4, 17, 70])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_gamma_of_some_classes(activation, classes):
    for full, focal_classes in ((False, 1), (True, 1), (False, 0), (True, classes)):
        case = ConfusionCase(
            batch=1,
            classes=classes,
            spatial=(40,),
            target_dtype=torch.uint8,
            activation=activation,
            gamma=1.5,
            focal_classes=focal_classes,
            full=full,
        )
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_certain_probabilities_have_the_slope_of_the_overlap_alone(gamma):
    certain_probabilities(OPERATORS, gamma, DEVICE)


def test_gamma_keeps_its_float64_digits():
    check(ConfusionCase(spatial=(20,), dtype=torch.float64, gamma=0.3), OPERATORS, DEVICE)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize(("classes", "dtype"), [(2, "bfloat16"), (3, "float32"), (17, "float64")])
def test_layouts_are_read_in_place_and_the_gradient_keeps_them(layout, classes, dtype):
    for target in ("labels", "dense"):
        case = ConfusionCase(
            classes=classes,
            layout=layout,
            dtype=getattr(torch, dtype),
            target=target,
            target_dtype=torch.uint8,
            weight=torch.bool,
        )
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("full", [False, True])
def test_many_classes_are_read_block_by_block(tiny_blocks, full):
    for activation, likelihood, target in (
        ("softmax", None, "labels"),
        ("softmax", "sigmoid", "dense"),
        ("sigmoid", None, "labels"),
    ):
        case = ConfusionCase(
            batch=2,
            classes=21,
            spatial=(90,),
            target=target,
            target_dtype=torch.uint8,
            activation=activation,
            likelihood=likelihood,
            weight=torch.float32,
            gamma=0.5 if full else 0.0,
            full=full,
        )
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("classes", [9, 16, 33, 70])
def test_class_counts_between_powers_of_two(classes):
    case = ConfusionCase(batch=1, classes=classes, spatial=(19,), target_dtype=torch.uint8)
    check(case, OPERATORS, DEVICE)


def test_more_classes_than_registers_hold():
    check(
        ConfusionCase(batch=1, classes=261, spatial=(9,), target_dtype=torch.int16),
        OPERATORS,
        DEVICE,
    )


def test_larger_volume_is_summed_in_chunks_and_slots(monkeypatch):
    monkeypatch.setattr(kernels, "MAX_SLOTS", 3)
    case = ConfusionCase(batch=2, classes=2, spatial=(13, 17, 9), target_dtype=torch.uint8)
    check(case, OPERATORS, DEVICE)
    monkeypatch.setattr(kernels, "MAX_TILES", 1)
    check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize(
    ("classes", "full"), [(2, False), (3, False), (3, True), (20, False), (21, True)]
)
def test_excluded_voxels_contribute_nothing_even_if_nan(classes, full, request):
    if classes == 21:
        request.getfixturevalue("tiny_blocks")
    case = ConfusionCase(classes=classes, spatial=(20,), target_dtype=torch.int64)
    input, target, _ = (None if x is None else x.to(DEVICE) for x in tensors(case))
    keep = (torch.rand(2, 20) < 0.5).to(DEVICE)
    poisoned = input.masked_fill(~keep.unsqueeze(1), float("nan"))
    clean = input.masked_fill(~keep.unsqueeze(1), 0.5)
    arguments = schema_arguments(case)
    expected = OPERATORS.soft_confusion(clean, target, keep, *arguments, full)
    assert torch.equal(OPERATORS.soft_confusion(poisoned, target, keep, *arguments, full), expected)
    # Out of range in every way that an index can be, and as the ignored label.
    for wrong, ignore_index in ((-1, None), (classes, None), (2**32 + 1, None), (77, 77)):
        marked = target.masked_fill(~keep, wrong)
        options = (*arguments[:3], ignore_index, 0.0)
        actual = OPERATORS.soft_confusion(poisoned, marked, None, *options, full)
        without = OPERATORS.soft_confusion(clean, marked, None, *options, full)
        assert torch.equal(actual, without)
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
        grad = torch.randn(2, classes, 8 if full else 4, dtype=torch.float64, device=DEVICE)
        gradient = OPERATORS.soft_confusion_backward(grad, poisoned, marked, None, *options)
        hidden = ~keep.unsqueeze(1).expand_as(gradient)
        assert torch.equal(gradient[hidden], torch.zeros_like(gradient[hidden]))
        assert not gradient.isnan().any()


def test_integer_indicator_other_than_0_and_1_is_excluded():
    input = torch.randn(1, 1, 6, device=DEVICE)
    target = torch.tensor([[[0, 1, 2, 255, 1, 0]]], dtype=torch.uint8, device=DEVICE)
    options = (1, 1, 0, None, 0.0)
    keep = torch.tensor([[1, 1, 0, 0, 1, 1]], dtype=torch.bool, device=DEVICE)
    actual = OPERATORS.soft_confusion(input, target, None, *options, True)
    expected = OPERATORS.soft_confusion(input, target.clamp(max=1), keep, *options, True)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 20])
def test_float_labels_that_are_not_whole_are_ignored(classes, dtype):
    logits = torch.randn(1, classes, 8, device=DEVICE)
    wrong = [0.5, -0.25, 1 - 2**-11, math.nan, math.inf, -math.inf]
    labels = torch.tensor([[1.0, -0.0, *wrong]], dtype=dtype, device=DEVICE)
    keep = torch.tensor([[True] * 2 + [False] * 6], device=DEVICE)
    options = (2, 2, 0, None, 0.0)
    actual = OPERATORS.soft_confusion(logits, labels, None, *options, True)
    whole = torch.tensor([[1, 0] + [1] * 6], device=DEVICE)
    expected = OPERATORS.soft_confusion(logits, whole, keep, *options, True)
    assert torch.equal(actual, expected)
    grad = torch.randn(1, classes, 4, dtype=torch.float64, device=DEVICE)
    gradient = OPERATORS.soft_confusion_backward(grad, logits, labels, None, *options)
    assert torch.count_nonzero(gradient[..., 2:]) == 0
    assert gradient[..., :2].count_nonzero() == 2 * classes


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("target", ["labels", "dense"])
def test_overlap_min_of_a_probability_that_rounds_to_1(activation, target):
    """Softmax and sigmoid of 18.7 miss 1 by 7.6e-9, a tenth of what float32 can tell from it."""
    logits = torch.tensor([[18.7, 0.0, -1.0]]).reshape(1, 3, 1)
    labels = torch.zeros(1, 1, dtype=torch.int64)
    if target == "dense":
        labels = torch.nn.functional.one_hot(labels, 3).movedim(-1, 1).float()
    code = Activation[activation]
    arguments = (logits.to(DEVICE), labels.to(DEVICE), None, code, code, 1, None, 0.0)
    wide = (logits.double(), labels, None, code, code, 1, None, 0.0)
    actual = OPERATORS.soft_confusion(*arguments, False).cpu()
    truth = reference.soft_confusion(*wide, False)
    torch.testing.assert_close(actual, truth, rtol=1e-5, atol=0)
    grad = torch.tensor([1.0, -0.5, 0.25, 0.0], dtype=torch.float64).expand(1, 3, 4).contiguous()
    actual = OPERATORS.soft_confusion_backward(grad.to(DEVICE), *arguments).cpu()
    truth = reference.soft_confusion_backward(grad, *wide)
    torch.testing.assert_close(actual.double(), truth, rtol=1e-5, atol=0)


@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("code", [1, 2])
def test_nan_logits_give_nan(classes, code):
    input, target, _ = tensors(ConfusionCase(classes=classes, spatial=(30,)))
    for c in (0, classes - 1):
        broken = input.clone()
        broken[0, c, 3] = float("nan")
        arguments = (target.to(DEVICE), None, code, code, 0, None, 0.0)
        sums = OPERATORS.soft_confusion(broken.to(DEVICE), *arguments, False)
        assert sums[0].isnan().any(), f"a NaN in class {c} vanished"
        assert not sums[1].isnan().any()
        grad = torch.ones(2, classes, 4, dtype=torch.float64, device=DEVICE)
        gradient = OPERATORS.soft_confusion_backward(grad, broken.to(DEVICE), *arguments)
        assert gradient[0, c, 3].isnan()
        assert not gradient[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 18])
def test_infinite_logits_are_limits(dtype, classes):
    logits = torch.zeros(1, classes, 4, dtype=dtype, device=DEVICE)
    logits[0, 1, 0] = float("inf")
    logits[0, 0, 1] = float("-inf")
    logits[0, 1, 2] = 1e4
    logits[0, :, 3] = float("-inf")
    labels = torch.tensor([[1, 1, 1, 1]], device=DEVICE)
    arguments = (labels, None, 2, 2, 0, None, 0.0)
    sums = OPERATORS.soft_confusion(logits, *arguments, False)
    assert sums[0, 1, 0].item() == pytest.approx(2 + 1 / (classes - 1) + 1 / classes, rel=1e-6)
    assert torch.isfinite(sums).all()
    grad = torch.ones(1, classes, 4, dtype=torch.float64, device=DEVICE)
    assert torch.isfinite(OPERATORS.soft_confusion_backward(grad, logits, *arguments)).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("sums", [4, 8])
def test_nearly_perfect_predictions_keep_their_relative_accuracy(gamma, classes, sums):
    """FN and NLL of a logit gap of 30 are about 1e-13: differences from 1 would give 0 or NaN."""
    logits = torch.zeros(1, classes, 10)
    logits[:, 0] = 30.0
    labels = torch.zeros(1, 10, dtype=torch.uint8)
    options = (2, 2, 0, None, gamma)
    actual = OPERATORS.soft_confusion(
        logits.to(DEVICE), labels.to(DEVICE), None, *options, sums == 8
    ).cpu()
    truth = reference.soft_confusion(logits.double(), labels, None, *options, sums == 8)
    torch.testing.assert_close(actual[:, 0], truth[:, 0], rtol=1e-4, atol=0)
    grad = torch.arange(1.0, classes * sums + 1, dtype=torch.float64).reshape(1, classes, sums)
    gradient = OPERATORS.soft_confusion_backward(
        grad.to(DEVICE), logits.to(DEVICE), labels.to(DEVICE), None, *options
    ).cpu()
    truth = reference.soft_confusion_backward(grad, logits.double(), labels, None, *options)
    if sums == 4:
        torch.testing.assert_close(gradient[:, 1:].double(), truth[:, 1:], rtol=1e-4, atol=0)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("target_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_soft_indicator_is_not_ignored_for_its_integer_part(dtype, target_dtype):
    target = torch.tensor([[0, 0.5, 1.5]], dtype=target_dtype, device=DEVICE)
    logits = torch.zeros(1, 1, 3, dtype=dtype, device=DEVICE)
    sums = OPERATORS.soft_confusion(logits, target, None, 1, 1, 0, 0, 0.0, False)
    expected = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)  # p = 1/2, of g = 1/2 and 3/2
    torch.testing.assert_close(sums[0, 0, :3].cpu(), expected)


@pytest.mark.parametrize("name", SURE_AND_WRONG)
def test_the_gradient_of_the_sure_and_wrong(name):
    case, kind = SURE_AND_WRONG[name]
    case = on_interpreter(case) if DEVICE == "cpu" else case
    check_gradient_of_sure(case, kind, OPERATORS, DEVICE)


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 3, 0), (1, 2), (3, 4, 1, 1), (2, 1)])
def test_empty_and_tiny_shapes(shape):
    logits = torch.randn(shape, device=DEVICE)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64, device=DEVICE)
    arguments = (labels, None, 2, 2, 0, None, 0.0)
    sums = OPERATORS.soft_confusion(logits, *arguments, False)
    expected = torch.zeros_like(sums)
    if logits.numel() > 0:
        expected = reference.soft_confusion(logits, *arguments, False)
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    gradient = OPERATORS.soft_confusion_backward(torch.ones_like(sums), logits, *arguments)
    assert gradient.shape == logits.shape


def test_every_output_is_written(poisoned_memory):
    for case in (
        ConfusionCase(spatial=(3, 5, 7), weight=torch.bool),
        ConfusionCase(classes=2, spatial=(1,), layout="channels_last"),
        ConfusionCase(classes=33, spatial=(129,), dtype=torch.float16),
    ):
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("classes", [2, 3, 20])
def test_same_bits_in_every_run(classes):
    case = ConfusionCase(classes=classes, spatial=(300,), weight=torch.float32)
    input, target, weight = (x.to(DEVICE) for x in tensors(case))
    arguments = (input, target, weight, *schema_arguments(case))
    grad = torch.randn(2, classes, 4, dtype=torch.float64, device=DEVICE)
    sums = OPERATORS.soft_confusion(*arguments, False)
    gradient = OPERATORS.soft_confusion_backward(grad, *arguments)
    for _ in range(20 if DEVICE == "cuda" else 1):
        assert torch.equal(OPERATORS.soft_confusion(*arguments, False), sums)
        assert torch.equal(OPERATORS.soft_confusion_backward(grad, *arguments), gradient)


@pytest.mark.parametrize("layout", ["contiguous", "sliced"])
@pytest.mark.skipif(DEVICE == "cuda", reason="the property is the wrapper's, not the device's")
def test_opcheck(layout):
    case = ConfusionCase(layout=layout, spatial=(5, 2), batch=1)
    input, target, weight = tensors(case)
    arguments = (target, weight, *schema_arguments(case))
    torch.library.opcheck(
        OPERATORS.soft_confusion.default, (input.requires_grad_(), *arguments, False)
    )
    grad = torch.randn(1, case.classes, 4, dtype=torch.float64)
    torch.library.opcheck(
        OPERATORS.soft_confusion_backward.default, (grad, input.detach(), *arguments)
    )


@pytest.mark.parametrize("classes", [1, 2, 3, 16, 17, 117, 256, 300])
@pytest.mark.parametrize("sums", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_workspace_is_bounded_and_every_chunk_has_one_slot(classes, sums, dtype):
    for batch, voxels in ((1, 512**3), (2, 96**3), (1, 1024**3), (7, 1)):
        problem = kernels.Problem(
            dtype, batch, classes, voxels, 0, 2, 2, 0, False, False, 0.0, sums, True
        )
        chosen = kernels.plan(problem, backward=False)
        block = chosen.options.BLOCK
        tiles_a_chunk, chunks, slots = kernels.reduction_shape(problem, chosen)
        online = chosen.kernel is kernels.forward_online
        assert not online or classes > (4 if dtype == torch.float64 else 96 if sums == 8 else 256)
        limit = 1 << (23 if online else 20)
        assert slots * batch * classes * sums * 8 <= limit
        assert chunks == math.ceil(voxels / (tiles_a_chunk * block))
        assert 1 <= slots <= chunks


def test_more_samples_than_a_launch_takes(monkeypatch):
    monkeypatch.setattr(launches, "MAX_SAMPLES", 2)
    for layout in ("contiguous", "channels_last"):
        case = ConfusionCase(batch=5, spatial=(2, 3), weight=torch.float32, layout=layout)
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_head_confusion_reduces_its_chunks_with_these_kernels(activation):
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 5, 4, 3, generator=generator)
    head, bias = torch.randn(3, 5, generator=generator), torch.randn(3, generator=generator)
    target = torch.randint(0, 3, (2, 4, 3), generator=generator)
    code = Activation[activation]
    arguments = (features, head, bias, target)
    options = (None, code, code, 0, None, 0.0)
    grad = torch.randn(2, 3, 4, dtype=torch.float64, generator=generator)
    on_device = [x.to(DEVICE) for x in arguments]
    chunk_bytes = 5 * 8 * 4
    sums = OPERATORS.head_confusion(*on_device, *options, False, chunk_bytes)
    expected = torch.ops.voxfuse_reference.head_confusion(*arguments, *options, False, chunk_bytes)
    torch.testing.assert_close(sums.cpu(), expected, rtol=1e-5, atol=1e-6)
    more = (*options, chunk_bytes, True, True)
    actual = OPERATORS.head_confusion_backward(grad.to(DEVICE), *on_device, *more)
    truth = torch.ops.voxfuse_reference.head_confusion_backward(grad, *arguments, *more)
    for a, b in zip(actual, truth, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_replays_the_same_bits():
    case = ConfusionCase(classes=3, spatial=(40, 40, 40), target_dtype=torch.uint8)
    input, target, _ = (None if x is None else x.cuda() for x in tensors(case))
    arguments = (input, target, None, *schema_arguments(case))
    grad = torch.randn(2, 3, 4, dtype=torch.float64, device="cuda")
    expected = (
        OPERATORS.soft_confusion(*arguments, False),
        OPERATORS.soft_confusion_backward(grad, *arguments),
    )
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = (
            OPERATORS.soft_confusion(*arguments, False),
            OPERATORS.soft_confusion_backward(grad, *arguments),
        )
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_samples_in_which_classes_are_not_annotated():
    for case in partial_cases(seed=33, count=8, spatial=(5, 3, 5)):
        check(case, OPERATORS, DEVICE)


@pytest.mark.parametrize("target", ["labels", "dense"])
def test_a_sample_without_any_class_contributes_nothing(target):
    """On a GPU, where no kernel can raise; and its background is there if others count as it."""
    case = ConfusionCase(target=target, target_dtype=torch.uint8, full=True)
    input, labels, _ = tensors(case, DEVICE)
    kept = torch.zeros(2, 3, dtype=torch.bool, device=DEVICE)
    kept[1] = True
    rest = (*schema_arguments(case), True, None)
    sums = kernels.soft_confusion(input, labels, None, *rest, 0, kept)
    assert not bool(sums[0].any())
    assert bool(sums[1].any())
    arguments = (torch.ones_like(sums), input, labels, None, *rest[:5], None)
    assert not bool(kernels.soft_confusion_backward(*arguments, 0, kept)[0].any())
    merged = kernels.soft_confusion(input, labels, None, *rest, 1, kept)
    kept[0, 0] = True
    assert torch.equal(merged, kernels.soft_confusion(input, labels, None, *rest, 1, kept))
