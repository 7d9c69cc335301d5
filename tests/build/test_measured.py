"""The documentation's figures are those of the committed measurements."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")]


def test_figures_in_prose_are_those_of_their_files():
    assert not report.wrong()


def test_the_table_of_the_readme_is_that_of_the_files():
    measured = f"{report.BEGIN}\n{report.readme()}\n{report.END}"
    assert measured in (ROOT / "README.md").read_text(), "run python benchmarks/report.py"


@pytest.mark.parametrize("file", sorted(path.stem for path in report.RESULTS.glob("*.json")))
def test_every_committed_measurement_is_on_a_page(file):
    """As a table or a picture that the site makes, or by its name beside the figures."""
    text = "\n".join(page.read_text() for page in PAGES)
    tables = re.findall(r"^```\{measured\} (\S+)$", text, re.MULTILINE)
    shown = {report.TABLES[table][0] for table in tables}
    shown.update(re.findall(r"^```\{measured-plot\} (\S+)$", text, re.MULTILINE))
    assert file in shown or f"`benchmarks/results/cpu/{file}.json`" in text


def test_every_table_is_on_a_page():
    text = "\n".join(page.read_text() for page in PAGES)
    assert set(report.TABLES) == set(re.findall(r"^```\{measured\} (\S+)$", text, re.MULTILINE))
