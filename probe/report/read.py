"""Which runs stand in one report, and what is each called?

Runs that were trained on the same dataset, on whatever folds: test sets take part in no fold.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from features.console import UserError, nearest
from features.labels import compare_classes
from features.samples import Samples
from probe.combine import averaged, weights_of
from probe.curve import CurvePoint, read_curve
from probe.evidence import fold_figures
from probe.predictions import VALIDATION, Predictions
from probe.records import Part, RunRecord
from probe.runs import read_predictions, read_run, read_samples

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
        members: of an ensemble of runs, these, the best out of fold first; its record then describes no folder.
    """

    folder: Path
    label: str
    record: RunRecord
    predictions: Predictions
    tables: dict[str, Samples]
    curve: tuple[CurvePoint, ...]
    members: tuple[Run, ...] = ()

    @property
    def chose(self) -> str:
        """Say what was chosen on its out-of-fold predictions; empty if nothing."""
        if not self.members:
            return self.record.chosen_out_of_fold
        weights = ["its weights"] if any(part.weight is not None for part in self.record.each_part) else []
        return " and ".join([*weights, *(["its members' choices"] if any(one.chose for one in self.members) else [])])

    @property
    def is_random(self) -> bool:
        """Whether another training would give another run."""
        return any(one.is_random for one in self.members) if self.members else self.record.is_random


def ensemble_of_runs(runs: Sequence[Run], *, weights: str = "equal") -> Run:
    """Make a run of the mean probabilities of runs that share training set, folds and patches.

    Every fold's model is the mean of theirs, and its threshold is chosen on its own out-of-fold predictions.

    Args:
        runs: at least two, as `read_runs` gives them.
        weights: "equal", or "out-of-fold" for the shares with the smallest log loss there (`probe.combine`).

    Raises:
        UserError: a single run, or runs on other folds, patches or classes.
    """
    if len(runs) < 2:
        found = ", ".join(run.record.id for run in runs) or "none"
        raise UserError(f"an ensemble needs at least two different runs; found {found}. Name others too, each once.")
    first = runs[0]
    for run in runs[1:]:
        if run.record.folds.digest != first.record.folds.digest:
            raise UserError(
                f"{run.label} was trained on folds {run.record.folds.digest[:_DIGITS]}, {first.label} on "
                f"{first.record.folds.digest[:_DIGITS]}: out of fold their mean would be of models that trained on the "
                "patch. Name runs on the same folds."
            )
    area = {run.label: fold_figures(run.predictions, run.record.train, VALIDATION)["auroc"].mean for run in runs}
    runs = sorted(runs, key=lambda run: -area[run.label])
    predictions = {run.label: run.predictions for run in runs}
    shares = weights_of(predictions, weights)
    parts = tuple(
        Part(
            model=run.record.id,
            view=run.label,
            pooling=run.record.pooling,
            weight=None if shares is None else shares[k],
        )
        for k, run in enumerate(runs)
    )
    similar: dict[str, dict[str, None]] = defaultdict(dict)
    for run in runs:
        for name, ids in (run.record.similar or {}).items():
            similar[name] |= dict.fromkeys(ids)
    options = {"ensemble_weights": weights}
    record = RunRecord(
        id=f"ensemble of {', '.join(run.record.id for run in runs)}",
        created=max(run.record.created for run in runs),
        kind="ensemble",
        model="ensemble",
        method=f"of {len(runs)} runs",
        options=options if shares else {},
        train=first.record.train,
        test=first.record.test,
        view=f"mean of {len(runs)}",
        pooling=f"weights {weights}",
        combined="mean",
        parts=parts,
        label_names=first.record.label_names,
        ordinal=first.record.ordinal,
        folds=first.record.folds,
        table_digests=first.record.table_digests,
        similar={name: tuple(ids) for name, ids in similar.items()} or None,
    )
    label = f"{record.model} {record.method}" + (", weighted" if shares else "")
    return Run(Path(), label, record, averaged(predictions, shares), first.tables, (), tuple(runs))


def named_runs(runs: Sequence[Run], names: Sequence[str]) -> list[Run]:
    """Find runs by folder or id; all of them by "all".

    Raises:
        UserError: one that is not among them.
    """
    if list(names) == ["all"]:
        return list(runs)
    found = {}
    for name in names:
        same = [run for run in runs if name == run.record.id or Path(name).resolve() == run.folder.resolve()]
        if not same:
            ids = [run.record.id for run in runs]
            raise UserError(
                f"`ensemble`: {name} is none of the runs reported, {', '.join(ids)}.{nearest(name, ids)} Name runs "
                "by folder or id, or say all."
            )
        found[same[0].record.id] = same[0]
    return list(found.values())


def read_runs(runs: Path, *, named: Sequence[Path] = (), folds: str | None = None) -> tuple[list[Run], list[str]]:
    """Read the runs that were trained on the same dataset, by date, with notes on what was left out.

    Args:
        runs: the folder of all runs.
        named: folders of runs; all in `runs` if there are none.
        folds: the first digits of a fold digest; only runs on those folds are taken.

    Raises:
        UserError: no runs, damaged ones, runs that were trained on different datasets, or that tell different classes.
    """
    folders, notes = (list(named), []) if named else _folders(runs)
    records: dict[str, RunRecord] = {}  # by id
    for folder in dict.fromkeys(folders):
        record = read_run(folder)
        if (same := records.setdefault(record.id, record)) is not record:
            notes.append(f"{folder} is the same run as {same.folder} and is left out.")
    in_order = sorted(records.values(), key=lambda record: (record.created, record.id))
    kept = [record for record in in_order if folds is None or record.folds.digest.startswith(folds)]
    if not kept:
        known = list(dict.fromkeys(record.folds.digest[:_DIGITS] for record in in_order))
        raise UserError(f"no run has folds {folds}.{nearest(str(folds), known)} The runs have {', '.join(known)}.")
    n_left_out = len(records) - len(kept)
    if n_left_out:
        notes.append(f"{n_left_out} run{'s' * (n_left_out > 1)} on other folds left out, as --folds asks for.")
    _require_same_training_set(kept)
    _require_same_classes(kept)
    n_tables = len({digest for record in kept if (digest := record.table_digests.get(record.train))})
    if n_tables > 1:
        notes.append(f"These runs were trained on {n_tables} different patch tables of {kept[0].train}.")
    n_assignments = len({record.folds.digest for record in kept})
    if n_assignments > 1:
        notes.append(
            f"These runs were trained on {n_assignments} different fold assignments. They are compared on test sets; "
            "out of fold, only with runs on the same folds."
        )
    return [_read(record, label) for record, label in zip(kept, labels_of(kept), strict=True)], notes


def _require_same_training_set(records: Sequence[RunRecord]) -> None:
    by_set: dict[str, list[RunRecord]] = defaultdict(list)
    for record in records:
        by_set[record.train].append(record)
    if len(by_set) == 1:
        return
    lines = [
        f"  {train}: {len(of_set)} run{'s' * (len(of_set) > 1)} ("
        f"{', '.join(_folder(record).name for record in of_set[:3])}{', ...' if len(of_set) > 3 else ''})"
        for train, of_set in by_set.items()
    ]
    raise UserError(
        f"these runs were trained on {len(by_set)} different datasets, and a report has one:\n"
        + "\n".join(lines)
        + "\nName the runs of one of them, for instance: fm-report "
        + " ".join(str(_folder(record)) for record in next(iter(by_set.values()))[:2])
    )


def _require_same_classes(records: Sequence[RunRecord]) -> None:
    first = records[0]
    for other in records[1:]:
        if compare_classes(first.label_names, other.label_names) != "same":
            option = "`positive`" if 2 in (first.n_classes, other.n_classes) else "`classes`"
            raise UserError(
                f"{_folder(first).name} tells {_told(first)}, and {_folder(other).name} {_told(other)}: they answer "
                f"different questions. Report runs of one question, or run the others again with the same {option} "
                "and `labels`."
            )
        if first.ordinal != other.ordinal:
            ordered, free = (first, other) if first.ordinal else (other, first)
            raise UserError(
                f"{_folder(ordered).name} takes its classes to be ordered, and {_folder(free).name} does not: their "
                "kappas weigh errors differently. Run one of them again with the same `ordinal`."
            )


def _told(record: RunRecord) -> str:
    """Say which classes a run tells apart."""
    named = [f"{name} ({k})" for k, name in enumerate(record.label_names)]
    return f"{named[1]} from {named[0]}" if len(named) == 2 else f"{', '.join(named)} apart"


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
        has_measures = any(path.name.startswith("measures-") for path in below)
        hint = f"{notes[0]}." if notes else "Make one with fm-probe or fm-finetune."
        if has_measures and not notes:
            hint = "Measures are shown beside runs: make one with fm-probe, without --measures, or with fm-finetune."
        raise UserError(f"{runs} holds {'measures but ' * has_measures}no finished run. {hint}")
    return finished, notes


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
            said = [name for name in telling if name in fact and (name, fact[name]) != ("seeds", 1)]
            if "recipe" in telling and not records[row].is_random:
                said = [name for name in said if name != "seed"]  # it seeds nothing that the others' does
            labels[row] = " ".join([label, *(_fact(name, fact[name]) for name in said)])
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
