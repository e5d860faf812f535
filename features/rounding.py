"""Does float16 hold what embeddings of another type say?

float16 has 11 significant bits, no number above 65,504, and below 0.00006 ever fewer bits, until everything below
0.00000003 is zero. What counts is how an embedding varies over the patches, for that is all that a probe sees: a column
of 1,000.01, 1,000.02, ... loses as much as one of 1e-9, 2e-9, ...
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from features.console import UserError, say

_LARGEST = 65_504
_MOST_ERROR = 0.05  # rounding error of a column, as a fraction of its standard deviation
_MOST_COLUMNS = 0.01  # fraction of the columns that may lose more: dead ones, which no scale would save
_ROWS = 8_192  # looked at together
_AIM = 64  # a good size for the largest number: far from both ends
_SHOWN = 3
_HARMLESS = "A linear probe is the same after either."


@dataclass
class _Findings:
    """What was found in (n, d) embeddings, row by row and column by column."""

    not_finite: list[int]
    too_large: list[int]
    zero: list[int]  # rows
    vanishing: list[int]  # rows that are zero in float16 alone
    n_vanishing: int  # cells
    largest: float
    smallest: float  # but zero
    deviation: NDArray[np.float64]  # (d,) over the rows
    error: NDArray[np.float64]  # (d,) root mean square of what rounding changes


def require_float16(embeddings: NDArray[np.floating[Any]], name: str, *, ids: NDArray[np.str_]) -> None:
    """Check that embeddings (n, d) can be rounded to float16 without losing what tells patches apart.

    Args:
        embeddings: of any float type.
        name: what the message calls them.
        ids: (n,) the patches' ids, for the message.

    Raises:
        UserError: if numbers are not finite or beyond the range of float16, rows are all zero or become so, all rows
            are equal, or more than a hundredth of the columns lose a twentieth of their standard deviation.
    """
    found = _look(embeddings, 1.0)
    n = len(embeddings)
    if found.not_finite:
        raise UserError(
            f"{name}: {_rows(found.not_finite, ids)} NaN or infinity. Compute these embeddings again; if their patches "
            "cannot be embedded, leave them out of the dataset."
        )
    if found.zero:
        raise UserError(
            f"{name}: {_rows(found.zero, ids)} zeros only, as if they had never been computed. Compute them again, or "
            "leave their patches out of the dataset."
        )
    if n > 1 and not found.deviation.any():
        raise UserError(
            f"{name}: all {n:,} embeddings are equal. Look at how they were computed: do they differ there?"
        )
    if found.too_large:
        raise UserError(
            f"{name}: {_rows(found.too_large, ids)} numbers beyond the range of float16 (±{_LARGEST:,}; the largest is "
            f"{found.largest:.3g}). {_remedy(embeddings, found)}"
        )
    lost = _lost(found)
    if found.vanishing or lost.sum() > _MOST_COLUMNS * len(lost):
        raise UserError(f"{name}: float16 does not hold them: {_loss(found, lost)}. {_remedy(embeddings, found)}")
    if lost.any():
        say(f"{name}: {lost.sum():,} of {len(lost):,} columns vary too little for float16; they tell nothing here.")


def _look(embeddings: NDArray[np.floating[Any]], factor: float) -> _Findings:
    """Look at all embeddings times `factor`, some thousand rows at a time."""
    n, d = embeddings.shape
    found = _Findings([], [], [], [], 0, 0.0, math.inf, np.zeros(d), np.zeros(d))
    total = np.zeros(d)
    first = embeddings[0].astype(np.float64) * factor  # deviations from it, so that a large mean costs no digits
    for start in range(0, n, _ROWS):
        values = embeddings[start : start + _ROWS].astype(np.float64) * factor
        finite = np.isfinite(values)
        with np.errstate(over="ignore", invalid="ignore"):
            halves = values.astype(np.float16).astype(np.float64)
            sizes = np.abs(values)
            vanishing = (halves == 0) & (values != 0)
            found.n_vanishing += int(vanishing.sum())
            for rows, mask in (
                (found.not_finite, ~finite.all(axis=1)),
                (found.too_large, (np.isinf(halves) & finite).any(axis=1)),
                (found.zero, ~values.any(axis=1)),
                (found.vanishing, vanishing.any(axis=1) & ~halves.any(axis=1)),
            ):
                rows.extend((start + np.flatnonzero(mask)).tolist())
            found.largest = max(found.largest, float(sizes.max(where=finite, initial=0)))
            found.smallest = min(found.smallest, float(sizes.min(where=finite & (values != 0), initial=math.inf)))
            total += (values - first).sum(axis=0)
            found.deviation += ((values - first) ** 2).sum(axis=0)
            found.error += ((halves - values) ** 2).sum(axis=0)
    with np.errstate(over="ignore", invalid="ignore"):
        found.deviation = np.sqrt(np.maximum(found.deviation / n - (total / n) ** 2, 0))
        found.error = np.sqrt(found.error / n)
    return found


def _lost(found: _Findings) -> NDArray[np.bool_]:
    """Mark the columns (d,) whose rounding error is large beside their deviation."""
    return np.asarray((found.deviation > 0) & ~(found.error <= _MOST_ERROR * found.deviation))


def _rows(rows: list[int], ids: NDArray[np.str_]) -> str:
    shown = ", ".join(repr(str(ids[row])) for row in rows[:_SHOWN])
    subject, verb = ("embedding", "holds") if len(rows) == 1 else ("embeddings", "hold")
    return f"{len(rows):,} {subject} ({shown}{', …' * (len(rows) > _SHOWN)}) {verb}"


def _loss(found: _Findings, lost: NDArray[np.bool_]) -> str:
    if found.n_vanishing:
        rows = f", and {len(found.vanishing):,} whole rows" if found.vanishing else ""
        return (
            f"{found.n_vanishing:,} numbers that are not zero would become zero{rows}; they lie between "
            f"{found.smallest:.2g} and {found.largest:.2g} in size, and float16 begins at 6e-08"
        )
    return (
        f"in {lost.sum():,} of {len(lost):,} columns rounding would change the numbers by more than a twentieth of how "
        "they vary"
    )


def _remedy(embeddings: NDArray[np.floating[Any]], found: _Findings) -> str:
    """Say what to do before import: scale by a power of two if that is enough, else standardise."""
    power = math.floor(math.log2(_AIM / found.largest))
    scaled = _look(embeddings, 2.0**power) if abs(power) < 1000 else None
    if scaled is None or scaled.too_large or scaled.vanishing or _lost(scaled).mean() > _MOST_COLUMNS:
        return (
            f"Standardise every column (subtract its mean, divide by its standard deviation), then import. {_HARMLESS}"
        )
    return f"Multiply all of them by 2**{power}, or standardise every column, then import. {_HARMLESS}"
