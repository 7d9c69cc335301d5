"""What is changed in a patch. Every random number is a function of (seed, step).

A step of augmentation is a function of a patch and a generator that returns a patch; which steps
there are, and in which order, is said by :func:`steps_of` alone.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from voxfuse.losses.declared import did_you_mean
from voxfuse.metrics._arrays import optional
from voxfuse.training.config import AugmentationOptions
from voxfuse.training.sampling import Patch

#: A step: it may write into what it returns, not into what it was given.
Step = Callable[[Patch, np.random.Generator], Patch]

#: Options of MONAI's that may have one value a key.
_PER_KEY = (
    *("mode", "padding_mode", "align_corners", "dtype"),
    *("grid_mode", "grid_padding_mode", "grid_align_corners"),
)

#: MONAI's smooth fields and lower resolutions change intensities, whatever their module says.
_OF_INTENSITY = ("SmoothFieldAdjust", "SimulateLowResolution")

#: Identity and the 180-degree rotations about each axis, as flips of two axes.
ROTATIONS: tuple[tuple[int, ...], ...] = ((), (1, 2), (0, 2), (0, 1))

#: Of the released code, which draws a number anew for every branch: 5/12, 1/4, 7/36, 5/36.
RELEASED = (0.42, 0.25, 0.19, 0.14)


def steps_of(options: AugmentationOptions) -> list[Step]:
    """The steps that a configuration asks for: space, then intensity, then MONAI's transforms.

    Raises:
        ValueError: MONAI has no transform of that name, or it does not take these options.
        ModuleNotFoundError: MONAI is asked for and not installed.
    """
    steps: list[Step] = []
    if options.flips != "none":
        steps.append(Flips(options.flips))
    if options.scale or options.shift:
        steps.append(Intensity(options.scale, options.shift))
    steps += [MonaiTransform(transform) for transform in options.monai]
    return steps


class Flips:
    """Mirror axes, or turn by 180 degrees: the section's ``flips``."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.probabilities = np.cumsum(RELEASED if kind == "released" else [0.25] * 4)

    def __call__(self, patch: Patch, random: np.random.Generator) -> Patch:
        """A view of the patch."""
        if self.kind == "mirror":
            axes = tuple(int(axis) for axis in np.flatnonzero(random.random(3) < 0.5))
        else:
            drawn = int(np.searchsorted(self.probabilities, random.random(), side="right"))
            axes = ROTATIONS[min(drawn, 3)]
        if not axes:
            return patch
        return Patch(
            np.flip(patch.image, tuple(axis + 1 for axis in axes)),
            np.flip(patch.label, axes),
            np.flip(patch.mask, axes),
        )


class Intensity:
    """``x (1 + s) + t`` a modality inside the mask, s and t uniform in +- scale and +- shift."""

    def __init__(self, scale: float, shift: float) -> None:
        self.scale, self.shift = scale, shift

    def __call__(self, patch: Patch, random: np.random.Generator) -> Patch:
        """A patch with another image."""
        drawn = random.uniform(-1, 1, (2, patch.image.shape[0], 1, 1, 1)).astype(np.float32)
        image = patch.image * (1 + self.scale * drawn[0])
        image += self.shift * drawn[1] * patch.mask
        return Patch(image, patch.label, patch.mask)


class MonaiTransform:
    """A dictionary transform of MONAI's by name, seeded from the step's numbers.

    Args:
        transform: ``name``, and the options that the transform takes. ``keys`` is ["image"] for
            transforms of intensity, else ["image", "label", "mask"], with "bilinear" for the image
            and "nearest" for the others where there is such an option. The mask follows the label
            wherever ``keys`` has image and label.
    """

    def __init__(self, transform: Mapping[str, Any]) -> None:
        transforms = optional("monai.transforms", "augmentation.monai")
        options = dict(transform)
        self.name = name = options.pop("name")
        made = getattr(transforms, name, None)
        if not isinstance(made, type) or not issubclass(made, transforms.MapTransform):
            known = [x for x in dir(transforms) if x.endswith("d")]
            raise ValueError(
                f"augmentation.monai: MONAI has no dictionary transform {name!r}"
                + did_you_mean(name, known)
            )
        if ".intensity." in made.__module__ or any(x in name for x in _OF_INTENSITY):
            options.setdefault("keys", ["image"])
        else:
            options.setdefault("keys", ["image", "label"])
            parameters = inspect.signature(made).parameters
            if options["keys"] == ["image", "label"]:
                options["keys"] = ["image", "label", "mask"]
                for key in ("mode", "grid_mode"):
                    if key in parameters:
                        options.setdefault(key, ["bilinear", "nearest"])
                for key in _PER_KEY:
                    value = options.get(key)
                    if isinstance(value, list) and len(value) == 2:
                        options[key] = [*value, value[1]]
        try:
            self.transform: Any = made(**options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"augmentation.monai: {name}: {error}") from None

    def __call__(self, patch: Patch, random: np.random.Generator) -> Patch:
        """The transform's image, label and mask."""
        seed = int(random.integers(2**31))
        if hasattr(self.transform, "set_random_state"):
            self.transform.set_random_state(seed=seed)
        # Copies: some of MONAI's write into what they are given, which is a view of the volume.
        given = {
            "image": torch.from_numpy(patch.image.copy()),
            "label": torch.from_numpy(patch.label.copy())[None],
            "mask": torch.from_numpy(patch.mask.astype(np.uint8, order="C"))[None],
        }
        try:
            made = self.transform(given)
        except Exception as error:  # MONAI's are of many kinds, and do not say whose they are
            text = str(error) or type(error).__name__
            raise ValueError(f"augmentation.monai: {self.name}: {text}") from error
        image, label, mask = (np.asarray(made[key]) for key in ("image", "label", "mask"))
        for name, array, before in (
            ("image", image, patch.image),
            ("label", label[0], patch.label),
        ):
            if array.shape != before.shape:
                raise ValueError(
                    f"augmentation.monai: {self.name} made {name} {array.shape} of {before.shape}, "
                    "expected the same shape"
                )
        return Patch(image.astype(np.float32), self._classes(label[0], patch.label), mask[0] > 0.5)

    def _classes(self, label: Any, before: Any) -> Any:
        """The label, whose classes are those of before and the background."""
        classes = label.astype(np.uint8)
        known = np.zeros(256, bool)
        known[before] = True
        known[0] = True
        wrong = label[(classes != label) | ~known[classes]]
        if wrong.size:
            raise ValueError(
                f"augmentation.monai: {self.name} made {wrong[0]:g} of a label of the classes "
                f"{np.flatnonzero(known).tolist()}: give 'label' mode 'nearest', or leave it out "
                "of keys"
            )
        return classes
