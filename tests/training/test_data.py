"""Data: what is found, what is refused and how it is said, grids that are undone, who is where."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from tests.training.phantom import SECTIONS, write_heads
from voxfuse import cli
from voxfuse.training.config import DataOptions, SamplingOptions, parse
from voxfuse.training.dataset import (
    DataError,
    Dataset,
    Subject,
    check_order,
    find_dataset,
    find_inputs,
)
from voxfuse.training.initial import initial_config
from voxfuse.training.predict import decided, load_model
from voxfuse.training.sampling import Sampler
from voxfuse.training.split import split_dataset
from voxfuse.training.trainer import Trainer
from voxfuse.training.volumes import check_subjects, load_volume, on_own_grid, save_like

LABELS = {"background": 0, "lesion": 1}


def options(**given):
    return DataOptions(**{**SECTIONS["data"], "test": [], **given})


def volume(folder, name="a", **given):
    data = options(**given)
    dataset = find_dataset(folder, data)
    return load_volume(dataset.subjects[name], data, dataset.labels)


def rewrite(path, change, affine=None):
    image = nibabel.load(path)
    array = change(np.asarray(image.dataobj).copy())
    nibabel.save(nibabel.Nifti1Image(array, image.affine if affine is None else affine), path)


# --- Intensities and grids ------------------------------------------------------------------------


def test_intensities_are_normalised_inside_the_mask(heads):
    flair = nibabel.load(heads / "a/flair.nii.gz").get_fdata()
    for kind, low, high in (
        ("zscore", None, None),
        ("robust", None, None),
        ("range", 0, 1),
        ("none", None, None),
    ):
        found = volume(heads, normalisation=kind)
        inside = found.image[0][found.mask]
        assert not found.image[:, ~found.mask].any()
        np.testing.assert_array_equal(found.mask, flair > 0)
        if kind == "zscore":
            assert abs(inside.mean()) < 1e-5
            assert abs(inside.std() - 1) < 1e-5
        elif kind == "robust":
            assert abs(np.median(inside)) < 1e-5
            assert abs(np.median(np.abs(inside)) - 1 / 1.4826) < 1e-5
        elif kind == "range":
            assert (inside.min(), inside.max()) == (low, high)
        else:
            np.testing.assert_allclose(inside, flair[flair > 0], rtol=1e-6)
    clipped = volume(heads, normalisation="none", clip=[1, 99])
    edges = np.percentile(flair[flair > 0], [1, 99])
    np.testing.assert_allclose(
        clipped.image[0][clipped.mask], np.clip(flair[flair > 0], *edges), rtol=1e-6
    )


ROTATED = np.array([[0, 0, 1.5, 3], [-1, 0, 0, 5], [0, -1.25, 0, 7], [0, 0, 0, 1.0]])


def test_orientation_and_resampling_are_undone(tmp_path):
    """A smooth field of the scan, seen by the network at another orientation and spacing."""
    write_heads(tmp_path, ["a"], shape=(24, 20, 28), affine=ROTATED)
    for file in ("flair", "t1"):
        smooth = ndimage.gaussian_filter(np.random.default_rng(1).standard_normal((24, 20, 28)), 3)
        field = (100 + 100 * smooth / np.abs(smooth).max()).astype(np.float32)
        rewrite(tmp_path / f"a/{file}.nii.gz", lambda _, field=field: field)
    turned = volume(tmp_path, mask="all", normalisation="none")
    codes = nibabel.aff2axcodes(ROTATED)
    assert codes == ("P", "I", "R")
    own = nibabel.load(tmp_path / "a/flair.nii.gz").get_fdata(dtype=np.float32)
    expected = nibabel.as_closest_canonical(nibabel.load(tmp_path / "a/flair.nii.gz")).get_fdata()
    np.testing.assert_allclose(turned.image[0], expected, rtol=1e-6)
    np.testing.assert_array_equal(on_own_grid(turned.image[:1], turned.placement)[0], own)
    found = volume(tmp_path, mask="all", normalisation="none", spacing=[0.75, 1.0, 0.625])
    assert found.image.shape[1:] == (56, 24, 40)  # axes R, A, S of 1.5, 1 and 1.25 mm
    assert found.label.shape == found.mask.shape == (56, 24, 40)
    back = on_own_grid(found.image[:1], found.placement)[0]
    assert back.shape == own.shape
    assert np.abs(back - own)[2:-2, 2:-2, 2:-2].max() < 3  # of 200: linear interpolation twice
    assert volume(tmp_path, mask="all", orientation="").image.shape[1:] == (24, 20, 28)


def test_resampled_labels_are_the_greatest_interpolated_class(tmp_path):
    write_heads(tmp_path, ["a"], shape=(24, 20, 28))
    box = np.zeros((24, 20, 28), np.uint8)
    box[4:12, 4:12, 4:12], box[12:16, 4:12, 4:12] = 1, 3
    rewrite(tmp_path / "a/lesions.nii.gz", lambda _: box)
    found = volume(
        tmp_path, mask="all", spacing=[0.5, 0.5, 0.5], labels={"background": 0, "x": 1, "y": 3}
    )
    assert set(np.unique(found.label)) == {0, 1, 2}  # classes, not values
    for c, value in ((1, 1), (2, 3)):
        assert abs((found.label == c).sum() / 8 / (box == value).sum() - 1) < 0.05


def test_a_prediction_lies_where_the_scan_does(tmp_path):
    write_heads(tmp_path, ["a"], shape=(24, 20, 28), affine=ROTATED)
    source = nibabel.load(tmp_path / "a/flair.nii.gz")
    source.set_qform(ROTATED, 1)
    source.set_sform(ROTATED, 4)
    nibabel.save(source, tmp_path / "a/flair.nii.gz")
    placement = volume(tmp_path).placement
    save_like(np.ones((24, 20, 28), np.uint8), placement, tmp_path / "out/a.nii.gz")
    written = nibabel.load(tmp_path / "out/a.nii.gz")
    np.testing.assert_array_equal(written.affine, source.affine)
    assert (int(written.header["qform_code"]), int(written.header["sform_code"])) == (1, 4)
    assert written.get_data_dtype() == np.uint8


# --- What is refused ------------------------------------------------------------------------------


def spoil(folder, what):
    """Spoil subject a; the error's pattern."""
    flair, t1, lesions = (folder / f"a/{x}.nii.gz" for x in ("flair", "t1", "lesions"))
    if what == "missing":
        t1.unlink()
        return r"^a: .*a/t1.nii.gz is missing"
    if what == "no label":
        lesions.unlink()
        return r"^a: has no label file beside .*flair.nii.gz"
    if what == "broken":
        t1.write_bytes(t1.read_bytes()[:500])
        return r"^a: .*t1.nii.gz: cannot be read"
    if what == "shape":
        rewrite(t1, lambda x: x[1:])
        return r"^a: .*t1.nii.gz has shape \(23, 20, 28\), but .*flair.nii.gz has \(24, 20, 28\)"
    if what == "affine":
        rewrite(lesions, lambda x: x, np.diag([1, 1, 1.1, 1]))
        return r"^a: .*lesions.nii.gz lies elsewhere than .*flair.nii.gz: .* differ by up to 0.1 mm"
    if what == "nan":

        def poke(x):
            x[12, 10, 14] = np.nan
            return x

        rewrite(t1, poke)
        return r"^a: .*t1.nii.gz is nan at \(12, 10, 14\), expected finite numbers"
    if what == "label":
        rewrite(lesions, lambda x: x * 2)
        return r"^a: .*lesions.nii.gz has the value 2, expected background = 0, lesion = 1"
    if what == "mask":
        rewrite(flair, lambda x: -x)
        return r"^a: .*flair.nii.gz has no voxel above 0 for the mask"
    assert what == "constant"
    rewrite(t1, lambda x: np.full_like(x, 7))
    return r"^a: .*t1.nii.gz is 7 everywhere inside the mask"


WRONG = ["missing", "no label", "broken", "shape", "affine", "nan", "label", "mask", "constant"]


@pytest.mark.parametrize("what", WRONG)
def test_files_that_do_not_fit_are_named_with_what_was_found(tmp_path, what):
    write_heads(tmp_path, ["a"], shape=(24, 20, 28))
    pattern = spoil(tmp_path, what)
    with pytest.raises(DataError, match=pattern):
        volume(tmp_path)


def test_every_subject_is_named_at_once_and_an_empty_label_is_allowed(tmp_path):
    write_heads(tmp_path, ["a", "b", "c", "d"], shape=(24, 20, 28))
    spoil(tmp_path, "missing")
    rewrite(tmp_path / "b/lesions.nii.gz", lambda x: x * 0)
    rewrite(tmp_path / "c/lesions.nii.gz", lambda x: x * 5)
    data = options()
    dataset = find_dataset(tmp_path, data)
    with pytest.raises(DataError) as caught:
        check_subjects(dataset.subjects.values(), data, dataset.labels, [])
    assert [line[:2] for line in str(caught.value).splitlines()] == ["a:", "c:"]
    kept = check_subjects([dataset.subjects["b"]], data, dataset.labels, ["b"])
    assert not kept["b"].label.any()
    write_heads(tmp_path / "more", ["a", "b", "c"], shape=(24, 20, 28))
    rewrite(tmp_path / "more/c/t1.nii.gz", lambda x: np.stack([x, x], -1))
    sections = {**SECTIONS, "data": {**SECTIONS["data"], "images": ["t1"]}}
    with pytest.raises(DataError, match="^c: .*t1.nii.gz has 2 channels, expected 1: t1$"):
        Trainer(parse(sections), tmp_path / "more", tmp_path / "run")  # c is tested


# --- Layouts --------------------------------------------------------------------------------------


def as_layout(heads, folder, kind):
    """The phantoms as nnU-Net or the Decathlon would have them."""
    names = ["a", "b", "c"]
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    for name in names:
        images = [nibabel.load(heads / f"{name}/{x}.nii.gz") for x in ("flair", "t1")]
        if kind == "decathlon":
            both = np.stack([np.asarray(x.dataobj) for x in images], -1)
            nibabel.save(
                nibabel.Nifti1Image(both, images[0].affine), folder / f"imagesTr/{name}.nii.gz"
            )
        else:
            for k, image in enumerate(images):
                nibabel.save(image, folder / f"imagesTr/{name}_{k:04d}.nii.gz")
        nibabel.save(
            nibabel.load(heads / f"{name}/lesions.nii.gz"), folder / f"labelsTr/{name}.nii.gz"
        )
    channels = {"0": "FLAIR", "1": "T1"}
    if kind == "nnunet":
        content = {"channel_names": channels, "labels": LABELS, "file_ending": ".nii.gz"}
    else:
        items = [
            {"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names
        ]
        items[1]["patient"] = items[2]["patient"] = "p"
        content = {
            "modality": channels, "labels": {"0": "background", "1": "lesion"},
            "training": items, "test": ["./imagesTs/z.nii.gz"],
        }  # fmt: skip
    (folder / "dataset.json").write_text(json.dumps(content))


@pytest.mark.parametrize("kind", ["nnunet", "decathlon"])
def test_a_dataset_json_says_the_same_as_folders(heads, tmp_path, kind):
    as_layout(heads, tmp_path / "set", kind)
    dataset = find_dataset(tmp_path / "set", DataOptions())
    assert (dataset.images, dataset.labels) == (("FLAIR", "T1"), LABELS)
    assert list(dataset.subjects) == ["a", "b", "c"]
    if kind == "decathlon":
        assert dataset.subjects["b"].group == dataset.subjects["c"].group == "p"
    found = load_volume(dataset.subjects["b"], DataOptions(), dataset.labels)
    expected = volume(heads, "b")
    np.testing.assert_array_equal(found.image, expected.image)
    np.testing.assert_array_equal(found.label, expected.label)
    if kind == "nnunet":
        chosen = find_dataset(tmp_path / "set", DataOptions(images=["T1"])).subjects["a"]
        assert [path.name for path in chosen.images] == ["a_0001.nii.gz"]
        with pytest.raises(ValueError, match="has no channel 'FLIAR'; did you mean FLAIR"):
            find_dataset(tmp_path / "set", DataOptions(images=["FLIAR"]))


def test_channels_of_one_name_are_known_by_place(heads, tmp_path):
    """nnU-Net's names of channels say how they are normalised."""
    folder = tmp_path / "set"
    as_layout(heads, folder, "nnunet")
    content = json.loads((folder / "dataset.json").read_text())
    content["channel_names"] = {"0": "MRI", "1": "MRI"}
    (folder / "dataset.json").write_text(json.dumps(content))
    files = [folder / "imagesTr/a_0000.nii.gz", folder / "imagesTr/a_0001.nii.gz"]
    first = initial_config(folder).data
    assert first.images == ["MRI", "MRI"]
    for data in (DataOptions(), first):
        dataset = find_dataset(folder, data)
        assert (dataset.channels, dataset.unused_channels) == ((0, 1), ())
        assert dataset.subjects["a"].images == tuple(files)
        for paths in ([folder / "imagesTr"], files):
            given = find_inputs(paths, dataset.images, data, dataset.channels, ())
            assert given[0].images == tuple(files)
    (folder / "imagesTr/MRI.nii.gz").touch()
    given = find_inputs([folder / "imagesTr"], ("MRI", "MRI"), DataOptions(), (0, 1), ())
    assert [len(set(subject.images)) for subject in given] == [2, 2, 2, 1]  # one of both channels
    content["channel_names"]["2"] = "T1"
    (folder / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="data.images: got 'MRI', which .* calls 2 channels, exp"):
        find_dataset(folder, DataOptions(images=["T1", "MRI"]))
    assert find_dataset(folder, DataOptions(images=["T1"])).channels == (2,)


def test_what_a_first_configuration_finds(tmp_path, capsys):
    """Names that hold the folder's, a scan with air below 0 in other axes than RAS."""
    rolled = np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    places = [tmp_path / "set" / f"BraTS_{k:03d}" for k in range(3)]
    write_heads(tmp_path / "set", [p.name for p in places], shape=(32, 16, 24), affine=rolled)
    for place in places:
        rewrite(place / "flair.nii.gz", lambda x: x - 50)
        for path in list(place.iterdir()):
            path.rename(place / f"{place.name}_{path.name}")
    command = ["train", "--init", str(tmp_path / "set"), str(tmp_path / "it.toml")]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.startswith(
        "3 subjects (0 without a label), images flair, t1, label lesions (background = 0, "
        "lesion = 1), mask all, 3 patients\n"
    )
    config = initial_config(tmp_path / "set")
    assert config.sampling.patch == [24, 32, 16]  # the file's (32, 16, 24) turned to RAS
    found = find_dataset(tmp_path / "set", config.data).subjects["BraTS_001"]
    names = [path.name for path in (*found.images, found.label)]
    assert names == [f"BraTS_001_{name}.nii.gz" for name in ("flair", "t1", "lesions")]
    for k, place in enumerate(places):
        for path in list(place.iterdir()):
            path.rename(place / path.name.replace("BraTS", f"P{k}"))
    with pytest.raises(DataError, match="--init: P._00._lesions, .* is in 1 of 3 folders"):
        initial_config(tmp_path / "set")


def test_two_files_of_one_modality_are_named(heads, tmp_path):
    folder = shutil.copytree(heads, tmp_path / "set")
    (folder / "b/t1.nii").touch()
    pattern = "^b: .*b has t1.nii.gz and t1.nii, expected one file t1$"
    with pytest.raises(DataError, match=pattern):
        find_dataset(folder, options())
    for paths in ([folder], [folder / "b"]):
        with pytest.raises(DataError, match=pattern):
            find_inputs(paths, ["flair", "t1"], DataOptions())
    assert find_dataset(folder, options(images=["flair"])).subjects["b"]


def test_labels_outside_the_mask_are_said(tmp_path):
    write_heads(tmp_path, ["a"], shape=(24, 20, 28))
    corner = np.zeros((24, 20, 28), np.uint8)
    corner[:2, :2, :2] = 1
    rewrite(tmp_path / "a/lesions.nii.gz", lambda _: corner)
    with pytest.raises(DataError, match="^a: 100.0% of the labelled voxels of .* outside the mask"):
        volume(tmp_path)
    assert volume(tmp_path, mask="all").label.sum() == 8
    corner[10:14, 9:11, 13:14] = 1
    rewrite(tmp_path / "a/lesions.nii.gz", lambda _: corner)
    with pytest.warns(UserWarning, match="^a: 50.0% of the labelled voxels of"):
        volume(tmp_path)


def json_of(folder, **content):
    folder.mkdir(exist_ok=True)
    made = {"channel_names": {"0": "FLAIR", "1": "T1"}, "labels": LABELS, **content}
    (folder / "dataset.json").write_text(json.dumps(made))
    return find_dataset(folder, DataOptions())


def test_cases_whose_labels_have_one_file_name_stay_apart(tmp_path):
    items = [
        {"image": [f"p{k}/f.nii.gz", f"p{k}/t1.nii.gz"], "label": f"p{k}/seg.nii.gz"}
        for k in range(3)
    ]
    found = json_of(tmp_path, training=items[:2], validation=items[2:])
    assert list(found.subjects) == ["p0/seg", "p1/seg", "p2/seg"]
    assert found.given == {"training": ["p0/seg", "p1/seg"], "validation": ["p2/seg"]}
    assert found.subjects["p1/seg"].images[1] == tmp_path / "p1/t1.nii.gz"
    with pytest.raises(DataError, match="two entries have the label p0/seg.nii.gz"):
        json_of(tmp_path, training=[items[0], {**items[1], "label": items[0]["label"]}])


@pytest.mark.parametrize(
    ("content", "pattern"),
    [
        (
            {"training": [{"label": "a"}]},
            r"dataset.json: training\[0\]: got .* expected paths as im",
        ),
        ({"training": [{"image": "a"}]}, r"dataset.json: training\[0\]: got .* image and label"),
        (
            {"dataset": {"x": {"images": ["a"]}}},
            r"dataset.json: dataset.x: got .* images and label",
        ),
    ],
)
def test_an_entry_of_a_dataset_json_that_lacks_something_is_named(tmp_path, content, pattern):
    with pytest.raises(DataError, match=pattern):
        json_of(tmp_path, **content)
    (tmp_path / "dataset.json").write_text("[]")
    with pytest.raises(DataError, match="dataset.json: got a list, expected an object"):
        find_dataset(tmp_path, DataOptions())


def test_voxels_that_nobody_judged_are_in_no_patch_loss_or_score(heads, tmp_path):
    """nnU-Net's label "ignore": here the upper half of every scan, with lesions in it."""
    as_layout(heads, tmp_path, "nnunet")
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["labels"]["ignore"] = 2
    (tmp_path / "dataset.json").write_text(json.dumps(content))

    def upper(x):
        x[:, :, 18:] = 2
        return x

    for name in "abc":
        rewrite(tmp_path / f"labelsTr/{name}.nii.gz", upper)
    dataset = find_dataset(tmp_path, DataOptions())
    assert (dataset.labels, dataset.ignored) == (LABELS, 2)
    assert initial_config(tmp_path).data.labels == {**LABELS, "ignore": 2}
    found = load_volume(
        dataset.subjects["a"], DataOptions(), dataset.labels, ignored=dataset.ignored
    )
    lower = volume(heads).label[:, :, :18]
    np.testing.assert_array_equal(found.label[:, :, :18], lower)
    assert (found.label[:, :, 18:] == 255).all()
    fine = DataOptions(spacing=[0.5, 0.5, 0.5])
    larger = load_volume(dataset.subjects["a"], fine, dataset.labels, ignored=dataset.ignored)
    assert set(np.unique(larger.label)) == {0, 1, 255}
    assert (larger.label[:, :, 36:] == 255).all()
    for method in ("balanced", "lesions"):
        drawn = SamplingOptions(method, [1, 1, 1], 50, jitter=0, minimum_subject_voxels=1)
        for place in Sampler({"a": found}, drawn).places(0):
            assert place.origin[2] < 18
    settings = ["sampling.patch=[16,16,16]", "network.features=[4,8]", "training.steps=2"]
    settings += ['data.test=["c"]', "training.device=cpu"]
    config, run = tmp_path / "it.toml", tmp_path / "run"
    config.write_text("")
    train = ["train", str(config), "--data", str(tmp_path), "--out", str(run)]
    assert cli.main([*train, *(x for setting in settings for x in ("--set", setting))]) == 0
    _, p, _ = load_model(run, "cpu").segmentation(dataset.subjects["c"])
    truth = np.asarray(nibabel.load(tmp_path / "labelsTr/c.nii.gz").dataobj)[:, :, :18] > 0
    with (run / "test.csv").open() as file:
        for row in list(csv.DictReader(file))[::4]:
            called = p[0, :, :, :18] >= np.float32(row["threshold"])
            dice = 2 * (called & truth).sum() / (called.sum() + truth.sum())
            assert float(row["dice"]) == pytest.approx(dice, abs=1e-12)
    for name in "abc":
        rewrite(tmp_path / f"labelsTr/{name}.nii.gz", lambda x: np.full_like(x, 2))
    with pytest.raises(DataError, match=r"^a: .*a.nii.gz is 2, which is ignored, in the whole ma"):
        load_volume(dataset.subjects["a"], DataOptions(), dataset.labels, ignored=dataset.ignored)
    content["labels"] = {"background": 0, "whole": [1, 2]}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"labels: got 'whole': \[1, 2\], .* regions are not trai"):
        find_dataset(tmp_path, DataOptions())


def test_classes_are_in_the_order_of_their_values_and_255_at_most(heads, tmp_path):
    def labels_of(**labels):
        case = {"image": ["a/f.nii.gz", "a/t1.nii.gz"], "label": "a/seg.nii.gz"}
        return json_of(tmp_path, labels=labels, training=[case]).labels

    shuffled = {"b": 4, "ignore": 3, "background": 0, "a": 1}
    assert list(labels_of(**shuffled).items()) == [("background", 0), ("a", 1), ("b", 4)]
    most = {f"v{k}": k for k in range(255)}
    assert len(labels_of(**most, ignore=400)) == 255
    with pytest.raises(DataError, match="data.labels: got 256 classes, expected 255 at most"):
        labels_of(**most, v255=255)
    subject = find_dataset(heads, options()).subjects["a"]
    with pytest.raises(DataError, match="got 400 classes"):
        load_volume(subject, options(), {f"v{k}": k for k in range(400)})
    probabilities = np.zeros((300, 1, 1, 2), np.float32)
    probabilities[[255, 299], 0, 0, [0, 1]] = 1
    classes = decided(probabilities, 0.5, np.ones((1, 1, 2), bool))
    assert classes.ravel().tolist() == [256, 300]


def test_a_prediction_takes_the_channels_that_were_trained_on(heads, tmp_path):
    as_layout(heads, tmp_path, "nnunet")
    images = tmp_path / "imagesTr"
    for chosen in (["T1", "FLAIR"], ["T1"], []):
        data = DataOptions(images=chosen)
        trained = find_dataset(tmp_path, data)
        for unused in (trained.unused_channels, None):
            given = find_inputs([images], trained.images, data, trained.channels, unused)
            assert [s.images for s in given] == [s.images for s in trained.subjects.values()]
    for k in range(4):
        path = tmp_path / f"new/patient_{k:04d}.nii.gz"
        path.parent.mkdir(exist_ok=True)
        path.touch()

    def four(*channels):
        return find_inputs([path.parent], ["FLAIR", "T1"][: len(channels[0])], data, *channels)

    for channels in ([(0,), ()], [(0,), (1,)], [(0, 1), ()], [(0,), (1, 2)]):
        with pytest.raises(ValueError, match="patient: .* has 0000, 0001, 0002, 0003 of it, expec"):
            four(*channels)
    for unused in ((1, 2, 3), None):
        with pytest.warns(UserWarning, match=r"left out: .*_0001.*_0003.nii.gz, as 0000 \(FLAIR\)"):
            assert [s.images[0].name for s in four((0,), unused)] == ["patient_0000.nii.gz"]
    (images / "b_0001.nii.gz").rename(images / "b_0002.nii.gz")
    pattern = r"^b: .*imagesTr has 0000, 0002 of it, expected 0000 \(FLAIR\), 0001 \(T1\)"
    for channels in ((0, 1), ()):
        found = find_inputs([images], ["FLAIR", "T1"], DataOptions(), channels)
        assert [s.name for s in found if not all(p.exists() for p in s.images)] == ["b"]
        assert found[1].images[1] == images / "b_0001.nii.gz"  # which reading it will name
    for name in "ac":
        for path in images.glob(f"{name}_*"):
            path.unlink()
    for channels in ((0, 1), ()):
        with pytest.raises(ValueError, match=pattern):
            find_inputs([images], ["FLAIR", "T1"], DataOptions(), channels)


def test_what_a_prediction_may_be_given(heads, tmp_path):
    plain, names = DataOptions(), ["flair", "t1"]
    files = [heads / "a/flair.nii.gz", heads / "a/t1.nii.gz"]
    assert find_inputs([heads / "a"], names, plain)[0].images == tuple(files)
    assert find_inputs(files, names, plain)[0].images == tuple(files)
    assert [subject.name for subject in find_inputs([heads], names, plain)] == ["a", "b", "c"]
    as_layout(heads, tmp_path / "set", "nnunet")
    cases = find_inputs([tmp_path / "set/imagesTr"], names, plain)
    assert [(s.name, len(s.images)) for s in cases] == [("a", 2), ("b", 2), ("c", 2)]
    with pytest.raises(ValueError, match="got t1.nii.gz in place of flair, expected the order fl"):
        find_inputs(files[::-1], names, plain)
    with pytest.raises(ValueError, match="got 3 paths, expected a folder, or 2 files: flair, t1"):
        find_inputs(files[:1] * 3, names, plain)
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in ("T1", "lesions", "x"):
        (flat / f"{name}.nii.gz").touch()
    with pytest.raises(FileNotFoundError, match=r"--input: .*flat has T1.nii.gz, expected t1, in"):
        find_inputs([flat], ["t1"], plain)
    (flat / "T1.nii.gz").unlink()
    found = find_inputs([flat], ["t1"], DataOptions(label="lesions"))
    assert [subject.name for subject in found] == ["x"]
    with pytest.raises(FileNotFoundError, match="--input: there is no .*nothing"):
        find_inputs([tmp_path / "nothing"], names, plain)


def test_no_subject_is_left_out_without_a_word(heads, tmp_path):
    def touch(*files):
        for file in files:
            path = tmp_path / f"{file}.nii.gz"
            path.parent.mkdir(exist_ok=True, parents=True)
            path.touch()

    def found(*folders):
        subjects = find_inputs([tmp_path.joinpath(*folders)], ["flair", "t1"], options())
        return {s.name: [p.name for p in s.images if p.exists()] for s in subjects}

    whole = ["flair.nii.gz", "t1.nii.gz"]
    touch("p1/flair", "p1/t1", "p2/p2_FLAIR", "p2/p2_T1", "p3/lesions", "atlas/x", "p4/raw/flair")
    touch("stray", "p1", "p2_probabilities", "lesions", "p1/before/flair")
    (tmp_path / "run").mkdir()
    with pytest.warns(UserWarning, match="left out") as said:
        assert found() == {"p1": whole, "p2": [], "p3": []}
    assert [str(warning.message) for warning in said] == [
        f"{tmp_path}: left out: atlas, p4, with no flair, t1 in them",
        f"{tmp_path}: left out: stray.nii.gz, beside folders of subjects",
    ]
    with pytest.warns(UserWarning, match="left out: before, as the folder itself has flair, t1"):
        assert found("p1") == {"p1": whole}
    with pytest.warns(UserWarning, match="left out: atlas, p4, with no flair, t1 in them$"):
        dataset = find_dataset(tmp_path, options())
    assert list(dataset.subjects) == ["p1", "p2", "p3"]
    pattern = r"^p2: .*p2/flair.nii.gz is missing; there is one in another sp.*\np3: .* is missing$"
    with pytest.raises(DataError, match=pattern):
        check_subjects(list(dataset.subjects.values())[1:], options(), LABELS, [])
    touch("others/p2/FLAIR")
    with pytest.raises(FileNotFoundError, match="has p2/FLAIR.nii.gz, expected flair, t1, in this"):
        found("others")

    touch("flat/c_0000", "flat/a", "flat/b", "flat/c", "flat/c_probabilities", "flat/lesions")
    subjects = find_inputs([tmp_path / "flat"], ["t1"], options())
    expected = {"c": "c_0000.nii.gz", "a": "a.nii.gz", "b": "b.nii.gz"}
    assert {s.name: s.images[0].name for s in subjects} == expected

    as_layout(heads, tmp_path / "nnunet", "nnunet")
    (tmp_path / "nnunet/labelsTr/b.nii.gz").unlink()
    dataset = find_dataset(tmp_path / "nnunet", DataOptions())
    assert list(dataset.subjects) == ["a", "c", "b"]
    with pytest.raises(DataError, match="^b: has no label file beside .*b_0000.nii.gz$"):
        check_subjects(dataset.subjects.values(), DataOptions(), LABELS, [])


@pytest.mark.parametrize("ending", [".nii.gz", ".NII.GZ"])
def test_files_that_are_named_as_modalities_are_in_their_order(ending):
    def check(files, images, *channels):
        check_order([Path(f"x/{file}{ending}") for file in files.split()], images.split(), channels)

    for files, images in {
        "flair t1": "flair t1",
        "a_FLAIR a-T1": "flair t1",
        "flair_to_t1 t1": "flair t1",  # registered to it
        "flair_to_t1 other": "flair t1",
        "a_t1 a_t1ce": "t1 t1ce",
        "a_ce a_t1": "t1_ce t1",
        "scan_2021 scan_2020": "flair t1",
        "b a": "flair t1",
        "t1": "flair t1",  # a file of all modalities
        "T1_to_FLAIR FLAIR_to_T1": "t1 flair",
        "in_t1 t1": "flair t1",
        "sub-01_T1w_brain sub-01_T2w_brain": "T1 t2w",
        "a_0001 a_0002": "flair t1",  # counted from 1, it may be
        "t1_a t1_b": "t1 flair",  # all of a study that is called so
        "a mri": "MRI MRI",
    }.items():
        check(files, images)
    check("a_0003 a_0001", "t1 flair", 3, 1)
    check("t1_2021 flair_2022", "t1 flair", 3, 1)
    check("patient_0007", "t1", 1)
    for files, images, *channels in (
        ("t1 flair", "flair t1"),
        ("a.T1 a.FLAIR", "flair t1"),
        ("t1 scan", "flair t1"),
        ("t1 flair x", "flair t1 t2"),
        ("a_t1ce a_t1", "t1 t1ce"),
        ("a_0001 a_0000", "flair t1"),
        ("a_0001 a_0003", "t1 flair", 3, 1),
        ("sub-01_FLAIR sub-01_T1w", "t1 flair"),
        ("sub-01_T2w sub-01_T1w", "T1 T2"),
        ("p_t1_brain p_flair_brain", "flair t1"),
        ("p_t1_brain p_other", "flair t1"),
    ):
        with pytest.raises(
            ValueError, match=f"got .* in place of .*, expected the order {images[:2]}"
        ):
            check(files, images, *channels)
    for files, images, *channels in (("a_0000 a_0001", "t1 t2", 0, 2), ("a_0000", "t1", 1)):
        with pytest.raises(ValueError, match="got a_000.* in place of t., expected 000"):
            check(files, images, *channels)


# --- Who is trained on ----------------------------------------------------------------------------

SCANS = {"a1": "a", "a2": "a", "b1": "b", "c1": "c", "d1": "d", "e1": "e"}


def scans():
    subjects = {name: Subject(name, (), None, group=group) for name, group in SCANS.items()}
    return Dataset(Path("x"), subjects, ("t1",), LABELS)


def test_no_patient_is_in_two_lists():
    split = split_dataset(scans(), DataOptions(validation=["b"], test=["a"]))
    assert split.test == ("a1", "a2")
    assert split.validation == ("b1",)
    assert split.training == ("c1", "d1", "e1")
    with pytest.raises(ValueError, match=r"data.test: a2 is of patient a, who \(a1\) is in data.t"):
        split_dataset(scans(), DataOptions(training=["a1"], test=["a2"]))
    with pytest.raises(ValueError, match="data.test: there is no subject or patient 'c2'"):
        split_dataset(scans(), DataOptions(test=["c2"]))
    with pytest.raises(ValueError, match="nobody is left to train on"):
        split_dataset(scans(), DataOptions(test=list("abcde")))
    with pytest.raises(ValueError, match="data.validation_share: got 0.4, but 1 patient is left"):
        split_dataset(scans(), DataOptions(validation_share=0.4, test=list("abcd")))
    for seed in range(20):
        drawn = split_dataset(scans(), DataOptions(validation_share=0.4, test=["e"]), seed)
        assert len({SCANS[name] for name in drawn.validation}) == 2
        assert {SCANS[x] for x in drawn.validation} & {SCANS[x] for x in drawn.training} == set()
        assert drawn == split_dataset(scans(), DataOptions(validation_share=0.4, test=["e"]), seed)


def test_the_training_of_a_dataset_json_lacks_who_is_validated_or_tested():
    given = {"training": ["a1", "a2", "b1", "c1"], "validation": ["d1"]}
    dataset = dataclasses.replace(scans(), given=given)
    split = split_dataset(dataset, DataOptions(test=["a1"]))
    assert (split.training, split.validation) == (("b1", "c1"), ("d1",))
    assert (split.test, split.unused) == (("a1",), ("a2", "e1"))
    split = split_dataset(dataset, DataOptions(validation=["c"], test=["d1"]))
    assert (split.training, split.validation) == (("a1", "a2", "b1"), ("c1",))
    drawn = split_dataset(dataset, DataOptions(validation=["b"], test=["c"]))
    assert drawn.training == ("a1", "a2")
    with pytest.raises(ValueError, match="data.test: c1 is of patient c, who is in data.training"):
        split_dataset(dataset, DataOptions(training=["c1"], test=["c1"]))
    with pytest.raises(ValueError, match="data.test: d1 is of patient d, who is in data.validat"):
        split_dataset(dataset, DataOptions(test=["d1"]))
    given["validation"] = ["a1"]  # the file's own lists contradict each other
    with pytest.raises(ValueError, match="data.validation: a1 is of patient a, who is in data.tr"):
        split_dataset(dataset, DataOptions(test=["b1"]))


def test_patients_of_a_table(tmp_path):
    write_heads(tmp_path, ["a", "b"], shape=(24, 20, 28))
    (tmp_path / "who.csv").write_text("subject,patient\na,x\nb,x\n", encoding="utf-8-sig")
    (tmp_path / "others.csv").write_bytes("Größe,subject\n".encode("latin-1"))
    with pytest.warns(UserWarning, match="--init: .*others.csv was not read: 'utf-8'"):
        assert initial_config(tmp_path).data.groups == "who.csv"
    with pytest.raises(DataError, match="data.groups: .*others.csv cannot be read: 'utf-8'"):
        find_dataset(tmp_path, options(groups="others.csv"))
    (tmp_path / "others.csv").unlink()
    dataset = find_dataset(tmp_path, options(groups="who.csv"))
    assert {subject.group for subject in dataset.subjects.values()} == {"x"}
    (tmp_path / "who.csv").write_text("subject,patient\na,x\n")
    with pytest.raises(DataError, match="^b: data.groups: .*who.csv has no row of it"):
        find_dataset(tmp_path, options(groups="who.csv"))
    with pytest.raises(DataError, match="--init: .*who.csv has columns .* but no row of b$"):
        initial_config(tmp_path)
    for rows, message in {
        "a,x\nb,": "got subject 'b' and patient '' in a row, expected both in",  # merged cells
        "a,x\nb": "got subject 'b' and patient '' in a row",
        "a,x\n , x": "got subject '' and patient 'x' in a row",
        "a,x\nb,x\nb,y": "got the patients x and y in rows of b, expected one",
    }.items():
        (tmp_path / "who.csv").write_text(f"subject,patient\n{rows}\n")
        with pytest.raises(DataError, match=f"data.groups: .*who.csv: {message}"):
            find_dataset(tmp_path, options(groups="who.csv"))
        with pytest.raises(DataError, match=f"--init: .*who.csv: {message}"):
            initial_config(tmp_path)
    (tmp_path / "who.csv").write_text('subject, patient\na, x\nb , "x",\n,\na,x\n')
    spaced = find_dataset(tmp_path, initial_config(tmp_path).data)
    assert [subject.group for subject in spaced.subjects.values()] == ["x", "x"]
    (tmp_path / "who.csv").write_text("Subject;Patient\na;x\nb;x\n")
    with pytest.warns(UserWarning, match="--init: .*who.csv was not read: got the columns Subj"):
        assert initial_config(tmp_path).data.groups == ""
    for patient in (None, " "):
        case = {"image": "a/flair.nii.gz", "label": "a/lesions.nii.gz", "patient": patient}
        with pytest.raises(DataError, match=r"training\[0\]: got .* as patient, expected a name"):
            json_of(tmp_path, channel_names={"0": "FLAIR"}, training=[case])
