"""ratio_loss on the CPU: reference and compiled kernel against the formula, autograd, bad input."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from torch import Tensor

import voxfuse  # noqa: F401  (registers the operators)
from tests.ops.ratio_loss.cases import FORMULA_CASES, RatioCase, cases, statistics
from voxfuse import _library
from voxfuse.contract import FULL, Absent, Reduction, Sum
from voxfuse.ops.ratio_loss import ratio_loss

needs_library = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)
BACKENDS = ("auto", "reference")


def formula(stats: Tensor, case: RatioCase) -> Tensor:
    """The loss as the papers write it, in differentiable PyTorch (class volumes are constants)."""
    rows = stats[:, case.first_class :]
    weight = torch.ones(1, dtype=torch.float64)
    if case.class_weight is not None:
        weight = torch.tensor(case.class_weight, dtype=torch.float64)
    annotated = (weight != 0) if weight.ndim == 2 else torch.ones_like(rows[..., 0]).bool()
    if case.batch:
        if weight.ndim == 2:
            rows = rows * annotated.unsqueeze(-1)
            weight = (weight.sum(0) / annotated.sum(0)).nan_to_num(0)
        rows, annotated = rows.sum(0, keepdim=True), annotated.any(0, keepdim=True)
    volume = (rows[..., 0] + rows[..., 2]).detach()
    n = sum(x * rows[..., k] for k, x in enumerate(case.numerator))
    d = sum(x * rows[..., k] for k, x in enumerate(case.denominator))
    if case.class_pooling:
        pooling = volume ** -(case.class_pooling - 1.0) * weight
        n, d = (pooling * n).sum(1), (pooling * d).sum(1)
        weight, annotated = torch.ones(1, dtype=torch.float64), annotated.any(1)
    ratio = (n + case.smooth_nr) / (d + case.smooth_dr).clamp(min=case.min_denominator)
    if case.log:
        terms = -ratio.clamp(min=case.min_denominator).log()
    else:
        terms = (1 - ratio) ** case.exponent
        plain = max(case.exponent_from - case.first_class, 0)
        if plain:
            terms = torch.cat([1 - ratio[:, :plain], terms[:, plain:]], 1)
    terms = case.ratio_scale * weight * terms
    if case.reduction == Reduction.none:
        return terms[0] if case.batch else terms
    count = annotated.sum() if case.absent == Absent.ignore else terms.numel()
    loss = terms.sum() / (count if case.reduction == Reduction.mean else 1)
    ones = (1.0,) * stats.shape[1]
    on = torch.tensor(case.nll_weight or ones, dtype=torch.float64)
    off = torch.tensor(case.off_weight or ones, dtype=torch.float64)
    total = case.nll_scale * (on * stats[..., Sum.NLL]).sum()
    if stats.shape[2] == FULL:
        total = total + case.off_scale * (off * stats[..., Sum.OFF]).sum()
    volumes = stats[..., Sum.TP] + stats[..., Sum.FN]
    divisor = [
        lambda: torch.ones(()),
        lambda: (on * volumes).sum(),
        lambda: stats[:, 0, Sum.W].sum(),
        lambda: stats[..., Sum.W].sum(),
        lambda: volumes.sum(),
    ][case.normaliser]()
    return loss + total / divisor.detach()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FORMULA_CASES, ids=range(len(FORMULA_CASES)))
def test_value_and_slopes_equal_the_formula_and_its_autograd(case, backend):
    stats = statistics().requires_grad_()
    expected = formula(stats, case)
    grad = torch.rand_like(expected)
    (slopes,) = torch.autograd.grad(expected, stats, grad)
    actual = ratio_loss(stats, **case.options(), backend=backend)
    (actual_slopes,) = torch.autograd.grad(actual, stats, grad)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-14)
    if case.class_pooling:
        # The formula's volumes are constants; so are the operator's.
        torch.testing.assert_close(actual_slopes, slopes, rtol=1e-10, atol=1e-13)
    else:
        torch.testing.assert_close(actual_slopes, slopes, rtol=1e-11, atol=1e-14)


@needs_library
@hypothesis.settings(max_examples=300)
@hypothesis.given(cases())
def test_compiled_equals_reference(drawn):
    case, stats = drawn
    arguments = case.arguments()
    actual, slopes = torch.ops.voxfuse.ratio_loss(stats, *arguments)
    expected, expected_slopes = torch.ops.voxfuse_reference.ratio_loss(stats, *arguments)
    tolerance = {"rtol": 1e-11 if case.double_loss else 1e-6, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(actual, expected, **tolerance)
    torch.testing.assert_close(slopes, expected_slopes, rtol=1e-10, atol=1e-14, equal_nan=True)
    grad = torch.rand_like(actual)
    where = (case.first_class, case.batch, case.class_pooling)
    torch.testing.assert_close(
        torch.ops.voxfuse.ratio_loss_backward(grad, slopes, *where),
        torch.ops.voxfuse_reference.ratio_loss_backward(grad, slopes, *where),
        rtol=0,
        atol=0,
        equal_nan=True,
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_tiny_loss_keeps_full_relative_precision(backend):
    stats = torch.tensor([[[1e6, 3e-9, 1e-9, 0.0]]], dtype=torch.float64)
    loss = ratio_loss(stats, smooth_nr=0, smooth_dr=0, double_loss=True, backend=backend)
    assert float(loss) == pytest.approx(2e-15, rel=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_absent_classes(backend):
    stats = statistics(1, 3, 4)
    stats[0, 1] = torch.tensor([0.0, 2.0, 0.0, 0.0])

    def loss(**options):
        return float(ratio_loss(stats, double_loss=True, backend=backend, **options))

    terms = ratio_loss(stats, reduction="none", double_loss=True, backend=backend)[0]
    assert loss(absent="keep") == pytest.approx(float(terms.mean()))
    assert loss(absent="zero") == pytest.approx(float(terms[0] + terms[2]) / 3)
    assert loss(absent="ignore") == pytest.approx(float(terms[0] + terms[2]) / 2)
    assert loss(absent="ignore", reduction="sum") == pytest.approx(float(terms[0] + terms[2]))
    empty = torch.zeros(2, 3, 4, dtype=torch.float64)
    assert float(ratio_loss(empty, absent="ignore", backend=backend)) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_generalised_weights_of_absent_classes(backend):
    stats = torch.tensor([[[4.0, 1, 1, 0], [0, 3, 0, 0], [2, 1, 0, 0]]], dtype=torch.float64)
    options = {"numerator": (2.0,), "denominator": (2.0, 1.0, 1.0), "smooth_nr": 0, "smooth_dr": 0}

    def loss(stats, **more):
        return float(ratio_loss(stats, **options, class_pooling="square", backend=backend, **more))

    w = (1 / 25, 1 / 4, 1 / 4)  # class 1 borrows the largest finite weight
    numerator = 2 * (4 * w[0] + 2 * w[2])
    denominator = 10 * w[0] + 3 * w[1] + 5 * w[2]
    assert loss(stats) == pytest.approx(1 - numerator / denominator)
    denominator -= 3 * w[1]
    assert loss(stats, absent="ignore") == pytest.approx(1 - numerator / denominator)
    none_present = stats.clone()
    none_present[..., 0] = none_present[..., 2] = 0
    assert loss(none_present) == 1  # false positives cost
    assert loss(none_present, absent="zero") == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_empty_sets_agree(backend):
    stats = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    for options in ({}, {"log": True}, {"exponent": 0.5}):
        loss = ratio_loss(stats, smooth_nr=0, smooth_dr=0, backend=backend, **options)
        (slopes,) = torch.autograd.grad(loss, stats)
        assert float(loss.detach()) == 0
        assert bool((slopes == 0).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("exponent", [0.25, 0.75, 2.0])
def test_slope_at_a_perfect_prediction_is_zero(backend, exponent):
    stats = torch.tensor([[[5.0, 0, 0, 0]]], dtype=torch.float64, requires_grad=True)
    loss = ratio_loss(stats, exponent=exponent, backend=backend)
    (slopes,) = torch.autograd.grad(loss, stats)
    assert float(loss.detach()) == 0
    assert bool((slopes == 0).all())


@pytest.mark.parametrize("namespace", ["voxfuse", "voxfuse_reference"])
@pytest.mark.parametrize("case", [FORMULA_CASES[i] for i in (0, 4, 8, 11, 17)], ids=range(5))
def test_opcheck(namespace, case):
    stats = statistics().requires_grad_()
    operators = getattr(torch.ops, namespace)
    torch.library.opcheck(operators.ratio_loss.default, (stats, *case.arguments()))
    loss, slopes = operators.ratio_loss(stats.detach(), *case.arguments())
    torch.library.opcheck(
        operators.ratio_loss_backward.default,
        (loss, slopes, case.first_class, case.batch, case.class_pooling),
    )


def test_strided_statistics_are_read_right():
    stats = statistics(2, 3, 8)
    strided = stats.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    torch.testing.assert_close(ratio_loss(strided), ratio_loss(stats), rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_derivative_is_refused(backend):
    stats = statistics().requires_grad_()
    (slopes,) = torch.autograd.grad(ratio_loss(stats, backend=backend), stats, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        slopes.sum().backward()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "max"}, ValueError, "reduction: got 'max', expected one of"),
        ({"absent": 1}, ValueError, "absent: got 1, expected one of 'keep', 'ignore', 'zero'"),
        ({"first_class": 3}, ValueError, "first_class: got 3, expected 0 to 2"),
        ({"numerator": [1.0] * 9}, ValueError, "numerator: got 9 numbers for 8 sums"),
        ({"exponent": 0}, ValueError, "exponent: got 0, expected a number > 0"),
        ({"exponent_from": -1}, ValueError, "exponent_from: got -1, expected an int >= 0"),
        (
            {"exponent_from": 1, "class_pooling": "square"},
            ValueError,
            "exponent_from: got 1, expected 0 with pooled classes",
        ),
        ({"class_weight": torch.ones(2)}, ValueError, r"class_weight: got shape \(2,\), expected"),
        ({"nll_weight": [1.0] * 3}, TypeError, "nll_weight: expected a torch.Tensor, got list"),
        ({"reduction": "none", "nll_scale": 1}, ValueError, "reduction: 'none' cannot be combined"),
    ],
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        ratio_loss(statistics(), **options)


def test_bad_statistics():
    with pytest.raises(TypeError, match="stats: got float32 of shape"):
        ratio_loss(statistics().float())
    with pytest.raises(ValueError, match=r"stats: got shape \(2, 3, 5\), expected \(B, C, 4\)"):
        ratio_loss(statistics()[..., :5])
    with pytest.raises(ValueError, match="stats: got 4 sums a class, but off_scale"):
        ratio_loss(statistics(sums=4), off_scale=1)


@needs_library
def test_the_compiled_operator_checks_by_itself():
    arguments = list(RatioCase().arguments())
    with pytest.raises(RuntimeError, match="stats: expected float64"):
        torch.ops.voxfuse.ratio_loss(statistics().float(), *arguments)
    arguments[7] = torch.ones(5, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="class_weight: expected a contiguous float64"):
        torch.ops.voxfuse.ratio_loss(statistics(), *arguments)
