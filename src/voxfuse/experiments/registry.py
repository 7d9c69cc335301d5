"""Every experiment by name."""

from __future__ import annotations

from importlib import import_module

from voxfuse.experiments.claims import write_page
from voxfuse.experiments.experiment import Experiment, Place

#: Modules of this package that have an ``EXPERIMENT``, in the order in which they are done.
EXPERIMENTS = ("bounds", "losses", "lesions", "fusion")


def find(name: str) -> Experiment:
    """An experiment by name.

    Raises:
        ValueError: there is none of this name.
    """
    if name not in EXPERIMENTS:
        raise ValueError(f"NAME: got {name!r}, expected one of {', '.join(EXPERIMENTS)}")
    found: Experiment = import_module(f"voxfuse.experiments.{name}").EXPERIMENT
    return found


def write_pages(place: Place) -> None:
    """The pages of every experiment that has rows, since some look at others', and the table."""
    for name in EXPERIMENTS:
        if (place.results / name / "results.csv").is_file():
            find(name).write_pages(place)
    write_page(place.results)
