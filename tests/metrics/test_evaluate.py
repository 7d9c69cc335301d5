"""``voxfuse evaluate``: files matched, grids compared, tables and page written."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from voxfuse import cli

nibabel = pytest.importorskip("nibabel", reason="the files are read by nibabel")
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
AFFINE = np.diag([-1.0, 1.0, 2.0, 1.0])


def save(path, array, affine=AFFINE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def lesions(*starts, shape=(20, 24, 10), label=1):
    mask = np.zeros(shape, np.uint8)
    for x, y, z in starts:
        mask[x : x + 4, y : y + 3, z : z + 2] = label
    return mask


@pytest.fixture
def study(tmp_path):
    """Three subjects; the third has no lesions. One method misses one and invents one."""
    truths = {
        "p1": lesions((2, 2, 2), (10, 12, 5)),
        "p2": lesions((5, 5, 5)),
        "p3": lesions(),
    }
    ours = {
        "p1": lesions((2, 3, 2), (14, 2, 7)),
        "p2": lesions((5, 5, 5)),
        "p3": lesions(),
    }
    for name, mask in truths.items():
        save(tmp_path / "truth" / f"{name}.nii.gz", mask)
        save(tmp_path / "ours" / f"{name}.nii.gz", ours[name])
        save(tmp_path / "theirs" / f"{name}.nii.gz", np.roll(mask, 1, 0))
        p = np.clip(0.8 * ours[name] + 0.1 * (mask + 0.0), 0, 1).astype(np.float32)
        save(tmp_path / "probabilities" / f"{name}.nii.gz", p)
    return tmp_path


def run(*arguments):
    return cli.main(["evaluate", *map(str, arguments)])


def test_tables_hold_the_numbers(study, capsys):
    out = study / "out"
    assert run(study / "ours", study / "truth", "--rule", "isbi", "msseg", "--out", out) == 0
    assert "over 3 subjects" in capsys.readouterr().out
    rows = list(csv.DictReader((out / "subjects.csv").open()))
    assert [row["subject"] for row in rows] == ["p1", "p2", "p3"]
    # p1: 48 true voxels of 2 mm3, 48 predicted, 16 shared.
    assert float(rows[0]["dice"]) == pytest.approx(2 * 16 / 96)
    assert float(rows[0]["truth_ml"]) == pytest.approx(0.096)
    assert rows[0]["isbi.lesion_sensitivity"] == rows[0]["isbi.lesion_precision"] == "0.5"
    assert (rows[2]["dice"], rows[2]["sensitivity"]) == ("1.0", "")
    found = json.loads((out / "results.json").read_text())
    assert found["subjects"][2]["sensitivity"] is None
    pooled = {row["metric"]: row for row in csv.DictReader((out / "pooled.csv").open())}
    assert float(pooled["isbi.lesion_f1"]["pooled"]) == pytest.approx(2 / 3)
    strata = list(csv.DictReader((out / "lesions.csv").open()))
    counted = [row["lesions_truth"] for row in strata if row["rule"] == "isbi"]
    assert counted == ["0", "3", "0", "0"]  # 24 voxels of 2 mm3 each: 48 mm3
    text = (out / "summary.md").read_text()
    assert "empty prediction" in text
    assert "| Dice | 2 TP / (2 TP + FP + FN) | 0 | 0 | 1 |" in text


def test_without_a_folder_the_summary_is_printed(study, capsys):
    assert run(study / "ours" / "p1.nii.gz", study / "truth" / "p1.nii.gz") == 0
    assert "| Lesion F1, isbi | 0.500 |" in capsys.readouterr().out


def test_comparison_says_who_wins_on_which_subject(study):
    out = study / "out"
    arguments = study / "ours", study / "truth", "--compare", study / "theirs", "--out", out
    assert run(*arguments) == 0
    rows = list(csv.DictReader((out / "compare.csv").open()))
    winners = {row["subject"]: row["winner"] for row in rows if row["metric"] == "dice"}
    assert winners == {"p1": "theirs", "p2": "ours", "p3": "tie"}
    assert "ours wins" in (out / "summary.md").read_text()
    # Differences of volumes are of magnitudes, and are named so.
    names = [
        one["column"]
        for one in json.loads((out / "results.json").read_text())["comparison"]["metrics"]
    ]
    for found in ({row["metric"] for row in rows}, set(names)):
        assert "|volume_difference_ml|" in found
        assert "volume_difference_ml" not in found
    assert "| \\|Volume difference\\| [ml] | " in (out / "summary.md").read_text()
    assert "<td>|Volume difference| [ml]</td>" in (out / "report.html").read_text()
    # Beside results without a comparison, it would be of other predictions.
    assert run(study / "ours", study / "truth", "--out", out) == 0
    assert not (out / "compare.csv").exists()


def test_probabilities_give_curves(study):
    out = study / "out"
    assert run(study / "probabilities", study / "truth", "--probabilities", "--out", out) == 0
    curves = json.loads((out / "results.json").read_text())["curves"]["foreground"]
    assert {"precision_recall", "reliability", "isbi.free_response"} <= set(curves)
    # At 0.5 and above, one false lesion in three subjects, and two of three are found.
    free = curves["isbi.free_response"]
    place = free["thresholds"].index(0.5)
    assert free["false_lesions"][place] == pytest.approx(1 / 3)
    assert free["sensitivity"][place] == pytest.approx(2 / 3)


def test_several_labels_and_channels(tmp_path):
    truth = lesions((2, 2, 2)) + lesions((10, 10, 5), label=2)
    save(tmp_path / "t.nii.gz", truth)
    channels = np.stack([truth != 1, truth == 1, np.zeros_like(truth)], -1).astype(np.float32)
    save(tmp_path / "p.nii.gz", channels)
    out = tmp_path / "out"
    arguments = "--probabilities", "--labels", 1, 2, "--out", out
    assert run(tmp_path / "p.nii.gz", tmp_path / "t.nii.gz", *arguments) == 0
    rows = list(csv.DictReader((out / "subjects.csv").open()))
    assert [(row["label"], row["dice"]) for row in rows] == [("1", "1.0"), ("2", "0.0")]
    assert "Label 2" in (out / "report.html").read_text()


LEVELS = np.random.default_rng(0).integers(3, size=(9, 8, 10))
OF_PREDICT = ("--prediction-pattern", "{}_probabilities.nii.gz")


def scored(folder, *arguments):
    """Dice by label of predictions/ against truth/, by probabilities."""
    command = folder / "predictions", folder / "truth", "--probabilities", "--surface", "none"
    assert run(*command, "--out", folder / "scores", *arguments) == 0
    rows = csv.DictReader((folder / "scores/subjects.csv").open())
    return {row["label"]: float(row["dice"]) for row in rows}


def predicted(folder, values, *model):
    """What voxfuse predict writes of intensities 0, 1, 2, whose labels are these values."""
    save(folder / "scans/a.nii.gz", LEVELS.astype(np.float32))
    save(folder / "truth/a.nii.gz", np.array(values, np.uint8)[LEVELS])
    files = "--input", folder / "scans", "--output", folder / "predictions"
    assert cli.main(["predict", "--probabilities", *map(str, (*files, *model))]) == 0
    return folder / "predictions/a_probabilities.nii.gz"


def test_channels_of_a_run_are_its_labels(tmp_path, capsys):
    """Values with a gap; of files that do not say what their channels are, as well."""
    from tests.inference.networks import of_a_run
    from voxfuse.training import checkpoints

    network = {"name": "tests.inference.networks:of_a_run"}
    data = {"normalisation": "none", "mask": "all"}
    content = {
        "kind": "patches", "images": ["flair"], "step": 1, "network": of_a_run(1, 3).state_dict(),
        "labels": {"background": 0, "lesion": 1, "edema": 4},
        "config": {"network": network, "sampling": {"patch": [16, 16, 16]}, "data": data},
    }  # fmt: skip
    (tmp_path / "run").mkdir()
    checkpoints.save(tmp_path / "run/model.pt", content)
    path = predicted(tmp_path, (0, 1, 4), "--model", tmp_path / "run", "--trust-model")
    assert scored(tmp_path, *OF_PREDICT, "--labels", 1) == {"1": 1.0}
    assert scored(tmp_path, *OF_PREDICT, "--labels", 4, 1) == {"4": 1.0, "1": 1.0}

    def error(*arguments):
        command = tmp_path / "predictions", tmp_path / "truth", "--probabilities"
        assert run(*command, *arguments) == 1
        return capsys.readouterr().err

    both = "got channels of the labels 1 4, expected "
    assert both + "one of label 2\n" in error(*OF_PREDICT, "--labels", 2)
    assert both + "--labels\n" in error(*OF_PREDICT)
    assert "but --channels says 3: 0 1 4" in error(*OF_PREDICT, "--channels", 0, 1, 4)
    # The masks, which the folder's own names would take.
    masks = error("--labels", 1)
    assert "a.nii.gz: got whole numbers (uint8 without a scale), expected probabilities; " in masks
    assert "--prediction-pattern '{}_probabilities.nii.gz' takes those" in masks
    # Without a word in the header.
    channels = np.asanyarray(nibabel.load(path).dataobj)
    save(path, channels)
    for labels in ((), ("--labels", 1), ("--labels", 0, 1, 4)):
        assert "got 2 channels without a background" in error(*OF_PREDICT, *labels)
    assert scored(tmp_path, *OF_PREDICT, "--labels", 1, 4) == {"1": 1.0, "4": 1.0}
    assert scored(tmp_path, *OF_PREDICT, "--labels", 4, "--channels", 1, 4) == {"4": 1.0}
    save(path, np.concatenate([1 - channels.sum(-1, keepdims=True), channels], -1))
    for labels in ((), ("--labels", 1), ("--labels", 1, 2, 4)):
        assert "got 3 channels with a background" in error(*OF_PREDICT, *labels)
    expected = {"0": 1.0, "1": 1.0, "4": 1.0}
    assert scored(tmp_path, *OF_PREDICT, "--labels", 0, 1, 4) == expected
    assert scored(tmp_path, *OF_PREDICT, "--labels", 1, 4) == {"1": 1.0, "4": 1.0}


@pytest.mark.parametrize(
    ("network", "values", "more"),
    [("three_classes", (0, 1, 2), ()), ("two_regions", (0, 5, 2), ("--regions", 5, 2))],
)
def test_channels_of_a_network_are_its_labels_or_regions(network, values, more, tmp_path, capsys):
    model = f"{Path(__file__).resolve().parents[1] / 'inference/networks.py'}:{network}"
    predicted(tmp_path, values, "--model", model, "--patch", 16, *more)
    assert scored(tmp_path, *OF_PREDICT, "--labels", 2) == {"2": 1.0}
    first = scored(tmp_path, *OF_PREDICT, "--labels", values[1])[str(values[1])]
    # The region of 5 holds that of 2.
    assert first == (1.0 if not more else pytest.approx(
        2 * (LEVELS == 1).sum() / ((LEVELS == 1).sum() + (LEVELS > 0).sum())
    ))  # fmt: skip
    assert ("channels are regions: each is scored" in capsys.readouterr().err) == bool(more)


def test_scaled_whole_numbers_are_probabilities(study):
    for path in (study / "probabilities").iterdir():
        image = nibabel.Nifti1Image(np.rint(nibabel.load(path).get_fdata() * 255), AFFINE)
        image.set_data_dtype(np.uint8)
        image.header.set_slope_inter(1 / 255, 0)
        nibabel.save(image, path)
    assert run(study / "probabilities", study / "truth", "--probabilities") == 0


def test_folders_of_one_file_are_matched_by_name(study, capsys):
    """Two files are a pair whatever their names; what is found in folders is not."""
    save(study / "one/patient07.nii.gz", lesions((2, 2, 2)))
    save(study / "other/patient01.nii.gz", lesions((2, 2, 2)))
    assert run(study / "one", study / "other") == 1
    assert "no prediction for 1 of 1 subjects: patient01" in capsys.readouterr().err
    assert run(study / "one/patient07.nii.gz", study / "other") == 1
    assert run(study / "one/patient07.nii.gz", study / "other/patient01.nii.gz") == 0
    same = study / "other", study / "other", "--out", study / "out", "--images"
    assert run(*same, study / "one") == 1
    assert "--images: there is none for patient01" in capsys.readouterr().err
    pattern = study / "one/patient07.nii.gz", study / "other", "--prediction-pattern", "{}.nii.gz"
    assert run(*pattern) == 1
    assert "--prediction-pattern: is for folders, but" in capsys.readouterr().err


def test_a_label_that_no_truth_has_is_named(study, capsys):
    """Both masks are empty for it, so that its Dice is 1."""
    assert run(study / "ours", study / "truth", "--labels", 1, 7) == 0
    printed = capsys.readouterr()
    assert "no truth has a voxel of label 7" in printed.err
    assert "no truth has a voxel of label 7" in printed.out


def test_an_image_is_not_shown_for_another_subject(study, capsys):
    save(study / "images" / "p1.nii.gz", lesions((2, 2, 2)))
    arguments = "--images", study / "images", "--out", study / "out"
    assert run(study / "ours", study / "truth", *arguments) == 1
    assert "--images: there is none for p2" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [np.float32, np.int16])
def test_images_are_shown_beside_what_is_not_finite(dtype):
    from voxfuse.metrics import match_lesions
    from voxfuse.metrics.report.pictures import find_misses

    truth = lesions((2, 2, 2)) > 0
    none = np.zeros_like(truth)
    match = match_lesions(none, truth)
    image = np.random.default_rng(0).integers(1, 1000, truth.shape).astype(dtype)

    def picture():
        names = {"subject": "a", "label": "1", "image": image}
        return find_misses(none, truth, match, np.eye(4), **names)[0].picture.astype(int)

    expected = picture()
    if dtype == np.float32:
        image[19, :8], image[19, 8], image[19, 9] = np.inf, np.nan, -np.inf
        expected[-10:, 0] = np.array([0, 0, *[255] * 8])[:, None]  # x and y are turned around
    assert expected.max() > 200
    assert np.abs(picture() - expected).max() <= 10  # the percentiles are of fewer voxels


def test_label_2_of_wmh_counts_as_nothing(tmp_path, capsys):
    truth = lesions((2, 2, 2)) + lesions((10, 10, 5), label=2)
    save(tmp_path / "t.nii.gz", truth)
    save(tmp_path / "p.nii.gz", (truth > 0).astype(np.uint8))
    files = tmp_path / "p.nii.gz", tmp_path / "t.nii.gz"
    assert run(*files, "--rule", "wmh") == 0
    text = capsys.readouterr().out
    assert "| Lesion F1, wmh | 1.000 |" in text
    assert "label 2 in the truth count as nothing" in text


def test_minimum_volume_is_tuned_on_subjects_that_are_not_scored(study, capsys):
    crumbs = lesions((2, 2, 2), (10, 12, 5))
    crumbs[18, 20, 8] = crumbs[0, 20, 0] = 1
    save(study / "ours" / "p1.nii.gz", crumbs)
    assert run(study / "ours", study / "truth", "--tune-on", "p1") == 0
    text = capsys.readouterr().out
    assert "minimum volume 2 mm3" in text
    assert "2 subjects" in text


def test_every_method_is_tuned_on_its_own_predictions(study):
    """The truth itself as the other method: nothing of it is removed for our crumbs."""
    truth = lesions((5, 5, 5))
    truth[18, 20, 8] = 1
    save(study / "truth/p2.nii.gz", truth)
    crumbs = lesions((2, 2, 2), (10, 12, 5))
    crumbs[18, 20, 8] = crumbs[0, 20, 0] = 1
    save(study / "ours/p1.nii.gz", crumbs)
    out, other = study / "out", study / "truth"
    assert run(study / "ours", other, "--tune-on", "p1", "--compare", other, "--out", out) == 0
    found = json.loads((out / "results.json").read_text())
    rows = csv.DictReader((out / "compare.csv").open())
    differences = {row["subject"]: row["difference"] for row in rows if row["metric"] == "dice"}
    assert float(differences["p2"]) == pytest.approx(2 * 24 / (24 + 25) - 1)
    assert (found["options"]["minimum_volume"], found["comparison"]["minimum_volume"]) == (2, 0)
    assert "minimum volume of ours 2 mm3" in found["notes"][0]
    assert "minimum volume of truth 0 mm3" in found["notes"][1]
    assert "2 mm³ or less removed (of truth: 0 mm³)" in (out / "report.html").read_text()


def test_curves_say_whether_small_lesions_are_in_them(study):
    """The one of 2 mm3 is removed from free response; the others are of voxels."""
    p = 0.8 * lesions((2, 2, 2), (10, 12, 5)).astype(np.float32)
    p[18, 20, 8] = 0.8
    save(study / "probabilities/p1.nii.gz", p)
    out = study / "out"
    arguments = "--probabilities", "--minimum-volume", 2, "--out", out
    assert run(study / "probabilities", study / "truth", *arguments) == 0
    found = json.loads((out / "results.json").read_text())
    assert set(found["curves"]["foreground"]["isbi.free_response"]["false_lesions"]) == {0}
    assert "average precision and the curves of voxels over" in found["notes"][0]
    assert (out / "report.html").read_text().count("Small lesions are not removed here.") == 3


def test_masks_as_probabilities_are_named(study, capsys):
    save(study / "probabilities/p2.nii.gz", lesions((5, 5, 5)).astype(np.float32))
    assert run(study / "probabilities", study / "truth", "--probabilities") == 0
    printed = capsys.readouterr()
    for text in printed:
        assert "1 files hold 0 and 1 only" in text
        assert "probabilities/p2.nii.gz" in text


def with_bytes(path, place, content):
    """A file of which some bytes are others."""
    found = bytearray(nibabel.Nifti1Image(lesions((2, 2, 2)), AFFINE).to_bytes())
    found[place : place + len(content)] = content
    path.write_bytes(found)


def with_header(path, array, affine=AFFINE, unit=None, sizes=None):
    image = nibabel.Nifti1Image(array, affine)
    if sizes is not None:
        image.header["pixdim"][1:4] = sizes
        image.set_sform(affine, 1, update_affine=False)
    if unit:
        image.header.set_xyzt_units(unit)
    nibabel.save(image, path)


@pytest.mark.parametrize(("value", "shown"), [(0, "1 x 1 x 0"), (np.nan, "1 x 1 x nan")])
def test_voxels_without_a_size_are_an_error(tmp_path, capsys, value, shown):
    with_bytes(tmp_path / "a.nii", 320, np.float32(value).tobytes())  # of srow_z
    assert run(tmp_path / "a.nii", tmp_path / "a.nii") == 1
    error = capsys.readouterr().err
    assert f"a.nii: got an affine with voxels of {shown} mm, expected finite numbers and" in error


@pytest.mark.parametrize(("unit", "factor"), [("micron", 1000), ("meter", 0.001), ("mm", 1)])
def test_sizes_are_in_mm_whatever_the_unit(tmp_path, unit, factor):
    """And what is written like such a scan lies where it does."""
    from voxfuse.inference.reading import header_of
    from voxfuse.metrics.files import load_scan
    from voxfuse.training.volumes import placement_of, save_like

    affine = np.diag([*AFFINE.diagonal()[:3] * factor, 1])
    with_header(tmp_path / "a.nii", lesions((2, 2, 2)), affine, unit)
    scan = load_scan(tmp_path / "a.nii")
    np.testing.assert_allclose(scan.affine, AFFINE, rtol=1e-6)
    np.testing.assert_array_equal(header_of(tmp_path / "a.nii").affine, scan.affine)
    for codes in (1, 0):  # without them, the sizes of voxels alone are in the header
        image = nibabel.load(tmp_path / "a.nii")
        for form in ("sform_code", "qform_code"):
            image.header[form] = codes
        nibabel.save(nibabel.Nifti1Image(image.dataobj, None, image.header), tmp_path / "b.nii")
        scan = load_scan(tmp_path / "b.nii")
        save_like(scan.array, placement_of(scan, scan.path), tmp_path / "c.nii.gz")
        np.testing.assert_array_equal(load_scan(tmp_path / "c.nii.gz").affine, scan.affine)
        assert scan.spacing == pytest.approx((1, 1, 2))


def test_contradicting_sizes_are_noted(tmp_path, capsys):
    with_header(tmp_path / "p.nii", lesions((2, 2, 2)), sizes=(1, 1, 3))
    save(tmp_path / "t.nii.gz", lesions((2, 2, 2)))
    assert run(tmp_path / "p.nii", tmp_path / "t.nii.gz") == 0
    for text in capsys.readouterr():
        assert "p.nii: its affine has voxels of 1 x 1 x 2 mm, which are taken, but" in text
        assert "says 1 x 1 x 3 mm" in text


def test_hidden_files_are_no_subjects(study):
    from voxfuse.metrics.files import find_scans

    for name in ("._p1.nii.gz", ".old/p9.nii.gz"):
        save(study / "truth" / name, lesions())
    assert list(find_scans(study / "truth")) == ["p1", "p2", "p3"]
    assert list(find_scans(study / "truth", "{}.nii.gz")) == ["p1", "p2", "p3"]
    assert list(find_scans(study / "truth", ".old/{}.nii.gz")) == ["p9"]


def test_endings_in_capitals_are_read(study, capsys):
    for name, ending in (("p1", "NII.GZ"), ("p2", "nii.GZ")):
        (study / f"truth/{name}.nii.gz").rename(study / f"truth/{name}.{ending}")
    assert run(study / "ours", study / "truth") == 0
    assert "## foreground: 3 subjects" in capsys.readouterr().out


def test_names_are_one_however_accents_are_encoded(study):
    """Composed, and decomposed as macOS hands them out."""
    from voxfuse.metrics.files import find_scans

    one, other = (unicodedata.normalize(form, "é") for form in ("NFC", "NFD"))
    save(study / f"ours/{one}.nii.gz", lesions())
    save(study / f"truth/{other}.nii.gz", lesions())
    assert run(study / "ours", study / "truth", "--tune-on", "p1", other) == 0
    assert one in find_scans(study / "truth", "{}.nii.gz")
    save(study / f"truth/{other}/m.nii.gz", lesions())
    assert list(find_scans(study / "truth", f"{one}/{{}}.nii.gz")) == ["m"]


@pytest.mark.skipif(sys.platform == "darwin", reason="whose file systems have UTF-8 only")
def test_a_name_that_no_table_can_hold_is_an_error(study, capsys):
    latin = os.fsdecode(b"M\xfcller")
    save(study / latin / "p1.nii.gz", lesions())
    shutil.copy(study / "ours/p1.nii.gz", study / f"ours/{latin}.nii.gz")
    for place in ("ours", latin, f"ours/{latin}.nii.gz"):
        assert run(study / place, study / "truth", "--out", study / "out") == 1
        error = capsys.readouterr().err
        assert "M\\udcfcller" in error
        assert "expected one in UTF-8" in error
    assert not (study / "out").exists()


@pytest.mark.parametrize("pattern", [None, "{}/m.nii.gz"])
def test_links_are_followed(tmp_path, pattern):
    """Once, where they go in a circle; one to nothing is an error."""
    from voxfuse.metrics.files import find_scans

    for name in ("a", "b"):
        save(tmp_path / "store" / name / "m.nii.gz", lesions())
    folder = tmp_path / "truth"
    save(folder / "c/m.nii.gz", lesions())
    for name in ("a", "b"):
        (folder / name).symlink_to(tmp_path / "store" / name)
    (folder / "c/all").symlink_to(folder)
    named = [name if pattern else f"{name}/m" for name in ("a", "b", "c")]
    assert list(find_scans(folder, pattern)) == named
    (folder / "d").symlink_to(tmp_path / "store/d")
    with pytest.raises(FileNotFoundError, match=r"truth/d: is a link to .*/store/d, which is not"):
        find_scans(folder, pattern)


@pytest.mark.parametrize("pattern", [None, "{}/m.nii.gz"])
def test_of_files_that_git_annex_has_not_fetched_scans_are_errors(tmp_path, pattern):
    from voxfuse.metrics.files import find_scans

    save(tmp_path / "a/m.nii.gz", lesions())
    content = ".git/annex/objects/x/y"
    (tmp_path / "CHANGES").symlink_to(content)
    assert list(find_scans(tmp_path, pattern)) == ["a" if pattern else "a/m"]
    (tmp_path / "b").mkdir()
    (tmp_path / "b/m.nii.gz").symlink_to("../" + content)
    with pytest.raises(FileNotFoundError, match="m.nii.gz: is a link to"):
        find_scans(tmp_path, pattern)


def test_a_folder_that_may_not_be_read_is_told(tmp_path, monkeypatch):
    from voxfuse.metrics.files import find_scans

    save(tmp_path / "a/m.nii.gz", lesions())
    (tmp_path / "lost+found").mkdir()
    inside = Path.iterdir

    def refused(folder):
        if folder.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(folder))
        return inside(folder)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.warns(UserWarning, match=r"lost\+found: left out, as it may not be read"):
        assert list(find_scans(tmp_path)) == ["a/m"]


def test_resampling_takes_the_nearest_voxel(tmp_path, capsys):
    """The same mask, stored from the other end of two axes, and moved by a voxel."""
    truth = lesions((2, 2, 2), (10, 12, 5))
    save(tmp_path / "t.nii.gz", truth)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    affine[0, 3] = -19.0
    save(tmp_path / "p.nii.gz", truth[::-1], affine)
    files = tmp_path / "p.nii.gz", tmp_path / "t.nii.gz"
    assert run(*files) == 1
    assert "their affines differ by up to 19" in capsys.readouterr().err
    assert run(*files, "--resample") == 0
    assert "| Dice | 1.000 |" in capsys.readouterr().out


@pytest.mark.parametrize("turned", [False, True])
def test_resampling_by_half_a_voxel_takes_every_voxel_once(tmp_path, turned):
    """Rounding of the affine, as of a turned one, decides nothing."""
    from voxfuse.metrics.files import load_scan, on_grid_of

    affine = np.diag([0.7, 0.7, 3, 1])
    if turned:
        c, s = np.cos(0.3), np.sin(0.3)
        turn = np.array([[c, -s, 0, 9.1], [s, c, 0, -71.3], [0, 0, 1, 3.7], [0, 0, 0, 1]])
        affine = turn @ affine
    numbers = np.arange(1, 13, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 4), np.uint8)
    save(tmp_path / "p.nii", numbers, affine)
    moved = np.eye(4)
    moved[0, 3] = 0.5
    save(tmp_path / "t.nii", numbers, affine @ moved)
    scan, truth = load_scan(tmp_path / "p.nii"), load_scan(tmp_path / "t.nii")
    np.testing.assert_array_equal(on_grid_of(scan, truth, resample=True).array, numbers)


def test_patterns_find_a_subject_s_file(study, capsys):
    for name in ("p1", "p2", "p3"):
        (study / "truth" / name).mkdir()
        shutil.move(study / "truth" / f"{name}.nii.gz", study / "truth" / name / "m.nii.gz")
    assert run(study / "ours", study / "truth") == 1
    assert "no prediction for 3 of 3 subjects: p1/m, p2/m, p3/m" in capsys.readouterr().err
    assert run(study / "ours", study / "truth", "--truth-pattern", "{}/m.nii.gz") == 0


@pytest.mark.parametrize(
    ("break_it", "arguments", "message"),
    [
        (lambda f: (f / "ours/p2.nii.gz").unlink(), (), "no prediction for 1 of 3 subjects: p2"),
        (lambda f: shutil.rmtree(f / "ours"), (), "there is no such file or folder"),
        (
            lambda f: save(f / "ours/p1.nii.gz", np.zeros((20, 24, 9), np.uint8)),
            (),
            "has shape (20, 24, 9), the truth",
        ),
        (
            lambda f: save(f / "ours/p1.nii.gz", np.full((20, 24, 10), 0.4, np.float32)),
            (),
            "got 0.4 at voxel (0, 0, 0), expected whole numbers; --probabilities takes others",
        ),
        (
            lambda f: save(f / "ours/p1.nii.gz", np.full((20, 24, 10), 7.0, np.float32)),
            ("--probabilities",),
            "expected probabilities in [0, 1] without NaN",
        ),
        (lambda f: (f / "ours/p1.nii.gz").write_bytes(b"?"), (), "p1.nii.gz: cannot be read"),
        (
            lambda f: with_bytes((f / "ours/p1.nii.gz").rename(f / "ours/p1.nii"), 70, b"\xe7\3"),
            (),
            "p1.nii: cannot be read: data code 999 not recognized",
        ),
        (
            lambda f: save(f / "ours/p1.nii.gz", np.zeros((20, 24, 10), np.complex64)),
            (),
            "p1.nii.gz: got voxels of dtype complex64, expected real numbers",
        ),
        (
            lambda f: save(
                f / "ours/p1.nii.gz", np.zeros((20, 24, 10), [(c, np.uint8) for c in "RGB"])
            ),
            (),
            "p1.nii.gz: got voxels of dtype [('R', 'u1'), ",
        ),
        (lambda f: None, ("--probabilities", "--threshold", "50"), "--threshold: got 50"),
        (lambda f: None, ("--tune-on", "p9"), "--tune-on: got p9, expected some, not all, of p1"),
        (lambda f: None, ("--threshold", "0.2"), "--threshold: is for --probabilities"),
        (lambda f: None, ("--bins", "0"), "--bins: is for --probabilities"),
        (lambda f: None, ("--channels", "0", "1"), "--channels: is for --probabilities"),
        (lambda f: None, ("--images", "truth"), "--images: is for --out"),
        (lambda f: None, ("--image-pattern", "{}.nii"), "--image-pattern: is for --images"),
        (
            lambda f: None,
            ("--truth-pattern", "*/{}.nii"),
            "pattern: got '*/{}.nii', expected {}, and names of files as they are",
        ),
        (
            lambda f: None,
            ("--tune-on", "p1", "--minimum-volume", "0"),
            "--minimum-volume: got one beside --tune-on, which chooses it",
        ),
        (
            lambda f: None,
            ("--surface", "none", "--tolerance", "2"),
            "--tolerance: got one beside --surface none",
        ),
        (
            lambda f: None,
            ("--labels", "2", "1", "--ignore-label", "1"),
            "--ignore-label: got 1, which --labels asks to score",
        ),
        (lambda f: None, ("--labels", "1", "1"), "--labels: got 1 1, expected each once"),
        (
            lambda f: None,
            ("--probabilities",),
            "p1.nii.gz: got whole numbers (uint8 without a scale), expected probabilities\n",
        ),
    ],
)
def test_errors_say_what_is_wrong_and_where(study, capsys, break_it, arguments, message):
    break_it(study)
    assert run(study / "ours", study / "truth", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--size-edges", 50, 10), "--size-edges: got [50.0, 10.0], expected ascending volumes"),
        (("--size-edges", "nan"), "--size-edges: got [nan], expected ascending volumes"),
        (
            ("--out", "truth/p1.nii.gz/out"),
            "--out: nothing can be written to truth/p1.nii.gz/out: ",
        ),
    ],
)
def test_what_can_be_known_at_the_start_is_said_there(
    study, capsys, monkeypatch, arguments, message
):
    """Before anything is scored."""
    monkeypatch.chdir(study)
    monkeypatch.setattr("voxfuse.metrics.study.score_subject", None)
    assert run("ours", "truth", *arguments) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("side", ["ours", "theirs", "images", "truth"])
def test_a_file_that_does_not_fit_is_an_error_before_anything_is_scored(
    study, capsys, monkeypatch, side
):
    """The last one: what it needs is in its header."""
    shutil.copytree(study / "ours", study / "images")
    command = study / "ours", study / "truth", "--compare", study / "theirs", "--images"
    command += study / "images", "--out", study / "out"
    monkeypatch.setattr("voxfuse.metrics.study.score_subject", None)

    def error():
        assert run(*command) == 1
        assert not (study / "out").exists()
        return capsys.readouterr().err

    path = study / side / "p3.nii.gz"
    save(path, lesions(), np.diag([1, 1, 3, 1]))
    assert "p3.nii.gz lies elsewhere than the truth" in error()
    save(path, np.zeros((20, 24, 10, 2), np.float32))
    assert f"{side}/p3.nii.gz: got shape (20, 24, 10, 2), expected" in error()
    path.write_bytes(b"?")
    assert f"{side}/p3.nii.gz: cannot be read" in error()
    if side == "images":
        path.unlink()
        assert "--images: there is none for p3" in error()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.inf, "got inf at voxel (1, 2, 3), expected a label"),
        (np.nan, "got nan at voxel (1, 2, 3), expected a label"),
        (60000.3, "got 60000.3 at voxel (1, 2, 3), expected whole numbers"),
        (60000.0005, None),
    ],
)
@pytest.mark.parametrize("side", ["ours", "truth"])
def test_labels_are_finite_whole_numbers(study, capsys, side, value, expected):
    mask = lesions((2, 2, 2)).astype(np.float64)
    mask[1, 2, 3] = value
    save(study / side / "p1.nii.gz", mask)
    assert run(study / "ours", study / "truth") == int(expected is not None)
    error = capsys.readouterr().err
    assert "warning" not in error
    assert expected is None or f"{side}/p1.nii.gz: {expected}" in error


def test_predictions_without_a_truth_are_named(study, capsys):
    save(study / "ours" / "p4.nii.gz", lesions())
    assert run(study / "ours", study / "truth") == 0
    assert "1 predictions have no truth: p4" in capsys.readouterr().err


@pytest.fixture
def page(study):
    out = study / "out"
    arguments = study / "probabilities", study / "truth", "--probabilities"
    assert run(*arguments, "--compare", study / "probabilities", "--out", out) == 0
    return out / "report.html"


def test_the_page_needs_nothing_from_elsewhere(page):
    text = page.read_text()
    assert not re.search(r"https?:|//[a-z]|@import|<link|<iframe", text)
    sources = re.findall(r'(?:src|href|data)="([^"]*)"|url\(([^)]*)\)', text)
    assert sources
    assert all(first.startswith("data:image/png;base64,") for first, _ in sources)
    assert "default-src 'none'" in text


def test_the_page_of_empty_truths_has_no_best_threshold(study):
    for path in (study / "truth").iterdir():
        save(path, lesions())
    out = study / "out"
    assert run(study / "probabilities", study / "truth", "--probabilities", "--out", out) == 0
    text = (out / "report.html").read_text()
    assert "<figcaption>Undefined, as no truth has a voxel.</figcaption>" in text
    assert "is best" not in text
    assert "All voxels pooled: average precision \N{EN DASH}." in text


@pytest.mark.parametrize("bins", [0, 1000])
def test_the_page_of_ignored_voxels_has_no_curves(study, bins):
    for path in (study / "truth").iterdir():
        save(path, np.full((20, 24, 10), 9, np.uint8))
    command = study / "probabilities", study / "truth", "--probabilities", "--ignore-label", 9
    assert run(*command, "--bins", bins, "--out", study / "out") == 0
    assert "Every voxel is ignored, so" in (study / "out/report.html").read_text()


def test_the_page_escapes_what_it_is_given(tmp_path):
    name = "<b>x & y"
    save(tmp_path / "p" / f"{name}.nii.gz", lesions((1, 1, 1)))
    save(tmp_path / "t" / f"{name}.nii.gz", lesions((10, 10, 5)))
    assert run(tmp_path / "p", tmp_path / "t", "--out", tmp_path / "out") == 0
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<b>x" not in text
    assert "&lt;b&gt;x &amp; y" in text


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome on the path")
def test_the_page_in_a_browser(page, tmp_path):
    """It shows its three colours, its curves, and no error in the console."""
    Image = pytest.importorskip("PIL.Image", reason="reads the screenshot")
    shot = tmp_path / "page.png"
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        "--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}",
        "--window-size=1300,6000", f"--screenshot={shot}", page.as_uri(),
    ]  # fmt: skip
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shot.exists(), ended.stderr
    assert "CONSOLE" not in ended.stderr, ended.stderr
    pixels = np.asarray(Image.open(shot).convert("RGB")).reshape(-1, 3)
    shown = set(map(tuple, np.unique(pixels, axis=0).tolist()))
    from voxfuse.metrics.report.pictures import COLOURS

    assert {*COLOURS.values(), (0, 114, 178), (213, 94, 0)} <= shown
