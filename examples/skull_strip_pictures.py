"""The two pictures of the skull-stripping demo."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from head_image import Grid, is_brain
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke
from torch import Tensor

from voxfuse.fusion.windows import resolve_window

TRUTH, MASK = "#ffd23f", "#00c2d1"
TITLES = {
    "constant": "constant window",
    "gaussian": "Gaussian window",
    "bspline5": "B-spline window, order 5",
}

# Name of the view -> axis the slice is taken across, and the letters at its left, right, bottom
# and top edge; arrays run to the right, anterior, superior.
VIEWS = {
    "axial": (2, "LRPA"),
    "coronal": (1, "LRIS"),
    "sagittal": (0, "PAIS"),
}


def draw_fusion(
    path: Path,
    grid: Grid,
    patch: int,
    probabilities: Mapping[str, Tensor],
    dice: Mapping[str, float | None],
) -> None:
    """Slices of the head with each window's mask, and the last prediction minus the first."""
    plain, *_, smooth = probabilities
    plain_probability, smooth_probability = probabilities[plain], probabilities[smooth]
    difference = (smooth_probability - plain_probability).numpy()
    image = grid.image.numpy()
    brain = grid.mask.numpy() if grid.mask is not None else is_brain(smooth_probability).numpy()
    brightest = float(np.percentile(image[brain], 99.5)) * 1.15 if brain.any() else 1.0
    figure, axes = _panels(grid, len(probabilities) + 1)
    colours: Any = None
    for row, (view, (axis, letters)) in enumerate(VIEWS.items()):
        index = _slice_to_show(brain, is_brain(plain_probability).numpy(), axis)
        extent = _extent(grid, axis)
        for column, (name, probability) in enumerate(probabilities.items()):
            panel = axes[row, column]
            _show_head(panel, _cut(image, axis, index), extent, brightest)
            _mask(panel, _cut(is_brain(probability).numpy(), axis, index), extent, MASK)
            if grid.mask is not None:
                _outline(panel, _cut(grid.mask.numpy(), axis, index), extent, TRUTH, 1.3)
            _letters(panel, letters)
            if row == 0:
                panel.set_title(_title(name, dice[name]), fontsize=13, pad=8)
        panel = axes[row, -1]
        _show_head(panel, _cut(image, axis, index), extent, brightest)
        shown = _cut(difference, axis, index)
        colours = panel.imshow(
            np.ma.masked_inside(shown, -0.05, 0.05).T,
            origin="lower",
            extent=extent,
            cmap="RdBu",
            vmin=-1,
            vmax=1,
            alpha=0.85,
            interpolation="nearest",
        )
        _letters(panel, letters)
        if row == 0:
            panel.set_title(f"difference,\n{smooth} minus {plain}", fontsize=13, pad=8)
        axes[row, 0].set_ylabel(view, fontsize=13)
    _scale_bar(axes[0, 0])
    figure.suptitle(
        f"One network, the same {patch}\u00b3 patches: only the fusion window differs",
        fontsize=15,
        y=0.985,
    )
    entries: list[Any] = [
        Patch(facecolor=(*to_rgb(MASK), 0.45), edgecolor=MASK, label="predicted brain")
    ]
    if grid.mask is not None:
        entries.append(
            Line2D([], [], color=TRUTH, linewidth=2.5, label="true outline of the brain")
        )
    figure.legend(
        handles=entries,
        loc="center left",
        bbox_to_anchor=(0.04, 0.034),
        ncols=2,
        fontsize=12,
        facecolor="#404040",
        labelcolor="white",
        edgecolor="none",
    )
    bar = figure.colorbar(
        colours,
        cax=figure.add_axes((0.77, 0.048, 0.21, 0.012)),
        orientation="horizontal",
        ticks=[-1, 0, 1],
    )
    bar.ax.set_xticklabels(["\u22121", "0", "+1"])
    bar.set_label("difference of the brain probabilities", fontsize=10)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panels(grid: Grid, columns: int) -> tuple[Figure, np.ndarray]:
    """Three rows of panels, all at the same scale of millimetres."""
    sizes = [_extent(grid, axis) for axis, _ in VIEWS.values()]
    width = max(extent[1] for extent in sizes)
    heights = [extent[3] for extent in sizes]
    left, right, above, below, gap, panel = 0.4, 0.15, 1.05, 0.85, 0.06, 3.45  # inches
    inches = [panel * height / width for height in heights]
    total = (
        left + columns * panel + (columns - 1) * gap + right,
        above + sum(inches) + 2 * gap + below,
    )
    figure, axes = plt.subplots(
        3, columns, figsize=total, facecolor="white", gridspec_kw={"height_ratios": heights}
    )
    figure.subplots_adjust(
        left=left / total[0],
        right=1 - right / total[0],
        top=1 - above / total[1],
        bottom=below / total[1],
        wspace=gap / panel,
        hspace=gap / (sum(inches) / 3),
    )
    for row, extent in enumerate(sizes):
        for axis in axes[row]:
            margin = (width - extent[1]) / 2
            axis.set_xlim(-margin, extent[1] + margin)
            axis.set_ylim(0, extent[3])
            axis.set_autoscale_on(False)
    return figure, axes


def draw_windows(path: Path, names: Sequence[str], size: int = 96) -> None:
    """The windows along one axis, how they add up to 1, and four of them in two dimensions."""
    figure = plt.figure(figsize=(12, 8.8), facecolor="white")
    layout = figure.add_gridspec(
        2,
        4,
        height_ratios=(1.3, 1),
        left=0.06,
        right=0.92,
        top=0.95,
        bottom=0.05,
        hspace=0.5,
        wspace=0.16,
    )
    _draw_curves(figure.add_subplot(layout[0, :2]), names, size)
    _draw_unity(figure.add_subplot(layout[0, 2:]), "bspline5", size)
    colours: Any = None
    for column, name in enumerate(("constant", "bspline1", "hashemi", "bspline5")):
        panel = figure.add_subplot(layout[1, column])
        vector = _vector(name, size)
        colours = panel.imshow(
            np.outer(vector, vector),
            origin="lower",
            cmap="magma",
            vmin=0,
            vmax=1,
            extent=(0, 1, 0, 1),
        )
        panel.set_title(f"{name}, 2-D", fontsize=11)
        panel.set_xticks([0, 0.5, 1], ["0", "\u00bd", "1"])
        panel.set_yticks([0, 0.5, 1], ["0", "\u00bd", "1"] if column == 0 else [])
        if column == 0:
            panel.set_ylabel("position / patch size")
    figure.colorbar(
        colours, cax=figure.add_axes((0.935, 0.06, 0.012, 0.275)), label="weight / peak"
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_curves(panel: Axes, names: Sequence[str], size: int) -> None:
    position = (np.arange(size) + 0.5) / size
    splines = [name for name in names if name.startswith("bspline")]
    shades = dict(
        zip(splines, plt.get_cmap("viridis_r")(np.linspace(0.15, 1, len(splines))), strict=True)
    )
    styles: dict[str, dict[str, Any]] = {
        "constant": {"color": "0.35", "linestyle": "-"},
        "gaussian": {"color": "#d1495b", "linestyle": "--"},
        "hashemi": {"color": "#ed9b40", "linestyle": "-."},
    }
    for name in names:
        vector = _vector(name, size)
        width = np.sqrt((vector * (position - 0.5) ** 2).sum() / vector.sum())
        style = styles.get(name, {"color": shades.get(name, "k")})
        panel.plot(position, vector, linewidth=2, label=f"{name} ({width:.3f})", **style)
    panel.set_title("Weight along one axis of a patch", fontsize=12)
    panel.set_xlabel("position / patch size")
    panel.set_ylabel("weight / peak")
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1.08)
    panel.grid(alpha=0.25)
    panel.legend(
        title="window (width: standard deviation / patch size)",
        fontsize=9,
        title_fontsize=9,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.13),
        ncols=3,
        frameon=False,
    )


def _draw_unity(panel: Axes, name: str, size: int) -> None:
    """Weights of overlapping patches after normalisation: at every voxel they add up to 1."""
    starts = np.arange(0, 5) * size // 2
    length = int(starts[-1]) + size
    weights = np.zeros((len(starts), length))
    for row, start in enumerate(starts):
        weights[row, start : start + size] = _vector(name, size)
    weights /= weights.sum(axis=0)
    voxels = np.arange(length) + 0.5
    shades = plt.get_cmap("tab10")(range(len(starts)))
    panel.stackplot(voxels, weights, colors=shades, alpha=0.75, linewidth=0)
    for row, start in enumerate(starts):
        height = 1.08 + 0.075 * (row % 2)
        panel.barh(height, size, left=start, height=0.06, color=shades[row], alpha=0.75)
        panel.text(start + size / 2, height, f"patch {row + 1}", ha="center", va="center")
    panel.set_title(f"{name} windows at overlap 0.5 add up to 1", fontsize=12)
    panel.set_xlabel("voxel along the volume")
    panel.set_ylabel("weight of each patch at a voxel, stacked")
    panel.yaxis.set_label_position("right")
    panel.yaxis.tick_right()
    panel.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    panel.set_xlim(0, length)
    panel.set_ylim(0, 1.22)


def _vector(name: str, size: int) -> np.ndarray:
    """The window along one axis, scaled to a peak of 1."""
    vector = np.asarray(resolve_window(name, [size])[0])
    return vector / vector.max()


def _title(name: str, accuracy: float | None) -> str:
    text = TITLES.get(name, name)
    return text if accuracy is None else f"{text}\nDice {accuracy:.3f}"


def _slice_to_show(brain: np.ndarray, found: np.ndarray, axis: int) -> int:
    """A typical slice: through the middle of the brain, with as much of it found as overall."""
    others = tuple(other for other in range(3) if other != axis)
    area = brain.sum(axis=others)
    share = (brain & found).sum(axis=others) / np.maximum(area, 1)
    overall = (brain & found).sum() / max(int(brain.sum()), 1)
    return int(np.argmin(np.where(area >= 0.8 * area.max(), np.abs(share - overall), np.inf)))


def _cut(volume: np.ndarray, axis: int, index: int) -> np.ndarray:
    return np.take(volume, index, axis=axis)


def _extent(grid: Grid, axis: int) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of a slice in mm, so that every grid has its true shape."""
    size = [n * step for n, step in zip(grid.image.shape, grid.spacing, strict=True)]
    across, up = (size[other] for other in range(3) if other != axis)
    return 0.0, across, 0.0, up


def _show_head(
    panel: Axes, image: np.ndarray, extent: tuple[float, float, float, float], brightest: float
) -> None:
    panel.imshow(
        image.T,
        origin="lower",
        extent=extent,
        cmap="gray",
        vmin=0,
        vmax=brightest,
        interpolation="bilinear",
    )
    panel.set_facecolor("black")
    panel.set_xticks([])
    panel.set_yticks([])


def _mask(
    panel: Axes, mask: np.ndarray, extent: tuple[float, float, float, float], colour: str
) -> None:
    """Fill a mask faintly and draw its outline."""
    tint = np.zeros((*mask.T.shape, 4))
    tint[mask.T] = (*to_rgb(colour), 0.33)
    panel.imshow(tint, origin="lower", extent=extent, interpolation="nearest")
    _outline(panel, mask, extent, colour, 1.4)


def _outline(
    panel: Axes,
    mask: np.ndarray,
    extent: tuple[float, float, float, float],
    colour: str,
    width: float,
) -> None:
    if mask.any() and not mask.all():
        panel.contour(
            mask.T.astype(float),
            levels=[0.5],
            origin="lower",
            extent=extent,
            colors=[colour],
            linewidths=width,
        )


def _letters(panel: Axes, letters: str) -> None:
    """Anatomical directions at the edges: left, right, posterior, anterior, inferior, superior."""
    places = ((0.025, 0.5), (0.975, 0.5), (0.5, 0.02), (0.5, 0.98))
    sides = (("left", "center"), ("right", "center"), ("center", "bottom"), ("center", "top"))
    for letter, (x, y), (horizontal, vertical) in zip(letters, places, sides, strict=True):
        text = panel.text(
            x,
            y,
            letter,
            transform=panel.transAxes,
            color="white",
            fontsize=11,
            fontweight="bold",
            ha=horizontal,
            va=vertical,
        )
        text.set_path_effects([withStroke(linewidth=2.5, foreground="black")])


def _scale_bar(panel: Axes, length: float = 50) -> None:
    left, right = panel.get_xlim()
    bottom, top = panel.get_ylim()
    x, y = left + 0.05 * (right - left), bottom + 0.045 * (top - bottom)
    panel.plot([x, x + length], [y, y], color="white", linewidth=3, solid_capstyle="butt")
    panel.text(
        x + length / 2,
        y + 0.012 * (top - bottom),
        f"{length:.0f} mm",
        color="white",
        ha="center",
        va="bottom",
        fontsize=10,
    )
