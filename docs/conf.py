"""The site: `make docs` builds it into build/site, and a warning is an error.

Sphinx, because the docstrings are its language (roles, mathematics) and it checks every reference
between pages; MyST, because the pages are Markdown that is read in the repository as well.
"""

from __future__ import annotations

import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

import voxfuse

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

project = "voxfuse"
author = "voxfuse developers"
copyright = author
version = release = voxfuse.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinxarg.ext",
    "sphinx_copybutton",
    "measured",
]
exclude_patterns = ["images"]

# Pages.
myst_heading_anchors = 3  # as in the repository's own rendering: page.md#heading
myst_enable_extensions = ["dollarmath"]
copybutton_exclude = ".linenos, .gp, .go"

# Docstrings.
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Shapes"]
python_display_short_literal_types = True
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = f"voxfuse {release}"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sphinx = False
# The source of a page is the repository.
html_copy_source = html_show_sourcelink = False
html_math_renderer = "mathml"


def mathml(self: Any, node: nodes.math | nodes.math_block, block: bool) -> None:
    """Mathematics as MathML, which browsers draw without a script from elsewhere."""
    display = "block" if block else "inline"
    text = convert(node.astext(), display=display)
    self.body.append(f'<div class="math">{text}</div>' if block else text)
    raise nodes.SkipNode


#: Pages of the site that are files elsewhere in the repository.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "SECURITY.md": "security.md",
    "data/README.md": "data.md",
}


def on_the_site(text: str, folder: Path, page: Path) -> str:
    """Links of a text in ``folder`` as the site's ``page`` has them; of a source, the text."""

    def moved(link: re.Match[str]) -> str:
        label, path, anchor = link.groups(default="")
        if not path or ":" in path:
            return link[0]
        path = posixpath.normpath((folder / path).relative_to(ROOT).as_posix())
        if path.startswith("examples/") and path.endswith((".py", ".toml")):
            path, anchor = "docs/examples.md", "#" + path.replace("/", "").replace(".", "")
        if label.endswith(".md"):
            label = ""  # becomes the page's title
        target = ROOT / "docs" / ELSEWHERE.get(path, path.removeprefix("docs/"))
        here = Path(os.path.relpath(target, page.parent)).as_posix()
        return f"[{label}]({here}{anchor})" if target.is_file() else link[1]

    return re.sub(r"\[([^\[\]]*)\]\(([^)\s#]*)(#[^)\s]*)?\)", moved, text)


def read_page(app: Sphinx, page: str, content: list[str]) -> None:
    path = Path(app.env.doc2path(page))
    if path.suffix == ".md":
        content[0] = on_the_site(content[0], path.parent, path)


def read_included(app: Sphinx, path: Path, page: str, content: list[str]) -> None:
    into = Path(app.env.doc2path(page))
    content[0] = on_the_site(content[0], (ROOT / "docs" / path).resolve().parent, into)


def setup(app: Sphinx) -> None:
    app.connect("source-read", read_page)
    app.connect("include-read", read_included)
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=(lambda self, node: mathml(self, node, False), None),
        block_renderers=(lambda self, node: mathml(self, node, True), None),
    )
