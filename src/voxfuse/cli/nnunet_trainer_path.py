"""``voxfuse nnunet-trainer-path``: where nnU-Net finds the trainers."""

from __future__ import annotations

import argparse
from typing import Any


def _print_path(options: argparse.Namespace) -> int:
    from voxfuse.integrations.nnunet.training import TRAINERS

    print(TRAINERS)
    return 0


def add(commands: Any) -> None:
    """Register the command."""
    parser = commands.add_parser(
        "nnunet-trainer-path",
        help="print the folder of nnU-Net's trainers, for nnUNet_extTrainer",
        description="nnUNet_extTrainer=$(voxfuse nnunet-trainer-path) nnUNetv2_train DATASET "
        "CONFIGURATION FOLD -tr nnUNetTrainerVoxfuse",
    )
    parser.set_defaults(run=_print_path)
