"""A study through the command: on its own grid, as the demo, as the network itself."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import voxfuse
from tests.inference import networks
from voxfuse import cli

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = ROOT / "tests/inference/networks.py"

OBLIQUE = np.array([[0.9, -0.3, 0.1, 5], [0.28, 1.1, 0.2, -7], [-0.1, -0.2, 1.4, 11], [0, 0, 0, 1]])
FLIPPED = np.array([[0, 0, -1.5, 40], [-1, 0, 0, 30], [0, 2, 0, -9], [0, 0, 0, 1.0]])
#: What a scanner's file may have: name of the file, affine, shape of a fourth axis, scaling.
HEADERS = {
    "oblique": ("scan.nii.gz", OBLIQUE, (), None),
    "flipped": ("scan.nii", FLIPPED, (), None),
    "one volume of four axes": ("scan.nii.gz", FLIPPED, (1,), None),
    "slope": ("scan.nii", OBLIQUE, (), (0.25, -3.0)),
    "not compressed": ("scan.nii", np.diag([1, 1, 1, 1.0]), (), None),
}


def predict(model, inputs, output, *options):
    """The command's exit status."""
    model = f"{NETWORKS}:{model}" if re.fullmatch(r"\w+", str(model)) else model
    inputs = inputs if isinstance(inputs, list) else [inputs]
    given = ["--model", model, "--input", *inputs, "--output", output, *options]
    return cli.main(["predict", *map(str, given)])


def write(path, array, affine=None, scaling=None):
    if scaling is not None:  # nibabel writes what it is given, and reads it scaled
        array = ((array - scaling[1]) / scaling[0]).astype(np.int16)
    image = nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine)
    if scaling is not None:
        image.header.set_slope_inter(*scaling)
    image.set_sform(image.affine, 1)
    image.set_qform(image.affine, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)
    return path


def read(path):
    return np.asanyarray(nibabel.load(path).dataobj)


def intensities(shape=(23, 18, 21), seed=0, levels=2):
    return np.random.default_rng(seed).integers(levels, size=shape).astype(np.float32)


@pytest.mark.parametrize("header", HEADERS)
def test_a_segmentation_lies_voxel_by_voxel_where_the_scan_does(tmp_path, header):
    name, affine, more, scaling = HEADERS[header]
    truth = intensities()
    scan = write(tmp_path / name, truth.reshape(*truth.shape, *more), affine, scaling)
    assert np.array_equal(read(scan).reshape(truth.shape), truth)  # the slope is undone
    out = tmp_path / "out.nii.gz"
    options = ["--patch", 8, 12, 16, "--orientation", "LPS", "--batch", 3]
    assert predict("above_half", scan, out, *options) == 0
    written, source = nibabel.load(out), nibabel.load(scan)
    assert written.get_data_dtype() == np.uint8
    assert np.array_equal(read(out), truth)
    np.testing.assert_array_equal(written.affine, source.affine)
    for form in ("qform_code", "sform_code", "xyzt_units"):
        assert written.header[form] == source.header[form]
    assert np.isnan(written.header["scl_slope"]) or written.header["scl_slope"] == 1


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_halved_voxels_come_back_voxel_by_voxel(tmp_path, axis):
    """Twice as many voxels along one axis: both halves of a voxel are nearest to its own value."""
    truth = intensities(levels=2)
    scan = write(tmp_path / "scan.nii.gz", truth, FLIPPED)
    sizes = np.array([1.5, 1.0, 2.0])  # right, anterior, superior
    sizes[axis] /= 2
    for model, more in (("above_half", []), ("three_classes", ["--probabilities"])):
        out = tmp_path / f"{model}.nii.gz"
        options = ["--patch", 16, "--orientation", "RAS", "--spacing", *sizes, *more]
        assert predict(model, scan, out, *options) == 0
        assert np.array_equal(read(out), truth)
    probabilities = read(tmp_path / "three_classes_probabilities.nii.gz")
    assert probabilities.shape == (*truth.shape, 2)
    assert np.array_equal(probabilities[..., 0] > 0.5, truth == 1)


def test_the_bundled_network_segments_as_the_demo(tmp_path, monkeypatch):
    """Part of the bundled head: patches, window and mask are those of examples/skull_strip.py."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    demo = pytest.importorskip("skull_strip", reason="the demo needs matplotlib")
    head_image, network = sys.modules["head_image"], sys.modules["skull_strip_unet"].bundled()
    head = nibabel.load(ROOT / "data/head_mr/ch2.nii.gz").slicer[40:128, 60:148, 60:148]
    scan = tmp_path / "head.nii.gz"
    nibabel.save(head, scan)
    read_head = head_image.read_head(scan, clip=False)
    whole = demo.Run("native", 0, None, torch.zeros(read_head.image.shape), None, 1, 0, 0, None)
    watch = demo.Predictor(network, torch.device("cpu"))
    run = demo.predict_patches(
        watch, watch.watch, read_head.native(), whole, 64, "bspline5", torch.device("cpu"), "auto"
    )
    read_head.save_mask(run.probability, tmp_path / "demo.nii.gz")
    model = f"{ROOT / 'examples/skull_strip_unet.py'}:bundled"
    options = ["--patch", 64, "--normalize", "range", "--window", "bspline5", "--spacing", 1]
    assert predict(model, scan, tmp_path / "command.nii.gz", *options) == 0
    expected, found = read(tmp_path / "demo.nii.gz"), read(tmp_path / "command.nii.gz")
    assert 0.1 < expected.mean() < 0.9
    assert np.array_equal(found, expected)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A program of two patches a call, and the module it is of."""
    network = networks.Positional().eval()
    path = tmp_path_factory.mktemp("exported") / "network.pt2"
    torch.export.save(torch.export.export(network, (torch.zeros(2, 1, 8, 12, 16),)), path)
    return path, network


def test_an_export_of_fixed_batch_predicts_what_its_network_does(tmp_path, exported):
    path, network = exported
    scan = intensities((15, 23, 31), levels=5)
    write(tmp_path / "in/scan.nii.gz", scan)
    options = ["--trust-model", "--tta", "rotations"]
    assert predict(path, tmp_path / "in", tmp_path / "out", *options) == 0
    expected = voxfuse.sliding_window_inference(
        torch.from_numpy(scan)[None, None],
        (8, 12, 16),
        5,
        network,
        output="labels",
        activation="softmax",
        tta="rotations",
    )
    patches = len(voxfuse.fusion.grids.plan_grid(scan.shape, (8, 12, 16), 0.5, "shifted"))
    assert patches % 2  # the last batch is padded
    assert np.array_equal(read(tmp_path / "out/scan.nii.gz"), expected[0, 0].numpy())
    status = json.loads((tmp_path / "out/status/scan.json").read_text())
    assert status["model"]["kind"] == "export"
    assert status["model"]["digest"].startswith("sha256:")


def test_without_the_users_word_an_export_is_not_loaded(tmp_path, exported, capsys):
    scan = write(tmp_path / "scan.nii.gz", intensities())
    assert predict(exported[0], scan, tmp_path / "out.nii.gz") == 1
    error = capsys.readouterr().err
    assert "network.pt2 is an exported program: loading it can run code" in error
    assert "--trust-model says that you know where it comes from" in error
    assert not (tmp_path / "out.nii.gz").exists()


def test_regions_and_channels_and_masks(tmp_path):
    truth = intensities(levels=3)
    scan = write(tmp_path / "a.nii.gz", truth, OBLIQUE)
    out = tmp_path / "out.nii.gz"
    patch = ["--patch", 16, "--overwrite"]
    regions = [*patch, "--regions", 5, 2, "--probabilities"]
    assert predict("two_regions", scan, out, *regions) == 0
    assert np.array_equal(read(out), np.array([0, 5, 2])[truth.astype(int)])
    assert read(tmp_path / "out_probabilities.nii.gz").shape == (*truth.shape, 2)
    # Two channels by two options; a mask beside the first.
    other = write(tmp_path / "b.nii.gz", truth + intensities(seed=1), OBLIQUE)
    inside = np.indices(truth.shape)[0] > 10
    write(tmp_path / "outline.nii.gz", inside.astype(np.uint8), OBLIQUE)
    options = [*patch, "--mask", "outline"]
    assert predict("of_two_channels", [scan, "--input", other], out, *options) == 0
    assert np.array_equal(read(out), (intensities(seed=1) == 1) & inside)
    # Intensities of 0 and 4 become 0 and 1.
    assert predict("above_half", scan, out, *patch, "--normalize", "0:2.5") == 0
    assert np.array_equal(read(out), truth == 2)
    with_more_channels = tmp_path / "channels.nii.gz"
    write(with_more_channels, np.stack([truth, truth + 1], 3))
    assert predict("of_two_channels", with_more_channels, out, *patch) == 0
    assert read(out).all()


def test_the_last_layer_apart_changes_labels_by_rounding_alone(tmp_path):
    scan = write(tmp_path / "scan.nii.gz", intensities((20, 27, 31), levels=9))
    options = ["--patch", 16, "--activation", "none"]
    assert predict("positional", scan, tmp_path / "whole.nii.gz", *options) == 0
    assert predict("positional", scan, tmp_path / "apart.nii.gz", *options, "--head", "last") == 0
    whole, apart = read(tmp_path / "whole.nii.gz"), read(tmp_path / "apart.nii.gz")
    assert len(np.unique(whole)) > 1
    assert np.mean(whole != apart) < 1e-3


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("positional", []),
        ("positional", ["--activation", "sigmoid"]),
        ("two_regions", ["--regions", 5, 2, "--threshold", 0.2]),
        ("above_half", ["--threshold", 0.2]),
    ],
)
def test_probabilities_behind_the_last_layer_change_no_label(tmp_path, model, options):
    truth = intensities((20, 27, 31), levels=9) * (1 if model == "positional" else 0.25)
    scan = write(tmp_path / "scan.nii.gz", truth)
    inside = np.zeros(truth.shape, np.uint8)
    inside[4:10, 3:, 5:] = 1  # leaves patches out
    write(tmp_path / "outline.nii.gz", inside)
    options = ["--patch", 4, "--mask", "outline", "--head", "last", "--spacing", 1.5, *options]
    assert predict(model, scan, tmp_path / "labels.nii.gz", *options) == 0
    assert predict(model, scan, tmp_path / "both.nii.gz", *options, "--probabilities") == 0
    labels = read(tmp_path / "labels.nii.gz")
    assert len(np.unique(labels)) > 1
    assert np.array_equal(read(tmp_path / "both.nii.gz"), labels)
    probabilities = read(tmp_path / "both_probabilities.nii.gz")
    assert 0 < probabilities[inside == 1].max() <= 1
    assert not probabilities[inside == 0].any()


def test_folders_are_studies_and_numbers_are_channels(tmp_path):
    truth = {name: intensities(seed=k) for k, name in enumerate("xyz")}
    for name, array in truth.items():
        write(tmp_path / f"numbered/{name}_0000.nii.gz", array * 0)
        write(tmp_path / f"numbered/{name}_0001.nii.gz", array)
        write(tmp_path / f"first/{name}.nii.gz", array * 0)
        write(tmp_path / f"second/{name}.nii", array)
    folders = {
        "numbered": [tmp_path / "numbered"],
        "apart": [tmp_path / "first", tmp_path / "second"],
    }
    for name, given in folders.items():
        assert predict("of_two_channels", given, tmp_path / name, "--patch", 16, "--quiet") == 0
        for study, array in truth.items():
            assert np.array_equal(read(tmp_path / name / f"{study}.nii.gz"), array)
