"""Configurations: what is wrong is named with what is near, and what is written is read back."""

from __future__ import annotations

import dataclasses

import pytest

from voxfuse import cli
from voxfuse.training.config import Config, ConfigError, load, parse, to_toml
from voxfuse.training.initial import initial_config
from voxfuse.training.objective import LOSSES, Objective


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"trainning": {}}, r"\[trainning\]: no such section, .*; did you mean training\?"),
        ({"training": {"step": 5}}, r"training.step: no such key; did you mean steps\?"),
        ({"training": {"steps": "5"}}, "training.steps: got '5', expected an integer"),
        ({"training": {"steps": True}}, "training.steps: got True, expected an integer"),
        ({"training": {"steps": 0}}, "training.steps: got 0, expected 1 or more"),
        ({"data": {"images": "flair"}}, "data.images: got 'flair', expected a list of strings"),
        ({"data": {"labels": {"lesion": 1}}}, "data.labels: .* expected a background of 0"),
        ({"data": {"labels": {"a": 0, "b": 0}}}, "data.labels: .* expected each value once"),
        (
            {"data": {"labels": {"background": 0, "ignore": 3, "enhancing": 4, "core": 1}}},
            "data.labels: got the order background, enhancing, core, expected ascending values: "
            "background, core, enhancing; weights",
        ),
        ({"data": {"orientation": "RAL"}}, "data.orientation: got 'RAL'"),
        ({"data": {"orientation": "RASX"}}, "data.orientation: got 'RASX'"),
        ({"data": {"clip": [99, 1]}}, "data.clip: .* the lower first"),
        ({"sampling": {"method": "lesion"}}, r"expected one of balanced, lesions, uniform; did yo"),
        ({"sampling": {"patch": [32, 32]}}, r"sampling.patch: got \[32, 32\], expected three"),
        ({"sampling": {"jitter": 0.6}}, "sampling.jitter: got 0.6, expected 0 to 0.5"),
        ({"prediction": {"window": "hashmi"}}, "prediction.window: .*; did you mean hashemi"),
        ({"augmentation": {"monai": [{}]}}, "augmentation.monai: .* expected name"),
        ({"sampling": 5}, r"sampling: got 5, expected a section \[sampling\]"),
    ],
)
def test_what_is_wrong_is_named(sections, message):
    with pytest.raises(ConfigError, match=message):
        parse(sections)


def test_what_is_written_is_read_back(tmp_path):
    config = parse(
        {
            "data": {"labels": {"background": 0, "ignore": 9, 'a "b" c': 2}, "images": ["flair"]},
            "network": {"name": "unet", "features": [4, 8], "norm": "batch"},
            "loss": {"name": "TverskyLoss", "alpha": 0.3, "beta": 0.7, "batch": True},
            "augmentation": {"monai": [{"name": "RandGaussianNoised", "prob": 0.1}]},
            "optimiser": {"learning_rate": 1e-5, "undecayed": ["\\.norm\\."]},
        }
    )
    for comments in (True, False):
        path = tmp_path / "config.toml"
        path.write_text(to_toml(config, comments))
        assert load(path) == config
    path.write_text("[training\n")
    with pytest.raises(ConfigError, match="config.toml: cannot be read"):
        load(path)


def test_settings_take_the_place_of_the_file(tmp_path):
    path = tmp_path / "config.toml"
    path.write_text(to_toml(Config()))
    config = load(path, ["training.seed=3", 'data.test=["a", "b"]', "sampling.method=uniform"])
    assert (config.training.seed, config.data.test) == (3, ["a", "b"])
    assert config.sampling.method == "uniform"
    with pytest.raises(ConfigError, match="training.sed: no such key; did you mean seed"):
        load(path, ["training.sed=3"])
    with pytest.raises(ConfigError, match="--set: got 'seed', expected section.key=value"):
        load(path, ["seed"])


def test_every_key_has_its_comment_in_the_first_configuration(heads, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--init", str(heads)]) == 0
    text = (tmp_path / "voxfuse.toml").read_text()
    config = load(tmp_path / "voxfuse.toml")
    assert config == initial_config(heads)
    assert (config.data.images, config.data.label) == (["flair", "t1"], "lesions")
    assert config.data.labels == {"background": 0, "lesion": 1}
    commented = {line.split(" = ")[0] for line in text.splitlines() if " = " in line[:30]}
    for section in dataclasses.fields(Config):
        for key in dataclasses.fields(getattr(config, section.name)):
            assert key.name in commented | {"options"}, key.name
    assert max(map(len, text.splitlines())) <= 100
    assert cli.main(["train", "--init", str(heads)]) == 1
    assert "voxfuse.toml: is there already" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(LOSSES))
def test_every_loss_by_name(name):
    import torch

    config = parse({"loss": {"name": name}})
    objective = Objective(config.loss)
    binary = name == "LovaszHingeLoss"
    logits = torch.randn(2, 1 if binary else 2, 4, 4, 4, requires_grad=True)
    objective(logits, torch.randint(0, 2, (2, 1, 4, 4, 4), dtype=torch.uint8)).backward()
    assert logits.grad.any()


def test_a_stack_of_outputs_is_a_list_of_them():
    import torch

    for name in ("DiceCELoss", "LovaszHingeLoss"):
        objective = Objective(parse({"loss": {"name": name}}).loss)
        stack = torch.randn(2, 3, 1 if name == "LovaszHingeLoss" else 2, 4, 4, 4)
        label = torch.randint(0, 2, (2, 1, 4, 4, 4), dtype=torch.uint8)
        mask = torch.rand(2, 1, 4, 4, 4) > 0.5
        listed = list(stack.unbind(1))
        assert torch.equal(objective(stack, label, mask), objective(listed, label, mask))


def test_what_makes_no_loss():
    with pytest.raises(ConfigError, match="loss.name: got 'DiceCLoss', .*did you mean DiceCELoss"):
        Objective(parse({"loss": {"name": "DiceCLoss"}}).loss)
    with pytest.raises(
        ConfigError, match="loss.alpa: not an option of TverskyLoss, .*; did you mean alpha"
    ):
        Objective(parse({"loss": {"name": "TverskyLoss", "alpa": 0.3}}).loss)
    with pytest.raises(ConfigError, match="loss.alpha: got -1"):
        Objective(parse({"loss": {"name": "TverskyLoss", "alpha": -1}}).loss)
    with pytest.raises(ConfigError, match="loss.reduction: got 'none', expected mean or sum"):
        Objective(parse({"loss": {"name": "DiceLoss", "reduction": "none"}}).loss)
    with pytest.raises(ConfigError, match="loss.activation: got 'none'"):
        Objective(parse({"loss": {"name": "DiceLoss", "activation": "none"}}).loss)
