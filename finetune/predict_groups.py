"""What share of each slide's figures does a run call class 1, and what share is that in truth?"""

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
class GroupRate:
    """The share of class 1 in one group.

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
    """Name the CSV of groups beside that of patches.

    >>> by_group_path(Path("new/predictions.csv"))
    PosixPath('new/predictions-by-group.csv')
    """
    return out.with_name(f"{out.stem}-by-group{out.suffix}")


def groups_of(patches: Patches, path: Path) -> list[str]:
    """Find the group of every patch: by a column of groups, or by the folder in which an image lies below `path`.

    Returns:
        (n,) names, empty where a table names none.

    Raises:
        UserError: neither is there, or all cells of the column are empty.
    """
    known = known_cells(patches.columns.get("group"))
    if known is not None and any(known):
        return known
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


def group_rates(
    sources: Sequence[str],
    groups: Sequence[Sequence[str]],
    probability: Sequence[NDArray[np.float64]],
    *,
    threshold: float,
    errors: ErrorRates,
) -> list[GroupRate]:
    """Compute the share of class 1 in every group of every source; patches without a group are in none.

    Args:
        sources: name of each source.
        groups: of each, (n,) names.
        probability: of each, (n,).
        threshold: class 1 from this probability on.
        errors: of the run at that threshold.
    """
    rates = []
    for source, names, values in zip(sources, groups, probability, strict=True):
        place = {group: k for k, group in enumerate(dict.fromkeys(names))}
        of_patch = np.array([place[name] for name in names], dtype=np.intp)
        totals = np.bincount(of_patch)
        positives = np.bincount(of_patch, weights=values >= threshold).astype(np.intp)
        for group, n, n_positive in zip(place, totals.tolist(), positives.tolist(), strict=True):
            if group:
                ends, corrected = share_interval(n_positive, n), errors.corrected(n_positive, n)
                rates.append(GroupRate(source, group, n, n_positive, n_positive / n, *ends, *corrected))
    return rates


def group_table(rates: Sequence[GroupRate]) -> bytes:
    """Make a CSV of groups; a corrected share that does not exist is empty."""
    rows = [[_cell(value) for value in vars(rate).values()] for rate in rates]
    return csv_bytes(COLUMNS, rows)


def _cell(value: str | float) -> str | float:
    if isinstance(value, float):
        return "" if np.isnan(value) else f"{value:.6f}"
    return value
