"""How much do figures scatter when the same training is done again, and would that turn the order of two runs?"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr

from probe.resample import Scatter


@dataclass(frozen=True)
class VarianceParts:
    """Where the scatter of one figure comes from, as standard deviations.

    Of one fold model: `training` is what another seed changes in all folds alike, `fold` what other training slides
    change in all seeds alike, `residual` what is left: a seed's luck with one fold. Moments of a two-way table without
    replication (Searle, Casella and McCulloch, Variance Components, 1992, ch. 4); a negative estimate is 0.

    Attributes:
        training, fold, residual: of the figure of one fold model, at threshold 0.5.
        ensemble_training: of the figure of one training's ensemble, over trainings.
        ensemble_slide: of that figure, over slides (or patches, where slides are not known).
        each: the figure of each training's ensemble.
    """

    training: float
    fold: float
    residual: float
    ensemble_training: float
    ensemble_slide: float
    each: tuple[float, ...]


@dataclass(frozen=True)
class Trainings:
    """The trainings of one run on one set.

    Attributes:
        n: how many.
        figures: figure (`probe.metrics.COMPARED`) to where its scatter comes from.
    """

    n: int
    figures: dict[str, VarianceParts]


def variance_parts(fold_models: NDArray[np.float64], each: NDArray[np.float64], *, slide: float) -> VarianceParts:
    """Split the scatter of a figure.

    >>> table = np.array([[0.70, 0.80], [0.72, 0.82], [0.68, 0.78]])  # three trainings of two folds
    >>> parts = variance_parts(table, np.array([0.76, 0.78, 0.74]), slide=0.03)
    >>> round(parts.training, 3), round(parts.fold, 3), round(parts.residual, 3), round(parts.ensemble_training, 3)
    (0.02, 0.071, 0.0, 0.02)

    Args:
        fold_models: (K, F) the figure of every fold model; at least two trainings and two folds.
        each: (K,) the figure of each training's ensemble.
        slide: standard error of that figure over slides.
    """
    n_trainings, n_folds = fold_models.shape
    by_training, by_fold = fold_models.mean(axis=1), fold_models.mean(axis=0)
    left = fold_models - by_training[:, None] - by_fold + fold_models.mean()
    residual = float((left**2).sum()) / ((n_trainings - 1) * (n_folds - 1))
    training = float(np.var(by_training, ddof=1)) - residual / n_folds
    fold = float(np.var(by_fold, ddof=1)) - residual / n_trainings
    return VarianceParts(
        training=math.sqrt(max(0.0, training)),
        fold=math.sqrt(max(0.0, fold)),
        residual=math.sqrt(residual),
        ensemble_training=float(np.std(each, ddof=1)),
        ensemble_slide=slide,
        each=tuple(each.tolist()),
    )


def chance_to_turn(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Estimate how often the order of two runs is the other way round, if each is trained once more.

    The difference of two new trainings scatters about the difference of the means, by both runs' scatter and by the
    means' own (a prediction interval for Student's t; degrees of freedom by Welch and Satterthwaite). A run with a
    single figure counts as one that every training repeats, such as a probe that is solved exactly.

    >>> round(chance_to_turn(np.array([0.80, 0.82, 0.81]), np.array([0.75])), 4)
    0.0175

    Args:
        first, second: (K,) a figure of each of their trainings, on the same patches.

    Returns:
        From 0 to 1; NaN if neither has two trainings, or a figure does not exist.
    """
    scatters = [Scatter.of(values) for values in (first, second)]
    new = [Scatter(one.variance * (len(v) + 1), one.freedom) for one, v in zip(scatters, (first, second), strict=True)]
    total = new[0] + new[1]
    difference = float(first.mean() - second.mean())
    if max(len(first), len(second)) < 2 or not math.isfinite(difference):
        return math.nan
    if total.variance == 0:
        return 0.5 if difference == 0 else 0.0
    return float(stdtr(total.freedom, -abs(difference) / math.sqrt(total.variance)))
