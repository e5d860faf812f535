"""What do runs say together? One comparison per test set, computed from run folders alone.

    folders -> read_runs -> collect -> Report -> probe.page (HTML), probe.tables (Markdown, LaTeX)

Runs stand in one report only if they were trained on the same folds: a model that saw other slides cannot be set beside
them. All runs on a set are judged on the same patches and the same resamples (`probe.evidence`).
"""

from __future__ import annotations

import os
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError, nearest, progress
from features.samples import MISSING_VOTE, Samples, audit
from probe.curve import CurvePoint, read_curve
from probe.evidence import (
    Comparison,
    DomainView,
    Ensemble,
    RaterView,
    Resampling,
    by_agreement,
    by_domain,
    compare,
    ensemble,
    fold_figures,
    rows_of,
)
from probe.metrics import ECE_BINS, FoldFigure
from probe.predictions import VALIDATION, Predictions
from probe.runs import read_predictions, read_run, read_samples

_NEEDED = (
    "id",
    "created",
    "kind",
    "model",
    "method",
    "train",
    "view",
    "pooling",
    "options",
    "folds",
    "versions",
    "cost",
)
_NOT_TELLING = frozenset({"view", "pooling", "fractions", "test"})  # the outcome is told, or the run is no other for it
_DIGITS = 8  # of a digest, in names and messages
_POINTS = 250  # at most, of a drawn curve


@dataclass(frozen=True, eq=False)
class Run:
    """A run, read.

    Attributes:
        folder: where it is.
        label: its name in tables: model and method, and what tells it from others of the same.
        record: its run.json, with metrics.json under `metrics`.
        predictions: all of them.
        tables: dataset to the patch table of what was predicted.
        curve: its learning curve; empty if it has none.
    """

    folder: Path
    label: str
    record: dict[str, Any]
    predictions: Predictions
    tables: dict[str, Samples]
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Confusion:
    """Patches by label and prediction at the run's threshold."""

    tp: int
    fn: int
    fp: int
    tn: int


@dataclass(frozen=True)
class Curves:
    """What is drawn of one run on one set.

    Attributes:
        roc: (false positive rate, true positive rate) from (0, 0) to (1, 1).
        precision_recall: (recall, precision) from the highest threshold to the lowest.
        calibration: (mean probability, observed rate, patches) of every bin of the calibration error that is not empty.
    """

    roc: tuple[tuple[float, float], ...]
    precision_recall: tuple[tuple[float, float], ...]
    calibration: tuple[tuple[float, float, int], ...]


@dataclass(frozen=True)
class SetReport:
    """All runs on one set; every mapping is by run label.

    Attributes:
        dataset, split: which set; split "validation" holds out-of-fold predictions.
        n, n_positive: patches.
        n_identical: sets of byte-identical patches among them.
        comparison: figures with intervals, differences, ranks.
        folds: figure to what the fold models reach.
        confusion, curves: of the ensemble.
        raters: by agreement of the raters; empty without two raters.
        domains: by domain; empty without two domains.
        missing: runs without predictions here.
    """

    dataset: str
    split: str
    n: int
    n_positive: int
    n_identical: int
    comparison: Comparison
    folds: dict[str, dict[str, FoldFigure]]
    confusion: dict[str, Confusion]
    curves: dict[str, Curves]
    raters: dict[str, RaterView]
    domains: dict[str, DomainView]
    missing: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.dataset}/{self.split}"

    @property
    def title(self) -> str:
        return f"{self.dataset}, {'out of fold' if self.split == VALIDATION else self.split}"


@dataclass(frozen=True)
class Report:
    """Everything that is tabulated or drawn.

    Attributes:
        created: when, in UTC.
        version: of mitofm.
        labels: of the runs, by date.
        train: the dataset that all runs were trained on.
        fold_digest, n_folds: of the assignment that all runs share.
        how: of the resampling.
        sets: the test sets, that of the training dataset first, then the out-of-fold predictions.
        notes: what a reader must know: sets that runs lack, identical patches, what was left out.
    """

    created: str
    version: str
    labels: tuple[str, ...]
    train: str
    fold_digest: str
    n_folds: int
    how: Resampling
    sets: tuple[SetReport, ...]
    notes: tuple[str, ...]


# ------------------------------------------------------------------------------------------------------------- reading


def read_runs(runs: Path, *, named: Sequence[Path] = (), folds: str | None = None) -> tuple[list[Run], list[str]]:
    """Runs that were trained on the same folds, by date, and notes on what was left out.

    Args:
        runs: the folder of all runs.
        named: folders of runs; all in `runs` if there are none.
        folds: the first digits of a fold digest; only runs on those folds are taken.

    Raises:
        UserError: no runs, damaged ones, or runs of different folds.
    """
    folders, notes = (list(named), []) if named else _folders(runs)
    records: list[tuple[Path, dict[str, Any]]] = []
    of_id: dict[str, Path] = {}
    for folder in dict.fromkeys(folders):
        record = _read_record(folder)
        if (same := of_id.setdefault(str(record["id"]), folder)) is folder:
            records.append((folder, record))
        else:
            notes.append(f"{folder} is the same run as {same} and is left out.")
    by_folds: dict[str, list[tuple[Path, dict[str, Any]]]] = defaultdict(list)
    for folder, record in sorted(records, key=lambda found: (found[1]["created"], found[1]["id"])):
        by_folds[str(record["folds"]["digest"])].append((folder, record))
    chosen = [digest for digest in by_folds if folds is None or digest.startswith(folds)]
    if not chosen:
        known = [digest[:_DIGITS] for digest in by_folds]
        raise UserError(f"no run has folds {folds}.{nearest(str(folds), known)} The runs have {', '.join(known)}.")
    if len(chosen) > 1:
        raise UserError(_different_folds({digest: by_folds[digest] for digest in chosen}))
    left = sum(map(len, by_folds.values())) - len(by_folds[chosen[0]])
    if left:
        notes.append(
            f"{left} run{'s' * (left > 1)} on other folds left out: different folds are never tabulated together."
        )
    kept = by_folds[chosen[0]]
    labels = labels_of([record for _, record in kept])
    return [_read(folder, record, label) for (folder, record), label in zip(kept, labels, strict=True)], notes


def _folders(runs: Path) -> tuple[list[Path], list[str]]:
    if not runs.is_dir():
        raise UserError(
            f"{runs} {'is not a folder' if runs.exists() else 'does not exist'}. Expected the folder of all runs; "
            "make one with fm-probe or fm-finetune."
        )
    below = sorted(path for path in runs.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = [path for path in below if (path / "run.json").exists()]
    unfinished = [path for path in below if (path / "training.json").exists() and path not in found]
    notes = [f"{path.name} has not finished and is left out: fm-finetune --resume {path}" for path in unfinished]
    if not found:
        hint = f" {notes[0]}." if notes else " Make one with fm-probe or fm-finetune."
        raise UserError(f"{runs} holds no finished run.{hint}")
    return found, notes


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_run(folder)
    missing = [name for name in _NEEDED if name not in record] or [
        f"folds.{name}"
        for name in ("n", "digest")
        if not isinstance(record["folds"], dict) or name not in record["folds"]
    ]
    if missing:
        raise UserError(f"{folder}/run.json lacks {', '.join(missing)}: it is damaged. Run the command again.")
    return record


def _different_folds(by_folds: Mapping[str, Sequence[tuple[Path, Mapping[str, Any]]]]) -> str:
    lines = [
        f"  {digest[:_DIGITS]}: {found[0][1]['train']}, {found[0][1]['folds']['n']} folds, "
        f"{len(found)} run{'s' * (len(found) > 1)} ({', '.join(folder.name for folder, _ in found[:3])}"
        f"{', ...' if len(found) > 3 else ''})"
        for digest, found in by_folds.items()
    ]
    first = next(iter(by_folds))[:_DIGITS]
    return (
        f"these runs were trained on {len(by_folds)} different fold assignments, and are never tabulated together:\n"
        + "\n".join(lines)
        + f"\nReport one of them, for instance: fm-report --folds {first}"
    )


def _read(folder: Path, record: dict[str, Any], label: str) -> Run:
    predictions = read_predictions(folder)
    held = {dataset for dataset, _ in predictions.sets()}
    expected = [record["train"], *record.get("test", ())]
    missing = [name for name in expected if name not in held]
    if missing:
        raise UserError(
            f"{folder} says that it was scored on {', '.join(missing)}, but its predictions.csv has only "
            f"{', '.join(sorted(held)) or 'none'}. Restore the file, or run the command again."
        )
    return Run(folder, label, record, predictions, read_samples(folder, predictions), read_curve(folder))


def labels_of(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A distinct name for every run: model and method; then the options in which namesakes differ; then their ids."""
    labels = [f"{record['model']} {record['method']}" for record in records]
    for label in [label for label, count in Counter(labels).items() if count > 1]:
        namesakes = [row for row, other in enumerate(labels) if other == label]
        facts = [_facts(records[row]) for row in namesakes]
        known = dict.fromkeys(name for fact in facts for name in fact)
        telling = [name for name in known if len({str(fact.get(name, "")) for fact in facts}) > 1]
        for row, fact in zip(namesakes, facts, strict=True):
            labels[row] = " ".join([label, *(_shown(name, fact[name]) for name in telling if name in fact)])
    for part in (2, 0):  # the last digits of the id; all of it where these are the same
        repeated = {label for label, count in Counter(labels).items() if count > 1}
        labels = [
            f"{label} #{str(record['id']).rpartition('-')[2] if part else record['id']}" if label in repeated else label
            for label, record in zip(labels, records, strict=True)
        ]
    return labels


def _facts(record: Mapping[str, Any]) -> dict[str, Any]:
    """What may tell a run from its namesakes: what came out of choosing, then what was asked for."""
    asked = {name: value for name, value in record["options"].items() if name not in _NOT_TELLING}
    nested = {inner: value for outer in asked.values() if isinstance(outer, dict) for inner, value in outer.items()}
    return {
        "view": record["view"],
        "pooling": record["pooling"],
        **nested,
        **{name: value for name, value in asked.items() if not isinstance(value, dict)},
    }


def _shown(name: str, value: Any) -> str:
    return str(value) if name in ("view", "pooling", "recipe") else f"{name}={'default' if value is None else value}"


# ---------------------------------------------------------------------------------------------------------- collecting


def collect(runs: Sequence[Run], notes: Sequence[str] = (), *, how: Resampling = Resampling()) -> Report:
    """Compare runs on every set that any of them has.

    Args:
        runs: of `read_runs`.
        notes: to begin with.
        how: of the resampling.

    Raises:
        UserError: if runs disagree on a set's patches, labels or slides.
    """
    from importlib.metadata import version

    train = str(runs[0].record["train"])
    names = dict.fromkeys(pair for run in runs for pair in run.predictions.sets())
    ordered = sorted(names, key=lambda pair: (pair[1] == VALIDATION, pair[0] != train))
    with progress("compare", len(ordered), unit="sets") as advance, ThreadPoolExecutor(os.cpu_count()) as pool:

        def on_set(pair: tuple[str, str]) -> SetReport:
            found = _on_set(runs, *pair, how)
            advance(1)
            return found

        sets = list(pool.map(on_set, ordered))
    said = list(notes)
    for on in sets:
        said += [
            f"{label} was not scored on {on.dataset}: run it again with --test {on.dataset}." for label in on.missing
        ]
        if on.n_identical:
            said.append(
                f"{on.title} holds {on.n_identical} sets of byte-identical patches; they count as separate patches."
            )
    return Report(
        created=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        version=version("mitofm"),
        labels=tuple(run.label for run in runs),
        train=train,
        fold_digest=str(runs[0].record["folds"]["digest"]),
        n_folds=int(runs[0].record["folds"]["n"]),
        how=how,
        sets=tuple(sets),
        notes=tuple(dict.fromkeys(said)),
    )


def _on_set(runs: Sequence[Run], dataset: str, split: str, how: Resampling) -> SetReport:
    having = [run for run in runs if (dataset, split) in run.predictions.sets()]
    judged = {run.label: _ensemble(run, dataset, split) for run in having}
    comparison = compare(judged, how=how)  # refuses runs of different patches
    table = fullest([run.tables[dataset] for run in having])
    tables = {label: table.select(rows_of(on, table.id)) for label, on in judged.items()}  # in each run's own order
    first = next(iter(tables.values()))
    rated = ((first.votes != MISSING_VOTE).sum(axis=1) >= 2).any()
    return SetReport(
        dataset=dataset,
        split=split,
        n=len(first),
        n_positive=int((first.label == 1).sum()),
        n_identical=len(audit(first).duplicates),
        comparison=comparison,
        folds={run.label: fold_figures(run.predictions, dataset, split) for run in having},
        confusion={label: _confusion(on) for label, on in judged.items()},
        curves={label: _curves(on) for label, on in judged.items()},
        raters={label: by_agreement(on, tables[label].votes, how=how) for label, on in judged.items() if rated},
        domains={
            label: by_domain(on, tables[label].domain, how=how)
            for label, on in judged.items()
            if len(set(first.domain.tolist()) - {""}) >= 2
        },
        missing=tuple(run.label for run in runs if run not in having),
    )


def fullest(tables: Sequence[Samples]) -> Samples:
    """The patch table that knows most; runs without a samples.csv know least."""
    return max(tables, key=lambda table: (table.votes.shape[1], (table.domain != "").sum(), (table.sha256 != "").sum()))


def _ensemble(run: Run, dataset: str, split: str) -> Ensemble:
    try:
        return ensemble(run.predictions, dataset, split)
    except UserError as error:
        raise UserError(f"{run.folder}: {error}") from error


def _confusion(on: Ensemble) -> Confusion:
    y, predicted = on.label == 1, on.probability >= on.threshold
    return Confusion(
        tp=int((y & predicted).sum()),
        fn=int((y & ~predicted).sum()),
        fp=int((~y & predicted).sum()),
        tn=int((~y & ~predicted).sum()),
    )


def _curves(on: Ensemble) -> Curves:
    y, p = on.label == 1, on.probability
    order = np.argsort(-p, kind="stable")
    last_of_tie = np.append(np.diff(p[order]) != 0, True)  # equal scores enter together
    tp, n = np.cumsum(y[order])[last_of_tie], np.flatnonzero(last_of_tie) + 1
    n_positive, n_negative = max(1, int(y.sum())), max(1, int((~y).sum()))
    bins = np.minimum((p * ECE_BINS).astype(np.intp), ECE_BINS - 1)
    count = np.bincount(bins, minlength=ECE_BINS)
    filled = np.flatnonzero(count)
    mean, rate = (np.bincount(bins, weights=values, minlength=ECE_BINS)[filled] / count[filled] for values in (p, y))
    return Curves(
        roc=((0.0, 0.0), *_thinned((n - tp) / n_negative, tp / n_positive)),
        precision_recall=_thinned(tp / n_positive, tp / n),
        calibration=tuple(zip(mean.tolist(), rate.tolist(), count[filled].tolist(), strict=True)),
    )


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[tuple[float, float], ...]:
    """The points of a curve, at most `_POINTS` of them, both ends kept."""
    rows = np.unique(np.linspace(0, len(x) - 1, min(len(x), _POINTS)).astype(np.intp))
    return tuple(zip(x[rows].tolist(), y[rows].tolist(), strict=True))
