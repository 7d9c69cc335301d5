"""``voxfuse predict``: segmentations of scans by a trained run."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

DESCRIPTION = """\
Segment scans with a model that `voxfuse train` made. A subject's segmentation lies on its own grid;
outside the mask it is background. One subject is written to OUT if that ends as an image does,
several to OUT/SUBJECT.nii.gz; what is there is overwritten, but never a
subject's image, mask or label.
"""

_ENDINGS = (".nii", ".nii.gz")

#: What a user may take for a format that is written; without this it would become a folder.
_NOT_WRITTEN = (".mgz", ".mgh", ".mha", ".mhd", ".nrrd", ".img", ".hdr", ".gz")


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "predict", help="segment scans with a trained model", description=DESCRIPTION
    )
    parser.add_argument(
        "--model", type=Path, required=True, metavar="RUN", help="what voxfuse train --out wrote"
    )
    parser.add_argument(
        "--input", type=Path, required=True, nargs="+", metavar="PATH",
        help="a subject's folder, a folder of those, nnU-Net's images, or a file a modality",
    )  # fmt: skip
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="file or folder")
    parser.add_argument(
        "--probabilities", action="store_true",
        help="write SUBJECT_probabilities.nii.gz besides: float32, (x, y, z), or a channel a label",
    )  # fmt: skip
    parser.add_argument("--threshold", type=float, help="p >= threshold is foreground")
    parser.add_argument("--window", help="weights of a patch's voxels, such as bspline or hashemi")
    parser.add_argument("--overlap", type=float, help="share of a patch that the next one has too")
    parser.add_argument("--grid", choices=["shifted", "even", "half_patch"])
    parser.add_argument(
        "--orientations", choices=["none", "rotations", "mirror"],
        help="predictions averaged: four turned by 180 degrees, or eight flips",
    )  # fmt: skip
    parser.add_argument("--batch", type=int, help="patches a call of the network")
    parser.add_argument("--device", default="auto", help="as PyTorch names it (default: auto)")
    parser.set_defaults(run=_predict)


def _predict(options: argparse.Namespace) -> int:
    try:
        return _run(options)
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        print(f"voxfuse predict: {error}", file=sys.stderr)
        return 1


def _targets(path: Path) -> tuple[Path, Path]:
    """Where a segmentation and its probabilities are written."""
    stem = path.name.removesuffix(".gz").removesuffix(".nii")
    return path, path.with_name(f"{stem}_probabilities.nii.gz")


def _run(options: argparse.Namespace) -> int:
    from voxfuse.training.config import parse
    from voxfuse.training.dataset import file_of, find_inputs
    from voxfuse.training.predict import load_model
    from voxfuse.training.volumes import save_like

    model = load_model(options.model, options.device)
    names = ("threshold", "window", "overlap", "grid", "orientations", "batch")
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if "threshold" in given and len(model.labels) > 2:
        raise ValueError("--threshold: is for one foreground label; of several the greatest wins")
    wanted = parse({"prediction": {**vars(model.config.prediction), **given}}).prediction
    one_file = options.output.name.endswith(_ENDINGS)
    if options.output.name.endswith(_NOT_WRITTEN) and not one_file:
        raise ValueError(
            f"--output: got {options.output}, expected a folder or a file .nii.gz or .nii"
        )
    subjects = find_inputs(options.input, model.images, model.config.data, model.channels)
    if one_file and len(subjects) > 1:
        raise ValueError(
            f"--output: got {options.output} for {len(subjects)} subjects, expected a folder"
        )
    targets = [
        _targets(options.output if one_file else options.output / f"{subject.name}.nii.gz")
        for subject in subjects
    ]
    label = model.config.data.label
    kept: set[Path] = set()
    for s in subjects:
        truth = file_of(s.images[0].parent, label) if label else None
        kept |= {path.resolve() for path in (*s.images, s.mask, truth) if path is not None}
    made: set[Path] = set()
    for path in [path for pair in targets for path in pair[: 1 + options.probabilities]]:
        if path.resolve() in kept:
            raise ValueError(
                f"--output: {path} is an image, mask or label of a subject, expected another place"
            )
        if path in made:
            raise ValueError(f"--output: two of the subjects would be written to {path}")
        made.add(path)
    for done, (subject, (path, beside)) in enumerate(zip(subjects, targets, strict=True), 1):
        labels, probabilities, volume = model.segmentation(subject, wanted)
        save_like(labels, volume.placement, path)
        if options.probabilities:
            channels = np.moveaxis(probabilities, 0, -1)
            channels = channels[..., 0] if channels.shape[-1] == 1 else channels
            save_like(channels, volume.placement, beside)
        count = int(np.count_nonzero(labels))
        print(f"{done}/{len(subjects)} {subject.name}: {count} voxels, {path}", flush=True)
    return 0
