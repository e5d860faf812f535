"""Is the difference real? Intervals, paired tests, ranks, and scores by rater and by domain.

A test set is a sample of slides, and patches of one slide resemble each other. Everything here is therefore resampled
by slide where slides are known (Field and Welsh, JRSS B 69, 2007) and by patch elsewhere; every result says which.
Resamples are counts, not copies: a slide drawn twice counts twice (Efron and Tibshirani, An Introduction to the
Bootstrap, 1993), and all runs on the same images are judged on the same resamples. With few slides of very unequal size
plain percentiles are too narrow; docs/decisions/evidence.md measures by how much, and what is done about it here.

    predictions -> evaluate                     the run alone: what metrics.json holds
    predictions -> ensemble -> judge            every figure with its interval
                            -> compare          runs side by side: differences, tests, ranks
                            -> by_agreement     figures the raters agreed on, figures they did not, and the raters
                            -> by_domain        every domain, their mean, the worst
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from features.console import UserError
from features.samples import MISSING_VOTE
from probe.metrics import (
    NAMES,
    FoldFigure,
    Interval,
    Judgement,
    RunMetrics,
    SetMetrics,
    Tally,
    resampled_scores,
    scores,
    tally,
)
from probe.metrics import as_dict as as_dict
from probe.predictions import VALIDATION, Predictions, threshold_of

SLIDE, SAMPLE = "slide", "sample"  # what is drawn
COMPARED = ("balanced_accuracy", "auroc")  # the figures that differences, tests and ranks are of
OF_RATERS = ("balanced_accuracy", "sensitivity", "specificity")  # a rater gives classes, not scores
SMALLER_IS_BETTER = frozenset({"brier", "ece"})
_UPWARD = frozenset({"ece"})  # sampling adds to it, and resampling once more: its interval holds the reflected one too
_BLOCK = 2**17  # counts drawn at a time
_MOST_LEFT_OUT = 5_000  # clusters; with more of them percentiles need no widening
_MANY = 2**17  # patches: in a set of more, clusters are drawn in bundles
_BUNDLES = 2**12  # of them; the standard error of a figure is then known to a hundredth
_NORMAL = NormalDist()


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
        if not 0.5 <= self.level < 1:
            raise UserError(f"a level of {self.level}: intervals need one from 0.5 to below 1, such as 0.95.")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One run on one set as one model: the mean probability of its fold models, one row per patch.

    Attributes:
        dataset, split: which set.
        id, group: (n,) str; group is empty where the slide is unknown.
        label: (n,) int8.
        probability: (n,) mean over fold models; of "validation", that of the one model that did not train on it.
        threshold: positive from this probability on; chosen on the run's out-of-fold predictions.
    """

    dataset: str
    split: str
    id: NDArray[np.str_]
    label: NDArray[np.int8]
    group: NDArray[np.str_]
    probability: NDArray[np.float64]
    threshold: float

    def __len__(self) -> int:
        return len(self.id)

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Ensemble:
        """The rows of a mask, or those of an index array in its order."""
        columns = {name: getattr(self, name)[rows] for name in ("id", "label", "group", "probability")}
        return replace(self, **columns)


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

    Infinite or undefined z are those of runs without variance: p is 1 for equal ones, else 0.
    """

    first: float
    second: float
    value: float
    standard_error: float
    z: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Pair:
    """Two runs on the same images.

    Attributes:
        first, second: the runs' names.
        differences: figure (`COMPARED`) to difference.
        delong: None where samples are not independent, that is, where slides are known.
    """

    first: str
    second: str
    differences: dict[str, Difference]
    delong: DeLong | None


@dataclass(frozen=True)
class Rank:
    """A run's place among the runs compared; 1 is the best, equals share the better place.

    Attributes:
        value: its rank.
        low, high: the interval of its rank over resamples. It says how far this test set decides the order, and is
            too narrow for runs that are truly equal (Hall and Miller, Annals of Statistics 37, 2009).
        share_first: share of resamples in which no run is better.
    """

    value: int
    low: int
    high: int
    share_first: float


@dataclass(frozen=True)
class Comparison:
    """Runs on the same images, judged on the same resamples.

    Attributes:
        judgements: run to its figures.
        pairs: every two runs, in the order given.
        ranks: figure (`COMPARED`) to run to rank.
    """

    judgements: dict[str, Judgement]
    pairs: tuple[Pair, ...]
    ranks: dict[str, dict[str, Rank]]


@dataclass(frozen=True)
class Rater:
    """One rater, and the run, against the majority of the other raters on the same figures.

    Attributes:
        n, n_positive: figures with a vote of this rater and a majority among the others, and those positive by it.
        n_missing: figures without a vote of this rater, or of any other.
        n_tied: figures left out because the others are split evenly.
        rater, run: figure (`OF_RATERS`) to interval, both against the others' majority.
        difference: run minus rater in balanced accuracy.
    """

    n: int
    n_positive: int
    n_missing: int
    n_tied: int
    rater: dict[str, Interval]
    run: dict[str, Interval]
    difference: Difference


@dataclass(frozen=True)
class RaterView:
    """Scores by how far the raters agree.

    Attributes:
        unanimous, disputed: figures with at least two votes, all equal or not; None where there are none.
        n_unrated: figures with fewer than two votes.
        raters: one per column of votes; the human ceiling.
    """

    unanimous: Judgement | None
    disputed: Judgement | None
    n_unrated: int
    raters: tuple[Rater, ...]


@dataclass(frozen=True)
class Worst:
    """The domain with the worst score.

    Attributes:
        domain: its name.
        value: its score.
        share: share of resamples in which it is the worst.
    """

    domain: str
    value: float
    share: float


@dataclass(frozen=True)
class DomainView:
    """Scores by domain: every domain counts the same, however many patches it has.

    Attributes:
        domains: domain to its figures, resampled within it.
        n_without: patches without a domain; they are in no figure here.
        macro: figure to the mean over the domains in which it exists; resampled over all of them.
        n_domains: figure to the number of those domains.
        worst: figure to the worst of those domains; None where there is none.
    """

    domains: dict[str, Judgement]
    n_without: int
    macro: dict[str, Interval]
    n_domains: dict[str, int]
    worst: dict[str, Worst | None]


def ensemble(predictions: Predictions, dataset: str, split: str) -> Ensemble:
    """A run's mean probability over fold models on one of its sets, in the order of the patch table.

    Raises:
        UserError: if the run has no such set, or its rows are not those of whole fold models.
    """
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    name = f"{dataset}/{split}"
    if not len(part.id):
        held = ", ".join(sorted(f"{a}/{b}" for a, b in predictions.sets())) or "none"
        raise UserError(f"this run has no predictions of {name}; it has: {held}. Run it again with --test {dataset}.")
    # A patch's fold models mostly stand together: a string per run of rows is compared, not one per row.
    starts = np.flatnonzero(np.append(True, part.id[1:] != part.id[:-1]))
    ids, first, row = np.unique(part.id[starts], return_index=True, return_inverse=True)
    first, row = starts[first], np.repeat(row, np.diff(starts, append=len(part.id)))
    n_models = np.bincount(row)
    if np.bincount(row * (part.fold.max() + 1) + part.fold).max() > 1:
        raise UserError(f"predictions of {name}: a patch occurs twice for one fold. predictions.csv is damaged.")
    if n_models.min() < n_models.max():
        lacking = ids[np.argmin(n_models)]
        raise UserError(
            f"predictions of {name}: {lacking} has {n_models.min()} fold models, others have {n_models.max()}. "
            "predictions.csv is damaged."
        )
    if not np.isfinite(part.logit).all():
        raise UserError(f"predictions of {name}: {(~np.isfinite(part.logit)).sum()} are no numbers. The run diverged.")
    for column in ("label", "group"):
        values = getattr(part, column)
        differing = np.flatnonzero(values != values[first][row])
        if len(differing):
            raise UserError(
                f"predictions of {name}: {part.id[differing[0]]} has two {column}s. predictions.csv is damaged."
            )
    in_order = np.argsort(first)
    rows = first[in_order]
    return Ensemble(
        dataset=dataset,
        split=split,
        id=part.id[rows],
        label=part.label[rows],
        group=part.group[rows],
        probability=(np.bincount(row, weights=part.probability) / n_models)[in_order],
        threshold=threshold_of(predictions),
    )


def rows_of(judged: Ensemble, ids: NDArray[np.str_]) -> NDArray[np.intp]:
    """Where each patch of the set stands in a patch table: votes[rows_of(judged, table_ids)] are aligned with it.

    Raises:
        UserError: if the table lacks a patch.
    """
    order = np.argsort(ids, kind="stable")
    place = np.searchsorted(ids, judged.id, sorter=order)
    found = place < np.searchsorted(ids, judged.id, side="right", sorter=order)
    if not found.all():
        missing = judged.id[~found]
        raise UserError(
            f"{len(missing)} of {len(judged)} patches of {judged.dataset}/{judged.split} are not in the patch table "
            f"(first: {missing[0]}). The run and the table are of different data."
        )
    return np.asarray(order[place])


@dataclass(frozen=True, eq=False)
class _Clusters:
    """What is drawn: cluster `index[i]` (of n) brings patch i.

    In a set of very many patches each cluster may be a random bundle of several: a bootstrap of random groups (Wolter,
    Introduction to Variance Estimation, 2007, ch. 2). Bundles of independent clusters are as independent, so intervals
    are as wide, without a million draws per resample.

    Attributes:
        index: (patches,) cluster.
        n: number of clusters drawn.
        unit: what a cluster is, before bundling.
        n_units: how many of those there are.
        n_alone: patches that are clusters of their own for want of a slide.
    """

    index: NDArray[np.intp]
    n: int
    unit: str
    n_units: int
    n_alone: int

    @property
    def independent(self) -> bool:
        return self.n_units == len(self.index)


def _clusters(group: NDArray[np.str_]) -> _Clusters:
    known = group != ""
    names, index = np.unique(group, return_inverse=True)
    index = index - (len(names) > 0 and names[0] == "")  # the empty name sorts first
    n_slides, n_alone = len(names) - int(not known.all()), int((~known).sum())
    index[~known] = n_slides + np.arange(n_alone)
    n = n_slides + n_alone
    n_drawn = min(n, _BUNDLES) if len(group) > _MANY else n
    if n_drawn < n:
        index = (np.random.default_rng(0).permutation(n) % n_drawn)[index]
    return _Clusters(index, n_drawn, SLIDE if known.any() else SAMPLE, n, n_alone if known.any() else 0)


@dataclass(frozen=True, eq=False)
class _Resampled:
    """Figures of R models: as they are, on every resample, and without each cluster in turn.

    Attributes:
        value: name to (R,).
        drawn: name to (R, replicates).
        without: name to (R, clusters); (R, 0) where there are very many clusters.
    """

    value: dict[str, NDArray[np.float64]]
    drawn: dict[str, NDArray[np.float64]]
    without: dict[str, NDArray[np.float64]]


def _resample(tallies: Sequence[Tally], n_clusters: int, how: Resampling, names: Collection[str] = NAMES) -> _Resampled:
    def figures(blocks: Iterable[NDArray[np.intp]]) -> dict[str, NDArray[np.float64]]:
        parts = [[resampled_scores(counted, block, names=names) for counted in tallies] for block in blocks]
        none = np.empty((len(tallies), 0))
        return {
            name: np.concatenate([none, *(np.stack([found[name] for found in part]) for part in parts)], axis=1)
            for name in names
        }

    whole = figures([np.ones((1, n_clusters), dtype=np.intp)])
    value = {name: values[:, 0] for name, values in whole.items()}
    return _Resampled(value, figures(_draws(n_clusters, how)), figures(_left_out(n_clusters)))


def _draws(n_clusters: int, how: Resampling) -> Iterator[NDArray[np.intp]]:
    """Blocks of (b, n_clusters) counts: n_clusters draws with replacement, how.replicates times."""
    rng = np.random.default_rng(how.seed)
    step = max(1, _BLOCK // max(1, n_clusters))
    for start in range(0, how.replicates, step):
        b = min(step, how.replicates - start)
        drawn = rng.integers(0, max(1, n_clusters), size=(b, n_clusters)) + n_clusters * np.arange(b)[:, None]
        yield np.bincount(drawn.ravel(), minlength=b * n_clusters).reshape(b, n_clusters)


def _left_out(n_clusters: int) -> Iterator[NDArray[np.intp]]:
    """Blocks of (b, n_clusters) counts: all clusters but one, each in turn."""
    if n_clusters > _MOST_LEFT_OUT:
        return
    step = max(1, _BLOCK // max(1, n_clusters))
    for start in range(0, n_clusters, step):
        b = min(step, n_clusters - start)
        count = np.ones((b, n_clusters), dtype=np.intp)
        count[np.arange(b), start + np.arange(b)] = 0
        yield count


@dataclass(frozen=True, eq=False)
class _Spread:
    """How a figure scatters over resamples, and how far that scatter is to be trusted.

    The interval is that of percentiles, further out: as far as Student's t with `freedom` degrees of freedom lies
    beyond the normal, times `ratio`. That is the percentile interval expanded for small samples (Hesterberg, The
    American Statistician 69, 2015), here for clusters of unequal weight. The jackknife that leaves out each cluster in
    turn (Efron and Stein, Annals of Statistics 9, 1981) gives both: `ratio` is its standard error over that of the
    resamples, which few clusters make too small, and `freedom` is Satterthwaite's for a sum of unequal squares
    (Biometrics Bulletin 2, 1946; for clusters Imbens and Kolesar, Review of Economics and Statistics 98, 2016). With
    equal clusters `freedom` is their number less one; with one heavy slide among light ones it is hardly more than one.
    """

    value: float
    drawn: NDArray[np.float64]  # (r,) sorted, without undefined ones
    n_undefined: int
    ratio: float
    freedom: float
    usable: bool

    def at(self, level: float) -> tuple[float, float]:
        """The interval of that level; NaN where there is none. Beyond all resamples the normal tail goes on."""
        if not self.usable:
            return math.nan, math.nan
        z = self.ratio * _to_t(_NORMAL.inv_cdf((1 + level) / 2), self.freedom)
        share = _NORMAL.cdf(-z)
        low, high = (float(end) for end in np.quantile(self.drawn, [share, 1 - share]))
        if share * len(self.drawn) < 1:
            reach = z * float(self.drawn.std())
            low, high = min(low, self.value - reach), max(high, self.value + reach)
        return low, high

    def p_of(self, null: float) -> float:
        """One minus the level of the interval that ends at `null`."""
        if not self.usable:
            return math.nan
        below, above = float((self.drawn < null).mean()), float((self.drawn > null).mean())
        beyond = min(below, above) + (1 - below - above) / 2
        z = -_NORMAL.inv_cdf(min(0.5, max(beyond, 0.5 / len(self.drawn))))
        if beyond * len(self.drawn) < 1:
            z = max(z, abs(self.value - null) / float(self.drawn.std()))
        return math.erfc(_to_z(z / self.ratio, self.freedom) / math.sqrt(2))


def _spread(value: float, drawn: NDArray[np.float64], without: NDArray[np.float64], n_clusters: int) -> _Spread:
    """Of (r,) figures of resamples and (k,) figures without each cluster, which may be (0,) for very many clusters."""
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
        moved = (without - without.mean()) ** 2
        if moved.any():
            error = math.sqrt(float(moved.sum()) * (n_clusters - 1) / n_clusters)
            ratio = max(1.0, error / float(defined.std()))
            share = moved / moved.sum()
            freedom = min(freedom, max(1.0, 3 / float((share**2).sum()) - 1))  # 3: the kurtosis of a normal
    return _Spread(value, defined, len(drawn) - len(defined), ratio, freedom, usable)


def _to_t(z: float, freedom: float) -> float:
    """The quantile of Student's t at the level of a normal quantile.

    Wallace, Annals of Mathematical Statistics 30, 1959; at 95 % it is 0.1 % too large with 7 degrees of freedom, 1 %
    with 3.
    """
    stretched = z * (8 * freedom + 3) / (8 * freedom + 1)
    return math.copysign(math.sqrt(freedom * math.expm1(stretched**2 / freedom)), z)


def _to_z(t: float, freedom: float) -> float:
    """The inverse of `_to_t`."""
    return math.copysign(math.sqrt(freedom * math.log1p(t**2 / freedom)), t) * (8 * freedom + 1) / (8 * freedom + 3)


def _interval(name: str, spread: _Spread, how: Resampling) -> Interval:
    low, high = spread.at(how.level)
    if name in _UPWARD:
        low, high = min(low, 2 * spread.value - high), max(high, 2 * spread.value - low)
    low, high = np.clip([low, high], -1 if name == "mcc" else 0, 1).tolist()
    return Interval(spread.value, low, high, spread.n_undefined)


def _intervals(resampled: _Resampled, model: int, n_clusters: int, how: Resampling) -> dict[str, Interval]:
    return {
        name: _interval(
            name,
            _spread(float(value[model]), resampled.drawn[name][model], resampled.without[name][model], n_clusters),
            how,
        )
        for name, value in resampled.value.items()
    }


def _difference(
    name: str, resampled: _Resampled, first: int, second: int, n_clusters: int, how: Resampling
) -> Difference:
    def less(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(values[first] - values[second])

    value = float(less(resampled.value[name]))
    spread = _spread(value, less(resampled.drawn[name]), less(resampled.without[name]), n_clusters)
    if value == 0 and not spread.drawn.any():
        return Difference(0.0, 0.0, 0.0, 1.0, math.nan, spread.n_undefined)  # the two never differ
    low, high = np.clip(spread.at(how.level), -1, 1).tolist()
    return Difference(value, low, high, spread.p_of(0.0), math.nan, spread.n_undefined)


def judge(judged: Ensemble, *, how: Resampling = Resampling()) -> Judgement:
    """Every figure of one run on one set, each with its interval.

    Args:
        judged: the run on the set.
        how: of the resampling.
    """
    clusters = _clusters(judged.group)
    resampled = _resample([_tally(judged, clusters)], clusters.n, how)
    return _judgement(judged, clusters, _intervals(resampled, 0, clusters.n, how), how)


def evaluate(predictions: Predictions, *, how: Resampling = Resampling()) -> RunMetrics:
    """Compute the figures of a run from its predictions: those that metrics.json holds.

    Args:
        predictions: all of the run's.
        how: of the resampling.
    """
    sets = {}
    for dataset, split in predictions.sets():
        whole = ensemble(predictions, dataset, split)
        sets[f"{dataset}/{split}"] = SetMetrics(
            n=len(whole),
            n_positive=int((whole.label == 1).sum()),
            folds=fold_figures(predictions, dataset, split),
            ensemble=judge(whole, how=how) if split != VALIDATION else None,
        )
    return RunMetrics(threshold_of(predictions), sets)


def fold_figures(predictions: Predictions, dataset: str, split: str) -> dict[str, FoldFigure]:
    """Compute every figure of every fold model on one set, at threshold 0.5 (the paper's view)."""
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    per_fold = [
        scores(part.label[part.fold == fold], part.probability[part.fold == fold]) for fold in np.unique(part.fold)
    ]
    values = {name: [figures[name] for figures in per_fold] for name in NAMES}
    return {name: FoldFigure(float(np.mean(v)), float(np.std(v)), tuple(v)) for name, v in values.items()}


def _tally(judged: Ensemble, clusters: _Clusters) -> Tally:
    return tally(
        judged.label,
        judged.probability,
        cluster=clusters.index,
        n_clusters=clusters.n,
        threshold=judged.threshold,
    )


def _judgement(judged: Ensemble, clusters: _Clusters, figures: dict[str, Interval], how: Resampling) -> Judgement:
    return Judgement(
        n=len(judged),
        n_positive=int((judged.label == 1).sum()),
        unit=clusters.unit,
        n_clusters=clusters.n_units,
        n_alone=clusters.n_alone,
        threshold=judged.threshold,
        level=how.level,
        replicates=how.replicates,
        figures=figures,
    )


def compare(runs: Mapping[str, Ensemble], *, how: Resampling = Resampling()) -> Comparison:
    """Runs on the same images: their figures, every difference with interval and p-value, and their ranks.

    Args:
        runs: name to run. Rows may come in any order; they are matched by id.
        how: of the resampling; all runs share the resamples.

    Raises:
        UserError: if there is no run, or the runs' sets, patches, labels or slides differ.
    """
    names = list(runs)
    matched = _matched(runs)
    first = matched[0]
    clusters = _clusters(first.group)
    resampled = _resample([_tally(judged, clusters) for judged in matched], clusters.n, how)
    judgements = {
        name: _judgement(judged, clusters, _intervals(resampled, model, clusters.n, how), how)
        for model, (name, judged) in enumerate(zip(names, matched, strict=True))
    }
    pairs = list(combinations(range(len(names)), 2))
    differences = {
        name: _adjusted([_difference(name, resampled, a, b, clusters.n, how) for a, b in pairs]) for name in COMPARED
    }
    tests: Sequence[DeLong | None] = [None] * len(pairs)
    if clusters.independent:
        tests = _delong_tests(first.label, np.stack([judged.probability for judged in matched]), pairs)
    return Comparison(
        judgements=judgements,
        pairs=tuple(
            Pair(names[a], names[b], {name: differences[name][k] for name in COMPARED}, tests[k])
            for k, (a, b) in enumerate(pairs)
        ),
        ranks={
            name: dict(zip(names, _ranks(resampled.value[name], resampled.drawn[name], how.level), strict=True))
            for name in COMPARED
        },
    )


def _matched(runs: Mapping[str, Ensemble]) -> list[Ensemble]:
    """The runs with their rows in the order of the first."""
    if not runs:
        raise UserError("no runs to compare. Run fm-probe or fm-finetune first.")
    (name, first), *others = runs.items()
    order = np.argsort(first.id, kind="stable")
    matched = [first]
    for other_name, other in others:
        if (first.dataset, first.split) != (other.dataset, other.split):
            raise UserError(
                f"{name} is judged on {first.dataset}/{first.split}, {other_name} on {other.dataset}/{other.split}: "
                "only runs on the same set can be compared."
            )
        only_first, only_other = np.setdiff1d(first.id, other.id), np.setdiff1d(other.id, first.id)
        if len(only_first) or len(only_other):
            said = [
                f"{len(ids)} only in {run} (first: {ids[0]})"
                for run, ids in ((name, only_first), (other_name, only_other))
                if len(ids)
            ]
            raise UserError(
                f"{name} and {other_name} are judged on different patches of {first.dataset}: {', '.join(said)}. "
                "Run both on the same data."
            )
        rows = np.empty(len(first), dtype=np.intp)
        rows[order] = np.argsort(other.id, kind="stable")
        other = other.select(rows)
        for column, plural in (("label", "labels"), ("group", "slides")):
            mine, theirs = getattr(first, column), getattr(other, column)
            differing = np.flatnonzero(mine != theirs)
            if len(differing):
                at = differing[0]
                raise UserError(
                    f"{name} and {other_name} have different {plural} for {len(differing)} patches of {first.dataset} "
                    f"(first: {first.id[at]}, {mine[at]!s} and {theirs[at]!s}). Run both on the same data."
                )
        matched.append(other)
    return matched


def _adjusted(differences: list[Difference]) -> list[Difference]:
    adjusted = holm([difference.p for difference in differences])
    return [replace(one, p_holm=float(p)) for one, p in zip(differences, adjusted, strict=True)]


def holm(p: ArrayLike) -> NDArray[np.float64]:
    """P-values adjusted for their number (Holm, Scandinavian Journal of Statistics 6, 1979).

    Rejecting those below alpha keeps the chance of any false rejection below alpha, whatever their dependence.

    Args:
        p: (m,) p-values; NaN is no test and counts for none.

    Returns:
        (m,) adjusted, at most 1; NaN stays.
    """
    raw = np.asarray(p, dtype=np.float64)
    adjusted = np.full(raw.shape, np.nan)
    tests = np.flatnonzero(~np.isnan(raw))
    ascending = tests[np.argsort(raw[tests], kind="stable")]
    scaled = raw[ascending] * np.arange(len(ascending), 0, -1)
    adjusted[ascending] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted


def delong(label: ArrayLike, score: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """AUROCs on the same independent samples, and their covariance, in O(n log n) by mid-ranks.

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
    among_all = np.stack([_mid_ranks(row) for row in scores])
    of_positives = (among_all[:, y] - np.stack([_mid_ranks(row[y]) for row in scores])) / n_negative
    of_negatives = 1 - (among_all[:, ~y] - np.stack([_mid_ranks(row[~y]) for row in scores])) / n_positive
    covariance = np.cov(of_positives) / n_positive + np.cov(of_negatives) / n_negative
    return of_positives.mean(axis=1), np.atleast_2d(covariance)


def _mid_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n,) ranks from 1; equal values share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


def _delong_tests(
    label: NDArray[np.int8], score: NDArray[np.float64], pairs: Sequence[tuple[int, int]]
) -> Sequence[DeLong | None]:
    if min((label == 1).sum(), (label == 0).sum()) < 2:
        return [None] * len(pairs)
    area, covariance = delong(label, score)
    found = []
    for a, b in pairs:
        value = float(area[a] - area[b])
        variance = float(covariance[a, a] + covariance[b, b] - 2 * covariance[a, b])
        rounding = 1e-12 * float(covariance[a, a] + covariance[b, b])
        error = math.sqrt(variance) if variance > rounding else 0.0
        z = value / error if error else math.copysign(math.inf, value) if value else 0.0
        p = math.erfc(abs(z) / math.sqrt(2))
        found.append(DeLong(float(area[a]), float(area[b]), value, error, z, p, math.nan))
    adjusted = holm([test.p for test in found])
    return [replace(test, p_holm=float(p)) for test, p in zip(found, adjusted, strict=True)]


def _ranks(value: NDArray[np.float64], drawn: NDArray[np.float64], level: float) -> list[Rank]:
    """Of (R,) figures and their (R, r) resamples, the larger the better."""
    defined = drawn[:, np.isfinite(drawn).all(axis=0)]
    ranked = _places(defined)
    tail = (1 - level) / 2
    ranks = []
    for model, place in enumerate(_places(value[:, None])[:, 0]):
        if not defined.shape[1]:
            ranks.append(Rank(int(place), 1, len(value), math.nan))
            continue
        low = np.quantile(ranked[model], tail, method="inverted_cdf")
        high = np.quantile(ranked[model], 1 - tail, method="inverted_cdf")
        ranks.append(Rank(int(place), int(low), int(high), float((ranked[model] == 1).mean())))
    return ranks


def _places(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """(R, r) ranks within each column from 1, the largest first; equals share the better place."""
    return np.stack([1 + (values > row).sum(axis=0) for row in values])


def by_agreement(judged: Ensemble, votes: NDArray[np.integer], *, how: Resampling = Resampling()) -> RaterView:
    """Scores on figures that the raters agreed on and on those they did not, and the raters as the human ceiling.

    A rater is judged against the majority of the others, never against one that contains the rater's own vote; the run
    is judged beside, on the same figures by the same majority. Where the others are evenly split there is no majority.

    Args:
        judged: the run on the set.
        votes: (n, raters), 1 positive, 0 negative, -1 missing, aligned with the set (see `rows_of`).
        how: of the resampling; p-values of the differences are adjusted over raters.

    Raises:
        ValueError: if votes are not (n, raters), or hold other values.
        UserError: if there are fewer than two raters.
    """
    votes = np.asarray(votes)
    if votes.ndim != 2 or len(votes) != len(judged):
        raise ValueError(f"votes must be ({len(judged)}, raters), got shape {votes.shape}")
    if not np.isin(votes, (0, 1, MISSING_VOTE)).all():
        raise ValueError(f"votes must be 0, 1 or {MISSING_VOTE}, found {sorted(set(votes.ravel().tolist()))}")
    if votes.shape[1] < 2:
        raise UserError(
            f"{judged.dataset} has the votes of {votes.shape[1]} raters; agreement needs two. It has no rater view."
        )
    given = votes != MISSING_VOTE
    n_votes, n_for = given.sum(axis=1), (votes == 1).sum(axis=1)
    agreed = (n_for == 0) | (n_for == n_votes)
    parts = [judged.select((n_votes >= 2) & rows) for rows in (agreed, ~agreed)]
    unanimous, disputed = (judge(part, how=how) if len(part) else None for part in parts)
    raters = [
        _rater(judged, votes[:, k], n_votes - given[:, k], n_for - (votes[:, k] == 1), how)
        for k in range(votes.shape[1])
    ]
    adjusted = _adjusted([rater.difference for rater in raters])
    return RaterView(
        unanimous=unanimous,
        disputed=disputed,
        n_unrated=int((n_votes < 2).sum()),
        raters=tuple(replace(rater, difference=one) for rater, one in zip(raters, adjusted, strict=True)),
    )


def _rater(
    judged: Ensemble,
    vote: NDArray[np.integer],
    n_others: NDArray[np.integer],
    n_others_for: NDArray[np.integer],
    how: Resampling,
) -> Rater:
    missing = (vote == MISSING_VOTE) | (n_others == 0)
    tied = ~missing & (2 * n_others_for == n_others)
    rows = ~(missing | tied)
    part = replace(judged.select(rows), label=(2 * n_others_for > n_others)[rows].astype(np.int8))
    clusters = _clusters(part.group)
    alone = replace(part, probability=vote[rows].astype(np.float64), threshold=0.5)
    tallies = [_tally(alone, clusters), _tally(part, clusters)]
    resampled = _resample(tallies, clusters.n, how, OF_RATERS)
    return Rater(
        n=len(part),
        n_positive=int(part.label.sum()),
        n_missing=int(missing.sum()),
        n_tied=int(tied.sum()),
        rater=_intervals(resampled, 0, clusters.n, how),
        run=_intervals(resampled, 1, clusters.n, how),
        difference=_difference("balanced_accuracy", resampled, 1, 0, clusters.n, how),
    )


def by_domain(judged: Ensemble, domain: NDArray[np.str_], *, how: Resampling = Resampling()) -> DomainView:
    """Every figure in every domain (tumour type, scanner, centre), their mean over domains, and the worst domain.

    Args:
        judged: the run on the set.
        domain: (n,) str, aligned with the set (see `rows_of`); empty where unknown.
        how: of the resampling.

    Raises:
        ValueError: if domain is not (n,).
        UserError: if no patch has a domain.
    """
    domain = np.asarray(domain)
    if domain.shape != (len(judged),):
        raise ValueError(f"domain must be ({len(judged)},), got shape {domain.shape}")
    known = domain != ""
    if not known.any():
        raise UserError(f"{judged.dataset} has no domains (tumour type, scanner, centre). It has no domain view.")
    names = np.unique(domain[known]).tolist()
    parts = [judged.select(domain == name) for name in names]
    # For the mean, slides are drawn from the whole set: a slide may lie in two domains.
    clusters = _clusters(judged.group[known])
    tallies = [
        tally(
            part.label,
            part.probability,
            cluster=clusters.index[domain[known] == name],
            n_clusters=clusters.n,
            threshold=part.threshold,
        )
        for name, part in zip(names, parts, strict=True)
    ]
    resampled = _resample(tallies, clusters.n, how)
    macro: dict[str, Interval] = {}
    n_domains: dict[str, int] = {}
    worst: dict[str, Worst | None] = {}
    for name, value in resampled.value.items():
        rows = np.flatnonzero(np.isfinite(value))
        n_domains[name] = len(rows)
        drawn, without = resampled.drawn[name][rows], resampled.without[name][rows]
        if not len(rows):
            macro[name], worst[name] = Interval(math.nan, math.nan, math.nan, how.replicates), None
            continue
        spread = _spread(float(value[rows].mean()), drawn.mean(axis=0), without.mean(axis=0), clusters.n)
        macro[name] = _interval(name, spread, how)
        worst[name] = _worst(name, [names[row] for row in rows], value[rows], drawn)
    return DomainView(
        domains={name: judge(part, how=how) for name, part in zip(names, parts, strict=True)},
        n_without=int((~known).sum()),
        macro=macro,
        n_domains=n_domains,
        worst=worst,
    )


def _worst(name: str, domains: list[str], value: NDArray[np.float64], drawn: NDArray[np.float64]) -> Worst:
    sign = -1 if name in SMALLER_IS_BETTER else 1
    at = int(np.argmin(sign * value))
    defined = drawn[:, np.isfinite(drawn).all(axis=0)]
    share = float((np.argmin(sign * defined, axis=0) == at).mean()) if defined.size else math.nan
    return Worst(domains[at], float(value[at]), share)
