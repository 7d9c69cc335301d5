"""One HTML page that needs nothing else: styles, pictures and the script are inside."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence

from voxfuse.metrics.definitions import definition
from voxfuse.metrics.lesions import free_response_of_counts
from voxfuse.metrics.report.charts import Series, bar_chart, xy_chart
from voxfuse.metrics.report.pictures import COLOURS, Miss, data_uri
from voxfuse.metrics.report.tables import (
    Report,
    compared_title,
    number,
    policies,
    short_columns,
    title,
)
from voxfuse.metrics.study import LEVELS, Comparison, Study

STYLE = """
:root { --ink: #1c2733; --soft: #5b6b7b; --line: #dfe5ea; --back: #f5f7f9; --card: #fff;
  --accent: #0072b2; --bar: #cfe4f2; --good: #d6efe4; --bad: #f6e0cf; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --soft: #9aa8b5; --line: #33404c;
  --back: #12181e; --card: #1b232b; --accent: #56b4e9; --bar: #1f4a66; --good: #1d4a3a;
  --bad: #573a22; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 32px 24px 64px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; overflow-wrap: anywhere; }
h2 { font-size: 21px; margin: 44px 0 12px; padding-top: 16px; border-top: 1px solid var(--line); }
h3 { font-size: 16px; margin: 0 0 8px; }
p, li { max-width: 80ch; } .soft { color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; }
.card, figure, .scroll { background: var(--card); border: 1px solid var(--line);
  border-radius: 10px; }
.card { padding: 12px 16px; } .card b { display: block; font-size: 26px; line-height: 1.3;
  font-variant-numeric: tabular-nums; } .card small { color: var(--soft); display: block; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(360px, 1fr)); gap: 16px;
  margin-top: 16px; }
figure { margin: 0; padding: 16px; } figcaption { color: var(--soft); font-size: 13px;
  margin-top: 6px; }
svg { width: 100%; height: auto; display: block; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.line { fill: none; stroke-width: 2.2; }
.diagonal { stroke: var(--soft); stroke-dasharray: 5 4; }
.tick { fill: var(--soft); font-size: 11.5px; } .title { fill: var(--ink); font-size: 12.5px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; font-size: 13px; margin-top: 6px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 6px; }
.scroll { overflow-x: auto; margin: 12px 0; }
table { border-collapse: collapse; width: 100%; font-size: 13.5px;
  font-variant-numeric: tabular-nums; }
th, td { padding: 6px 12px; text-align: right; border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; background: var(--card); }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
.text td { white-space: normal; } th:first-child, td:first-child { position: sticky; left: 0;
  background: var(--card); }
th[data-sort] { cursor: pointer; } th[data-sort]:hover { color: var(--accent); }
td.rate { background: linear-gradient(90deg, var(--bar) var(--part), transparent var(--part)); }
td.won { background: var(--good); } td.lost { background: var(--bad); }
.misses { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 14px; }
.misses figure { padding: 10px; }
.misses img { width: 100%; image-rendering: pixelated; border-radius: 6px; display: block;
  background: #000; }
details { margin: 12px 0; } summary { cursor: pointer; color: var(--accent); }
"""

SCRIPT = """
for (const head of document.querySelectorAll('th[data-sort]')) head.onclick = () => {
  const body = head.closest('table').tBodies[0], column = head.cellIndex;
  const down = head.dataset.sort !== 'down';
  head.dataset.sort = down ? 'down' : 'up';
  const key = row => { const v = row.cells[column].dataset.value;
    return v === undefined ? row.cells[column].textContent : v === '' ? -Infinity : +v; };
  const order = (a, b) => { const x = key(a), y = key(b);
    return (x > y ? -1 : x < y ? 1 : 0) * (down ? 1 : -1); };
  body.append(...[...body.rows].sort(order));
};
"""


def html_page(report: Report) -> str:
    """The page as text."""
    name = html.escape(report.name)
    body = [f"<h1>Evaluation of {name}</h1>", f'<p class="soft">{_scope(report)}</p>']
    for study in report.studies:
        body += _study(report, study)
    if report.misses:
        body += _misses(report.misses)
    body += _definitions(report)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>Evaluation of {name}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(body)}</main><script>{SCRIPT}</script></body></html>\n"
    )


def _scope(report: Report) -> str:
    subjects = max(len(study.scores) for study in report.studies)
    parts = [f"{subjects} subject{'s' if subjects > 1 else ''}"]
    parts += [f"lesions by {rule}" for rule in report.options.rules]
    if any(study.curves is not None for study in report.studies):
        parts.append(f"probabilities cut at {report.options.threshold:g}")
    volume, others = report.options.minimum_volume, report.other_minimum_volume
    if volume or others:
        apart = "" if others is None else f" (of {report.other_name}: {others:g} mm³)"
        parts.append(f"predicted lesions of {volume:g} mm³ or less removed{apart}")
    if report.options.outline is not None:
        parts.append(f"surface Dice at {report.options.tolerance:g} mm")
    return html.escape("; ".join(parts)) + "."


def _study(report: Report, study: Study) -> list[str]:
    heading = "Results" if len(report.studies) == 1 else f"Label {study.label}"
    parts = [f"<h2>{html.escape(heading)}</h2>", _cards(study)]
    parts.append(f'<div class="charts">{"".join(_charts(report, study))}</div>')
    compared = report.comparisons.get(study.label)
    if compared:
        parts += _comparison(report, study, compared)
    parts += [
        "<h2>Subjects</h2>",
        '<p class="soft">Click a heading to sort. – is undefined: see Empty masks below.</p>',
        _subject_table(study),
        "<h2>All metrics over subjects</h2>",
        '<p class="soft">Pooled: all voxels, or all lesions, taken as one subject’s. n: subjects '
        "where the metric is defined.</p>",
        _pooled_table(study),
    ]
    return parts


def _cards(study: Study) -> str:
    cards = []
    for column, one in study.columns.items():
        name = column.rpartition(".")[2]
        if name not in ("dice", "lesion_f1", "hd95", "average_precision", "isbi_score", "f2"):
            continue
        spread = f"± {number(one.sd, column)}, " if not math.isnan(one.sd) else ""
        cards.append(
            f'<div class="card"><small>{html.escape(title(column))}</small>'
            f"<b>{number(one.mean, column)}</b>"
            f"<small>{spread}n = {one.subjects}</small></div>"
        )
    correlation = number(study.volume_correlation, "dice")
    cards.append(
        f'<div class="card"><small>Volume correlation</small><b>{correlation}</b>'
        f"<small>Pearson, n = {len(study.scores)}</small></div>"
    )
    return f'<div class="cards">{"".join(cards)}</div>'


def _figure(heading: str, chart: str, caption: str = "") -> str:
    below = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f"<figure><h3>{html.escape(heading)}</h3>{chart}{below}</figure>"


def _charts(report: Report, study: Study) -> Iterable[str]:
    names = [one.subject for one in study.scores]

    def column(name: str) -> list[float]:
        return [one.values.get(name, math.nan) for one in study.scores]

    truth, predicted = column("truth_ml"), column("prediction_ml")
    reach = max([*truth, *predicted, 1e-6]) * 1.06
    yield _figure(
        "Volumes",
        xy_chart(
            [Series("subjects", truth, predicted, names, line=False, dots=True)],
            "true volume [ml]",
            "predicted volume [ml]",
            x_range=(0, reach),
            y_range=(0, reach),
            diagonal=True,
        ),
        "One point a subject; on the dashed line the volume is right.",
    )
    for rule, match in study.matches.items():
        strata = match.by_size(report.size_edges)
        counts = ", ".join(f"{part.detected.size} ({name})" for name, part in strata)
        yield _figure(
            f"Lesions by size, {rule}",
            bar_chart(
                [name for name, _ in strata],
                [
                    ("sensitivity", [part.sensitivity for _, part in strata]),
                    ("precision", [part.precision for _, part in strata]),
                    ("F1", [part.f1 for _, part in strata]),
                ],
                "rate",
                "lesion volume [mm³]",
            ),
            f"True lesions: {counts}. Sensitivity is of true lesions by their size, precision of "
            "predicted ones by theirs; – where there are none.",
        )
    subjects = Series(
        "subjects", column("sensitivity"), column("precision"), names, line=False, dots=True
    )
    if study.curves is None or not study.curves.precision_recall().thresholds.size:
        why = (
            "Probabilities would give a curve (--probabilities)."
            if study.curves is None
            else "Every voxel is ignored, so that there is no curve."
        )
        yield _figure(
            "Precision and recall",
            xy_chart([subjects], "recall (sensitivity)", "precision", x_range=(0, 1)),
            f"Voxels, one point a subject. {why}",
        )
    else:
        curve = study.curves.precision_recall()
        pooled = Series("all voxels", [0.0, *curve.recall], [curve.precision[0], *curve.precision],
                        steps=True)  # fmt: skip
        area = number(study.curves.average_precision(), "average_precision")
        whole = " Small lesions are not removed here." if report.options.minimum_volume else ""
        yield _figure(
            "Precision and recall",
            xy_chart([pooled, subjects], "recall (sensitivity)", "precision", x_range=(0, 1)),
            f"All voxels pooled: average precision {area}.{whole} Points: subjects at the "
            "threshold.",
        )
        series = []
        for beta in (1, 2):
            thresholds, values = study.curves.f_beta(beta)
            series.append(Series(f"F{beta}", list(thresholds), list(values)))
        yield _figure(
            "F over the threshold",
            xy_chart(series, "threshold", "F, pooled", x_range=(0, 1)),
            _best_thresholds(series) + whole,
        )
        reliability = study.curves.reliability(10)
        line = Series(
            "bins", list(reliability.predicted), list(reliability.observed),
            [f"{voxels} voxels" for voxels in reliability.voxels], dots=True,
        )  # fmt: skip
        yield _figure(
            "Reliability",
            xy_chart([line], "predicted probability", "observed frequency", x_range=(0, 1),
                     diagonal=True),
            f"Expected calibration error {reliability.calibration_error:.4f}.{whole}",
        )  # fmt: skip
    if study.free_response:
        curves = []
        for rule, found in study.free_response.items():
            curve_of_rule = free_response_of_counts(LEVELS, found, len(study.scores))
            named = [f"threshold {level:.2f}" for level in LEVELS]
            curves.append(
                Series(rule, list(curve_of_rule.false_lesions), list(curve_of_rule.sensitivity),
                       named, dots=True)
            )  # fmt: skip
        yield _figure(
            "Free response",
            xy_chart(curves, "false lesions a subject", "lesion sensitivity"),
            "Thresholds 0.05 to 0.95.",
        )
    else:
        points = [
            Series(rule, column(f"{rule}.lesions_false"), column(f"{rule}.lesion_sensitivity"),
                   names, line=False, dots=True)
            for rule in study.matches
        ]  # fmt: skip
        if points:
            yield _figure(
                "Free response",
                xy_chart(points, "false lesions", "lesion sensitivity"),
                "One point a subject. Probabilities would give a curve.",
            )


def _best_thresholds(series: Sequence[Series]) -> str:
    if all(math.isnan(value) for one in series for value in one.y):
        return "Undefined, as no truth has a voxel."
    parts = []
    for one in series:
        best = max(range(len(one.y)), key=lambda index, one=one: one.y[index])  # type: ignore[misc]
        parts.append(f"{one.name} is best, {one.y[best]:.3f}, at {one.x[best]:.3g}")
    return "; ".join(parts) + " (chosen on these subjects: no fair score for them)."


def _cell(value: float, column: str) -> str:
    data = "" if math.isnan(value) else f"{value:.6g}"
    metric = definition(column)
    if metric.better == "higher" and not math.isnan(value):
        part = f"{100 * min(max(value, 0), 1):.1f}%"
        return (
            f'<td class="rate" style="--part:{part}" data-value="{data}">'
            f"{number(value, column)}</td>"
        )
    return f'<td data-value="{data}">{number(value, column)}</td>'


def _subject_table(study: Study) -> str:
    columns = short_columns(study)
    head = "".join(
        f'<th data-sort="" title="{html.escape(definition(c).formula)}">'
        f"{html.escape(title(c))}</th>"
        for c in columns
    )
    rows = "".join(
        f"<tr><td>{html.escape(one.subject)}</td>"
        + "".join(_cell(one.values.get(c, math.nan), c) for c in columns)
        + "</tr>"
        for one in study.scores
    )
    return (
        f'<div class="scroll"><table><thead><tr><th data-sort="">Subject</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _pooled_table(study: Study) -> str:
    names = ("mean", "sd", "median", "low", "high", "pooled")
    rows = "".join(
        f"<tr><td>{html.escape(title(column))}</td>"
        + "".join(f"<td>{number(getattr(one, name), column)}</td>" for name in names)
        + f"<td>{one.subjects}</td></tr>"
        for column, one in study.columns.items()
    )
    head = "".join(
        f"<th>{one}</th>" for one in ("mean", "sd", "median", "min", "max", "pooled", "n")
    )
    return (
        f'<div class="scroll"><table><thead><tr><th>Metric</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _comparison(report: Report, study: Study, compared: list[Comparison]) -> list[str]:
    first, second = html.escape(report.name), html.escape(report.other_name)
    rows = []
    for one in compared:
        interval = f"{number(one.low, one.column)} to {number(one.high, one.column)}"
        better = definition(one.column).better
        sign = 1 if better == "higher" else -1
        kind = ""
        if not math.isnan(one.low) and (one.low > 0 or one.high < 0):
            kind = ' class="won"' if sign * one.difference > 0 else ' class="lost"'
        rows.append(
            f"<tr><td>{html.escape(compared_title(one.column))}</td>"
            f"<td{kind}>{number(one.difference, one.column)}</td><td>{interval}</td>"
            f"<td>{one.count('first')}</td><td>{one.count('second')}</td>"
            f"<td>{one.count('tie')}</td></tr>"
        )
    shown = [c for c in compared if c.column in short_columns(study)]
    winners = "".join(
        f"<tr><td>{html.escape(one.subject)}</td>"
        + "".join(_winner(c, one.subject) for c in shown)
        + "</tr>"
        for one in study.scores
    )
    heads = "".join(f"<th>{html.escape(compared_title(c.column))}</th>" for c in shown)
    return [
        f"<h2>{first} against {second}</h2>",
        f'<p class="soft">Mean over subjects of {first} minus {second}, with the 95 % interval of '
        "Student’s t. Coloured where the interval excludes 0: green where "
        f"{first} is better, orange where {second} is. |…|: of magnitudes, as 0 is best.</p>",
        '<div class="scroll"><table><thead><tr><th>Metric</th><th>difference</th>'
        f"<th>95 % interval</th><th>{first} wins</th><th>{second} wins</th><th>ties</th>"
        "</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>",
        f"<h3>Subject by subject: {first} minus {second}</h3>",
        f'<div class="scroll"><table><thead><tr><th>Subject</th>{heads}</tr></thead>'
        f"<tbody>{winners}</tbody></table></div>",
    ]


def _winner(one: Comparison, subject: str) -> str:
    if subject not in one.winners:
        return "<td>–</td>"
    kind = {"first": "won", "second": "lost", "tie": ""}[one.winners[subject]]
    return f'<td class="{kind}">{number(one.differences[subject], one.column)}</td>'


def _misses(misses: Sequence[Miss]) -> list[str]:
    key = "".join(
        f'<span><i style="background:rgb{colour}"></i>{name}</span>'
        for name, colour in COLOURS.items()
    )
    figures = []
    for miss in misses:
        rows, columns, _ = miss.picture.shape
        ratio = columns * miss.pixel[1] / (rows * miss.pixel[0])
        what = "Missed" if miss.kind == "missed" else "False"
        label = "" if miss.label == "foreground" else f", label {html.escape(miss.label)}"
        figures.append(
            f'<figure><img style="aspect-ratio:{ratio:.4f}" src="{data_uri(miss.picture)}" '
            f'alt="{what} lesion of {html.escape(miss.subject)}"><figcaption><b>{what}, '
            f"{miss.volume:.0f} mm³</b><br>{html.escape(miss.subject)}{label}, "
            f"slice {miss.slice_number}</figcaption></figure>"
        )
    return [
        "<h2>Largest misses</h2>",
        '<p class="soft">Axial slices; the patient’s right is on the left. The frame marks the '
        "lesion.</p>",
        f'<div class="legend" style="margin-bottom:12px">{key}</div>',
        f'<div class="misses">{"".join(figures)}</div>',
    ]


def _definitions(report: Report) -> list[str]:
    rows = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
        for row in policies(report)
    )
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in report.notes)
    rules = "".join(f"<li>{html.escape(str(rule))}</li>" for rule in report.options.rules)
    return [
        "<h2>Definitions and empty masks</h2>",
        f"<ul>{rules}{notes}</ul>",
        '<p class="soft">What a metric is worth where a mask, or for lesion-wise metrics every '
        "lesion, is missing. Undefined values are left out of means.</p>",
        '<div class="scroll text"><table><thead><tr><th>Metric</th><th>Formula</th>'
        "<th>Empty truth</th><th>Empty prediction</th><th>Both empty</th></tr></thead>"
        f"<tbody>{rows}</tbody></table></div>",
        f'<p class="soft">voxfuse {html.escape(report.version)}. Not a medical device: for '
        "research.</p>",
    ]
