"""Sources: what is read is what is stored, whatever stores it; chunks are decompressed once."""

from __future__ import annotations

import collections
import gzip
import pickle
from itertools import product

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch

from tests.scale.volumes import SHAPE, Failing, ome_image, values_of, whole, zarr
from voxfuse.scale import DamagedError, Space, create_destination, open_source
from voxfuse.scale import stores as scale_stores
from voxfuse.scale.chunk_cache import ChunkCache, edges_of, widest


def stored_ways(folder, array):
    """The same values in everything that a source can be."""
    import dask.array

    np.save(folder / "v.npy", array)
    for number, kinds in enumerate(
        (
            dict(zarr_format=3, chunks=(8, 5, 13)),
            dict(zarr_format=3, chunks=(4, 4, 4), shards=(8, 12, 8)),
            dict(zarr_format=2, chunks=(21, 6, 5), order="F"),
        )
    ):
        zarr.create_array(folder / f"{number}.zarr", data=array, **kinds)
        yield folder / f"{number}.zarr"
    zipped = zarr.storage.ZipStore(folder / "v.zip", mode="w")
    zarr.create_array(zipped, data=array, chunks=(8, 8, 8))
    zipped.close()
    yield folder / "v.zip"
    yield str(folder / "v.npy")
    yield array
    yield array.astype(array.dtype.newbyteorder(">"))
    yield np.memmap(folder / "v.dat", array.dtype, "w+", shape=array.shape)
    yield dask.array.from_array(array, chunks=((10, 11), (3, 9, 6), 4))
    yield zarr.open_array(folder / "1.zarr", mode="r")
    url = "memory://test_sources/v.zarr"
    zarr.create_array(url, data=array, chunks=(8, 8, 8), overwrite=True)
    yield url


def test_values_are_those_stored_whatever_stores_them(tmp_path):
    array = values_of()
    key = (slice(0, 1), slice(3, 20), slice(0, 18), slice(6, 7))
    for stored in stored_ways(tmp_path, array):
        if isinstance(stored, np.memmap):
            stored[:] = array
        source = open_source(stored)
        assert source.shape == (1, *SHAPE), source
        assert source.dtype == array.dtype, source
        assert source.dtype.isnative, source
        assert np.array_equal(source[key], array[None][key]), source
        assert np.array_equal(whole(source), array[None]), source
        assert source.fingerprint() == open_source(array).fingerprint(), source
        assert open_source(source) is source
    other = array.copy()
    other[7, 6, 4] += 1
    assert open_source(other).fingerprint() != open_source(array).fingerprint()
    tensor = torch.from_numpy(array.astype(np.float32))
    assert np.array_equal(whole(open_source(tensor)), tensor[None].numpy())


def test_a_source_of_a_path_is_opened_again_by_another_process(tmp_path):
    array = values_of((3, *SHAPE))
    zarr.create_array(tmp_path / "v.zarr", data=array, chunks=(1, 8, 8, 8))
    source = open_source(tmp_path / "v.zarr", channel=2, cache_bytes=50_000)
    whole(source)
    again = pickle.loads(pickle.dumps(source))
    assert (again.decompressed, again.cache_bytes) == (0, 50_000)
    assert np.array_equal(whole(again), array[2:3])
    held = pickle.loads(pickle.dumps(open_source(zarr.open_array(tmp_path / "v.zarr", mode="r"))))
    assert np.array_equal(whole(held), array)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_level_channel_and_timepoint_of_ome_zarr(tmp_path, version):
    array = values_of((2, 3, *SHAPE))
    ome_image(tmp_path / "image.zarr", array, version)
    source = open_source(tmp_path / "image.zarr", channel=1, timepoint=1)
    assert np.array_equal(whole(source), array[1, 1:2])
    units = ("micrometer",) * 3
    assert source.space == Space(("z", "y", "x"), (6.0, 0.5, 0.5), (0.75, 0.0, 0.0), units)
    for level in (1, "1"):
        coarse = open_source(tmp_path / "image.zarr", level=level, timepoint=0)
        assert np.array_equal(whole(coarse), array[0, :, ::2, ::2, ::2])
        assert coarse.space.scale == (12.0, 1.0, 1.0)

    for wrong, message in (
        (dict(timepoint=0, level=2), r"level: got 2, but .* has 2: 0 to 1, or by path '0', '1'"),
        (dict(timepoint=0, level="s0"), r"level: got 's0'"),
        (dict(timepoint=0, channel=3), r"channel: got 3, expected 0 to 2"),
        (dict(channel=0), r"timepoint: .* has 2, say which: 0 to 1"),
        (dict(timepoint=2), r"timepoint: got 2, expected 0 to 1"),
        (dict(timepoint=0, axes="tczyx"), r"axes: got 'tczyx', but .* names its own"),
    ):
        with pytest.raises(ValueError, match=message):
            open_source(tmp_path / "image.zarr", **wrong)


@pytest.mark.parametrize(
    "names", [("axial", "coronal", "sagittal"), ("row", "col"), ("tz", "c", "x"), ("y1", "y2")]
)
def test_space_axes_of_ome_zarr_may_have_any_names(names, tmp_path):
    array = values_of((12, 20, 28)[: len(names)])
    group = ome_image(tmp_path / "image.zarr", array, "0.5", names, range(1, len(names) + 1))
    ome = group.attrs["ome"]
    for axis in ome["multiscales"][0]["axes"]:
        axis["type"] = "space"
    group.attrs["ome"] = ome
    source = open_source(tmp_path / "image.zarr")
    assert source.shape == (1, *array.shape)
    assert np.array_equal(whole(source)[0], array)
    assert source.space.axes == names
    made = create_destination(tmp_path / "made.zarr", array.shape, np.uint8, like=source)
    assert made.shape == array.shape
    for axis in ome["multiscales"][0]["axes"]:
        axis["name"] = "y"
    group.attrs["ome"] = ome
    with pytest.raises(ValueError, match=r"has axes y, y.*, expected different names"):
        open_source(tmp_path / "image.zarr")


@pytest.mark.parametrize("names", [("c", "y", "x"), ("t", "y", "x"), ("time", "channel", "y", "x")])
def test_axes_of_ome_zarr_without_types_are_known_by_name(names, tmp_path):
    array = values_of((2, 3, 18, 13)[-len(names) :])
    group = ome_image(tmp_path / "image.zarr", array, "0.4", names, [1] * len(names))
    [described] = group.attrs["multiscales"]
    described["axes"] = [{"name": name} for name in names]
    group.attrs["multiscales"] = [described]
    timed = names[0] != "c"
    source = open_source(tmp_path / "image.zarr", timepoint=1 if timed else None)
    expected = array[1] if timed else array
    assert np.array_equal(whole(source), expected.reshape(-1, 18, 13))
    assert source.space.axes == ("y", "x")


@pytest.mark.parametrize("by_path", [True, False])
@pytest.mark.parametrize(
    ("names", "order"),
    [
        (("z", "y", "x", "c"), "zyxc"),
        (("t", "z", "y", "x"), "tzyx"),
        (("Time", "Channel", "y", "x"), "tcyx"),
        (("c", "x", "y", "z"), "cxyz"),
        (("t", "depth", "height", "width", "c"), "tzyxc"),
        (("t", "y", "x"), "tyx"),
        (("z", "y", "x"), "zyx"),
        (("band", "z", "y", "x"), "czyx"),  # by place, as where a name is missing
        ((None, "z", "y", "x"), "czyx"),
        ((None, "t", "y", "x"), "czyx"),
        (("x", "x", "x", "c"), "czyx"),
    ],
)
def test_axes_of_an_array_of_zarr_are_known_by_name(tmp_path, names, order, by_path):
    array = values_of((2, 3, 4, 5, 6)[: len(names)])
    stored = zarr.create_array(
        tmp_path / "v.zarr", data=array, chunks=(2,) * len(names), dimension_names=names
    )
    given = tmp_path / "v.zarr" if by_path else stored
    if "t" in order:
        extent = array.shape[order.index("t")]
        with pytest.raises(ValueError, match=rf"timepoint: .* has {extent}, say which"):
            open_source(given)
    timepoint = 1 if "t" in order else None
    source = open_source(given, timepoint=timepoint)
    expected = open_source(array, axes=order, timepoint=timepoint)
    assert np.array_equal(whole(source), whole(expected))
    said = "cxyzt"[: len(names)]  # goes before names
    assert open_source(given, axes=said, timepoint=0 if "t" in said else None).shape[0] == 2


@pytest.mark.parametrize(
    "names", [("z", "y", "x", "band"), ("s", "w", "z", "y", "t"), ("t", "time", "y", "x")]
)
def test_names_of_axes_that_do_not_say_which_are_which_are_an_error(tmp_path, names):
    array = values_of((2, 3, 4, 5, 6)[: len(names)])
    zarr.create_array(tmp_path / "v.zarr", data=array, chunks=array.shape, dimension_names=names)
    with pytest.raises(ValueError, match=f"axes: .* calls its axes {', '.join(names)}, expected"):
        open_source(tmp_path / "v.zarr")
    said = "cxyzt"[: len(names)]
    assert open_source(tmp_path / "v.zarr", axes=said, timepoint=0 if "t" in said else None)


def test_channels_may_lie_last_and_axes_may_be_named():
    array = values_of((*SHAPE, 3))
    source = open_source(array, axes="zyxc")
    assert source.shape == (3, *SHAPE)
    key = (slice(1, 3), slice(2, 9), slice(0, 18), slice(4, 5))
    assert np.array_equal(source[key], np.moveaxis(array, 3, 0)[key])


def test_nifti_is_mapped_and_gzip_decompressed_once_with_a_warning(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    array = values_of((*SHAPE, 2), np.int16)
    image = nibabel.Nifti1Image(array, np.diag([0.5, 0.6, 2, 1]))
    image.header.set_xyzt_units("mm")
    nibabel.save(image, tmp_path / "v.nii")
    (tmp_path / "v.nii.gz").write_bytes(gzip.compress((tmp_path / "v.nii").read_bytes()))
    with pytest.raises(ValueError, match="timepoint: .* has 2, say which: 0 to 1; or axes='xyzc'"):
        open_source(tmp_path / "v.nii")
    second = open_source(tmp_path / "v.nii", timepoint=1)
    assert np.array_equal(whole(second), array[None, ..., 1])
    source = open_source(tmp_path / "v.nii", axes="xyzc")
    assert isinstance(source.behind, np.memmap)
    assert np.array_equal(whole(source), np.moveaxis(array, 3, 0))
    assert source.space.axes == ("x", "y", "z")
    assert source.space.units == ("millimeter",) * 3
    np.testing.assert_allclose(source.space.scale, (0.5, 0.6, 2), rtol=1e-6)
    (tmp_path / "scratch").mkdir()
    with pytest.warns(UserWarning, match="gzip cannot be read at random; decompressed once"):
        packed = open_source(
            tmp_path / "v.nii.gz", axes="xyzc", channel=1, scratch=tmp_path / "scratch"
        )
    assert np.array_equal(whole(packed), array[None, ..., 1])
    assert isinstance(packed.behind, np.memmap)
    assert list((tmp_path / "scratch").iterdir()) == []

    image.header.set_slope_inter(0.25, -3)
    nibabel.save(image, tmp_path / "scaled.nii")
    scaled = open_source(tmp_path / "scaled.nii", axes="xyzc")
    assert scaled.dtype == np.float32
    loaded = nibabel.load(tmp_path / "scaled.nii").get_fdata(dtype=np.float32)
    assert np.array_equal(whole(scaled), np.moveaxis(loaded, 3, 0))

    packed_bytes = (tmp_path / "v.nii.gz").read_bytes()
    (tmp_path / "torn.nii.gz").write_bytes(packed_bytes[: len(packed_bytes) // 2])
    with pytest.raises(
        DamagedError, match=r"torn.nii.gz, decompressed to .* what is stored is not whole"
    ):
        open_source(tmp_path / "torn.nii.gz")
    (tmp_path / "torn.nii").write_bytes((tmp_path / "v.nii").read_bytes()[:2000])
    with pytest.raises(DamagedError, match=r"torn.nii: cannot be read"):
        open_source(tmp_path / "torn.nii")


def test_labels_lie_where_the_nifti_volume_does(tmp_path):
    nibabel = pytest.importorskip("nibabel", reason="nibabel is not installed")
    array = values_of(SHAPE, np.int16)

    def opened(affine, axes=None, array=array):
        nibabel.save(nibabel.Nifti1Image(array, affine), tmp_path / "v.nii")
        return open_source(tmp_path / "v.nii", axes=axes)

    affine = np.array([[0.5, 0, 0, -31.5], [0, 0.75, 0, 8], [0, 0, 2, 0.25], [0, 0, 0, 1]])
    source = opened(affine)
    labels = create_destination(tmp_path / "a.zarr", SHAPE, np.uint8, kind="labels", like=source)
    found = open_source(tmp_path / "a.zarr/labels/prediction").space
    assert labels.shape == SHAPE
    assert (found.axes, found.scale) == (("x", "y", "z"), (0.5, 0.75, 2))
    voxel = np.array([3, 5, 7])
    where = np.array(found.translation) + voxel * found.scale
    assert np.array_equal(where, (affine @ [*voxel, 1])[:3])
    # A turn of a hundredth of a voxel at the far corner is rounding.
    rounded = affine.copy()
    rounded[0, 1] = 1e-5
    assert opened(rounded).space.translation == (-31.5, 8, 0.25)
    assert opened(affine, "xyzc", array[..., None]).shape == (1, *SHAPE)
    for turn in (np.diag([-1, -1, 1, 1]), np.eye(4)[[1, 0, 2, 3]]):
        turned = opened(turn @ affine)
        assert turned.space.translation == (0, 0, 0)
        np.testing.assert_allclose(turned.space.scale, (0.5, 0.75, 2))
        with pytest.warns(UserWarning, match=r"like: .*v.nii: its affine turns or mirrors axes"):
            create_destination(
                tmp_path / "a.zarr", SHAPE, np.uint8, kind="labels", like=turned, overwrite=True
            )


def test_what_is_no_volume_is_an_error_that_says_what_to_open(tmp_path):
    group = zarr.create_group(tmp_path / "group.zarr")
    group.create_array("raw", shape=(3, 3), dtype="u1")
    cases = [
        (tmp_path / "none.zarr", {}, FileNotFoundError, "there is no such file or folder"),
        (tmp_path, {}, FileNotFoundError, "there is no Zarr array or group"),
        (tmp_path / "group.zarr", {}, ValueError, "without OME-Zarr's multiscales, with raw in it"),
        (tmp_path / "group.zarr/raw", {"level": 1}, ValueError, "is an array, not an OME-Zarr"),
        (values_of(), {"channel": 1}, ValueError, "channel: got 1, but ndarray has no axis"),
        (values_of(), {"timepoint": 0}, ValueError, "timepoint: got 0, but ndarray has no such"),
        (values_of(), {"axes": "zyxc"}, ValueError, "axes: got 'zyxc', expected 3 different"),
        (values_of(), {"axes": "tcc"}, ValueError, "axes: got 'tcc'"),
        (values_of().astype(complex), {}, TypeError, "has dtype complex128"),
        (values_of((1, 1, 2, 3, 4, 5)), {}, ValueError, "has 6 axes, expected 1 to 5"),
        ([1, 2], {}, TypeError, "source: got list, expected a path, a URL, or what has shape"),
        (tmp_path / "x.npy", {}, FileNotFoundError, "there is no such file"),
        (values_of(), {"cache_bytes": 0}, ValueError, "cache_bytes: got 0"),
    ]
    (tmp_path / "v.tif").write_bytes(b"II")
    cases.append((tmp_path / "v.tif", {}, ValueError, "got a file, expected a folder of Zarr"))
    big = zarr.create_array(tmp_path / "big.zarr", shape=(64, 64), chunks=(64, 64), dtype="f8")
    cases.append((big, {"cache_bytes": 9999}, ValueError, "a chunk of .* has 32768 bytes"))
    for attributes, message in (
        ({"ome": {"plate": {}}}, "is a plate of OME-Zarr"),
        ({"bioformats2raw.layout": 3}, "has several images of OME-Zarr"),
        ({"ome": {"labels": ["a"]}}, "has the label images a; open one"),
        ({"multiscales": [{"version": "0.2", "datasets": []}]}, "is OME-Zarr of version 0.2"),
        ({"ome": {"multiscales": [{"axes": [{"name": "z"}], "datasets": [{}]}]}}, "cannot be read"),
    ):
        store = zarr.storage.MemoryStore()
        cases.append((zarr.create_group(store, attributes=attributes), {}, ValueError, message))
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            open_source(given, **options)
    source = open_source(values_of())
    for key, error in (
        ((slice(0, 1),), TypeError),
        ((0, slice(0, 1), slice(0, 1), slice(0, 1)), TypeError),
        ((slice(0, 1), slice(3, 22), slice(0, 1), slice(0, 1)), ValueError),
        ((slice(0, 1), slice(3, 3), slice(0, 1), slice(0, 1)), ValueError),
        ((slice(0, 1), slice(0, 3, 2), slice(0, 1), slice(0, 1)), ValueError),
    ):
        with pytest.raises(error, match="key: got"):
            source[key]


class Counted:
    """An array that notes how often each of its chunks is read."""

    def __init__(self, array, edges):
        self.array, self.edges, self.reads = array, edges, collections.Counter()

    def read(self, key):
        ranges = []
        for edges, each in zip(self.edges, key, strict=True):
            assert each.start in edges[:-1]
            assert each.stop in edges[1:]
            ranges.append(range(edges.index(each.start), edges.index(each.stop)))
        self.reads.update(product(*ranges))
        return self.array[key]


def patches_of(extent, patch, stride):
    starts = [[*range(0, n - p, s), n - p] for n, p, s in zip(extent, patch, stride, strict=True)]
    for corner in product(*starts):
        yield tuple(slice(low, low + p) for low, p in zip(corner, patch, strict=True))


@hypothesis.given(data=st.data())
def test_in_a_box_every_chunk_is_read_once_within_the_bytes_that_were_said(data):
    draw = data.draw
    extent = draw(st.tuples(*[st.integers(4, 24)] * 2))
    patch = tuple(draw(st.integers(1, n)) for n in extent)
    stride = tuple(draw(st.integers(1, p)) for p in patch)
    if draw(st.booleans()):
        chunks = draw(st.tuples(*[st.integers(1, 9)] * 2))
    else:  # as Dask has them
        cuts = [sorted(draw(st.sets(st.integers(1, n - 1), max_size=4))) for n in extent]
        chunks = [np.diff([0, *c, n]).tolist() for c, n in zip(cuts, extent, strict=True)]
    axis = draw(st.integers(0, 1))
    array = values_of(extent, np.uint16, 1)
    counted = Counted(array, edges_of(extent, chunks))
    box = list(extent)
    box[axis] = patch[axis]
    needed = 2 * np.prod([widest(e, n) for e, n in zip(counted.edges, box, strict=True)])
    cache = ChunkCache(counted.read, array.dtype, counted.edges, int(needed))
    cache.start(axis)
    for key in sorted(patches_of(extent, patch, stride), key=lambda key: key[axis].start):
        assert np.array_equal(cache.read(key), array[key])
    assert max(counted.reads.values()) == 1
    assert cache.decompressed == len(counted.reads)
    assert cache.bytes <= cache.most_bytes <= needed

    # With room for next to nothing the values stay right.
    small = ChunkCache(counted.read, array.dtype, counted.edges, draw(st.integers(1, 200)))
    for key in patches_of(extent, patch, stride):
        assert np.array_equal(small.read(key), array[key])
    assert small.most_bytes <= small.limit


def test_a_source_reads_each_chunk_once_a_box_in_memory_that_does_not_grow_with_depth(tmp_path):
    most = []
    for depth in (48, 192):
        array = values_of((2, depth, 40, 24), np.uint8)
        zarr.create_array(tmp_path / f"{depth}.zarr", data=array, chunks=(1, 16, 16, 16))
        source = open_source(tmp_path / f"{depth}.zarr")
        said = source.cache_for((depth, 40, 24), (24, 24, 24), 0)
        assert said == 2 * 48 * 40 * 24
        for _ in range(2):  # two boxes
            source.start(0)
            for patch in patches_of((depth, 40, 24), (24, 24, 24), (12, 8, 12)):
                key = (slice(0, 2), *patch)
                assert np.array_equal(source[key], array[key])
        assert source.decompressed == 2 * 2 * (depth // 16) * 3 * 2
        assert source.most_cached_bytes <= said
        most.append(source.most_cached_bytes)
    assert most[0] == most[1]
    plain = open_source(values_of())
    plain.start(0)
    assert (plain.cache_for(SHAPE, (4, 4, 4), 0), plain.cache_bytes, plain.decompressed) == (
        0,
        0,
        0,
    )


def test_a_store_that_fails_once_is_asked_again_and_one_that_keeps_failing_is_an_error(
    monkeypatch,
):
    monkeypatch.setattr(scale_stores, "PAUSE", 0)
    array = values_of()
    store = Failing(zarr.storage.MemoryStore(), ConnectionResetError(104, "reset by peer"))
    zarr.create_array(store, data=array, chunks=(8, 8, 8))
    source = open_source(zarr.open_array(store, mode="r+"))
    source.behind.store_path.store.times = 1
    with pytest.warns(
        UserWarning, match=r"voxels \[0:21, 0:18, 0:13\] \(zyx\): reset by peer; try"
    ):
        assert np.array_equal(whole(source), array[None])
    source.start(None)
    source.behind.store_path.store.times = 10**6
    with (
        pytest.warns(UserWarning, match="trying again"),
        pytest.raises(ConnectionResetError, match=r"reset by peer \(3 attempts\)"),
    ):
        whole(source)


def test_a_chunk_that_is_not_whole_is_an_error_that_says_where(tmp_path):
    array = values_of()
    for number, compressor in enumerate(("zstd", "gzip", "blosc")):
        codec = {
            "zstd": zarr.codecs.ZstdCodec(),
            "gzip": zarr.codecs.GzipCodec(),
            "blosc": zarr.codecs.BloscCodec(),
        }[compressor]
        path = tmp_path / f"{number}.zarr"
        zarr.create_array(path, data=array, chunks=(8, 18, 13), compressors=[codec])
        chunk = path / "c/1/0/0"
        chunk.write_bytes(chunk.read_bytes()[:40])
        source = open_source(path)
        assert np.array_equal(source[0:1, 0:8, 0:18, 0:13][0], array[:8])
        with pytest.raises(DamagedError, match=r"\.zarr: voxels \[8:16, 0:18, 0:13\] \(zyx\)"):
            source[0:1, 8:9, 0:1, 0:1]


def test_a_source_is_not_opened_twice():
    source = open_source(np.zeros((3, 8, 8, 8), np.uint8))
    assert open_source(source) is source
    for chosen in ({"channel": 1}, {"level": 0}, {"timepoint": 0}, {"axes": "czyx"}):
        with pytest.raises(
            ValueError, match=f"{next(iter(chosen))}: got .* for a Source, which is"
        ):
            open_source(source, **chosen)
