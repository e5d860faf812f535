"""What are the figures of thousands of resamples of one set? Counted, not copied: a cluster drawn twice counts twice.

Confusion counts, log loss, Brier and calibration are sums over patches: one matrix product gives those of many
resamples. AUROC and average precision are sums over the scores of the positives, which are sorted once: of few clusters
their cumulative counts are one more product, of many they are added up patch by patch. Of more than two classes that is
done for each class against the rest.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probe.metrics import (
    ECE_BINS,
    THRESHOLD,
    auroc,
    average_precision,
    calibration_bin,
    confusion_figures,
    figure_names,
    log_losses,
    matrix_figures,
    predicted_classes,
    squared_errors,
)

_BLOCK = 2**19  # numbers worked on at a time: a few megabytes, which stay near the processor
_MANY = 2**17  # samples: in larger sets, scores are rounded to quantiles of the positives' scores before ranking
_STEPS = 2**11  # quantiles: at a million samples they moved an interval's ends by less than a hundredth of its width
_DENSE = 40  # one multiplication of a matrix product takes a fortieth of a step from patch to patch
_EXACT = 2**24  # float32 holds every whole number up to here
_RANKED = frozenset({"auroc", "average_precision"})


@dataclass(frozen=True, eq=False)
class Tally:
    """Predictions sorted and counted by cluster, once for all resamples. A cluster (slide, patch) is drawn as a whole.

    It is a `probe.resample.Statistic`: called with counts of clusters, it gives the figures.

    With more than `_MANY` samples, ranking all of them per resample would take too long: scores are rounded to
    quantiles first. How far that moves the figures of the whole set is kept, and added to those of every resample.

    Attributes:
        table: (k, c * c + 2 + ECE_BINS) what a cluster adds to each sum: patches by label and predicted class, squared
            errors, log losses, and per calibration bin what was right minus its probability.
        ranks: what AUROC and average precision follow from, of class 1 if there are two, else of every class that the
            set holds; empty where neither is wanted.
        held: (c,) which classes the set holds.
        ordinal: whether kappa's weights are quadratic.
        names: the figures wanted.
    """

    table: NDArray[np.float64]
    ranks: dict[int, _Ranked]
    held: NDArray[np.bool_]
    ordinal: bool
    names: tuple[str, ...]

    def __call__(self, count: NDArray[np.floating[Any]], /) -> dict[str, NDArray[np.float64]]:
        """Compute the figures of many resamples: in resample j, every sample of cluster c occurs `count[j, c]` times.

        Each equals `probe.metrics.scores` of the repeated rows, ties included, but for the rounding of this class.

        Args:
            count: (r, k), 0 or more.

        Returns:
            Name to (r,); NaN in a resample that lacks a class the figure needs (see `probe.metrics.scores`).
        """
        c = len(self.held)
        sums = count @ self.table
        matrix = sums[:, : c * c].reshape(-1, c, c)
        total = matrix.sum(axis=(1, 2))
        with np.errstate(invalid="ignore", divide="ignore"):  # a resample without samples, or without a class
            figures = {
                "brier": sums[:, c * c] / total,
                "log_loss": sums[:, c * c + 1] / total,
                "ece": np.abs(sums[:, c * c + 2 :]).sum(axis=1) / total,
            }
            if c == 2:
                negative, positive = matrix.sum(axis=2).T
                figures |= confusion_figures(positive, negative, tp=matrix[:, 1, 1], tn=matrix[:, 0, 0])
                figures |= self.ranks[1](count, positive, negative) if self.ranks else {}
            else:
                figures |= matrix_figures(matrix, ordinal=self.ordinal, held=self.held)
                figures |= self._ranked(count, matrix.sum(axis=2)) if self.ranks else {}
        return {name: figures[name] for name in self.names}

    def _ranked(
        self, count: NDArray[np.floating[Any]], of_class: NDArray[np.float64]
    ) -> dict[str, NDArray[np.float64]]:
        """Compute AUROC and average precision of every class against the rest, and their means."""
        total = of_class.sum(axis=1)
        each = {k: ranked(count, of_class[:, k], total - of_class[:, k]) for k, ranked in self.ranks.items()}
        absent = np.full(len(count), np.nan)
        found = {}
        for name in _RANKED:
            values = [figures[name] for figures in each.values()]
            found[name] = np.mean(values, axis=0) if len(values) > 1 else absent
            found |= {f"{name} {k}": each[k][name] if k in each else absent for k in range(len(self.held))}
        return found


def tally(
    label: ArrayLike,
    probability: ArrayLike,
    *,
    cluster: NDArray[np.intp],
    n_clusters: int,
    threshold: float = THRESHOLD,
    ordinal: bool = False,
    names: Collection[str] | None = None,
) -> Tally:
    """Count (n,) labels and probabilities by cluster, once for all resamples.

    Args:
        label: (n,) class numbers.
        probability: (n, c) of every class; or (n,) of class 1, of two.
        cluster: (n,) what each sample is drawn with, 0 to n_clusters - 1; `np.arange(n)` where each is drawn alone.
        n_clusters: how many clusters there are; some may be without a sample.
        threshold: of two classes, class 1 is predicted from this probability on.
        ordinal: see `probe.metrics.scores`.
        names: the figures wanted, of `probe.metrics.figure_names`; by default all.
    """
    y = np.asarray(label).astype(np.intp)
    p = np.asarray(probability, dtype=np.float64)
    p = np.stack([1 - p, p], axis=1) if p.ndim == 1 else p
    c = p.shape[1]
    names = figure_names(c) if names is None else tuple(names)
    predicted = predicted_classes(p, threshold)
    table = np.zeros((n_clusters, c * c + 2 + ECE_BINS))
    np.add.at(table, (cluster, y * c + predicted), 1)
    if c == 2:  # of class 1, whatever is predicted
        brier, surest, right = (p[:, 1] - y) ** 2, p[:, 1], y
    else:
        brier, surest, right = squared_errors(y, p), p.max(axis=1), y == predicted
    table[:, c * c] = np.bincount(cluster, weights=brier, minlength=n_clusters)
    table[:, c * c + 1] = np.bincount(cluster, weights=log_losses(y, p), minlength=n_clusters)
    np.add.at(table, (cluster, c * c + 2 + calibration_bin(surest)), right - surest)
    held = np.bincount(y, minlength=c) > 0
    ranks: dict[int, _Ranked] = {}
    if not _RANKED.isdisjoint(name.split()[0] for name in names):
        ranks = {
            k: _ranked(y == k, p[:, k], cluster, n_clusters) for k in ([1] if c == 2 else np.flatnonzero(held).tolist())
        }
    return Tally(table, ranks, held, ordinal, names)


@dataclass(frozen=True, eq=False)
class _Ranked:
    """One class against the rest, ranked.

    Attributes:
        ranks: counts by score.
        rounded_off: figure to what rounding took from it; empty without rounding.
    """

    ranks: _Cumulated | _Sorted
    rounded_off: dict[str, float]

    def __call__(
        self, count: NDArray[np.floating[Any]], positive: NDArray[np.float64], negative: NDArray[np.float64]
    ) -> dict[str, NDArray[np.float64]]:
        """Compute AUROC and average precision, each (b,), of (b, k) resamples and their (b,) patches of either side."""
        won, precision = self.ranks.sums(count)
        return {
            "auroc": won / (positive * negative) + self.rounded_off.get("auroc", 0.0),
            "average_precision": precision / positive + self.rounded_off.get("average_precision", 0.0),
        }


def _ranked(y: NDArray[np.bool_], p: NDArray[np.float64], cluster: NDArray[np.intp], n_clusters: int) -> _Ranked:
    rounded_off = {}
    if len(p) > _MANY:
        quantiles = np.unique(np.quantile(p[y] if y.any() else p, np.linspace(0, 1, _STEPS + 1)))
        exact, p = p, np.searchsorted(quantiles, p).astype(np.float64)
        rounded_off = {
            "auroc": auroc(y, exact) - auroc(y, p),
            "average_precision": average_precision(y, exact) - average_precision(y, p),
        }
    return _Ranked(_ranks(y, p, cluster, n_clusters), rounded_off)


# ------------------------------------------------------------------------------------- AUROC and average precision
#
# Both depend only on how many positives have each of their g distinct scores, and on how many negatives have that score
# and how many a lower one.


def _ranks(
    y: NDArray[np.bool_], p: NDArray[np.float64], cluster: NDArray[np.intp], n_clusters: int
) -> _Cumulated | _Sorted:
    order = np.argsort(p, kind="stable")
    positives, negatives = order[y[order]], order[~y[order]]
    distinct, first = np.unique(p[positives], return_index=True)
    g = len(distinct)
    below, up_to = (np.searchsorted(p[negatives], distinct, side=side) for side in ("left", "right"))
    if n_clusters * g > _DENSE * len(p):
        return _Sorted(cluster[positives], np.append(first, len(positives)), cluster[negatives], below, up_to)
    hits = _by_score(cluster[positives], np.searchsorted(distinct, p[positives]), n_clusters, g)
    true = np.cumsum(hits[:, ::-1], axis=1)[:, ::-1]
    # Negatives with a score of the positives', and those between it and the one below.
    tied = np.searchsorted(distinct, p[negatives], side="right") > np.searchsorted(distinct, p[negatives])
    at = np.searchsorted(distinct, p[negatives])
    equal = _by_score(cluster[negatives][tied], at[tied], n_clusters, g + 1)
    between = _by_score(cluster[negatives][~tied], at[~tied], n_clusters, g + 1)
    n_lower = (np.cumsum(between, axis=1) + np.cumsum(equal, axis=1) - equal)[:, :g]
    retrieved = true + (equal + between).sum(axis=1, keepdims=True) - n_lower
    return _Cumulated(np.concatenate([hits, true, retrieved], axis=1), hits @ (2 * n_lower + equal[:, :g]).T)


def _by_score(cluster: NDArray[np.intp], score: NDArray[np.intp], n_clusters: int, n: int) -> NDArray[np.float64]:
    """Count samples by cluster and score: (k, n)."""
    return np.bincount(cluster * n + score, minlength=n_clusters * n).reshape(n_clusters, n).astype(np.float64)


@dataclass(frozen=True, eq=False)
class _Cumulated:
    """Counts of few clusters by score.

    Attributes:
        table: (k, 3 g) a cluster's positives with each of the g scores, with that score or a higher one, and all its
            samples with that score or a higher one.
        won_twice: (k, k) twice the pairs that the positives of one cluster win against the negatives of another.
    """

    table: NDArray[np.float64]
    won_twice: NDArray[np.float64]

    def sums(self, count: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Add up pairs won, and precision over positives, each (b,), of (b, k) resamples."""
        won, precision = np.empty(len(count)), np.empty(len(count))
        step = max(16, _BLOCK // max(1, self.table.shape[1]))
        for start in range(0, len(count), step):
            rows = slice(start, start + step)
            hits, true, retrieved = np.split(_product(count[rows], self.table), 3, axis=1)
            share = np.divide(true, retrieved, out=np.zeros(true.shape), where=retrieved > 0, dtype=np.float64)
            precision[rows] = np.einsum("bg,bg->b", hits, share)
            won[rows] = np.einsum("bk,bk->b", _product(count[rows], self.won_twice), count[rows]) / 2
        return won, precision


@dataclass(frozen=True, eq=False)
class _Sorted:
    """Samples of many clusters in ascending order of scores.

    Attributes:
        positive: (p,) clusters of the positives.
        first: (g + 1,) the first positive with each of the g scores, and p.
        negative: (q,) clusters of the negatives.
        below, up_to: (g,) how many negatives have a lower score, and how many that score or a lower one.
    """

    positive: NDArray[np.intp]
    first: NDArray[np.intp]
    negative: NDArray[np.intp]
    below: NDArray[np.intp]
    up_to: NDArray[np.intp]

    def sums(self, count: NDArray[np.floating[Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Add up pairs won, and precision over positives, each (b,), of (b, k) resamples."""
        won, precision = np.empty(len(count)), np.empty(len(count))
        n = len(self.positive) + len(self.negative)
        if count.size and float(count.max()) * n < _EXACT:
            count = count.astype(np.float32)
        step = max(16, _BLOCK // max(1, n))
        for start in range(0, len(count), step):
            rows = slice(start, start + step)
            turned = np.ascontiguousarray(count[rows].T)  # adding rows is faster than adding within one
            positives, negatives = _added_up(turned, self.positive), _added_up(turned, self.negative)
            before, lower = positives[self.first], negatives[self.below]
            hits, true = np.diff(before, axis=0), before[-1] - before[:-1]
            retrieved = true + negatives[-1] - lower
            share = np.divide(true, retrieved, out=np.zeros(true.shape), where=retrieved > 0, dtype=np.float64)
            precision[rows] = np.einsum("gb,gb->b", hits, share)
            won[rows] = np.einsum("gb,gb->b", hits, (lower + negatives[self.up_to]) / 2, dtype=np.float64)
        return won, precision


def _added_up(turned: NDArray[np.floating[Any]], cluster: NDArray[np.intp]) -> NDArray[np.floating[Any]]:
    """Add up (k, b) counts over (m,) clusters one after the other: (m + 1, b), from 0 on."""
    total = np.zeros((len(cluster) + 1, turned.shape[1]), dtype=turned.dtype)
    np.cumsum(turned[cluster], axis=0, out=total[1:])
    return total


def _product(count: NDArray[np.floating[Any]], table: NDArray[np.float64]) -> NDArray[np.floating[Any]]:
    """Multiply whole numbers: in float32 where every sum that can occur is a whole number that it holds."""
    if count.size and table.size and float(count.sum(axis=1).max()) * float(table.max()) < _EXACT:
        return count.astype(np.float32) @ table.astype(np.float32)
    return count @ table
