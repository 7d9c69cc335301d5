"""The emulation of CUDA itself: threads, barriers and shuffles, and the mistakes that it finds."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.emulation import emulator

pytestmark = emulator.NEEDED


def run_broken(name: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = emulator.build("broken", ("tests/emulation/broken_main.cpp",))
    return subprocess.run(
        [str(program), name],
        env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_emulation_runs_threads_barriers_and_shuffles():
    result = run_broken("right")
    assert result.returncode == 0, result.stderr
    assert [int(x) for x in result.stdout.split()] == [63 - i + 1 for i in range(64)]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("beyond_shared", "heap-buffer-overflow"),
        ("beyond_global", "heap-buffer-overflow"),
        ("barrier_in_a_branch", "__syncthreads() after a thread of the block has ended"),
        ("shuffle_in_a_branch", "deadlock"),
        ("shift_too_far", "shift exponent"),
    ],
)
def test_emulation_finds(name, message):
    result = run_broken(name)
    assert result.returncode != 0
    assert message in result.stderr


def test_emulation_shows_a_missing_barrier_by_running_the_threads_backwards():
    forwards = run_broken("missing_barrier")
    backwards = run_broken("missing_barrier", EMULATION_ORDER="reverse")
    assert forwards.returncode == backwards.returncode == 0
    assert forwards.stdout != backwards.stdout
