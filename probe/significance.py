"""Are two runs different? Paired differences by resampling, DeLong's test, and Holm's correction for many tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import nctdtrinc, stdtr, stdtrit  # of (noncentral) t; scipy.stats loads slowly

from probe.metrics import mid_ranks
from probe.resample import Resampled, Scatter

_MOST_SLIDES = 10**6


@dataclass(frozen=True)
class Difference:
    """First minus second on the same images.

    Attributes:
        value: the difference.
        low, high: its interval.
        p: two-sided; one minus the level at which the interval would end at zero. NaN where no test is valid.
        p_holm: p adjusted for all comparisons of this figure on this set, as every `..._holm` below.
        n_undefined: resamples that lack a class.
        standard_error, freedom: of the difference, trainings included, and its degrees of freedom.
        training_error: the standard error that trainings alone give; 0 with one training each.
        detectable: the smallest true difference that this pair would show on such a set at 5 % in four of five cases.
        detectable_holm: the same at 5 % divided by the number of tests.
        wide: ends of the interval at the largest plausible design effect; None where slides are known.
        p_wide: p at that design effect; NaN where slides are known.
        p_equivalent: against a true difference of the margin or more, either way: two one-sided tests at 2.5 % each
            (Schuirmann, Journal of Pharmacokinetics and Biopharmaceutics 15, 1987; ICH E9, 1998, 3.5 and 5.5), doubled,
            so that it is below 5 % where the 95 % interval lies within the margin.
        p_not_worse: against "the first is worse than the second by the margin or more".
        p_not_better: against "the first is better than the second by the margin or more".
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float
    n_undefined: int
    standard_error: float = math.nan
    freedom: float = math.nan
    detectable: float = math.nan
    detectable_holm: float = math.nan
    wide: tuple[float, float] | None = None
    p_wide: float = math.nan
    p_equivalent: float = math.nan
    p_not_worse: float = math.nan
    p_not_better: float = math.nan
    p_wide_holm: float = math.nan
    p_equivalent_holm: float = math.nan
    p_not_worse_holm: float = math.nan
    p_not_better_holm: float = math.nan
    training_error: float = 0.0


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


@dataclass(frozen=True)
class ResampledT:
    """The mean difference of two runs over the folds of one cross-validation, with the corrected resampled t test.

    Attributes:
        value: mean over folds.
        low, high: its 95 % interval.
        freedom: folds less one.
        p: two-sided.
    """

    value: float
    low: float
    high: float
    freedom: float
    p: float


Verdict = Literal["better", "worse", "equivalent", "not worse", "not better", "unknown"]
_Test = TypeVar("_Test", Difference, DeLong)
_ONE_SIDED = ("p_equivalent", "p_not_worse", "p_not_better")


def difference(resampled: Resampled, name: str, first: int, second: int, *, margin: float | None = None) -> Difference:
    """Compare a figure of two subjects on the same resamples: first minus second.

    The scatter of both subjects' trainings is included. What is adjusted for the number of tests (`..._holm`) stays
    NaN until `adjusted`.

    Args:
        resampled: figures of all subjects.
        name: the figure.
        first, second: subjects.
        margin: a true difference below it does not matter; None for no test of equivalence.
    """
    each = resampled.trainings[name]
    training = Scatter.of(each[first]) + Scatter.of(each[second])
    spread = resampled.spread(name, lambda values: values[first] - values[second], training=training)
    if spread.value == spread.clusters.variance == training.variance == 0:
        same = Difference(0.0, 0.0, 0.0, 1.0, math.nan, spread.n_undefined)  # the two never differ
        return same if margin is None else replace(same, p_equivalent=0.0, p_not_worse=0.0, p_not_better=0.0)
    low, high = np.clip(spread.ends(resampled.level), -1, 1).tolist()
    found = Difference(
        spread.value,
        low,
        high,
        spread.p_value(0.0),
        math.nan,
        spread.n_undefined,
        standard_error=spread.standard_error,
        freedom=spread.degrees_of_freedom,
        detectable=detectable(spread.standard_error, spread.degrees_of_freedom),
        training_error=math.sqrt(training.variance),
    )
    if spread.design_effect > 1:
        wide = np.clip(spread.ends(resampled.level, spread.design_effect), -1, 1).tolist()
        found = replace(found, wide=tuple(wide), p_wide=spread.p_value(0.0, spread.design_effect))
    if margin is not None:
        # Twice the one-sided p-value, as for a difference: below 5 % where the 95 % interval ends within the margin.
        p_not_worse, p_not_better = (min(1.0, 2 * p) for p in (spread.p_above(-margin), spread.p_below(margin)))
        found = replace(
            found,
            p_equivalent=float(np.maximum(p_not_worse, p_not_better)),
            p_not_worse=p_not_worse,
            p_not_better=p_not_better,
        )
    return found


def untested(found: Difference) -> Difference:
    """Leave out every p-value and detectable difference, where no test of it is valid; the interval stays."""
    nothing: dict[str, Any] = {
        name: math.nan for name in vars(found) if name.startswith("p") or name.startswith("detectable")
    }
    return replace(found, **nothing)


def verdict(found: Difference, margin: float | None, alpha: float = 0.05) -> Verdict:
    """Say in a word what a difference shows, after adjustment for the number of tests; "unknown" if nothing."""
    if found.p_holm < alpha:
        return "better" if found.value > 0 else "worse"
    if margin is not None:
        if found.p_equivalent_holm < alpha:
            return "equivalent"
        if found.p_not_worse_holm < alpha:
            return "not worse"
        if found.p_not_better_holm < alpha:
            return "not better"
    return "unknown"


def detectable(standard_error: float, freedom: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Compute the smallest true difference that a two-sided t test calls with a given power.

    The statistic is taken to be noncentral t; its noncentrality is the true difference over the standard error.
    """
    if not standard_error > 0:
        return math.nan
    critical = -float(stdtrit(freedom, alpha / 2))
    return standard_error * float(nctdtrinc(freedom, 1 - power, critical))


def slides_needed(found: Difference, n_clusters: int, wanted: float, *, power: float = 0.8) -> int | None:
    """Compute how many slides like these would show a true difference at 5 % with a given power.

    The variance that slides give falls with their number; that of trainings does not.

    Args:
        found: the difference of two runs on this set.
        n_clusters: slides of this set (patches, where slides are unknown).
        wanted: the true difference.
        power: share of such sets that would show it.

    Returns:
        The number; None where no number would do, as trainings scatter too much, or where the set gives no variance.
    """
    of_slides = found.standard_error**2 - found.training_error**2

    def shows(n: float) -> bool:
        error = math.sqrt(of_slides * n_clusters / n + found.training_error**2)
        return detectable(error, found.freedom * n / n_clusters, power=power) <= abs(wanted)

    if not of_slides > 0 or not shows(_MOST_SLIDES):
        return None
    low, high = 1, _MOST_SLIDES
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if shows(middle) else (middle + 1, high)
    return low


def resampled_t(differences: ArrayLike, *, test_share: float) -> ResampledT:
    """Test the mean difference of two runs over the folds of one cross-validation.

    Folds share their training rows, so that the usual t test calls too many differences real. Nadeau and Bengio
    (Machine Learning 52, 2003) multiply the variance of the mean by 1 + F n_test / n_train.

    Args:
        differences: (F,) of the same figure on every fold, each by the models that did not train on it.
        test_share: share of rows in one fold, such as .2 of five folds.
    """
    each = np.asarray(differences, dtype=np.float64)
    value, freedom = float(each.mean()), len(each) - 1.0
    error = math.sqrt(float(each.var(ddof=1)) * (1 / len(each) + test_share / (1 - test_share)))
    reach = -error * float(stdtrit(freedom, 0.025))
    p = 2 * float(stdtr(freedom, -abs(value) / error)) if error else float(value == 0)
    return ResampledT(value, value - reach, value + reach, freedom, p)


def adjusted(tests: Sequence[_Test], n_tests: int | None = None) -> list[_Test]:
    """Fill in what is adjusted for the number of these tests: every `..._holm`.

    Args:
        tests: those with p = NaN are no tests.
        n_tests: their number, if these are only some of them.
    """
    n = n_tests if n_tests is not None else sum(not math.isnan(test.p) for test in tests)
    names = [name for name in ("p", "p_wide", *_ONE_SIDED) if tests and hasattr(tests[0], name)]
    columns = {name: holm([getattr(test, name) for test in tests], n_tests=n_tests).tolist() for name in names}
    found = []
    for k, test in enumerate(tests):
        filled: dict[str, Any] = {f"{name}_holm": column[k] for name, column in columns.items()}
        if isinstance(test, Difference) and not math.isnan(test.detectable):
            filled["detectable_holm"] = detectable(test.standard_error, test.freedom, alpha=0.05 / max(1, n))
        found.append(replace(test, **filled))
    return found


def holm(p: ArrayLike, *, n_tests: int | None = None) -> NDArray[np.float64]:
    """Adjust p-values for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting those below alpha keeps the chance of any false rejection below alpha, whatever their dependence.

    Args:
        p: (m,) p-values; NaN is no test and counts for none.
        n_tests: how many tests there are, if these are the smallest p-values of more.

    Returns:
        (m,) adjusted, at most 1; NaN stays.
    """
    raw = np.asarray(p, dtype=np.float64)
    result = np.full(raw.shape, np.nan)
    tests = np.flatnonzero(~np.isnan(raw))
    ascending = tests[np.argsort(raw[tests], kind="stable")]
    n = max(len(ascending), n_tests or 0)
    scaled = raw[ascending] * (n - np.arange(len(ascending)))
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
