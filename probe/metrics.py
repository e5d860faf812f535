"""How good are these scores? Figures from labels and probabilities alone; label 1 (Atypical) is the positive class.

Balanced accuracy, AUROC and average precision equal scikit-learn's definitions (ties included); they are written out
here because every later figure resamples them by the thousand.
"""

from __future__ import annotations

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


def scores(label: ArrayLike, probability: ArrayLike, *, threshold: float = THRESHOLD) -> dict[str, float]:
    """Every figure of `NAMES` for one set of predictions.

    Args:
        label: (n,) 0 or 1.
        probability: (n,) predicted probability of class 1.
        threshold: predicted positive from this probability on.

    Returns:
        Name to value; NaN where a figure does not exist because a class is absent.
    """
    y = np.asarray(label).astype(bool)
    p = np.asarray(probability, dtype=np.float64)
    predicted = p >= threshold
    tp, fn = float((predicted & y).sum()), float((~predicted & y).sum())
    fp, tn = float((predicted & ~y).sum()), float((~predicted & ~y).sum())
    sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    spread = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    return {
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "auroc": auroc(y, p),
        "average_precision": average_precision(y, p),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "f1": _ratio(2 * tp, 2 * tp + fp + fn),
        "mcc": (tp * tn - fp * fn) / spread if spread else 0.0,
        "brier": float(np.mean((p - y) ** 2)),
        "ece": expected_calibration_error(y, p),
    }


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
