"""Where Zarr's data lies: stores opened, their failures tried again and explained."""

from __future__ import annotations

import errno
import gzip
import os
import time
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from voxfuse.scale._optional import require, zarr

Result = TypeVar("Result")

#: Times that reading or writing is tried, and seconds before the second one, doubled for each next.
ATTEMPTS, PAUSE = 3, 0.25

#: Failures that another attempt does not mend, and what does.
LASTING = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "the quota is used up: make room there",
    errno.EROFS: "it can be read only: choose another place",
    errno.EACCES: "change the permissions, or choose another place",
    errno.EPERM: "change the permissions, or choose another place",
    errno.ENOENT: "",
    errno.EEXIST: "",
    errno.ENOTDIR: "",
    errno.EISDIR: "",
    errno.EFBIG: "the file system does not take files of this size: choose smaller shards",
}


#: What stores other than file systems raise without a number.
UNNUMBERED: dict[type[OSError], int] = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
}


class DamagedError(ValueError):
    """What is stored is not whole: a checksum does not fit, or bytes are missing."""


def decoded(read: Callable[[], Result], what: str) -> Result:
    """What ``read`` returns; the errors of decompression, of many kinds, become one.

    Raises:
        DamagedError: what is stored cannot be decoded.
    """
    try:
        return read()
    except (ValueError, RuntimeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedError(
            f"{what}: cannot be read as what is stored is not whole: {error}"
        ) from error


def insisting(action: Callable[[], Result], what: str, lost: str = "") -> Result:
    """What ``action`` returns; where a store fails, it is asked again, with a warning.

    Args:
        action: reads or writes something whole, so that repeating it does no harm.
        what: what it does, for the messages.
        lost: what a failure means for the work so far.

    Raises:
        OSError: the store failed :data:`ATTEMPTS` times, or for a reason that will last (disk full,
            read-only, not allowed), with the same ``errno``.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return action()
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
            number = error.errno or UNNUMBERED.get(type(error), errno.EIO)
            lasting = number in LASTING
            if lasting or attempt == ATTEMPTS:
                tried = "" if lasting else f" ({ATTEMPTS} attempts)"
                advice = LASTING.get(number, "")
                said = "; ".join(
                    part for part in (f"{what}: {reason}{tried}", advice, lost) if part
                )
                raise OSError(number, said) from error
            warnings.warn(f"{what}: {reason}; trying again", stacklevel=2)
            time.sleep(PAUSE * 2 ** (attempt - 1))
    raise AssertionError


def local_path(where: object) -> Path | None:
    """The path of what lies on a file system; None for a URL or a store."""
    if isinstance(where, os.PathLike):
        return Path(where)
    if isinstance(where, str):
        if where.startswith("file://"):
            return Path(where.removeprefix("file://"))
        return None if "://" in where or "::" in where else Path(where)
    return None


def reading(where: Any, storage_options: Mapping[str, Any] | None) -> Any:
    """A Zarr array or group to read from: of a path, a URL of fsspec, or a store.

    Raises:
        FileNotFoundError: there is none.
        ImportError: zarr or fsspec is not installed.
    """
    package = zarr(f"Reading {where}")
    path = local_path(where)
    options = None if storage_options is None else dict(storage_options)
    if path is not None:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "there is no such file or folder", str(path))
        where = path
        if path.suffix == ".zip":
            where = package.storage.ZipStore(path, mode="r")
    elif isinstance(where, str):
        require("fsspec", f"Reading {where}", "fsspec")
    try:
        return package.open(where, mode="r", storage_options=options)
    except FileNotFoundError as error:  # zarr's errors of nodes are of this kind too
        raise FileNotFoundError(
            errno.ENOENT, "there is no Zarr array or group", str(where)
        ) from error


def writing(where: Any, storage_options: Mapping[str, Any] | None) -> Any:
    """A store of zarr to write to: of a path, a URL of fsspec, or a store.

    On a file system, files appear under their names when they are whole and on the disk.
    """
    package = zarr(f"Writing {where}")
    path = local_path(where)
    if path is not None:
        if path.suffix == ".zip":
            raise ValueError(
                f"where: got {path}, expected a folder or URL: what is in a zip file cannot be "
                "replaced; pack the folder when it is done"
            )
        from voxfuse.scale._synced_store import SyncedStore

        return SyncedStore(path)
    if isinstance(where, str):
        require("fsspec", f"Writing {where}", "fsspec")
        options = None if storage_options is None else dict(storage_options)
        return package.storage.FsspecStore.from_url(where, storage_options=options)
    if isinstance(where, package.storage.LocalStore):
        from voxfuse.scale._synced_store import SyncedStore

        return SyncedStore(where.root, read_only=where.read_only)
    if isinstance(where, package.abc.store.Store):
        return where
    raise TypeError(
        f"where: got {type(where).__name__}, expected a path, a URL of fsspec or a store of zarr"
    )
