"""What a job will take is said, and what would not fit does not begin."""

from __future__ import annotations

import re
import subprocess
import sys

import numpy as np
import pytest

from tests.inference.test_studies import NETWORKS, intensities, predict, write
from voxfuse.inference.plan import memory_of_machine, parse_bytes

OPTIONS = ["--patch", 16]


def test_a_dry_run_says_what_it_would_do_and_does_nothing(tmp_path, capsys):
    for k, shape in enumerate([(24, 16, 16), (30, 33, 16)]):
        write(tmp_path / f"in/s{k}.nii.gz", intensities(shape))
    out = tmp_path / "out"
    options = [*OPTIONS, "--dry-run", "--tta", "mirror", "--batch", 4, "--memory-limit", "64G"]
    assert predict("above_half", tmp_path / "in", out, *options) == 0
    printed = capsys.readouterr().out
    # 24 at steps of 8: 2 patches; 30 and 33: 3 and 4.
    assert "patches  14 of 16 x 16 x 16, in 32 calls of 4 x 8 orientations" in printed
    assert re.search(r"memory   [0-9.]+ [kMG]B of 64 GB: process .*, network ", printed)
    assert f"output   {(24 * 256 + 30 * 33 * 16) / 1000:.3g} kB" in printed
    assert re.search(r"time     [0-9.]+ s in the network, at [0-9.e-]+ s a call", printed)
    assert not out.exists()
    (tmp_path / "in/s2.nii.gz").write_bytes(b"no image")
    assert predict("above_half", tmp_path / "in", out, *options) == 3
    assert "s2: " in capsys.readouterr().out
    assert predict("above_half", tmp_path / "in", out, *options[:-1], "1M") == 1
    assert "would not fit 1 MB" in capsys.readouterr().err
    for name in ("s0", "s1"):
        (tmp_path / f"in/{name}.nii.gz").unlink()
    assert predict("above_half", tmp_path / "in", out, *options) == 1


def test_what_would_not_fit_does_not_begin(tmp_path, capsys):
    write(tmp_path / "in/small.nii.gz", intensities())
    large = write(tmp_path / "in/large.nii.gz", intensities((96, 96, 96)).astype(np.uint8))
    out = tmp_path / "out"
    for options, advice in (
        (["--memory-limit", "1M"], "or a machine with more memory"),
        (["--memory-limit", "1M", "--spacing", 0.25], "take a coarser --spacing"),
    ):
        given = [*OPTIONS, *options]
        assert predict("above_half", tmp_path / "in", out, *given) == 1
        error = capsys.readouterr().err
        assert "--memory-limit:" in error
        assert "would not fit 1 MB" in error
        assert "the largest study is large" in error
        assert advice in error, error
    assert not out.exists()
    more = ["--probabilities", "--memory-limit", "1M"]
    assert predict("three_classes", large, out, *OPTIONS, *more) == 1
    assert "leave --probabilities out" in capsys.readouterr().err


MEASURED = """
import sys
from pathlib import Path
from voxfuse.inference.plan import plan_of
from voxfuse.inference.request import Request, prepare, _resident
from voxfuse.inference.night import Night
network, folder, output = sys.argv[1:]
job = prepare(Request(network, [Path(folder)], Path(output), patch=[48], spacing=[1.0, 0.8, 1.0],
                      probabilities=True, normalize="zscore"))
planned = plan_of(job, job.probe())
before = _resident("VmRSS")
night = Night(job.segmenter, job.write)
assert [o.state for o in night.run(job.studies, job.targets)] == ["done"] * 2
print(planned.peak - planned.memory["process"] - planned.memory["network"],
      _resident("VmHWM") - before)
"""


def test_memory_is_at_most_what_is_planned(tmp_path):
    if not sys.platform.startswith("linux"):
        pytest.skip("a process's peak is read from /proc")
    for name in "ab":
        write(tmp_path / f"in/{name}.nii.gz", intensities((96, 90, 80), levels=3))
    arguments = [f"{NETWORKS}:three_classes", str(tmp_path / "in"), str(tmp_path / "out")]
    ran = subprocess.run(
        [sys.executable, "-c", MEASURED, *arguments], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    planned, taken = (int(x) for x in ran.stdout.splitlines()[-1].split())
    assert taken <= planned <= 3 * taken


@pytest.mark.parametrize(
    ("cgroup", "files", "expected"),
    [
        ("", {}, 8000),
        ("0::/a/b\n", {"sys/fs/cgroup/a/memory.max": "3000", "sys/fs/cgroup/a/b/memory.max": "max"},
         3000),
        ("0::/a\n", {"sys/fs/cgroup/memory.max": "5000"}, 5000),  # a container's own is the root
        ("7:cpu,memory:/x\n3:cpu:/\n", {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2000"},
         2000),
        ("7:memory:/x\n", {"sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712"},
         8000),
    ],
)  # fmt: skip
def test_limits_of_cgroups_count(tmp_path, cgroup, files, expected):
    contents = {"proc/meminfo": "MemTotal:       8 kB\n", "proc/self/cgroup": cgroup, **files}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory_of_machine(tmp_path) == (8 * 1024 if expected == 8000 else expected)


def test_sizes_are_read():
    assert parse_bytes("24G") == 24 * 10**9
    assert parse_bytes("512 MiB") == 512 * 2**20
    assert parse_bytes("1000") == 1000
    for wrong in ("", "G", "-1G", "1.2.3", "5 parsecs", "0"):
        with pytest.raises(ValueError, match="--memory-limit: got"):
            parse_bytes(wrong)
