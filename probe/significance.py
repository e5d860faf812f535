"""Are two runs different? Paired differences by resampling, DeLong's test, and Holm's correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probe.metrics import mid_ranks
from probe.resample import Resampled


@dataclass(frozen=True)
class Difference:
    """First minus second on the same images.

    Attributes:
        value: the difference.
        low, high: its interval.
        p: two-sided; one minus the level at which the interval would end at zero.
        p_holm: p adjusted for all comparisons of this figure on this set.
        n_undefined: resamples that lack a class.
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float
    n_undefined: int


@dataclass(frozen=True)
class DeLong:
    """DeLong's test of two AUROCs on the same independent samples.

    Attributes:
        first, second: the AUROCs.
        value: their difference.
        standard_error: of the difference.
        z: value / standard_error.
        p: two-sided, from the normal distribution.
        p_holm: p adjusted for all pairs compared on this set.

    Without variance z is infinite or zero: p is then 1 for equal runs, else 0.
    """

    first: float
    second: float
    value: float
    standard_error: float
    z: float
    p: float
    p_holm: float


_Test = TypeVar("_Test", Difference, DeLong)


def difference(resampled: Resampled, name: str, first: int, second: int) -> Difference:
    """Compare a figure of two tallies on the same resamples: first minus second; `p_holm` stays NaN."""
    spread = resampled.spread(name, lambda values: values[first] - values[second])
    value = spread.value
    if value == 0 and not spread.drawn.any():
        return Difference(0.0, 0.0, 0.0, 1.0, math.nan, spread.n_undefined)  # the two never differ
    low, high = np.clip(spread.ends(resampled.level), -1, 1).tolist()
    return Difference(value, low, high, spread.p_value(0.0), math.nan, spread.n_undefined)


def adjusted(tests: Sequence[_Test]) -> list[_Test]:
    """Fill in `p_holm`: the p-values adjusted for the number of these tests."""
    return [replace(test, p_holm=float(p)) for test, p in zip(tests, holm([test.p for test in tests]), strict=True)]


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """Adjust p-values for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting those below alpha keeps the chance of any false rejection below alpha, whatever their dependence.

    Args:
        p: (m,) p-values; NaN is no test and counts for none.

    Returns:
        (m,) adjusted, at most 1; NaN stays.
    """
    raw = np.asarray(p, dtype=np.float64)
    result = np.full(raw.shape, np.nan)
    tests = np.flatnonzero(~np.isnan(raw))
    ascending = tests[np.argsort(raw[tests], kind="stable")]
    scaled = raw[ascending] * np.arange(len(ascending), 0, -1)
    result[ascending] = np.minimum(np.maximum.accumulate(scaled), 1)
    return result


def delong(label: ArrayLike, score: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Compute AUROCs on the same independent samples, and their covariance, in O(n log n) by mid-ranks.

    DeLong, DeLong and Clarke-Pearson, Biometrics 44, 1988; computed as by Sun and Xu, IEEE Signal Processing Letters
    21, 2014. A sample's placement is the share of the other class that it beats, a tie counting half.

    Args:
        label: (n,) 0 or 1, at least two of each.
        score: (m, n) of m models.

    Returns:
        AUROC (m,) and covariance (m, m).

    Raises:
        ValueError: if a class has fewer than two samples.
    """
    y = np.asarray(label).astype(bool)
    scores = np.atleast_2d(np.asarray(score, dtype=np.float64))
    n_positive, n_negative = int(y.sum()), int((~y).sum())
    if min(n_positive, n_negative) < 2:
        raise ValueError(f"DeLong's test needs two samples of each class, got {n_positive} and {n_negative}")
    ranks = np.stack([mid_ranks(row) for row in scores])
    positives = (ranks[:, y] - np.stack([mid_ranks(row[y]) for row in scores])) / n_negative  # placements
    negatives = 1 - (ranks[:, ~y] - np.stack([mid_ranks(row[~y]) for row in scores])) / n_positive
    covariance = np.cov(positives) / n_positive + np.cov(negatives) / n_negative
    return positives.mean(axis=1), np.atleast_2d(covariance)


def delong_tests(
    label: NDArray[np.int8], score: NDArray[np.float64], pairs: Sequence[tuple[int, int]]
) -> Sequence[DeLong | None]:
    """Test the AUROCs of pairs of (m, n) models; None for each where a class has fewer than two samples."""
    if min((label == 1).sum(), (label == 0).sum()) < 2:
        return [None] * len(pairs)
    area, covariance = delong(label, score)
    tests = []
    for a, b in pairs:
        value = float(area[a] - area[b])
        variance = float(covariance[a, a] + covariance[b, b] - 2 * covariance[a, b])
        rounding = 1e-12 * float(covariance[a, a] + covariance[b, b])
        error = math.sqrt(variance) if variance > rounding else 0.0
        z = value / error if error else math.copysign(math.inf, value) if value else 0.0
        p = math.erfc(abs(z) / math.sqrt(2))
        tests.append(DeLong(float(area[a]), float(area[b]), value, error, z, p, math.nan))
    return adjusted(tests)
