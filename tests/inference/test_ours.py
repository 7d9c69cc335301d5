"""What is another's stays: files and labels are replaced only where they are known to be ours."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.inference.test_studies import intensities, predict, read, write
from voxfuse.inference import night, request
from voxfuse.inference.models import load_network
from voxfuse.inference.night import Target, nameless, said
from voxfuse.inference.plan import plan_of
from voxfuse.inference.reading import find_studies
from voxfuse.inference.request import Request, prepare
from voxfuse.training import checkpoints
from voxfuse.training.dataset import Subject
from voxfuse.training.networks import make_network
from voxfuse.training.predict import load_model

ROOT = Path(__file__).resolve().parents[2]
PATCH = ["--patch", 16, "--quiet"]


def test_a_file_is_replaced_only_if_its_status_says_that_it_is_ours(tmp_path, capsys):
    truth = intensities()
    scan = write(tmp_path / "in/a.nii.gz", truth)
    write(tmp_path / "in/b.nii.gz", truth)
    out = tmp_path / "out"
    label = write(out / "a.nii.gz", truth * 7)

    def run(*options):
        status = predict("above_half", tmp_path / "in", out, *PATCH, *options)
        return status, capsys.readouterr().err

    def refused(*options):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        status, error = run(*options)
        assert (status, "expected another place, or --overwrite" in error) == (1, True), error
        assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
        return error

    assert "out/a.nii.gz is not as the status tells" in refused()
    assert run("--skip-existing") == (0, "")  # kept, since nothing is known of it
    assert (read(label) == truth * 7).all()
    assert run("--overwrite") == (0, "")
    assert (read(label) == truth).all()
    assert run("--probabilities") == (0, "")  # ours
    assert run("--probabilities") == (0, "")
    assert run() == (0, "")  # ours are the probabilities too, still
    assert run("--probabilities") == (0, "")

    # A study that fails takes nothing of this away.
    whole = scan.read_bytes()
    scan.write_bytes(whole[:-100])
    assert run()[0] == 3
    scan.write_bytes(whole)
    assert run("--probabilities") == (0, "")
    (out / ".a.nii.gz.0123.part").write_bytes(b"killed")
    (out / ".a.nii.gz.4567.part").mkdir()
    assert run("--skip-existing") == (0, "")
    assert not list(out.rglob("*.part"))

    # Another number of patches a call does not begin anew; a mask is corrected by hand.
    stamps = [path.stat().st_mtime_ns for path in out.glob("*.nii.gz")]
    assert run("--skip-existing", "--batch", 3) == (0, "")
    assert [path.stat().st_mtime_ns for path in out.glob("*.nii.gz")] == stamps
    write(label, truth * 3)
    refused()
    refused("--skip-existing")
    assert run("--overwrite") == (0, "")
    (out / "summary.json").write_text('{"foreground_mean": {}}')
    assert "out/summary.json is not" in refused()


@pytest.mark.parametrize("more", [[], ["--probabilities"]])
def test_a_night_that_is_killed_while_it_writes_leaves_nothing_unknown(
    tmp_path, capsys, monkeypatch, more
):
    """Wherever it is: the next one goes on, and replaces no mask that was corrected since."""
    write(tmp_path / "in/a.nii.gz", intensities())
    out, moments = tmp_path / "out", []
    assert predict("above_half", tmp_path / "in", out, *PATCH, "--probabilities") == 0

    def around(function):
        def kept(*arguments):
            for step in (lambda: None, lambda: function(*arguments)):
                step()
                moments.append(tmp_path / f"moment{len(moments)}")
                shutil.copytree(out, moments[-1])

        return kept

    for name in ("move_file", "write_text"):
        monkeypatch.setattr(night, name, around(getattr(night, name)))
    options = [*PATCH, "--normalize", "0:1.2", *more]
    assert predict("above_half", tmp_path / "in", out, *options) == 0
    monkeypatch.undo()
    assert len(moments) == 6 + 2 * len(more)
    expected = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    assert len(expected) == 1 + len(more)
    for k, moment in enumerate(moments):
        killed = shutil.copytree(moment, tmp_path / f"killed{k}")
        again = predict("above_half", tmp_path / "in", killed, *options, "--skip-existing")
        assert (again, capsys.readouterr().err) == (0, "")
        assert {path.name: path.read_bytes() for path in killed.glob("*.nii.gz")} == expected
        assert not list(killed.rglob("*.part/*"))
        corrected = write(moment / "a.nii.gz", intensities() * 7)
        assert predict("above_half", tmp_path / "in", moment, *options, "--skip-existing") == 1
        assert "a.nii.gz is not as the status tells" in capsys.readouterr().err
        assert (read(corrected) == intensities() * 7).all()


def test_another_study_of_the_same_name_replaces_nothing(tmp_path, capsys):
    """As of patients whose folders have the same names of files."""
    truths = {name: intensities(seed=k) for k, name in enumerate(("p1", "p2"))}
    scans = {name: write(tmp_path / name / "FLAIR.nii.gz", x) for name, x in truths.items()}
    first, out = scans["p1"], tmp_path / "out"
    label, beside = out / "FLAIR.nii.gz", out / "FLAIR_probabilities.nii.gz"

    def run(scan, *options, model="above_half"):
        return predict(model, scan, out, *PATCH, *options), capsys.readouterr().err

    def refused(*options):
        before = {p: p.read_bytes() for p in (label, out / "status/FLAIR.json")}
        status, error = run(scans["p2"], *options)
        assert (status, "FLAIR.nii.gz is, by its status, of other images" in error) == (1, True)
        assert {p: p.read_bytes() for p in before} == before

    assert run(first, "--probabilities") == (0, "")
    refused()
    refused("--skip-existing")
    whole = first.read_bytes()
    first.write_bytes(whole[:-100])
    assert run(first)[0] == 1  # as it cannot be read, which takes nothing away
    refused()
    first.write_bytes(whole)
    assert run(first, "--threshold", 0.4) == (0, "")  # the same study
    assert not beside.exists()  # they would be another threshold's
    # Of a study of more channels these images are a part.
    blank = write(tmp_path / "blank.nii.gz", truths["p1"] * 0)
    assert run([blank, first], model="of_two_channels") == (0, "")
    assert run(first, "--probabilities") == (0, "")
    assert run(scans["p2"], "--overwrite") == (0, "")
    assert (read(label) == truths["p2"]).all()
    assert not beside.exists()
    segment = Target(out / "FLAIR.dcm", status=out / "status/FLAIR.json")  # beside the other format
    assert segment.is_of_others(["sha256:0"])
    label.unlink()
    assert not segment.is_of_others(["sha256:0"])


@pytest.mark.parametrize("output", ["out", "out/a.nii.gz"])
@pytest.mark.parametrize("full", ["_probabilities.nii.gz", "a.nii.gz"])
def test_a_study_that_is_not_written_whole_leaves_what_was_there(
    tmp_path, monkeypatch, output, full
):
    """As on a full disk: probabilities are no other labels' than those beside them."""
    scan = write(tmp_path / "in/a.nii.gz", intensities())
    out = tmp_path / "out"
    options = [*PATCH, "--probabilities", "--overwrite"]
    assert predict("above_half", scan, tmp_path / output, *options) == 0
    before = {path.name: path.read_bytes() for path in out.glob("*.nii.gz")}
    assert len(before) == 2
    own = request.save_like

    def save_like(array, placement, path, comment=""):
        if path.name.endswith(full):
            raise OSError(28, "No space left on device", str(path))
        own(array, placement, path, comment)

    monkeypatch.setattr(request, "save_like", save_like)
    other = ["--normalize", "0:3", "--threshold", 0.9]
    assert predict("above_half", scan, tmp_path / output, *options, *other) == 1
    assert {path.name: path.read_bytes() for path in out.glob("*.nii.gz")} == before
    assert not list(out.rglob("*.part"))


def test_one_file_is_replaced_only_where_that_is_said(tmp_path, capsys):
    scan = write(tmp_path / "a_0000.nii.gz", intensities())
    label = write(tmp_path / "a.nii.gz", intensities() * 5)
    before = label.read_bytes()
    for output in (label, tmp_path):  # by its name, and by the study's
        assert predict("above_half", scan, output, *PATCH) == 1
        assert "a.nii.gz " in (error := capsys.readouterr().err)
        assert "expected another place, or --overwrite" in error
        assert label.read_bytes() == before
    assert predict("above_half", scan, label, *PATCH, "--skip-existing") == 1
    assert "--skip-existing: got --output" in capsys.readouterr().err
    assert predict("above_half", scan, label, *PATCH, "--overwrite") == 0
    assert (read(label) == intensities()).all()


def test_an_output_that_cannot_be_written_is_noticed_before(tmp_path, capsys):
    write(tmp_path / "in/a.nii.gz", intensities())
    (tmp_path / "out").write_text("a file")
    assert predict("interrupted", tmp_path / "in", tmp_path / "out", *PATCH) == 1
    assert "--output: nothing can be written to" in capsys.readouterr().err


def test_an_interrupted_night_says_so(tmp_path, capsys):
    write(tmp_path / "in/a.nii.gz", intensities() * 0)
    write(tmp_path / "in/b.nii.gz", intensities())
    assert predict("interrupted", tmp_path / "in", tmp_path / "out", *PATCH) == 130
    assert capsys.readouterr().err == "voxfuse predict: interrupted\n"
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["of"], summary["finished"], summary["done"]) == (2, False, 0)


def test_probabilities_that_are_taken_for_logits_are_noticed(tmp_path, capsys):
    scan = write(tmp_path / "in/a.nii.gz", intensities())
    for options, count in (([], 1), (["--activation", "identity"], 0)):
        out = tmp_path / f"out{count}"
        assert predict("probabilities", scan.parent, out, "--patch", 16, *options) == 0
        error = capsys.readouterr().err
        assert error.count("--activation identity is right, not sigmoid") == count
        assert ("note" in json.loads((out / "status/a.json").read_text())) == bool(count)
    assert (read(tmp_path / "out0/a.nii.gz") == intensities()).all()


def test_no_study_of_a_folder_is_left_out_without_a_word(tmp_path):
    for name in ("in/all", "in/b", "in/p1/flair", "in/.hidden/x"):
        write(tmp_path / f"{name}.nii.gz", intensities())
    with pytest.warns(UserWarning, match=r"in: left out: p1, folders of images beside studies$"):
        found = find_studies([tmp_path / "in"])
    assert [study.name for study in found] == ["all", "b"]  # no file is called by --mask all


@pytest.mark.parametrize("kind", ["network", "run"])
def test_capitals_and_links_to_nothing_are_studies(tmp_path, capsys, kind):
    """Content of git-annex that was not fetched is such a link."""
    for name in ("a", "b"):
        write(tmp_path / f"in/{name}.nii.gz", intensities(levels=3))
    (tmp_path / "in/b.nii.gz").rename(tmp_path / "in/b.NII.GZ")
    (tmp_path / "in/c.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    out = tmp_path / "out"
    if kind == "run":
        save_run(tmp_path)
        assert predict(tmp_path / "model.pt", tmp_path / "in", out, "--quiet") == 3
    else:
        assert predict("above_half", tmp_path / "in", out, *PATCH) == 3
    assert re.search(r"1 of 3 failed:\n  c: .*in/c.nii.gz", capsys.readouterr().err)
    assert sorted(path.name for path in out.glob("*.gz")) == ["a.nii.gz", "b.nii.gz"]
    write(tmp_path / "in/b.nii.gz", intensities())
    assert predict("above_half", tmp_path / "in", out, *PATCH) == 1
    assert "b.NII.GZ and b.nii.gz in" in capsys.readouterr().err


def test_numbers_are_channels_where_they_count_from_0(tmp_path):
    def names(*files):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        for file in files:
            (folder / f"{file}.nii.gz").touch()
        found = find_studies([folder])
        return {s.name: [p.name.removesuffix(".nii.gz") for p in s.images] for s in found}

    years = ("scan_2021", "scan_2022")
    assert names(*years) == {name: [name] for name in years}
    patients = ("case_0001", "case_0002")
    assert names(*patients) == {name: [name] for name in patients}
    assert names("case_0007") == {"case_0007": ["case_0007"]}
    assert names("a_0000", "b_0000") == {"a": ["a_0000"], "b": ["b_0000"]}
    both = {"a": ["a_0000", "a_0001"], "b": ["b_0000", "b_0001"]}  # b's second is not there
    assert names("a_0000", "a_0001", "b_0000") == both
    one = tmp_path / "2/case_0007.nii.gz"
    assert [study.name for study in find_studies([one])] == ["case_0007"]


def test_a_mask_is_of_one_study(tmp_path):
    for name in ("a", "b", "brain"):
        (tmp_path / f"{name}.nii.gz").touch()
    with pytest.raises(ValueError, match=r"--mask: got 'brain', .*brain.nii.gz, for a and b, exp"):
        find_studies([tmp_path], "brain")
    (tmp_path / "b.nii.gz").unlink()
    assert find_studies([tmp_path], "brain")[0].mask == tmp_path / "brain.nii.gz"


def save_run(folder, name="unet", images=("flair",)):
    """A run's model, as it is before it is trained."""
    options = {"features": [4, 8]}
    content = {
        "kind": "patches",
        "config": {"network": {"name": name, **options}, "sampling": {"patch": [16, 16, 16]}},
        "images": list(images),
        "labels": {"background": 0, "lesions": 1},
        "step": 3,
        "network": make_network(name, len(images), 2, options).state_dict(),
    }
    checkpoints.save(folder / "model.pt", content)


def test_a_run_that_names_code_is_trusted_or_refused(tmp_path, capsys):
    name = "voxfuse.training.networks.unet:UNet"
    save_run(tmp_path, name)
    scan = write(tmp_path / "scan.nii.gz", intensities())
    assert predict(tmp_path, scan, tmp_path / "out.nii.gz") == 1
    error = capsys.readouterr().err
    assert f"names the network '{name}', a module that is imported" in error
    assert "--trust-model says that you know" in error
    assert load_model(tmp_path, "cpu", trust=True).step == 3
    checkpoints.save(tmp_path / "model.pt", {"kind": "patches", "step": 1})
    with pytest.raises(ValueError, match="is no model: it has no config, images, labels, network"):
        load_model(tmp_path)


def test_models_of_older_versions_load(tmp_path):
    """Their labels may be in any order, and they do not say which channels they left out."""
    save_run(tmp_path)
    content = checkpoints.restore(tmp_path / "model.pt")
    shuffled = {"core": 4, "lesion": 1, "background": 0}
    for images, unused in (([], ()), (["flair"], None)):
        data = {"labels": shuffled, "images": images}
        old = {**content, "config": {**content["config"], "data": data}, "channels": [0]}
        old["labels"] = shuffled
        old["network"] = make_network("unet", 1, 3, {"features": [4, 8]}).state_dict()
        checkpoints.save(tmp_path / "model.pt", old)
        model = load_model(tmp_path, "cpu")
        assert list(model.labels.items()) == [("background", 0), ("lesion", 1), ("core", 4)]
        assert model.config.data.labels == shuffled
        assert model.unused_channels == unused


def test_a_case_that_lacks_a_modality_stops_no_other(tmp_path, capsys):
    save_run(tmp_path, images=["flair", "t1"])
    for name in ("a_0000", "a_0001", "b_0000", "c_0000", "c_0001"):
        write(tmp_path / f"in/{name}.nii.gz", intensities(levels=3))
    model, out = str(tmp_path / "model.pt"), tmp_path / "out"
    assert predict(model, tmp_path / "in", out) == 3
    assert re.search(r"1 of 3 failed:\n  b: .*b_0001.nii.gz", capsys.readouterr().err)
    assert sorted(path.name for path in out.glob("*.gz")) == ["a.nii.gz", "c.nii.gz"]
    for name in ("p1/flair", "p1/t1", "p2/FLAIR", "p2/T1"):
        write(tmp_path / f"folders/{name}.nii.gz", intensities(levels=3))
    assert predict(model, tmp_path / "folders", tmp_path / "of_folders") == 3
    pattern = r"1 of 2 failed:\n  p2: p2: .*flair.nii.gz is missing; there is one in another spell"
    assert re.search(pattern, capsys.readouterr().err)
    # What is compared with the machine's memory has the network in it.
    job = prepare(Request(model, [tmp_path / "in"], tmp_path / "other"))
    assert job.first.seconds > 0
    assert plan_of(job, job.first).memory["network"] == job.first.network


def test_code_of_a_model_imports_what_lies_beside_it_and_replaces_nothing(tmp_path):
    (tmp_path / "beside.py").write_text("import torch\nnetwork = torch.nn.Conv3d(1, 1, 1)\n")
    lazy = "def network():\n    import beside\n    return beside.network\n"
    (tmp_path / "json.py").write_text(lazy)
    assert load_network(f"{tmp_path / 'json.py'}:network", "cpu").kind == "module"
    assert sys.modules["json"] is json


def test_a_process_that_goes_on_loads_code_as_it_is_now(tmp_path):
    """As a worker of Dask does, for one command after the other."""
    model = "import torch, pack.values\nclass Scaled(torch.nn.Module):\n"
    model += "    def forward(self, x):\n        return x * pack.values.SCALE\n"
    model += "def network(): return Scaled()\n"
    digests = []
    for folder, scale, with_init in (("a", 1, False), ("b", 20, False), ("b", 300, True)):
        pack = tmp_path / folder / "pack"
        pack.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / "model.py").write_text(model)
        (pack / "values.py").write_text(f"SCALE = {scale}\n")
        if with_init:
            (pack / "__init__.py").touch()
        loaded = load_network(f"{tmp_path / folder / 'model.py'}:network", "cpu")
        assert float(loaded(torch.ones(1, 1, 2, 2, 2)).max()) == scale
        digests.append(loaded.digest)
    assert len(set(digests)) == 3  # though they have the same weights, none
    again = load_network(f"{tmp_path / 'b/model.py'}:network", "cpu")
    assert again.digest == digests[-1]
    named = load_network(f"{tmp_path / 'b/model.py'}:network", "cpu", identity="mine")
    assert named.digest == "mine"


def test_a_name_is_taken_out_as_a_word():
    study = Subject("1", (Path("/data/1.nii.gz"),), None)
    assert nameless("1: nan at (11, 2)", study) == "the study: nan at (11, 2)"
    assert nameless("/data/1.nii.gz has nan", study) == "image 0 has nan"
    inside = Subject("jane", (Path("in/jane.nii.gz"),), None)
    assert nameless("in/jane.nii.gz contains nan", inside) == "image 0 contains nan"
    assert nameless("jane_flair: nan in 'in/x'", inside) == "the study_flair: nan in 'its folder/x'"


@pytest.mark.parametrize("folder", ["out", "", "/data/masks"])
def test_where_a_result_goes_is_taken_out_too(folder):
    study = Subject("jane", (Path("in/jane.nii.gz"),), None)
    place = Path(folder)
    beside, status = place / "jane_probabilities.nii.gz", place / "status/jane.json"
    target = Target(place / "jane.nii.gz", beside, status)
    part = f"{'0' * 32}.part"
    for path, expected in (
        (target.path, "the output"),
        (beside, "the probabilities"),
        (status, "the status"),
        (beside.absolute(), "the probabilities"),
        (place / f".jane.nii.gz.{part}", "the output"),
        (place / f".jane.nii.gz.{part}/jane.nii.gz", "the output"),
        (place / f".jane.nii.gz.{part}/.jane_probabilities.nii.gz.{part}", "the probabilities"),
        (place / f"status/.jane.json.{part}", "the status"),
    ):
        error = said(OSError(28, "No space left on device", str(path)))
        expected = f"[Errno 28] No space left on device: '{expected}'"
        assert nameless(error, study, target) == expected


@pytest.mark.parametrize(
    ("full", "what"), [("jane.nii.gz", "output"), ("jane_probabilities.nii.gz", "probabilities")]
)
def test_the_status_of_a_full_disk_has_no_path(tmp_path, monkeypatch, full, what):
    write(tmp_path / "in/jane.nii.gz", intensities())
    monkeypatch.chdir(tmp_path)
    own = request.save_like

    def save_like(array, placement, path, comment=""):
        if path.name == full:
            raise OSError(28, "No space left on device", str(path))
        own(array, placement, path, comment)

    monkeypatch.setattr(request, "save_like", save_like)
    assert predict("above_half", "in", "out", *PATCH, "--probabilities") == 1
    found = json.loads((tmp_path / "out/status/jane.json").read_text())
    assert found["error"] == f"[Errno 28] No space left on device: 'the {what}'"


def test_array_tasks_have_their_shards_when_some_are_done_again(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("the script is for SLURM, and needs flock")
    command = tmp_path / "bin/voxfuse"
    command.parent.mkdir()
    command.write_text('#!/bin/bash\necho "$@" >> calls\n')
    command.chmod(0o755)
    variables = {
        "PATH": f"{command.parent}:{os.environ['PATH']}", "MODEL": "m.pt2", "VOLUME": "in.zarr",
        "OUT": "out.zarr", "SHARDS": "16", "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_COUNT": "2",
    }  # fmt: skip
    script = ["bash", str(ROOT / "examples/predict.sbatch")]
    subprocess.run(script, cwd=tmp_path, env=variables, check=True)
    prepared, predicted = (tmp_path / "calls").read_text().splitlines()
    assert prepared.endswith("--prepare 16 --foreground 0")
    assert predicted.endswith("--output out.zarr --overlap 0.5 --shard 7/16")
