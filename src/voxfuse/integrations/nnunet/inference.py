"""nnU-Net's sliding window and export on the fused operators: labels without a class volume."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from acvl_utils.cropping_and_padding.padding import pad_nd_image
from nnunetv2.configuration import ANISO_THRESHOLD, default_num_processes
from nnunetv2.inference.sliding_window_prediction import (
    compute_gaussian,
    compute_steps_for_sliding_window,
)
from nnunetv2.preprocessing.resampling.default_resampling import (
    determine_do_sep_z_and_axis,
    resample_data_or_seg_to_shape,
)
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from tqdm import tqdm

from voxfuse.fusion.fuser import PatchFuser

#: Where an attribute of the predictor keeps the networks of its folds.
_KEPT = "_voxfuse_networks"


@dataclass(frozen=True)
class Tiles:
    """nnU-Net's tiles of a volume, as three axes.

    ``starts`` are the first voxels along each axis, below 0 where ``before`` voxels of padding lie
    before the volume; of a 2D configuration every slice is a row of tiles.
    """

    volume: tuple[int, ...]
    tile: tuple[int, ...]
    starts: tuple[tuple[int, ...], ...]
    before: tuple[int, ...]
    padded: tuple[int, ...]
    flat: bool

    def window(self, gaussian: bool) -> list[NDArray[np.float64]]:
        """The weights along each axis: in float64, of which nnU-Net's are rounded to half."""
        if not gaussian:
            return [np.ones(size) for size in self.tile]
        exact = torch.float64, torch.device("cpu")
        # Not through the cache, which holds two windows and others need.
        return [
            compute_gaussian.__wrapped__((size,), 1 / 8, 1, *exact).numpy() for size in self.tile
        ]


def tiles(predictor: Any, shape: Sequence[int]) -> Tiles:
    """The tiles of a preprocessed image of spatial ``shape``, by nnU-Net's own steps."""
    patch = tuple(int(size) for size in predictor.configuration_manager.patch_size)
    flat = len(patch) < len(shape)
    tile = (1, *patch) if flat else patch
    padded = tuple(max(size, each) for size, each in zip(shape, tile, strict=True))
    before = tuple((size - each) // 2 for size, each in zip(padded, shape, strict=True))
    steps = compute_steps_for_sliding_window(padded[-len(patch) :], patch, predictor.tile_step_size)
    starts = [range(padded[0]), *steps] if flat else steps
    places = zip(starts, before, strict=True)
    return Tiles(
        tuple(shape),
        tile,
        tuple(tuple(dict.fromkeys(start - low for start in axis)) for axis, low in places),
        before,
        padded,
        flat,
    )


@dataclass(frozen=True)
class Export:
    """How fused logits become labels of the image: nnU-Net's export of one case."""

    size: tuple[int, ...]
    order: tuple[int, ...]
    bbox: tuple[slice, ...]
    native: tuple[int, ...]
    forward: tuple[int, ...]

    def allocate(self, dtype: Any) -> tuple[NDArray[Any], NDArray[Any]]:
        """Zeros of the image's shape, and the view of them that the labels go to."""
        labels = np.zeros(self.native, dtype)
        return labels, labels.transpose(self.forward)[self.bbox]


def export(predictor: Any, properties: dict[str, Any]) -> Export:
    """nnU-Net's rule for a case; ``resampling_reason`` says whether it is followed."""
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    size = tuple(int(n) for n in properties["shape_after_cropping_and_before_resampling"])
    target = [properties["spacing"][axis] for axis in plans.transpose_forward]
    current = configuration.spacing
    if len(current) != len(size):
        current = [target[0], *current]
    keywords = configuration.resampling_fn_probabilities.keywords
    separate, axis = determine_do_sep_z_and_axis(
        keywords.get("force_separate_z", False),
        current,
        target,
        keywords.get("separate_z_anisotropy_threshold", ANISO_THRESHOLD),
    )
    cropped_from = properties["shape_before_cropping"]
    return Export(
        size,
        tuple(0 if separate and a == axis else 1 for a in range(len(size))),
        tuple(slice(int(low), int(high)) for low, high in properties["bbox_used_for_cropping"]),
        tuple(int(cropped_from[axis]) for axis in plans.transpose_backward),
        tuple(plans.transpose_forward),
    )


def resampling_reason(predictor: Any) -> str | None:
    """Why labels of this model are not resampled here, or None where they are."""
    manager = predictor.label_manager
    decided = ("convert_logits_to_segmentation", "convert_probabilities_to_segmentation")
    own = any(getattr(type(manager), name) is not getattr(LabelManager, name) for name in decided)
    if own or (manager.has_regions and manager.inference_nonlin is not torch.sigmoid):
        return f"its label manager {type(manager).__name__} makes labels in another way"
    function = predictor.configuration_manager.resampling_fn_probabilities
    if getattr(function, "func", None) is not resample_data_or_seg_to_shape or function.args:
        return f"it resamples by {getattr(function, 'func', function)}"
    keywords = dict(function.keywords)
    for name in ("force_separate_z", "separate_z_anisotropy_threshold"):
        keywords.pop(name, None)
    found = {"is_seg": False, "order": 3, "order_z": 0} | keywords
    if found != {"is_seg": False, "order": 1, "order_z": 0}:
        return f"it resamples with {found}, not with order=1, order_z=0, is_seg=False"
    if manager.num_segmentation_heads == 1 and not manager.has_regions:
        return "it has a single class"
    return None


def predicted_labels(
    predictor: Any, data: Tensor, properties: dict[str, Any]
) -> NDArray[np.uint8] | NDArray[np.uint16]:
    """Labels of the image from a preprocessed case, as nnU-Net's export returns them."""
    rule, manager = export(predictor, properties), predictor.label_manager
    dtype = np.uint8 if len(manager.foreground_labels) < 255 else np.uint16
    labels, view = rule.allocate(dtype)
    decided: dict[str, Any] = {"output": "labels"}
    if manager.has_regions:
        order = [int(label) for label in manager.regions_class_order]
        decided = {"output": "regions", "regions": order}
        decided |= {"activation": "sigmoid", "voting": "logit"}
    decided |= {"resample_to": rule.size, "resample_order": rule.order, "finite": True}
    with threads():
        _fused(predictor, networks(predictor), data, out=view, **decided)
    return labels


def predicted_logits(predictor: Any, members: Sequence[nn.Module], data: Tensor) -> Tensor:
    """The fused logits (C, x, y, z) float32 of some networks' mean."""
    logits: Tensor = _fused(predictor, members, data, output="logits", dtype=torch.float32)
    # Two numbers say whether there is anything infinite; NaN is let through, as in nnU-Net.
    bounds = torch.stack(torch.aminmax(logits))
    if not bool(bounds.isfinite().all()) and bool(logits.isinf().any()):
        raise RuntimeError("predictions: infinite")
    return logits


def networks(predictor: Any) -> list[nn.Module]:
    """One network for each fold, which stay where they are from case to case."""
    parameters = predictor.list_of_parameters
    if len(parameters) == 1:
        _loaded(predictor.network, parameters[0])
        return [predictor.network]
    kept = getattr(predictor, _KEPT, None)
    if kept is None or kept[0] is not parameters or kept[1] is not predictor.network:
        members = [_loaded(_copied(predictor.network), each) for each in parameters]
        kept = (parameters, predictor.network, members)
        setattr(predictor, _KEPT, kept)
    return list(kept[2])


def _copied(network: nn.Module) -> nn.Module:
    if isinstance(network, OptimizedModule):
        original: nn.Module = copy.deepcopy(network._orig_mod)
        original.compile()
        return original
    return copy.deepcopy(network)


def _loaded(network: nn.Module, parameters: dict[str, Tensor]) -> nn.Module:
    whole: nn.Module = network._orig_mod if isinstance(network, OptimizedModule) else network
    whole.load_state_dict(parameters)
    return network


@contextmanager
def threads() -> Iterator[None]:
    """nnU-Net's number of threads while it predicts."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(default_num_processes, before))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.inference_mode()
def _fused(predictor: Any, members: Sequence[nn.Module], data: Tensor, **options: Any) -> Any:
    """Predict all tiles of a case and fuse them: on the device, or the CPU if that is too small."""
    if data.ndim != 4:
        raise ValueError(f"data: got shape {tuple(data.shape)}, expected (channels, x, y, z)")
    device = predictor.device
    for network in members:
        network.to(device).eval()
    empty_cache(device)
    cast = torch.autocast("cuda") if device.type == "cuda" else nullcontext()
    with cast:
        if predictor.perform_everything_on_device and device.type != "cpu":
            try:
                return _run(predictor, members, data, device, options)
            except torch.OutOfMemoryError:
                print("Prediction on device ran out of memory: the sums are moved to the CPU")
                empty_cache(device)
        result = _run(predictor, members, data, torch.device("cpu"), options)
    empty_cache(device)
    return result


def _run(
    predictor: Any,
    members: Sequence[nn.Module],
    data: Tensor,
    device: torch.device,
    options: dict[str, Any],
) -> Any:
    plan = tiles(predictor, data.shape[1:])
    turns = _turns(predictor, 2 if plan.flat else 3)
    fuser = PatchFuser(
        plan.volume,
        plan.tile,
        predictor.label_manager.num_segmentation_heads,
        origins=plan.starts,
        window=plan.window(predictor.use_gaussian),
        members=len(members) * len(turns),
        **options,
    )
    source = data.to(device)
    if plan.padded != plan.volume:
        source = pad_nd_image(source, plan.padded, "constant", {"value": 0})
    for origins in tqdm(fuser.batches(1), total=len(fuser), disable=not predictor.allow_tqdm):
        place = [
            slice(start + low, start + low + size)
            for start, low, size in zip(origins[0].tolist(), plan.before, plan.tile, strict=True)
        ]
        tile = source[(slice(None), *place)][None].to(predictor.device)
        tile = tile[:, :, 0] if plan.flat else tile
        fuser.add_members(list(_predictions(members, tile, turns, plan.flat, device)), origins)
    return fuser.result()


def _turns(predictor: Any, axes: int) -> list[tuple[int, ...]]:
    """The axes of a tile that each of its predictions is mirrored along."""
    mirrored = predictor.allowed_mirroring_axes if predictor.use_mirroring else None
    if not mirrored:
        return [()]
    if not 0 <= min(mirrored) <= max(mirrored) < axes:
        raise ValueError(
            f"allowed_mirroring_axes: got {tuple(mirrored)}, expected axes of a tile of {axes}"
        )
    subsets = (itertools.combinations(mirrored, count) for count in range(len(mirrored) + 1))
    return list(itertools.chain.from_iterable(subsets))


def _predictions(
    members: Sequence[nn.Module],
    tile: Tensor,
    turns: Sequence[tuple[int, ...]],
    flat: bool,
    device: torch.device,
) -> Iterator[tuple[Tensor, tuple[int, ...]]]:
    """What the networks make of a tile and its mirrored versions, and how these are turned."""
    for network in members:
        for turn in turns:
            given = torch.flip(tile, [axis + 2 for axis in turn]) if turn else tile.clone()
            prediction = network(given).to(device)
            # A slice of a 2D configuration is a tile of depth 1.
            prediction = prediction[:, :, None] if flat else prediction
            yield prediction, tuple(axis + flat for axis in turn)
