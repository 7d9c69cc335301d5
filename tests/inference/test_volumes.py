"""A Zarr volume through the command: prepared, in shards, to the bits of one piece."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from tests.inference.test_studies import NETWORKS, intensities, predict, write
from voxfuse.inference.request import Request

zarr = pytest.importorskip("zarr", reason="needs the extra zarr")

from voxfuse.inference import results  # noqa: E402
from voxfuse.inference.volumes import open_volume, settle  # noqa: E402
from voxfuse.scale import Space, create_destination, open_destination, open_source  # noqa: E402

OPTIONS = ["--patch", 16, "--batch", 2]


def result(path):
    return np.asarray(open_destination(str(path), labels="segmentation").array[...])


@pytest.fixture
def volume(tmp_path):
    """Intensities 0 to 2, with nothing in the half of z above 40."""
    array = intensities((70, 33, 30), levels=3)
    array[40:] = 0
    stored = zarr.create_array(
        store=str(tmp_path / "in.zarr"), shape=array.shape, chunks=(16, 16, 16), dtype="uint8"
    )
    stored[...] = array.astype(np.uint8)
    return tmp_path / "in.zarr", array


def test_a_volume_in_shards_is_the_volume_in_one_piece(volume, tmp_path, capsys):
    path, truth = volume
    assert predict("three_classes", path, tmp_path / "one.zarr", *OPTIONS) == 0
    assert np.array_equal(result(tmp_path / "one.zarr"), truth)
    assert re.search(r"1 box of at most .* voxels", capsys.readouterr().out)
    out = tmp_path / "several.zarr"
    assert predict("three_classes", path, out, *OPTIONS, "--prepare", 3, "--foreground", "0") == 0
    plan = capsys.readouterr().out
    assert "3 shards of" in plan
    patches = re.search(r"(\d+) patches, .* the (\d+) of the whole", plan)
    assert int(patches[2]) < 9 * 4 * 3  # the empty ones are left out
    for k in (2, 0, 1, 1):  # in any order, and again
        assert predict("three_classes", path, out, *OPTIONS, "--shard", f"{k}/3", "--quiet") == 0
    assert np.array_equal(result(out), truth)
    assert predict("three_classes", path, out, *OPTIONS) == 0  # and what is left, which is nothing
    # The same command goes on whatever number of processes there are now.
    same = ["three_classes", path, out, *OPTIONS, "--foreground"]
    assert predict(*same, "0.0") == 0
    assert predict(*same, "0.5") == 1
    assert re.search(r"--foreground: got 0.5, .* was prepared with 0\.0;", capsys.readouterr().err)


def test_a_foreground_that_was_corrected_is_another(volume, tmp_path, capsys):
    path, truth = volume
    mask = zarr.create_array(store=str(tmp_path / "m.zarr"), shape=truth.shape, dtype="uint8")
    mask[10, 10, 10] = 1
    same = ["three_classes", path, tmp_path / "out.zarr", *OPTIONS, "--foreground"]
    before = open_source(str(tmp_path / "m.zarr")).fingerprint()
    for _ in range(2):
        assert predict(*same, tmp_path / "m.zarr") == 0
    mask[38, 30, 28] = 1
    assert open_source(str(tmp_path / "m.zarr")).fingerprint() == before  # which is of samples
    assert predict(*same, tmp_path / "m.zarr") == 1
    assert "--foreground: is above 0 in other patches than when" in capsys.readouterr().err


def stored(path, array, kind="zarr", axes=None):
    """The array as NIfTI, whose axes are x, y, z; as Zarr; or as OME-Zarr of these axes."""
    if kind == "nifti":
        return write(path.with_suffix(".nii"), array)
    if axes is not None:
        like = Space(tuple(axes), (1.0,) * 3, (0.0,) * 3, (None,) * 3)
        made = create_destination(path, array.shape, array.dtype, kind=kind, like=like)
        made[tuple(slice(0, n) for n in array.shape)] = array
    else:
        zarr.create_array(str(path), data=array, chunks=(16, 16, 16))
    return path


@pytest.mark.parametrize("shape", [(32, 32, 32), (32, 40, 24)])
@pytest.mark.parametrize(
    ("volume", "mask", "turned"),
    [
        (dict(), dict(), False),
        (dict(), dict(kind="nifti"), True),
        (dict(kind="nifti"), dict(), True),
        (dict(kind="nifti"), dict(kind="nifti"), False),
        (dict(kind="image", axes="xyz"), dict(), True),
        (dict(kind="image", axes="ZYX"), dict(kind="nifti"), True),
        (dict(kind="array", axes="xyz"), dict(kind="nifti"), False),
        (dict(kind="image", axes=("axial", "coronal", "sagittal")), dict(), False),
    ],
)
def test_axes_of_a_foreground_are_matched_by_name(volume, mask, turned, shape, tmp_path):
    array = np.zeros(shape, np.float32)
    array[:8, :, 16:] = 1
    looked_at = stored(tmp_path / "m.zarr", (array.T if turned else array).astype("u1"), **mask)
    path = stored(tmp_path / "in.zarr", array, **volume)
    request = Request(f"{NETWORKS}:three_classes", [path], tmp_path / "out.zarr", patch=[8])
    job = open_volume(request, str(looked_at))
    for origin in product(*(range(0, n, 8) for n in shape)):
        patch = tuple(slice(start, start + 8) for start in origin)
        assert job.skip_origin(origin) == (not array[patch].any()), origin


def test_axes_of_a_foreground_that_cannot_be_matched_are_an_error(tmp_path):
    array = np.ones((16, 16, 24), np.float32)
    names = ("axial", "coronal", "sagittal")
    path = stored(tmp_path / "in.zarr", array, "image", names)
    request = Request(f"{NETWORKS}:three_classes", [path], tmp_path / "out.zarr", patch=[8])
    mask = stored(tmp_path / "m.zarr", array, "nifti")
    with pytest.raises(ValueError, match="--foreground: has axes x, y, z, expected those of the v"):
        open_volume(request, str(mask))
    request = replace(request, input=[stored(tmp_path / "zyx.zarr", array)])
    with pytest.raises(ValueError, match=r"\(16, 16, 24\) \(x, y, z\), expected \(24, 16, 16\)"):
        open_volume(request, str(mask))
    mirrored = write(tmp_path / "mirrored.nii", array, np.diag([-1.0, 1, 1, 1]))
    request = replace(request, input=[mirrored])
    with pytest.raises(ValueError, match="--foreground: lies elsewhere than the volume: their aff"):
        open_volume(request, str(mask))


@pytest.mark.parametrize("name", ["three_classes", "two_regions"])
def test_probabilities_and_regions_are_written_box_by_box(name, volume, tmp_path, capsys):
    path, truth = volume
    out, options = tmp_path / "out.zarr", [*OPTIONS, "--probabilities"]
    expected = truth
    logits = np.stack([8 * truth - 4, 16 * truth - 16])
    probabilities = np.exp(logits) / (1 + np.exp(logits).sum(0))
    if name == "two_regions":  # the second is where the first is 2
        options += ["--regions", 5, 3]
        expected = np.array([0, 5, 3])[truth.astype(int)]
        probabilities = 1 / (1 + np.exp(-np.stack([8 * truth - 4, 8 * truth - 12])))
    assert predict(name, path, out, *options, "--prepare", 2) == 0
    assert "208 kB to write" in capsys.readouterr().out  # three bytes a voxel
    for k in (1, 0, 0):
        assert predict(name, path, out, *options, "--shard", f"{k}/2", "--quiet") == 0
    assert np.array_equal(result(out), expected)
    image = open_destination(str(out)).array
    assert image.shape == probabilities.shape
    assert image.dtype == np.uint8
    assert np.abs(np.asarray(image[...]) / 255 - probabilities).max() <= 0.5 / 255 + 1e-6
    assert open_source(str(out)).shape == image.shape  # of an OME-Zarr image
    # A shard that is gone, of labels or of probabilities, is one that is not done.
    shards = [file for file in out.rglob("c/**/*") if file.is_file()]
    for shard in (next(f for f in shards if "labels" in f.parts), shards[0], shards[-1]):
        content = shard.read_bytes()
        shard.unlink()
        assert predict(name, path, out, *options, "--quiet") == 0
        assert shard.read_bytes() == content
    if name == "two_regions":
        assert predict(name, path, out, *options, "--threshold", 0.4, "--shard", "0/2") == 1
        assert "models.labels: was " in capsys.readouterr().err


def test_sigmoids_that_are_all_1_change_no_label(volume, tmp_path):
    path, truth = volume
    options = [*OPTIONS, "--activation", "sigmoid", "--head", "last", "--foreground", "0"]
    for name, more in ("labels", []), ("both", ["--probabilities"]):
        out = tmp_path / f"{name}.zarr"
        assert predict("sure_of_three", path, out, *options, *more) == 0
        assert np.array_equal(result(out), truth)
    image = np.asarray(open_destination(str(out)).array[...])
    assert (image[:, truth == 2] == 255).all()
    assert not image[:, 60:].any()  # under no patch


def test_logits_are_no_probabilities(volume, tmp_path, capsys):
    path, _ = volume
    options = [*OPTIONS, "--probabilities", "--activation", "identity"]
    assert predict("three_classes", path, tmp_path / "out.zarr", *options) == 1
    assert re.search(r"values from -4 .* expected probabilities in", capsys.readouterr().err)


def test_a_dry_run_of_a_volume_measures_and_makes_nothing(volume, tmp_path, capsys):
    path, _ = volume
    options = [*OPTIONS, "--tta", "mirror", "--workers", 2, "--dry-run", "--memory-limit", "64G"]
    assert predict("three_classes", path, tmp_path / "out.zarr", *options) == 0
    printed = capsys.readouterr().out
    patches = int(re.search(r"^(\d+) patches", printed, re.M)[1])
    calls = int(re.search(r"calls    (\d+) of 2 patches", printed)[1])
    assert calls == 8 * -(-patches // 2)  # of one box
    assert re.search(r"memory   .* of 64 GB, for each of 2 processes: process .*, box ", printed)
    assert re.search(r"time     [0-9.]+ m?i?n?s? in .* \(measured\), with a core for each", printed)
    assert not (tmp_path / "out.zarr").exists()
    assert not (tmp_path / "out.zarr.job").exists()


MEASURED = """
import sys
from pathlib import Path
import torch
from voxfuse.inference.request import Request, _resident
from voxfuse.inference.volumes import settle
network, path, out = sys.argv[1:]
request = Request(network, [Path(path)], Path(out), patch=[32], batch=2, orientations="mirror",
                  probabilities=True)
torch.set_num_threads(1)
volume, cost = settle(request, lambda cost: None)
volume.job.run(volume.folder)
print(sum(cost.memory.values()), cost.plan.memory, _resident("VmHWM"))
"""


def test_memory_with_flips_and_probabilities_is_what_is_planned(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("a process's peak is read from /proc")
    noise = np.random.default_rng(0).standard_normal((192, 64, 64)).astype(np.float32)
    zarr.create_array(str(tmp_path / "in.zarr"), data=noise, chunks=(48, 48, 48))
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, f"{NETWORKS}:many_classes", str(tmp_path / "in.zarr"),
         str(tmp_path / "out.zarr")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    planned, box, taken = (int(x) for x in ran.stdout.split())
    # Eight predictions of 12 MiB, twice, and the 48 probabilities of a slab: more than the rest.
    assert box > 2 * 8 * 12 * 2**20
    # What a library loads when it is first used is not planned.
    assert taken - planned < 64 * 2**20


def test_what_is_no_volume_in_boxes_is_told(volume, tmp_path, capsys):
    path, _ = volume
    for options, expected in (
        (["--spacing", "1"], "--spacing: is for studies"),
        (["--normalize", "range"], "--normalize: got 'range', expected none or zscore"),
        (["--shard", "3/3"], "--shard: got '3/3', expected I/N with 0 <= I < N"),
        (["--shard", "0/2"], r"--shard: there is no .*out.zarr; --prepare makes it"),
        (["--foreground", "brain.zarr"], "--foreground: got 'brain.zarr', expected a finite numb"),
        (["--foreground", "nan"], "--foreground: got 'nan', expected a finite number"),
        (["--prepare", "0"], "--prepare: got 0, expected a number of shards >= 1"),
        (["--prepare", "--shard", "0/2"], "--prepare: is done once and before; --shard predicts"),
        (["--timeout", "3"], "--timeout: is for studies"),
    ):
        assert predict("three_classes", path, tmp_path / "out.zarr", *OPTIONS, *options) == 1
        error = capsys.readouterr().err
        assert re.search(expected, error), error
    assert not (tmp_path / "out.zarr").exists()
    assert predict(tmp_path, path, tmp_path / "out.zarr", *OPTIONS) == 1
    assert "--model: got" in (error := capsys.readouterr().err)
    assert "a run of voxfuse train predicts studies" in error
    assert predict("not_finite", path, tmp_path / "nan.zarr", *OPTIONS) == 1
    assert "the network's predictions are not finite" in capsys.readouterr().err
    # Another network, patch or input is not the one that was prepared.
    out = tmp_path / "out2.zarr"
    assert predict("three_classes", path, out, *OPTIONS, "--prepare") == 0
    assert predict("three_classes", path, out, "--patch", 14, "--shard", "0/1") == 1
    assert "was prepared for another job" in capsys.readouterr().err


def test_of_two_at_once_and_of_one_that_is_killed_the_output_is_whole(
    volume, tmp_path, capsys, monkeypatch
):
    path, truth = volume
    out, make = tmp_path / "out.zarr", results.create_destination
    more = [*OPTIONS, "--probabilities"]

    def killed(*given, **options):
        if options["kind"] == "labels":
            raise KeyboardInterrupt
        return make(*given, **options)

    with monkeypatch.context() as patch:  # after the image, before the labels
        patch.setattr(results, "create_destination", killed)
        assert predict("three_classes", path, out, *more) == 130
    assert not out.exists()

    def overtaken(*given, **options):
        if options["kind"] == "image":
            monkeypatch.undo()
            assert predict("three_classes", path, out, *more, "--prepare") == 0
        return make(*given, **options)

    monkeypatch.setattr(results, "create_destination", overtaken)
    assert predict("three_classes", path, out, *more) == 0
    assert np.array_equal(result(out), truth)
    request = Request(f"{NETWORKS}:three_classes", [path], tmp_path / "two.zarr", patch=[16])
    slower, _ = open_volume(request), settle(request, lambda cost: None)
    slower = slower.create()
    slower.prepare()
    slower.job.run(slower.folder)
    assert np.array_equal(result(tmp_path / "two.zarr"), truth)
    capsys.readouterr()
    assert predict("three_classes", path, tmp_path / "two.zarr", "--patch", 16, *more[-1:]) == 1
    assert "--probabilities: " in (error := capsys.readouterr().err)
    assert "two.zarr was prepared without" in error


def test_labels_of_others_stay_and_boxes_that_are_gone_are_not_done(volume, tmp_path, capsys):
    path, truth = volume
    annotated = tmp_path / "annotated.zarr"
    manual = create_destination(
        str(annotated), truth.shape, np.uint8, kind="labels", name="segmentation"
    )
    manual[0:70, 0:33, 0:30] = np.full(truth.shape, 7, np.uint8)
    assert predict("three_classes", path, annotated, *OPTIONS) == 1
    assert re.search(r"--output: .*annotated.zarr exists, but no .*job", capsys.readouterr().err)
    assert (result(annotated) == 7).all()
    assert not (tmp_path / "annotated.zarr.job").exists()

    out = tmp_path / "out.zarr"
    assert predict("three_classes", path, out, *OPTIONS) == 0
    assert predict("three_classes", path, out, *OPTIONS) == 0  # all of it is done
    shutil.rmtree(out)
    capsys.readouterr()
    assert predict("three_classes", path, out, *OPTIONS) == 1
    assert re.search(r"there is no .*out.zarr, but .*job says which of", capsys.readouterr().err)
    assert not out.exists()
    shutil.rmtree(tmp_path / "out.zarr.job")
    assert predict("three_classes", path, out, *OPTIONS) == 0
    assert np.array_equal(result(out), truth)
