"""Files that are whole whenever the process dies, and what tells one from another."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO


def write_whole(
    path: Path, write: Callable[[BinaryIO], object], *, exclusive: bool = False
) -> None:
    """Write a file that has its old content or all of its new one, never a part.

    The content goes to a file beside it, onto the disk, and then takes its name.

    Raises:
        FileExistsError: with ``exclusive``, there is one already, of another process perhaps.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with beside.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        if exclusive:
            _link(beside, path)
        else:
            os.replace(beside, path)
    except OSError as error:
        raise _named(error, path) from None
    finally:
        beside.unlink(missing_ok=True)
    _to_disk(path.parent)  # the name too is on the disk


def _link(file: Path, path: Path) -> None:
    """Give a file a name that none has; where there are no links it is looked for, and renamed."""
    try:
        os.link(file, path)
    except FileExistsError:
        raise
    except OSError:
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        os.replace(file, path)


@contextlib.contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A folder beside a file, for it and others until all are whole; gone afterwards.

    Raises:
        OSError: of a file in it, by the name that it was to have.
    """
    folder = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        folder.mkdir()
        yield folder
    except OSError as error:
        at = Path(str(error.filename))
        if error.errno is None or folder not in (at, *at.parents):
            raise
        meant = path.with_name(at.name) if at.parent == folder and at.suffix != ".part" else path
        raise OSError(error.errno, error.strerror, str(meant)) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def move_file(file: Path, path: Path) -> None:
    """Give a file that is whole its name, in place of what has it."""
    os.replace(file, path)
    _to_disk(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, with their names on the disk."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    _to_disk(folder.parent)


def check_writable(folder: Path, option: str) -> None:
    """Make a folder; raise where no file can be written there, before anything is computed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"{option}: nothing can be written to {folder}: {error}") from None


def move_folder(folder: Path, path: Path) -> bool:
    """Give a folder that is whole its name; False: another process's has it already."""
    try:
        os.rename(folder, path)
    except OSError:
        if not path.exists():
            raise
        return False
    _to_disk(path.parent)
    return True


def unfinished(folder: Path, name: str = "") -> list[Path]:
    """Files, or those of one name, that :func:`write_whole` was writing when its process died.

    Of one name also the folders of :func:`staging`.
    """
    return list(folder.glob(f".{glob.escape(name)}.*.part" if name else ".*.part"))


def write_text(path: Path, text: str, *, exclusive: bool = False) -> None:
    """:func:`write_whole` of a text."""
    write_whole(path, lambda file: file.write(text.encode()), exclusive=exclusive)


def _to_disk(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        raise _named(error, folder) from None
    finally:
        os.close(descriptor)


def _named(error: OSError, path: Path) -> OSError:
    """The error, with the file that a full disk's lacks."""
    if error.filename is None:
        error.filename = str(path)
    return error


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, read in pieces."""
    found = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            found.update(block)
    return found.hexdigest()
