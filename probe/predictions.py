"""What did each fold's model predict for each patch, and how is that kept in CSV files?

predictions.csv holds one row per patch and fold model; the models of one fold differ by the seed of their training.
With two classes it has the logit and the probability of class 1; with more those of every class, by number.
samples.csv holds the patch tables of what was predicted. Both are written in pieces of bounded size, so that a run of a
million patches needs no second copy of itself in memory.
"""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.samples import MISSING_VOTE, VOTE_LETTERS, Samples, make_samples
from probe.metrics import THRESHOLD, best_threshold, probabilities

VALIDATION = "validation"  # the split name of out-of-fold predictions
_TYPES: dict[str, type[np.generic]] = {
    "dataset": np.str_,
    "id": np.str_,
    "label": np.int8,
    "group": np.str_,
    "split": np.str_,
    "fold": np.intp,
    "seed": np.intp,
}
COLUMNS = (*_TYPES, "logit", "probability")  # of predictions.csv with two classes
SAMPLE_COLUMNS = ("dataset", "id", "label", "group", "split", "votes", "domain", "sha256")
_LETTERS = dict(enumerate(VOTE_LETTERS)) | {MISSING_VOTE: "-"}  # a rater's vote as a letter
_VOTES = {letter: vote for vote, letter in _LETTERS.items()}
_ROWS = 2**16  # of a CSV file made at a time
_ROUNDED = 1e-6  # predictions.csv gives a probability with six digits


@dataclass(frozen=True, eq=False)
class Predictions:
    """Predictions as columns, one row per patch and fold model. Out-of-fold rows have split "validation".

    Attributes:
        dataset, id, group, split: (n,) str.
        label: (n,) int8.
        fold: (n,) the fold whose model predicts.
        seed: (n,) of that model's training.
        logit: (n, c - 1) float32, of classes 1, 2, ... over class 0.
    """

    dataset: NDArray[np.str_]
    id: NDArray[np.str_]
    label: NDArray[np.int8]
    group: NDArray[np.str_]
    split: NDArray[np.str_]
    fold: NDArray[np.intp]
    seed: NDArray[np.intp]
    logit: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.id)

    def __repr__(self) -> str:
        sets = ", ".join(f"{dataset}/{split}" for dataset, split in self.sets())
        return f"Predictions({len(self):,} rows: {sets})"

    @property
    def n_classes(self) -> int:
        """How many classes there are."""
        return int(self.logit.shape[1]) + 1

    @property
    def probability(self) -> NDArray[np.float64]:
        """(n, c) of every class."""
        return probabilities(self.logit)

    def sets(self) -> list[tuple[str, str]]:
        """List the (dataset, split) pairs in order of appearance."""
        new = (self.dataset[1:] != self.dataset[:-1]) | (self.split[1:] != self.split[:-1])
        first = np.flatnonzero(np.append(len(self.id) > 0, new))
        return list(dict.fromkeys(zip(self.dataset[first].tolist(), self.split[first].tolist(), strict=True)))

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Predictions:
        """Select the rows of a mask or an index array. A mask whose rows are contiguous is a view, not a copy."""
        chosen: NDArray[np.bool_] | NDArray[np.intp] | slice = rows
        if rows.dtype == np.bool_ and len(rows):
            contiguous = slice(int(rows.argmax()), int(rows.argmax()) + int(rows.sum()))
            chosen = contiguous if rows[contiguous].all() else rows
        return Predictions(**{field.name: getattr(self, field.name)[chosen] for field in fields(self)})


def predictions_of(
    dataset: str,
    samples: Samples,
    *,
    split: str,
    fold: NDArray[np.intp],
    seed: NDArray[np.intp] | int = 0,
    logit: NDArray[np.floating],
) -> Predictions:
    """Make the predictions of one dataset.

    Args:
        dataset: its name.
        samples: (n,) the patches predicted.
        split: "validation" or "test".
        fold, seed: of the model of each patch, in any shape that broadcasts to (n, models): (F,) if each of F models
            predicts every patch.
        logit: (n, models, c - 1).
    """
    rows = np.repeat(np.arange(len(samples)), logit.shape[1])
    return Predictions(
        dataset=np.broadcast_to(dataset, len(rows)),
        id=samples.id[rows],
        label=samples.label[rows],
        group=samples.group[rows],
        split=np.broadcast_to(split, len(rows)),
        fold=np.broadcast_to(fold, logit.shape[:2]).reshape(-1),
        seed=np.broadcast_to(np.asarray(seed, dtype=np.intp), logit.shape[:2]).reshape(-1),
        logit=np.asarray(logit, dtype=np.float32).reshape(-1, logit.shape[2]),
    )


def concatenate(parts: Sequence[Predictions]) -> Predictions:
    """Join several sets of predictions."""
    names = [field.name for field in fields(Predictions)]
    return Predictions(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})


def patches_of(part: Predictions) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Find the patches of one set: the first row of each, in order, and (n,) the number of each row's patch."""
    # A patch's rows mostly follow each other: its id is compared once per stretch of them, not once per row.
    starts = np.flatnonzero(np.append(len(part) > 0, part.id[1:] != part.id[:-1]))
    _, first, row = np.unique(part.id[starts], return_index=True, return_inverse=True)
    in_order = np.argsort(first)
    number = np.empty_like(in_order)
    number[in_order] = np.arange(len(first))
    return starts[first[in_order]], np.repeat(number[row], np.diff(starts, append=len(part)))


def trainings_of(predictions: Predictions) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """List the seeds of a run's trainings in ascending order, and (n,) the number of each row's training."""
    seed = predictions.seed
    if not len(seed) or (seed == seed[0]).all():  # most runs; found without sorting
        return seed[:1], np.zeros(len(seed), dtype=np.intp)
    seeds, training = np.unique(seed, return_inverse=True)
    return seeds, training


def by_training(predictions: Predictions, dataset: str, split: str) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Average the fold models of each training on one set.

    Returns:
        The seeds (K,) in ascending order, and probabilities (K, n, c), patches in the order of the patch table: of
        "validation" each patch's under the one model of the training that did not train on it.
    """
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    seeds, training = trainings_of(part)
    first, patch = patches_of(part)
    cell = training * len(first) + patch
    size = len(seeds) * len(first)
    total = [np.bincount(cell, weights=column, minlength=size) for column in part.probability.T]
    mean = np.stack(total, axis=1) / np.bincount(cell, minlength=size)[:, None]
    return seeds, mean.reshape(len(seeds), len(first), -1)


def threshold_of(predictions: Predictions) -> float:
    """Choose a run's threshold: the best on its out-of-fold predictions, or their mean over trainings; else 0.5.

    With more than two classes the most probable one is predicted, and there is none: NaN.
    """
    if predictions.n_classes > 2:
        return math.nan
    label, probability = _out_of_fold(predictions)
    return best_threshold(label, probability.mean(axis=0)) if len(label) else THRESHOLD


def thresholds_of(predictions: Predictions) -> NDArray[np.float64]:
    """Choose a threshold (K,) for each training of a run by itself, as `threshold_of` does."""
    n_trainings = len(trainings_of(predictions)[0])
    if predictions.n_classes > 2:
        return np.full(n_trainings, math.nan)
    label, probability = _out_of_fold(predictions)
    if not len(label):
        return np.full(n_trainings, THRESHOLD)
    return np.array([best_threshold(label, one) for one in probability])


def _out_of_fold(predictions: Predictions) -> tuple[NDArray[np.int8], NDArray[np.float64]]:
    """Find labels (n,) and out-of-fold probabilities (K, n) of class 1 of the patches that cross-validation used."""
    part = predictions.select(predictions.split == VALIDATION)
    if not len(part):
        return part.label, np.empty((0, 0))
    return part.label[patches_of(part)[0]], by_training(part, str(part.dataset[0]), VALIDATION)[1][..., 1]


# ------------------------------------------------------------------------------------------------------ predictions.csv


def columns_of(n_classes: int) -> tuple[str, ...]:
    """List the columns of predictions.csv.

    >>> columns_of(3)[-5:]
    ('logit_1', 'logit_2', 'probability_0', 'probability_1', 'probability_2')
    """
    if n_classes == 2:
        return COLUMNS
    logits = (f"logit_{k}" for k in range(1, n_classes))
    return (*_TYPES, *logits, *(f"probability_{k}" for k in range(n_classes)))


def predictions_csv(predictions: Predictions) -> Iterator[bytes]:
    """Make predictions.csv, a piece at a time."""
    names = columns_of(predictions.n_classes)
    for start in range(0, max(1, len(predictions)), _ROWS):
        part = predictions.select(np.arange(start, min(start + _ROWS, len(predictions))))
        columns = [getattr(part, name).tolist() for name in _TYPES]
        # 9 digits give a float32 back exactly.
        columns += [[f"{value:.9g}" for value in column] for column in part.logit.T.tolist()]
        columns += [[f"{value:.6f}" for value in column] for column in _written(part.probability).T.tolist()]
        yield csv_bytes(() if start else names, zip(*columns, strict=True))


def _written(probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Choose the probabilities that are written: of two classes that of class 1, of more all."""
    return probability[:, 1:] if probability.shape[1] == 2 else probability


def parse_predictions(text: str, *, seed: int = 0) -> Predictions:
    """Read predictions.csv.

    Args:
        text: of the file.
        seed: of the only training, for files of early versions, which do not say it.

    Raises:
        ValueError: if a column is missing, a row is malformed, or a probability is not that of its logit.
    """
    early = tuple(name for name in COLUMNS if name != "seed")
    has_seeds = not text.startswith(",".join(early) + "\n")
    n_classes = max(2, 1 + text.partition("\n")[0].count(",logit_"))
    expected = columns_of(n_classes)
    columns: dict[str, Sequence[str]] = dict(parse_columns(text, expected if has_seeds else early))
    if not has_seeds:
        columns["seed"] = [str(seed)] * len(columns["id"])
    try:
        arrays: dict[str, Any] = {name: np.array(columns[name], dtype=dtype) for name, dtype in _TYPES.items()}
        numbers = np.array([columns[name] for name in expected[len(_TYPES) :]], dtype=np.float64).T  # (n, ...)
        with np.errstate(over="ignore"):  # becomes infinite, which is refused below
            logit = numbers[:, : n_classes - 1].astype(np.float32)
    except OverflowError as error:
        raise ValueError(str(error)) from error
    written = numbers[:, n_classes - 1 :]
    predictions = Predictions(**arrays, logit=logit)
    if not ((predictions.label >= 0) & (predictions.label < n_classes)).all():
        raise ValueError(
            "a label is neither 0 nor 1" if n_classes == 2 else f"a label is not from 0 to {n_classes - 1}"
        )
    undefined = np.flatnonzero(~np.isfinite(predictions.logit).all(axis=1))
    if len(undefined):
        raise ValueError(f"the logit of line {undefined[0] + 2} is no number")
    meant = _written(predictions.probability)
    wrong, column = np.nonzero(~(np.abs(meant - written) < _ROUNDED))
    if len(wrong):
        raise ValueError(
            f"line {wrong[0] + 2}: the probability is {written[wrong[0], column[0]]:g}, that of its logit is "
            f"{meant[wrong[0], column[0]]:.6f}"
        )
    return predictions


# ---------------------------------------------------------------------------------------------------------- samples.csv


def samples_csv(predictions: Predictions, tables: Mapping[str, Samples]) -> Iterator[bytes]:
    """Make samples.csv: the rows of every dataset's patch table, of which there may be more, that were predicted."""
    yield csv_bytes(SAMPLE_COLUMNS, ())
    for name in dict.fromkeys(dataset for dataset, _ in predictions.sets()):
        table, ids = tables[name], predictions.id[predictions.dataset == name]
        ids = ids[np.append(True, ids[1:] != ids[:-1])]  # a patch's fold models mostly follow each other
        if not np.array_equal(ids, table.id):
            table = table.select(np.isin(table.id, ids))
        for start in range(0, len(table), _ROWS):
            rows = slice(start, start + _ROWS)
            columns = {column: getattr(table, column)[rows].tolist() for column in SAMPLE_COLUMNS[1:]}
            columns["votes"] = ["".join(_LETTERS[vote] for vote in row) for row in columns["votes"]]
            yield csv_bytes((), zip(repeat(name), *columns.values(), strict=False))


def parse_samples(text: str) -> dict[str, Samples]:
    """Read samples.csv: dataset to patch table.

    Raises:
        ValueError: if a column is missing, a row is malformed, or a table contradicts itself.
    """
    columns = parse_columns(text, SAMPLE_COLUMNS)
    dataset = np.array(columns["dataset"], dtype=np.str_)
    try:
        return {name: _table(columns, np.flatnonzero(dataset == name)) for name in dict.fromkeys(columns["dataset"])}
    except KeyError as error:
        raise ValueError(f"a vote is {error}") from error
    except UserError as error:
        raise ValueError(str(error)) from error


def _table(columns: Mapping[str, Sequence[str]], rows: NDArray[np.intp]) -> Samples:
    cells = {name: [columns[name][row] for row in rows] for name in SAMPLE_COLUMNS}
    votes = [[_VOTES[letter] for letter in cell] for cell in cells["votes"]]
    return make_samples(
        cells["id"],
        [int(label) for label in cells["label"]],
        sha256=cells["sha256"],
        group=cells["group"],
        split=cells["split"],
        votes=np.array(votes, dtype=np.int8).reshape(len(rows), -1),
        domain=cells["domain"],
    )


def samples_from(predictions: Predictions) -> dict[str, Samples]:
    """Make patch tables of predictions alone, which hold no votes, domains and digests."""
    tables = {}
    for name in dict.fromkeys(predictions.dataset.tolist()):
        part = predictions.select(predictions.dataset == name)
        _, first = np.unique(part.id, return_index=True)
        part = part.select(np.sort(first))
        tables[name] = make_samples(
            part.id.tolist(), part.label.tolist(), sha256=[""] * len(part), group=part.group.tolist()
        )
    return tables


# ------------------------------------------------------------------------------------------------------------ CSV files


def parse_columns(text: str, expected: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Read a CSV file that `csv_bytes` made: column to cells.

    Raises:
        ValueError: if it has other columns, or ragged rows.
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        header, rows = tuple(next(reader, ())), list(reader)
    except csv.Error as error:
        raise ValueError(str(error)) from error
    if header != tuple(expected):
        raise ValueError(f"found columns {', '.join(header) or 'none'}, expected {', '.join(expected)}")
    ragged = next((line for line, row in enumerate(rows, start=2) if len(row) != len(expected)), None)
    if ragged:
        raise ValueError(f"row {ragged} has {len(rows[ragged - 2])} cells of {len(expected)}")
    cells: Any = zip(*rows, strict=True) if rows else repeat(())
    return dict(zip(expected, cells, strict=False))


class _Lines(list[str]):
    """Takes what a csv.writer writes: lines, whose "\\r\\n" becomes a bare line feed."""

    def write(self, line: str) -> None:
        self.append(line.removesuffix("\r\n") + "\n")


def csv_bytes(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """Make a CSV file that gives every cell back unchanged, whatever characters it holds.

    The header is empty for a further piece of a file.
    """
    out = _Lines()
    writer = csv.writer(out, lineterminator="\r\n")  # given "\n", Python before 3.13 would leave a lone "\r" unquoted
    if header:
        writer.writerow(header)
    writer.writerows(rows)
    return "".join(out).encode()
