"""One contract: the codes, columns and schemas that Python, Triton and C++ agree on."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

from voxfuse import contract

CODES = Path(__file__).parents[2] / "csrc" / "contract" / "codes.h"
#: Operators with backward passes or variants of their own have one stem.
STEMS = (
    "soft_confusion",
    "hard_confusion",
    "head_confusion",
    "ratio_loss",
    "overlap_add",
    "finalize_slab",
    "resample_argmax",
)
ENUMERATIONS = {
    name: kind
    for name, kind in vars(contract).items()
    if inspect.isclass(kind) and issubclass(kind, contract.Code) and kind is not contract.Code
}


@pytest.fixture(scope="module")
def header() -> str:
    if not CODES.exists():
        pytest.skip("the C++ sources are not here")
    return re.sub(r"//.*", "", CODES.read_text())


def enumerators(body: str) -> dict[str, int]:
    """The members of a C++ enumeration and their values."""
    values: dict[str, int] = {}
    for member in filter(None, (text.strip() for text in body.split(","))):
        name, _, value = (part.strip() for part in member.partition("="))
        values[name] = int(value) if value else max(values.values(), default=-1) + 1
    return values


def test_cpp_has_the_same_codes_under_the_same_names(header):
    found = dict(re.findall(r"enum class (\w+) : int \{([^}]*)\};", header))
    found |= dict(re.findall(r"struct (\w+) \{\s*enum \w+ : int \{([^}]*)\};\s*\};", header))
    assert header.count("enum ") == len(found)
    compared = {name: enumerators(body) for name, body in found.items()}
    assert compared == {
        name: {code.name: int(code) for code in kind} for name, kind in ENUMERATIONS.items()
    }


def test_cpp_has_the_same_widths_of_the_sums(header):
    (listed,) = re.findall(r"inline constexpr int ([^;]*);", header)
    assert f'char VALUE_ERROR[] = "{contract.VALUE_ERROR}";' in header
    assert float(re.search(r"TARGET_ROOM = (.*);", header)[1]) == contract.TARGET_ROOM
    assert enumerators(listed) == {"CORE": contract.CORE, "FULL": contract.FULL}
    assert list(contract.Sum) == list(range(contract.FULL))
    assert [column.name for column in contract.Sum][: contract.CORE] == ["TP", "FP", "FN", "NLL"]


def test_codes_print_as_integers():
    """Triton puts constants into the names of kernels."""
    for kind in ENUMERATIONS.values():
        for code in kind:
            assert [repr(code), str(code), f"{code}"] == [str(int(code))] * 3


def test_the_contract_imports_nothing_of_voxfuse():
    tree = ast.parse(inspect.getsource(contract))
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    modules |= {
        n.name for node in ast.walk(tree) if isinstance(node, ast.Import) for n in node.names
    }
    assert not any(name.split(".")[0] in ("voxfuse", "torch", "triton") for name in modules)


@pytest.mark.parametrize(
    ("options", "operators"),
    [
        (
            contract.ConfusionOptions,
            (
                "soft_confusion",
                "soft_confusion_backward",
                "head_confusion",
                "head_confusion_backward",
            ),
        ),
        (contract.RatioOptions, ("ratio_loss",)),
    ],
)
def test_options_are_arguments_of_the_schemas(options, operators):
    for name in operators:
        arguments = {a.name for a in torch._C.parse_schema(name + contract.SCHEMAS[name]).arguments}
        assert set(options._fields) <= arguments, name


def test_every_operator_stands_where_the_guide_says():
    root = CODES.parents[2]
    guide = (root / "CONTRIBUTING.md").read_text()
    places = re.findall(r"`((?:src|csrc|triton_kernels|tests)/[^`]*)`", guide)
    assert sum("<stem>" in place for place in places) >= 7
    for stem in STEMS:
        for place in {place.replace("<stem>", stem) for place in places}:
            path = root / place
            assert path.exists() or path.with_suffix(".py").exists(), place
