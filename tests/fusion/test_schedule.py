"""Schedule: order, which slices are final when, and what may be added."""

from __future__ import annotations

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from voxfuse.fusion.schedule import Schedule, chosen_axis

VOLUME, PATCH = (17, 9), (6, 4)


def scheduled(data, members=1):
    origin = st.tuples(st.integers(-5, 16), st.integers(-3, 8))
    origins = data.draw(st.lists(origin, min_size=1, max_size=12, unique=True))
    return Schedule(
        torch.tensor(origins), VOLUME, PATCH, data.draw(st.sampled_from([0, 1])), members
    )


@hypothesis.given(data=st.data())
def test_a_slice_is_final_when_no_patch_to_come_reaches_it_and_is_handed_out_once(data):
    schedule = scheduled(data, members := data.draw(st.integers(1, 2)))
    axis, extent = schedule.axis, VOLUME[schedule.axis]
    starts = schedule.origins[:, axis].tolist()
    assert starts == sorted(starts)
    had, handed = [0] * len(starts), 0
    while schedule.lacking():
        index = data.draw(st.sampled_from(schedule.lacking()))
        schedule.done([index], 1)
        had[index] += 1
        to_come = [start for start, n in zip(starts, had, strict=True) if n < members]
        reached = min([min(max(start, 0), extent) for start in to_come], default=extent)
        for start, stop in schedule.final(PATCH[axis]):
            assert (start, stop - start <= PATCH[axis]) == (handed, True)
            handed = stop
        assert handed == schedule.front == schedule.base == reached
    schedule.check_complete()


@hypothesis.given(data=st.data())
def test_a_batch_is_cut_such_that_every_patch_fits_the_ring(data):
    schedule = scheduled(data)
    depth, axis = PATCH[schedule.axis], schedule.axis
    indices = schedule.indices(None, len(schedule.lacking()), 1)
    seen = []
    for segment in schedule.segments(indices, 1, depth):
        for index in indices[segment]:
            last = min(max(int(schedule.origins[index, axis]) + depth, 0), VOLUME[axis])
            assert last <= schedule.base + depth
        seen += indices[segment]
        schedule.done(indices[segment], 1)
    assert seen == indices


def test_patches_come_as_often_as_they_have_members():
    schedule = Schedule(torch.tensor([[4, 0], [0, 0]]), VOLUME, PATCH, 0, 2)
    assert schedule.origins.tolist() == [[0, 0], [4, 0]]
    assert schedule.indices([[4, 0], [4, 0]], 2, 1) == [1, 1]
    with pytest.raises(ValueError, match=r"\(4, 0\) is added again; each patch comes 2 times"):
        schedule.indices([[4, 0], [4, 0]], 2, 2)
    schedule.done([0, 1], 1)
    assert (schedule.lacking(), schedule.base) == ([0, 1], 0)
    schedule.done([0], 1)
    assert (schedule.lacking(), schedule.base) == ([1], 4)
    with pytest.raises(RuntimeError, match=r"1 of 2 patches are missing, the first at \(4, 0\)"):
        schedule.check_complete()


def test_origins_occur_once():
    with pytest.raises(ValueError, match=r"origins: \(4, 0\) occurs more than once; .* members="):
        Schedule(torch.tensor([[4, 0], [0, 0], [4, 0]]), VOLUME, PATCH, 0, 1)


def test_the_axis_is_the_one_with_the_smallest_ring():
    assert chosen_axis("auto", (40, 90, 30), (16, 16, 16)) == 1
    assert chosen_axis(2, (40, 90, 30), (16, 16, 16)) == 2
