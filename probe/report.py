"""How are runs laid beside each other? One table shaped like the paper's Table 3, published figures next to ours."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from probe.results import VALIDATION

if TYPE_CHECKING:
    from rich.table import Table

SOURCES = {"table-3": "paper, Table 3", "re-run": "authors' re-run"}
_FIGURES = ("balanced_accuracy", "auroc")


@cache
def published() -> tuple[dict[str, str], ...]:
    """Published figures: source, date, model, method, dataset, balanced_accuracy, auroc, each with its std if given.

    Source: Table 3 of Banerjee et al. 2025 (arXiv 2506.21444v1), and the authors' later re-run in the notebooks of the
    AMi-Br_Benchmark repository (commit 3acf4dad). Means over five fold models on the same test images.
    """
    with files("probe").joinpath("data/published.csv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


def leaderboard(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Runs (as `probe.results.read_run` gives them) as a table: mean ± std over fold models on every set.

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
            cells += [_cell(figures["folds"][figure]) if figures else "" for figure in _FIGURES]
        table.add_row(f"{run['model']} ({run['method']})", f"{run['view']}, {run['pooling']}", *cells)
        for source, title in SOURCES.items():
            rows = {
                row["dataset"]: row
                for row in published()
                if (row["source"], row["model"], row["method"]) == (source, run["model"], run["method"])
            }
            if rows and run["train"] == "ami-br":
                table.add_row(f"  {title}", "full, card", *_published_cells(sets, rows), style="dim")
        table.add_section()
    return table


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
    return f"{figure['mean']:.4f} ± {figure['std']:.4f}"


def _published_cells(sets: Sequence[str], rows: Mapping[str, Mapping[str, str]]) -> list[str]:
    cells = []
    for name in sets:
        dataset, split = name.rsplit("/", 1)
        row = rows.get(dataset) if split != VALIDATION else None
        for figure in _FIGURES:
            std = f" ± {row[f'{figure}_std']}" if row and row[f"{figure}_std"] else ""
            cells.append(f"{row[figure]}{std}" if row else "")
    return cells
