"""The demo: its figures, its files, and what it does with somebody else's image."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

nibabel = pytest.importorskip("nibabel", reason="needs the extra demo: nibabel")
pytest.importorskip("matplotlib", reason="needs the extra demo: matplotlib")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import head_image  # noqa: E402
import measure  # noqa: E402
import skull_strip  # noqa: E402
import skull_strip_unet  # noqa: E402

HEAD = ROOT / "data" / "head_mr" / "ch2.nii.gz"
BRAIN = ROOT / "data" / "head_mr" / "ch2bet.nii.gz"
WEIGHTS = ROOT / "data" / "skull_strip_unet" / "weights.npz"

# Dice of 96^3 patches on the 128^3 grid, from an independent implementation of network and fusion.
EXPECTED = {
    "constant": 0.461,
    "gaussian": 0.934,
    "hashemi": 0.933,
    "bspline1": 0.919,
    "bspline2": 0.934,
    "bspline3": 0.934,
    "bspline5": 0.934,
    "bspline7": 0.934,
}


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    assert skull_strip.main(["--quick", "--out", str(folder)]) == 0
    return folder, json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def turned_head(tmp_path_factory):
    """The bundled head as a scanner might store it: axes in another order, two of them flipped,
    slices 2 mm thick, the grid shifted in space, a fourth axis of length 1."""
    folder = tmp_path_factory.mktemp("head")
    paths = []
    for source in (HEAD, BRAIN):
        image = nibabel.load(source)
        array = np.asarray(image.dataobj)[:, :, ::2]
        affine = image.affine @ np.diag([1, 1, 2, 1])
        affine[:3, 3] += (3.5, -7.25, 11.0)
        stored = nibabel.Nifti1Image(array, affine)
        here = nibabel.orientations.io_orientation(affine)
        there = nibabel.orientations.axcodes2ornt(("P", "S", "L"))
        stored = stored.as_reoriented(nibabel.orientations.ornt_transform(here, there))
        stored = nibabel.Nifti1Image(np.asarray(stored.dataobj)[..., None], stored.affine)
        paths.append(folder / source.name)
        nibabel.save(stored, paths[-1])
    return tuple(paths)


def test_quick_run_reproduces_the_expected_dice(quick):
    _, report = quick
    rows = {row["window"]: row for row in report["fusion"]}
    assert {row["grid"] for row in report["fusion"]} == {"128"}
    assert rows[None]["patch"] == 0
    assert rows[None]["dice"] == pytest.approx(0.934, abs=0.01)
    for window, dice in EXPECTED.items():
        assert rows[window]["patch"] == 96
        assert rows[window]["dice"] == pytest.approx(dice, abs=0.01), window
    assert rows["bspline5"]["dice_to_whole"] > 0.99 > 0.6 > rows["constant"]["dice_to_whole"]


def test_report_has_every_key_and_finite_costs(quick):
    _, report = quick
    assert {"machine", "fusion", "loss"} <= set(report)
    for row in report["fusion"]:
        assert list(row) == [
            "grid",
            "patch",
            "window",
            "dice",
            "dice_to_whole",
            "network_seconds",
            "fuse_seconds",
            "peak_extra_bytes",
        ]
        assert row["network_seconds"] > 0
        assert row["fuse_seconds"] >= 0
        assert row["peak_extra_bytes"] is None or row["peak_extra_bytes"] > 0


def test_losses_agree_with_float64(quick):
    _, report = quick
    values = [row["value"] for row in report["loss"]]
    assert values
    assert max(values) - min(values) < 1e-5
    for row in report["loss"]:
        assert row["max_grad_error"] < 1e-5, row
        assert row["forward_backward_ms"] > 0


def test_pictures_and_mask_are_written(quick):
    folder, _ = quick
    import matplotlib.image

    for name in ("fusion.png", "windows.png"):
        picture = matplotlib.image.imread(folder / name)
        assert min(picture.shape[:2]) > 800
        assert picture[..., :3].std() > 0.05, "the picture is blank"
    mask = nibabel.load(folder / "brain_mask.nii.gz")
    head = nibabel.load(HEAD)
    assert mask.shape == head.shape
    assert np.array_equal(mask.affine, head.affine)
    assert set(np.unique(np.asarray(mask.dataobj))) == {0, 1}


def test_own_image_gets_its_mask_on_its_own_grid(turned_head, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(skull_strip, "TRAINING_WINDOWS", skull_strip.NATIVE_WINDOWS)
    image, mask = turned_head
    arguments = ["--quick", "--image", str(image), "--mask", str(mask), "--out", str(tmp_path)]
    assert skull_strip.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "99.9th percentile" in printed
    assert "resampled from 181x217x91 voxels of 1.0x1.0x2.0 mm" in printed
    written, given = nibabel.load(tmp_path / "brain_mask.nii.gz"), nibabel.load(mask)
    assert written.shape == given.shape
    assert np.allclose(written.affine, given.affine)
    first = np.asarray(written.dataobj) > 0
    second = np.asarray(given.dataobj) > 0
    assert 2 * (first & second).sum() / (first.sum() + second.sum()) > 0.9


def test_orientation_and_grid_survive_the_round_trip(turned_head, tmp_path):
    """Reading a mask and writing it back, through the 1 mm grid, changes only its border."""
    head = head_image.read_head(*turned_head, clip=True)
    assert tuple(head.image.shape) == (181, 217, 91)
    native = head.native()
    assert tuple(native.image.shape) == (181, 217, 182)
    reference = head_image.read_head(HEAD, BRAIN, clip=False)
    upright = reference.image[:, :, ::2]
    assert torch.corrcoef(torch.stack((upright.flatten(), head.image.flatten())))[0, 1] > 0.99
    head.save_mask(native.mask.float(), tmp_path / "again.nii.gz")
    again = np.asarray(nibabel.load(tmp_path / "again.nii.gz").dataobj) > 0
    given = np.asarray(nibabel.load(turned_head[1]).dataobj) > 0
    assert (again == given).mean() > 0.995


def _nifti(path, shape=(40, 40, 40), affine=None, fill=None):
    array = np.random.default_rng(0).random(shape).astype(np.float32)
    if fill is not None:
        array[...] = fill
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return path


def test_unusable_files_are_refused_with_the_reason(tmp_path, capsys):
    good = _nifti(tmp_path / "good.nii.gz")
    text = tmp_path / "notes.nii.gz"
    text.write_text("not an image")
    cases = [
        (["--image", str(tmp_path / "absent.nii.gz")], "--image: there is no file"),
        (["--image", str(text)], "--image:"),
        (["--image", str(_nifti(tmp_path / "4d.nii.gz", (40, 40, 40, 3)))], "one 3D volume"),
        (["--image", str(_nifti(tmp_path / "2d.nii.gz", (40, 40)))], "one 3D volume"),
        (["--image", str(_nifti(tmp_path / "flat.nii.gz", fill=7))], "is constant"),
        (["--image", str(_nifti(tmp_path / "nan.nii.gz", fill=np.nan))], "no finite voxel"),
        (["--image", str(_nifti(tmp_path / "tiny.nii.gz", (8, 40, 40)))], "a whole head is needed"),
        (
            ["--image", str(good), "--mask", str(_nifti(tmp_path / "m1.nii.gz", (40, 40, 41)))],
            "the same grid",
        ),
        (
            [
                "--image",
                str(good),
                "--mask",
                str(_nifti(tmp_path / "m2.nii.gz", affine=np.diag([2, 1, 1, 1]))),
            ],
            "another affine",
        ),
        (
            ["--image", str(good), "--mask", str(_nifti(tmp_path / "m3.nii.gz", fill=0))],
            "is empty",
        ),
        (["--device", "abacus"], "--device"),
        (["--backend", "triton", "--device", "meta"], "--device"),
    ]
    for arguments, reason in cases:
        assert skull_strip.main([*arguments, "--out", str(tmp_path / "out")]) == 2, arguments
        assert reason in capsys.readouterr().err, arguments
    assert not (tmp_path / "out").exists()


def test_network_wants_sizes_divisible_by_eight():
    network = skull_strip_unet.load_skull_strip_unet(WEIGHTS)
    assert sum(parameter.numel() for parameter in network.state_dict().values()) == 171_465
    assert network(torch.zeros(1, 1, 8, 16, 24)).shape == (1, 1, 8, 16, 24)
    with pytest.raises(ValueError, match="divisible by 8"):
        network(torch.zeros(1, 1, 8, 16, 20))


def test_weights_are_plain_arrays(tmp_path):
    """A file that would run code when unpickled is refused."""
    path = tmp_path / "weights.npz"
    np.savez(path, **{"conv3d.kernel": np.array([object()], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        skull_strip_unet.load_skull_strip_unet(path)


def test_peak_memory_sees_a_temporary_tensor():
    size = 64 * 2**20
    with measure.peak_memory(torch.device("cpu")) as peak:
        torch.ones(size // 4).sum()
    if peak.extra_bytes is None:
        pytest.skip(measure.how_memory_is_measured(torch.device("cpu")))
    # Pages that the process gives back meanwhile count against it.
    assert 0.99 * size <= peak.extra_bytes < 1.25 * size


@pytest.mark.skipif(
    "not measured" in measure.how_memory_is_measured(torch.device("cpu")),
    reason="needs Linux with a writable /proc/self/clear_refs",
)
def test_many_classes_fit_a_larger_patch_without_logits():
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "many_classes.py", "--quick"],
        capture_output=True,
        text=True,
        check=True,
    )
    largest = {
        name.strip(): (int(edge), int(peak), int(beyond))
        for name, edge, peak, beyond in re.findall(
            r"^(.+?)\s+(\d+)\^3\s+[\d,]+\s+(\d+) MiB.*takes (\d+) MiB$", run.stdout, re.MULTILINE
        )
    }
    fused = largest.pop("fused")
    assert "convolution, voxfuse's loss" in largest
    assert fused[0] > max(edge for edge, _, _ in largest.values())
    for _, peak, beyond in (fused, *largest.values()):
        assert peak <= 128 < beyond + 1


def test_many_classes_steps_compute_one_loss():
    import many_classes

    image = torch.rand(40, 40, 40)
    regions = torch.randint(0, many_classes.CLASSES, (40, 40, 40), dtype=torch.uint8)
    values = [
        many_classes.train(step, image, regions, 16).loss
        for step in many_classes.training_steps().values()
    ]
    assert max(values) - min(values) < 1e-5 * max(values)
    step = many_classes.training_steps()["fused"]
    with pytest.raises(SystemExit, match="a patch of 16.3 takes"):
        many_classes.largest(step, image, regions, 1, 16, 8)
