"""The public patch fusion call: windows by name, patches anywhere or on a grid."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from voxfuse.fusion.grids import Grid, Origins, checked_origins, tables_for_origins
from voxfuse.fusion.windows import WindowLike
from voxfuse.ops import _checks
from voxfuse.ops import overlap_add as operators


def overlap_add(
    patches: Tensor,
    origins: Origins,
    volume_shape: Sequence[int],
    window: WindowLike = "bspline",
    *,
    activation: str = "none",
    backend: str = "auto",
) -> Tensor:
    r"""Fuse overlapping patches into a volume: their weighted mean at every voxel.

    .. math:: V(x) = \sum_i w(x - o_i) P_i(x - o_i) \Big/ \sum_i w(x - o_i)

    The weights are normalised in float64. Where the origins are a Cartesian product and the window
    is a product of axes, they are normalised an axis before the addition, so that neither a volume
    of weights nor a division is needed; a voxel under one patch is that patch's value exactly.

    Args:
        patches: (N, C, \*patch), 1 to 3 spatial axes; float32, float16, bfloat16 or float64; any
            device.
        origins: first voxels of the patches, which may lie outside the volume (what sticks out is
            left out): an (N, n) integer tensor or array, a :class:`~voxfuse.fusion.grids.Grid`, or
            a list of the starts along each axis, whose combinations, last axis fastest, are the
            patches.
        volume_shape: extent of the result.
        window: "bspline" (order 5), "bspline0" to "bspline9", "hashemi", "gaussian",
            "nnunet_gaussian", "monai_gaussian", "hann", "constant"; or an array of the patch's
            shape, or one vector an axis, with weights >= 0.
        activation: "none", or what is made of every patch before it is weighted, inside the kernel
            and without a copy of the patches: "softmax" over the channels, or "sigmoid". Computed
            in the accumulation's dtype; infinities and NaN as in ``torch.softmax``.
        backend: "auto", "cpp", "cuda", "triton" or "reference"; see :func:`voxfuse.backends`.

    Returns:
        (C, \*volume) in the patches' dtype; accumulated in float32, or float64 for float64
        patches, in patch order, and rounded once: probabilities of float16 patches are float16.
        Uncovered voxels are 0. Differentiable in ``patches``; with an activation they are kept for
        the backward pass, which activates them again, and cannot be differentiated once more.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes, devices or options do not fit.

    Example:
        >>> import torch, voxfuse
        >>> patches = torch.tensor([[[1.0, 1.0, 1.0, 1.0]], [[2.0, 2.0, 2.0, 2.0]]])
        >>> voxfuse.overlap_add(patches, [[0, 2]], (6,), window="constant")
        tensor([[1.0000, 1.0000, 1.5000, 1.5000, 2.0000, 2.0000]])
    """
    patches = _checks.require_tensor("patches", patches)
    if not 3 <= patches.ndim <= 5:
        raise ValueError(
            f"patches: got shape {tuple(patches.shape)}, expected (N, C, *patch) with 1 to 3 "
            "spatial axes"
        )
    if len(volume_shape) != patches.ndim - 2:
        raise ValueError(
            f"volume_shape: got {tuple(volume_shape)}, expected {patches.ndim - 2} sizes to go "
            f"with patches of shape {tuple(patches.shape)}"
        )
    volume_shape = _checks.integers("volume_shape", volume_shape)
    patch_shape = tuple(patches.shape[2:])
    places = checked_origins(origins, volume_shape, patch_shape, len(patches))
    if len(places) != len(patches):
        raise ValueError(
            f"origins: are {len(places)}, but there are {patches.shape[0]} patches, of shape "
            f"{tuple(patches.shape)} (an (N, n) tensor gives origins, a list of lists the starts "
            "along each axis)"
        )
    if isinstance(places, Grid):
        tables = places.tables(window)
    else:
        tables = tables_for_origins(places, window, volume_shape, patch_shape)
    total = None if tables.total is None else tables.total.to(patches.device)
    return operators.overlap_add(
        patches,
        tables.origins,
        tables.rows,
        tables.weights,
        volume_shape,
        total=total,
        activation=activation,
        backend=backend,
    )
