"""MONAI's inferers with the fused sliding window; importing this imports MONAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import monai.inferers
from torch import Tensor

from voxfuse.fusion.heads import HeadLike
from voxfuse.fusion.orientations import Augmentation
from voxfuse.fusion.windows import WindowLike
from voxfuse.integrations.monai._inference import sliding_window_inference


class SlidingWindowInferer(monai.inferers.SlidingWindowInferer):  # type: ignore[misc]
    """``monai.inferers.SlidingWindowInferer`` on the fused sliding window: same arguments.

    Args:
        window, output, tta, head, activation, voting, threshold: further ones, of every call; see
            :func:`voxfuse.integrations.monai.sliding_window_inference`. A call takes them too, and
            ``out=``.
        args, kwargs: MONAI's.
    """

    def __init__(
        self,
        *args: Any,
        window: WindowLike | None = None,
        output: str = "logits",
        tta: Augmentation = None,
        head: HeadLike = None,
        activation: str = "none",
        voting: str | None = None,
        threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.fusion = {
            "window": window,
            "output": output,
            "tta": tta,
            "head": head,
            "activation": activation,
            "voting": voting,
            "threshold": threshold,
        }

    def __call__(
        self, inputs: Tensor, network: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        condition = kwargs.get("condition")
        if condition is not None and condition.shape != inputs.shape:
            raise ValueError(
                f"condition: got shape {tuple(condition.shape)}, expected that of inputs, "
                f"{tuple(inputs.shape)}"
            )
        device = kwargs.pop("device", self.device)
        buffer_steps = kwargs.pop("buffer_steps", self.buffer_steps)
        buffer_dim = kwargs.pop("buffer_dim", self.buffer_dim)
        large = self.cpu_thresh is not None and inputs.shape[2:].numel() > self.cpu_thresh
        if device is None and large:
            device = "cpu"
        return sliding_window_inference(
            inputs,
            self.roi_size,
            self.sw_batch_size,
            network,
            self.overlap,
            self.mode,
            self.sigma_scale,
            self.padding_mode,
            self.cval,
            self.sw_device,
            device,
            self.progress,
            self.roi_weight_map,
            None,
            buffer_steps,
            buffer_dim,
            self.with_coord,
            *args,
            **(self.fusion | kwargs),
        )


class SlidingWindowInfererAdapt(
    monai.inferers.SlidingWindowInfererAdapt,  # type: ignore[misc]
    SlidingWindowInferer,
):
    """``monai.inferers.SlidingWindowInfererAdapt``: to the CPU when the GPU's memory is full.

    MONAI's class decides where to stitch and calls the next class, which is the fused one.
    """
