"""Files of a run that are whole whenever the process dies, and load without running code."""

from __future__ import annotations

import csv
import io
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from voxfuse._files import write_text, write_whole

#: Of the files of checkpoints and models.
FORMAT = 1


def save(path: Path, content: Mapping[str, Any]) -> None:
    """Write tensors and plain values for :func:`restore`."""
    write_whole(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def restore(path: Path, device: torch.device | str = "cpu") -> dict[str, Any]:
    """Read what :func:`save` wrote; tensors and plain values only, never code.

    Raises:
        ValueError: the file cannot be read, or is of another format.
    """
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise ValueError("is no model or checkpoint")
        content = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # a pickle's errors are of many kinds
        why = (str(error) or type(error).__name__).splitlines()[0]
        if isinstance(error, pickle.UnpicklingError):  # its text advises to run what is in there
            why = "holds more than tensors and plain values"
        raise ValueError(f"{path}: cannot be read: {why}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path}: is no file of voxfuse's training of format {FORMAT}")
    return content


class Log:
    """A CSV file that grows by rows; after a crash it is cut to what a checkpoint knows."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path, self.columns = path, list(columns)

    def cut(self, step: int) -> None:
        """Keep the rows up to ``step``; without a file, begin one."""
        kept = []
        if self.path.is_file():
            with self.path.open(newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    whole = None not in row.values() and (row.get("step") or "").isdigit()
                    if whole and int(row["step"]) <= step:
                        kept.append([row[column] for column in self.columns])
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([self.columns, *kept])
        write_text(self.path, text.getvalue())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        text = io.StringIO()
        csv.DictWriter(text, self.columns, lineterminator="\n").writerow(row)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text.getvalue())
