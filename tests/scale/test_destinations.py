"""Destinations: shards are whole or not there, damage is found, failures lose nothing."""

from __future__ import annotations

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.scale.volumes import SHAPE, Failing, ome_image, values_of, whole, zarr
from voxfuse._files import unfinished
from voxfuse.scale import (
    DamagedError,
    Space,
    build_pyramid,
    create_destination,
    open_destination,
    open_source,
)
from voxfuse.scale import stores as scale_stores
from voxfuse.scale.layout import Layout

#: Chunks and shards that do not divide the volume.
SMALL = dict(chunks=(4, 6, 4), shards=(8, 12, 8))


def write(destination, array):
    for shard in destination.shards():
        destination[shard] = array[shard]


def everything(array):
    return tuple(slice(0, n) for n in array.shape)


def test_what_is_written_is_read_by_zarr_and_by_a_source(tmp_path):
    for array in (values_of(), values_of((2, *SHAPE), np.float32), values_of((30, 20), np.uint8)):
        where = tmp_path / f"{array.ndim}{array.dtype}.zarr"
        small = dict(SMALL) if array.ndim > 2 else dict(chunks=4, shards=8)
        destination = create_destination(
            where, array.shape, array.dtype, kind="image" if array.ndim == 4 else "array", **small
        )
        assert destination.unit[-2:] in ((12, 8), (8, 8))
        write(destination, array)
        destination.flush()
        destination.check()
        again = pickle.loads(pickle.dumps(open_destination(where)))
        assert np.array_equal(again[everything(array)], array)
        node = zarr.open_array(where / "0" if array.ndim == 4 else where, mode="r")
        assert np.array_equal(node[...], array)
        assert node.metadata.zarr_format == 3
        source = open_source(where, axes="zyx"[-array.ndim :] if array.ndim < 4 else None)
        assert np.array_equal(whole(source), array if array.ndim == 4 else array[None])
    # Whole shards at once, and again over what is there.
    destination[0:16, 0:20] = array[:16] + 1
    assert np.array_equal(destination[0:16, 0:20], array[:16] + 1)


def test_only_whole_shards_are_taken(tmp_path):
    destination = create_destination(tmp_path / "x.zarr", SHAPE, np.uint8, **SMALL)
    good = np.zeros((8, 12, 8), np.uint8)
    with pytest.raises(ValueError, match=r"key: got slice\(0, 7, None\), expected whole shards of"):
        destination[0:7, 0:12, 0:8] = good[:7]
    with pytest.raises(ValueError, match="from and to multiples of 12, or 18"):
        destination[0:8, 6:18, 0:8] = good
    with pytest.raises(ValueError, match=r"values: got shape \(8, 12, 8\), expected \(5, 6, 5\)"):
        destination[16:21, 12:18, 8:13] = good
    with pytest.raises(TypeError, match="values: got dtype float64, expected uint8"):
        destination[0:8, 0:12, 0:8] = good.astype(float)
    assert not any(destination.written(shard) for shard in destination.shards())
    with pytest.raises(DamagedError, match=r"voxels \[0:8, 0:12, 0:8\]: the shard is not there"):
        destination.check()


def test_a_shard_of_nothing_but_the_fill_value_is_written_too(tmp_path):
    destination = create_destination(tmp_path / "x.zarr", SHAPE, np.uint8, **SMALL)
    write(destination, np.zeros(SHAPE, np.uint8))
    assert all(destination.written(shard) for shard in destination.shards())
    destination.check()


@pytest.mark.parametrize("damage", ["cut", "short", "empty", "flipped", "zeros", "gone"])
def test_a_torn_shard_is_found_and_written_again(tmp_path, damage):
    array = np.random.default_rng(0).integers(0, 255, SHAPE).astype(np.uint8)
    destination = create_destination(tmp_path / "x.zarr", SHAPE, np.uint8, **SMALL)
    write(destination, array)
    file = tmp_path / "x.zarr/c/1/0/1"
    data = file.read_bytes()
    flipped = bytes([*data[:100], data[100] ^ 1, *data[101:]])
    torn = {"cut": data[:300], "short": data[:-1], "empty": b"", "flipped": flipped}
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(torn.get(damage, bytes(len(data))))
    shard = (slice(8, 16), slice(0, 12), slice(8, 13))
    with pytest.raises(DamagedError, match=r"x\.zarr: voxels \[8:16, 0:12, 8:13\]"):
        destination.check()
    destination.check((slice(0, 8), slice(0, 18), slice(0, 13)))
    if damage != "gone":
        with pytest.raises(DamagedError, match="not whole"):
            destination[shard]
    destination[shard] = array[shard]
    destination.check()
    assert np.array_equal(destination[everything(array)], array)


def test_probabilities_as_bytes(tmp_path):
    array = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    array[0, 0, :2] = 0, 1
    destination = create_destination(
        tmp_path / "p.zarr", SHAPE, np.uint8, probabilities=True, **SMALL
    )
    assert destination.dtype == np.float32
    write(destination, array)
    again = open_destination(tmp_path / "p.zarr")
    assert np.abs(again[everything(array)] - array).max() <= 0.5 / 255 + 1e-6
    stored = zarr.open_array(tmp_path / "p.zarr", mode="r")
    assert np.array_equal(stored[...], np.rint(array.astype(np.float64) * 255))
    for wrong in (1.5, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"expected probabilities in \[0, 1\]"):
            destination[0:8, 0:12, 0:8] = np.full((8, 12, 8), wrong, np.float32)


def test_labels_of_an_image_lie_where_its_voxels_do_and_are_valid_ome_zarr(tmp_path):
    models = pytest.importorskip("ome_zarr_models.v05", reason="ome-zarr-models is not installed")
    array = values_of((1, 2, *SHAPE))
    ome_image(tmp_path / "image.zarr", array, "0.5")
    labels = values_of(SHAPE, np.uint8)
    where = tmp_path / "image.zarr"
    for name, level in (("lesions", 0), ("coarse", 1)):
        source = open_source(where, level=level)
        shape = source.shape[1:]
        like = None if level == 0 else source
        destination = create_destination(
            where,
            shape,
            np.uint8,
            kind="labels",
            name=name,
            like=like,
            colors={1: (255, 0, 0, 255)},
            **SMALL,
        )
        write(destination, labels[tuple(slice(0, n) for n in shape)])
        group = zarr.open_group(where / "labels" / name, mode="r")
        model = models.ImageLabel.from_zarr(group)
        [multiscale] = model.attributes.ome.multiscales
        assert [axis.name for axis in multiscale.axes] == ["z", "y", "x"]
        assert [axis.unit for axis in multiscale.axes] == ["micrometer"] * 3
        scale, translation = multiscale.datasets[0].coordinateTransformations
        factor = 2**level
        assert scale.scale == [6.0 * factor, 0.5 * factor, 0.5 * factor]
        assert translation.translation == [0.75, 0.0, 0.0]
        label = group.attrs["ome"]["image-label"]
        assert label["source"] == {"image": "../../"}
        assert label["colors"] == [{"label-value": 1, "rgba": [255, 0, 0, 255]}]
        assert open_source(where / "labels" / name).space == source.space
        assert np.array_equal(
            open_destination(where, labels=name)[
                everything(labels[tuple(slice(0, n) for n in shape)])
            ],
            labels[tuple(slice(0, n) for n in shape)],
        )
    listed = models.Labels.from_zarr(zarr.open_group(where / "labels", mode="r"))
    assert listed.label_paths == ["lesions", "coarse"]

    with pytest.raises(FileExistsError, match=r"labels/lesions/0: there is something already"):
        create_destination(where, SHAPE, np.uint8, kind="labels", name="lesions")
    fresh = create_destination(
        where, SHAPE, np.uint16, kind="labels", name="lesions", overwrite=True, **SMALL
    )
    assert fresh.dtype == np.uint16
    assert not fresh.written(next(fresh.shards()))
    assert np.array_equal(whole(open_source(where)), array[0])

    with pytest.raises(
        ValueError, match=r"shape: got \(9, 9, 9\), expected \(21, 18, 13\), as the"
    ):
        create_destination(where, (9, 9, 9), np.uint8, kind="labels", name="other")


def test_an_image_and_labels_without_an_image_are_valid_ome_zarr_too(tmp_path):
    models = pytest.importorskip("ome_zarr_models.v05", reason="ome-zarr-models is not installed")
    space = Space(("z", "y", "x"), (2.0, 0.5, 0.5), (10.0, 0.0, 0.25), ("micrometer",) * 3)
    for shape in (SHAPE, (3, *SHAPE)):
        where = tmp_path / f"{len(shape)}.zarr"
        create_destination(where, shape, np.float32, kind="image", like=space, name="p", **SMALL)
        models.Image.from_zarr(zarr.open_group(where, mode="r"))
        assert open_source(where).space == space
    create_destination(tmp_path / "l.zarr", SHAPE, np.uint8, kind="labels", like=space)
    root = zarr.open_group(tmp_path / "l.zarr", mode="r")
    models.ImageLabel.from_zarr(root["labels/prediction"])
    models.Labels.from_zarr(root["labels"])
    assert "source" not in root["labels/prediction"].attrs["ome"]["image-label"]


def test_a_place_that_does_not_fit_is_an_error(tmp_path):
    ome_image(tmp_path / "old.zarr", values_of((1, 1, *SHAPE)), "0.4")
    zarr.create_array(tmp_path / "array.zarr", data=values_of())
    (tmp_path / "text").mkdir()
    (tmp_path / "text/a.txt").write_text("a")
    (tmp_path / "text/0").mkdir()
    (tmp_path / "text/0/b.txt").write_text("b")
    old = sorted((tmp_path / "old.zarr").rglob("*"))
    new = tmp_path / "new.zarr"
    cases = [
        ((tmp_path / "old.zarr", SHAPE, "u1"), dict(kind="labels"), ValueError, "Zarr format 2"),
        (
            (tmp_path / "array.zarr", SHAPE, "u1"),
            dict(kind="labels"),
            ValueError,
            "has no label im",
        ),
        ((tmp_path / "array.zarr", SHAPE, "u1"), {}, FileExistsError, "there is something already"),
        ((tmp_path / "text", SHAPE, "u1"), {}, FileExistsError, "there is something already"),
        ((tmp_path / "text", SHAPE, "u1"), dict(overwrite=True), ValueError, "else than a Zarr"),
        (
            (tmp_path / "text", SHAPE, "u1"),
            dict(overwrite=True, kind="image"),
            ValueError,
            "text/0: there is something else than a Zarr array",
        ),
        (
            (tmp_path / "old.zarr", SHAPE, "u1"),
            dict(overwrite=True, kind="image"),
            ValueError,
            "Zarr format 2",
        ),
        ((tmp_path / "old.zarr", SHAPE, "u1"), dict(overwrite=True), ValueError, "which no array"),
        (
            (new, SHAPE, "u1"),
            dict(kind="mask"),
            ValueError,
            "kind: got 'mask', expected one of 'arr",
        ),
        ((new, SHAPE, "f4"), dict(kind="labels"), TypeError, "got float32, expected integers"),
        ((new, SHAPE, "f4"), dict(probabilities=True), TypeError, "expected uint8"),
        ((new, SHAPE, "c8"), {}, TypeError, "got complex64, expected booleans or real"),
        (
            (new, SHAPE, "u1"),
            dict(fill=0.5),
            ValueError,
            "fill: got 0.5, expected a value that uint8",
        ),
        (
            (new, SHAPE, "u1"),
            dict(fill=-1),
            ValueError,
            "fill: got -1, expected a value that uint8",
        ),
        (
            (tmp_path / "new.zip", SHAPE, "u1"),
            {},
            ValueError,
            "where: got .*new.zip, expected a fol",
        ),
        ((new, (0, 3), "u1"), {}, ValueError, r"shape: got \(0, 3\)"),
        (
            (new, SHAPE, "u1"),
            dict(chunks=(4, 4)),
            ValueError,
            r"chunks: got \(4, 4\), expected a pos",
        ),
        (
            (new, SHAPE, "u1"),
            dict(chunks=4, shards=6),
            ValueError,
            "shards: got 6, expected multip",
        ),
        ((new, SHAPE, "u1"), dict(chunks=0), ValueError, "chunks: got 0"),
        ((new, SHAPE, "u1"), dict(colors={1: (0, 0, 0, 0)}), ValueError, "colors: got some"),
        (
            (new, SHAPE, "u1"),
            dict(kind="labels", colors={1: (255, 0, 0)}),
            ValueError,
            r"colors: got \(255, 0, 0\) for label 1, expected four",
        ),
        ((new, SHAPE, "u1"), dict(kind="labels", name="a/b"), ValueError, "name: got 'a/b'"),
        ((new, (20,), "u1"), dict(kind="image"), ValueError, "two spatial axes or more"),
        ((new, SHAPE, "u1"), dict(like=3), TypeError, "like: got int"),
        ((new, (9, 9, 9), "u1"), dict(like=open_source(values_of())), ValueError, "shape: got"),
        ((3, SHAPE, "u1"), {}, TypeError, "where: got int, expected a path"),
    ]
    for arguments, options, error, message in cases:
        with pytest.raises(error, match=message):
            create_destination(*arguments, **options)
    with pytest.raises(ValueError, match=r"scale: got \(1.0,\) for axes .* expected 2 entries"):
        Space(("y", "x"), (1.0,), (0.0, 0.0), (None, None))
    assert not new.exists()
    assert (tmp_path / "text/a.txt").exists()
    assert (tmp_path / "text/0/b.txt").exists()
    assert sorted((tmp_path / "old.zarr").rglob("*")) == old
    with pytest.raises(FileNotFoundError, match="there is no Zarr array"):
        open_destination(new)
    with pytest.raises(ValueError, match="is of Zarr format 2"):
        open_destination(tmp_path / "old.zarr")


def test_an_array_is_replaced_only_where_that_is_said(tmp_path):
    write(
        create_destination(tmp_path / "x.zarr", SHAPE, np.uint8, **SMALL), values_of(dtype=np.uint8)
    )
    again = create_destination(tmp_path / "x.zarr", (9, 9, 9), np.int32, overwrite=True)
    assert (again.shape, again.dtype) == ((9, 9, 9), np.int32)
    assert not (tmp_path / "x.zarr/c").exists()


def test_a_label_image_that_is_replaced_keeps_no_colours(tmp_path):
    def made(**options):
        labels = create_destination(
            tmp_path, SHAPE, np.uint8, kind="labels", name="a", **SMALL, **options
        )
        write(labels, values_of(dtype=np.uint8))
        build_pyramid(tmp_path, labels="a", factors=[(2, 2, 2)])
        return zarr.open_group(tmp_path / "labels/a", mode="r").attrs["ome"]["image-label"]

    red = {"label-value": 1, "rgba": [255, 0, 0, 255]}
    assert made(colors={1: (255, 0, 0, 255)}) == {"colors": [red]}  # a pyramid leaves them
    assert made(overwrite=True) == {}


def test_a_destination_is_made_to_the_end_or_is_not_taken(tmp_path, monkeypatch):
    """Its metadata comes last: a failure before is tried again, a kill before is an error."""
    monkeypatch.setattr(scale_stores, "PAUSE", 0)
    describe, failures = Layout.describe, [TimeoutError(errno.ETIMEDOUT, "timed out")]

    def failing(self, *args, **kwargs):
        if failures:
            raise failures.pop()
        describe(self, *args, **kwargs)

    monkeypatch.setattr(Layout, "describe", failing)
    with pytest.warns(UserWarning, match="timed out; trying again"):
        made = create_destination(tmp_path / "x.zarr", SHAPE, np.uint8, kind="labels", **SMALL)
    write(made, values_of(dtype=np.uint8))
    open_destination(tmp_path / "x.zarr", labels="prediction").check()
    assert zarr.open_group(tmp_path / "x.zarr/labels").attrs["ome"]["labels"] == ["prediction"]
    for kind, name in (("labels", "prediction"), ("image", None)):
        where = tmp_path / f"{kind}.zarr"
        failures.append(KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            create_destination(where, SHAPE, np.uint8, kind=kind)
        with pytest.raises(ValueError, match="which was not made to the end; create_destination"):
            open_destination(where, labels=name)
        create_destination(where, SHAPE, np.uint8, kind=kind, overwrite=True)
        assert open_destination(where, labels=name).shape == SHAPE


def test_a_disk_that_is_full_is_an_error_and_what_was_written_stays(tmp_path, monkeypatch):
    """The system's own error, from a limit on the size of files of a process."""
    array = np.random.default_rng(0).integers(0, 255, (32, 16, 16)).astype(np.uint8)
    destination = create_destination(
        tmp_path / "x.zarr", array.shape, np.uint8, chunks=8, shards=16
    )
    first, second = destination.shards()
    destination[first] = array[first]
    destination[second] = 255 - array[second]  # what an earlier run left

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            OSError, match=r"writing voxels \[16:32, 0:16, 0:16\] \(4096 bytes\): No"
        ) as e:
            destination[second] = array[second]
    assert e.value.errno == errno.ENOSPC
    assert "make room there; shards that were written before are whole" in str(e.value)
    assert not list(Path(tmp_path).rglob(".*"))
    destination.check()
    assert np.array_equal(destination[second], 255 - array[second])
    destination[second] = array[second]
    assert np.array_equal(destination[everything(array)], array)


def test_a_store_that_fails_once_is_written_again_and_one_that_keeps_failing_loses_nothing(
    monkeypatch,
):
    monkeypatch.setattr(scale_stores, "PAUSE", 0)
    array = values_of(dtype=np.uint8)
    store = Failing(zarr.storage.MemoryStore(), TimeoutError(errno.ETIMEDOUT, "timed out"))
    destination = create_destination(store, SHAPE, np.uint8, **SMALL)
    first, second = list(destination.shards())[:2]
    store.times = 1
    with pytest.warns(UserWarning, match=r"writing voxels .* timed out; trying again"):
        destination[first] = array[first]
    store.times = 10**6
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(TimeoutError, match=r"timed out \(3 attempts\); shards that were written"),
    ):
        destination[second] = array[second]
    store.times = 0
    assert np.array_equal(destination[first], array[first])
    assert not destination.written(second)
    write(destination, array)
    destination.check()


def test_a_store_that_is_read_only_is_an_error_at_once(tmp_path):
    store = zarr.storage.MemoryStore()
    create_destination(store, SHAPE, np.uint8, **SMALL)
    read_only = store.with_read_only(True)
    destination = open_destination(read_only)
    with pytest.raises(PermissionError, match="is opened read-only") as raised:
        destination[0:8, 0:12, 0:8] = np.zeros((8, 12, 8), np.uint8)
    assert raised.value.errno == errno.EROFS
    with pytest.raises(PermissionError, match="read-only"):
        create_destination(zarr.storage.MemoryStore(read_only=True), SHAPE, np.uint8)
    if os.geteuid() == 0:
        return  # no folder is read-only for root
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match="change the permissions, or choose another place"):
        create_destination(folder / "x.zarr", SHAPE, np.uint8)


WRITERS = """
import os, random, signal, sys, time
import numpy as np
import voxfuse.scale._synced_store
from voxfuse.scale import open_destination
for number, where in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        destination = open_destination(where)
        [shard] = destination.shards()
        written = 0
        while True:
            written += 1
            destination[shard] = np.full([s.stop - s.start for s in shard], written, np.uint16)
    time.sleep(random.Random(number).uniform(0.05, 0.5))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_writers_that_are_killed_leave_whole_shards_and_what_they_left_can_be_swept(tmp_path):
    places = [tmp_path / f"{number}.zarr" for number in range(12)]
    for where in places:
        create_destination(where, (96, 96, 96), np.uint16, chunks=32, shards=96)
    subprocess.run([sys.executable, "-c", WRITERS, *map(str, places)], check=True)
    written = 0
    for where in places:
        destination = open_destination(where)
        [shard] = destination.shards()
        if destination.written(shard):
            written += 1
            destination.check()
            values = destination[shard]
            assert values.min() == values.max() > 0
        (where / "c/0/0").mkdir(parents=True, exist_ok=True)
        (where / "c/0/0/.0.beef.part").write_bytes(b"torn")
        destination.sweep()
        assert not [left for folder in where.rglob("*/") for left in unfinished(folder)]
    assert written > 3
