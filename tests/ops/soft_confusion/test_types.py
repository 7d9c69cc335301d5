"""Labels, dense targets and weights of every type: the same numbers give the same bits."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import voxfuse
from tests.emulation import emulator
from tests.ops.soft_confusion.cases import lay_out
from voxfuse import _library
from voxfuse.contract import Activation
from voxfuse.ops import _checks
from voxfuse.ops.soft_confusion import validate_labels

TYPES = _checks.NUMBER_DTYPES

#: What a call of the corpus is drawn from; every two choices of two of these meet in some call.
CHOICES: dict[str, tuple[Any, ...]] = {
    "target": TYPES,
    "weight": (None, *TYPES),
    "kind": ("two labels", "labels", "many labels", "dense", "indicator"),
    "input": (torch.float32, torch.bfloat16, torch.float64),
    "activation": ("softmax", "sigmoid"),
    "layout": ("contiguous", "with channel", "strided", "permuted"),
    "ignored": (None, 1, 100),
    "voxels": ((4, 4, 8), (5, 3, 9)),
}
CLASSES = {"two labels": 2, "labels": 3, "many labels": 20, "dense": 3, "indicator": 1}


def corpus(choices: dict[str, tuple[Any, ...]]) -> list[dict[str, Any]]:
    """Random calls in which every pair of choices occurs, each the best of a few drawn."""
    drawn = random.Random(0)
    names = list(choices)

    def pairs(call: dict[str, Any]) -> set[tuple[Any, ...]]:
        return {(a, call[a], b, call[b]) for a, b in itertools.combinations(names, 2)}

    missing = {
        (a, x, b, y)
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(choices[a], choices[b])
    }
    calls = []
    while missing:
        a, x, b, y = min(missing, key=str)
        offers = [{n: drawn.choice(v) for n, v in choices.items()} | {a: x, b: y} for _ in range(8)]
        best = max(offers, key=lambda call: len(pairs(call) & missing))
        missing -= pairs(best)
        calls.append(best)
    return calls


def placed(tensor: Tensor, layout: str) -> Tensor:
    """The same values of (B, [C,] *spatial) elsewhere in memory."""
    if layout == "strided":
        return torch.stack([tensor, tensor], -1)[..., 0]
    return lay_out(tensor, layout)


def results(operators: Any, call: dict[str, Any], plain: bool) -> tuple[Tensor, Tensor]:
    """Sums and gradient; ``plain``: of int64 targets and float64 weights with the same values."""
    generator = torch.Generator().manual_seed(1)
    classes, voxels = CLASSES[call["kind"]], (2, *call["voxels"])

    def numbers(shape: tuple[int, ...], most: int, dtype: torch.dtype) -> Tensor:
        high = 2 if dtype == torch.bool else most
        return torch.randint(0, high, shape, generator=generator)

    input = torch.randn(2, classes, *call["voxels"], generator=generator).to(call["input"])
    dense = call["kind"] in ("dense", "indicator")
    ignored = None if call["kind"] == "dense" else call["ignored"]
    most = {"dense": 4, "indicator": 2}.get(call["kind"], classes)
    target = numbers((2, classes, *call["voxels"]) if dense else voxels, most, call["target"])
    if ignored is not None and call["target"] != torch.bool:
        where = torch.rand(target.shape, generator=generator) < 0.3
        target = target.masked_fill(where, ignored)
    if call["layout"] == "with channel" and not dense:
        target = target.unsqueeze(1)
    target = placed(target.to(torch.int64 if plain else call["target"]), call["layout"])
    weight = None
    if call["weight"] is not None:
        weight = numbers(voxels, 4, call["weight"])
        weight = placed(weight.to(torch.float64 if plain else call["weight"]), call["layout"])
    activation = Activation[call["activation"]]
    options = (activation, activation, 0, ignored, 0.0)
    grad = torch.randn(2, classes, 8, generator=generator, dtype=torch.float64)
    return (
        operators.soft_confusion(input, target, weight, *options, True, any_target=True),
        operators.soft_confusion_backward(grad, input, target, weight, *options),
    )


@pytest.fixture(scope="module", params=["reference", "cpp", "triton", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[tuple[str, Any]]:
    """A backend's name and operators: CUDA's emulated, Triton's in its interpreter."""
    name = request.param
    if name == "cuda":
        if emulator.missing() is not None:
            pytest.skip(f"no CUDA emulation: {emulator.missing()}")
        operators = emulator.SoftConfusion()
        yield name, operators
        operators.close()
        return
    if name == "cpp" and not _library.defines_operators():
        pytest.skip("the compiled CPU library is not built")
    if name == "triton":
        pytest.importorskip("triton", reason="the package triton is not installed")
        if torch.cuda.is_available():
            pytest.skip("Triton compiles for the GPU here: its interpreter is off")
    namespace = "voxfuse" if name == "cpp" else f"voxfuse_{name}"
    yield name, getattr(torch.ops, namespace)


def test_every_pair_of_types_layouts_and_masks_gives_the_bits_of_int64_and_float64(backend):
    name, operators = backend
    choices = dict(CHOICES)
    if name == "triton":
        # A tenth of a second a call: every type of weights meets one of targets.
        del choices["weight"]
        choices |= {"kind": ("labels", "dense", "indicator"), "input": (torch.float32,)}
        choices |= {"layout": ("contiguous", "strided"), "ignored": (None, 1), "voxels": ((35,),)}
    following = dict(zip(TYPES, (*TYPES[5:], *TYPES[:5]), strict=True))
    plain: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = {}
    for drawn in corpus(choices):
        call = {"weight": following[drawn["target"]], **drawn}
        # What the values depend on: bool has two of them.
        types = [None if x is None else x == torch.bool for x in (call["target"], call["weight"])]
        key = (*types, *(call[other] for other in CHOICES if other not in ("target", "weight")))
        if key not in plain:
            plain[key] = results(operators, call, True)
        sums, gradient = results(operators, call, False)
        assert torch.equal(sums, plain[key][0]), f"sums of {call}"
        assert torch.equal(gradient, plain[key][1]), f"gradient of {call}"


def one_label(
    operators: Any, label: int, dtype: torch.dtype, classes: int, ignore_index: int | None
) -> list[Tensor]:
    """Sums and gradient of three voxels, of which the second has ``label`` and logits of NaN."""
    target = torch.tensor([[0, label, 1]], dtype=dtype)
    input = torch.linspace(-2, 2, 3 * classes).reshape(1, classes, 3).clone()
    input[:, :, 1] = float("nan")
    grad = torch.linspace(-1, 1, 4 * classes, dtype=torch.float64).reshape(1, classes, 4)
    arguments = (input, target, None, 2, 2, 0, ignore_index, 0.0)
    return [
        operators.soft_confusion(*arguments, False),
        operators.soft_confusion_backward(grad, *arguments),
    ]


@pytest.mark.parametrize(
    ("dtype", "label"),
    [
        (torch.uint8, 255),
        (torch.int8, -1),
        (torch.int16, -1),
        (torch.uint16, 2**16 - 1),
        (torch.uint32, 2**32 - 1),
        (torch.int64, -(2**40)),
        (torch.uint64, 2**63 - 1),
        (torch.bfloat16, -100),
        (torch.float64, 2**40),
    ],
)
def test_any_label_that_its_type_holds_can_be_ignored(backend, dtype, label):
    _, operators = backend
    expected = one_label(operators, 77, torch.int64, 3, 77)
    actual = one_label(operators, label, dtype, 3, label)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize(
    ("dtype", "label", "classes", "ignore_index"),
    [
        # Bits that without their sign, or in 32 of them, are a class:
        (torch.int8, -1, 300, None),
        (torch.int16, -25536, 40001, None),
        (torch.int64, 2**32 + 1, 3, None),
        (torch.uint64, 2**32 + 1, 3, None),
        # or that with another sign are the ignored label:
        (torch.uint8, 255, 3, -1),
        (torch.int8, -1, 3, 255),
        (torch.uint16, 2**16 - 1, 3, -1),
        (torch.uint32, 2**32 - 1, 3, -1),
        (torch.uint64, 2**64 - 1, 3, -1),
    ],
)
def test_a_label_counts_as_what_it_is_in_its_own_type(backend, dtype, label, classes, ignore_index):
    name, operators = backend
    if name in ("cuda", "triton") and classes > 300:
        pytest.skip("so many classes take the emulation and the interpreter minutes")
    if name in ("cuda", "triton"):
        expected = one_label(operators, -77, torch.int64, classes, None)
        actual = one_label(operators, label, dtype, classes, ignore_index)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    else:
        with pytest.raises(RuntimeError, match=rf"target: label {label} is outside \[0, {classes}"):
            one_label(operators, label, dtype, classes, ignore_index)


def test_a_short_unsigned_label_may_name_more_classes_than_the_signed_type(backend):
    name, operators = backend
    # So many take the emulation and the interpreter minutes: there, a byte beyond int8.
    classes, dtype = (200, torch.uint8) if name in ("cuda", "triton") else (40001, torch.uint16)
    given = torch.zeros(1, classes, 2)
    label = torch.full((1, 2), classes - 1)
    arguments = (None, 2, 2, 0, None, 0.0, False)
    sums = operators.soft_confusion(given, label.to(dtype), *arguments)
    assert torch.equal(sums, operators.soft_confusion(given, label, *arguments))
    assert float(sums[0, -1, 0]) == pytest.approx(2 / classes)


@pytest.mark.parametrize("name", ["reference", "auto"])
@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.uint8, 255), (torch.int8, -1), (torch.int64, 255), (torch.float32, 255)],
)
def test_the_only_label_outside_the_classes_may_mark_voxels_to_ignore(name, dtype, value):
    labels = torch.tensor([[0, 1, 0, 0, 2]]).to(dtype)
    labels[0, 2:4] = value
    hint = f"; if {value} marks voxels to ignore, pass ignore_index={value}$"
    logits = torch.zeros(1, 3, 5)
    with pytest.raises(ValueError, match=rf"label {value} is .*, first at target\[0, 2\]{hint}"):
        voxfuse.soft_confusion(logits, labels, backend=name)
    with pytest.raises(ValueError, match=hint):
        validate_labels(labels, 3, None)
    voxfuse.soft_confusion(logits, labels, backend=name, ignore_index=value)
    other = labels.clone()
    other[0, 4] = 7
    for wrong, ignore_index in ((other, None), (labels, 9)):
        with pytest.raises(ValueError, match=r"first at target\[0, 2\]$"):
            voxfuse.soft_confusion(logits, wrong, backend=name, ignore_index=ignore_index)


@pytest.mark.parametrize(
    ("dtype", "classes"), [(torch.bfloat16, 257), (torch.float16, 2049), (torch.int8, 300)]
)
def test_labels_of_a_floating_type_must_tell_the_classes_apart(dtype, classes):
    labels = torch.zeros(1, 2, dtype=dtype)
    voxfuse.soft_confusion(torch.zeros(1, classes, 2), labels)
    if dtype.is_floating_point:
        with pytest.raises(TypeError, match=f"target: got {labels.dtype}".replace("torch.", "")):
            voxfuse.soft_confusion(torch.zeros(1, classes + 1, 2), labels)
    # One value a class has no numbers of classes in it.
    dense = torch.zeros(1, 2 * classes, 2, dtype=dtype)
    voxfuse.soft_confusion(torch.zeros(1, 2 * classes, 2), dense)
