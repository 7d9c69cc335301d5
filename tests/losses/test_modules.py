"""The modules and functions of the losses: options, signatures, state."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
import torch._dynamo.testing

import voxfuse
from tests.losses.cases import (
    MODULES,
    batch,
    everyone,
    module_of,
)
from voxfuse.ops.head_confusion import head_confusion

# --- Modules -------------------------------------------------------------------------------------


@everyone
def test_modules_pickle_copy_and_print(name):
    loss = MODULES[name]()
    logits, labels = batch()
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert repr(twin) == repr(loss)
        torch.testing.assert_close(twin(logits, labels), loss(logits, labels), rtol=0, atol=0)


def test_repr_shows_what_matters():
    loss = voxfuse.TverskyLoss(0.3, 0.7, include_background=False, class_weight=[1.0, 2.0])
    assert repr(loss) == (
        "TverskyLoss(alpha=0.3, beta=0.7, include_background=False, class_weight=[1.0, 2.0])"
    )
    loss.class_weight = [[1.0, 0.0], [0.1, 2.0]]
    assert repr(loss).endswith("class_weight=[[1.0, 0.0], [0.1, 2.0]])")


def test_a_changed_option_takes_effect():
    logits, labels = batch()
    loss = voxfuse.TverskyLoss()
    loss.alpha, loss.beta = 0.3, 0.7
    torch.testing.assert_close(
        loss(logits, labels), voxfuse.TverskyLoss(0.3, 0.7)(logits, labels), rtol=0, atol=0
    )
    loss.alpha = -1
    with pytest.raises(ValueError, match="alpha: got -1"):
        loss(logits, labels)


def test_weights_are_buffers_and_survive_a_state_dict():
    loss = voxfuse.DiceCELoss(class_weight=[1.0, 2.0, 3.0], likelihood_weight=torch.ones(3))
    assert set(loss.state_dict()) == {"class_weight", "likelihood_weight"}
    other = voxfuse.DiceCELoss(class_weight=[0.0] * 3, likelihood_weight=torch.zeros(3))
    other.load_state_dict(loss.state_dict())
    torch.testing.assert_close(other.class_weight, loss.class_weight)


@pytest.mark.parametrize("function", voxfuse.functional.__all__)
def test_functions_have_the_options_and_defaults_of_their_modules(function):
    own = list(inspect.signature(getattr(voxfuse.functional, function)).parameters.values())
    theirs = inspect.signature(module_of(function)).parameters
    assert [(p.name, p.default) for p in own[:3]] == [
        ("input", inspect.Parameter.empty),
        ("target", inspect.Parameter.empty),
        ("mask", None),
    ]
    of_call = {"annotated": None, "return_sums": False}
    options = {**of_call, **{n: p.default for n, p in theirs.items()}}
    assert {p.name: p.default for p in own[3:]} == options
    assert all(p.kind is p.KEYWORD_ONLY for p in own[3:])


def test_a_mask_is_called_mask_everywhere():
    """In modules, functions, deep supervision, heads, fused networks and the operators."""
    logits, labels = batch()
    mask = torch.rand(2, 5, 4, 3) > 0.3
    # A convolution that hands its features on as logits.
    network = torch.nn.Sequential(torch.nn.Conv3d(3, 3, 1))
    torch.nn.init.dirac_(network[0].weight)
    torch.nn.init.zeros_(network[0].bias)
    head = (logits, network[0].weight, network[0].bias, labels)
    loss = voxfuse.DiceCELoss()
    expected = loss(logits, labels, mask)
    assert expected != loss(logits, labels)
    for value in (
        loss(logits, labels, mask=mask),
        voxfuse.functional.dice_ce_loss(logits, labels, mask=mask),
        voxfuse.DeepSupervisionLoss(loss)([logits], labels, mask=mask),
        voxfuse.head_loss(loss, *head, mask=mask),
        voxfuse.HeadDiceCELoss()(*head, mask=mask),
        voxfuse.fuse_head(network, loss)(logits, labels, mask=mask),
    ):
        torch.testing.assert_close(value, expected)
    for call in (
        lambda **k: loss(logits, labels, **k),
        lambda **k: voxfuse.DeepSupervisionLoss(loss)([logits], labels, **k),
        lambda **k: voxfuse.functional.dice_ce_loss(logits, labels, **k),
    ):
        with pytest.raises(TypeError, match="weight.*weights of voxels are mask="):
            call(weight=mask)
    with pytest.raises(TypeError, match="masks: not an argument of the call of DiceCELoss"):
        loss(logits, labels, masks=mask)
    with pytest.raises(TypeError, match="voxel_weight: .* HeadDiceCELoss; weights of voxels are"):
        voxfuse.HeadDiceCELoss()(*head, voxel_weight=mask)
    sums = voxfuse.soft_confusion(logits, labels, mask=mask)
    torch.testing.assert_close(head_confusion(*head, mask=mask), sums)


@pytest.mark.parametrize("function", voxfuse.functional.__all__)
def test_functions_go_by_their_names(function):
    loss = getattr(voxfuse.functional, function)
    assert (loss.__name__, loss.__module__) == (function, "voxfuse.losses.functional")
    assert f"see :class:`voxfuse.{module_of(function).__name__}`." in loss.__doc__
    assert pickle.loads(pickle.dumps(loss)) is loss
    logits, labels = batch()
    with pytest.raises(TypeError, match=rf"{function}\(\) takes from 2 to 3 positional arguments"):
        loss(logits, labels, None, 0.3)
    with pytest.raises(TypeError, match="unexpected keyword argument 'alfa'"):
        loss(logits, labels, alfa=0.3)


@pytest.mark.parametrize("function", voxfuse.functional.__all__)
def test_options_are_the_parameters_of_the_constructor(function):
    """In their order: what makes the loss first, by position; what all share by keyword."""
    module = module_of(function)
    parameters = inspect.signature(module).parameters
    keywords = [p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert {"process_group", "ddp_average", "backend", "class_weight"} <= set(keywords)
    loss = module()
    for option in parameters.values():
        assert getattr(loss, option.name) == option.default
    with pytest.raises(TypeError, match="too many positional arguments"):
        module(*[p.default for p in parameters.values()])
    with pytest.raises(
        TypeError, match=f"alfa: not an option of {module.__name__}, which has .*backend"
    ):
        module(alfa=0.3)


@pytest.mark.slow
def test_type_checkers_know_the_options(tmp_path):
    api = pytest.importorskip("mypy.api")
    uses = tmp_path / "uses.py"
    uses.write_text(
        "import torch\n"
        "from voxfuse import functional as F\n"
        "x = torch.zeros(1)\n"
        "reveal_type(F.tversky_loss(x, x, alpha=0.3, smooth_nr=0.0, class_weight=[1.0]))\n"
        "reveal_type(F.bce_loss(x, x, x, pos_weight=2.0))\n"
        "reveal_type(F.lovasz_softmax_loss(x, x, classes=[1]))\n"
        "reveal_type(F.tversky_loss(x, x, mask=x, return_sums=True))\n"
        "reveal_type(F.dice_ce_loss)\n"
        "F.tversky_loss(x, x, alfa=0.3)\n"
        "F.tversky_loss(x, x, alpha='a')\n"
        "F.tversky_loss(x)\n"
        "import voxfuse\n"
        "reveal_type(voxfuse.TverskyLoss)\n"
        "reveal_type(voxfuse.TverskyLoss(0.3, 0.7, smooth_nr=0.0, class_weight=[1.0]))\n"
        "from voxfuse.integrations import monai\n"
        "reveal_type(monai.FocalLoss)\n"
        "voxfuse.TverskyLoss(0.3, 0.7, 1.0, 'sigmoid')\n"
        "voxfuse.DiceLoss(pos_weight=2.0)\n"
        "monai.DiceLoss(squared=True)\n"
        "reveal_type(voxfuse.HeadDiceCELoss)\n"
        "reveal_type(voxfuse.HeadTverskyLoss(0.3, 0.7, smooth_nr=0.0, chunk_bytes=1 << 20))\n"
        "voxfuse.HeadTverskyLoss(alfa=0.3)\n"
    )
    told, _, _ = api.run([str(uses), "--no-error-summary"])
    lines: dict[int, str] = {}
    for line in told.splitlines():
        number, text = line.split("uses.py:")[1].split(": ", 1)
        lines.setdefault(int(number), text)
    tensor = 'note: Revealed type is "torch._tensor.Tensor"'
    assert [lines.pop(number) for number in (4, 5, 6)] == [tensor] * 3
    assert lines.pop(7).startswith('note: Revealed type is "tuple[torch._tensor.Tensor, tuple[')
    function, constructor, peers, head = (lines.pop(number) for number in (8, 13, 16, 20))
    assert "lambda_dice: float =" in function
    assert "likelihood_weight:" in function
    assert "alpha: float =, beta: float =, gamma: float =, *, activation: str =" in constructor
    assert "include_background: bool =, to_onehot_y: bool =, gamma: float =" in peers
    assert "lambda_dice: float =, lambda_ce: float =" in head
    assert "likelihood_weight:" in head
    assert "chunk_bytes: int =" in head
    made = {14: "voxfuse.losses.overlap.TverskyLoss", 21: "voxfuse.losses.head.HeadTverskyLoss"}
    for number, kind in made.items():
        assert lines.pop(number) == f'note: Revealed type is "{kind}"'
    assert sorted(lines) == [9, 10, 11, 17, 18, 19, 22]
    assert all(text.startswith("error: ") for text in lines.values())


@everyone
def test_functions_equal_modules(name):
    module = MODULES[name]()
    words = type(module).__name__.removesuffix("Loss")
    known = {n.replace("_", ""): n for n in voxfuse.functional.__all__}
    key = {"Lovasz": "lovaszsoftmax"}.get(words, words.lower()) + "loss"
    function = getattr(voxfuse.functional, known[key])
    options = {"alpha": 0.3, "beta": 0.7} if "Tversky" in words and "Focal" not in words else {}
    options = {"beta": 2.0} if words == "FBeta" else options
    options = {"squared": True} if name == "dice squared" else options
    logits, labels = batch()
    torch.testing.assert_close(
        function(logits, labels, **options), module(logits, labels), rtol=0, atol=0
    )


TENSOR = torch.zeros(2, 3, 4, 4)
SLIPS = {
    "boolean, by position": (
        lambda: voxfuse.TverskyLoss(False, True),
        "alpha: got False, exp",
    ),
    "boolean, by name": (lambda: voxfuse.DiceCELoss(lambda_ce=True), "lambda_ce: got True, expec"),
    "MONAI's first argument": (lambda: voxfuse.DiceLoss(False), "DiceLoss: too many positional"),
    "of BCE too": (lambda: voxfuse.BCELoss(False), "BCELoss: too many positional"),
    "boolean label": (lambda: voxfuse.DiceLoss(ignore_index=True), "ignore_index: got True, exp"),
    "not constructed": (
        lambda: voxfuse.DiceCELoss(TENSOR, TENSOR),
        r"got a tensor of shape \(2, 3, 4, 4\) .* construct the loss first: DiceCELoss\(\)\(logits",
    ),
    "not constructed, by name": (
        lambda: voxfuse.DiceLoss(input=TENSOR, target=TENSOR),
        r"construct the loss first: DiceLoss\(\)",
    ),
    "tensor for a number": (
        lambda: voxfuse.TverskyLoss(alpha=TENSOR),
        r"alpha: got a tensor of shape \(2, 3, 4, 4\), expected a number",
    ),
    "class of a loss": (
        lambda: voxfuse.DeepSupervisionLoss(voxfuse.DiceCELoss),
        r"loss: got the class DiceCELoss, expected a loss to call, DiceCELoss\(\)",
    ),
    "misspelt": (
        lambda: voxfuse.TopKLoss(class_wieght=[1.0, 2.0]),
        r"class_wieght: not an option of TopKLoss, which has .*; did you mean class_weight\?",
    ),
    "misspelt, in a function": (
        lambda: voxfuse.functional.dice_loss(TENSOR, TENSOR, smoth_nr=1.0),
        r"'smoth_nr'; did you mean smooth_nr\?",
    ),
    "another loss's option": (
        lambda: voxfuse.DiceLoss(w_type="simple"),
        "w_type: not an option of DiceLoss; MONAI's w_type is class_pooling= of voxfuse.Gen",
    ),
    "a function that returns no tensor": (
        lambda: voxfuse.SumsLoss(lambda sums: 3.0)(TENSOR, TENSOR),
        "function: returned a float, expected a torch.Tensor",
    ),
    "an array": (
        lambda: voxfuse.DiceLoss()(TENSOR, TENSOR.numpy()),
        "target: expected a torch.Tensor, got ndarray; use torch.from_numpy",
    ),
    "class as a function": (
        lambda: voxfuse.SumsLoss(voxfuse.DiceCELoss),
        "function: got the class DiceCELoss",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_common_slip_gets_a_short_message(slip):
    make, message = SLIPS[slip]
    with pytest.raises(TypeError, match=message) as caught:
        make()
    assert len(str(caught.value)) < 200


@pytest.mark.parametrize(
    "loss",
    [
        voxfuse.DiceCELoss,
        voxfuse.LovaszLoss,
        lambda **k: voxfuse.DeepSupervisionLoss(voxfuse.CrossEntropyLoss(**k), downsample="max"),
    ],
)
def test_ignore_index_may_be_an_integer_of_numpy(loss):
    logits = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.full((2, 4, 4), 255, dtype=torch.uint8)
    labels[0] = 1
    expected = loss(ignore_index=255)(logits, labels)
    assert torch.equal(loss(ignore_index=np.int64(255))(logits, labels), expected)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_weights_of_classes_are_finite_and_not_negative(wrong):
    message = f"class_weight: got {wrong:g}, expected finite numbers >= 0"
    for weights in ([1.0, wrong, 1.0], torch.tensor([1.0, wrong, 1.0])):
        with pytest.raises(ValueError, match=message):
            voxfuse.LovaszLoss(class_weight=weights)
        loss = voxfuse.DiceLoss()
        with pytest.raises(ValueError, match=message):
            loss.class_weight = weights
        with pytest.raises(ValueError, match=message):
            voxfuse.functional.dice_loss(TENSOR, TENSOR, class_weight=weights)


@pytest.mark.parametrize(
    ("dtype", "label", "ignore_index", "told"),
    [
        (torch.bfloat16, 999, 999, True),  # held as 1000
        (torch.int8, -1, 255, True),
        (torch.float16, float("inf"), 70000, True),
        (torch.uint8, 255, -1, True),
        (torch.uint8, 255, 254, False),
        (torch.float32, 7, 255, False),
    ],
)
def test_a_wrong_label_says_that_its_type_cannot_hold_the_ignored_one(
    dtype, label, ignore_index, told
):
    labels = torch.full((2, 4, 4), label).to(dtype)
    name = str(dtype).removeprefix("torch.")
    more = f"; {name} labels cannot hold ignore_index {ignore_index}"
    for call in (voxfuse.soft_confusion, voxfuse.functional.dice_loss):
        with pytest.raises(ValueError, match="target: label") as caught:
            call(TENSOR, labels, ignore_index=ignore_index)
        assert str(caught.value).endswith(more) == told


@pytest.mark.parametrize(
    ("make", "name", "given"),
    [
        (voxfuse.DiceCELoss, "lambda_dice", torch.tensor(0.25)),
        (voxfuse.TverskyLoss, "alpha", np.array([0.25])),
        (voxfuse.FocalLoss, "alpha", [0.1, 0.2, 0.7]),
        (voxfuse.FocalLoss, "alpha", torch.tensor([0.1, 0.2, 0.7])),
    ],
)
def test_a_number_that_is_changed_in_place_is_not_the_losses(make, name, given):
    logits, labels = batch()
    loss = make(**{name: given})
    before = repr(loss), float(loss(logits, labels))
    if isinstance(given, list):
        given[0] = 5.0
    else:
        given *= 5
    assert (repr(loss), float(loss(logits, labels))) == before
    assert "tensor" not in repr(loss)
    setattr(loss, name, given)
    assert repr(loss) != before[0]
    assert float(loss(logits, labels)) != before[1]


def test_a_number_that_requires_grad_is_an_error():
    learnt = torch.nn.Parameter(torch.tensor(0.5))
    message = r"requires grad, but no gradient flows to it; detach it"
    for make, name in (
        (voxfuse.DiceCELoss, "lambda_dice"),
        (voxfuse.TverskyLoss, "alpha"),
        (voxfuse.FocalLoss, "gamma"),
        (voxfuse.FocalLoss, "alpha"),
        (voxfuse.UnifiedFocalLoss, "delta"),
        (voxfuse.HeadDiceCELoss, "lambda_ce"),
    ):
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            make(**{name: learnt})
        with pytest.raises(ValueError, match=f"{name}: {message}"):
            setattr(make(), name, learnt)
    with pytest.raises(ValueError, match=f"alpha: {message}"):
        voxfuse.FocalLoss(alpha=[0.5, learnt, 0.5])
    with pytest.raises(ValueError, match=f"lambda_ce: {message}"):
        voxfuse.functional.dice_ce_loss(TENSOR, TENSOR[:, 0].long(), lambda_ce=learnt)
    for weights in ([1.0, learnt], torch.ones(2, requires_grad=True)):
        with pytest.raises(ValueError, match=f"weights: {message}"):
            voxfuse.DeepSupervisionLoss(voxfuse.DiceLoss(), weights=weights)


@pytest.mark.parametrize("name", ["batch", "include_background", "likelihood_include_background"])
def test_a_flag_is_true_or_false(name):
    message = f"{name}: got 'False', expected True or False"
    with pytest.raises(TypeError, match=message):
        voxfuse.DiceCELoss(**{name: "False"})
    with pytest.raises(TypeError, match=message):
        voxfuse.functional.dice_ce_loss(TENSOR, TENSOR[:, 0].long(), **{name: "False"})
    assert getattr(voxfuse.DiceCELoss(**{name: np.bool_(True)}), name)
