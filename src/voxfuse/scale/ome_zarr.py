"""Metadata of OME-Zarr 0.4 and 0.5: read, and written as 0.5 says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VERSIONS = ("0.4", "0.5")
#: What an axis of this name is, where its type is not said.
KINDS_BY_NAME = {
    "t": "time",
    "time": "time",
    "c": "channel",
    "channel": "channel",
    "channels": "channel",
}


@dataclass(frozen=True)
class Space:
    """Where the voxels of an array lie: one entry a spatial axis, in the array's order.

    The centre of voxel k is at ``translation + k * scale``, in ``units`` (None: not known).
    """

    axes: tuple[str, ...]
    scale: tuple[float, ...]
    translation: tuple[float, ...]
    units: tuple[str | None, ...]

    def __post_init__(self) -> None:
        for name in ("scale", "translation", "units"):
            if len(getattr(self, name)) != len(self.axes):
                raise ValueError(
                    f"{name}: got {getattr(self, name)!r} for axes {self.axes!r}, expected "
                    f"{len(self.axes)} entries"
                )

    def coarser(self, factors: Sequence[int]) -> Space:
        """Of blocks of ``factors`` voxels: the first one's centre is half a block from its edge."""
        moved = [
            start + (factor - 1) / 2 * size
            for start, factor, size in zip(self.translation, factors, self.scale, strict=True)
        ]
        scale = [factor * size for factor, size in zip(factors, self.scale, strict=True)]
        return Space(self.axes, tuple(scale), tuple(moved), self.units)


@dataclass(frozen=True)
class Axis:
    """An axis of an image."""

    name: str
    kind: str  #: "space", "time", "channel", or another word
    unit: str | None = None


@dataclass(frozen=True)
class Level:
    """An array of a pyramid, and how its voxels lie, one number an axis."""

    path: str
    scale: tuple[float, ...]
    translation: tuple[float, ...]


@dataclass(frozen=True)
class Multiscale:
    """An image of several levels, the finest first."""

    axes: tuple[Axis, ...]
    levels: tuple[Level, ...]

    def order(self) -> str:
        """A letter an axis: t of time, c of channels; of space the names' first, or by place."""
        space = [axis.name[:1] for axis in self.axes if axis.kind == "space"]
        if len({*space, "t", "c", ""}) < len(space) + 3:  # two begin alike, or as time does
            space = list("zyx"[3 - len(space) :])
        found = iter(space)
        letters = {"time": "t", "channel": "c"}
        return "".join(letters.get(axis.kind) or next(found) for axis in self.axes)

    def space(self, level: Level) -> Space:
        """Where a level's voxels lie."""
        at = [k for k, axis in enumerate(self.axes) if axis.kind == "space"]
        return Space(
            tuple(self.axes[k].name for k in at),
            tuple(level.scale[k] for k in at),
            tuple(level.translation[k] for k in at),
            tuple(self.axes[k].unit for k in at),
        )

    def level(self, which: int | str, where: str) -> Level:
        """The level of a number, 0 the finest, or of an array's path.

        Raises:
            ValueError: there is none such.
        """
        found = [level for level in self.levels if level.path == which]
        if isinstance(which, int) and 0 <= which < len(self.levels):
            found = [self.levels[which]]
        if not found:
            paths = ", ".join(repr(level.path) for level in self.levels)
            raise ValueError(
                f"level: got {which!r}, but {where} has {len(self.levels)}: 0 to "
                f"{len(self.levels) - 1}, or by path {paths}"
            )
        return found[0]


def multiscale_of(attributes: Mapping[str, Any], where: str) -> Multiscale | None:
    """The image that a group's attributes describe; None if they describe none.

    Raises:
        ValueError: its metadata is of another version, or not what that version says.
    """
    ome = attributes.get("ome", attributes)
    if not isinstance(ome, Mapping) or not ome.get("multiscales"):
        return None
    described = ome["multiscales"][0]
    version = str(ome.get("version") or described.get("version") or "not given")
    if version not in VERSIONS and not isinstance(described.get("axes"), list):
        raise ValueError(
            f"{where}: is OME-Zarr of version {version}, expected {' or '.join(VERSIONS)}"
        )
    try:
        axes = tuple(
            Axis(
                str(axis["name"]),
                str(axis.get("type") or KINDS_BY_NAME.get(axis["name"].lower(), "space")),
                axis.get("unit"),
            )
            for axis in described["axes"]
        )
        overall = described.get("coordinateTransformations")
        levels = tuple(
            Level(str(each["path"]), *_transformed(each, overall, len(axes)))
            for each in described["datasets"]
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{where}: its metadata of OME-Zarr {version} cannot be read: {error!r}"
        ) from None
    kinds = [axis.kind for axis in axes]
    most = {"space": 3, "time": 1, "channel": 1}
    if "space" not in kinds or any(kinds.count(kind) > most.get(kind, 0) for kind in kinds):
        listed = ", ".join(f"{axis.name} ({axis.kind})" for axis in axes)
        raise ValueError(
            f"{where}: has axes {listed}; expected 1 to 3 of space, and at most time and channel"
        )
    return Multiscale(axes, levels)


def multiscale_attributes(
    name: str,
    channel: bool,
    levels: Sequence[tuple[str, Space]],
    kind: str | None = None,
) -> dict[str, Any]:
    """The entry of ``multiscales`` of an image with these arrays.

    Args:
        name: the image's.
        channel: whether the arrays have an axis of channels first.
        levels: of each array its path in the group and where its voxels lie, the finest first.
        kind: how the coarser levels were made.
    """
    space = levels[0][1]
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}] if channel else []
    for axis, unit in zip(space.axes, space.units, strict=True):
        axes.append({"name": axis, "type": "space"} | ({"unit": unit} if unit else {}))
    before = [1.0] * channel, [0.0] * channel
    described: dict[str, Any] = {
        "name": name,
        "axes": axes,
        "datasets": [
            {
                "path": path,
                "coordinateTransformations": [
                    {"type": "scale", "scale": [*before[0], *map(float, each.scale)]},
                    {"type": "translation", "translation": [*before[1], *each.translation]},
                ],
            }
            for path, each in levels
        ],
    }
    return described | ({"type": kind} if kind else {})


def _transformed(
    described: Mapping[str, Any], overall: Any, count: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and translation of an array, after those of all arrays."""
    scale, translation = [1.0] * count, [0.0] * count
    steps = [*(described.get("coordinateTransformations") or ()), *(overall or ())]
    for step in steps:
        if step["type"] == "scale":
            factors = _numbers(step["scale"], count)
            scale = [a * b for a, b in zip(scale, factors, strict=True)]
            translation = [a * b for a, b in zip(translation, factors, strict=True)]
        elif step["type"] == "translation":
            moved = _numbers(step["translation"], count)
            translation = [a + b for a, b in zip(translation, moved, strict=True)]
        elif step["type"] != "identity":
            raise ValueError(f"a transformation of type {step['type']!r}")
    return tuple(scale), tuple(translation)


def _numbers(values: Sequence[Any], count: int) -> list[float]:
    if len(values) != count:
        raise ValueError(f"{len(values)} numbers for {count} axes")
    return [float(value) for value in values]
