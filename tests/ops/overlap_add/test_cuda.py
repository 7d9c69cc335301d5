"""overlap_add's CUDA kernels, emulated on the host under sanitizers, against the reference."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch

from tests.accuracy import assert_accurate
from tests.emulation import emulator
from tests.ops.overlap_add.cases import (
    CHANNELS,
    FLOATS,
    assert_fused,
    fusion_case,
    gradient_scale,
    special_patches,
)
from voxfuse.fusion.grids import _cover, plan_grid
from voxfuse.reference import overlap_add as fusion_reference

pytestmark = [emulator.NEEDED, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def overlap_add() -> Iterator[emulator.OverlapAdd]:
    operators = emulator.OverlapAdd()
    yield operators
    operators.close()


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
    weights = [table[:1].contiguous() for table in tables]
    cover = [_cover(*axis) for axis in axes]
    rows = torch.zeros_like(grid.origins)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    alone = torch.zeros(3, *patch, dtype=accumulator)
    least = [_cover(v, (0,), p) for v, p in zip(vectors, patch, strict=True)]
    arguments = (patches[:1], grid.origins[:1] * 0, rows[:1], weights, None, 0, 0, patch[0], 0, 0.3)
    overlap_add.overlap_add_(alone, *arguments, cover=least)
    assert torch.equal(alone.to(dtype), patches[0])
    nothing = [torch.full_like(table, -1) for table in least]
    overlap_add.overlap_add_(alone, *arguments, cover=nothing)
    assert torch.equal(alone.to(dtype), patches[0])
    for axis in range(len(patch)):
        extent = list(volume)
        extent[axis] = volume[axis] - 1
        place = (axis, 1, volume[axis], 1 << axis, 0.3, 0, cover)
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
    weights = [table[:1].contiguous() for table in tables]
    cover = [_cover(*axis) for axis in axes]
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    ring = torch.zeros(channels, *volume, dtype=accumulator)
    rows = torch.zeros_like(grid.origins)
    place = (grid.origins, rows, weights, None, 0, 0, volume[0], 0, 0.3, 2, cover)
    overlap_add.overlap_add_(ring, patches, *place)
    torch.testing.assert_close(ring.sum(0), torch.ones_like(ring[0]))  # of weights that sum to 1
    truth, plain = torch.zeros_like(ring).double(), torch.zeros_like(ring)
    for accumulated in (truth, plain):
        fusion_reference.overlap_add_(accumulated, patches.to(accumulated.dtype), *place)
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
