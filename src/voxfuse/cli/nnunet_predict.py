"""``voxfuse nnunet-predict``: nnU-Net's command with its labels made here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any
from unittest import mock

COMMAND = "nnunet-predict"


def run(arguments: Sequence[str]) -> int:
    """Run nnU-Net's own entry point, whose parser reads the arguments."""
    try:
        from nnunetv2.inference.predict_from_raw_data import predict_entry_point
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "nnunetv2":
            raise
        print(f"voxfuse {COMMAND}: nnU-Net is not installed: pip install nnunetv2", file=sys.stderr)
        return 1

    from voxfuse.integrations.nnunet import patch

    program = f"voxfuse {COMMAND}"
    with patch(), mock.patch.object(sys, "argv", [program, *arguments]):
        predict_entry_point()
    return 0


def add(commands: Any) -> None:
    """List the command; its arguments are nnU-Net's to read, and go to :func:`run`."""
    commands.add_parser(
        COMMAND,
        help="nnUNetv2_predict, with its arguments, without a volume of all classes",
        add_help=False,
    ).set_defaults(run=lambda options: run(()))


def takes(arguments: Sequence[str]) -> bool:
    """Whether the command line is this command's."""
    return list(arguments[:1]) == [COMMAND]
