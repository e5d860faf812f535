"""Is the difference real? Figures of runs with intervals, and runs compared on the same images.

    predictions -> evaluate                  one run: what metrics.json holds
    predictions -> ensemble_of -> judge      every figure with its interval
                               -> compare    runs side by side: differences, tests, ranks
                               -> probe.raters.by_agreement, probe.domains.by_domain

Intervals and p-values come from resampling (`probe.resample`, `probe.significance`): by slide where slides are known,
by patch elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from features.console import UserError
from features.display import html_table
from probe.metrics import COMPARED, NAMES, FoldFigure, Judgement, RunMetrics, SetMetrics, scores
from probe.predictions import VALIDATION, Predictions, by_training, patches_of, threshold_of, trainings_of
from probe.resample import Clusters, Resampling, intervals, make_clusters, resample
from probe.significance import DeLong, Difference, adjusted, delong_tests, difference
from probe.tally import Tally, tally


@dataclass(frozen=True, eq=False)
class Ensemble:
    """One run on one set as one model: the mean probability of its fold models, one row per patch.

    Attributes:
        dataset, split: which set.
        id, group: (n,) str; group is empty where the slide is unknown.
        label: (n,) int8.
        probability: (n,) mean over fold models; of "validation", over those that did not train on it, one per seed.
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

    def __repr__(self) -> str:
        n_positive = int((self.label == 1).sum())
        return (
            f"Ensemble({self.dataset}/{self.split}: {len(self):,} patches, {n_positive:,} positive, "
            f"threshold {self.threshold:.3f})"
        )

    def select(self, rows: NDArray[np.bool_] | NDArray[np.intp]) -> Ensemble:
        """Keep the rows of a mask, or those of an index array in its order."""
        columns = {name: getattr(self, name)[rows] for name in ("id", "label", "group", "probability")}
        return replace(self, **columns)


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

    def __repr__(self) -> str:
        return f"Comparison({len(self.judgements)} runs: {', '.join(self.judgements)})"

    def _repr_html_(self) -> str:
        columns = [title for name in COMPARED for title in (name.replace("_", " "), "rank")]
        rows = [
            (run, *(cell for name in COMPARED for cell in (one.figures[name], self.ranks[name][run].value)))
            for run, one in self.judgements.items()
        ]
        return html_table(("run", *columns), rows, caption=repr(self))


def ensemble_of(predictions: Predictions, dataset: str, split: str) -> Ensemble:
    """Average a run's probabilities over its fold models on one of its sets, in the order of the patch table.

    Raises:
        UserError: if the run has no such set, or its rows are not those of whole fold models.
    """
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    name = f"{dataset}/{split}"
    if not len(part.id):
        known = ", ".join(sorted(f"{a}/{b}" for a, b in predictions.sets())) or "none"
        raise UserError(f"this run has no predictions of {name}; it has: {known}. Run it again with --test {dataset}.")
    first, row = patches_of(part)
    seeds, training = trainings_of(part)
    n_models = np.bincount(row * len(seeds) + training, minlength=len(first) * len(seeds))  # of each training
    if np.bincount((row * len(seeds) + training) * (part.fold.max() + 1) + part.fold).max() > 1:
        raise UserError(f"predictions of {name}: a patch occurs twice for one fold. predictions.csv is damaged.")
    if n_models.min() < n_models.max():
        lacking = part.id[first[np.argmin(n_models) // len(seeds)]]
        raise UserError(
            f"predictions of {name}: {lacking} has {n_models.min()} fold models, others have {n_models.max()}. "
            "predictions.csv is damaged."
        )
    if not np.isfinite(part.logit).all():
        raise UserError(f"predictions of {name}: {(~np.isfinite(part.logit)).sum()} are no numbers. The run diverged.")
    for column in ("label", "group"):
        values = getattr(part, column)
        differing = np.flatnonzero(values != values[first][row])
        if len(differing):
            raise UserError(
                f"predictions of {name}: {part.id[differing[0]]} has two {column}s. predictions.csv is damaged."
            )
    return Ensemble(
        dataset=dataset,
        split=split,
        id=part.id[first],
        label=part.label[first],
        group=part.group[first],
        probability=by_training(part, dataset, split)[1].mean(axis=0),
        threshold=threshold_of(predictions),
    )


def rows_of(ensemble: Ensemble, ids: NDArray[np.str_]) -> NDArray[np.intp]:
    """Find each patch of the set in a patch table: votes[rows_of(ensemble, table_ids)] are aligned with the set.

    Raises:
        UserError: if the table lacks a patch.
    """
    order = np.argsort(ids, kind="stable")
    position = np.searchsorted(ids, ensemble.id, sorter=order)
    missing = ensemble.id[position == np.searchsorted(ids, ensemble.id, side="right", sorter=order)]
    if len(missing):
        raise UserError(
            f"{len(missing)} of {len(ensemble)} patches of {ensemble.dataset}/{ensemble.split} are not in the patch "
            f"table (first: {missing[0]}). The run and the table are of different data."
        )
    return np.asarray(order[position])


def judge(ensemble: Ensemble, *, resampling: Resampling = Resampling()) -> Judgement:
    """Compute every figure of one run on one set, each with its interval.

    >>> label, k = np.array([0, 1] * 10, dtype=np.int8), np.arange(20)  # 20 patches of 5 slides
    >>> probability = np.where(k % 7 < 5, 0.2 + 0.6 * label, 0.5)
    >>> run = Ensemble("mine", "test", k.astype(str), label, (k // 4).astype(str), probability, threshold=0.5)
    >>> judgement = judge(run, resampling=Resampling(replicates=1_000))
    >>> print(judgement.n_clusters, judgement.unit, judgement.figures["auroc"])
    5 slide 0.970 (0.875–1.000)
    """
    return compare({"run": ensemble}, resampling=resampling).judgements["run"]


def tally_of(ensemble: Ensemble, clusters: Clusters) -> Tally:
    """Count an ensemble's predictions by cluster."""
    return tally(
        ensemble.label,
        ensemble.probability,
        cluster=clusters.index,
        n_clusters=clusters.n,
        threshold=ensemble.threshold,
    )


def evaluate(predictions: Predictions, *, resampling: Resampling = Resampling()) -> RunMetrics:
    """Compute the figures of a run from its predictions: those that metrics.json holds."""
    sets = {}
    for dataset, split in predictions.sets():
        ensemble = ensemble_of(predictions, dataset, split)
        sets[f"{dataset}/{split}"] = SetMetrics(
            n=len(ensemble),
            n_positive=int((ensemble.label == 1).sum()),
            folds=fold_figures(predictions, dataset, split),
            ensemble=judge(ensemble, resampling=resampling) if split != VALIDATION else None,
        )
    return RunMetrics(threshold_of(predictions), sets)


def fold_figures(predictions: Predictions, dataset: str, split: str) -> dict[str, FoldFigure]:
    """Compute every figure of every fold model, those of one training after the other's, on one set at threshold 0.5.

    That is the paper's view.
    """
    part = predictions.select((predictions.dataset == dataset) & (predictions.split == split))
    rows_of_models = [
        (part.seed == seed) & (part.fold == fold) for seed in trainings_of(part)[0] for fold in np.unique(part.fold)
    ]
    per_model = [scores(part.label[rows], part.probability[rows]) for rows in rows_of_models]
    values = {name: [figures[name] for figures in per_model] for name in NAMES}
    return {name: FoldFigure(float(np.mean(v)), float(np.std(v)), tuple(v)) for name, v in values.items()}


def compare(runs: Mapping[str, Ensemble], *, resampling: Resampling = Resampling()) -> Comparison:
    """Compare runs on the same images: their figures, every difference with interval and p-value, and their ranks.

    Args:
        runs: name to run. Rows may come in any order; they are matched by id.
        resampling: how resamples are drawn; all runs share them.

    Raises:
        UserError: if there is no run, or the runs' sets, patches, labels or slides differ.
    """
    names = list(runs)
    matched = _matched(runs)
    first = matched[0]
    clusters = make_clusters(first.group)
    resampled = resample([tally_of(ensemble, clusters) for ensemble in matched], clusters.n, resampling)
    pairs = list(combinations(range(len(names)), 2))
    differences = {name: adjusted([difference(resampled, name, a, b) for a, b in pairs]) for name in COMPARED}
    tests: Sequence[DeLong | None] = [None] * len(pairs)
    if pairs and clusters.independent:
        tests = delong_tests(first.label, np.stack([ensemble.probability for ensemble in matched]), pairs)
    return Comparison(
        judgements={
            name: Judgement(
                n=len(ensemble),
                n_positive=int((ensemble.label == 1).sum()),
                unit=clusters.unit,
                n_clusters=clusters.n_units,
                n_alone=clusters.n_alone,
                threshold=ensemble.threshold,
                level=resampling.level,
                replicates=resampling.replicates,
                figures=intervals(resampled, model),
            )
            for model, (name, ensemble) in enumerate(zip(names, matched, strict=True))
        },
        pairs=tuple(
            Pair(names[a], names[b], {name: differences[name][k] for name in COMPARED}, tests[k])
            for k, (a, b) in enumerate(pairs)
        ),
        ranks={
            name: dict(zip(names, _ranks(resampled.value[name], resampled.drawn[name], resampling.level), strict=True))
            for name in COMPARED
        },
    )


def _matched(runs: Mapping[str, Ensemble]) -> list[Ensemble]:
    """Return the runs with their rows in the order of the first run's."""
    if not runs:
        raise UserError("no runs to compare. Run fm-probe or fm-finetune first.")
    (name, first), *others = runs.items()
    matched = [first]
    for other_name, other in others:
        names = f"{name} and {other_name}"
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
