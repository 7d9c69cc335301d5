"""overlap_add on the CPU: reference and compiled kernels, wrappers, autograd, bad input."""

from __future__ import annotations

import dataclasses

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import voxfuse
from tests.accuracy import assert_accurate, compute_dtype
from tests.ops.overlap_add.cases import (
    ALL,
    CHANNELS,
    FLOATS,
    FusionArguments,
    gradient_scale,
    make_case,
    needs_library,
    special_patches,
)
from voxfuse.contract import Activation
from voxfuse.fusion.grids import plan_grid
from voxfuse.ops import overlap_add as ops

# Hypothesis warns of fixtures that its examples share; poisoning is the same for all of them.
POISONED = hypothesis.settings(
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)


CASES = dict(
    volume=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    patch=st.lists(st.integers(1, 37), min_size=3, max_size=3),
    count=st.integers(0, 6),
    channels=st.sampled_from([1, 2, 3, 11]),
    dtype=st.sampled_from(FLOATS),
    dense=st.booleans(),
    general=st.booleans(),
    activation=st.integers(0, 2),
    seed=st.integers(0, 3),
)


def in_float64(case: FusionArguments) -> FusionArguments:
    return dataclasses.replace(case, patches=case.patches.double())


def weight_of_patch(case: FusionArguments, i: int) -> Tensor:
    """The weight of every voxel of patch i, in float64, by the definition."""
    axes = len(case.volume)
    if len(case.weights) != axes:
        return case.weights[0][0]
    vectors = [w[k] for w, k in zip(case.weights, case.rows[i].tolist(), strict=True)]
    letters = "abc"[:axes]
    return torch.einsum(",".join(letters) + "->" + letters, *vectors)


def brute_force(case: FusionArguments) -> np.ndarray:
    """The volume voxel by voxel."""
    result = np.zeros((case.patches.shape[1], *case.volume))
    total = np.zeros(case.volume)
    values = case.patches.double().numpy()
    if case.activation == 1:
        values = 1 / (1 + np.exp(-values))
    elif case.activation == 2:
        values = np.exp(values) / np.exp(values).sum(1, keepdims=True)
    for i, origin in enumerate(case.origins.tolist()):
        weight = weight_of_patch(case, i).numpy()
        for t in np.ndindex(*weight.shape):
            x = tuple(o + s for o, s in zip(origin, t, strict=True))
            if all(0 <= a < b for a, b in zip(x, case.volume, strict=True)):
                result[(slice(None), *x)] += weight[t] * values[(i, slice(None), *t)]
                total[x] += weight[t]
    if case.total is None:
        return result
    return np.divide(result, total, out=np.zeros_like(result), where=total > 0)


def weight_magnitude(case: FusionArguments) -> Tensor:
    """Sum of |weight x value| over the patches at every voxel: what rounding errors scale with."""
    case = in_float64(case)
    if not case.activation:
        case.patches = case.patches.abs()
    return case.forward(torch.ops.voxfuse_reference)


def assert_same(actual: Tensor, expected: Tensor, case: FusionArguments, namespace) -> None:
    """To the bit; but PyTorch, and with it the reference, rounds an activation by where it lies."""
    if case.activation and namespace is torch.ops.voxfuse_reference:
        eps = torch.finfo(actual.dtype).eps
        torch.testing.assert_close(actual, expected, rtol=8 * eps, atol=8 * eps)
    else:
        assert torch.equal(actual, expected)


# --- The reference itself ------------------------------------------------------------------------


@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("volume", [(9,), (7, 5), (5, 6, 4)])
def test_reference_equals_the_definition(volume, dense, general, activation):
    options = {"dtype": torch.float64, "dense": dense, "general": general}
    case = make_case(volume, (4, 3, 3)[: len(volume)], 5, activation=activation, **options)
    actual = case.forward(torch.ops.voxfuse_reference)
    np.testing.assert_allclose(actual.numpy(), brute_force(case), rtol=1e-13, atol=1e-15)


# --- Every backend against the truth --------------------------------------------------------------


@pytest.mark.parametrize("namespace", ALL, ids=str)
@POISONED
@hypothesis.given(**CASES)
def test_forward_is_as_accurate_as_plain_pytorch(namespace, poisoned_memory, **options):
    options["patch"] = options["patch"][: len(options["volume"])]
    case = make_case(**options)
    actual = case.forward(namespace)
    assert actual.dtype == case.patches.dtype
    truth = in_float64(case).forward(torch.ops.voxfuse_reference)
    wide = compute_dtype(case.patches.dtype)
    plain = plain_pytorch(case, wide).to(case.patches.dtype)
    assert_accurate(
        actual,
        plain,
        truth,
        scale=weight_magnitude(case),
        dtype=case.patches.dtype,
        # one rounding of the result, three of the weight and one an addition
        allowance=1 if case.patches.dtype != wide else 4 + len(case.origins),
        what="forward",
    )


def plain_pytorch(case: FusionArguments, dtype: torch.dtype) -> Tensor:
    """What a user writes: sum the weighted patches, divide by the sum of the weights."""
    volume = torch.zeros(case.patches.shape[1], *case.volume, dtype=dtype)
    total = torch.zeros(case.volume, dtype=dtype)
    for i, origin in enumerate(case.origins.tolist()):
        weight = weight_of_patch(case, i).to(dtype)
        source, target = [], []
        for o, p, v in zip(origin, weight.shape, case.volume, strict=True):
            first, last = max(o, 0), max(min(o + p, v), max(o, 0))
            if first >= last:
                break
            source.append(slice(first - o, last - o))
            target.append(slice(first, last))
        else:
            block = case.patches[(i, slice(None), *source)].to(dtype)
            if case.activation:
                block = block.softmax(0) if case.activation == 2 else block.sigmoid()
            volume[(slice(None), *target)] += weight[tuple(source)] * block
            total[tuple(target)] += weight[tuple(source)]
    if case.total is None:
        return volume
    return torch.where(total > 0, volume / total, torch.zeros_like(volume))


@needs_library
@POISONED
@hypothesis.given(**CASES)
def test_backward_is_as_accurate_as_plain_pytorch(poisoned_memory, **options):
    options["patch"] = options["patch"][: len(options["volume"])]
    case = make_case(**options)
    dtype = case.patches.dtype
    wide = compute_dtype(dtype)
    grad = torch.randn(case.patches.shape[1], *case.volume).to(dtype)
    actual = case.backward(grad)
    truth, plain = (
        case.backward(grad.to(kind), torch.ops.voxfuse_reference) for kind in (torch.float64, wide)
    )
    assert actual.dtype == dtype
    if len(case.origins) == 0:
        return
    weighted = dataclasses.replace(case, activation=0).backward(
        grad.double(), torch.ops.voxfuse_reference
    )
    assert_accurate(
        actual,
        plain.to(dtype),
        truth,
        scale=gradient_scale(case.patches, weighted, case.activation),
        dtype=dtype,
        allowance=1 if dtype != wide else 4 + case.patches.shape[1] / 2,
        what="backward",
    )
    assert bool((actual[weighted == 0] == 0).all())


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [*CHANNELS, 130, 1100])
@pytest.mark.parametrize("activation", [1, 2])
def test_activated_patches_of_any_number_of_channels(dtype, channels, activation, poisoned_memory):
    """Blocks of voxels of every kind: parts of rows, rows, several rows."""
    wide = compute_dtype(dtype)
    for volume, patch, count in (((5, 21, 33), (3, 16, 17), 4), ((3, 700), (2, 600), 3)):
        if channels > 200 and dtype != torch.float32:
            volume, patch = volume[-2:], patch[-2:]
        options = {"channels": channels, "dtype": dtype, "general": channels % 2 == 0}
        case = make_case(volume, patch, count, activation=activation, **options)
        truth = in_float64(case).forward(torch.ops.voxfuse_reference)
        plain = plain_pytorch(case, wide).to(dtype)
        # Sums over the channels round once a term.
        allowance = 1 if dtype != wide else 4 + count + channels / 2
        assert_accurate(case.forward(), plain, truth, scale=truth, dtype=dtype, allowance=allowance)
        grad = torch.randn(channels, *volume).to(dtype)
        weighted = dataclasses.replace(case, activation=0).backward(grad.double())
        assert_accurate(
            case.backward(grad),
            case.backward(grad.to(wide), torch.ops.voxfuse_reference).to(dtype),
            case.backward(grad.double(), torch.ops.voxfuse_reference),
            scale=gradient_scale(case.patches, weighted, activation),
            dtype=dtype,
            allowance=1 if dtype != wide else 4 + channels / 2,
        )


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("channels", [1, 4, 11])
def test_infinities_and_nan_are_those_of_torch(namespace, dtype, channels):
    patches = special_patches(dtype, channels)
    zero = torch.zeros(1, 1, dtype=torch.int64)
    half = [torch.full((1, 9), 0.5, dtype=torch.float64)]
    for activation, function in ((1, torch.sigmoid), (2, lambda p: p.softmax(1))):
        case = FusionArguments(patches, zero, zero, half, None, (9,), activation)
        leaf = patches.to(compute_dtype(dtype)).requires_grad_()
        expected = 0.5 * function(leaf)[0]
        torch.testing.assert_close(
            case.forward(namespace), expected.detach().to(dtype), equal_nan=True
        )
        grad = torch.linspace(-1, 1, 9 * channels).reshape(channels, 9).to(dtype)
        (gradient,) = torch.autograd.grad(expected, leaf, grad.to(leaf.dtype))
        torch.testing.assert_close(
            case.backward(grad, namespace), gradient.to(dtype), equal_nan=True
        )


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_gradients(namespace, dense, general):
    case = make_case((7, 6), (4, 3), 4, dtype=torch.float64, dense=dense, general=general)
    patches = case.patches.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: case.forward(namespace, p), patches)
    assert torch.autograd.gradgradcheck(lambda p: case.forward(namespace, p), patches)


#: What patches over a volume of (6, 5, 7) weigh along the axes.
COVER = [torch.rand(2, size, dtype=torch.float64) for size in (6, 5, 7)]


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_gradients_of_activated_patches(namespace, general, activation):
    code = Activation[activation]
    options = {"dtype": torch.float64, "general": general, "activation": code}
    case = make_case((7, 6), (4, 3), 4, channels=3, **options)
    patches = case.patches.requires_grad_()
    assert torch.autograd.gradcheck(lambda p: case.forward(namespace, p), patches)
    total = case.forward(namespace, patches).square().sum()
    (first,) = torch.autograd.grad(total, patches, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again with an activation"):
        first.sum().backward()


@pytest.mark.parametrize("activation", ["none", "sigmoid", "softmax"])
def test_transforms_take_an_activation(activation):
    """torch.func.grad and vmap, as autograd and a loop do it."""
    patches = torch.randn(3, 2, 4, 5, dtype=torch.float64)

    def energy(p):
        fused = voxfuse.overlap_add(p, [[0, 3]], (8,), activation=activation)
        return fused.square().sum()

    expected = []
    for p in patches:
        leaf = p.clone().requires_grad_()
        energy(leaf).backward()
        expected.append(leaf.grad)
    mapped = torch.func.vmap(torch.func.grad(energy))(patches)
    torch.testing.assert_close(mapped, torch.stack(expected))


def test_what_is_kept_for_the_backward_pass():
    """The patches, where they are activated, and nothing of the size of the volume or the patches
    otherwise."""
    patches = torch.randn(2, 3, 4, requires_grad=True)
    for activation in ("none", "softmax"):
        kept = []

        def keep(tensor, kept=kept):
            kept.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            voxfuse.overlap_add(patches, [[0, 2]], (6,), activation=activation)
        floating = [t for t in kept if t.dtype == torch.float32]
        expected = [] if activation == "none" else [patches.data_ptr()]
        assert [t.data_ptr() for t in floating] == expected


# Neither a fake kernel nor autograd looks at layout and sums of weights together.
@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize(
    ("layout", "general"),
    [
        ("contiguous", False),
        ("permuted", True),
        ("sliced", False),
        ("empty", True),
    ],
)
def test_opcheck(namespace, layout, general):
    case = make_case((6, 5, 7), (3, 4, 5), 0 if layout == "empty" else 3, general=general)
    if layout == "permuted":
        case.patches = case.patches.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    elif layout == "sliced":
        case.patches = torch.randn(6, 4, 3, 4, 10)[::2, 1:3, ..., ::2]
    patches = case.patches.detach().requires_grad_()
    tables = (case.origins, case.rows, case.weights, case.total)
    torch.library.opcheck(namespace.overlap_add.default, (patches, *tables, list(case.volume)))
    call = (patches, *tables, list(case.volume), 1 if general else 2)
    torch.library.opcheck(namespace.overlap_add.default, call)
    grad = torch.randn(2, *case.volume, requires_grad=True)
    torch.library.opcheck(namespace.overlap_add_backward.default, (grad, *tables))
    activated_call = (grad.detach(), *tables, case.patches, 2)
    torch.library.opcheck(namespace.overlap_add_backward.default, activated_call)
    ring = torch.zeros(2, *case.volume)
    torch.library.opcheck(
        namespace.overlap_add_.default, (ring, case.patches, *tables, 1, 2, 2 + 5)
    )
    torch.library.opcheck(
        namespace.overlap_add_.default, (ring, case.patches, *tables, 1, 2, 2 + 5, 6)
    )
    torch.library.opcheck(
        namespace.overlap_add_.default, (ring, case.patches, *tables, 1, 2, 2 + 5, 6, 0.0, 2)
    )
    tall = torch.zeros(2, 5, 5, 7)
    factors = (case.patches, case.origins, case.rows, case.weights, None, 0, 1, 6, 3, 0.5, 0, COVER)
    torch.library.opcheck(namespace.overlap_add_.default, (tall, *factors))
    total = torch.zeros(case.volume, dtype=torch.float64)
    torch.library.opcheck(namespace.overlap_weights_.default, (total, *tables[:3], 0, 0, 6))


@pytest.mark.parametrize("activation", ["none", "softmax"])
def test_compiles_to_one_graph(activation):
    case = make_case((6, 5, 7), (3, 4, 5), 3)
    tables = (case.origins, case.rows, case.weights, case.volume)

    def fuse(patches):
        return ops.overlap_add(patches, *tables, activation=activation) * 2

    compiled = torch.compile(fuse, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(case.patches), fuse(case.patches))
    gradients = []
    for call in (compiled, fuse):
        leaf = case.patches.clone().requires_grad_()
        call(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


# --- The ring form --------------------------------------------------------------------------------


@pytest.mark.parametrize("namespace", ALL, ids=str)
@hypothesis.given(**CASES, data=st.data())
def test_ring_holds_a_window_of_the_volume(namespace, data, **options):
    options["patch"] = options["patch"][: len(options["volume"])]
    case = make_case(**options)
    wide = compute_dtype(case.patches.dtype)
    axis = data.draw(st.integers(0, len(case.volume) - 1))
    length = case.volume[axis]
    depth = data.draw(st.integers(1, length + 3))
    start = data.draw(st.integers(0, length - 1))
    stop = data.draw(st.integers(start, min(start + depth, length)))
    extent = list(case.volume)
    extent[axis] = depth

    def in_slots(tensor: Tensor, spatial: int, fill: float) -> Tensor:
        ring = tensor.new_full([*tensor.shape[:spatial], *extent], fill)
        for x in range(start, stop):
            ring.select(spatial + axis, x % depth).copy_(tensor.select(spatial + axis, x))
        return ring

    volume = torch.zeros(case.patches.shape[1], *case.volume, dtype=wide)
    tables = (case.origins, case.rows, case.weights)
    activation = (0, 0.0, case.activation)
    namespace.overlap_add_(
        volume, case.patches, *tables, case.total, 0, 0, case.volume[0], *activation
    )
    total = None if case.total is None else in_slots(case.total, 0, 1.0)
    ring = in_slots(torch.zeros_like(volume), 1, 5.0)
    namespace.overlap_add_(ring, case.patches, *tables, total, axis, start, stop, *activation)
    assert_same(ring, in_slots(volume, 1, 5.0), case, namespace)

    sums = torch.zeros(case.volume, dtype=torch.float64)
    namespace.overlap_weights_(sums, *tables, 0, 0, case.volume[0])
    window = in_slots(torch.zeros_like(sums), 0, 3.0)
    namespace.overlap_weights_(window, *tables, axis, start, stop)
    torch.testing.assert_close(window, in_slots(sums, 0, 3.0), rtol=0, atol=0)


@pytest.mark.parametrize("namespace", ALL, ids=str)
@hypothesis.given(**CASES, data=st.data())
def test_mirrored_patches_are_turned_back(namespace, data, **options):
    """Bit for bit what adding flipped copies gives, in a ring along any axis."""
    options["patch"] = options["patch"][: len(options["volume"])]
    case = make_case(**options)
    axes = len(case.volume)
    flip = data.draw(st.integers(0, 2**axes - 1))
    axis = data.draw(st.integers(0, axes - 1))
    start = data.draw(st.integers(0, case.volume[axis]))
    place = (axis, start, start + data.draw(st.integers(0, case.volume[axis])))
    turned = [2 + a for a in range(axes) if flip >> a & 1]
    tables = (case.origins, case.rows, case.weights, case.total)
    shape = (case.patches.shape[1], *case.volume)
    ring = torch.full(shape, 2.0, dtype=compute_dtype(case.patches.dtype))
    expected = ring.clone()
    namespace.overlap_add_(expected, case.patches, *tables, *place, 0, 0.0, case.activation)
    mirrored = case.patches.flip(turned)
    namespace.overlap_add_(ring, mirrored, *tables, *place, flip, 0.0, case.activation)
    assert_same(ring, expected, case, namespace)


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_bits_do_not_depend_on_the_batches(namespace, dtype, general, activation):
    options = {"dtype": dtype, "general": general, "activation": activation}
    case = make_case((17, 19, 23), (9, 8, 10), 7, **options)
    wide = compute_dtype(dtype)
    results = []
    for size in (7, 3, 1):
        volume = torch.zeros(2, *case.volume, dtype=wide)
        for i in range(0, 7, size):
            part = slice(i, i + size)
            namespace.overlap_add_(
                volume,
                case.patches[part],
                case.origins[part],
                case.rows[part],
                case.weights,
                case.total,
                0,
                0,
                17,
                0,
                0.0,
                activation,
            )
        results.append(volume)
    for result in results:
        assert_same(result, results[0], case, namespace)
    assert_same(results[0].to(dtype), case.forward(namespace), case, namespace)


# --- What the fusion promises ---------------------------------------------------------------------


@hypothesis.given(
    volume=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    patch=st.lists(st.integers(1, 16), min_size=3, max_size=3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.8]),
    window=st.sampled_from(voxfuse.fusion.windows.NAMES),
    grid=st.booleans(),
    value=st.floats(0.1, 1e6),
)
def test_a_constant_comes_back_within_8_ulp(volume, patch, overlap, window, grid, value):
    plan = plan_grid(volume, patch[: len(volume)], overlap)
    patches = torch.full((len(plan), 1, *plan.patch_shape), value)
    origins = plan if grid else torch.cat([plan.origins, plan.origins[:1]])
    patches = patches if grid else torch.cat([patches, patches[:1]])
    result = voxfuse.overlap_add(patches, origins, volume, window)
    ulp = torch.nextafter(patches.flatten()[0], torch.tensor(np.inf)) - patches.flatten()[0]
    assert ((result - patches.flatten()[0]).abs() <= 8 * ulp).all()


@pytest.mark.parametrize("window", voxfuse.fusion.windows.NAMES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("grid", [True, False])
def test_a_voxel_under_one_patch_is_that_patch_to_the_bit(window, dtype, grid):
    starts = [[0, 5, 11], [0, 6]]
    origins = torch.cartesian_prod(*[torch.tensor(s) for s in starts])
    origins = origins if grid else origins[:-1]
    patches = torch.randn(len(origins), 2, 7, 8).to(dtype)
    result = voxfuse.overlap_add(patches, origins, (18, 14), window)
    count = torch.zeros(18, 14, dtype=torch.int64)
    alone = torch.zeros(2, 18, 14, dtype=dtype)
    for patch, (z, y) in zip(patches, origins.tolist(), strict=True):
        count[z : z + 7, y : y + 8] += 1
        alone[:, z : z + 7, y : y + 8] = patch
    assert torch.equal(result[:, count == 1], alone[:, count == 1])
    assert (result[:, count == 0] == 0).all()


def test_corners_of_an_order_7_window_survive_on_the_general_path():
    # The corner's weight is 1.8e-42 of the peak, subnormal in float32.
    window = voxfuse.bspline_window((128, 128, 128), order=7)
    patch = torch.randn(1, 1, 128, 128, 128)
    alone = voxfuse.overlap_add(patch, torch.zeros(1, 3, dtype=torch.int64), (128,) * 3, window)
    assert torch.equal(alone, patch[0])
    origins = torch.tensor([[0, 0, 0], [1, 2, 3], [70, 60, 50]])
    ones = torch.ones(3, 1, 128, 128, 128)
    result = voxfuse.overlap_add(ones, origins, (128,) * 3, "bspline7")
    assert ((result - 1).abs() <= 8 * 2**-23).all()


def test_grid_and_general_path_agree():
    plan = plan_grid((30, 21), (8, 9), 0.5)
    patches = torch.randn(len(plan), 2, 8, 9, dtype=torch.float64)
    fused = voxfuse.overlap_add(patches, plan, (30, 21), "bspline")
    starts = voxfuse.overlap_add(patches, [list(s) for s in plan.starts], (30, 21), "bspline")
    dense = voxfuse.bspline_window((8, 9), 5)
    general = voxfuse.overlap_add(patches, plan.origins, (30, 21), dense)
    assert torch.equal(fused, starts)
    torch.testing.assert_close(fused, general, rtol=1e-13, atol=1e-14)


def test_nan_stays_where_its_patch_is():
    patches = torch.ones(2, 1, 4)
    patches[0, 0, 3] = np.nan
    result = voxfuse.overlap_add(patches, [[0, 2]], (6,))
    assert result.isnan().tolist() == [[False, False, False, True, False, False]]


def test_zero_weights_leave_voxels_uncovered():
    result = voxfuse.overlap_add(torch.ones(1, 1, 3), [[0]], (3,), np.array([0.0, 1, 0]))
    assert result.tolist() == [[0, 1, 0]]
    origins = torch.tensor([[0], [0]])
    result = voxfuse.overlap_add(torch.ones(2, 1, 3), origins, (3,), np.array([0.0, 1, 0]))
    assert result.tolist() == [[0, 1, 0]]


def test_a_tensor_subclass_is_unwrapped():
    class Subclass(torch.Tensor):
        pass

    patches = torch.ones(2, 1, 4).as_subclass(Subclass)
    assert type(voxfuse.overlap_add(patches, [[0, 2]], (6,))) is Tensor


def test_any_strides_give_the_same_bits():
    case = make_case((9, 8, 7), (4, 5, 6), 4)
    expected = case.forward()
    last = case.patches.contiguous(memory_format=torch.channels_last_3d)
    assert torch.equal(case.forward(patches=last), expected)
    padded = torch.randn(8, 5, 4, 5, 12)
    padded[::2, 1:3, :, :, ::2] = case.patches
    assert torch.equal(case.forward(patches=padded[::2, 1:3, :, :, ::2]), expected)


def test_origins_far_away_do_not_overflow():
    far = torch.iinfo(torch.int64)
    origins = torch.tensor([[far.max], [far.min], [1]])
    weights = [torch.ones(1, 2, dtype=torch.float64)]
    result = ops.overlap_add(torch.ones(3, 1, 2), origins, torch.zeros_like(origins), weights, (4,))
    assert result.tolist() == [[0, 1, 1, 0]]
