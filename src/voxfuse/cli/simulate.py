"""``voxfuse simulate``: heads with simulated MS lesions, as folders to train on."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Put MS-like lesions into real heads. OUT gets a folder a simulated head (its modalities inside the
brain, and lesions.nii.gz) and subjects.csv, whose column patient says whose head it is: what
`voxfuse train` takes, with data.groups = "subjects.csv".
"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "simulate", help="put MS-like lesions into real heads", description=DESCRIPTION
    )
    parser.add_argument(
        "--host", type=Path, nargs="+", required=True, metavar="PATH",
        help="heads: a folder with t1.nii.gz (and flair, t2, lesions), a folder of such folders, "
        "or a T1 file",
    )  # fmt: skip
    parser.add_argument(
        "--shapes", default="none", metavar="FOLDER",
        help="masks whose lesions are put in, deformed and scaled; none: a random model (default)",
    )  # fmt: skip
    parser.add_argument(
        "--shapes-pattern", metavar="PATTERN",
        help="where a mask lies in FOLDER, such as '{}/lesions.nii.gz' (default: all images are)",
    )  # fmt: skip
    parser.add_argument(
        "--leave-out", nargs="+", default=[], metavar="NAME",
        help="masks of FOLDER that are not used: of patients who are validated or tested",
    )  # fmt: skip
    parser.add_argument(
        "--shapes-brain", type=float, default=1120.0, metavar="ML",
        help="brain volume of the heads that the masks are of: lesions are scaled to the host's "
        "(default: 1120)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="OUT", help="what is written")
    parser.add_argument(
        "--count", type=int, default=1, metavar="N", help="of each head (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random number (default: 0)")
    parser.add_argument(
        "--images", nargs="+", metavar="NAME",
        help="modalities to write, those that a head has (default: t1 flair t2); some head has to "
        "have each that is given",
    )  # fmt: skip
    parser.add_argument(
        "--label", metavar="NAME",
        help="file of a head's own lesions, which stay; and of those written (default: lesions, "
        "where a head has it)",
    )  # fmt: skip
    parser.add_argument(
        "--mask", default="positive", metavar="NAME",
        help="file of a head's brain mask, beside its T1 (default: T1 > 0)",
    )  # fmt: skip
    parser.add_argument(
        "--with-hosts", action="store_true", help="write the heads as they are as well"
    )
    parser.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> int:
    try:
        from voxfuse.training.simulation import MaskShapes, RandomShapes
        from voxfuse.training.simulation.files import LABEL, find_hosts, write_simulated

        if options.count < 1:
            raise ValueError(f"--count: got {options.count}, expected 1 or more")
        if not options.shapes_brain > 0:
            raise ValueError(f"--shapes-brain: got {options.shapes_brain}, expected ml above 0")
        hosts = find_hosts(options.host, options.images, options.label, options.mask)
        shapes: Any = RandomShapes()
        if options.shapes != "none":
            shapes = MaskShapes.from_folder(
                options.shapes,
                options.shapes_brain * 1000,
                options.leave_out,
                options.shapes_pattern,
            )  # fmt: skip
        for line in write_simulated(
            hosts, shapes, options.out, options.count, options.seed,
            options.label or LABEL, with_hosts=options.with_hosts,
        ):  # fmt: skip
            print(line, flush=True)
    except (ValueError, TypeError, OSError, ModuleNotFoundError) as error:
        print(f"voxfuse simulate: {error}", file=sys.stderr)
        return 1
    return 0
