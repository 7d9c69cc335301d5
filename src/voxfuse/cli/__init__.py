"""The command ``voxfuse``."""

from __future__ import annotations

import argparse
import os
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from voxfuse.cli import (
    evaluate,
    experiment,
    info,
    nnunet_predict,
    nnunet_trainer_path,
    predict,
    simulate,
    train,
)

#: One module of this package a command, in the order in which they are listed.
COMMANDS = (
    info,
    evaluate,
    simulate,
    train,
    predict,
    experiment,
    nnunet_predict,
    nnunet_trainer_path,
)


class _Parser(argparse.ArgumentParser):
    """A parser, and of subcommands, to which ``-160:240`` and ``-1e-3`` are no options."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._negative_number_matcher = re.compile(r"-\.?\d")  # as of Python 3.14


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    made = _Parser(prog="voxfuse", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add(commands)
    return made


@contextmanager
def _plain_warnings(command: str) -> Iterator[None]:
    """Show voxfuse's own warnings as a line of the command, without the line of the source."""
    package = str(Path(__file__).parents[1])

    def show(message: Any, category: Any, filename: str, *rest: Any, **named: Any) -> None:
        if filename.startswith(package):
            print(f"voxfuse {command}: warning: {message}", file=sys.stderr)
        else:
            before(message, category, filename, *rest, **named)

    with warnings.catch_warnings():
        before = warnings.showwarning
        warnings.showwarning = show
        yield


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if nnunet_predict.takes(arguments):
        return nnunet_predict.run(arguments[1:])
    options = parser().parse_args(arguments)
    try:
        with _plain_warnings(options.command):
            status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader has seen enough (`voxfuse info | head -1`); what is left goes nowhere, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status
