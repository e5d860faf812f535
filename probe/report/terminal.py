"""What does a command print of its runs?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from rich.table import Table

from probe.curve import CurvePoint, summarise
from probe.leaks import UNSEEN
from probe.metrics import Interval
from probe.predictions import VALIDATION
from probe.records import RunRecord
from probe.report.published import FIGURES, FIGURES_OF_MORE, SOURCES, published_for
from probe.significance import Difference

_TEXT = frozenset(
    {"Model", "Set", "View", "Pooling", "View, pooling", "C per fold", ""}
)  # columns of words, not of numbers


def result_tables(runs: Sequence[RunRecord]) -> list[Table]:
    """Tabulate runs: fold models, and the ensembles where there is a test set."""
    ensembles, domains = ensemble_table(runs), held_out_table(runs)
    return [leaderboard(runs), *([domains] if domains else []), *([ensembles] if ensembles else [])]


def leaderboard(runs: Sequence[RunRecord]) -> Table:
    """Tabulate runs by mean ± std over fold models on every set.

    Below each run stand the published figures of the same model and method, where there are any.
    """
    sets = list(dict.fromkeys(name for run in runs for name in run.figures.sets))
    named = [name.rsplit("/", 1) for name in sets]
    titles = [f"{dataset}\n{'test, unseen' if split == UNSEEN else split}" for dataset, split in named]
    columns = [f"{title}\n{figure}" for title in titles for figure in _headings(runs)]
    at = "threshold 0.5" if runs[0].n_classes == 2 else "means over the classes that a set holds"
    table = _table(f"Mean ± std over {_which_models(runs)}; {at}", "Model", "View, pooling", *columns)
    for run in runs:
        metrics = [run.figures.sets.get(name) for name in sets]
        cells = [
            _spread(one.folds[figure].mean, one.folds[figure].std) if one else ""
            for one in metrics
            for figure in FIGURES
        ]
        table.add_row(f"{run.model} ({run.method})", f"{run.view}, {run.pooling}", *cells)
        published = [published_for(run, *name.rsplit("/", 1)) for name in sets]
        for source in SOURCES:
            rows = [by_source.get(source) for by_source in published]
            title = next((row.title for row in rows if row), None)  # of one model and method, the same on all sets
            if title:
                figures = [row.figures[figure] if row else None for row in rows for figure in FIGURES]
                cells = [_spread(figure.mean, figure.std) if figure else "" for figure in figures]
                table.add_row(f"  {title}", "full, card", *cells, style="dim")
        table.add_section()
    return table


def _which_models(runs: Sequence[RunRecord]) -> str:
    """Say over which models figures are averaged: how many, where runs were trained with several seeds."""
    counts = {(len(run.seeds), run.folds.n) for run in runs}
    if all(n_seeds == 1 for n_seeds, _ in counts):
        return "fold models"
    return " or ".join(f"{k * f} fold models ({k} seed{'s' * (k > 1)} x {f} folds)" for k, f in sorted(counts))


def _headings(runs: Sequence[RunRecord]) -> tuple[str, ...]:
    return tuple((FIGURES if runs[0].n_classes == 2 else FIGURES_OF_MORE).values())


def held_out_table(runs: Sequence[RunRecord]) -> Table | None:
    """Tabulate what each run reaches on every domain that it held out in turn; None if folds are no domains."""
    names = runs[0].folds.names
    if not names:
        return None
    columns = [f"{name}\n{figure}" for name in names for figure in _headings(runs)]
    table = _table("Each domain, by the model that was trained on the others", "Model", "View, pooling", *columns)
    for run in runs:
        of = run.figures.sets[f"{run.train}/{VALIDATION}"].folds
        # By seed and fold: the mean over the seeds of a fold.
        each = {figure: np.reshape(of[figure].each, (len(run.seeds), -1)).mean(axis=0) for figure in FIGURES}
        cells = [f"{each[figure][k]:.4f}" for k in range(len(names)) for figure in FIGURES]
        table.add_row(f"{run.model} ({run.method})", f"{run.view}, {run.pooling}", *cells)
    return table


def ensemble_table(runs: Sequence[RunRecord]) -> Table | None:
    """Tabulate the fold ensemble of every run on the test sets, with intervals; None where no run has a test set."""
    sets = {name: one.ensemble for run in runs for name, one in run.figures.sets.items() if one.ensemble}
    if not sets:
        return None
    level = next(iter(sets.values())).level
    titles = [f"{' '.join(name.rsplit('/', 1))}\n{one.n_clusters} {one.unit}s" for name, one in sets.items()]
    columns = [f"{title}\n{figure}" for title in titles for figure in _headings(runs)]
    of_two = runs[0].n_classes == 2
    at = "at the threshold of its out-of-fold predictions" if of_two else "says the most probable class"
    title = f"Fold ensemble {at}; {level:.0%} intervals"
    table = _table(title, "Model", *(["Threshold"] if of_two else []), *columns)
    for run in runs:
        metrics = [run.figures.sets.get(name) for name in sets]
        ensembles = [one.ensemble if one else None for one in metrics]
        cells = [_interval_cell(one.figures[figure]) if one else "" for one in ensembles for figure in FIGURES]
        threshold = [f"{run.figures.threshold:.3f}"] if of_two else []
        table.add_row(f"{run.model} ({run.method})", *threshold, *cells)
    return table


def candidates_table(runs: Sequence[RunRecord]) -> Table:
    """Tabulate what each run chose its embedding from: validation figures on training data, the choice bold."""
    columns = ("Model", "View", "Pooling", "Validation AUROC", "Validation bal. acc.", "C per fold", "")
    table = _table("Chosen by cross-validation on training data", *columns)
    for run in runs:
        for candidate in run.candidates or ():
            if run.combined and not candidate.combined:
                continue  # those of one embedding stand in the rows of their own runs
            own = (run.view, run.pooling, run.combined)
            is_chosen = (candidate.view, candidate.pooling, candidate.combined) == own
            is_chosen &= candidate.model in (None, run.model)
            how = f" ({candidate.combined})" if candidate.combined else ""
            table.add_row(
                f"{candidate.model or run.model}{how}",
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


def gain_table(run: RunRecord, gains: Mapping[str, Mapping[str, Difference]]) -> Table:
    """Tabulate what a combination gains over its best part on every set (`probe.combine.gains`), with intervals."""
    title = f"{run.model} ({run.method}) minus its best part, {run.each_part[0]}"
    table = _table(title, "Set", *(text for figure in _headings([run]) for text in (figure, "p")))
    for name, differences in gains.items():
        cells = []
        for figure in FIGURES:
            one = differences[figure]
            ends = "" if math.isnan(one.low) else f" ({one.low:+.3f} to {one.high:+.3f})"
            cells += [f"{one.value:+.4f}{ends}", "–" if math.isnan(one.p) else f"{one.p:.3f}"]
        table.add_row(name.replace("/", " "), *cells)
    if any(math.isnan(one["auroc"].p) for one in gains.values()):
        table.caption = "Out of fold there is no p-value: the parts were chosen there, which makes them look better."
    return table


def training_table(run: RunRecord) -> Table:
    """Tabulate how a fine-tuned run's models trained: epochs, the one that was kept, and its validation figures."""
    several = len(run.seeds) > 1
    columns = ("Fold", "Epochs", "Kept", "Loss", "Validation bal. acc.", "Validation AUROC", "Learning rate")
    what = "seed and fold" if several else "fold"
    table = _table(f"Training: the epoch kept per {what}", *(["Seed"] if several else []), *columns)
    models = zip(run.fold_models, run.history or (), run.best_epoch or (), strict=True) if run.history else ()
    for (seed, fold), history, kept in models:
        best = history[kept]
        table.add_row(
            *([str(seed)] if several else []),
            run.folds.names[fold] if run.folds.names else str(fold),
            str(len(history)),
            str(kept + 1),
            f"{best.loss:.4f}",
            f"{best.balanced_accuracy:.4f}",
            f"{best.auroc:.4f}",
            f"{best.learning_rate:.1e}",
        )
    return table


def curve_tables(curves: Mapping[str, Sequence[CurvePoint]], *, n_classes: int = 2) -> list[Table]:
    """Make a table per set: by run (named by the keys) and fraction, what was trained on and what it reached."""
    tables: dict[str, Table] = {}
    at = "; threshold 0.5" if n_classes == 2 else "; means over the classes that a set holds"
    for label, points in curves.items():
        previous = ""
        for row in summarise(points):
            if row.name not in tables:
                title = f"Learning curve, {row.name}: mean ± std over folds and draws{at}"
                tables[row.name] = _table(title, "Model", "Fraction", "Slides", "Patches", "AUROC", "Bal. acc.")
            if row.name != previous:
                tables[row.name].add_section()
            tables[row.name].add_row(
                label if row.name != previous else "",
                f"{row.fraction:g}",
                f"{row.n_slides:,.0f}",
                f"{row.n_patches:,.0f}",
                _spread(row.auroc, row.auroc_std),
                _spread(row.balanced_accuracy, row.balanced_accuracy_std),
            )
            previous = row.name
    return list(tables.values())


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_style="bold", header_style="bold")
    for column in columns:
        table.add_column(column, justify="left" if column in _TEXT else "right")
    return table


def _spread(mean: float, std: float | None) -> str:
    return "–" if math.isnan(mean) else f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")


def _interval_cell(figure: Interval) -> str:
    if math.isnan(figure.value):
        return "–"
    return f"{figure.value:.4f}" + (f" ({figure.ends})" if figure.ends else "")
