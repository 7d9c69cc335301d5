"""``nnUNetPredictor`` whose labels need no volume of all classes, and its methods for others."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from copy import deepcopy
from importlib.metadata import version
from types import TracebackType
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.utilities.file_and_folder_operations import save_json
from nnunetv2.configuration import default_num_processes
from nnunetv2.inference import predict_from_raw_data as peer
from nnunetv2.inference.data_iterators import PreprocessAdapterFromNpy
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.inference.sliding_window_prediction import compute_gaussian
from nnunetv2.utilities.helpers import empty_cache
from nnunetv2.utilities.json_export import recursive_fix_for_json_export
from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot
from numpy.typing import NDArray
from torch import Tensor

from voxfuse.integrations.nnunet import inference

#: The versions of nnU-Net whose methods these replace, having been read and tested with.
KNOWN_VERSIONS = ("2.8.1",)

#: What ``patch`` replaces.
_METHODS = (
    "predict_from_files",
    "predict_from_files_sequential",
    "predict_from_data_iterator",
    "predict_single_npy_array",
)
#: What a subclass must not have changed for labels to be made here.
_FOLLOWED = (
    "_internal_get_sliding_window_slicers",
    "_internal_maybe_mirror_and_predict",
    "_internal_predict_sliding_window_return_logits",
    "predict_logits_from_preprocessed_data",
    "predict_sliding_window_return_logits",
)
_ORIGINAL = {name: nnUNetPredictor.__dict__[name] for name in (*_METHODS, *_FOLLOWED)}
#: What ``patch`` has replaced, by name.
_replaced: dict[str, Callable[..., Any]] = {}
_said: set[str] = set()


class Predictor(nnUNetPredictor):  # type: ignore[misc]
    """nnU-Net's predictor with its tiles fused in float32, and labels resampled as they come.

    The constructor, the methods and their arguments are nnU-Net's (2.8). The same tiles, Gaussian,
    mirroring, folds, and separate treatment of a coarse axis; logits are the float64 weighted
    means to rounding, where nnU-Net's half-precision sums are off by up to 0.5. Labels (of
    classes or of regions) are decided slice by slice at the image's resolution, so that neither a
    volume of all classes nor a worker for the export exists; all folds stay on the device.

    Where labels are made another way, nnU-Net's own path is taken, and a warning says so once:
    probabilities, another resampling function or other orders than 1 and 0, label managers or
    subclasses of their own.

    Args:
        args, kwargs: of ``nnUNetPredictor``.

    Example:
        >>> from voxfuse.integrations.nnunet import Predictor  # doctest: +SKIP
        >>> predictor = Predictor(device=torch.device("cuda"))  # doctest: +SKIP
        >>> predictor.initialize_from_trained_model_folder(folder, (0,))  # doctest: +SKIP
        >>> predictor.predict_from_files("imagesTs", "labelsTs")  # doctest: +SKIP
    """

    def predict_from_files(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        num_processes_preprocessing: int = default_num_processes,
        num_processes_segmentation_export: int = default_num_processes,
        folder_with_segs_from_prev_stage: str | None = None,
        num_parts: int = 1,
        part_id: int = 0,
        use_cropped_logits_resampling: bool = False,
    ) -> Any:
        """As nnU-Net's; ``use_cropped_logits_resampling``, TotalSegmentator's, has no effect."""
        cases = _cases(self, locals(), save_probabilities, overwrite, part_id, num_parts)
        if not cases[0]:
            return None
        inputs, outputs, previous = cases
        iterator = self._internal_get_data_iterator_from_lists_of_filenames(
            inputs, previous, outputs, num_processes_preprocessing
        )
        return self.predict_from_data_iterator(
            iterator, save_probabilities, num_processes_segmentation_export
        )

    def predict_from_files_sequential(
        self,
        list_of_lists_or_source_folder: str | list[list[str]],
        output_folder_or_list_of_truncated_output_files: str | list[str] | None,
        save_probabilities: bool = False,
        overwrite: bool = True,
        folder_with_segs_from_prev_stage: str | None = None,
        use_cropped_logits_resampling: bool = False,
    ) -> Any:
        """As nnU-Net's; ``use_cropped_logits_resampling``, TotalSegmentator's, has no effect."""
        cases = _cases(self, locals(), save_probabilities, overwrite, 0, 1)
        if not cases[0]:
            return None
        results = []
        for data, properties, output in _preprocessed(self, *cases):
            print(f"perform_everything_on_device: {self.perform_everything_on_device}")
            result = _case(self, data, properties, output, save_probabilities)
            if output is None:
                results.append(result)
        compute_gaussian.cache_clear()
        empty_cache(self.device)
        return results

    def predict_from_data_iterator(
        self,
        data_iterator: Iterable[dict[str, Any]],
        save_probabilities: bool = False,
        num_processes_segmentation_export: int = default_num_processes,
        use_cropped_logits_resampling: bool = False,
    ) -> list[Any]:
        """As nnU-Net's; ``use_cropped_logits_resampling``, TotalSegmentator's, has no effect."""
        if not _makes_labels(self, save_probabilities):
            own = _replaced.get("predict_from_data_iterator")
            own = own or _ORIGINAL["predict_from_data_iterator"]
            results: list[Any] = own(
                self, data_iterator, save_probabilities, num_processes_segmentation_export
            )
            return results
        results = []
        # Compression leaves the interpreter to the next case's network.
        with ThreadPoolExecutor(1) as writer:
            writing: deque[Future[None]] = deque()
            for item in data_iterator:
                data, output = _loaded(item["data"]), item["ofile"]
                what = f"image of shape {tuple(data.shape)}"
                print(f"\nPredicting {what if output is None else os.path.basename(output)}:")
                labels = inference.predicted_labels(self, data, item["data_properties"])
                if output is None:
                    results.append(labels)
                    continue
                results.append(None)
                if len(writing) > 1:
                    writing.popleft().result()
                arguments = (self, labels, output, item["data_properties"])
                writing.append(writer.submit(_write, *arguments))
            for each in writing:
                each.result()
        if isinstance(data_iterator, MultiThreadedAugmenter):
            data_iterator._finish()
        compute_gaussian.cache_clear()
        empty_cache(self.device)
        return results

    def predict_single_npy_array(
        self,
        input_image: NDArray[Any],
        image_properties: dict[str, Any],
        segmentation_previous_stage: NDArray[Any] | None = None,
        output_file_truncated: str | None = None,
        save_or_return_probabilities: bool = False,
        use_cropped_logits_resampling: bool = False,
    ) -> Any:
        """As nnU-Net's; ``use_cropped_logits_resampling``, TotalSegmentator's, has no effect."""
        adapter = PreprocessAdapterFromNpy(
            [input_image],
            [segmentation_previous_stage],
            [image_properties],
            [output_file_truncated],
            self.plans_manager,
            self.dataset_json,
            self.configuration_manager,
            num_threads_in_multithreaded=1,
            verbose=self.verbose,
        )
        item = next(adapter)
        return _case(
            self,
            item["data"],
            item["data_properties"],
            output_file_truncated,
            save_or_return_probabilities,
        )

    def predict_logits_from_preprocessed_data(self, data: Tensor) -> Tensor:
        """Fused logits (C, x, y, z), the mean of the folds: float32, where nnU-Net's are half."""
        with inference.threads():
            logits = inference.predicted_logits(self, inference.networks(self), data)
        return logits.cpu()

    def predict_sliding_window_return_logits(self, input_image: Tensor) -> Tensor:
        """Fused logits of the network as it is: float32, where nnU-Net's are half."""
        return inference.predicted_logits(self, [self.network], input_image)


class patch(AbstractContextManager["patch"]):
    """Have every ``nnUNetPredictor`` make labels as :class:`Predictor` does.

    For programs that build one themselves: call it once, or use it as a context manager, at whose
    end nnU-Net has its methods back (:meth:`undo` does the same). It replaces
    ``predict_from_files``, ``predict_from_files_sequential``, ``predict_from_data_iterator`` and
    ``predict_single_npy_array``, before or after TotalSegmentator has replaced them.

    Raises:
        RuntimeError: the installed nnU-Net is of a version whose methods are not known here.

    Example:
        >>> import voxfuse.integrations.nnunet  # doctest: +SKIP
        >>> with voxfuse.integrations.nnunet.patch():  # doctest: +SKIP
        ...     totalsegmentator("ct.nii.gz", "segmentations", ml=True)
    """

    def __init__(self) -> None:
        found = version("nnunetv2")
        if found not in KNOWN_VERSIONS:
            raise RuntimeError(
                f"patch: nnU-Net {found} is installed, and its predictor's methods are known of "
                f"{', '.join(KNOWN_VERSIONS)}: others may call what is replaced in another way; "
                "voxfuse.integrations.nnunet.Predictor inherits from whatever is installed"
            )
        #: The methods that this call has replaced; none where they were already.
        self._names = () if _replaced else _METHODS
        for name in self._names:
            _replaced[name] = nnUNetPredictor.__dict__[name]
            setattr(nnUNetPredictor, name, Predictor.__dict__[name])

    def undo(self) -> None:
        """Give nnU-Net its methods back, unless another program has replaced them since."""
        for name in self._names:
            before = _replaced.pop(name)
            if nnUNetPredictor.__dict__[name] is Predictor.__dict__[name]:
                setattr(nnUNetPredictor, name, before)
        self._names = ()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()


def _makes_labels(predictor: Any, probabilities: bool) -> bool:
    """Whether labels are made here; a warning says why they are not, once."""
    reason = "probabilities are asked for" if probabilities else None
    for name in _FOLLOWED:
        found = getattr(type(predictor), name, None)
        if found not in (_ORIGINAL[name], Predictor.__dict__.get(name)):
            reason = reason or f"{type(predictor).__name__} has a {name} of its own"
    reason = reason or inference.resampling_reason(predictor)
    if reason is not None and reason not in _said:
        _said.add(reason)
        warnings.warn(f"voxfuse: this model is exported by nnU-Net, because {reason}", stacklevel=4)
    return reason is None


def _case(
    predictor: Any,
    data: Tensor,
    properties: dict[str, Any],
    output: str | None,
    probabilities: bool,
) -> Any:
    """What nnU-Net returns of a case, or None where it is written to a file."""
    if _makes_labels(predictor, probabilities):
        labels = inference.predicted_labels(predictor, data, properties)
        return labels if output is None else _write(predictor, labels, output, properties)
    logits = predictor.predict_logits_from_preprocessed_data(data).cpu()
    plans, configuration = predictor.plans_manager, predictor.configuration_manager
    # Looked up where others replace them.
    if output is not None:
        return peer.export_prediction_from_logits(
            logits, properties, configuration, plans, predictor.dataset_json, output, probabilities
        )
    return peer.convert_predicted_logits_to_segmentation_with_correct_shape(
        logits, plans, configuration, predictor.label_manager, properties, probabilities
    )


def _write(predictor: Any, labels: NDArray[Any], output: str, properties: dict[str, Any]) -> None:
    writer = predictor.plans_manager.image_reader_writer_class()
    writer.write_seg(labels, output + predictor.dataset_json["file_ending"], properties)


def _cases(
    predictor: Any,
    arguments: dict[str, Any],
    save_probabilities: bool,
    overwrite: bool,
    part_id: int,
    num_parts: int,
) -> tuple[list[list[str]], list[str] | None, list[str | None]]:
    """nnU-Net's lists of input and output files, after it has noted what it was called with."""
    if not 0 <= part_id < num_parts:
        raise ValueError(f"part_id: got {part_id}, expected 0 to {num_parts - 1}")
    arguments = {name: value for name, value in arguments.items() if name != "self"}
    outputs = arguments["output_folder_or_list_of_truncated_output_files"]
    if outputs is not None:
        folder = outputs if isinstance(outputs, str) else os.path.dirname(outputs[0]) or "."
        os.makedirs(folder, exist_ok=True)
        noted = deepcopy(arguments)
        recursive_fix_for_json_export(noted)
        save_json(noted, os.path.join(folder, "predict_from_raw_data_args.json"))
        for name, content in (
            ("dataset", predictor.dataset_json),
            ("plans", predictor.plans_manager.plans),
        ):
            save_json(content, os.path.join(folder, f"{name}.json"), sort_keys=False)
    previous = arguments["folder_with_segs_from_prev_stage"]
    stage = predictor.configuration_manager.previous_stage_name
    if stage is not None and previous is None:
        raise ValueError(
            f"folder_with_segs_from_prev_stage: got None, but this configuration takes the "
            f"segmentations of {stage} as input"
        )
    lists: tuple[list[list[str]], list[str] | None, list[str | None]]
    lists = predictor._manage_input_and_output_lists(
        arguments["list_of_lists_or_source_folder"],
        outputs,
        previous,
        overwrite,
        part_id,
        num_parts,
        save_probabilities,
    )
    return lists


def _preprocessed(
    predictor: Any,
    inputs: list[list[str]],
    outputs: list[str] | None,
    previous: list[str | None],
) -> Iterator[tuple[Tensor, dict[str, Any], str | None]]:
    """Cases preprocessed one after the other: data, properties, output file."""
    configuration = predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=predictor.verbose)
    names: list[str | None] = [None] * len(inputs) if outputs is None else list(outputs)
    for files, output, stage in zip(inputs, names, previous, strict=True):
        data, labels, properties = preprocessor.run_case(
            files, stage, predictor.plans_manager, configuration, predictor.dataset_json
        )
        if stage is not None:
            foreground = predictor.label_manager.foreground_labels
            data = np.vstack((data, convert_labelmap_to_one_hot(labels[0], foreground, data.dtype)))
        yield torch.from_numpy(data), properties, output


def _loaded(data: Tensor | str) -> Tensor:
    """A case's data, which nnU-Net's workers may have left in a file."""
    if isinstance(data, Tensor):
        return data
    array = np.load(data)
    os.remove(data)
    return torch.from_numpy(array)
