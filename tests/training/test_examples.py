"""The configurations in examples/: trained, gone on with, tested and predicted, by the commands."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import nibabel
import numpy as np
import pytest

from tests.training.phantom import write_heads
from voxfuse import cli
from voxfuse.training.config import load
from voxfuse.training.evaluation import thresholds
from voxfuse.training.predict import load_model

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")

#: Width, extent and subjects; all else is the example's.
COMMON = [
    'data.images=["flair", "t1"]', "data.training=[]", "data.groups=", "data.validation_share=0.0",
    'data.test=["b"]', "sampling.patch=[16, 16, 16]", "training.threads=1",
]  # fmt: skip
REDUCED = {
    # 16^3 patches at batch 1 leave the bottom of four levels one voxel.
    "hashemi2018": [
        "network.levels=2", "network.layers=2", "network.growth=2", "network.features=4",
        'data.validation=["c"]', "training.validate_every=3",
    ],
    "salehi2017": ["network.features=[4, 8, 8]", "optimiser.learning_rate=1e-3"],
    "ms_lesions": ["network.features=[4, 8, 8]", "sampling.batch=2"],
}  # fmt: skip


@pytest.fixture(scope="module")
def patients(tmp_path_factory):
    return write_heads(tmp_path_factory.mktemp("patients"), ["a", "b", "c"], shape=(30, 34, 26))


@pytest.mark.parametrize("name", list(REDUCED))
def test_an_example_trains_goes_on_tests_and_predicts(name, patients, tmp_path, capsys):
    example = ROOT / f"examples/{name}.toml"
    given = load(example)
    assert (given.training.seed, given.prediction.threshold) == (0, 0.5)
    settings = [*COMMON, *REDUCED[name], "training.steps=6", "prediction.batch=16"]
    run = tmp_path / "run"
    command = ["train", str(example), "--data", str(patients), "--out", str(run)]
    command += [x for setting in settings for x in ("--set", setting)]
    assert cli.main([*command, "--stop-at", "3"]) == 0
    assert not (run / "test.csv").exists()
    assert cli.main(command) == 0
    assert "goes on from step 3" in capsys.readouterr().err
    model = load_model(run)
    assert model.step in (3, 6)
    with (run / "test.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["subject", "window", "threshold", "dice", "recall", "precision"]
    assert {(row["subject"], row["window"]) for row in rows} == {("b", given.prediction.window)}
    assert [float(row["threshold"]) for row in rows] == thresholds().tolist()
    recall = [float(row["recall"]) for row in rows]
    assert recall == sorted(recall, reverse=True)
    assert recall[0] > recall[-1]

    out = tmp_path / "out"
    predict = ["predict", "--model", str(run), "--output", str(out)]
    assert cli.main([*predict, "--input", str(patients / "b"), "--probabilities"]) == 0
    assert sorted(path.name for path in out.glob("*.gz")) == ["b.nii.gz", "b_probabilities.nii.gz"]
    source = nibabel.load(patients / "b/flair.nii.gz")
    mask, probabilities = (nibabel.load(out / f"b{end}.nii.gz") for end in ("", "_probabilities"))
    np.testing.assert_array_equal(mask.affine, source.affine)
    p = probabilities.get_fdata(dtype=np.float32)
    outside = source.get_fdata() <= 0
    assert not p[outside].any()
    np.testing.assert_array_equal(mask.get_fdata() > 0, (p >= 0.5) & ~outside)
    truth = nibabel.load(patients / "b/lesions.nii.gz").get_fdata() > 0
    for row in rows[::9]:
        above = p >= np.float32(float(row["threshold"]))
        dice = 2 * (above & truth).sum() / (above.sum() + truth.sum())
        assert float(row["dice"]) == pytest.approx(dice, abs=1e-12)


def test_the_bundled_heads_example_tests_on_what_its_first_lines_write():
    example = ROOT / "examples/simulated_head.toml"
    (count,) = re.findall(r"simulate --host \S+ --out simulated --count (\d+)", example.read_text())
    written = [f"ch2bet-sim0-{k:03d}" for k in range(int(count))]
    config = load(example)
    assert (config.data.test, config.data.groups) == (written[-2:], "")
    page = (ROOT / "docs/tutorials/lesions_to_report.md").read_text()
    assert page.count(f"--out simulated --count {count}\n") == 1


def test_what_predict_is_told_takes_the_place_of_the_run(patients, tmp_path, capsys):
    settings = [*COMMON, *REDUCED["ms_lesions"], "training.steps=1", "data.test=[]"]
    run = tmp_path / "run"
    command = ["train", str(ROOT / "examples/ms_lesions.toml"), "--data", str(patients)]
    command += [x for setting in settings for x in ("--set", setting)]
    assert cli.main([*command, "--out", str(run)]) == 0
    one = ["predict", "--model", str(run), "--input", str(patients / "a"), "--output"]
    none, all_ = tmp_path / "none.nii.gz", tmp_path / "all.nii.gz"
    assert cli.main([*one, str(none), "--threshold", "1", "--overlap", "0"]) == 0
    assert cli.main([*one, str(all_), "--threshold", "0", "--overlap", "0"]) == 0
    inside = nibabel.load(patients / "a/flair.nii.gz").get_fdata() > 0
    assert not nibabel.load(none).get_fdata().any()
    np.testing.assert_array_equal(nibabel.load(all_).get_fdata() > 0, inside)
    capsys.readouterr()
    for more, message in (
        (["--window", "bspine"], "--window: got 'bspine', expected one of bspline"),
        (["--overlap", "1.5"], "--overlap: got 1.5, expected 0 to 0.95"),
    ):
        assert cli.main([*one, str(none), *more]) == 1
        assert f"voxfuse predict: {message}" in capsys.readouterr().err
    every = ["predict", "--model", str(run), "--input", str(patients), "--overlap", "0", "--output"]
    assert cli.main([*every, str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.gz")) == [f"{x}.nii.gz" for x in "abc"]
    several = ["predict", "--model", str(run), "--input", str(patients), "--output", str(none)]
    assert cli.main(several) == 1
    assert "for 3 subjects, expected a folder" in capsys.readouterr().err
    assert cli.main(["train", "nothing.toml", "--data", str(patients), "--out", str(run)]) == 1
    assert "voxfuse train: nothing.toml: there is no such file" in capsys.readouterr().err
