"""A prediction of a volume that fits no memory: box by box, in any number of processes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from voxfuse import _backends, _library
from voxfuse.fusion.arrays import Assignable, Part, Sliceable, flush, torch_dtype, unit_of
from voxfuse.fusion.batches import Batches, Probe, apart, held_by_probe, warn_of
from voxfuse.fusion.grids import Grid
from voxfuse.fusion.network import Predictor
from voxfuse.fusion.padded_volume import PaddedVolume
from voxfuse.fusion.region import Box
from voxfuse.fusion.schedule import chosen_axis
from voxfuse.fusion.sink import Sink
from voxfuse.fusion.sliding_window import Settings, check_apart, infer
from voxfuse.ops.finalize_slab import check_out
from voxfuse.scale.boxes import Plan, plan_boxes
from voxfuse.scale.intensities import Lifted, Normalisation
from voxfuse.scale.manifest import (
    FORMAT,
    Folder,
    ManifestError,
    differences,
    digest,
    digest_of,
    digest_of_model,
    fingerprint_of,
    packed,
    plain,
    unpacked,
)
from voxfuse.scale.written import Remembered, is_there

#: Options of a sliding window that are not of a job.
_REFUSED = ("process_fn", "resample_to", "resample_order", "regions")
#: Why not.
_WHY = {
    "process_fn": "what it makes of weights from call to call no box can know",
    **dict.fromkeys(_REFUSED[1:], "results have the volume's own voxels"),
    **dict.fromkeys(("skip", "skip_origin"), "it is an argument of prepare()"),
    **dict.fromkeys(("region", "buffer_steps"), "a job is cut into boxes, see box="),
    **dict.fromkeys(("pad_batches", "progress"), "batches are always full; progress is of run()"),
}


class Job:
    r"""Predict a volume larger than memory, to the bits of any other way to cut it.

    Every process makes the same job; one of them prepares its folder, and each does its share::

        job = Job(source, out, (96, 96, 96), network, output="labels")
        print(job.plan())
        job.prepare("job")
        job.run("job", shard=(0, 4))

    A box of the result needs the patches that reach into it and nothing else, as weights are
    normalised over the axes of the whole volume. Grid, weights, streaming axis and the way they are
    summed are the whole volume's; the network is given full batches only. So the boxes, in any
    order and any of them twice, make the same bits as a single one.

    Args:
        source: the volume, (channels, \*spatial) or (\*spatial); see
            :class:`voxfuse.fusion.arrays.Sliceable`. Integers are handed on as float32.
        out: the result, (C, \*spatial), for one channel also (\*spatial); see
            :class:`voxfuse.fusion.arrays.Assignable`. Boxes are whole units of it, so that each is
            written once.
        roi_size, sw_batch_size, predictor: as for :func:`voxfuse.sliding_window_inference`. The
            predictor has one output, of the patches' resolution.
        models: what the predictor was made of, by name: modules; files, best as a Path, which has
            to be there; or texts, which a str is that names no file. The manifest keeps digests of
            files and of modules' state_dict. None: those of the predictors that are modules; of a
            function only a first batch of predictions is compared.
        normalisation: None; "zscore", which brings each channel to mean 0 and standard deviation 1
            over the whole volume (read once, when the job is prepared); or (means, deviations).
        box: extents of a box, rounded up to whole units. None: what ``memory`` allows.
        memory: bytes that a box, with the predictions of a batch, may take beside the network,
            where ``box`` is not given.
        shards: how many processes the plan reckons with.
        stream_axis, options: of :func:`voxfuse.sliding_window_inference`, but ``out``, ``region``,
            ``pad_batches``, ``process_fn``, ``resample_to``, ``skip`` and ``skip_origin`` (these
            two are arguments of :meth:`prepare`).

    Raises:
        TypeError: an argument has a wrong type.
        ValueError: shapes or options do not fit.
        RuntimeError: there are no kernels for the activation asked for, only the reference.
    """

    def __init__(
        self,
        source: Sliceable,
        out: Assignable | Tensor,
        roi_size: int | Sequence[int],
        predictor: Predictor | Sequence[Predictor],
        sw_batch_size: int = 4,
        *,
        models: Mapping[str, Any] | None = None,
        normalisation: Normalisation = None,
        box: Sequence[int] | None = None,
        memory: int = 1 << 30,
        shards: int = 1,
        stream_axis: str | int = "auto",
        **options: Any,
    ) -> None:
        allowed = [field.name for field in fields(Settings) if field.name not in _REFUSED]
        for name in options:
            if name not in allowed:
                why = _WHY.get(name, f"expected {', '.join(allowed)}")
                raise TypeError(f"{name}: is no option of a job: {why}")
        if isinstance(source, Tensor):
            source = source.detach().to("cpu")
            source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
        if not isinstance(source, Sliceable):
            raise TypeError(
                f"source: got {type(source).__name__}, expected an array that can be sliced; "
                "voxfuse.scale.open_source opens paths and URLs"
            )
        self._out: Any = out.numpy() if isinstance(out, Tensor) else out
        if not isinstance(self._out, Assignable):
            raise TypeError(
                f"out: got {type(out).__name__}, expected an array that boxes can be assigned to; "
                "voxfuse.scale.create_destination makes one at a path or URL"
            )
        axes = _axes(roi_size, tuple(source.shape), tuple(self._out.shape))
        self._lifted = Lifted(source, axes, normalisation)
        self._settings = Settings(**options)
        with torch.no_grad():
            parts = self._settings.of(self._lifted, roi_size, predictor)
        self._volume, self._network, self._weights, self._options = parts
        self._size, self._models = sw_batch_size, _models(models, predictor)
        self._extents, self._memory, self._shards = box, memory, shards
        self._axis = chosen_axis(stream_axis, self._volume.spatial, self._volume.roi)
        self._source = source
        self._batches(sw_batch_size)  # which may refuse the number
        check_apart(self._out, source=source)
        _refuse_reference(self._settings, self._network.device)
        _refuse_training(predictor)
        if axes > 3:
            raise ValueError(f"roi_size: got {axes} spatial axes, expected 1 to 3")
        if self._weights.factors[0].ndim > axes:
            shape = tuple(self._weights.factors[0].shape)
            raise ValueError(
                f"roi_weight_map: got shape {shape}, weights that differ by channel, expected "
                f"those of a patch, {self._volume.roi}"
            )
        shape, spatial = tuple(self._out.shape), self._volume.spatial
        if shape[-axes:] != spatial or len(shape) - axes not in (0, 1):
            raise ValueError(f"out: got shape {shape}, expected {spatial}, or (C, *{spatial})")
        self._bare = len(shape) == axes
        unit = unit_of(self._out)
        self._unit = unit if self._bare else unit[1:]
        self._steady: dict[str, bool] = {}

    @property
    def grid(self) -> Grid:
        """The patches of the whole volume."""
        return self._volume.grid

    def plan(self, folder: Any = None) -> Plan:
        """The boxes and what they cost: those of a prepared folder, or of all patches.

        The network predicts one batch for it, which says how many channels there are to sum.
        """
        if folder is not None:
            return self._opened(Folder(folder))[1]
        first = [axis[0] for axis in self._volume.grid.starts]
        _start(self._source, None)
        with torch.no_grad():
            members, _ = self._batches(self._size).predict([(0, first)])
        return self._planned(None, self._channels(members[0].outputs))

    def prepare(
        self,
        folder: Any,
        *,
        skip: Callable[[Tensor], bool] | None = None,
        skip_origin: Callable[[tuple[int, ...]], bool] | None = None,
        skipping: str | None = None,
    ) -> Plan:
        """Write the manifest of the job, which boxes only read.

        Statistics for the normalisation and ``skip`` need the whole volume, which is read here,
        once. Preparing the same job again changes nothing.

        Args:
            folder: a folder that all processes see.
            skip, skip_origin: patches for which they are true are not predicted; as for
                :func:`voxfuse.sliding_window_inference`.
            skipping: which patches these are, in words; kept in the manifest.

        Raises:
            ManifestError: another job was prepared there; with the differences.
        """
        place = Folder(folder)
        before = place.read()
        self._lifted.settle(None)
        kept = self._kept(skip, skip_origin)
        size, probe = self._size, self._probe(self._size, kept)
        channels = self._channels(probe.outputs[0][0])
        steady = self._is_steady(probe)
        if not steady and size > 1:
            warn_of(size, 2)
            size, probe = 1, self._probe(1, kept)
            steady = self._is_steady(probe)
        if not steady:
            raise ValueError(
                "predictor: gives one patch other bits each time, with which no box could be done "
                "again"
            )
        plan = self._planned(kept, channels)
        content = {
            **self._described(),
            "batch": {"given": self._size, "size": size},
            "probe": _digest_of(probe),
            "skipped": 0 if kept is None else int((~kept).sum()),
            "kept": packed(kept),
            "skipping": skipping,
            "boxes": [[list(box.low), list(box.high)] for box in plan.boxes],
            "patches": list(plan.patches),
            "memory": plan.memory,
        }
        # Another process may have been quicker.
        _refuse(place, before or place.write(content), content)
        return plan

    def run(
        self,
        folder: Any,
        shard: tuple[int, int] = (0, 1),
        *,
        resume: bool = True,
        progress: Callable[[int, int], object] | None = None,
    ) -> int:
        """Do the boxes of a shard that are not done, and mark each when it is on the disk.

        Args:
            folder: where the job was prepared.
            shard: (i, n): the i-th of n parts, counted from 0. Any n will do, whatever the plan
                reckoned with, and processes may do the same boxes.
            resume: whether boxes are left as they are that have a marker, and of which the result
                still has what was written (all shards, where they are files, and a few voxels).
            progress: called with the numbers of finished boxes and of the shard's, after each.

        Returns:
            How many boxes were predicted.

        Raises:
            ManifestError: the folder is not prepared, is damaged, or of another job: another
                model, input, window or grid, or a machine that would give other bits.
        """
        if not isinstance(shard, Sequence) or len(shard) != 2:
            raise ValueError(f"shard: got {shard!r}, expected (i, n) with 0 <= i < n")
        run = self.begun(folder)
        boxes, done = run.plan.shard(*shard), 0
        for number, index in enumerate(boxes, 1):
            if not (resume and run.is_done(index)):
                run.predict(index)
                done += 1
            if progress is not None:
                progress(number, len(boxes))
        return done

    def begun(self, folder: Any) -> Run:
        """What :meth:`run` does before its first box, for boxes that are given one by one.

        Raises:
            ManifestError: as :meth:`run`.
        """
        place = Folder(folder)
        manifest, plan, kept = self._opened(place)
        size = manifest["batch"]["size"]
        # The digest of the predictions of a few patches finds out what no version number tells.
        probe = self._probe(size, kept)
        _refuse(place, {"probe": manifest["probe"]}, {"probe": _digest_of(probe)})
        if not self._is_steady(probe):
            raise ManifestError(
                f"{place.path}: the predictor gives a patch other bits at another place of a batch "
                f"of {size}, or beside other patches, which it did not where the job was prepared"
            )
        return Run(self, place, plan, kept, size, digest(manifest))

    def leaves_out(self, folder: Any, skip_origin: Callable[[tuple[int, ...]], bool]) -> bool:
        """Whether the patches that a prepared folder leaves out are those of a function."""
        content = Folder(folder).read() or {}
        return content.get("kept") == packed(self._kept(None, skip_origin))

    def remaining(self, folder: Any) -> list[int]:
        """The numbers of the boxes that are not done, or of which the result has nothing."""
        place = Folder(folder)
        manifest, plan, _ = self._opened(place)
        seal = digest(manifest)
        return [k for k, box in enumerate(plan.boxes) if not self._is_done(place, k, box, seal)]

    def _is_done(self, place: Folder, index: int, box: Box, seal: str) -> bool:
        """Whether a box has a marker, and the result still what was written then."""
        content = place.marked(index, box, seal)
        return content is not None and is_there(self._out, self._place(box), content["sample"])

    def _place(self, box: Box) -> tuple[slice, ...]:
        """A box's voxels in the result."""
        return box.slices if self._bare else (slice(0, int(self._out.shape[0])), *box.slices)

    def _predict(self, box: Box, kept: NDArray[np.bool_] | None, size: int) -> Any:
        """Write one box, and have it on the disk; returns what its marker remembers of it."""
        volume, network = self._volume, self._network
        _start(self._source, self._axis)
        skip = None if kept is None else _left_out(volume, kept)
        with torch.no_grad():
            placement = volume.placement(self._axis, None, skip, box.slices)
            batches, key = self._batches(size), self._place(box)
            low, shape = [s.start for s in key], [s.stop - s.start for s in key]
            part = Remembered(self._out, low, shape)
            infer(volume, placement, network, batches, self._options, part, False)
        flush(self._out)
        return part.sample()

    def _opened(self, place: Folder) -> tuple[dict[str, Any], Plan, NDArray[np.bool_] | None]:
        """The manifest of this job, its boxes, and the patches that are predicted."""
        manifest = place.read()
        if manifest is None:
            raise ManifestError(f"{place.path}: has no manifest; prepare the job first")
        self._lifted.settle(manifest["volume"]["normalisation"])
        described = self._described()
        _refuse(place, {key: manifest[key] for key in described}, described)
        given = {"given": manifest["batch"]["given"]}
        _refuse(place, {"batch": given}, {"batch": {"given": self._size}})
        kept = unpacked(manifest["kept"], len(self._volume.grid))
        plan = Plan(
            tuple(Box(tuple(low), tuple(high)) for low, high in manifest["boxes"]),
            tuple(manifest["patches"]),
            len(self._volume.grid) if kept is None else int(kept.sum()),
            manifest["memory"],
            _bytes_of(self._out),
            self._shards,
        )
        return manifest, plan, kept

    def _described(self) -> dict[str, Any]:
        """What has to be the same in every process."""
        volume = self._volume
        options = {field.name: getattr(self._settings, field.name) for field in fields(Settings)}
        for where in ("sw_device", "device", *_REFUSED):
            options.pop(where)
        described = {
            "format": FORMAT,
            "volume": {
                "shape": list(self._source.shape),
                "dtype": str(np.dtype(self._source.dtype)),
                "fingerprint": _fingerprint(self._source),
                "normalisation": self._lifted.statistics,
            },
            "result": {
                "shape": [int(size) for size in self._out.shape],
                "dtype": str(np.dtype(self._out.dtype)),
                "unit": list(self._unit),
            },
            "grid": {
                "patch": list(volume.roi),
                "starts": [list(axis) for axis in volume.grid.starts],
                "stream_axis": self._axis,
            },
            "options": plain(options),
            "models": {name: digest_of_model(each) for name, each in self._models.items()},
            "machine": _machine(self._network.device),
        }
        return described

    def _kept(
        self,
        skip: Callable[[Tensor], bool] | None,
        skip_origin: Callable[[tuple[int, ...]], bool] | None,
    ) -> NDArray[np.bool_] | None:
        """Which patches are predicted, in the grid's order; None: all."""
        for name, each in (("skip", skip), ("skip_origin", skip_origin)):
            if each is not None and not callable(each):
                raise TypeError(f"{name}: got {type(each).__name__}, expected a function")
        if skip is None and skip_origin is None:
            return None
        grid, volume = self._volume.grid, self._volume
        counts = [len(starts) for starts in grid.starts]
        kept = np.ones(counts, bool)
        _start(self._source, self._axis)
        # In streaming order, so that chunks are read once.
        order = [self._axis, *(a for a in range(len(counts)) if a != self._axis)]
        for numbers in itertools.product(*(range(counts[a]) for a in order)):
            index = tuple(number for _, number in sorted(zip(order, numbers, strict=True)))
            origin = tuple(starts[k] for starts, k in zip(grid.starts, index, strict=True))
            left_out = skip_origin is not None and skip_origin(origin)
            if not left_out and skip is not None:
                patches = volume.cut([(0, list(origin))], torch.device("cpu")).patches
                left_out = bool(skip(patches))
            kept[index] = not left_out
        if not kept.any():
            raise ValueError("skip: is true for every patch, so that nothing was predicted")
        return kept.reshape(-1)

    def _probe(self, size: int, kept: NDArray[np.bool_] | None) -> Probe:
        """What the network makes of a batch of patches from all over the volume."""
        grid, counts = self._volume.grid, [len(starts) for starts in self._volume.grid.starts]
        numbers = range(len(grid)) if kept is None else kept.nonzero()[0]
        chosen = [int(numbers[k]) for k in apart(len(numbers), size)]
        places = [
            (0, [starts[k] for starts, k in zip(grid.starts, index, strict=True)])
            for index in zip(*np.unravel_index(chosen, counts), strict=True)
        ]
        _start(self._source, None)
        with torch.no_grad():
            return self._batches(size).probe(places, digest_of)

    def _is_steady(self, probe: Probe) -> bool:
        """Whether bits depend on nothing but a patch; tried once for each network's bits."""
        bits = _digest_of(probe)
        if bits not in self._steady:
            with torch.no_grad():
                self._steady[bits] = probe.steady()
        return self._steady[bits]

    def _batches(self, size: int) -> Batches:
        return Batches(self._volume, self._network, self._weights, size, padded=True)

    def _channels(self, outputs: Sequence[Tensor]) -> int:
        """Channels of the network's one output; ``out`` has to be what these become."""
        if len(outputs) != 1:
            raise ValueError(f"predictor: returned {len(outputs)} outputs, expected one")
        channels, *patch = outputs[0].shape[1:]
        if tuple(patch) != self._volume.roi:
            raise ValueError(
                f"predictor: returned patches of {tuple(patch)} voxels for those of "
                f"{self._volume.roi}, expected the same resolution"
            )
        heads, shape = self._network.heads, tuple(self._out.shape)
        options = self._options.of(channels, heads.merged, heads.kind or outputs[0].dtype)
        whole = Part(self._out, (0,) * len(shape), shape)
        Sink(options, self._volume.spatial, self._axis, whole, None)
        dtype, classes = torch_dtype("out", self._out.dtype), options.classes or channels
        check_out(torch.empty(shape, dtype=dtype, device="meta"), options.finish, classes)
        return int(channels)

    def _planned(self, kept: NDArray[np.bool_] | None, channels: int) -> Plan:
        volume, axis, unit = self._volume, self._axis, self._unit
        accumulate = self._options.accumulate
        itemsize = 4 if accumulate is None else accumulate.itemsize
        result = _bytes_of(self._out) // math.prod(volume.spatial)
        image = self._volume.source.shape[1] * self._lifted.itemsize
        predicted = 4 * channels * self._network.members * held_by_probe(self._size)
        batch = math.prod(volume.roi) * (2 * image * self._size + predicted)

        # Weights with a floor need sums along all of the last axis.
        wide = bool(self._weights.floor) and kept is None and axis != len(unit) - 1

        def memory(extents: Sequence[int]) -> int:
            slices = math.prod(size for a, size in enumerate(extents) if a != axis)
            if wide:
                slices = slices // extents[-1] * volume.spatial[-1]
            depth = min(volume.roi[axis], extents[axis])
            sums = depth * slices * (itemsize * channels + (8 if kept is not None else 0))
            gathered = slices * (min(unit[axis], extents[axis]) + depth) * result
            reach = [
                min(size + 2 * patch, extent)
                for size, patch, extent in zip(extents, volume.roi, volume.spatial, strict=True)
            ]
            return sums + gathered + batch + _cached(self._source, reach, volume.roi, axis)

        return plan_boxes(
            volume.grid,
            unit,
            axis,
            memory,
            _bytes_of(self._out),
            extents=self._extents,
            shards=self._shards,
            most=self._memory,
            kept=kept,
            uncut=(len(unit) - 1,) if wide else (),
        )


@dataclass(frozen=True)
class Run:
    """Boxes of a job, by their numbers in ``plan``; made by :meth:`Job.begun`."""

    job: Job
    place: Folder
    plan: Plan
    kept: NDArray[np.bool_] | None
    size: int  #: of batches
    seal: str  #: digest of the manifest

    def is_done(self, index: int) -> bool:
        """Whether a box has a marker, and the result still what was written then."""
        return self.job._is_done(self.place, index, self.plan.boxes[index], self.seal)

    def predict(self, index: int) -> None:
        """Do a box, and mark it when it is on the disk."""
        box = self.plan.boxes[index]
        sample = self.job._predict(box, self.kept, self.size)
        self.place.mark(index, box, self.seal, sample)


def _axes(roi_size: int | Sequence[int], source: tuple[int, ...], out: tuple[int, ...]) -> int:
    """How many axes are spatial."""
    if isinstance(roi_size, Sequence):
        return len(roi_size)
    if source == out:
        raise ValueError(
            f"roi_size: got {roi_size!r} for source and out of shape {source}, whose first axis "
            "may be one of channels; expected a number for every spatial axis"
        )
    return min(len(source), len(out)) - (len(source) == len(out))


def _models(
    models: Mapping[str, Any] | None, predictor: Predictor | Sequence[Predictor]
) -> dict[str, Any]:
    if models is not None:
        return dict(models)
    networks = predictor if isinstance(predictor, Sequence) else [predictor]
    return {
        f"network {number}": each
        for number, each in enumerate(networks)
        if isinstance(each, nn.Module)
    }


def _refuse_reference(settings: Settings, device: torch.device) -> None:
    """Raise RuntimeError where activations would be PyTorch's, whose bits depend on the box."""
    device = torch.device(settings.device or device)
    found = _backends.backends()
    kernels = {"cpu": ("cpp",), "cuda": ("cuda", "triton")}.get(device.type, ())
    compiled = any(found[name].available for name in kernels) or settings.backend == "triton"
    if settings.activation in ("softmax", "sigmoid") and (
        settings.backend == "reference" or not compiled
    ):
        raise RuntimeError(
            f"backend: activation {settings.activation!r} would be computed by the reference on "
            f"{device.type}, whose bits depend on where a voxel lies in a box; expected compiled "
            "or Triton kernels, or activation 'none'"
        )


def _refuse_training(predictor: Predictor | Sequence[Predictor]) -> None:
    """Raise ValueError for a network with layers that go by the batch, or by chance."""
    for network in predictor if isinstance(predictor, Sequence) else [predictor]:
        layers = network.named_modules() if isinstance(network, nn.Module) else ()
        for name, layer in layers:
            by_batch = getattr(layer, "running_mean", None) is not None
            if layer.training and (by_batch or isinstance(layer, nn.modules.dropout._DropoutNd)):
                raise ValueError(
                    f"predictor: its layer {name or 'itself'} ({type(layer).__name__}) is in "
                    "training mode, where predictions depend on the batch or on chance; call "
                    ".eval() of the network first"
                )


def _digest_of(probe: Probe) -> str:
    return digest([of_outputs[0] for of_outputs in probe.digests])


def _machine(device: torch.device) -> dict[str, Any]:
    """What bits depend on beside the arguments."""
    found: dict[str, Any] = {
        "torch": str(torch.__version__),
        "voxfuse": _backends.versions()["voxfuse"],
        "backends": [name for name, each in _backends.backends().items() if each.available],
        "cpu": [torch.backends.cpu.get_cpu_capability(), _library.cpu_capability()],
        "device": device.type,
    }
    if device.type == "cuda":
        found |= {
            "gpu": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "float32": [
                torch.backends.cuda.matmul.fp32_precision,
                torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]
            ],
        }
    return found


def _fingerprint(source: Any) -> str:
    """What tells a volume from another: its own word, if it has one."""
    own = getattr(source, "fingerprint", None)
    return fingerprint_of(source) if own is None else str(own())


def _left_out(volume: PaddedVolume, kept: NDArray[np.bool_]) -> Callable[[tuple[int, ...]], bool]:
    """Whether a patch is skipped, by its origin."""
    starts = volume.grid.starts
    numbers = [{start: k for k, start in enumerate(axis)} for axis in starts]
    present = kept.reshape([len(axis) for axis in starts])

    def skipped(origin: tuple[int, ...]) -> bool:
        index = tuple(of[start] for of, start in zip(numbers, origin, strict=True))
        return not present[index]

    return skipped


def _refuse(place: Folder, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ManifestError if two descriptions differ, with how."""
    changes = list(differences(before, now))
    if changes:
        why = ""
        if len(changes) == 1 and changes[0].startswith("probe: "):
            why = (
                " (the first batch has other bits here: another number of threads, processor or "
                "library, or a model that is not in the manifest)"
            )
        raise ManifestError(
            f"{place.path}: was prepared for another job: {'; '.join(changes)}{why}; prepare this "
            "one in another folder"
        )


def _start(source: Any, axis: int | None) -> None:
    """Tell a source with a cache that another box begins."""
    if hasattr(source, "start"):
        source.start(axis)


def _cached(source: Any, reach: Sequence[int], patch: Sequence[int], axis: int) -> int:
    """Bytes that a source's cache takes for a box."""
    if not hasattr(source, "cache_for"):
        return 0
    most = getattr(source, "cache_bytes", math.inf)
    return int(min(source.cache_for(reach, patch, axis), most))


def _bytes_of(out: Any) -> int:
    dtype: np.dtype[Any] = np.dtype(out.dtype)
    return math.prod(int(size) for size in out.shape) * dtype.itemsize
