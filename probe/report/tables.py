"""How are runs tabulated in a paper? Two tables, in Markdown and in LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from features.console import printable
from probe.metrics import Interval
from probe.report.collect import Report
from probe.report.published import FIGURES, SOURCES, Published, published_for
from probe.report.read import Run

_DIGITS = 3  # in print


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
        groups: a heading over every `len(FIGURES)` columns.
        rows: a name, cells, and whether the row is somebody else's figures.
    """

    caption: str
    groups: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...], bool], ...]


def grids(report: Report, runs: Sequence[Run]) -> tuple[Grid, Grid]:
    """Make two tables of the test sets: fold models and what was published of them; ensembles with intervals."""
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
    folds, ensembles = [], []
    for run in runs:
        folds.append((run.label, tuple(cells.get(run.label, _NONE) for cells in fold_cells), False))
        ensembles.append((run.label, tuple(cells.get(run.label, _NONE) for cells in ensemble_cells), False))
        for source in SOURCES:
            found = [published_for(run.record, one.dataset, one.split).get(source) for one, _ in columns]
            title = next((row.title for row in found if row), None)  # of one model and method, the same on all sets
            if title:
                cells = zip(found, columns, strict=True)
                published = tuple(_published_cell(row, name) for row, (_, name) in cells)
                folds.append((f"{run.label}: {title}", published, True))
    units = "; ".join(f"{one.title}: {one.any_judgement.n_clusters} {one.any_judgement.unit}s" for one in sets)
    return (
        Grid(
            f"Mean ± standard deviation over {report.n_folds} fold models trained on {report.train}; threshold 0.5.",
            groups,
            tuple(folds),
        ),
        Grid(
            f"Ensemble of {report.n_folds} fold models at the threshold chosen on out-of-fold predictions, with "
            f"{report.how.level:.0%} cluster-bootstrap intervals ({units}).",
            groups,
            tuple(ensembles),
        ),
    )


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
    columns = [f"{group}: {figure}" for group in grid.groups for figure in FIGURES.values()]
    lines = [
        _markdown_text(grid.caption),
        "",
        "| " + " | ".join(["Model", *map(_markdown_text, columns)]) + " |",
        "|" + "|".join(["---", *["--:"] * len(columns)]) + "|",
    ]
    for name, cells, others in grid.rows:
        shown = [_joined(f"**{cell.value}**" if cell.best else cell.value, cell.aside) for cell in cells]
        name = _markdown_text(name)
        lines.append("| " + " | ".join([f"*{name}*" if others else name, *shown]) + " |")
    return "\n".join(lines) + "\n"


def latex(grid: Grid) -> str:
    """Print a grid as a table environment; needs the package booktabs."""
    n = len(FIGURES)
    rules = "".join(f"\\cmidrule(lr){{{2 + n * k}-{1 + n * (k + 1)}}}" for k in range(len(grid.groups)))
    lines = [
        "\\begin{table}",
        "\\centering",
        f"\\caption{{{_latex_text(grid.caption)}}}",
        f"\\begin{{tabular}}{{l{'r' * n * len(grid.groups)}}}",
        "\\toprule",
        " & ".join(["", *(f"\\multicolumn{{{n}}}{{c}}{{{_latex_text(group)}}}" for group in grid.groups)]) + " \\\\",
        rules,
        " & ".join(["Model", *(_latex_text(figure) for _ in grid.groups for figure in FIGURES.values())]) + " \\\\",
        "\\midrule",
    ]
    for name, cells, others in grid.rows:
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
    return f"{value} {aside}" if aside else value


_LATEX = {
    **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "–": "--",
    "[": "{[}",  # after a line's end these two would be taken for its arguments
    "*": "{*}",
}


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(letter, letter) for letter in printable(text))


def _markdown_text(text: str) -> str:
    return re.sub(r"([\\`*_{}\[\]<>|#&~$])", r"\\\1", printable(text))
