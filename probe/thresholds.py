"""Does a run's threshold hold in other domains, and what would it take to choose a better one there?

A threshold is chosen on the slides that a run trained on. In another domain (tumour type, scanner, centre) the same
run may need another. Here is what the run's own threshold gives in each domain, beside the best one that could have
been chosen there, and beside thresholds chosen on a few slides of the domain.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from probe.edge import held
from probe.ensembles import Ensemble
from probe.metrics import Interval, best_threshold, confusion_figures
from probe.resample import Clusters, Resampling, Sums, intervals, resample, sums_by_cluster

THRESHOLD_FIGURES = ("balanced_accuracy", "sensitivity", "specificity")
_CELLS, _FEWEST_VALUES = 2**22, 64  # of a table of counts; in larger ones probabilities are rounded to quantiles
_DRAWS = 200  # of slides, for each point of a learning curve
_TAIL = 0.1  # of the draws lie below the low end of a point, and as many above the high one


@dataclass(frozen=True)
class Recalibration:
    """Balanced accuracy at a threshold chosen on a few slides of a domain, judged on its other slides.

    Attributes:
        n_slides: that the threshold is chosen on. If they hold one class only, the run's own threshold stays.
        balanced_accuracy: mean over draws of slides.
        low, high: a tenth of the draws lie below, a tenth above.
        own: mean of the balanced accuracy that the run's own threshold has on the same other slides.
    """

    n_slides: int
    balanced_accuracy: float
    low: float
    high: float
    own: float


@dataclass(frozen=True)
class DomainThreshold:
    """What thresholds give in one domain.

    Attributes:
        n, n_positive, n_clusters: patches, those of class 1, and slides (patches where slides are unknown).
        own: figure (`THRESHOLD_FIGURES`) to interval, at the run's own threshold.
        oracle_threshold: the best threshold on these very patches, the mean over trainings; NaN if a class is absent.
        oracle: figure to interval at that threshold. Optimistic: it was chosen on the patches it is judged on.
        at_specificity: sensitivity at the lowest threshold whose specificity is at least the one asked for; chosen
            again on every resample.
        recalibration: by number of slides, up to half of the domain's. Made on this set: it tells what calibration
            would need, not how good the run is.
        n_slides_needed: the fewest slides from which on, along that curve, a threshold chosen on them is better on
            average than the run's own; None if there are none.
    """

    n: int
    n_positive: int
    n_clusters: int
    own: dict[str, Interval]
    oracle_threshold: float
    oracle: dict[str, Interval]
    at_specificity: Interval
    recalibration: tuple[Recalibration, ...]
    n_slides_needed: int | None


@dataclass(frozen=True)
class ThresholdView:
    """What thresholds give in every domain.

    Attributes:
        specificity: the one that `at_specificity` holds fixed.
        domains: name to what thresholds give there.
        all: the same on all patches of the set together.
    """

    specificity: float
    domains: dict[str, DomainThreshold]
    all: DomainThreshold


def by_threshold(
    ensemble: Ensemble, domain: NDArray[np.str_], *, specificity: float = 0.9, resampling: Resampling = Resampling()
) -> ThresholdView:
    """Judge a run's threshold in every domain.

    Args:
        ensemble: the run on the set.
        domain: (n,) str, aligned with the set (see `probe.ensembles.rows_of`); empty where unknown.
        specificity: to hold fixed.
        resampling: how resamples are drawn; its seed also draws the slides of the learning curves.

    Raises:
        ValueError: if domain is not (n,).
        UserError: a specificity that is not between 0 and 1.
    """
    domain = np.asarray(domain)
    if domain.shape != (len(ensemble),):
        raise ValueError(f"domain must be ({len(ensemble)},), got shape {domain.shape}")
    if not 0 < specificity < 1:
        raise UserError(f"`specificity={specificity}`: expected a share between 0 and 1, such as 0.9.")
    names = sorted(set(domain.tolist()) - {""})
    return ThresholdView(
        specificity=specificity,
        domains={name: _judge(ensemble.select(domain == name), specificity, resampling) for name in names},
        all=_judge(ensemble, specificity, resampling),
    )


def _judge(ensemble: Ensemble, specificity: float, resampling: Resampling) -> DomainThreshold:
    clusters, y = ensemble.clusters, ensemble.label == 1
    both = bool(y.any() and not y.all())
    best = [best_threshold(y, p) if both else np.nan for p in ensemble.positive]
    own = [_at(y, p >= t, clusters) for p, t in zip(ensemble.positive, ensemble.thresholds, strict=True)]
    tuned = [_at(y, p >= t, clusters) for p, t in zip(ensemble.positive, best, strict=True)]
    resampled = resample([own, tuned], clusters, resampling)
    ranked = [_Ranked.of(y, p, clusters) for p in ensemble.positive]
    fixed = resample([[_AtSpecificity(one, specificity) for one in ranked]], clusters, resampling)
    classes = held(ensemble.label, clusters.index, ensemble.by_training)
    curve = _learning_curve(ranked, ensemble.thresholds, clusters, resampling.seed) if both else ()
    return DomainThreshold(
        n=len(ensemble),
        n_positive=int(y.sum()),
        n_clusters=clusters.n_units,
        own=intervals(resampled, 0, classes=classes),
        oracle_threshold=float(np.mean(best)),
        oracle=intervals(resampled, 1, classes=classes),
        at_specificity=intervals(fixed, 0, classes=classes)["sensitivity"],
        recalibration=curve,
        n_slides_needed=_fewest(curve),
    )


def _at(y: NDArray[np.bool_], predicted: NDArray[np.bool_], clusters: Clusters) -> Sums:
    columns = np.stack([y, ~y, y & predicted, ~y & ~predicted], axis=1).astype(np.float64)

    def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        positive, negative, tp, tn = sums.T
        found = confusion_figures(positive, negative, tp=tp, tn=tn)
        return {name: found[name] for name in THRESHOLD_FIGURES}

    return Sums(sums_by_cluster(columns, clusters), figures)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """Patches of each class by cluster and by the distinct probabilities of a set, ascending.

    Attributes:
        value: (g,) distinct probabilities.
        negatives, positives: (g + 1, k) of each cluster, how many lie below the j-th value; all of them in the last
            row. Whole numbers, which float32 holds exactly.
    """

    value: NDArray[np.float64]
    negatives: NDArray[np.float32]
    positives: NDArray[np.float32]

    @classmethod
    def of(cls, y: NDArray[np.bool_], probability: NDArray[np.float64], clusters: Clusters) -> _Ranked:
        most = max(_FEWEST_VALUES, _CELLS // max(1, clusters.n))
        value = np.unique(probability)
        if len(value) > most:
            value = np.unique(np.quantile(value, np.linspace(0, 1, most)))
        place = np.searchsorted(value, probability, side="right")  # below every value from this one on

        def below(of_class: NDArray[np.bool_]) -> NDArray[np.float32]:
            cell = place[of_class] * clusters.n + clusters.index[of_class]
            count = np.bincount(cell, minlength=(len(value) + 1) * clusters.n).astype(np.float32)
            return np.cumsum(count.reshape(-1, clusters.n), axis=0)

        return cls(value, below(~y), below(y))


@dataclass(frozen=True, eq=False)
class _AtSpecificity:
    """The sensitivity at the lowest threshold that has a specificity: a statistic (`probe.resample.Statistic`)."""

    ranked: _Ranked
    specificity: float

    def __call__(self, count: NDArray[np.float64], /) -> dict[str, NDArray[np.float64]]:
        times = count.astype(np.float32)
        n_negative, n_positive = (times @ counts[-1] for counts in (self.ranked.negatives, self.ranked.positives))
        wanted = self.specificity * n_negative.astype(np.float64) - 1e-6  # less what rounding may add
        low, high = np.zeros(len(count), dtype=np.intp), np.full(len(count), len(self.ranked.value))
        while (low < high).any():  # the first value with so many negatives below it, by bisection
            middle = (low + high) // 2
            enough = np.einsum("bk,bk->b", times, self.ranked.negatives[middle]) >= wanted
            low, high = np.where(enough, low, middle + 1), np.where(enough, middle, high)
        missed = np.einsum("bk,bk->b", times, self.ranked.positives[low])
        with np.errstate(divide="ignore", invalid="ignore"):  # an absent class
            found = np.where(n_negative > 0, 1 - missed.astype(np.float64) / n_positive, np.nan)
        return {"sensitivity": found}


def _learning_curve(
    ranked: list[_Ranked], thresholds: NDArray[np.float64], clusters: Clusters, seed: int
) -> tuple[Recalibration, ...]:
    """Choose thresholds on 1, 2, 4, ... slides, up to half of them, and judge each on all others."""
    if clusters.n < clusters.n_units:
        return ()  # so many that bundles of them were drawn
    rng = np.random.default_rng(seed)
    place = np.argsort(np.argsort(rng.random((_DRAWS, clusters.n)), axis=1), axis=1)  # of a slide, in each draw
    points = []
    n_slides = 1
    while n_slides <= clusters.n // 2:
        chosen = (place < n_slides).astype(np.float32)
        of_trainings = [_on_others(one, float(t), chosen) for one, t in zip(ranked, thresholds, strict=True)]
        tuned, own = np.mean(of_trainings, axis=0)
        judged = np.isfinite(tuned)  # the others hold both classes
        if judged.any():
            low, high = np.quantile(tuned[judged], [_TAIL, 1 - _TAIL]).tolist()
            means = float(tuned[judged].mean()), float(own[judged].mean())
            points.append(Recalibration(n_slides, means[0], low, high, own=means[1]))
        n_slides *= 2
    return tuple(points)


def _on_others(ranked: _Ranked, own: float, chosen: NDArray[np.float32]) -> NDArray[np.float64]:
    """Judge a threshold chosen on the (d, k) clusters that are 1, and the run's own, on those that are 0.

    Returns:
        (2, d) balanced accuracy; NaN where the others lack a class.
    """
    value, d = ranked.value, np.arange(len(chosen))
    n_negative, n_positive = (
        (chosen @ counts[-1]).astype(np.float64) for counts in (ranked.negatives, ranked.positives)
    )
    # The best threshold is always just below a positive.
    hits = np.flatnonzero(np.diff(ranked.positives.sum(axis=1)) > 0)
    rejected, missed, still = (
        chosen @ counts.T for counts in (ranked.negatives[hits], ranked.positives[hits], ranked.positives[hits + 1])
    )  # (d, hits)
    # Balanced accuracy times 2 n+ n-, in whole numbers, so that equals are equal: of those the first is taken.
    score = n_positive[:, None] * rejected + n_negative[:, None] * (n_positive[:, None] - missed)
    best = hits[np.argmax(np.where(still > missed, score, -1), axis=1)]
    both = ranked.negatives + ranked.positives
    n_below = np.einsum("dk,dk->d", chosen, both[best])
    # The next value below it that a chosen patch has: the last with fewer patches below it.
    low, high = np.zeros(len(d), dtype=np.intp), best
    while (low < high).any():
        middle = (low + high + 1) // 2
        fewer = np.einsum("dk,dk->d", chosen, both[middle]) < n_below
        low, high = np.where(fewer, middle, low), np.where(fewer, high, middle - 1)
    threshold = (value[np.where(n_below > 0, low, best)] + value[best]) / 2
    threshold[n_negative * n_positive == 0] = own
    found = []
    for at in (np.searchsorted(value, threshold), np.full(len(d), np.searchsorted(value, own))):
        n_rejected, n_missed = (
            counts[at].sum(axis=1, dtype=np.float64) - np.einsum("dk,dk->d", chosen, counts[at])
            for counts in (ranked.negatives, ranked.positives)
        )
        with np.errstate(divide="ignore", invalid="ignore"):  # others without one of the classes
            specificity = n_rejected / (ranked.negatives[-1].sum() - n_negative)
            sensitivity = 1 - n_missed / (ranked.positives[-1].sum() - n_positive)
            found.append((sensitivity + specificity) / 2)
    return np.stack(found)


def _fewest(curve: tuple[Recalibration, ...]) -> int | None:
    fewest = None
    for point in reversed(curve):
        if point.balanced_accuracy <= point.own:
            break
        fewest = point.n_slides
    return fewest
