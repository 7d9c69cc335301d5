"""overlap_add of weights with a lower bound."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tests.accuracy import compute_dtype
from tests.ops.overlap_add.cases import (
    ALL,
    FLOATS,
    make_case,
    needs_library,
)
from voxfuse.fusion.grids import _cover, plan_grid, weights_for_origins
from voxfuse.fusion.windows import Raised
from voxfuse.ops import overlap_add as ops
from voxfuse.reference.overlap_add import activated

# --- Weights with a lower bound -------------------------------------------------------------------

GRIDS = dict(
    volume=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    patch=st.lists(st.integers(1, 24), min_size=3, max_size=3),
    overlap=st.floats(0, 0.8),
    floor=st.sampled_from([1e-6, 1e-2, 0.3, 2.0]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 3),
)


def floored_case(volume, patch, overlap, floor, dtype=torch.float32, seed=0):
    """Arguments of ``overlap_add_`` from the patches on, by a grid, its cover, and the same by a
    total."""
    grid = plan_grid(volume, patch, overlap)
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.rand(p, dtype=torch.float64, generator=generator).numpy() for p in patch]
    raised = Raised(vectors, floor)
    # A single axis is raised beforehand by the fusion; the operator takes it all the same.
    table = weights_for_origins(grid.origins, raised, volume, patch)
    if len(patch) == 1:
        table.weights[:] = [torch.from_numpy(vectors[0])[None]]
        table.cover[:] = [_cover(vectors[0], grid.starts[0], volume[0])]
    patches = torch.randn(len(grid), 2, *patch, generator=generator).to(dtype)
    dense = torch.from_numpy(raised.dense())[None]
    total = torch.zeros(volume, dtype=torch.float64)
    ops.overlap_weights_(total, grid.origins, grid.rows * 0, [dense], backend="reference")
    tables = (grid.origins, grid.rows * 0)
    return (
        (patches, *tables, table.weights),
        table.cover,
        (patches, *tables, [dense], total),
    )


@pytest.mark.parametrize("namespace", ALL, ids=str)
@hypothesis.given(**GRIDS, data=st.data())
def test_a_floor_is_what_the_dense_window_and_its_sum_give(namespace, data, **options):
    """In a ring along any axis, of mirrored patches, too."""
    options["patch"] = options["patch"][: len(options["volume"])]
    volume, floor, dtype = options["volume"], options["floor"], options["dtype"]
    factors, cover, dense = floored_case(**options)
    axes = len(volume)
    axis = data.draw(st.integers(0, axes - 1))
    depth = data.draw(st.integers(1, volume[axis]))
    start = data.draw(st.integers(0, volume[axis] - depth))
    flip = data.draw(st.integers(0, 2**axes - 1))
    extent = list(volume)
    extent[axis] = depth
    wide = compute_dtype(dtype)
    ring = torch.zeros(2, *extent, dtype=wide)
    namespace.overlap_add_(ring, *factors, None, axis, start, start + depth, flip, floor, 0, cover)
    # The truth: the volume's sums, turned into the ring's slots.
    full = torch.zeros(2, *volume, dtype=torch.float64)
    size = torch.zeros_like(full)
    for target, patches in ((full, dense[0].double()), (size, dense[0].double().abs())):
        torch.ops.voxfuse_reference.overlap_add_(target, patches, *dense[1:], 0, 0, volume[0], flip)

    def in_slots(tensor):
        return torch.stack(
            [tensor.select(1 + axis, start + (slot - start) % depth) for slot in range(depth)],
            1 + axis,
        )

    # Twelve roundings for the weights and products, one a term; the truth has as many.
    u = torch.finfo(wide).eps / 2 * (2 if wide == torch.float64 else 1)
    bound = (len(dense[0]) + 12) * u * in_slots(size)
    assert ((ring.double() - in_slots(full)).abs() <= bound).all()


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [1, 2])
def test_activated_patches_with_a_floor(namespace, dtype, activation):
    """In a ring and of mirrored patches; what is activated beforehand gives the same."""
    volume, floor = (23, 20, 31), 0.2
    (patches, *tables), cover, _ = floored_case(volume, (9, 10, 16), 0.5, floor, dtype)
    wide = compute_dtype(dtype)
    place = (None, 2, 3, 28, 5, floor)
    rings = [torch.zeros(2, 23, 20, 25, dtype=wide) for _ in range(2)]
    namespace.overlap_add_(rings[0], patches, *tables, *place, activation, cover)
    before = activated(patches.to(wide), activation, 1)
    namespace.overlap_add_(rings[1], before, *tables, *place, 0, cover)
    eps = torch.finfo(wide).eps
    torch.testing.assert_close(*rings, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_voxel_under_one_patch_with_a_floor_keeps_its_bits(namespace, dtype):
    factors, cover, _ = floored_case((9, 10, 11), (9, 10, 11), 0.5, 0.2, dtype)
    ring = torch.zeros(2, 9, 10, 11, dtype=compute_dtype(dtype))
    namespace.overlap_add_(ring, *factors, None, 0, 0, 9, 0, 0.2, 0, cover)
    assert torch.equal(ring.to(dtype), factors[0][0])


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_patches_that_the_tables_do_not_name_weigh_nothing(namespace, dtype, axis):
    factors, cover, _ = floored_case((9, 10, 40), (5, 6, 21), 0.5, 0.2, dtype)
    full, ring = torch.zeros(2, 2, 9, 10, 40, dtype=compute_dtype(dtype))
    options = (None, 0, 0, 9, 0, 0.2, 0, cover)
    namespace.overlap_add_(full, *factors, *options)
    cover[axis][:, 2:5] = -1.0
    namespace.overlap_add_(ring, *factors, *options)
    full.narrow(1 + axis, 2, 3).zero_()
    assert torch.equal(ring, full)


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_floor_gives_the_same_bits_for_any_batches_and_threads(dtype):
    (patches, origins, rows, weights), cover, _ = floored_case(
        (40, 33, 90), (20, 18, 50), 0.5, 0.1, dtype
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads, size in ((1, len(patches)), (2, 1), (3, 3), (5, 7)):
            torch.set_num_threads(threads)
            ring = torch.zeros(2, 40, 33, 90, dtype=compute_dtype(dtype))
            for first in range(0, len(patches), size):
                part = slice(first, first + size)
                tables = (patches[part], origins[part], rows[part], weights, None)
                torch.ops.voxfuse.overlap_add_(ring, *tables, 0, 0, 40, 0, 0.1, 0, cover)
            results.append(ring)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"floor": 0.0}, ValueError, r"floor: got 0.0, expected a finite number > 0 with cover"),
        ({"floor": float("nan")}, ValueError, r"floor: got nan"),
        ({"cover": []}, ValueError, r"cover: got shapes \[\], expected one \(m, extent\) tensor"),
        (
            {"cover": [torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 8)]},
            ValueError,
            r"cover: got shapes \[\(2, 5\), \(2, 8\)\], expected .* up to \(6, 8\)",
        ),
        ({"cover": [torch.ones(2, 6), torch.ones(2, 8)]}, TypeError, r"cover: got .*float32"),
        (
            {"total": torch.ones(6, 8, dtype=torch.float64)},
            ValueError,
            r"total: got one beside floor",
        ),
    ],
)
def test_a_bad_floor_is_named(changes, error, message):
    factors, cover, _ = floored_case((6, 8), (4, 4), 0.5, 0.1)
    options = {"floor": 0.1, "cover": cover, **changes}
    with pytest.raises(error, match=message):
        ops.overlap_add_(torch.zeros(2, 6, 8), *factors, **options)


@needs_library
def test_a_bad_floor_is_refused_by_the_operator():
    factors, cover, _ = floored_case((6, 8), (4, 4), 0.5, 0.1)
    ring = torch.zeros(2, 6, 8)
    for tables, floor, message in (
        (None, 0.1, "cover: are 0, expected 2 with floor"),
        (cover, 0.0, "cover: are 2, expected 0 without floor"),
        (cover, -1.0, "floor: got -1"),
        ([cover[0], cover[1][:, :7]], 0.1, r"cover: got shape \(2, 7\), expected"),
        ([cover[0][:, :5], cover[1]], 0.1, "or more"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.voxfuse.overlap_add_(ring, *factors, None, 0, 0, 6, 0, floor, 0, tables)


@needs_library
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_bits_do_not_depend_on_threads_or_run(dtype, general, activation):
    options = {"dtype": dtype, "general": general, "activation": activation}
    case = make_case((17, 19, 41), (9, 8, 10), 12, **options)
    grad = torch.randn(2, *case.volume).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            results.append((case.forward(), case.backward(grad)))
    finally:
        torch.set_num_threads(before)
    for forward, backward in results[1:]:
        assert torch.equal(forward, results[0][0])
        assert torch.equal(backward, results[0][1])
