"""The GPU report without a GPU: every step in small on the CPU, and what makes it stop."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.utils._pytree as pytree

from benchmarks import byte_model, gpu_bars, gpu_report, kernel_driver, losses

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {
    "machine",
    "missing",
    "tests",
    "sanitizer",
    "bars",
    "byte_model",
    "measurements",
    "profile",
    "counters",
    "steps",
    "verdict",
    "wrong",
    "seconds",
}


def dry_run(out: Path, *more: str) -> tuple[int, dict]:
    """Exit status and report.json of a small run on the CPU."""
    command = [ROOT / "benchmarks" / "gpu_report.sh", out, "--dry-run", "--peers", ""]
    command += ["--tests", "tests/fusion/test_grids.py", *more]
    environment = {**os.environ, "PYTHON": sys.executable}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (out / "report.json").exists(), done.stdout + done.stderr
    return done.returncode, json.loads((out / "report.json").read_text())


@pytest.mark.slow
def test_a_dry_run_fills_every_section(tmp_path):
    status, report = dry_run(tmp_path)
    steps = {step["name"]: step for step in report["steps"]}
    assert status == 0, json.dumps(report["steps"], indent=1)
    assert report.keys() >= SECTIONS
    assert steps["gpu tests"]["status"] == steps["other tests"]["status"] == "ok"
    assert report["tests"]["gpu"]["skipped"] > 100
    assert report["tests"]["rest"]["passed"] > 0
    # What is not there is said to be absent, with the reason.
    for name in ("build", "sanitizer", "counters", "fusion benchmark, 4 classes"):
        assert steps[name]["status"] == "absent", name
        assert report["missing"][name]
    kinds = {"loss", "small", "large", "fusion", "head"}
    assert report["measurements"].keys() >= kinds
    assert all(report["measurements"][kind] for kind in kinds)
    assert len(report["bars"]) >= 30
    peers = [bar for bar in report["bars"] if "MONAI" in bar["bar"]]
    assert peers
    assert all(bar["met"] is None and bar["note"] for bar in peers)  # left out, and said so
    assert {bar["met"] for bar in report["bars"]} == {True, False, None}
    assert all((bar["measured"] is None) == (bar["met"] is None) for bar in report["bars"])
    assert report["profile"]
    assert {row["kernel"] for row in report["byte_model"]} >= {"soft_confusion", "overlap_add"}
    assert report["wrong"] is None
    text = (tmp_path / "report.md").read_text()
    assert "| bar | case | limit |" in text
    assert "dry run" in text
    # Few and small: someone has to carry them home.
    left = list(tmp_path.iterdir())
    assert len(left) <= 8
    assert all(path.is_file() and path.stat().st_size < 1 << 20 for path in left)


@pytest.mark.slow
def test_the_first_wrong_result_stops_it(tmp_path):
    status, report = dry_run(tmp_path, "--inject-wrong-result", "loss")
    steps = {step["name"]: step for step in report["steps"]}
    assert status == gpu_report.WRONG_RESULT
    assert steps["loss bars"]["status"] == "wrong result"
    assert "gradient" in report["wrong"]
    assert report["verdict"].startswith("WRONG RESULT")
    for name in ("small step bars", "fusion bars", "head bars", "profile", "other tests"):
        assert steps[name]["status"] == "not run"
        assert "wrong result" in steps[name]["note"]
    assert report["measurements"].keys() == {"loss"}


def options(out: Path, **changes: object):
    """A report over nothing, to run steps of the tests' own."""
    import argparse

    given = {"out": out, "device": "cpu", "budget": 60.0, "keep_going": False}
    return argparse.Namespace(**{**given, **changes})


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_hang_or_a_crash_costs_its_own_step_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_report, "WAIT_TO_DIE", 0.5)
    report = gpu_report.Report(options(tmp_path))
    deaf = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    started = time.monotonic()
    report.run(
        gpu_report.Step("hang", python(deaf), 1),
        gpu_report.Step("crash", python("import os; print('last words'); os.abort()"), 30),
        gpu_report.Step("absent program", ["/no/such/program"], 30),
    )
    report.run(gpu_report.Step("after", python("print(1)"), 30))
    assert time.monotonic() - started < 30
    found = json.loads((tmp_path / "report.json").read_text())
    steps = {step["name"]: step for step in found["steps"]}
    assert {name: step["status"] for name, step in steps.items()} == {
        "hang": "timed out",
        "crash": "failed",
        "absent program": "failed",
        "after": "ok",
    }
    assert "last words" in steps["crash"]["note"]
    assert found["wrong"] is None
    assert "hang, crash" in found["verdict"]


def test_without_cuda_kernels_the_others_are_built_all_the_same(tmp_path, monkeypatch):
    tools = tmp_path / "tools"
    tools.mkdir()
    cmake = tools / "cmake"
    cmake.write_text(
        '#!/bin/sh\ncase "$*" in *VOXFUSE_CUDA=0*|*--build*|*--install*) exit 0;; esac; exit 1\n'
    )
    cmake.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setattr(gpu_report, "CAPABILITY", "print(90)")
    report = gpu_report.Report(options(tmp_path, device="cuda", no_build=False))
    gpu_report.build(report)
    found = json.loads((tmp_path / "report.json").read_text())
    assert [(step["name"], step["status"]) for step in found["steps"]] == [
        ("build for 9.0", "failed"),
        ("build without CUDA", "ok"),
    ]


@pytest.mark.parametrize(
    ("where", "message", "wrong"),
    [
        ("tests.ops.test_gpu", "AssertionError: statistics of Case(): error 1 exceeds", True),
        ("tests.ops.overlap_add.test_cpu", "assert False", True),
        ("tests.ops.test_gpu", "RuntimeError: CUDA error: an illegal memory access", False),
        ("tests.ops.test_gpu", "Failed: 2097152 bytes beside logits and gradient", False),
        ("tests.build.test_documentation", "assert 1 == 2", False),
    ],
)
def test_only_a_failed_parity_test_is_a_wrong_result(tmp_path, where, message, wrong):
    report = gpu_report.Report(options(tmp_path))
    junit = tmp_path / "junit-gpu.xml"
    junit.write_text(
        f'<testsuites><testsuite><testcase classname="{where}" name="a"/>'
        f'<testcase classname="{where}" name="b"><failure message="{message}"/></testcase>'
        "</testsuite></testsuites>"
    )
    read = gpu_report.read_junit(junit, report, "gpu")
    report.run(gpu_report.Step("gpu tests", python("raise SystemExit(1)"), 30, read=read))
    report.run(gpu_report.Step("after", python(""), 30))
    found = json.loads((tmp_path / "report.json").read_text())
    assert found["tests"]["gpu"]["passed"] == found["tests"]["gpu"]["failed"] == 1
    assert (found["wrong"] is not None) == wrong
    assert [step["status"] for step in found["steps"]] == (
        ["wrong result", "not run"] if wrong else ["failed", "ok"]
    )


def bars(monkeypatch, path: Path, step: str) -> tuple[int, dict]:
    """Exit status and results of one step of gpu_bars on the CPU."""
    arguments = ["gpu_bars.py", step, "--device", "cpu", "--peers", "", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", arguments)
    return gpu_bars.main(), json.loads(path.read_text())


def test_a_case_that_fails_costs_itself_alone(tmp_path, monkeypatch):
    made = []

    def own_loss(backend, real=losses.own_loss):
        made.append(backend)
        if len(made) == 1:
            raise RuntimeError("no kernel image is available")
        return real(backend)

    monkeypatch.setattr(losses, "own_loss", own_loss)
    status, found = bars(monkeypatch, tmp_path / "loss.json", "loss")
    assert status == 1
    (why,) = found["failed"].values()
    assert why == "RuntimeError: no kernel image is available"
    cases = [result["case"] for result in found["results"]]
    assert len(cases) == 2 * len(gpu_bars.CPU_SHAPES)  # the ceiling, and all cases but one
    assert any(bar["measured"] is None and "failed" in bar["note"] for bar in found["bars"])


def test_an_interrupted_step_leaves_what_it_has_measured(tmp_path, monkeypatch):
    def interrupted(run):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_bars, "streaming", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bars(monkeypatch, tmp_path / "fusion.json", "fusion")
    found = json.loads((tmp_path / "fusion.json").read_text())
    assert found["results"]
    assert found["bars"]


def test_the_driver_gives_operators_all_tensors_on_their_device(monkeypatch):
    """A GPU's operators refuse tables on the CPU, which a driver on the CPU cannot show."""
    device = torch.device("meta")
    called = set()

    class Operators:
        def __getattr__(self, name):
            def call(*arguments):
                called.add(name)
                tensors = [x for x in pytree.tree_leaves(arguments) if isinstance(x, torch.Tensor)]
                assert tensors
                assert all(x.device == device for x in tensors), name
                return torch.empty(0, device=device)

            return call

    monkeypatch.setattr(kernel_driver, "backends_on", lambda _: {"cuda": Operators()})
    for name, call in kernel_driver.calls(device).items():
        if "DiceCELoss" not in name and "finalize_slab" not in name:  # they run operators proper
            call()
    assert called >= {"soft_confusion_backward", "overlap_add_", "head_confusion_backward"}


def test_the_driver_goes_on_after_a_failure_and_begins_where_it_is_told(monkeypatch, capsys):
    def failing():
        raise RuntimeError("no kernel image is available")

    calls = {"a": failing, "b": lambda: None, "c": lambda: None, "d": lambda: None}
    monkeypatch.setattr(kernel_driver, "calls", lambda device, scale: calls)
    monkeypatch.setattr(sys, "argv", ["kernel_driver.py", "--device", "cpu", "--turn", "0.5"])
    assert kernel_driver.main() == 1
    assert capsys.readouterr().out.splitlines() == ["c", "d", "FAILED: a", "b"]


def test_the_byte_model_reads_the_kernels_own_constants():
    constants = byte_model.cuda_constants("soft_confusion.cu")
    assert constants.keys() >= {"kWorkspace", "kRowsAtLeast", "kRowsAtMost", "kChunk"}
    assert constants["kLargestChunk"] % constants["kChunk"] == 0
    for batch, classes, voxels in ((1, 2, 512**3), (2, 4, 256**3), (1, 117, 128**3), (3, 5, 10)):
        rows = byte_model.cuda_rows(batch, classes, voxels)
        assert 1 <= rows <= -(-voxels // constants["kChunk"])
        assert batch * rows * classes * 4 <= max(constants["kWorkspace"], 132 * batch * classes * 4)


def test_nothing_moves_less_than_its_floor():
    pytest.importorskip("triton", reason="the package triton is not installed")
    rows = byte_model.table()
    assert len(rows) > 40
    assert all(row["moved"] >= row["floor"] > 0 for row in rows)
    losses = [row for row in rows if row["kernel"].startswith("soft_confusion")]
    assert all(row["moved_over_floor"] < 1.01 and row["workspace"] <= 1 << 20 for row in losses)
