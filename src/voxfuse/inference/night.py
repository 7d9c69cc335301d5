"""One study after the other: the next is read while one is predicted and the last is written."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from voxfuse._backends import versions
from voxfuse._files import move_file, staging, unfinished, write_text
from voxfuse.inference.dicom import is_dicom
from voxfuse.inference.models import digest_of_file
from voxfuse.inference.segmenters import Overdue, Segmentation, Segmenter, Watch
from voxfuse.metrics.files import probabilities_of
from voxfuse.training.dataset import DataError, Subject
from voxfuse.training.volumes import Placement, Volume

#: Folder of the statuses, and file of the summary, below the output's.
STATUS, SUMMARY = "status", "summary.json"


class Refused(FileExistsError):
    """What is there is another study's, and stays, as does its status."""


@dataclass(frozen=True)
class Target:
    """Where a study's segmentation goes."""

    path: Path
    beside: Path | None = None  #: of the probabilities
    status: Path | None = None

    @property
    def paths(self) -> list[Path]:
        """All of it."""
        return [self.path] if self.beside is None else [self.path, self.beside]

    def below(self, folder: Path) -> Target:
        """The same files in another folder."""
        beside = None if self.beside is None else folder / self.beside.name
        return Target(folder / self.path.name, beside)

    @property
    def exists(self) -> bool:
        """Whether all of it is there."""
        return all(path.exists() for path in self.paths)

    def recorded(self) -> dict[str, Any]:
        """The status as it is there; {} without a legible one."""
        try:
            content = json.loads(self.status.read_text("utf-8")) if self.status else {}
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def foreign(self) -> list[Path]:
        """Files that are there and of which the status does not say that they are ours."""
        known = _digests(self.recorded())
        there = [path for path in self.paths if path.exists()]
        return [path for path in there if path.is_dir() or digest_of_file(path) not in known]

    def is_of_others(self, images: Sequence[str]) -> bool:
        """Whether what is there is, by its status, of other images than those with these digests.

        Of another model the same study may have fewer images, or more.
        """
        stem = self.path.name.removesuffix(".dcm").removesuffix(".gz").removesuffix(".nii")
        endings = (".nii.gz", ".nii", ".dcm", "_probabilities.nii.gz")  # which share a status
        there = any(self.path.with_name(stem + ending).exists() for ending in endings)
        before, given = set(self.recorded().get("inputs", ())), set(images)
        return there and bool(before) and not (given <= before or before <= given)


def _digests(status: Mapping[str, Any]) -> list[str]:
    """SHA-256 of the files that are ours by a status."""
    written = [status[key] for key in ("output", "probabilities") if key in status]
    return sorted({*written, *status.get("earlier", ())})


@dataclass
class Outcome:
    """What became of a study."""

    name: str
    state: str  #: "done", "kept" or "failed"
    target: Target
    error: str = ""
    refused: bool = False  #: whether it failed as what is there is another study's
    note: str = ""  #: what looks wrong
    voxels: int = 0
    seconds: dict[str, float] = field(default_factory=dict)


class _Task:
    """A function at work in a thread of its own, which is left behind where it does not end."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.future: Future[Any] = Future()
        self.begun = time.monotonic()
        threading.Thread(target=self._work, args=(function, arguments), daemon=True).start()

    def _work(self, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
        try:
            self.future.set_result(function(*arguments))
        except BaseException as error:
            self.future.set_exception(error)

    def result(self, timeout: float | None) -> Any:
        """What the function returns or raises.

        Raises:
            Overdue: it has worked for longer than ``timeout`` seconds.
        """
        left = None if timeout is None else max(0.0, self.begun + timeout - time.monotonic())
        try:
            return self.future.result(left)
        except TimeoutError as error:
            if self.future.done():
                raise
            raise Overdue("took longer than --timeout allows") from error


@dataclass(frozen=True)
class _Read:
    """A study in memory."""

    volume: Volume
    digests: list[str]
    seconds: float


class Night:
    """A batch of studies.

    Args:
        segmenter: reads and predicts.
        write: writes to the paths of a :class:`Target`, in a folder from which all of its files
            take their places when they are whole.
        timeout: seconds that reading and predicting a study, and writing it, may take; a call of
            the network is not interrupted, but no further one begins.
        skip_existing: leave out studies whose output is there, unless their status is of another
            model, other options or other images.
        overwrite: replace what is there even if its status tells of other images; else the study
            fails, and what is there stays.
        report: called with what became of a study, as soon as that is known.
        progress: called with a study's name and the calls of the network so far.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        write: Callable[[Segmentation, Placement, Target], None],
        *,
        timeout: float | None = None,
        skip_existing: bool = False,
        overwrite: bool = False,
        report: Callable[[Outcome], object] = lambda outcome: None,
        progress: Callable[[Subject, Volume, int], object] | None = None,
    ) -> None:
        self._segmenter, self._write = segmenter, write
        self._timeout, self._skip, self._overwrite = timeout, skip_existing, overwrite
        self._report, self._progress = report, progress
        self._deciding = threading.Lock()  # whether a study was written in time
        self._made: set[tuple[int, int]] = set()  # files of this night
        self.outcomes: list[Outcome] = []
        #: Seconds of the whole batch, and of the network's calls in it.
        self.seconds, self.network_seconds = 0.0, 0.0

    def run(self, studies: Sequence[Subject], targets: Sequence[Target]) -> list[Outcome]:
        """Segment the studies in their order; one that fails does not stop the others."""
        begun = time.monotonic()
        work: list[tuple[Subject, Target]] = []
        for study, target in zip(studies, targets, strict=True):
            if self._skip and target.exists and self._is_current(study, target):
                self._done(Outcome(study.name, "kept", target))
            else:
                work.append((study, target))
        try:
            self._work(work)
        finally:
            self.seconds = time.monotonic() - begun
        return self.outcomes

    def _work(self, work: list[tuple[Subject, Target]]) -> None:
        writing: tuple[_Task, Subject, Outcome] | None = None
        reading = _Task(self._read, *work[0]) if work else None
        for k, (study, target) in enumerate(work):
            outcome = Outcome(study.name, "failed", target)
            result: tuple[Segmentation, _Read] | None = None
            try:
                assert reading is not None
                current, reading = reading, None
                read = current.result(self._timeout)
                if k + 1 < len(work):
                    reading = _Task(self._read, *work[k + 1])
                result = self._predict(study, read, outcome), read
            except Exception as error:
                outcome.error, outcome.refused = said(error), isinstance(error, Refused)
            if reading is None and k + 1 < len(work):
                reading = _Task(self._read, *work[k + 1])
            if writing is not None:  # one at a time, so that results do not pile up
                self._written(*writing)
                writing = None
            if result is None:
                self._failed(study, outcome)
            else:
                writing = _Task(self._finish, study, *result, outcome), study, outcome
        if writing is not None:
            self._written(*writing)

    def _read(self, study: Subject, target: Target) -> _Read:
        begun = time.perf_counter()
        volume = self._segmenter.read(study)
        digests = digests_of(study)
        self._check_other(study, target, digests)
        return _Read(volume, digests, time.perf_counter() - begun)

    def _check_other(self, study: Subject, target: Target, digests: Sequence[str]) -> None:
        """Raise where another study's result would be replaced.

        Raises:
            Refused: with the file.
        """
        if not self._overwrite and target.is_of_others(digests[: len(study.images)]):
            raise Refused(
                f"{study.name}: {target.path} is, by its status, of other images than "
                f"{study.images[0]}; expected another --output, or --overwrite"
            )
        # Of names that differ in case alone some file systems make one file.
        if target.path.exists() and _identity(target.path) in self._made:
            raise Refused(f"{study.name}: {target.path} is another study's of this batch")

    def _predict(self, study: Subject, read: _Read, outcome: Outcome) -> Segmentation:
        deadline = None
        if self._timeout is not None:
            deadline = time.monotonic() + self._timeout - read.seconds
        watch = Watch(deadline)
        if self._progress is not None:
            seen = self._progress
            watch.called = lambda calls: seen(study, read.volume, calls)
        begun = time.perf_counter()
        try:
            return self._segmenter.predict(read.volume, watch)
        finally:
            self.network_seconds += watch.seconds
            outcome.seconds = {
                "read": read.seconds,
                "predict": time.perf_counter() - begun,
                "network": watch.seconds,
            }

    def _finish(
        self, study: Subject, segmentation: Segmentation, read: _Read, outcome: Outcome
    ) -> None:
        begun = time.perf_counter()
        placement = read.volume.placement
        target = outcome.target
        self._check_other(study, target, read.digests)  # another process may have written it since
        target.path.parent.mkdir(parents=True, exist_ok=True)
        for path in target.paths:  # of a process that was killed
            for left in unfinished(path.parent, path.name):
                if left.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
                else:
                    left.unlink(missing_ok=True)
        with staging(target.path) as folder:
            made = target.below(folder)
            self._write(segmentation, placement, made)
            outcome.voxels = int(np.count_nonzero(segmentation.labels))
            outcome.seconds["write"] = time.perf_counter() - begun
            counts = np.bincount(segmentation.labels.reshape(-1).astype(np.int64))
            found = {
                "shape": list(segmentation.labels.shape),
                "network_shape": list(read.volume.mask.shape),
                "voxels": {str(value): int(n) for value, n in enumerate(counts) if n},
                "inputs": read.digests,
                "output": digest_of_file(made.path),
            }
            if segmentation.note:
                found["note"] = outcome.note = segmentation.note
            if made.beside is not None:
                found["probabilities"] = digest_of_file(made.beside)
            before = target.recorded()
            earlier = _digests(before)
            if target.beside is None and earlier:  # its probabilities may stay
                found["earlier"] = earlier
            outdated = self._outdated(target, before, read.digests)
            with self._deciding:
                if outcome.error:  # too late: it has failed already
                    return
                # Whenever the process dies, the status has all that may be there from now on, and
                # probabilities lie beside no other labels than theirs.
                known = {"earlier": sorted({*earlier, *_digests(found)}), "inputs": read.digests}
                self._status(study, replace(outcome, state="writing"), known)
                if outdated is not None:
                    outdated.unlink(missing_ok=True)
                for file, path in zip(made.paths, target.paths, strict=True):
                    move_file(file, path)
                self._status(study, replace(outcome, state="done"), found)
                outcome.state = "done"
                self._made.add(_identity(target.path))

    def _outdated(
        self, target: Target, before: Mapping[str, Any], digests: Sequence[str]
    ) -> Path | None:
        """Earlier probabilities that would lie beside labels that are not theirs."""
        if target.beside is not None:
            return target.beside
        beside = probabilities_of(target.path)
        if self._is_same(before, digests, "probabilities") or not beside.is_file():
            return None
        return beside if digest_of_file(beside) in _digests(before) else None

    def _written(self, task: _Task, study: Subject, outcome: Outcome) -> None:
        try:
            task.result(self._timeout)
        except Exception as error:
            with self._deciding:
                if outcome.state != "done":
                    outcome.error, outcome.refused = said(error), isinstance(error, Refused)
        if outcome.error:
            self._failed(study, outcome)
        else:
            self._done(outcome)

    def _failed(self, study: Subject, outcome: Outcome) -> None:
        if outcome.refused:
            self._done(outcome)
            return
        try:
            content = outcome.target.recorded()
            ours = _digests(content)
            known = {"earlier": ours} if ours else {}
            if ours and "inputs" in content:
                known["inputs"] = content["inputs"]  # of what is there
            self._status(study, outcome, known)
        except OSError as error:
            outcome.error += f"; its status was not written: {error}"
        self._done(outcome)

    def _done(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        self._report(outcome)

    def _status(self, study: Subject, outcome: Outcome, found: Mapping[str, Any]) -> None:
        path = outcome.target.status
        if path is None:
            return
        content = {
            "state": outcome.state,
            **self._segmenter.about,
            **found,
            "seconds": {part: round(s, 3) for part, s in outcome.seconds.items()},
            "versions": {**versions(), "python": platform.python_version()},
            "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }
        if outcome.error:
            content["error"] = nameless(outcome.error, study, outcome.target)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(content, indent=2) + "\n")

    def _is_current(self, study: Subject, target: Target) -> bool:
        """Whether a segmentation is of this model, these options and these images.

        Without a status nothing is known against it.
        """
        if target.status is None or not target.status.is_file():
            return True
        try:
            content = target.recorded()
            written = [content["output"]]
            if target.beside is not None:
                written.append(content["probabilities"])
            return self._is_same(content, digests_of(study)) and written == [
                digest_of_file(path) for path in target.paths
            ]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _is_same(self, status: Mapping[str, Any], digests: Sequence[str], *but: str) -> bool:
        """Whether a status tells of this model, these options, ``but`` for some, and images."""
        # As JSON has it: tuples are lists there.
        about = json.loads(json.dumps(self._segmenter.about))
        return (
            status.get("state") == "done"
            and all(_compared(status.get(key), but) == _compared(about[key], but) for key in about)
            and status.get("inputs") == digests
        )

    def summary(self) -> dict[str, Any]:
        """All outcomes, as they are written beside the segmentations."""
        states = {"done": 0, "kept": 0, "failed": 0}
        for outcome in self.outcomes:
            states[outcome.state] += 1
        return {
            **states,
            "seconds": round(self.seconds, 3),
            "network_seconds": round(self.network_seconds, 3),
            **self._segmenter.about,
            "studies": {
                outcome.name: {
                    "state": outcome.state,
                    "seconds": {part: round(s, 3) for part, s in outcome.seconds.items()},
                    **({"error": outcome.error} if outcome.error else {}),
                }
                for outcome in self.outcomes
            },
        }


def _compared(about: Any, but: Sequence[str]) -> Any:
    """What a result depends on: not on the patches of a call."""
    if not isinstance(about, dict):
        return about
    but = ("batch", *but)
    return {key: _compared(value, but) for key, value in about.items() if key not in but}


def _identity(path: Path) -> tuple[int, int]:
    """What tells a file from another, whatever its name."""
    about = path.stat()
    return about.st_dev, about.st_ino


def digests_of(study: Subject) -> list[str]:
    """SHA-256 of a study's images, and of its mask."""
    found = []
    for path in (*study.images, *([study.mask] if study.mask else [])):
        if path.is_dir():
            files = sorted(
                digest_of_file(file)
                for file in path.iterdir()
                if file.is_file() and is_dicom(file)  # and no .DS_Store
            )
            found.append(f"sha256:{hashlib.sha256(''.join(files).encode()).hexdigest()}")
        else:
            found.append(digest_of_file(path))
    return found


def said(error: BaseException) -> str:
    """An error in a line; its type where that is not for users."""
    text = " ".join(str(error).split())
    if isinstance(error, ValueError | OSError | RuntimeError | DataError) and text:
        return text
    return f"{type(error).__name__}: {text}".rstrip(": ")


def nameless(text: str, study: Subject, target: Target | None = None) -> str:
    """A message without paths and names of a study and its files, which may be a patient's."""
    folders = {path.parent for path in study.images}
    if target is not None:
        written = {"output": target.path, "probabilities": target.beside, "status": target.status}
        paths = {what: path for what, path in written.items() if path is not None}
        for end, left in (("/", ""), ("", r"\1")):  # while they are written
            for path in paths.values():
                part = rf"\.({re.escape(path.name)})\.[0-9a-f]{{32}}\.part{end}"
                text = re.sub(part, left, text)
        for what, path in paths.items():
            text = _without_path(path, f"the {what}", text)
        folders |= {path.parent for path in paths.values()}
    for k, path in enumerate(study.images):
        for file in path.iterdir() if path.is_dir() else ():
            text = _without_path(file, f"a slice of image {k}", text)
        text = _without(path.name, f"image {k}", _without_path(path, f"image {k}", text))
    if study.mask is not None:
        text = _without_path(study.mask, "the mask", text)
    for folder in sorted(folders, key=lambda folder: len(str(folder)), reverse=True):
        text = _without_path(folder, "its folder", text)
    return _without(study.name, "the study", text)


def _without_path(path: Path, instead: str, text: str) -> str:
    """A path, as it is and from the root; of a single word, as "in" is one, only as a path."""
    for each in (str(path.absolute()), str(path)):
        one = re.escape(each)
        found = rf"(?<![\w./]){one}(?!\w)"
        if "/" not in each and "." not in each:
            found = rf"(?<![\w./]){one}(?=/)|(?<=['\"]){one}(?=['\"])"
        if each not in (".", "/"):
            text = re.sub(found, instead, text)
    return text


def _without(name: str, instead: str, text: str) -> str:
    """Only whole words, of which ``_`` is no part: a name may be a digit."""
    return re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", instead, text)
