r"""Windows, overlaps and votes on patients with MS lesions, from one prediction of each patch.

The networks are those of ``examples/ms_lesions.toml``: Dice with cross-entropy, patches of 32^3. A
scan's patches are predicted once, at an overlap of 0.75, and kept as float16; the patches of the
other overlaps are among them. Of two classes only the difference d of the logits matters: the
softmax's foreground is sigmoid(d), and the mean of logits has the mean of d.

**Effective width** of a window: the standard deviation of its weights along an axis about the
patch's centre, as they are sampled at the N voxels, over the patch's extent:

.. math:: \sigma = \frac1N \sqrt{\sum_t w(t) (t - c)^2 \Big/ \sum_t w(t)}, \quad c = (N - 1) / 2

0.289 of a uniform window, 0.118 of the B-spline of order 5, 0.177 of Hashemi's. Windows of
different shapes are compared at equal width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxfuse import PatchFuser
from voxfuse.experiments import fusion_page
from voxfuse.experiments.experiment import Experiment, Place, Run
from voxfuse.experiments.fusion_page import COLUMNS, KEY, SEEDS, TEST
from voxfuse.experiments.scores import Curve, curve, curve_of_counts, leave_one_out
from voxfuse.fusion.grids import Grid, plan_grid
from voxfuse.fusion.windows import bspline_window, gaussian_window
from voxfuse.metrics import ScoreCounts
from voxfuse.metrics._arrays import optional
from voxfuse.training.config import Config, parse
from voxfuse.training.dataset import find_dataset
from voxfuse.training.predict import MODEL, Model, first_output, load_model
from voxfuse.training.trainer import train
from voxfuse.training.volumes import Volume, load_volume

Vector = NDArray[np.float64]

#: The folder of the scans in ``place.data``.
DATA = "ms_lesions"

#: Extent of a patch, overlap of the prediction that is kept, and all overlaps.
PATCH, FINEST, OVERLAPS = 32, 0.75, (0.25, 0.5, 0.75)

#: Of Gaussians, beside those that match another window.
WIDTHS = (0.03, 0.06, 0.08, 0.25)


def config_of(run: Run, quick: bool) -> Config:
    """How a run's network is trained: as ``examples/ms_lesions.toml`` says."""
    fold = int(run["fold"])
    return parse(
        {
            "data": {
                "images": ["flair", "t1"],
                "label": "lesions",
                "labels": {"background": 0, "lesion": 1},
                "mask": "positive",
                "normalisation": "robust",
                "groups": "subjects.csv",
                "training": list(TEST[1 - fold]),
            },
            "sampling": {
                "method": "balanced",
                "patch": [PATCH] * 3,
                "batch": 4,
                "foreground": 0.5,
                "jitter": 0.375,
            },
            "augmentation": {"flips": "mirror", "scale": 0.1, "shift": 0.1},
            "network": {"name": "unet", "features": [4, 8] if quick else [8, 16, 32, 64]},
            "loss": {"name": "DiceCELoss", "batch": True, "include_background": False},
            "optimiser": {
                "name": "AdamW",
                "learning_rate": 1e-3,
                "weight_decay": 0.01,
                "schedule": "polynomial",
            },
            "training": {"steps": 6 if quick else 800, "seed": int(run["seed"]), "threads": 1},
            "prediction": {"window": "bspline", "overlap": 0.5, "orientations": "none"},
        }
    )


# --- Windows --------------------------------------------------------------------------------------


def effective_width(weights: Vector) -> float:
    """See the module's docstring.

    Example:
        >>> import voxfuse
        >>> from voxfuse.experiments.fusion import effective_width
        >>> [round(effective_width(voxfuse.bspline_window(32, n).numpy()), 3) for n in (0, 1, 5)]
        [0.289, 0.204, 0.118]
    """
    t = np.arange(weights.size) - (weights.size - 1) / 2
    return float(np.sqrt((weights * t**2).sum() / weights.sum())) / weights.size


def hashemi(extent: int, scale: float = 1.0) -> Vector:
    """Hashemi's window stretched over ``scale`` of the patch, 0 beyond."""
    t = np.abs(np.arange(extent) - (extent - 1) / 2) / (extent * scale / 2)
    t = np.clip(1 - t, 0, 1)
    weights: Vector = np.where(t <= 0.5, 2 * t**2, 1 - 2 * (1 - t) ** 2)
    return weights


@lru_cache(maxsize=256)
def _of_width(shape: str, width: float, extent: int) -> Vector:
    """The window of a family of one parameter that has this effective width."""

    def made(parameter: float) -> Vector:
        if shape == "hashemi":
            return hashemi(extent, parameter)
        weights: Vector = gaussian_window(extent, parameter).numpy()
        return weights

    low, top = {"hashemi": (0.1, 1.0), "gaussian": (0.02, 20.0)}[shape]
    if width == effective_width(made(top)):
        return made(top)
    optimize = optional("scipy.optimize", "A window of a given width")
    found = optimize.brentq(lambda x: effective_width(made(x)) - width, low, top, xtol=1e-12)
    return made(float(found))


@dataclass(frozen=True)
class Setting:
    """A way of putting patches together."""

    overlap: float
    voting: str  #: "soft" averages probabilities, "logit" logits
    window: str
    width: float | None  #: None of no window

    def vector(self, extent: int = PATCH) -> Vector:
        """The window's weights along an axis, never 0: a voxel of one patch alone has that one."""
        if self.window == "uniform":
            return np.ones(extent)
        if self.window.startswith("bspline"):
            weights: Vector = bspline_window(extent, int(self.window[len("bspline") :])).numpy()
            return weights
        assert self.width is not None
        weights = _of_width(self.window, self.width, extent)
        positive: Vector = np.maximum(weights, 1e-9 * weights.max())
        return positive


NONE = Setting(0.0, "soft", "none", None)


def settings(quick: bool) -> list[Setting]:
    """Every setting that is measured."""
    orders = (1, 5) if quick else range(1, 8)
    splines = {f"bspline{n}": effective_width(bspline_window(PATCH, n).numpy()) for n in orders}
    own = effective_width(hashemi(PATCH))
    uniform = effective_width(np.ones(PATCH))
    made = [NONE]
    for overlap in OVERLAPS:
        windows = [("uniform", uniform), *splines.items(), ("hashemi", own)]
        windows += [("gaussian", width) for width in (*splines.values(), own)]
        if not quick:
            windows += [("gaussian", width) for width in WIDTHS]
        if overlap >= 0.5:  # below, narrow ones leave voxels that none of them reaches
            windows += [("hashemi", width) for width in splines.values() if width < own]
        made += [Setting(overlap, "soft", *window) for window in windows]
        middle = [("uniform", uniform), ("bspline5", splines["bspline5"]), ("hashemi", own)]
        made += [Setting(overlap, "logit", *window) for window in middle]
        made.append(Setting(overlap, "logit", "gaussian", splines["bspline5"]))
    return made


# --- Patches --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patches:
    """Differences of logits of a scan's patches: (N, 1, \\*patch) float16."""

    grid: Grid
    logits: Tensor

    def places(self, grid: Grid) -> Tensor:
        """Where the patches of a coarser grid are among these.

        Raises:
            ValueError: one is not among them.
        """
        axes = []
        for coarse, fine in zip(grid.starts, self.grid.starts, strict=True):
            if not set(coarse) <= set(fine):
                raise ValueError(f"grid: got starts {coarse}, expected some of {fine}")
            axes.append(np.array([fine.index(start) for start in coarse]))
        shape = [len(fine) for fine in self.grid.starts]
        places = np.ravel_multi_index(tuple(np.meshgrid(*axes, indexing="ij")), shape)
        return torch.from_numpy(places.ravel())


def predict_patches(network: nn.Module, image: NDArray[np.float32], batch: int = 8) -> Patches:
    """Predict every patch of the finest overlap once.

    Raises:
        RuntimeError: a prediction is not finite, or beyond float16.
    """
    volume = torch.from_numpy(image)
    grid = plan_grid(tuple(volume.shape[1:]), (PATCH,) * 3, FINEST)
    origins = grid.origins.tolist()
    logits = torch.empty(len(grid), 1, *grid.patch_shape, dtype=torch.float16)
    for first in range(0, len(origins), batch):
        patches = torch.stack(
            [
                volume[:, x : x + PATCH, y : y + PATCH, z : z + PATCH]
                for x, y, z in origins[first : first + batch]
            ]
        )
        with torch.inference_mode():
            outputs = first_output(network(patches)).float()
        logits[first : first + batch] = outputs[:, 1:] - outputs[:, :1]
    if not torch.isfinite(logits).all():
        raise RuntimeError("logits: got some that are not finite in float16, expected finite ones")
    return Patches(grid, logits)


def fused(patches: Patches, setting: Setting) -> NDArray[np.float32]:
    """Probabilities (\\*spatial) of the patches put together."""
    fine = patches.grid
    grid = plan_grid(fine.volume_shape, fine.patch_shape, setting.overlap).distinct()
    places = patches.places(grid)
    if setting.window == "none":
        return _abutted(patches, grid, places)
    fuser = PatchFuser(
        fine.volume_shape,
        fine.patch_shape,
        1,
        origins=grid,
        window=[setting.vector(n) for n in fine.patch_shape],
        output="probabilities",
        activation="sigmoid",
        voting=setting.voting,
        dtype=torch.float32,
    )
    for chosen in places[fuser.order].split(256):
        fuser.add(patches.logits[chosen])
    # The weights add up to 1 but for rounding.
    result: NDArray[np.float32] = fuser.result()[0].clamp_(0, 1).numpy()
    return result


def _abutted(patches: Patches, grid: Grid, places: Tensor) -> NDArray[np.float32]:
    """Patches side by side; where the last of an axis is shifted back, the one before it counts."""
    result = np.zeros(grid.volume_shape, np.float32)
    origins = grid.origins.tolist()
    for place, (x, y, z) in reversed(list(zip(places.tolist(), origins, strict=True))):
        patch = patches.logits[place, 0].float().sigmoid().numpy()
        result[x : x + PATCH, y : y + PATCH, z : z + PATCH] = patch
    return result


# --- What is measured -----------------------------------------------------------------------------


def jumps(
    probabilities: NDArray[np.float32], mask: NDArray[np.bool_], grid: Grid
) -> tuple[float, float]:
    """Mean ``|p(x) - p(x - 1)|`` across the planes of patches' faces, and midway between those.

    Both voxels in the mask. Planes less than two voxels from a face are no middle.
    """
    means = []
    planes: list[tuple[int, int, bool]] = []
    for axis, (starts, size, extent) in enumerate(
        zip(grid.starts, grid.patch_shape, grid.volume_shape, strict=True)
    ):
        ends = {start + size for start in starts}
        faces = sorted(x for x in {*starts, *ends} if 0 < x < extent)
        planes += [(axis, x, True) for x in faces]
        pairs = zip([0, *faces], [*faces, extent], strict=True)
        planes += [(axis, (a + b) // 2, False) for a, b in pairs if b - a >= 4]
    for wanted in (True, False):
        total, count = 0.0, 0
        for axis, x, is_face in planes:
            if is_face != wanted:
                continue
            both = mask.take(x, axis) & mask.take(x - 1, axis)
            steps = np.abs(probabilities.take(x, axis) - probabilities.take(x - 1, axis))
            total += float(steps[both].sum(dtype=np.float64))
            count += int(both.sum())
        means.append(total / count if count else float("nan"))
    return means[0], means[1]


def depths(extent: Sequence[int]) -> NDArray[np.int64]:
    """Of every voxel of a patch: how many voxels lie between it and the nearest face."""
    axes = [np.minimum(np.arange(n), np.arange(n)[::-1]) for n in extent]
    nearest: NDArray[np.int64] = np.minimum(
        np.minimum(axes[0][:, None, None], axes[1][None, :, None]), axes[2][None, None, :]
    )
    return nearest


def by_depth(
    patches: Patches, truth: NDArray[np.bool_], mask: NDArray[np.bool_], group: int = 64
) -> list[ScoreCounts]:
    """Voxels of all patches before they are put together, by their depth in their own patch."""
    codes = 1 << 16  # every float16
    depth = depths(patches.grid.patch_shape)
    levels = int(depth.max()) + 1
    totals = np.zeros((2, levels * codes), np.int64)
    origins = patches.grid.origins.tolist()
    for first in range(0, len(origins), group):
        cuts = [
            (slice(x, x + PATCH), slice(y, y + PATCH), slice(z, z + PATCH))
            for x, y, z in origins[first : first + group]
        ]
        inside = np.stack([mask[cut] for cut in cuts])
        true = np.stack([truth[cut] for cut in cuts])[inside]
        bits = patches.logits[first : first + group, 0].numpy().view(np.uint16)
        index = (bits.astype(np.int64) + depth * codes)[inside]
        totals[0] += np.bincount(index[true], minlength=totals.shape[1])
        totals[1] += np.bincount(index[~true], minlength=totals.shape[1])
    logits = np.arange(codes, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.isfinite(logits)
    p = torch.from_numpy(logits[finite]).sigmoid().numpy()
    thresholds, place = np.unique(p, return_inverse=True)

    def summed(counts: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount(place, counts[finite], thresholds.size).astype(np.int64)

    made = []
    for positives, negatives in zip(*totals.reshape(2, levels, codes), strict=True):
        both = summed(positives), summed(negatives)
        sums = thresholds.astype(np.float64) * (both[0] + both[1])
        made.append(ScoreCounts(thresholds.astype(np.float64), *both, sums))
    return made


def mean_error(counts: ScoreCounts) -> float:
    """Mean ``|p - g|`` over the voxels, g being the truth."""
    wrong = counts.thresholds @ counts.negatives + (1 - counts.thresholds) @ counts.positives
    return float(wrong / (counts.positives.sum() + counts.negatives.sum()))


@dataclass(frozen=True)
class Measured:
    """Of one subject and one setting, or one depth."""

    curve: Curve
    error: float
    face: float | None = None
    mid: float | None = None


def measure(
    patches: Patches, truth: NDArray[np.bool_], mask: NDArray[np.bool_], quick: bool
) -> Iterator[tuple[tuple[Setting, int | None], Measured]]:
    """Every setting and every depth of a subject, inside the mask."""
    for setting in settings(quick):
        p = fused(patches, setting)
        grid = plan_grid(p.shape, patches.grid.patch_shape, setting.overlap).distinct()
        error = float(np.abs(p - truth)[mask].mean(dtype=np.float64))
        yield (setting, None), Measured(curve(p, truth, mask), error, *jumps(p, mask, grid))
    unfused = Setting(FINEST, "soft", "none", None)
    for depth, counts in enumerate(by_depth(patches, truth, mask)):
        yield (unfused, depth), Measured(curve_of_counts(counts), mean_error(counts))


def middle(volume: Volume, extent: int = 56) -> Volume:
    """The middle of a scan, for a quick look."""
    cut = tuple(slice(max((n - extent) // 2, 0), (n + extent) // 2) for n in volume.mask.shape)
    assert volume.label is not None
    return dataclasses.replace(
        volume,
        image=np.ascontiguousarray(volume.image[(slice(None), *cut)]),
        mask=volume.mask[cut],
        label=volume.label[cut],
    )


def trained(run: Run, place: Place) -> Model:
    """The run's network, which is trained if it is not there.

    Raises:
        ValueError: what is there was trained in another way.
    """
    config = config_of(run, place.quick)
    folder = place.work / "fusion" / "models" / f"fold{run['fold']}_seed{run['seed']}"
    there = (folder / MODEL).is_file()
    if not there or load_model(folder, "cpu").step < config.training.steps:
        train(config, place.data / DATA, folder)
    model = load_model(folder, "cpu")
    # Whom it is tested on, and how, makes no difference to the network.
    got = dataclasses.replace(
        model.config,
        data=dataclasses.replace(model.config.data, test=config.data.test),
        prediction=config.prediction,
    )
    for part in dataclasses.fields(got):
        found, expected = getattr(got, part.name), getattr(config, part.name)
        if found != expected:
            raise ValueError(f"{folder}: was trained with {found}, expected {expected}")
    return model


def rows(run: Run, place: Place) -> list[dict[str, Any]]:
    """Rows of a network's test subjects."""
    torch.set_num_threads(1)
    model = trained(run, place)
    names = TEST[int(run["fold"])]
    dataset = find_dataset(place.data / DATA, model.config.data)
    found: dict[tuple[Setting, int | None], dict[str, Measured]] = {}
    for name in names:
        place.say(f"fusion: {name}")
        volume = load_volume(dataset.subjects[name], model.config.data, model.labels)
        if place.quick:
            volume = middle(volume)
        assert volume.label is not None
        patches = predict_patches(model.network, volume.image)
        for key, measured in measure(patches, volume.label > 0, volume.mask, place.quick):
            found.setdefault(key, {})[name] = measured
    return [row for key, subjects in found.items() for row in _rows_of(run, key, subjects)]


def _rows_of(
    run: Run, key: tuple[Setting, int | None], subjects: Mapping[str, Measured]
) -> Iterator[dict[str, Any]]:
    setting, depth = key
    for scores in leave_one_out({name: found.curve for name, found in subjects.items()}):
        found = subjects[scores["subject"]]
        yield {
            **run,
            **dataclasses.asdict(setting),
            "depth": depth,
            **scores,
            "error": found.error,
            "face": found.face,
            "mid": found.mid,
        }


def runs(quick: bool) -> list[Run]:
    """A network a fold and a seed; both folds of a seed before the next."""
    seeds = SEEDS[:1] if quick else SEEDS
    return [{"fold": fold, "seed": seed} for seed in seeds for fold in (0, 1)]


EXPERIMENT = Experiment(
    name="fusion",
    title=fusion_page.TITLE,
    key=KEY,
    columns=COLUMNS,
    runs=runs,
    rows=rows,
    pages=fusion_page.pages,
)
