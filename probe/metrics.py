"""How good are these scores? Figures from labels and probabilities alone.

A label is the number of a class. A model gives a logit of every class over class 0, whose own is 0; probabilities are
their softmax. With two classes that is one logit and its sigmoid: class 1 (Atypical) is the positive class, predicted
from a threshold on. Of more classes the most probable one is predicted, and figures are means over classes, each
against the rest: over those that a set holds, if these are two or more.

Every figure equals scikit-learn's, ties included. `probe.tally` computes the same figures of thousands of resamples at
once.

The records at the end hold figures: `Interval`, `FoldFigure`, `Judgement` (one ensemble on one set), and `RunMetrics`,
which is what metrics.json holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import expit, softmax

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
# Of more than two classes; each of `_PER_CLASS` is also there for every class k by itself, as "recall k".
_TITLES_OF_MORE = {
    "balanced_accuracy": "Balanced accuracy",
    "auroc": "AUROC",
    "average_precision": "Average precision",
    "f1": "F1",
    "mcc": "MCC",
    "kappa": "Kappa",
    "log_loss": "Log loss",
    "brier": "Brier",
    "ece": "ECE",
}
_PER_CLASS = {"recall": "Recall", "auroc": "AUROC", "average_precision": "Average precision"}
COMPARED = ("balanced_accuracy", "auroc")  # the figures for which there are differences, tests, ranks, learning curves
SMALLER_IS_BETTER = frozenset({"brier", "ece", "log_loss"})
_LEAST = 1e-15  # probability that a log loss is computed from


def probabilities(logit: NDArray[np.floating]) -> NDArray[np.float64]:
    """Turn logits (..., c - 1) of classes 1, 2, ... over class 0 into probabilities (..., c) of all classes."""
    wide = logit.astype(np.float64)
    if wide.shape[-1] == 1:
        positive = expit(wide)
        return np.concatenate([1 - positive, positive], axis=-1)
    return np.asarray(softmax(np.concatenate([np.zeros_like(wide[..., :1]), wide], axis=-1), axis=-1))


def predicted_classes(probability: NDArray[np.floating], threshold: float = THRESHOLD) -> NDArray[np.int8]:
    """Predict classes (n,) of probabilities (n, c): of two class 1 from the threshold on, else the most probable."""
    if probability.shape[1] == 2:
        return np.asarray(probability[:, 1] >= threshold, dtype=np.int8)
    return np.asarray(probability.argmax(axis=1), dtype=np.int8)


def judge_logits(label: NDArray[np.integer], logit: NDArray[np.floating]) -> tuple[float, float]:
    """Compute balanced accuracy and AUROC of (n,) labels and (n, c - 1) logits, the most probable class predicted."""
    if logit.shape[1] == 1:
        return balanced_accuracy(label, logit[:, 0] >= 0), auroc(label, logit[:, 0])
    p = probabilities(logit)
    return balanced_accuracy(label, p.argmax(axis=1)), auroc(label, p)


def figure_titles(classes: Sequence[str]) -> dict[str, str]:
    """List the figures of a task with these classes, and their headings.

    >>> list(figure_titles(("a", "b", "c")))[:4]
    ['balanced_accuracy', 'auroc', 'average_precision', 'f1']
    >>> figure_titles(("a", "b", "c"))["recall 1"]
    'Recall b'
    """
    if len(classes) == 2:
        return TITLES
    return _TITLES_OF_MORE | {
        f"{name} {k}": f"{title} {one}" for name, title in _PER_CLASS.items() for k, one in enumerate(classes)
    }


def figure_names(n_classes: int) -> tuple[str, ...]:
    """List the figures of a task with this many classes."""
    return tuple(figure_titles([str(k) for k in range(n_classes)]))


def scores(
    label: ArrayLike, probability: ArrayLike, *, threshold: float = THRESHOLD, ordinal: bool = False
) -> dict[str, float]:
    """Compute every figure of `figure_names` for one set of predictions.

    Args:
        label: (n,) class numbers.
        probability: (n, c) of every class; or (n,) of class 1, of two.
        threshold: of two classes, class 1 is predicted from this probability on.
        ordinal: whether the classes are ordered; kappa's weights are then quadratic (Cohen, Psychological Bulletin 70,
            1968), else all errors weigh the same.

    Returns:
        Name to value; NaN where a figure does not exist because a class is absent. Of two classes sensitivity, average
        precision and F1 need a positive, specificity a negative, balanced accuracy, AUROC and MCC both. Of more
        classes a figure of one class needs that class, and AUROC others too; means need two classes.
    """
    p = np.asarray(probability, dtype=np.float64)
    if p.ndim == 2 and p.shape[1] > 2:
        return _scores_of_more(np.asarray(label).astype(np.intp), p, ordinal=ordinal)
    y, p = np.asarray(label).astype(bool), p if p.ndim == 1 else p[:, 1]
    predicted = p >= threshold
    figures = confusion_figures(y.sum(), (~y).sum(), tp=(y & predicted).sum(), tn=(~y & ~predicted).sum())
    figures |= {
        "auroc": auroc(y, p),
        "average_precision": average_precision(y, p),
        "brier": np.mean((p - y) ** 2),
        "ece": expected_calibration_error(y, p),
    }
    return {name: float(figures[name]) for name in NAMES}


def _scores_of_more(y: NDArray[np.intp], p: NDArray[np.float64], *, ordinal: bool) -> dict[str, float]:
    n_classes = p.shape[1]
    predicted = p.argmax(axis=1)
    matrix = np.bincount(y * n_classes + predicted, minlength=n_classes**2).reshape(1, n_classes, n_classes)
    figures = {name: float(value[0]) for name, value in matrix_figures(matrix, ordinal=ordinal).items()}
    held = np.flatnonzero(matrix[0].sum(axis=1))
    for k in range(n_classes):
        figures[f"auroc {k}"] = auroc(y == k, p[:, k])
        figures[f"average_precision {k}"] = average_precision(y == k, p[:, k])
    for name in ("auroc", "average_precision"):
        of_held = [figures[f"{name} {k}"] for k in held]
        figures[name] = float(np.mean(of_held)) if len(held) > 1 else math.nan
    surest = p.max(axis=1)
    figures["log_loss"] = float(log_losses(y, p).mean()) if len(y) else math.nan
    figures["brier"] = float(squared_errors(y, p).mean()) if len(y) else math.nan
    figures["ece"] = expected_calibration_error(y == predicted, surest) if len(y) else math.nan
    return {name: figures[name] for name in figure_names(n_classes)}


def log_losses(label: NDArray[np.integer], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Compute minus the log of the probability (n, c) of each patch's class; (n,)."""
    return np.asarray(-np.log(np.maximum(probability[np.arange(len(label)), label], _LEAST)))


def squared_errors(label: NDArray[np.integer], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum the squared errors of probabilities (n, c) over classes (Brier, Monthly Weather Review 78, 1950); (n,)."""
    return np.asarray(((probability - np.eye(probability.shape[1])[label]) ** 2).sum(axis=1))


def matrix_figures(
    matrix: NDArray[Any], *, ordinal: bool = False, held: NDArray[np.bool_] | None = None
) -> dict[str, NDArray[np.float64]]:
    """Compute the figures that follow from (b, c, c) confusion matrices of more than two classes: (b,) each.

    Args:
        matrix: counts by label and predicted class.
        ordinal: see `scores`.
        held: (c,) the classes that means are over, and that must be there; by default those of the first matrix.
    """
    matrix = np.asarray(matrix, dtype=np.float64)
    c = matrix.shape[1]
    of_class, called, right = matrix.sum(axis=2), matrix.sum(axis=1), np.einsum("bkk->bk", matrix)  # (b, c) each
    total = of_class.sum(axis=1)
    held = of_class[0] > 0 if held is None else held
    steps = np.arange(c)
    weight = (steps[:, None] - steps) ** 2 if ordinal else 1 - np.eye(c)
    with np.errstate(divide="ignore", invalid="ignore"):  # an absent class gives NaN
        recall = right / of_class
        f1 = np.where(of_class > 0, 2 * right / (of_class + called), np.nan)
        chance = np.einsum("bk,kl,bl->b", of_class, weight, called) / total
        kappa = 1 - np.einsum("bkl,kl->b", matrix, weight) / chance
        agreed = right.sum(axis=1) * total - (of_class * called).sum(axis=1)
        spread = [total**2 - (side**2).sum(axis=1) for side in (called, of_class)]
        mcc = np.where((spread[0] == 0) & (spread[1] > 0), 0.0, agreed / np.sqrt(spread[0] * spread[1]))
    lacks = (of_class[:, held] == 0).any(axis=1) | (held.sum() < 2)
    means = {
        "balanced_accuracy": recall[:, held].mean(axis=1) if held.any() else np.full(len(matrix), np.nan),
        "f1": f1[:, held].mean(axis=1) if held.any() else np.full(len(matrix), np.nan),
        "mcc": mcc,
        "kappa": kappa,
    }
    return {name: np.where(lacks, np.nan, value) for name, value in means.items()} | {
        f"recall {k}": recall[:, k] for k in range(c)
    }


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
    """Average the recall of every class that (n,) labels hold, of (n,) predicted classes; NaN if they hold only one."""
    y, said = np.asarray(label).astype(np.intp), np.asarray(predicted).astype(np.intp)
    held = np.unique(y)
    if len(held) < 2:
        return math.nan
    return float(np.mean([(said[y == k] == k).mean() for k in held]))


def auroc(label: ArrayLike, score: ArrayLike) -> float:
    """Compute the area under the ROC curve from mid-ranks (Mann and Whitney); NaN if a class is absent.

    Args:
        label: (n,) 0 or 1; or class numbers.
        score: (n,), the larger the more likely class 1; or (n, c) probabilities, whose areas, each class against the
            rest, are averaged over the classes that the labels hold.
    """
    values = np.asarray(score)
    if values.ndim == 2:
        y = np.asarray(label)
        held = np.unique(y).astype(np.intp)
        return float(np.mean([auroc(y == k, values[:, k]) for k in held])) if len(held) > 1 else math.nan
    y = np.asarray(label).astype(bool)
    n_positive, n_negative = int(y.sum()), int((~y).sum())
    if not n_positive or not n_negative:
        return float("nan")
    ranks = mid_ranks(values)
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
    """Compute the log loss (k,) of (n,) labels and (n, k, c - 1) logits, all classes weighing the same, as in probes.

    Classes that the labels do not hold weigh nothing.
    """
    y = np.asarray(label).astype(np.intp)
    wide = logit.astype(np.float64)
    if wide.shape[-1] == 1:
        losses = np.logaddexp(0, np.where(y[:, None] == 1, -wide[..., 0], wide[..., 0]))
    else:
        every = np.concatenate([np.zeros_like(wide[..., :1]), wide], axis=-1)
        own = np.take_along_axis(every, y[:, None, None], axis=-1)[..., 0]
        losses = np.logaddexp.reduce(every, axis=-1) - own
    return np.asarray(np.mean([losses[y == k].mean(axis=0) for k in np.unique(y)], axis=0))


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
        return f"{self.value:.3f}" + (f" ({self.ends})" if self.ends else "")

    @property
    def ends(self) -> str:
        """Both ends in print, joined by a word where a minus sign would stand beside a dash; empty if there are none.

        >>> Interval(0.5, 0.4, 0.6).ends, Interval(-0.1, -0.2, 0.05).ends
        ('0.400–0.600', '-0.200 to 0.050')
        """
        joint = " to " if self.low < 0 else "–"
        return "" if math.isnan(self.low) else f"{self.low:.3f}{joint}{self.high:.3f}"


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
        counts: patches of every class.
        unit: what was resampled, "slide" or "sample".
        n_clusters: how many of them.
        n_alone: patches of unknown slide among known ones; each counts as one slide.
        threshold: of two classes, positive from this probability on; else NaN.
        level, replicates: of the resampling.
        figures: name (`figure_names`) to interval.
        trainings: how many (seeds); figures are means over them, and intervals contain their scatter.
        design_effect: the largest plausible one, for which `Interval.wide` is; 1 where slides are known.
    """

    counts: tuple[int, ...]
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
    def n(self) -> int:
        """Patches."""
        return sum(self.counts)

    @property
    def n_positive(self) -> int:
        """Patches of class 1."""
        return self.counts[1]

    @property
    def over(self) -> str:
        """What the intervals generalise over, in words."""
        drawn = "slides" if self.unit == "slide" else "patches"
        return f"other {drawn}" + (" and trainings" if self.trainings > 1 else "")

    def __repr__(self) -> str:
        figures = ", ".join(f"{name} {figure}" for name, figure in self.figures.items())
        return f"Judgement({describe_counts(self.counts)}, {self.n_clusters:,} {self.unit}s: {figures})"


def describe_counts(counts: Sequence[int]) -> str:
    """Say how many patches there are, and of two classes how many positives.

    >>> describe_counts((15, 5)), describe_counts((7, 0, 3))
    ('20 patches, 5 positive', '10 patches of 2 classes')
    """
    n = f"{sum(counts):,} patches"
    return (
        f"{n}, {counts[1]:,} positive" if len(counts) == 2 else f"{n} of {sum(count > 0 for count in counts)} classes"
    )


@dataclass(frozen=True)
class SetMetrics:
    """The figures of a run on one set.

    Attributes:
        counts: patches of every class.
        folds: name (`figure_names`) to what the fold models reach.
        ensemble: of the ensemble; None for out-of-fold predictions, on which the threshold was chosen.
    """

    counts: tuple[int, ...]
    folds: dict[str, FoldFigure]
    ensemble: Judgement | None


_SAMPLED = ("unit", "n_clusters", "n_alone", "level", "replicates")  # of a Judgement; how its intervals were made


@dataclass(frozen=True)
class RunMetrics:
    """The figures of a run: what metrics.json holds.

    Attributes:
        threshold: of the ensemble, chosen on the out-of-fold predictions; NaN for more than two classes.
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
    counts = metrics.counts
    of_classes = {"n_positive": counts[1]} if len(counts) == 2 else {"counts": counts}
    record: dict[str, Any] = {"n": sum(counts)} | of_classes | {"folds": metrics.folds}
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
    if "counts" not in record:  # two classes
        record = {**record, "counts": [record["n"] - record["n_positive"], record["n_positive"]]}
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
