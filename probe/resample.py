"""How much would a figure change on other slides? Resampling by slide, and the intervals that follow from it.

A test set is a sample of slides, and patches of one slide resemble each other. Whole slides are therefore drawn where
slides are known (Field and Welsh, JRSS B 69, 2007), and patches elsewhere; every result says which. A resample is a
count per slide, not a copy of rows (Efron and Tibshirani, An Introduction to the Bootstrap, 1993), and all runs on the
same patches are judged on the same resamples. With few slides of very unequal size their scatter is too small, and is
itself uncertain: docs/decisions/evidence.md measures by how much, and what is done about it here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from operator import itemgetter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, logit, stdtr, stdtrit  # the last two of Student's t; scipy.stats loads slowly

from features.console import UserError
from probe.edge import Held, edge_ends
from probe.metrics import Interval

_MOST_REPLICATES = 1_000_000  # half a minute and more for every run and set
SLIDE, SAMPLE = "slide", "sample"  # what is drawn
UNBOUNDED = (-math.inf, math.inf)
# Figures that may lie elsewhere than between 0 and 1, by the first word of their name.
_RANGE = dict.fromkeys(("mcc", "kappa", "fleiss", "krippendorff", "correlation", "concordance", "bias"), (-1.0, 1.0))
_RANGE |= dict.fromkeys(("ari", "cosine", "margin", "balanced_margin"), (-1.0, 1.0))
_RANGE |= {"nmi": (0.0, math.inf), "log_loss": (0.0, math.inf), "benefit": (-math.inf, 1.0)}
_RANGE |= dict.fromkeys(("slope", "intercept", "lower", "upper"), UNBOUNDED)
_BIASED_UPWARD = frozenset({"ece"})  # sampling adds to it, and resampling once more
_LARGEST_DESIGN_EFFECT = 100.0
_ROUNDING = 1e-12  # of a figure: what resamples differ by less is how they were added up
_BLOCK = 2**17  # counts drawn at a time
_MOST_LEFT_OUT = 5_000  # clusters; with more of them percentiles need no widening
_MOST_KEPT = 2**25  # counts of a set that are kept: 32 megabytes
_MANY = 2**17  # patches: in a set of more, clusters are drawn in bundles
_BUNDLES = 2**12  # bundles drawn then; the standard error of a figure is then known to a hundredth


@dataclass(frozen=True)
class Resampling:
    """How resamples are drawn. The same values give the same intervals, to the last digit.

    Attributes:
        replicates: how many.
        level: coverage asked of an interval.
        seed: of the generator; runs judged on the same set with the same seed share their resamples.
        design_effect: the largest plausible one where slides are unknown: how many times as large the variance of a
            figure may be as independent patches would make it. 1 gives no range.
    """

    replicates: int = 10_000
    level: float = 0.95
    seed: int = 42
    design_effect: float = 2.0

    def __post_init__(self) -> None:
        if self.replicates < 100:
            raise UserError(f"{self.replicates} replicates: an interval needs at least 100; 10,000 is the default.")
        if self.replicates > _MOST_REPLICATES:
            raise UserError(f"{self.replicates} replicates: at most {_MOST_REPLICATES:,}; 10,000 is the default.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed {self.seed}: expected a whole number from 0 to 2^32 - 1.")
        if not 0.5 <= self.level < 1:
            raise UserError(f"a level of {self.level}: intervals need one from 0.5 to below 1, such as 0.95.")
        if not 1 <= self.design_effect <= _LARGEST_DESIGN_EFFECT:
            raise UserError(
                f"a design effect of {self.design_effect}: expected 1 (patches are independent) to "
                f"{_LARGEST_DESIGN_EFFECT:g}; 2 is the default."
            )


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
        """Whether slides are known, and no two patches share one. Patches of unknown slides may share a slide."""
        return self.unit == SLIDE and self.n_units == len(self.index)


def make_clusters(group: NDArray[np.str_], digest: NDArray[np.str_] | None = None) -> Clusters:
    """Make the clusters of (n,) slide names; a patch with an empty name is one cluster.

    Args:
        group: (n,) slide, empty where unknown.
        digest: (n,) of the patch's file, empty where unknown. Clusters that hold the same file are one, as in
            `features.folds.effective_groups`: a copy of a patch says nothing new.
    """
    known = group != ""
    names, index = np.unique(group, return_inverse=True)
    index = index - (len(names) > 0 and names[0] == "")  # the empty name sorts first
    n_slides, n_alone = len(names) - int(not known.all()), int((~known).sum())
    index[~known] = n_slides + np.arange(n_alone)
    n = n_slides + n_alone
    if digest is not None:
        index, n = _joined(index, n, digest)
    n_units, n_alone = n, n - len(np.unique(index[known]))
    n_drawn = min(n, _BUNDLES) if len(group) > _MANY else n
    if n_drawn < n:
        index = (np.random.default_rng(0).permutation(n) % n_drawn)[index]
    return Clusters(index, n_drawn, SLIDE if known.any() else SAMPLE, n_units, n_alone if known.any() else 0)


def _joined(index: NDArray[np.intp], n: int, digest: NDArray[np.str_]) -> tuple[NDArray[np.intp], int]:
    """Join those of n clusters that hold the same file."""
    has = np.flatnonzero(digest != "")
    files, file = np.unique(digest[has], return_inverse=True)
    cluster, lowest = index[has], np.arange(n)  # the lowest cluster that each is joined to
    while True:
        of_file = np.full(len(files), n)
        np.minimum.at(of_file, file, lowest[cluster])
        joined = lowest.copy()
        np.minimum.at(joined, cluster, of_file[file])
        if np.array_equal(joined, lowest):
            break
        lowest = joined
    kept, number = np.unique(lowest, return_inverse=True)
    return number[index], len(kept)


class Statistic(Protocol):
    """Figures of a set in which cluster c occurs `count[j, c]` times: counts (b, k) to name to (b,)."""

    def __call__(self, count: NDArray[np.float64], /) -> Mapping[str, NDArray[np.float64]]:
        """Compute the figures of b sets from (b, k) counts of clusters; NaN where one does not exist."""


@dataclass(frozen=True, eq=False)
class Sums:
    """A statistic whose figures follow from sums over patches, as a sensitivity does from counts of patches.

    Attributes:
        table: (k, q) what each cluster adds to each sum.
        figures: turns (b, q) sums into name to (b,).
    """

    table: NDArray[np.float64]
    figures: Callable[[NDArray[np.float64]], Mapping[str, NDArray[np.float64]]]

    def __call__(self, count: NDArray[np.float64], /) -> Mapping[str, NDArray[np.float64]]:
        """Compute the figures of b sets from (b, k) counts of clusters."""
        return self.figures(count @ self.table)


def sums_by_cluster(columns: NDArray[np.float64], clusters: Clusters) -> NDArray[np.float64]:
    """Add up (n, q) columns over the patches of each cluster: (k, q)."""
    table = np.zeros((clusters.n, columns.shape[1]))
    np.add.at(table, clusters.index, columns)
    return table


@dataclass(frozen=True)
class Scatter:
    """How far a mean over trainings scatters from one set of trainings to the next.

    Attributes:
        variance: of the mean.
        freedom: degrees of freedom with which that variance is known.
    """

    variance: float
    freedom: float

    @classmethod
    def of(cls, values: NDArray[np.float64]) -> Scatter:
        """Measure it from a figure of (K,) trainings; of a single one it is not known, and is not included."""
        if len(values) < 2:
            return NO_SCATTER
        return cls(float(values.var(ddof=1)) / len(values), len(values) - 1.0)

    def __add__(self, other: Scatter) -> Scatter:
        """Add an independent one; degrees of freedom by Welch and Satterthwaite."""
        variance = self.variance + other.variance
        if not variance > 0:
            return Scatter(variance, min(self.freedom, other.freedom))
        weight = (self.variance / variance) ** 2 / self.freedom + (other.variance / variance) ** 2 / other.freedom
        return Scatter(variance, 1 / weight if weight else math.inf)


NO_SCATTER = Scatter(0.0, math.inf)


@dataclass(frozen=True, eq=False)
class Resampled:
    """Figures of R subjects (runs, raters, domains), means over trainings: as they are, resampled, one cluster less.

    Attributes:
        value: name to (R,).
        drawn: name to (R, replicates).
        without: name to (R, clusters), without each cluster in turn; (R, 0) where there are very many clusters.
        trainings: name to the figures of every subject's trainings, (K,) each, as they are.
        n_clusters: how many were drawn from.
        level: of the intervals.
        design_effect: the largest plausible one; 1 where slides are known.
    """

    value: dict[str, NDArray[np.float64]]
    drawn: dict[str, NDArray[np.float64]]
    without: dict[str, NDArray[np.float64]]
    trainings: dict[str, tuple[NDArray[np.float64], ...]]
    n_clusters: int
    level: float
    design_effect: float

    def spread(
        self,
        name: str,
        combine: Callable[[NDArray[np.float64]], NDArray[np.float64]],
        *,
        training: Scatter = NO_SCATTER,
    ) -> Spread:
        """Measure the spread of what `combine` makes of a figure of the subjects: of (R, ...) numbers (...).

        Args:
            name: the figure.
            combine: such as the difference of two subjects.
            training: scatter of the combined figure over trainings.
        """
        value, drawn, without = (combine(figures[name]) for figures in (self.value, self.drawn, self.without))
        return make_spread(
            float(value),
            drawn,
            without,
            n_clusters=self.n_clusters,
            training=training,
            design_effect=self.design_effect,
        )

    def of(self, name: str, subject: int) -> Spread:
        """Measure the spread of a figure of one subject, with the scatter of its own trainings."""
        return self.spread(name, itemgetter(subject), training=Scatter.of(self.trainings[name][subject]))


def resample(statistics: Sequence[Sequence[Statistic]], clusters: Clusters, resampling: Resampling) -> Resampled:
    """Compute the figures of several subjects on the same resamples.

    Args:
        statistics: of every subject (a run, a rater, a domain), one statistic for each of its trainings; all give the
            same names.
        clusters: what is drawn.
        resampling: how resamples are drawn.
    """
    k = clusters.n
    n_without = k if k <= _MOST_LEFT_OUT else 0
    counts = chain([np.ones((1, k))], _left_out(k), _draws(k, resampling))
    tables: dict[str, NDArray[np.float64]] = {}  # name to (R, 1 + n_without + replicates)
    trainings: dict[str, list[list[float]]] = {}
    at = 0
    for count in counts:
        for row, subject in enumerate(statistics):
            for one in subject:
                for name, figures in one(count).items():
                    if name not in tables:
                        tables[name] = np.zeros((len(statistics), 1 + n_without + resampling.replicates))
                        trainings[name] = [[] for _ in statistics]
                    tables[name][row, at : at + len(count)] += figures
                    if at == 0:  # the whole set
                        trainings[name][row].append(float(figures[0]))
        at += len(count)
    n_trainings = np.array([len(subject) for subject in statistics])[:, None]
    means = {name: table / n_trainings for name, table in tables.items()}
    return Resampled(
        value={name: mean[:, 0] for name, mean in means.items()},
        drawn={name: mean[:, 1 + n_without :] for name, mean in means.items()},
        without={name: mean[:, 1 : 1 + n_without] for name, mean in means.items()},
        trainings={name: tuple(map(np.array, of_subjects)) for name, of_subjects in trainings.items()},
        n_clusters=k,
        level=resampling.level,
        design_effect=resampling.design_effect if clusters.unit == SAMPLE else 1.0,
    )


def _draws(n_clusters: int, resampling: Resampling) -> Iterator[NDArray[np.float64]]:
    """Yield blocks of (b, n_clusters) counts: n_clusters draws with replacement, once per replicate."""
    drawn = _drawn if resampling.replicates * n_clusters > _MOST_KEPT else _kept
    for block in drawn(n_clusters, resampling.replicates, resampling.seed):
        yield block.astype(np.float64)


@lru_cache(maxsize=64)
def _kept(n_clusters: int, replicates: int, seed: int) -> tuple[NDArray[np.uint8], ...]:
    """Keep the draws of the last sets: a report draws the same ones for every run and view."""
    return tuple(block.astype(np.uint8) for block in _drawn(n_clusters, replicates, seed))


def _drawn(n_clusters: int, replicates: int, seed: int) -> Iterator[NDArray[np.intp]]:
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // max(1, n_clusters))
    for start in range(0, replicates, step):
        b = min(step, replicates - start)
        drawn = rng.integers(0, max(1, n_clusters), size=(b, n_clusters)) + n_clusters * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * n_clusters).reshape(b, n_clusters)


def _left_out(n_clusters: int) -> Iterator[NDArray[np.float64]]:
    """Yield blocks of (b, n_clusters) counts: all clusters but one, each in turn."""
    if n_clusters > _MOST_LEFT_OUT:
        return
    step = max(1, _BLOCK // max(1, n_clusters))
    for start in range(0, n_clusters, step):
        yield 1 - np.eye(min(step, n_clusters - start), n_clusters, start)


@dataclass(frozen=True)
class Spread:
    """How a figure scatters, and how far that scatter is to be trusted.

    The standard error between clusters is the larger one of two: the jackknife's, which leaves out each cluster in turn
    (Efron and Stein, Annals of Statistics 9, 1981), and that of the resamples, times the root of n / (n - 1) as for a
    sample. Its degrees of freedom are Satterthwaite's for a sum of unequal squares (Biometrics Bulletin 2, 1946; for
    clusters Imbens and Kolesar, Review of Economics and Statistics 98, 2016): with equal clusters their number less
    one, with one heavy slide among light ones hardly more than one. The variance of a mean over trainings is added
    (Welch, Biometrika 34, 1947).

    Attributes:
        value: the figure.
        n_undefined: resamples in which it does not exist.
        clusters: scatter between sets of clusters; variance 0 if no resample changes the figure, NaN if it is not
            known: fewer than two clusters, a class that a single one holds, half of the resamples without a class.
        training: scatter between sets of trainings.
        bias: mean of the resamples less the figure.
        design_effect: the largest plausible one; 1 where slides are known.
    """

    value: float
    n_undefined: int
    clusters: Scatter
    training: Scatter = NO_SCATTER
    bias: float = 0.0
    design_effect: float = 1.0

    def scatter(self, design_effect: float = 1.0) -> Scatter:
        """Add up the scatter between clusters, times a design effect, and that of trainings; NaN if there is none."""
        if not self.clusters.variance > 0:
            return Scatter(math.nan, math.nan)
        return replace(self.clusters, variance=design_effect * self.clusters.variance) + self.training

    @property
    def standard_error(self) -> float:
        """Standard error, that of trainings included; NaN if it is not known."""
        return math.sqrt(self.scatter().variance)

    @property
    def degrees_of_freedom(self) -> float:
        """Degrees of freedom of the standard error."""
        return self.scatter().freedom

    def ends(
        self, level: float, design_effect: float = 1.0, *, within: tuple[float, float] = UNBOUNDED
    ) -> tuple[float, float]:
        """Compute the ends of the interval of a level by Student's t; NaN where there is none.

        Args:
            level: coverage asked.
            design_effect: how many times as large the variance between clusters is taken to be.
            within: the figure's range. Of one with two ends t is taken on the logit scale, so that the interval never
                leaves it, and reaches farther towards the middle; else it is cut to the range.
        """
        scatter = self.scatter(design_effect)
        reach = -float(stdtrit(scatter.freedom, (1 - level) / 2)) * math.sqrt(scatter.variance)
        lowest, highest = within
        if math.isinf(highest - lowest) or not lowest < self.value < highest:
            low, high = np.clip([self.value - reach, self.value + reach], lowest, highest).tolist()
            return low, high
        share = (self.value - lowest) / (highest - lowest)
        reach /= share * (1 - share) * (highest - lowest)  # the logit's derivative
        low, high = (lowest + (highest - lowest) * expit(logit(share) + np.array([-reach, reach]))).tolist()
        return low, high

    def p_value(self, null: float, design_effect: float = 1.0) -> float:
        """Compute the two-sided p-value: one minus the level of the unbounded interval that ends at `null`."""
        return 2 * min(self.p_above(null, design_effect), self.p_below(null, design_effect))

    def p_above(self, null: float, design_effect: float = 1.0) -> float:
        """Compute the one-sided p-value against a true figure of `null` or less."""
        scatter = self.scatter(design_effect)
        return float(stdtr(scatter.freedom, (null - self.value) / math.sqrt(scatter.variance)))

    def p_below(self, null: float, design_effect: float = 1.0) -> float:
        """Compute the one-sided p-value against a true figure of `null` or more."""
        scatter = self.scatter(design_effect)
        return float(stdtr(scatter.freedom, (self.value - null) / math.sqrt(scatter.variance)))


def make_spread(
    value: float,
    drawn: NDArray[np.float64],
    without: NDArray[np.float64],
    *,
    n_clusters: int,
    training: Scatter = NO_SCATTER,
    design_effect: float = 1.0,
) -> Spread:
    """Measure the spread of a figure.

    Args:
        value: the figure.
        drawn: (r,) on every resample.
        without: (k,) without each cluster in turn; (0,) for very many clusters.
        n_clusters: how many there are.
        training: scatter of the figure over trainings.
        design_effect: the largest plausible one; 1 where slides are known.
    """
    defined = drawn[np.isfinite(drawn)]
    n_undefined = len(drawn) - len(defined)
    known = math.isfinite(value) and n_clusters > 1 and 2 * len(defined) > len(drawn) and np.isfinite(without).all()
    if not known:
        return Spread(value, n_undefined, Scatter(math.nan, math.nan), training, math.nan, design_effect)
    variance, freedom = 0.0, max(1.0, n_clusters - 1.0)
    if np.ptp(defined) > _ROUNDING * max(1.0, abs(value)):
        variance = float(defined.var()) * n_clusters / (n_clusters - 1)
        squares = (without - without.mean()) ** 2 if len(without) else np.zeros(1)
        if squares.any():
            variance = max(variance, float(squares.sum()) * (n_clusters - 1) / n_clusters)
            share = squares / squares.sum()
            freedom = min(freedom, max(1.0, 3 / float((share**2).sum()) - 1))  # 3: the kurtosis of a normal
    bias = float(defined.mean()) - value
    return Spread(value, n_undefined, Scatter(variance, freedom), training, bias, design_effect)


def interval(name: str, spread: Spread, level: float) -> Interval:
    """Give a figure its interval, within its range, and its ends at the largest plausible design effect."""
    low, high = _ends(name, spread, level, 1.0)
    wide = _ends(name, spread, level, spread.design_effect) if spread.design_effect > 1 else None
    return Interval(spread.value, low, high, spread.n_undefined, wide)


def _ends(name: str, spread: Spread, level: float, design_effect: float) -> tuple[float, float]:
    """Compute the ends of a figure's interval.

    Sampling adds to the calibration error, and resampling once more: by as much as is taken from its lower end.
    """
    within = _RANGE.get(name.split()[0], (0.0, 1.0))
    low, high = spread.ends(level, design_effect, within=within)
    return (max(within[0], low - max(0.0, spread.bias)) if name in _BIASED_UPWARD else low), high


def intervals(resampled: Resampled, subject: int, *, classes: Held | None = None) -> dict[str, Interval]:
    """Give every figure of one subject its interval.

    Args:
        resampled: figures of all subjects.
        subject: which of them.
        classes: how many clusters hold each class; with it, a figure that no resample changes because it is perfect
            gets an exact interval.
    """
    level, values = resampled.level, {name: float(each[subject]) for name, each in resampled.value.items()}
    found = {}
    for name in values:
        spread = resampled.of(name, subject)
        found[name] = interval(name, spread, level)
        if classes is None or spread.clusters.variance != 0:
            continue
        ends = edge_ends(name, values, classes, level)
        if ends is not None:
            thinned = classes.thinned(spread.design_effect)
            wide = edge_ends(name, values, thinned, level) if spread.design_effect > 1 else None
            found[name] = Interval(values[name], *ends, spread.n_undefined, wide, exact=True)
    return found
