"""Runs are done once and whole, whoever else is at them and whenever a process dies."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from voxfuse.cli import main
from voxfuse.experiments import lesions, losses, tables
from voxfuse.experiments.experiment import Experiment, Finished, Place, carry_out
from voxfuse.experiments.registry import EXPERIMENTS, find
from voxfuse.experiments.results import Results, claim

KEY, COLUMNS = ("loss", "seed"), ("loss", "seed", "subject", "dice")


def _rows(run, place):
    place.say(f"training {run['seed']}")
    return [{**run, "subject": subject, "dice": 1 / 3} for subject in "ab"]


def _experiment(rows=_rows, seeds=3):
    return Experiment(
        name="little",
        title="A little one",
        key=KEY,
        columns=COLUMNS,
        runs=lambda quick: [{"loss": "dice", "seed": seed} for seed in range(seeds)],
        rows=rows,
        pages=lambda done: {"README.md": f"{len(done.runs)} of {len(done.declared)} runs\n"},
    )


@pytest.fixture
def said():
    return []


@pytest.fixture
def place(tmp_path, said):
    return Place(tmp_path, tmp_path / "work", tmp_path / "results", say=said.append)


def test_finished_runs_are_not_done_again(place, said):
    carry_out(_experiment(), place, runs=2)
    assert (place.results / "little" / "README.md").read_text() == "2 of 3 runs\n"
    del said[:]
    carry_out(_experiment(), place)
    assert [line for line in said if line.startswith("training")] == ["training 2"]
    rows = _experiment().results(place).rows()
    assert [row["seed"] for row in rows] == ["0", "0", "1", "1", "2", "2"]
    assert rows[0] == {"loss": "dice", "seed": "0", "subject": "a", "dice": "0.33333"}


def test_a_run_that_fails_leaves_no_row(place):
    def rows(run, place):
        yield from _rows(run, place)
        if run["seed"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        carry_out(_experiment(rows), place)
    assert {row["seed"] for row in _experiment().results(place).rows()} == {"0"}
    carry_out(_experiment(), place)
    assert len(_experiment().results(place).rows()) == 6


def test_rows_that_a_killed_process_left_are_replaced(place):
    results = _experiment().results(place)
    results.add({"loss": "dice", "seed": 0}, _rows({"loss": "dice", "seed": 0}, place), 1.0)
    (results.folder / "runs.csv").unlink()  # it died between the two files
    carry_out(_experiment(), place)
    assert len(results.rows()) == 6


def test_a_run_that_another_process_is_at_is_left_to_it(place):
    path = place.work / "little" / "claims" / "dice_1"
    code = (
        "import sys; from pathlib import Path; from voxfuse.experiments.results import claim\n"
        "with claim(Path(sys.argv[1])) as mine: print(mine, flush=True); sys.stdin.read()"
    )
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "True\n"
        assert _experiment().do(place) == 2
        other.kill()
    with claim(path) as mine:
        assert mine
    assert _experiment().do(place) == 1


def test_results_refuse_what_is_not_the_runs(tmp_path):
    results = Results(tmp_path / "x", KEY, COLUMNS)
    run = {"loss": "dice", "seed": 0}
    for wrong in ({**run, "subject": "a"}, {**run, "seed": 1, "subject": "a", "dice": 1.0}):
        with pytest.raises(ValueError, match="rows: got"):
            results.add(run, [wrong], 1.0)
    results.add(run, [], 1.0)
    with pytest.raises(ValueError, match="done already"):
        results.add(run, [], 1.0)


@pytest.mark.parametrize("name", EXPERIMENTS)
@pytest.mark.parametrize("quick", [False, True])
def test_declared_runs_have_names_of_their_own(name, quick):
    experiment = find(name)
    runs = experiment.runs(quick)
    assert len({experiment.named(run) for run in runs}) == len(runs) > 0
    assert all(set(run) == set(experiment.key) <= set(experiment.columns) for run in runs)


def test_losses_of_a_seed_are_pairs_and_seeds_are_not_cut():
    """Whatever is cut from the end, the losses of the seeds before are complete."""
    runs = losses.runs(False)
    assert len(runs) == 95
    first = [(run["task"], run["seed"], run["loss"]) for run in runs[:70]]
    assert first == [
        (task, seed, loss)
        for task in losses.TASKS
        for seed in losses.SEEDS
        for loss in losses.PRIMARY
    ]


def test_the_subjects_of_losses_are_those_committed(request):
    path = request.config.rootpath / "docs/experiments/losses/subjects.csv"
    with path.open(newline="") as file:
        committed = list(csv.DictReader(file))
    found = losses.parts([row["subject"] for row in committed])
    assert {row["subject"]: row["part"] for row in committed} == {
        name: part for part, names in found.items() for name in names
    }
    assert {part: len(names) for part, names in found.items()} == losses.PARTS
    with pytest.raises(ValueError, match="got 3 hippocampi, expected 200"):
        losses.parts(["a", "b", "c"])


def test_one_run_of_the_quick_losses(tmp_path, hippocampi):
    command = ["experiment", "losses", "--quick", "--runs", "1"]
    folders = ["--data", str(hippocampi.parent), "--work", str(tmp_path)]
    assert main([*command, *folders]) == 0
    results = find("losses").results(Place(hippocampi, tmp_path, tmp_path / "quick" / "results"))
    assert len(results.runs()) == 1
    rows = results.rows()
    assert {row["threshold"] for row in rows} == {"0.5", "tuned-dice", "tuned-f2"}
    assert {row["split"] for row in rows} == {"validation", "test"}
    for row in rows:
        tp, fp, fn = (int(row[name]) for name in ("tp", "fp", "fn"))
        if row["split"] == "test":
            assert float(row["dice"]) == pytest.approx(2 * tp / (2 * tp + fp + fn), abs=1e-5)
    assert (results.folder / "README.md").is_file()


def test_what_fails_in_processes_is_told_in_a_line(tmp_path, capfd):
    folders = ["--data", str(tmp_path), "--work", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main(["experiment", "losses", "--jobs", "2", *folders]) == 1
    told = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("losses:")]
    assert [line.split(": ")[0] for line in told] == ["voxfuse experiment"] * 3
    assert str(tmp_path) in told[0]
    assert told[2].endswith("losses: 2 of 2 processes failed")


def test_processes_do_what_is_left_and_one_page(tmp_path):
    folders = ["--work", str(tmp_path), "--quick"]
    assert main(["experiment", "bounds", "--jobs", "2", "--runs", "1", *folders]) == 0
    results = tmp_path / "quick" / "results"
    assert len((results / "bounds" / "runs.csv").read_text().splitlines()) == 2
    assert (results / "README.md").is_file()


def test_an_unknown_experiment_is_named(capsys):
    assert main(["experiment", "loses"]) == 1
    expected = f"NAME: got 'loses', expected one of {', '.join(EXPERIMENTS)}"
    assert expected in capsys.readouterr().err


def test_nobody_who_is_tested_gives_lesions_to_training():
    """Neither the scans' own masks nor those that the tuning heads get."""
    assert set(lesions.OWN) == {name for fold in lesions.FOLDS for name in fold if "lesjak" in name}
    assert not set(lesions.OWN) & set(lesions.TUNING)
    assert not set(lesions.FOLDS[0]) & set(lesions.FOLDS[1])
    runs = lesions.runs(False)
    assert len(runs) == 55
    assert [run["seed"] for run in runs[:30]] == sorted(run["seed"] for run in runs[:30])


def test_masks_that_enrich_training_are_of_others(tmp_path, ms_lesions):
    place = Place(ms_lesions.parent, tmp_path, tmp_path)
    lesions.link_masks(place)
    lesions.link_masks(place)  # what is there is left alone
    paths = list((tmp_path / "lesions" / "data" / "masks").iterdir())
    masks = {path.name.split(".")[0] for path in paths}
    assert len(masks) == len(paths) == 20
    assert all(path.is_file() for path in paths)
    assert not masks & {*lesions.OWN, *lesions.TUNING}


def _finished(name, task, structures, subjects, dice):
    """Rows of an experiment with given Dice by (loss, threshold), seed and subject."""
    experiment, rows = find(name), []
    for (loss, way), values in dice.items():
        for seed, of_seed in enumerate(values):
            for subject, value in zip(subjects, of_seed, strict=True):
                row = dict.fromkeys(experiment.columns, "")
                row |= {"task": task, "loss": loss, "seed": str(seed), "fold": "0"}
                row |= {"split": "test", "subject": subject, "threshold": way, "level": "0.5"}
                row |= dict.fromkeys(("recall", "precision", "f2", "ap"), "0.25")
                row |= dict.fromkeys(("tp", "fp", "fn"), "1")
                for k, structure in enumerate(structures):
                    wanted = value + (0.125, -0.125)[k] if len(structures) > 1 else value
                    rows.append({**row, "structure": structure, "dice": str(wanted)})
    return Finished(rows, [], experiment.runs(False), Path())


def test_the_page_of_losses_has_means_and_differences_of_pairs():
    """The mean over structures, seeds and subjects; differences over the seeds that both have."""
    ways = ("0.5", "tuned-dice", "tuned-f2", "argmax")
    dice = {("dice", way): [[0.5, 0.7], [0.6, 0.8]] for way in ways}
    dice |= {("jaccard", way): [[0.25, 0.45]] for way in ways}
    finished = _finished("losses", "two-class", ("anterior", "posterior"), "ab", dice)
    page = losses.pages(finished)["README.md"]
    assert "| dice | 2 | 0.250 | 0.250 | 0.650 |" in page
    assert "| jaccard | 1 | 0.250 | 0.250 | 0.350 |" in page
    assert "| jaccard | 1 | -0.250 (-0.250 to -0.250) |" in page
    assert "0 of 95 runs" in page
    assert "## Binary" not in page


def test_the_page_of_lesions_averages_scans_of_a_patient():
    ways = ("0.5", "tuned-dice", "tuned-f2", "semireal-dice", "semireal-f2")
    scans = ("lesjak07", "mslessegP14-1", "mslessegP14-2")
    dice = {("dice", way): [[0.6, 0.1, 0.3]] for way in ways}
    dice |= {("cross-entropy", way): [[0.4, 0.1, 0.1]] for way in ways}
    finished = _finished("lesions", "lesion", ("lesion",), scans, dice)
    sizes = _finished("lesions", "lesion", ("lesions < 10 mm3",), scans, dice)
    finished.rows.extend(sizes.rows)
    page = lesions.pages(finished)["README.md"]
    assert "| dice | 1 | 0.250 | 0.250 | 0.400 |" in page
    assert "| cross-entropy | 1 | -0.150 (-0.785 to +0.485), one seed, 0 of 2 patients" in page
    assert "| dice | 1 | 3 of 6, 3 false | 3 of 6, 3 false |" in page


def test_pages_tell_what_tuning_does_and_which_thresholds_it_chose():
    dice = {("dice", "0.5"): [[0.5, 0.7], [0.6, 0.8]], ("dice", "tuned-f2"): [[0.5, 0.5]] * 2}
    dice |= {("dice", "tuned-dice"): [[0.6, 0.8], [0.7, 0.9]]}
    rows = _finished("losses", "binary", ("hippocampus",), "ab", dice).rows
    scores = tables.Scores(rows, "binary")
    assert "| dice | 2 | +0.100 (+0.100 to +0.100) |" in tables.tuning(scores)
    chosen = {("0", "tuned-dice"): "0.3", ("1", "tuned-dice"): "0.9999", ("0", "tuned-f2"): "0.1"}
    for row in rows:
        row["level"] = chosen.get((row["seed"], row["threshold"]), "0.2")
    told = tables.levels(scores, rows, "binary", ("hippocampus",))
    line = "| dice | 0.65 (0.3 to 0.9999), 1 of 2 an end of the range | 0.15 (0.1 to 0.2) |"
    assert told.splitlines()[-1] == line
    of = lambda row: row["subject"]  # noqa: E731
    by_subject = tables.levels(scores, rows, "binary", ("hippocampus",), of=of)
    assert "2 of 4 an end of the range" in by_subject
    assert not tables.levels(scores, rows, "binary", ("amygdala",))
