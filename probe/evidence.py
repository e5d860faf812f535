"""Is the difference real? Figures of runs with intervals, and runs compared on the same images.

    predictions -> evaluate                                  one run: what metrics.json holds
    predictions -> probe.ensembles.ensemble_of -> judge      every figure with its interval
                                               -> compare    runs side by side: differences, tests, ranks

Intervals and p-values come from resampling (`probe.resample`, `probe.significance`): by slide where slides are known,
by patch elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.display import html_table
from features.samples import Samples
from probe.edge import held
from probe.ensembles import Ensemble, ensemble_of, rows_of
from probe.metrics import COMPARED, FoldFigure, Judgement, RunMetrics, SetMetrics, figure_names, scores
from probe.predictions import VALIDATION, Predictions, threshold_of, trainings_of
from probe.resample import Clusters, Resampled, Resampling, intervals, resample
from probe.significance import (
    DeLong,
    Difference,
    ResampledT,
    adjusted,
    delong_tests,
    difference,
    resampled_t,
    slides_needed,
    untested,
)
from probe.trainings import Trainings, VarianceParts, chance_to_turn, variance_parts

Folds = Mapping[str, Mapping[str, FoldFigure]]  # run to figure to what its fold models reach


@dataclass(frozen=True)
class Question:
    """What is asked of a comparison beyond whether two runs differ.

    Attributes:
        margin: differences smaller than this are of no account; None asks for no test of equivalence.
        wanted: a difference that one would like to show; how many slides would do?

    Raises:
        UserError: a value that is no difference of two shares.
    """

    margin: float | None = None
    wanted: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("margin", self.margin), ("difference", self.wanted)):
            if value is not None and not 0 < value < 1:
                raise UserError(f"`{name}={value}`: expected a difference between 0 and 1, such as 0.02.")


@dataclass(frozen=True)
class Pair:
    """Two runs on the same images.

    Attributes:
        first, second: the runs' names.
        differences: figure (`COMPARED`) to difference.
        untested: why the differences have no p-values; empty if they have.
        delong: None unless patches are independent: slides are known, and each has one patch.
        resampled_t: figure to the test over folds; out of fold only, and empty where it is not valid.
        turned: figure to the chance that the order is the other way round after one more training of each; NaN where
            it is not known, because a run has been trained only once.
    """

    first: str
    second: str
    differences: dict[str, Difference]
    untested: str
    delong: DeLong | None
    resampled_t: dict[str, ResampledT]
    turned: dict[str, float]


@dataclass(frozen=True)
class Rank:
    """A run's rank among the runs compared; 1 is the best, equals share the better rank.

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
class Detectable:
    """Which differences a set would show, with 80 % power at 5 %.

    Attributes:
        one: the median over pairs of runs, for one pair tested alone.
        holm: the same if all pairs are tested, by Holm's first step.
        low, high: of the pair of which this set could show the smallest and the largest, tested alone.
        n_clusters: slides (or patches, where slides are not known) of this set.
        wanted: the difference that was asked for; None if none was.
        slides: how many slides like these would show it, tested alone, for the median pair; None likewise.
    """

    one: float
    holm: float
    low: float
    high: float
    n_clusters: int
    wanted: float | None
    slides: int | None


@dataclass(frozen=True)
class Comparison:
    """Runs on the same images, judged on the same resamples.

    Attributes:
        judgements: run to its figures.
        pairs: every two runs, in the order given.
        ranks: figure (`COMPARED`) to run to rank.
        detectable: figure to the differences that this set would show; empty for a single run.
        trainings: run to where the scatter of its figures comes from; of runs with several trainings.
        exact: runs that every training repeats.
    """

    judgements: dict[str, Judgement]
    pairs: tuple[Pair, ...]
    ranks: dict[str, dict[str, Rank]]
    detectable: dict[str, Detectable]
    trainings: dict[str, Trainings]
    exact: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Comparison({len(self.judgements)} runs: {', '.join(self.judgements)})"

    def _repr_html_(self) -> str:
        columns = [title for name in COMPARED for title in (name.replace("_", " "), "rank")]
        rows = [
            (run, *(cell for name in COMPARED for cell in (one.figures[name], self.ranks[name][run].value)))
            for run, one in self.judgements.items()
        ]
        return html_table(("run", *columns), rows, caption=repr(self))


def judge(ensemble: Ensemble, *, resampling: Resampling = Resampling()) -> Judgement:
    """Compute every figure of one run on one set, each with its interval.

    >>> label, k = np.array([0, 1] * 10, dtype=np.int8), np.arange(20)  # 20 patches of 5 slides
    >>> probability = np.where(k % 7 < 5, 0.2 + 0.6 * label, 0.5)
    >>> run = Ensemble(
    ...     dataset="mine",
    ...     split="test",
    ...     id=k.astype(str),
    ...     label=label,
    ...     group=(k // 4).astype(str),
    ...     digest=np.full(20, ""),
    ...     by_training=np.stack([1 - probability, probability], axis=1)[None],
    ...     thresholds=np.array([0.5]),
    ...     threshold=0.5,
    ...     prior=0.5,
    ... )
    >>> judgement = judge(run, resampling=Resampling(replicates=1_000))
    >>> print(judgement.n_clusters, judgement.unit, judgement.figures["auroc"])
    5 slide 0.970 (0.672–0.998)
    """
    return compare({"run": ensemble}, resampling=resampling).judgements["run"]


def evaluate(
    predictions: Predictions,
    *,
    tables: Mapping[str, Samples] | None = None,
    resampling: Resampling = Resampling(),
    ordinal: bool = False,
) -> RunMetrics:
    """Compute the figures of a run from its predictions: those that metrics.json holds.

    Args:
        predictions: all of them.
        tables: dataset to patch table, which tells byte-identical patches; they are drawn together.
        resampling: how resamples are drawn.
        ordinal: whether the classes are ordered.
    """
    sets = {}
    for dataset, split in predictions.sets():
        ensemble = ensemble_of(predictions, dataset, split, samples=(tables or {}).get(dataset), ordinal=ordinal)
        sets[f"{dataset}/{split}"] = SetMetrics(
            counts=ensemble.counts,
            folds=fold_figures(predictions, dataset, split, ordinal=ordinal),
            ensemble=judge(ensemble, resampling=resampling) if split != VALIDATION else None,
        )
    return RunMetrics(threshold_of(predictions), sets)


def fold_figures(predictions: Predictions, dataset: str, split: str, *, ordinal: bool = False) -> dict[str, FoldFigure]:
    """Compute every figure of every fold model on one set, at threshold 0.5 (the paper's view), seed by seed."""
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    models = [(seed, fold) for seed in trainings_of(part)[0] for fold in np.unique(part.fold)]
    rows_of_model = [(part.seed == seed) & (part.fold == fold) for seed, fold in models]
    probability = part.probability
    per_model = [scores(part.label[rows], probability[rows], ordinal=ordinal) for rows in rows_of_model]
    values = {name: [figures[name] for figures in per_model] for name in figure_names(part.n_classes)}
    return {name: FoldFigure(float(np.mean(v)), float(np.std(v)), tuple(v)) for name, v in values.items()}


def compare(
    runs: Mapping[str, Ensemble],
    *,
    resampling: Resampling = Resampling(),
    question: Question = Question(),
    folds: Folds | None = None,
    chose: Mapping[str, str] | None = None,
    exact: Collection[str] = (),
) -> Comparison:
    """Compare runs on the same images: their figures, every difference with interval and p-value, and their ranks.

    Args:
        runs: name to run. Rows may come in any order; they are matched by id.
        resampling: how resamples are drawn; all runs share them.
        question: what else is asked.
        folds: the figures of the runs' fold models (`fold_figures`), for the parts of variance, and on out-of-fold
            predictions for the test over folds.
        chose: what each run chose on these very patches, such as "its epoch"; with any of it a difference has no
            p-value, because the chosen maximum is better than it would be elsewhere. Only out of fold.
        exact: runs that every training repeats, because nothing in them is random.

    Raises:
        UserError: if there is no run, or the runs' sets, patches, labels or slides differ.
    """
    names, chose = list(runs), chose or {}
    matched = _matched(runs)
    first = matched[0]
    clusters = first.clusters
    resampled = resample([ensemble.tallies(clusters) for ensemble in matched], clusters, resampling)
    classes = [held(first.label, clusters.index, ensemble.by_training) for ensemble in matched]
    pairs = list(combinations(range(len(names)), 2))
    why = [_why_untested(names[a], names[b], chose) for a, b in pairs]
    differences = {}
    for name in COMPARED:
        found = [difference(resampled, name, a, b, margin=question.margin) for a, b in pairs]
        found = [untested(one) if reason else one for one, reason in zip(found, why, strict=True)]
        differences[name] = adjusted(found)
    delongs: Sequence[DeLong | None] = [None] * len(pairs)
    if pairs and clusters.independent and not any(why) and first.n_classes == 2:
        positive = np.stack([ensemble.probability[:, 1] for ensemble in matched])
        delongs = delong_tests(first.label, positive, pairs)
    return Comparison(
        judgements={
            name: Judgement(
                counts=ensemble.counts,
                unit=clusters.unit,
                n_clusters=clusters.n_units,
                n_alone=clusters.n_alone,
                threshold=ensemble.threshold,
                level=resampling.level,
                replicates=resampling.replicates,
                figures=intervals(resampled, model, classes=classes[model]),
                trainings=len(ensemble.by_training),
                design_effect=resampled.design_effect,
            )
            for model, (name, ensemble) in enumerate(zip(names, matched, strict=True))
        },
        pairs=tuple(
            Pair(
                names[a],
                names[b],
                {name: differences[name][k] for name in COMPARED},
                why[k],
                delongs[k],
                _over_folds(matched, names, a, b, folds) if not why[k] else {},
                {name: _turned(resampled.trainings[name], a, b, names, exact) for name in COMPARED},
            )
            for k, (a, b) in enumerate(pairs)
        ),
        ranks={
            name: dict(zip(names, _ranks(resampled.value[name], resampled.drawn[name], resampling.level), strict=True))
            for name in COMPARED
        },
        detectable={
            name: one
            for name in COMPARED
            if (one := _detectable(differences[name], clusters, question.wanted)) is not None
        },
        trainings=_trainings(names, resampled, folds),
        exact=tuple(name for name in names if name in exact),
    )


def _why_untested(first: str, second: str, chose: Mapping[str, str]) -> str:
    said = [f"{name} chose {chose[name]}" for name in (first, second) if chose.get(name)]
    return f"{' and '.join(said)} on these very patches" if said else ""


def _over_folds(
    runs: Sequence[Ensemble], names: Sequence[str], a: int, b: int, folds: Folds | None
) -> dict[str, ResampledT]:
    """Test the difference of two runs over the folds of their cross-validation; of several trainings by their mean."""
    if runs[a].split != VALIDATION or folds is None:
        return {}
    tests = {}
    for figure in COMPARED:
        first, second = (_by_training(folds[names[k]][figure], len(runs[k].by_training)).mean(axis=0) for k in (a, b))
        tests[figure] = resampled_t(first - second, test_share=1 / len(first))
    return tests


def _by_training(figure: FoldFigure, n_trainings: int) -> NDArray[np.float64]:
    """Arrange what the fold models reach as (trainings, folds)."""
    return np.array(figure.each).reshape(n_trainings, -1)


def _turned(
    trainings: Sequence[NDArray[np.float64]], a: int, b: int, names: Sequence[str], exact: Collection[str]
) -> float:
    if names[a] in exact and names[b] in exact:
        return 0.0
    known = all(len(trainings[model]) > 1 or names[model] in exact for model in (a, b))
    return chance_to_turn(trainings[a], trainings[b]) if known else math.nan


def _detectable(differences: Sequence[Difference], clusters: Clusters, wanted: float | None) -> Detectable | None:
    """Summarise which differences a set would show over its pairs; None where there is none."""
    known = sorted((one for one in differences if math.isfinite(one.detectable)), key=lambda one: one.detectable)
    if not known:
        return None
    middle = known[len(known) // 2]
    return Detectable(
        one=float(np.median([one.detectable for one in known])),
        holm=float(np.median([one.detectable_holm for one in known])),
        low=known[0].detectable,
        high=known[-1].detectable,
        n_clusters=clusters.n_units,
        wanted=wanted,
        slides=None if wanted is None else slides_needed(middle, clusters.n_units, wanted),
    )


def _trainings(names: Sequence[str], resampled: Resampled, folds: Folds | None) -> dict[str, Trainings]:
    found = {}
    for model, name in enumerate(names):
        n_trainings = len(resampled.trainings[COMPARED[0]][model])
        if n_trainings < 2 or folds is None:
            continue
        figures: dict[str, VarianceParts] = {}
        for figure in COMPARED:
            spread = resampled.of(figure, model)
            figures[figure] = variance_parts(
                _by_training(folds[name][figure], n_trainings),
                resampled.trainings[figure][model],
                slide=math.sqrt(max(0.0, spread.standard_error**2 - spread.training.variance)),
            )
        found[name] = Trainings(n_trainings, figures)
    return found


def _matched(runs: Mapping[str, Ensemble]) -> list[Ensemble]:
    """Return the runs with their rows in the order of the first run's."""
    if not runs:
        raise UserError("no runs to compare. Run fm-probe or fm-finetune first.")
    (name, first), *others = runs.items()
    matched = [first]
    for other_name, other in others:
        names = f"{name} and {other_name}"
        if first.n_classes != other.n_classes:
            raise UserError(
                f"{name} tells {first.n_classes} classes apart, {other_name} {other.n_classes}: only runs of the same "
                "classes can be compared."
            )
        if (first.dataset, first.split) != (other.dataset, other.split):
            raise UserError(
                f"{name} is judged on {first.dataset}/{first.split}, {other_name} on {other.dataset}/{other.split}: "
                "only runs on the same set can be compared."
            )
        only = {name: np.setdiff1d(first.id, other.id), other_name: np.setdiff1d(other.id, first.id)}
        unshared = [f"{len(ids)} only in {run} (first: {ids[0]})" for run, ids in only.items() if len(ids)]
        if unshared:
            raise UserError(
                f"{names} are judged on different patches of {first.dataset}: {', '.join(unshared)}. "
                "Run both on the same data."
            )
        other = other.select(rows_of(first, other.id))
        for column, plural in (("label", "labels"), ("group", "slides")):
            values, other_values = getattr(first, column), getattr(other, column)
            differing = np.flatnonzero(values != other_values)
            if len(differing):
                row = differing[0]
                raise UserError(
                    f"{names} have different {plural} for {len(differing)} patches of {first.dataset} "
                    f"(first: {first.id[row]}, {values[row]!s} and {other_values[row]!s}). Run both on the same data."
                )
        matched.append(other)
    return matched


def _ranks(value: NDArray[np.float64], drawn: NDArray[np.float64], level: float) -> list[Rank]:
    """Rank (R,) figures with intervals from their (R, r) resamples, the larger the better."""
    defined = drawn[:, np.isfinite(drawn).all(axis=0)]
    ranked = _rank_columns(defined)
    tail = (1 - level) / 2
    ranks = []
    for model, rank in enumerate(_rank_columns(value[:, None])[:, 0].tolist()):
        if not defined.shape[1]:
            ranks.append(Rank(rank, 1, len(value), math.nan))
            continue
        low, high = (int(np.quantile(ranked[model], end, method="inverted_cdf")) for end in (tail, 1 - tail))
        ranks.append(Rank(rank, low, high, float((ranked[model] == 1).mean())))
    return ranks


def _rank_columns(values: NDArray[np.float64]) -> NDArray[np.intp]:
    """Rank (R, r) values within each column from 1, the largest first; equals share the better rank."""
    return np.stack([1 + (values > row).sum(axis=0) for row in values])
