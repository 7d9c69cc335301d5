"""Stores of zarr that write shards whole; importing this needs zarr."""

from __future__ import annotations

import asyncio
from typing import Any

from zarr.storage import LocalStore, WrapperStore

from voxfuse._files import make_folder, write_whole


class SyncedStore(LocalStore):  # type: ignore[misc]
    """A file system, whose files are on the disk before they have their names."""

    async def set(self, key: str, value: Any) -> None:
        await asyncio.to_thread(self.set_sync, key, value)

    def set_sync(self, key: str, value: Any) -> None:
        self._check_writable()
        path = self.root / key
        make_folder(path.parent)
        write_whole(path, lambda file: file.write(value.as_numpy_array().data))

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        if not await self.exists(key):
            await self.set(key, value)


class ForWriting(WrapperStore):  # type: ignore[misc]
    """A store that says of every shard that it is not there.

    zarr merges what it writes with the shard that is there, even where all of it is replaced: it
    would read it first, and fail if that is a torn one.
    """

    async def get(self, key: str, *args: Any, **kwargs: Any) -> Any:
        if key.rpartition("/")[2] != "zarr.json":
            return None
        return await super().get(key, *args, **kwargs)
