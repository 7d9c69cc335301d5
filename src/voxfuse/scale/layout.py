"""Where arrays lie in a store: alone, as an OME-Zarr 0.5 image, or as one of its label images."""

from __future__ import annotations

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from voxfuse.scale._optional import zarr
from voxfuse.scale.ome_zarr import Multiscale, Space, multiscale_attributes, multiscale_of

KINDS = ("array", "image", "labels")


@dataclass(frozen=True)
class Layout:
    """The places of an array and its groups in a store, and what is written there.

    Args:
        store: of zarr.
        where: names it in messages.
        kind: one of :data:`KINDS`.
        name: of the label image, or of the image.
    """

    store: Any
    where: str
    kind: str
    name: str

    @property
    def group(self) -> str:
        """The path of the image's own group."""
        return f"labels/{self.name}" if self.kind == "labels" else ""

    def path(self, level: str = "0") -> str:
        """The path of the array of a level."""
        return "" if self.kind == "array" else f"{self.group}/{level}".lstrip("/")

    def shown(self, level: str = "0") -> str:
        """The same for messages."""
        return f"{self.where}/{self.path(level)}".rstrip("/")

    def node(self, path: str) -> Any:
        """The array or group of a path, or None."""
        try:
            return zarr(f"Reading {self.where}").open(self.store, path=path, mode="r")
        except FileNotFoundError:
            return None

    def image(self, path: str) -> Multiscale | None:
        """The image that the group of a path is, or None."""
        group = self.node(path)
        if group is None or hasattr(group, "chunks"):
            return None
        return multiscale_of(dict(group.attrs), f"{self.where}/{path}".rstrip("/"))

    def check_parent(self) -> None:
        """Raise ValueError if images or label images of 0.5 cannot be put there."""
        root = self.node("")
        if self.kind == "array" or root is None:
            return
        if self.kind == "labels" and hasattr(root, "chunks"):
            raise ValueError(
                f"{self.where}: is a Zarr array, which has no label images; give another place, "
                "where a group is made for them"
            )
        if root.metadata.zarr_format != 3:
            raise ValueError(
                f"{self.where}: is of Zarr format 2 (OME-Zarr 0.4), where images and label images "
                "of OME-Zarr 0.5 cannot be put; give another place, where a group is made for "
                "them, and like= the source"
            )

    def check_free(self) -> None:
        """Raise FileExistsError if there is something already."""
        if not synced(self.store.is_empty(self.group)):
            raise FileExistsError(
                errno.EEXIST,
                "there is something already; open_destination goes on with it, overwrite=True "
                "replaces it",
                f"{self.where}/{self.group}".rstrip("/"),
            )

    def clear(self) -> None:
        """Remove the arrays that are there, and nothing that is no Zarr.

        Raises:
            ValueError: there is something else.
        """
        node = self.node(self.group)
        if self.kind == "array":
            if node is not None and not hasattr(node, "chunks"):
                raise ValueError(f"{self.where}: is a Zarr group, which no array replaces")
            self._remove("")
            return
        if hasattr(node, "chunks"):
            raise ValueError(f"{self.where}: is a Zarr array, which no group replaces")
        image = self.image(self.group) if node is not None else None
        levels = [level.path for level in image.levels] if image is not None else []
        for path in dict.fromkeys(["0", *levels]):
            self._remove(self.path(path))

    def _remove(self, path: str) -> None:
        """Remove an array, if there is one."""
        if hasattr(self.node(path), "chunks"):
            synced(self.store.delete_dir(path))
        elif not synced(self.store.is_empty(path)):
            where = f"{self.where}/{path}".rstrip("/")
            raise ValueError(f"{where}: there is something else than a Zarr array")

    def create_groups(self) -> None:
        """Make the groups above the arrays, where they are lacking."""
        if self.kind != "array":
            self._group("")
        if self.kind == "labels":
            self._group("labels")
            self._group(self.group)

    def create_array(
        self,
        level: str,
        shape: Sequence[int],
        dtype: np.dtype[Any],
        *,
        chunks: Sequence[int],
        shards: Sequence[int],
        fill: float,
        axes: Sequence[str],
        attributes: Mapping[str, Any],
    ) -> None:
        """Create an array of shards of compressed chunks, each with a crc32c."""
        package = zarr(f"Writing {self.where}")
        codecs = package.codecs
        package.create_array(
            self.store,
            name=self.path(level) or None,
            shape=tuple(shape),
            dtype=dtype,
            chunks=tuple(chunks),
            shards=tuple(shards),
            compressors=[codecs.ZstdCodec(level=1), codecs.Crc32cCodec()],
            fill_value=fill,
            dimension_names=list(axes),
            attributes=dict(attributes),
            zarr_format=3,
        )

    def describe(
        self,
        channel: bool,
        levels: Sequence[tuple[str, Space]],
        method: str | None = None,
        colors: Mapping[int, Sequence[int]] | None = None,
    ) -> None:
        """Write the groups' metadata: of the image, and the list of an image's label images.

        With ``colors``, of which there may be none, a label image's own are begun anew; None leaves
        them.
        """
        if self.kind == "array":
            return
        group = self._group(self.group)
        before = group.attrs.get("ome", {})
        described = multiscale_attributes(self.name, channel, levels, method)
        ome: dict[str, Any] = before | {"version": "0.5", "multiscales": [described]}
        if self.kind == "labels":
            label = dict(before.get("image-label", {})) if colors is None else {}
            if self.image("") is not None:
                label["source"] = {"image": "../../"}
            if colors:
                label["colors"] = [
                    {"label-value": int(value), "rgba": [int(part) for part in color]}
                    for value, color in sorted(colors.items())
                ]
            ome["image-label"] = label
        if self.kind == "labels":
            labels = self._group("labels")
            listed = labels.attrs.get("ome", {"version": "0.5"})
            names = listed.get("labels", [])
            if self.name not in names:
                labels.attrs["ome"] = listed | {"labels": [*names, self.name]}
        group.attrs["ome"] = ome  # last: where it is, all is

    def _group(self, path: str) -> Any:
        """A group to write to, made where there is none."""
        package = zarr(f"Writing {self.where}")
        if self.node(path) is None:
            package.create_group(self.store, path=path, zarr_format=3)
        return package.open_group(self.store, path=path, mode="r+", zarr_format=3)


def synced(awaitable: Any) -> Any:
    """The result of an asynchronous method of a store."""
    from zarr.core.sync import sync

    return sync(awaitable)
