"""Grids: the peers' rules, coverage, and weights that are a partition of unity."""

from __future__ import annotations

import importlib
import itertools
import re

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from voxfuse.fusion import windows
from voxfuse.fusion.grids import Grid, plan_grid, tables_for_origins
from voxfuse.reference import windows as numpy_twin

SETTINGS = dict(
    extent=st.integers(1, 120),
    patch=st.integers(1, 60),
    overlap=st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.625, 0.75, 0.9]),
)
RULES = ("shifted", "even", "half_patch")


@hypothesis.given(**SETTINGS)
def test_shifted_starts_are_monais(extent, patch, overlap):
    utils = pytest.importorskip("monai.data.utils")
    inferers = pytest.importorskip("monai.inferers.utils")
    padded = max(extent, patch)
    margin = (padded - extent) // 2
    interval = inferers._get_scan_interval((padded,), (patch,), 1, (overlap,))
    expected = [
        s[0].start - margin for s in utils.dense_patch_slices((padded,), (patch,), interval)
    ]
    assert list(plan_grid((extent,), (patch,), overlap).starts[0]) == expected


@hypothesis.given(**SETTINGS)
def test_even_starts_are_nnunets(extent, patch, overlap):
    hypothesis.assume(extent >= patch)
    target = patch * (1 - overlap)
    count = int(np.ceil((extent - patch) / target)) + 1
    step = (extent - patch) / (count - 1) if count > 1 else 1e9
    expected = [int(np.round(step * i)) for i in range(count)]
    assert list(plan_grid((extent,), (patch,), overlap, "even").starts[0]) == expected


@hypothesis.given(extent=st.integers(1, 120), patch=st.integers(2, 60))
def test_half_patch_grid_covers_every_voxel_twice(extent, patch):
    starts = plan_grid((extent,), (patch,), 0.5, "half_patch").starts[0]
    assert starts[0] == -(patch // 2)
    assert all(b - a == patch // 2 for a, b in itertools.pairwise(starts))
    for x in (0, extent // 2, extent - 1):
        assert sum(start <= x < start + patch for start in starts) >= 2


@hypothesis.given(**SETTINGS)
def test_compiled_grids_equal_the_numpy_ones(extent, patch, overlap):
    try:
        host = importlib.import_module("voxfuse._host")
    except ImportError:
        pytest.skip("voxfuse._host is not built")
    for rule in ("shifted_starts", "even_starts"):
        arguments = (extent, patch, overlap)
        assert getattr(host, rule)(*arguments) == getattr(numpy_twin, rule)(*arguments)
    assert host.half_patch_starts(extent, patch) == numpy_twin.half_patch_starts(extent, patch)
    starts = numpy_twin.shifted_starts(extent, patch, overlap)
    window = numpy_twin.bspline(patch, 5)
    np.testing.assert_array_equal(
        host.normalised_rows(window, starts, extent),
        numpy_twin.normalised_rows(window, starts, extent),
    )


@hypothesis.given(**SETTINGS, rule=st.sampled_from(RULES), name=st.sampled_from(windows.NAMES[:-1]))
def test_axis_weights_are_a_partition_of_unity(extent, patch, overlap, rule, name):
    hypothesis.assume(name != "monai_gaussian")
    overlap = 0.5 if rule == "half_patch" else overlap
    grid = plan_grid((extent,), (patch,), overlap, rule)
    tables = grid.tables(name)
    assert tables.total is None
    total = np.zeros(extent)
    count = np.zeros(extent, dtype=int)
    for start, row in zip(grid.starts[0], tables.weights[0].numpy(), strict=True):
        for t in range(patch):
            if 0 <= start + t < extent:
                total[start + t] += row[t]
                count[start + t] += 1
                alone = row[t]
            else:
                assert row[t] == 0
    np.testing.assert_allclose(total, 1, rtol=1e-14)
    assert (total[count == 1] == 1).all()
    assert len(grid.starts[0]) > 1 or alone == 1


def test_origins_run_with_the_last_axis_fastest():
    grid = plan_grid((6, 6), (4, 4), 0.5)
    assert grid.origins.tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]
    assert grid.rows.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert len(grid) == 4


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_shuffled_grid_is_recognised(shuffle):
    grid = plan_grid((20, 17), (8, 6), 0.5)
    order = torch.randperm(len(grid)) if shuffle else torch.arange(len(grid))
    tables = tables_for_origins(grid.origins[order], "bspline", (20, 17), (8, 6))
    assert tables.total is None
    expected = grid.tables("bspline")
    for axis in range(2):
        torch.testing.assert_close(
            tables.weights[axis][tables.rows[:, axis]],
            expected.weights[axis][expected.rows[order, axis]],
            rtol=0,
            atol=0,
        )


def test_repeated_or_missing_origins_take_the_general_way():
    grid = plan_grid((20, 17), (8, 6), 0.5)
    for origins in (grid.origins[:-1], torch.cat([grid.origins, grid.origins[:1]])):
        assert tables_for_origins(origins, "bspline", (20, 17), (8, 6)).total is not None


def test_a_dense_window_takes_the_general_way():
    assert plan_grid((20, 17), (8, 6), 0.5).tables("monai_gaussian").total is not None
    assert Grid((9,), (3,), ((0, 3, 6),)).tables(np.ones(3)).total is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((), ()), "volume_shape: got (), expected 1 to 3 sizes >= 1"),
        (((4, 0), (2, 2)), "volume_shape: got (4, 0), expected 1 to 3 sizes >= 1"),
        (((4, 4), (2,)), "patch_shape: got (2,), expected 2 sizes >= 1"),
        (((4,), (0,)), "patch_shape: got (0,), expected 1 sizes >= 1"),
        (((4,), (2,), 1.0), "overlap: got 1.0, expected numbers in [0, 1), one or 1"),
        (((4, 4), (2, 2), (0.5,)), "overlap: got (0.5,), expected numbers in [0, 1), one or 2"),
        (
            ((4,), (2,), 0.25, "half_patch"),
            "overlap: got 0.25, expected 0.5 with rule 'half_patch'",
        ),
        (
            ((4,), (2,), 0.5, "odd"),
            "rule: got 'odd', expected one of 'shifted', 'even', 'half_patch'",
        ),
    ],
)
def test_bad_grids(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message) + "$"):
        plan_grid(*arguments)
