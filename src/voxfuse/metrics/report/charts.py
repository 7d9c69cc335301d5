"""Charts as SVG, drawn without any package."""

from __future__ import annotations

import html
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

#: Told apart with colour-deficient eyes, too (Okabe and Ito).
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
WIDTH, HEIGHT = 420, 320
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 48


@dataclass(frozen=True)
class Series:
    """Points of one colour; ``names`` are shown when the mouse rests on one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    names: Sequence[str] = ()
    line: bool = True
    dots: bool = False
    steps: bool = False


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from ``low`` to ``high``."""
    span = high - low
    raw = span / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def xy_chart(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    *,
    x_range: tuple[float, float] | None = None,
    y_range: tuple[float, float] | None = (0.0, 1.0),
    diagonal: bool = False,
) -> str:
    """Lines or points over two axes; points that are not finite are left out."""
    kept = [
        [
            (x, y, one.names[i] if one.names else "")
            for i, (x, y) in enumerate(zip(one.x, one.y, strict=True))
            if math.isfinite(x) and math.isfinite(y)
        ]
        for one in series
    ]
    points = [point for part in kept for point in part]
    x_low, x_high = x_range or _reach([point[0] for point in points])
    y_low, y_high = y_range or _reach([point[1] for point in points])

    def to_x(value: float) -> float:
        return LEFT + (value - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def to_y(value: float) -> float:
        return HEIGHT - BOTTOM - (value - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [_start(f"{y_title} over {x_title}")]
    for tick in ticks(x_low, x_high):
        x = to_x(tick)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" '
            f'text-anchor="middle">{tick:.4g}</text>'
        )
    for tick in ticks(y_low, y_high):
        y = to_y(tick)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    if diagonal:
        low, high = max(x_low, y_low), min(x_high, y_high)
        parts.append(
            f'<line class="diagonal" x1="{to_x(low):.1f}" y1="{to_y(low):.1f}" '
            f'x2="{to_x(high):.1f}" y2="{to_y(high):.1f}"/>'
        )
    for colour, one, part in zip(_colours(len(series)), series, kept, strict=True):
        if one.line and part:
            path = f"M{to_x(part[0][0]):.1f},{to_y(part[0][1]):.1f}"
            for before, after in itertools.pairwise(part):
                if one.steps:  # the new precision holds from the last recall on
                    path += f"L{to_x(before[0]):.1f},{to_y(after[1]):.1f}"
                path += f"L{to_x(after[0]):.1f},{to_y(after[1]):.1f}"
            parts.append(f'<path class="line" d="{path}" stroke="{colour}"/>')
        if one.dots:
            parts += [
                f'<circle cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="4.5" fill="{colour}">'
                f"<title>{html.escape(name)}</title></circle>"
                for x, y, name in part
            ]
    parts.append(_axis_titles(x_title, y_title))
    return "".join(parts) + "</svg>" + _legend([one.name for one in series])


def bar_chart(
    groups: Sequence[str], series: Sequence[tuple[str, Sequence[float]]], y_title: str, x_title: str
) -> str:
    """Groups of bars from 0 to 1; an undefined value is a dash on the axis."""
    parts = [_start(f"{y_title} by {x_title}")]
    floor, height = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    for tick in ticks(0, 1):
        y = floor - tick * height
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    room = (WIDTH - LEFT - RIGHT) / max(len(groups), 1)
    width = room * 0.72 / max(len(series), 1)
    for place, group in enumerate(groups):
        start = LEFT + place * room + room * 0.14
        for index, (colour, (name, values)) in enumerate(
            zip(_colours(len(series)), series, strict=True)
        ):
            x, value = start + index * width, values[place]
            if math.isnan(value):
                parts.append(
                    f'<text class="tick" x="{x + width / 2:.1f}" y="{floor - 4}" '
                    f'text-anchor="middle">–</text>'
                )
                continue
            parts.append(
                f'<rect x="{x:.1f}" y="{floor - value * height:.1f}" width="{width - 2:.1f}" '
                f'height="{value * height:.1f}" fill="{colour}" rx="2">'
                f"<title>{html.escape(f'{name}, {group}: {value:.3f}')}</title></rect>"
            )
        parts.append(
            f'<text class="tick" x="{start + room * 0.36:.1f}" y="{floor + 16}" '
            f'text-anchor="middle">{html.escape(group)}</text>'
        )
    parts.append(_axis_titles(x_title, y_title))
    return "".join(parts) + "</svg>" + _legend([name for name, _ in series])


def _reach(values: Sequence[float]) -> tuple[float, float]:
    high = max(values, default=1.0)
    return 0.0, high * 1.06 if high > 0 else 1.0


def _colours(count: int) -> list[str]:
    return [PALETTE[index % len(PALETTE)] for index in range(count)]


def _start(label: str) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'


def _axis_titles(x_title: str, y_title: str) -> str:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return (
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" '
        f'y2="{HEIGHT - BOTTOM}"/>'
        f'<text class="title" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 10}" '
        f'text-anchor="middle">{html.escape(x_title)}</text>'
        f'<text class="title" transform="translate(15 {middle}) rotate(-90)" '
        f'text-anchor="middle">{html.escape(y_title)}</text>'
    )


def _legend(names: Sequence[str]) -> str:
    if len(names) < 2:
        return ""
    items = "".join(
        f'<span><i style="background:{colour}"></i>{html.escape(name)}</span>'
        for colour, name in zip(_colours(len(names)), names, strict=True)
    )
    return f'<div class="legend">{items}</div>'
