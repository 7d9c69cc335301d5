"""A generated data set, as nnU-Net's preprocessing leaves it, and plans for a small network.

nnU-Net itself is what is installed; only timm is a stub (``stubs/``).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

#: For ``PYTHONPATH`` of a subprocess; a timm that is installed comes first.
STUBS = str(Path(__file__).parent / "stubs")
if STUBS not in sys.path:
    sys.path.append(STUBS)

DATASET = "Dataset001_Tiny"
CONFIGURATION = "3d_fullres"
_ORGANS = {"background": 0, "liver": 1, "tumour": 2, "vessel": 3}
_REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "vessel": 3}

#: ``dataset.json``'s labels, by the kind of training they ask nnU-Net for.
LABELS: dict[str, dict[str, Any]] = {
    "labels": _ORGANS,
    "ignore": {**_ORGANS, "ignore": 4},
    "regions": _REGIONS,
    "regions and ignore": {**_REGIONS, "ignore": 4},
}


def dataset_json(kind: str) -> dict[str, Any]:
    return {
        "channel_names": {"0": "MR"},
        "labels": LABELS[kind],
        "regions_class_order": [1, 2, 3],
        "file_ending": ".nii.gz",
        "numTraining": 2,
    }


def plans() -> dict[str, Any]:
    architecture = {
        "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
        "arch_kwargs": {
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [[3, 3, 3]] * 3,
            "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
            "n_conv_per_stage": [1, 1, 1],
            "n_conv_per_stage_decoder": [1, 1],
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-05, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    function = "resample_data_or_seg_to_shape"
    configuration = {
        "data_identifier": f"nnUNetPlans_{CONFIGURATION}",
        "preprocessor_name": "DefaultPreprocessor",
        "batch_size": 2,
        "patch_size": [16, 16, 16],
        "median_image_size_in_voxels": [20.0, 20.0, 20.0],
        "spacing": [1.0, 1.0, 1.0],
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": function,
        "resampling_fn_seg": function,
        "resampling_fn_data_kwargs": {**resampling, "order": 3},
        "resampling_fn_seg_kwargs": {**resampling, "is_seg": True},
        "resampling_fn_probabilities": function,
        "resampling_fn_probabilities_kwargs": resampling,
        "architecture": architecture,
        "batch_dice": True,
    }
    return {
        "dataset_name": DATASET,
        "plans_name": "nnUNetPlans",
        "original_median_spacing_after_transp": [1.0, 1.0, 1.0],
        "original_median_shape_after_transp": [20, 20, 20],
        "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2],
        "transpose_backward": [0, 1, 2],
        "configurations": {CONFIGURATION: configuration},
        "experiment_planner_used": "ExperimentPlanner",
        "label_manager": "LabelManager",
        "foreground_intensity_properties_per_channel": {
            "0": {"max": 1, "mean": 0, "median": 0, "min": -1, "std": 1}
        },
    }


def case(kind: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (1, 20, 20, 20) and its labels: nested cubes; a corner that is not annotated."""
    place = np.abs(np.indices((20, 20, 20)) - 8 - seed).max(0)
    labels = np.select([place < 3, place < 5, place < 8], [3, 2, 1], 0).astype(np.int16)
    image = labels + np.random.default_rng(seed).normal(0, 0.5, labels.shape)
    if "ignore" in LABELS[kind]:
        labels[:7] = 4
    return image.astype(np.float32)[None], labels[None]


@pytest.fixture
def nnunet_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """nnU-Net's folders below the test's own, and no workers for its augmentation."""
    for name in ("raw", "preprocessed", "results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.delenv("nnUNet_extTrainer", raising=False)
    return tmp_path


def write_preprocessed(folders: Path, kind: str) -> None:
    """Put two cases of ``kind`` where nnU-Net's training looks for them."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    dataset = folders / "preprocessed" / DATASET
    cases = dataset / f"nnUNetPlans_{CONFIGURATION}"
    cases.mkdir(parents=True)
    split = [{"train": ["case0"], "val": ["case1"]}]
    files = {"dataset": dataset_json(kind), "nnUNetPlans": plans(), "splits_final": split}
    for name, content in {**files, "dataset_fingerprint": {}}.items():
        (dataset / f"{name}.json").write_text(json.dumps(content))
    wanted = [x for name, x in LABELS[kind].items() if name not in ("background", "ignore")]
    wanted.append([-1, *range(4)])
    for seed in range(2):
        image, labels = case(kind, seed)
        places = {
            tuple(x) if isinstance(x, list) else x: np.argwhere(
                np.isin(labels, [*np.atleast_1d(x)])
            )
            for x in wanted
        }
        properties = {"class_locations": places, "spacing": [1.0, 1.0, 1.0]}
        shape = image.shape
        nnUNetDatasetBlosc2.save_case(
            image, labels, properties, str(cases / f"case{seed}"), chunks=shape, blocks=shape
        )
