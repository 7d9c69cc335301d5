"""soft_confusion's CUDA kernels without a GPU: emulated on the host under Address- and UBSanitizer.

Each runs against the reference in float64; fresh memory is NaN, and an access beyond a
buffer or a shared array, a barrier that not all threads reach or undefined behaviour ends the
program and fails the test. See tests/emulation/cuda_emulation.h for what the emulation covers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
import torch

from tests.emulation import emulator
from tests.ops.soft_confusion.cases import (
    ACTIVATIONS,
    SURE_AND_WRONG,
    ConfusionCase,
    certain_probabilities,
    check,
    check_gradient_of_sure,
    partial_cases,
    schema_arguments,
    tensors,
)

pytestmark = [emulator.NEEDED, pytest.mark.usefixtures("one_thread")]

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(scope="module")
def soft_confusion() -> Iterator[emulator.SoftConfusion]:
    operators = emulator.SoftConfusion()
    yield operators
    operators.close()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 14, 16, 17, 24, 130, 257])
@pytest.mark.parametrize("full", [False, True])
def test_softmax_of_any_number_of_classes(soft_confusion, classes, dtype, full):
    if classes > 16 and full:
        classes = min(classes, 20)  # the general kernel, whatever the number
    check(
        ConfusionCase(
            classes=classes,
            # A multiple of 16 voxels, so that planes are aligned and read as vectors.
            spatial=(3, 8, 16) if classes > 16 else (11, 16, 7),
            dtype=dtype,
            target_dtype=torch.uint8,
            weight=torch.float32,
            full=full,
            gamma=0.5 if classes % 2 else 0.0,
        ),
        soft_confusion,
    )


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 8, 9, 16, 20, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts_and_odd_sizes(soft_confusion, classes, dtype, layout):
    for spatial in ((5, 7, 11), (4, 8, 8)):
        check(
            ConfusionCase(
                classes=classes,
                spatial=spatial,
                dtype=dtype,
                target="labels_channel",
                target_dtype=torch.int16,
                activation="sigmoid" if classes == 1 else "softmax",
                layout=layout,
            ),
            soft_confusion,
        )


@pytest.mark.parametrize("spatial", [(), (1,), (3,), (8,), (257,), (31, 33)])
@pytest.mark.parametrize("classes", [1, 2, 5, 18])
def test_any_number_of_axes_and_voxels(soft_confusion, classes, spatial):
    activation = "sigmoid" if classes == 1 else "softmax"
    check(
        ConfusionCase(classes=classes, spatial=spatial, activation=activation, batch=3),
        soft_confusion,
    )


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, torch.float32), (6, torch.bfloat16), (19, torch.float16), (3, torch.float64)],
)
def test_ignored_labels(soft_confusion, classes, dtype):
    for spatial, ignore_index in itertools.product(((4, 4, 8), (5, 3, 9)), (None, 1, 100)):
        case = ConfusionCase(
            classes=classes, spatial=spatial, dtype=dtype, ignore_index=ignore_index
        )
        check(case, soft_confusion)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("overlap", ["product", "min"])
def test_dense_targets(soft_confusion, activation, overlap):
    for classes, dtype, layout in itertools.product(
        (1, 3), (torch.float32, torch.float16, torch.float64), ("contiguous", "sliced")
    ):
        check(
            ConfusionCase(
                classes=classes,
                spatial=(4, 4, 8) if layout == "contiguous" else (5, 3, 9),
                dtype=dtype,
                target="dense",
                target_dtype=torch.float32,
                activation=activation,
                overlap=overlap,
                layout=layout,
                full=True,
                weight=torch.float32,
                gamma=1.0,
            ),
            soft_confusion,
        )


@pytest.mark.parametrize("target_dtype", FLOATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_soft_indicator_is_not_ignored_for_its_integer_part(soft_confusion, dtype, target_dtype):
    target = torch.tensor([[0, 0.5, 1.5]], dtype=target_dtype)
    sums = soft_confusion.soft_confusion(
        torch.zeros(1, 1, 3, dtype=dtype), target, None, 1, 1, 0, 0, 0.0, False
    )
    expected = torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64)  # p = 1/2, of g = 1/2 and 3/2
    torch.testing.assert_close(sums[0, 0, :3], expected)


@pytest.mark.parametrize("target_dtype", [torch.int16, torch.int32, torch.int64, torch.float32])
def test_indicator_with_an_ignored_value(soft_confusion, target_dtype):
    for activation in ("sigmoid", "softmax"):
        check(
            ConfusionCase(
                classes=1,
                spatial=(5, 3, 9),
                target="dense",
                target_dtype=target_dtype,
                activation=activation,
                ignore_index=-1,
            ),
            soft_confusion,
        )


@pytest.mark.parametrize(
    ("activation", "likelihood"), list(itertools.product(ACTIVATIONS, ACTIVATIONS))
)
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("full", [False, True])
def test_pairs_of_activations(soft_confusion, activation, likelihood, gamma, full):
    for overlap, target in (("product", "labels"), ("min", "labels"), ("min", "dense")):
        for dtype in (torch.float32, torch.float64):
            check(
                ConfusionCase(
                    dtype=dtype,
                    classes=3,
                    spatial=(4, 4, 8),
                    target=target,
                    target_dtype=torch.float32 if target == "dense" else torch.uint8,
                    activation=activation,
                    likelihood=likelihood,
                    overlap=overlap,
                    gamma=gamma,
                    focal_classes=None if full else 2,
                    full=full,
                ),
                soft_confusion,
            )


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("classes", [2, 4, 7, 21])
def test_focal_modulation_of_confident_predictions(soft_confusion, classes, gamma):
    for full, focal_classes in itertools.product((False, True), (None, 1)):
        case = ConfusionCase(
            classes=classes,
            spatial=(4, 4, 8),
            gamma=gamma,
            focal_classes=focal_classes,
            full=full,
            spread=12.0,
        )
        check(case, soft_confusion)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_certain_probabilities_have_the_slope_of_the_overlap_alone(soft_confusion, gamma):
    certain_probabilities(soft_confusion, gamma, "cpu")


@pytest.mark.parametrize("name", SURE_AND_WRONG)
def test_the_gradient_of_the_sure_and_wrong_keeps_its_digits(soft_confusion, name):
    case, kind = SURE_AND_WRONG[name]
    check_gradient_of_sure(case, kind, soft_confusion)


@pytest.mark.parametrize("classes", [3, 5, 16])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_a_likelihood_of_one_class_alone_keeps_its_digits(soft_confusion, classes, gamma):
    """OFF of the class that the network is sure of: small beside its own cotangent."""
    case = ConfusionCase(
        batch=40, classes=classes, spatial=(6,), spread=10.0, wrong=True, full=True
    )
    case = dataclasses.replace(case, gamma=gamma)
    input, target, _ = tensors(case)
    for best in range(classes):
        chosen = input.argmax(1) == best
        left_out = torch.where(chosen, target, -1)
        grad = torch.zeros(40, classes, 8, dtype=torch.float64)
        grad[:, best, 4] = 1.0
        arguments = (input, left_out, None, *schema_arguments(case))
        actual = soft_confusion.soft_confusion_backward(grad, *arguments).double()
        others = input.double().clone()
        others[:, best] = -math.inf
        # p_c - [c = best], the gradient of -log p_best, with 1 - p_best as the sum of the others.
        truth = input.double().softmax(1)
        truth[:, best] = -(others.logsumexp(1) - input.double().logsumexp(1)).exp()
        truth = truth * chosen.unsqueeze(1)
        largest = truth.abs().amax(1, keepdim=True).clamp(min=1e-30)
        assert float(((actual - truth).abs() / largest).max()) < 1e-5


CLASS_PATHS = (2, 3, 8, 9, 20, 140, 300)


@pytest.mark.parametrize("classes", CLASS_PATHS)
def test_labels_without_a_class_count_as_ignored(soft_confusion, classes):
    for dtype, wrong in (
        (torch.int64, (-1, 2**40, -(2**62), classes)),
        (torch.int32, (-1, 2**31 - 1, -(2**31), classes)),
        (torch.float32, (float("nan"), float("inf"), -1e30, 1e30)),
        (torch.float32, (0.5, -0.5, 1e-30, classes - 0.5)),
        (torch.float16, (float("nan"), 0.5, -0.5, 1.5)),
    ):
        input, target, _ = tensors(
            ConfusionCase(classes=classes, spatial=(70,), target_dtype=dtype)
        )
        arguments = schema_arguments(ConfusionCase())
        grad = torch.randn(2, classes, 4, dtype=torch.float64)
        clean = soft_confusion.soft_confusion(input, target, None, *arguments, False)
        wide = torch.cat([input, torch.full_like(input[..., :4], float("nan"))], -1).contiguous()
        strange = torch.tensor(wrong, dtype=dtype).expand(2, 4)
        dirty_target = torch.cat([target, strange], -1)
        dirty = soft_confusion.soft_confusion(wide, dirty_target, None, *arguments, False)
        torch.testing.assert_close(dirty, clean, rtol=1e-6, atol=0)
        gradient = soft_confusion.soft_confusion_backward(
            grad, wide, dirty_target, None, *arguments
        )
        assert bool((gradient[..., 70:] == 0).all())
        assert not bool(gradient.isnan().any())


@pytest.mark.parametrize("classes", [1, *CLASS_PATHS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_in_the_logits_is_not_hidden(soft_confusion, classes, dtype):
    activation = "sigmoid" if classes == 1 else "softmax"
    case = ConfusionCase(
        batch=1, classes=classes, spatial=(66,), dtype=dtype, activation=activation
    )
    for c in {0, classes - 1}:
        input, target, _ = tensors(case)
        input[0, c, 33] = float("nan")
        sums = soft_confusion.soft_confusion(input, target, None, *schema_arguments(case), False)
        assert bool(sums[0, :, :3].sum(-1).isnan().all())


@pytest.mark.parametrize("classes", CLASS_PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_infinite_logits_mean_the_limit(soft_confusion, classes, dtype):
    infinite = float("inf")
    case = ConfusionCase(batch=1, classes=classes, spatial=(6,), dtype=dtype)
    arguments = schema_arguments(case)
    input = torch.zeros(1, classes, 6, dtype=dtype)
    input[0, 1, 0] = infinite  # certain of class 1
    input[0, :, 1] = -infinite  # all alike
    input[0, :, 2] = infinite
    input[0, 0, 3] = -infinite
    input[0, :2, 4] = infinite
    target = torch.tensor([[1, 0, 1, 1, 0, 1]], dtype=torch.uint8)
    sums = soft_confusion.soft_confusion(input, target, None, *arguments, False)
    p = torch.zeros(classes, 6, dtype=torch.float64)
    p[1, 0] = 1
    p[:, 1] = p[:, 2] = p[:, 5] = 1 / classes
    p[1:, 3] = 1 / (classes - 1)
    p[:2, 4] = 0.5
    g = (target.double() == torch.arange(classes)[:, None]).double()
    expected = torch.stack([(p * g).sum(-1), (p * (1 - g)).sum(-1), ((1 - p) * g).sum(-1)], -1)
    torch.testing.assert_close(sums[0, :, :3], expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn(1, classes, 4, dtype=torch.float64)
    gradient = soft_confusion.soft_confusion_backward(grad, input, target, None, *arguments)
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("classes", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("kind", ["ordinary", "infinite", "large", "far apart", "nan"])
def test_the_common_way_of_few_classes_agrees_with_the_general_one(
    soft_confusion, classes, dtype, kind
):
    """Weights of 1 ask for the general way; the common one has to leave extreme logits to it."""
    case = ConfusionCase(
        batch=1, classes=classes, spatial=(2048,), dtype=dtype, target_dtype=torch.uint8
    )
    input, target, _ = tensors(case)
    ones = torch.ones(1, 2048)
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(0, 2048, (40,), generator=generator)
    extremes = {
        "ordinary": (0.0,),
        "infinite": (math.inf, -math.inf),
        "large": (3e38, -3e38, 2e6),
        "far apart": (400.0, -400.0, 90.0),
        "nan": (math.nan,),
    }[kind]
    for i, place in enumerate(places):
        input[0, i % classes, place] = extremes[i % len(extremes)]
    if kind == "nan":
        input[0, :, 77] = math.nan
    arguments = schema_arguments(case)
    plain = soft_confusion.soft_confusion(input, target, None, *arguments, False)
    general = soft_confusion.soft_confusion(input, target, ones, *arguments, False)
    grad = torch.randn(1, classes, 4, dtype=torch.float64, generator=generator)
    slopes = [
        soft_confusion.soft_confusion_backward(grad, input, target, w, *arguments)
        for w in (None, ones)
    ]
    if kind == "nan":
        assert bool(plain[..., :3].sum(-1).isnan().all())
        assert torch.equal(slopes[0].isnan(), slopes[1].isnan())
    else:
        torch.testing.assert_close(plain, general, rtol=2e-6, atol=1e-6)
    rtol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(*slopes, rtol=rtol, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("distance", [0.0, 1e-3, 12.0])
def test_the_product_of_many_voxels_does_not_overflow(distance):
    """160 voxels of a thread with two like classes: their factors of 2 are 2^160 together."""
    operators = emulator.SoftConfusion(EMULATION_CHUNK=str(256 * 160), EMULATION_ROWS="1")
    input = torch.zeros(1, 2, 256 * 160)
    input[:, 1] = distance
    target = torch.zeros(1, 256 * 160, dtype=torch.uint8)
    arguments = schema_arguments(ConfusionCase())
    sums = operators.soft_confusion(input, target, None, *arguments, False)
    operators.close()
    expected = 256 * 160 * math.log1p(math.exp(distance))
    assert sums[0, 0, 3].item() == pytest.approx(expected, rel=2e-6)
    assert sums[0, 1, 3].item() == 0


def test_logits_too_large_for_one_rounding(soft_confusion):
    for classes, dtype in itertools.product((2, 3, 12, 30), (torch.float32, torch.bfloat16)):
        input, target, _ = tensors(ConfusionCase(classes=classes, spatial=(4, 4, 8), dtype=dtype))
        check_against = (input * 0 + torch.randint(-4, 5, input.shape)).to(dtype)
        shifted = check_against + (2.0**9 if dtype == torch.bfloat16 else 2.0**23)
        arguments = schema_arguments(ConfusionCase())
        expected = soft_confusion.soft_confusion(
            (shifted - shifted.amax(1, keepdim=True)), target, None, *arguments, False
        )
        actual = soft_confusion.soft_confusion(shifted, target, None, *arguments, False)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_many_chunks_and_rows(soft_confusion):
    """More than one chunk a row and more than one block a sample, in every kind of kernel."""
    for classes, spatial in ((2, (50, 41, 60)), (3, (9001,)), (6, (8200,)), (17, (4200,))):
        check(
            ConfusionCase(classes=classes, batch=1, spatial=spatial, target_dtype=torch.uint8),
            soft_confusion,
        )
    check(ConfusionCase(classes=2, batch=1, spatial=(9001,), dtype=torch.float64), soft_confusion)
    check(ConfusionCase(classes=2, batch=1, spatial=(9001,), activation="sigmoid"), soft_confusion)


def test_the_order_of_threads_and_blocks_does_not_change_a_bit(soft_confusion):
    backwards = emulator.SoftConfusion(EMULATION_ORDER="reverse")
    for classes, activation, full, dtype in (
        (2, "softmax", True, torch.float32),
        (3, "softmax", False, torch.bfloat16),
        (9, "softmax", True, torch.float32),
        (40, "softmax", False, torch.float32),
        (3, "sigmoid", True, torch.float16),
        (3, "softmax", True, torch.float64),
    ):
        case = ConfusionCase(classes=classes, spatial=(2500,), dtype=dtype, activation=activation)
        input, target, _ = tensors(case)
        arguments = schema_arguments(case)
        once = soft_confusion.soft_confusion(input, target, None, *arguments, full)
        again = backwards.soft_confusion(input, target, None, *arguments, full)
        assert torch.equal(once, again)
        gradients = [
            operators.soft_confusion_backward(once.sin(), input, target, None, *arguments)
            for operators in (soft_confusion, backwards)
        ]
        assert torch.equal(*gradients)
    backwards.close()


@pytest.mark.parametrize(
    ("classes", "activation", "full", "spatial"),
    [
        (2, "softmax", False, (50, 41, 60)),  # 61 rows: groups of rows
        (3, "softmax", True, (9001,)),
        (9, "softmax", False, (70,)),
        (17, "softmax", False, (4200,)),
        (3, "sigmoid", True, (9001,)),
        (3, "sigmoid", False, (50, 41, 60)),
        (20, "softmax", True, (9001,)),
    ],
)
def test_rows_added_by_the_last_block_are_those_of_a_second_kernel(
    soft_confusion, classes, activation, full, spatial
):
    """To the bit; and the counters are left as they were found."""
    two_kernels = emulator.SoftConfusion(EMULATION_NO_COUNTERS="1")
    for batch in (1, 3) if len(spatial) == 1 else (1,):
        case = ConfusionCase(batch=batch, classes=classes, spatial=spatial, activation=activation)
        input, target, _ = tensors(case)
        arguments = schema_arguments(case)
        expected = two_kernels.soft_confusion(input, target, None, *arguments, full)
        first = soft_confusion.soft_confusion(input, target, None, *arguments, full)
        again = soft_confusion.soft_confusion(input, target, None, *arguments, full)
        assert torch.equal(first, expected)
        assert torch.equal(first, again)
    two_kernels.close()


@pytest.mark.parametrize("spatial", [(5, 3, 9), (4, 16, 16)])
def test_samples_in_which_classes_are_not_annotated(soft_confusion, spatial):
    for case in partial_cases(seed=20 + len(spatial), count=16, spatial=spatial):
        check(case, soft_confusion)


def test_a_sample_without_any_class_contributes_nothing(soft_confusion):
    """On a GPU, where no kernel can raise; and its background is there if others count as it."""
    for classes, target in ((3, "labels"), (3, "dense"), (20, "labels")):
        case = ConfusionCase(classes=classes, target=target, target_dtype=torch.uint8, full=True)
        input, labels, _ = tensors(case)
        kept = torch.zeros(2, classes, dtype=torch.bool)
        kept[1] = True
        rest = (*schema_arguments(case), True, None)
        sums = soft_confusion.soft_confusion(input, labels, None, *rest, 0, kept)
        assert not bool(sums[0].any())
        assert bool(sums[1].any())
        grad = torch.ones_like(sums)
        arguments = (grad, input, labels, None, *rest[:5], None)
        gradient = soft_confusion.soft_confusion_backward(*arguments, 0, kept)
        assert not bool(gradient[0].any())
        merged = soft_confusion.soft_confusion(input, labels, None, *rest, 1, kept)
        kept[0, 0] = True
        assert torch.equal(
            merged, soft_confusion.soft_confusion(input, labels, None, *rest, 1, kept)
        )
