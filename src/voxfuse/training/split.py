"""Who is trained on, validated and tested."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from voxfuse.losses.declared import did_you_mean
from voxfuse.training.config import DataOptions
from voxfuse.training.dataset import Dataset


@dataclass(frozen=True)
class Split:
    """Names of subjects; no patient is in two of the lists."""

    training: tuple[str, ...]
    validation: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()


def split_dataset(dataset: Dataset, options: DataOptions, seed: int = 0) -> Split:
    """Who is trained on, validated and tested.

    Lists name subjects, or patients for all of theirs. Where nothing is said of training, it is
    everyone else, but for scans of patients who are validated or tested. A dataset.json's own lists
    hold where the options have none; its training, but for the patients whom the options validate
    or test.

    Args:
        dataset: see :func:`voxfuse.training.dataset.find_dataset`.
        options: the section ``[data]``.
        seed: of the patients that ``validation_share`` draws.

    Raises:
        ValueError: an unknown name (the message has the nearest one), a patient in two lists, or
            nobody left to train on, or to draw for validation.

    Example:
        >>> from pathlib import Path
        >>> from voxfuse.training.config import DataOptions
        >>> from voxfuse.training.dataset import Dataset, Subject
        >>> from voxfuse.training.split import split_dataset
        >>> scans = {"a1": "a", "a2": "a", "b1": "b", "c1": "c"}
        >>> subjects = {name: Subject(name, (), None, group=of) for name, of in scans.items()}
        >>> data = Dataset(Path(), subjects, ("t1",), {"background": 0, "lesion": 1})
        >>> split = split_dataset(data, DataOptions(test=["a1"]))
        >>> split.training, split.test, split.unused
        (('b1', 'c1'), ('a1',), ('a2',))
    """
    subjects = dataset.subjects
    groups: dict[str, list[str]] = {}
    for name, subject in subjects.items():
        groups.setdefault(subject.group or name, []).append(name)

    def named(part: str) -> list[str]:
        chosen: list[str] = []
        for name in getattr(options, part) or dataset.given.get(part, []):
            if name not in subjects and name not in groups:
                known = [*subjects, *groups]
                raise ValueError(
                    f"data.{part}: there is no subject or patient {name!r} in {dataset.folder}"
                    + did_you_mean(name, known)
                )
            chosen += [name] if name in subjects else groups[name]
        return list(dict.fromkeys(chosen))

    def patients(names: Iterable[str]) -> set[str]:
        return {subjects[name].group or name for name in names}

    training, validation, test = named("training"), named("validation"), named("test")
    if not options.training:
        asked = (validation if options.validation else []) + (test if options.test else [])
        held = patients(asked)
        training = [name for name in training if not patients([name]) & held]
    if not validation and options.validation_share:
        held = patients(test)
        free = sorted(patients(training or subjects) - held)
        if len(free) < 2:
            raise ValueError(
                f"data.validation_share: got {options.validation_share:g}, but {len(free)} patient "
                "is left for training and validation, expected two or more"
            )
        count = min(max(1, round(options.validation_share * len(free))), len(free) - 1)
        drawn = np.random.default_rng([seed, 0x5917]).choice(len(free), count, replace=False)
        chosen = {free[k] for k in drawn}
        validation = [name for name in subjects if patients([name]) <= chosen]
        training = [name for name in training if not patients([name]) <= chosen]
    if not training:
        held = patients([*validation, *test])
        training = [name for name in subjects if not patients([name]) & held]
    lists = {"training": training, "validation": validation, "test": test}
    seen: dict[str, tuple[str, str]] = {}
    for part, names in lists.items():
        for name in names:
            (patient,) = patients([name])
            other, where = seen.setdefault(patient, (name, part))
            if where != part:
                what = "is" if other == name else f"({other}) is"
                raise ValueError(
                    f"data.{part}: {name} is of patient {patient}, who {what} in data.{where} too"
                )
    if not training:
        raise ValueError("data.training: nobody is left to train on")
    used = {name for names in lists.values() for name in names}
    unused = tuple(name for name in subjects if name not in used)
    return Split(tuple(training), tuple(validation), tuple(test), unused)
