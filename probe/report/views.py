"""What stands in each section of the page? Records for the template, with figures drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from features.console import UserError
from probe.curve import CurveSummary, summarise
from probe.metrics import COMPARED, TITLES, Interval
from probe.report import charts
from probe.report.charts import N_STYLES, Line, Row
from probe.report.collect import SetReport
from probe.report.published import SOURCES, Published, published_on
from probe.report.read import Run
from probe.runs import read_weights
from probe.significance import Difference

_MANY = 8  # runs in one square plot; more are drawn apart by method

Numbered = Sequence[tuple[int, Run]]  # runs with their number in the report, which decides their line style


@dataclass(frozen=True)
class CurvePanel:
    """ROC and precision-recall curves of runs of one method, or of all.

    Attributes:
        method: None for all.
        runs: label to the figures of the ensemble.
        roc, precision_recall: plots.
    """

    method: str | None
    runs: Mapping[str, Mapping[str, Interval]]
    roc: Markup
    precision_recall: Markup


@dataclass(frozen=True)
class SetView:
    """One set in all sections.

    Attributes:
        report: its figures.
        board: the runs, best AUROC first.
        published_for: label to what was published of the same model and method, by source.
        published: every published model and method to what was published of it, by source.
        best: figure (`COMPARED`) to the highest mean over fold models of our runs.
        intervals: plot of all runs.
        panels: ROC and precision-recall curves.
        calibration: label to reliability plot.
        matrices: figure to rows of differences; None where row and column are the same run.
        learning, learning_plots: label to the points of its learning curve, of runs that have one; a plot per figure.
    """

    report: SetReport
    board: Sequence[Run]
    published_for: Mapping[str, Mapping[str, Published]]
    published: Mapping[tuple[str, str], Mapping[str, Published]]
    best: Mapping[str, float]
    intervals: Markup
    panels: Sequence[CurvePanel]
    calibration: Mapping[str, Markup]
    matrices: Mapping[str, Sequence[tuple[str, Sequence[Difference | None]]]]
    learning: Mapping[str, Sequence[CurveSummary]]
    learning_plots: Sequence[Markup]


def set_view(set_report: SetReport, runs: Sequence[Run]) -> SetView:
    """Arrange and draw one set, with all runs of the report."""
    scored = [(number, run) for number, run in enumerate(runs) if run.label not in set_report.missing]
    published = published_on(set_report.dataset, set_report.split, train=runs[0].record.train)
    models: dict[tuple[str, str], dict[str, Published]] = {}
    for row in published:
        models.setdefault((row.model, row.method), {})[row.source] = row
    ranks = set_report.comparison.ranks["auroc"]
    summaries = {run.label: summarise(run.curve) for _, run in scored}
    learning = {label: [p for p in points if p.name == set_report.name] for label, points in summaries.items()}
    return SetView(
        report=set_report,
        board=sorted((run for _, run in scored), key=lambda run: ranks[run.label].value),
        published_for={run.label: models.get((run.record.model, run.record.method), {}) for _, run in scored},
        published=models,
        best={name: max(folds[name].mean for folds in set_report.folds.values()) for name in COMPARED},
        intervals=_intervals(set_report, scored, published),
        panels=_panels(set_report, scored),
        calibration={
            run.label: charts.reliability(
                set_report.curves[run.label].calibration,
                title=f"Calibration of {run.label} on {set_report.title}",
                style=number % N_STYLES,
            )
            for number, run in scored
        },
        matrices={name: _matrix(set_report, name) for name in COMPARED},
        learning={label: points for label, points in learning.items() if points},
        learning_plots=[_learning_plot(set_report, scored, learning, figure) for figure in COMPARED],
    )


def costs(run: Run, n_parameters: int | None) -> tuple[float | None, ...]:
    """Gather what a run cost: seconds, images per second, peak memory in MiB, parameters per fold and of the backbone.

    Where a figure is not known, it is None.
    """
    cost, n_trained = run.record.cost, run.record.n_trained
    memory = cost.peak_memory_mb if cost.peak_device_memory_mb is None else cost.peak_device_memory_mb
    n_trained = _n_trained_by_probe(run) if n_trained is None else n_trained
    return cost.seconds, cost.images_per_second, memory, n_trained, n_parameters


def _n_trained_by_probe(run: Run) -> int | None:
    """Count the numbers that a fold's probe trains: one per feature and one more."""
    try:
        return int(read_weights(run.folder)["coef"].shape[1]) + 1
    except (UserError, KeyError):
        return None  # no figure depends on it


def _intervals(set_report: SetReport, scored: Numbered, published: Sequence[Published]) -> Markup:
    rows = []
    for number, run in scored:
        figures = set_report.comparison.judgements[run.label].figures
        same = [row for row in published if (row.model, row.method) == (run.record.model, run.record.method)]
        rows.append(
            Row(
                label=run.label,
                style=number % N_STYLES,
                figures=[figures[name] for name in COMPARED],
                folds=[set_report.folds[run.label][name].each for name in COMPARED],
                published=[[_mark(row, name, run.label) for row in same] for name in COMPARED],
            )
        )
    rows.sort(key=lambda row: -row.figures[1].value)
    if published:
        rows += [_published_marks([row for row in published if row.source == source], source) for source in SOURCES]
    title = f"{set_report.title}: ensembles with {set_report.any_judgement.level:.0%} intervals"
    return charts.intervals([TITLES[name] for name in COMPARED], rows, title=title)


def _published_marks(rows: Sequence[Published], source: str) -> Row:
    """Make a row of the interval plot with every published model."""
    return Row(
        label=f"published: {SOURCES[source]}",
        style=0,
        figures=[Interval(math.nan, math.nan, math.nan)] * len(COMPARED),
        folds=[()] * len(COMPARED),
        published=[[_mark(row, name, f"{row.model} {row.method}") for row in rows] for name in COMPARED],
    )


def _mark(row: Published, name: str, label: str) -> tuple[str, float, str]:
    mean = row.figures[name].mean
    return row.source, mean, f"{label}, {SOURCES[row.source]}: {mean:.4f}"


def _matrix(set_report: SetReport, name: str) -> list[tuple[str, list[Difference | None]]]:
    """Tabulate row minus column for every two runs; None where they are the same."""
    labels = list(set_report.comparison.judgements)
    differences = {(pair.first, pair.second): pair.differences[name] for pair in set_report.comparison.pairs}

    def cell(first: str, second: str) -> Difference | None:
        if first == second:
            return None
        if (first, second) in differences:
            return differences[first, second]
        reverse = differences[second, first]
        return replace(reverse, value=0.0 - reverse.value, low=0.0 - reverse.high, high=0.0 - reverse.low)  # no -0.0

    return [(first, [cell(first, second) for second in labels]) for first in labels]


def _panels(set_report: SetReport, scored: Numbered) -> list[CurvePanel]:
    """Draw ROC and precision-recall curves: all runs together, or apart by method where they are many."""
    if len(scored) <= _MANY:
        return [_panel(set_report, scored, None)]
    return [
        _panel(set_report, [(number, run) for number, run in scored if run.record.method == method], method)
        for method in dict.fromkeys(run.record.method for _, run in scored)
    ]


def _panel(set_report: SetReport, scored: Numbered, method: str | None) -> CurvePanel:
    figures = {run.label: set_report.comparison.judgements[run.label].figures for _, run in scored}

    def lines(kind: str, figure: str) -> list[Line]:
        return [
            Line(
                number % N_STYLES,
                getattr(set_report.curves[run.label], kind),
                f"{run.label}: {TITLES[figure]} {figures[run.label][figure].value:.3f}",
            )
            for number, run in scored
            if not math.isnan(figures[run.label][figure].value)
        ]

    title = f"{set_report.title}, {method}" if method else set_report.title
    return CurvePanel(
        method=method,
        runs=figures,
        roc=charts.square(
            lines("roc", "auroc"),
            title=f"ROC curves, {title}",
            x="1 − specificity",
            y="sensitivity",
            diagonal=True,
        ),
        precision_recall=charts.square(
            lines("precision_recall", "average_precision"),
            title=f"Precision-recall curves, {title}",
            x="recall",
            y="precision",
            level=set_report.n_positive / set_report.n,
        ),
    )


def _learning_plot(
    set_report: SetReport, scored: Numbered, learning: Mapping[str, Sequence[CurveSummary]], figure: str
) -> Markup:
    lines = []
    for number, run in scored:
        defined = [point for point in learning[run.label] if math.isfinite(getattr(point, figure))]
        at = [(point.n_slides, getattr(point, figure)) for point in defined]
        spread = [getattr(point, f"{figure}_std") for point in defined]
        if learning[run.label]:
            lines.append(Line(number % N_STYLES, at, run.label, spread))
    title = f"{TITLES[figure]} over training slides, {set_report.title}"
    return charts.over_slides(lines, title=title, y=TITLES[figure])
