"""One visit to a GPU: build, check, measure and report. Started by benchmarks/gpu_report.sh.

Every step is a process of its own with a time limit, so that a hang or a crash costs that step
alone; its exit status and seconds are in the report, which is written anew after every step. A
wrong result (a failed parity test, a benchmark's correctness gate) is different: what is running
is brought to its end, and nothing more is measured. This file imports neither PyTorch nor voxfuse.

Left in OUT: report.json, report.md, junit-gpu.xml, junit-rest.xml, sanitizer.log, profile.json,
counters.csv, steps.log.

Exit status: 0 when every step ended well, 1 when one did not, 3 on a wrong result. A bar that is
missed is a finding, not a failure.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import glob
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.gpu_page import markdown

ROOT = Path(__file__).resolve().parent.parent
WRONG_RESULT = 3
WAIT_TO_DIE = 10.0
SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")
PACKAGES = (
    "torch", "triton", "numpy", "pytest", "hypothesis", "xdist", "scipy", "pybind11", "monai",
    "nnunetv2",
)  # fmt: skip
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, % of peak",
    "smsp__inst_executed.sum": "instructions",
    "launch__registers_per_thread": "registers",
}
# Tests whose failure says something about the surroundings, not about a result.
NOT_RESULTS = ("tests.build.", "tests.examples.")


@dataclasses.dataclass
class Step:
    """One process: its command, its limit, and what became of it."""

    name: str
    command: list[str]
    limit: float
    environment: dict[str, str] = dataclasses.field(default_factory=dict)
    #: Reads what the step left; sets ``wrong`` where that is a wrong result.
    read: Callable[[Step], None] | None = None
    status: str = "not run"
    exit: int | None = None
    seconds: float = 0.0
    note: str = ""
    wrong: str | None = None
    log: Path | None = None

    def as_row(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "status": self.status,
            "exit": self.exit,
            "seconds": round(self.seconds, 1),
            "limit": round(self.limit, 1),
            "note": self.note,
        }


class Running:
    """A started step."""

    def __init__(self, step: Step, scratch: Path, limit: float) -> None:
        self.step = step
        step.limit = limit
        step.log = scratch / (re.sub(r"\W+", "-", step.name) + ".log")
        self.started = time.monotonic()
        self.asked = False
        with step.log.open("wb") as log:
            try:
                self.process: subprocess.Popen[bytes] | None = subprocess.Popen(
                    step.command,
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": python_path(), **step.environment},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            except OSError as error:
                self.process = None
                step.status, step.note = "failed", str(error)

    def poll(self) -> bool:
        """Whether the step is over; asks it to end at its limit, and makes it soon after."""
        step, process = self.step, self.process
        if process is None:
            return True
        code = process.poll()
        step.seconds = time.monotonic() - self.started
        if code is None:
            if step.seconds > step.limit + WAIT_TO_DIE:
                self.kill()
                code = process.wait()
            elif step.seconds > step.limit and not self.asked:
                # pytest writes what it has when it is interrupted.
                self.asked = True
                process.send_signal(signal.SIGINT)
                return False
            else:
                return False
        self.kill()  # whatever it left running
        step.exit = code
        step.status = "timed out" if self.asked else "ok" if code == 0 else "failed"
        if code == WRONG_RESULT:
            step.status = "wrong result"
        return True

    def kill(self) -> None:
        assert self.process is not None
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return


def python_path() -> str:
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join([str(ROOT / "src"), str(ROOT), *([inherited] if inherited else [])])


class Report:
    """Runs the steps and keeps report.json up to date."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.out: Path = options.out.resolve()
        self.out.mkdir(parents=True, exist_ok=True)
        # Written by steps, read and condensed here, removed at the end.
        self.scratch = self.out / "scratch"
        shutil.rmtree(self.scratch, ignore_errors=True)
        self.scratch.mkdir()
        self.cuda = options.device == "cuda"
        self.started = time.monotonic()
        self.steps: list[Step] = []
        self.wrong: str | None = None
        self.data: dict[str, Any] = {
            "device": options.device,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": {},
            "missing": {},
            "tests": {},
            "sanitizer": {},
            "bars": [],
            "byte_model": [],
            "measurements": {},
            "profile": {},
            "counters": [],
        }

    # --- running -----------------------------------------------------------------------------

    def left(self) -> float:
        return self.options.budget - (time.monotonic() - self.started)

    def run(self, *steps: Step) -> None:
        """Run the steps at the same time, each for at most its limit and what time is left."""
        running = []
        for step in steps:
            self.steps.append(step)
            if self.wrong and not self.options.keep_going:
                step.note = "not run after a wrong result"
            elif self.left() < 5:
                step.note = "not run: no time was left"
            else:
                print(f"-- {step.name}", flush=True)
                limit = min(step.limit, self.left() - 2)
                running.append(Running(step, self.scratch, max(limit, 1)))
        started = list(running)
        while running:
            running = [one for one in running if not one.poll()]
            time.sleep(0.05)
        for one in started:
            self.finish(one.step)
        self.write()

    def finish(self, step: Step) -> None:
        if step.read is not None:
            try:
                step.read(step)
            except (OSError, ValueError, KeyError, ElementTree.ParseError) as error:
                step.note = f"{step.note}; what it left cannot be read: {error!r}".lstrip("; ")
                if step.status == "ok":
                    step.status = "failed"
        if step.status == "wrong result" and step.wrong is None:
            step.wrong = tail(step, 3)
        if step.wrong is not None:
            step.status = "wrong result"
            self.wrong = self.wrong or f"{step.name}: {step.wrong}"
        elif step.status in ("failed", "timed out") and not step.note:
            step.note = tail(step, 3)
        print(f"   {step.name}: {step.status}, {step.seconds:.1f} s  {step.note}"[:300], flush=True)

    def absent(self, name: str, why: str) -> None:
        self.steps.append(Step(name, [], 0, status="absent", note=why))
        self.data["missing"][name] = why
        self.write()

    # --- writing -----------------------------------------------------------------------------

    def verdict(self) -> str:
        if self.wrong:
            return f"WRONG RESULT, stopped: {self.wrong}"
        bad = [step.name for step in self.steps if step.status not in ("ok", "absent")]
        bars = self.data["bars"]
        met = sum(bar["met"] is True for bar in bars)
        missed = sum(bar["met"] is False for bar in bars)
        said = f"{met} bars met, {missed} missed, {len(bars) - met - missed} not measured"
        if not self.cuda:
            said = f"dry run on the CPU, whose figures mean nothing: {said}"
        return said + (f"; steps that did not end well: {', '.join(bad)}" if bad else "")

    def write(self) -> None:
        self.data["steps"] = [step.as_row() for step in self.steps]
        self.data["seconds"] = round(time.monotonic() - self.started, 1)
        self.data["wrong"] = self.wrong
        self.data["verdict"] = self.verdict()
        write_whole(self.out / "report.json", json.dumps(self.data, indent=1) + "\n")
        write_whole(self.out / "report.md", markdown(self.data))
        logs = []
        for step in self.steps:
            if step.log is not None and step.log.exists():
                logs.append(f"===== {step.name}: {step.status}, exit {step.exit}\n")
                logs.append(tail(step, 60, 8000) + "\n")
        write_whole(self.out / "steps.log", "".join(logs))


def write_whole(path: Path, text: str) -> None:
    partial = path.with_suffix(path.suffix + ".partial")
    partial.write_text(text)
    partial.replace(path)


def tail(step: Step, lines: int, characters: int = 600) -> str:
    if step.log is None or not step.log.exists():
        return ""
    with step.log.open("rb") as log:
        log.seek(max(0, step.log.stat().st_size - 65536))
        text = log.read().decode(errors="replace")
    return "\n".join(text.strip().splitlines()[-lines:])[-characters:]


# --- the steps -----------------------------------------------------------------------------------

DESCRIBE = """
import json, sys
import torch
from benchmarks import byte_model, harness
import voxfuse
device = torch.device(sys.argv[1])
described = harness.machine(device)
described["backends"] = {name: str(one) for name, one in voxfuse.backends().items()}
if device.type == "cuda":
    properties = torch.cuda.get_device_properties(device)
    described["multiprocessors"] = properties.multi_processor_count
    described["memory"] = properties.total_memory
    described["l2_bytes"] = getattr(properties, "L2_cache_size", None)
    described["capability"] = list(torch.cuda.get_device_capability(device))
try:
    table = byte_model.table()
except Exception as error:
    table, described["byte_model_error"] = [], repr(error)
json.dump({"machine": described, "byte_model": table}, open(sys.argv[2], "w"))
"""

CAPABILITY = """
import sys, torch
if not torch.cuda.is_available():
    sys.exit("PyTorch sees no CUDA device")
print("%d%d" % torch.cuda.get_device_capability(0))
"""


#: Where CUDA's installers put programs without adding them to the path.
ELSEWHERE = (
    "/usr/local/cuda*/bin",
    "/usr/local/cuda*/compute-sanitizer",
    "/opt/nvidia/nsight-compute/*",
)


def program(name: str) -> str | None:
    """Where a program of CUDA's is, on the path or off it."""
    folders = [folder for pattern in ELSEWHERE for folder in sorted(glob.glob(pattern))]
    return shutil.which(name) or shutil.which(name, path=os.pathsep.join(reversed(folders)))


def build(report: Report) -> None:
    """Compile the CPU and CUDA kernels for the device found, in place."""
    options = report.options
    if options.no_build or not report.cuda:
        report.absent("build", "not asked for: what is installed or built already is used")
        return
    try:
        found = subprocess.run(
            [sys.executable, "-c", CAPABILITY],
            capture_output=True,
            text=True,
            timeout=90,
            check=False,
        )
    except subprocess.TimeoutExpired:
        report.absent("build", "PyTorch did not answer within 90 s")
        return
    if found.returncode:
        report.absent("build", found.stderr.strip()[-300:])
        return
    if shutil.which("cmake") is None:
        report.absent("build", "CMake was not found: only the Triton kernels can run")
        return
    capability = found.stdout.strip()
    directory = ROOT / "build" / "gpu_report"
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    jobs = str(os.cpu_count() or 1)
    listed = f"{capability[:-1]}.{capability[-1]}"
    compiler = os.environ.get("CUDACXX") or program("nvcc")
    environment = {"CUDACXX": compiler} if compiler else {}

    def script(cuda: str) -> list[str]:
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(directory), *generator,
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DCMAKE_INSTALL_PREFIX={ROOT / 'src/voxfuse'}",
            f"-DVOXFUSE_CUDA={cuda}", f"-DVOXFUSE_CUDA_ARCHITECTURES={capability}",
        ]  # fmt: skip
        compile_ = ["cmake", "--build", str(directory), "--parallel", jobs]
        parts = (configure, compile_, ["cmake", "--install", str(directory)])
        return ["bash", "-c", " && ".join(" ".join(map(quoted, part)) for part in parts)]

    step = Step(f"build for {listed}", script("1" if compiler else "auto"), 240, environment)
    report.run(step)
    if step.status != "ok":
        report.run(Step("build without CUDA", script("0"), 120, environment))


def quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def describe(report: Report) -> None:
    path = report.scratch / "machine.json"

    def read(step: Step) -> None:
        found = json.loads(path.read_text())
        report.data["machine"] |= found["machine"]
        report.data["byte_model"] = found["byte_model"]

    machine = report.data["machine"]
    for name, command in (
        ("nvidia_smi", ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm",
                        "--format=csv,noheader"]),
        ("nvcc", ["nvcc", "--version"]),
    ):  # fmt: skip
        found = program(command[0])
        if found is None:
            report.data["missing"][command[0]] = "not found"
            continue
        command[0] = found
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            machine[name] = " ".join(done.stdout.strip().splitlines()[-2:])
        except subprocess.TimeoutExpired:
            machine[name] = "no answer within 20 s"
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            report.data["missing"][package] = "the Python package is not installed"
    command = [sys.executable, "-c", DESCRIBE, report.options.device, str(path)]
    report.run(Step("machine", command, 60, read=read))


def read_junit(path: Path, report: Report, name: str) -> Callable[[Step], None]:
    """Counts and failures; a failed assertion of a test of results is a wrong result."""

    def read(step: Step) -> None:
        if not path.exists():
            step.note = "no junit file was written"
            return
        counts = {"passed": 0, "failed": 0, "errors": 0, "skipped": 0}
        failures = []
        wrong = []
        for case in ElementTree.parse(path).iter("testcase"):
            where = f"{case.get('classname', '')}::{case.get('name', '')}"
            bad = case.find("failure")
            if bad is not None:
                counts["failed"] += 1
                message = bad.get("message", "")
                failures.append(f"{where}: {message[:300]}")
                is_result = not any(part in where for part in NOT_RESULTS)
                if is_result and message.startswith(("AssertionError", "assert ")):
                    wrong.append(f"{where}: {message[:160]}")
            elif case.find("error") is not None:
                counts["errors"] += 1
                failures.append(f"{where}: {case.find('error').get('message', '')[:300]}")
            elif case.find("skipped") is not None:
                counts["skipped"] += 1
            else:
                counts["passed"] += 1
        report.data["tests"][name] = {**counts, "failures": failures[:40]}
        if wrong:
            step.wrong = f"{len(wrong)} failed parity tests, the first {wrong[0]}"
        step.note = ", ".join(f"{value} {key}" for key, value in counts.items())

    return read


def pytest_command(junit: Path, arguments: Sequence[str]) -> list[str]:
    return [
        sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
        "--tb=short", "--maxfail=25", f"--junitxml={junit}", *arguments,
    ]  # fmt: skip


def in_parallel(report: Report, most: int, share: str) -> list[str]:
    """pytest's options for several processes on a GPU's machine, if pytest-xdist is there."""
    if importlib.util.find_spec("xdist") is None or not report.cuda:
        return []
    return ["-n", str(min(most, os.cpu_count() or 1)), "--dist", share]


def gpu_tests(report: Report) -> Step:
    """Most of their time is Triton's compiler, one kernel after the other in a process."""
    junit = report.out / "junit-gpu.xml"
    files = ["tests"] if report.cuda else ["tests/ops/soft_confusion/test_gpu.py"]
    command = pytest_command(junit, ["-m", "gpu", *in_parallel(report, 6, "loadgroup"), *files])
    return Step("gpu tests", command, 200, read=read_junit(junit, report, "gpu"))


def other_tests(report: Report) -> None:
    """The rest of the suite, in the time that is left."""
    junit = report.out / "junit-rest.xml"
    # A file at a time: its tests share what they compile.
    arguments = ["-m", "not gpu", *in_parallel(report, 8, "loadfile"), *report.options.tests]
    command = pytest_command(junit, arguments)
    report.run(Step("other tests", command, 300, read=read_junit(junit, report, "rest")))


def sanitizers(report: Report) -> list[Step]:
    sanitizer = program("compute-sanitizer")
    if sanitizer is None or not report.cuda:
        why = "compute-sanitizer was not found" if report.cuda else "there is no GPU"
        report.absent("sanitizer", why)
        return []
    driver = [sys.executable, str(ROOT / "benchmarks" / "kernel_driver.py"), "--device", "cuda"]
    steps = []
    for number, tool in enumerate(SANITIZERS):
        log = report.scratch / f"{tool}.log"

        def read(step: Step, tool: str = tool, log: Path = log) -> None:
            text = log.read_text(errors="replace")
            found = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: ([^\n]*)", text)
            summary = found[-1] if found else "no summary was written"
            kernels = sorted(set(re.findall(r"=========\s+at (\S+)", text)))[:12]
            report.data["sanitizer"][tool] = {
                "summary": summary,
                "exit": step.exit,
                "kernels": kernels,
            }
            step.note = summary
            with (report.out / "sanitizer.log").open("a") as whole:
                whole.write(f"===== {tool}: exit {step.exit}\n{text[:200_000]}\n")

        command = [
            sanitizer, "--tool", tool, "--error-exitcode", "86", "--print-limit", "20",
            "--log-file", str(log), *driver, "--turn", str(number / len(SANITIZERS)),
        ]  # fmt: skip
        # Out of PyTorch's cache every tensor is an allocation of its own, with watched ends.
        environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        steps.append(Step(f"sanitizer {tool}", command, 150, environment, read))
    return steps


def bars_step(report: Report, name: str, limit: float, title: str) -> Step:
    """One step of benchmarks/gpu_bars.py."""
    path = report.scratch / f"{name}.json"

    def read(step: Step) -> None:
        if not path.exists():
            step.note = f"its bars are not measured. {tail(step, 2)}"
            return
        found = json.loads(path.read_text())
        report.data["bars"] += found["bars"]
        report.data["measurements"][name] = found["results"]
        for what, why in found["missing"].items():
            report.data["missing"][what if what in PACKAGES else f"{name}: {what}"] = why
        step.wrong = found["wrong"]
        step.note = "; ".join(f"{what}: {why}" for what, why in found["failed"].items())

    script = ROOT / "benchmarks" / "gpu_bars.py"
    command = [sys.executable, str(script), name, "--device", report.options.device]
    command += ["--json", str(path), "--budget", str(limit * 0.8)]
    command += ["--peers", report.options.peers]
    if name in report.options.inject_wrong_result:
        command.append("--inject-wrong-result")
    return Step(title, command, limit, read=read)


def fusion_against_monai(report: Report, classes: int, volume: int) -> None:
    """The sliding window with a null predictor, and MONAI's in the same run."""
    name = f"fusion benchmark, {classes} classes"
    if importlib.util.find_spec("monai") is None or "monai" not in report.options.peers:
        report.absent(name, "the package monai is not installed, or not asked for")
        return
    path = report.scratch / f"fusion-{classes}.json"

    def read(step: Step) -> None:
        if not path.exists():
            # The benchmark checks values and labels against MONAI's before it measures.
            if "is not the peer's result" in tail(step, 4):
                step.wrong = tail(step, 2)
            return
        found = json.loads(path.read_text())
        report.data["measurements"][name] = found["time"]
        for part in found["time"]:
            for row_name, row in part["rows"].items():
                ratio = row.get("times_faster_than", {}).get("MONAI")
                if ratio is None:
                    continue
                case = f"{part['patches']} patches of {part['classes']} x {part['patch']}^3"
                report.data["bars"].append(
                    {
                        "bar": f"{row_name}: {part['output']}, time of MONAI's fusion over ours",
                        "case": case,
                        "limit": 10.0,
                        "measured": ratio,
                        "at_least": True,
                        "note": "",
                        "sign": ">=",
                        "met": ratio >= 10.0,
                    }
                )

    command = [
        sys.executable, str(ROOT / "benchmarks" / "run.py"), "fusion", "--device",
        report.options.device, "--classes", str(classes), "--volume", str(volume), "--parts",
        "time", "--peers", "monai", "--rounds", "20", "--budget", "12", "--json", str(path),
    ]  # fmt: skip
    if not report.cuda:
        command.append("--quick")
    report.run(Step(name, command, 60, read=read))


def profile(report: Report) -> None:
    path = report.out / "profile.json"

    def read(step: Step) -> None:
        report.data["profile"] = json.loads(path.read_text())

    driver = str(ROOT / "benchmarks" / "kernel_driver.py")
    scale = "8" if report.cuda else "1"
    command = [sys.executable, driver, "--device", report.options.device, "--scale", scale]
    report.run(Step("profile", [*command, "--profile", str(path)], 60, read=read))


def counters(report: Report) -> None:
    """Nsight Compute on every kernel, at a size that memory decides."""
    profiler = program("ncu")
    if profiler is None or not report.cuda:
        report.absent("counters", "ncu was not found" if report.cuda else "there is no GPU")
        return
    path = report.out / "counters.csv"

    def read(step: Step) -> None:
        lines = path.read_text(errors="replace").splitlines()
        first = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
        if first is None:
            step.note = f"no counters were read. {' '.join(lines[-2:])[:200]}"
            step.status = "failed"
            return
        rows = list(csv.DictReader(lines[first:]))
        units = rows[0]
        for row in rows[1:]:
            kernel = re.sub(r"voxfuse::cuda::|\(anonymous namespace\)::|<unnamed>::", "",
                            row.get("Kernel Name", ""))  # fmt: skip
            found = {"kernel": kernel.split("(")[0][:80]}
            for metric, label in COUNTERS.items():
                found[label] = f"{row.get(metric, '')} {units.get(metric, '')}".strip()
            report.data["counters"].append(found)

    # PyTorch's own kernels are named in its namespaces; these are everything else of interest.
    ours = (
        "regex:few_|many_|separate_|general_|finish|epilogue|gather|scatter|_forward|_backward|"
        "_scatter|_finish|_head|finalize"
    )
    driver = str(ROOT / "benchmarks" / "kernel_driver.py")
    command = [
        profiler, "--clock-control", "none", "--csv", "--page", "raw", "--log-file", str(path),
        "--kernel-name", ours, "--launch-count", "120", "--metrics", ",".join(COUNTERS),
        sys.executable, driver, "--device", "cuda", "--scale", "8",
    ]  # fmt: skip
    report.run(Step("counters", command, 75, read=read))


def run_all(report: Report) -> None:
    report.write()
    build(report)
    describe(report)
    # None of these is timed: they share the machine.
    together = [gpu_tests(report), *sanitizers(report)]
    if report.cuda and "compile" in report.options.peers:
        together.append(bars_step(report, "warm", 150, "compile the peers"))
    report.run(*together)
    scale = 1.0 if report.cuda else 0.5
    report.run(bars_step(report, "loss", 130 * scale, "loss bars"))
    report.run(bars_step(report, "small", 45 * scale, "small step bars"))
    report.run(bars_step(report, "large", 45 * scale, "2^31 elements"))
    report.run(bars_step(report, "fusion", 60 * scale, "fusion bars"))
    report.run(bars_step(report, "head", 60 * scale, "head bars"))
    fusion_against_monai(report, 4, 384 if report.cuda else 96)
    if report.cuda:
        fusion_against_monai(report, 117, 192)
    profile(report)
    counters(report)
    other_tests(report)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_report.sh", description="Build, check and measure on one GPU, and report."
    )
    parser.add_argument("out", type=Path, help="folder for the report")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument(
        "--dry-run",
        dest="device",
        action="store_const",
        const="cpu",
        help="the same steps on the CPU, small: what needs a GPU is reported as absent",
    )
    parser.add_argument(
        "--budget", type=float, default=525.0, help="seconds for everything (default 525)"
    )
    parser.add_argument("--no-build", action="store_true", help="use what is built already")
    parser.add_argument(
        "--peers", default="monai,nnunet,compile", help="comma-separated (default all three)"
    )
    parser.add_argument(
        "--tests",
        nargs="+",
        default=["tests"],
        metavar="PATH",
        help="what of the suite runs beside the gpu tests (default all of it)",
    )
    parser.add_argument(
        "--keep-going", action="store_true", help="measure on after a wrong result all the same"
    )
    parser.add_argument(
        "--inject-wrong-result",
        nargs="+",
        default=[],
        choices=["loss", "small", "large", "fusion", "head"],
        metavar="STEP",
        help="falsify a step's results, to see that the report stops",
    )
    report = Report(parser.parse_args(arguments))
    stale_files = ("junit-gpu.xml", "junit-rest.xml", "sanitizer.log", "counters.csv")
    for stale in (*stale_files, "profile.json"):
        (report.out / stale).unlink(missing_ok=True)
    run_all(report)
    report.write()
    shutil.rmtree(report.scratch)
    print((report.out / "report.md").read_text()[-6000:] if report.cuda else "", flush=True)
    print(report.data["verdict"])
    if report.wrong:
        return WRONG_RESULT
    return int(any(step.status not in ("ok", "absent") for step in report.steps))


if __name__ == "__main__":
    sys.exit(main())
