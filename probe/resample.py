"""How much would a figure change on other slides? Resampling by slide, and the intervals that follow from it.

A test set is a sample of slides, and patches of one slide resemble each other. Whole slides are therefore drawn where
slides are known (Field and Welsh, JRSS B 69, 2007), and patches elsewhere; every result says which. A resample is a
count per slide, not a copy of rows (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), and all runs on the
same patches are judged on the same resamples. With few slides of very unequal size plain percentiles are too narrow;
docs/decisions/evidence.md measures by how much, and what is done about it here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtr, stdtrit  # of the normal and of Student's t; scipy.stats loads slowly

from features.console import UserError
from probe.metrics import NAMES, Interval
from probe.tally import Tally, resampled_scores

_MOST_REPLICATES = 1_000_000  # half a minute and more for every run and set
SLIDE, SAMPLE = "slide", "sample"  # what is drawn
_BIASED_UPWARD = frozenset({"ece"})  # sampling adds to it, and resampling once more
_BLOCK = 2**17  # counts drawn at a time
_MOST_LEFT_OUT = 5_000  # clusters; with more of them percentiles need no widening
_MANY = 2**17  # patches: in a set of more, clusters are drawn in bundles
_BUNDLES = 2**12  # bundles drawn then; the standard error of a figure is then known to a hundredth


@dataclass(frozen=True)
class Resampling:
    """How resamples are drawn. The same values give the same intervals, to the last digit.

    Attributes:
        replicates: how many.
        level: coverage asked of an interval.
        seed: of the generator; runs judged on the same set with the same seed share their resamples.
    """

    replicates: int = 10_000
    level: float = 0.95
    seed: int = 42

    def __post_init__(self) -> None:
        if self.replicates < 100:
            raise UserError(f"{self.replicates} replicates: an interval needs at least 100; 10,000 is the default.")
        if self.replicates > _MOST_REPLICATES:
            raise UserError(f"{self.replicates} replicates: at most {_MOST_REPLICATES:,}; 10,000 is the default.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: expected a whole number from 0 to 2^32 - 1.")
        if not 0.5 <= self.level < 1:
            raise UserError(f"a level of {self.level}: intervals need one from 0.5 to below 1, such as 0.95.")


@dataclass(frozen=True, eq=False)
class Clusters:
    """The clusters that are drawn: patch i comes with cluster `index[i]`, one of n.

    In a set of very many patches each cluster may be a random bundle of several: a bootstrap of random groups (Wolter,
    Introduction to Variance Estimation, 2007, ch. 2). Bundles of independent clusters are as independent, so intervals
    are as wide, without a million draws per resample.

    Attributes:
        index: (patches,) cluster.
        n: number of clusters drawn.
        unit: what a cluster is, before bundling: "slide" or "sample".
        n_units: how many of those there are.
        n_alone: patches of unknown slide among known ones; each is one cluster.
    """

    index: NDArray[np.intp]
    n: int
    unit: str
    n_units: int
    n_alone: int

    @property
    def independent(self) -> bool:
        """Whether no two patches share a cluster."""
        return self.n_units == len(self.index)


def make_clusters(group: NDArray[np.str_]) -> Clusters:
    """Make the clusters of (n,) slide names; a patch with an empty name is one cluster."""
    known = group != ""
    names, index = np.unique(group, return_inverse=True)
    index = index - (len(names) > 0 and names[0] == "")  # the empty name sorts first
    n_slides, n_alone = len(names) - int(not known.all()), int((~known).sum())
    index[~known] = n_slides + np.arange(n_alone)
    n = n_slides + n_alone
    n_drawn = min(n, _BUNDLES) if len(group) > _MANY else n
    if n_drawn < n:
        index = (np.random.default_rng(0).permutation(n) % n_drawn)[index]
    return Clusters(index, n_drawn, SLIDE if known.any() else SAMPLE, n, n_alone if known.any() else 0)


@dataclass(frozen=True, eq=False)
class Resampled:
    """Figures of R tallies: as they are, on every resample, and without each cluster in turn.

    Attributes:
        value: name to (R,).
        drawn: name to (R, replicates).
        without: name to (R, clusters); (R, 0) where there are very many clusters.
        n_clusters: how many were drawn from.
        level: of the intervals.
    """

    value: dict[str, NDArray[np.float64]]
    drawn: dict[str, NDArray[np.float64]]
    without: dict[str, NDArray[np.float64]]
    n_clusters: int
    level: float

    def spread(self, name: str, combine: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Spread:
        """Measure the spread of what `combine` makes of a figure of the tallies: of (R, ...) numbers (...)."""
        value, drawn, without = (combine(figures[name]) for figures in (self.value, self.drawn, self.without))
        return make_spread(float(value), drawn, without, n_clusters=self.n_clusters)


def resample(
    tallies: Sequence[Tally], n_clusters: int, resampling: Resampling, *, names: Collection[str] = NAMES
) -> Resampled:
    """Compute the figures of tallies that share their clusters, all on the same resamples."""

    def figures(blocks: Iterable[NDArray[np.intp]]) -> dict[str, NDArray[np.float64]]:
        parts = [[resampled_scores(tallied, block, names=names) for tallied in tallies] for block in blocks]
        empty = np.empty((len(tallies), 0))
        return {
            name: np.concatenate([empty, *(np.stack([scored[name] for scored in part]) for part in parts)], axis=1)
            for name in names
        }

    whole = figures([np.ones((1, n_clusters), dtype=np.intp)])
    return Resampled(
        value={name: values[:, 0] for name, values in whole.items()},
        drawn=figures(_draws(n_clusters, resampling)),
        without=figures(_left_out(n_clusters)),
        n_clusters=n_clusters,
        level=resampling.level,
    )


def _draws(n_clusters: int, resampling: Resampling) -> Iterator[NDArray[np.intp]]:
    """Yield blocks of (b, n_clusters) counts: n_clusters draws with replacement, once per replicate."""
    rng = np.random.default_rng(resampling.seed)
    step = max(1, _BLOCK // max(1, n_clusters))
    for start in range(0, resampling.replicates, step):
        b = min(step, resampling.replicates - start)
        drawn = rng.integers(0, max(1, n_clusters), size=(b, n_clusters)) + n_clusters * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * n_clusters).reshape(b, n_clusters)


def _left_out(n_clusters: int) -> Iterator[NDArray[np.intp]]:
    """Yield blocks of (b, n_clusters) counts: all clusters but one, each in turn."""
    if n_clusters > _MOST_LEFT_OUT:
        return
    step = max(1, _BLOCK // max(1, n_clusters))
    for start in range(0, n_clusters, step):
        yield 1 - np.eye(min(step, n_clusters - start), n_clusters, start, dtype=np.intp)


@dataclass(frozen=True, eq=False)
class Spread:
    """How a figure scatters over resamples, and how far that scatter is to be trusted.

    The interval is that of percentiles, made wider by two factors: Student's t with `freedom` degrees of freedom over
    the normal, and `ratio`. That is the percentile interval expanded for small samples (Hesterberg, The American
    Statistician 69, 2015), here for clusters of unequal weight. The jackknife that leaves out each cluster in turn
    (Efron and Stein, Annals of Statistics 9, 1981) gives both. `ratio` is the jackknife's standard error over that of
    the resamples, which is too small with few clusters. `freedom` is Satterthwaite's for a sum of unequal squares
    (Biometrics Bulletin 2, 1946; for clusters Imbens and Kolesar, Review of Economics and Statistics 98, 2016): with
    equal clusters their number less one, with one heavy slide among light ones hardly more than one.
    """

    value: float
    drawn: NDArray[np.float64]  # (r,) sorted, without undefined ones
    n_undefined: int
    ratio: float
    freedom: float
    usable: bool

    def ends(self, level: float) -> tuple[float, float]:
        """Compute the ends of the interval of a level; NaN where there is none.

        Where it reaches beyond all resamples, their scatter is continued as a normal distribution.
        """
        if not self.usable:
            return math.nan, math.nan
        z = -self.ratio * float(stdtrit(self.freedom, (1 - level) / 2))
        share = float(ndtr(-z))
        low, high = (float(end) for end in np.quantile(self.drawn, [share, 1 - share]))
        if share * len(self.drawn) < 1:
            reach = z * float(self.drawn.std())
            low, high = min(low, self.value - reach), max(high, self.value + reach)
        return low, high

    def p_value(self, null: float) -> float:
        """Compute the two-sided p-value: one minus the level of the interval that ends at `null`."""
        if not self.usable:
            return math.nan
        below, above = float((self.drawn < null).mean()), float((self.drawn > null).mean())
        beyond = min(below, above) + (1 - below - above) / 2
        z = -float(ndtri(min(0.5, max(beyond, 0.5 / len(self.drawn)))))
        if beyond * len(self.drawn) < 1:
            z = max(z, abs(self.value - null) / float(self.drawn.std()))
        return 2 * float(stdtr(self.freedom, -z / self.ratio))


def make_spread(value: float, drawn: NDArray[np.float64], without: NDArray[np.float64], *, n_clusters: int) -> Spread:
    """Measure the spread of a figure.

    Args:
        value: the figure.
        drawn: (r,) on every resample.
        without: (k,) without each cluster in turn; (0,) for very many clusters.
        n_clusters: how many there are.
    """
    defined = np.sort(drawn[np.isfinite(drawn)])
    ratio, freedom = 1.0, max(1.0, n_clusters - 1.0)
    usable = (
        math.isfinite(value)
        and n_clusters > 1
        and 2 * len(defined) > len(drawn)
        and bool(np.isfinite(without).all())
        and defined[0] < defined[-1]
    )
    if usable and len(without):
        squares = (without - without.mean()) ** 2
        if squares.any():
            error = math.sqrt(float(squares.sum()) * (n_clusters - 1) / n_clusters)
            ratio = max(1.0, error / float(defined.std()))
            share = squares / squares.sum()
            freedom = min(freedom, max(1.0, 3 / float((share**2).sum()) - 1))  # 3: the kurtosis of a normal
    return Spread(value, defined, len(drawn) - len(defined), ratio, freedom, usable)


def interval(name: str, spread: Spread, level: float) -> Interval:
    """Give a figure its interval, cut to the figure's range.

    Sampling adds to the calibration error, and resampling adds once more: its interval holds the percentiles and their
    reflection about the figure.
    """
    low, high = spread.ends(level)
    if name in _BIASED_UPWARD:
        low, high = min(low, 2 * spread.value - high), max(high, 2 * spread.value - low)
    low, high = np.clip([low, high], -1 if name == "mcc" else 0, 1).tolist()
    return Interval(spread.value, low, high, spread.n_undefined)


def intervals(resampled: Resampled, model: int) -> dict[str, Interval]:
    """Give every figure of one of the tallies its interval."""
    return {
        name: interval(name, resampled.spread(name, itemgetter(model)), resampled.level) for name in resampled.value
    }
