"""Which run is better across data sets, and how much can a handful of them say of the next one?

The differences of two runs on J test sets are d_j, each with a standard error s_j. They are taken as

    d_j ~ N(delta_j, s_j^2)      what a set shows of its own true difference
    delta_j ~ N(mu, tau^2)       true differences scatter about a mean from set to set

(Gelman et al., Bayesian Data Analysis, 2013, ch. 5; for classifiers on several data sets Corani et al., Machine
Learning 106, 2017). The prior of mu is flat. That of tau is half-normal with scale `TAU_SCALE`: the differences between
backbones on these tasks are some hundredths, so from set to set they scatter by some hundredths, hardly by more than
a tenth. With three sets this prior matters, because three differences say little of their scatter; docs/figures.md
shows by how much. Both are integrated out on a grid of tau, without sampling.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from probe.evidence import Comparison
from probe.metrics import COMPARED, mid_ranks
from probe.significance import adjusted

TAU_SCALE = 0.05
_GRID = 400  # values of tau
_WIDEST = 5.0  # scales of the prior that the grid spans
_LEVEL = 0.95
_FEW = 10  # sets; with fewer, what is said of a new one rests on the prior of tau in part


@dataclass(frozen=True)
class AcrossPair:
    """Two runs over several sets: first minus second.

    Attributes:
        first, second: the runs' names.
        n_sets: on which both stand.
        mean, low, high: of the mean difference over all sets of this kind: its posterior mean and 95 % interval.
        between: posterior mean of the standard deviation of the true difference from set to set.
        p_better, p_equivalent, p_worse: chances that on a new set the first is better than the second by more than
            `rope`, that they differ by no more than it, and that it is worse by more; their sum is 1.
    """

    first: str
    second: str
    n_sets: int
    mean: float
    low: float
    high: float
    between: float
    p_better: float
    p_equivalent: float
    p_worse: float


@dataclass(frozen=True)
class AcrossFigure:
    """One figure over several sets.

    Attributes:
        pairs: every two runs that stand on two sets or more together.
        mean_ranks: run to its mean rank over the sets on which all these runs stand, 1 the best (Friedman).
        critical_difference: two mean ranks that differ by less cannot be told apart (Nemenyi's test at 5 %; Demsar,
            Journal of Machine Learning Research 7, 2006). NaN with fewer than two runs or two sets.
        n_sets: sets with this figure.
        sentence: what that number of sets can show, in words.
    """

    pairs: tuple[AcrossPair, ...]
    mean_ranks: dict[str, float]
    critical_difference: float
    n_sets: int
    sentence: str


@dataclass(frozen=True)
class Across:
    """Runs over several test sets.

    Attributes:
        rope: the region of practical equivalence: differences of at most this are of no account.
        figures: figure (`COMPARED`) to what all sets say together.
    """

    rope: float
    figures: dict[str, AcrossFigure]


def across_sets(
    comparisons: Mapping[str, Comparison], *, rope: float = 0.01, tau_scale: float = TAU_SCALE
) -> Across | None:
    """Compare runs over test sets that have no patch in common.

    Args:
        comparisons: name of the set to the comparison on it.
        rope: differences of at most this are of no account.
        tau_scale: of the prior of the scatter between sets.

    Returns:
        None with fewer than two sets or two runs.
    """
    if len(comparisons) < 2 or max(len(one.judgements) for one in comparisons.values()) < 2:
        return None
    return Across(rope, {name: _figure(comparisons, name, rope, tau_scale) for name in COMPARED})


def _figure(comparisons: Mapping[str, Comparison], name: str, rope: float, tau_scale: float) -> AcrossFigure:
    shown: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)  # pair to differences, standard errors
    values: list[dict[str, float]] = []  # of every set, run to figure
    for comparison in comparisons.values():
        for pair in comparison.pairs:
            one, turned = pair.differences[name], (pair.second, pair.first) in shown
            error = 0.0 if one.low == one.high == 0 else one.standard_error  # two runs that never differ
            if math.isfinite(one.value) and math.isfinite(error):
                runs = (pair.second, pair.first) if turned else (pair.first, pair.second)
                shown[runs].append((-one.value if turned else one.value, error))
        of_runs = {run: judged.figures[name].value for run, judged in comparison.judgements.items()}
        values.append({run: value for run, value in of_runs.items() if math.isfinite(value)})
    values = [of_runs for of_runs in values if of_runs]
    ranked = [run for run in (values[0] if values else ()) if all(run in of_runs for of_runs in values)]
    ranks = mean_ranks(np.array([[of_runs[run] for run in ranked] for of_runs in values])) if ranked else np.empty(0)
    return AcrossFigure(
        pairs=tuple(
            AcrossPair(*runs, len(found), *pooled(*np.array(found).T, rope=rope, tau_scale=tau_scale))
            for runs, found in shown.items()
            if len(found) > 1
        ),
        mean_ranks=dict(zip(ranked, ranks.tolist(), strict=True)),
        critical_difference=critical_difference(len(ranked), len(values)),
        n_sets=len(values),
        sentence=_sentence(len(values), len(ranked)),
    )


def pooled(
    difference: NDArray[np.float64],
    standard_error: NDArray[np.float64],
    *,
    rope: float,
    tau_scale: float = TAU_SCALE,
) -> tuple[float, float, float, float, float, float, float]:
    """Pool the differences of two runs over sets, by the model above.

    Args:
        difference, standard_error: (J,) on every set.
        rope: differences of at most this are of no account.
        tau_scale: of the prior of the scatter between sets.

    Returns:
        mean, low, high, between, p_better, p_equivalent and p_worse of `AcrossPair`.
    """
    tau = (np.arange(_GRID) + 0.5) * (_WIDEST * tau_scale / _GRID)  # (t,), without 0
    weight = 1 / (standard_error**2 + tau[:, None] ** 2)  # (t, J)
    variance = 1 / weight.sum(axis=1)  # of mu, given tau
    mean = variance * (weight @ difference)
    log_density = (
        -((tau / tau_scale) ** 2) / 2
        + np.log(variance) / 2
        + (np.log(weight) - weight * (difference - mean[:, None]) ** 2).sum(axis=1) / 2
    )
    density = np.exp(log_density - log_density.max())
    density /= density.sum()

    def below(at: float, spread: NDArray[np.float64]) -> float:
        return float(density @ ndtr((at - mean) / spread))

    error, of_new = np.sqrt(variance), np.sqrt(variance + tau**2)
    p_worse, p_better = below(-rope, of_new), 1 - below(rope, of_new)
    tail = (1 - _LEVEL) / 2
    low, high = (_quantile(lambda at: below(at, error), share, mean, error) for share in (tail, 1 - tail))
    return float(density @ mean), low, high, float(density @ tau), p_better, 1 - p_better - p_worse, p_worse


def _quantile(
    below: Callable[[float], float], share: float, mean: NDArray[np.float64], error: NDArray[np.float64]
) -> float:
    """Find where a mixture of normal distributions reaches a share, by bisection between quantiles of its parts."""
    ends = mean + float(ndtri(share)) * error
    low, high = float(ends.min()), float(ends.max())
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) < share else (low, middle)
    return (low + high) / 2


# ---------------------------------------------------------------------------------------------------------------- ranks


def mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Average the ranks of (sets, runs) figures over sets: (runs,), 1 the largest; equals share the mean rank."""
    return np.asarray(np.mean([mid_ranks(-row) for row in values], axis=0))


def critical_difference(n_runs: int, n_sets: int) -> float:
    """Compute the smallest difference of mean ranks that Nemenyi's test calls real at 5 %; NaN if there is no test."""
    if n_runs < 2 or n_sets < 2:
        return math.nan
    return _studentized_range(n_runs) / math.sqrt(2) * math.sqrt(n_runs * (n_runs + 1) / (6 * n_sets))


def _studentized_range(n: int) -> float:
    """Compute the 95 % quantile of the range of n standard normal numbers, from its integral (Tukey)."""
    z = np.linspace(-9, 9, 1801)
    density = n * np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi) * (z[1] - z[0])

    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        share = float(density @ (ndtr(z) - ndtr(z - middle)) ** (n - 1))  # the largest is z, all others within `middle`
        low, high = (middle, high) if share < _LEVEL else (low, middle)
    return (low + high) / 2


def _sentence(n_sets: int, n_runs: int) -> str:
    if n_sets < 2:
        return "One test set says nothing of how a difference varies from set to set."
    said = f"{n_sets} test sets say how much a difference varies from set to set, and so what a new set would show."
    if n_sets < _FEW:
        said = (
            f"{n_sets} test sets are few: how much a difference varies from set to set is hardly known from them, and "
            f"what is said of a new set rests in part on the assumption that it varies by some {TAU_SCALE:g}."
        )
    # No two mean ranks can differ by more than those of a run that is always the best and one that is always the worst.
    if n_runs > 1 and critical_difference(n_runs, n_sets) > n_runs - 1:
        said += " Not even a run that is the best on all of them can be told from the worst by its mean rank."
    return said


# ----------------------------------------------------------------------------------------------- one correction for all


def adjusted_over(comparisons: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """Adjust the p-values of all pairs, figures and sets together by Holm, not figure by figure and set by set."""
    places = [
        (set_name, k, figure)
        for set_name, comparison in comparisons.items()
        for k, pair in enumerate(comparison.pairs)
        for figure in pair.differences
    ]
    tests = adjusted([comparisons[name].pairs[k].differences[figure] for name, k, figure in places])
    found = dict(zip(places, tests, strict=True))
    return {
        set_name: replace(
            comparison,
            pairs=tuple(
                replace(pair, differences={figure: found[set_name, k, figure] for figure in pair.differences})
                for k, pair in enumerate(comparison.pairs)
            ),
        )
        for set_name, comparison in comparisons.items()
    }
