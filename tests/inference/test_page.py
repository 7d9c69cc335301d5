"""The commands of docs/predict.md, and README's one, run in a clone, at a spacing of seconds."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from voxfuse import cli

ROOT = Path(__file__).resolve().parents[2]
PAGE, README = ((ROOT / page).read_text() for page in ("docs/predict.md", "README.md"))
BLOCKS = {
    "README": re.findall(r"^(\$ voxfuse predict --model examples/.*?)^```", README, re.M | re.S),
    "page": re.findall(r"^```console\n(.*?)^```", PAGE, re.M | re.S),
}


def numbers(line):
    """A line with other numbers."""
    return re.sub(r"\d+(\\\.\d+)?", r"[\\d.]+", re.escape(line))


def coarse(line):
    """A command on fewer voxels, and with one worker to start."""
    line = line.replace("--spacing 2 ", "--spacing 5 ").replace("--workers 2", "--workers 1")
    return line.replace("[::2, ::2, ::2]", "[::2, ::3, ::3]")


@pytest.mark.parametrize("blocks", BLOCKS.values(), ids=BLOCKS)
def test_the_commands_of_the_page_run(blocks, tmp_path, monkeypatch, capsys):
    pytest.importorskip("nibabel", reason="the page reads NIfTI files")
    pytest.importorskip("distributed", reason="the page starts workers")
    pytest.importorskip("zarr", reason="the page has a Zarr volume")
    for name in ("examples", "data"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    assert blocks
    for block in blocks:
        lines = block.replace("\\\n", "").splitlines()
        for number, line in enumerate(lines):
            if not line.startswith("$ "):
                continue
            program, *arguments = shlex.split(coarse(line[2:]))
            if program == "python":
                assert arguments[0] == "-c"
                exec(compile(arguments[1], "docs/predict.md", "exec"), {})
                continue
            assert program == "voxfuse"
            assert cli.main(arguments) == 0, line
            printed = capsys.readouterr().out
            for shown in lines[number + 1 :]:
                if shown.startswith("$ "):
                    break
                assert re.search(numbers(shown), printed), printed
