"""DICOM series in, on their own geometry; DICOM-SEG out."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from tests.inference.test_ours import save_run
from tests.inference.test_studies import intensities, predict, read, write

pydicom = pytest.importorskip("pydicom", reason="needs the extra dicom: pydicom")

from voxfuse.inference.dicom import load_series, read_series  # noqa: E402

#: Unit vectors along a row and along a column, in LPS: oblique, and not axial.
ALONG_ROW = np.array([0.0, 0.8, -0.6])
ALONG_COLUMN = np.array([0.6, -0.48, -0.64])
NORMAL = np.cross(ALONG_ROW, ALONG_COLUMN)
ORIGIN = np.array([-31.5, 12.25, 103.0])
ROWS_MM, COLUMNS_MM, SLICES_MM = 0.75, 0.5, 2.5  # between rows, between columns
PATCH = ["--patch", 16]


def write_series(folder, array, change=None, slope=lambda k: 1.0):
    """Stored values (column, row, slice) as a file a slice, in no order of names."""
    folder.mkdir(parents=True)
    series, study, frame = (pydicom.uid.generate_uid() for _ in range(3))
    names = np.random.default_rng(5).permutation(array.shape[2])
    for k in range(array.shape[2]):
        one = pydicom.Dataset()
        one.file_meta = pydicom.dataset.FileMetaDataset()
        one.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        one.SOPClassUID = pydicom.uid.MRImageStorage
        one.SOPInstanceUID = pydicom.uid.generate_uid()
        one.SeriesInstanceUID, one.StudyInstanceUID, one.FrameOfReferenceUID = series, study, frame
        one.PatientName, one.PatientID, one.Modality = "Doe^Jane", "42", "MR"
        for empty in ("PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
                      "AccessionNumber", "ReferringPhysicianName"):  # fmt: skip
            setattr(one, empty, "")
        one.SeriesNumber = one.InstanceNumber = k + 1
        one.Columns, one.Rows = array.shape[:2]
        one.PixelSpacing = [ROWS_MM, COLUMNS_MM]
        one.ImageOrientationPatient = [*ALONG_ROW, *ALONG_COLUMN]
        one.ImagePositionPatient = [*(ORIGIN + k * SLICES_MM * NORMAL)]
        one.SamplesPerPixel, one.PhotometricInterpretation = 1, "MONOCHROME2"
        one.BitsAllocated = one.BitsStored = 16
        one.HighBit, one.PixelRepresentation = 15, 0
        one.RescaleSlope, one.RescaleIntercept = slope(k), -1
        stored = ((array[:, :, k] + 1) / slope(k)).astype(np.uint16)
        one.PixelData = stored.T.tobytes()
        if change is not None and change(k, one) == "leave out":
            continue
        one.save_as(folder / f"IM{names[k]:03d}", enforce_file_format=True)
    return folder


def test_a_series_lies_where_its_slices_do(tmp_path):
    array = intensities((20, 17, 6), levels=50) * 4
    scan = read_series(write_series(tmp_path / "s", array, slope=lambda k: [1.0, 0.5, 2.0][k % 3]))
    assert np.abs(scan.array - array).max() <= 1  # stored values are integers
    assert np.array_equal(scan.array[:, :, ::3], array[:, :, ::3])
    for column, row, k in [(0, 0, 0), (19, 0, 0), (0, 16, 5), (7, 3, 2)]:
        place = ORIGIN + k * SLICES_MM * NORMAL
        place = place + column * COLUMNS_MM * ALONG_ROW + row * ROWS_MM * ALONG_COLUMN
        expected = place * [-1, -1, 1]  # LPS to RAS
        np.testing.assert_allclose((scan.affine @ [column, row, k, 1])[:3], expected, atol=1e-9)
    np.testing.assert_allclose(scan.spacing, (COLUMNS_MM, ROWS_MM, SLICES_MM))


def moved(by):
    def change(k, one):
        if k == 3:
            one.ImagePositionPatient = [*(np.asarray(one.ImagePositionPatient, float) + by)]

    return change


def set_to(name, value, every=False):
    def change(k, one):
        if every or k == 3:
            setattr(one, name, value)

    return change


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        (lambda k, one: "leave out" if k == 3 else None, "a slice is missing between .* 5.000 mm"),
        (moved(-SLICES_MM * NORMAL), "two slices lie in one place"),
        (moved(0.4 * NORMAL), "slices lie 2.100 to 2.900 mm apart"),
        (moved(0.4 * ALONG_ROW), "slices are shifted by up to 0.4 mm across their normal"),
        (set_to("PixelSpacing", [1.0, 1.0]), "PixelSpacing differs between the slices"),
        (set_to("ImageOrientationPatient", [1, 0, 0, 0, 1, 0]), "ImageOrientationPatient differs"),
        (set_to("SeriesInstanceUID", "1.2.3"), "has slices of 2 series, expected one a folder"),
        (set_to("PhotometricInterpretation", "MONOCHROME1", True), "MONOCHROME1, expected grey"),
        (lambda k, one: one.pop("PixelSpacing") and None, "IM.*: has no PixelSpacing"),
        (set_to("PixelSpacing", None), "IM.*: has no PixelSpacing"),
        (set_to("RescaleSlope", None), "IM.*: has an empty RescaleSlope"),
        (lambda k, one: one.pop("ImagePositionPatient") and None, "has no slices with a position"),
        (
            lambda k, one: k == 7 and one.pop("ImagePositionPatient") and None,
            "IM.*: has no ImagePositionPatient, which other slices have",
        ),
    ],
)
def test_a_series_that_is_no_regular_grid_is_refused(tmp_path, change, pattern):
    folder = write_series(tmp_path / "s", intensities((8, 7, 8)), change)
    with pytest.raises(ValueError, match=pattern):
        load_series(folder)


@pytest.mark.parametrize(
    ("name", "spoil", "pattern"),
    [
        ("IM007", lambda whole: b"", "is empty"),
        ("IM007", lambda whole: whole[:100], "is cut off"),
        ("IM007", lambda whole: bytes(len(whole)), "is damaged"),
        ("IM007", lambda whole: whole[132:], "lacks the preamble"),
        ("IM007", lambda whole: whole[:128] + whole[132:], "is damaged"),
        ("IM007.dcm", lambda whole: b"x" * len(whole), "is damaged"),
        ("IM007.IMA", lambda whole: b"x" * len(whole), "is damaged"),
        ("IM007", lambda whole: whole[:150], "has no Rows and is cut off"),  # nothing is left
        ("IM007", lambda whole: whole[:500], "has no Rows and is cut off"),
        ("IM007", None, "is a link to a file that is not there"),
    ],
)
def test_a_slice_that_is_damaged_is_not_left_out(tmp_path, name, spoil, pattern):
    """The last one or the first: no neighbour on its other side tells that it is missing."""
    folder = write_series(tmp_path / "s", intensities((8, 7, 8)))
    last = next(p for p in folder.iterdir() if pydicom.dcmread(p).InstanceNumber == 8)
    whole = last.read_bytes()
    if name.startswith("IM007."):
        last.unlink()
        last = folder / name
    if spoil is None:
        last.unlink()
        last.symlink_to(tmp_path / "nowhere")
    else:
        last.write_bytes(spoil(whole))
    with pytest.raises(ValueError, match=rf"{last.name}: .*({pattern})"):
        load_series(folder, pixels=False)


def test_a_folder_of_damaged_slices_alone_is_a_study_that_fails(tmp_path, capsys):
    write_series(tmp_path / "in/a", intensities((8, 7, 8)))
    (tmp_path / "in/b").mkdir()
    (tmp_path / "in/b/1.dcm").touch()
    (tmp_path / "in/c").mkdir()
    (tmp_path / "in/c/1.dcm").symlink_to("nowhere")
    assert predict("above_half", tmp_path / "in", tmp_path / "out", *PATCH) == 3
    failed = capsys.readouterr().err
    assert re.search(r"b: .*1.dcm: is empty", failed), failed
    assert re.search(r"c: .*1.dcm: is a link to a file that is not there", failed), failed


def test_no_cut_takes_a_slice_away_without_a_word(tmp_path):
    folder = write_series(tmp_path / "s", intensities((8, 7, 3)))
    last = next(p for p in folder.iterdir() if pydicom.dcmread(p).InstanceNumber == 3)
    whole = last.read_bytes()
    for length in range(0, len(whole), 7):
        last.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=re.escape(str(folder))):
            read_series(folder)


def test_what_is_no_slice_may_lie_beside_slices(tmp_path):
    folder = write_series(tmp_path / "s", intensities((8, 7, 8)))
    for name in ("notes.txt", "a.JSON", ".DS_Store", "._IM007", "DICOMDIR", "VERSION", "b.nii.gz"):
        (folder / name).write_bytes(b"short")
    for name in ("DONE", "Icon\r", "x.bak"):
        (folder / name).touch()
    (folder / "seg.raw").write_bytes(bytes(1000))
    (folder / "CHANGES").symlink_to("nowhere")
    (folder / "log").write_bytes(b"a longer text that no program takes for DICOM, " * 4)
    (folder / "inside").mkdir()
    report = pydicom.Dataset()  # of another series, without an image
    report.file_meta = pydicom.dataset.FileMetaDataset()
    report.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    report.SOPClassUID = pydicom.uid.BasicTextSRStorage
    report.SOPInstanceUID = report.SeriesInstanceUID = pydicom.uid.generate_uid()
    report.save_as(folder / "SR001", enforce_file_format=True)
    assert load_series(folder).shape == (8, 7, 8)


def test_from_a_series_to_nifti_and_to_dicom_seg(tmp_path):
    highdicom = pytest.importorskip("highdicom", reason="needs the extra dicom: highdicom")
    truth = intensities((20, 17, 14), levels=3)
    folder = write_series(tmp_path / "in/jane", truth)
    write_series(tmp_path / "in/nothing", truth * 0)
    write_series(tmp_path / "in/second", (truth == 2) * 2.0)
    for name in ("mask.nii.gz", "mask.dcm"):
        assert predict("three_classes", folder, tmp_path / name, *PATCH) == 0
    assert np.array_equal(read(tmp_path / "mask.nii.gz"), truth)

    found = highdicom.seg.segread(tmp_path / "mask.dcm")
    assert [d.SegmentLabel for d in found.SegmentSequence] == ["label 1", "label 2"]
    slices = load_series(folder).slices
    frames = found.get_pixels_by_source_instance(
        [one.SOPInstanceUID for one in slices], combine_segments=True
    )
    assert np.array_equal(frames.transpose(2, 1, 0), truth)
    assert str(found.PatientID) == "42"  # it is the patient's, as the series

    out = tmp_path / "out"
    write_series(tmp_path / "in/broken", truth, lambda k, one: one.pop("PixelSpacing") and None)
    assert predict("three_classes", tmp_path / "in", out, *PATCH, "--format", "dicom") == 3
    written = sorted(path.name for path in out.glob("*.dcm"))
    assert written == ["jane.dcm", "nothing.dcm", "second.dcm"]  # a broken series stops no other
    failed = json.loads((out / "status/broken.json").read_text())
    assert failed["error"].endswith(": a slice of image 0: has no PixelSpacing")
    assert not highdicom.seg.segread(out / "nothing.dcm").pixel_array.any()
    second = highdicom.seg.segread(out / "second.dcm")  # a segment has the number of its class
    assert [d.SegmentLabel for d in second.SegmentSequence] == ["label 1", "label 2"]
    assert second.get_pixels_by_source_instance(
        [one.SOPInstanceUID for one in load_series(tmp_path / "in/second").slices],
        segment_numbers=[2],
    ).any()
    status = (out / "status/jane.json").read_text()
    assert "jane" not in status.lower()
    assert json.loads(status)["voxels"].keys() == {"0", "1", "2"}


def test_what_dicom_is_not_written_for(tmp_path, capsys):
    folder = write_series(tmp_path / "s", intensities((8, 7, 8)))

    plain = write(tmp_path / "scan.nii.gz", intensities())
    for given, output, options, expected in (
        (plain, "x.dcm", [], "DICOM-SEG is of DICOM series, but .*scan.nii.gz is none"),
        (folder, "x.dcm", ["--probabilities"], "--probabilities: is not written as DICOM-SEG"),
        (folder, "s/mask.nii.gz", [], "is an image, mask or label of a subject"),
    ):
        assert predict("above_half", given, tmp_path / output, *PATCH, *options) == 1
        error = capsys.readouterr().err
        assert re.search(expected, error), error


def test_a_run_predicts_a_folder_of_series(tmp_path):
    for name in ("first", "second"):
        write_series(tmp_path / "in" / name, intensities((20, 17, 8), levels=3))
    contents = pydicom.dataset.FileMetaDataset()  # of a medium: it is no slice
    contents.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    contents.MediaStorageSOPClassUID = pydicom.uid.MediaStorageDirectoryStorage
    contents.MediaStorageSOPInstanceUID = pydicom.uid.generate_uid()
    table = pydicom.Dataset()
    table.file_meta = contents
    table.save_as(tmp_path / "in/DICOMDIR", enforce_file_format=True)
    save_run(tmp_path)
    out = tmp_path / "out"
    assert predict(tmp_path / "model.pt", tmp_path / "in", out) == 0
    assert sorted(path.name for path in out.glob("*.gz")) == ["first.nii.gz", "second.nii.gz"]


def test_folders_named_by_uids_keep_their_whole_names(tmp_path, monkeypatch):
    names = ["1.3.12.2.1107.5.1", "1.3.12.2.1107.5.2"]
    for name in names:
        write_series(tmp_path / "in" / name, intensities((16, 16, 3)))
    written = [f"{name}.nii.gz" for name in names]
    assert predict("above_half", tmp_path / "in", tmp_path / "both", *PATCH) == 0
    assert sorted(path.name for path in (tmp_path / "both").glob("*.gz")) == written
    for name in names:  # each from within
        monkeypatch.chdir(tmp_path / "in" / name)
        assert predict("above_half", ".", tmp_path / "out", *PATCH) == 0
    (tmp_path / "in" / names[1] / ".DS_Store").touch()  # makes it no other series
    assert predict("above_half", ".", tmp_path / "out", *PATCH) == 0
    assert sorted(path.name for path in (tmp_path / "out").glob("*.gz")) == written
