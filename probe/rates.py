"""How large is the share of class 1 on each slide, by the run and by the annotation?

The share among a slide's figures, not the class of a single one, is what a prognosis rests on. What a run predicts (the
apparent share) is drawn towards the middle by its errors. With its sensitivity and specificity, known out of fold, the
share is corrected for them (Rogan and Gladen, American Journal of Epidemiology 107, 1978).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from features.console import UserError
from probe.edge import held
from probe.ensembles import Ensemble
from probe.metrics import Interval
from probe.resample import Clusters, Resampling, Sums, intervals, make_clusters, resample, sums_by_cluster

MIN_FIGURES = 10  # figures of a slide; of fewer, a share says too little to be compared
AGREEMENT_FIGURES = ("bias", "lower limit", "upper limit", "concordance")
_FEWEST = 3  # slides, for limits of agreement
_LIMITS = 1.96  # standard deviations to either side (Bland and Altman)


@dataclass(frozen=True)
class ErrorRates:
    """What is known of a run's errors, from patches of slides that did not train the model that predicted them.

    Attributes:
        sensitivity, specificity: with their intervals over other slides.
        n_sensitivity, n_specificity: how many independent patches each is worth: as many as would give its standard
            error.
        slides: variance from slide to slide of a slide's own sensitivity, of its own specificity, and their covariance.
    """

    sensitivity: Interval
    specificity: Interval
    n_sensitivity: float
    n_specificity: float
    slides: tuple[float, float, float]

    def corrected(self, n_positive: int, n: int, level: float = 0.95) -> tuple[float, float, float]:
        """Correct the share of a slide's figures that were predicted positive; see `corrected_rate`."""
        return corrected_rate(
            n_positive,
            n,
            self.sensitivity.value,
            self.specificity.value,
            n_sensitivity=self.n_sensitivity,
            n_specificity=self.n_specificity,
            slides=self.slides,
            level=level,
        )


@dataclass(frozen=True)
class SlideRate:
    """The share of class 1 on one slide.

    Attributes:
        slide, domain: names; the domain is empty where unknown. A slide in several domains has a row for each.
        n: figures.
        annotated: share among them by annotation.
        predicted: share among them by the run at its threshold.
        corrected: predicted, corrected for the run's sensitivity and specificity; NaN if they do not sum to above 1.
        low, high: interval of the share on this slide, of which its figures are a sample.
    """

    slide: str
    domain: str
    n: int
    annotated: float
    predicted: float
    corrected: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """How far shares by the run agree with those by annotation, slide by slide, each slide counting the same.

    Attributes:
        n_slides: how many.
        predicted, corrected: figure (`AGREEMENT_FIGURES`) to interval over other slides. Bias: mean of the run's share
            less the annotated one. Limits: bias ± 1.96 standard deviations of that difference, between which some
            95 % of slides lie (Bland and Altman, Lancet 327, 1986). Concordance: Lin's correlation coefficient, 1 if
            both shares are the same on every slide (Biometrics 45, 1989).
    """

    n_slides: int
    predicted: dict[str, Interval]
    corrected: dict[str, Interval]


@dataclass(frozen=True)
class RateView:
    """Shares of class 1 by slide.

    Attributes:
        slides: those with at least `MIN_FIGURES` figures, by name.
        n_left_out: slides with fewer.
        sensitivity, specificity: of the run, out of fold, at the threshold used here.
        agreement: "all", and each domain, to agreement; without those that have fewer than three slides.
    """

    slides: tuple[SlideRate, ...]
    n_left_out: int
    sensitivity: Interval
    specificity: Interval
    agreement: dict[str, Agreement]


# ----------------------------------------------------------------------------------------------------- one slide's rate


def corrected_rate(
    n_positive: int,
    n: int,
    sensitivity: float,
    specificity: float,
    *,
    n_sensitivity: float,
    n_specificity: float,
    slides: tuple[float, float, float] = (0.0, 0.0, 0.0),
    level: float = 0.95,
) -> tuple[float, float, float]:
    """Correct a share of positive predictions for errors (Rogan and Gladen), with an interval.

    The interval is that of Lang and Reiczigel (Preventive Veterinary Medicine 113, 2014), which holds the uncertainty
    of the share, of the sensitivity and of the specificity. To its variance is added what a slide's own sensitivity and
    specificity stray from those of all slides, if that is known.

    Args:
        n_positive, n: figures of the slide that were predicted positive, and all of them.
        sensitivity, specificity: of the predictions.
        n_sensitivity, n_specificity: independent patches that these were estimated from.
        slides: as in `ErrorRates`.
        level: coverage asked.

    Returns:
        The corrected share and the ends of its interval, all within 0 to 1; NaN if sensitivity and specificity do not
        sum to above 1, because positives would then be no more often predicted positive than negatives.
    """
    if not n or not sensitivity + specificity > 1:
        return math.nan, math.nan, math.nan
    value = (n_positive / n + specificity - 1) / (sensitivity + specificity - 1)
    z = float(-ndtri((1 - level) / 2))
    apparent, n_apparent = (n_positive + z**2 / 2) / (n + z**2), n + z**2
    hit, rejected = (
        (n_of * one + 1) / (n_of + 2) for one, n_of in ((sensitivity, n_sensitivity), (specificity, n_specificity))
    )
    gain = hit + rejected - 1
    if not gain > 0:
        return math.nan, math.nan, math.nan
    share = (apparent + rejected - 1) / gain
    of_hit, of_rejected = hit * (1 - hit) / (n_sensitivity + 2), rejected * (1 - rejected) / (n_specificity + 2)
    inside = min(1.0, max(0.0, share))  # a slide's own errors act on a share, which is none outside
    variance = (
        apparent * (1 - apparent) / n_apparent
        + share**2 * of_hit
        + (1 - share) ** 2 * of_rejected
        + max(0.0, inside**2 * slides[0] + (1 - inside) ** 2 * slides[1] - 2 * inside * (1 - inside) * slides[2])
    )
    middle = share + 2 * z**2 * (share * of_hit - (1 - share) * of_rejected)
    reach = z * math.sqrt(variance) / gain
    low, high = middle - reach, middle + reach
    return min(1.0, max(0.0, value)), min(1.0, max(0.0, low)), min(1.0, max(0.0, high))


def share_interval(n_positive: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Compute the interval of a share of `n` figures (Wilson, Journal of the American Statistical Assoc. 22, 1927)."""
    z2 = float(ndtri((1 - level) / 2)) ** 2
    middle, reach = n_positive + z2 / 2, math.sqrt(z2) * math.sqrt(n_positive * (n - n_positive) / n + z2 / 4)
    return max(0.0, (middle - reach) / (n + z2)), min(1.0, (middle + reach) / (n + z2))


def error_rates(
    out_of_fold: Ensemble, *, threshold: float | None = None, resampling: Resampling = Resampling()
) -> ErrorRates:
    """Estimate a run's sensitivity and specificity from its out-of-fold predictions, all its trainings together.

    Args:
        out_of_fold: the run on its validation folds.
        threshold: positive from this probability on; the run's own if None.
        resampling: how resamples are drawn.
    """
    y = out_of_fold.label == 1
    predicted = out_of_fold.probability[:, 1] >= (out_of_fold.threshold if threshold is None else threshold)
    clusters = out_of_fold.clusters
    counts = sums_by_cluster(np.stack([y, ~y, y & predicted, ~y & ~predicted], axis=1).astype(np.float64), clusters)
    resampled = resample([[Sums(counts, _hit_rates)]], clusters, resampling)
    found = intervals(resampled, 0, classes=held(out_of_fold.label, clusters.index, out_of_fold.by_training))

    def worth(name: str, of_class: NDArray[np.float64]) -> float:
        value, variance = found[name].value, resampled.of(name, 0).standard_error ** 2
        # One that no resample changes is worth as many patches as clusters hold its class.
        n = value * (1 - value) / variance if variance > 0 else float((of_class > 0).sum())
        return min(n, float(of_class.sum()))

    return ErrorRates(
        found["sensitivity"],
        found["specificity"],
        worth("sensitivity", counts[:, 0]),
        worth("specificity", counts[:, 1]),
        _between_slides(counts),
    )


def _hit_rates(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    positive, negative, tp, tn = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):  # an absent class
        return {"sensitivity": tp / positive, "specificity": tn / negative}


def _between_slides(counts: NDArray[np.float64]) -> tuple[float, float, float]:
    """Estimate how sensitivity and specificity vary over slides, from (k, 4) counts, by the method of moments.

    If a slide's sensitivity varies with variance v about s, its m positives bring hits of variance
    m s (1 - s) + m (m - 1) v; with its l negatives, m l times the covariance.
    """
    positive, negative, tp, tn = counts.T
    variances, strays = [], []
    for n, hits in ((positive, tp), (negative, tn)):
        total, pairs = float(n.sum()), float((n * (n - 1)).sum())
        rate = float(hits.sum()) / total if total else 0.0
        weight = np.sqrt(1 - n / max(total, 1.0))  # a heavy slide is near the rate because it makes the rate
        strayed = np.divide(hits - n * rate, weight, out=np.zeros_like(hits), where=weight > 0)
        beyond_chance = float((strayed**2).sum()) - rate * (1 - rate) * total
        variances.append(min(rate * (1 - rate), max(0.0, beyond_chance / pairs)) if pairs else 0.0)
        strays.append(strayed)
    pairs = float((positive * negative).sum())
    covariance = float((strays[0] * strays[1]).sum()) / pairs if pairs else 0.0
    most = math.sqrt(variances[0] * variances[1])
    return variances[0], variances[1], min(most, max(-most, covariance))


# ------------------------------------------------------------------------------------------------ the slides of one set


def by_slide(
    ensemble: Ensemble,
    domain: NDArray[np.str_],
    *,
    out_of_fold: Ensemble,
    resampling: Resampling = Resampling(),
) -> RateView:
    """Compare a run's share of class 1 with the annotated one, slide by slide.

    The slides' rows are those of all trainings together, which is what `fm-predict` gives. Agreement is the mean over
    trainings, each at its own threshold and corrected for its own errors.

    Args:
        ensemble: the run on the set.
        domain: (n,) str, aligned with the set (see `probe.ensembles.rows_of`); empty where unknown.
        out_of_fold: the run on its validation folds, where its errors are known from.
        resampling: how resamples are drawn.

    Raises:
        ValueError: if domain is not (n,).
        UserError: if no patch has a slide.
    """
    domain = np.asarray(domain)
    if domain.shape != (len(ensemble),):
        raise ValueError(f"domain must be ({len(ensemble)},), got shape {domain.shape}")
    known = ensemble.group != ""
    if not known.any():
        raise UserError(f"{ensemble.dataset} has no slides: there is no rate per slide.")
    part = ensemble.select(known)
    places, row = np.unique(np.stack([part.group, domain[known]]), axis=1, return_inverse=True)  # slide and domain
    n = np.bincount(row)
    kept = np.flatnonzero(n >= MIN_FIGURES)

    def share(of: NDArray[np.bool_]) -> NDArray[np.float64]:
        return np.asarray(np.bincount(row, weights=of)[kept] / n[kept])

    slide, domains = places[:, kept]
    annotated, predicted = share(part.label == 1), share(part.predicted == 1)
    errors = error_rates(out_of_fold, threshold=ensemble.threshold, resampling=resampling)
    shares = []  # of every training: predicted, and corrected for its own errors
    for k, threshold in enumerate(part.thresholds):
        of_training = share(part.positive[k] >= threshold)
        y, hit = out_of_fold.label == 1, out_of_fold.positive[k] >= threshold
        gain = hit[y].mean() - hit[~y].mean() if y.any() and not y.all() else math.nan
        corrected = np.clip((of_training - hit[~y].mean()) / gain, 0, 1) if gain > 0 else np.full(len(kept), np.nan)
        shares.append((of_training, corrected))
    agreement = {}
    for name in ("all", *(sorted(set(domains.tolist()) - {""}) if len(set(domains.tolist())) > 1 else ())):
        rows = np.flatnonzero((domains == name) | (name == "all"))
        clusters = make_clusters(slide[rows])
        if clusters.n < _FEWEST:
            continue
        subjects = [
            [_agreement(by_run[rows], annotated[rows], clusters) for by_run in forms]
            for forms in zip(*shares, strict=True)
        ]
        resampled = resample(subjects, clusters, resampling)
        agreement[name] = Agreement(clusters.n, intervals(resampled, 0), intervals(resampled, 1))
    slides = []
    for k, figures in enumerate(n[kept].tolist()):
        n_positive = round(float(predicted[k]) * figures)
        value, low, high = errors.corrected(n_positive, figures, resampling.level)
        names = str(slide[k]), str(domains[k])
        slides.append(SlideRate(*names, figures, float(annotated[k]), float(predicted[k]), value, low, high))
    return RateView(
        slides=tuple(slides),
        n_left_out=len(n) - len(kept),
        sensitivity=errors.sensitivity,
        specificity=errors.specificity,
        agreement=agreement,
    )


def _agreement(by_run: NDArray[np.float64], annotated: NDArray[np.float64], clusters: Clusters) -> Sums:
    """Sum up what limits of agreement and concordance of (m,) shares need; NaN if the run's shares are."""
    undefined = np.nan if np.isnan(by_run).any() else 0.0
    x, y = np.nan_to_num(by_run), annotated
    columns = np.stack([np.ones(len(x)), x, y, x * x, y * y, x * y], axis=1)

    def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        n = sums[:, 0]
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample of a single slide, or of equal shares
            x, y, xx, yy, xy = sums[:, 1:].T / n
            bias = x - y + undefined
            limit = _LIMITS * np.sqrt(np.maximum(0, xx + yy - 2 * xy - bias**2) * n / (n - 1))
            return {
                "bias": bias,
                "lower limit": bias - limit,
                "upper limit": bias + limit,
                "concordance": 2 * (xy - x * y) / (xx - x**2 + yy - y**2 + bias**2),
            }

    return Sums(sums_by_cluster(columns, clusters), figures)
