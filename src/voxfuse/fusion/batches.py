"""Patches predicted batch by batch; where asked for, in batches that are always full."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from voxfuse.fusion.importance import Importance
from voxfuse.fusion.network import Member, Network
from voxfuse.fusion.padded_volume import PaddedVolume

#: A patch: the number of its sample, and its origin.
Place = tuple[int, list[int]]


class Batches:
    """The patches of a volume through a network, at most ``size`` at a time.

    Libraries choose their kernels by the size of a batch, and the bits of a prediction may depend
    on it. With ``padded`` every batch is full, the last one too.
    """

    def __init__(
        self,
        volume: PaddedVolume,
        network: Network,
        weights: Importance,
        size: int,
        *,
        padded: bool,
    ) -> None:
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"sw_batch_size: got {size!r}, expected an integer >= 1")
        if padded and network.process_fn is not None:
            raise ValueError(
                "process_fn: got one with full batches (pad_batches=True, or region=), of which it "
                "would see the padding"
            )
        self._volume, self._network, self._weights = volume, network, weights
        self.size, self.padded = size, padded

    def predict(self, places: Sequence[Place]) -> tuple[list[Member], Importance]:
        """The predictions of at most ``size`` patches, and their weights."""
        given = self._full(places) if self.padded else list(places)
        members, weights = self._network.predict(
            self._volume.cut(given, self._network.device), self._weights
        )
        if len(given) > len(places):
            count = len(places)
            members = [Member(m.flip, m.keys, [t[:count] for t in m.outputs]) for m in members]
        return members, weights

    def probe(
        self, places: Sequence[Place], digest: Callable[[Tensor], str] = lambda output: ""
    ) -> Probe:
        """Try the network with a full batch of at most ``size`` patches; see :func:`apart`.

        Args:
            places: the patches.
            digest: what is kept of every output.
        """
        full = self._full(places)
        members = [member.outputs for member in self.predict(full)[0]]
        return Probe(
            self,
            full,
            {k: [[t[k : k + 1].clone() for t in m] for m in members] for k in _two_of(len(places))},
            [[digest(t) for t in m] for m in members],
        )

    def settle(self, places: Sequence[Place]) -> None:
        """Turn to batches of one, with a warning, if bits depend on what a batch is made of.

        Tried with a batch of patches that lie apart from each other.
        """
        if not self.padded or self.size == 1 or not places:
            return
        if not self.probe([places[k] for k in apart(len(places), self.size)]).steady():
            warn_of(self.size, 4)
            self.size = 1

    def _full(self, places: Sequence[Place]) -> list[Place]:
        return [*places, *[places[-1]] * (self.size - len(places))]


@dataclass(frozen=True)
class Probe:
    """What a network makes of one full batch: of one patch or two, and digests of all of it.

    Both are by members and outputs. The whole of it is not kept: it is as large as what the network
    returns.
    """

    batches: Batches
    places: Sequence[Place]
    outputs: dict[int, list[list[Tensor]]]  #: by the number of the patch
    digests: list[list[str]]

    def steady(self) -> bool:
        """Whether a patch's bits are the same wherever in a batch it is, whatever is beside it.

        Two patches fill batches of their own, so that what depends on the place in a batch shows,
        and what depends on the other patches in it, the largest value among them, say.
        """
        return all(
            same_bits(once, again)
            for k, members in self.outputs.items()
            for outputs, repeated in zip(members, self._filled_with(k), strict=True)
            for once, again in zip(outputs, repeated, strict=True)
        )

    def _filled_with(self, k: int) -> list[list[Tensor]]:
        members, _ = self.batches.predict([self.places[k]] * len(self.places))
        return [member.outputs for member in members]


def _two_of(count: int) -> list[int]:
    """The numbers of the patches that a probe keeps."""
    return sorted({0, count // 2})


def held_by_probe(size: int) -> int:
    """Predictions that are in memory at once while a batch of ``size`` is tried."""
    return size + len(_two_of(size))


def apart(count: int, size: int) -> list[int]:
    """The numbers of at most ``size`` of ``count`` patches, spread evenly over them."""
    return [k * count // min(size, count) for k in range(min(size, count))]


def warn_of(size: int, stacklevel: int) -> None:
    """Say that patches are predicted one by one, and why."""
    warnings.warn(
        f"predictor: a patch's prediction has other bits at another place of a batch of {size}, or "
        "beside other patches; patches are predicted one by one",
        stacklevel=stacklevel + 1,
    )


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same numbers, or both none, everywhere."""
    return bool(((one == other) | ((one != one) & (other != other))).all())


def cut_into(total: int, size: int, progress: bool) -> Iterable[range]:
    """Cut the numbers up to ``total`` into ranges, with a progress bar if asked for."""
    ranges = [range(first, min(first + size, total)) for first in range(0, total, size)]
    if not progress:
        return ranges
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise RuntimeError("progress: needs the package tqdm (pip install tqdm)") from None
    bar: Iterable[range] = tqdm(ranges, unit="batch")
    return bar
