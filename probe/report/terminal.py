"""What does a command print of its runs?"""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from probe.metrics import FoldFigure, Interval
from probe.predictions import VALIDATION
from probe.report.published import FIGURES, SOURCES, PublishedFigure, published_for
from probe.runs import RunRecord


def result_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Tabulate runs: fold models, and the ensembles where there is a test set."""
    ensembles = ensemble_table(runs)
    return [leaderboard(runs), *([ensembles] if ensembles else [])]


def leaderboard(runs: Sequence[RunRecord]) -> Table:
    """Tabulate runs by mean ± std over fold models on every set.

    Below each run stand the published figures of the same model and method, where there are any.
    """
    sets = list(dict.fromkeys(name for run in runs for name in run.figures.sets))
    table = _table("Mean ± std over fold models; threshold 0.5")
    table.add_column("Model")
    table.add_column("View, pooling")
    for name in sets:
        dataset, split = name.rsplit("/", 1)
        title = f"{dataset}\n{'validation' if split == VALIDATION else 'test'}"
        for figure in FIGURES.values():
            table.add_column(f"{title}\n{figure}", justify="right")
    for run in runs:
        metrics = [run.figures.sets.get(name) for name in sets]
        cells = [_fold_cell(one.folds[figure]) if one else "" for one in metrics for figure in FIGURES]
        table.add_row(f"{run.model} ({run.method})", f"{run.view}, {run.pooling}", *cells)
        published = [published_for(run, *name.rsplit("/", 1)) for name in sets]
        for source, title in SOURCES.items():
            rows = [by_source.get(source) for by_source in published]
            if any(rows):
                cells = [_published_cell(row.figures[figure]) if row else "" for row in rows for figure in FIGURES]
                table.add_row(f"  {title}", "full, card", *cells, style="dim")
        table.add_section()
    return table


def ensemble_table(runs: Sequence[RunRecord]) -> Table | None:
    """Tabulate the fold ensemble of every run on the test sets, with intervals; None where no run has a test set."""
    sets = {name: one.ensemble for run in runs for name, one in run.figures.sets.items() if one.ensemble}
    if not sets:
        return None
    level = next(iter(sets.values())).level
    table = _table(f"Fold ensemble at the threshold of its out-of-fold predictions; {level:.0%} intervals")
    table.add_column("Model")
    table.add_column("Threshold", justify="right")
    for name, judgement in sets.items():
        title = f"{' '.join(name.rsplit('/', 1))}\n{judgement.n_clusters} {judgement.unit}s"
        for figure in FIGURES.values():
            table.add_column(f"{title}\n{figure}", justify="right")
    for run in runs:
        metrics = [run.figures.sets.get(name) for name in sets]
        ensembles = [one.ensemble if one else None for one in metrics]
        cells = [_interval_cell(one.figures[figure]) if one else "" for one in ensembles for figure in FIGURES]
        table.add_row(f"{run.model} ({run.method})", f"{run.figures.threshold:.3f}", *cells)
    return table


def candidates_table(runs: Sequence[RunRecord]) -> Table:
    """Tabulate what each run chose its view and pooling from: validation figures on training data, the choice bold."""
    table = _table("Chosen by cross-validation on training data")
    for column in ("Model", "View", "Pooling", "Validation AUROC", "Validation bal. acc.", "C per fold", ""):
        table.add_column(column, justify="right" if column.startswith("Validation") else "left")
    for run in runs:
        for candidate in run.candidates or ():
            is_chosen = (candidate.view, candidate.pooling) == (run.view, run.pooling)
            table.add_row(
                run.model,
                candidate.view,
                candidate.pooling,
                f"{candidate.validation_auroc:.4f}",
                f"{candidate.validation_balanced_accuracy:.4f}",
                " ".join(f"{c:g}" for c in candidate.chosen_strength or ()),
                "chosen" if is_chosen else "",
                style="bold" if is_chosen else "dim",
            )
        table.add_section()
    return table


def training_table(run: RunRecord) -> Table:
    """Tabulate how a fine-tuned run's folds trained: epochs, the one that was kept, and its validation figures."""
    table = _table("Training: the epoch kept per fold")
    columns = ("Fold", "Epochs", "Kept", "Loss", "Validation bal. acc.", "Validation AUROC", "Learning rate")
    for column in columns:
        table.add_column(column, justify="right")
    for fold, (history, kept) in enumerate(zip(run.history or (), run.best_epoch or (), strict=True)):
        best = history[kept]
        table.add_row(
            str(fold),
            str(len(history)),
            str(kept + 1),
            f"{best.loss:.4f}",
            f"{best.balanced_accuracy:.4f}",
            f"{best.auroc:.4f}",
            f"{best.learning_rate:.1e}",
        )
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_style="bold", header_style="bold")


def _fold_cell(figure: FoldFigure) -> str:
    return "–" if math.isnan(figure.mean) else f"{figure.mean:.4f} ± {figure.std:.4f}"


def _interval_cell(figure: Interval) -> str:
    if math.isnan(figure.value):
        return "–"
    ends = "" if math.isnan(figure.low) else f" ({figure.low:.3f}–{figure.high:.3f})"
    return f"{figure.value:.4f}{ends}"


def _published_cell(figure: PublishedFigure) -> str:
    return f"{figure.mean:.4f}" + ("" if figure.std is None else f" ± {figure.std:.4f}")
