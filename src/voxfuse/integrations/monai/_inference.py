"""MONAI's sliding window on the streaming patch fusion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from voxfuse.fusion.batches import Batches
from voxfuse.fusion.heads import HeadLike
from voxfuse.fusion.importance import importance
from voxfuse.fusion.network import Network, Predictor
from voxfuse.fusion.options import FusionOptions
from voxfuse.fusion.orientations import Augmentation
from voxfuse.fusion.padded_volume import PaddedVolume
from voxfuse.fusion.sliding_window import check_buffer, infer
from voxfuse.fusion.windows import WindowLike


def sliding_window_inference(
    inputs: Tensor,
    roi_size: Sequence[int | None] | int,
    sw_batch_size: int,
    predictor: Predictor | Sequence[Predictor],
    overlap: Sequence[float] | float = 0.25,
    mode: str = "constant",
    sigma_scale: Sequence[float] | float = 0.125,
    padding_mode: str = "constant",
    cval: float = 0.0,
    sw_device: torch.device | str | None = None,
    device: torch.device | str | None = None,
    progress: bool = False,
    roi_weight_map: Tensor | None = None,
    process_fn: Callable[..., Any] | None = None,
    buffer_steps: int | None = None,
    buffer_dim: int = -1,
    with_coord: bool = False,
    *args: Any,
    window: WindowLike | None = None,
    output: str = "logits",
    out: Any = None,
    tta: Augmentation = None,
    head: HeadLike = None,
    activation: str = "none",
    voting: str | None = None,
    threshold: float | None = None,
    **kwargs: Any,
) -> Any:
    r"""``monai.inferers.sliding_window_inference``, argument by argument (MONAI 1.6), fused here.

    ``process_fn``, four spatial axes, weights by channel and predictions that require a gradient
    are added by PyTorch, as MONAI does; ``docs/differences.md`` says what differs.

    Args:
        window: weights of a patch's voxels, in place of ``mode`` and ``roi_weight_map``; see
            :func:`voxfuse.overlap_add`.
        output, out, tta, head, activation, voting, threshold: as for
            :func:`voxfuse.sliding_window_inference`. With an output other than "logits" patches
            are predicted in the order that keeps the least memory, which need not be MONAI's. Only
            "logits" without ``head`` carry a gradient.

    Raises:
        TypeError: an argument has a wrong type or dtype.
        ValueError: shapes or options do not fit.

    Example:
        >>> import torch
        >>> from voxfuse.integrations.monai import sliding_window_inference
        >>> volume = torch.rand(1, 1, 40, 30, 20)
        >>> result = sliding_window_inference(volume, (16, 16, 16), 4, lambda x: 2 * x, 0.5)
        >>> torch.allclose(result, 2 * volume)
        True
    """
    volume = PaddedVolume(
        inputs, roi_size, overlap, "shifted", padding_mode, cval, kwargs.get("condition")
    )
    check_buffer(buffer_steps, buffer_dim, len(volume.spatial))
    network = Network(
        predictor,
        volume,
        args,
        kwargs,
        tta=tta,
        head=head,
        activation=activation,
        voting=voting,
        process_fn=process_fn,
        with_coord=with_coord,
        sw_device=sw_device,
        device=device,
    )
    options = FusionOptions(
        network.heads.classes,
        output,
        activation,
        network.heads.voting,
        threshold,
        members=network.members,
        dtype=inputs.dtype if inputs.is_floating_point() else None,
    )
    weights = importance(volume.roi, window, mode, sigma_scale, roi_weight_map)
    # Means are summed in the result itself, and MONAI's order of patches costs nothing.
    placement = volume.placement(0 if output == "logits" else "auto")
    batches = Batches(volume, network, weights, sw_batch_size, padded=False)
    return infer(volume, placement, network, batches, options, out, progress)
