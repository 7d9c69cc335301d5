"""Simulated lesions have the statistics measured on patients, and leave the host alone."""

from __future__ import annotations

import csv
from pathlib import Path

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from voxfuse.cli import main
from voxfuse.training.config import DataOptions
from voxfuse.training.dataset import DataError, find_dataset
from voxfuse.training.simulation import (
    CONTRASTS,
    Host,
    MaskShapes,
    RandomShapes,
    SimulationOptions,
    simulate,
)
from voxfuse.training.simulation.files import _patient, find_hosts
from voxfuse.training.simulation.placement import grow
from voxfuse.training.volumes import load_volume

ROOT = Path(__file__).resolve().parents[2]
HEAD = ROOT / "data/head_mr/ch2bet.nii.gz"
NEIGHBOURS = ndimage.generate_binary_structure(3, 2)  # 18-connected

#: 10, 50 and 90 % of a lesion's voxels over white matter; see the package's docstring.
MEASURED = {"flair": (1.15, 1.355, 1.6), "t1": (0.46, 0.755, 0.955), "t2": (1.25, 1.75, 2.5)}


def read(path: Path) -> np.ndarray:
    return np.asarray(nibabel.as_closest_canonical(nibabel.load(path)).dataobj)


@pytest.fixture(scope="module")
def head() -> Host:
    return Host.of({"t1": read(HEAD)})


def volumes_of(mask: np.ndarray) -> np.ndarray:
    """mm3 of the lesions of a mask at 1 mm, as they were measured on patients."""
    labels, _ = ndimage.label(mask, NEIGHBOURS)
    sizes = np.bincount(labels.ravel())[1:]
    return sizes[sizes >= 3]


class Measurement:
    """Simulates until there are so many lesions, and keeps volumes and contrasts."""

    def __init__(self, hosts: list[Host], shapes, seed: int, lesions: int = 2000) -> None:
        volumes, ratios, k = [], {name: [] for name in hosts[0].images}, 0
        while sum(map(len, volumes)) < lesions:
            host = hosts[k % len(hosts)]
            made = simulate(host, shapes, (seed, k))
            assert made.placed == made.drawn
            volumes.append(volumes_of(made.simulated[host.box]))
            assert len(volumes[-1]) == made.placed, "lesions have merged, or are too small"
            for name, image in made.images.items():
                ratios[name].append(image[made.simulated] / host.levels[name])
            k += 1
        self.volumes = np.concatenate(volumes)
        self.ratios = {name: np.concatenate(values) for name, values in ratios.items()}

    def check_volumes(self) -> None:
        logarithm = np.log(self.volumes)
        assert logarithm.mean() == pytest.approx(3.22, abs=0.15)
        assert logarithm.std() == pytest.approx(1.40, abs=0.15)
        assert (self.volumes < 10).mean() == pytest.approx(0.26, abs=0.05)
        large = self.volumes[self.volumes > 1000].sum() / self.volumes.sum()
        assert large == pytest.approx(0.71, abs=0.10)

    def check_contrasts(self) -> None:
        for name, values in self.ratios.items():
            found = np.percentile(values, [10, 50, 90])
            assert found == pytest.approx(MEASURED[name], abs=0.05), name


def test_the_random_model_has_the_measured_volumes_and_contrasts(head):
    found = Measurement([head], RandomShapes(), seed=11)
    found.check_volumes()
    found.check_contrasts()


@pytest.mark.data
def test_real_shapes_in_patients_have_the_measured_volumes_and_contrasts(ms_lesions):
    hosts = []
    for name in ("lesjak07", "lesjak19", "lesjak26"):
        images = {x: read(ms_lesions / name / f"{x}.nii.gz") for x in ("t1", "flair", "t2")}
        hosts.append(Host.of(images, None, read(ms_lesions / name / "lesions.nii.gz")))
    found = Measurement(hosts, MaskShapes.from_folder(ms_lesions / "masks_mni"), seed=11)
    found.check_volumes()
    found.check_contrasts()


def test_lesions_are_a_function_of_the_seed(head):
    one, same, other = (simulate(head, seed=(seed, 5)) for seed in (1, 1, 2))
    assert np.array_equal(one.images["t1"], same.images["t1"])
    assert np.array_equal(one.lesions, same.lesions)
    assert (one.lesions & other.lesions).sum() < 0.5 * (one.lesions | other.lesions).sum()


def test_confluent_lesions_lie_at_the_ventricles_and_the_host_elsewhere_stays(head):
    for seed in range(2):
        made = simulate(head, seed=seed)
        labels, count = ndimage.label(made.simulated[head.box], NEIGHBOURS)
        sizes = np.bincount(labels.ravel())[1:]
        near = ndimage.minimum(head.to_ventricles, labels, np.arange(1, count + 1))
        assert 1 <= (sizes >= 950).sum() <= 3
        assert (near[sizes >= 950] <= 5).all()
        assert not (made.simulated[head.box] & ~(head.white | head.wall)).any()
        # The edge's Gaussian ends at four deviations, which are three voxels.
        rim = ndimage.binary_dilation(made.simulated, np.ones((3, 3, 3)))
        reached = ndimage.binary_dilation(rim, np.ones((3, 3, 3)), 2)
        rim &= ~made.simulated
        changed = np.abs(made.images["t1"] - head.images["t1"])
        assert not changed[~reached].any()
        assert changed[made.simulated].mean() > changed[rim].mean() > 0


def test_real_lesions_stay_and_new_ones_do_not_touch_them(head):
    first = simulate(head, seed=3)
    again = Host.of(first.images, head.images["t1"] > 0, first.lesions)
    made = simulate(again, seed=4)
    assert np.array_equal(made.lesions, made.simulated | first.lesions)
    around = ndimage.binary_dilation(first.lesions, np.ones((3, 3, 3)))
    assert not (made.simulated & around).any()
    for name, image in made.images.items():
        assert np.array_equal(image[first.lesions], first.images[name][first.lesions])


def test_shapes_of_masks_scale_with_the_brain(tmp_path):
    mask = np.zeros((40, 40, 40), np.uint8)
    mask[5:9, 5:9, 5:10] = mask[20:35, 10:22, 10:20] = 1  # 80 and 1,800 mm3
    mask[1, 1, 1] = 1
    for name in ("a", "b"):
        nibabel.save(nibabel.Nifti1Image(mask, np.eye(4)), tmp_path / f"{name}.nii.gz")
    shapes = MaskShapes.from_folder(tmp_path, 1e6, leave_out=["b"])
    drawn = shapes.draw(np.random.default_rng(0), 3, 1, brain_volume=1.5e6)
    assert [shape.volume for shape in drawn] == pytest.approx([2700, 120, 120])
    with pytest.raises(ValueError, match="leave_out: got c, expected some of a, b"):
        MaskShapes.from_folder(tmp_path, leave_out=["c"])


def test_voxels_of_masks_are_those_of_the_affine_as_everywhere(tmp_path):
    mask = np.zeros((20, 21, 22), np.uint8)
    mask[5:9, 5:10, 5:7] = 1
    affine = np.array([[0, 0, -3.0, 5], [2, 0, 0, 0], [0, 1.5, 0, 0], [0, 0, 0, 1]])
    image = nibabel.Nifti1Image(mask, affine)
    image.header["pixdim"][1:4], image.header["qform_code"] = 1, 0
    nibabel.save(image, tmp_path / "a.nii.gz")
    with pytest.warns(UserWarning, match=r"affine has voxels of 2 x 1.5 x 3 mm, which are taken"):
        [template] = MaskShapes.from_folder(tmp_path).templates
    assert template.volume == pytest.approx(40 * 9)
    assert template.spacing == pytest.approx([3, 2, 1.5])
    assert template.depth.shape == (6, 8, 9)
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4, 2)), np.eye(4)), tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"got shape \(4, 4, 4, 2\), expected \(x, y, z\)"):
        MaskShapes.from_folder(tmp_path)
    (tmp_path / "a.nii.gz").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"a.nii.gz: cannot be read"):
        MaskShapes.from_folder(tmp_path)


def test_a_lesion_grows_to_its_volume_where_there_is_room():
    score = -np.abs(np.indices((9, 9, 9)) - 4.0).sum(0)
    free = np.ones((9, 9, 9), bool)
    free[:, :, 6:] = False
    for voxels in (1, 3, 12, 100):
        lesion = grow(score, free, (4, 4, 4), voxels)
        assert abs(lesion.sum() - voxels) <= (0 if voxels <= 12 else 0.04 * voxels)
        assert not (lesion & ~free).any()
        assert ndimage.label(lesion, NEIGHBOURS)[1] == 1
    free[:, :, 5] = False
    free[3:6, 3:6, 3:5] = True
    free[2], free[:, 2], free[:, :, 2] = False, False, False
    free[6], free[:, 6] = False, False
    assert grow(score, free, (4, 4, 4), 30) is None, "18 voxels hang together"


def test_errors_name_what_is_wrong(head):
    t1 = head.images["t1"]
    with pytest.raises(ValueError, match="images: got flair, expected t1 among them"):
        Host.of({"flair": t1})
    with pytest.raises(ValueError, match=r"brain: got shape \(3, 3, 3\), expected that of t1"):
        Host.of({"t1": t1}, np.ones((3, 3, 3), bool))
    with pytest.raises(ValueError, match="brain: got 0 voxels with t1 > 0|brain: has no voxel"):
        Host.of({"t1": np.zeros((20, 20, 20))})
    flair = np.where(t1 > 0, 300.0 - t1, 0)  # white matter is darker than the mean, as in FLAIR
    normalised = {
        name: np.where(t1 > 0, (image - image[t1 > 0].mean()) / image[t1 > 0].std(), 0)
        for name, image in (("t1", t1), ("flair", flair))
    }
    with pytest.raises(ValueError, match="images: t1 has [34].% of the brain below 0, expected"):
        Host.of({"t1": normalised["t1"]}, t1 > 0)
    with pytest.raises(ValueError, match="images: flair has white matter of -1.*, expected the sc"):
        Host.of({"t1": t1, "flair": normalised["flair"]})
    only = SimulationOptions(contrasts={"flair": CONTRASTS["flair"]})
    with pytest.raises(ValueError, match="contrasts: there is none of t1, only of flair"):
        simulate(head, options=only)


def test_the_command_writes_folders_that_training_reads(tmp_path, capsys, monkeypatch):
    out = tmp_path / "made"
    arguments = ["simulate", "--host", str(HEAD), "--out", str(out), "--count", "1", "--seed", "3"]
    assert main([*arguments, "--with-hosts"]) == 0
    assert "ch2bet-sim3-000: " in capsys.readouterr().out
    with (out / "subjects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["subject"] for row in rows] == ["ch2bet", "ch2bet-sim3-000"]
    assert {row["patient"] for row in rows} == {"ch2bet"}
    options = DataOptions(
        images=["t1"], label="lesions", labels={"background": 0, "lesion": 1}, groups="subjects.csv"
    )
    dataset = find_dataset(out, options)
    for row in rows:
        volume = load_volume(dataset.subjects[row["subject"]], options, dataset.labels)
        voxels = int((volume.label > 0).sum())
        assert voxels / 1000 == pytest.approx(float(row["lesion_ml"]), abs=1e-3)
        assert np.array_equal(volume.mask, read(HEAD) > 0)
        if voxels:
            assert volume.image[0][volume.label > 0].mean() < volume.image[0][volume.mask].mean()
    assert nibabel.load(out / "ch2bet-sim3-000/t1.nii.gz").affine == pytest.approx(
        nibabel.load(HEAD).affine
    )
    assert main(arguments) == 1
    assert "subjects.csv is there already" in capsys.readouterr().err
    # With hosts, into the folder of the hosts.
    head = tmp_path / "heads/a"
    head.mkdir(parents=True)
    (head / "t1.nii.gz").symlink_to(HEAD)
    arguments = ["simulate", "--host", str(head.parent), "--out", str(head.parent), "--with-hosts"]
    other = head.parent / "b/T1.nii.gz"
    other.parent.mkdir()
    other.symlink_to(HEAD)
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "heads: left out: b, with no t1\n" in said
    assert "heads/a is there already; expected a new folder" in said
    assert sorted(path.name for path in head.parent.iterdir()) == ["a", "b"]
    monkeypatch.chdir(head)
    assert [each.subject.name for each in find_hosts(["."])] == ["a"]


def test_hosts_are_of_the_patients_that_their_table_says(tmp_path):
    for name in ("p1_b", "p2_a"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "t1.nii.gz").touch()
    table = tmp_path / "subjects.csv"

    heads = find_hosts([tmp_path])
    table.write_text("subject,patient\np1_b, p1\np2_a,p2\n", encoding="utf-8-sig")
    assert [_patient(head.subject) for head in heads] == ["p1", "p2"]
    table.write_text("subject,patient\np1_b,p1\n")
    with pytest.raises(DataError, match="^p2_a: --host: .*subjects.csv has no row of it"):
        _patient(heads[1].subject)
    table.write_text("subject,patient\np1_b,\n")
    with pytest.raises(
        DataError, match="--host: .*subjects.csv: got subject 'p1_b' and patient ''"
    ):
        _patient(heads[0].subject)


def _head_files(folder: Path, **files: np.ndarray) -> Path:
    """A folder of images of these names."""
    folder.mkdir(parents=True)
    for name, array in files.items():
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
    return folder


def test_files_of_a_head_in_another_spelling_are_an_error(tmp_path, capsys):
    scan, lesion = np.ones((4, 4, 4), np.float32), np.eye(4, dtype=np.uint8)[None].repeat(4, 0)
    head = _head_files(tmp_path / "a", t1=scan, FLAIR=scan, Lesions=lesion)
    message = "a has FLAIR.nii.gz, Lesions.nii.gz, expected t1, flair, t2, lesions, in this spelli"
    for place in (head, tmp_path):
        assert main(["simulate", "--host", str(place), "--out", str(tmp_path / "out")]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"a has Lesions.nii.gz, expected t1, lesions"):
        find_hosts([head / "t1.nii.gz"])
    [host] = find_hosts([head], ["t1", "FLAIR"], "Lesions")
    assert host.images == ("t1", "FLAIR")
    assert host.subject.label == head / "Lesions.nii.gz"
    # As BraTS calls them, and training reads them.
    other = _head_files(tmp_path / "b", t1=scan, b_flair=scan, b_lesions=lesion)
    [host] = find_hosts([other])
    assert host.images == ("t1", "flair")
    assert host.subject.label == other / "b_lesions.nii.gz"


def test_names_that_were_given_have_to_be_there(tmp_path):
    scan = np.ones((4, 4, 4), np.float32)
    _head_files(tmp_path / "a", t1=scan)
    _head_files(tmp_path / "b", t1=scan, pd=scan, wmh=scan)
    assert len(find_hosts([tmp_path], ["t1", "pd"], "wmh")) == 2  # one of them has them
    with pytest.raises(ValueError, match="--images: got flair, which no head of --host has"):
        find_hosts([tmp_path], ["t1", "flair"])
    with pytest.raises(ValueError, match="--label: got lesions, which no head of --host has"):
        find_hosts([tmp_path], label="lesions")


def test_the_mask_of_a_t1_file_lies_beside_it(tmp_path):
    scan, brain = np.ones((4, 4, 4), np.float32), np.zeros((4, 4, 4), np.uint8)
    brain[1:3] = 1
    head = _head_files(tmp_path / "a", scan=scan, brain=brain, lesions=brain)
    [host] = find_hosts([head / "scan.nii.gz"], mask="brain")
    assert host.subject.name == "scan"
    assert host.images == ("t1",)
    volume = load_volume(host.subject, host.data, {"background": 0, "lesion": 1})
    assert np.array_equal(volume.mask, brain > 0)
    assert np.array_equal(volume.label, brain)
    [host] = find_hosts([head / "scan.nii.gz"], mask="skull")
    with pytest.raises(DataError, match=r"^scan: .*skull.nii.gz is missing"):
        load_volume(host.subject, host.data, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--host", "nowhere"], "--host: nowhere is no folder, nor an image"),
        (["--host", str(ROOT / "docs")], "has no t1, nor has a folder in it"),
        (["--host", str(HEAD), "--count", "0"], "--count: got 0, expected 1 or more"),
        (["--host", str(HEAD), "--images", "flair"], "--images: got flair, expected t1 among them"),
        (["--host", str(HEAD), "--shapes", "nowhere"], "nowhere: there is no such file or folder"),
    ],
)
def test_the_command_says_what_is_wrong(given, message, tmp_path, capsys):
    assert main(["simulate", *given, "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
