"""What a job will take, before it begins: patches, memory, output and time."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from voxfuse import PatchFuser
from voxfuse.fusion._memory import readable_bytes
from voxfuse.inference.night import said
from voxfuse.inference.reading import Header, header_of
from voxfuse.inference.request import Job, Probe
from voxfuse.training.dataset import Subject
from voxfuse.training.volumes import Placement, oriented, resampled_shape

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}


@dataclass(frozen=True)
class Extent:
    """A study by its headers."""

    study: Subject
    own: int  #: voxels of its own grid
    shape: tuple[int, ...]  #: of the network's grid
    channels: int
    itemsize: int  #: bytes of a voxel in its file
    patches: int


@dataclass
class Plan:
    """See :func:`plan_of`."""

    extents: list[Extent]
    unreadable: list[tuple[Subject, str]]
    calls: int
    seconds: float  #: of the network
    seconds_a_call: float
    output: int  #: bytes, before compression
    memory: dict[str, int] = field(default_factory=dict)  #: bytes by part, at the peak

    @property
    def peak(self) -> int:
        """Bytes of host memory."""
        return sum(self.memory.values())

    def lines(self, job: Job, limit: int) -> list[str]:
        """For people."""
        segmenter = job.segmenter
        patches = sum(extent.patches for extent in self.extents)
        model = segmenter.about["model"]
        size = " x ".join(map(str, segmenter.patch))
        times = f" x {segmenter.members} orientations" if segmenter.members > 1 else ""
        shown = [
            f"model    {model['kind']} {model['digest']}",
            f"studies  {len(job.studies)}"
            + (f", {len(self.unreadable)} of which cannot be read" if self.unreadable else ""),
            f"patches  {patches} of {size}, in {self.calls} calls of {segmenter.batch}{times}",
            f"memory   {readable_bytes(self.peak)} of {readable_bytes(limit)}: "
            f"{parts_of(self.memory)}",
            f"output   {readable_bytes(self.output)} before compression",
            f"time     {time_of(self.calls, self.seconds_a_call)}",
        ]
        shown += [f"         {study.name}: {why}" for study, why in self.unreadable]
        return shown

    def check(self, job: Job, limit: int) -> None:
        """Raise for a peak above ``limit``.

        Raises:
            MemoryError: the message has the parts, and the option to change.
        """
        if self.peak <= limit:
            return
        largest = max(self.extents, key=lambda extent: math.prod(extent.shape) + extent.own)
        raise MemoryError(
            f"--memory-limit: {readable_bytes(self.peak)} would not fit {readable_bytes(limit)} "
            f"({parts_of(self.memory)}; the largest study is {largest.study.name}); "
            f"{self._advice(job, largest)}"
        )

    def _advice(self, job: Job, largest: Extent) -> str:
        probabilities = self.memory.get("probabilities", 0)
        if job.probabilities and probabilities > 0.5 * self.memory["scans and labels"]:
            return "leave --probabilities out"
        dominant = max(self.memory, key=lambda name: self.memory[name])
        if dominant == "network":
            return "take a smaller --batch or --patch"
        if math.prod(largest.shape) > 2 * largest.own:
            return "take a coarser --spacing"
        return "take a coarser --spacing, or a machine with more memory"


def plan_of(job: Job, probe: Probe) -> Plan:
    """What the studies of a job take, by their headers and one call of the network.

    A mask whose voxels alone are predicted is not looked at: patches, output and time are then
    upper bounds. Memory is that of a study's arrays at the peak of reading, predicting and writing,
    all three at once where there are several studies.
    """
    extents: list[Extent] = []
    unreadable: list[tuple[Subject, str]] = []
    for study in job.studies:
        try:
            extents.append(_extent(job, study, [header_of(path) for path in study.images]))
        except ModuleNotFoundError:
            raise
        except Exception as error:  # a header may have anything in it
            unreadable.append((study, said(error)))
    segmenter = job.segmenter
    calls = sum(-(-e.patches // segmenter.batch) for e in extents) * segmenter.members
    values = 1 + 4 * segmenter.channels_written
    plan = Plan(
        extents,
        unreadable,
        calls,
        calls * probe.seconds,
        probe.seconds,
        sum(extent.own for extent in extents) * values,
    )
    plan.memory = {"process": probe.process, "network": probe.network}
    if extents:
        reading = max(_reading(extent) for extent in extents)
        held = max(_held(extent) for extent in extents)
        largest = max(extents, key=lambda extent: math.prod(extent.shape))
        fusing, probabilities = _predicting(job, largest)
        labels = 3 * max(extent.own for extent in extents)
        if len(extents) == 1:
            fusing = max(fusing + held + labels, reading)
        else:
            fusing += held + labels + reading
        plan.memory |= {"scans and labels": fusing, "probabilities": probabilities}
    return plan


def _extent(job: Job, study: Subject, headers: Sequence[Header]) -> Extent:
    first = headers[0]
    still = tuple((axis, 1) for axis in range(3))
    placement = Placement(first.affine, first.shape, still, first.shape, study.images[0])
    placement = oriented(placement, job.segmenter.data.orientation)
    shape = resampled_shape(placement, job.segmenter.data.spacing)
    return Extent(
        study,
        math.prod(first.shape),
        shape,
        sum(header.channels for header in headers),
        first.itemsize,
        job.segmenter.patches(shape),
    )


def _reading(extent: Extent) -> int:
    """Bytes while a study is read: its file, float32 twice, and one channel normalised."""
    voxels = math.prod(extent.shape)
    resampled = 4 * extent.channels * voxels if voxels != extent.own else 0
    return extent.own * (extent.itemsize + 8 * extent.channels + 2) + resampled + 28 * voxels


def _held(extent: Extent) -> int:
    """Bytes of a study as the network takes it, with its mask cut as a channel."""
    return math.prod(extent.shape) * (4 * (2 * extent.channels + 1) + 1) + extent.own


def _predicting(job: Job, extent: Extent) -> tuple[int, int]:
    """Bytes of the fusion, and of probabilities."""
    segmenter = job.segmenter
    padded = tuple(max(n, p) for n, p in zip(extent.shape, segmenter.patch, strict=True))
    output = "labels" if segmenter.classes > 1 else "mask"
    fuser = PatchFuser(
        padded,
        segmenter.patch,
        segmenter.classes,
        overlap=segmenter.overlap,
        output=output,
        activation="identity" if output == "mask" else "none",
    )
    fusing = fuser.plan()
    ring = fusing.ring_bytes + fusing.weight_bytes + fusing.output_bytes
    if not segmenter.fuses_probabilities:
        return ring, 0
    values = 4 * segmenter.classes
    # On the network's grid; on the file's own; turned back, and as they are written.
    return ring, values * (math.prod(extent.shape) + 3 * extent.own)


# --- Of the machine -------------------------------------------------------------------------------


def parse_bytes(text: str) -> int:
    """Bytes of a size such as 24G or 512MB (powers of 1000) or 24GiB (of 1024).

    Raises:
        ValueError: no such size.

    Example:
        >>> from voxfuse.inference.plan import parse_bytes
        >>> parse_bytes("1.5G"), parse_bytes("2 MiB")
        (1500000000, 2097152)
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(i?)b?\s*", text.lower())
    try:
        assert found is not None
        unit = _UNITS[found[2]]
        if found[3]:
            unit = 1024 ** round(math.log(unit, 1000))
        size = int(float(found[1]) * unit)
        assert size > 0
    except (AssertionError, ValueError, OverflowError):
        raise ValueError(f"--memory-limit: got {text!r}, expected a size such as 24G") from None
    return size


def memory_of_machine(root: Path = Path("/")) -> int:
    """Bytes that this process may have: the machine's, or less where a cgroup says so."""
    limits = []
    meminfo = root / "proc/meminfo"
    if meminfo.is_file():
        found = re.search(r"^MemTotal:\s+(\d+) kB", meminfo.read_text(), re.M)
        if found:
            limits.append(int(found[1]) * 1024)
    groups = root / "proc/self/cgroup"
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, place = line.split(":", 2)
        if controllers == "":  # version 2: one hierarchy of all
            base, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            base, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        # A group has at most what those above it have. In a container its own may be the root.
        folder = base / place.lstrip("/")
        for above in [folder, *folder.parents]:
            file = above / name
            if file.is_file() and file.read_text().strip().isdigit():
                limits.append(int(file.read_text()))
            if above == base:
                break
    return min(limits, default=1 << 62)


def duration(seconds: float) -> str:
    """A time for people."""
    for size, unit in ((3600, "h"), (60, "min")):
        if seconds >= 1.6 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def time_of(calls: float, seconds_a_call: float) -> str:
    """What calls take, as plans say it."""
    return (
        f"{duration(calls * seconds_a_call)} in the network, at {seconds_a_call:.2g} s a call "
        "(measured)"
    )


def parts_of(memory: Mapping[str, int]) -> str:
    """Memory by part, as plans say it."""
    return ", ".join(f"{name} {readable_bytes(count)}" for name, count in memory.items())
