"""ratio_loss's Triton kernel: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import hypothesis
import pytest
import torch

from tests.ops.ratio_loss.cases import FORMULA_CASES, RatioCase, cases, statistics
from voxfuse.ops.ratio_loss import ratio_loss

pytest.importorskip("triton", reason="the package triton is not installed")
from voxfuse.triton_kernels import ratio_loss as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = torch.ops.voxfuse_triton
REFERENCE = torch.ops.voxfuse_reference


def check(case: RatioCase, stats: torch.Tensor) -> None:
    """Both operators against the reference, whose arithmetic is float64 as well."""
    arguments = case.arguments()
    on_device = [x.to(DEVICE) if isinstance(x, torch.Tensor) else x for x in arguments]
    actual, slopes = OPERATORS.ratio_loss(stats.to(DEVICE), *on_device)
    expected, expected_slopes = REFERENCE.ratio_loss(stats, *arguments)
    assert actual.dtype == expected.dtype
    # 1e-11 leaves room for the power and the logarithm of numbers near 0 and 1.
    tolerance = {"rtol": 1e-11 if case.double_loss else 1e-6, "atol": 1e-14, "equal_nan": True}
    torch.testing.assert_close(actual.cpu(), expected, **tolerance)
    torch.testing.assert_close(
        slopes.cpu(), expected_slopes, rtol=1e-10, atol=1e-14, equal_nan=True
    )
    generator = torch.Generator().manual_seed(0)
    grad = torch.rand(expected.shape, generator=generator, dtype=expected.dtype)
    where = (case.first_class, case.batch, case.class_pooling)
    gradient = OPERATORS.ratio_loss_backward(grad.to(DEVICE), slopes, *where)
    exact = REFERENCE.ratio_loss_backward(grad, slopes.cpu(), *where)
    torch.testing.assert_close(gradient.cpu(), exact, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", FORMULA_CASES, ids=range(len(FORMULA_CASES)))
def test_every_form_of_the_loss(case):
    check(case, statistics())


@hypothesis.settings(max_examples=150)
@hypothesis.given(cases())
def test_any_combination(drawn):
    check(*drawn)


@pytest.mark.parametrize("tile", [1, 8, 1024])
def test_rows_are_walked_over_when_they_do_not_fit(tile, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tile)
    stats = statistics(5, 3, 8)
    stats[1, 1, :3] = 0
    for case in (
        RatioCase(absent=1, nll_scale=1.0, off_scale=0.5, normaliser=2),
        RatioCase(class_pooling=3, absent=1, reduction=0),
        RatioCase(batch=True, first_class=1, normaliser=4, nll_scale=1.0),
    ):
        check(case, stats)


def test_many_classes():
    check(RatioCase(nll_scale=1.0, normaliser=1, first_class=1), statistics(2, 300, 4))


@pytest.mark.parametrize("shape", [(0, 3, 4), (1, 1, 8)])
def test_empty_and_tiny_statistics(shape):
    for case in (
        RatioCase(),
        RatioCase(batch=True),
        RatioCase(reduction=0),
        RatioCase(reduction=0, batch=True),
    ):
        check(case, statistics(*shape))


def test_a_tiny_loss_keeps_full_relative_precision():
    stats = torch.tensor([[[1e6, 3e-9, 1e-9, 0.0]]], dtype=torch.float64, device=DEVICE)
    options = {"smooth_nr": 0, "smooth_dr": 0, "double_loss": True}
    loss = ratio_loss(stats, **options, backend="triton")
    assert float(loss) == pytest.approx(2e-15, rel=1e-12)


def test_every_output_is_written(poisoned_memory):
    for case in (FORMULA_CASES[0], FORMULA_CASES[7], RatioCase(ratio_scale=0.0, reduction=0)):
        check(case, statistics())


def test_same_bits_in_every_run():
    stats = statistics(3, 5, 8).to(DEVICE)
    arguments = RatioCase(exponent=0.75, nll_scale=1.0, normaliser=3).arguments()
    first = OPERATORS.ratio_loss(stats, *arguments)
    for _ in range(20 if DEVICE == "cuda" else 2):
        again = OPERATORS.ratio_loss(stats, *arguments)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.skipif(DEVICE == "cuda", reason="the property is the wrapper's, not the device's")
def test_opcheck():
    stats = statistics().requires_grad_()
    case = FORMULA_CASES[8]
    torch.library.opcheck(OPERATORS.ratio_loss.default, (stats, *case.arguments()))
    loss, slopes = OPERATORS.ratio_loss(stats.detach(), *case.arguments())
    where = (case.first_class, case.batch, case.class_pooling)
    torch.library.opcheck(OPERATORS.ratio_loss_backward.default, (loss, slopes, *where))
