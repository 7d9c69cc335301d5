"""Tables for machines and for text."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from voxfuse.metrics.definitions import METRICS, definition
from voxfuse.metrics.lesions import SIZE_EDGES
from voxfuse.metrics.report.pictures import Miss
from voxfuse.metrics.study import Comparison, Options, Study

#: Columns of the short tables, where they were computed.
SHORT = (
    "dice",
    "sensitivity",
    "precision",
    "f2",
    "average_precision",
    "volume_difference_ml",
    "hd95",
    "assd",
    "surface_dice",
    "lesion_sensitivity",
    "lesion_precision",
    "lesion_f1",
    "lesions_false",
    "wmh_hd95",
    "isbi_score",
)


@dataclass(frozen=True)
class Report:
    """What the tables and the page are made of."""

    name: str
    studies: list[Study]
    options: Options
    size_edges: Sequence[float] = SIZE_EDGES
    other_name: str = ""
    other_minimum_volume: float | None = None  #: mm3, where it was tuned for the other method
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)
    misses: list[Miss] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    version: str = ""


def title(column: str) -> str:
    """How a column is headed: a rule's metrics carry its name."""
    rule = column.rpartition(".")[0]
    metric = definition(column)
    unit = f" [{metric.unit}]" if metric.unit else ""
    if metric.name in ("isbi_score", "wmh_hd95"):  # one rule's alone, and named after it
        rule = ""
    return f"{metric.title}{unit}" + (f", {rule}" if rule else "")


def compared_title(column: str) -> str:
    """How a column's differences are headed: of magnitudes, where 0 is best from both sides."""
    if definition(column).better != "zero":
        return title(column)
    return title(column).replace(definition(column).title, f"|{definition(column).title}|")


def compared_name(column: str) -> str:
    """A column's name in compare.csv, beside differences of magnitudes ``|column|``."""
    return f"|{column}|" if definition(column).better == "zero" else column


def short_columns(study: Study) -> list[str]:
    return [column for column in study.columns if column.rpartition(".")[2] in SHORT]


def number(value: float, column: str) -> str:
    """A value as text: counts whole, millilitres and millimetres to 2 digits, rates to 3."""
    if math.isnan(value):
        return "–"
    name = column.rpartition(".")[2]
    if name in ("lesions_truth", "lesions_prediction", "lesions_missed", "lesions_false"):
        return f"{value:.0f}" if value == round(value) else f"{value:.1f}"
    if name in ("specificity", "npv"):
        return f"{value:.5f}"
    return f"{value:.2f}" if METRICS[name].unit else f"{value:.3f}"


def policy_value(value: float | None) -> str:
    if value is None:
        return "by formula"
    return "undefined" if math.isnan(value) else f"{value:g}"


def policies(report: Report) -> Iterable[tuple[str, str, str, str, str]]:
    """Title, formula and the values for empty masks of every metric that was computed."""
    names = {column.rpartition(".")[2] for study in report.studies for column in study.columns}
    for name, metric in METRICS.items():
        if name in names:
            yield (
                metric.title,
                metric.formula,
                policy_value(metric.empty_truth),
                policy_value(metric.empty_prediction),
                policy_value(metric.both_empty),
            )


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def markdown(report: Report) -> str:
    """The summary: pooled metrics, subjects, lesions by size, comparison, policies."""
    parts = [f"# Evaluation of {report.name}"]
    parts += [f"- {rule}" for rule in report.options.rules]
    for study in report.studies:
        heading = f"## {study.label}: {len(study.scores)} subjects"
        rows = [
            (
                title(column),
                number(one.mean, column),
                number(one.sd, column),
                number(one.median, column),
                number(one.low, column),
                number(one.high, column),
                number(one.pooled, column),
                f"{one.subjects}",
            )
            for column, one in study.columns.items()
        ]
        header = ["metric", "mean", "sd", "median", "min", "max", "pooled", "n"]
        parts += ["", heading, "", _table(header, rows)]
        correlation = number(study.volume_correlation, "dice")
        parts += ["", f"Correlation of volumes over subjects: {correlation}"]
        columns = short_columns(study)
        rows_of_subjects = [
            (one.subject, *(number(one.values.get(c, math.nan), c) for c in columns))
            for one in study.scores
        ]
        parts += ["", _table(["subject", *(title(c) for c in columns)], rows_of_subjects)]
        for rule, match in study.matches.items():
            strata = [
                (
                    name,
                    f"{part.detected.size}",
                    f"{part.matching.size}",
                    number(part.sensitivity, "dice"),
                    number(part.precision, "dice"),
                    number(part.f1, "dice"),
                )
                for name, part in match.by_size(report.size_edges)
            ]
            header = ["mm3", "true", "predicted", "sensitivity", "precision", "F1"]
            parts += ["", f"Lesions by size, {rule}:", "", _table(header, strata)]
        compared = report.comparisons.get(study.label)
        if compared:
            parts += ["", f"### Against {report.other_name}", "", _comparison(report, compared)]
    header = ["metric", "formula", "empty truth", "empty prediction", "both empty"]
    parts += [
        "",
        "## Empty masks",
        "",
        "Undefined values are left out of means; n counts the others.",
        "",
        _table(header, policies(report)),
    ]
    if report.notes:
        parts += ["", "## Notes", "", *(f"- {note}" for note in report.notes)]
    return "\n".join(parts) + "\n"


def _comparison(report: Report, compared: list[Comparison]) -> str:
    rows = [
        (
            compared_title(one.column),
            number(one.difference, one.column),
            f"{number(one.low, one.column)} to {number(one.high, one.column)}",
            f"{one.count('first')}",
            f"{one.count('second')}",
            f"{one.count('tie')}",
        )
        for one in compared
    ]
    header = ["metric", "difference", "95 % t interval", f"{report.name} wins"]
    return _table([*header, f"{report.other_name} wins", "ties"], rows)


def write_tables(report: Report, folder: Path) -> list[Path]:
    """Write subjects.csv, pooled.csv, lesions.csv, summary.md and results.json.

    And compare.csv, if there is a comparison; else one of an earlier run goes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = [
        _csv(folder / "subjects.csv", _subject_rows(report)),
        _csv(folder / "pooled.csv", _pooled_rows(report)),
        _csv(folder / "lesions.csv", _lesion_rows(report)),
    ]
    if report.comparisons:
        written.append(_csv(folder / "compare.csv", _compare_rows(report)))
    else:
        (folder / "compare.csv").unlink(missing_ok=True)
    (folder / "summary.md").write_text(markdown(report), encoding="utf-8")
    text = json.dumps(_plain(as_json(report)), indent=1, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    return [*written, folder / "summary.md", folder / "results.json"]


def _csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    header = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, header)
        writer.writeheader()
        # An undefined value is an empty cell.
        writer.writerows(
            {k: "" if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
            for row in rows
        )
    return path


def _subject_rows(report: Report) -> list[dict[str, Any]]:
    return [
        {"subject": one.subject, "label": one.label, **one.values}
        for study in report.studies
        for one in study.scores
    ]


def _pooled_rows(report: Report) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for study in report.studies:
        rows += [
            {"label": study.label, "metric": column, **asdict(one)}
            for column, one in study.columns.items()
        ]
        rows.append(
            {
                "label": study.label,
                "metric": "volume_correlation",
                "subjects": len(study.scores),
                "pooled": study.volume_correlation,
            }
        )
    return rows


def _lesion_rows(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "label": study.label,
            "rule": rule,
            "volume_mm3": name,
            "lesions_truth": part.detected.size,
            "lesions_prediction": part.matching.size,
            "sensitivity": part.sensitivity,
            "precision": part.precision,
            "f1": part.f1,
        }
        for study in report.studies
        for rule, match in study.matches.items()
        for name, part in match.by_size(report.size_edges)
    ]


def _compare_rows(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "label": label,
            "metric": compared_name(one.column),
            "subject": subject,
            "difference": difference,
            "winner": {"first": report.name, "second": report.other_name}.get(
                one.winners[subject], "tie"
            ),
        }
        for label, compared in report.comparisons.items()
        for one in compared
        for subject, difference in one.differences.items()
    ]


def as_json(report: Report) -> dict[str, Any]:
    """Everything but the pictures."""
    return {
        "voxfuse": report.version,
        "name": report.name,
        "options": asdict(report.options),
        "notes": report.notes,
        "subjects": _subject_rows(report),
        "pooled": _pooled_rows(report),
        "lesions_by_size": _lesion_rows(report),
        "curves": {study.label: _curves(study) for study in report.studies},
        "comparison": {
            "other": report.other_name,
            "minimum_volume": report.other_minimum_volume,
            "metrics": [
                {"label": label, **asdict(one), "column": compared_name(one.column)}
                for label, compared in report.comparisons.items()
                for one in compared
            ],
        }
        if report.comparisons
        else None,
        "empty_masks": {
            name: {
                "truth": policy_value(metric.empty_truth),
                "prediction": policy_value(metric.empty_prediction),
                "both": policy_value(metric.both_empty),
            }
            for name, metric in METRICS.items()
        },
    }


def _curves(study: Study) -> dict[str, Any]:
    from voxfuse.metrics.lesions import free_response_of_counts
    from voxfuse.metrics.study import LEVELS

    found: dict[str, Any] = {}
    if study.curves is not None:
        found["precision_recall"] = asdict(study.curves.precision_recall())
        found["f1"], found["f2"] = (study.curves.f_beta(beta)[1] for beta in (1, 2))
        found["reliability"] = asdict(study.curves.reliability(10))
        found["calibration_error"] = study.curves.reliability(10).calibration_error
    for rule, counts in study.free_response.items():
        curve = free_response_of_counts(LEVELS, counts, len(study.scores))
        found[f"{rule}.free_response"] = asdict(curve)
    return found


def _plain(value: Any) -> Any:
    """What JSON can hold: lists for arrays, null for undefined numbers."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
