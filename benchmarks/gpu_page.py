"""report.md of a visit to a GPU. Imports neither PyTorch nor voxfuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def markdown(data: dict[str, Any]) -> str:
    """report.md: verdict, bars, steps, tests, sanitizers, counters."""

    def cell(value: object) -> str:
        if isinstance(value, float):
            return f"{value:.4g}"
        return str(value).replace("|", "/").replace("\n", " ")[:200]

    def rows(names: Sequence[str], items: Sequence[Sequence[object]]) -> list[str]:
        head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
        return [*head, *("| " + " | ".join(map(cell, item)) + " |" for item in items), ""]

    says = {True: "met", False: "MISSED", None: "not measured"}
    lines = [f"# {data['verdict']}", "", f"{data['time']}, {data['seconds']} s", ""]
    lines += ["## Machine", ""]
    lines += [f"- {key}: {cell(value)}" for key, value in data["machine"].items()]
    lines += ["", "## Bars", ""]
    lines += rows(
        ["bar", "case", "limit", "measured", "", "note"],
        [
            [
                bar["bar"],
                bar["case"],
                f"{bar['sign']} {bar['limit']:.4g}",
                "" if bar["measured"] is None else bar["measured"],
                says[bar["met"]],
                bar["note"],
            ]
            for bar in data["bars"]
        ],
    )
    lines += ["## Missing", ""]
    lines += [f"- {name}: {cell(why)}" for name, why in data["missing"].items()] or ["nothing"]
    lines += ["", "## Steps", ""]
    steps = data["steps"]
    lines += rows(
        ["step", "status", "exit", "seconds", "limit", "note"],
        [[s["name"], s["status"], s["exit"], s["seconds"], s["limit"], s["note"]] for s in steps],
    )
    lines += ["## Tests", ""]
    for name, found in data["tests"].items():
        counts = ", ".join(f"{value} {key}" for key, value in found.items() if key != "failures")
        lines.append(f"- {name}: {counts}")
        lines += [f"  - {cell(failure)}" for failure in found["failures"]]
    lines += ["", "## compute-sanitizer", ""]
    lines += [f"- {tool}: {cell(found)}" for tool, found in data["sanitizer"].items()]
    lines += ["", "## Nsight Compute", ""]
    if data["counters"]:
        names = list(data["counters"][0])
        lines += rows(names, [[row.get(name, "") for name in names] for row in data["counters"]])
    lines += ["## Bytes", ""]
    if data["byte_model"]:
        names = list(data["byte_model"][0])
        lines += rows(names, [[row[name] for name in names] for row in data["byte_model"]])
    return "\n".join(lines) + "\n"
