"""How volumes are cut: whole units, about equal shards, few patches that are predicted twice."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from voxfuse.fusion.grids import plan_grid
from voxfuse.scale import plan_boxes


def ring(channels, patch, axis):
    def memory(extents):
        slices = math.prod(size for a, size in enumerate(extents) if a != axis)
        return 4 * channels * min(patch[axis], extents[axis]) * slices

    return memory


def planned(volume, patch=96, unit=1, axis=0, **options):
    grid = plan_grid(volume, (patch,) * len(volume))
    units = (unit,) * len(volume) if isinstance(unit, int) else unit
    written = math.prod(volume)
    return plan_boxes(grid, units, axis, ring(4, (patch,) * 3, axis), written, **options)


def test_slabs_end_where_one_row_of_patches_reaches_over():
    """1,008 slices: 21 steps of 48, so that 22 rows are predicted in place of 21."""
    plan = planned((4032, 512, 512))
    assert all(box.low[0] % 48 == 0 for box in plan.boxes)
    assert plan.extra < 0.05
    assert [box.shape[1:] for box in plan.boxes] == [(512, 512)] * len(plan)


def test_given_extents_are_rounded_up_to_whole_units():
    plan = planned((4096, 4096, 4096), unit=(64, 128, 100), extents=(1000, 1024, 1000))
    assert {box.low[0] % 64 for box in plan.boxes} == {0}
    assert plan.boxes[0].shape == (1024, 1024, 1000)
    cubes = planned((4096, 4096, 4096), extents=(1024, 1024, 1024))
    assert len(cubes) == 64
    assert 0.10 < cubes.extra < 0.20


@pytest.mark.parametrize("seed", range(12))
def test_boxes_are_a_partition_into_whole_units(seed):
    draw = random.Random(seed)
    axes = draw.choice([1, 2, 3])
    volume = [draw.randint(40, 700) for _ in range(axes)]
    unit = [draw.choice([1, 16, 37, 64]) for _ in range(axes)]
    grid = plan_grid(volume, [32] * axes, draw.choice([0.0, 0.5, 0.7]))
    kept = np.random.default_rng(seed).random(len(grid)) < 0.4
    axis = draw.randrange(axes)
    memory = ring(2, [32] * axes, axis)
    plan = plan_boxes(
        grid, unit, axis, memory, 1, shards=draw.randint(1, 5), most=memory(volume) // 2 + 1,
        kept=kept,
    ) if axes == 3 else plan_boxes(grid, unit, axis, memory, 1, shards=3, kept=kept)  # fmt: skip
    covered = np.zeros(volume, np.uint8)
    for box in plan.boxes:
        covered[box.slices] += 1
        for low, high, u, extent in zip(box.low, box.high, unit, volume, strict=True):
            assert low % u == 0
            assert high % u == 0 or high == extent
    assert (covered == 1).all()
    assert sum(plan.patches) >= plan.whole == kept.sum()
    for n in (1, 2, 3, 7):
        shards = [plan.shard(i, n) for i in range(n)]
        assert [k for shard in shards for k in shard] == list(range(len(plan)))


def test_shards_are_balanced_by_the_patches_that_are_left():
    grid = plan_grid((9600, 96, 96), (96, 96, 96))
    kept = np.zeros(len(grid), bool)
    kept[:40] = True  # a fifth of the volume has everything
    memory = ring(1, (96,) * 3, 0)
    plan = plan_boxes(grid, (16, 16, 16), 0, memory, 1, shards=4, kept=kept)
    shares = [sum(plan.patches[k] for k in plan.shard(i, 4)) for i in range(4)]
    assert max(shares) <= 15
    assert "4 shards of" in str(plan)


def test_boxes_fit_the_memory_that_is_allowed():
    plan = planned((10_000, 10_000, 10_000), unit=128, most=1 << 30)
    assert plan.memory <= 1 << 30
    assert plan.extra < 0.35
    with pytest.raises(ValueError, match="memory: got 1000, but a box of"):
        planned((1000, 1000, 1000), most=1000)
