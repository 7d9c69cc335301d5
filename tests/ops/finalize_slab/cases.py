"""Cases of finalize_slab and the check of a kernel's answer, shared by the backends' tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tests.accuracy import assert_accurate
from voxfuse.contract import Activation, Finish
from voxfuse.ops.finalize_slab import finalize_slab
from voxfuse.reference.finalize_slab import finalize_slab as reference

ACTIVATIONS = tuple(Activation.__members__)
MODES = tuple(Finish.__members__)
INTEGERS = (torch.uint8, torch.uint16, torch.int16, torch.int32, torch.int64)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclasses.dataclass(frozen=True)
class SlabCase:
    """A random ring, some of whose voxels no patch covers, and what to make of it.

    ``special`` puts NaN, infinities and ties into the ring.
    """

    mode: str
    activation: str = "none"
    channels: int = 5
    classes: int | None = None  # of a head
    extent: tuple[int, ...] = (4, 3, 7)
    ring_axis: int = 0
    start: int = 6
    slices: int = 3
    real: torch.dtype = torch.float32
    dtype: torch.dtype | None = None
    applied: bool = False
    divisor: float = 1.0
    total: bool = False
    fill: float = 0.0
    clear: bool = True
    special: bool = False
    into_volume: bool = False
    seed: int = 0

    @property
    def probabilities(self) -> bool:
        """The ring holds probabilities: an entropy of anything else is no number."""
        return self.mode == "entropy" and (self.applied or self.activation == "none")

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """(ring, total, weight, bias)."""
        generator = torch.Generator().manual_seed(self.seed)
        ring = torch.randn(self.channels, *self.extent, generator=generator) * 3
        if self.probabilities:
            ring = ring.sigmoid() if self.channels == 1 else ring.softmax(0)
            ring = ring * self.divisor
        if self.special:
            ring = ring.round()  # ties
            flat = ring.flatten(1)
            kinds = torch.randint(0, 8, flat.shape, generator=generator)
            for kind, value in enumerate((float("nan"), float("inf"), -float("inf"))):
                flat[kinds == kind] = value
            flat[:, ::5] = -float("inf")
            flat[-1, ::10] = 1.0
            ring = flat.view_as(ring)
        total = weight = bias = None
        if self.total:
            total = torch.randint(0, 3, self.extent, generator=generator).double()
        if self.classes is not None:
            weight = torch.randn(self.classes, self.channels, generator=generator).to(self.real)
            bias = torch.randn(self.classes, generator=generator).to(self.real)
        return ring.to(self.real), total, weight, bias

    def out(self, dtype: torch.dtype) -> Tensor:
        """Where the slab goes, filled with a value that does not come out."""
        shape = list(self.extent)
        shape[self.ring_axis] = self.slices + (4 if self.into_volume else 0)
        count = self.classes or self.channels
        channels = count if self.mode in ("values", "mask") else 1
        out = torch.full((channels, *shape), 77).to(dtype)
        first = 2 if self.into_volume else 0
        return out.narrow(1 + self.ring_axis, first, self.slices)

    def options(self) -> tuple[Any, ...]:
        """The operator's arguments after the tensors."""
        return (
            self.ring_axis,
            self.start,
            self.start + self.slices,
            Activation[self.activation],
            self.applied,
            Finish[self.mode],
            self.divisor,
            0.375,
            self.fill,
            self.clear,
        )


def check(case: SlabCase, operator: Callable[..., None], device: str = "cpu") -> None:
    """Call ``operator`` with the schema's arguments and compare with the reference in float64."""
    default = {"labels": torch.uint8, "mask": torch.bool}.get(case.mode, torch.float32)
    dtype = case.dtype or default
    ring, total, weight, bias = case.tensors()
    wide = [None if x is None else x.double() for x in (weight, bias)]
    exact = not dtype.is_floating_point
    truth = case.out(dtype if exact else torch.float64)
    plain = case.out(dtype)
    reference(ring.double().clone(), truth, total, *wide, *case.options())
    cleared = ring.clone()
    reference(cleared, plain, total, weight, bias, *case.options())

    out = case.out(dtype)
    whole = out if out._base is None else out._base
    moved = [None if x is None else x.to(device) for x in (ring.clone(), total, weight, bias)]
    target = whole.to(device)
    slab = target.as_strided(out.shape, target.stride(), out.storage_offset())
    operator(moved[0], slab, *moved[1:], *case.options())
    actual = slab.cpu()
    assert torch.equal(torch.nan_to_num(moved[0].cpu(), 7.0), torch.nan_to_num(cleared, 7.0))
    if case.into_volume:
        touched = slab.numel()
        rest = target.cpu().clone()
        rest.as_strided(out.shape, rest.stride(), out.storage_offset()).copy_(whole.view(-1)[:1])
        assert bool((rest == whole.view(-1)[:1]).all()), f"{case}: more than {touched} written"
    if actual.numel() == 0:
        return
    if exact:
        _check_choice(case, ring, wide, actual, truth)
        return
    scale = torch.nan_to_num(truth.abs(), 0.0, 0.0, 0.0).clamp(min=1)
    if case.classes is not None and case.activation == "none":
        assert wide[0] is not None
        scale = scale + float(wide[0].abs().sum(1).max() * 12)
    assert_accurate(actual, plain, truth, scale=scale, dtype=dtype, allowance=8, what=f"{case}")


def _check_choice(
    case: SlabCase, ring: Tensor, head: list[Tensor | None], actual: Tensor, truth: Tensor
) -> None:
    """Labels and masks are right but for what rounding moves across a tie or the threshold."""
    different = actual.to(torch.int64) != truth.to(torch.int64)
    activated = case.activation != "none" and not case.applied
    if case.classes is None and (case.mode == "labels" or not activated) and case.divisor == 1:
        assert not bool(different.any()), f"{case}"
        return
    values = dataclasses.replace(case, mode="values", total=False, dtype=torch.float64)
    if case.mode == "labels":
        values = dataclasses.replace(values, activation="none")
    exact = values.out(torch.float64)
    reference(ring.double().clone(), exact, None, *head, *values.options())
    tolerance = 64 * torch.finfo(case.real).eps
    if case.mode == "mask":
        close = (exact - 0.375).abs() <= tolerance
    else:
        covered = actual.to(torch.int64).clamp(0, exact.shape[0] - 1)
        near = exact.gather(0, covered)
        close = exact.amax(0, keepdim=True) - near <= tolerance * exact.abs().amax().clamp(min=1)
    assert not bool((different & ~close).any()), f"{case}"


def empty_out(mode, classes, slab, dtype=torch.float32):
    if mode == "labels":
        return torch.full((1, *slab), 77, dtype=torch.uint8)
    if mode == "mask":
        return torch.full((classes, *slab), 77, dtype=torch.uint8)
    return torch.full((classes if mode == "values" else 1, *slab), 77.0, dtype=dtype)


def finalized(backend, ring, mode, axis, start, stop, classes, dtype, **options):
    slab = list(ring.shape[1:])
    slab[axis] = stop - start
    out = empty_out(mode, classes, slab, dtype)
    ring = ring.clone()
    finalize_slab(
        ring, out, mode, ring_axis=axis, start=start, stop=stop, backend=backend, **options
    )
    return out, ring
