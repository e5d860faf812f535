"""Do a run's probabilities mean what they say, and what is it worth to act on them?

A run is trained with both classes weighing the same, so its raw probabilities are those of a set in which half of the
patches are positive. Everywhere else in mitofm a probability is the raw one. Here the corrected one stands beside it:
the run's logit plus log(prior / (1 - prior)), where the prior is the share of positives among its training patches.
Every probability moves, and a threshold with them: the order of patches and all decisions stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit, log_expit, logit

from features.console import UserError
from probe.ensembles import Ensemble
from probe.metrics import ECE_BINS, Interval, calibration_bin
from probe.resample import Clusters, Resampling, Sums, intervals, resample, sums_by_cluster

CALIBRATION_FIGURES = ("brier", "ece", "slope", "intercept")
ACTING_FROM = tuple(step / 20 for step in range(1, 20))  # probabilities of the decision curve
_EDGE = 1e-12  # probabilities are kept this far from 0 and 1, where the logit is infinite
_STEPS = 100  # of Newton's method, at most; some eight are needed


@dataclass(frozen=True)
class PredictiveValues:
    """How far the run's decisions can be trusted where class 1 is as frequent as `prevalence`.

    Attributes:
        prevalence: share of class 1 among the patches that the run would meet.
        ppv: share of class 1 among those predicted to be it.
        npv: share of class 0 among those predicted to be it.
    """

    prevalence: float
    ppv: Interval
    npv: Interval


@dataclass(frozen=True)
class NetBenefit:
    """The decision curve (Vickers and Elkin, Medical Decision Making 26, 2006), on corrected probabilities.

    Who acts from a probability t on holds a missed positive to be (1 - t) / t times as bad as a false alarm. The net
    benefit is the share of true positives, less t / (1 - t) times that of false positives, among all patches. Acting
    on no patch has the benefit 0. All are empty where the prior is not known.

    Attributes:
        threshold: (t,) the probability from which on one acts.
        run: (t,) benefit of acting where the run says at least that.
        low, high: (t,) ends of its interval.
        all: (t,) benefit of acting on every patch.
    """

    threshold: tuple[float, ...]
    run: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    all: tuple[float, ...]


@dataclass(frozen=True)
class Calibration:
    """How well a run's probabilities agree with what is the case.

    Attributes:
        prior: share of class 1 among the training patches, by which probabilities are corrected; NaN where not known.
        prevalence: share of class 1 in this set.
        raw, corrected: figure (`CALIBRATION_FIGURES`) to interval. Slope and intercept are those of Cox (Biometrika 45,
            1958), as Van Calster et al. recommend them (Journal of Clinical Epidemiology 74, 2016; BMC Medicine 17,
            2019). The slope is that of a logistic regression of the class on the logit: 1 if right, below 1 if
            probabilities are too extreme. The intercept is that of the same regression with the slope held at 1
            (calibration in the large): 0 if right, below 0 if probabilities are too high. NaN where a class is absent,
            and the slope where some threshold parts the classes without an error.
        predictive_values: at the run's threshold, for every prevalence asked for.
        net_benefit: the decision curve.
    """

    prior: float
    prevalence: float
    raw: dict[str, Interval]
    corrected: dict[str, Interval]
    predictive_values: tuple[PredictiveValues, ...]
    net_benefit: NetBenefit


def calibrate(
    ensemble: Ensemble, *, prevalences: Sequence[float] = (), resampling: Resampling = Resampling()
) -> Calibration:
    """Judge a run's probabilities on one set, raw and corrected for the training prior.

    Args:
        ensemble: the run on the set.
        prevalences: shares of class 1 for which predictive values are wanted.
        resampling: how resamples are drawn.

    Raises:
        UserError: a prevalence that is not between 0 and 1.
    """
    for prevalence in prevalences:
        if not 0 < prevalence < 1:
            raise UserError(f"`prevalence={prevalence}`: expected a share between 0 and 1, such as 0.2.")
    clusters = ensemble.clusters
    label = (ensemble.label == 1).astype(np.float64)
    raw = [logit(np.clip(probability, _EDGE, 1 - _EDGE)) for probability in ensemble.positive]
    corrected = [values + logit(ensemble.prior) for values in raw] if 0 < ensemble.prior < 1 else []
    subjects = [[_agreement(label, values, clusters) for values in logits] for logits in (raw, corrected) if logits]
    resampled = resample(subjects, clusters, resampling)
    unknown = Interval(math.nan, math.nan, math.nan)
    return Calibration(
        prior=ensemble.prior,
        prevalence=float(label.mean()),
        raw=intervals(resampled, 0),
        corrected=intervals(resampled, 1) if corrected else dict.fromkeys(CALIBRATION_FIGURES, unknown),
        predictive_values=_predictive_values(ensemble, prevalences, clusters, resampling),
        net_benefit=_net_benefit(label, [expit(values) for values in corrected], clusters, resampling),
    )


# -------------------------------------------------------------------------------------- agreement with what is the case


def _agreement(label: NDArray[np.float64], logits: NDArray[np.float64], clusters: Clusters) -> Sums:
    """Sum up what Brier, calibration error, slope and intercept of (n,) labels and logits need.

    A resample's slope and intercept are one step away from those of the whole set: what each cluster adds to the
    derivatives of the likelihood are sums like any other.
    """
    n, p = len(label), expit(logits)
    bins = np.zeros((n, ECE_BINS))
    bins[np.arange(n), calibration_bin(p)] = label - p
    line, level = _fit(np.stack([np.ones(n), logits], axis=1), label, 0.0), _fit(np.ones((n, 1)), label, logits)
    columns = [np.ones(n), label, (p - label) ** 2, *bins.T]
    for mean in (expit(line[0] + line[1] * logits), expit(level[0] + logits)):
        weight = mean * (1 - mean)
        bend = weight * (1 - 2 * mean)
        columns += [label - mean, (label - mean) * logits, *(weight * logits**k for k in range(3))]
        columns += [bend * logits**k for k in range(4)]
    table = sums_by_cluster(np.nan_to_num(np.stack(columns, axis=1)), clusters)  # without a fit: NaN, added below

    def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        patches, positive, squares = sums.T[:3]
        of_line, of_level = sums.T[3 + ECE_BINS : 12 + ECE_BINS], sums.T[12 + ECE_BINS :]
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample without patches, or with one class
            both = np.where((positive > 0) & (positive < patches), 0.0, np.nan)
            return {
                "brier": squares / patches,
                "ece": np.abs(sums[:, 3 : 3 + ECE_BINS]).sum(axis=1) / patches,
                "slope": line[1] + _step(of_line)[1] + both,
                "intercept": level[0] + _step_of_level(of_level) + both,
            }

    return Sums(table, figures)


def _step(sums: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Step from the fit of the whole set towards that of each of b resamples, from (9, b) sums of derivatives.

    Newton's step, then once more with the curvature's own change along it (Chebyshev's method).
    """
    gradient, (i0, i1, i2), (t0, t1, t2, t3) = sums[:2], sums[2:5], sums[5:]
    determinant = np.where(i0 * i2 > i1**2, i0 * i2 - i1**2, np.nan)

    def solved(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        return (i2 * a - i1 * b) / determinant, (i0 * b - i1 * a) / determinant

    x, y = solved(*gradient)
    return solved(
        gradient[0] - (t0 * x**2 + 2 * t1 * x * y + t2 * y**2) / 2,
        gradient[1] - (t1 * x**2 + 2 * t2 * x * y + t3 * y**2) / 2,
    )


def _step_of_level(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Step as `_step` does, with the slope held."""
    gradient, curvature, bend = sums[0], sums[2], sums[5]
    x = gradient / curvature
    return np.asarray((gradient - bend * x**2 / 2) / curvature)


def _fit(
    design: NDArray[np.float64], label: NDArray[np.float64], offset: NDArray[np.float64] | float
) -> NDArray[np.float64]:
    """Fit a logistic regression of (n,) labels on a design (n, q) by maximum likelihood: (q,), NaN if there is none.

    There is none if a class is absent, or if the last column of several parts the classes without an error.
    """
    q = design.shape[1]
    positives, negatives = design[label == 1, -1], design[label == 0, -1]
    if not len(positives) or not len(negatives):
        return np.full(q, np.nan)
    if q > 1 and not (positives.min() < negatives.max() and negatives.min() < positives.max()):
        return np.full(q, np.nan)
    sign = np.where(label == 1, 1.0, -1.0)

    def likelihood(at: NDArray[np.float64]) -> float:
        return float(log_expit(sign * (offset + design @ at)).sum())

    found = np.zeros(q)
    for _ in range(_STEPS):
        mean = expit(offset + design @ found)
        curvature = design.T @ (design * (mean * (1 - mean))[:, None])
        step = np.linalg.lstsq(curvature, design.T @ (label - mean))[0]
        while likelihood(found + step) < likelihood(found) and np.abs(step).max() > 1e-12:
            step = step / 2  # too far
        found = found + step
        if np.abs(step).max() < 1e-10:
            break
    return found


# ------------------------------------------------------------------------------------------------- decisions, in effect


def _predictive_values(
    ensemble: Ensemble, prevalences: Sequence[float], clusters: Clusters, resampling: Resampling
) -> tuple[PredictiveValues, ...]:
    """Compute both predictive values from sensitivity and specificity, for every prevalence (Bayes' rule)."""
    if not prevalences:
        return ()
    y = ensemble.label == 1

    def statistic(predicted: NDArray[np.bool_]) -> Sums:
        columns = np.stack([y, ~y, y & predicted, ~y & ~predicted], axis=1).astype(np.float64)

        def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
            positive, negative, tp, tn = sums.T
            found = {}
            with np.errstate(divide="ignore", invalid="ignore"):  # an absent class, or one that is never predicted
                sensitivity, specificity = tp / positive, tn / negative
                for k, share in enumerate(prevalences):
                    hits, rejected = sensitivity * share, specificity * (1 - share)
                    found[f"ppv {k}"] = hits / (hits + (1 - specificity) * (1 - share))
                    found[f"npv {k}"] = rejected / (rejected + (1 - sensitivity) * share)
            return found

        return Sums(sums_by_cluster(columns, clusters), figures)

    trainings = [
        statistic(probability >= threshold)
        for probability, threshold in zip(ensemble.positive, ensemble.thresholds, strict=True)
    ]
    found = intervals(resample([trainings], clusters, resampling), 0)
    return tuple(PredictiveValues(one, found[f"ppv {k}"], found[f"npv {k}"]) for k, one in enumerate(prevalences))


def _net_benefit(
    label: NDArray[np.float64],
    probability: Sequence[NDArray[np.float64]],
    clusters: Clusters,
    resampling: Resampling,
) -> NetBenefit:
    """Compute the decision curve, the mean over trainings, of (n,) corrected probabilities of each."""
    if not probability:
        return NetBenefit((), (), (), (), ())
    odds = np.array([one / (1 - one) for one in ACTING_FROM])

    def statistic(p: NDArray[np.float64]) -> Sums:
        acting = p[:, None] >= np.array(ACTING_FROM)
        gain = np.where(label[:, None] == 1, 1.0, -odds) * acting
        table = sums_by_cluster(np.concatenate([np.ones((len(p), 1)), gain], axis=1), clusters)

        def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
            with np.errstate(invalid="ignore"):  # a resample without patches
                return {f"benefit {k}": sums[:, 1 + k] / sums[:, 0] for k in range(len(odds))}

        return Sums(table, figures)

    found = intervals(resample([[statistic(p) for p in probability]], clusters, resampling), 0).values()
    prevalence = float(label.mean())
    return NetBenefit(
        threshold=ACTING_FROM,
        run=tuple(one.value for one in found),
        low=tuple(one.low for one in found),
        high=tuple(one.high for one in found),
        all=tuple((prevalence - odds * (1 - prevalence)).tolist()),
    )
