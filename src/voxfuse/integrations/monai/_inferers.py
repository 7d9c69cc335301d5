"""MONAI's inferers with the fused sliding window; importing this imports MONAI."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import monai.inferers
from torch import Tensor

from voxfuse.integrations.monai._inference import sliding_window_inference


class SlidingWindowInferer(monai.inferers.SlidingWindowInferer):  # type: ignore[misc]
    """``monai.inferers.SlidingWindowInferer`` on the fused sliding window: same arguments."""

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
            **kwargs,
        )


class SlidingWindowInfererAdapt(
    monai.inferers.SlidingWindowInfererAdapt,  # type: ignore[misc]
    SlidingWindowInferer,
):
    """``monai.inferers.SlidingWindowInfererAdapt``: to the CPU when the GPU's memory is full.

    MONAI's class decides where to stitch and calls the next class, which is the fused one.
    """
