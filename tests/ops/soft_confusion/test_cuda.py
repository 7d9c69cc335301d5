"""The CUDA kernels without a GPU: emulated on the host under Address- and UBSanitizer.

Every kernel runs against the reference in float64; fresh memory is NaN, and an access beyond a
buffer or a shared array, a barrier that not all threads reach or undefined behaviour ends the
program and fails the test. See tests/emulation/cuda_emulation.h for what the emulation covers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.accuracy import assert_accurate
from tests.emulation import emulator
from tests.ops.finalize_slab import cases as finalize_cases
from tests.ops.finalize_slab.cases import Case as Slab
from tests.ops.overlap_add.cases import CHANNELS, gradient_scale, special_patches
from tests.ops.soft_confusion.cases import (
    ACTIVATIONS,
    SURE_AND_WRONG,
    Case,
    certain_probabilities,
    check,
    check_gradient_of_sure,
    schema_arguments,
    tensors,
)
from voxfuse.fusion.grids import _cover, plan_grid
from voxfuse.reference import overlap_add as fusion_reference
from voxfuse.reference import ratio_loss as ratio_reference

pytestmark = pytest.mark.skipif(
    emulator.missing() is not None, reason=f"no CUDA emulation: {emulator.missing()}"
)

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # The reference's small tensors gain nothing from threads that the emulation needs.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- The emulation itself ------------------------------------------------------------------------


def run_broken(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = emulator.build("broken", ("tests/emulation/broken_main.cpp",))
    return subprocess.run(
        [str(program), name],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_emulation_runs_threads_barriers_and_shuffles():
    result = run_broken("right")
    assert result.returncode == 0, result.stderr
    assert [int(x) for x in result.stdout.split()] == [63 - i + 1 for i in range(64)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_shared", "heap-buffer-overflow"),
        ("beyond_global", "heap-buffer-overflow"),
        ("barrier_in_a_branch", "__syncthreads() after a thread of the block has ended"),
        ("shuffle_in_a_branch", "deadlock"),
        ("shift_too_far", "shift exponent"),
    ],
)
def test_emulation_finds(name, message):
    result = run_broken(name)
    assert result.returncode != 0
    assert message in result.stderr


def test_emulation_shows_a_missing_barrier_by_running_the_threads_backwards():
    forwards = run_broken("missing_barrier")
    backwards = run_broken("missing_barrier", EMULATION_ORDER="reverse")
    assert forwards.returncode == backwards.returncode == 0
    assert forwards.stdout != backwards.stdout


# --- soft_confusion ------------------------------------------------------------------------------


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
        Case(
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
            Case(
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
    check(Case(classes=classes, spatial=spatial, activation=activation, batch=3), soft_confusion)


@pytest.mark.parametrize(
    "target_dtype",
    [torch.uint8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32],
)
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, torch.float32), (6, torch.bfloat16), (19, torch.float16), (3, torch.float64)],
)
def test_label_types(soft_confusion, classes, dtype, target_dtype):
    for spatial, ignore_index in itertools.product(((4, 4, 8), (5, 3, 9)), (None, 1, 100)):
        check(
            Case(
                classes=classes,
                spatial=spatial,
                dtype=dtype,
                target_dtype=target_dtype,
                ignore_index=ignore_index,
            ),
            soft_confusion,
        )


@pytest.mark.parametrize(
    "weight", [torch.bool, torch.float16, torch.bfloat16, torch.float32, torch.float64]
)
@pytest.mark.parametrize(
    ("classes", "dtype"),
    [(2, torch.float32), (6, torch.bfloat16), (19, torch.float32), (3, torch.float64)],
)
def test_weight_types(soft_confusion, classes, dtype, weight):
    for spatial in ((4, 4, 8), (5, 3, 9)):
        check(Case(classes=classes, spatial=spatial, dtype=dtype, weight=weight), soft_confusion)


@pytest.mark.parametrize(
    "target_dtype",
    [torch.bool, torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64],
)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("overlap", ["product", "min"])
def test_dense_targets(soft_confusion, activation, overlap, target_dtype):
    for classes, dtype, layout in itertools.product(
        (1, 3), (torch.float32, torch.float16, torch.float64), ("contiguous", "sliced")
    ):
        check(
            Case(
                classes=classes,
                spatial=(4, 4, 8) if layout == "contiguous" else (5, 3, 9),
                dtype=dtype,
                target="dense",
                target_dtype=target_dtype,
                activation=activation,
                overlap=overlap,
                layout=layout,
                full=True,
                weight=torch.float32,
                gamma=1.0,
            ),
            soft_confusion,
        )


@pytest.mark.parametrize("target_dtype", [torch.int16, torch.int32, torch.int64, torch.float32])
def test_indicator_with_an_ignored_value(soft_confusion, target_dtype):
    for activation in ("sigmoid", "softmax"):
        check(
            Case(
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
                Case(
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
        case = Case(
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
    case = Case(batch=40, classes=classes, spatial=(6,), spread=10.0, wrong=True, full=True)
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
        input, target, _ = tensors(Case(classes=classes, spatial=(70,), target_dtype=dtype))
        arguments = schema_arguments(Case())
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
    case = Case(batch=1, classes=classes, spatial=(66,), dtype=dtype, activation=activation)
    for c in {0, classes - 1}:
        input, target, _ = tensors(case)
        input[0, c, 33] = float("nan")
        sums = soft_confusion.soft_confusion(input, target, None, *schema_arguments(case), False)
        assert bool(sums[0, :, :3].sum(-1).isnan().all())


@pytest.mark.parametrize("classes", CLASS_PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_infinite_logits_mean_the_limit(soft_confusion, classes, dtype):
    infinite = float("inf")
    case = Case(batch=1, classes=classes, spatial=(6,), dtype=dtype)
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
    case = Case(batch=1, classes=classes, spatial=(2048,), dtype=dtype, target_dtype=torch.uint8)
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
    arguments = schema_arguments(Case())
    sums = operators.soft_confusion(input, target, None, *arguments, False)
    operators.close()
    expected = 256 * 160 * math.log1p(math.exp(distance))
    assert sums[0, 0, 3].item() == pytest.approx(expected, rel=2e-6)
    assert sums[0, 1, 3].item() == 0


def test_logits_too_large_for_one_rounding(soft_confusion):
    for classes, dtype in itertools.product((2, 3, 12, 30), (torch.float32, torch.bfloat16)):
        input, target, _ = tensors(Case(classes=classes, spatial=(4, 4, 8), dtype=dtype))
        check_against = (input * 0 + torch.randint(-4, 5, input.shape)).to(dtype)
        shifted = check_against + (2.0**9 if dtype == torch.bfloat16 else 2.0**23)
        arguments = schema_arguments(Case())
        expected = soft_confusion.soft_confusion(
            (shifted - shifted.amax(1, keepdim=True)), target, None, *arguments, False
        )
        actual = soft_confusion.soft_confusion(shifted, target, None, *arguments, False)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_many_chunks_and_rows(soft_confusion):
    """More than one chunk a row and more than one block a sample, in every kind of kernel."""
    for classes, spatial in ((2, (50, 41, 60)), (3, (9001,)), (6, (8200,)), (17, (4200,))):
        check(
            Case(classes=classes, batch=1, spatial=spatial, target_dtype=torch.uint8),
            soft_confusion,
        )
    check(Case(classes=2, batch=1, spatial=(9001,), dtype=torch.float64), soft_confusion)
    check(Case(classes=2, batch=1, spatial=(9001,), activation="sigmoid"), soft_confusion)


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
        case = Case(classes=classes, spatial=(2500,), dtype=dtype, activation=activation)
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
    for batch in (1, 3):
        case = Case(batch=batch, classes=classes, spatial=spatial, activation=activation)
        input, target, _ = tensors(case)
        arguments = schema_arguments(case)
        expected = two_kernels.soft_confusion(input, target, None, *arguments, full)
        first = soft_confusion.soft_confusion(input, target, None, *arguments, full)
        again = soft_confusion.soft_confusion(input, target, None, *arguments, full)
        assert torch.equal(first, expected)
        assert torch.equal(first, again)
    two_kernels.close()


def test_a_loss_is_two_launches_forward_and_two_backward(tmp_path):
    logs = [tmp_path / name for name in ("confusion", "ratio")]
    confusion = emulator.SoftConfusion(EMULATION_LOG=str(logs[0]))
    ratio = emulator.RatioLoss(EMULATION_LOG=str(logs[1]))
    for classes in (2, 9, 20, 300):
        input, target, _ = tensors(Case(classes=classes, spatial=(3000,)))
        arguments = schema_arguments(Case())
        before = sum(map(len, (confusion.launched(logs[0]), ratio.launched(logs[1]))))
        sums = confusion.soft_confusion(input, target, None, *arguments, False)
        _, cotangents = ratio.ratio_loss(sums, *RATIO.values())
        forward = sum(map(len, (confusion.launched(logs[0]), ratio.launched(logs[1]))))
        grad = ratio.ratio_loss_backward(torch.ones(()), cotangents, 0, False, 0)
        confusion.soft_confusion_backward(grad, input, target, None, *arguments)
        backward = sum(map(len, (confusion.launched(logs[0]), ratio.launched(logs[1]))))
        assert (forward - before, backward - forward) == (2, 2)
    confusion.close()
    ratio.close()


# --- ratio_loss ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ratio_loss() -> Iterator[emulator.RatioLoss]:
    operators = emulator.RatioLoss()
    yield operators
    operators.close()


RATIO = dict(
    numerator=(1.0,),
    denominator=(1.0, 0.3, 0.7),
    smooth_nr=1e-5,
    smooth_dr=1e-5,
    min_denominator=0.0,
    exponent=1.0,
    log=False,
    class_weight=None,
    first_class=0,
    batch=False,
    class_pooling=0,
    absent=0,
    reduction=1,
    ratio_scale=1.0,
    nll_weight=None,
    off_weight=None,
    nll_scale=0.0,
    off_scale=0.0,
    normaliser=0,
    double_loss=True,
    exponent_from=0,
)


def check_ratio(operators: emulator.RatioLoss, stats: Tensor, **changes: object) -> None:
    case = {**RATIO, **changes}
    first = int(case["first_class"])
    weights = torch.linspace(0.5, 2, stats.shape[1], dtype=torch.float64)
    for name in ("class_weight", "nll_weight", "off_weight"):
        if case[name] is not None:
            wanted = weights[first:] if name == "class_weight" else weights
            case[name] = wanted if case[name] else None
    expected = ratio_reference.ratio_loss(stats, *case.values())
    actual = operators.ratio_loss(stats, *case.values())
    # Nothing here is larger than some thousands, and the sums have a handful of terms.
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        rtol = 1e-12 if a.dtype == torch.float64 else 1e-7
        torch.testing.assert_close(a, e, rtol=rtol, atol=1e-13, equal_nan=True)
    loss, cotangents = expected
    grad = torch.linspace(1, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    rest = (first, case["batch"], case["class_pooling"])
    torch.testing.assert_close(
        operators.ratio_loss_backward(grad, cotangents, *rest),
        ratio_reference.ratio_loss_backward(grad, cotangents, *rest),
        rtol=1e-15,
        atol=0,
    )


def statistics(samples: int, classes: int, sums: int) -> Tensor:
    generator = torch.Generator().manual_seed(samples * classes)
    stats = torch.rand(samples, classes, sums, generator=generator, dtype=torch.float64) * 10
    stats[0, 0, :4] = 0  # an absent class
    stats[-1, -1, 1:3] = 0  # a perfect one
    return stats


@pytest.mark.parametrize(("samples", "classes", "sums"), [(1, 2, 4), (2, 3, 8), (5, 130, 8)])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("class_pooling", [0, 1, 2, 3])
def test_ratio_loss_reductions(ratio_loss, samples, classes, sums, reduction, class_pooling):
    stats = statistics(samples, classes, sums)
    for batch, absent, first_class in itertools.product((False, True), (0, 1, 2), (0, 1)):
        check_ratio(
            ratio_loss,
            stats,
            reduction=reduction,
            class_pooling=class_pooling,
            batch=batch,
            absent=absent,
            first_class=first_class,
            class_weight=first_class == 1,
        )


@pytest.mark.parametrize("exponent", [1.0, 0.75, 2.0])
@pytest.mark.parametrize("log", [False, True])
def test_ratio_loss_terms(ratio_loss, exponent, log):
    stats = statistics(3, 4, 8)
    for smooth, least in ((0.0, 0.0), (1.0, 1e-7), (0.0, 20.0)):
        check_ratio(
            ratio_loss,
            stats[:, 1:],
            exponent=exponent,
            exponent_from=2,
            first_class=1,
            log=log,
            smooth_nr=smooth,
            smooth_dr=smooth,
            min_denominator=least,
            double_loss=False,
        )


@pytest.mark.parametrize("normaliser", [0, 1, 2, 3, 4])
def test_ratio_loss_likelihood(ratio_loss, normaliser):
    stats = statistics(3, 4, 8)
    for weighted, scale in itertools.product((False, True), (0.0, 1.0)):
        check_ratio(
            ratio_loss,
            stats,
            ratio_scale=scale,
            nll_scale=0.5,
            off_scale=0.25,
            nll_weight=weighted,
            off_weight=weighted,
            normaliser=normaliser,
        )
    check_ratio(ratio_loss, stats * 0, nll_scale=1.0, normaliser=normaliser)


# --- overlap_add ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overlap_add() -> Iterator[emulator.OverlapAdd]:
    operators = emulator.OverlapAdd()
    yield operators
    operators.close()


def fusion_case(
    patch: tuple[int, ...], volume: tuple[int, ...], count: int, channels: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """Patches at random origins, some partly or wholly outside; separable tables, a window."""
    generator = torch.Generator().manual_seed(count + sum(patch))
    axes = len(patch)
    patches = torch.randn(count, channels, *patch, generator=generator, dtype=torch.float64)
    low = torch.tensor([-p for p in patch])
    high = torch.tensor([v + 1 for v in volume])
    origins = low + (torch.rand(count, axes, generator=generator) * (high - low)).long()
    if count > 2:
        origins[0] = 0
        origins[1] = 2**40
        origins[2] = -(2**62)
    rows = torch.randint(0, 3, (count, axes), generator=generator)
    tables = [torch.rand(3, p, generator=generator, dtype=torch.float64) + 0.1 for p in patch]
    window = torch.rand(1, *patch, generator=generator, dtype=torch.float64) + 0.1
    return patches.to(dtype), origins, rows, tables, window


def assert_fused(actual: Tensor, run, patches: Tensor, dtype: torch.dtype, what: str) -> None:
    """``run`` fuses patches of a given type with the reference."""
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    truth, plain = run(patches.double()), run(patches.to(compute))
    size = run(patches.double().abs())
    # Every product and every addition rounds once; at most some tens of patches overlap. The
    # result is rounded once more to a half type.
    allowance = 2 if dtype == compute else 1
    assert_accurate(
        actual, plain.to(dtype), truth, scale=size, dtype=dtype, allowance=allowance, what=what
    )


FUSIONS = [
    ((5,), (23,), 9, 3),
    ((4, 8), (12, 16), 7, 5),
    ((4, 5, 8), (9, 11, 16), 12, 1),
    ((3, 4, 16), (20, 9, 40), 14, 6),
    ((2, 3, 7), (9, 30, 150), 30, 2),
    ((9, 9, 9), (4, 5, 6), 3, 2),
    ((2, 2, 2), (5, 5, 5), 1, 1),
]


@pytest.mark.parametrize(("patch", "volume", "count", "channels"), FUSIONS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("divided", [False, True])
def test_fusion(overlap_add, patch, volume, count, channels, dtype, dense, divided):
    patches, origins, rows, tables, window = fusion_case(patch, volume, count, channels, dtype)
    weights = [window] if dense else tables
    if dense and len(patch) == 1:  # along one axis a window is a table of one row
        rows = torch.zeros_like(rows)
    total = None
    if divided:
        total = torch.zeros(volume, dtype=torch.float64)
        fusion_reference.overlap_weights_(total, origins, rows, weights, 0, 0, volume[0])
    actual = overlap_add.overlap_add(patches, origins, rows, weights, total, volume)
    assert_fused(
        actual,
        lambda p: fusion_reference.overlap_add(p, origins, rows, weights, total, volume),
        patches,
        dtype,
        "overlap_add",
    )
    grad = torch.randn(channels, *volume, dtype=torch.float64).to(dtype)
    assert_fused(
        overlap_add.overlap_add_backward(grad, origins, rows, weights, total),
        lambda g: fusion_reference.overlap_add_backward(g, origins, rows, weights, total),
        grad,
        dtype,
        "overlap_add_backward",
    )


@pytest.mark.parametrize("ring_axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("start", [0, 7])
def test_ring(overlap_add, ring_axis, dtype, start):
    patch, extent = (3, 4, 8), (9, 10, 12)
    patches, origins, rows, tables, window = fusion_case(patch, (16, 16, 16), 15, 5, dtype)
    stop = start + extent[ring_axis]
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for weights, divided in ((tables, False), (tables, True), ([window], False)):
        total = torch.rand(extent, dtype=torch.float64) + 0.5
        expected = total.clone()
        place = (ring_axis, start, stop)
        overlap_add.overlap_weights_(total, origins, rows, weights, *place)
        fusion_reference.overlap_weights_(expected, origins, rows, weights, *place)
        torch.testing.assert_close(total, expected, rtol=1e-14, atol=0)
        divisor = total if divided else None
        ring = torch.randn(5, *extent, dtype=accumulator)
        before = ring.clone()
        overlap_add.overlap_add_(ring, patches, origins, rows, weights, divisor, *place)
        truth, plain, size = before.double(), before.clone(), before.double().abs()
        for accumulated, p in (
            (truth, patches.double()),
            (plain, patches.to(accumulator)),
            (size, patches.double().abs()),
        ):
            fusion_reference.overlap_add_(accumulated, p, origins, rows, weights, divisor, *place)
        assert_accurate(ring, plain, truth, scale=size, dtype=accumulator, allowance=2)


@pytest.mark.parametrize(
    ("patch", "volume"), [((7,), (23,)), ((3, 8), (9, 16)), ((3, 4, 16), (7, 6, 29))]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_weights_with_a_floor(overlap_add, patch, volume, dtype):
    """In a ring along every axis, of mirrored patches; voxels under one patch keep their bits."""
    grid = plan_grid(volume, patch, 0.5)
    patches, _, _, tables, _ = fusion_case(patch, volume, len(grid), 3, dtype)
    vectors = [table[0].numpy() for table in tables]
    axes = zip(vectors, grid.starts, volume, strict=True)
    weights = [table[:1].contiguous() for table in tables] + [_cover(*axis) for axis in axes]
    rows = torch.zeros_like(grid.origins)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    alone = torch.zeros(3, *patch, dtype=accumulator)
    least = [_cover(v, (0,), p) for v, p in zip(vectors, patch, strict=True)]
    arguments = (grid.origins[:1] * 0, rows[:1], [*weights[: len(patch)], *least])
    overlap_add.overlap_add_(alone, patches[:1], *arguments, None, 0, 0, patch[0], 0, 0.3)
    assert torch.equal(alone.to(dtype), patches[0])
    nothing = [*weights[: len(patch)], *(torch.full_like(table, -1) for table in least)]
    overlap_add.overlap_add_(
        alone, patches[:1], *arguments[:2], nothing, None, 0, 0, patch[0], 0, 0.3
    )
    assert torch.equal(alone.to(dtype), patches[0])
    for axis in range(len(patch)):
        extent = list(volume)
        extent[axis] = volume[axis] - 1
        place = (axis, 1, volume[axis], 1 << axis, 0.3)
        ring = torch.zeros(3, *extent, dtype=accumulator)
        truth, size = ring.double(), ring.double()
        plain = ring.clone()
        overlap_add.overlap_add_(ring, patches, grid.origins, rows, weights, None, *place)
        for accumulated, p in (
            (truth, patches.double()),
            (plain, patches.to(accumulator)),
            (size, patches.double().abs()),
        ):
            tables = (grid.origins, rows, weights, None)
            fusion_reference.overlap_add_(accumulated, p, *tables, *place)
        assert_accurate(ring, plain, truth, scale=size, dtype=accumulator, allowance=2)


@pytest.mark.parametrize(
    ("patch", "volume"), [((7,), (23,)), ((3, 8), (9, 16)), ((3, 4, 16), (5, 6, 24))]
)
@pytest.mark.parametrize("dtype", FLOATS)
def test_mirrored_patches_are_turned_back(overlap_add, patch, volume, dtype):
    """Bit for bit what adding flipped copies gives; rows are runs, or no multiple of them."""
    patches, origins, rows, weights, _ = fusion_case(patch, volume, 7, 3, dtype)
    axes = len(patch)
    place = (axes - 1, 2, 2 + volume[-1])
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    for flip in range(1, 2**axes):
        turned = [2 + axis for axis in range(axes) if flip >> axis & 1]
        ring = torch.ones(3, *volume, dtype=accumulator)
        expected = ring.clone()
        tables = (origins, rows, weights, None, *place)
        overlap_add.overlap_add_(expected, patches, *tables)
        overlap_add.overlap_add_(ring, patches.flip(turned), *tables, flip)
        assert torch.equal(ring, expected)


@pytest.mark.parametrize("activation", [1, 2])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_fusion_of_activated_patches(overlap_add, activation, channels, dtype):
    for patch, volume, divided in (
        ((5,), (23,), False),
        ((4, 8), (12, 16), True),
        ((3, 4, 16), (5, 9, 40), channels % 2 == 0),
    ):
        count = 6
        patches, origins, rows, tables, _ = fusion_case(patch, volume, count, channels, dtype)
        total = None
        if divided:
            total = torch.zeros(volume, dtype=torch.float64)
            fusion_reference.overlap_weights_(total, origins, rows, tables, 0, 0, volume[0])
        weights = (origins, rows, tables, total)
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        truth, plain = (
            fusion_reference.overlap_add(patches.to(wide), *weights, volume, activation)
            for wide in (torch.float64, compute)
        )
        assert_accurate(
            overlap_add.overlap_add(patches, *weights, volume, activation),
            plain.to(dtype),
            truth,
            scale=truth,
            dtype=dtype,
            allowance=8 if dtype == compute else 1,
        )
        grad = torch.randn(channels, *volume, dtype=torch.float64).to(dtype)
        truth, plain = (
            fusion_reference.overlap_add_backward(
                grad.to(wide), *weights, patches.to(wide), activation
            )
            for wide in (torch.float64, compute)
        )
        weighted = fusion_reference.overlap_add_backward(grad.double(), *weights)
        assert_accurate(
            overlap_add.overlap_add_backward(grad, *weights, patches, activation),
            plain.to(dtype),
            truth,
            scale=gradient_scale(patches, weighted, activation),
            dtype=dtype,
            allowance=8 if dtype == compute else 1,
        )


@pytest.mark.parametrize("activation", [1, 2])
@pytest.mark.parametrize("channels", [1, 4, 11])
@pytest.mark.parametrize("dtype", FLOATS)
def test_infinities_and_nan_are_those_of_torch(overlap_add, activation, channels, dtype):
    patches = special_patches(dtype, channels)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    tables = (zero, zero, [torch.full((1, 9), 0.5, dtype=torch.float64)], None)
    torch.testing.assert_close(
        overlap_add.overlap_add(patches, *tables, (9,), activation),
        fusion_reference.overlap_add(patches, *tables, (9,), activation),
        equal_nan=True,
    )
    grad = torch.linspace(-1, 1, 9 * channels).reshape(channels, 9).to(dtype)
    torch.testing.assert_close(
        overlap_add.overlap_add_backward(grad, *tables, patches, activation),
        fusion_reference.overlap_add_backward(grad, *tables, patches, activation),
        equal_nan=True,
    )


@pytest.mark.parametrize("activation", [1, 2])
@pytest.mark.parametrize("channels", [3, 9])
@pytest.mark.parametrize("dtype", FLOATS)
def test_activated_bits_depend_on_neither_flips_nor_calls(overlap_add, activation, channels, dtype):
    patch, volume = (3, 4, 10), (5, 6, 24)
    patches, origins, rows, weights, _ = fusion_case(patch, volume, 5, channels, dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    whole = torch.ones(channels, *volume, dtype=accumulator)
    place = (2, 2, 2 + volume[-1])
    tables = (weights, None, *place)
    overlap_add.overlap_add_(whole, patches, origins, rows, *tables, 0, 0.0, activation)
    for flip in range(1, 8):
        ring = torch.ones_like(whole)
        mirrored = patches.flip([2 + axis for axis in range(3) if flip >> axis & 1])
        for part in (slice(0, 3), slice(3, 5)):
            own = (mirrored[part], origins[part], rows[part])
            overlap_add.overlap_add_(ring, *own, *tables, flip, 0.0, activation)
        assert torch.equal(ring, whole)
    if dtype == accumulator:
        place = (0, 0, volume[0], 0, 0.0, activation)
        ring = torch.zeros_like(whole)
        overlap_add.overlap_add_(ring, patches, origins, rows, weights, None, *place)
        gathered = overlap_add.overlap_add(
            patches, origins, rows, weights, None, volume, activation
        )
        assert torch.equal(ring, gathered)


@pytest.mark.parametrize("channels", [3, 9])
@pytest.mark.parametrize("dtype", FLOATS)
def test_activated_patches_with_a_floor(overlap_add, channels, dtype):
    patch, volume = (3, 4, 16), (7, 6, 29)
    grid = plan_grid(volume, patch, 0.5)
    patches, _, _, tables, _ = fusion_case(patch, volume, len(grid), channels, dtype)
    vectors = [table[0].numpy() for table in tables]
    axes = zip(vectors, grid.starts, volume, strict=True)
    weights = [table[:1].contiguous() for table in tables] + [_cover(*axis) for axis in axes]
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    ring = torch.zeros(channels, *volume, dtype=accumulator)
    place = (grid.origins, torch.zeros_like(grid.origins), weights, None, 0, 0, volume[0], 0, 0.3)
    overlap_add.overlap_add_(ring, patches, *place, 2)
    torch.testing.assert_close(ring.sum(0), torch.ones_like(ring[0]))  # of weights that sum to 1
    truth, plain = torch.zeros_like(ring).double(), torch.zeros_like(ring)
    for accumulated in (truth, plain):
        fusion_reference.overlap_add_(accumulated, patches.to(accumulated.dtype), *place, 2)
    assert_accurate(ring, plain, truth, scale=truth, dtype=accumulator, allowance=8)


def test_a_softmax_of_many_channels_takes_one_launch_more(tmp_path):
    """And nothing else does: neither a sigmoid nor the backward pass."""
    log = tmp_path / "launches"
    operators = emulator.OverlapAdd(EMULATION_LOG=str(log))
    expected = []
    for channels, activation, kept in ((3, 2, []), (9, 1, []), (9, 2, ["normalise"])):
        patches, origins, rows, tables, _ = fusion_case((4, 8), (12, 16), 4, channels, FLOATS[0])
        weights = (origins, rows, tables, None)
        fused = operators.overlap_add(patches, *weights, (12, 16), activation)
        operators.overlap_add_(fused, patches, *weights, 0, 0, 12, 0, 0.0, activation)
        operators.overlap_add_backward(fused, *weights, patches, activation)
        expected += [*kept, "gather", *kept, "gather", "scatter_activated"]
    operators.close()
    assert [name.split("<")[0] for name, _ in operators.launched(log)] == expected


def test_a_voxel_under_one_patch_keeps_its_bits(overlap_add):
    patches, *_ = fusion_case((4, 4, 6), (4, 4, 6), 1, 3, torch.float16)
    ones = [torch.ones(1, size, dtype=torch.float64) for size in (4, 4, 6)]
    zero = torch.zeros(1, 3, dtype=torch.int64)
    fused = overlap_add.overlap_add(patches, zero, zero, ones, None, (6, 4, 9))
    assert torch.equal(fused[:, :4, :, :6], patches[0])
    assert bool((fused[:, 4:] == 0).all())
    assert bool((fused[..., 6:] == 0).all())


def test_infinite_patches_do_not_leak_into_voxels_outside(overlap_add):
    patches = torch.full((1, 1, 3), math.inf)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    ones = [torch.ones(1, 3, dtype=torch.float64)]
    fused = overlap_add.overlap_add(patches, zero, zero, ones, None, (8,))
    assert fused.tolist() == [[math.inf] * 3 + [0.0] * 5]


def test_more_patches_over_a_tile_than_a_block_lists(overlap_add):
    count = 300
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(count, 1, 2, 3, generator=generator)
    origins = torch.randint(-1, 5, (count, 2), generator=generator)
    rows = torch.zeros(count, 2, dtype=torch.int64)
    tables = [torch.rand(1, size, dtype=torch.float64) for size in (2, 3)]
    actual = overlap_add.overlap_add(patches, origins, rows, tables, None, (6, 7))
    assert_fused(
        actual,
        lambda p: fusion_reference.overlap_add(p, origins, rows, tables, None, (6, 7)),
        patches,
        torch.float32,
        "many patches",
    )


def test_rows_that_do_not_exist_leave_the_patch_out(overlap_add):
    patches = torch.ones(3, 1, 2)
    origins = torch.tensor([[0], [1], [2]])
    rows = torch.tensor([[0], [5], [-1]])
    tables = [torch.ones(1, 2, dtype=torch.float64)]
    fused = overlap_add.overlap_add(patches, origins, rows, tables, None, (5,))
    assert fused.tolist() == [[1.0, 1.0, 0.0, 0.0, 0.0]]


# --- finalize_slab -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finalize_slab() -> Iterator[Callable[..., None]]:
    operators = emulator.FinalizeSlab()
    yield operators.finalize_slab
    operators.close()


@pytest.mark.parametrize("mode", finalize_cases.MODES)
@pytest.mark.parametrize("activation", finalize_cases.ACTIVATIONS)
@pytest.mark.parametrize("special", [False, True])
def test_finalize_modes_and_activations(finalize_slab, mode, activation, special):
    for channels, applied, real in itertools.product(
        (1, 2, 8, 21), (False, True), (torch.float32, torch.float64)
    ):
        case = Slab(mode, activation, channels, applied=applied, real=real, special=special)
        finalize_cases.check(case, finalize_slab)
        whole = dataclasses.replace(case, extent=(4, 6, 32), total=not special, fill=1)
        finalize_cases.check(whole, finalize_slab)


@pytest.mark.parametrize("mode", ["values", "labels", "mask", "foreground"])
def test_finalize_with_a_head(finalize_slab, mode):
    for activation, classes in itertools.product(finalize_cases.ACTIVATIONS, (1, 4, 19)):
        case = Slab(mode, activation, channels=6, classes=classes, divisor=3.0, total=True)
        finalize_cases.check(case, finalize_slab)
        finalize_cases.check(dataclasses.replace(case, real=torch.float64), finalize_slab)


def test_finalize_results_of_any_type(finalize_slab):
    for dtype in finalize_cases.INTEGERS:
        case = Slab("labels", channels=70, dtype=dtype, total=True, fill=9)
        finalize_cases.check(case, finalize_slab)
    for dtype, fill in itertools.product((torch.bool, torch.uint8), (0.0, 0.5, 2.0)):
        finalize_cases.check(Slab("mask", dtype=dtype, total=True, fill=fill), finalize_slab)
    for dtype, mode in itertools.product(FLOATS, ("values", "foreground", "entropy")):
        for real in (torch.float32, torch.float64):
            case = Slab(mode, "softmax", dtype=dtype, real=real, total=True, fill=0.25)
            finalize_cases.check(case, finalize_slab)


@pytest.mark.parametrize("ring_axis", [0, 1, 2])
def test_finalize_any_axis_and_place_of_the_ring(finalize_slab, ring_axis):
    for start, slices in ((0, 3), (1, 3), (5, 2), (7, 1), (4, 0)):
        for mode, extent in itertools.product(("labels", "values"), ((3, 5, 4), (3, 13, 41))):
            case = Slab(mode, extent=extent, ring_axis=ring_axis, start=start, slices=slices)
            case = dataclasses.replace(case, into_volume=slices > 0, clear=slices != 2)
            finalize_cases.check(case, finalize_slab)
            finalize_cases.check(dataclasses.replace(case, total=True, fill=3), finalize_slab)
