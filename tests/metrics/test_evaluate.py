"""``voxfuse evaluate``: files matched, grids compared, tables and page written."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess

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
    channels = np.stack([truth == 0, truth == 1, np.zeros_like(truth)], -1).astype(np.float32)
    save(tmp_path / "p.nii.gz", channels)
    out = tmp_path / "out"
    arguments = "--probabilities", "--labels", 1, 2, "--out", out
    assert run(tmp_path / "p.nii.gz", tmp_path / "t.nii.gz", *arguments) == 0
    rows = list(csv.DictReader((out / "subjects.csv").open()))
    assert [(row["label"], row["dice"]) for row in rows] == [("1", "1.0"), ("2", "0.0")]
    assert "Label 2" in (out / "report.html").read_text()


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
            "numbers that are no labels; --probabilities takes those",
        ),
        (
            lambda f: save(f / "ours/p1.nii.gz", np.full((20, 24, 10), 7.0, np.float32)),
            ("--probabilities",),
            "expected probabilities in [0, 1] without NaN",
        ),
        (lambda f: (f / "ours/p1.nii.gz").write_bytes(b"?"), (), "p1.nii.gz: cannot be read"),
        (lambda f: None, ("--threshold", "50"), "--threshold: got 50"),
        (lambda f: None, ("--tune-on", "p9"), "--tune-on: got p9, expected some, not all, of p1"),
    ],
)
def test_errors_say_what_is_wrong_and_where(study, capsys, break_it, arguments, message):
    break_it(study)
    assert run(study / "ours", study / "truth", *arguments) == 1
    assert message in capsys.readouterr().err


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
