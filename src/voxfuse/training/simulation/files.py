"""Hosts from files, and simulated heads into folders that training reads."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from voxfuse.metrics.files import is_image
from voxfuse.training.config import DataOptions
from voxfuse.training.dataset import (
    DataError,
    Subject,
    file_named,
    file_of,
    images_in,
    name_of,
    near_files,
    patients_of,
    say_left_out,
    subject_of_folder,
    with_name,
)
from voxfuse.training.simulation.hosts import Host
from voxfuse.training.simulation.placement import SimulationOptions, simulate
from voxfuse.training.simulation.shapes import Shapes
from voxfuse.training.volumes import Volume, load_volume, save_like, turn_back

#: What is looked for where no names are given.
IMAGES, LABEL = ("t1", "flair", "t2"), "lesions"
#: The table of the simulated heads.
TABLE = "subjects.csv"
COLUMNS = ("subject", "patient", "host", "seed", "lesions", "simulated_ml", "lesion_ml")


@dataclass(frozen=True)
class HostFiles:
    """A head's files, and the names of its modalities."""

    subject: Subject
    images: tuple[str, ...]
    data: DataOptions


def find_hosts(
    places: Sequence[str | Path],
    images: Sequence[str] | None = None,
    label: str | None = None,
    mask: str = "positive",
) -> list[HostFiles]:
    """The heads of folders and files.

    Args:
        places: a folder with ``t1`` is a head, another folder one of such folders; a file is a T1,
            whose label and mask lie beside it.
        images: modalities that are taken where a head has them; ``t1`` has to be among them.
            Default: :data:`IMAGES`.
        label: name of a head's own lesions, where it has any. Default: :data:`LABEL`.
        mask: name of the brain mask, or "positive" for T1 > 0.

    A ``subjects.csv`` beside the folders of heads says by its columns subject and patient whose
    they are.

    Raises:
        FileNotFoundError: a place is not there, or has no T1.
        ValueError: ``images`` has no t1, two heads have one name, a head has a file in another
            spelling of its name, or no head has an image or label that was given.
    """
    wanted = IMAGES if images is None else images
    if "t1" not in wanted:
        raise ValueError(f"--images: got {', '.join(wanted)}, expected t1 among them")
    ordered = ["t1", *(name for name in wanted if name != "t1")]
    found: list[HostFiles] = []
    for place in map(Path, places):
        if place.is_file() and is_image(place):
            host = _host_in(with_name(place.parent), [name_of(place)], label or LABEL, mask)
            name = name_of(place)
            subject = replace(host.subject, name=name, images=(place,), group=name)
            found.append(replace(host, subject=subject, images=("t1",)))
            continue
        if not place.is_dir():
            raise FileNotFoundError(f"--host: {place} is no folder, nor an image")
        folders = [with_name(place)] if file_named(place, "t1") else sorted(place.iterdir())
        heads = [folder for folder in folders if folder.is_dir() and file_named(folder, "t1")]
        if not heads:
            raise FileNotFoundError(f"--host: {place} has no t1, nor has a folder in it")
        others = [x.name for x in folders if x.is_dir() and x not in heads and images_in(x)]
        say_left_out(place, others, "with no t1")
        found += [_host_in(head, ordered, label or LABEL, mask) for head in heads]
    names = [host.subject.name for host in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"--host: two heads are called {name}")
    for name in images or ():
        if not any(name in host.images for host in found):
            raise ValueError(f"--images: got {name}, which no head of --host has")
    if label is not None and not any(host.subject.label for host in found):
        raise ValueError(f"--label: got {label}, which no head of --host has")
    return found


def _host_in(folder: Path, names: Sequence[str], label: str, mask: str) -> HostFiles:
    """The head whose files lie in a folder, with those of the modalities that it has."""
    present = [name for name in names if file_of(folder, name)]
    data = DataOptions(images=present, label=label, mask=mask, normalisation="none")
    subject = subject_of_folder(folder, present, data)
    assert subject is not None
    missing = [name for name in names if name not in present]
    near = near_files(folder, missing if subject.label else [*missing, label])
    if near:
        raise ValueError(
            f"--host: {folder} has {', '.join(path.name for path in near)}, expected "
            f"{', '.join([*names, label])}, in this spelling"
        )
    return HostFiles(subject, tuple(present), data)


def _patient(subject: Subject) -> str:
    """Whose head it is, as the table beside its folder says; its name where there is none."""
    folder = subject.images[0].parent
    table = folder.parent / TABLE
    found = patients_of(table, "--host") if table.is_file() else {subject.name: subject.name}
    if subject.name not in found and folder.name == subject.name:
        raise DataError(f"{subject.name}: --host: {table} has no row of it")
    return found.get(subject.name, subject.name)


def host_of(volume: Volume, images: Sequence[str]) -> Host:
    """A volume that was loaded without normalisation, as a host."""
    placement = volume.placement
    own = np.sqrt((placement.affine[:3, :3] ** 2).sum(0))
    spacing = [0.0] * 3
    for size, (axis, _) in zip(own, placement.turned, strict=True):
        # Of a resampled volume: the same extent in mm.
        spacing[axis] = float(size) * placement.turned_shape[axis] / volume.mask.shape[axis]
    modalities = dict(zip(images, volume.image, strict=True))
    lesions = None if volume.label is None else volume.label > 0
    return Host.of(modalities, volume.mask, lesions, spacing)


def write_simulated(
    hosts: Sequence[HostFiles],
    shapes: Shapes,
    out: Path,
    count: int = 1,
    seed: int = 0,
    label: str = LABEL,
    options: SimulationOptions | None = None,
    with_hosts: bool = False,
) -> Iterator[str]:
    """Write ``count`` simulated heads of each host, and :data:`TABLE`; yield a line for each.

    Head k of host h, in the order given, has the seed (seed, h, k).

    Raises:
        ValueError: ``out`` has a table or one of the heads already, two heads would be one folder,
            or a host cannot be read or used.
    """
    table = out / TABLE
    names = [name for host in hosts for name in _made_of(host.subject.name, count, seed)]
    names += [host.subject.name for host in hosts if with_hosts]
    for path in (table, *(out / name for name in names)):  # a host itself, perhaps
        if path.exists():
            raise ValueError(f"--out: {path} is there already; expected a new folder")
    for name, times in Counter(names).items():
        if times > 1:
            raise ValueError(f"--out: two heads would be written to {out / name}")
    out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for h, files in enumerate(hosts):
        labels = {"background": 0, "lesion": 1} if files.subject.label else None
        volume = load_volume(files.subject, files.data, labels)
        try:
            host = host_of(volume, files.images)
        except ValueError as error:
            raise ValueError(f"{files.subject.name}: {error}") from None
        voxel = float(host.spacing.prod()) / 1000
        about = {"patient": _patient(files.subject), "host": files.subject.name}
        if with_hosts:
            name = files.subject.name
            _write(out / name, volume, files.images, volume.image, host.lesions, label)
            volumes = {"simulated_ml": 0, "lesion_ml": round(host.lesions.sum() * voxel, 3)}
            rows.append({"subject": name, **about, "seed": "", "lesions": 0, **volumes})
            yield f"{name}: as it is"
        for k, name in enumerate(_made_of(files.subject.name, count, seed)):
            made = simulate(host, shapes, (seed, h, k), options)
            arrays = np.stack([made.images[image] for image in files.images])
            _write(out / name, volume, files.images, arrays, made.lesions, label)
            simulated, real = made.simulated.sum() * voxel, host.lesions.sum() * voxel
            rows.append({
                "subject": name, **about, "seed": f"{seed} {h} {k}", "lesions": made.placed,
                "simulated_ml": round(simulated, 3), "lesion_ml": round(simulated + real, 3),
            })  # fmt: skip
            yield (
                f"{name}: {made.placed} lesions of {simulated:.1f} ml"
                + (f" (and {real:.1f} ml of its own)" if real else "")
                + (f"; {made.drawn - made.placed} found no place" * (made.drawn > made.placed))
            )
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def _made_of(name: str, count: int, seed: int) -> list[str]:
    """What the simulated heads of a host are called."""
    return [f"{name}-sim{seed}-{k:03d}" for k in range(count)]


def _write(
    folder: Path,
    volume: Volume,
    names: Sequence[str],
    images: NDArray[np.float32],
    lesions: NDArray[np.bool_],
    label: str,
) -> None:
    """Modalities (whole numbers where the host has such) and lesions, on the host's own grid."""
    placement = volume.placement
    for name, before, image in zip(names, volume.image, images, strict=True):
        own = turn_back(image * volume.mask, placement.turned)
        if np.array_equal(before, np.rint(before)) and np.abs(before).max() < 2**13:
            # In the brain above 0: training may take that for its mask.
            own = np.where(turn_back(before, placement.turned) > 0, np.maximum(np.rint(own), 1), 0)
            own = own.astype(np.int16)
        save_like(own, placement, folder / f"{name}.nii.gz")
    save_like(
        turn_back(lesions.astype(np.uint8), placement.turned), placement, folder / f"{label}.nii.gz"
    )
