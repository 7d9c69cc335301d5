"""The optimiser of a run, and the learning rate of a step."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from voxfuse.training.config import ConfigError, OptimiserOptions


def make_optimiser(network: nn.Module, options: OptimiserOptions) -> torch.optim.Optimizer:
    """AdamW, Adam or SGD over the network's parameters.

    Args:
        network: what is trained.
        options: the section ``[optimiser]``.

    Raises:
        ConfigError: ``undecayed`` holds no regular expression, or one that matches no parameter.
    """
    decayed: list[nn.Parameter] = []
    undecayed: list[nn.Parameter] = []
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    for pattern in options.undecayed:
        try:
            found = any(re.search(pattern, name) for name, _ in named)
        except re.error as error:
            raise ConfigError(f"optimiser.undecayed: got {pattern!r}: {error}") from None
        if not found:
            listed = ", ".join(name for name, _ in named[:5])
            raise ConfigError(
                f"optimiser.undecayed: {pattern!r} matches none of the parameters {listed}, ..."
            )
    for name, parameter in named:
        free = any(re.search(pattern, name) for pattern in options.undecayed)
        (undecayed if free else decayed).append(parameter)
    every: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": options.weight_decay},
        {"params": undecayed, "weight_decay": 0.0},
    ]
    groups = [group for group in every if group["params"]]
    rate = options.learning_rate
    if options.name == "SGD":
        nesterov = options.momentum > 0
        return torch.optim.SGD(groups, rate, momentum=options.momentum, nesterov=nesterov)
    if options.name == "Adam":
        return torch.optim.Adam(groups, rate)
    return torch.optim.AdamW(groups, rate)


def learning_rate(options: OptimiserOptions, step: int, steps: int) -> float:
    r"""The learning rate of a step, from 0.

    "polynomial": ``lr (1 - step / steps)^power``. "decay": ``lr factor^floor(step / every)``, the
    schedule of Hashemi et al. 2018 (0.95, 500) and of Salehi et al. 2017 (0.9, 1000). "released":
    the same with one factor more, as Hashemi's code has it, which decays at step 0 too.

    Example:
        >>> from voxfuse.training.config import OptimiserOptions
        >>> from voxfuse.training.optimisers import learning_rate
        >>> options = OptimiserOptions(learning_rate=1.0, schedule="decay", decay_factor=0.5)
        >>> [learning_rate(options, step, 2000) for step in (0, 499, 500, 1000)]
        [1.0, 1.0, 0.5, 0.25]
    """
    if options.schedule == "polynomial":
        return options.learning_rate * float((1 - step / steps) ** options.power)
    if options.schedule == "constant":
        return options.learning_rate
    decays = step // options.decay_steps + (options.schedule == "released")
    return options.learning_rate * float(options.decay_factor**decays)


def forgets(options: OptimiserOptions, step: int) -> bool:
    """Whether the optimiser's moments start anew at this step (Hashemi's code re-compiles)."""
    return options.schedule == "released" and step % options.decay_steps == 0
