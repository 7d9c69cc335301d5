"""Rows of finished runs as CSV files, which several processes may add to and any may be killed."""

from __future__ import annotations

import csv
import fcntl
import io
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from voxfuse._files import write_text

Row = Mapping[str, Any]

#: What runs.csv says of a run beside its key.
ABOUT = ("seconds", "finished")


def text_of(value: Any) -> str:
    """A value as the files have it: floats to five digits, None as nothing.

    Example:
        >>> from voxfuse.experiments.results import text_of
        >>> text_of(0.123456789), text_of(3), text_of(None)
        ('0.12346', '3', '')
    """
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


class Results:
    """``results.csv``, the rows of finished runs, and ``runs.csv``, a line each.

    A run is there with all of its rows or not at all: files are written beside and renamed, and
    ``runs.csv`` comes last. Processes take turns by a lock on the folder.

    Args:
        folder: is made where it is missing.
        key: the columns that name a run.
        columns: of ``results.csv``, the key's among them.
    """

    def __init__(self, folder: str | Path, key: Sequence[str], columns: Sequence[str]) -> None:
        self.folder, self.key, self.columns = Path(folder), tuple(key), tuple(columns)
        self.folder.mkdir(parents=True, exist_ok=True)

    def rows(self) -> list[dict[str, str]]:
        """Every row, as text."""
        return read_rows(self.folder / "results.csv")

    def runs(self) -> list[dict[str, str]]:
        """A row a finished run: its key, the processor's seconds, and when it ended."""
        return read_rows(self.folder / "runs.csv")

    def has(self, run: Row) -> bool:
        """Whether this run is done."""
        return self._named(run) in {self._named(done) for done in self.runs()}

    def add(self, run: Row, rows: Iterable[Row], seconds: float) -> None:
        """Add a finished run; rows that a killed process left of it are replaced.

        Raises:
            ValueError: the run is done, or a row has other columns or is another run's.
        """
        new = [{column: text_of(value) for column, value in row.items()} for row in rows]
        name = self._named(run)
        for row in new:
            if set(row) != set(self.columns) or self._named(row) != name:
                raise ValueError(f"rows: got {row}, expected a row of {name} with {self.columns}")
        with self._alone():
            if self.has(run):
                raise ValueError(f"run: {name} is done already, expected a run that is not")
            kept = [row for row in self.rows() if self._named(row) != name]
            self._write("results.csv", self.columns, [*kept, *new])
            ended = time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime())
            about = {**dict(zip(self.key, name, strict=True)), "seconds": f"{seconds:.0f}"}
            done = [*self.runs(), {**about, "finished": ended}]
            self._write("runs.csv", (*self.key, *ABOUT), done)

    def _named(self, run: Row) -> tuple[str, ...]:
        return tuple(text_of(run[column]) for column in self.key)

    def _write(self, name: str, columns: Sequence[str], rows: Iterable[Row]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.folder / name, text.getvalue())

    @contextmanager
    def _alone(self) -> Iterator[None]:
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file, none where there is no file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Whether this process has the file's lock; it ends with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)
