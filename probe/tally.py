"""What are the figures of thousands of resamples of one set? Counted, not copied: a cluster drawn twice counts twice.

Confusion counts, Brier and calibration are sums over patches: one matrix product gives those of many resamples. AUROC
and average precision are cumulative sums of counts in the order of scores, which is sorted once.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from probe.metrics import ECE_BINS, NAMES, THRESHOLD, auroc, average_precision, calibration_bin, confusion_figures

_BLOCK = 2**17  # counts resampled at a time: a megabyte, which stays in the cache
_MANY = 2**17  # samples: in larger sets, scores are rounded to quantiles of the positives' scores before ranking
_STEPS = 2**11  # quantiles: at a million samples they moved an interval's ends by less than a hundredth of its width
_DENSE = 40  # one multiplication of a matrix product takes a fortieth of one step of a gathered sum


@dataclass(frozen=True, eq=False)
class Tally:
    """Predictions sorted and counted by cluster, once for all resamples. A cluster (slide, patch) is drawn as a whole.

    AUROC and average precision depend only on how many positives have each score, and on how many negatives have that
    score or lie between two neighbouring ones. So the g distinct scores of the positives, ascending, cut the negatives
    into 2 g + 1 segments: segment 2 j + 1 is the j-th of those scores itself, segment 2 j what lies between it and the
    one below.

    With more than `_MANY` samples, a walk through all of them per resample would take too long: scores are rounded to
    quantiles first. How far that moves the figures of the whole set is kept, and added to those of every resample.

    Attributes:
        table: (k, 5 + ECE_BINS) what a cluster adds to each sum: positives, negatives, true positives, true negatives,
            squared errors, and label minus probability per calibration bin.
        positives: in the g scores.
        negatives: in the 2 g + 1 segments.
        rounded_off: figure to what rounding took from it; empty without rounding.
        names: the figures wanted.

    It is a `probe.resample.Statistic`: called with counts of clusters, it gives the figures.
    """

    table: NDArray[np.float64]
    positives: _Segments
    negatives: _Segments
    rounded_off: dict[str, float]
    names: tuple[str, ...]

    def __call__(self, count: NDArray[np.floating], /) -> dict[str, NDArray[np.float64]]:
        """Compute the figures of many resamples: in resample j, every sample of cluster c occurs `count[j, c]` times.

        Each equals `probe.metrics.scores` of the repeated rows, ties included, but for the rounding of this class.

        Args:
            count: (r, k), 0 or more.

        Returns:
            Name to (r,); NaN in a resample that lacks a class the figure needs (see `probe.metrics.scores`).
        """
        results = {name: np.empty(len(count)) for name in self.names}
        n_samples = len(self.positives.segment) + len(self.negatives.segment)
        n_walked = self.negatives.n if self.rounded_off else n_samples
        step = max(1, _BLOCK // max(1, count.shape[1], n_walked))
        for start in range(0, len(count), step):
            block = count[start : start + step].astype(np.float64)
            figures = _sum_figures(self, block)
            if "auroc" in self.names or "average_precision" in self.names:
                figures |= _rank_figures(self, block)
            for name in self.names:
                results[name][start : start + step] = figures[name]
        return results


@dataclass(frozen=True, eq=False)
class _Segments:
    """Samples of one class by the segment of the score that they lie in, ascending.

    Attributes:
        cluster, segment: (m,) of every sample.
        n: how many segments there are.
        counts: (k, n) samples of every cluster in every segment; None where that would be large and nearly empty.
    """

    cluster: NDArray[np.intp]
    segment: NDArray[np.intp]
    n: int
    counts: NDArray[np.float64] | None


def tally(
    label: ArrayLike,
    probability: ArrayLike,
    *,
    cluster: NDArray[np.intp],
    n_clusters: int,
    threshold: float = THRESHOLD,
    names: Collection[str] = NAMES,
) -> Tally:
    """Count (n,) labels and probabilities by cluster, once for all resamples.

    Args:
        label: (n,) 0 or 1.
        probability: (n,) predicted probability of class 1.
        cluster: (n,) what each sample is drawn with, 0 to n_clusters - 1; `np.arange(n)` where each is drawn alone.
        n_clusters: how many clusters there are; some may be without a sample.
        threshold: predicted positive from this probability on.
        names: the figures wanted, of `probe.metrics.NAMES`.
    """
    y = np.asarray(label).astype(bool)
    p = np.asarray(probability, dtype=np.float64)
    predicted = p >= threshold
    table = np.zeros((n_clusters, 5 + ECE_BINS))
    for column, value in enumerate((y, ~y, y & predicted, ~y & ~predicted, (p - y) ** 2)):
        table[:, column] = np.bincount(cluster, weights=value, minlength=n_clusters)
    np.add.at(table, (cluster, 5 + calibration_bin(p)), y - p)
    rounded_off = {}
    if len(p) > _MANY:
        quantiles = np.unique(np.quantile(p[y] if y.any() else p, np.linspace(0, 1, _STEPS + 1)))
        exact, p = p, np.searchsorted(quantiles, p).astype(np.float64)
        rounded_off = {
            "auroc": auroc(y, exact) - auroc(y, p),
            "average_precision": average_precision(y, exact) - average_precision(y, p),
        }
    order = np.argsort(p, kind="stable")
    positives, negatives = order[y[order]], order[~y[order]]
    distinct, score = np.unique(p[positives], return_inverse=True)
    between = np.searchsorted(distinct, p[negatives], side="left")
    between += np.searchsorted(distinct, p[negatives], side="right")
    return Tally(
        table,
        _segments(cluster[positives], score, n=len(distinct), n_clusters=n_clusters),
        _segments(cluster[negatives], between, n=2 * len(distinct) + 1, n_clusters=n_clusters),
        rounded_off,
        tuple(names),
    )


def _segments(cluster: NDArray[np.intp], segment: NDArray[np.intp], *, n: int, n_clusters: int) -> _Segments:
    counts = None
    if n_clusters * n <= _DENSE * len(segment):
        flat = np.bincount(cluster * n + segment, minlength=n_clusters * n)
        counts = flat.reshape(n_clusters, n).astype(np.float64)
    return _Segments(cluster, segment, n, counts)


def _sum_figures(tallied: Tally, count: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Compute the figures that follow from sums over samples, each (b,), of (b, k) resamples."""
    sums = count @ tallied.table
    positive, negative, tp, tn, squares = sums.T[:5]
    with np.errstate(invalid="ignore"):  # a resample without samples gives NaN
        return confusion_figures(positive, negative, tp=tp, tn=tn) | {
            "brier": squares / (positive + negative),
            "ece": np.abs(sums[:, 5:]).sum(axis=1) / (positive + negative),
        }


def _rank_figures(tallied: Tally, count: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """Compute the figures that follow from ranks, each (b,), of (b, k) resamples."""
    hits = _segment_counts(count, tallied.positives)  # positives with each distinct score
    others = _segment_counts(count, tallied.negatives)
    negatives = np.cumsum(others, axis=1)  # with this segment's scores or lower ones
    n_positive, n_negative = hits.sum(axis=1), negatives[:, -1]
    lower, tied = negatives[:, :-1:2], others[:, 1::2]
    true = np.cumsum(hits[:, ::-1], axis=1)[:, ::-1]  # positives with this score or a higher one
    retrieved = true + n_negative[:, None] - lower  # equal scores enter together
    precision = np.divide(true, retrieved, out=np.zeros_like(true), where=retrieved > 0)
    with np.errstate(invalid="ignore"):  # an absent class gives NaN
        figures = {
            "auroc": np.einsum("bg,bg->b", hits, lower + tied / 2) / (n_positive * n_negative),
            "average_precision": np.einsum("bg,bg->b", hits, precision) / n_positive,
        }
    return {name: values + tallied.rounded_off.get(name, 0.0) for name, values in figures.items()}


def _segment_counts(count: NDArray[np.float64], segments: _Segments) -> NDArray[np.float64]:
    """Turn (b, k) counts of clusters into (b, n) counts of segments."""
    if segments.counts is not None:
        return count @ segments.counts
    total = np.zeros((len(count), segments.n))
    if len(segments.segment):
        starts = np.flatnonzero(np.diff(segments.segment, prepend=-1))
        total[:, segments.segment[starts]] = np.add.reduceat(count[:, segments.cluster], starts, axis=1)
    return total
