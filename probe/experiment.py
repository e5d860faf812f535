"""What is asked of a backbone: which rows train, which validate together, and which patches test?

An experiment is made once, from patch tables alone, and is the same for a probe and a fine-tuning:

    patch tables -> Experiment -> fit -> FoldLogits -> Predictions -> run

The two differ in `fit` alone. Test rows choose nothing: no fit sees them before it has ended.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.console import UserError, say
from features.fingerprint import fingerprint
from features.folds import SEED, Folds, Scheme, domain_folds, fold_models, grouped_folds, no_folds
from features.labels import Classes
from features.samples import MISSING_VOTE, TEST, Samples, vote_shares
from probe.predictions import VALIDATION, Predictions, concatenate, predictions_of
from probe.records import FoldsRecord

AMI_BR = "ami-br"  # the dataset for which the paper's fold assignment is kept


@dataclass(frozen=True, eq=False)
class FoldLogits:
    """The result of a fit: the logits of an experiment's patches, of classes 1, 2, ... over class 0.

    Attributes:
        validation: (n, K, c - 1) float32; each training row under the models, one per seed, of the fold that it
            validates.
        tests: dataset to (m, K * F, c - 1) float32; every test row under every model, in the order of `fold_models`.
        seeds: of the K trainings.
    """

    validation: NDArray[np.float32]
    tests: Mapping[str, NDArray[np.float32]]
    seeds: tuple[int, ...] = (SEED,)


@dataclass(frozen=True, eq=False)
class Experiment:
    """A question that a probe or a fine-tuning answers. Build one with `make_experiment`.

    Attributes:
        train: name of the dataset that trains.
        tables: dataset to patch table, that of `train` first.
        rows: (n,) the rows of the training table that cross-validation uses.
        folds: in which fold each of them validates.
        fold_seed: from which the folds were drawn.
        n_classes: how many classes there are.
        soft_labels: "votes" if models train on the raters' shares of votes, else None: on labels.
    """

    train: str
    tables: Mapping[str, Samples]
    rows: NDArray[np.intp]
    folds: Folds
    fold_seed: int
    n_classes: int = 2
    soft_labels: str | None = None

    def __repr__(self) -> str:
        tests = ", ".join(f"{name} ({len(rows):,})" for name, rows in self.tests.items()) or "none"
        return f"Experiment({self.train}: {len(self.rows):,} rows in {self.folds.n_folds} folds; tests: {tests})"

    @property
    def samples(self) -> Samples:
        """(n,) the patch table of the rows that cross-validation uses."""
        return self.tables[self.train].select(self.rows)

    @property
    def label(self) -> NDArray[np.int8]:
        """(n,) their labels."""
        return self.tables[self.train].label[self.rows]

    @property
    def target(self) -> NDArray[np.float32] | None:
        """(n, c) the share of each class that they train towards; None for all on the label."""
        return None if self.soft_labels is None else vote_shares(self.samples, self.n_classes)

    @property
    def test(self) -> tuple[str, ...]:
        """The names of the datasets other than `train`."""
        return tuple(name for name in self.tables if name != self.train)

    @property
    def tests(self) -> dict[str, NDArray[np.intp]]:
        """Dataset to the rows that every fold model is scored on: of `train` its test split, of others all.

        Those without a row are left out.
        """
        rows = {
            name: np.flatnonzero(table.split == TEST) if name == self.train else np.arange(len(table))
            for name, table in self.tables.items()
        }
        return {name: chosen for name, chosen in rows.items() if len(chosen)}

    @property
    def table_digests(self) -> dict[str, str]:
        """Dataset to the digest of its patch table."""
        return {name: table.table_digest for name, table in self.tables.items()}

    @property
    def digest(self) -> str:
        """SHA-256 over the folds and all patch tables: equal digests mean the same question."""
        return fingerprint({"folds": self.folds.digest, "train": self.train, "tables": self.table_digests})

    def folds_record(self) -> FoldsRecord:
        """Describe the fold assignment as a run records it."""
        folds = self.folds
        return FoldsRecord(
            n=folds.n_folds, source=folds.source, digest=folds.digest, seed=self.fold_seed, names=folds.names or None
        )

    def predictions(self, logits: FoldLogits) -> Predictions:
        """Join logits with the patches they are of.

        Raises:
            ValueError: if logits of a set are missing, or have another shape.
        """
        seeds = np.array(logits.seeds, dtype=np.intp)
        seed, fold = np.array(fold_models(logits.seeds, self.folds.n_folds), dtype=np.intp).T  # (K * F,) each
        parts = [
            predictions_of(
                self.train,
                self.samples,
                split=VALIDATION,
                fold=self.folds.fold[:, None],
                seed=seeds,
                logit=_shaped(self.train, logits.validation, (len(self.rows), len(seeds), self.n_classes - 1)),
            )
        ]
        for name, rows in self.tests.items():
            logit = _shaped(name, logits.tests.get(name), (len(rows), len(fold), self.n_classes - 1))
            samples = self.tables[name].select(rows)
            parts.append(predictions_of(name, samples, split=TEST, fold=fold, seed=seed, logit=logit))
        return concatenate(parts)


def _shaped(name: str, logit: NDArray[np.float32] | None, shape: tuple[int, ...]) -> NDArray[np.float32]:
    if logit is None or logit.shape != shape:
        raise ValueError(f"{name}: expected logits {shape}, got {None if logit is None else logit.shape}")
    return logit


def require_known(*, soft_labels: str | None, folds_by: str | None) -> None:
    """Refuse labels and folds that there are not, before patches are read.

    Raises:
        UserError: soft labels other than "votes", or folds other than by "domain"; None is neither.
    """
    if folds_by not in (None, "domain"):
        raise UserError(
            f"`folds_by={folds_by}`: expected domain, the column of a patch table for scanners, centres, tumour types "
            "and the like."
        )
    if soft_labels not in (None, "votes"):
        raise UserError(f"`soft_labels={soft_labels}`: expected votes, for the share of the raters' votes.")


def make_experiment(
    train: str,
    tables: Mapping[str, Samples],
    *,
    cv: int | None = 5,
    at_least: int = 2,
    fold_seed: int = SEED,
    paper_folds: bool = False,
    classes: Classes | None = None,
    soft_labels: str | None = None,
    folds_by: str | None = None,
) -> Experiment:
    """Decide which rows train and which validate together.

    >>> from features.samples import make_samples
    >>> names = [f"{k}.png" for k in range(8)]
    >>> table = make_samples(names, [0, 1] * 4, sha256=[""] * 8, split=["train"] * 6 + ["test"] * 2)
    >>> make_experiment("mine", {"mine": table}, cv=3)
    Experiment(mine: 6 rows in 3 folds; tests: mine (2))

    Args:
        train: dataset whose training split is cross-validated; if it has none, all its rows but the test split's.
        tables: dataset to patch table, of `train` and of every dataset to score.
        cv: number of folds; None where nothing is fitted, and no folds are needed.
        at_least: the fewest folds that can be fitted, see `grouped_folds`.
        fold_seed: of the fold assignment.
        paper_folds: take the assignment of the paper's runs where `train` is AMi-Br.
        classes: the names of all classes; by default as many as the training table's labels count.
        soft_labels: "votes" to train on the raters' shares of votes.
        folds_by: "domain" to let each domain of the training rows validate in turn; `cv` and `paper_folds` then count
            for nothing.

    Raises:
        UserError: if no row may train, a fold would lack a class (see `features.folds`), or votes or domains are asked
            for where there are none.
    """
    require_known(soft_labels=soft_labels, folds_by=folds_by)
    table = tables[train]
    rows = table.training_rows
    if not len(rows):
        raise UserError(
            f"{train} has no patch to train on: its split says 'test' everywhere. Train on another dataset, or correct "
            "the split."
        )
    scheme: Scheme = "paper" if paper_folds and train == AMI_BR else "default"
    if cv is None:
        folds = no_folds(len(rows))
    elif folds_by is None:
        chosen = table.select(rows)
        folds = grouped_folds(chosen, cv, seed=fold_seed, scheme=scheme, classes=classes, at_least=at_least)
    else:
        folds = domain_folds(table.select(rows), seed=fold_seed, classes=classes)
        say(f"{train}: one fold per domain, {', '.join(folds.names)}, whatever `cv` says.")
    if soft_labels and not (table.votes[rows] != MISSING_VOTE).any():
        raise UserError(
            f"{train} has no votes of raters to train on. Leave `soft_labels` out, or train on a dataset with votes."
        )
    others = {name: samples for name, samples in tables.items() if name != train}
    n_classes = len(classes) if classes else table.n_classes
    experiment = Experiment(train, {train: table} | others, rows, folds, fold_seed, n_classes, soft_labels)
    if cv is not None:
        _require_two_classes(experiment, classes or tuple(map(str, range(n_classes))), at_least)
    return experiment


def _require_two_classes(experiment: Experiment, classes: Sequence[str], at_least: int) -> None:
    """Refuse folds of which one validates on less than two classes: nothing can be chosen on it."""
    folds = experiment.folds
    for fold in range(folds.n_folds):
        present = np.unique(experiment.label[folds.fold == fold])
        if len(present) < 2:
            found = ", ".join(classes[k] for k in present) or "nothing"
            name = folds.names[fold] if folds.names else f"{fold} of {folds.n_folds}"
            fewer = "a smaller `cv`, " if folds.n_folds > at_least else ""
            remedy = "Make it one with another domain" if folds.names else f"Use {fewer}another `fold_seed`"
            raise UserError(
                f"fold {name} validates on {found} alone; expected patches of at least two classes, as epochs and "
                f"strengths are chosen on them. {remedy}, or label more slides."
            )
