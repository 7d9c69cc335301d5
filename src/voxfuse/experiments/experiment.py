"""What an experiment is, and how its runs are done: in slices, by processes, never twice."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from voxfuse._files import write_text
from voxfuse.experiments.results import Results, Row, claim, text_of

#: The values of an experiment's key columns.
Run = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """Where an experiment works."""

    data: Path  #: the folder above the data sets
    work: Path  #: models and what is made of data, kept between runs, outside the project
    results: Path  #: the folder above every experiment's results
    quick: bool = False  #: the same in little, for a look at whether it works
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Finished:
    """What pages are made from."""

    rows: list[dict[str, str]]
    runs: list[dict[str, str]]  #: with ``seconds`` and ``finished``
    declared: list[Run]
    results: Path  #: the folder above every experiment's results

    @property
    def hours(self) -> float:
        """Of a processor, for the runs."""
        return sum(float(run["seconds"]) for run in self.runs) / 3600


@dataclass(frozen=True)
class Experiment:
    """A declared list of runs, a function from a run to its rows, and pages made from the rows.

    A module of this package has one, ``EXPERIMENT``;
    :mod:`voxfuse.experiments.registry` lists them.
    """

    name: str  #: of the folder of results too
    title: str
    key: tuple[str, ...]  #: the columns that name a run
    columns: tuple[str, ...]  #: of results.csv, the key's among them
    runs: Callable[[bool], Sequence[Run]]  #: quick or not; the order in which they are done
    rows: Callable[[Run, Place], Iterable[Row]]  #: of a run
    pages: Callable[[Finished], Mapping[str, str]]  #: names and content of files

    def results(self, place: Place) -> Results:
        """What has been done of it."""
        return Results(place.results / self.name, self.key, self.columns)

    def named(self, run: Run) -> str:
        """A run as a file's name."""
        return "_".join(text_of(run[column]) for column in self.key if text_of(run[column]))

    def do(self, place: Place, runs: int | None = None, seconds: float | None = None) -> int:
        """Do declared runs that nobody has done and no other process is at; how many were done.

        Args:
            place: where.
            runs: leave after so many.
            seconds: begin none after so long.
        """
        began, count = time.monotonic(), 0
        results = self.results(place)
        for run in self.runs(place.quick):
            late = seconds is not None and time.monotonic() - began > seconds
            if late or (runs is not None and count >= runs):
                break
            name = self.named(run)
            with claim(place.work / self.name / "claims" / name) as mine:
                if not mine or results.has(run):
                    continue
                place.say(f"{self.name}: {name}")
                before = time.process_time()
                rows = list(self.rows(run, place))
                results.add(run, rows, time.process_time() - before)
                count += 1
        return count

    def write_pages(self, place: Place) -> None:
        """Make the pages anew from the rows that there are."""
        results = self.results(place)
        made = Finished(results.rows(), results.runs(), list(self.runs(place.quick)), place.results)
        for name, content in self.pages(made).items():
            write_text(results.folder / name, content)


def carry_out(
    experiment: Experiment,
    place: Place,
    *,
    jobs: int = 1,
    runs: int | None = None,
    seconds: float | None = None,
) -> None:
    """Do runs of an experiment and write its pages; a quick one begins anew.

    Args:
        experiment: see :mod:`voxfuse.experiments.registry`.
        place: where.
        jobs: processes, of one thread each: two do more than one of two threads.
        runs: leave after so many, in all.
        seconds: no process begins a run after so long.

    Raises:
        ValueError: an argument below 1.
        RuntimeError: a process failed.
    """
    for name, value in (("jobs", jobs), ("runs", runs), ("seconds", seconds)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}: got {value}, expected 1 or more")
    if place.quick:
        shutil.rmtree(place.work / experiment.name, ignore_errors=True)
        shutil.rmtree(place.results / experiment.name, ignore_errors=True)
    if jobs == 1:
        experiment.do(place, runs, seconds)
    else:
        _by_processes(experiment, place, jobs, runs, seconds)
    experiment.write_pages(place)


def _by_processes(
    experiment: Experiment, place: Place, jobs: int, runs: int | None, seconds: float | None
) -> None:
    """Each takes the next run that no other is at."""
    processes = []
    for k in range(jobs):
        share = None if runs is None else (runs + jobs - 1 - k) // jobs
        if share == 0:
            continue
        command = [sys.executable, "-m", "voxfuse", "experiment", experiment.name, "--share"]
        command += ["--quick"] if place.quick else []
        for option, value in (
            ("--data", place.data), ("--work", place.work), ("--out", place.results),
            ("--runs", share), ("--seconds", seconds),
        ):  # fmt: skip
            command += [] if value is None else [option, str(value)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen(command, env=environment))
    try:
        failed = [process.args for process in processes if process.wait()]
    finally:
        for process in processes:
            process.terminate()  # those that an interrupt has left
    if failed:
        raise RuntimeError(f"{experiment.name}: {len(failed)} of {jobs} processes failed")
