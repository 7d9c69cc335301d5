"""Runs: gone on with to the same bits whenever they die, the best kept, the schedules, the log."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from tests.training.phantom import SECTIONS, write_heads
from voxfuse import cli
from voxfuse._files import write_whole
from voxfuse.training import checkpoints
from voxfuse.training.config import ConfigError, OptimiserOptions, parse, to_toml
from voxfuse.training.networks import UNet
from voxfuse.training.optimisers import forgets, learning_rate, make_optimiser
from voxfuse.training.predict import device_of, load_model
from voxfuse.training.trainer import Trainer, train

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.usefixtures("one_thread")


def config(**changes):
    """The phantoms' configuration, with keys ``section__key`` changed."""
    sections = {name: dict(keys) for name, keys in SECTIONS.items()}
    for place, value in changes.items():
        section, key = place.split("__")
        sections.setdefault(section, {})[key] = value
    return parse(sections)


def quiet(_: str) -> None:
    pass


def log_of(run):
    with (run / "log.csv").open() as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


def assert_same(one, two, where=""):
    """Tensors bit for bit, and all else."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for key in one.keys() - {"seconds"}:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, two), where
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for k, (a, b) in enumerate(zip(one, two, strict=True)):
            assert_same(a, b, f"{where}[{k}]")
    else:
        assert one == two, where


def assert_same_runs(one, two):
    assert log_of(one) == log_of(two)
    for name in ("model.pt", "checkpoint.pt"):
        assert_same(checkpoints.restore(one / name), checkpoints.restore(two / name), name)
    assert (one / "test.csv").read_text() == (two / "test.csv").read_text()
    assert (one / "config.toml").read_text() == (two / "config.toml").read_text()


# Dropout draws from PyTorch's own numbers, a validation chooses the model, rows span checkpoints.
THOROUGH = {
    "network__dropout": 0.2,
    "training__validate_every": 4,
    "data__validation": ["b"],
    "sampling__method": "lesions",
}


def test_simulated_lesions_change_with_the_steps_and_a_run_goes_on_with_the_same(heads, tmp_path):
    wanted = config(augmentation__simulate_every=4, training__steps=8, training__checkpoint_every=3)
    whole = Trainer(wanted, heads, tmp_path / "whole", quiet)
    real = {name: volume.label for name, volume in whole.sampler.volumes.items()}
    seen = []
    for step in (0, 3, 4):
        whole.batch(step)
        seen.append({name: volume.label for name, volume in whole.sampler.volumes.items()})
    for name, label in real.items():
        first, same, other = (labels[name] for labels in seen)
        assert (first[label > 0] == 1).all(), "a real lesion is gone"
        assert first.sum() > label.sum()
        assert np.array_equal(first, same)
        assert not np.array_equal(first, other)
    assert whole.fit()
    assert not train(wanted, heads, tmp_path / "left", stop_at=5)
    assert train(wanted, heads, tmp_path / "left")
    assert_same_runs(tmp_path / "whole", tmp_path / "left")
    wanted = config(augmentation__simulate_every=4, data__images=["flair"])
    with pytest.raises(ConfigError, match="simulate_every: got images flair, expected t1 and any"):
        Trainer(wanted, heads, tmp_path / "x", quiet)


@pytest.mark.parametrize("method", ["balanced", "lesions"])
def test_simulated_lesions_are_drawn_about_in_heads_without_their_own(heads, tmp_path, method):
    healthy = shutil.copytree(heads, tmp_path / "healthy")
    for path in healthy.glob("*/lesions.nii.gz"):
        image = nibabel.load(path)
        empty = np.zeros(image.shape, np.uint8)
        nibabel.save(nibabel.Nifti1Image(empty, image.affine), path)
    wanted = config(augmentation__simulate_every=4, sampling__method=method)
    trainer = Trainer(wanted, healthy, tmp_path / "run", quiet)
    trainer.batch(0)
    assert trainer.sampler.options.method == method
    assert all(trainer.sampler.classes.values())
    with pytest.raises(ValueError, match="no training subject has a voxel of a lesion"):
        Trainer(config(sampling__method=method), healthy, tmp_path / "run", quiet)


def test_a_run_that_is_left_goes_on_to_the_same_bits(heads, tmp_path):
    wanted = config(**THOROUGH)
    assert train(wanted, heads, tmp_path / "whole")
    for stop in (1, 7, 8, 12):
        done = train(wanted, heads, tmp_path / "parts", stop_at=stop)
        torch.manual_seed(stop)  # what else draws numbers does not matter
    assert done
    assert_same_runs(tmp_path / "whole", tmp_path / "parts")
    rows = log_of(tmp_path / "whole")
    assert [row["step"] for row in rows] == ["3", "4", "6", "8", "9", "12"]
    assert [bool(row["validation_dice"]) for row in rows] == [False, True, False, True, False, True]
    assert not list((tmp_path / "parts").glob(".*"))


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
from voxfuse.training.trainer import train
config, data, run = sys.argv[1:]
wait = random.Random(1)
for _ in range(12):
    child = os.fork()
    if child == 0:
        train(config, data, run)
        os._exit(0)
    time.sleep(wait.uniform(0.05, 0.6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
train(config, data, run)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the test forks processes to kill them")
def test_kill_minus_9_at_any_moment_changes_nothing(heads, tmp_path):
    """Twelve processes killed at random moments, checkpoints after every step."""
    wanted = config(**THOROUGH, training__checkpoint_every=1)
    assert train(wanted, heads, tmp_path / "whole")
    (tmp_path / "config.toml").write_text(to_toml(wanted))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    arguments = [tmp_path / "config.toml", heads, tmp_path / "killed"]
    subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLED, *map(str, arguments)],
        check=True, env=environment, capture_output=True,
    )  # fmt: skip
    assert_same_runs(tmp_path / "whole", tmp_path / "killed")


def test_a_file_is_whole_or_the_one_before(tmp_path, monkeypatch):
    """The process dies in the middle of the file, and between its end and its name."""
    path = tmp_path / "checkpoint.pt"
    checkpoints.save(path, {"network": torch.ones(1000)})

    def half(file):
        file.write(b"x" * 100)
        raise KeyboardInterrupt

    def interrupted(*_):
        raise KeyboardInterrupt  # as itself: in the background of a shell the signal is ignored

    with pytest.raises(KeyboardInterrupt):
        write_whole(path, half)
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoints.save(path, {"network": torch.zeros(1000)})
    assert checkpoints.restore(path)["network"].all()
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_run_that_died_in_its_first_file_begins_again(heads, tmp_path):
    (tmp_path / ".config.toml.4711.part").write_text("[tra")
    train(config(), heads, tmp_path, stop_at=1)
    assert not list(tmp_path.glob(".*"))


def test_the_log_is_cut_to_the_checkpoint(tmp_path):
    log = checkpoints.Log(tmp_path / "log.csv", ["step", "loss"])
    log.cut(0)
    for step in (3, 6, 9):
        log.add({"step": step, "loss": step / 2})
    with log.path.open("a") as file:
        file.write("12,")  # killed in the middle of a row
    with log.path.open("a") as file:
        file.write('\n"')
    log.cut(6)
    assert log.path.read_text() == "step,loss\n3,1.5\n6,3.0\n"


def test_files_of_others_are_no_checkpoints(tmp_path):
    path = tmp_path / "model.pt"
    for text in (b"nonsense", b"", b"[data]\n"):
        path.write_bytes(text)
        with pytest.raises(
            ValueError, match="model.pt: cannot be read: is no model or checkpoint$"
        ):
            load_model(path)
    torch.save({"network": {}}, path)
    with pytest.raises(ValueError, match="is no file of voxfuse's training of format 1"):
        load_model(path)
    torch.save({"format": 1, "run": os.system}, path)  # code is not run
    with pytest.raises(
        ValueError, match="cannot be read: holds more than tensors and plain values$"
    ):
        load_model(path)
    with pytest.raises(FileNotFoundError, match="there is no .*voxfuse train writes it"):
        load_model(tmp_path / "nothing")


def test_a_run_is_of_one_configuration_and_one_set_of_scans(heads, tmp_path):
    train(config(), heads, tmp_path / "run", stop_at=2)
    with pytest.raises(ConfigError, match="training.seed: got 1, but the run in .*run has 0"):
        Trainer(config(training__seed=1), heads, tmp_path / "run")
    others = write_heads(tmp_path / "others", ["b", "a", "c"])
    with pytest.raises(ConfigError, match="are others than those that the run"):
        train(config(), others, tmp_path / "run")
    validated = config(data__validation=["b"], training__steps=2)
    scans = write_heads(tmp_path / "scans", ["a", "b", "c"])
    train(validated, scans, tmp_path / "validated", stop_at=1)
    before = (scans / "b/lesions.nii.gz").read_bytes()
    shutil.copy(scans / "a/lesions.nii.gz", scans / "b/lesions.nii.gz")
    with pytest.raises(ConfigError, match="are others than those that the run"):
        train(validated, scans, tmp_path / "validated")
    (scans / "b/lesions.nii.gz").write_bytes(before)
    train(validated, scans, tmp_path / "validated")
    table = tmp_path / "validated/test.csv"
    before = table.read_text()
    shutil.copy(scans / "a/lesions.nii.gz", scans / "c/lesions.nii.gz")
    train(validated, scans, tmp_path / "validated")
    assert table.read_text() != before
    table.write_text("as it was")
    train(validated, scans, tmp_path / "validated")
    assert table.read_text() == "as it was"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").touch()
    with pytest.raises(ConfigError, match="--out: .*full is not empty and no run"):
        Trainer(config(), heads, tmp_path / "full")


def test_a_run_is_of_one_table_of_patients(heads, tmp_path):
    """Patients are drawn, then one of their scans."""
    scans = shutil.copytree(heads, tmp_path / "scans")
    run, table = tmp_path / "run", scans / "who.csv"
    table.write_text("subject,patient\na,p\nb,p\nc,q\n")
    wanted = config(data__groups="who.csv", training__steps=2)
    train(wanted, scans, run, stop_at=1)
    table.write_text("subject,patient\na,p\nb,o\nc,q\n")
    with pytest.raises(ConfigError, match="data.groups: the patients of the subjects in .* others"):
        train(wanted, scans, run)
    checkpoint = checkpoints.restore(run / "checkpoint.pt")
    del checkpoint["groups"]  # as those of older versions
    checkpoints.save(run / "checkpoint.pt", checkpoint)
    assert train(wanted, scans, run)


def test_the_best_model_by_validation_is_kept_and_training_stops_early(
    heads, tmp_path, monkeypatch
):
    scores = iter([0.3, 0.5, 0.4, 0.5, 0.9])
    monkeypatch.setattr(Trainer, "validate", lambda self: next(scores))
    wanted = config(data__validation=["b"], training__validate_every=2, training__patience=2)
    assert train(wanted, heads, tmp_path / "run")
    rows = log_of(tmp_path / "run")
    dice = [row["validation_dice"] for row in rows if row["validation_dice"]]
    assert dice == ["0.3", "0.5", "0.4", "0.5"]
    model = checkpoints.restore(tmp_path / "run/model.pt")
    assert (model["step"], model["score"]) == (4, 0.5)
    assert checkpoints.restore(tmp_path / "run/checkpoint.pt")["progress"]["step"] == 8
    assert train(wanted, heads, tmp_path / "run")  # it is done, and says so again


def test_a_validation_is_the_dice_of_the_prediction(heads, tmp_path):
    trainer = Trainer(config(data__validation=["b"]), heads, tmp_path / "run", quiet)
    with torch.no_grad():
        trainer.network.heads[0].weight.zero_()
        trainer.network.heads[0].bias.copy_(torch.tensor([0.0, 5.0]))
    (volume,) = trainer.validation
    truth, inside = int(volume.label.sum()), int(volume.mask.sum())
    assert trainer.validate() == pytest.approx(2 * truth / (truth + inside), rel=1e-12)


def test_deep_supervision_and_mixed_precision(heads, tmp_path):
    wanted = config(network__deep_supervision=True, training__precision="bfloat16",
                    training__loss_inside_mask=True, network__features=[4, 4, 8])  # fmt: skip
    trainer = Trainer(wanted, heads, tmp_path / "run", quiet)
    trainer.network.train()
    batch = trainer.batch(0)
    with torch.autocast("cpu", torch.bfloat16):
        outputs = trainer.network(batch.image)
    assert [x.shape[-1] for x in outputs] == [16, 8]
    assert outputs[0].dtype == torch.bfloat16
    before = [p.detach().clone() for p in trainer.network.parameters()]
    assert trainer.update(batch, 0).dtype == torch.float32
    assert all((a != b).any() for a, b in zip(before, trainer.network.parameters(), strict=True))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="training.precision: got 'float16' on cpu"):
            Trainer(config(training__precision="float16"), heads, tmp_path / "run", quiet)


class Outputs(torch.nn.Module):
    """A network of as many outputs as it is told, that loses voxels at the border."""

    def __init__(self, in_channels, out_channels, outputs=2, lost=0, listed=False):
        super().__init__()
        self.features = torch.nn.Conv3d(in_channels, 4, 3, padding=1 - lost)
        self.norm = torch.nn.BatchNorm3d(4)
        self.head = torch.nn.Conv3d(4, outputs, 1)
        self.listed = listed

    def forward(self, x):
        x = torch.nn.functional.dropout(self.norm(self.features(x)), training=True)
        return [self.head(x)] * 2 if self.listed else self.head(x)


def test_a_network_with_other_outputs_than_classes_is_named_before_anything_trains(heads, tmp_path):
    def made(**options):
        changes = {f"network__{name}": value for name, value in options.items()}
        wanted = config(**changes, loss__activation="sigmoid")
        del wanted.network.options["features"]
        wanted.network.name = f"{__name__}:Outputs"
        return Trainer(wanted, heads, tmp_path / "run", quiet)

    for options, shape, more in (
        ({"outputs": 1}, "1, 1, 16, 16, 16", "class; with a sigmoid too the background has a chan"),
        ({"outputs": 3, "listed": True}, "1, 3, 16, 16, 16", "class$"),
        ({"lost": 1}, "1, 2, 14, 14, 14", "class$"),
    ):
        expected = r"patch of 16 x .* expected \(1, 2, 16, 16, 16\), a channel a "
        pattern = rf"network.name: .*:Outputs makes \({shape}\) of a {expected}{more}"
        with pytest.raises(ConfigError, match=pattern):
            made(**options)
    assert not (tmp_path / "run").exists()
    state = torch.random.get_rng_state()
    trainer = made(listed=True)
    assert torch.equal(state, torch.random.get_rng_state())
    assert trainer.network.training
    assert not trainer.network.norm.num_batches_tracked


def test_voxels_outside_the_mask_do_not_count_where_the_loss_has_it(heads, tmp_path):
    trainer = Trainer(config(training__loss_inside_mask=True), heads, tmp_path / "run", quiet)
    batch = trainer.batch(0)
    logits = torch.randn(2, 2, 16, 16, 16)
    other = torch.where(batch.mask, logits, torch.randn_like(logits))
    one, two = (trainer.objective(x, batch.label, batch.mask) for x in (logits, other))
    assert not batch.mask.all()
    assert torch.equal(one, two)


def test_a_loss_that_is_not_finite_ends_the_run(heads, tmp_path):
    trainer = Trainer(config(), heads, tmp_path / "run", quiet)
    with torch.no_grad():
        next(trainer.network.parameters()).fill_(float("nan"))
    with pytest.raises(RuntimeError, match="step 1: the loss is nan; A smaller optimiser"):
        trainer.fit()


def test_weights_that_make_no_numbers_are_not_saved(heads, tmp_path):
    """The loss of the one step is finite; what it leaves is not."""
    far = {"optimiser__name": "SGD", "optimiser__learning_rate": 1e38, "data__validation": ["b"]}
    for name, steps in {"validated": 1, "left": 2}.items():
        wanted = config(**far, training__steps=steps)
        with pytest.raises(RuntimeError, match="step 1: .* is not finite; A smaller optimiser"):
            train(wanted, heads, tmp_path / name, stop_at=1)
        assert {path.name for path in (tmp_path / name).iterdir()} == {"config.toml", "log.csv"}
    # The folder is not lost: another configuration may begin there.
    assert train(config(training__steps=1), heads, tmp_path / "left")
    assert checkpoints.restore(tmp_path / "left/model.pt")["config"]["training"]["steps"] == 1
    trainer = Trainer(config(data__validation=["b"]), heads, tmp_path / "run", quiet)
    trainer.fit(stop_at=1)
    with torch.no_grad():
        trainer.network.heads[0].bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="b: the network's probabilities are not finite"):
        trainer.validate()
    with pytest.raises(RuntimeError, match="is from before.* in a new folder"):
        trainer.after(True, trainer.batch(1).image)


def test_schedules():
    decay = OptimiserOptions(learning_rate=1e-3, schedule="decay")  # Hashemi: x 0.95 every 500
    steps = [0, 499, 500, 1000]
    assert [learning_rate(decay, s, 9) for s in steps] == pytest.approx(
        [1e-3, 1e-3, 0.95e-3, 0.95**2 * 1e-3]
    )
    released = OptimiserOptions(learning_rate=1e-3, schedule="released")
    assert learning_rate(released, 0, 9) == pytest.approx(0.95e-3)
    assert [s for s in range(1200) if forgets(released, s)] == [0, 500, 1000]
    assert not any(forgets(decay, s) for s in range(1200))
    polynomial = OptimiserOptions(learning_rate=1.0)
    assert learning_rate(polynomial, 400, 800) == pytest.approx(0.5**0.9)


def test_parameters_without_weight_decay():
    network = UNet(1, 2, (4, 8))
    optimiser = make_optimiser(network, OptimiserOptions(undecayed=["bias$", r"down\.0\.1\."]))
    decayed, free = optimiser.param_groups
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)
    chosen = {id(p) for name, p in network.named_parameters()
              if name.endswith("bias") or name.startswith("down.0.1.")}  # fmt: skip
    assert {id(p) for p in free["params"]} == chosen
    with pytest.raises(ConfigError, match="'batchnorm' matches none of the parameters down.0.0.w"):
        make_optimiser(network, OptimiserOptions(undecayed=["batchnorm"]))
    sgd = make_optimiser(network, OptimiserOptions("SGD", momentum=0.9))
    assert sgd.defaults["nesterov"]


def test_patches_for_two_updates(heads, tmp_path):
    trainer = Trainer(config(training__updates_per_patch=2), heads, tmp_path / "run", quiet)
    images = [trainer.batch(step).image for step in range(4)]
    assert torch.equal(images[0], images[1])
    assert not torch.equal(images[1], images[2])
    assert torch.equal(images[2], images[3])


def test_a_prediction_overwrites_no_scan_that_it_reads(heads, tmp_path, capsys):
    made = config(data__images=["flair"], data__test=[], training__steps=1)
    train(made, heads, tmp_path / "run")
    flat = tmp_path / "flat"
    flat.mkdir()
    for name in "ab":
        shutil.copy(heads / name / "flair.nii.gz", flat / f"{name}.nii.gz")
    shutil.copy(heads / "a/flair.nii.gz", flat / "a_probabilities.nii.gz")
    shutil.copytree(heads / "c", tmp_path / "c")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")}
    one = flat / "a.nii.gz"

    def predict(scans, output, *more):
        command = ["predict", "--model", tmp_path / "run", "--input", scans, "--output", output]
        status = cli.main([str(word) for word in (*command, *more)])
        return status, capsys.readouterr().err

    for scans, output in (
        (flat, flat),
        (one, one),
        (tmp_path / "c", tmp_path / "c/lesions.nii.gz"),
    ):
        status, error = predict(scans, output)
        assert (status, "is an image, mask or label of a subject" in error) == (1, True)
    assert predict(flat, tmp_path / "o.mgz") == (
        1, f"voxfuse predict: --output: got {tmp_path / 'o.mgz'}, expected a folder or a file "
        ".nii.gz or .nii\n",
    )  # fmt: skip
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")} == before
    output = tmp_path / "out/a.nii.gz"
    assert predict(one, output, "--probabilities") == (0, "")
    assert sorted(path.name for path in output.parent.iterdir()) == [
        "a.nii.gz", "a_probabilities.nii.gz",
    ]  # fmt: skip
    assert predict(one, output.parent / "a.nii") == (0, "")
    packed, plain = (nibabel.load(output.parent / name) for name in ("a.nii.gz", "a.nii"))
    assert packed.get_fdata().tobytes() == plain.get_fdata().tobytes()


def test_a_device_that_is_not_there_and_a_sigmoid_of_several_labels_are_named(heads, tmp_path):
    with pytest.raises(ValueError, match="training.device: got 'cdua', expected auto, cpu, cuda"):
        Trainer(config(training__device="cdua"), heads, tmp_path / "run", quiet)
    with pytest.raises(ValueError, match=r"device: got 'cuda:99', but PyTorch .* sees \d+ GPUs"):
        device_of("cuda:99", "device")
    labels = {"background": 0, "lesion": 1, "other": 2}
    with pytest.raises(ConfigError, match="loss.ignore_index: got 1, .* 'ignore' in data.labels"):
        Trainer(config(loss__ignore_index=1), heads, tmp_path / "run", quiet)
    several = config(data__labels=labels, loss__name="BCELoss")
    with pytest.raises(ConfigError, match="loss.activation: got 'sigmoid' for 2 labels"):
        Trainer(several, heads, tmp_path / "run", quiet)
    assert not (tmp_path / "run").exists()
