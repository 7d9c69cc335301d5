"""The loop of a run: patches, updates, validation, early stopping, log and checkpoints."""

from __future__ import annotations

import math
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from voxfuse._files import unfinished, write_text
from voxfuse.metrics import SegmentationScores
from voxfuse.training import checkpoints
from voxfuse.training.augmentation import steps_of
from voxfuse.training.config import Config, ConfigError, SamplingOptions, load, to_toml
from voxfuse.training.dataset import IGNORED, Dataset, find_dataset
from voxfuse.training.evaluation import rows_of_subjects, write_rows
from voxfuse.training.networks import check_patch, make_network
from voxfuse.training.objective import Objective
from voxfuse.training.optimisers import forgets, learning_rate, make_optimiser
from voxfuse.training.predict import (
    MODEL,
    decided,
    device_of,
    first_output,
    foreground_probabilities,
    load_model,
)
from voxfuse.training.sampling import AUGMENTATION, NETWORK, Sampler, generator
from voxfuse.training.simulation.renewal import Renewal
from voxfuse.training.split import Split, split_dataset
from voxfuse.training.volumes import Volume, check_subjects

#: Columns of log.csv. A row is the mean of the steps since the row before; "relaxed" is the share
#: of patches with fewer lesion voxels than asked for.
COLUMNS = ("step", "learning_rate", "loss", "relaxed", "validation_dice", "seconds")

CHECKPOINT = "checkpoint.pt"

Say = Callable[[str], None]


@dataclass
class Batch:
    """The patches of a step on the device."""

    image: Tensor  #: (B, C, \*patch)
    label: Tensor  #: (B, 1, \*patch) uint8
    mask: Tensor | None  #: (B, 1, \*patch), where the loss has one
    relaxed: int  #: patches with fewer lesion voxels than asked for


@dataclass
class Progress:
    """What a run knows beside its weights; plain values, in the checkpoint."""

    step: int = 0  #: updates done
    losses: list[float] | None = None  #: since the last row of the log
    relaxed: int = 0  #: patches since then
    best: float = -math.inf
    waited: int = 0  #: validations since the best one
    stopped: bool = False
    seconds: float = 0.0
    tested: int | None = None  #: the fingerprint of the scans of test.csv


class Trainer:
    """A run of a configuration on a folder: made, checked, and gone on with.

    Nothing is written before the configuration, the files of every subject and the network with
    the patches are checked. A run that exists is gone on with from its checkpoint; on the CPU, at
    the same number of threads, to the same bits as if it had not been interrupted. One that failed
    before its first checkpoint does not hold its folder: it may begin again as another.

    Args:
        config: see :mod:`voxfuse.training.config`.
        data: the folder; see :func:`voxfuse.training.dataset.find_dataset`.
        run: the folder that is written.
        say: gets a line now and then; default: standard error.

    Raises:
        ConfigError: keys that do not fit the data or each other, or the run that exists.
        DataError: files that do not fit.
    """

    def __init__(
        self, config: Config, data: str | Path, run: str | Path, say: Say | None = None
    ) -> None:
        self.config, self.run = config, Path(run)
        self.say = say or (lambda line: print(line, file=sys.stderr, flush=True))
        self._check_run()
        self.dataset: Dataset = find_dataset(data, config.data)
        self.split: Split = split_dataset(self.dataset, config.data, config.training.seed)
        self.device = device_of(config.training.device)
        self.ignored = None if self.dataset.ignored is None else IGNORED
        if "ignore_index" in config.loss.options:  # not in Objective: such models still predict
            raise ConfigError(
                f"loss.ignore_index: got {config.loss.options['ignore_index']!r}, expected no such "
                "key: the label whose voxels do not count is the one called 'ignore' in data.labels"
            )
        self.objective = Objective(config.loss, config.training.depth_weights, self.ignored)
        if self.objective.activation == "sigmoid" and len(self.dataset.labels) > 2:
            raise ConfigError(
                f"loss.activation: got 'sigmoid' for {len(self.dataset.labels) - 1} labels beside "
                "the background, expected softmax: of several the greatest wins"
            )
        self.augmentation = steps_of(config.augmentation)
        # Weights are drawn from the seed alone.
        with _random_state(generator(config.training.seed, 0, NETWORK), self.device):
            classes = len(self.dataset.labels)
            options = config.network
            self.network = make_network(
                options.name, len(self.dataset.images), classes, options.options
            )
        check_patch(self.network, config.sampling.patch, config.sampling.batch)
        self.network.to(self.device, memory_format=torch.channels_last_3d)  # type: ignore[call-overload]
        self._check_outputs(len(self.dataset.images), classes)
        self.optimiser = make_optimiser(self.network, config.optimiser)
        half = config.training.precision == "float16"
        if half and self.device.type != "cuda":
            raise ConfigError(
                f"training.precision: got 'float16' on {self.device.type}, expected float32 or "
                "bfloat16: the scaled loss is for a GPU"
            )
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=half)
        self.progress = Progress(losses=[])
        volumes = self._load()
        self.validation = [volumes[name] for name in self.split.validation]
        # With simulated lesions another one takes its place before a patch is drawn; these heads
        # may have none.
        drawn = config.sampling
        if config.augmentation.simulate_every:
            drawn = replace(drawn, method="uniform")
        trained = {name: volumes[name] for name in self.split.training}
        self.sampler = self._sampler(trained, drawn)
        #: Of the arrays as they are on disk: a run is not gone on with on others.
        self.fingerprint = _fingerprint([*self.sampler.volumes.values(), *self.validation])
        self.renewal: Renewal | None = None
        self.renewed = -1  #: number of the simulation that the sampler has
        if config.augmentation.simulate_every:
            if self.ignored is not None:
                raise ConfigError(
                    "augmentation.simulate_every: got a label 'ignore' in the data, expected none"
                )
            self.renewal = Renewal(
                {name: self.dataset.subjects[name] for name in self.split.training},
                self.dataset.images,
                self.dataset.labels,
                config.data,
                config.augmentation.simulate_shapes,
                config.training.seed,
            )
        self.log = checkpoints.Log(self.run / "log.csv", COLUMNS)

    # --- Set-up -----------------------------------------------------------------------------------

    def _check_run(self) -> None:
        """A run that exists has to be of this configuration."""
        path = self.run / "config.toml"
        if self.run.exists() and not self.run.is_dir():
            raise ConfigError(f"--out: {self.run} is a file, expected a folder")
        there = set(self.run.iterdir()) if self.run.is_dir() else set()
        there -= set(unfinished(self.run))
        if path in there and there <= {path, self.run / "log.csv"}:
            return  # it failed before it had learnt anything
        if not path.is_file():
            if there:
                raise ConfigError(
                    f"--out: {self.run} is not empty and no run (it has no config.toml)"
                )
            return
        before, now = load(path).to_dict(), self.config.to_dict()
        for section, keys in now.items():
            for key in keys.keys() | before[section].keys():
                was, wanted = before[section].get(key), keys.get(key)
                if was != wanted and f"{section}.{key}" not in ("training.device",):
                    raise ConfigError(
                        f"{section}.{key}: got {wanted!r}, but the run in {self.run} has {was!r}; "
                        "another folder for another run"
                    )

    def _check_outputs(self, channels: int, classes: int) -> None:
        """The network has to predict a channel a class: what it has learnt could not be used else.

        A patch of zeros goes through it once; through those with a factor, as voxfuse's own, a
        small one, as 128^3 voxels take long on a CPU.
        """
        factor = getattr(self.network, "factor", None)
        extent = self.config.sampling.patch
        if isinstance(factor, int):
            extent = [min(n, 2 * factor) for n in extent]
        training = self.network.training
        self.network.eval()
        with torch.no_grad(), _random_state(None, self.device):
            patch = torch.zeros(1, channels, *extent, device=self.device)
            patch = patch.contiguous(memory_format=torch.channels_last_3d)
            got = tuple(first_output(self.network(patch)).shape)
        self.network.train(training)
        if got != (1, classes, *extent):
            more = "; with a sigmoid too the background has a channel" if got[1:2] == (1,) else ""
            raise ConfigError(
                f"network.name: {self.config.network.name} makes {got} of a patch of "
                f"{' x '.join(map(str, extent))} voxels, expected {(1, classes, *extent)}, a "
                f"channel a class{more}"
            )

    def _load(self) -> dict[str, Volume]:
        """Everyone's arrays checked, those of training and validation kept."""
        split, data = self.split, self.config.data
        everyone = [*split.training, *split.validation, *split.test]
        keep = [*split.training, *split.validation]
        subjects = [self.dataset.subjects[name] for name in everyone]
        volumes = check_subjects(
            subjects, data, self.dataset.labels, keep, self.dataset.ignored, self.dataset.images
        )
        self.say(
            f"training on {len(split.training)} subjects ({', '.join(split.training[:6])}"
            f"{', ...' if split.training[6:] else ''}), validation {len(split.validation)}, "
            f"test {len(split.test)}"
            + (f"; unused: {', '.join(split.unused)}" if split.unused else "")
        )
        return volumes

    def _sampler(self, volumes: Mapping[str, Volume], options: SamplingOptions) -> Sampler:
        groups = {name: self.dataset.subjects[name].group for name in volumes}
        return Sampler(volumes, options, groups, self.config.training.seed)

    @cached_property
    def test_fingerprint(self) -> int:
        """Of the test subjects' files: test.csv is written anew for others."""
        value = 0
        for name in self.split.test:
            subject = self.dataset.subjects[name]
            value = zlib.crc32(name.encode(), value)
            for path in (*subject.images, subject.label, subject.mask):
                value = zlib.crc32(path.read_bytes() if path else b"", value)
        return value

    # --- A step -----------------------------------------------------------------------------------

    def batch(self, step: int) -> Batch:
        """The patches of a step: a function of the seed and the step."""
        training = self.config.training
        number = step // training.updates_per_patch
        if self.renewal is not None:
            first = number * training.updates_per_patch  # the patches are of one simulation
            renewed = first // self.config.augmentation.simulate_every
            if renewed != self.renewed:
                simulated = self.renewal.volumes(renewed)
                self.sampler = self._sampler(simulated, self.config.sampling)
                self.renewed = renewed
        random = generator(training.seed, number, AUGMENTATION)
        images, labels, masks, relaxed = [], [], [], 0
        for place, patch in self.sampler.patches(number):
            for change in self.augmentation:
                patch = change(patch, random)
            images.append(patch.image)
            labels.append(patch.label)
            masks.append(patch.mask)
            relaxed += place.relaxed
        image = self._to_device(np.stack(images)).contiguous(memory_format=torch.channels_last_3d)
        label = self._to_device(np.stack(labels)[:, None])
        mask = self._to_device(np.stack(masks)[:, None]) if training.loss_inside_mask else None
        return Batch(image, label, mask, relaxed)

    def _to_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def update(self, batch: Batch, step: int) -> Tensor:
        """One update of the weights; returns the loss, on the device."""
        config = self.config
        rate = learning_rate(config.optimiser, step, config.training.steps)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        if forgets(config.optimiser, step):
            self.optimiser.state.clear()
        precision = config.training.precision
        self.optimiser.zero_grad(set_to_none=True)
        with torch.autocast(
            self.device.type, getattr(torch, precision), enabled=precision != "float32"
        ):
            outputs = self.network(batch.image)
        loss: Tensor = self.objective(outputs, batch.label, batch.mask)
        self.scaler.scale(loss).backward()
        if config.optimiser.clip_gradient:
            self.scaler.unscale_(self.optimiser)
            torch.nn.utils.clip_grad_norm_(
                self.network.parameters(), config.optimiser.clip_gradient
            )
        self.scaler.step(self.optimiser)
        self.scaler.update()
        return loss.detach()

    # --- The loop ---------------------------------------------------------------------------------

    def fit(self, stop_at: int | None = None, minutes: float | None = None) -> bool:
        """Train from where the run is to its end, and write test.csv; return whether it is done.

        Args:
            stop_at: leave after this step, with a checkpoint.
            minutes: leave after so long, with a checkpoint.

        Raises:
            RuntimeError: the loss, a weight or an output of the network is not finite.
            ConfigError: the checkpoint is of other data.
        """
        training = self.config.training
        if training.threads:
            torch.set_num_threads(training.threads)
        self._begin()
        began, before = time.monotonic(), self.progress.seconds
        end = min(training.steps, stop_at or training.steps)
        with _random_state(None, self.device), self._bar() as bar:
            for step, batch in self._batches(self.progress.step, end):
                if self.progress.stopped:
                    break
                # Dropout too is a function of the seed and the step.
                torch.manual_seed(int(generator(training.seed, step, NETWORK).integers(2**62)))
                self.network.train()
                self.note(self.update(batch, step), batch.relaxed)
                self.progress.seconds = before + time.monotonic() - began
                leaving = minutes is not None and time.monotonic() - began > 60 * minutes
                self.after(leaving or self.progress.step == end, batch.image)
                bar(self.progress)
                if leaving:
                    break
        if self.progress.step < training.steps and not self.progress.stopped:
            self.say(f"{self.run}: at step {self.progress.step} of {training.steps}")
            return False
        self._test()
        return True

    def _begin(self) -> None:
        """Write what a new run begins with, or take the checkpoint's place."""
        path = self.run / CHECKPOINT
        self.run.mkdir(parents=True, exist_ok=True)
        for dead in unfinished(self.run):
            dead.unlink()
        if not path.is_file():
            write_text(self.run / "config.toml", to_toml(self.config))
        if path.is_file():
            content = checkpoints.restore(path, self.device)
            if content["fingerprint"] != self.fingerprint:
                raise ConfigError(
                    f"--data: the scans of {self.dataset.folder} are others than those that the "
                    f"run in {self.run} began with"
                )
            # Checkpoints of older versions have no patients.
            if content.get("groups", self.sampler.groups) != self.sampler.groups:
                raise ConfigError(
                    f"data.groups: the patients of the subjects in {self.dataset.folder} are "
                    f"others than those that the run in {self.run} began with"
                )
            self.network.load_state_dict(content["network"])
            self.optimiser.load_state_dict(content["optimiser"])
            self.scaler.load_state_dict(content["scaler"])
            self.progress = Progress(**content["progress"])
            self.say(f"{self.run}: goes on from step {self.progress.step}")
        self.log.cut(self.progress.step)

    def _batches(self, step: int, end: int) -> Iterator[tuple[int, Batch]]:
        """Steps and their patches; for a GPU the next ones are made while it works."""
        if self.device.type != "cuda":
            for k in range(step, end):
                yield k, self.batch(k)
            return
        with ThreadPoolExecutor(1) as pool:
            coming: Future[Batch] = pool.submit(self.batch, step)
            for k in range(step, end):
                batch = coming.result()
                if k + 1 < end:
                    coming = pool.submit(self.batch, k + 1)
                yield k, batch

    def note(self, loss: Tensor, relaxed: int) -> None:
        """Add a step to the row to come. A GPU is waited for only where a row is written."""
        progress = self.progress
        assert progress.losses is not None
        progress.step += 1
        progress.relaxed += relaxed
        value: Any = loss  # a number once it is looked at
        progress.losses.append(value)
        if self.device.type == "cpu" or progress.step % self.config.training.log_every == 0:
            self._check_losses()

    def _check_losses(self) -> None:
        progress = self.progress
        assert progress.losses is not None
        progress.losses = [float(x) for x in progress.losses]
        for k, x in enumerate(progress.losses, progress.step - len(progress.losses) + 1):
            if not math.isfinite(x):
                raise self._diverged(k, f"the loss is {x}")

    def _check_network(self, images: Tensor) -> None:
        """Before a file is written: nobody can go on from weights or predict with a network that
        make no numbers."""
        step, state = self.progress.step, self.network.state_dict()
        for name, x in state.items():
            if x.is_floating_point() and not bool(x.isfinite().all()):
                raise self._diverged(step, f"{name} is not finite")
        self.network.eval()
        with torch.no_grad():
            finite = first_output(self.network(images)).isfinite().all()
        if not bool(finite):
            raise self._diverged(step, "the network's output is not finite")

    def _diverged(self, step: int, what: str) -> RuntimeError:
        before = (self.run / CHECKPOINT).is_file()
        return RuntimeError(
            f"step {step}: {what}; "
            + (f"the last checkpoint in {self.run} is from before. " if before else "")
            + "A smaller optimiser.learning_rate or optimiser.clip_gradient helps"
            + (", in a new folder" if before else "")
        )

    def after(self, last: bool, images: Tensor) -> None:
        """What follows a step: validation, a row, a checkpoint.

        Args:
            last: whether the run leaves after it.
            images: of a batch, that the network has to make numbers of before it is saved.
        """
        progress, training = self.progress, self.config.training
        assert progress.losses is not None
        final = progress.step == training.steps
        score: float | None = None
        better = False
        validating = self.validation and (progress.step % training.validate_every == 0 or final)
        saving = progress.step % training.checkpoint_every == 0 or last or final
        if validating or saving:
            self._check_losses()
            self._check_network(images)
        if validating:
            score = self.validate()
            better = score > progress.best
            progress.waited = 0 if better else progress.waited + 1
            progress.best = max(score, progress.best)
            progress.stopped = 0 < training.patience <= progress.waited
        if progress.step % training.log_every == 0 or score is not None or final:
            self._row(score)
        if saving or progress.stopped or better:
            if better or not self.validation:
                self._save_model(score)
            self._save()

    def _row(self, score: float | None) -> None:
        progress, training = self.progress, self.config.training
        assert progress.losses is not None
        patches = len(progress.losses) * self.config.sampling.batch
        losses = [float(x) for x in progress.losses]
        rate = learning_rate(self.config.optimiser, progress.step - 1, training.steps)
        row = {
            "step": progress.step,
            "learning_rate": f"{rate:.8g}",
            "loss": f"{sum(losses) / len(losses):.9g}",
            "relaxed": f"{progress.relaxed / patches:.6g}",
            "validation_dice": "" if score is None else f"{score:.9g}",
            "seconds": f"{progress.seconds:.1f}",
        }
        self.log.add(row)
        progress.losses, progress.relaxed = [], 0
        if score is not None:
            self.say(f"step {progress.step}: validation Dice {score:.4f}, best {progress.best:.4f}")

    def validate(self) -> float:
        """Mean Dice over validation subjects and classes, on the network's grid; 0 for none."""
        overlap = self.config.training.validation_overlap
        options = replace(
            self.config.prediction, overlap=overlap, grid="shifted", orientations="none"
        )
        scores = SegmentationScores(
            "labels",
            num_classes=len(self.dataset.labels),
            include_background=False,
            ignore_index=self.ignored,
        )
        self.network.eval()
        for volume in self.validation:
            probabilities = foreground_probabilities(
                self.network, volume, options, self.sampler.patch, self.objective.activation
            )
            labels = torch.from_numpy(decided(probabilities, options.threshold, volume.mask))
            scores.update(labels[None], torch.from_numpy(volume.label)[None])
        dice = float(scores.compute("mean")["dice"])
        return 0.0 if math.isnan(dice) else dice

    def _save(self) -> None:
        progress = self.progress
        assert progress.losses is not None
        progress.losses = [float(x) for x in progress.losses]
        checkpoints.save(
            self.run / CHECKPOINT,
            {
                "network": self.network.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
                "progress": dict(vars(progress)),
                "fingerprint": self.fingerprint,
                "groups": self.sampler.groups,
            },
        )

    def _save_model(self, score: float | None) -> None:
        content = {
            "kind": "patches",
            "config": self.config.to_dict(),
            "images": list(self.dataset.images),
            "channels": list(self.dataset.channels),
            "unused_channels": list(self.dataset.unused_channels),
            "labels": dict(self.dataset.labels),
            "network": self.network.state_dict(),
            "step": self.progress.step,
            "score": score,
        }
        checkpoints.save(self.run / MODEL, content)

    def _test(self) -> None:
        """Write test.csv, if there is none of these scans yet."""
        path = self.run / "test.csv"
        done = path.is_file() and self.progress.tested == self.test_fingerprint
        if done or not self.split.test:
            return
        model = load_model(self.run, str(self.device), trust=True)
        subjects = [self.dataset.subjects[name] for name in self.split.test]
        rows = rows_of_subjects(model, subjects, ignored=self.dataset.ignored)
        write_rows(path, rows)
        self.progress.tested = self.test_fingerprint
        self._save()
        for row in rows:
            if row["threshold"] == 0.5:
                label = f" {row['label']}" if "label" in row else ""
                self.say(f"{row['subject']}{label}: Dice {row['dice']:.3f} at 0.5")

    @contextmanager
    def _bar(self) -> Iterator[Callable[[Progress], object]]:
        """A bar with the time left on a terminal; else a line every half minute."""
        steps, spoken = self.config.training.steps, [time.monotonic()]
        if sys.stderr.isatty():
            from tqdm import tqdm

            with tqdm(total=steps, initial=self.progress.step, unit="step") as bar:
                yield lambda progress: bar.update(progress.step - bar.n)
            return
        first, began = self.progress.step, time.monotonic()

        def line(progress: Progress) -> None:
            now = time.monotonic()
            if now - spoken[0] > 30:
                spoken[0] = now
                left = (now - began) / (progress.step - first) * (steps - progress.step)
                self.say(f"step {progress.step} of {steps}, {left / 60:.1f} minutes left")

        yield line


def _fingerprint(volumes: Iterable[Volume]) -> int:
    value = 0
    for volume in volumes:
        value = zlib.crc32(volume.name.encode(), value)
        for array in (volume.image, volume.label, volume.mask):
            value = zlib.crc32(np.ascontiguousarray(array).data, value)
    return value


@contextmanager
def _random_state(seeded: np.random.Generator | None, device: torch.device) -> Iterator[None]:
    """PyTorch's random numbers as they were, afterwards; inside, of the generator's seed."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if seeded is not None:
            torch.manual_seed(int(seeded.integers(2**62)))
        yield


def train(
    config: Config | str | Path,
    data: str | Path,
    run: str | Path,
    *,
    stop_at: int | None = None,
    minutes: float | None = None,
) -> bool:
    """Train what a configuration asks for, or go on with it; return whether it is done.

    Args:
        config: a configuration, or the path of a TOML file.
        data, run: see :class:`Trainer`.
        stop_at, minutes: see :meth:`Trainer.fit`.

    Raises:
        ConfigError, DataError, RuntimeError: see :class:`Trainer` and :meth:`Trainer.fit`.
    """
    made = config if isinstance(config, Config) else load(config)
    return Trainer(made, data, run).fit(stop_at, minutes)
