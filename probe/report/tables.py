"""How are runs tabulated in a paper? Two tables, in Markdown and in LaTeX."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from features.console import printable
from probe.report.collect import Report, SetReport
from probe.report.published import FIGURES, SOURCES, published_for
from probe.report.read import Run

_DIGITS = 3  # in print


@dataclass(frozen=True)
class Cell:
    """A figure in print: the value, what stands behind it in smaller type, and whether it is the best of its column."""

    value: str
    aside: str = ""
    best: bool = False


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
    folds, ensembles = [], []
    for run in runs:
        folds.append((run.label, tuple(_fold_cell(run, *column) for column in _columns(sets)), False))
        ensembles.append((run.label, tuple(_ensemble_cell(run, *column) for column in _columns(sets)), False))
        for source, title in SOURCES.items():
            cells = tuple(_published_cell(run, *column, source) for column in _columns(sets))
            if any(cell.value != "–" for cell in cells):
                folds.append((f"{run.label}: {title}", cells, True))
    units = "; ".join(f"{one.title}: {one.any_judgement.n_clusters} {one.any_judgement.unit}s" for one in sets)
    return (
        Grid(
            f"Mean ± standard deviation over {report.n_folds} fold models trained on {report.train}; threshold 0.5.",
            groups,
            tuple(folds),
        ),
        Grid(
            f"Ensemble of {report.n_folds} fold models at the threshold chosen on out-of-fold predictions, with "
            f"{report.resampling.level:.0%} cluster-bootstrap intervals ({units}).",
            groups,
            tuple(ensembles),
        ),
    )


def _columns(sets: Sequence[SetReport]) -> list[tuple[SetReport, str]]:
    return [(one, figure) for one in sets for figure in FIGURES]


def _fold_cell(run: Run, set_report: SetReport, name: str) -> Cell:
    if run.label in set_report.missing:
        return Cell("–")
    figure = set_report.folds[run.label][name]
    is_best = _is_best(figure.mean, (folds[name].mean for folds in set_report.folds.values()))
    return Cell(_digits(figure.mean), f"± {_digits(figure.std)}", is_best)


def _ensemble_cell(run: Run, set_report: SetReport, name: str) -> Cell:
    if run.label in set_report.missing:
        return Cell("–")
    judgements = set_report.comparison.judgements
    figure = judgements[run.label].figures[name]
    ends = f"[{_digits(figure.low)}, {_digits(figure.high)}]" if not math.isnan(figure.low) else ""
    is_best = _is_best(figure.value, (judgement.figures[name].value for judgement in judgements.values()))
    return Cell(_digits(figure.value), ends, is_best)


def _published_cell(run: Run, set_report: SetReport, name: str, source: str) -> Cell:
    row = published_for(run.record, set_report.dataset, set_report.split).get(source)
    if row is None:
        return Cell("–")
    std = row.figures[name].std
    return Cell(_digits(row.figures[name].mean), "" if std is None else f"± {_digits(std)}")


def _is_best(value: float, values: Iterable[float]) -> bool:
    """Whether a value is the highest as printed; of equals in print all are."""
    return round(value, _DIGITS) == max((round(other, _DIGITS) for other in values if not math.isnan(other)), default=0)


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
        shown = [
            " ".join(part for part in (f"**{cell.value}**" if cell.best else cell.value, cell.aside) if part)
            for cell in cells
        ]
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
            " ".join(
                part
                for part in (
                    f"\\textbf{{{_latex_text(cell.value)}}}" if cell.best else _latex_text(cell.value),
                    f"{{\\scriptsize {_latex_text(cell.aside)}}}" if cell.aside else "",
                )
                if part
            )
            for cell in cells
        ]
        name = _latex_text(name)
        lines.append(" & ".join([f"\\quad\\textit{{{name}}}" if others else name, *shown]) + " \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}", "\\end{table}"]) + "\n"


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
