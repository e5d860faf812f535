"""How good are these scores? Figures from labels and probabilities alone; label 1 (Atypical) is the positive class.

Balanced accuracy, AUROC and average precision equal scikit-learn's definitions (ties included); they are written out
here because every later figure resamples them by the thousand.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5  # the paper's
ECE_BINS = 15  # Guo et al. 2017, On Calibration of Modern Neural Networks
NAMES = (
    "balanced_accuracy",
    "auroc",
    "average_precision",
    "sensitivity",
    "specificity",
    "f1",
    "mcc",
    "brier",
    "ece",
)
_BLOCK = 2**17  # counts resampled at a time: a megabyte, which stays in the cache
_DENSE = 40  # a multiplication in a matrix product takes a fortieth of the time of a gathered sum's step


def scores(label: ArrayLike, probability: ArrayLike, *, threshold: float = THRESHOLD) -> dict[str, float]:
    """Every figure of `NAMES` for one set of predictions.

    Args:
        label: (n,) 0 or 1.
        probability: (n,) predicted probability of class 1.
        threshold: predicted positive from this probability on.

    Returns:
        Name to value; NaN where a figure does not exist because a class is absent: sensitivity, average precision and
        F1 need a positive, specificity a negative, balanced accuracy, AUROC and MCC both.
    """
    y = np.asarray(label)
    whole = tally(y, probability, cluster=np.zeros(len(y), dtype=np.intp), n_clusters=1, threshold=threshold)
    found = resampled_scores(whole, np.ones((1, 1), dtype=np.intp))
    return {name: float(values[0]) for name, values in found.items()}


@dataclass(frozen=True, eq=False)
class Tally:
    """Predictions sorted and counted by cluster, once for all resamples. A cluster (slide, patch) is drawn as a whole.

    The distinct scores of the positives, ascending, cut the scores into 2 g + 1 segments: segment 2 j + 1 is the j-th
    of those scores itself, segment 2 j what lies between it and the one below. All that ranks decide follows from how
    many positives each score has and how many negatives each segment.

    Attributes:
        table: (k, 5 + ECE_BINS) what a cluster adds to each sum: positives, negatives, true positives, true negatives,
            squared errors, and label minus probability per calibration bin.
        positive, negative: cluster of every positive and negative sample.
        score: of every positive sample, which distinct score it has.
        segment: of every negative sample, the segment of its score.
        n_scores: g.
    """

    table: NDArray[np.float64]
    positive: NDArray[np.intp]
    score: NDArray[np.intp]
    negative: NDArray[np.intp]
    segment: NDArray[np.intp]
    n_scores: int


def tally(
    label: ArrayLike,
    probability: ArrayLike,
    *,
    cluster: NDArray[np.intp],
    n_clusters: int,
    threshold: float = THRESHOLD,
) -> Tally:
    """Prepare (n,) labels and probabilities for resampling.

    Args:
        label: (n,) 0 or 1.
        probability: (n,) predicted probability of class 1.
        cluster: (n,) what each sample is drawn with, 0 to n_clusters - 1; `np.arange(n)` where each is drawn alone.
        n_clusters: how many clusters there are; some may be without a sample.
        threshold: predicted positive from this probability on.
    """
    y = np.asarray(label).astype(bool)
    p = np.asarray(probability, dtype=np.float64)
    predicted = p >= threshold
    table = np.zeros((n_clusters, 5 + ECE_BINS))
    for column, value in enumerate((y, ~y, y & predicted, ~y & ~predicted, (p - y) ** 2)):
        table[:, column] = np.bincount(cluster, weights=value, minlength=n_clusters)
    bins = np.minimum((p * ECE_BINS).astype(np.intp), ECE_BINS - 1)
    np.add.at(table, (cluster, 5 + bins), y - p)
    distinct, score = np.unique(p[y], return_inverse=True)
    segment = np.searchsorted(distinct, p[~y], side="left") + np.searchsorted(distinct, p[~y], side="right")
    return Tally(table, cluster[y], score, cluster[~y], segment, len(distinct))


def resampled_scores(
    counted: Tally, count: NDArray[np.integer], *, names: Collection[str] = NAMES
) -> dict[str, NDArray[np.float64]]:
    """The figures of many resamples at once: in resample j, every sample of cluster c occurs `count[j, c]` times.

    Confusion counts, Brier and calibration are one matrix product, AUROC and average precision one cumulative sum of
    counts in score order. Each equals `scores` of the repeated rows, ties included.

    Args:
        counted: of `tally`.
        count: (r, k), 0 or more.
        names: the figures wanted.

    Returns:
        Name to (r,); NaN in a resample that lacks a class the figure needs (see `scores`).
    """
    parts = [_resampled(counted, block, names, influence=False) for block in _blocks(counted, count)]
    return {name: np.concatenate([part[name][0] for part in parts]) for name in names}


def resampled_influences(
    counted: Tally, count: NDArray[np.integer], *, names: Collection[str] = NAMES
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """As `resampled_scores`, and how much each cluster moves each figure: its derivative by `count[j, c]`.

    Their squares add up to the variance of the figure over clusters (the infinitesimal jackknife: Efron, The jackknife,
    the bootstrap and other resampling plans, 1982, chapter 6; for AUROC that is the clustered variance of Obuchowski,
    Biometrics 53, 1997). The calibration error has a corner where a bin's gap is zero; there the derivative is zero.

    Returns:
        Name to the figure (r,) and its derivatives (r, k); memory grows with r * k.
    """
    parts = [_resampled(counted, block, names, influence=True) for block in _blocks(counted, count)]
    return {
        name: (np.concatenate([part[name][0] for part in parts]), np.concatenate([part[name][1] for part in parts]))
        for name in names
    }


def _blocks(counted: Tally, count: NDArray[np.integer]) -> Iterator[NDArray[np.float64]]:
    width = max(count.shape[1], len(counted.positive) + len(counted.negative))
    step = max(1, _BLOCK // width)
    for start in range(0, max(1, len(count)), step):
        yield count[start : start + step].astype(np.float64)


def _resampled(
    counted: Tally, count: NDArray[np.float64], names: Collection[str], *, influence: bool
) -> dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Figures (b,) of (b, k) resamples and, if asked for, their derivatives (b, k); else empty ones."""
    sums = count @ counted.table
    positive, negative, tp, tn, squares = sums.T[:5]
    gaps = sums[:, 5:]
    n = positive + negative
    none = np.empty((len(count), 0))
    found = {}

    def by_cluster(**by_sum: NDArray[np.float64]) -> NDArray[np.float64]:
        """Derivatives by the sums, carried on to the clusters that they are sums of."""
        if not influence:
            return none
        columns = {"positive": 0, "negative": 1, "tp": 2, "tn": 3, "squares": 4}
        derivative = np.zeros_like(sums)
        for name, value in by_sum.items():
            derivative[:, columns[name] if name in columns else slice(5, None)] = value
        return derivative @ counted.table.T

    with np.errstate(divide="ignore", invalid="ignore"):  # an absent class gives NaN
        sensitivity, specificity = tp / positive, tn / negative
        moved_sensitivity = by_cluster(tp=1 / positive, positive=-sensitivity / positive)
        moved_specificity = by_cluster(tn=1 / negative, negative=-specificity / negative)
        found["sensitivity"] = sensitivity, moved_sensitivity
        found["specificity"] = specificity, moved_specificity
        found["balanced_accuracy"] = (sensitivity + specificity) / 2, (moved_sensitivity + moved_specificity) / 2
        if "f1" in names:
            whole = tp + positive + negative - tn  # 2 tp + fp + fn
            f1 = np.where(positive > 0, 2 * tp / whole, np.nan)
            moved = by_cluster(tp=(2 - f1) / whole, tn=f1 / whole, positive=-f1 / whole, negative=-f1 / whole)
            found["f1"] = f1, moved
        if "mcc" in names:
            found["mcc"] = _mcc(positive, negative, tp, tn, by_cluster)
        if "brier" in names:
            brier = squares / n
            found["brier"] = brier, by_cluster(squares=1 / n, positive=-brier / n, negative=-brier / n)
        if "ece" in names:
            ece = np.abs(gaps).sum(axis=1) / n
            found["ece"] = ece, by_cluster(gaps=np.sign(gaps) / n[:, None], positive=-ece / n, negative=-ece / n)
        if "auroc" in names or "average_precision" in names:
            found["auroc"], found["average_precision"] = _ranked(counted, count, influence=influence)
    return {name: found[name] for name in names}


def _mcc(
    positive: NDArray[np.float64],
    negative: NDArray[np.float64],
    tp: NDArray[np.float64],
    tn: NDArray[np.float64],
    by_cluster: Callable[..., NDArray[np.float64]],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matthews' correlation of (b,) confusion counts and its derivatives; 0 where only one class is predicted."""
    fn, fp = positive - tp, negative - tn
    called, cleared = tp + fp, tn + fn
    spread = np.sqrt(called * positive * negative * cleared)
    mcc = np.where((spread == 0) & (positive > 0) & (negative > 0), 0.0, (tp * tn - fp * fn) / spread)
    moved = by_cluster(
        positive=-fp / spread - mcc / 2 * (1 / positive + 1 / cleared),
        negative=-fn / spread - mcc / 2 * (1 / negative + 1 / called),
        tp=(tn + fp) / spread - mcc / 2 * (1 / called - 1 / cleared),
        tn=(tp + fn) / spread - mcc / 2 * (1 / cleared - 1 / called),
    )
    return mcc, moved


def _ranked(
    counted: Tally, count: NDArray[np.float64], *, influence: bool
) -> tuple[tuple[NDArray[np.float64], NDArray[np.float64]], tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """AUROC and average precision (b,) of (b, k) resamples, each with its derivatives (b, k)."""
    n_clusters, n_segments = count.shape[1], 2 * counted.n_scores + 1
    hits = _collect(count, counted.positive, counted.score, counted.n_scores)  # positives with each distinct score
    others = _collect(count, counted.negative, counted.segment, n_segments)
    below = np.cumsum(others, axis=1)  # negatives up to and with each segment
    n_negative, lower = below[:, -1:], below[:, : n_segments - 1 : 2]
    beaten = lower + others[:, 1::2] / 2  # negatives that a positive beats; a tie is half a win
    reached = _from_top(hits)  # (b, g + 1) positives with this score or a higher one; the last is 0
    n_positive, true = reached[:, :1], reached[:, :-1]
    auroc = np.einsum("bg,bg->b", hits, beaten)[:, None] / (n_positive * n_negative)
    retrieved = true + n_negative - lower  # equal scores enter together
    share = np.divide(true, retrieved, out=np.zeros_like(true), where=retrieved > 0)
    precision = np.einsum("bg,bg->b", hits, share)[:, None] / n_positive
    none = np.empty((len(count), 0))
    if not influence:
        return (auroc[:, 0], none), (precision[:, 0], none)

    def by_cluster(by_score: NDArray[np.float64], by_segment: NDArray[np.float64]) -> NDArray[np.float64]:
        """Derivatives by one positive of each score and one negative of each segment, carried to their clusters."""
        of_positives = _collect(by_score, counted.score, counted.positive, n_clusters)
        return of_positives + _collect(by_segment, counted.segment, counted.negative, n_clusters)

    beating = np.repeat(reached, 2, axis=1)[:, :n_segments]  # positives above a negative, or tied, of each segment
    beating[:, 1::2] = reached[:, 1:] + hits / 2
    pairs = n_positive * n_negative
    moved_auroc = by_cluster(beaten / pairs - auroc / n_positive, beating / pairs - auroc / n_negative)

    weight = np.divide(hits, retrieved**2, out=np.zeros_like(hits), where=retrieved > 0)
    gained = np.cumsum(weight * (retrieved - true), axis=1)  # a positive adds to all retrieved at its score or lower
    lost = np.zeros((len(count), n_segments))  # and so does a negative
    lost[:, 1::2] = np.cumsum(weight * true, axis=1)
    lost[:, 2::2] = lost[:, 1::2]
    moved_precision = by_cluster((share + gained - precision) / n_positive, -lost / n_positive)
    return (auroc[:, 0], moved_auroc), (precision[:, 0], moved_precision)


def _from_top(hits: NDArray[np.float64]) -> NDArray[np.float64]:
    """(b, g) to (b, g + 1): the sum of each column and all to its right, then zero."""
    total = np.zeros((len(hits), hits.shape[1] + 1))
    total[:, :-1] = np.cumsum(hits[:, ::-1], axis=1)[:, ::-1]
    return total


def _collect(
    values: NDArray[np.float64], source: NDArray[np.intp], target: NDArray[np.intp], size: int
) -> NDArray[np.float64]:
    """(b, m) to (b, size): column t is the sum, over every sample i with `target[i]` t, of column `source[i]`."""
    if values.shape[1] * size <= _DENSE * len(source):
        link = np.zeros((values.shape[1], size))
        np.add.at(link, (source, target), 1)
        return values @ link
    total = np.zeros((len(values), size))
    if len(target):
        order = np.argsort(target, kind="stable")
        present, starts = np.unique(target[order], return_index=True)
        total[:, present] = np.add.reduceat(values[:, source[order]], starts, axis=1)
    return total


def balanced_accuracy(label: ArrayLike, predicted: ArrayLike) -> float:
    """Mean of sensitivity and specificity for (n,) labels and (n,) predicted classes; NaN if a class is absent."""
    y, hit = np.asarray(label).astype(bool), np.asarray(predicted).astype(bool)
    return (_ratio(float((hit & y).sum()), float(y.sum())) + _ratio(float((~hit & ~y).sum()), float((~y).sum()))) / 2


def auroc(label: ArrayLike, score: ArrayLike) -> float:
    """Area under the ROC curve: the Mann-Whitney statistic with mid-ranks for ties; NaN if a class is absent."""
    y = np.asarray(label).astype(bool)
    n_positive, n_negative = int(y.sum()), int((~y).sum())
    if not n_positive or not n_negative:
        return float("nan")
    _, inverse, counts = np.unique(np.asarray(score), return_inverse=True, return_counts=True)
    mid_rank = np.cumsum(counts) - (counts - 1) / 2  # of each distinct score, from 1
    return float((mid_rank[inverse][y].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def average_precision(label: ArrayLike, score: ArrayLike) -> float:
    """Precision averaged over the steps in recall, for the positive class; NaN if there is none."""
    y = np.asarray(label).astype(bool)
    if not y.any():
        return float("nan")
    descending = np.argsort(-np.asarray(score), kind="stable")
    hits, ranked = y[descending], np.asarray(score)[descending]
    last_of_tie = np.append(ranked[1:] != ranked[:-1], True)  # equal scores enter together
    tp = np.cumsum(hits)[last_of_tie]
    n_retrieved = np.flatnonzero(last_of_tie) + 1
    recall_step = np.diff(tp, prepend=0) / y.sum()
    return float(np.sum(recall_step * tp / n_retrieved))


def expected_calibration_error(label: ArrayLike, probability: ArrayLike) -> float:
    """Mean gap between predicted and observed rate over `ECE_BINS` equal-width bins, weighted by their counts."""
    y, p = np.asarray(label, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    bins = np.minimum((p * ECE_BINS).astype(int), ECE_BINS - 1)
    gaps = np.bincount(bins, weights=y - p, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(y))


def best_threshold(label: ArrayLike, probability: ArrayLike) -> float:
    """The threshold with the highest balanced accuracy on these predictions; midway between neighbouring scores.

    Meant for out-of-fold predictions. Never choose it on the predictions it is judged on.

    Raises:
        ValueError: if a class is absent.
    """
    y = np.asarray(label).astype(bool)
    p = np.asarray(probability, dtype=np.float64)
    if y.all() or not y.any():
        raise ValueError("a threshold needs both classes")
    cuts = np.unique(p)
    cuts = np.concatenate([[cuts[0]], (cuts[1:] + cuts[:-1]) / 2])
    sensitivity = 1 - np.searchsorted(np.sort(p[y]), cuts) / y.sum()
    specificity = np.searchsorted(np.sort(p[~y]), cuts) / (~y).sum()
    return float(cuts[np.argmax(sensitivity + specificity)])


def balanced_log_loss(label: ArrayLike, logit: NDArray[np.floating]) -> NDArray[np.float64]:
    """Log loss with both classes weighing the same, as probes minimise it: (n,) labels, (n, k) logits to (k,)."""
    y = np.asarray(label).astype(bool)
    signed = np.where(y[:, None], -logit, logit).astype(np.float64)
    losses = np.logaddexp(0, signed)
    return np.asarray((losses[y].mean(axis=0) + losses[~y].mean(axis=0)) / 2)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")
