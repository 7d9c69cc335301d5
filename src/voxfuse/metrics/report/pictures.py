"""Slices through the largest misses, as PNG inside the page."""

from __future__ import annotations

import base64
import struct
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics._arrays import Floats, Mask, optional
from voxfuse.metrics.lesions import LesionMatch

#: True positives, false positives and false negatives: told apart with colour-deficient eyes, too.
COLOURS = {
    "true positive": (0, 158, 115),
    "false positive": (230, 159, 0),
    "missed": (204, 51, 119),
}


@dataclass(frozen=True)
class Miss:
    """One lesion that was missed, or predicted where there is none."""

    subject: str
    label: str
    kind: str  #: "missed" or "false"
    volume: float  #: mm3
    slice_number: int
    picture: NDArray[np.uint8]  #: (rows, columns, 3)
    pixel: tuple[float, float]  #: mm: height and width of one


def find_misses(
    prediction: Mask,
    truth: Mask,
    match: LesionMatch,
    affine: Floats,
    *,
    subject: str,
    label: str,
    image: NDArray[Any] | None = None,
    count: int = 4,
) -> list[Miss]:
    """The ``count`` largest missed and false lesions of a subject, with axial slices through them.

    Slices are shown as radiologists see them: the patient's right on the left, the front on top.

    Args:
        prediction, truth: masks (x, y, z).
        match: of these masks, with the numbered lesions.
        affine: from voxels to mm, RAS.
        image: shown below the colours, on the same grid; NaN is black, infinity white.
    """
    if match.truth_numbers is None or match.prediction_numbers is None:
        raise ValueError("match: expected one of match_lesions, with its numbered lesions")
    candidates = [
        ("missed", float(match.truth_volumes[index]), index)
        for index in np.flatnonzero(~match.detected)
    ] + [
        ("false", float(match.prediction_volumes[index]), index)
        for index in np.flatnonzero(~match.matching)
    ]
    candidates.sort(key=lambda found: -found[1])
    candidates = candidates[:count]
    if not candidates:
        return []
    axes, flips = _radiological(affine)

    def turned(volume: NDArray[Any]) -> NDArray[Any]:
        volume = volume.transpose(axes)
        return volume[tuple(slice(None, None, -1 if flip else 1) for flip in flips)]

    numbers = {"missed": turned(match.truth_numbers), "false": turned(match.prediction_numbers)}
    shown_prediction, shown_truth = turned(prediction), turned(truth)
    background = None if image is None else turned(image)
    window = None
    if background is not None:
        bright = background[np.isfinite(background) & (background > 0)]
        window = np.percentile(bright, (1, 99.5)) if bright.size else None
    sizes = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))[list(axes)]
    boxes = {
        kind: optional("scipy.ndimage", "Slices through lesions").find_objects(volume)
        for kind, volume in numbers.items()
    }
    misses = []
    for kind, volume, index in candidates:
        box = boxes[kind][index]
        inside = numbers[kind][box] == index + 1
        place = int(inside.sum(axis=(0, 1)).argmax()) + box[2].start
        picture = _painted(
            shown_prediction[:, :, place].T,
            shown_truth[:, :, place].T,
            None if background is None else background[:, :, place].T,
            window,
        )
        _frame(picture, box[1], box[0])
        extent = numbers[kind].shape[2]
        number = extent - 1 - place if flips[2] else place
        misses.append(
            Miss(subject, label, kind, volume, number, picture, (float(sizes[1]), float(sizes[0])))
        )
    return misses


def _radiological(affine: Floats) -> tuple[tuple[int, ...], list[bool]]:
    """Axes and flips that turn voxels so that x grows to the left, y backwards, z upwards."""
    directions = affine[:3, :3] / np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    axes = [-1, -1, -1]
    left = {0, 1, 2}
    for world in np.argsort(-np.abs(directions).max(axis=1)):
        axis = max(left, key=lambda one: abs(directions[world, one]))
        axes[world] = axis
        left.remove(axis)
    signs = [directions[world, axes[world]] for world in range(3)]
    return tuple(axes), [signs[0] > 0, signs[1] > 0, signs[2] < 0]


def _painted(
    prediction: Mask, truth: Mask, image: NDArray[Any] | None, window: Any
) -> NDArray[np.uint8]:
    shade = np.full(truth.shape, 28.0)
    if image is not None and window is not None:
        low, high = window
        image = np.nan_to_num(image, nan=low, posinf=high, neginf=low)
        shade = 255 * np.clip((image - low) / max(high - low, 1e-9), 0, 1)
    picture = np.repeat(shade[:, :, None], 3, axis=2)
    for name, mask in (
        ("true positive", prediction & truth),
        ("false positive", prediction & ~truth),
        ("missed", truth & ~prediction),
    ):
        opacity = 0.65 if image is not None else 1.0
        colour = np.asarray(COLOURS[name], dtype=np.float64)
        picture[mask] = (1 - opacity) * picture[mask] + opacity * colour
    return picture.astype(np.uint8)


def _frame(picture: NDArray[np.uint8], rows: slice, columns: slice) -> None:
    """A thin white frame, a few pixels around the lesion."""
    top, bottom = max(rows.start - 4, 0), min(rows.stop + 3, picture.shape[0] - 1)
    first, last = max(columns.start - 4, 0), min(columns.stop + 3, picture.shape[1] - 1)
    for row in (top, bottom):
        picture[row, first : last + 1] = 255
    for column in (first, last):
        picture[top : bottom + 1, column] = 255


def png(picture: NDArray[np.uint8]) -> bytes:
    """An RGB picture as a PNG file."""
    height, width, _ = picture.shape
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(picture))

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(lines, 9)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def data_uri(picture: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + base64.b64encode(png(picture)).decode()
