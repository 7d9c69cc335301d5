"""Bad options and files: what each of them is told."""

from __future__ import annotations

import re

import numpy as np
import pytest

from tests.inference.test_studies import intensities, predict, read, write

PATCH = ["--patch", "16"]

#: Name -> model, input, options after those for a patch, and what the error says.
TABLE = {
    "no such model": ("nothing.pt2", "scan.nii.gz", [], r"--model: there is no file nothing.pt2"),
    "no such run": ("./run", "scan.nii.gz", [], r"--model: there is no run; voxfuse train"),
    "no export": ("scan.pt2", "scan.nii.gz", ["--trust-model"], "is no file of torch.export.save"),
    "not trusted": ("scan.pt2", "scan.nii.gz", [], "scan.pt2 is an exported program: loading it"),
    "no such module": ("nowhere_at_all:x", "scan.nii.gz", [], "there is no module nowhere_at_all"),
    "no such attribute": (":missing", "scan.nii.gz", [], "networks.py has no missing"),
    "no network": (":number", "scan.nii.gz", [], "number is of type int, expected a network"),
    "a factory that fails": (
        ":raising", "scan.nii.gz", [], r"raising\(\) raised RuntimeError: no weights here",
    ),
    "no state": (":Plain", "scan.nii.gz", [], "returned Plain, which has no state .* --model-id"),
    "no such input": (":above_half", "no.nii.gz", [], "--input: there is no .*no.nii.gz"),
    "an empty folder": (":above_half", "empty", [], r"--input: .*empty has no images \(\*.nii.gz"),
    "file and folder": (
        ":above_half", "empty scan.nii.gz", [], "expected files or folders",
    ),
    "no image": (":above_half", "text.nii.gz", [], "text.nii.gz: cannot be read"),
    "two axes": (":above_half", "flat.nii.gz", [], "got 2 axes, expected three spatial ones"),
    "cut short": (":above_half", "short.nii.gz", [], "short.nii.gz: cannot be read"),
    "NaN": (":above_half", "nan.nii.gz", [], r"is nan at \(1, 2, 3\), expected finite numbers"),
    "another grid": (
        ":of_two_channels", "scan.nii.gz moved.nii.gz", [],
        "moved.nii.gz lies elsewhere than .*scan.nii.gz: .* up to 2 mm",
    ),
    "another shape": (
        ":of_two_channels", "scan.nii.gz other.nii.gz", [],
        r"other.nii.gz has shape \(22, 18, 21\), but",
    ),
    "too few channels": (
        ":of_two_channels", "scan.nii.gz", [], r"does not take patches \(1, 1, 16, 16, 16\)",
    ),
    "too many channels": (
        ":above_half", "scan.nii.gz moved.nii.gz", [],
        "channels of scan are 2 files: scan.nii.gz, moved.nii.gz",
    ),
    "no patch": (":above_half", "scan.nii.gz", ["no patch"], "--patch: is needed"),
    "two numbers of a patch": (
        ":above_half", "scan.nii.gz", ["--patch", "8", "8"], "--patch: got 2 numbers, expected 1 o",
    ),
    "an overlap of 1": (":above_half", "scan.nii.gz", ["--overlap", "1"], "--overlap: got 1"),
    "a misspelt window": (
        ":above_half", "scan.nii.gz", ["--window", "bsplin"], "--window: .*'bsplin'.*bspline",
    ),
    "a misspelt orientation": (
        ":above_half", "scan.nii.gz", ["--orientation", "RAX"], "--orientation: .*RAX",
    ),
    "a spacing of 0": (":above_half", "scan.nii.gz", ["--spacing", "0"], "--spacing: got "),
    "an unknown normalisation": (
        ":above_half", "scan.nii.gz", ["--normalize", "minmax"], "--normalize: got 'minmax', exp",
    ),
    "a window of intensities": (
        ":above_half", "scan.nii.gz", ["--normalize", "5:1"], "--normalize: .* LOW below HIGH",
    ),
    "no mask": (":above_half", "scan.nii.gz", ["--mask", "brain"], "has no file brain"),
    "too few regions": (
        ":two_regions", "scan.nii.gz", ["--regions", "1"], "--regions: got 1 values for 2 channels",
    ),
    "labels of one class": (":above_half", "scan.nii.gz", ["--labels"], "--labels: the network h"),
    "a threshold of labels": (
        ":three_classes", "scan.nii.gz", ["--threshold", "0.4"], "--threshold: is for one channel",
    ),
    "softmax of one class": (
        ":above_half", "scan.nii.gz", ["--activation", "softmax"], "--activation: got softmax for",
    ),
    "an unknown activation": (
        ":above_half", "scan.nii.gz", ["--activation", "relu"], "--activation: got 'relu', expect",
    ),
    "no such layer": (
        ":above_half", "scan.nii.gz", ["--head", "final"], "--head: got 'final'.*: copy, last",
    ),
    "not the last layer": (
        ":softmaxed", "scan.nii.gz", ["--head", "1"], "--head: is not the network's last layer",
    ),
    "a class": (":Positional", "scan.nii.gz", [], "Positional is a class, whose netwo"),
    "another extent": (":halving", "scan.nii.gz", [], "returned .*8, 8, 8.* expected their extent"),
    "not finite": (":not_finite", "scan.nii.gz", [], "the network's predictions are not finite"),
    "no such device": (
        ":above_half", "scan.nii.gz", ["--device", "tpu9"], "--device: got 'tpu9', expected auto",
    ),
    "another format": (
        ":above_half", "scan.nii.gz", ["out.mgz"], "--output: got .*out.mgz, expected a folder or",
    ),
    "capitals": (
        ":above_half", "scan.nii.gz", ["out.NII.GZ"], "--output: got .*out.NII.GZ, expected a fo",
    ),
    "a picture": (":above_half", "scan.nii.gz", ["out.tif"], "--output: got .*out.tif, expected a"),
    "a script": (":exiting", "scan.nii.gz", [], r"exiting\(\) raised SystemExit: 3"),
    "over the scan": (
        ":above_half", "scan.nii.gz", ["scan.nii.gz"], "--output: .* is an image, mask or label",
    ),
    "a timeout of 0": (":above_half", "scan.nii.gz", ["--timeout", "0"], "--timeout: got 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One of each kind."""
    folder = tmp_path_factory.mktemp("files")
    array = intensities()
    write(folder / "scan.nii.gz", array)
    write(folder / "moved.nii.gz", array, np.array(np.eye(4)) + np.eye(4, k=3) * 2)
    write(folder / "other.nii.gz", array[1:])
    write(folder / "flat.nii.gz", array[0])
    array[1, 2, 3] = np.nan
    write(folder / "nan.nii.gz", array)
    whole = (folder / "scan.nii.gz").read_bytes()
    (folder / "short.nii.gz").write_bytes(whole[:-200])
    (folder / "text.nii.gz").write_text("no image at all")
    (folder / "scan.pt2").write_text("no program at all")
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize("name", TABLE)
def test_bad_options_and_files_are_told_apart(files, name, capsys, monkeypatch):
    model, inputs, options, expected = TABLE[name]
    monkeypatch.chdir(files)
    model = model[1:] if model.startswith(":") else model
    output, patch = "out.nii.gz", PATCH
    if options and options[0].startswith(("out.", "scan.")):
        output, options = options[0], []
    if options and options[0] in ("no patch", "--patch"):
        patch, options = [], options if options[0] == "--patch" else []
    status = predict(model, inputs.split(), output, *patch, *options)
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith("voxfuse predict: ")
    assert re.search(expected, error), error
    assert not (files / "out.nii.gz").exists()
    assert len(read(files / "scan.nii.gz")) == 23  # as it was
