"""Networks by name, with the options that a configuration gives them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from voxfuse.losses.declared import did_you_mean
from voxfuse.training.networks.fc_densenet import FCDenseNet
from voxfuse.training.networks.unet import UNet

__all__ = ["NETWORKS", "FCDenseNet", "UNet", "check_patch", "make_network"]

#: The networks that have a name; the first is the default.
NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "unet": UNet,
    "unet_salehi2017": partial(
        UNet, features=(8, 16, 32, 64, 128, 256), norm="none", negative_slope=0.0
    ),
    "fc_densenet": FCDenseNet,
    "fc_densenet_compact": partial(FCDenseNet, compact=True),
}


def make_network(
    name: str, channels: int, classes: int, options: Mapping[str, Any] | None = None
) -> nn.Module:
    r"""Make a network that maps (B, ``channels``, \*spatial) to logits (B, ``classes``, \*spatial).

    Args:
        name: one of :data:`NETWORKS`, or ``"package.module:Class"``: any callable that returns an
            ``nn.Module`` and takes ``channels`` and ``classes``, or ``in_channels`` and
            ``out_channels`` (MONAI's names). While it trains it may return a list of outputs, the
            finest first (deep supervision).
        channels: of the input, its modalities.
        classes: with the background.
        options: passed on by name.

    Raises:
        ValueError: an unknown name, nothing of that name in the module, or an option that the
            network does not have; the message names the nearest one.
        ModuleNotFoundError: there is no such module.

    Example:
        >>> from voxfuse.training.networks import make_network
        >>> network = make_network("unet", 2, 2, {"features": [4, 8]})
        >>> sum(weight.numel() for weight in network.parameters())
        4870
    """
    given = dict(options or {})
    made = NETWORKS.get(name)
    if made is None:
        made = _imported(name)
    known = inspect.signature(made).parameters
    names = _names_of_counts(name, known)
    free = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for option in given:
        if option in names:
            raise ValueError(
                f"network.{option}: it follows from the data, got {given[option]!r} besides"
            )
        if option not in known and not free:
            allowed = [x for x in known if x not in names]
            raise ValueError(
                f"network.{option}: not an option of {name}, which has {', '.join(allowed)}"
                + did_you_mean(option, allowed)
            )
    network = made(**dict(zip(names, (channels, classes), strict=True)), **given)
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"network.name: {name} made a {type(network).__name__}, expected an nn.Module"
        )
    return network


def _imported(name: str) -> Callable[..., nn.Module]:
    """What ``package.module:Class`` stands for."""
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(
            f"network.name: got {name!r}, expected one of {', '.join(NETWORKS)}, or "
            f"'package.module:Class'{did_you_mean(name, NETWORKS)}"
        )
    found = getattr(importlib.import_module(module), attribute, None)
    if not callable(found):
        raise ValueError(f"network.name: {module} has nothing to call that is named {attribute}")
    made: Callable[..., nn.Module] = found
    return made


def _names_of_counts(name: str, known: Mapping[str, Any]) -> tuple[str, str]:
    """What the network calls its input's channels and its classes."""
    for names in (("channels", "classes"), ("in_channels", "out_channels")):
        if all(x in known for x in names):
            return names
    raise ValueError(
        f"network.name: {name} takes {', '.join(known)}, expected channels and classes, or "
        "in_channels and out_channels, among them"
    )


def check_patch(network: nn.Module, patch: Sequence[int], batch: int) -> None:
    """Raise where patches of this extent do not go through one of voxfuse's networks.

    Args:
        network: another one than voxfuse's is not looked at: it has no ``factor``.
        patch: extent in voxels.
        batch: patches a step.

    Raises:
        ValueError: the extent is no multiple of the network's factor; or its coarsest level has one
            voxel, of which a normalisation makes zeros (over the voxels of a patch; over the batch,
            if that is one patch).
    """
    factor = getattr(network, "factor", None)
    if not isinstance(factor, int):
        return
    listed = " x ".join(map(str, patch))
    if any(n % factor for n in patch):
        raise ValueError(
            f"sampling.patch: got {listed} voxels, expected multiples of {factor}, by which the "
            "network's coarsest level is coarser"
        )
    over = getattr(network, "normalised_over", "none")
    if all(n == factor for n in patch) and (over == "patch" or (over == "batch" and batch == 1)):
        rest = " or sampling.batch of 2 and more" if over == "batch" else ""
        raise ValueError(
            f"sampling.patch: got {listed} voxels, of which the network's coarsest level makes one;"
            f" normalised alone it is always 0. Expected {2 * factor} voxels along an axis{rest}"
        )
