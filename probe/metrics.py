"""How good are these scores? Figures from labels and probabilities alone; label 1 (Atypical) is the positive class.

Every figure equals scikit-learn's, ties included. `probe.tally` computes the same figures of thousands of resamples at
once.

The records at the end hold figures: `Interval`, `FoldFigure`, `Judgement` (one ensemble on one set), and `RunMetrics`,
which is what metrics.json holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

THRESHOLD = 0.5  # the paper's
ECE_BINS = 15  # Guo et al. 2017, On Calibration of Modern Neural Networks
TITLES = {
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "sensitivity": "Sensitivity",
    "specificity": "Specificity",
    "f1": "F1",
    "mcc": "MCC",
    "brier": "Brier",
    "ece": "ECE",
}
NAMES = tuple(TITLES)
COMPARED = ("balanced_accuracy", "auroc")  # the figures for which there are differences, tests, ranks, learning curves
SMALLER_IS_BETTER = frozenset({"brier", "ece"})


def scores(label: ArrayLike, probability: ArrayLike, *, threshold: float = THRESHOLD) -> dict[str, float]:
    """Compute every figure of `NAMES` for one set of predictions.

    Args:
        label: (n,) 0 or 1.
        probability: (n,) predicted probability of class 1.
        threshold: predicted positive from this probability on.

    Returns:
        Name to value; NaN where a figure does not exist because a class is absent: sensitivity, average precision and
        F1 need a positive, specificity a negative, balanced accuracy, AUROC and MCC both.
    """
    y, p = np.asarray(label).astype(bool), np.asarray(probability, dtype=np.float64)
    predicted = p >= threshold
    figures = confusion_figures(y.sum(), (~y).sum(), tp=(y & predicted).sum(), tn=(~y & ~predicted).sum())
    figures |= {
        "auroc": auroc(y, p),
        "average_precision": average_precision(y, p),
        "brier": np.mean((p - y) ** 2),
        "ece": expected_calibration_error(y, p),
    }
    return {name: float(figures[name]) for name in NAMES}


def confusion_figures(positive: Any, negative: Any, *, tp: Any, tn: Any) -> dict[str, Any]:
    """Compute the figures that follow from a confusion matrix; NaN where a class is absent.

    Args:
        positive, negative: patches of each class; numbers of NumPy, or arrays with one number per resample.
        tp, tn: those of them predicted right.
    """
    fn, fp = positive - tp, negative - tn
    with np.errstate(divide="ignore", invalid="ignore"):  # an absent class gives NaN
        sensitivity, specificity = tp / positive, tn / negative
        root = np.sqrt((tp + fp) * 1.0 * positive * negative * (tn + fn))  # 1.0: the product may exceed 64 bits
        one_class_predicted = (root == 0) & (positive > 0) & (negative > 0)
        return {
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "f1": np.where(positive > 0, 2 * tp / (2 * tp + fp + fn), np.nan),
            "mcc": np.where(one_class_predicted, 0.0, (tp * 1.0 * tn - fp * 1.0 * fn) / root),
        }


def balanced_accuracy(label: ArrayLike, predicted: ArrayLike) -> float:
    """Average sensitivity and specificity, of (n,) labels and (n,) predicted classes; NaN if a class is absent."""
    y, hit = np.asarray(label).astype(bool), np.asarray(predicted).astype(bool)
    figures = confusion_figures(y.sum(), (~y).sum(), tp=(y & hit).sum(), tn=(~y & ~hit).sum())
    return float(figures["balanced_accuracy"])


def auroc(label: ArrayLike, score: ArrayLike) -> float:
    """Compute the area under the ROC curve from mid-ranks (Mann and Whitney); NaN if a class is absent."""
    y = np.asarray(label).astype(bool)
    n_positive, n_negative = int(y.sum()), int((~y).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = mid_ranks(np.asarray(score))
    return float((ranks[y].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def mid_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Rank (n,) values from 1; equal values share the mean of their ranks.

    As `scipy.stats.rankdata`, without the import of `scipy.stats`, which takes longer than a probe.
    """
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[inverse])


def average_precision(label: ArrayLike, score: ArrayLike) -> float:
    """Average precision over the steps in recall, for the positive class; NaN if there is none."""
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
    """Average the gap between predicted and observed rate over `ECE_BINS` equally wide bins, weighted by patches."""
    y, p = np.asarray(label, dtype=np.float64), np.asarray(probability, dtype=np.float64)
    gaps = np.bincount(calibration_bin(p), weights=y - p, minlength=ECE_BINS)
    return float(np.abs(gaps).sum() / len(y))


def calibration_bin(probability: NDArray[np.float64]) -> NDArray[np.intp]:
    """Give each of (n,) probabilities the number of its bin, of `ECE_BINS` equally wide ones."""
    return np.minimum((probability * ECE_BINS).astype(np.intp), ECE_BINS - 1)


def best_threshold(label: ArrayLike, probability: ArrayLike) -> float:
    """Choose the threshold with the highest balanced accuracy on these predictions, midway between neighbouring scores.

    Meant for out-of-fold predictions. Figures at this threshold must come from other predictions than these.

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
    """Compute the log loss (k,) of (n,) labels and (n, k) logits, both classes weighing the same, as probes do."""
    y = np.asarray(label).astype(bool)
    signed = np.where(y[:, None], -logit, logit).astype(np.float64)
    losses = np.logaddexp(0, signed)
    return np.asarray((losses[y].mean(axis=0) + losses[~y].mean(axis=0)) / 2)


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
        wide: ends at the largest plausible design effect; None where slides are known.
        exact: a Clopper-Pearson bound, because no resample changes the figure (perfect scores).
    """

    value: float
    low: float
    high: float
    n_undefined: int | None = None
    wide: tuple[float, float] | None = None
    exact: bool = False

    def __str__(self) -> str:
        return f"{self.value:.3f}" + ("" if math.isnan(self.low) else f" ({self.low:.3f}–{self.high:.3f})")


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
        trainings: how many (seeds); figures are means over them, and intervals contain their scatter.
        design_effect: the largest plausible one, for which `Interval.wide` is; 1 where slides are known.
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
    trainings: int = 1
    design_effect: float = 1.0

    @property
    def over(self) -> str:
        """What the intervals generalise over, in words."""
        drawn = "slides" if self.unit == "slide" else "patches"
        return f"other {drawn}" + (" and trainings" if self.trainings > 1 else "")

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {figure}" for name, figure in self.figures.items())
        return (
            f"Judgement({self.n:,} patches, {self.n_positive:,} positive, {self.n_clusters:,} {self.unit}s: {figures})"
        )


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
        """Make the JSON object of metrics.json. A figure that does not exist is null."""
        return dict(as_dict({"threshold": self.threshold, "sets": {k: _set_as_dict(v) for k, v in self.sets.items()}}))

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunMetrics:
        """Read the JSON object of metrics.json.

        Raises:
            ValueError: if it lacks something, or holds something else than figures.
        """
        record = _with_nan(record)
        try:
            sets = {name: _set_from_dict(one, record["threshold"]) for name, one in record["sets"].items()}
            return msgspec.convert({**record, "sets": sets}, cls)
        except KeyError as error:
            raise ValueError(f"{error} is missing") from error
        except (TypeError, AttributeError, IndexError) as error:
            raise ValueError(str(error)) from error


def _set_as_dict(metrics: SetMetrics) -> dict[str, Any]:
    record: dict[str, Any] = {"n": metrics.n, "n_positive": metrics.n_positive, "folds": metrics.folds}
    if metrics.ensemble is not None:
        figures = metrics.ensemble.figures
        record["ensemble"] = {name: figure.value for name, figure in figures.items()}
        record["intervals"] = {name: getattr(metrics.ensemble, name) for name in _SAMPLED} | {
            "figures": {name: [figure.low, figure.high] for name, figure in figures.items()}
        }
    return record


def _set_from_dict(record: Mapping[str, Any], threshold: float) -> dict[str, Any]:
    """Arrange one set of metrics.json as `SetMetrics`."""
    judgement = None
    if "intervals" in record:  # runs of early versions have an ensemble without
        ends = record["intervals"]["figures"]
        figures = {
            name: {"value": value, "low": ends[name][0], "high": ends[name][1]}
            for name, value in record["ensemble"].items()
        }
        judgement = {**record, **record["intervals"], "threshold": threshold, "figures": figures}
    return {**record, "ensemble": judgement}


def _with_nan(value: Any) -> Any:
    """Undo what `as_dict` does to a figure that does not exist."""
    if isinstance(value, Mapping):
        return {name: _with_nan(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_with_nan(one) for one in value]
    return math.nan if value is None else value


def as_dict(result: Any) -> Any:
    """Turn a result into plain JSON values: records to objects, tuples to lists, NaN and infinities to null."""
    if dataclasses.is_dataclass(result):
        result = vars(result)
    if isinstance(result, Mapping):
        return {str(key): as_dict(value) for key, value in result.items()}
    if isinstance(result, tuple | list):
        return [as_dict(value) for value in result]
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    return result
