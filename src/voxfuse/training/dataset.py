"""Which files are which subject's, and which patient a subject is."""

from __future__ import annotations

import csv
import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from voxfuse.losses.declared import did_you_mean
from voxfuse.metrics.files import ENDINGS, is_image
from voxfuse.training.config import IGNORE, DataOptions

#: What the voxels of the label "ignore" are in a volume; classes lie below it.
IGNORED = 255


class DataError(ValueError):
    """Files are missing or do not fit; the message names subject and file."""


@dataclass(frozen=True)
class Subject:
    """One examination: its files, none of which has been looked at yet."""

    name: str
    images: tuple[Path, ...]  #: one a modality, or one that has all of them as channels
    label: Path | None
    mask: Path | None = None
    group: str = ""  #: the patient


@dataclass(frozen=True)
class Dataset:
    """The subjects of a folder, their modalities and labels."""

    folder: Path
    subjects: dict[str, Subject]
    images: tuple[str, ...]
    labels: dict[str, int]  #: name and value, ascending from the background's, without "ignore"
    given: dict[str, list[str]] = field(default_factory=dict)  #: a dataset.json's own split
    channels: tuple[int, ...] = ()  #: of a dataset.json: the place of each modality in it
    unused_channels: tuple[int, ...] = ()  #: of a dataset.json: the places of its others
    ignored: int | None = None  #: value of the label "ignore"


def files_named(folder: Path, name: str) -> list[Path]:
    """The image files of this name without the ending."""
    paths = [folder / f"{name}{ending}" for ending in ENDINGS]
    return [path for path in paths if path.is_file()]


def file_named(folder: Path, name: str) -> Path | None:
    """The image file of this name without the ending, or None.

    Raises:
        DataError: there are several, with other endings.
    """
    found = files_named(folder, name)
    if len(found) > 1:
        listed = " and ".join(path.name for path in found)
        raise DataError(f"{folder.name}: {folder} has {listed}, expected one file {name}")
    return found[0] if found else None


def names_of(place: Path, name: str) -> list[str]:
    """What a subject's file may be called: this, or its folder's name and this, as BraTS has it."""
    return [name, *(f"{place.name}{between}{name}" for between in "_-")]


def file_of(place: Path, name: str) -> Path | None:
    """A subject's file of this name, see :func:`names_of`, or None."""
    return next(filter(None, (file_named(place, x) for x in names_of(place, name))), None)


def name_of(path: Path) -> str:
    """The file's name without an image's ending; a folder's whole one, as UIDs have dots."""
    if path.is_dir():
        return path.name
    for ending in ENDINGS:
        if path.name.lower().endswith(ending):
            return path.name[: -len(ending)]
    return path.stem


def with_name(path: Path) -> Path:
    """The path by its name, which subjects get: ``.`` and ``..`` have none."""
    return path.resolve() if path.name in ("", "..") else path


def images_in(folder: Path) -> list[Path]:
    """The image files of a folder itself, but for hidden ones; and links to what is not there."""
    return sorted(
        path for path in folder.iterdir() if is_image(path) and not path.name.startswith(".")
    )


def near_files(place: Path, names: Iterable[str]) -> list[Path]:
    """A folder's files of these names, in whatever case of letters."""
    wanted = [name.lower() for name in names]
    begins = place.name.lower()
    wanted += [f"{begins}{between}{name}" for name in wanted for between in "_-"]
    return [path for path in images_in(place) if name_of(path).lower() in wanted]


def numbered(path: Path) -> tuple[str, int | None]:
    """A file's subject, and its modality's number where it is named ``NAME_0000`` as nnU-Net's."""
    name, underscore, number = name_of(path).rpartition("_")
    if underscore and name and len(number) == 4 and number.isdigit():
        return name, int(number)
    return name_of(path), None


def check_classes(labels: Mapping[str, int]) -> None:
    """Raise for more classes than a volume's label can hold.

    Raises:
        DataError: there are more than 255, with the background.
    """
    if len(labels) > IGNORED:
        raise DataError(
            f"data.labels: got {len(labels)} classes, expected {IGNORED} at most, the background "
            "among them"
        )


def find_dataset(folder: str | Path, options: DataOptions) -> Dataset:
    """The subjects of a folder: one a subfolder, or as a ``dataset.json`` says.

    A ``dataset.json`` is nnU-Net's (``channel_names``, ``labels``, ``file_ending``; ``imagesTr``
    and ``labelsTr``, or a ``dataset`` of cases), the Medical Segmentation Decathlon's or MONAI's
    (``training``: a list of ``image`` and ``label``, optionally ``patient``; ``validation`` and
    ``test`` too, where they have labels).

    Args:
        folder: where the data lie.
        options: the section ``[data]``.

    Raises:
        FileNotFoundError: there is no such folder, or nothing in it.
        DataError: a ``dataset.json`` that cannot be read, two files of one name, more than 255
            classes, a table of patients that lacks a subject (see :func:`patients_of`).
        ValueError: ``images`` or ``labels`` are not said, or not in the ``dataset.json``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"--data: {folder} is no folder")
    if (folder / "dataset.json").is_file():
        found = _from_json(folder, options)
    else:
        found = _from_folders(folder, options)
    if not found.subjects:
        raise FileNotFoundError(f"{folder}: there is no subject with images")
    if IGNORE in found.labels:
        labels = {name: value for name, value in found.labels.items() if name != IGNORE}
        found = replace(found, labels=labels, ignored=found.labels[IGNORE])
    check_classes(found.labels)
    if options.groups:
        groups = _groups(folder / options.groups, found.subjects)
        found = replace(
            found, subjects={k: replace(s, group=groups[k]) for k, s in found.subjects.items()}
        )
    return found


def _from_folders(folder: Path, options: DataOptions) -> Dataset:
    if not options.images or not options.label or not options.labels:
        missing = next(x for x in ("images", "label", "labels") if not getattr(options, x))
        raise ValueError(
            f"data.{missing}: is empty, and there is no dataset.json in {folder}; "
            f"voxfuse train --init {folder} writes a configuration for it"
        )
    subjects = _subjects_in(folder, options.images, options, options.label)
    named = {subject.name: subject for subject in subjects}
    return Dataset(folder, named, tuple(options.images), options.labels)


def _subjects_in(
    folder: Path, images: Sequence[str], options: DataOptions, label: str
) -> list[Subject]:
    """The subjects of a folder of folders; of others that have images it is said.

    A folder that has a modality in another spelling alone, or the label alone, is a subject too, so
    that reading it names what it lacks.
    """
    subjects: list[Subject] = []
    others: list[str] = []
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        subject = subject_of_folder(place, images, options)
        if subject is None and not place.name.startswith("."):
            if near_files(place, [*images, *([label] if label else [])]):
                subject = _subject_at(place, images, options)
            elif images_in(place) or any(images_in(x) for x in place.iterdir() if x.is_dir()):
                others.append(place.name)
        if subject is not None:
            subjects.append(subject)
    if subjects:
        say_left_out(folder, others, f"with no {', '.join(images)} in them")
    return subjects


def say_left_out(folder: Path, names: Sequence[str], why: str) -> None:
    """Warn of what has images and is no subject."""
    if names:
        more = f" and {len(names) - 6} more" if names[6:] else ""
        warnings.warn(f"{folder}: left out: {', '.join(names[:6])}{more}, {why}", stacklevel=4)


def subject_of_folder(place: Path, images: Sequence[str], options: DataOptions) -> Subject | None:
    """The subject whose files lie in ``place``; None if no image does.

    A missing image is the path where it was looked for, so that an error can name it.
    """
    return _subject_at(place, images, options) if any(file_of(place, x) for x in images) else None


def _subject_at(place: Path, images: Sequence[str], options: DataOptions) -> Subject:
    paths = [file_of(place, name) or place / f"{name}.nii.gz" for name in images]
    mask = None
    if options.mask not in ("positive", "all"):
        mask = file_of(place, options.mask) or place / f"{options.mask}.nii.gz"
    label = file_of(place, options.label) if options.label else None
    return Subject(place.name, tuple(paths), label, mask, place.name)


def _from_json(folder: Path, options: DataOptions) -> Dataset:
    path = folder / "dataset.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: got a {type(content).__name__}, expected an object {{...}}")
    named = content.get("channel_names") or content.get("modality")
    if not isinstance(named, dict):
        raise DataError(f"{path}: has no channel_names (nnU-Net) or modality (Decathlon)")
    channels = [str(named[key]) for key in sorted(named, key=int)]
    chosen = options.images or channels
    for name in chosen:
        if name not in channels:
            raise ValueError(
                f"data.images: {path} has no channel {name!r}{did_you_mean(name, channels)} "
                f"(it has {', '.join(channels)})"
            )
        if chosen != channels and channels.count(name) > 1:
            raise ValueError(
                f"data.images: got {name!r}, which {path} calls {channels.count(name)} channels, "
                "expected all channels in their order, or []"
            )
    if options.mask not in ("positive", "all"):
        raise ValueError(
            f"data.mask: got {options.mask!r}, expected positive or all with a dataset.json"
        )
    cases, given = _cases(folder, content, channels)
    # All are known by place: nnU-Net's names say how they are normalised, and may be one name.
    every = range(len(channels))
    places = tuple(every if chosen == channels else map(channels.index, chosen))
    subjects = {}
    for name, (images, label, group) in cases.items():
        if len(images) == len(channels):
            images = [images[place] for place in places]
        elif len(images) != 1:
            raise DataError(f"{name}: {path} has {len(images)} images for {len(channels)} channels")
        elif chosen != channels:
            raise ValueError(
                f"data.images: got {chosen}, expected all channels, {channels}, of one file"
            )
        subjects[name] = Subject(name, tuple(images), label, None, group)
    labels = options.labels or _labels(path, content)
    unused = tuple(place for place in range(len(channels)) if place not in places)
    return Dataset(folder, subjects, tuple(chosen), labels, given, places, unused)


_Case = tuple[list[Path], "Path | None", str]


def _cases(
    folder: Path, content: Mapping[str, Any], channels: Sequence[str]
) -> tuple[dict[str, _Case], dict[str, list[str]]]:
    """Images, label and patient of every case; and the lists that the file itself has."""
    cases: dict[str, _Case] = {}
    given: dict[str, list[str]] = {}
    if "training" in content and isinstance(content["training"], list):
        listed: list[tuple[str, list[Path], str, str | None]] = []
        for part in ("training", "validation", "test"):
            for k, item in enumerate(content.get(part) or []):
                if part == "test" and not (isinstance(item, dict) and "label" in item):
                    continue  # the Decathlon's test images have no labels
                images, label = _files(folder, f"{part}[{k}]", item, "image")
                patient = item.get("patient")
                patient = None if patient is None else str(patient).strip()
                if "patient" in item and not patient:
                    raise DataError(
                        f"{folder / 'dataset.json'}: {part}[{k}]: got {item['patient']!r} as "
                        "patient, expected a name"
                    )
                listed.append((part, images, label, patient))
        # Where files of several cases have one name, a case is called by its path.
        labels = {Path(label) for _, _, label, _ in listed}
        unique = len({name_of(path) for path in labels}) == len(labels)
        for part, images, label, patient in listed:
            name = name_of(Path(label))
            name = name if unique else (Path(label).parent / name).as_posix()
            case: _Case = (images, folder / label, name if patient is None else patient)
            if cases.setdefault(name, case) != case:
                raise DataError(f"{folder / 'dataset.json'}: two entries have the label {label}")
            given.setdefault(part, []).append(name)
        return cases, given
    if isinstance(content.get("dataset"), dict):
        for name, item in content["dataset"].items():
            images, label = _files(folder, f"dataset.{name}", item, "images")
            cases[name] = (images, folder / label, name)
        return cases, given
    ending = content.get("file_ending", ".nii.gz")
    for truth in sorted((folder / "labelsTr").glob(f"[!.]*{ending}")):
        name = truth.name[: -len(ending)]
        paths = [folder / f"imagesTr/{name}_{k:04d}{ending}" for k in range(len(channels))]
        cases[name] = (paths, truth, name)
    # Those without a label come last, so that what is drawn of the others stays.
    for path in sorted((folder / "imagesTr").glob(f"[!.]*_0000{ending}")):
        name = path.name[: -len(f"_0000{ending}")]
        paths = [folder / f"imagesTr/{name}_{k:04d}{ending}" for k in range(len(channels))]
        cases.setdefault(name, (paths, None, name))
    return cases, given


def _files(folder: Path, place: str, item: Any, key: str) -> tuple[list[Path], str]:
    """Images and label of an entry of a dataset.json."""
    images = item.get(key) if isinstance(item, dict) else None
    images = [images] if isinstance(images, str) else images
    label = item.get("label") if isinstance(item, dict) else None
    if (
        not isinstance(images, list)
        or not images
        or not all(isinstance(x, str) for x in [*images, label])
    ):
        raise DataError(
            f"{folder / 'dataset.json'}: {place}: got {item!r}, expected paths as {key} and label"
        )
    return [folder / image for image in images], str(label)


def _labels(path: Path, content: Mapping[str, Any]) -> dict[str, int]:
    """Names and values: nnU-Net has name -> value, the Decathlon value -> name."""
    labels = content.get("labels")
    if not isinstance(labels, dict) or not labels:
        raise DataError(f"{path}: has no labels")
    if all(str(key).lstrip("-").isdigit() for key in labels):
        labels = {str(name): int(value) for value, name in labels.items()}
    for name, value in labels.items():
        if not isinstance(value, int):
            raise DataError(
                f"{path}: labels: got {name!r}: {value!r}, expected a name and one value; regions "
                "are not trained (data.labels can name the values one by one)"
            )
    ordered = dict(sorted(labels.items(), key=lambda item: item[1]))
    if next(iter(ordered.values())) != 0:
        raise DataError(f"{path}: labels: got {labels}, expected a background of 0")
    return ordered


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file in UTF-8, with or without the mark that Excel begins it with.

    Cells have no space around them; those that a row lacks are empty.
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file, restval="", skipinitialspace=True))
    return [
        {key.strip(): cell.strip() for key, cell in row.items() if key is not None} for row in rows
    ]


def patients_of(path: Path, option: str) -> dict[str, str]:
    """Whose scans the subjects are, by the columns subject and patient of a table.

    Args:
        path: a CSV file; see :func:`read_table`.
        option: what names the table, for messages.

    Raises:
        DataError: it cannot be read or has no such columns; a row with one of the two alone, as of
            cells that were merged; a subject with two patients.
    """
    try:
        rows = read_table(path)
    except (OSError, ValueError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{option}: {path} cannot be read: {reason}") from None
    if not rows or not {"subject", "patient"} <= set(rows[0]):
        raise DataError(
            f"{option}: {path} has no columns subject and patient, with a comma between"
        )
    found: dict[str, str] = {}
    for row in rows:
        subject, patient = row["subject"], row["patient"]
        if bool(subject) != bool(patient):
            raise DataError(
                f"{option}: {path}: got subject {subject!r} and patient {patient!r} in a row, "
                "expected both in every row"
            )
        if found.setdefault(subject, patient) != patient:
            raise DataError(
                f"{option}: {path}: got the patients {found[subject]} and {patient} in rows of "
                f"{subject}, expected one"
            )
    return found


def _groups(path: Path, subjects: Iterable[str]) -> dict[str, str]:
    found = patients_of(path, "data.groups")
    missing = [name for name in subjects if name not in found]
    if missing:
        raise DataError(f"{missing[0]}: data.groups: {path} has no row of it")
    return found


def _listed(numbers: Iterable[int], images: Iterable[str]) -> str:
    """Modalities with their numbers in files' names: "0000 (flair), 0001 (t1)"."""
    return ", ".join(f"{k:04d} ({image})" for k, image in zip(numbers, images, strict=True))


def _words(name: str) -> str:
    """The words of a name between underscores: "_sub_01_t1_" of "sub-01_T1w"."""
    words = (re.sub("^(t1|t2|pd)w$", r"\1", word) for word in re.split(r"[\W_]+", name.lower()))
    return f"_{'_'.join(filter(None, words))}_"


def _modality_in(name: str, images: Sequence[str]) -> int | None:
    """The place of the only modality among a name's words."""
    text, found = _words(name), []
    for image in sorted(images, key=len, reverse=True):  # t1_ce is no t1
        if _words(image) in text:
            found.append(_words(image))
            text = text.replace(_words(image), "__")
    places = [k for k, image in enumerate(images) if [_words(image)] == found]
    return places[0] if len(places) == 1 else None


def check_order(paths: Sequence[Path], images: Sequence[str], channels: Sequence[int] = ()) -> None:
    """Raise where files, one a modality, are named as modalities in another order.

    A name says a modality by one of its words (``t1.nii.gz``, ``a_T1w_brain.nii.gz``; two different
    ones say nothing: ``flair_to_t1.nii.gz``), or else by nnU-Net's number. One that says another
    modality than its place's is an error if no other file says that one by a word, or if the file
    in the other place says another one as well.

    Args:
        paths: in the order in which they are given.
        images: the modalities.
        channels: the modalities' numbers in names as nnU-Net's; default: 0, 1, ...

    Raises:
        ValueError: another order, or another modality's number than ``channels``.

    Example:
        >>> from pathlib import Path
        >>> from voxfuse.training.dataset import check_order
        >>> check_order([Path("a_t1.nii.gz"), Path("a_flair.nii.gz")], ["flair", "t1"])
        Traceback (most recent call last):
        ValueError: --input: got a_t1.nii.gz in place of flair, expected the order flair, t1
    """
    if len(paths) != len(images):
        return
    numbers = list(channels or range(len(images)))
    words = [_modality_in(name_of(path), images) for path in paths]
    said = list(words)
    for k, path in enumerate(paths):
        number = numbered(path)[1] if is_image(path) else None
        if words[k] is None and number in numbers:
            said[k] = numbers.index(number)
        elif words[k] is None and channels and number is not None:
            if len(paths) == 1 and number > max(channels):
                continue  # it may be a patient's
            raise ValueError(
                f"--input: got {path.name} in place of {images[k]}, expected "
                f"{_listed(numbers, images)}"
            )
    moved = {k: place for k, place in enumerate(said) if place not in (None, k)}
    for k, place in moved.items():
        alone = words[k] == place and words.count(place) == 1
        if alone or place in moved:
            raise ValueError(
                f"--input: got {paths[k].name} in place of {images[k]}, expected the order "
                f"{', '.join(images)}"
            )


def find_inputs(
    paths: Sequence[Path],
    images: Sequence[str],
    options: DataOptions,
    channels: Sequence[int] = (),
    unused_channels: Sequence[int] | None = None,
) -> list[Subject]:
    """The subjects that ``voxfuse predict --input`` names; labels are not looked for.

    Args:
        paths: a file a modality, in the network's order (see :func:`check_order`); or a folder: of
            one subject, of a folder a subject, of files ``CASE_0000.nii.gz`` as nnU-Net names them,
            or, for one modality (or all of them in one file), of a file a subject.
        images: the modalities.
        options: the section ``[data]``.
        channels: the modalities' numbers in names as nnU-Net's; default: 0, 1, ...
        unused_channels: of a dataset.json that has more of them: the others' numbers. Files with
            any other number are an error. None: not known with ``channels``, none without.

    A subject that lacks a modality, beside whole ones, has the path where it was looked for, so
    that reading it names it: one of nnU-Net's cases, or a folder with some of the modalities, with
    others' spelling or with the label. Files without a number beside nnU-Net's are a subject each.
    What else has images and is left out is a warning.

    Raises:
        FileNotFoundError: no such path, or nothing there.
        ValueError: not as many files as modalities, in another order, of other numbers, or two of
            one name.
    """
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"--input: there is no {path}")
    if len(paths) > 1 or paths[0].is_file():
        if len(paths) not in (1, len(images)) or not all(path.is_file() for path in paths):
            raise ValueError(
                f"--input: got {len(paths)} paths, expected a folder, or {len(images)} files: "
                f"{', '.join(images)}"
            )
        check_order(paths, images, channels)
        mask = None
        if options.mask not in ("positive", "all"):
            mask = file_named(paths[0].parent, options.mask)
        return [Subject(name_of(paths[0]), tuple(paths), None, mask)]
    folder = paths[0]
    plain = DataOptions(mask=options.mask)
    # Channels of one name, as a dataset.json may have them, have no files of their names.
    names = images if len(set(images)) == len(images) else ()
    several = _subjects_in(folder, names, plain, options.label) if names else []
    one = subject_of_folder(folder, names, plain)
    if one is not None:
        below = [subject.name for subject in several]
        say_left_out(folder, below, f"as the folder itself has {', '.join(images)}")
        return [one]
    files = images_in(folder)

    def besides(names: Iterable[str]) -> list[Path]:
        """Files that are of no subject of these names, nor what is written of it."""
        known = {options.label, options.mask, *names}
        return [path for path in files if name_of(path).removesuffix("_probabilities") not in known]

    if any(path.exists() for subject in several for path in subject.images):
        left = [path.name for path in besides(subject.name for subject in several)]
        say_left_out(folder, left, "beside folders of subjects")
        return several
    cases: dict[str, dict[int, Path]] = {}
    for path in files:
        name, number = numbered(path)
        if number is not None:
            cases.setdefault(name, {})[number] = path
    if cases:
        wanted = list(channels or range(len(images)))
        expected = _listed(wanted, images)
        known = not channels or unused_channels is not None
        whole = any(set(wanted) <= set(found) for found in cases.values())
        skipped: list[str] = []
        for name, found in cases.items():
            # What is no modality's number may be a patient's: patient_0000, patient_0001.
            more = known and len(set(found) - set(unused_channels or ())) > len(wanted)
            if more or not (whole or set(wanted) <= set(found)):
                has = ", ".join(f"{k:04d}" for k in sorted(found))
                raise ValueError(f"{name}: {folder} has {has} of it, expected {expected}")
            skipped += [found[k].name for k in sorted(found) if k not in wanted]
        say_left_out(folder, skipped, f"as {expected} is taken of each subject")
        subjects = [
            Subject(
                name,
                tuple(found.get(k, folder / f"{name}_{k:04d}.nii.gz") for k in wanted),
                None,
            )
            for name, found in cases.items()
        ]
        others = [path for path in besides(cases) if numbered(path)[1] is None]
        return subjects + [Subject(name_of(path), (path,), None) for path in others]
    near = near_files(folder, names)
    if not files:
        near = [path for s in several for path in near_files(s.images[0].parent, names)]
    if near:
        raise FileNotFoundError(
            f"--input: {folder} has {near[0].relative_to(folder)}, expected {', '.join(images)}, "
            "in this spelling"
        )
    files = [path for path in files if name_of(path) not in (options.label, options.mask)]
    if not files:
        raise FileNotFoundError(
            f"--input: {folder} has no {', '.join(images)}, no folders with them and no images"
        )
    return [Subject(name_of(path), (path,), None) for path in files]
