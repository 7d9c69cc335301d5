"""soft_confusion on the CPU: reference and compiled kernels, wrapper, autograd, bad input."""

from __future__ import annotations

import itertools

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

import voxfuse
from tests.ops.soft_confusion.cases import (
    ACTIVATIONS,
    ALL,
    SURE_AND_WRONG,
    ConfusionCase,
    certain_probabilities,
    check,
    check_gradient_of_sure,
    cotangents,
    schema_arguments,
    tensors,
)
from voxfuse import _library
from voxfuse.contract import Activation, Sum
from voxfuse.reference import soft_confusion as reference

needs_library = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)


# --- The reference itself -----------------------------------------------------------------------


def brute_force(p: np.ndarray, g: np.ndarray, w: np.ndarray) -> np.ndarray:
    """TP, FP, FN by the definition, for (B, C, V) probabilities."""
    w = w[:, None]
    return np.stack([(w * p * g).sum(-1), (w * p * (1 - g)).sum(-1), (w * (1 - p) * g).sum(-1)], -1)


def test_reference_equals_the_definition():
    logits = torch.randn(2, 3, 11, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, 11))
    weight = torch.rand(2, 11, dtype=torch.float64)
    p = logits.softmax(1).numpy()
    g = np.stack([(labels.numpy() == c) for c in range(3)], 1).astype(float)
    expected = brute_force(p, g, weight.numpy())
    actual = voxfuse.soft_confusion(logits, labels, mask=weight, backend="reference")
    np.testing.assert_allclose(actual[..., :3].numpy(), expected, rtol=1e-13)
    nll = torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weight
    torch.testing.assert_close(actual[..., 3].sum(1), nll.sum(1), rtol=1e-12, atol=0)


@pytest.mark.parametrize("focal_classes", [0, 1, 2])
def test_gamma_of_some_classes_is_a_mixture_of_two_exponents(focal_classes):
    """In the reference: the first classes as with gamma, the others as without."""
    for likelihood in ACTIVATIONS:
        case = ConfusionCase(
            dtype=torch.float64, activation=likelihood, gamma=1.5, focal_classes=focal_classes
        )
        input, target, _ = tensors(case)
        options = dict(activation=likelihood, full=True, backend="reference")
        mixed = voxfuse.soft_confusion(
            input, target, gamma=1.5, focal_classes=focal_classes, **options
        )
        focal = voxfuse.soft_confusion(input, target, gamma=1.5, **options)
        plain = voxfuse.soft_confusion(input, target, **options)
        assert torch.equal(mixed[:, :focal_classes], focal[:, :focal_classes])
        assert torch.equal(mixed[:, focal_classes:], plain[:, focal_classes:])
        assert not torch.equal(focal, plain)


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("focal_classes", [0, 1, 2, 9])
def test_gamma_of_some_classes(operators, activation, focal_classes):
    for full, target, dtype in itertools.product(
        (False, True), ("labels", "dense"), (torch.float32, torch.float64)
    ):
        case = ConfusionCase(
            dtype=dtype,
            target=target,
            target_dtype=torch.uint8 if target == "labels" else torch.float32,
            activation=activation,
            gamma=1.5,
            focal_classes=focal_classes,
            full=full,
        )
        check(case, operators)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("focal_classes", [None, 1])
@pytest.mark.parametrize("overlap", ["product", "min"])
@pytest.mark.parametrize(
    ("activation", "likelihood"), list(itertools.product(ACTIVATIONS, ACTIVATIONS))
)
def test_reference_backward_equals_autograd_of_its_forward(
    activation, likelihood, overlap, gamma, focal_classes
):
    case = ConfusionCase(
        dtype=torch.float64,
        target="dense",
        target_dtype=torch.float64,
        weight=torch.float64,
        activation=activation,
        likelihood=likelihood,
        overlap=overlap,
        gamma=gamma,
    )
    input, target, weight = tensors(case)
    arguments = schema_arguments(case)
    input.requires_grad_()
    sums = reference.soft_confusion(input, target, weight, *arguments, True, focal_classes)
    grad = torch.randn_like(sums)
    (expected,) = torch.autograd.grad(sums, input, grad)
    actual = reference.soft_confusion_backward(
        grad, input.detach(), target, weight, *arguments, focal_classes
    )
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", SURE_AND_WRONG)
def test_reference_in_float32_keeps_the_gradient_of_the_sure_and_wrong(name):
    """It is what the kernels are measured against: a few roundings of the largest element."""
    case, kind = SURE_AND_WRONG[name]
    input, target, weight = tensors(case)
    arguments = schema_arguments(case)
    grad = cotangents(case, kind)
    truth, plain = (
        reference.soft_confusion_backward(grad, input.to(dtype), target, weight, *arguments)
        for dtype in (torch.float64, torch.float32)
    )
    largest = truth.flatten(1).abs().amax(1).clamp(min=1e-30)
    error = (plain - truth).flatten(1).abs().amax(1) / largest
    assert float(error.max()) < 4e-6


# --- The compiled kernels against the truth -------------------------------------------------------


@needs_library
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("classes", [1, 2, 3, 4, 5, 16, 17, 40])
@pytest.mark.parametrize("full", [False, True])
def test_class_paths(classes, dtype, full):
    activation = "sigmoid" if classes == 1 else "softmax"
    for weight in (None, torch.float32):
        check(
            ConfusionCase(
                classes=classes,
                spatial=(7, 5, 13),
                dtype=dtype,
                target_dtype=torch.uint8,
                weight=weight,
                activation=activation,
                full=full,
            ),
            torch.ops.voxfuse,
        )


@needs_library
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("weight", [None, torch.float32])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("classes", [2, 3, 4, 8, 16, 17])
@pytest.mark.parametrize("target", ["labels", "dense", "shares"])
def test_the_cores_of_the_common_options_agree_with_the_general_one(
    target, classes, activation, weight, layout
):
    """Any gamma takes the general core; here no class has it."""
    case = ConfusionCase(
        classes=classes,
        spatial=(7, 5, 13),
        target=target,
        target_dtype=torch.int64 if target == "labels" else torch.float32,
        weight=weight,
        activation=activation,
        layout=layout,
        full=True,
    )
    given = tensors(case)
    options = schema_arguments(case)[:-1]
    grad = torch.randn(2, classes, 4, generator=torch.Generator().manual_seed(1)).double()
    grad[1, :, Sum.NLL] = 0  # a sample without a likelihood
    rounding = torch.finfo(torch.float32).eps
    found = []
    for gamma, focal_classes in ((0.0, None), (2.0, 0)):
        sums = torch.ops.voxfuse.soft_confusion(*given, *options, gamma, True, focal_classes)
        gradient = torch.ops.voxfuse.soft_confusion_backward(
            grad, *given, *options, gamma, focal_classes
        )
        found.append((sums, gradient))
    (sums, gradient), (general_sums, general_gradient) = found
    # A lane adds some 30 terms, each of a few roundings.
    torch.testing.assert_close(sums, general_sums, rtol=32 * rounding, atol=0)
    largest = float(general_gradient.abs().max())
    torch.testing.assert_close(gradient, general_gradient, rtol=0, atol=8 * rounding * largest)


@needs_library
@pytest.mark.parametrize("target", ["labels", "labels_channel"])
@pytest.mark.parametrize("ignore_index", [None, 255, -1])
def test_ignored_labels(target, ignore_index):
    check(ConfusionCase(target=target, ignore_index=ignore_index, full=True), torch.ops.voxfuse)


@needs_library
@pytest.mark.parametrize("classes", [1, 4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dense_targets(classes, activation):
    case = ConfusionCase(
        classes=classes, target="dense", activation=activation, overlap="min", full=True
    )
    check(case, torch.ops.voxfuse)


@needs_library
def test_integer_indicator_of_one_class():
    case = ConfusionCase(classes=1, activation="sigmoid", ignore_index=9)
    check(case, torch.ops.voxfuse)


@needs_library
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_layouts_are_read_in_place_and_the_gradient_keeps_them(layout, dtype):
    for classes, target in itertools.product((2, 3, 20), ("labels", "dense")):
        check(
            ConfusionCase(
                classes=classes,
                layout=layout,
                dtype=dtype,
                target=target,
                target_dtype=torch.uint8,
                weight=torch.bool,
            ),
            torch.ops.voxfuse,
        )


@needs_library
@hypothesis.given(
    case=st.builds(
        ConfusionCase,
        batch=st.integers(1, 3),
        classes=st.sampled_from([1, 2, 3, 4, 6, 16, 19]),
        spatial=st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
        target=st.sampled_from(["labels", "labels_channel", "dense"]),
        target_dtype=st.sampled_from([torch.uint8, torch.float32]),
        weight=st.sampled_from([None, torch.bool, torch.float32, torch.float64]),
        activation=st.sampled_from(ACTIVATIONS),
        likelihood=st.sampled_from((None, *ACTIVATIONS)),
        overlap=st.sampled_from(["product", "min"]),
        gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        full=st.booleans(),
        layout=st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"]),
        seed=st.integers(0, 1000),
    )
)
@hypothesis.settings(max_examples=200)
def test_any_combination(case):
    check(case, torch.ops.voxfuse)


@needs_library
@pytest.mark.parametrize("name", SURE_AND_WRONG)
def test_gradient_where_the_network_is_sure_and_wrong(name):
    check_gradient_of_sure(*SURE_AND_WRONG[name], torch.ops.voxfuse)


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
def test_overlap_min_keeps_what_a_probability_rounded_to_one_misses(operators):
    """1 - p is 7.7e-9 for a gap of log(1.3e8) or so, and p itself 1 in float32."""
    logits = torch.tensor([[[18.68], [0.0]]])
    labels = torch.tensor([[0]])
    p = float(logits.double().softmax(1)[0, 1, 0])
    sums = operators.soft_confusion(logits, labels, None, 2, 2, 1, None, 0.0, False)
    assert sums[0, 0, 2].item() == pytest.approx(p, rel=1e-6)
    grad = torch.ones(1, 2, 4, dtype=torch.float64)
    grad[..., 0] = -1
    gradient = operators.soft_confusion_backward(grad, logits, labels, None, 2, 2, 1, None, 0.0)
    # d/dz of (FP - TP + FN + NLL) of both classes: h = -2 and 1, and p - 1 of the likelihood.
    assert gradient[0, 0, 0].item() == pytest.approx(-4 * p, rel=1e-6)
    assert gradient[0, 1, 0].item() == pytest.approx(4 * p, rel=1e-6)


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
def test_overlap_min_counts_a_tiny_target_that_is_missed(operators):
    p, g = torch.zeros(1, 2, 1), torch.full((1, 2, 1), 1e-9)
    sums = operators.soft_confusion(p, g, None, 0, 2, 1, None, 0.0, False)
    torch.testing.assert_close(sums[0, :, :3], torch.tensor([[0, 0, 1e-9]] * 2).double())


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
def test_overlap_min_of_no_probability_has_no_slope(operators):
    p, g = torch.full((1, 2, 1), float("nan")), torch.ones(1, 2, 1)
    grad = torch.ones(1, 2, 4, dtype=torch.float64)
    gradient = operators.soft_confusion_backward(grad, p, g, None, 0, 0, 1, None, 0.0)
    assert gradient.isnan().all()


@needs_library
def test_chunks_and_ranges_of_a_larger_volume():
    check(
        ConfusionCase(batch=1, classes=2, spatial=(41, 43, 45), target_dtype=torch.uint8),
        torch.ops.voxfuse,
    )
    check(
        ConfusionCase(batch=3, classes=5, spatial=(20, 21, 22), weight=torch.float32),
        torch.ops.voxfuse,
    )


# --- Properties of every CPU backend --------------------------------------------------------------


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_excluded_voxels_contribute_nothing_even_if_nan(operators, activation):
    case = ConfusionCase(classes=3, spatial=(50,), activation=activation, target_dtype=torch.uint8)
    input, target, _ = tensors(case)
    keep = torch.rand(2, 50) < 0.5
    poisoned = input.masked_fill(~keep.unsqueeze(1), float("nan"))
    clean = input.masked_fill(~keep.unsqueeze(1), 0.5)
    arguments = schema_arguments(case)
    by_weight = operators.soft_confusion(poisoned, target, keep, *arguments, True)
    expected = operators.soft_confusion(clean, target, keep, *arguments, True)
    assert torch.equal(by_weight, expected)
    ignored = target.masked_fill(~keep, 77)
    options = (*arguments[:3], 77, 0.0)
    by_index = operators.soft_confusion(poisoned, ignored, None, *options, True)
    assert torch.equal(by_index, expected)
    grad = torch.randn(2, 3, 8, dtype=torch.float64)
    gradient = operators.soft_confusion_backward(grad, poisoned, ignored, None, *options)
    hidden = ~keep.unsqueeze(1).expand_as(gradient)
    assert torch.equal(gradient[hidden], torch.zeros_like(gradient[hidden]))
    assert not gradient.isnan().any()


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_certain_probabilities_have_the_slope_of_the_overlap_alone(operators, gamma):
    """A log-likelihood that no loss uses has infinite slopes there; they must not show."""
    certain_probabilities(operators, gamma, "cpu")


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
@pytest.mark.parametrize("classes", [2, 3, 20])
@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_nan_logits_give_nan(operators, classes, activation):
    input, target, _ = tensors(ConfusionCase(classes=classes, spatial=(100,)))
    for c in range(classes):
        broken = input.clone()
        broken[0, c, 3] = float("nan")
        code = Activation[activation]
        sums = operators.soft_confusion(broken, target, None, code, code, 0, None, 0.0, False)
        assert sums[0].isnan().any(), f"a NaN in class {c} vanished"
        assert not sums[1].isnan().any()


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("classes", [2, 3, 18])
def test_infinite_logits_are_limits(operators, dtype, classes):
    logits = torch.zeros(1, classes, 3, dtype=dtype)
    logits[0, 1, 0] = float("inf")
    logits[0, 0, 1] = float("-inf")
    logits[0, 1, 2] = 1e4
    labels = torch.tensor([[1, 1, 1]])
    sums = operators.soft_confusion(logits, labels, None, 2, 2, 0, None, 0.0, False)
    assert sums[0, 1, 0] == pytest.approx(2 + 1 / (classes - 1), rel=1e-6)
    assert sums[0, 0, 1] == 0
    assert torch.isfinite(sums).all()
    grad = torch.ones(1, classes, 4, dtype=torch.float64)
    gradient = operators.soft_confusion_backward(grad, logits, labels, None, 2, 2, 0, None, 0.0)
    assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("operators", ALL, ids=["auto", "reference"])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_nearly_perfect_predictions_keep_their_relative_accuracy(operators, gamma):
    """FN and NLL of a logit gap of 30 are about 1e-13: differences from 1 would give 0 or NaN."""
    logits = torch.tensor([[[30.0] * 40, [0.0] * 40]])
    labels = torch.zeros(1, 40, dtype=torch.uint8)
    for activation, rest in ((2, np.exp(-30.0)),):
        sums = operators.soft_confusion(
            logits, labels, None, activation, activation, 0, None, gamma, False
        )
        assert sums[0, 0, 2].item() == pytest.approx(40 * rest, rel=1e-5)
        assert sums[0, 0, 3].item() == pytest.approx(40 * rest * rest**gamma, rel=1e-4)
        grad = torch.ones(1, 2, 4, dtype=torch.float64)
        gradient = operators.soft_confusion_backward(
            grad, logits, labels, None, activation, activation, 0, None, gamma
        )
        assert torch.isfinite(gradient).all()
        truth = reference.soft_confusion_backward(
            grad, logits.double(), labels, None, activation, activation, 0, None, gamma
        )
        torch.testing.assert_close(gradient.double(), truth, rtol=1e-4, atol=0)


def test_one_class_softmax_is_certain():
    sums = voxfuse.soft_confusion(torch.randn(1, 1, 5), torch.ones(1, 1, 5), gamma=0.5)
    assert sums[0, 0].tolist() == [5, 0, 0, 0]


@pytest.mark.parametrize("shape", [(0, 2, 4), (2, 3, 0), (1, 2), (3, 4, 1, 1)])
def test_empty_and_tiny_shapes(shape):
    logits = torch.randn(shape, requires_grad=True)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    sums = voxfuse.soft_confusion(logits, labels)
    assert sums.shape == (*shape[:2], 4)
    sums.sum().backward()
    assert logits.grad.shape == logits.shape


@needs_library
@pytest.mark.parametrize("classes", [2, 3, 16, 30])
def test_same_bits_for_any_number_of_threads_and_every_run(classes):
    input, target, weight = tensors(
        ConfusionCase(batch=2, classes=classes, spatial=(33, 17, 29), weight=torch.float32)
    )
    grad = torch.randn(2, classes, 4, dtype=torch.float64)
    arguments = (2, 2, 0, None, 0.0)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            results.append(
                (
                    torch.ops.voxfuse.soft_confusion(input, target, weight, *arguments, False),
                    torch.ops.voxfuse.soft_confusion_backward(
                        grad, input, target, weight, *arguments
                    ),
                )
            )
    finally:
        torch.set_num_threads(threads)
    for sums, gradient in results[1:]:
        assert torch.equal(sums, results[0][0])
        assert torch.equal(gradient, results[0][1])


@needs_library
def test_every_output_is_written(poisoned_memory):
    for case in (
        ConfusionCase(spatial=(3, 5, 7), weight=torch.bool),
        ConfusionCase(classes=2, spatial=(1,), layout="channels_last"),
        ConfusionCase(classes=33, spatial=(129,), dtype=torch.float16),
    ):
        check(case, torch.ops.voxfuse)


@pytest.mark.parametrize("classes", [1, 3])
@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_gradcheck(classes, gamma, backend):
    case = ConfusionCase(
        batch=2,
        classes=classes,
        spatial=(3, 2),
        dtype=torch.float64,
        activation="sigmoid" if classes == 1 else "softmax",
        target_dtype=torch.float32,
        weight=torch.float64,
    )
    input, target, weight = tensors(case)

    def sums(x):
        return voxfuse.soft_confusion(
            x,
            target,
            mask=weight,
            activation=case.activation,
            gamma=gamma,
            full=True,
            backend=backend,
        )

    assert torch.autograd.gradcheck(sums, input.requires_grad_())


@pytest.mark.parametrize("namespace", ["voxfuse", "voxfuse_reference"])
@pytest.mark.parametrize(
    "case",
    [
        ConfusionCase(),
        ConfusionCase(layout="channels_last"),
        ConfusionCase(layout="sliced"),
        ConfusionCase(layout="permuted", dtype=torch.float16),
        ConfusionCase(spatial=(0,)),
        ConfusionCase(classes=1, spatial=(1,), activation="sigmoid", target_dtype=torch.float32),
    ],
    ids=lambda case: f"{case.layout}-{case.spatial}",
)
def test_opcheck(namespace, case):
    input, target, weight = tensors(case)
    operator = getattr(torch.ops, namespace).soft_confusion.default
    arguments = (target, weight, *schema_arguments(case), False)
    torch.library.opcheck(operator, (input.requires_grad_(), *arguments))
    grad = torch.randn(case.batch, case.classes, 4, dtype=torch.float64)
    backward = getattr(torch.ops, namespace).soft_confusion_backward.default
    torch.library.opcheck(backward, (grad, input.detach(), target, weight, *schema_arguments(case)))


def test_compiles_without_a_graph_break():
    input, target, _ = tensors(ConfusionCase(classes=4, spatial=(6, 5)))

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x, y):
        sums = voxfuse.soft_confusion(x, y, ignore_index=9)
        return sums[..., 0].sum() / sums.sum()

    compiled = input.clone().requires_grad_()
    step(compiled, target).backward()
    eager = input.clone().requires_grad_()
    sums = voxfuse.soft_confusion(eager, target, ignore_index=9)
    (sums[..., 0].sum() / sums.sum()).backward()
    torch.testing.assert_close(compiled.grad, eager.grad)


def test_second_derivatives_are_refused():
    logits = torch.randn(1, 2, 4, requires_grad=True)
    sums = voxfuse.soft_confusion(logits, torch.zeros(1, 4, dtype=torch.int64))
    (first,) = torch.autograd.grad(sums[..., 0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()


def test_tensor_subclasses_are_unwrapped():
    class Tagged(torch.Tensor):
        pass

    logits = torch.randn(1, 2, 4)
    labels = torch.zeros(1, 1, 4)
    expected = voxfuse.soft_confusion(logits, labels)
    tagged = logits.as_subclass(Tagged).requires_grad_()
    actual = voxfuse.soft_confusion(tagged, labels.as_subclass(Tagged))
    assert type(actual) is torch.Tensor
    assert torch.equal(actual, expected)
    actual.sum().backward()
    assert tagged.grad is not None
