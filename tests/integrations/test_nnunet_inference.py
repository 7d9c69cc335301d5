"""nnU-Net's prediction on the fused operators, against its own functions in float64."""

from __future__ import annotations

import json
import sys
import warnings

import numpy as np
import pytest
import torch

from tests.integrations.nnunet_data import CONFIGURATION, DATASET, nnunet_folders  # noqa: F401
from tests.integrations.nnunet_model import (
    MODEL,
    assert_labels,
    image,
    model_plans,
    true_logits,
    true_values,
    write_model,
)
from voxfuse import cli

reason = "nnunetv2 is not installed, or not what it needs"
peer = pytest.importorskip("nnunetv2.inference.predict_from_raw_data", reason=reason)
predictor_module = pytest.importorskip("voxfuse.integrations.nnunet.predictor", reason=reason)
Predictor, patch = predictor_module.Predictor, predictor_module.patch

pytestmark = pytest.mark.usefixtures("nnunet_folders")
ORGANS = {"background": 0, "liver": 1, "tumour": 2, "vessel": 3}
REGIONS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "vessel": 3}
QUIET = {"device": torch.device("cpu"), "allow_tqdm": False}
SHAPE = (22, 26, 30)


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(predictor_module, "_said", set())


def loaded(kind, folder, **options):
    predictor = kind(**QUIET, **options)
    folds = sorted(int(path.name[5:]) for path in folder.glob("fold_*"))
    predictor.initialize_from_trained_model_folder(str(folder), folds)
    return predictor


def preprocessed(predictor, data, properties):
    """What nnU-Net's preprocessing makes of an image."""
    preprocessor = predictor.configuration_manager.preprocessor_class(verbose=False)
    case, _, found = preprocessor.run_case_npy(
        data,
        None,
        dict(properties),
        predictor.plans_manager,
        predictor.configuration_manager,
        predictor.dataset_json,
    )
    return torch.from_numpy(case), found


#: Changes of the configuration, labels, spacing of the image, further options of the model.
MODELS = {
    "labels": ({}, ORGANS, (1.4, 0.9, 1.1), {}),
    "folds and mirroring": ({}, ORGANS, (1.4, 0.9, 1.1), {"folds": (0, 1), "mirrored": (0, 2)}),
    "regions": ({}, REGIONS, (1.4, 0.9, 1.1), {"mirrored": (1,)}),
    "a coarse axis of the plans": (
        {"spacing": [4.0, 1.0, 1.0], "patch_size": [4, 16, 16]}
        | {"median_image_size_in_voxels": [5.0, 20.0, 20.0]},
        ORGANS,
        (1.0, 2.5, 1.2),
        {},
    ),
    "a coarse axis of the image": ({}, ORGANS, (1.0, 3.5, 1.0), {}),
    "slices": (
        {"patch_size": [16, 16], "spacing": [0.8, 1.0]},
        ORGANS,
        (1, 2, 1.3),
        {"mirrored": (0, 1)},
    ),
    "tiles beyond the image": ({"patch_size": [32, 16, 32]}, ORGANS, (1.4, 0.9, 1.1), {}),
}


@pytest.mark.parametrize(("changes", "labels", "spacing", "options"), MODELS.values(), ids=MODELS)
def test_labels_and_logits_are_those_of_float64(tmp_path, changes, labels, spacing, options):
    folder = write_model(tmp_path / "model", model_plans(**changes), labels, **options)
    predictor = loaded(Predictor, folder)
    data, properties = image(SHAPE), {"spacing": spacing}
    case, found = preprocessed(predictor, data, properties)
    expected = true_logits(predictor, case)
    logits = predictor.predict_logits_from_preprocessed_data(case)
    assert logits.dtype == torch.float32
    np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = predictor.predict_single_npy_array(data, dict(properties))
    assert result.dtype == np.uint8
    assert result.shape == SHAPE
    order = [1, 2, 3] if labels is REGIONS else None
    assert_labels(result, true_values(predictor, expected, found), order)


def test_the_rule_of_the_coarse_axis_is_nnunets(tmp_path):
    """The current spacing first, then the new one; none with two coarsest axes or if forced off."""
    folder = write_model(tmp_path / "model", model_plans(), ORGANS)
    predictor = loaded(Predictor, folder)
    _, found = preprocessed(predictor, image(SHAPE), {"spacing": (1.0, 1.0, 1.0)})
    kwargs = predictor.configuration_manager.configuration["resampling_fn_probabilities_kwargs"]
    orders = {}
    for current, spacing, forced in (
        ([1, 1, 1], (1, 3.0, 1), None),
        ([1, 1, 1], (1, 3.1, 1), None),
        ([1, 1, 4], (1, 5.0, 1), None),
        ([4, 4, 1], (1, 5.0, 1), None),
        ([1, 1, 1], (1, 5.0, 1), False),
        ([1, 2, 1], (1, 1.0, 1), True),
    ):
        predictor.configuration_manager.configuration["spacing"] = current
        kwargs["force_separate_z"] = forced
        type(predictor.configuration_manager).resampling_fn_probabilities.fget.cache_clear()
        rule = predictor_module.inference.export(predictor, found | {"spacing": spacing})
        orders[tuple(current), spacing, forced] = rule.order
    # The image's second axis is the first of the transposed ones.
    assert list(orders.values()) == [
        (1, 1, 1),
        (0, 1, 1),
        (1, 1, 0),
        (1, 1, 1),
        (1, 1, 1),
        (1, 0, 1),
    ]


def test_from_255_foreground_labels_on_they_are_uint16(tmp_path):
    labels = {"background": 0} | {f"organ {n}": n for n in range(1, 256)}
    plan = model_plans(patch_size=[8, 8, 8])
    folder = write_model(tmp_path / "model", plan, labels)
    data = image((14, 12, 13))
    result = loaded(Predictor, folder).predict_single_npy_array(data, {"spacing": (1, 1, 1)})
    assert result.dtype == np.uint16
    del labels["organ 255"]
    folder = write_model(tmp_path / "smaller", plan, labels)
    result = loaded(Predictor, folder).predict_single_npy_array(data, {"spacing": (1, 1, 1)})
    assert result.dtype == np.uint8


def write_images(folder, count):
    import SimpleITK

    folder.mkdir(exist_ok=True)
    for number in range(count):
        picture = SimpleITK.GetImageFromArray(image(SHAPE, number)[0])
        picture.SetSpacing((1.1, 0.9, 1.4))
        SimpleITK.WriteImage(picture, str(folder / f"case{number}_0000.nii.gz"))
    return str(folder)


def read(path):
    import SimpleITK

    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def test_files_come_from_workers_or_one_after_the_other(tmp_path, capsys):
    """With nnU-Net's preprocessing in its own processes, from arrays, in sequence: the same."""
    folder = write_model(tmp_path / "model", model_plans(), ORGANS)
    predictor = loaded(Predictor, folder)
    source = write_images(tmp_path / "images", 2)
    results = predictor.predict_from_files(
        source, str(tmp_path / "a"), num_processes_preprocessing=1
    )
    assert results == [None, None]
    predictor.predict_from_files_sequential(source, str(tmp_path / "b"))
    inputs = [[f"{source}/case1_0000.nii.gz"]]
    (returned,) = predictor.predict_from_files_sequential(inputs, None)
    written = [read(tmp_path / "a" / f"case{number}.nii.gz") for number in range(2)]
    assert np.array_equal(returned, written[1])
    assert np.array_equal(written[0], read(tmp_path / "b" / "case0.nii.gz"))
    assert not np.array_equal(*written)
    for name in ("dataset", "plans", "predict_from_raw_data_args"):
        assert json.loads((tmp_path / "a" / f"{name}.json").read_text())
    before = (tmp_path / "b" / "case0.nii.gz").stat().st_mtime_ns
    (tmp_path / "b" / "case1.nii.gz").unlink()
    predictor.predict_from_files_sequential(source, str(tmp_path / "b"), overwrite=False)
    assert (tmp_path / "b" / "case0.nii.gz").stat().st_mtime_ns == before
    assert np.array_equal(written[1], read(tmp_path / "b" / "case1.nii.gz"))


def test_a_cascade_takes_the_labels_of_the_stage_before(tmp_path):
    plan = model_plans(previous_stage="3d_lowres")
    plan["configurations"]["3d_lowres"] = dict(plan["configurations"][CONFIGURATION])
    del plan["configurations"]["3d_lowres"]["previous_stage"]
    folder = write_model(tmp_path / "model", plan, ORGANS)
    predictor = loaded(Predictor, folder)
    source = write_images(tmp_path / "images", 1)
    with pytest.raises(ValueError, match="folder_with_segs_from_prev_stage: got None"):
        predictor.predict_from_files_sequential(source, None)
    import SimpleITK

    stage = np.random.default_rng(0).integers(0, 4, SHAPE).astype(np.int16)
    previous = tmp_path / "previous"
    previous.mkdir()
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(stage), str(previous / "case0.nii.gz"))
    (labels,) = predictor.predict_from_files_sequential(
        source, None, folder_with_segs_from_prev_stage=str(previous)
    )
    data = image(SHAPE)
    assert np.array_equal(
        labels, predictor.predict_single_npy_array(data, {"spacing": (1.4, 0.9, 1.1)}, stage[None])
    )
    other = predictor.predict_single_npy_array(data, {"spacing": (1.4, 0.9, 1.1)}, 0 * stage[None])
    assert not np.array_equal(labels, other)


def test_infinite_logits_are_an_error_as_in_nnunet(tmp_path):
    folder = write_model(tmp_path / "model", model_plans(), ORGANS)
    predictor = loaded(Predictor, folder)
    name = next(name for name in predictor.list_of_parameters[0] if "seg_layers.1.bias" in name)
    predictor.list_of_parameters[0][name][2] = torch.inf
    data = image(SHAPE)
    with pytest.raises(RuntimeError, match="infinite"):
        predictor.predict_single_npy_array(data, {"spacing": (1, 1, 1)})
    case, _ = preprocessed(predictor, data, {"spacing": (1, 1, 1)})
    with pytest.raises(RuntimeError, match="infinite"):
        predictor.predict_logits_from_preprocessed_data(case)


def test_what_is_nnunets_own_is_taken_from_it_and_said_once(tmp_path):
    folder = write_model(tmp_path / "model", model_plans(), ORGANS)
    predictor = loaded(Predictor, folder)
    data, properties = image(SHAPE), {"spacing": (1.4, 0.9, 1.1)}
    with pytest.warns(UserWarning, match="by nnU-Net, because probabilities are asked for"):
        labels, values = predictor.predict_single_npy_array(
            data, dict(properties), save_or_return_probabilities=True
        )
    assert values.shape == (4, *SHAPE)
    assert np.array_equal(values.argmax(0), labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor.predict_single_npy_array(data, dict(properties), None, None, True)
    kwargs = {"is_seg": False, "order": 0, "order_z": 0, "force_separate_z": None}
    plan = model_plans(resampling_fn_probabilities_kwargs=kwargs)
    nearest = loaded(Predictor, write_model(tmp_path / "nearest", plan, ORGANS))
    with pytest.warns(UserWarning, match=r"because it resamples with .*'order': 0"):
        got = nearest.predict_single_npy_array(data, dict(properties))
    case, found = preprocessed(nearest, data, properties)
    expected = true_values(nearest, true_logits(nearest, case), found)
    assert_labels(got, expected)

    class Mine(Predictor):
        def _internal_maybe_mirror_and_predict(self, x):
            return super()._internal_maybe_mirror_and_predict(x)

    with pytest.warns(UserWarning, match="because Mine has a _internal_maybe_mirror_and_predict"):
        loaded(Mine, folder).predict_single_npy_array(data, dict(properties))


def test_patch_serves_those_who_build_nnunets_predictor(tmp_path):
    folder = write_model(tmp_path / "model", model_plans(), ORGANS, folds=(0, 1))
    data, properties = image(SHAPE), {"spacing": (1.4, 0.9, 1.1)}
    expected = loaded(Predictor, folder).predict_single_npy_array(data, dict(properties))
    own = dict(peer.nnUNetPredictor.__dict__)
    with patch():
        predictor = loaded(peer.nnUNetPredictor, folder)
        with patch():  # changes nothing, and gives nothing back
            pass
        got = predictor.predict_single_npy_array(data, dict(properties))
    assert np.array_equal(got, expected)
    assert dict(peer.nnUNetPredictor.__dict__) == own
    patched = patch()
    source = write_images(tmp_path / "images", 1)
    (got,) = predictor.predict_from_files_sequential(source, None)
    patched.undo()
    assert np.array_equal(got, expected)
    assert dict(peer.nnUNetPredictor.__dict__) == own


def test_patch_refuses_what_it_does_not_know(monkeypatch):
    monkeypatch.setattr(predictor_module, "version", lambda name: "3.0.0")
    with pytest.raises(RuntimeError, match=r"nnU-Net 3.0.0 is installed, .* known of 2.8.1"):
        patch()


@pytest.mark.parametrize("first", ["voxfuse", "TotalSegmentator"])
def test_totalsegmentator_in_both_orders(tmp_path, monkeypatch, first):
    """It replaces the same methods at import, and calls them with an argument of its own."""
    theirs = pytest.importorskip("totalsegmentator.nnunet_runtime_patches")
    export = pytest.importorskip("nnunetv2.inference.export_prediction")
    names = ("predict_from_files", "predict_from_files_sequential", "predict_from_data_iterator")
    names += ("predict_from_list_of_npy_arrays", "predict_single_npy_array")
    for name in names:
        monkeypatch.setattr(peer.nnUNetPredictor, name, peer.nnUNetPredictor.__dict__[name])
    monkeypatch.setattr(peer.nnUNetPredictor, theirs._PATCH_MARKER, False, raising=False)
    for module in (peer, export):
        for name in (
            "export_prediction_from_logits",
            "convert_predicted_logits_to_segmentation_with_correct_shape",
        ):
            monkeypatch.setattr(module, name, getattr(module, name))
    folder = write_model(tmp_path / "model", model_plans(), ORGANS)
    data = image(SHAPE)
    expected = loaded(Predictor, folder).predict_single_npy_array(
        data, {"spacing": (1.4, 0.9, 1.1)}
    )
    source, items = write_images(tmp_path / "images", 1), []
    if first == "voxfuse":
        with patch():
            # What is asked of the methods is there already.
            assert not theirs.patch_nnunet_cropped_logits_resampling()
            items.append(loaded(peer.nnUNetPredictor, folder))
            results = items[0].predict_from_files_sequential(
                source, None, use_cropped_logits_resampling=True
            )
    else:
        assert theirs.patch_nnunet_cropped_logits_resampling()
        before = peer.nnUNetPredictor.predict_from_data_iterator
        with patch():
            items.append(loaded(peer.nnUNetPredictor, folder))
            adapter = peer.PreprocessAdapterFromNpy(
                [data],
                [None],
                [{"spacing": (1.4, 0.9, 1.1)}],
                [None],
                items[0].plans_manager,
                items[0].dataset_json,
                items[0].configuration_manager,
            )
            results = items[0].predict_from_data_iterator(adapter, False, 1, True)
        assert peer.nnUNetPredictor.predict_from_data_iterator is before
    assert np.array_equal(results[0], expected)


def test_the_command_takes_nnunets_arguments(tmp_path, monkeypatch):
    folder = write_model(tmp_path / "results" / MODEL, model_plans(), ORGANS)
    source, threads = write_images(tmp_path / "images", 1), torch.get_num_threads()
    monkeypatch.setattr("nnunetv2.paths.nnUNet_results", str(tmp_path / "results"))
    monkeypatch.setattr(
        "nnunetv2.utilities.file_path_utilities.nnUNet_results", str(tmp_path / "results")
    )
    before = list(sys.argv)
    arguments = f"-i {source} -o {tmp_path / 'out'} -d {DATASET} -c {CONFIGURATION} -f 0"
    arguments += " -device cpu -npp 0 -nps 0 --disable_progress_bar"
    assert cli.main(["nnunet-predict", *arguments.split()]) == 0
    torch.set_num_threads(threads)
    assert sys.argv == before
    expected = loaded(Predictor, folder).predict_from_files_sequential(source, None)
    assert np.array_equal(read(tmp_path / "out" / "case0.nii.gz"), expected[0])
