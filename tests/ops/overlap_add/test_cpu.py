"""overlap_add on the CPU: reference and compiled kernels, wrappers, autograd, bad input."""

from __future__ import annotations

import dataclasses
import itertools

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import voxfuse
from tests.accuracy import assert_accurate, compute_dtype
from tests.ops.overlap_add.cases import (
    CHANNELS,
    FLOATS,
    FusionArguments,
    gradient_scale,
    make_case,
    special_patches,
)
from voxfuse import _library
from voxfuse.contract import Activation
from voxfuse.fusion.grids import _cover, plan_grid, weights_for_origins
from voxfuse.fusion.windows import Raised
from voxfuse.ops import overlap_add as ops
from voxfuse.reference.overlap_add import activated

ALL = (torch.ops.voxfuse, torch.ops.voxfuse_reference)
needs_library = pytest.mark.skipif(
    not _library.defines_operators(), reason="the compiled CPU library is not built"
)

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


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "permuted", "sliced", "empty", "length one"])
@pytest.mark.parametrize("general", [False, True])
def test_opcheck(namespace, layout, general):
    count = {"empty": 0, "length one": 1}.get(layout, 3)
    patch = (1, 1, 1) if layout == "length one" else (3, 4, 5)
    case = make_case((6, 5, 7), patch, count, general=general)
    if layout == "permuted":
        case.patches = case.patches.permute(0, 1, 4, 3, 2).contiguous().permute(0, 1, 4, 3, 2)
    elif layout == "sliced":
        case.patches = torch.randn(6, 4, 3, 4, 10)[::2, 1:3, ..., ::2]
    patches = case.patches.detach().requires_grad_()
    tables = (case.origins, case.rows, case.weights, case.total)
    torch.library.opcheck(namespace.overlap_add.default, (patches, *tables, list(case.volume)))
    for activation in (1, 2):
        call = (patches, *tables, list(case.volume), activation)
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


# --- Weights with a lower bound -------------------------------------------------------------------

GRIDS = dict(
    volume=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    patch=st.lists(st.integers(1, 24), min_size=3, max_size=3),
    overlap=st.floats(0, 0.8),
    floor=st.sampled_from([1e-6, 1e-2, 0.3, 2.0]),
    dtype=st.sampled_from(FLOATS),
    seed=st.integers(0, 3),
)


def floored_case(volume, patch, overlap, floor, dtype=torch.float32, seed=0):
    """Arguments of ``overlap_add_`` from the patches on, by a grid, its cover, and the same by a
    total."""
    grid = plan_grid(volume, patch, overlap)
    generator = torch.Generator().manual_seed(seed)
    vectors = [torch.rand(p, dtype=torch.float64, generator=generator).numpy() for p in patch]
    raised = Raised(vectors, floor)
    # A single axis is raised beforehand by the fusion; the operator takes it all the same.
    table = weights_for_origins(grid.origins, raised, volume, patch)
    if len(patch) == 1:
        table.weights[:] = [torch.from_numpy(vectors[0])[None]]
        table.cover[:] = [_cover(vectors[0], grid.starts[0], volume[0])]
    patches = torch.randn(len(grid), 2, *patch, generator=generator).to(dtype)
    dense = torch.from_numpy(raised.dense())[None]
    total = torch.zeros(volume, dtype=torch.float64)
    ops.overlap_weights_(total, grid.origins, grid.rows * 0, [dense], backend="reference")
    tables = (grid.origins, grid.rows * 0)
    return (
        (patches, *tables, table.weights),
        table.cover,
        (patches, *tables, [dense], total),
    )


@pytest.mark.parametrize("namespace", ALL, ids=str)
@hypothesis.given(**GRIDS, data=st.data())
def test_a_floor_is_what_the_dense_window_and_its_sum_give(namespace, data, **options):
    """In a ring along any axis, of mirrored patches, too."""
    options["patch"] = options["patch"][: len(options["volume"])]
    volume, floor, dtype = options["volume"], options["floor"], options["dtype"]
    factors, cover, dense = floored_case(**options)
    axes = len(volume)
    axis = data.draw(st.integers(0, axes - 1))
    depth = data.draw(st.integers(1, volume[axis]))
    start = data.draw(st.integers(0, volume[axis] - depth))
    flip = data.draw(st.integers(0, 2**axes - 1))
    extent = list(volume)
    extent[axis] = depth
    wide = compute_dtype(dtype)
    ring = torch.zeros(2, *extent, dtype=wide)
    namespace.overlap_add_(ring, *factors, None, axis, start, start + depth, flip, floor, 0, cover)
    # The truth: the volume's sums, turned into the ring's slots.
    full = torch.zeros(2, *volume, dtype=torch.float64)
    size = torch.zeros_like(full)
    for target, patches in ((full, dense[0].double()), (size, dense[0].double().abs())):
        torch.ops.voxfuse_reference.overlap_add_(target, patches, *dense[1:], 0, 0, volume[0], flip)

    def in_slots(tensor):
        return torch.stack(
            [tensor.select(1 + axis, start + (slot - start) % depth) for slot in range(depth)],
            1 + axis,
        )

    # Twelve roundings for the weights and products, one a term; the truth has as many.
    u = torch.finfo(wide).eps / 2 * (2 if wide == torch.float64 else 1)
    bound = (len(dense[0]) + 12) * u * in_slots(size)
    assert ((ring.double() - in_slots(full)).abs() <= bound).all()


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [1, 2])
def test_activated_patches_with_a_floor(namespace, dtype, activation):
    """In a ring and of mirrored patches; what is activated beforehand gives the same."""
    volume, floor = (23, 20, 31), 0.2
    (patches, *tables), cover, _ = floored_case(volume, (9, 10, 16), 0.5, floor, dtype)
    wide = compute_dtype(dtype)
    place = (None, 2, 3, 28, 5, floor)
    rings = [torch.zeros(2, 23, 20, 25, dtype=wide) for _ in range(2)]
    namespace.overlap_add_(rings[0], patches, *tables, *place, activation, cover)
    before = activated(patches.to(wide), activation, 1)
    namespace.overlap_add_(rings[1], before, *tables, *place, 0, cover)
    eps = torch.finfo(wide).eps
    torch.testing.assert_close(*rings, rtol=8 * eps, atol=eps)


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_voxel_under_one_patch_with_a_floor_keeps_its_bits(namespace, dtype):
    factors, cover, _ = floored_case((9, 10, 11), (9, 10, 11), 0.5, 0.2, dtype)
    ring = torch.zeros(2, 9, 10, 11, dtype=compute_dtype(dtype))
    namespace.overlap_add_(ring, *factors, None, 0, 0, 9, 0, 0.2, 0, cover)
    assert torch.equal(ring.to(dtype), factors[0][0])


@pytest.mark.parametrize("namespace", ALL, ids=str)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_patches_that_the_tables_do_not_name_weigh_nothing(namespace, dtype, axis):
    factors, cover, _ = floored_case((9, 10, 40), (5, 6, 21), 0.5, 0.2, dtype)
    full, ring = torch.zeros(2, 2, 9, 10, 40, dtype=compute_dtype(dtype))
    options = (None, 0, 0, 9, 0, 0.2, 0, cover)
    namespace.overlap_add_(full, *factors, *options)
    cover[axis][:, 2:5] = -1.0
    namespace.overlap_add_(ring, *factors, *options)
    full.narrow(1 + axis, 2, 3).zero_()
    assert torch.equal(ring, full)


@needs_library
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_floor_gives_the_same_bits_for_any_batches_and_threads(dtype):
    (patches, origins, rows, weights), cover, _ = floored_case(
        (40, 33, 90), (20, 18, 50), 0.5, 0.1, dtype
    )
    before = torch.get_num_threads()
    results = []
    try:
        for threads, size in ((1, len(patches)), (2, 1), (3, 3), (5, 7)):
            torch.set_num_threads(threads)
            ring = torch.zeros(2, 40, 33, 90, dtype=compute_dtype(dtype))
            for first in range(0, len(patches), size):
                part = slice(first, first + size)
                tables = (patches[part], origins[part], rows[part], weights, None)
                torch.ops.voxfuse.overlap_add_(ring, *tables, 0, 0, 40, 0, 0.1, 0, cover)
            results.append(ring)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"floor": 0.0}, ValueError, r"floor: got 0.0, expected a finite number > 0 with cover"),
        ({"floor": float("nan")}, ValueError, r"floor: got nan"),
        ({"cover": []}, ValueError, r"cover: got shapes \[\], expected one \(m, extent\) tensor"),
        (
            {"cover": [torch.ones(2, 5, dtype=torch.float64), torch.ones(2, 8)]},
            ValueError,
            r"cover: got shapes \[\(2, 5\), \(2, 8\)\], expected .* up to \(6, 8\)",
        ),
        ({"cover": [torch.ones(2, 6), torch.ones(2, 8)]}, TypeError, r"cover: got .*float32"),
        (
            {"total": torch.ones(6, 8, dtype=torch.float64)},
            ValueError,
            r"total: got one beside floor",
        ),
    ],
)
def test_a_bad_floor_is_named(changes, error, message):
    factors, cover, _ = floored_case((6, 8), (4, 4), 0.5, 0.1)
    options = {"floor": 0.1, "cover": cover, **changes}
    with pytest.raises(error, match=message):
        ops.overlap_add_(torch.zeros(2, 6, 8), *factors, **options)


@needs_library
def test_a_bad_floor_is_refused_by_the_operator():
    factors, cover, _ = floored_case((6, 8), (4, 4), 0.5, 0.1)
    ring = torch.zeros(2, 6, 8)
    for tables, floor, message in (
        (None, 0.1, "cover: are 0, expected 2 with floor"),
        (cover, 0.0, "cover: are 2, expected 0 without floor"),
        (cover, -1.0, "floor: got -1"),
        ([cover[0], cover[1][:, :7]], 0.1, r"cover: got shape \(2, 7\), expected"),
        ([cover[0][:, :5], cover[1]], 0.1, "or more"),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.voxfuse.overlap_add_(ring, *factors, None, 0, 0, 6, 0, floor, 0, tables)


@needs_library
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("activation", [0, 1, 2])
def test_bits_do_not_depend_on_threads_or_run(dtype, general, activation):
    options = {"dtype": dtype, "general": general, "activation": activation}
    case = make_case((17, 19, 41), (9, 8, 10), 12, **options)
    grad = torch.randn(2, *case.volume).to(dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            results.append((case.forward(), case.backward(grad)))
    finally:
        torch.set_num_threads(before)
    for forward, backward in results[1:]:
        assert torch.equal(forward, results[0][0])
        assert torch.equal(backward, results[0][1])


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


# --- Bad input ------------------------------------------------------------------------------------


def bad_call(function, changes, error, message):
    with pytest.raises(error) as caught:
        function(**changes)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"patches": [1]}, TypeError, "patches: expected a torch.Tensor, got list"),
        (
            {"patches": torch.ones(2, 1, 4, 5, dtype=torch.int32)},
            TypeError,
            "patches: got int32 of shape (2, 1, 4, 5) on cpu, expected float32, float16, bfloat16 "
            "or float64",
        ),
        (
            {"patches": torch.ones(2, 4)},
            ValueError,
            "patches: got shape (2, 4), expected (N, C, *patch) with 1 to 3 spatial axes",
        ),
        (
            {"volume_shape": (6,)},
            ValueError,
            "volume_shape: got (6,), expected 2 sizes to go with patches of shape (2, 1, 4, 5)",
        ),
        (
            {"origins": torch.zeros(2, 3, dtype=torch.int64)},
            ValueError,
            "origins: got shape (2, 3), expected (2, 2)",
        ),
        (
            {"origins": torch.zeros(2, 2)},
            TypeError,
            "origins: got float32 of shape (2, 2) on cpu, expected integers",
        ),
        (
            {"origins": torch.zeros(3, 2, dtype=torch.int64)},
            ValueError,
            "origins: are 3, but there are 2 patches, of shape (2, 1, 4, 5) (an (N, n) tensor "
            "gives origins, a list of lists the starts along each axis)",
        ),
        (
            {"origins": [[0, 1]]},
            ValueError,
            "origins: got starts along 1 axes, expected a list of 2 lists of integers, or an "
            "(N, 2) tensor of origins",
        ),
        (
            {"origins": 3},
            TypeError,
            "origins: got int, expected a list of 2 lists of integers, or an (N, 2) tensor of "
            "origins",
        ),
        (
            {"origins": plan_grid((6, 5), (4, 4))},
            ValueError,
            "origins: got a grid of (4, 4) patches over a volume (6, 5), expected (4, 5) over "
            "(6, 5)",
        ),
        (
            {"backend": "fast"},
            ValueError,
            "backend: got 'fast', expected one of 'auto', 'reference', 'cpp', 'cuda', 'triton'",
        ),
        (
            {"activation": "relu"},
            ValueError,
            "activation: got 'relu', expected one of 'none', 'sigmoid', 'softmax'",
        ),
    ],
)
def test_bad_input(changes, error, message):
    good = {"patches": torch.ones(2, 1, 4, 5), "origins": [[0, 2], [0]], "volume_shape": (6, 5)}
    assert voxfuse.overlap_add(**good).shape == (1, 6, 5)
    bad_call(voxfuse.overlap_add, {**good, **changes}, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"origins": torch.zeros(2, 2, dtype=torch.int32)},
            TypeError,
            "origins: got int32 of shape (2, 2) on cpu, expected int64",
        ),
        (
            {"rows": torch.zeros(3, 2, dtype=torch.int64)},
            ValueError,
            "rows: got shape (3, 2), expected (2, 2)",
        ),
        (
            {"rows": torch.tensor([[0, 0], [0, 1]])},
            ValueError,
            "rows: 1 on axis 1 is outside [0, 1), the rows of weights[1]",
        ),
        (
            {"rows": torch.tensor([[0, 0], [-2, 0]])},
            ValueError,
            "rows: -2 on axis 0 is outside [0, 1), the rows of weights[0]",
        ),
        (
            {"weights": [torch.ones(1, 4), torch.ones(1, 5)]},
            TypeError,
            "weights: got float32 of shape (1, 4) on cpu, expected float64",
        ),
        (
            {"weights": [torch.ones(1, 4).double(), torch.ones(1, 6).double()]},
            ValueError,
            "weights: got shapes [(1, 4), (1, 6)], expected (k, 4), (k, 5), or one dense (1, 4, 5)",
        ),
        (
            {"weights": [torch.ones(2, 4, 5).double()]},
            ValueError,
            "weights: got shapes [(2, 4, 5)], expected (k, 4), (k, 5), or one dense (1, 4, 5)",
        ),
        (
            {"weights": torch.ones(1, 4, 5).double()},
            TypeError,
            "weights: expected a list of tensors, got Tensor",
        ),
        (
            {"total": torch.ones(6, 5)},
            TypeError,
            "total: got float32 of shape (6, 5) on cpu, expected float64",
        ),
        (
            {"total": torch.ones(5, 6).double()},
            ValueError,
            "total: got shape (5, 6), expected (6, 5)",
        ),
        (
            {"volume_shape": (6, -1)},
            ValueError,
            "volume_shape: got (6, -1), expected 2 sizes >= 0 to go with patches of shape "
            "(2, 1, 4, 5)",
        ),
    ],
)
def test_bad_tables(changes, error, message):
    good = {
        "patches": torch.ones(2, 1, 4, 5),
        "origins": torch.zeros(2, 2, dtype=torch.int64),
        "rows": torch.zeros(2, 2, dtype=torch.int64),
        "weights": [torch.ones(1, 4).double(), torch.ones(1, 5).double()],
        "volume_shape": (6, 5),
    }
    assert ops.overlap_add(**good).shape == (1, 6, 5)
    bad_call(ops.overlap_add, {**good, **changes}, error, message)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"ring": torch.zeros(1, 6, 5).half()},
            TypeError,
            "ring: got float16 of shape (1, 6, 5) on cpu, expected float32 for patches of dtype "
            "float32",
        ),
        (
            {"ring": torch.zeros(2, 6, 5)},
            ValueError,
            "ring: got shape (2, 6, 5), expected (C, *extent) to go with patches of shape "
            "(2, 1, 4, 5)",
        ),
        (
            {"ring": torch.zeros(1, 5, 6).transpose(1, 2)},
            ValueError,
            "ring: strides (30, 1, 6), expected a contiguous tensor",
        ),
        ({"ring_axis": 2}, ValueError, "ring_axis: got 2, expected 0 <= ring_axis < 2"),
        (
            {"start": 1, "stop": 8},
            ValueError,
            "start, stop: got 1, 8, expected 0 <= start <= stop <= start + 6, the slots of ring",
        ),
        (
            {"patches": torch.ones(2, 1, 4, 5, requires_grad=True)},
            ValueError,
            "patches: require grad, but overlap_add_ has none; use overlap_add",
        ),
        (
            {"activation": 2},
            ValueError,
            "activation: got 2, expected one of 'none', 'sigmoid', 'softmax'",
        ),
    ],
)
def test_bad_rings(changes, error, message):
    good = {
        "ring": torch.zeros(1, 6, 5),
        "patches": torch.ones(2, 1, 4, 5),
        "origins": torch.zeros(2, 2, dtype=torch.int64),
        "rows": torch.zeros(2, 2, dtype=torch.int64),
        "weights": [torch.ones(1, 4).double(), torch.ones(1, 5).double()],
    }
    assert ops.overlap_add_(**good) is good["ring"]
    bad_call(ops.overlap_add_, {**good, **changes}, error, message)


@needs_library
def test_the_compiled_operator_checks_for_itself():
    case = make_case((6, 5), (4, 3), 2)
    rows = case.rows.clone()
    rows[1, 0] = 3
    message = r"rows: 3 on axis 0 is outside \[0, 3\), the rows of weights\[0\]"
    with pytest.raises(RuntimeError, match=message):
        torch.ops.voxfuse.overlap_add(
            case.patches, case.origins, rows, case.weights, None, list(case.volume)
        )
    for wrong in (
        (case.patches[:, :, :3], case.origins, case.rows, case.weights, None, [6, 5]),
        (case.patches, case.origins[:1], case.rows, case.weights, None, [6, 5]),
        (case.patches, case.origins, case.rows, case.weights[:1], None, [6, 5]),
        (case.patches, case.origins, case.rows, case.weights, None, [6, 5, 4]),
        (case.patches, case.origins, case.rows, case.weights, torch.ones(5), [6, 5]),
        (case.patches.int(), case.origins, case.rows, case.weights, None, [6, 5]),
    ):
        with pytest.raises(RuntimeError, match=r"(patches|origins|weights|total): "):
            torch.ops.voxfuse.overlap_add(*wrong)


@pytest.mark.parametrize("namespace", ALL, ids=str)
def test_operators_check_the_activation(namespace):
    case = make_case((6, 5), (4, 3), 2)
    grad, tables = torch.ones(2, 6, 5), (case.origins, case.rows, case.weights, case.total)
    for wrong in (-1, 3):
        for call in (
            lambda n=wrong: namespace.overlap_add(case.patches, *tables, [6, 5], n),
            lambda n=wrong: namespace.overlap_add_(grad, case.patches, *tables, 0, 0, 6, 0, 0.0, n),
            lambda n=wrong: namespace.overlap_add_backward(grad, *tables, case.patches, n),
        ):
            with pytest.raises((ValueError, RuntimeError), match=f"activation: got {wrong}, exp"):
                call()
    with pytest.raises((ValueError, RuntimeError), match="patches: got None"):
        namespace.overlap_add_backward(grad, *tables, None, 2)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_an_activation_is_that_of_the_patches(activation):
    """On a grid and on the general path, and differentiable."""
    plan = plan_grid((30, 21), (8, 9), 0.5)
    patches = torch.randn(len(plan), 3, 8, 9, dtype=torch.float64, requires_grad=True)
    code = Activation[activation]
    for origins, window in ((plan, "bspline"), (plan.origins, voxfuse.bspline_window((8, 9), 5))):
        fused = voxfuse.overlap_add(patches, origins, (30, 21), window, activation=activation)
        expected = voxfuse.overlap_add(activated(patches, code, 1), origins, (30, 21), window)
        torch.testing.assert_close(fused, expected, rtol=1e-13, atol=1e-14)
        grad = torch.randn_like(fused)
        torch.testing.assert_close(
            *(torch.autograd.grad(x, patches, grad) for x in (fused, expected)),
            rtol=1e-12,
            atol=1e-14,
        )
        if activation == "softmax":
            torch.testing.assert_close(fused.sum(0), torch.ones_like(fused[0]))


def test_every_combination_of_axes_and_form_runs():
    for axes, dense, general in itertools.product((1, 2, 3), (False, True), (False, True)):
        case = make_case((6, 7, 8)[:axes], (3, 4, 5)[:axes], 3, dense=dense, general=general)
        torch.testing.assert_close(case.forward(), case.forward(torch.ops.voxfuse_reference))
