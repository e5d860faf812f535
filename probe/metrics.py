"""How good are these scores? Figures from labels and probabilities alone; label 1 (Atypical) is the positive class.

Balanced accuracy, AUROC and average precision equal scikit-learn's definitions (ties included); they are written out
here because every later figure resamples them by the thousand.

The records at the end hold figures: `Interval`, `FoldFigure`, `Judgement` (one run on one set), and `RunMetrics`, which
is what metrics.json holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

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
_MANY = 2**17  # samples: of more of them, resamples rank scores rounded to quantiles of the positives'
_STEPS = 2**11  # quantiles: at a million samples they moved an interval's ends by less than a hundredth of its width
_DENSE = 40  # one multiplication of a matrix product takes a fortieth of one step of a gathered sum


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

    Of more than `_MANY` samples the scores are rounded to quantiles first, or every resample would take a walk through
    all of them. What that takes from the figures of all samples is given back to those of every resample.

    Attributes:
        table: (k, 5 + ECE_BINS) what a cluster adds to each sum: positives, negatives, true positives, true negatives,
            squared errors, and label minus probability per calibration bin.
        positives: in the g scores.
        negatives: in the 2 g + 1 segments.
        rounded_off: figure to what rounding took from it; empty without rounding.
    """

    table: NDArray[np.float64]
    positives: _Placed
    negatives: _Placed
    rounded_off: dict[str, float]


@dataclass(frozen=True, eq=False)
class _Placed:
    """Samples of one class in the places that ranks leave them, in ascending order of place.

    Attributes:
        cluster, place: (m,) of every sample.
        n_places: how many there are.
        link: (k, n_places) how many samples of a cluster are in a place; None where it would be large and nearly empty.
    """

    cluster: NDArray[np.intp]
    place: NDArray[np.intp]
    n_places: int
    link: NDArray[np.float64] | None


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
    others = p[negatives]
    segment = np.searchsorted(distinct, others, side="left") + np.searchsorted(distinct, others, side="right")
    return Tally(
        table,
        _placed(cluster[positives], score, n_clusters=n_clusters, n_places=len(distinct)),
        _placed(cluster[negatives], segment, n_clusters=n_clusters, n_places=2 * len(distinct) + 1),
        rounded_off,
    )


def _placed(cluster: NDArray[np.intp], place: NDArray[np.intp], *, n_clusters: int, n_places: int) -> _Placed:
    link = None
    if n_clusters * n_places <= _DENSE * len(place):
        counts = np.bincount(cluster * n_places + place, minlength=n_clusters * n_places)
        link = counts.reshape(n_clusters, n_places).astype(np.float64)
    return _Placed(cluster, place, n_places, link)


def resampled_scores(
    counted: Tally, count: NDArray[np.integer], *, names: Collection[str] = NAMES
) -> dict[str, NDArray[np.float64]]:
    """The figures of many resamples at once: in resample j, every sample of cluster c occurs `count[j, c]` times.

    Confusion counts, Brier and calibration are one matrix product, AUROC and average precision one cumulative sum of
    counts in score order. Each equals `scores` of the repeated rows, ties included, but for the rounding of `Tally`.

    Args:
        counted: of `tally`.
        count: (r, k), 0 or more.
        names: the figures wanted.

    Returns:
        Name to (r,); NaN in a resample that lacks a class the figure needs (see `scores`).
    """
    found = {name: np.empty(len(count)) for name in names}
    n_walked = (
        counted.negatives.n_places
        if counted.rounded_off
        else len(counted.positives.place) + len(counted.negatives.place)
    )
    step = max(1, _BLOCK // max(1, count.shape[1], n_walked))
    for start in range(0, len(count), step):
        block = count[start : start + step].astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):  # an absent class gives NaN
            figures = _counted(counted, block)
            if "auroc" in names or "average_precision" in names:
                figures |= _ranked(counted, block)
        for name in names:
            found[name][start : start + step] = figures[name]
    return found


def _counted(counted: Tally, count: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The figures that follow from sums over samples: each (b,), of (b, k) resamples."""
    sums = count @ counted.table
    positive, negative, tp, tn, squares = sums.T[:5]
    fn, fp, n = positive - tp, negative - tn, positive + negative
    sensitivity, specificity = tp / positive, tn / negative
    spread = np.sqrt((tp + fp) * positive * negative * (tn + fn))
    one_sided = (spread == 0) & (positive > 0) & (negative > 0)  # one class predicted throughout
    return {
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "f1": np.where(positive > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
        "mcc": np.where(one_sided, 0.0, (tp * tn - fp * fn) / spread),
        "brier": squares / n,
        "ece": np.abs(sums[:, 5:]).sum(axis=1) / n,
    }


def _ranked(counted: Tally, count: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """The figures that follow from ranks: each (b,), of (b, k) resamples."""
    hits = _collect(count, counted.positives)  # positives with each distinct score
    others = _collect(count, counted.negatives)
    negatives = np.cumsum(others, axis=1)  # with this segment's scores or lower ones
    n_positive, n_negative = hits.sum(axis=1), negatives[:, -1]
    lower, tied = negatives[:, :-1:2], others[:, 1::2]
    true = np.cumsum(hits[:, ::-1], axis=1)[:, ::-1]  # positives with this score or a higher one
    retrieved = true + n_negative[:, None] - lower  # equal scores enter together
    precision = np.divide(true, retrieved, out=np.zeros_like(true), where=retrieved > 0)
    figures = {
        "auroc": np.einsum("bg,bg->b", hits, lower + tied / 2) / (n_positive * n_negative),
        "average_precision": np.einsum("bg,bg->b", hits, precision) / n_positive,
    }
    return {name: values + counted.rounded_off.get(name, 0.0) for name, values in figures.items()}


def _collect(count: NDArray[np.float64], placed: _Placed) -> NDArray[np.float64]:
    """(b, k) counts of clusters to (b, n_places) counts of places."""
    if placed.link is not None:
        return count @ placed.link
    total = np.zeros((len(count), placed.n_places))
    if len(placed.place):
        starts = np.flatnonzero(np.diff(placed.place, prepend=-1))
        total[:, placed.place[starts]] = np.add.reduceat(count[:, placed.cluster], starts, axis=1)
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


# ------------------------------------------------------------------------------------------------- figures, recorded


@dataclass(frozen=True)
class Interval:
    """A figure and the interval around it.

    Attributes:
        value: the figure; NaN if it does not exist (see `scores`).
        low, high: ends of the interval; NaN where the data give none: fewer than two clusters, a class that a single
            cluster holds, half of the resamples without a class, or a figure that no resample changes.
        n_undefined: resamples that lack a class the figure needs; the interval is that of the others. None if it was
            read from metrics.json, which does not keep it.
    """

    value: float
    low: float
    high: float
    n_undefined: int | None = None


@dataclass(frozen=True)
class FoldFigure:
    """A figure of every fold model at threshold 0.5, as in the paper.

    Attributes:
        mean, std: over fold models; the standard deviation is that of a population.
        each: the figure of every fold model.
    """

    mean: float
    std: float
    each: tuple[float, ...]


@dataclass(frozen=True)
class Judgement:
    """Every figure of one run's ensemble on one set.

    Attributes:
        n, n_positive: patches.
        unit: what was resampled, "slide" or "sample".
        n_clusters: how many of them.
        n_alone: patches of unknown slide among known ones; each counts as one slide.
        threshold: positive from this probability on.
        level, replicates: of the resampling.
        figures: name (`NAMES`) to interval.
    """

    n: int
    n_positive: int
    unit: str
    n_clusters: int
    n_alone: int
    threshold: float
    level: float
    replicates: int
    figures: dict[str, Interval]


@dataclass(frozen=True)
class SetMetrics:
    """The figures of a run on one set.

    Attributes:
        n, n_positive: patches.
        folds: name (`NAMES`) to what the fold models reach.
        ensemble: of the ensemble; None for out-of-fold predictions, on which the threshold was chosen.
    """

    n: int
    n_positive: int
    folds: dict[str, FoldFigure]
    ensemble: Judgement | None


_SAMPLED = ("unit", "n_clusters", "n_alone", "level", "replicates")  # of a Judgement; how its intervals were made


@dataclass(frozen=True)
class RunMetrics:
    """The figures of a run: what metrics.json holds.

    Attributes:
        threshold: of the ensemble, chosen on the out-of-fold predictions.
        sets: "dataset/split" to its figures.
    """

    threshold: float
    sets: dict[str, SetMetrics]

    def as_dict(self) -> dict[str, Any]:
        """The JSON object of metrics.json. A figure that does not exist is null."""
        return dict(as_dict({"threshold": self.threshold, "sets": {k: _set_as_dict(v) for k, v in self.sets.items()}}))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunMetrics:
        """Read the JSON object of metrics.json.

        Raises:
            ValueError: if it lacks something, or holds something else than figures.
        """
        try:
            threshold = float(record["threshold"])
            sets = {str(name): _set_from_dict(one, threshold) for name, one in record["sets"].items()}
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(str(error)) from error
        return cls(threshold, sets)


def _set_as_dict(metrics: SetMetrics) -> dict[str, Any]:
    record: dict[str, Any] = {"n": metrics.n, "n_positive": metrics.n_positive, "folds": metrics.folds}
    if metrics.ensemble is not None:
        figures = metrics.ensemble.figures
        record["ensemble"] = {name: figure.value for name, figure in figures.items()}
        record["intervals"] = {name: getattr(metrics.ensemble, name) for name in _SAMPLED} | {
            "figures": {name: [figure.low, figure.high] for name, figure in figures.items()}
        }
    return record


def _set_from_dict(record: Mapping[str, Any], threshold: float) -> SetMetrics:
    n, n_positive = int(record["n"]), int(record["n_positive"])
    folds = {
        name: FoldFigure(_number(one["mean"]), _number(one["std"]), tuple(map(_number, one["each"])))
        for name, one in record["folds"].items()
    }
    judgement = None
    if "intervals" in record:  # runs of early versions have an ensemble without
        sampled, ends = record["intervals"], record["intervals"]["figures"]
        judgement = Judgement(
            n=n,
            n_positive=n_positive,
            unit=str(sampled["unit"]),
            n_clusters=int(sampled["n_clusters"]),
            n_alone=int(sampled["n_alone"]),
            threshold=threshold,
            level=float(sampled["level"]),
            replicates=int(sampled["replicates"]),
            figures={
                name: Interval(_number(value), _number(ends[name][0]), _number(ends[name][1]))
                for name, value in record["ensemble"].items()
            },
        )
    return SetMetrics(n, n_positive, folds, judgement)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def as_dict(result: Any) -> Any:
    """Turn a result into plain JSON values: records to objects, tuples to lists, NaN and infinities to null."""
    if dataclasses.is_dataclass(result):
        return {field.name: as_dict(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(key): as_dict(value) for key, value in result.items()}
    if isinstance(result, tuple | list):
        return [as_dict(value) for value in result]
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    return result
