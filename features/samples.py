"""What is a row? One labelled patch: id, label, group, split, rater votes, domain and the digest of its bytes."""

from __future__ import annotations

import hashlib
import re
import string
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.display import html_table

TRAIN, TEST = "train", "test"
MISSING_VOTE = -1
VOTE_LETTERS = string.digits + string.ascii_lowercase + string.ascii_uppercase  # of the vote for class 0, 1, ...
MOST_CLASSES = len(VOTE_LETTERS)
_VOTE_LETTER = dict(enumerate(VOTE_LETTERS)) | {MISSING_VOTE: "-"}
_SHOWN = 5  # rows in a notebook, sets of patches in a sentence


@dataclass(frozen=True, eq=False)
class Samples:
    """The patch table of one dataset, in its fixed row order. Unknown strings are empty, never None.

    Attributes:
        id: (n,) str, unique; the file's path below the dataset's folder (`Atypical/MIDOG21_7.png`).
        label: (n,) int8; the number of the class, from 0 to 61. Of two classes 1 is the positive one (Atypical).
        group: (n,) str; the slide or patient, whose patches always stay on one side of a split; empty where unknown.
        split: (n,) str; "train", "test", or empty where the dataset defines no split.
        votes: (n, n_raters) int8; each rater's class, -1 if missing; n_raters may be 0.
        domain: (n,) str; tumour type, scanner or centre; empty where unknown.
        sha256: (n,) str; hex SHA-256 of the stored bytes: the file, or the array row of an HDF5 file; empty where
            unknown.
    """

    id: NDArray[np.str_]
    label: NDArray[np.int8]
    group: NDArray[np.str_]
    split: NDArray[np.str_]
    votes: NDArray[np.int8]
    domain: NDArray[np.str_]
    sha256: NDArray[np.str_]

    def __post_init__(self) -> None:
        n = len(self.id)
        for field in fields(self):
            if len(getattr(self, field.name)) != n:
                raise ValueError(f"samples: column {field.name} has {len(getattr(self, field.name))} rows, id has {n}")
        if self.votes.ndim != 2:
            raise ValueError(f"samples: votes must be (n, n_raters), got shape {self.votes.shape}")

    def __len__(self) -> int:
        return len(self.id)

    def __repr__(self) -> str:
        n_groups = len(set(self.group.tolist()) - {""})
        splits = ", ".join(f"{int((self.split == split).sum()):,} {split}" for split in (TRAIN, TEST))
        counts = np.bincount(self.label, minlength=2).tolist()
        classes = f"{counts[1]:,} positive" if len(counts) == 2 else f"{', '.join(f'{n:,}' for n in counts)} of classes"
        return f"Samples({len(self):,} patches: {classes}; {splits}; {n_groups:,} groups)"

    def _repr_html_(self) -> str:
        columns = ("id", "label", "group", "split", "domain")
        rows = zip(*(getattr(self, name)[:_SHOWN].tolist() for name in columns), strict=True)
        return html_table(columns, rows, caption=f"{self!r}, the first {min(_SHOWN, len(self))}")

    @property
    def images_digest(self) -> str:
        """SHA-256 over (id, sha256) in row order: equal for the same patches in the same order, whatever the labels."""
        return _digest(self.id, self.sha256)

    @property
    def table_digest(self) -> str:
        """SHA-256 over every column in row order: equal only if labels, groups, splits, votes and domains are equal."""
        votes = ["".join(_VOTE_LETTER.get(vote, "?") for vote in row) for row in self.votes.tolist()]
        return _digest(self.id, self.label, self.group, self.split, votes, self.domain, self.sha256)

    @property
    def n_classes(self) -> int:
        """How many classes the labels count, at least 2: one more than the largest label."""
        return max(2, int(self.label.max(initial=0)) + 1)

    @property
    def training_rows(self) -> NDArray[np.intp]:
        """The rows that cross-validation may use: the training split; where there is none, all but the test split."""
        training = self.split == TRAIN
        return np.flatnonzero(training if training.any() else self.split != TEST)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Samples:
        """Select the rows of a boolean mask or an index array, in that order."""
        return replace(self, **{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def relabelled(self, labels: Sequence[int]) -> Samples:
        """Give every class another label, in labels and votes: class k becomes `labels[k]`; a missing vote stays so.

        >>> make_samples(["a.png", "b.png"], [0, 1], sha256=["", ""]).relabelled([2, 0]).label.tolist()
        [2, 0]
        """
        new = np.array([*labels, MISSING_VOTE], dtype=np.int8)  # the last is what -1 picks
        return replace(self, label=new[self.label], votes=new[self.votes])


def vote_shares(samples: Samples, n_classes: int) -> NDArray[np.float32]:
    """Compute which share of its votes each patch has for each class; without any vote, all is its label's.

    >>> votes = np.array([[0, 2, 2, -1], [-1, -1, -1, -1]], dtype=np.int8)
    >>> vote_shares(make_samples(["a.png", "b.png"], [2, 1], sha256=["", ""], votes=votes), 3).round(2).tolist()
    [[0.33000001311302185, 0.0, 0.6700000166893005], [0.0, 1.0, 0.0]]

    Args:
        samples: (n,) patch table.
        n_classes: c, more than every label and vote.

    Returns:
        (n, c) float32; every row sums to 1.

    Raises:
        ValueError: for a label or a vote that is none of these classes.
    """
    classes = np.arange(n_classes)
    counts = (samples.votes[:, :, None] == classes).sum(axis=1)  # (n, c)
    unvoted = (samples.votes == MISSING_VOTE).all(axis=1)
    counts[unvoted] = samples.label[unvoted, None] == classes
    highest = max(int(samples.label.max(initial=0)), int(samples.votes.max(initial=0)))
    if highest >= n_classes:
        raise ValueError(f"samples: class {highest} is none of {n_classes}")
    shares: NDArray[np.float32] = (counts / counts.sum(axis=1, keepdims=True)).astype(np.float32)
    return shares


def make_samples(
    id: Sequence[str],
    label: Sequence[int],
    *,
    sha256: Sequence[str],
    group: Sequence[str] | None = None,
    split: Sequence[str] | None = None,
    votes: NDArray[np.int8] | None = None,
    domain: Sequence[str] | None = None,
) -> Samples:
    """Build a patch table from plain columns and check it; columns left out count as unknown.

    >>> make_samples(["a.png", "b.png", "c.png"], [1, 0, 0], sha256=["", "", ""], group=["s1", "s1", "s2"])
    Samples(3 patches: 1 positive; 0 train, 0 test; 2 groups)

    Raises:
        UserError: on a duplicate id, a label or a vote that is no class number, or a split other than train, test or
            empty.
    """
    n = len(id)
    unknown = [""] * n
    ids = _strings(id)
    unique, counts = np.unique(ids, return_counts=True)
    if len(unique) < n:
        repeated = unique[counts > 1]
        raise UserError(
            f"{len(repeated)} ids occur more than once (first: {repeated[0]}). No two patches may have the same id: "
            "remove the repeated rows or rename the files."
        )
    labels = np.asarray(label, dtype=np.int8 if n == 0 else None)
    _require_classes("labels", labels, 0)
    given = np.empty((n, 0), dtype=np.int8) if votes is None else np.asarray(votes)
    _require_classes("votes", given, MISSING_VOTE)
    splits = _strings(unknown if split is None else split)
    unknown_splits = sorted(set(splits.tolist()) - {TRAIN, TEST, ""})
    if unknown_splits:
        raise UserError(f"unknown split {unknown_splits[0]!r}: a split is 'train', 'test' or empty.")
    return Samples(
        id=ids,
        label=labels.astype(np.int8),
        group=_strings(unknown if group is None else group),
        split=splits,
        votes=given.astype(np.int8),
        domain=_strings(unknown if domain is None else domain),
        sha256=_strings(sha256),
    )


def _require_classes(what: str, values: NDArray[Any], least: int) -> None:
    wrong = np.setdiff1d(values, np.arange(least, MOST_CLASSES)).tolist()
    if wrong:
        missing = f", or {MISSING_VOTE} where one is missing" if least < 0 else ""
        raise UserError(
            f"{what} must be whole numbers from 0 to {MOST_CLASSES - 1}, one for each class{missing}; found "
            f"{', '.join(map(str, wrong[:_SHOWN]))}."
        )


def _strings(values: Iterable[str]) -> NDArray[np.str_]:
    listed = [str(value) for value in values]
    return np.array(listed, dtype=np.str_) if listed else np.array([], dtype="<U1")


def _digest(*columns: Iterable[object]) -> str:
    digest = hashlib.sha256()
    for row in zip(*columns, strict=True):
        # Length-prefixed cells: no content of a cell can imitate a cell border.
        for cell in row:
            data = str(cell).encode()
            digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


def group_key(name: str) -> str:
    """Reduce the name of a slide or patient to what is compared: S1 and s1, or 7, 007 and 7.0, may well be one.

    >>> [group_key(name) for name in ("S1", "s1 ", "007", "7.0", "7a")]
    ['s1', 's1', '7', '7', '7a']
    """
    reduced = unicodedata.normalize("NFC", name).strip(" '\"=").casefold()
    number = re.fullmatch(r"0*([0-9]+)(\.0+)?", reduced)
    return number[1] if number else reduced


@dataclass(frozen=True)
class Audit:
    """What could make a score look better than it is: repeated patches, contradicting labels, groups in both splits.

    Attributes:
        duplicates: ids of byte-identical patches, one tuple per set of identical ones.
        conflicts: those of `duplicates` that carry different labels.
        split_duplicates: those of `duplicates` with one copy in train and another in test.
        split_groups: groups (slides, patients) with patches in both train and test.
        alike_groups: names of groups that differ only in case or in how a number is written, one tuple per set.
        n_without_group: patches whose group is unknown.
    """

    duplicates: tuple[tuple[str, ...], ...]
    conflicts: tuple[tuple[str, ...], ...]
    split_duplicates: tuple[tuple[str, ...], ...]
    split_groups: tuple[str, ...]
    alike_groups: tuple[tuple[str, ...], ...]
    n_without_group: int
    n_samples: int

    @property
    def n_surplus(self) -> int:
        """How many patches would be removed if one of every set of duplicates were kept."""
        return sum(len(ids) - 1 for ids in self.duplicates)

    def lines(self) -> list[str]:
        """Describe the findings, one sentence each; an empty list if there are none."""
        lines = []
        if self.duplicates:
            n_files = sum(map(len, self.duplicates))
            lines.append(
                f"{len(self.duplicates)} sets of identical patches ({n_files} patches, {self.n_surplus} surplus); "
                "folds keep each set together"
            )
        lines += [f"contradicting labels on identical patches: {', '.join(ids)}" for ids in self.conflicts[:_SHOWN]]
        if len(self.conflicts) > _SHOWN:
            lines.append(f"... and {len(self.conflicts) - _SHOWN} more sets with contradicting labels")
        if self.split_duplicates:
            lines.append(
                f"{len(self.split_duplicates)} sets of identical patches lie in train and test at once "
                f"(first: {', '.join(self.split_duplicates[0])}): test scores are optimistic"
            )
        if self.split_groups:
            lines.append(
                f"{len(self.split_groups)} groups have patches in train and test at once "
                f"(first: {self.split_groups[0]}): test scores are optimistic"
            )
        if self.alike_groups:
            lines.append(
                f"{len(self.alike_groups)} groups are written in several ways "
                f"(first: {', '.join(self.alike_groups[0])}), and these count as "
                "different ones: if they are the same slide or patient, write them alike"
            )
        if self.n_without_group:
            lines.append(
                f"{self.n_without_group} of {self.n_samples} patches have no known group (slide or patient): "
                "each counts as a group by itself, so intervals and folds may be too optimistic"
            )
        return lines

    def as_dict(self) -> dict[str, object]:
        """Give the findings as plain JSON values."""
        return {
            "duplicates": [list(ids) for ids in self.duplicates],
            "conflicts": [list(ids) for ids in self.conflicts],
            "split_duplicates": [list(ids) for ids in self.split_duplicates],
            "split_groups": list(self.split_groups),
            "alike_groups": [list(names) for names in self.alike_groups],
            "n_without_group": self.n_without_group,
        }


def audit(samples: Samples) -> Audit:
    """Find byte-identical patches, contradicting labels, and groups or patches shared by train and test."""
    order = np.argsort(samples.sha256, kind="stable")
    _, starts = np.unique(samples.sha256[order], return_index=True)
    sets = [rows for rows in np.split(order, starts[1:]) if len(rows) > 1 and samples.sha256[rows[0]]]

    def ids(rows: NDArray[np.intp]) -> tuple[str, ...]:
        return tuple(samples.id[rows].tolist())

    def in_both_splits(rows: NDArray[np.intp]) -> bool:
        return {TRAIN, TEST} <= set(samples.split[rows].tolist())

    known = samples.group != ""
    shared = set(samples.group[known & (samples.split == TRAIN)]) & set(samples.group[known & (samples.split == TEST)])
    return Audit(
        duplicates=tuple(ids(rows) for rows in sets),
        conflicts=tuple(ids(rows) for rows in sets if len(set(samples.label[rows].tolist())) > 1),
        split_duplicates=tuple(ids(rows) for rows in sets if in_both_splits(rows)),
        split_groups=tuple(sorted(map(str, shared))),
        alike_groups=_alike(samples.group[known]),
        n_without_group=int((~known).sum()),
        n_samples=len(samples),
    )


def _alike(groups: NDArray[np.str_]) -> tuple[tuple[str, ...], ...]:
    spellings = defaultdict(list)
    for name in sorted(set(groups.tolist())):
        spellings[group_key(name)].append(name)
    return tuple(tuple(names) for names in spellings.values() if len(names) > 1)
