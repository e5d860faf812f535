"""What stands in each section of the page? Records for the template, with figures drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from features.console import UserError
from probe.curve import CurveSummary, summarise
from probe.evidence import Pair
from probe.metrics import COMPARED, Interval
from probe.report import charts
from probe.report.charts import N_STYLES, SMALL, Dot, Line, Row
from probe.report.collect import Confusion, SetReport
from probe.report.headlines import power
from probe.report.published import SOURCES, Published, published_on
from probe.report.read import Run
from probe.report.summary import by_rank, certain, over, reversed_difference
from probe.runs import read_weights
from probe.significance import Difference, verdict
from probe.thresholds import ThresholdView

_MANY = 8  # runs in one square plot; more are drawn apart by method
_DRAWN = 3  # runs whose slides and patches are drawn one by one: the best of a set
_MARKS = {"better": "▲", "worse": "▼", "equivalent": "≈", "not worse": "≥", "not better": "≤"}
_TOLD = frozenset("▲▼△▽≈")  # elsewhere it is said what the set could show
_UNSURE = {"▲": "△", "▼": "▽"}  # only if every patch comes from its own patient

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
class ClassPanel:
    """One class against the rest: the curves of a set's best runs.

    Attributes:
        name: of the class.
        n: patches of it.
        figures: label to AUROC and average precision.
        roc, precision_recall: plots.
    """

    name: str
    n: int
    figures: Mapping[str, tuple[float, float]]
    roc: Markup
    precision_recall: Markup


@dataclass(frozen=True)
class MatrixCell:
    """A cell of a confusion matrix.

    Attributes:
        count: patches of the row's class that are called the column's.
        share: of the row's; NaN of a class that the set lacks.
        shade: 0 to 10, from that share.
    """

    count: int
    share: float
    shade: int


@dataclass(frozen=True)
class Cell:
    """Two runs in a table of differences.

    Attributes:
        difference: row minus column.
        mark: what it shows, as a sign; empty for nothing.
        shows: where the runs are not told apart, the smallest difference that would be shown; None elsewhere.
    """

    difference: Difference
    mark: str
    shows: float | None


@dataclass(frozen=True)
class RatePlots:
    """The rates per slide of one run: predicted over annotated, and their difference over their mean."""

    label: str
    scatter: Markup
    bland_altman: Markup


@dataclass(frozen=True)
class SetView:
    """One set in all sections.

    Attributes:
        index: of the set in the report.
        report: its figures.
        over: what its intervals generalise over.
        has_wide: whether there are wider ones, as slides are not known.
        power: how many pairs differ, and which differences the set can show.
        untested: why some pairs have no p-value.
        shown: labels of the runs whose slides and patches are drawn.
        board: the runs, best AUROC first.
        published_for: label to what was published of the same model and method, by source.
        published: every published model and method to what was published of it, by source.
        best: figure (`COMPARED`) to the highest mean over fold models of our runs.
        intervals: plot of all runs.
        panels: ROC and precision-recall curves; none with more than two classes.
        class_panels: the same of every class against the rest, the hardest for the best run first; none with two.
        confusion: label to the rows of its confusion matrix; none with two classes.
        calibration: label to reliability plots: of class 1; with more than two classes of every class that the set
            holds, by the best run alone.
        matrices: figure to rows of differences; None where row and column are the same run.
        trainings: whether a run was trained several times.
        turned: pairs for which it is known how often another training would turn their order.
        net_benefit: decision curves; None where there are none.
        recalibration, domain_styles: what thresholds chosen on labelled slides gain by domain, for the best run, and
            the line style of every domain.
        rates: plots of the rate per slide.
        learning, learning_plots: label to the points of its learning curve, of runs that have one; a plot per figure.
    """

    index: int
    report: SetReport
    over: str
    has_wide: bool
    power: str
    untested: Sequence[str]
    shown: Sequence[str]
    board: Sequence[Run]
    published_for: Mapping[str, Mapping[str, Published]]
    published: Mapping[tuple[str, str], Mapping[str, Published]]
    best: Mapping[str, float]
    intervals: Markup
    panels: Sequence[CurvePanel]
    class_panels: Sequence[ClassPanel]
    confusion: Mapping[str, Sequence[Sequence[MatrixCell]]]
    calibration: Mapping[str, Sequence[Markup]]
    matrices: Mapping[str, Sequence[tuple[str, Sequence[Cell | None]]]]
    trainings: bool
    turned: Sequence[Pair]
    net_benefit: Markup | None
    recalibration: Markup | None
    domain_styles: Mapping[str, int]
    rates: Sequence[RatePlots]
    learning: Mapping[str, Sequence[CurveSummary]]
    learning_plots: Sequence[Markup]


def set_view(set_report: SetReport, runs: Sequence[Run], *, index: int, margin: float | None) -> SetView:
    """Arrange and draw one set, with all runs of the report."""
    scored = [(number, run) for number, run in enumerate(runs) if run.label not in set_report.missing]
    style = {run.label: number % N_STYLES for number, run in scored}
    published = published_on(set_report.dataset, set_report.split, train=runs[0].record.train)
    models: dict[tuple[str, str], dict[str, Published]] = {}
    for row in published:
        models.setdefault((row.model, row.method), {})[row.source] = row
    labels = by_rank(set_report)
    of_two = len(set_report.classes) == 2
    summaries = {run.label: summarise(run.curve) for _, run in scored}
    learning = {label: [p for p in points if p.name == set_report.name] for label, points in summaries.items()}
    comparison = set_report.comparison
    travelled = [set_report.thresholds[label] for label in labels if label in set_report.thresholds]
    return SetView(
        index=index,
        report=set_report,
        over=over(set_report),
        has_wide=any(one.wide for judged in comparison.judgements.values() for one in judged.figures.values()),
        power=power(set_report),
        untested=list(dict.fromkeys(pair.untested for pair in comparison.pairs if pair.untested)),
        shown=labels[:_DRAWN],
        board=sorted((run for _, run in scored), key=lambda run: labels.index(run.label)),
        published_for={run.label: models.get((run.record.model, run.record.method), {}) for _, run in scored},
        published=models,
        best={name: max(folds[name].mean for folds in set_report.folds.values()) for name in COMPARED},
        intervals=_intervals(set_report, scored, published),
        panels=_panels(set_report, scored) if of_two else [],
        class_panels=[] if of_two else _class_panels(set_report, labels[:_DRAWN], style),
        confusion={} if of_two else {label: _confusion(set_report.confusion[label]) for label in labels},
        calibration={
            label: _reliability(set_report, label, style[label]) for label in (labels if of_two else labels[:1])
        },
        matrices={name: _matrix(set_report, name, margin) for name in COMPARED},
        trainings=bool(comparison.trainings),
        turned=[pair for pair in comparison.pairs if not all(math.isnan(chance) for chance in pair.turned.values())],
        net_benefit=_net_benefit(set_report, style),
        recalibration=_recalibration(set_report, travelled[0]) if travelled else None,
        domain_styles={domain: k % N_STYLES for k, domain in enumerate(travelled[0].domains)} if travelled else {},
        rates=[
            _rate_plots(set_report, label, style[label])
            for label in labels[:_DRAWN]
            if label in set_report.rates and "all" in set_report.rates[label].agreement
        ],
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
    """Count the numbers that a fold's probe trains: one per feature and one more, for every class but class 0."""
    try:
        return int(sum(array[0].size for array in read_weights(run.folder).values()))
    except UserError:
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
    return charts.intervals([set_report.titles[name] for name in COMPARED], rows, title=title)


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


def _matrix(set_report: SetReport, name: str, margin: float | None) -> list[tuple[str, list[Cell | None]]]:
    """Tabulate row minus column for every two runs; None where they are the same."""
    labels = list(set_report.comparison.judgements)
    differences = {(pair.first, pair.second): pair.differences[name] for pair in set_report.comparison.pairs}
    differences |= {(second, first): reversed_difference(one) for (first, second), one in differences.items()}
    return [
        (first, [None if first == second else _cell(differences[first, second], margin) for second in labels])
        for first in labels
    ]


def _cell(difference: Difference, margin: float | None) -> Cell:
    mark = _MARKS.get(verdict(difference, margin), "")
    if mark and certain(difference, margin) == "unknown":
        mark = _UNSURE.get(mark, "")
    told = mark in _TOLD or math.isnan(difference.detectable_holm)
    return Cell(difference, mark, None if told else difference.detectable_holm)


def _net_benefit(set_report: SetReport, style: Mapping[str, int]) -> Markup | None:
    curves = {label: of.net_benefit for label, of in set_report.calibration.items() if of.net_benefit.threshold}
    if not curves:
        return None
    lines = [Line(style[label], list(zip(of.threshold, of.run, strict=True)), label) for label, of in curves.items()]
    any_curve = next(iter(curves.values()))
    everyone = list(zip(any_curve.threshold, any_curve.all, strict=True))
    return charts.decision_curves(lines, everyone, title=f"Decision curves, {set_report.title}")


def _recalibration(set_report: SetReport, view: ThresholdView) -> Markup | None:
    """Draw what a threshold gains that was chosen on some slides of a domain, over the run's own, by domain."""
    lines = [
        Line(
            number % N_STYLES,
            [
                (point.n_slides, gain)
                for point in of.recalibration
                if math.isfinite(gain := point.balanced_accuracy - point.own)
            ],
            f"{domain}: {of.own['balanced_accuracy'].value:.3f} at the run's own threshold",
        )
        for number, (domain, of) in enumerate(view.domains.items())
    ]
    lines = [line for line in lines if line.points]
    if not lines:
        return None
    return charts.over_slides(
        lines,
        title=f"What a threshold chosen on labelled slides of a domain gains, {set_report.title}",
        x="labelled slides of the domain",
        y="gain in balanced accuracy",
        level=0.0,
    )


def _rate_plots(set_report: SetReport, label: str, style: int) -> RatePlots:
    view = set_report.rates[label]
    title = f"{label} on {set_report.title}"
    scatter, differences = [], []
    for one in view.slides:
        hint = f"{one.slide}: {one.n} figures, annotated {one.annotated:.3f}, predicted {one.predicted:.3f}"
        corrected = one.corrected
        if math.isnan(corrected):
            corrected = one.predicted
        else:
            hint += f", corrected {one.corrected:.3f} ({one.low:.3f} to {one.high:.3f})"
            scatter.append(Dot(one.annotated, one.corrected, hint, one.low, one.high))
        scatter.append(Dot(one.annotated, one.predicted, hint, hollow=True))
        differences.append(Dot((one.annotated + corrected) / 2, corrected - one.annotated, hint))
    found = view.agreement["all"].corrected
    if math.isnan(found["bias"].value):
        found = view.agreement["all"].predicted
    levels = [(found[name], name) for name in ("bias", "lower limit", "upper limit")]
    rate = f"rate of {set_report.classes[1]}"
    return RatePlots(
        label,
        charts.agreement(scatter, title=f"Rates per slide, {title}", x=f"annotated {rate}", y="predicted", style=style),
        charts.bland_altman(
            differences,
            levels,
            title=f"Bland-Altman plot, {title}",
            x="mean of predicted and annotated",
            y="predicted minus annotated",
            style=style,
        ),
    )


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
                getattr(set_report.curves[run.label][0], kind),
                f"{run.label}: {set_report.titles[figure]} {figures[run.label][figure].value:.3f}",
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


def _class_panels(set_report: SetReport, labels: Sequence[str], style: Mapping[str, int]) -> list[ClassPanel]:
    """Draw every class that a set holds against the rest, the one that the best run tells worst first."""
    figures = {label: set_report.comparison.judgements[label].figures for label in labels}
    if len(set_report.held) < 2:
        return []
    panels = []
    for k in sorted(set_report.held, key=lambda k: figures[labels[0]][f"auroc {k}"].value):
        name = set_report.classes[k]
        values = {label: (of[f"auroc {k}"].value, of[f"average_precision {k}"].value) for label, of in figures.items()}
        title = f"{name} on {set_report.title}"
        roc, precision_recall = (
            [
                Line(
                    style[label],
                    getattr(set_report.curves[label][k], kind),
                    f"{label}: {title} {values[label][at]:.3f}",
                )
                for label in labels
            ]
            for at, (kind, title) in enumerate((("roc", "AUROC"), ("precision_recall", "average precision")))
        )
        panels.append(
            ClassPanel(
                name,
                set_report.counts[k],
                values,
                charts.square(
                    roc, title=f"ROC curves, {title}", x="1 − specificity", y="sensitivity", diagonal=True, side=SMALL
                ),
                charts.square(
                    precision_recall,
                    title=f"Precision-recall curves, {title}",
                    x="recall",
                    y="precision",
                    level=set_report.counts[k] / set_report.n,
                    side=SMALL,
                ),
            )
        )
    return panels


def _confusion(confusion: Confusion) -> list[list[MatrixCell]]:
    """Give every count of a confusion matrix its share of the row."""
    return [
        [
            MatrixCell(count, share := count / sum(row) if sum(row) else math.nan, round(10 * share) if count else 0)
            for count in row
        ]
        for row in confusion
    ]


def _reliability(set_report: SetReport, label: str, style: int) -> list[Markup]:
    """Draw how often each drawn class is there, over its probability."""
    plots = []
    for k, curves in zip(set_report.drawn_classes, set_report.curves[label], strict=True):
        of_two = len(set_report.classes) == 2
        if not of_two and k not in set_report.held:
            continue
        of_class = "" if of_two else f" for {set_report.classes[k]}"
        title = f"Calibration of {label}{of_class} on {set_report.title}"
        plots.append(charts.reliability(curves.calibration, title=title, style=style))
    return plots


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
    title = f"{set_report.titles[figure]} over training slides, {set_report.title}"
    return charts.over_slides(lines, title=title, y=set_report.titles[figure])
