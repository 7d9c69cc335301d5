"""A generated model folder of nnU-Net's, and the float64 truth of what it predicts."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.integrations.nnunet_data import CONFIGURATION, DATASET, dataset_json, plans

#: Where nnU-Net's command looks for it, below its folder of results.
MODEL = f"{DATASET}/nnUNetTrainer__nnUNetPlans__{CONFIGURATION}"


def model_plans(**configuration: Any) -> dict[str, Any]:
    """The data set's plans with another order of axes, and changes of the configuration."""
    changed = copy.deepcopy(plans())
    changed |= {"transpose_forward": [1, 2, 0], "transpose_backward": [2, 0, 1]}
    own = changed["configurations"][CONFIGURATION] | {"normalization_schemes": ["NoNormalization"]}
    if len(configuration.get("patch_size", (0,) * 3)) == 2:
        own["architecture"]["arch_kwargs"] |= {
            "conv_op": "torch.nn.modules.conv.Conv2d",
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
            "kernel_sizes": [[3, 3]] * 3,
            "strides": [[1, 1], [2, 2], [2, 2]],
        }
    changed["configurations"][CONFIGURATION] = own | configuration
    return changed


def write_model(
    folder: Path,
    plan: dict[str, Any],
    labels: dict[str, Any],
    *,
    folds: Sequence[int] = (0,),
    mirrored: tuple[int, ...] | None = None,
) -> Path:
    """Plans, ``dataset.json`` and a random network's checkpoint for every fold."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    folder.mkdir(parents=True, exist_ok=True)
    dataset = dataset_json("labels") | {"labels": labels}
    (folder / "plans.json").write_text(json.dumps(plan))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    manager = PlansManager(plan)
    configuration = manager.get_configuration(CONFIGURATION)
    for fold in folds:
        torch.manual_seed(fold)
        network = nnUNetTrainer.build_network_architecture(
            manager,
            configuration,
            determine_num_input_channels(manager, configuration, dataset),
            manager.get_label_manager(dataset).num_segmentation_heads,
            enable_deep_supervision=False,
        )
        (folder / f"fold_{fold}").mkdir(exist_ok=True)
        torch.save(
            {
                "network_weights": network.state_dict(),
                "trainer_name": "nnUNetTrainer",
                "init_args": {"configuration": CONFIGURATION},
                "inference_allowed_mirroring_axes": mirrored,
            },
            folder / f"fold_{fold}" / "checkpoint_final.pth",
        )
    return folder


def image(shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Smooth noise (1, *shape) with a border of zeros, which nnU-Net crops."""
    from scipy.ndimage import gaussian_filter

    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5) * 8
    result = np.zeros(shape, np.float32)
    inner = (slice(2, -1), slice(1, -2), slice(3, None))
    result[inner] = smooth[inner]
    return result[None]


def true_logits(predictor: Any, data: torch.Tensor) -> np.ndarray:
    """nnU-Net's sliding window with its weights and sums in float64."""
    from acvl_utils.cropping_and_padding.padding import pad_nd_image
    from nnunetv2.inference.sliding_window_prediction import compute_gaussian

    patch = tuple(predictor.configuration_manager.patch_size)
    window = torch.ones(patch, dtype=torch.float64)
    if predictor.use_gaussian:
        exact = torch.float64, torch.device("cpu")
        window = compute_gaussian.__wrapped__(patch, 1 / 8, 10, *exact)
    padded, back = pad_nd_image(data, patch, "constant", {"value": 0}, True, None)
    sums = weights = 0
    for parameters in predictor.list_of_parameters:
        predictor.network.load_state_dict(parameters)
        predictor.network.eval()
        total = torch.zeros(
            predictor.label_manager.num_segmentation_heads, *padded.shape[1:], dtype=torch.float64
        )
        weights = torch.zeros(padded.shape[1:], dtype=torch.float64)
        for place in predictor._internal_get_sliding_window_slicers(padded.shape[1:]):
            tile = torch.clone(padded[place][None])
            total[place] += window * predictor._internal_maybe_mirror_and_predict(tile)[0].double()
            weights[place[1:]] += window
        sums = sums + total / weights
    return (sums / len(predictor.list_of_parameters))[(slice(None), *back[1:])].numpy()


def true_values(predictor: Any, logits: np.ndarray, properties: dict[str, Any]) -> np.ndarray:
    """The logits resampled by nnU-Net's function in float64, cropping and axes turned back."""
    plan, configuration = predictor.plans_manager, predictor.configuration_manager
    target = [properties["spacing"][axis] for axis in plan.transpose_forward]
    current = configuration.spacing
    current = current if len(current) == 3 else [target[0], *current]
    size = properties["shape_after_cropping_and_before_resampling"]
    resampled = configuration.resampling_fn_probabilities(logits, size, current, target)
    whole = np.full((len(logits), *properties["shape_before_cropping"]), np.nan)
    whole[(slice(None), *(slice(*x) for x in properties["bbox_used_for_cropping"]))] = resampled
    return whole.transpose(0, *(axis + 1 for axis in plan.transpose_backward))


def assert_labels(
    labels: np.ndarray, values: np.ndarray, regions: Sequence[int] | None = None
) -> None:
    """Labels are those of the true values, but where two are as good as equal; 0 outside."""
    inside = ~np.isnan(values[0])
    assert labels.shape == inside.shape
    assert not labels[~inside].any()
    values, labels = values[:, inside], labels[inside]
    if regions is None:
        expected = values.argmax(0)
        best = np.sort(values, 0)[-2:]
        near = best[1] - best[0]
    else:
        expected = np.zeros_like(labels)
        for label, chosen in zip(regions, values > 0, strict=True):
            expected[chosen] = label
        near = np.abs(values).min(0)
    differ = labels != expected
    # Every step is float32: tiles, their mean, and the interpolation.
    assert near[differ].max(initial=0) < 2e-5 * np.abs(values).max()
    assert differ.mean() < 1e-3
    assert len(np.unique(expected)) > 1
