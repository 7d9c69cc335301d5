"""overlap_add's Triton kernels: on a GPU, or in Triton's interpreter where there is none."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from tests.accuracy import assert_accurate, compute_dtype
from tests.ops.overlap_add.cases import CHANNELS, FLOATS, gradient_scale, special_patches
from voxfuse.ops import overlap_add as wrappers

pytest.importorskip("triton", reason="the package triton is not installed")
from voxfuse.triton_kernels.overlap_add import launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPERATORS = torch.ops.voxfuse_triton
REFERENCE = torch.ops.voxfuse_reference


@dataclasses.dataclass(frozen=True)
class RandomPatches:
    """Random patches over a volume, some of them partly or wholly outside."""

    volume: tuple[int, ...] = (3, 6, 7)
    patch: tuple[int, ...] = (2, 4, 5)
    count: int = 6
    channels: int = 3
    dtype: torch.dtype = torch.float32
    dense: bool = False
    total: bool = False
    layout: str = "contiguous"
    activation: int = 0
    seed: int = 0

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor | None]:
        """(patches, origins, rows, weights, total), on the CPU."""
        generator = torch.Generator().manual_seed(self.seed)
        axes = len(self.volume)
        patches = torch.randn(self.count, self.channels, *self.patch, generator=generator)
        patches = patches.to(self.dtype)
        if self.layout == "channels_last":
            order = (0, *range(2, axes + 2), 1)
            patches = patches.permute(order).contiguous().movedim(-1, 1)
        origins = torch.stack(
            [
                torch.randint(-p, v + 1, (self.count,), generator=generator)
                for v, p in zip(self.volume, self.patch, strict=True)
            ],
            -1,
        )
        kinds = 1 if self.dense else 2
        rows = torch.randint(0, kinds, (self.count, axes), generator=generator)
        shapes = [(1, *self.patch)] if self.dense else [(2, p) for p in self.patch]
        weights = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        total = None
        if self.total:
            total = torch.zeros(self.volume, dtype=torch.float64)
            REFERENCE.overlap_weights_(total, origins, rows, weights, 0, 0, self.volume[0])
        return patches, origins, rows, weights, total


def on_device(*values):
    moved = []
    for value in values:
        if isinstance(value, list):
            moved.append([x.to(DEVICE) for x in value])
        else:
            moved.append(value.to(DEVICE) if isinstance(value, Tensor) else value)
    return moved


def widened(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    return [x.to(dtype) for x in tensors]


def check(case: RandomPatches) -> None:
    """Forward and backward against the reference in float64."""
    patches, *tables = case.tensors()
    compute = compute_dtype(case.dtype)
    rounding = 8 if case.dtype == compute else 1
    volume = list(case.volume)
    activation = case.activation
    actual = OPERATORS.overlap_add(*on_device(patches, *tables), volume, activation)
    truth = REFERENCE.overlap_add(patches.double(), *tables, volume, activation)
    plain = REFERENCE.overlap_add(patches.to(compute), *tables, volume, activation)
    magnitude = truth
    if activation == 0:
        magnitude = REFERENCE.overlap_add(patches.double().abs(), *tables, volume)
    assert actual.dtype == case.dtype
    # At most 8 patches lie over a voxel here: so many products and sums are rounded.
    assert_accurate(
        actual,
        plain.to(case.dtype),
        truth,
        scale=magnitude,
        dtype=case.dtype,
        allowance=rounding,
        what=f"{case}",
    )
    uncovered = magnitude == 0
    assert bool((actual.cpu()[uncovered] == 0).all())
    if case.count == 0:
        return
    generator = torch.Generator().manual_seed(case.seed + 1)
    grad = torch.randn(actual.shape, generator=generator).to(case.dtype)
    gradient = OPERATORS.overlap_add_backward(*on_device(grad, *tables, patches), activation)
    true_gradient, plain_gradient = (
        REFERENCE.overlap_add_backward(grad.to(wide), *tables, patches.to(wide), activation)
        for wide in (torch.float64, compute)
    )
    weighted = REFERENCE.overlap_add_backward(grad.double(), *tables)
    assert gradient.dtype == case.dtype
    assert_accurate(
        gradient,
        plain_gradient.to(case.dtype),
        true_gradient,
        scale=gradient_scale(patches, weighted, activation),
        dtype=case.dtype,
        allowance=rounding,
        what=f"gradient of {case}",
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("total", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_dtypes_and_kinds_of_weights(dtype, total, dense):
    check(RandomPatches(dtype=dtype, total=total, dense=dense))


@pytest.mark.parametrize(
    ("volume", "patch"),
    [((17,), (5,)), ((9, 11), (4, 6)), ((2, 3, 5), (4, 5, 8)), ((1, 1, 1), (1, 1, 1))],
)
@pytest.mark.parametrize("dense", [False, True])
def test_any_number_of_axes(volume, patch, dense):
    for total in (False, True):
        check(RandomPatches(volume=volume, patch=patch, dense=dense, total=total))


@pytest.mark.parametrize("channels", [1, 2, 9])
def test_channels(channels):
    check(RandomPatches(channels=channels, count=4))


@pytest.mark.parametrize("activation", [1, 2])
@pytest.mark.parametrize("channels", CHANNELS)
def test_activated_patches(activation, channels):
    for dtype, total, dense in zip(
        FLOATS, (False, True, False, True), (False, False, True, True), strict=True
    ):
        case = RandomPatches(channels=channels, count=4, dtype=dtype, total=total, dense=dense)
        check(dataclasses.replace(case, activation=activation))


@pytest.mark.parametrize("activation", [1, 2])
def test_activated_patches_of_any_layout_and_axes(activation):
    for volume, patch in (((17,), (5,)), ((9, 11), (4, 6)), ((2, 3, 5), (4, 5, 8))):
        check(RandomPatches(volume=volume, patch=patch, channels=9, activation=activation))
    check(RandomPatches(layout="channels_last", channels=4, activation=activation))
    check(RandomPatches(layout="channels_last", channels=10, activation=activation))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 4, 11])
@pytest.mark.parametrize("activation", [1, 2])
def test_infinities_and_nan_are_those_of_torch(dtype, channels, activation):
    patches = special_patches(dtype, channels)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    tables = (zero, zero, [torch.full((1, 9), 0.5, dtype=torch.float64)], None)
    actual = OPERATORS.overlap_add(*on_device(patches, *tables), [9], activation)
    expected = REFERENCE.overlap_add(patches, *tables, [9], activation)
    torch.testing.assert_close(actual.cpu(), expected, equal_nan=True)
    grad = torch.linspace(-1, 1, 9 * channels).reshape(channels, 9).to(dtype)
    gradient = OPERATORS.overlap_add_backward(*on_device(grad, *tables, patches), activation)
    expected = REFERENCE.overlap_add_backward(grad, *tables, patches, activation)
    torch.testing.assert_close(gradient.cpu(), expected, equal_nan=True)


@pytest.mark.parametrize("channels", [3, 9])
@pytest.mark.parametrize("activation", [1, 2])
def test_activated_bits_depend_on_neither_flips_nor_calls(channels, activation):
    case = RandomPatches(count=5, channels=channels)
    patches, *tables = case.tensors()
    place = (2, 1, 1 + case.volume[2])
    whole = torch.ones(channels, *case.volume, device=DEVICE)
    OPERATORS.overlap_add_(whole, *on_device(patches, *tables), *place, 0, 0.0, activation)
    for flip in (1, 2, 4, 7):  # every axis by itself, and all at once
        ring = torch.ones_like(whole)
        for first in range(0, 5, 2):
            part = slice(first, first + 2)
            mirrored = patches[part].flip([2 + a for a in range(3) if flip >> a & 1])
            origins, rows, weights, total = tables
            own = on_device(mirrored, origins[part], rows[part], weights, total)
            OPERATORS.overlap_add_(ring, *own, *place, flip, 0.0, activation)
        assert torch.equal(ring, whole)
    zero = torch.zeros_like(whole)
    OPERATORS.overlap_add_(
        zero, *on_device(patches, *tables), 0, 0, case.volume[0], 0, 0.0, activation
    )
    volume = list(case.volume)
    gathered = OPERATORS.overlap_add(*on_device(patches, *tables), volume, activation)
    assert torch.equal(zero, gathered)


@pytest.mark.parametrize("channels", [3, 9])
def test_activated_patches_with_a_floor(channels):
    case = RandomPatches(count=4, channels=channels)
    patches, origins, rows, weights, _ = case.tensors()
    cover = [torch.rand(2, size, dtype=torch.float64) for size in case.volume]
    tables = (origins, rows, weights, None, 0, 0, case.volume[0], 1, 0.3, 2, cover)
    ring, expected = (torch.zeros(channels, *case.volume) for _ in range(2))
    REFERENCE.overlap_add_(expected, patches, *tables)
    ring = ring.to(DEVICE)
    OPERATORS.overlap_add_(ring, *on_device(patches, *tables))
    torch.testing.assert_close(ring.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_bad_activations():
    patches, *tables = RandomPatches().tensors()
    for call in (
        lambda: OPERATORS.overlap_add(*on_device(patches, *tables), [3, 6, 7], 3),
        lambda: OPERATORS.overlap_add_backward(*on_device(patches[0], *tables), None, -1),
    ):
        with pytest.raises(ValueError, match="activation: got"):
            call()


def test_channels_last_patches_are_read_in_place():
    check(RandomPatches(layout="channels_last", channels=4))


def test_channels_so_far_apart_that_a_multiple_needs_64_bits():
    """Of the 4 GiB that they lie in, little is written to."""
    stride = 1 << 29
    case = RandomPatches(channels=5, count=1, dtype=torch.float16)
    patches, *tables = on_device(*case.tensors())
    room = torch.empty(4 * stride + 64, dtype=patches.dtype, device=DEVICE)
    far = room.as_strided(patches.shape, (room.numel(), stride, *patches.stride()[2:]))
    far.copy_(patches)
    volume = list(case.volume)
    expected = OPERATORS.overlap_add(patches, *tables, volume)
    assert expected.count_nonzero() > 0
    assert torch.equal(OPERATORS.overlap_add(far, *tables, volume), expected)


def test_tiles_smaller_than_the_volume_and_more_patches_than_a_block(monkeypatch):
    monkeypatch.setattr(launch, "TILE", 16)
    monkeypatch.setattr(launch, "MAX_WIDTH", 4)
    monkeypatch.setattr(launch, "ORIGINS", 4)
    check(RandomPatches(volume=(2, 5, 6), count=7, channels=1))
    check(RandomPatches(volume=(9, 6), patch=(4, 4), count=9, total=True, dtype=torch.float64))


@pytest.mark.parametrize("count", [0, 1])
def test_no_patches_or_one(count):
    check(RandomPatches(count=count))


def test_a_voxel_under_one_patch_of_weight_1_keeps_its_bits():
    patch = torch.randn(1, 2, 5, 6, dtype=torch.float32)
    tables = [torch.zeros(1, 2, dtype=torch.int64)] * 2
    weights = [torch.ones(1, 5, dtype=torch.float64), torch.ones(1, 6, dtype=torch.float64)]
    actual = OPERATORS.overlap_add(*on_device(patch, *tables, weights, None), [5, 6])
    assert torch.equal(actual.cpu(), patch[0])


@pytest.mark.parametrize("ring_axis", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("total", [False, True])
def test_ring(ring_axis, dtype, total):
    case = RandomPatches(dtype=dtype, count=4, channels=2)
    patches, origins, rows, weights, _ = case.tensors()
    extent = list(case.volume)
    extent[ring_axis] = 3
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    for start, stop in ((0, 3), (2, 5), (1, 3)):
        sums = None
        if total:
            sums = torch.zeros(extent, dtype=torch.float64)
            place = (ring_axis, start, stop)
            REFERENCE.overlap_weights_(sums, origins, rows, weights, *place)
            ours = torch.zeros(extent, dtype=torch.float64, device=DEVICE)
            OPERATORS.overlap_weights_(*on_device(ours, origins, rows, weights), *place)
            torch.testing.assert_close(ours.cpu(), sums, rtol=1e-15, atol=1e-16)
        before = torch.randn(case.channels, *extent, dtype=accumulation)
        truth, ring = before.double(), before.clone().to(DEVICE)
        tables = (origins, rows, weights, sums)
        place = (ring_axis, start, stop)
        REFERENCE.overlap_add_(truth, patches.double(), *tables, *place)
        OPERATORS.overlap_add_(ring, *on_device(patches, *tables), *place)
        torch.testing.assert_close(
            ring.cpu().double(), truth, rtol=0, atol=16 * torch.finfo(accumulation).eps
        )
        untouched = truth == before.double()
        assert torch.equal(ring.cpu()[untouched], before[untouched])


@pytest.mark.parametrize("volume", [(9,), (6, 9), (5, 6, 9)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_floor_is_the_references(volume, dtype):
    """Along every axis of a ring; a voxel under one patch keeps its bits."""
    axes, floor = len(volume), 0.2
    case = RandomPatches(volume=volume, patch=(3, 4, 5)[3 - axes :], dtype=dtype)
    patches, _, _, _, _ = case.tensors()
    generator = torch.Generator().manual_seed(1)
    windows = [torch.rand(p, generator=generator, dtype=torch.float64) for p in case.patch]
    starts = [(-1, 0, v - p) for p, v in zip(case.patch, volume, strict=True)]
    cover = []
    for window, along, size in zip(windows, starts, volume, strict=True):
        table = torch.full((3, size), -1.0, dtype=torch.float64)
        for x in range(size):
            over = [window[x - s] for s in along if 0 <= x - s < len(window)]
            table[: len(over), x] = torch.tensor(over, dtype=torch.float64)
        cover.append(table)
    origins = torch.tensor(list(itertools.product(*starts)))[: case.count]
    patches = patches[: len(origins)]
    rows = torch.zeros_like(origins)
    weights = [window[None] for window in windows]
    accumulation = torch.float64 if dtype == torch.float64 else torch.float32
    for axis in range(axes):
        extent = list(volume)
        extent[axis] = 4
        truth = torch.zeros(case.channels, *extent, dtype=torch.float64)
        ring = truth.to(DEVICE, accumulation)
        options = (None, axis, 1, 5, 1, floor, 0, cover)
        REFERENCE.overlap_add_(truth, patches.double(), origins, rows, weights, *options)
        OPERATORS.overlap_add_(ring, *on_device(patches, origins, rows, weights, *options))
        torch.testing.assert_close(
            ring.cpu().double(), truth, rtol=0, atol=16 * torch.finfo(accumulation).eps
        )


def test_patches_that_the_tables_do_not_name_weigh_nothing():
    case = RandomPatches()
    patches, origins, rows, weights, _ = case.tensors()
    cover = [torch.rand(2, size, dtype=torch.float64) for size in case.volume]
    cover[1][:, 2:4] = -1.0
    tables = (origins, rows, weights, None, 0, 0, case.volume[0], 0, 0.3, 0, cover)
    ring, expected = (torch.zeros(case.channels, *case.volume) for _ in range(2))
    REFERENCE.overlap_add_(expected, patches, *tables)
    ring = ring.to(DEVICE)
    OPERATORS.overlap_add_(ring, *on_device(patches, *tables))
    assert (expected[:, :, 2:4] == 0).all()
    assert (expected[:, :, 4:] != 0).any()
    torch.testing.assert_close(ring.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("volume", [(9,), (6, 7), (3, 6, 7)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_mirrored_patches_are_turned_back(volume, layout):
    """Bit for bit what adding flipped copies gives."""
    axes = len(volume)
    for dtype, axis, total in zip(
        FLOATS, [0, axes - 1] * 2, [False, False, True, True], strict=True
    ):
        case = RandomPatches(
            volume=volume, patch=(2, 4, 5)[3 - axes :], layout=layout, dtype=dtype, total=total
        )
        patches, *tables = case.tensors()
        place = (axis, 1, 1 + volume[axis])
        for flip in range(1, 2**axes):
            turned = [2 + a for a in range(axes) if flip >> a & 1]
            ring = torch.ones(case.channels, *volume, dtype=compute_dtype(dtype), device=DEVICE)
            expected = ring.clone()
            OPERATORS.overlap_add_(expected, *on_device(patches, *tables), *place)
            flipped = torch.empty_like(patches).copy_(patches.flip(turned))
            OPERATORS.overlap_add_(ring, *on_device(flipped, *tables), *place, flip)
            assert torch.equal(ring, expected)


@pytest.mark.parametrize("dense", [False, True])
def test_the_bits_do_not_depend_on_how_patches_are_spread_over_calls(dense):
    case = RandomPatches(count=7, dense=dense)
    patches, origins, rows, weights, _ = case.tensors()
    whole = torch.zeros(case.channels, *case.volume, device=DEVICE)
    parts = whole.clone()
    place = (0, 0, case.volume[0])
    OPERATORS.overlap_add_(whole, *on_device(patches, origins, rows, weights), None, *place)
    for part in (slice(0, 1), slice(1, 4), slice(4, 7)):
        tables = on_device(patches[part], origins[part], rows[part], weights)
        OPERATORS.overlap_add_(parts, *tables, None, *place)
    assert torch.equal(whole, parts)
    gathered = OPERATORS.overlap_add(
        *on_device(patches, origins, rows, weights), None, list(case.volume)
    )
    assert torch.equal(whole, gathered)
    again = OPERATORS.overlap_add(
        *on_device(patches, origins, rows, weights), None, list(case.volume)
    )
    assert torch.equal(again, gathered)


def test_every_output_is_written(poisoned_memory):
    for case in (
        RandomPatches(count=2),
        RandomPatches(volume=(33,), patch=(5,), count=1, channels=5),
    ):
        check(case)


def test_rows_that_do_not_exist_stay_in_bounds():
    patches, origins, rows, weights, _ = RandomPatches().tensors()
    wrong = rows * 1000 - 500
    arguments = on_device(patches, origins, wrong, weights)
    assert torch.isfinite(OPERATORS.overlap_add(*arguments, None, [3, 6, 7])).all()


def test_the_wrapper_reaches_the_kernel():
    patches, origins, rows, weights, _ = RandomPatches().tensors()
    actual = wrappers.overlap_add(
        patches.to(DEVICE), origins, rows, weights, (3, 6, 7), backend="triton"
    )
    expected = wrappers.overlap_add(patches, origins, rows, weights, (3, 6, 7))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="the property is the wrapper's, not the device's")
def test_opcheck():
    case = RandomPatches(volume=(6, 7), patch=(3, 4), count=3)
    patches, origins, rows, weights, _ = case.tensors()
    tables = (origins, rows, weights, None)
    torch.library.opcheck(
        OPERATORS.overlap_add.default, (patches.requires_grad_(), *tables, list(case.volume))
    )
    grad = torch.randn(case.channels, *case.volume)
    torch.library.opcheck(OPERATORS.overlap_add_backward.default, (grad, *tables))
    activated = (patches.detach().requires_grad_(), *tables, list(case.volume), 2)
    torch.library.opcheck(OPERATORS.overlap_add.default, activated)
    ring = torch.zeros(case.channels, *case.volume)
    arguments = (ring, patches.detach(), *tables, 0, 0, 6)
    torch.library.opcheck(OPERATORS.overlap_add_.default, arguments)


@pytest.mark.parametrize(
    ("height", "width"), [*itertools.product((1, 3, 96, 512), (1, 5, 96, 512))]
)
def test_tiles_have_a_bounded_size(height, width):
    block_y, block_x = launch.tile_shape(height, width)
    assert block_y * block_x <= launch.TILE
    assert block_y < 2 * height
    assert block_x < 2 * width
