"""What share of each slide's figures does a run call each class, and what share is class 1 in truth?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from extract.datasets import Patches
from features.console import UserError
from features.tables import known_cells
from probe.predictions import csv_bytes
from probe.rates import ErrorRates, share_interval

COLUMNS = ("source", "group", "n", "n_positive", "rate", "low", "high", "corrected", "corrected_low", "corrected_high")


@dataclass(frozen=True)
class GroupCounts:
    """How many patches of one group are predicted to be of each class.

    Attributes:
        source, group: the path that was given, and the group in it.
        counts: patches per class.
    """

    source: str
    group: str
    counts: tuple[int, ...]

    @property
    def n(self) -> int:
        """Patches of the group."""
        return sum(self.counts)

    @property
    def shares(self) -> tuple[float, ...]:
        """The share of each class."""
        return tuple(count / self.n for count in self.counts)


@dataclass(frozen=True)
class GroupRate:
    """The share of class 1 of two in one group.

    Attributes:
        source, group: the path that was given, and the group in it.
        n, n_positive: patches, and those predicted to be class 1.
        rate, low, high: the share predicted, with Wilson's interval: how far it may differ on other patches of the
            group, predicted with the same errors.
        corrected, corrected_low, corrected_high: the share in truth, with its interval, by the errors that the run
            made out of fold (`probe.rates.corrected_rate`). NaN if the run does no better than guessing.
    """

    source: str
    group: str
    n: int
    n_positive: int
    rate: float
    low: float
    high: float
    corrected: float
    corrected_low: float
    corrected_high: float


def by_group_path(out: Path) -> Path:
    """Name the CSV of groups beside the file, or folder, of patches.

    >>> by_group_path(Path("new/predictions.csv")), by_group_path(Path("new/result.geojson"))
    (PosixPath('new/predictions-by-group.csv'), PosixPath('new/result-by-group.csv'))
    >>> by_group_path(Path("."))
    PosixPath('by-group.csv')
    """
    if not out.name:  # this folder
        return out / "by-group.csv"
    suffix = ".csv" if out.suffix.lower() in ("", ".json", ".geojson") else out.suffix
    return out.with_name(f"{out.stem}-by-group{suffix}")


def groups_of(patches: Patches, path: Path) -> list[str]:
    """Find the group of every patch: by a column of groups, by its slide, or by the folder of an image below `path`.

    Returns:
        (n,) names, empty where a table names none.

    Raises:
        UserError: neither is there, or all cells of the column are empty.
    """
    known = known_cells(patches.columns.get("group"))
    if known is not None and any(known):
        return known
    if patches.points is not None:
        return patches.points.slide
    if known is None and path.is_dir():
        folders = [PurePosixPath(id).parent.as_posix() for id in patches.id]
        loose = [id for id, folder in zip(patches.id, folders, strict=True) if folder == "."]
        if not loose:
            return folders
        raise UserError(
            f"{path}: {len(loose)} images (first: {loose[0]}) lie in no folder of their slide, so their group is not "
            "known. Put the images of each slide into a folder of its own, or give a table with the columns path and "
            "group."
        )
    raise UserError(
        f"{path}: the groups (slides) of its patches are not known. Give a table or a file of arrays with a column "
        "group, or a folder with one sub-folder per slide."
    )


def count_groups(
    sources: Sequence[str],
    groups: Sequence[Sequence[str]],
    predicted: Sequence[NDArray[np.integer]],
    *,
    n_classes: int,
) -> list[GroupCounts]:
    """Count the patches of every class in every group of every source; patches without a group are in none.

    Args:
        sources: name of each source.
        groups: of each, (n,) names.
        predicted: of each, (n,) class numbers.
        n_classes: how many classes there are.
    """
    counted = []
    for source, names, classes in zip(sources, groups, predicted, strict=True):
        place = {group: k for k, group in enumerate(dict.fromkeys(names))}
        counts = np.zeros((len(place), n_classes), dtype=np.intp)
        np.add.at(counts, (np.array([place[name] for name in names], dtype=np.intp), classes), 1)
        found = zip(place, counts.tolist(), strict=True)
        counted += [GroupCounts(source, group, tuple(of_class)) for group, of_class in found if group]
    return counted


def group_rates(groups: Sequence[GroupCounts], errors: ErrorRates) -> list[GroupRate]:
    """Compute the share of class 1 of two in every group, with its interval, and corrected for the run's errors."""
    rates = []
    for one in groups:
        n, n_positive = one.n, one.counts[1]
        ends, corrected = share_interval(n_positive, n), errors.corrected(n_positive, n)
        rates.append(GroupRate(one.source, one.group, n, n_positive, n_positive / n, *ends, *corrected))
    return rates


def rate_table(rates: Sequence[GroupRate]) -> bytes:
    """Make a CSV of groups for two classes; a corrected share that does not exist is empty."""
    return csv_bytes(COLUMNS, [[_cell(value) for value in vars(rate).values()] for rate in rates])


def share_table(groups: Sequence[GroupCounts], classes: Sequence[str]) -> bytes:
    """Make a CSV of groups for more than two classes: the predicted share of each class."""
    header = ("source", "group", "n", *(f"share_{name}" for name in classes))
    return csv_bytes(header, [(one.source, one.group, one.n, *map(_cell, one.shares)) for one in groups])


def _cell(value: str | float) -> str | float:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6f}"
    return value
