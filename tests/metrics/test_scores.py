"""SegmentationScores: its formulas, its policies, and the numbers of other libraries."""

from __future__ import annotations

import importlib.util
import math
import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.ranks import launch
from voxfuse.metrics import SegmentationScores, VoxelCounts, volume_metrics

NAMES = ("dice", "jaccard", "sensitivity", "precision", "specificity", "npv", "mcc")


def batches(seed: int, classes: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Logits and labels; some classes are in no truth, in no prediction, or in neither."""
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(draw.randint(1, 3)):
        size = draw.randint(1, 3)
        logits = torch.randn(size, classes, 3, 4, 5, generator=generator)
        labels = torch.randint(0, classes, (size, 3, 4, 5), generator=generator)
        for b in range(size):
            for c in range(1, classes):
                kind = draw.random()
                if kind < 0.5:
                    labels[b][labels[b] == c] = 0
                if kind < 0.3 or kind > 0.85:
                    logits[b, c] = -9.0
        found.append((logits, labels))
    return found


def scored(seed: int, **options: Any) -> SegmentationScores:
    scores = SegmentationScores(**options)
    for logits, labels in batches(seed):
        scores.update(logits, labels)
    return scores


def one_hot(labels: torch.Tensor, classes: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, classes).movedim(-1, 1)


# --- Formulas and policies ------------------------------------------------------------------------


def test_scores_are_those_of_voxel_counts():
    """One formula for arrays and for single counts, whose table settles what is empty."""
    scores = scored(1, absent=1.0, beta=0.5)
    values = scores.compute("none")
    assert set(values) == {*NAMES, "f0.5", "relative_volume_difference"}
    for b, sample in enumerate(scores.counts.tolist()):
        for c, row in enumerate(sample):
            counts = VoxelCounts(*row)
            expected = {name: getattr(counts, name) for name in NAMES}
            expected["f0.5"] = counts.f_beta(0.5)
            volumes = volume_metrics(counts, 1.0)
            if counts.truth:
                name = "relative_volume_difference"
                expected[name] = volumes[name]
            if counts.truth == counts.prediction == 0:
                expected |= {"sensitivity": 1.0, "precision": 1.0}
            for name, value in expected.items():
                assert values[name][b, c].item() == pytest.approx(value, nan_ok=True), name


def test_mcc_is_the_correlation_of_the_two_masks():
    logits, labels = torch.randn(2, 4, 60), torch.randint(0, 4, (2, 60))
    scores = SegmentationScores()
    scores.update(logits, labels)
    predicted, true = one_hot(logits.argmax(1)), one_hot(labels)
    for b, c in ((0, 0), (0, 1), (1, 3)):
        expected = np.corrcoef(predicted[b, c], true[b, c])[0, 1]
        assert scores.compute("none")["mcc"][b, c].item() == pytest.approx(expected)


def test_what_absent_classes_and_false_alarms_are_worth():
    labels = torch.tensor([[0, 0, 1]])
    logits = torch.nn.functional.one_hot(torch.tensor([[0, 2, 1]]), 4).movedim(-1, 1).float()

    def dice(**options: Any) -> list[float]:
        scores = SegmentationScores(**options)
        scores.update(logits, labels)
        return scores.compute()["dice"].tolist()

    third = 2 / 3
    assert dice() == pytest.approx([third, 1, 0, math.nan], nan_ok=True)
    assert dice(absent=1.0) == pytest.approx([third, 1, 0, 1])
    assert dice(absent=0) == pytest.approx([third, 1, 0, 0])
    assert dice(false_alarm="ignore") == pytest.approx([third, 1, math.nan, math.nan], nan_ok=True)
    assert dice(false_alarm="ignore", absent=1.0) == pytest.approx(
        [third, 1, math.nan, 1], nan_ok=True
    )


def test_masks_ignored_labels_thresholds_and_predicted_labels():
    logits, labels = batches(3)[0]
    mask = torch.rand(labels.shape) > 0.4
    scores = SegmentationScores()
    counts = scores.update(logits, labels, mask=mask)
    ignoring = SegmentationScores(ignore_index=255)
    assert torch.equal(ignoring.update(logits, labels.masked_fill(~mask, 255)), counts)
    of_labels = SegmentationScores("labels", num_classes=4)
    assert torch.equal(of_labels.update(logits.argmax(1), labels, mask=mask), counts)
    regions = SegmentationScores("threshold", threshold=0.3)
    truth = one_hot(labels)
    predicted = logits.sigmoid() > 0.3
    hits = (predicted & (truth == 1)).flatten(2).sum(-1)
    assert torch.equal(regions.update(logits, truth)[..., 0], hits)


# --- What it keeps --------------------------------------------------------------------------------


@pytest.mark.parametrize("pooled", [False, True])
def test_state_goes_on_elsewhere_and_reset_forgets(pooled):
    whole, first, second = (SegmentationScores(pooled=pooled) for _ in range(3))
    assert first.state_dict() == {}
    (a, *rest), _ = batches(4) + batches(5), None
    first.update(*a)
    second.update(*rest[0])  # is forgotten
    second.load_state_dict(first.state_dict())
    whole.update(*a)
    for batch in rest:
        whole.update(*batch)
        second.update(*batch)
    assert torch.equal(second.counts, whole.counts)
    assert not torch.equal(first.counts, whole.counts)
    whole.reset()
    whole.update(*a)
    assert torch.equal(whole.counts, first.counts)
    second.load_state_dict({})
    with pytest.raises(RuntimeError, match="compute: nothing was counted"):
        second.compute()


def test_bad_input_is_named():
    for options, error, message in (
        (dict(absent="nan"), ValueError, "absent: got 'nan', expected 'ignore' or a number"),
        (dict(absent=math.nan), ValueError, "absent: got nan"),
        (dict(false_alarm="no"), ValueError, "false_alarm: got 'no', expected 'score' or 'ignore'"),
        (dict(beta=0), ValueError, "beta: got 0, expected a positive number"),
        (dict(mode="bogus"), ValueError, "mode: got 'bogus', expected one of 'argmax'"),
        (dict(mode=4), ValueError, "mode: got 4"),
        (dict(mode="labels"), ValueError, "num_classes: got None"),
        (dict(num_classes=-3), ValueError, "num_classes: got -3, expected an int >= 1"),
        (dict(ignore_index=1.5), TypeError, "ignore_index: got 1.5, expected an int or None"),
        (dict(mode="threshold", activation="relu"), ValueError, "activation: got 'relu'"),
        (dict(mode="threshold", threshold="a"), TypeError, "threshold: got 'a', expected a number"),
        (
            dict(mode="threshold", threshold=[0.5] * 4),
            TypeError,
            r"threshold: got \[0.5, .*, expected a number",
        ),
        (dict(backend="gpu"), ValueError, "backend: got 'gpu', expected one of 'auto'"),
    ):
        with pytest.raises(error, match=message):
            SegmentationScores(**options)
    with pytest.raises(TypeError, match=r"input: .* pass the finest, outputs\[0\]"):
        SegmentationScores().update([torch.zeros(1, 2, 2)], torch.zeros(1, 2))
    scores = scored(6, names=["background", "a", "b", "c"])
    with pytest.raises(ValueError, match="reduction: got 'sum', expected one of 'none', 'class'"):
        scores.compute("sum")
    with pytest.raises(ValueError, match="input: has 3 classes, but what was counted before has 4"):
        scores.update(torch.zeros(1, 3, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="names: got 1 names, but input has 2 classes"):
        SegmentationScores(names=["one"]).update(torch.zeros(1, 2, 2), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="include_background: got False, but the only class"):
        SegmentationScores("threshold", include_background=False).update(
            torch.zeros(1, 1, 2), torch.zeros(1, 2)
        )
    with pytest.raises(ValueError, match="state: got counts of 2 samples, but pooled=True"):
        SegmentationScores(pooled=True).load_state_dict({"counts": torch.zeros(2, 3, 4)})
    with pytest.raises(ValueError, match=r"state: got \['sums'\], expected counts"):
        SegmentationScores().load_state_dict({"sums": torch.zeros(2)})


def test_printing_before_the_first_batch_says_so():
    scores = SegmentationScores("threshold", absent=1.0)
    assert repr(scores) == "SegmentationScores(mode='threshold', absent=1.0)"
    assert str(scores) == f"{scores!r}: nothing was counted yet"


def test_printing_shows_a_table():
    text = str(
        scored(7, names=["background", "liver", "tumour", "vessel"], include_background=False)
    )
    lines = text.splitlines()
    assert lines[0].split() == (
        [
            "class",
            "Dice",
            "Jaccard",
            "F2",
            "Sensitivity",
            "PPV",
            "Specificity",
            "NPV",
            "dV/V",
            "MCC",
            "of",
        ]
    )
    assert [line.split()[0] for line in lines[1:]] == ["liver", "tumour", "vessel", "mean"]
    expected = scored(7).compute()["dice"]
    assert lines[1].split()[1] in (f"{expected[1].item():.3f}", "-")
    assert len({len(line) for line in lines[:-1]}) == 1


# --- Other libraries ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
def test_dice_as_monai(seed):
    metrics = pytest.importorskip("monai.metrics")
    for background, empty in ((True, True), (False, True), (True, False), (False, False)):
        scores = scored(
            seed,
            include_background=background,
            absent="ignore" if empty else 1.0,
            false_alarm="ignore" if empty else "score",
        )
        for reduction, ours in (("mean", "mean"), ("mean_batch", "class"), ("none", "none")):
            theirs = metrics.DiceMetric(
                include_background=background, reduction=reduction, ignore_empty=empty
            )
            for logits, labels in batches(seed):
                theirs(one_hot(logits.argmax(1)), one_hot(labels))
            found = scores.compute(ours)["dice"]
            expected = theirs.aggregate().double().reshape(found.shape)
            if reduction != "none":
                found = found.nan_to_num(0.0)  # without any score MONAI says 0
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def pseudo_dice_of_nnunet(seed: int) -> tuple[list[float], float]:
    """nnU-Net's validation_step and on_validation_epoch_end, for labels."""
    from nnunetv2.training.loss.dice import get_tp_fp_fn_tn

    outputs = []
    for output, target in batches(seed):
        axes = [0, *range(2, output.ndim)]
        segmentation = output.argmax(1)[:, None]
        predicted = torch.zeros(output.shape, dtype=torch.float16)
        predicted.scatter_(1, segmentation, 1)
        tp, fp, fn, _ = get_tp_fp_fn_tn(predicted, target[:, None], axes=axes, mask=None)
        outputs.append([x.numpy()[1:] for x in (tp, fp, fn)])
    tp, fp, fn = (np.sum([o[i] for o in outputs], 0) for i in range(3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # 0/0, and means of nothing
        each = [2 * i / (2 * i + j + k) for i, j, k in zip(tp, fp, fn, strict=True)]
        return each, float(np.nanmean(each))


@pytest.mark.parametrize("seed", range(12))
def test_dice_as_nnunet(seed):
    pytest.importorskip("nnunetv2")
    each, mean = pseudo_dice_of_nnunet(seed)
    scores = scored(seed, pooled=True, include_background=False)
    # nnU-Net divides float32 sums of float16 indicators.
    assert scores.compute()["dice"].tolist() == pytest.approx(each, rel=1e-3, nan_ok=True)
    assert scores.compute("mean")["dice"].item() == pytest.approx(mean, rel=1e-3, nan_ok=True)


@pytest.mark.parametrize("seed", range(12))
def test_dice_as_torchmetrics(seed):
    segmentation = pytest.importorskip("torchmetrics.segmentation")
    for background, level in ((True, "samplewise"), (False, "samplewise"), (True, "global")):
        scores = scored(seed, include_background=background, pooled=level == "global")
        for average, ours in (("macro", "mean"), ("none", "class")):
            theirs = segmentation.DiceScore(
                4, background, average=average, aggregation_level=level, input_format="one-hot"
            )
            for logits, labels in batches(seed):
                theirs.update(one_hot(logits.argmax(1)), one_hot(labels))
            expected = theirs.compute().double()
            found = scores.compute(ours)["dice"]
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True)


def test_counts_as_segmentation_models_pytorch():
    package = importlib.util.find_spec("segmentation_models_pytorch")
    if package is None or package.origin is None:
        pytest.skip("segmentation_models_pytorch is not installed")
    # The package imports timm; this file of it needs PyTorch alone.
    path = Path(package.origin).parent / "metrics" / "functional.py"
    spec = importlib.util.spec_from_file_location("smp_metrics", path)
    assert spec is not None
    assert spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    scores = SegmentationScores()
    for seed in range(6):
        for logits, labels in batches(seed):
            counts = theirs.get_stats(logits.argmax(1), labels, "multiclass", num_classes=4)
            assert torch.equal(scores.update(logits, labels), torch.stack(counts, -1))


# --- Ranks ----------------------------------------------------------------------------------------


def ranks_equal_one_process(rank: int, world: int) -> None:
    """One rank has more batches than the other, which may have none."""
    every = batches(8) + batches(9) + batches(10)
    for own in ((every[:1], every[1:]), ([], every)):
        for pooled in (False, True):
            options: dict[str, Any] = dict(pooled=pooled, num_classes=4)
            single = SegmentationScores(**options)
            for batch in own[0] + own[1]:
                single.update(*batch)
            mine = SegmentationScores(**options, process_group="world")
            for batch in own[rank]:
                mine.update(*batch)
            before = mine.counts.clone()
            for reduction in ("none", "class", "mean"):
                for name, expected in single.compute(reduction).items():
                    torch.testing.assert_close(
                        mine.compute(reduction)[name], expected, rtol=0, atol=0, equal_nan=True
                    )
            assert torch.equal(mine.counts, before)


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="PyTorch is built without gloo"
)
def test_ranks_score_as_one_process(tmp_path):
    launch(2, tmp_path, (ranks_equal_one_process,))


@pytest.mark.parametrize("pooled", [False, True])
def test_what_it_keeps_is_its_own(pooled):
    scores = SegmentationScores(pooled=pooled)
    counts = scores.update(*batches(4)[0])
    total = counts.sum(0)
    counts.zero_()
    scores.counts.zero_()
    assert torch.equal(scores.counts.sum(0), total)


def test_a_state_is_of_samples_or_of_their_sum():
    pooled = scored(4, pooled=True).state_dict()
    with pytest.raises(ValueError, match="state: got the sum of all samples, but pooled=False"):
        SegmentationScores().load_state_dict(pooled)
    for counts in (pooled["counts"].double(), -pooled["counts"]):
        with pytest.raises(ValueError, match=f"state: got counts in {counts.dtype}"):
            SegmentationScores(pooled=True).load_state_dict({"counts": counts})
