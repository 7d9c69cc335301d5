"""``voxfuse train``: a configuration and a folder, to a trained model and its test."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

DESCRIPTION = """\
Train a segmentation network on patches, as a configuration says. RUN holds config.toml, log.csv,
checkpoint.pt, model.pt and test.csv; the same command again goes on where the run was left.
`voxfuse train --init FOLDER` writes a commented configuration for a folder first.
"""


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "train", help="train a network on a folder of scans and masks", description=DESCRIPTION
    )
    parser.add_argument(
        "config", type=Path, nargs="?", metavar="CONFIG.toml",
        help="what to train; with --init where it is written (default: voxfuse.toml)",
    )  # fmt: skip
    parser.add_argument(
        "--init", type=Path, metavar="FOLDER",
        help="write a configuration with every default for the data in FOLDER, and leave",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER",
        help="a folder a subject, or what a dataset.json in it says (nnU-Net, Decathlon)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="RUN", help="the folder that the run writes")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE",
        help="in place of what the configuration says, such as training.seed=1; may be repeated",
    )  # fmt: skip
    parser.add_argument(
        "--stop-at", type=int, metavar="STEP", help="leave after this step, to go on another time"
    )
    parser.add_argument(
        "--minutes", type=float, metavar="M", help="leave after so long, to go on another time"
    )
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    try:
        if options.init is not None:
            return _init(options)
        for name in ("config", "data", "out"):
            if getattr(options, name) is None:
                wanted = "CONFIG.toml" if name == "config" else f"--{name}"
                raise ValueError(f"{wanted}: is missing; expected CONFIG.toml --data --out")
        if options.stop_at is not None and options.stop_at < 1:
            raise ValueError(f"--stop-at: got {options.stop_at}, expected a step from 1 on")
        from voxfuse.training.config import load
        from voxfuse.training.trainer import train

        config = load(options.config, options.set)
        train(config, options.data, options.out, stop_at=options.stop_at, minutes=options.minutes)
    except KeyboardInterrupt:
        print("voxfuse train: interrupted; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"voxfuse train: {error}", file=sys.stderr)
        return 1
    return 0


def _init(options: argparse.Namespace) -> int:
    from voxfuse.training.config import to_toml
    from voxfuse.training.dataset import find_dataset
    from voxfuse.training.initial import initial_config

    path = options.config or Path("voxfuse.toml")
    if path.exists():
        raise ValueError(f"{path}: is there already; name another file, CONFIG.toml")
    config = initial_config(options.init)
    dataset = find_dataset(options.init, config.data)
    data, names = config.data, dataset.subjects
    unlabelled = sum(1 for subject in names.values() if subject.label is None)
    print(
        f"{len(names)} subjects ({unlabelled} without a label), "
        f"images {', '.join(data.images)}, label {data.label or 'of dataset.json'} "
        f"({', '.join(f'{name} = {value}' for name, value in data.labels.items())}), "
        f"mask {data.mask}, {len({s.group for s in names.values()})} patients"
        + (f" from {data.groups}" if data.groups else "")
    )
    path.write_text(to_toml(config), encoding="utf-8")
    print(f"wrote {path}; then: voxfuse train {path} --data {options.init} --out RUN")
    return 0
