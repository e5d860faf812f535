"""Which runs stand in one report, and what is each called?

Only runs that were trained on the same folds: a model that saw other slides cannot be set beside them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.console import UserError, nearest
from features.labels import compare_classes
from features.samples import Samples
from probe.curve import CurvePoint, read_curve
from probe.predictions import Predictions
from probe.runs import RunRecord, read_predictions, read_run, read_samples

# Options that never become part of a run's name: the record says which view and pooling were chosen, and a run is the
# same whatever else it scored.
_NOT_TELLING = frozenset({"view", "pooling", "fractions", "test"})
_DIGITS = 8  # of a digest, in names and messages


@dataclass(frozen=True, eq=False)
class Run:
    """A run that has been read.

    Attributes:
        folder: where it is.
        label: its name in tables: model and method, and what distinguishes it from others of the same.
        record: its run.json and metrics.json.
        predictions: all of them.
        tables: dataset to the patch table of what was predicted.
        curve: its learning curve; empty if it has none.
    """

    folder: Path
    label: str
    record: RunRecord
    predictions: Predictions
    tables: dict[str, Samples]
    curve: tuple[CurvePoint, ...]


def read_runs(runs: Path, *, named: Sequence[Path] = (), folds: str | None = None) -> tuple[list[Run], list[str]]:
    """Read the runs that were trained on the same folds, by date, with notes on what was left out.

    Args:
        runs: the folder of all runs.
        named: folders of runs; all in `runs` if there are none.
        folds: the first digits of a fold digest; only runs on those folds are taken.

    Raises:
        UserError: no runs, damaged ones, or runs of different folds.
    """
    folders, notes = (list(named), []) if named else _folders(runs)
    records: dict[str, RunRecord] = {}  # by id
    for folder in dict.fromkeys(folders):
        record = read_run(folder)
        if (same := records.setdefault(record.id, record)) is not record:
            notes.append(f"{folder} is the same run as {same.folder} and is left out.")
    by_folds: dict[str, list[RunRecord]] = defaultdict(list)
    for record in sorted(records.values(), key=lambda record: (record.created, record.id)):
        by_folds[record.folds.digest].append(record)
    chosen = [digest for digest in by_folds if folds is None or digest.startswith(folds)]
    if not chosen:
        known = [digest[:_DIGITS] for digest in by_folds]
        raise UserError(f"no run has folds {folds}.{nearest(str(folds), known)} The runs have {', '.join(known)}.")
    if len(chosen) > 1:
        raise UserError(_different_folds({digest: by_folds[digest] for digest in chosen}))
    kept = by_folds[chosen[0]]
    n_left_out = len(records) - len(kept)
    if n_left_out:
        notes.append(
            f"{n_left_out} run{'s' * (n_left_out > 1)} on other folds left out: different folds are never tabulated "
            "together."
        )
    _require_same_classes(kept)
    return [_read(record, label) for record, label in zip(kept, labels_of(kept), strict=True)], notes


def _require_same_classes(records: Sequence[RunRecord]) -> None:
    first = records[0]
    for other in records[1:]:
        if compare_classes(first.label_names, other.label_names) != "same":
            raise UserError(
                f"{_folder(first).name} tells {first.label_names[1]} (1) from {first.label_names[0]} (0), and "
                f"{_folder(other).name} {other.label_names[1]} from {other.label_names[0]}: they answer different "
                "questions. Report runs of one question, or run the others again with the same `positive` and `labels`."
            )


def _folders(runs: Path) -> tuple[list[Path], list[str]]:
    """List the folders of finished runs, and notes on unfinished ones."""
    if not runs.is_dir():
        raise UserError(
            f"{runs} {'is not a folder' if runs.exists() else 'does not exist'}. Expected the folder of all runs; "
            "make one with fm-probe or fm-finetune."
        )
    below = sorted(path for path in runs.iterdir() if path.is_dir() and not path.name.startswith("."))
    finished = [path for path in below if (path / "run.json").exists()]
    unfinished = [path for path in below if (path / "training.json").exists() and path not in finished]
    notes = [f"{path.name} has not finished and is left out: fm-finetune --resume {path}" for path in unfinished]
    if not finished:
        hint = f" {notes[0]}." if notes else " Make one with fm-probe or fm-finetune."
        raise UserError(f"{runs} holds no finished run.{hint}")
    return finished, notes


def _different_folds(by_folds: Mapping[str, Sequence[RunRecord]]) -> str:
    lines = [
        f"  {digest[:_DIGITS]}: {records[0].train}, {records[0].folds.n} folds, "
        f"{len(records)} run{'s' * (len(records) > 1)} ({', '.join(_folder(record).name for record in records[:3])}"
        f"{', ...' if len(records) > 3 else ''})"
        for digest, records in by_folds.items()
    ]
    first = next(iter(by_folds))[:_DIGITS]
    return (
        f"these runs were trained on {len(by_folds)} different fold assignments, and are never tabulated together:\n"
        + "\n".join(lines)
        + f"\nReport one of them, for instance: fm-report --folds {first}"
    )


def _read(record: RunRecord, label: str) -> Run:
    folder = _folder(record)
    predictions = read_predictions(folder, seed=record.seeds[0])
    datasets = {dataset for dataset, _ in predictions.sets()}
    missing = [name for name in (record.train, *record.test) if name not in datasets]
    if missing:
        raise UserError(
            f"{folder} says that it was scored on {', '.join(missing)}, but its predictions.csv has only "
            f"{', '.join(sorted(datasets)) or 'none'}. Restore the file, or run the command again."
        )
    return Run(folder, label, record, predictions, read_samples(folder, predictions), read_curve(folder))


def _folder(record: RunRecord) -> Path:
    assert record.folder is not None  # `read_run` says where it read
    return record.folder


def labels_of(records: Sequence[RunRecord]) -> list[str]:
    """Name every run differently: model and method; then the options in which namesakes differ; then their ids."""
    labels = [f"{record.model} {record.method}" for record in records]
    for label in _repeated(labels):
        rows = [row for row, other in enumerate(labels) if other == label]
        facts = [_facts(records[row]) for row in rows]
        known = dict.fromkeys(name for fact in facts for name in fact)
        telling = [name for name in known if len({str(fact.get(name, "")) for fact in facts}) > 1]
        for row, fact in zip(rows, facts, strict=True):
            labels[row] = " ".join([label, *(_fact(name, fact[name]) for name in telling if name in fact)])
    for shorten in (True, False):  # the id's last digits; the whole id where these are the same
        repeated = _repeated(labels)
        labels = [
            f"{label} #{record.id.rpartition('-')[2] if shorten else record.id}" if label in repeated else label
            for label, record in zip(labels, records, strict=True)
        ]
    return labels


def _repeated(labels: Sequence[str]) -> list[str]:
    return [label for label, count in Counter(labels).items() if count > 1]


def _facts(record: RunRecord) -> dict[str, Any]:
    """Gather what may distinguish a run from its namesakes: view and pooling, then the options."""
    # Early versions did not record these two.
    whole = {"fold_seed": record.folds.seed, **record.options, "seeds": len(record.seeds)}
    options = {name: value for name, value in whole.items() if name not in _NOT_TELLING}
    nested = {inner: value for outer in options.values() if isinstance(outer, dict) for inner, value in outer.items()}
    flat = {name: value for name, value in options.items() if not isinstance(value, dict)}
    return {"view": record.view, "pooling": record.pooling, **nested, **flat}


def _fact(name: str, value: Any) -> str:
    return str(value) if name in ("view", "pooling", "recipe") else f"{name}={'default' if value is None else value}"
