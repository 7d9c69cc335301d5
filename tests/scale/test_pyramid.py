"""Coarser levels: what their voxels are, where they lie, and that a pass can be gone on with."""

from __future__ import annotations

import errno
import json
from collections import Counter
from itertools import product

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest

from tests.scale.volumes import SHAPE, ome_image, values_of, whole, zarr
from voxfuse.scale import (
    DamagedError,
    Space,
    build_pyramid,
    create_destination,
    destinations,
    open_destination,
    open_source,
    pyramid,
)

SMALL = dict(chunks=(4, 6, 4), shards=(8, 12, 8))
SPACE = Space(("z", "y", "x"), (2.0, 0.5, 0.5), (10.0, 0.0, 0.25), ("micrometer",) * 3)


def blocks_of(array, factors):
    """For every block its place in the result, and its voxels: the definition."""
    places = [range(-(-n // f)) for n, f in zip(array.shape, factors, strict=True)]
    for place in product(*places):
        voxels = tuple(slice(k * f, (k + 1) * f) for k, f in zip(place, factors, strict=True))
        yield place, array[voxels].ravel()


shapes_and_factors = st.integers(1, 3).flatmap(
    lambda d: st.tuples(st.tuples(*[st.integers(1, 7)] * d), st.tuples(*[st.integers(1, 4)] * d))
)


@hypothesis.given(
    shapes_and_factors.flatmap(
        lambda both: st.tuples(
            hnp.arrays(np.uint16, both[0], elements=st.integers(0, 4)), st.just(both[1])
        )
    )
)
def test_the_majority_is_that_of_every_block_of_ties_the_lowest_but_zero(case):
    labels, factors = case
    result = pyramid.majority(labels, factors)
    assert result.dtype == labels.dtype
    for place, voxels in blocks_of(labels, factors):
        counts = Counter(voxels.tolist())
        most = [label for label, count in counts.items() if count == max(counts.values())]
        expected = min(label for label in most if label) if any(most) else 0
        assert result[place] == expected


@hypothesis.given(shapes_and_factors, st.sampled_from([np.uint8, np.int16, np.float32]))
def test_the_mean_is_that_of_every_block(both, dtype):
    shape, factors = both
    values = values_of(shape, dtype)
    result = pyramid.mean(values, factors)
    assert result.dtype == dtype
    for place, voxels in blocks_of(values, factors):
        exact = voxels.mean(dtype=np.float64)
        assert result[place] == dtype(exact if dtype == np.float32 else np.rint(exact))


def labels_like_image(folder, version="0.5"):
    """Labels of an image of two levels."""
    ome_image(folder / "image.zarr", values_of((1, 2, *SHAPE)), version)
    labels = (values_of(SHAPE, np.uint8) // 70).astype(np.uint8)
    made = create_destination(
        folder / "image.zarr", SHAPE, np.uint8, kind="labels", name="organs", **SMALL
    )
    for shard in made.shards():
        made[shard] = labels[shard]
    return folder / "image.zarr", labels


def test_labels_follow_the_levels_of_their_image_and_are_valid_ome_zarr(tmp_path):
    models = pytest.importorskip("ome_zarr_models.v05", reason="ome-zarr-models is not installed")
    where, labels = labels_like_image(tmp_path)
    assert build_pyramid(where, labels="organs") == ["0", "1"]
    group = zarr.open_group(where / "labels/organs", mode="r")
    assert np.array_equal(group["1"][...], pyramid.majority(labels, (2, 2, 2)))
    model = models.ImageLabel.from_zarr(group)
    [multiscale] = model.attributes.ome.multiscales
    assert multiscale.type == "majority"
    scale, translation = multiscale.datasets[1].coordinateTransformations
    image = open_source(where, level=0).space
    assert scale.scale == [2 * s for s in image.scale]
    # Half a voxel of the finest level further: the centre of its first two.
    expected = [t + s / 2 for t, s in zip(image.translation, image.scale, strict=True)]
    assert translation.translation == expected
    assert open_source(where / "labels/organs", level=1).space == image.coarser((2, 2, 2))
    # The image with its labels: as many levels.
    models.Image.from_zarr(zarr.open_group(where, mode="r"))


def test_thick_voxels_stay_until_the_others_are_as_thick(tmp_path, monkeypatch):
    models = pytest.importorskip("ome_zarr_models.v05", reason="ome-zarr-models is not installed")
    monkeypatch.setattr(pyramid, "COARSEST", 3)
    values = values_of((2, *SHAPE), np.float32)
    made = create_destination(
        tmp_path / "p.zarr", values.shape, np.float32, kind="image", like=SPACE, name="p", **SMALL
    )
    for shard in made.shards():
        made[shard] = values[shard]
    assert build_pyramid(tmp_path / "p.zarr") == ["0", "1", "2", "3", "4", "5"]
    group = zarr.open_group(tmp_path / "p.zarr", mode="r")
    shapes = [group[str(level)].shape for level in range(6)]
    assert shapes[:4] == [(2, 21, 18, 13), (2, 21, 9, 7), (2, 21, 5, 4), (2, 11, 3, 2)]
    expected = pyramid.mean(pyramid.mean(values, (1, 1, 2, 2)), (1, 1, 2, 2))
    assert np.array_equal(group["2"][...], expected)
    assert open_source(tmp_path / "p.zarr", level=3).space.scale == (4.0, 4.0, 4.0)
    assert open_source(tmp_path / "p.zarr", level=3).space.translation == (11.0, 1.75, 2.0)
    [multiscale] = models.Image.from_zarr(group).attributes.ome.multiscales
    assert (multiscale.name, multiscale.type) == ("p", "mean")
    # Made again with other factors, nothing of before stays.
    assert build_pyramid(tmp_path / "p.zarr", factors=[(3, 1, 1)]) == ["0", "1"]
    assert sorted(name for name, _ in zarr.open_group(tmp_path / "p.zarr").members()) == ["0", "1"]


def test_probabilities_stay_probabilities(tmp_path):
    values = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    made = create_destination(
        tmp_path / "p.zarr", SHAPE, np.uint8, kind="image", probabilities=True, **SMALL
    )
    for shard in made.shards():
        made[shard] = values[shard]
    build_pyramid(tmp_path / "p.zarr", factors=[(2, 2, 2)])
    coarse = open_destination(tmp_path / "p.zarr", level="1")
    result = coarse[tuple(slice(0, n) for n in coarse.shape)]
    assert np.abs(result - pyramid.mean(values, (2, 2, 2))).max() <= 1 / 255 + 1e-6


def test_a_pass_goes_on_where_a_full_disk_stopped_it_and_holds_a_few_chunks(tmp_path, monkeypatch):
    where, labels = labels_like_image(tmp_path)
    written, read = [], []
    write, original = destinations.ZarrDestination._write, destinations.ZarrDestination.__getitem__

    def counted(self, shard, values):
        write(self, shard, values)
        written.append(shard)

    def limited(self, shard, values):
        if len(written) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        counted(self, shard, values)

    def noted(self, key):
        values = original(self, key)
        read.append(values.size)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(destinations.ZarrDestination, "_write", limited)
        patch.setattr(destinations.ZarrDestination, "__getitem__", noted)
        with pytest.raises(OSError, match="No space left"):
            build_pyramid(where, labels="organs")
    assert max(read) <= 8 * np.prod(SMALL["chunks"])
    assert len(open_source(where / "labels/organs").shape) == 4  # a whole image of one level
    with pytest.raises(ValueError, match="level: got 1"):
        open_source(where / "labels/organs", level=1)
    with pytest.raises(
        ValueError, match=r"was begun as .*\[2, 2, 2\].* now it would be .*\[2, 1, 1"
    ):
        build_pyramid(where, labels="organs", factors=[(2, 1, 1)], resume=True)
    monkeypatch.setattr(destinations.ZarrDestination, "_write", counted)
    assert build_pyramid(where, labels="organs", resume=True) == ["0", "1"]
    coarse = open_destination(where, labels="organs", level="1")
    assert sorted(map(str, written)) == sorted(map(str, coarse.shards()))
    result = whole(open_source(where / "labels/organs", level=1))[0]
    assert np.array_equal(result, pyramid.majority(labels, (2, 2, 2)))


def test_a_finest_level_that_is_not_complete_is_an_error(tmp_path):
    where, _ = labels_like_image(tmp_path)
    (where / "labels/organs/0/c/1/1/1").unlink()
    with pytest.raises(DamagedError, match=r"voxels \[8:16, 12:18, 8:13\]: the shard is not there"):
        build_pyramid(where, labels="organs")


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_of_an_image_is_touched_that_is_refused(tmp_path):
    values = np.ones((2, *SHAPE), np.uint8)
    ome_image(tmp_path / "time.zarr", values_of((2, 2, *SHAPE)), "0.5")
    ome_image(tmp_path / "old.zarr", values, "0.4", "czyx", (1, 2.0, 0.5, 0.5))
    ome_image(tmp_path / "other.zarr", values, "0.5", "czyx", (1, 2.0, 0.5, 0.5))
    ome_image(tmp_path / "hole.zarr", values, "0.5", "czyx", (1, 2.0, 0.5, 0.5))
    (tmp_path / "hole.zarr/0/c/0/1/1/1").unlink()  # as of chunks that were never stored
    before = files_of(tmp_path)
    for name, error, message in (
        (
            "time",
            ValueError,
            r"has axes of \['time', 'channel', 'space', .*expected \[channel,\] sp",
        ),
        ("old", ValueError, "is of Zarr format 2"),
        (
            "other",
            FileExistsError,
            "there is something that build_pyramid did not make; overwrite=",
        ),
        ("hole", DamagedError, "the shard is not there"),
    ):
        with pytest.raises(error, match=message):
            build_pyramid(tmp_path / f"{name}.zarr", factors=[(2, 2, 2)])
    assert files_of(tmp_path) == before
    where = tmp_path / "other.zarr"
    assert build_pyramid(where, factors=[(1, 2, 2)], overwrite=True) == ["0", "1"]
    assert whole(open_source(where, level=1)).shape == (2, 21, 9, 7)
    # The next time it is of our making. Axes of arrays need no names.
    described = json.loads((where / "0/zarr.json").read_text())
    (where / "0/zarr.json").write_text(json.dumps(described | {"dimension_names": None}))
    assert build_pyramid(where, factors=[(2, 2, 2)]) == ["0", "1"]


def test_arguments_that_do_not_fit(tmp_path):
    where, _ = labels_like_image(tmp_path)
    for options, error, message in (
        (dict(labels="heart"), FileNotFoundError, "there is no OME-Zarr image"),
        (dict(labels="organs", method="max"), ValueError, "method: got 'max', expected 'majority'"),
        (dict(labels="organs", factors=[(2, 2)]), ValueError, r"factors: got \(2, 2\), expected 3"),
        (dict(labels="organs", factors=[(1, 1, 1)]), ValueError, "one of them above 1"),
        (dict(labels="organs", factors=[(0, 2, 2)]), ValueError, "one of them above 1"),
    ):
        with pytest.raises(error, match=message):
            build_pyramid(where, **options)
    small = create_destination(
        where, (9, 9, 9), np.uint8, kind="labels", name="part", like=SPACE, chunks=9, shards=9
    )
    small[0:9, 0:9, 0:9] = np.ones((9, 9, 9), np.uint8)
    with pytest.raises(ValueError, match="has no level of .* voxels, whose pyramid"):
        build_pyramid(where, labels="part")
    create_destination(tmp_path / "f.zarr", SHAPE, np.float32, kind="image", like=SPACE)
    with pytest.raises(ValueError, match="method: got 'majority' for float32, expected integers"):
        build_pyramid(tmp_path / "f.zarr", method="majority")
