"""Every example in the documentation runs: docstrings, README and the pages in docs/."""

from __future__ import annotations

import doctest
import importlib
import json
import pkgutil
import re
import shlex
import urllib.parse
from pathlib import Path

import pytest

import voxfuse
from tests.build.test_installed import BUNDLE
from voxfuse import cli
from voxfuse.losses import options
from voxfuse.training.augmentation import steps_of
from voxfuse.training.config import load

FENCED = re.MULTILINE | re.DOTALL
ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), ROOT / "data/README.md"]
)
# Triton kernels need a GPU or the interpreter, and have tests of their own; the rest is no Python.
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(voxfuse.__path__, "voxfuse.")
    if not re.match(r"voxfuse\.(triton_kernels|_host|libvoxfuse)", module.name)
)
OPTIONAL = {
    "distributed", "monai", "nnunetv2", "torchio", "segmentation_models_pytorch", "tqdm",
}  # fmt: skip


def _import(name):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name and error.name.split(".")[0] in OPTIONAL:
            pytest.skip(f"{name} needs the package {error.name}")
        raise


@pytest.mark.parametrize("name", ["voxfuse", *MODULES])
def test_docstring_examples(name):
    module = _import(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    report: list[str] = []
    for test in finder.find(module, name):
        runner.run(test, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


@pytest.mark.parametrize("name", voxfuse.__all__)
def test_public_names_have_a_docstring_with_an_example(name):
    documented = getattr(voxfuse, name)
    assert documented.__doc__, f"voxfuse.{name} has no docstring"
    if callable(documented) and name != "Backend":
        assert ">>>" in documented.__doc__, f"the docstring of voxfuse.{name} has no example"


def _python_blocks(page):
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```", text, FENCED)


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_of_a_page_run(page, tmp_path, monkeypatch):
    """The blocks of a page run in order, in one namespace, as a reader would try them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "example"}
    for block in _python_blocks(page):
        if "import monai" in block or "from monai" in block:
            pytest.importorskip("monai", reason="the example compares with MONAI")
        if "import nibabel" in block:
            pytest.importorskip("nibabel", reason="the example writes a NIfTI file")
        if "import torchio" in block:
            pytest.importorskip("torchio", reason="the example fills an aggregator of TorchIO's")
        exec(compile(block, page, "exec"), namespace)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_have_options_that_exist(page):
    """Those of predict.md and of the tutorial are run, too, by tests of their own."""
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for command in re.findall(r"^(?:\$|   ) voxfuse (.*)$", text, re.MULTILINE):
        arguments = shlex.split(command, comments=True)
        if arguments[0] != "nnunet-predict":  # whose options are nnU-Net's
            cli.parser().parse_args(arguments)


def test_settings_on_a_page_are_read(tmp_path):
    """The blocks that are neither Python nor commands."""
    training, monai = ((ROOT / f"docs/{page}.md").read_text() for page in ("training", "monai"))
    (settings,) = re.findall(r"^```toml\n(.*?)^```", training, FENCED)
    (tmp_path / "voxfuse.toml").write_text(settings)
    pytest.importorskip("monai", reason="the transforms are MONAI's")
    assert steps_of(load(tmp_path / "voxfuse.toml").augmentation)
    (entry,) = re.findall(r"^```json\n(.*?)^```", monai, FENCED)
    assert json.loads(f"{{{entry}}}")["loss"] == BUNDLE["loss"]


def test_readme_has_examples_of_loss_and_inference():
    blocks = "\n".join(_python_blocks("README.md"))
    assert "TverskyLoss" in blocks
    assert "sliding_window_inference" in blocks


@pytest.mark.parametrize("page", PAGES)
def test_links_between_files_lead_somewhere(page):
    text = (ROOT / page).read_text()
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link or link.startswith("#"):
            continue
        assert (folder / link.split("#")[0]).exists(), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_named_in_code_spans_exist(page):
    """`csrc/cpu/soft_confusion.cpp` in a page is a promise."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    folders = "csrc|src|tests|examples|benchmarks|triton_kernels|docs|data"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{page} names {path}"


def test_readme_is_read_in_a_minute():
    """It points to the pages of the site, and leaves the rest to them."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 150
    for page in ("installing", "choosing_a_loss", "fusion", "training", "performance"):
        assert f"](docs/{page}.md)" in text


def test_the_page_of_the_command_line_has_every_command():
    text = (ROOT / "docs/command_line.md").read_text()
    (commands,) = (a.choices for a in cli.parser()._actions if isinstance(a.choices, dict))
    assert set(re.findall(r"^\| `voxfuse ([\w-]+)` \|", text, re.MULTILINE)) == set(commands)


@pytest.mark.parametrize("page", PAGES)
def test_pictures_have_a_text_and_addresses_are_whole(page):
    """The text is that of who does not see the picture; addresses are https and of a host."""
    text = (ROOT / page).read_text()
    for alternative in re.findall(r"!\[([^\]]*)\]\(", text):
        assert len(alternative.split()) >= 3, f"{page}: {alternative!r} does not say what is seen"
    pictures = re.findall(
        r"^```\{(?:image|figure|measured-plot)\} .*\n((?::.*\n)*)", text, re.MULTILINE
    )
    assert all(re.search(r"^:alt: \S+ \S+ \S+", options, re.MULTILINE) for options in pictures)
    prose = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    for address in re.findall(r"\w+://[^\s)>`\"']+", prose):
        parts = urllib.parse.urlsplit(address.rstrip(".,;"))
        assert parts.scheme == "https", address
        assert re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", parts.netloc), address


def test_the_site_has_every_example_and_every_public_name():
    examples = (ROOT / "docs/examples.md").read_text()
    for path in (ROOT / "examples").glob("*.py"):
        assert f"{{literalinclude}} ../examples/{path.name}" in examples, path.name
    reference = "".join(path.read_text() for path in (ROOT / "docs/api").glob("*.rst"))
    listed = set(re.findall(r"^\.\. auto\w+:: (voxfuse\.\S+)$", reference, re.MULTILINE))
    names = ("functional", "metrics", "scale", "integrations.monai", "integrations.nnunet")
    for name in ("", *(f".{name}" for name in names)):
        module = importlib.import_module(f"voxfuse{name}")
        for public in module.__all__:
            found = getattr(module, public)
            defined = f"{getattr(found, '__module__', '')}.{public}"
            constants = {f"voxfuse.metrics.{x}.{public}" for x in ("definitions", "lesions")}
            if not isinstance(found, type(importlib)):
                assert {f"voxfuse{name}.{public}", defined} & listed or constants & listed, public


def test_the_pages_have_every_loss_and_every_argument_of_monais_with_another_name():
    text = (ROOT / "docs/losses.md").read_text()
    for name in voxfuse.losses.__all__:
        assert not name.endswith("Loss") or f"`{name}`" in text, name
    text = (ROOT / "docs/monai.md").read_text()
    for name in [*options.MONAI_NAMES, "weight"]:
        assert f"`{name}=" in text, name


# Column of the table -> label of the link and file, for an operator's stem.
OPERATOR_FILES = {
    "Python": {"wrapper": "../src/voxfuse/ops/{}.py"},
    "reference": {"PyTorch": "../src/voxfuse/reference/{}.py"},
    "schema": {"schema": "../csrc/ops/{}.cpp"},
    "CPU": {"driver": "../csrc/cpu/{}.cpp", "kernel": "../csrc/cpu/{}_kernel.cpp"},
    "CUDA": {"kernel": "../csrc/cuda/{}.cu", "binding": "../csrc/cuda/{}_operator.cpp"},
    "Triton": {"kernel": "../triton_kernels/{}.py", "kernels": "../triton_kernels/{}/"},
}


@pytest.mark.parametrize(
    "stem", sorted(path.stem for path in (ROOT / "src/voxfuse/ops").glob("[a-z]*.py"))
)
def test_the_architecture_links_every_file_of_an_operator(stem):
    """A new reader gets from an operator's name to each of its files in one step."""
    cells = [
        ", ".join(
            f"[{label}]({pattern.format(stem)})"
            for label, pattern in files.items()
            if (ROOT / "docs" / pattern.format(stem)).exists()
        )
        for files in OPERATOR_FILES.values()
    ]
    row = " | ".join(cells)
    found = re.search(
        rf"^\| `{stem}` \| [^|]+ \| (.*) \|$", (ROOT / "docs/architecture.md").read_text(), re.M
    )
    assert found is not None, (
        f"docs/architecture.md: add a row | `{stem}` | what it computes | {row} |"
    )
    assert found[1].split(" | ") == cells, (
        f"docs/architecture.md: the row of `{stem}` should end with {row} |"
    )
