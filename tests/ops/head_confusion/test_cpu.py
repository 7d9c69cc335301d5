"""head_confusion on the CPU: reference and compiled kernels, wrapper, autograd, bad input."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import subprocess
import sys

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

import voxfuse
from tests.ops.head_confusion.cases import (
    CHUNK_BYTES,
    check,
    check_types,
    head_tensors,
    unfused,
)
from tests.ops.soft_confusion.cases import (
    ACTIVATIONS,
    ConfusionCase,
    partial_cases,
    schema_arguments,
)
from voxfuse import _library
from voxfuse.ops.head_confusion import head_confusion
from voxfuse.reference.head_confusion import chunk_voxels

needs_library = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)
BOTH = [
    pytest.param("voxfuse", id="auto", marks=needs_library),
    pytest.param("voxfuse_reference", id="reference"),
]
OPTIONS = (2, 2, 0, None, 0.0)


def operators(namespace: str):
    return getattr(torch.ops, namespace)


# --- Against the unfused pipeline -----------------------------------------------------------------


@pytest.mark.parametrize("namespace", BOTH)
def test_every_type_of_targets_and_masks_gives_the_same_bits(namespace):
    check_types(operators(namespace))


@pytest.mark.parametrize("namespace", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("classes", "channels"), [(1, 1), (1, 5), (2, 32), (3, 7), (6, 4), (7, 9), (40, 3), (117, 33)]
)
def test_any_number_of_classes_and_features(namespace, classes, channels, dtype):
    case = ConfusionCase(
        classes=classes,
        spatial=(3, 7, 11),
        dtype=dtype,
        target_dtype=torch.uint8,
        activation="sigmoid" if classes == 1 else "softmax",
        weight=torch.float32,
    )
    check(case, channels, operators(namespace))


@pytest.mark.parametrize("namespace", BOTH)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced", "permuted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("channels", [2, 20])
def test_any_layout(namespace, layout, dtype, channels):
    case = ConfusionCase(spatial=(5, 6, 7), dtype=dtype, layout=layout, ignore_index=2)
    check(case, channels, operators(namespace))


@pytest.mark.parametrize(
    ("activation", "likelihood", "overlap", "gamma"),
    list(itertools.product(ACTIVATIONS, ACTIVATIONS, ["product", "min"], [0.0, 2.0])),
)
@needs_library
def test_any_option(activation, likelihood, overlap, gamma):
    case = ConfusionCase(
        target="dense",
        target_dtype=torch.float32,
        activation=activation,
        likelihood=likelihood,
        overlap=overlap,
        gamma=gamma,
        focal_classes=1,
        full=True,
    )
    check(case, 6, torch.ops.voxfuse)
    check(dataclasses.replace(case, focal_classes=None), 6, torch.ops.voxfuse)


@needs_library
@hypothesis.given(
    case=st.builds(
        ConfusionCase,
        batch=st.integers(1, 3),
        classes=st.integers(1, 20),
        spatial=st.lists(st.integers(1, 9), min_size=0, max_size=3).map(tuple),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
        target=st.sampled_from(["labels", "labels_channel", "dense"]),
        target_dtype=st.sampled_from([torch.uint8, torch.float32]),
        weight=st.sampled_from([None, torch.bool, torch.float32]),
        activation=st.sampled_from(ACTIVATIONS),
        overlap=st.sampled_from(["product", "min"]),
        gamma=st.sampled_from([0.0, 0.5, 2.0]),
        full=st.booleans(),
        layout=st.sampled_from(["contiguous", "channels_last", "sliced", "permuted"]),
        seed=st.integers(0, 1000),
    ),
    channels=st.integers(1, 40),
    bias=st.booleans(),
    chunk_bytes=st.sampled_from([1, 3000, CHUNK_BYTES]),
)
@hypothesis.settings(max_examples=100)
def test_any_combination(case, channels, bias, chunk_bytes):
    check(case, channels, torch.ops.voxfuse, bias=bias, chunk_bytes=chunk_bytes)


@pytest.mark.parametrize("namespace", BOTH)
def test_float64_equals_the_unfused_pipeline_to_rounding(namespace):
    case = ConfusionCase(classes=30, spatial=(9, 10, 11), dtype=torch.float64)
    given = head_tensors(case, 12)
    (expected,) = unfused(None, *given, OPTIONS, False)
    sums = operators(namespace).head_confusion(*given, *OPTIONS, False, CHUNK_BYTES)
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    grad = torch.randn_like(sums)
    actual = operators(namespace).head_confusion_backward(
        grad, *given, *OPTIONS, CHUNK_BYTES, True, True
    )
    for a, e in zip(actual, unfused(grad, *given, OPTIONS, False), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12 * e.abs().max().item())


@needs_library
def test_tiles_and_ranges_of_a_larger_volume():
    check(
        ConfusionCase(classes=5, spatial=(30, 31, 32), target_dtype=torch.uint8),
        8,
        torch.ops.voxfuse,
    )
    large = ConfusionCase(batch=1, classes=117, spatial=(21, 22, 23), target_dtype=torch.uint8)
    check(large, 32, torch.ops.voxfuse)


@pytest.mark.parametrize("namespace", BOTH)
@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 1 << 30])
def test_the_chunk_size_changes_rounding_only(namespace, chunk_bytes):
    check(ConfusionCase(spatial=(10, 11, 12)), 8, operators(namespace), chunk_bytes=chunk_bytes)


def test_the_reference_keeps_to_its_budget():
    assert chunk_voxels(117, 32, 4, 64 << 20) * (117 + 32) * 4 <= 64 << 20
    assert chunk_voxels(10_000, 10_000, 8, 1) == 1


# --- Properties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", BOTH)
def test_excluded_voxels_contribute_nothing_even_if_nan(namespace):
    case = ConfusionCase(spatial=(150,), target_dtype=torch.uint8)
    features, weight, bias, target, _ = head_tensors(case, 6)
    keep = torch.rand(2, 150) < 0.5
    poisoned = features.masked_fill(~keep.unsqueeze(1), float("nan"))
    clean = features.masked_fill(~keep.unsqueeze(1), 0)
    ignored = target.masked_fill(~keep, 77)
    ops = operators(namespace)
    by_index = (*OPTIONS[:3], 77, 0.0)
    for labels, mask, options in ((target, keep, OPTIONS), (ignored, None, by_index)):
        call = (labels, mask, *options)
        sums = ops.head_confusion(poisoned, weight, bias, *call, True, CHUNK_BYTES)
        expected = ops.head_confusion(clean, weight, bias, *call, True, CHUNK_BYTES)
        assert torch.equal(sums, expected)
        grad = torch.randn(2, 3, 8, dtype=torch.float64)
        tail = (*call, CHUNK_BYTES, True, True)
        actual = ops.head_confusion_backward(grad, poisoned, weight, bias, *tail)
        wanted = ops.head_confusion_backward(grad, clean, weight, bias, *tail)
        for a, w in zip(actual, wanted, strict=True):
            assert torch.equal(a, w)
        hidden = actual[0].masked_select(~keep.unsqueeze(1))
        assert torch.equal(hidden, torch.zeros_like(hidden))


@pytest.mark.parametrize("namespace", BOTH)
@pytest.mark.parametrize("where", ["features", "weight", "bias"])
def test_nan_gives_nan(namespace, where):
    tensors = dict(
        zip(
            ("features", "weight", "bias", "target", "voxel_weight"),
            head_tensors(ConfusionCase(spatial=(70,)), 4),
            strict=True,
        )
    )
    tensors[where].view(-1)[1] = float("nan")
    sums = operators(namespace).head_confusion(*tensors.values(), *OPTIONS, False, CHUNK_BYTES)
    assert sums[0].isnan().any()


@needs_library
@pytest.mark.parametrize(("classes", "channels"), [(2, 32), (40, 5)])
def test_same_bits_for_any_number_of_threads_and_every_run(classes, channels):
    case = ConfusionCase(classes=classes, spatial=(33, 17, 29), weight=torch.float32)
    given = head_tensors(case, channels)
    grad = torch.randn(2, classes, 4, dtype=torch.float64)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            sums = torch.ops.voxfuse.head_confusion(*given, *OPTIONS, False, CHUNK_BYTES)
            gradients = torch.ops.voxfuse.head_confusion_backward(
                grad, *given, *OPTIONS, CHUNK_BYTES, True, True
            )
            results.append((sums, *gradients))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        for mine, first in zip(result, results[0], strict=True):
            assert torch.equal(mine, first)


@needs_library
def test_every_output_is_written(poisoned_memory):
    check(ConfusionCase(spatial=(3, 5, 7), weight=torch.bool), 3, torch.ops.voxfuse)
    case = ConfusionCase(classes=33, spatial=(129,), dtype=torch.float16, layout="channels_last")
    check(case, 9, torch.ops.voxfuse)


MEMORY = """
import resource, torch, voxfuse
from voxfuse.ops.head_confusion import head_confusion
K, C, n = 8, 117, {side}
features = torch.randn(1, K, n, n, n).requires_grad_()
features.grad = torch.zeros_like(features)
weight = torch.randn(C, K, requires_grad=True)
labels = torch.zeros(1, n, n, n, dtype=torch.uint8)
def step(f, t):
    sums = head_confusion(f, weight, None, t)
    return torch.autograd.grad(sums[..., 1].sum(), (f, weight))
step(features[..., :8], labels[..., :8])  # threads, libraries
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
gradient, _ = step(features, labels)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print((after - before) * 1024 - gradient.numel() * 4)
"""


@needs_library
def test_memory_above_the_gradient_does_not_grow_with_the_volume():
    """The logits of 96^3 voxels would be 414 MB."""
    extra = []
    for side in (64, 96):
        code = MEMORY.format(side=side)
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        extra.append(int(run.stdout))
    assert max(extra) < 24 << 20, f"{extra} bytes above the features' gradient"


@pytest.mark.parametrize("need", list(itertools.product([False, True], repeat=3)))
@pytest.mark.parametrize("namespace", BOTH)
def test_only_wanted_gradients_are_made(namespace, need):
    features, weight, bias, target, _ = head_tensors(
        ConfusionCase(spatial=(9,), dtype=torch.float64), 4
    )
    inputs = [features, weight, bias]
    for tensor, wanted in zip(inputs, need, strict=True):
        tensor.requires_grad_(wanted)
    sums = operators(namespace).head_confusion(*inputs, target, None, *OPTIONS, False, CHUNK_BYTES)
    assert sums.requires_grad == any(need)
    if any(need):
        sums[..., 3].sum().backward()
    assert [x.grad is not None for x in inputs] == list(need)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 3, 0), (1, 3), (2, 3, 1, 1)])
@pytest.mark.parametrize("namespace", BOTH)
def test_empty_and_tiny_shapes(namespace, shape):
    features = torch.randn(shape, requires_grad=True)
    weight = torch.randn(5, 3, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    backend = "reference" if namespace == "voxfuse_reference" else "auto"
    sums = head_confusion(features, weight, bias, labels, backend=backend)
    assert sums.shape == (shape[0], 5, 4)
    sums.sum().backward()
    assert features.grad.shape == shape
    assert torch.isfinite(weight.grad).all()
    assert torch.isfinite(bias.grad).all()


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("classes", [1, 3])
def test_gradcheck(backend, classes):
    case = ConfusionCase(
        classes=classes,
        spatial=(3, 2),
        dtype=torch.float64,
        target_dtype=torch.float32,
        weight=torch.float64,
        spread=1.0,
    )
    features, weight, bias, target, voxel_weight = head_tensors(case, 4)

    def sums(*head):
        return head_confusion(
            *head,
            target,
            mask=voxel_weight,
            activation="sigmoid" if classes == 1 else "softmax",
            gamma=2.0,
            full=True,
            backend=backend,
        )

    inputs = [x.requires_grad_() for x in (features, weight, bias)]
    assert torch.autograd.gradcheck(sums, inputs)


@pytest.mark.parametrize("namespace", BOTH)
@pytest.mark.parametrize(
    "case",
    [
        ConfusionCase(),
        ConfusionCase(layout="channels_last"),
        ConfusionCase(layout="sliced", dtype=torch.float16),
        ConfusionCase(layout="permuted"),
        ConfusionCase(spatial=(0,)),
        ConfusionCase(classes=1, spatial=(1,), activation="sigmoid", target_dtype=torch.float32),
    ],
    ids=lambda case: f"{case.layout}-{case.spatial}",
)
def test_opcheck(namespace, case):
    features, weight, bias, *companions = head_tensors(case, 4)
    options = schema_arguments(case)
    head = [x.requires_grad_() for x in (features, weight, bias)]
    operator = operators(namespace).head_confusion.default
    torch.library.opcheck(operator, (*head, *companions, *options, False, CHUNK_BYTES))
    head = [x.detach() for x in head]
    grad = torch.randn(case.batch, case.classes, 4, dtype=torch.float64)
    backward = operators(namespace).head_confusion_backward.default
    for bias_given, wanted in ((True, (True, True)), (False, (False, True))):
        last = head[2] if bias_given else None
        arguments = (grad, *head[:2], last, *companions, *options, CHUNK_BYTES, *wanted)
        torch.library.opcheck(backward, arguments)


def test_compiles_without_a_graph_break():
    features, weight, bias, target, _ = head_tensors(ConfusionCase(classes=4, spatial=(6, 5)), 3)

    def step(f, w, b):
        sums = head_confusion(f, w, b, target, ignore_index=9)
        return sums[..., 0].sum() / sums.sum()

    results = []
    for run in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [x.clone().requires_grad_() for x in (features, weight, bias)]
        run(*inputs).backward()
        results.append([x.grad for x in inputs])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_takes_the_head_to_half_precision_and_leaves_the_rest(compiled):
    case = ConfusionCase(
        target="dense", target_dtype=torch.float32, spatial=(40,), weight=torch.float32
    )
    features, weight, bias, target, voxel_weight = head_tensors(case, 6)

    def step(f, w, b):
        with torch.autocast("cpu", torch.bfloat16):
            return head_confusion(f, w, b, target, mask=voxel_weight)

    run = torch.compile(step, fullgraph=True, backend="aot_eager") if compiled else step
    half = [x.to(torch.bfloat16) for x in (features, weight, bias)]
    expected = head_confusion(*half, target, mask=voxel_weight)
    inputs = [x.clone().requires_grad_() for x in (features, weight, bias)]
    sums = run(*inputs)
    assert torch.equal(sums, expected)
    sums.sum().backward()
    assert all(x.grad.dtype == torch.float32 for x in inputs)


def test_a_convolution_weight_is_taken_as_it_is():
    head = torch.nn.Conv3d(4, 3, 1)
    features, labels = torch.randn(1, 4, 2, 3, 4), torch.randint(0, 3, (1, 1, 2, 3, 4))
    sums = head_confusion(features, head.weight, head.bias, labels)
    expected = voxfuse.soft_confusion(head(features), labels)
    torch.testing.assert_close(sums, expected, rtol=1e-5, atol=1e-6)
    sums.sum().backward()
    assert head.weight.grad.shape == head.weight.shape


def test_second_derivatives_are_refused():
    features, weight, bias, target, _ = head_tensors(ConfusionCase(spatial=(5,)), 4)
    sums = head_confusion(features.requires_grad_(), weight, bias, target)
    (first,) = torch.autograd.grad(sums[..., 0].sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        first.sum().backward()


# --- Bad input ------------------------------------------------------------------------------------

BAD = [
    (dict(features=[1.0]), TypeError, "features: expected a torch.Tensor, got list"),
    (dict(features=torch.zeros(3)), ValueError, r"features: got shape \(3,\), expected \(B, K"),
    (dict(features=torch.zeros(1, 3, 4, dtype=torch.int64)), TypeError, "features: got int64"),
    (dict(weight=torch.zeros(2, 4)), ValueError, r"weight: got shape \(2, 4\), expected \(C, 3\)"),
    (dict(weight=torch.zeros(2, 3, 3, 3, 3)), ValueError, r"weight: got shape \(2, 3, 3, 3, 3\)"),
    (dict(weight=torch.zeros(0, 3)), ValueError, r"weight: got shape \(0, 3\)"),
    (
        dict(weight=torch.zeros(2, 3).double()),
        TypeError,
        "weight: got float64 .* expected the features' dtype float32",
    ),
    (dict(bias=torch.zeros(3)), ValueError, r"bias: got shape \(3,\), expected \(2,\)"),
    (dict(bias=torch.zeros(2).half()), TypeError, "bias: got float16"),
    (dict(target=torch.zeros(1, 5)), ValueError, r"target: got shape \(1, 5\)"),
    (dict(target=torch.tensor([[0, 1, 2, 1]])), ValueError, r"target: label 2 is outside \[0, 2\)"),
    (dict(target=torch.zeros(1, 2, 4, requires_grad=True)), ValueError, "target: requires grad"),
    (dict(mask=torch.zeros(1, 3)), ValueError, r"mask: got shape \(1, 3\)"),
    (dict(ignore_index="x"), TypeError, "ignore_index: got 'x'"),
    (dict(gamma=-1.0), ValueError, "gamma: got -1.0"),
    (dict(activation="relu"), ValueError, "activation: got 'relu'"),
    (dict(chunk_bytes=0), ValueError, "chunk_bytes: got 0, expected an int >= 1"),
    (dict(chunk_bytes=1.5), ValueError, "chunk_bytes: got 1.5"),
    (dict(backend="gpu"), ValueError, "backend: got 'gpu'"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD, ids=range(len(BAD)))
def test_bad_input_names_the_argument(change, error, message):
    arguments = dict(
        features=torch.zeros(1, 3, 4),
        weight=torch.zeros(2, 3),
        bias=torch.zeros(2),
        target=torch.zeros(1, 4, dtype=torch.int64),
    )
    arguments |= copy.copy(change)
    positional = [arguments.pop(name) for name in ("features", "weight", "bias", "target")]
    with pytest.raises(error, match=message):
        head_confusion(*positional, **arguments)


@needs_library
def test_the_operator_itself_raises_the_same_words():
    call = torch.ops.voxfuse.head_confusion
    rest = (None, *OPTIONS, False, CHUNK_BYTES)
    features, labels = torch.zeros(1, 3, 4), torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"weight: got shape \(2, 4\), expected \(C, 3\)"):
        call(features, torch.zeros(2, 4), None, labels, *rest)
    with pytest.raises(RuntimeError, match=r"bias: got shape \(3,\), expected \(2,\)"):
        call(features, torch.zeros(2, 3), torch.zeros(3), labels, *rest)
    wrong = torch.tensor([[0, 1, 9, 2]])
    options = (*OPTIONS[:3], 9, 0.0)
    with pytest.raises(RuntimeError, match=r"target: label 2 .* or ignore_index 9"):
        call(features, torch.zeros(2, 3), None, wrong, None, *options, False, CHUNK_BYTES)


# --- Partial labels -------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", BOTH)
def test_samples_in_which_classes_are_not_annotated(namespace):
    for index, case in enumerate(partial_cases(seed=40, count=24, spatial=(3, 7, 11))):
        check(case, 6, operators(namespace), chunk_bytes=8192 if index % 2 else CHUNK_BYTES)


@pytest.mark.parametrize("namespace", BOTH)
def test_features_of_voxels_whose_label_is_excluded_may_be_nan(namespace):
    case = ConfusionCase(classes=3, spatial=(70,))
    features, weight, bias, labels, _ = head_tensors(case, 4)
    kept = torch.tensor([[True, False, True]] * 2)
    features[(labels == 1)[:, None].expand_as(features)] = float("nan")
    rest = (*OPTIONS, CHUNK_BYTES, True, True, None, 0, kept)
    grad = torch.ones(2, 3, 4, dtype=torch.float64)
    gradients = operators(namespace).head_confusion_backward(
        grad, features, weight, bias, labels, None, *rest
    )
    assert not any(bool(gradient.isnan().any()) for gradient in gradients)
    assert not bool(gradients[1][1].any())
    assert not bool(gradients[2][1].any())
