"""Bad arguments of overlap_add are errors that name them."""

from __future__ import annotations

import itertools

import pytest
import torch

import voxfuse
from tests.ops.overlap_add.cases import (
    ALL,
    make_case,
    needs_library,
)
from voxfuse.contract import Activation
from voxfuse.fusion.grids import plan_grid
from voxfuse.ops import overlap_add as ops
from voxfuse.reference.overlap_add import activated

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
            {"origins": [[0, 1, 2]]},
            ValueError,
            "origins: got starts along 1 axes, expected a list of 2 lists of integers, or an "
            "(N, 2) tensor of origins",
        ),
        (
            {"origins": [[0, 1]]},
            ValueError,
            "origins: got a list of 1 lists of 2 integers; a list of lists is the starts along "
            "each axis, so pass the origins of patches as a tensor, torch.tensor(origins)",
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
