"""ratio_loss's CUDA kernel, emulated on the host under sanitizers, against the reference."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from tests.emulation import emulator
from tests.ops.ratio_loss.cases import check_ratio, with_absent_class

pytestmark = [emulator.NEEDED, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def ratio_loss() -> Iterator[emulator.RatioLoss]:
    operators = emulator.RatioLoss()
    yield operators
    operators.close()


@pytest.mark.parametrize(("samples", "classes", "sums"), [(1, 2, 4), (2, 3, 8), (5, 130, 8)])
@pytest.mark.parametrize("reduction", [0, 1, 2])
@pytest.mark.parametrize("class_pooling", [0, 1, 2, 3])
def test_ratio_loss_reductions(ratio_loss, samples, classes, sums, reduction, class_pooling):
    stats = with_absent_class(samples, classes, sums)
    weights = (None, True, "by sample")
    for batch, absent, first_class in itertools.product((False, True), (0, 1, 2), (0, 1)):
        check_ratio(
            ratio_loss,
            stats,
            reduction=reduction,
            class_pooling=class_pooling,
            batch=batch,
            absent=absent,
            first_class=first_class,
            class_weight=weights[(absent + first_class) % 3],
        )


@pytest.mark.parametrize("exponent", [1.0, 0.75, 2.0])
@pytest.mark.parametrize("log", [False, True])
def test_ratio_loss_terms(ratio_loss, exponent, log):
    stats = with_absent_class(3, 4, 8)
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
    stats = with_absent_class(3, 4, 8)
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
