"""How are runs tabulated in a paper? Three tables, in Markdown and in LaTeX; beside what was published, if anything."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from features.console import printable
from probe.metrics import Interval
from probe.report.collect import Report, SetReport
from probe.report.published import FIGURES, FIGURES_OF_MORE, SOURCES, Published, departures, published_on
from probe.report.read import Run
from probe.report.summary import ALPHA, by_rank, difference_of, listed, over, units
from probe.significance import Difference

_DIGITS = 3  # in print
_MOST_PAIRS = 15  # of runs; of more, each run is compared with the best alone


@dataclass(frozen=True)
class Cell:
    """A figure in print: the value, what stands behind it in smaller type, and whether it is the best of its column."""

    value: str
    aside: str = ""
    best: bool = False


_NONE = Cell("–")


@dataclass(frozen=True)
class Grid:
    """A table for a paper.

    Attributes:
        caption: what it shows.
        groups: a heading over every `len(figures)` columns.
        rows: a name, cells, and whether the row is somebody else's figures.
        figures: the headings of the columns of a group.
    """

    caption: str
    groups: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...], bool], ...]
    figures: tuple[str, ...] = tuple(FIGURES.values())


def grids(report: Report, runs: Sequence[Run]) -> tuple[Grid, ...]:
    """Make the tables of the test sets.

    Returns:
        Fold models and what was published of them; ensembles with intervals; differences of runs, if there are two.
    """
    sets = [one for one in report.sets if not one.is_validation] or list(report.sets)
    groups = tuple(f"{one.title} (n = {one.n:,})" for one in sets)
    columns = [(one, figure) for one in sets for figure in FIGURES]
    fold_cells = [
        _cells({label: (of[name].mean, f"± {_digits(of[name].std)}") for label, of in one.folds.items()})
        for one, name in columns
    ]
    ensemble_cells = [
        _cells({label: _with_ends(of.figures[name]) for label, of in one.comparison.judgements.items()})
        for one, name in columns
    ]
    folds = [(run.label, tuple(cells.get(run.label, _NONE) for cells in fold_cells), False) for run in runs]
    ensembles = [(run.label, tuple(cells.get(run.label, _NONE) for cells in ensemble_cells), False) for run in runs]
    drawn = "; ".join(
        f"{one.title}: {one.any_judgement.n_clusters:,} {units(one.any_judgement)}, intervals over {over(one)}"
        for one in sets
    )
    n_folds = listed([str(n) for n in sorted({run.record.folds.n for run in runs})])
    n_models = listed([str(n) for n in sorted({run.record.folds.n * len(run.record.seeds) for run in runs})])
    of_two, classes = len(report.classes) == 2, f"macro figures over {len(report.classes)} classes"
    at = "threshold 0.5" if of_two else classes
    chosen = "at the threshold chosen on out-of-fold predictions" if of_two else f"({classes}; the most probable one)"
    several = " (of runs with several trainings, the mean over them)" if n_models != n_folds else ""
    published = _published(report, sets)
    means = f"Mean ± standard deviation over {n_models} fold models trained on {report.train}; {at}."
    tables = [
        Grid(
            f"{means} {_beside(report, runs)}" if published else means,
            groups,
            _by_method(runs, folds, ensembles, published, columns) if published else tuple(folds),
            _headings(report),
        ),
        Grid(
            f"Ensemble of {n_folds} fold models{several} {chosen}, with {report.how.level:.0%} cluster-bootstrap "
            f"intervals ({drawn}).",
            groups,
            tuple(ensembles),
            _headings(report),
        ),
    ]
    return (*tables, _differences(report, sets, groups)) if len(runs) > 1 else tuple(tables)


_Row = tuple[str, tuple[Cell, ...], bool]
_Rows = dict[tuple[str, str], dict[str, dict[str, Published]]]  # (method, model) to source to dataset
_METHODS = {"full": "End to end", "probe": "Linear probes", "lora": "LoRA"}  # those that were published


def _published(report: Report, sets: Sequence[SetReport]) -> _Rows:
    """Gather what was published on the sets, by method and model in its own order."""
    rows: _Rows = {}
    for one in sets:
        for row in published_on(one.dataset, one.split, train=report.train):
            if not row.same_as_table_3:
                rows.setdefault((row.method, row.model), {}).setdefault(row.source, {})[one.dataset] = row
    return rows


def _beside(report: Report, runs: Sequence[Run]) -> str:
    """Say what stands beside our runs, and what these do otherwise than the published ones."""
    return (
        f"Below each run: its ensemble at its own threshold, with a {report.how.level:.0%} interval in brackets. In "
        "italics: published means over five fold models (Banerjee et al. 2025, arXiv 2506.21444v1; the re-run: the "
        "authors' notebooks, without what is no second measurement). Bold: the highest mean of a column. "
        + " ".join(say_departures(runs))
    )


def say_departures(runs: Sequence[Run]) -> list[str]:
    """Say what runs do otherwise than what each source published: a sentence each, or one if it is the same."""
    sources: dict[str, list[str]] = {}
    for source in SOURCES:
        who: dict[str, list[str]] = {}  # a departure to the runs
        for run in runs:
            for how in departures(run.record, source):
                who.setdefault(how, []).append(run.label)
        together: dict[tuple[str, ...], list[str]] = {}
        for how, labels in who.items():
            together.setdefault(tuple(labels), []).append(how)
        said = [f"{_among(of, [run.label for run in runs])}: {', '.join(how)}" for of, how in together.items()]
        sources.setdefault("; ".join(said) or "nothing, as far as the runs record it", []).append(
            f"the {SOURCES[source]}"
        )
    return [f"Other than in {listed(names)} – {said}." for said, names in sources.items()]


def _among(labels: Sequence[str], every: Sequence[str]) -> str:
    """Name some of the runs, in as few words as there are."""
    others = [label for label in every if label not in labels]
    if others and len(others) >= len(labels):
        return listed(labels)
    if len(every) == 1:
        return every[0]
    return f"all but {listed(others)}" if others else "all our runs"


def _by_method(
    runs: Sequence[Run],
    folds: Sequence[_Row],
    ensembles: Sequence[_Row],
    published: _Rows,
    columns: Sequence[tuple[SetReport, str]],
) -> tuple[_Row, ...]:
    """Set runs and published models below each other, by method: the table of the paper, with ours in it."""
    titles = {method: _METHODS[method] for method, _ in published}
    for run in runs:
        titles.setdefault(run.record.method, "Ensembles of runs" if run.members else run.record.method)
    rows: list[_Row] = []
    for method, title in titles.items():
        rows.append((title, (), False))
        for run, mean, ensemble in zip(runs, folds, ensembles, strict=True):
            if run.record.method == method:
                bracketed = [Cell("", " ".join(filter(None, (cell.value, cell.aside)))) for cell in ensemble[1]]
                rows += [mean, ("", tuple(bracketed), False)]
        for source in SOURCES:
            for (of, model), sources in published.items():
                if of == method and (by_set := sources.get(source)):
                    cells = tuple(_published_cell(by_set.get(one.dataset), name) for one, name in columns)
                    rows.append((f"{model}: {next(iter(by_set.values())).title}", cells, True))
    return _with_best(rows)


def _with_best(rows: Sequence[_Row]) -> tuple[_Row, ...]:
    """Mark the highest value of every column, ours or not; of equals in print all."""
    columns = zip(*(cells for _, cells, _ in rows if cells), strict=True)
    best = [
        max((cell.value for cell in column if cell.value.strip("–")), key=float, default=None) for column in columns
    ]
    return tuple(
        (name, tuple(replace(cell, best=cell.value == best[k]) for k, cell in enumerate(cells)), others)
        for name, cells, others in rows
    )


def _headings(report: Report) -> tuple[str, ...]:
    return tuple((FIGURES if len(report.classes) == 2 else FIGURES_OF_MORE).values())


def _differences(report: Report, sets: Sequence[SetReport], groups: tuple[str, ...]) -> Grid:
    """Tabulate every two runs, or each run and the best of the first set where pairs are too many to print."""
    pairs, which = list(combinations(report.labels, 2)), "every two runs"
    if len(pairs) > _MOST_PAIRS:
        best = by_rank(sets[0])[0]
        pairs, which = [(best, label) for label in report.labels if label != best], f"{best} and every other run"
    rows = [
        (
            f"{first} − {second}",
            tuple(_difference_cell(difference_of(one, first, second, name)) for one in sets for name in FIGURES),
            False,
        )
        for first, second in pairs
    ]
    counts = "; ".join(
        f"{one.title}: {(n := len(one.comparison.pairs))} pair{'s' * (n != 1)}, over {over(one)}" for one in sets
    )
    tests = "pairs of a set" if report.options.holm == "set" else "pairs, figures and sets together"
    return Grid(
        f"Differences of {which} on the same patches, with {report.how.level:.0%} intervals and p-values after Holm's "
        f"correction for all {tests} ({counts}); bold: p < .05. Where p is larger, δ is the smallest true "
        "difference that the set would show for this pair in four of five cases, at 5 % after correction.",
        groups,
        tuple(rows),
        _headings(report),
    )


def _difference_cell(difference: Difference | None) -> Cell:
    if difference is None or math.isnan(difference.value):
        return _NONE
    shown = difference.p_holm < ALPHA
    parts = [] if math.isnan(difference.low) else [f"[{_signed(difference.low)}, {_signed(difference.high)}]"]
    if not math.isnan(difference.p_holm):
        parts.append("p < .001" if difference.p_holm < 0.001 else f"p = {_digits(difference.p_holm)}")
    if not shown and not math.isnan(difference.detectable_holm):
        parts.append(f"δ = {_digits(difference.detectable_holm)}")
    return Cell(_signed(difference.value), ", ".join(parts), shown)


def _signed(value: float) -> str:
    text = _digits(abs(value))
    return ("−" if value < 0 and float(f"{value:.{_DIGITS}f}") else "+") + text


def _cells(figures: Mapping[str, tuple[float, str]]) -> dict[str, Cell]:
    """Print the figures of a column, run to value and what stands behind it; of equals in print all are the best."""
    printed = {label: round(value, _DIGITS) for label, (value, _) in figures.items() if not math.isnan(value)}
    best = max(printed.values(), default=math.nan)
    return {label: Cell(_digits(value), aside, printed.get(label) == best) for label, (value, aside) in figures.items()}


def _with_ends(figure: Interval) -> tuple[float, str]:
    ends = "" if math.isnan(figure.low) else f"[{_digits(figure.low)}, {_digits(figure.high)}]"
    return figure.value, ends


def _published_cell(row: Published | None, name: str) -> Cell:
    if row is None:
        return _NONE
    std = row.figures[name].std
    return Cell(_digits(row.figures[name].mean), "" if std is None else f"± {_digits(std)}")


def _digits(value: float) -> str:
    """Print a share with three digits and without the leading zero, as the field does."""
    return "–" if math.isnan(value) else re.sub(r"^(-?)0\.", r"\1.", f"{value:.{_DIGITS}f}")


def markdown(grid: Grid) -> str:
    """Print a grid as a pipe table with its caption above it."""
    columns = [f"{group}: {figure}" for group in grid.groups for figure in grid.figures]
    lines = [
        _markdown_text(grid.caption),
        "",
        "| " + " | ".join(["Model", *map(_markdown_text, columns)]) + " |",
        "|" + "|".join(["---", *["--:"] * len(columns)]) + "|",
    ]
    for name, cells, others in grid.rows:
        shown = [_joined(f"**{cell.value}**" if cell.best else cell.value, cell.aside) for cell in cells]
        name = _markdown_text(name)
        if not cells:  # a heading
            lines.append("| " + " | ".join([f"**{name}**", *[""] * len(columns)]) + " |")
            continue
        lines.append("| " + " | ".join([f"*{name}*" if others else name, *shown]) + " |")
    return "\n".join(lines) + "\n"


def latex(grid: Grid) -> str:
    """Print a grid as a table environment; a comment names the package that it needs."""
    n = len(grid.figures)
    rules = "".join(f"\\cmidrule(lr){{{2 + n * k}-{1 + n * (k + 1)}}}" for k in range(len(grid.groups)))
    lines = [
        "% \\usepackage{booktabs}",
        "\\begin{table}",
        "\\centering",
        "\\footnotesize",
        "\\setlength{\\tabcolsep}{3pt}",
        f"\\caption{{{_latex_text(grid.caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * n * len(grid.groups)}}}",
        "\\toprule",
        " & ".join(["", *(f"\\multicolumn{{{n}}}{{c}}{{{_latex_text(group)}}}" for group in grid.groups)]) + " \\\\",
        rules,
        " & ".join(["Model", *(_latex_text(figure) for _ in grid.groups for figure in grid.figures)]) + " \\\\",
        "\\midrule",
    ]
    for number, (name, cells, others) in enumerate(grid.rows):
        if not cells:  # a heading
            above = ["\\addlinespace"] if number else []
            lines += [*above, f"\\multicolumn{{{1 + n * len(grid.groups)}}}{{l}}{{{_latex_text(name)}}} \\\\"]
            continue
        shown = [
            _joined(
                f"\\textbf{{{_latex_text(cell.value)}}}" if cell.best else _latex_text(cell.value),
                f"{{\\scriptsize {_latex_text(cell.aside)}}}" if cell.aside else "",
            )
            for cell in cells
        ]
        name = _latex_text(name)
        lines.append(" & ".join([f"\\quad\\textit{{{name}}}" if others else name, *shown]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


def _joined(value: str, aside: str) -> str:
    return f"{value} {aside}".strip()


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
    "δ": r"$\delta$",
    "[": "{[}",  # after a line's end these two would be taken for its arguments
    "*": "{*}",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#&~$])", r"\\\1", printable(text))
