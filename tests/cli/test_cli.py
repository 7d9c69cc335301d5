"""The command line: what it prints, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from voxfuse import cli
from voxfuse.training.config import PredictionOptions

ROOT = Path(__file__).resolve().parents[2]


def test_info_as_json_is_what_info_prints(capsys):
    assert cli.main(["info", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in found["backends"])
    assert found["versions"]["torch"] in text


def test_a_reader_that_leaves_is_no_traceback():
    """`voxfuse info | head -1`: here the reader has left before the first line."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    try:
        ended = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "voxfuse", "info"],
            stdout=writer,
            stderr=subprocess.PIPE,
            env=environment,
            cwd=ROOT,
            text=True,
        )
    finally:
        os.close(writer)
    assert ended.returncode == 1
    assert ended.stderr == ""


def test_a_command_of_nnunet_without_nnunet(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "nnunetv2.inference.predict_from_raw_data", None)
    assert cli.main(["nnunet-predict", "-h"]) == 1
    assert capsys.readouterr().err.endswith("nnU-Net is not installed: pip install nnunetv2\n")


def test_a_warning_is_a_line_of_the_command(tmp_path, capsys):
    image = nibabel.Nifti1Image(np.arange(64, dtype=np.int16).reshape(4, 4, 4), np.eye(4))
    for name in ("a/t1", "a/lesions", "atlas/mni"):
        path = tmp_path / "heads" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        mask = nibabel.Nifti1Image((image.get_fdata() > 40).astype(np.uint8), np.eye(4))
        nibabel.save(mask if name == "a/lesions" else image, path)
    heads = tmp_path / "heads"
    assert cli.main(["train", "--init", str(heads), str(tmp_path / "made.toml")]) == 0
    expected = f"voxfuse train: warning: {heads}: left out: atlas, with no t1 in them\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("command", "option", "values", "expected"),
    [
        ("predict --model m --input a --output b", "--normalize", ["-160:240"], "-160:240"),
        ("predict --model m --input a --output b", "--foreground", ["-1e3"], "-1e3"),
        ("predict --model m --input a --output b", "--threshold", ["-.5e-3"], -0.5e-3),
        ("predict --model m --input a --output b", "--clip", ["-1e-3", "-5."], [-1e-3, -5.0]),
        ("predict --model m --input a --output b", "--regions", ["-1", "2"], [-1, 2]),
        ("evaluate a b", "--threshold", ["-1e-3"], -1e-3),
        ("evaluate a b", "--ignore-label", ["-1"], -1),
        ("simulate --host a --out b", "--seed", ["-3"], -3),
    ],
)
def test_negative_numbers_are_values(command, option, values, expected):
    """As docs/predict.md has it of a window of CT numbers."""
    spellings = [[option, *values]] + ([[f"{option}={values[0]}"]] if len(values) == 1 else [])
    for given in spellings:
        options = vars(cli.parser().parse_args([*command.split(), *given]))
        assert options[option.lstrip("-").replace("-", "_")] == expected
    with pytest.raises(SystemExit):
        cli.parser().parse_args([*command.split(), "-x"])


def test_every_option_has_a_help_and_patches_their_defaults():
    commands = cli.parser()._subparsers._group_actions[0].choices
    for name, command in commands.items():
        for action in command._actions:
            assert action.help, f"{name} {action.dest}"
    said = {action.dest: action.help for action in commands["predict"]._actions}
    defaults = PredictionOptions()
    for name in ("window", "overlap", "grid", "orientations"):
        assert f"of networks {getattr(defaults, name)})" in said[name]
