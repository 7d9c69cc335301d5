"""The committed table is that of the committed rows, and verdicts follow from rows."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

from voxfuse.experiments import claims, fusion_page
from voxfuse.experiments.experiment import Place
from voxfuse.experiments.registry import EXPERIMENTS, write_pages
from voxfuse.experiments.results import read_rows
from voxfuse.experiments.scores import CHOICES
from voxfuse.experiments.statistics import FewPatients
from voxfuse.experiments.tables import lost
from voxfuse.experiments.verdicts import FEW, NOT, ONLY, SHOWN, WAITING, of_few

RESULTS = Path(__file__).parents[2] / "docs" / "experiments"
LOSSES = ("cross-entropy", *claims.BY_BETA, "jaccard")


def test_the_committed_pages_are_those_of_the_committed_rows(tmp_path):
    """Where they are not: voxfuse experiment NAME --page."""
    for name in EXPERIMENTS:
        if (RESULTS / name / "results.csv").is_file():
            shutil.copytree(RESULTS / name, tmp_path / name)
    write_pages(Place(tmp_path, tmp_path, tmp_path))
    for made in tmp_path.rglob("*"):
        if made.is_file() and made.name not in ("README.md", "subjects.csv"):
            assert made.read_bytes() == (RESULTS / made.relative_to(tmp_path)).read_bytes(), made
    for made in tmp_path.glob("*/README.md"):
        assert made.read_text() == (RESULTS / made.relative_to(tmp_path)).read_text(), made
    assert (RESULTS / "README.md").read_text() == claims.page(RESULTS)
    experiments = {line.statement.experiment for line in claims.lines(RESULTS)}
    assert experiments == {"losses", "lesions", "fusion", "bounds"}
    assert experiments >= set(EXPERIMENTS)


def table(effect, seeds=5, subjects=90, tasks=("binary", "two-class")):
    """Rows of `losses` with ``effect(task, loss, way, score)`` above a common mean."""
    random = np.random.default_rng(0)
    names = [f"s{k:02}" for k in range(subjects)]
    noise = {
        key: 0.002 * random.standard_normal()
        for key in itertools.product(LOSSES, range(seeds), names)
    }
    rows = []
    for task, loss, seed, way in itertools.product(tasks, LOSSES, range(seeds), CHOICES):
        for name in (*names, "mean"):
            split = "validation" if name == "mean" else "test"
            scores = {
                score: 0.7 + effect(task, loss, way, score) + noise.get((loss, seed, name), 0)
                for score in ("recall", "precision", "dice", "f2", "ap")
            }
            known = {
                "task": task, "loss": loss, "seed": str(seed), "fold": "0", "split": split,
                "subject": name, "structure": "s", "threshold": way,
            }  # fmt: skip
            rows.append({**known, **{score: repr(value) for score, value in scores.items()}})
    return rows


def verdicts(lines):
    return {line.statement.name: line.verdict for line in lines}


def test_verdicts_on_losses():
    def effect(task, loss, way, score):
        """Dice beats cross-entropy at 0.5 in the binary task, everywhere in the other; recall and
        F2 rise with beta at 0.5 alone."""
        if score == "dice" and loss == "cross-entropy":
            return -0.05 if task == "two-class" or way == "0.5" else 0.0
        if loss.startswith("tversky") and way == "0.5" and score in ("recall", "f2"):
            return 0.1 * (float(loss[8:]) - 0.5)
        return 0.0

    rows = table(effect)
    found = verdicts(claims.of_losses(rows))
    assert found == {"L1": ONLY, "L2": SHOWN, "L3": ONLY, "L4": ONLY, "L5": SHOWN}
    # The other way round nothing holds, and Jaccard is off by five times the margin.

    def opposite(task, loss, way, score):
        beta = float(loss[8:]) if loss.startswith("tversky") else 0.0
        return 0.05 * (loss in ("cross-entropy", "jaccard")) - 0.02 * beta

    worse = table(opposite)
    assert set(verdicts(claims.of_losses(worse)).values()) == {NOT}
    few = claims.of_losses(table(effect, seeds=4))
    assert set(verdicts(few).values()) == {WAITING}
    assert few[0].measured == "4 of 5 seeds so far"
    assert set(verdicts(claims.of_losses([])).values()) == {WAITING}
    lines = claims.of_losses(rows)
    assert lines[0].advice.startswith("Take Dice for the threshold 0.5; at tuned ones no gain")
    assert "hardly worth" not in lines[0].advice + lines[1].advice
    tiny = table(lambda task, loss, way, score: -0.005 * (loss == "cross-entropy"))
    line = claims.of_losses(tiny)[0]
    assert line.verdict == SHOWN
    assert line.advice.endswith("a gain of less than 0.01 is hardly worth a change.")
    assert not any("hardly" in line.advice for line in claims.of_losses(table(opposite)))
    assert few[0].advice == "Nothing yet."


def test_holm_counts_claims_that_are_not_there_yet():
    evidence = {"L1": claims.Evidence("", 0.02)}
    assert claims.judged(evidence, evidence) == {"L1": NOT}  # 5 x 0.02
    sure = {"L1": claims.Evidence("", 0.001)}
    assert claims.judged(evidence, sure) == {"L1": ONLY}
    assert claims.judged(sure, sure) == {"L1": SHOWN}
    wrong = {"L1": claims.Evidence("", 0.001, holds=False)}
    assert claims.judged(wrong, wrong) == {"L1": NOT}


def test_verdicts_on_six_patients():
    above, both, below = (FewPatients(0.0, *ends) for ends in ((1, 2), (-1, 1), (-2, -1)))
    assert of_few(above, both) == SHOWN
    assert of_few(both, above) == ONLY
    assert of_few(both, both) == FEW
    assert of_few(below, both) == NOT
    rows = table(
        lambda task, loss, way, score: -0.1 * (loss == "cross-entropy" and score == "dice"),
        seeds=3,
        subjects=6,
        tasks=("lesion",),
    )
    found = verdicts(claims.of_lesions(rows))
    assert found["M1"] == SHOWN
    assert set(found.values()) <= {SHOWN, FEW, NOT, ONLY}
    assert not any(line.small for line in claims.of_lesions(rows))
    one_fold = [row for row in rows if row["subject"] in ("s00", "s01", "s02")]
    assert set(verdicts(claims.of_lesions(one_fold)).values()) == {WAITING}


def of_six(effect):
    """Dice loss less cross-entropy in every one of six patients, at tuned thresholds and at 0.5."""
    rows = table(
        lambda task, loss, way, score: effect(way) * (loss == "dice"),
        seeds=3,
        subjects=6,
        tasks=("lesion",),
    )
    return claims.of_lesions(rows)[0]


def test_what_six_patients_advise():
    tiny = of_six(lambda way: 0.005)
    assert tiny.verdict == SHOWN
    assert tiny.advice.endswith("hardly worth a change.")
    assert "folds +0.006" in tiny.measured
    both = of_six(lambda way: 0.05 if way == "0.5" else -0.05)
    assert both.verdict == ONLY
    assert both.advice.endswith("At tuned thresholds it is a loss.")
    assert of_six(lambda way: -0.05).advice == "Dice loss was worse on MS lesions."
    nothing = claims.Line(claims.LESIONS[0], "", FEW, FewPatients(0.0, 0.0, 0.0, patients=6))
    assert nothing.advice == "Nothing: six patients cannot tell."


def test_a_network_that_finds_nothing_at_one_half_is_named():
    rows = table(lambda task, loss, way, score: -0.01 * (loss == "dice" and score == "ap"))
    for row in rows:
        failed = (row["task"], row["loss"], row["seed"]) == ("two-class", "cross-entropy", "3")
        if failed and row["threshold"] == "0.5":
            row["recall"] = row["dice"] = "0.0"
    assert lost(rows, "two-class") == {("cross-entropy", "s"): [3]}
    assert lost(rows, "binary") == {}
    first, second = claims.of_losses(rows)[:2]
    assert "at 0.5 cross-entropy finds nothing of the s in 1 seed;" in second.measured
    assert "finds nothing" not in first.measured
    assert "AP -0.010" in first.measured
    better = table(lambda task, loss, way, score: 0.05 * (loss == "dice" and score != "ap"))
    assert "average precision" not in claims.of_losses(better)[0].advice
    dear = table(lambda task, loss, way, score: 0.05 * (-1) ** (score == "ap") * (loss == "dice"))
    expected = "The average precision of dice is lower than that of cross-entropy."
    assert claims.of_losses(dear)[0].advice.endswith(expected)


def test_verdicts_on_bounds():
    rows = read_rows(RESULTS / "bounds" / "results.csv")
    assert set(verdicts(claims.of_bounds(rows)).values()) == {SHOWN}
    broken = [{**row, "violations": "1"} if row["measure"] == "jaccard" else row for row in rows]
    assert verdicts(claims.of_bounds(broken))["B1"] == NOT
    assert set(verdicts(claims.of_bounds([])).values()) == {WAITING}


@pytest.mark.parametrize("line", claims.lines(RESULTS), ids=lambda line: line.statement.name)
def test_every_verdict_has_its_advice(line):
    possible = {"bounds": (SHOWN, NOT, WAITING)}.get(
        line.statement.experiment, (SHOWN, ONLY, NOT, FEW, WAITING)
    )
    for verdict in possible:
        if (line.statement.name, verdict) != ("F6", ONLY):  # it has no threshold
            assert claims.Line(line.statement, "", verdict).advice
    assert {claim.name for claim in fusion_page.CLAIMS} == set(claims.FUSION)
