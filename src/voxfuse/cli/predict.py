"""``voxfuse predict``: segmentations of scans by a trained run or any other network."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # Imported where the command runs: no other command needs them.
    from voxfuse.inference.night import Night, Outcome
    from voxfuse.inference.request import Job, Request
    from voxfuse.inference.volumes import Cost

DESCRIPTION = """\
Segment scans with a model that `voxfuse train` made, a program that torch.export saved, or a
network in a module of Python. A study's segmentation lies on its own grid; outside the mask it is
background. One study is written to OUT if that ends as an image does, several to OUT/STUDY.nii.gz
with OUT/status/STUDY.json and OUT/summary.json; a file that is there is replaced only if its status
says that it is as this command wrote it, of the same images, or with --overwrite, and never a
study's image or mask.
Exit status: 0; 1 if nothing was written; 3 if some studies failed; 130 if interrupted.
"""

#: Some studies failed.
SOME_FAILED = 3
#: Ended by Ctrl-C, as a shell says it.
INTERRUPTED = 130


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "predict", help="segment scans with a trained model", description=DESCRIPTION
    )
    parser.add_argument(
        "--model", required=True, metavar="MODEL",
        help="what voxfuse train --out wrote; FILE.pt2; MODULE:ATTR or FILE.py:ATTR, a network or "
        "a function that returns one",
    )  # fmt: skip
    parser.add_argument(
        "--input", type=Path, required=True, nargs="+", action="extend", metavar="PATH",
        help="a file a modality, in the network's order (also --input A --input B); a folder of a "
        "file a study, of nnU-Net's images, or such a folder a modality; of a run also a subject's "
        "folder, or a folder of those",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="file or folder")
    _add_results(parser)
    _add_patches(parser)
    _add_data(parser)
    _add_running(parser)
    _add_boxes(parser)
    parser.set_defaults(run=_predict)


def _add_results(parser: argparse.ArgumentParser) -> None:
    decided = parser.add_mutually_exclusive_group()
    decided.add_argument(
        "--labels", action="store_true",
        help="write the greatest of the classes, as it is by default where there are several",
    )  # fmt: skip
    decided.add_argument(
        "--regions", type=int, nargs="+", metavar="VALUE",
        help="channels are regions, decided one by one; write these values, later ones on top",
    )  # fmt: skip
    parser.add_argument(
        "--format", choices=["nifti", "dicom"],
        help="of what is written to a folder: OUT/STUDY.nii.gz, or of DICOM series OUT/STUDY.dcm, "
        "DICOM-SEG (--output FILE.dcm of one)",
    )  # fmt: skip
    parser.add_argument(
        "--probabilities", action="store_true",
        help="write STUDY_probabilities.nii.gz besides: float32, (x, y, z), or (x, y, z, C) with a "
        "channel a label above 0, or a region; the header says which, to voxfuse evaluate; "
        "of a Zarr volume an OME-Zarr image, uint8 in steps of 1/255",
    )  # fmt: skip
    parser.add_argument(
        "--threshold", type=float,
        help="p >= threshold is foreground; p > threshold of networks and regions (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--activation", metavar="NAME",
        help="of a network: softmax (default of several classes), sigmoid (of one, and regions), "
        "identity (it predicts probabilities) or none",
    )  # fmt: skip


def _add_patches(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--patch", type=int, nargs="+", metavar="N",
        help="extent of a patch, one number or three; an export's own by default",
    )  # fmt: skip
    parser.add_argument(
        "--window",
        help="weights of a patch's voxels, such as bspline or hashemi (default: the run's; of "
        "networks bspline)",
    )  # fmt: skip
    parser.add_argument(
        "--overlap", type=float,
        help="share of a patch that the next one has too (default: the run's; of networks 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--grid", choices=["shifted", "even", "half_patch"],
        help="where patches lie: in the scan, the last one shifted back; in it at even distances; "
        "or half a patch over its border, where it is reflected, with an overlap of 0.5 (default: "
        "the run's; of networks shifted)",
    )  # fmt: skip
    parser.add_argument(
        "--tta", "--orientations", dest="orientations", choices=["none", "rotations", "mirror"],
        help="predictions averaged: four turned by 180 degrees, or eight flips (default: the "
        "run's; of networks none)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", type=int,
        help="patches a call of the network (default: the run's; of networks 1, or as many as an "
        "export takes at least)",
    )  # fmt: skip
    parser.add_argument(
        "--head", metavar="LAYER",
        help="the network's last layer, a convolution of extent 1, by name; or FILE.npz with "
        "weight and bias, if the network returns features: fused where they are the fewer",
    )  # fmt: skip


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--orientation", metavar="RAS",
        help="axes that a network's scans are turned to, or '' as they are (default: RAS)",
    )  # fmt: skip
    parser.add_argument(
        "--spacing", type=float, nargs="+", metavar="MM",
        help="voxel size that they are resampled to, along the turned axes (default: as it is)",
    )  # fmt: skip
    parser.add_argument(
        "--normalize", metavar="HOW",
        help="zscore, robust, range, none (default), or LOW:HIGH, which become 0 and 1",
    )  # fmt: skip
    parser.add_argument(
        "--clip", type=float, nargs=2, metavar=("LOW", "HIGH"),
        help="percentiles to which intensities are clipped before",
    )  # fmt: skip
    parser.add_argument(
        "--mask", metavar="NAME",
        help="what is normalised and predicted: all (default), positive (first modality > 0), or "
        "a file beside it, without the ending",
    )  # fmt: skip


def _add_running(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-model", action="store_true", help="load FILE.pt2, though that can run code"
    )
    parser.add_argument(
        "--model-id", metavar="ID", help="what the model is called in a status, for its digest"
    )
    parser.add_argument("--device", default="auto", help="as PyTorch names it (default: auto)")
    parser.add_argument(
        "--skip-existing", action="store_true",
        help="leave out studies that are there, but not of another model or other options",
    )  # fmt: skip
    parser.add_argument(
        "--overwrite", action="store_true",
        help="replace files that are there, even if this command did not write them, or wrote them "
        "for other images",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, metavar="SECONDS", help="of a study; then it has failed"
    )
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print patches, memory, output and time, measured by a call of the network; no more",
    )  # fmt: skip
    parser.add_argument(
        "--memory-limit", metavar="SIZE",
        help="such as 24G: what would not fit does not begin (default: what the machine has)",
    )  # fmt: skip
    parser.add_argument("--quiet", action="store_true", help="print failures alone")


def _add_boxes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prepare", type=int, nargs="?", const=1, metavar="N",
        help="of a Zarr volume: make the output and OUT.job, the plan that processes share, with "
        "boxes for N of them (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--shard", metavar="I/N",
        help="of a prepared volume: predict the I-th of N parts, counted from 0; again what died",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, metavar="N",
        help="of a volume: predict its boxes in N processes of one thread each, which may die",
    )  # fmt: skip
    parser.add_argument(
        "--scheduler", metavar="ADDRESS",
        help="of a volume: predict its boxes on the workers of this scheduler of Dask, tls://...",
    )  # fmt: skip
    parser.add_argument(
        "--without-tls", action="store_true",
        help="whoever reaches the scheduler runs code on its workers; nobody else reaches this one",
    )  # fmt: skip
    parser.add_argument(
        "--foreground", metavar="LEVEL|VOLUME",
        help="of a Zarr volume: leave out patches without a voxel above LEVEL, or 0 in VOLUME",
    )  # fmt: skip


def _predict(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except KeyboardInterrupt:
        print("voxfuse predict: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (
        ValueError, TypeError, OSError, RuntimeError, MemoryError, ImportError,
    ) as error:  # fmt: skip
        print(f"voxfuse predict: {error}", file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    from voxfuse._files import check_writable, write_text
    from voxfuse.inference.night import SUMMARY, Night
    from voxfuse.inference.plan import memory_of_machine, parse_bytes, plan_of
    from voxfuse.inference.request import Request, is_volume, prepare

    if options.timeout is not None and not options.timeout > 0:
        raise ValueError(f"--timeout: got {options.timeout:g}, expected seconds above 0")
    limit = parse_bytes(options.memory_limit) if options.memory_limit else memory_of_machine()
    names = {field.name for field in dataclasses.fields(Request)}
    request = Request(**{k: v for k, v in vars(options).items() if k in names})
    if is_volume(request):
        return _volume(options, request, limit)
    for name in ("prepare", "shard", "foreground", "workers", "scheduler", "without_tls"):
        if getattr(options, name) not in (None, False):
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: is for a volume in boxes, of Zarr")
    job = prepare(request)
    wanted = options.dry_run or options.memory_limit
    planned = plan_of(job, job.probe() if wanted else job.first)
    if options.dry_run:
        print("\n".join(planned.lines(job, limit)))
        planned.check(job, limit)
        return (SOME_FAILED if planned.extents else 1) if planned.unreadable else 0
    planned.check(job, limit)
    check_writable(options.output if job.to_folder else options.output.parent, "--output")
    shown = _Progress(job, options.quiet)

    def write_summary() -> None:
        if job.to_folder:
            count = len(job.studies)
            finished = {"of": count, "finished": len(night.outcomes) == count}
            text = json.dumps({**finished, **night.summary()}, indent=2)
            write_text(options.output / SUMMARY, text + "\n")

    def report(outcome: Outcome) -> None:
        shown.outcome(outcome)
        if outcome.state != "kept":
            with contextlib.suppress(OSError):  # a full disk: the studies' errors say so
                write_summary()

    night = Night(
        job.segmenter,
        job.write,
        timeout=options.timeout,
        skip_existing=options.skip_existing,
        overwrite=options.overwrite,
        report=report,
        progress=shown.calls,
    )
    write_summary()  # in place of an earlier night's
    try:
        outcomes = night.run(job.studies, job.targets)
    finally:
        write_summary()
    return _ending(outcomes, night, options.quiet)


def _volume(options: argparse.Namespace, request: Request, limit: int) -> int:
    """A volume in boxes: prepare it, predict a shard of it, or both, here or on a cluster."""
    from voxfuse.inference.volumes import open_volume, parse_shard

    shard = parse_shard(options.shard) if options.shard else (0, 1)
    _check_boxes(options)
    shown = _Boxes(options.quiet)
    if options.scheduler:
        return _on_scheduler(options, request, shown)
    if options.shard:
        if not request.output.exists():
            raise FileNotFoundError(f"--shard: there is no {request.output}; --prepare makes it")
        volume = open_volume(request)
        volume.cost(volume.job.plan(volume.folder)).check(limit)
        volume.job.run(volume.folder, shard, progress=shown)
        return 0
    if options.workers:
        from voxfuse.inference.cluster import one_thread

        with one_thread():
            return _not_a_shard(options, request, limit, shown)
    return _not_a_shard(options, request, limit, shown)


def _not_a_shard(options: argparse.Namespace, request: Request, limit: int, shown: _Boxes) -> int:
    """Plan a volume, prepare it, or all of it."""
    from voxfuse.inference.volumes import open_volume, settle

    workers = options.workers
    shards = options.prepare or workers or 1
    if options.dry_run:
        volume = open_volume(request, options.foreground, shards=shards)
        cost = volume.cost(volume.job.plan(), measured=True)
        print("\n".join(cost.lines(limit, workers or 1)))
        cost.check(limit, workers)
        return 0

    def check(cost: Cost) -> None:
        cost.check(limit, workers)

    volume, cost = settle(request, check, options.foreground, shards, bool(options.prepare))
    if not options.quiet:
        print(cost.plan)
    if options.prepare:
        return 0
    if not workers:
        volume.job.run(volume.folder, progress=shown)
        return 0
    from voxfuse.inference.cluster import Cluster, local_cluster

    memory = sum(cost.memory.values())
    with (
        local_cluster(workers, memory, options.quiet) as client,
        Cluster(client, request, threads=1) as cluster,
    ):
        cluster.predict(shown)
    return 0


def _on_scheduler(options: argparse.Namespace, request: Request, shown: _Boxes) -> int:
    """The same on workers that load the model, which this process does not."""
    from voxfuse.inference.cluster import Cluster, client_of

    if options.dry_run or options.memory_limit:
        name = "dry-run" if options.dry_run else "memory-limit"
        raise ValueError(f"--{name}: is for what is predicted here, without --scheduler")
    with (
        client_of(options.scheduler, options.without_tls) as client,
        Cluster(client, request) as cluster,
    ):
        if not (cluster.memory() or options.quiet):
            print("voxfuse predict: waiting for a worker", file=sys.stderr)
        cluster.wait()
        threads = cluster.threads()
        if max(threads, default=1) > 1 and not options.quiet:
            print(
                "voxfuse predict: a worker does one box at a time, whatever threads it has, and "
                "keeps others waiting; dask worker --nthreads 1 starts one of one thread",
                file=sys.stderr,
            )
        cost = cluster.settle(
            foreground=options.foreground,
            shards=options.prepare or len(threads),
            again=options.prepare is not None,
        )
        if not options.quiet:
            print(f"{cost.plan}\nworkers that are there: {len(threads)}")
        if not options.prepare:
            cluster.predict(shown)
    return 0


def _check_boxes(options: argparse.Namespace) -> None:
    """Raise for options that do not go together."""
    for name in ("skip_existing", "overwrite", "timeout"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')}: is for studies")
    for name in ("prepare", "workers"):
        number = getattr(options, name)
        if number is not None and number < 1:
            what = "shards" if name == "prepare" else "processes"
            raise ValueError(f"--{name}: got {number}, expected a number of {what} >= 1")
    if options.prepare and options.shard:
        raise ValueError("--prepare: is done once and before; --shard predicts, expected one")
    if options.foreground and options.shard:
        raise ValueError("--foreground: is said to --prepare, which shards read")
    engines = [f"--{name}" for name in ("shard", "workers", "scheduler") if getattr(options, name)]
    if len(engines) > 1:
        raise ValueError(f"{engines[0]}: got {' and '.join(engines)}, expected one of them")
    if options.without_tls and not options.scheduler:
        raise ValueError("--without-tls: is for --scheduler")


class _Boxes:
    """A line whenever a box is done."""

    def __init__(self, quiet: bool) -> None:
        self._quiet, self._begun = quiet, time.monotonic()

    def __call__(self, done: int, count: int) -> None:
        from voxfuse.inference.plan import duration

        if not self._quiet:
            left = (time.monotonic() - self._begun) / done * (count - done)
            print(f"{done}/{count} boxes; {duration(left)} left", flush=True)


class _Progress:
    """A line a study, and on a terminal how far the present one is."""

    def __init__(self, job: Job, quiet: bool) -> None:
        self._job, self._count, self._quiet = job, len(job.studies), quiet
        self._live = sys.stderr.isatty() and not quiet
        self._begun = self._last = time.monotonic()
        self._seen = self._worked = 0
        self._noted = False

    def calls(self, study: Any, volume: Any, calls: int) -> None:
        """Called after every call of the network."""
        from voxfuse.inference.plan import duration

        now = time.monotonic()
        if not self._live or (calls > 1 and now - self._last < 0.2):
            return
        if calls == 1:
            self._first, self._total = now, self._job.calls(volume.mask.shape)
        self._last = now
        left = ""
        if calls > 1:
            rate = (now - self._first) / (calls - 1)
            left = f", {duration(rate * max(self._total - calls, 0))} left"
        text = f"\r{study.name}: call {calls} of {self._total}{left}\x1b[K"
        print(text, end="", file=sys.stderr, flush=True)

    def outcome(self, outcome: Outcome) -> None:
        """Called when a study is done."""
        from voxfuse.inference.plan import duration

        self._seen += 1
        self._worked += outcome.state != "kept"
        if self._live:
            print("\r\x1b[K", end="", file=sys.stderr)
        if self._quiet:
            return
        if outcome.note and not self._noted:
            self._noted = True
            print(f"voxfuse predict: {outcome.name}: {outcome.note}", file=sys.stderr)
        what = {
            "done": f"{outcome.voxels} voxels, {outcome.target.path}",
            "kept": f"is there, {outcome.target.path}",
            "failed": f"failed: {outcome.error}",
        }[outcome.state]
        left = ""
        if self._worked and self._seen < self._count:
            each = (time.monotonic() - self._begun) / self._worked
            left = f"; {duration(each * (self._count - self._seen))} left"
        print(f"{self._seen}/{self._count} {outcome.name}: {what}{left}", flush=True)


def _ending(outcomes: list[Outcome], night: Night, quiet: bool) -> int:
    """Name what failed; the exit status."""
    from voxfuse.inference.plan import duration

    failed = [outcome for outcome in outcomes if outcome.state == "failed"]
    if len(outcomes) == 1 and failed:
        print(f"voxfuse predict: {failed[0].error}", file=sys.stderr)
        return 1
    if len(outcomes) > 1 and not quiet:
        done = sum(outcome.state == "done" for outcome in outcomes)
        share = night.network_seconds / night.seconds if night.seconds else 0.0
        print(
            f"{done} of {len(outcomes)} segmented in {duration(night.seconds)}, {share:.0%} of it "
            "the network's"
        )
    if not failed:
        return 0
    print(f"voxfuse predict: {len(failed)} of {len(outcomes)} failed:", file=sys.stderr)
    for outcome in failed:
        print(f"  {outcome.name}: {outcome.error}", file=sys.stderr)
    return 1 if len(failed) == len(outcomes) else SOME_FAILED
