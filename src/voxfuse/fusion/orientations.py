"""Test-time augmentation by flips: which axes each prediction of a patch is mirrored along."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, combinations

from torch import Tensor

#: What ``tta=`` accepts: None, "mirror", "rotations", or the axes to flip for each prediction.
Augmentation = str | Sequence[Sequence[int]] | None


def flips(tta: Augmentation, axes: int) -> list[tuple[int, ...]]:
    """Return the spatial axes to flip for each prediction of a patch.

    Args:
        tta: None (the patch as it is); "mirror" (every subset of the axes, as nnU-Net); "rotations"
            (as it is and turned by 180 degrees in each plane of two axes: Hashemi et al. 2018); or
            a list of tuples of axes, such as ``[(), (0,), (0, 2)]``.
        axes: number of spatial axes.

    Raises:
        ValueError: an unknown name, an axis out of range, or the same flip twice.

    Example:
        >>> from voxfuse.fusion.orientations import flips
        >>> flips("rotations", 3)
        [(), (0, 1), (0, 2), (1, 2)]
    """
    if tta is None:
        return [()]
    everything = range(axes)
    if tta == "mirror":
        return list(chain.from_iterable(combinations(everything, n) for n in range(axes + 1)))
    if tta == "rotations":
        return [(), *combinations(everything, 2)]
    expected = f"None, 'mirror', 'rotations' or a list of tuples of axes in [0, {axes})"
    if isinstance(tta, str):
        raise ValueError(f"tta: got {tta!r}, expected {expected}")
    try:
        chosen = [tuple(sorted(int(axis) for axis in flip)) for flip in tta]
    except TypeError:
        raise ValueError(f"tta: got {tta!r}, expected {expected}") from None
    valid = all(set(flip) <= set(everything) and len(set(flip)) == len(flip) for flip in chosen)
    if not chosen or not valid or len(set(chosen)) != len(chosen):
        raise ValueError(f"tta: got {tta!r}, expected {expected}, each once")
    return chosen


def turned(patches: Tensor, axes: Sequence[int]) -> Tensor:
    """Patches (N, C, \\*patch) mirrored along spatial ``axes``, or mirrored ones turned back."""
    return patches.flip([axis + 2 for axis in axes]) if axes else patches
