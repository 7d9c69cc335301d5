"""``voxfuse experiment``: the runs of an experiment, its rows and pages."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Do the runs of an experiment that are not done yet, add their rows to OUT/NAME/results.csv and make
its page anew. It may be killed at any moment and called again: finished runs stay, and one that was
killed goes on from its last checkpoint.
"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "experiment", help="measure what a paper claims, on real patients", description=DESCRIPTION
    )
    parser.add_argument(
        "name", metavar="NAME", help="losses, lesions, fusion or bounds: docs/experiments/README.md"
    )
    parser.add_argument(
        "--quick", action="store_true",
        help="the same in little, begun anew, with its rows and page in WORK/quick",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", default=os.environ.get("VOXFUSE_DATA"),
        help="the folder above the data sets (default: VOXFUSE_DATA, or ../shared/data)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="OUT", default="docs/experiments",
        help="results are in OUT/NAME (default: docs/experiments)",
    )  # fmt: skip
    parser.add_argument(
        "--work", type=Path, metavar="WORK",
        default=Path.home() / ".cache" / "voxfuse" / "experiments",
        help="models, and what is made of the data (default: ~/.cache/voxfuse/experiments)",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="processes of one thread (default: 1)"
    )
    parser.add_argument("--runs", type=int, metavar="N", help="leave after so many runs in all")
    parser.add_argument("--seconds", type=float, metavar="S", help="begin no run after so long")
    parser.add_argument(
        "--page", action="store_true", help="do no runs: make the pages from the rows there are"
    )
    # What a process of --jobs is called with: runs alone, in the folders as they are.
    parser.add_argument("--share", action="store_true", help=argparse.SUPPRESS)
    parser.set_defaults(run=_experiment)


def _experiment(options: argparse.Namespace) -> int:
    try:
        from voxfuse.experiments.experiment import Place, carry_out
        from voxfuse.experiments.registry import find, write_pages

        experiment = find(options.name)
        data = Path(options.data or Path.cwd().parent / "shared" / "data")
        work, out = options.work, options.out
        if options.share:
            experiment.do(Place(data, work, out, options.quick), options.runs, options.seconds)
            return 0
        if options.quick:
            work, out = work / "quick", work / "quick" / "results"
        place = Place(data, work, out, options.quick)
        if not options.page:
            how = {"jobs": options.jobs, "runs": options.runs, "seconds": options.seconds}
            carry_out(experiment, place, **how)
        write_pages(place)
    except KeyboardInterrupt:
        print("voxfuse experiment: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"voxfuse experiment: {error}", file=sys.stderr)
        return 1
    return 0
