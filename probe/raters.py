"""How far do the raters agree, how good is a run where they do, and would it pass for one of them?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.samples import MISSING_VOTE
from probe.ensembles import Ensemble
from probe.evidence import judge
from probe.metrics import Interval, Judgement
from probe.resample import Clusters, Resampling, Sums, intervals, resample, sums_by_cluster
from probe.significance import Difference, adjusted, difference

RATER_FIGURES = ("balanced_accuracy", "sensitivity", "specificity", "kappa")  # a rater gives classes, not scores
SOFT_FIGURES = ("brier", "log_loss", "correlation")
_MOST_DISSENTS = 50
_EDGE = 1e-12  # probabilities are kept this far from 0 and 1 for their logarithm


@dataclass(frozen=True)
class Rater:
    """One rater, and the run in this rater's place, against each of the other raters.

    Both are compared with one other rater at a time, on the patches on which this rater and that other one voted, and
    the figures are means over the others. No patch is left out because the others disagree, so the rows of several
    raters are about the same patches, and can be compared with each other where every rater has seen every patch.

    Attributes:
        n: patches with a vote of this rater and of another.
        rater, run: figure (`RATER_FIGURES`) to interval. Kappa is Cohen's (Educational and Psychological Measurement
            20, 1960).
        difference: run minus rater in balanced accuracy.
    """

    n: int
    rater: dict[str, Interval]
    run: dict[str, Interval]
    difference: Difference


@dataclass(frozen=True)
class Dissent:
    """A patch on which the run and the raters differ.

    Attributes:
        id: its name.
        label: its class in the dataset.
        probability: of class 1, by the run.
    """

    id: str
    label: int
    probability: float


@dataclass(frozen=True)
class RaterView:
    """A run beside the raters.

    Attributes:
        unanimous, disputed: on patches with at least two votes, all equal or not; None where there are none.
        n_unrated: patches with fewer than two votes; they are in no figure here.
        fleiss: agreement of the raters beyond chance, by Fleiss' kappa (Psychological Bulletin 76, 1971); where the
            number of votes varies, in the form of Fleiss and Cuzick (Applied Psychological Measurement 3, 1979).
        krippendorff: the same by Krippendorff's alpha for names, which takes missing votes (Content Analysis, 2004).
        raters: one per column of votes.
        soft: figure (`SOFT_FIGURES`) to interval: the raw probability against the share of votes for class 1.
        against_unanimous: patches of which the run says the other class than all raters, the most confident first; of
            `n_against_unanimous` at most 50.
        with_minority: the same of those of which it says what fewer than half of the raters say.
    """

    unanimous: Judgement | None
    disputed: Judgement | None
    n_unrated: int
    fleiss: Interval
    krippendorff: Interval
    raters: tuple[Rater, ...]
    soft: dict[str, Interval]
    n_against_unanimous: int
    against_unanimous: tuple[Dissent, ...]
    n_with_minority: int
    with_minority: tuple[Dissent, ...]


def by_agreement(ensemble: Ensemble, votes: NDArray[np.integer], *, resampling: Resampling = Resampling()) -> RaterView:
    """Judge a run on patches that the raters agreed on, on those they did not, and beside each rater.

    Args:
        ensemble: the run on the set.
        votes: (n, raters), 1 positive, 0 negative, -1 missing, aligned with the set (see `probe.ensembles.rows_of`).
        resampling: how resamples are drawn; p-values of the differences are adjusted over raters.

    Raises:
        ValueError: if votes are not (n, raters), or hold other values.
        UserError: if there are fewer than two raters, or no patch has two votes.
    """
    votes = np.asarray(votes)
    if votes.ndim != 2 or len(votes) != len(ensemble):
        raise ValueError(f"votes must be ({len(ensemble)}, raters), got shape {votes.shape}")
    if not np.isin(votes, (0, 1, MISSING_VOTE)).all():
        raise ValueError(f"votes must be 0, 1 or {MISSING_VOTE}, found {sorted(set(votes.ravel().tolist()))}")
    if votes.shape[1] < 2:
        raise UserError(
            f"{ensemble.dataset} has the votes of {votes.shape[1]} raters; agreement needs two. It has no rater view."
        )
    rated = (votes != MISSING_VOTE).sum(axis=1) >= 2
    if not rated.any():
        raise UserError(f"{ensemble.dataset} has no patch with two votes; agreement needs two. It has no rater view.")
    part, votes = ensemble.select(rated), votes[rated]
    clusters = part.clusters
    n_votes, n_for = (votes != MISSING_VOTE).sum(axis=1), (votes == 1).sum(axis=1)
    agreed = (n_for == 0) | (n_for == n_votes)
    unanimous, disputed = (
        judge(part.select(rows), resampling=resampling) if rows.any() else None for rows in (agreed, ~agreed)
    )
    chance = intervals(resample([[_agreement_sums(n_votes, n_for, clusters)]], clusters, resampling), 0)
    trainings = [_soft_sums(probability, n_for / n_votes, clusters) for probability in part.positive]
    says = part.predicted == 1
    against, minority = (
        agreed & (says != (n_for > 0)),
        ~agreed & np.where(says, 2 * n_for < n_votes, 2 * n_for > n_votes),
    )
    return RaterView(
        unanimous=unanimous,
        disputed=disputed,
        n_unrated=int((~rated).sum()),
        fleiss=chance["fleiss"],
        krippendorff=chance["krippendorff"],
        raters=_raters(part, votes, clusters, resampling),
        soft=intervals(resample([trainings], clusters, resampling), 0),
        n_against_unanimous=int(against.sum()),
        against_unanimous=_dissents(part.select(against)),
        n_with_minority=int(minority.sum()),
        with_minority=_dissents(part.select(minority)),
    )


# ---------------------------------------------------------------------------------------------- raters among themselves


def _agreement_sums(n_votes: NDArray[np.integer], n_for: NDArray[np.integer], clusters: Clusters) -> Sums:
    """Sum up what Fleiss' kappa and Krippendorff's alpha need, of (n,) numbers of votes (two or more) and of those for.

    A patch with m votes, x of them for class 1, has x (m - x) pairs that disagree.
    """
    m, x = n_votes.astype(np.float64), n_for.astype(np.float64)
    differing = x * (m - x)
    columns = np.stack([np.ones(len(m)), m, x, differing / m, differing / (m - 1)], axis=1)

    def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        patches, total, positive, by_m, by_pairs = sums.T
        with np.errstate(divide="ignore", invalid="ignore"):  # all votes for one class: chance alone would agree
            share = positive / total
            return {
                "fleiss": 1 - by_m / ((total - patches) * share * (1 - share)),
                "krippendorff": 1 - (total - 1) * by_pairs / (positive * (total - positive)),
            }

    return Sums(sums_by_cluster(columns, clusters), figures)


# ----------------------------------------------------------------------------------------------- the run and each rater


def _raters(
    ensemble: Ensemble, votes: NDArray[np.integer], clusters: Clusters, resampling: Resampling
) -> tuple[Rater, ...]:
    """Compare each rater, and the run in its place, with the others."""
    n_raters = votes.shape[1]
    trainings = [
        (probability >= threshold).astype(np.int8)
        for probability, threshold in zip(ensemble.positive, ensemble.thresholds, strict=True)
    ]
    as_raters = [[_against_others(votes[:, k], votes, k, clusters)] for k in range(n_raters)]
    as_runs = [[_against_others(says, votes, k, clusters) for says in trainings] for k in range(n_raters)]
    resampled = resample([*as_raters, *as_runs], clusters, resampling)
    differences = adjusted([difference(resampled, "balanced_accuracy", n_raters + k, k) for k in range(n_raters)])
    has_vote = votes != MISSING_VOTE
    return tuple(
        Rater(
            n=int((has_vote[:, k] & (has_vote.sum(axis=1) > 1)).sum()),
            rater=intervals(resampled, k),
            run=intervals(resampled, n_raters + k),
            difference=differences[k],
        )
        for k in range(n_raters)
    )


def _against_others(says: NDArray[np.integer], votes: NDArray[np.integer], rater: int, clusters: Clusters) -> Sums:
    """Compare what (n,) `says` with each vote but those of one rater, where that rater and the other voted."""
    others = [k for k in range(votes.shape[1]) if k != rater]
    columns = []
    for other in others:
        shared = (votes[:, rater] != MISSING_VOTE) & (votes[:, other] != MISSING_VOTE)
        y, hit = votes[:, other] == 1, says == 1
        columns += [shared & y, shared & ~y, shared & y & hit, shared & ~y & ~hit]
    table = sums_by_cluster(np.stack(columns, axis=1).astype(np.float64), clusters)

    def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        positive, negative, tp, tn = np.moveaxis(sums.reshape(len(sums), len(others), 4), 2, 0)  # (b, others) each
        shared = positive + negative > 0
        with np.errstate(divide="ignore", invalid="ignore"):  # an absent class
            sensitivity, specificity = (_mean_of_defined(hits, shared) for hits in (tp / positive, tn / negative))
        return {
            "balanced_accuracy": (sensitivity + specificity) / 2,
            "sensitivity": sensitivity,
            "specificity": specificity,
            "kappa": _mean_of_defined(_cohen(positive, negative, tp=tp, tn=tn), shared),
        }

    return Sums(table, figures)


def _cohen(
    positive: NDArray[np.float64], negative: NDArray[np.float64], *, tp: NDArray[np.float64], tn: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Compute Cohen's kappa from patches of each class and those of them said right, as `probe.metrics` counts them."""
    n, said = positive + negative, tp + negative - tn
    with np.errstate(divide="ignore", invalid="ignore"):  # both say one class only: chance alone would agree
        by_chance = (positive * said + negative * (n - said)) / n**2
        return np.asarray(((tp + tn) / n - by_chance) / (1 - by_chance))


def _mean_of_defined(values: NDArray[np.float64], shared: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Average (b, others) figures over others that share patches; NaN if one of those has no figure, or none does."""
    with np.errstate(invalid="ignore"):
        return np.asarray(np.where(shared, values, 0).sum(axis=1) / shared.sum(axis=1))


# --------------------------------------------------------------------------------------------- soft labels and dissents


def _soft_sums(probability: NDArray[np.float64], share: NDArray[np.float64], clusters: Clusters) -> Sums:
    """Sum up what the scores of (n,) probabilities against (n,) shares of votes need."""
    p = np.clip(probability, _EDGE, 1 - _EDGE)
    loss = -(share * np.log(p) + (1 - share) * np.log(1 - p))
    columns = np.stack([np.ones(len(p)), (p - share) ** 2, loss, p, share, p * p, share * share, p * share], axis=1)

    def figures(sums: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        with np.errstate(divide="ignore", invalid="ignore"):  # all shares, or all probabilities, are the same
            squares, loss, p, share, pp, ss, ps = (sums[:, 1:] / sums[:, :1]).T
            correlation = (ps - p * share) / np.sqrt(np.maximum(0, pp - p**2) * np.maximum(0, ss - share**2))
        return {"brier": squares, "log_loss": loss, "correlation": correlation}

    return Sums(sums_by_cluster(columns, clusters), figures)


def _dissents(ensemble: Ensemble) -> tuple[Dissent, ...]:
    """List patches, those whose probability lies furthest from the threshold first."""
    positive = ensemble.probability[:, 1]
    order = np.argsort(-np.abs(positive - ensemble.threshold), kind="stable")[:_MOST_DISSENTS]
    chosen = ensemble.select(order)
    return tuple(
        Dissent(*row) for row in zip(chosen.id.tolist(), chosen.label.tolist(), positive[order].tolist(), strict=True)
    )
