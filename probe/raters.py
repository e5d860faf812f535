"""How good is a run where the raters agree, where they do not, and beside each rater?"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.samples import MISSING_VOTE
from probe.ensembles import Ensemble
from probe.evidence import judge
from probe.metrics import Interval, Judgement
from probe.resample import Resampling, intervals, resample
from probe.significance import Difference, adjusted, difference

RATER_FIGURES = ("balanced_accuracy", "sensitivity", "specificity")  # a rater gives classes, not scores


@dataclass(frozen=True)
class Rater:
    """One rater, and the run, against the majority of the other raters on the same patches.

    Attributes:
        n, n_positive: patches with a vote of this rater and a majority among the others, and those positive by it.
        n_missing: patches without a vote of this rater, or of any other.
        n_tied: patches left out because the others are split evenly.
        rater, run: figure (`RATER_FIGURES`) to interval, both against the others' majority.
        difference: run minus rater in balanced accuracy.
    """

    n: int
    n_positive: int
    n_missing: int
    n_tied: int
    rater: dict[str, Interval]
    run: dict[str, Interval]
    difference: Difference


@dataclass(frozen=True)
class RaterView:
    """Scores by how far the raters agree.

    Attributes:
        unanimous, disputed: on patches with at least two votes, all equal or not; None where there are none.
        n_unrated: patches with fewer than two votes.
        raters: one per column of votes; they show what a human reaches.
    """

    unanimous: Judgement | None
    disputed: Judgement | None
    n_unrated: int
    raters: tuple[Rater, ...]


def by_agreement(ensemble: Ensemble, votes: NDArray[np.integer], *, resampling: Resampling = Resampling()) -> RaterView:
    """Judge a run on patches that the raters agreed on, on those they did not, and beside each rater.

    A rater is judged by the majority of the others, which never contains this rater's own vote, and the run by the
    same majority on the same patches. Where the others are evenly split there is no majority.

    Args:
        ensemble: the run on the set.
        votes: (n, raters), 1 positive, 0 negative, -1 missing, aligned with the set (see `probe.evidence.rows_of`).
        resampling: how resamples are drawn; p-values of the differences are adjusted over raters.

    Raises:
        ValueError: if votes are not (n, raters), or hold other values.
        UserError: if there are fewer than two raters.
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
    n_votes, n_for = (votes != MISSING_VOTE).sum(axis=1), (votes == 1).sum(axis=1)
    agreed = (n_for == 0) | (n_for == n_votes)
    parts = [ensemble.select((n_votes >= 2) & rows) for rows in (agreed, ~agreed)]
    unanimous, disputed = (judge(part, resampling=resampling) if len(part) else None for part in parts)
    raters = [_rater(ensemble, votes[:, k], np.delete(votes, k, axis=1), resampling) for k in range(votes.shape[1])]
    differences = adjusted([rater.difference for rater in raters])
    return RaterView(
        unanimous=unanimous,
        disputed=disputed,
        n_unrated=int((n_votes < 2).sum()),
        raters=tuple(replace(rater, difference=one) for rater, one in zip(raters, differences, strict=True)),
    )


def _rater(
    ensemble: Ensemble,
    vote: NDArray[np.integer],
    others: NDArray[np.integer],
    resampling: Resampling,
) -> Rater:
    n_others, n_others_for = (others != MISSING_VOTE).sum(axis=1), (others == 1).sum(axis=1)
    missing = (vote == MISSING_VOTE) | (n_others == 0)
    tied = ~missing & (2 * n_others_for == n_others)
    rows = ~(missing | tied)
    run = replace(ensemble.select(rows), label=(2 * n_others_for > n_others)[rows].astype(np.int8))
    rater = replace(run, by_training=vote[rows].astype(np.float64)[None], thresholds=np.array([0.5]))
    clusters = run.clusters
    tallies = [one.tallies(clusters, names=RATER_FIGURES) for one in (rater, run)]
    resampled = resample(tallies, clusters, resampling)
    return Rater(
        n=len(run),
        n_positive=int(run.label.sum()),
        n_missing=int(missing.sum()),
        n_tied=int(tied.sum()),
        rater=intervals(resampled, 0),
        run=intervals(resampled, 1),
        difference=difference(resampled, "balanced_accuracy", 1, 0),
    )
