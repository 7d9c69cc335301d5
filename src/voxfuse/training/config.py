"""The configuration of a run: defaults with their comments, TOML in and out, checks.

A section is a dataclass whose fields are its keys; a field has its comment, and what it allows.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from voxfuse.fusion.windows import NAMES
from voxfuse.losses.declared import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


#: Name of the label whose voxels nobody has judged: nnU-Net's.
IGNORE = "ignore"


class ConfigError(ValueError):
    """A configuration asks for what there is not; the message names the key."""


def _key(
    default: Any,
    comment: str,
    *,
    choices: Iterable[str] = (),
    least: float | None = None,
    most: float | None = None,
) -> Any:
    """A field with its comment and what it allows; ``least`` and ``most`` hold for every item."""
    about = {"comment": comment, "choices": tuple(choices), "least": least, "most": most}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=about)
    return field(default=default, metadata=about)


@dataclass
class DataOptions:
    """Which files, which subjects, and what is done to intensities and grids."""

    images: list[str] = _key(
        [],
        "Modalities, in the network's order: files without the ending (flair.nii.gz is flair), or "
        "channel names of a dataset.json, all of which [] stands for.",
    )
    label: str = _key("", "File of the labels, without the ending; a dataset.json has its own.")
    labels: dict[str, int] = _key(
        {},
        "Names and values of the labels, the background first, with ascending values: classes, and "
        "weights of classes, are in this order. {} with a dataset.json: its own. Voxels of the one "
        "named 'ignore' count nowhere.",
    )
    mask: str = _key(
        "positive",
        "Brain or body: 'positive' (first modality > 0), 'all' (the whole scan), or a file without "
        "the ending. Normalised inside it; predictions outside it are background.",
    )
    groups: str = _key(
        "",
        "CSV file in the data folder with columns subject and patient (other columns do not "
        "matter): no patient is in two of training, validation and test.",
    )
    training: list[str] = _key(
        [], "Subjects, or patients; []: those that are in neither of the next two."
    )
    validation: list[str] = _key([], "Subjects that choose the best model and stop early.")
    validation_share: float = _key(
        0.0, "Where validation = []: draw this share of the patients.", least=0, most=0.9
    )
    test: list[str] = _key([], "Subjects of RUN/test.csv.")
    orientation: str = _key(
        "RAS",
        "Axes that scans are turned to, as nibabel names them, or '' as they are; "
        "predictions are turned back.",
    )
    spacing: list[float] = _key(
        [],
        "Voxel size in mm that scans are resampled to (images linearly, without smoothing; labels "
        "by the greatest of the interpolated classes), along the turned axes; []: as it is. "
        "Predictions come back on the scan's own grid.",
        least=0.01,
    )
    normalisation: str = _key(
        "zscore",
        "Of each modality inside the mask, 0 outside: 'zscore' (mean 0, deviation 1), 'robust' "
        "(median 0, median absolute deviation 1 / 1.4826, which lesions hardly move), 'range' "
        "(minimum 0, maximum 1) or 'none'.",
        choices=("zscore", "robust", "range", "none"),
    )
    clip: list[float] = _key(
        [0.0, 100.0],
        "Percentiles inside the mask to which intensities are clipped before.",
        least=0,
        most=100,
    )


@dataclass
class SamplingOptions:
    """Which patches a step has."""

    method: str = _key(
        "balanced",
        "'balanced': the share `foreground` of the patches about a voxel of a class, each class of "
        "the subject as often, the others about a voxel of the mask. 'lesions': the papers' "
        "selection, about a lesion voxel, accepted where the central half of the patch has enough "
        "of them. 'uniform': about any voxel of the mask.",
        choices=("balanced", "lesions", "uniform"),
    )
    patch: list[int] = _key([32, 32, 32], "Extent of a patch in voxels.", least=1)
    batch: int = _key(4, "Patches a step.", least=1)
    foreground: float = _key(
        0.5, "Of 'balanced': share of the patches about a class.", least=0, most=1
    )
    jitter: float = _key(
        0.3125,
        "The chosen voxel lies off the patch's centre by up to this share of its extent, along "
        "each axis; at 0.5 to its border. The papers' 20 voxels of 64.",
        least=0,
        most=0.5,
    )
    minimum_voxels: int = _key(
        50, "Of 'lesions': voxels that the central half must have ...", least=0
    )
    relaxed_voxels: int = _key(5, "... and from step relax_after on.", least=0)
    relax_after: int = _key(1000, "", least=0)
    minimum_subject_voxels: int = _key(
        100, "Of 'lesions': subjects with 1 to this many lesion voxels less one are left out ..."
    )
    relaxed_subject_voxels: int = _key(
        10, "... and from step relax_subjects_after on. The released code has 100 there."
    )
    relax_subjects_after: int = _key(1000, "", least=0)
    draws: int = _key(
        100,
        "Of 'lesions': patches drawn at most; then the one with most voxels is taken and counted "
        "in the log as relaxed.",
        least=1,
    )


@dataclass
class AugmentationOptions:
    """What is changed in a patch."""

    flips: str = _key(
        "mirror",
        "'mirror': each axis with probability 1/2. 'rotations': as it is and turned by 180 degrees "
        "in each plane, alike (Hashemi et al. 2018). 'released': those with the probabilities of "
        "the released code, 42, 25, 19 and 14 %. 'none'.",
        choices=("mirror", "rotations", "released", "none"),
    )
    scale: float = _key(
        0.1, "Intensities times 1 +- this, a modality, inside the mask.", least=0, most=1
    )
    shift: float = _key(0.1, "Intensities plus +- this, a modality, inside the mask.", least=0)
    monai: list[dict[str, Any]] = _key(
        [],
        "Transforms of MONAI's (pip install monai) after these, by name, such as "
        '{name = "RandGaussianNoised", prob = 0.2, std = 0.05}: dictionary transforms with their '
        "options. keys is ['image'] for those of intensity, else ['image', 'label', 'mask'].",
    )
    simulate_every: int = _key(
        0,
        "Put simulated MS lesions into every training subject, others each so many steps; 0: none. "
        "About a second a subject, in which nothing trains. Needs a modality t1.",
        least=0,
    )
    simulate_shapes: str = _key(
        "none",
        "Their shapes: 'none' is a random model, else a folder of masks; leave those of patients "
        "who are validated or tested out of it.",
    )


@dataclass
class NetworkOptions:
    """A network by name, and its options."""

    name: str = _key(
        "unet",
        "unet, unet_salehi2017, fc_densenet, fc_densenet_compact, or 'package.module:Class'. "
        "Further keys are its options.",
    )
    options: dict[str, Any] = _key({}, "")


@dataclass
class LossOptions:
    """A loss by name, and its options."""

    name: str = _key(
        "DiceCELoss",
        "A loss of voxfuse, such as DiceCELoss, TverskyLoss, FBetaLoss, FocalTverskyLoss, "
        "TverskyCELoss, UnifiedFocalLoss. Further keys are its options (docs/losses.md).",
    )
    options: dict[str, Any] = _key({}, "")


@dataclass
class OptimiserOptions:
    """The optimiser, and the learning rate of a step."""

    name: str = _key(
        "AdamW", "'AdamW', 'Adam' or 'SGD' (Nesterov).", choices=("AdamW", "Adam", "SGD")
    )
    learning_rate: float = _key(1e-3, "At the first step.", least=0)
    weight_decay: float = _key(
        0.01, "Decoupled in AdamW; the gradient of an L2 penalty in Adam and SGD.", least=0
    )
    undecayed: list[str] = _key(
        [], "Regular expressions; parameters whose names one matches have no weight decay."
    )
    momentum: float = _key(0.99, "Of SGD.", least=0, most=1)
    schedule: str = _key(
        "polynomial",
        "Of the learning rate: 'polynomial', (1 - step / steps)^power; 'decay', times decay_factor "
        "every decay_steps; 'released', the same one decay ahead, and the optimiser forgets its "
        "moments at each (Hashemi's code); 'constant'.",
        choices=("polynomial", "decay", "released", "constant"),
    )
    power: float = _key(0.9, "", least=0)
    decay_factor: float = _key(0.95, "", least=0, most=1)
    decay_steps: int = _key(500, "", least=1)
    clip_gradient: float = _key(0.0, "Norm that a gradient has at most; 0: any.", least=0)


@dataclass
class TrainingOptions:
    """How long, how exact, how often."""

    steps: int = _key(800, "Updates of the weights.", least=1)
    seed: int = _key(0, "Every random number follows from it and the step.", least=0)
    updates_per_patch: int = _key(1, "Updates with the same patches; 2 in Hashemi's code.", least=1)
    loss_inside_mask: bool = _key(False, "Voxels outside the mask do not count in the loss.")
    depth_weights: str = _key(
        "exp",
        "Of a network with deep supervision: 'exp' (1, 1/2, 1/4, ...), 'same' or 'two' (1, 1/2, "
        "1/2, ...).",
        choices=("exp", "same", "two"),
    )
    precision: str = _key(
        "float32",
        "'bfloat16' or 'float16' (with a scaled loss, on a GPU): mixed precision.",
        choices=("float32", "bfloat16", "float16"),
    )
    device: str = _key("auto", "'auto': a GPU if there is one; or as PyTorch names it.")
    threads: int = _key(
        0, "Of PyTorch on the CPU; 0: its default. Bits are the same for the same number.", least=0
    )
    validate_every: int = _key(200, "Steps between validations.", least=1)
    validation_overlap: float = _key(
        0.25, "Of the patches of a validation, in one orientation.", least=0, most=0.9
    )
    patience: int = _key(
        0, "Stop after so many validations without a better one; 0: never.", least=0
    )
    checkpoint_every: int = _key(100, "Steps between checkpoints.", least=1)
    log_every: int = _key(10, "Steps a row of log.csv is the mean of.", least=1)


@dataclass
class PredictionOptions:
    """How patches become a segmentation; options of ``voxfuse predict`` take their place."""

    window: str = _key("bspline", "Weights of a patch's voxels: docs/fusion.md.")
    overlap: float = _key(0.5, "Share of a patch that the next one has too.", least=0, most=0.95)
    grid: str = _key(
        "shifted",
        "'shifted' or 'even': inside the scan. 'half_patch': reflected at the border by half a "
        "patch, as Hashemi et al.",
        choices=("shifted", "even", "half_patch"),
    )
    orientations: str = _key(
        "none",
        "Predictions averaged: 'rotations', turned by 180 degrees in each plane besides, as "
        "Hashemi et al.; 'mirror', all eight flips; 'none'.",
        choices=("none", "rotations", "mirror"),
    )
    threshold: float = _key(
        0.5, "Of two classes: p >= threshold is foreground. Of more: the greatest.", least=0, most=1
    )
    batch: int = _key(4, "Patches a call of the network.", least=1)


@dataclass
class Config:
    """Everything that a run depends on, beside the data.

    Example:
        >>> from voxfuse.training.config import parse
        >>> config = parse({"network": {"name": "unet", "features": [4, 8]}})
        >>> config.network.options, config.training.steps
        ({'features': [4, 8]}, 800)
        >>> parse({"training": {"step": 100}})
        Traceback (most recent call last):
        voxfuse.training.config.ConfigError: training.step: no such key; did you mean steps? ...
    """

    data: DataOptions = field(default_factory=DataOptions)
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    augmentation: AugmentationOptions = field(default_factory=AugmentationOptions)
    network: NetworkOptions = field(default_factory=NetworkOptions)
    loss: LossOptions = field(default_factory=LossOptions)
    optimiser: OptimiserOptions = field(default_factory=OptimiserOptions)
    training: TrainingOptions = field(default_factory=TrainingOptions)
    prediction: PredictionOptions = field(default_factory=PredictionOptions)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Sections and keys as TOML has them: options of network and loss beside their names."""
        sections = dataclasses.asdict(self)
        for section in sections.values():
            section.update(section.pop("options", {}))
        return sections


def load(path: str | Path, settings: Iterable[str] = ()) -> Config:
    """Read a configuration.

    Args:
        path: a TOML file; what it leaves out has its default.
        settings: ``"section.key=value"`` (values as in TOML) in place of what the file says.

    Raises:
        ConfigError: no TOML, an unknown key (the message has the nearest one), or a value that is
            not allowed.
        FileNotFoundError: there is no such file.
    """
    try:
        sections = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: there is no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    for setting in settings:
        place, equals, value = setting.partition("=")
        section, dot, key = place.strip().partition(".")
        if not equals or not dot:
            raise ConfigError(f"--set: got {setting!r}, expected section.key=value")
        try:
            parsed = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            parsed = value.strip()  # a word needs no quotes
        sections.setdefault(section, {})[key] = parsed
    try:
        return parse(sections)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def parse(sections: Mapping[str, Any]) -> Config:
    """The configuration that sections of keys ask for.

    Raises:
        ConfigError: as :func:`load`.
    """
    known = {f.name: f for f in dataclasses.fields(Config)}
    made = {}
    for name, keys in sections.items():
        if name not in known:
            raise ConfigError(
                f"[{name}]: no such section, expected one of {', '.join(known)}"
                + did_you_mean(name, known)
            )
        if not isinstance(keys, Mapping):
            raise ConfigError(f"{name}: got {keys!r}, expected a section [{name}]")
        made[name] = _section(name, known[name].default_factory, keys)
    config = Config(**made)
    _check_together(config)
    return config


def _section(name: str, kind: Any, keys: Mapping[str, Any]) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name != "options"}
    hints = get_type_hints(kind)
    free = "options" in hints
    values: dict[str, Any] = {}
    for key, value in keys.items():
        if key in fields:
            values[key] = _checked(f"{name}.{key}", value, str(hints[key]), fields[key].metadata)
        elif free:
            values.setdefault("options", {})[key] = value
        else:
            listed = ", ".join(fields)
            raise ConfigError(
                f"{name}.{key}: no such key{did_you_mean(key, fields)} ([{name}] has {listed})"
            )
    return kind(**values)


_EXPECTED: dict[str, tuple[str, Any]] = {
    "<class 'bool'>": ("true or false", lambda x: isinstance(x, bool)),
    "<class 'int'>": ("an integer", lambda x: isinstance(x, int) and not isinstance(x, bool)),
    "<class 'float'>": (
        "a number", lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)
    ),
    "<class 'str'>": ("a string", lambda x: isinstance(x, str)),
}  # fmt: skip
_ITEMS = {
    "list[str]": ("strings", "<class 'str'>"),
    "list[int]": ("integers", "<class 'int'>"),
    "list[float]": ("numbers", "<class 'float'>"),
}


def _checked(place: str, value: Any, hint: str, allowed: Mapping[str, Any]) -> Any:
    """The value, if it is of the field's type and allowed."""
    if hint in _ITEMS:
        expected, item = _ITEMS[hint]
        if not isinstance(value, list) or not all(_EXPECTED[item][1](x) for x in value):
            raise ConfigError(f"{place}: got {value!r}, expected a list of {expected}")
    elif hint.startswith("dict"):
        if not isinstance(value, dict) or not all(
            _EXPECTED["<class 'int'>"][1](x) for x in value.values()
        ):
            raise ConfigError(f"{place}: got {value!r}, expected a table of integers")
    elif hint.startswith("list"):
        if not isinstance(value, list) or not all(isinstance(x, dict) for x in value):
            raise ConfigError(f"{place}: got {value!r}, expected a list of tables")
    else:
        expected, fits = _EXPECTED[hint]
        if not fits(value):
            raise ConfigError(f"{place}: got {value!r}, expected {expected}")
        value = float(value) if hint == "<class 'float'>" else value
    if allowed["choices"] and value not in allowed["choices"]:
        listed = ", ".join(allowed["choices"])
        raise ConfigError(
            f"{place}: got {value!r}, expected one of {listed}"
            + did_you_mean(str(value), allowed["choices"])
        )
    for x in value if isinstance(value, list) else [value]:
        least, most = allowed["least"], allowed["most"]
        if (least is not None and not x >= least) or (most is not None and not x <= most):
            bounds = f"{least:g} or more" if most is None else f"{least:g} to {most:g}"
            raise ConfigError(f"{place}: got {value!r}, expected {bounds}")
    return value


def _check_together(config: Config) -> None:
    """What one key's check cannot see."""
    data, sampling = config.data, config.sampling
    if len(sampling.patch) != 3:
        raise ConfigError(f"sampling.patch: got {sampling.patch}, expected three integers")
    if data.spacing and len(data.spacing) != 3:
        raise ConfigError(f"data.spacing: got {data.spacing}, expected [] or three numbers")
    if len(data.clip) != 2 or not data.clip[0] < data.clip[1]:
        raise ConfigError(f"data.clip: got {data.clip}, expected two percentiles, the lower first")
    sides = ["LR", "PA", "IS"]
    axes = sorted(i for x in data.orientation for i, side in enumerate(sides) if x in side)
    if data.orientation and (len(data.orientation) != 3 or axes != [0, 1, 2]):
        raise ConfigError(
            f"data.orientation: got {data.orientation!r}, expected '' or one of each of L or R, P "
            "or A, I or S, such as 'RAS'"
        )
    if data.labels and sorted(data.labels.values())[0] != 0:
        raise ConfigError(
            f"data.labels: got {data.labels}, expected a background of 0, such as "
            "{background = 0, lesion = 1}"
        )
    if len(set(data.labels.values())) != len(data.labels):
        raise ConfigError(f"data.labels: got {data.labels}, expected each value once")
    classes = [name for name in data.labels if name != IGNORE]
    ordered = sorted(classes, key=lambda name: data.labels[name])
    if classes != ordered:
        raise ConfigError(
            f"data.labels: got the order {', '.join(classes)}, expected ascending values: "
            f"{', '.join(ordered)}; weights of classes are in this order too"
        )
    window = config.prediction.window
    if window not in NAMES:
        raise ConfigError(
            f"prediction.window: got {window!r}, expected one of {', '.join(NAMES)}"
            + did_you_mean(window, NAMES)
        )
    for transform in config.augmentation.monai:
        if not isinstance(transform.get("name"), str):
            raise ConfigError(f"augmentation.monai: got {transform}, expected name = '...' in it")


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, Mapping):
        items = ", ".join(f"{_toml_key(key)} = {_toml(x)}" for key, x in value.items())
        return "{" + items + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)


def _toml_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _toml(key)


def to_toml(config: Config, comments: bool = True) -> str:
    """Every key with its value as TOML, which :func:`load` reads back, and its comment.

    Example:
        >>> from voxfuse.training.config import Config, to_toml
        >>> print(to_toml(Config(), comments=False).splitlines()[0])
        [data]
    """
    import textwrap

    lines: list[str] = []
    for section in dataclasses.fields(config):
        options = getattr(config, section.name)
        lines += [""] * bool(lines) + [f"[{section.name}]"]
        for key in dataclasses.fields(options):
            if key.name == "options":
                continue
            if comments and key.metadata["comment"]:
                lines += textwrap.wrap(
                    key.metadata["comment"], 98, initial_indent="# ", subsequent_indent="# "
                )
            lines.append(f"{key.name} = {_toml(getattr(options, key.name))}")
        for name, value in getattr(options, "options", {}).items():
            lines.append(f"{_toml_key(name)} = {_toml(value)}")
    return "\n".join(lines) + "\n"
