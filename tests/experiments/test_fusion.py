"""Patches that are predicted once, put together as the sliding window would, and measured."""

import shutil

import numpy as np
import pytest
import torch

import voxfuse
from tests.training.phantom import write_heads
from voxfuse.experiments import fusion, fusion_page
from voxfuse.experiments.experiment import Place, carry_out
from voxfuse.experiments.fusion import Setting, effective_width
from voxfuse.fusion.grids import plan_grid
from voxfuse.fusion.windows import gaussian_window, hashemi_window
from voxfuse.training.networks import UNet

SHAPE = (51, 40, 33)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return UNet(2, 2, features=(4, 8)).eval()


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).standard_normal((2, *SHAPE)).astype(np.float32)


@pytest.fixture(scope="module")
def patches(network, image):
    return fusion.predict_patches(network, image)


@pytest.mark.parametrize("overlap", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("voting", ["soft", "logit"])
def test_patches_of_every_overlap_are_fused_as_the_sliding_window_fuses(
    network, image, patches, overlap, voting
):
    window = Setting(overlap, voting, "hashemi", 0.14)
    with torch.inference_mode():
        expected = voxfuse.sliding_window_inference(
            torch.from_numpy(image)[None],
            32,
            4,
            network,
            overlap=overlap,
            window=[window.vector()] * 3,
            output="probabilities",
            activation="softmax",
            voting=voting,
        )
    # A float16 logit is off by 2^-11 of itself, and a sigmoid's slope is at most 1/4.
    tolerance = 2**-11 * float(patches.logits.abs().max()) / 4
    assert np.abs(fusion.fused(patches, window) - expected[0, 1].numpy()).max() < 1.1 * tolerance


def test_side_by_side_every_voxel_has_one_patch(patches):
    found = fusion.fused(patches, fusion.NONE)
    grid = plan_grid(SHAPE, (32,) * 3, 0)
    assert grid.starts == ((0, 19), (0, 8), (0, 1))
    where = dict(zip(map(tuple, patches.grid.origins.tolist()), patches.logits, strict=True))
    for voxel in np.random.default_rng(1).integers(SHAPE, size=(50, 3)):
        origin = tuple(starts[int(x >= 32)] for starts, x in zip(grid.starts, voxel, strict=True))
        logit = where[origin][0][tuple(voxel - origin)]
        assert found[tuple(voxel)] == pytest.approx(float(logit.float().sigmoid()), rel=1e-6)


def test_windows_have_the_width_that_they_are_asked_for():
    assert np.allclose(fusion.hashemi(32), hashemi_window(32).numpy(), atol=1e-15)
    for n in range(8):
        # The spline's own 1 / sqrt(12 (n + 1)), and what sampling makes of it.
        width = effective_width(voxfuse.bspline_window(32, n).numpy())
        assert width == pytest.approx(1 / np.sqrt(12 * (n + 1)), rel=2e-3)
    for window in fusion.settings(quick=False):
        if window.width is not None:
            assert effective_width(window.vector()) == pytest.approx(window.width, abs=1e-6)
            assert window.vector().min() > 0
    assert effective_width(gaussian_window(320, 0.05).numpy()) == pytest.approx(0.05, rel=1e-6)


def test_jumps_are_those_across_faces_and_midway():
    grid = plan_grid((64, 32, 32), (32, 32, 32), 0.5)
    p = np.zeros(grid.volume_shape, np.float32)
    p[16:24], p[24:48], p[48:] = 0.5, 0.25, 1.0
    # Faces at 16, 32 and 48 of the first axis, of 32 x 32 voxels; midway are 8, 24, 40 and 56 there
    # and 16 of the others, of twice as many.
    mask = np.ones(p.shape, bool)
    face, mid = fusion.jumps(p, mask, grid)
    assert face == pytest.approx((0.5 + 0 + 0.75) / 3)
    assert mid == pytest.approx(0.25 / (4 + 2 * 2))
    mask[:20] = False
    assert fusion.jumps(p, mask, grid)[0] == pytest.approx(0.75 / 2)


def test_single_patches_by_depth(patches):
    random = np.random.default_rng(2)
    truth, mask = random.random(SHAPE) < 0.2, random.random(SHAPE) < 0.7
    found = fusion.by_depth(patches, truth, mask, group=7)
    assert len(found) == 16
    depth = fusion.depths((32, 32, 32))
    assert [int((depth == d).sum()) for d in (0, 15)] == [32**3 - 30**3, 8]
    for d in (0, 9):
        p, g = [], []
        for (x, y, z), logit in zip(patches.grid.origins.tolist(), patches.logits, strict=True):
            cut = slice(x, x + 32), slice(y, y + 32), slice(z, z + 32)
            inside = mask[cut] & (depth == d)
            p.append(logit[0].float().sigmoid().numpy()[inside])
            g.append(truth[cut][inside])
        p, g = np.concatenate(p), np.concatenate(g)
        expected = voxfuse.metrics.score_counts(p, g)
        seen = (found[d].positives + found[d].negatives) > 0
        assert np.array_equal(found[d].thresholds[seen], expected.thresholds)
        assert np.array_equal(found[d].positives[seen], expected.positives)
        assert fusion.mean_error(found[d]) == pytest.approx(np.abs(p - g).mean(), rel=1e-5)


def test_the_receptive_field_is_what_an_input_voxel_can_change():
    """Of a network whose maxima do not hide a voxel: all weights positive, all inputs zero."""
    network = UNet(1, 1, features=(1, 1, 1), norm="none").eval()
    for weight in network.parameters():
        torch.nn.init.constant_(weight, 0.1 if weight.ndim > 1 else 0.0)
    line = 64
    reached = np.zeros((line, 4), bool)
    with torch.no_grad():
        for x in range(line):
            image = torch.zeros(1, 1, 4, 4, line)
            image[..., x] = 1e6
            reached[x] = network(image)[0, 0, 2, 2, 32:36].numpy() > 0
    for at in range(4):
        low, high = fusion_page.receptive_field(3, 32 + at)
        assert np.flatnonzero(reached[:, at])[[0, -1]].tolist() == [low, high]
    assert fusion_page.widest_field(4) == 100


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The whole experiment on phantoms."""
    folder = tmp_path_factory.mktemp("fusion")
    data = write_heads(folder / "ms_lesions", list(fusion_page.PATIENTS), shape=(40, 44, 36))
    lines = [f"{name},{name}" for name in fusion_page.PATIENTS]
    (data / "subjects.csv").write_text("\n".join(["subject,patient", *lines]) + "\n")
    place = Place(folder, folder / "work", folder / "out", True, lambda line: None)
    carry_out(fusion.EXPERIMENT, place)
    return place


def test_a_quick_run_makes_rows_and_a_page(quick):
    results = fusion.EXPERIMENT.results(quick)
    rows = fusion_page.Rows(results.rows())
    assert rows.seeds == [0]
    for row in results.rows():
        tp, fp, fn = (int(row[name]) for name in ("tp", "fp", "fn"))
        if tp:
            assert float(row["dice"]) == pytest.approx(2 * tp / (2 * tp + fp + fn), rel=1e-4)
    page = (quick.results / "fusion" / "README.md").read_text()
    for claim in fusion_page.CLAIMS:
        tuned, half = fusion_page.intervals(rows, claim)
        at_half = "" if claim.score == "seam" else half
        assert f"| {claim.name} {claim.text} | {tuned} | {at_half} |" in page
    differences = rows.difference(fusion_page.CLAIMS[0], "0.5")
    assert differences.shape == (1, 6)
    # What a run would do again is nothing.
    assert fusion.EXPERIMENT.do(quick) == 0


def test_a_network_of_another_training_is_refused(quick):
    models = quick.work / "fusion" / "models"
    shutil.copytree(models / "fold0_seed0", models / "fold0_seed7")
    with pytest.raises(ValueError, match="fold0_seed7: was trained with .*seed=0.*seed=7"):
        fusion.trained({"fold": 0, "seed": 7}, quick)
