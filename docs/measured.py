"""Tables and pictures of committed measurements, made while the site is built.

```{measured} loss
```

is the table of that name in benchmarks/report.py, and

```{measured-plot} loss
:alt: what the picture shows
```

the picture that benchmarks/plots.py draws. Both are followed by machine, versions, commit and file.
"""

from __future__ import annotations

import html
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from benchmarks import plots, report


class Measured(SphinxDirective):
    required_arguments = 1

    def made(self, name: str) -> list[nodes.Node]:
        return self.parse_text_to_nodes(report.TABLES[name][1]())

    def file(self, name: str) -> str:
        return report.TABLES[name][0]

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        file = self.file(name)
        for path in (report.RESULTS / f"{file}.json", report.__file__, plots.__file__):
            self.env.note_dependency(str(path))
        measured = nodes.container(classes=["measured"])
        measured += self.parse_text_to_nodes(f"Measured on {report.source(file)}")
        return [*self.made(name), measured]


class MeasuredPlot(Measured):
    option_spec: ClassVar[dict[str, Any]] = {"alt": directives.unchanged_required}

    def file(self, name: str) -> str:
        return name

    def made(self, name: str) -> list[nodes.Node]:
        alternative = html.escape(self.options["alt"])
        picture = plots.inline(report.load(name))
        drawn = f'<div class="plot" role="img" aria-label="{alternative}">{picture}</div>'
        return [nodes.raw("", drawn, format="html"), nodes.raw("", alternative, format="text")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("measured", Measured)
    app.add_directive("measured-plot", MeasuredPlot)
    return {"parallel_read_safe": True}
