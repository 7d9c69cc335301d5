"""The numbers of docs/kernels.md are those of the byte model and of the committed counts."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the byte model reads the Triton kernels' constants")

from benchmarks import byte_model

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/kernels.md").read_text()
BYTES = re.compile(
    r"^\| \((\d+), (\d+), (\d+)³\) (\w+) \| ([\d.]+) MB \| ([\d.]+) MB \| ([\d.]+) \| ([\d.]+) \|$",
    re.MULTILINE,
)
COUNTS = re.compile(
    r"^\| (CUDA|Triton) \| (\d+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", re.MULTILINE
)
COLUMNS = [(way, dtype) for way in ("forward", "backward") for dtype in ("float32", "bfloat16")]


def test_bytes_are_those_of_the_byte_model():
    rows = {(r["case"], r["backend"], r["kernel"]): r for r in byte_model.table()}
    found = BYTES.findall(PAGE)
    assert len(found) == 2 * len(byte_model.LOSS_SHAPES)
    for batch, classes, edge, dtype, forward, backward, cuda, triton in found:
        case = f"{batch}x{classes}x{edge}x{edge}x{edge} {dtype}"
        kernel = rows[case, "cuda", "soft_confusion"]
        assert float(forward) == pytest.approx(kernel["floor"] / 1e6, abs=0.051), case
        assert float(cuda) == kernel["moved_over_floor"], case
        assert float(triton) == rows[case, "triton", "soft_confusion"]["moved_over_floor"], case
        kernel = rows[case, "cuda", "soft_confusion_backward"]
        assert float(backward) == pytest.approx(kernel["floor"] / 1e6, abs=0.051), case
        assert kernel["moved_over_floor"] == 1.0


def test_instructions_are_those_of_the_committed_counts():
    committed = json.loads((ROOT / "benchmarks/results/instructions.json").read_text())
    counts = {
        (k["backend"], k["classes"], k["kernel"].split("_")[-1], k["dtype"]): k["per_logit"]
        for k in committed["kernels"]
    }
    shown = {
        (backend.lower(), int(classes), *column): float(number)
        for backend, classes, *numbers in COUNTS.findall(PAGE)
        for column, number in zip(COLUMNS, numbers, strict=True)
    }
    assert shown == pytest.approx(counts, abs=0.051)
