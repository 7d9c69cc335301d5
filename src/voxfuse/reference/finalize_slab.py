"""Finished slices of a ring turned into results, in plain PyTorch: the truth for every kernel.

The ring (K, \\*extent) holds the weighted sums of the patches; the slices ``start <= x < stop`` of
its axis ``ring_axis`` lie in the slots ``x % extent[ring_axis]``. A voxel's values are::

    f = ring / divisor                      K values
    z = weight f + bias                     C values (z = f without a head)
    p = activation(z)                       unless the patches went through it already

and the result is p (values), the index of the greatest (labels), p > threshold (mask), the greatest
of the foreground, or the entropy. Where ``total`` is 0 no patch lies and the result is ``fill``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from voxfuse.contract import Activation, Finish


def finalize_slab(
    ring: Tensor,
    out: Tensor,
    total: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    ring_axis: int,
    start: int,
    stop: int,
    activation: int,
    applied: bool,
    mode: int,
    divisor: float,
    threshold: float,
    fill: float,
    clear: bool,
) -> None:
    """Write the slab into ``out`` and, if ``clear``, zeros into the ring where it was."""
    depth = ring.shape[1 + ring_axis]
    done = start
    while done < stop:
        slot = done % depth
        size = min(stop - done, depth - slot)
        values = ring.narrow(1 + ring_axis, slot, size)
        target = out.narrow(1 + ring_axis, done - start, size)
        result = _result(values / divisor, weight, bias, activation, applied, mode, threshold)
        if total is not None:
            covered = total.narrow(ring_axis, slot, size) != 0
            result = torch.where(covered, result, torch.tensor(fill).to(result))
        target.copy_(result)
        if clear:
            values.zero_()
        done += size


def _result(
    values: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: int,
    applied: bool,
    mode: int,
    threshold: float,
) -> Tensor:
    if weight is not None:
        assert bias is not None
        shape = values.shape
        values = torch.addmm(bias.unsqueeze(1), weight, values.flatten(1))
        values = values.unflatten(1, shape[1:])
    if mode == Finish.labels:
        return values.argmax(0, keepdim=True)
    if not applied and activation == Activation.sigmoid:
        values = values.sigmoid()
    elif not applied and activation == Activation.softmax:
        values = values.softmax(0)
    if mode == Finish.mask:
        return values > threshold
    channels = activation == Activation.sigmoid or values.shape[0] == 1
    if mode == Finish.foreground:
        return values[0 if channels else 1 :].amax(0, keepdim=True)
    if mode == Finish.entropy:
        surprise = -torch.xlogy(values, values)
        if channels:
            surprise = surprise - torch.xlogy(1 - values, 1 - values)
        return surprise.sum(0, keepdim=True)
    return values
