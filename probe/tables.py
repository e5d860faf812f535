"""How are runs tabulated, on a terminal and in a paper? Published figures stand next to ours, never among them."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from features.console import printable
from probe.predictions import VALIDATION

if TYPE_CHECKING:
    from rich.table import Table

    from probe.report import Report, Run

SOURCES = {"table-3": "paper, Table 3", "re-run": "authors' re-run"}
FIGURES = {"balanced_accuracy": "bal. acc.", "auroc": "AUROC"}  # those that were published, in print
TRAINED_ON = "ami-br"  # what the published models were trained on


@cache
def published() -> tuple[dict[str, str], ...]:
    """Published figures: source, date, model, method, dataset, balanced_accuracy, auroc, each with its std if given.

    Source: Table 3 of Banerjee et al. 2025 (arXiv 2506.21444v1), and the authors' later re-run in the notebooks of the
    AMi-Br_Benchmark repository (commit 3acf4dad). Means over five fold models on the same test images.
    """
    with files("probe").joinpath("data/published.csv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


@dataclass(frozen=True)
class PublishedFigure:
    """A published mean over fold models and its standard deviation, where it was given."""

    source: str
    mean: float
    std: float | None


def published_for(record: Mapping[str, Any], dataset: str, figure: str) -> tuple[PublishedFigure, ...]:
    """What was published for a run's model and method on a dataset; nothing for runs trained on other data."""
    return tuple(
        PublishedFigure(row["source"], float(row[figure]), float(std) if (std := row[f"{figure}_std"]) else None)
        for row in published()
        if record["train"] == TRAINED_ON
        and (row["model"], row["method"], row["dataset"]) == (record["model"], record["method"], dataset)
    )


def leaderboard(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Runs (as `probe.runs.read_run` gives them) as a table: mean ± std over fold models on every set.

    Below each run stand the published figures for the same model and method, where there are any.
    """
    from rich.table import Table

    sets = list(dict.fromkeys(name for run in runs for name in run["metrics"]["sets"]))
    table = Table(title="Mean ± std over fold models; threshold 0.5", title_style="bold", header_style="bold")
    table.add_column("Model")
    table.add_column("View, pooling")
    for name in sets:
        dataset, split = name.rsplit("/", 1)
        title = f"{dataset}\n{'validation' if split == VALIDATION else 'test'}"
        table.add_column(f"{title}\nbal. acc.", justify="right")
        table.add_column(f"{title}\nAUROC", justify="right")
    for run in runs:
        cells = []
        for name in sets:
            figures = run["metrics"]["sets"].get(name)
            cells += [_cell(figures["folds"][figure]) if figures else "" for figure in FIGURES]
        table.add_row(f"{run['model']} ({run['method']})", f"{run['view']}, {run['pooling']}", *cells)
        for source, title in SOURCES.items():
            rows = {
                row["dataset"]: row
                for row in published()
                if (row["source"], row["model"], row["method"]) == (source, run["model"], run["method"])
            }
            if rows and run["train"] == TRAINED_ON:
                table.add_row(f"  {title}", "full, card", *_published_cells(sets, rows), style="dim")
        table.add_section()
    return table


def result_tables(runs: Sequence[Mapping[str, Any]]) -> list[Table]:
    """What a command prints of its runs: fold models, and the ensembles where there is a test set."""
    ensembles = ensemble_table(runs)
    return [leaderboard(runs), *([ensembles] if ensembles else [])]


def ensemble_table(runs: Sequence[Mapping[str, Any]]) -> Table | None:
    """The fold ensemble of every run on the test sets, with intervals; None where no run has a test set."""
    from rich.table import Table

    sets = {
        name: figures["intervals"]
        for run in runs
        for name, figures in run["metrics"]["sets"].items()
        if "intervals" in figures
    }
    if not sets:
        return None
    level = f"{next(iter(sets.values()))['level']:.0%}"
    table = Table(
        title=f"Fold ensemble at the threshold of its out-of-fold predictions; {level} intervals",
        title_style="bold",
        header_style="bold",
    )
    table.add_column("Model")
    table.add_column("Threshold", justify="right")
    for name, intervals in sets.items():
        dataset, split = name.rsplit("/", 1)
        title = f"{dataset} {split}\n{intervals['n_clusters']} {intervals['unit']}s"
        for figure in FIGURES.values():
            table.add_column(f"{title}\n{figure}", justify="right")
    for run in runs:
        cells = []
        for name in sets:
            found = run["metrics"]["sets"].get(name)
            cells += [_interval_cell(found, figure) if found else "" for figure in FIGURES]
        table.add_row(f"{run['model']} ({run['method']})", f"{run['metrics']['threshold']:.3f}", *cells)
    return table


def _interval_cell(figures: Mapping[str, Any], figure: str) -> str:
    value, (low, high) = figures["ensemble"][figure], figures["intervals"]["figures"][figure]
    if value is None:
        return "–"
    return f"{value:.4f}" if low is None else f"{value:.4f} ({low:.3f}–{high:.3f})"


def candidates_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """What each run chose its view and pooling from: validation figures on training data, the choice marked."""
    from rich.table import Table

    table = Table(title="Chosen by cross-validation on training data", title_style="bold", header_style="bold")
    for column in ("Model", "View", "Pooling", "Validation AUROC", "Validation bal. acc.", "C per fold", ""):
        table.add_column(column, justify="right" if column.startswith("Validation") else "left")
    for run in runs:
        for candidate in run["candidates"]:
            chosen = (candidate["view"], candidate["pooling"]) == (run["view"], run["pooling"])
            table.add_row(
                run["model"],
                candidate["view"],
                candidate["pooling"],
                f"{candidate['validation_auroc']:.4f}",
                f"{candidate['validation_balanced_accuracy']:.4f}",
                " ".join(f"{c:g}" for c in candidate.get("chosen_strength", ())),
                "chosen" if chosen else "",
                style="bold" if chosen else "dim",
            )
        table.add_section()
    return table


def training_table(run: Mapping[str, Any]) -> Table:
    """How a fine-tuned run's folds trained: epochs, the one that was kept, and its validation figures."""
    from rich.table import Table

    table = Table(title="Training: the epoch kept per fold", title_style="bold", header_style="bold")
    columns = ("Fold", "Epochs", "Kept", "Loss", "Validation bal. acc.", "Validation AUROC", "Learning rate")
    for column in columns:
        table.add_column(column, justify="right")
    for fold, (history, kept) in enumerate(zip(run["history"], run["best_epoch"], strict=True)):
        best = history[kept]
        table.add_row(
            str(fold),
            str(len(history)),
            str(kept + 1),
            f"{best['loss']:.4f}",
            f"{best['balanced_accuracy']:.4f}",
            f"{best['auroc']:.4f}",
            f"{best['learning_rate']:.1e}",
        )
    return table


def _cell(figure: Mapping[str, Any]) -> str:
    return "–" if figure["mean"] is None else f"{figure['mean']:.4f} ± {figure['std']:.4f}"


def _published_cells(sets: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    cells = []
    for name in sets:
        dataset, split = name.rsplit("/", 1)
        row = rows.get(dataset) if split != VALIDATION else None
        for figure in FIGURES:
            std = f" ± {row[f'{figure}_std']}" if row and row[f"{figure}_std"] else ""
            cells.append(f"{row[figure]}{std}" if row else "")
    return cells


# ------------------------------------------------------------------------------------------------------ tables in print


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
    """Two tables of the test sets: fold models and what was published of them; ensembles with intervals."""
    tests = [on for on in report.sets if on.split != VALIDATION] or list(report.sets)
    groups = tuple(f"{on.title} (n = {on.n:,})" for on in tests)
    columns = [(on, figure) for on in tests for figure in FIGURES]

    def best(of: Mapping[str, float]) -> float:
        return max((round(value, _PRINTED) for value in of.values()), default=0)

    folds, ensembles = [], []
    means = [best({label: of[figure].mean for label, of in on.folds.items()}) for on, figure in columns]
    values = [
        best({label: of.figures[figure].value for label, of in on.comparison.judgements.items()})
        for on, figure in columns
    ]
    for run in runs:
        mine, judged = [], []
        for (on, figure), highest, largest in zip(columns, means, values, strict=True):
            if run.label in on.missing:
                mine.append(Cell("–"))
                judged.append(Cell("–"))
                continue
            fold, one = on.folds[run.label][figure], on.comparison.judgements[run.label].figures[figure]
            mine.append(Cell(_digits(fold.mean), f"± {_digits(fold.std)}", round(fold.mean, _PRINTED) == highest))
            ends = f"[{_digits(one.low)}, {_digits(one.high)}]" if not math.isnan(one.low) else ""
            judged.append(Cell(_digits(one.value), ends, round(one.value, _PRINTED) == largest))
        folds.append((run.label, tuple(mine), False))
        ensembles.append((run.label, tuple(judged), False))
        for source, title in SOURCES.items():
            cells = [_published_cell(run, on.dataset, on.split, figure, source) for on, figure in columns]
            if any(cell.value != "–" for cell in cells):
                folds.append((f"{run.label}: {title}", tuple(cells), True))
    units = "; ".join(
        f"{on.title}: {next(iter(on.comparison.judgements.values())).n_clusters} "
        f"{next(iter(on.comparison.judgements.values())).unit}s"
        for on in tests
    )
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


def _published_cell(run: Run, dataset: str, split: str, figure: str, source: str) -> Cell:
    if split == VALIDATION:
        return Cell("–")
    for found in published_for(run.record, dataset, figure):
        if found.source == source:
            return Cell(_digits(found.mean), "" if found.std is None else f"± {_digits(found.std)}")
    return Cell("–")


_PRINTED = 3


def _digits(value: float) -> str:
    """Three digits, without the leading zero, as the field prints shares."""
    return "–" if math.isnan(value) else re.sub(r"^(-?)0\.", r"\1.", f"{value:.{_PRINTED}f}")


def markdown(grid: Grid) -> str:
    """A pipe table with its caption above it."""
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
    """A table environment; needs the package booktabs."""
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
