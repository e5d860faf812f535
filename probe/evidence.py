"""Is the difference real? Intervals, paired tests, ranks, and scores by rater and by domain.

A test set is a sample of slides, and patches of one slide resemble each other. Everything here is therefore resampled by
slide where slides are known (Field and Welsh, JRSS B 69, 2007) and by patch elsewhere; every result says which. Resamples
are counts, not copies: a slide drawn twice counts twice (Efron and Tibshirani, An Introduction to the Bootstrap, 1993),
and all runs on the same images are judged on the same resamples. Why intervals are studentised, and how well they
cover: docs/decisions/evidence.md.

    predictions -> ensemble -> judge          every figure with its interval
                            -> compare        runs side by side: differences, tests, ranks
                            -> by_agreement   figures the raters agreed on, figures they did not, and the raters
                            -> by_domain      every domain, their mean, the worst
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from features.console import UserError
from features.samples import MISSING_VOTE
from probe.metrics import NAMES, THRESHOLD, Tally, best_threshold, resampled_influences, tally
from probe.results import VALIDATION, Predictions

SLIDE, SAMPLE = "slide", "sample"  # what is drawn
COMPARED = ("balanced_accuracy", "auroc")  # the figures that differences, tests and ranks are of
OF_RATERS = ("balanced_accuracy", "sensitivity", "specificity")  # a rater gives classes, not scores
SMALLER_IS_BETTER = frozenset({"brier", "ece"})
_BLOCK = 2**17  # counts drawn at a time
_FLAT = 1e-10  # a variance of a difference below this share of the two variances is rounding


# ------------------------------------------------------------------------------------------------- records


@dataclass(frozen=True)
class Resampling:
    """How resamples are drawn. The same values give the same intervals, to the last digit.

    Attributes:
        replicates: how many.
        level: coverage asked of an interval.
        seed: of the generator; runs judged on the same set with the same seed share their resamples.
    """

    replicates: int = 10_000
    level: float = 0.95
    seed: int = 42

    def __post_init__(self) -> None:
        if self.replicates < 100:
            raise UserError(f"{self.replicates} replicates: an interval needs at least 100; 10,000 is the default.")
        if not 0.5 <= self.level < 1:
            raise UserError(f"a level of {self.level}: intervals need one from 0.5 to below 1, such as 0.95.")


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One run on one set as one model: the mean probability of its fold models, one row per patch.

    Attributes:
        dataset, split: which set.
        id, group: (n,) str; group is empty where the slide is unknown.
        label: (n,) int8.
        probability: (n,) mean over fold models; of "validation", that of the one model that did not train on it.
        threshold: positive from this probability on; chosen on the run's out-of-fold predictions.
    """

    dataset: str
    split: str
    id: NDArray[np.str_]
    label: NDArray[np.int8]
    group: NDArray[np.str_]
    probability: NDArray[np.float64]
    threshold: float

    def __len__(self) -> int:
        return len(self.id)

    def select(self, rows: NDArray[np.bool_]) -> Ensemble:
        """The rows of a mask."""
        columns = {name: getattr(self, name)[rows] for name in ("id", "label", "group", "probability")}
        return replace(self, **columns)


@dataclass(frozen=True)
class Interval:
    """A figure and the interval around it.

    Attributes:
        value: the figure; NaN if it does not exist (see `probe.metrics.scores`).
        low, high: ends of the interval; NaN where none can be given (fewer than two clusters, a figure without value).
        method: "studentised"; "percentile" where too many resamples have no spread of their own; "exact" where the
            figure is perfect and no resample differs; "none".
        n_undefined: resamples that lack a class the figure needs; they are left out of the interval.
    """

    value: float
    low: float
    high: float
    method: str
    n_undefined: int


@dataclass(frozen=True)
class Judgement:
    """Every figure of one run on one set.

    Attributes:
        n, n_positive: patches.
        unit: what was resampled, "slide" or "sample".
        n_clusters: how many of them.
        n_alone: patches of unknown slide among known ones; each counts as a slide of its own.
        threshold: as in `Ensemble`.
        level, replicates: as in `Resampling`.
        figures: name (`probe.metrics.NAMES`) to interval.
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
class Difference:
    """First minus second on the same images.

    Attributes:
        value: the difference.
        low, high: its interval; excludes zero exactly when p < 1 - level.
        p: two-sided; share of resamples whose studentised distance from `value` is at least that of zero.
        p_holm: p adjusted for all pairs compared on this set.
        n_undefined: resamples that lack a class.
    """

    value: float
    low: float
    high: float
    p: float
    p_holm: float
    n_undefined: int


@dataclass(frozen=True)
class DeLong:
    """DeLong's test of two AUROCs on the same independent samples.

    Attributes:
        first, second: the AUROCs.
        value: their difference.
        standard_error: of the difference.
        z: value / standard_error.
        p: two-sided, from the normal distribution.
        p_holm: p adjusted for all pairs compared on this set.
    """

    first: float
    second: float
    value: float
    standard_error: float
    z: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Pair:
    """Two runs on the same images.

    Attributes:
        first, second: the runs' names.
        differences: figure (`COMPARED`) to difference.
        delong: None where samples are not independent, that is, where slides are known.
    """

    first: str
    second: str
    differences: dict[str, Difference]
    delong: DeLong | None


@dataclass(frozen=True)
class Rank:
    """A run's place among the runs compared; 1 is the best, equals share the better place.

    Attributes:
        value: its rank.
        low, high: the interval of its rank over resamples. It says how far this test set decides the order, and is
            too narrow for runs that are truly equal (Hall and Miller, Annals of Statistics 37, 2009).
        share_first: share of resamples in which no run is better.
    """

    value: int
    low: int
    high: int
    share_first: float


@dataclass(frozen=True)
class Comparison:
    """Runs on the same images, judged on the same resamples.

    Attributes:
        judgements: run to its figures.
        pairs: every two runs, in the order given.
        ranks: figure (`COMPARED`) to run to rank.
    """

    judgements: dict[str, Judgement]
    pairs: tuple[Pair, ...]
    ranks: dict[str, dict[str, Rank]]


@dataclass(frozen=True)
class Rater:
    """One rater, and the run, against the majority of the other raters on the same figures.

    Attributes:
        n, n_positive: figures with a vote of this rater and a majority among the others, and those positive by it.
        n_missing: figures without a vote of this rater, or of any other.
        n_tied: figures left out because the others are split evenly.
        rater, run: figure (`OF_RATERS`) to interval, both against the others' majority.
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
        unanimous, disputed: figures with at least two votes, all equal or not; None where there are none.
        n_unrated: figures with fewer than two votes.
        raters: one per column of votes; the human ceiling.
    """

    unanimous: Judgement | None
    disputed: Judgement | None
    n_unrated: int
    raters: tuple[Rater, ...]


@dataclass(frozen=True)
class Worst:
    """The domain with the worst score.

    Attributes:
        domain: its name.
        value: its score.
        share: share of resamples in which it is the worst.
    """

    domain: str
    value: float
    share: float


@dataclass(frozen=True)
class DomainView:
    """Scores by domain: every domain counts the same, however many patches it has.

    Attributes:
        domains: domain to its figures, resampled within it.
        n_without: patches without a domain; they are in no figure here.
        macro: figure to the mean over the domains in which it exists; resampled over all of them.
        n_domains: figure to the number of those domains.
        worst: figure to the worst of those domains.
    """

    domains: dict[str, Judgement]
    n_without: int
    macro: dict[str, Interval]
    n_domains: dict[str, int]
    worst: dict[str, Worst]


def as_dict(result: Any) -> Any:
    """A result as plain JSON values: records as objects, tuples as lists, NaN and infinities as null."""
    if dataclasses.is_dataclass(result):
        return {field.name: as_dict(getattr(result, field.name)) for field in dataclasses.fields(result)}
    if isinstance(result, Mapping):
        return {str(key): as_dict(value) for key, value in result.items()}
    if isinstance(result, tuple | list):
        return [as_dict(value) for value in result]
    if isinstance(result, float):
        return result if math.isfinite(result) else None
    return result


# ------------------------------------------------------------------------------------------------- what is judged


def threshold_of(predictions: Predictions) -> float:
    """The run's threshold: the best on its out-of-fold predictions; 0.5 where it has none."""
    out_of_fold = predictions.select(predictions.split == VALIDATION)
    return best_threshold(out_of_fold.label, out_of_fold.probability) if len(out_of_fold.label) else THRESHOLD


def ensemble(predictions: Predictions, dataset: str, split: str) -> Ensemble:
    """A run's mean probability over fold models on one of its sets, in the order of the patch table.

    Raises:
        UserError: if the run has no such set, or its rows are not those of whole fold models.
    """
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    name = f"{dataset}/{split}"
    if not len(part.id):
        held = ", ".join(sorted(f"{a}/{b}" for a, b in predictions.sets())) or "none"
        raise UserError(f"this run has no predictions of {name}; it has: {held}. Run it again with --test {dataset}.")
    ids, first, row, n_models = np.unique(part.id, return_index=True, return_inverse=True, return_counts=True)
    if len(set(zip(row.tolist(), part.fold.tolist(), strict=True))) < len(row):
        raise UserError(f"predictions of {name}: a patch occurs twice for one fold. predictions.csv is damaged.")
    if n_models.min() < n_models.max():
        lacking = ids[np.argmin(n_models)]
        raise UserError(
            f"predictions of {name}: {lacking} has {n_models.min()} fold models, others have {n_models.max()}. "
            "predictions.csv is damaged."
        )
    for column in ("label", "group"):
        values = getattr(part, column)
        differing = np.flatnonzero(values != values[first][row])
        if len(differing):
            raise UserError(
                f"predictions of {name}: {part.id[differing[0]]} has two {column}s. predictions.csv is damaged."
            )
    in_order = np.argsort(first)
    rows = first[in_order]
    return Ensemble(
        dataset=dataset,
        split=split,
        id=part.id[rows],
        label=part.label[rows],
        group=part.group[rows],
        probability=(np.bincount(row, weights=part.probability) / n_models)[in_order],
        threshold=threshold_of(predictions),
    )


def rows_of(judged: Ensemble, ids: NDArray[np.str_]) -> NDArray[np.intp]:
    """Where each patch of the set stands in a patch table: votes[rows_of(judged, table_ids)] are aligned with it.

    Raises:
        UserError: if the table lacks a patch.
    """
    order = np.argsort(ids, kind="stable")
    place = np.minimum(np.searchsorted(ids, judged.id, sorter=order), len(ids) - 1) if len(ids) else None
    missing = judged.id if place is None else judged.id[ids[order[place]] != judged.id]
    if len(missing) or place is None:
        raise UserError(
            f"{len(missing)} of {len(judged)} patches of {judged.dataset}/{judged.split} are not in the patch table "
            f"(first: {missing[0]}). The run and the table are of different data."
        )
    return np.asarray(order[place])
