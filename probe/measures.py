"""What do measures other than a probe say of a store's embeddings?

Neighbours, few labelled patches, retrieval, clusters, robustness, altered patches, and how far two backbones agree. One
embedding of each backbone is measured, on the patches that probes train on and on every test set. Nothing is chosen on
tests; k of the k nearest neighbours is, on training patches, by neighbours on other slides.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from features.alterations import ALTERATIONS, altered_view, split_alteration
from features.console import UserError, nearest, progress, say
from features.entry import Entry
from features.store import FeatureStore
from probe.candidates import Setup, embeddings_of, list_candidates
from probe.clusterings import agreement, k_means
from probe.commands import missing_embeddings, missing_import
from probe.experiment import Experiment
from probe.fewshot import DRAWS, draw_shots, few_shot, possible_shots
from probe.measure_records import MEASURES, Figure, Measured, MeasureRecord, write_measures
from probe.measure_sets import Key, PatchSet, patch_set, say_left_out, silent_measures
from probe.metrics import balanced_accuracy, predicted_classes
from probe.neighbours import (
    Neighbours,
    class_shares,
    mutual_neighbours,
    neighbours,
    precision_at,
    unit_vectors,
)
from probe.neighbours import nearest as nearest_rows
from probe.probing import ProbeOptions, experiment_of, prepare
from probe.resample import Clusters, Resampling, Statistic, Sums, intervals, resample, sums_by_cluster
from probe.robustness import (
    BALANCED_DRAWS,
    FEW,
    balanced_margin,
    balanced_robustness,
    draw_balanced,
    median_margin,
    robustness_counts,
    robustness_index,
    robustness_margins,
    robustness_of_chance,
)
from probe.runs import read_run, versions
from probe.similarity import as_tensor, linear_cka, self_similarity
from probe.tally import tally

NEIGHBOURS = (1, 3, 5, 11, 21, 51)  # odd, so that of two classes one always has more
CUT_OFFS = (1, 5, 10)  # of retrieval
_MOST_CELLS = 128  # of a table of groups and clusters whose sums are resampled
_LEVEL = 0.95
_OF_NEIGHBOURS = frozenset({"knn", "retrieval", "robustness", "alignment"})  # within a set
_OPTIONS = ("train", "test", "view", "pooling", "labels", "seed", "device")  # those of a probe that count here

Chosen = tuple[Entry, str, str]  # training entry, pooling, and why these


def class_means(values: Mapping[str, NDArray[np.floating]], label: NDArray[np.intp], clusters: Clusters) -> Sums:
    """Make the statistic of means over classes of the mean over a class's patches.

    Args:
        values: name to (n,) numbers of the patches, NaN where there is none.
        label: (n,) of the class; all the same for the plain mean over patches.
        clusters: of the patches.
    """
    classes = np.unique(label)
    known = {name: np.isfinite(value) for name, value in values.items()}
    of_class = [label == k for k in classes]
    columns = [
        column
        for name, value in values.items()
        for of in of_class
        for column in (np.where(of & known[name], value, 0), of & known[name])
    ]
    shape = (len(values), len(classes), 2)
    held = np.sum(columns, axis=1).reshape(shape)[..., 1] > 0  # classes without a number count for nothing

    def figures(sums: NDArray[np.float64]) -> Mapping[str, NDArray[np.float64]]:
        parts = sums.reshape(-1, *shape)
        with np.errstate(invalid="ignore", divide="ignore"):
            means = np.where(held, parts[..., 0] / parts[..., 1], 0).sum(axis=2) / held.sum(axis=1)
        return {name: means[:, k] for k, name in enumerate(values)}

    return Sums(sums_by_cluster(np.stack(columns, axis=1).astype(np.float64), clusters), figures)


@dataclass(frozen=True, eq=False)
class _Found:
    """What was computed of an embedding on a set: statistics by measure, chances by figure, and fixed figures."""

    of: PatchSet
    embedding: str
    statistics: dict[str, list[Statistic]]
    chance: dict[str, float]
    fixed: list[Figure]

    @classmethod
    def none(cls, of: PatchSet, embedding: str) -> _Found:
        return cls(of, embedding, defaultdict(list), {}, [])

    def fix(self, measure: str, name: str, value: float, **more: float | str | int) -> None:
        """Add a figure whose interval is known or does not exist."""
        at = {"embedding": self.embedding, "dataset": self.of.dataset, "split": self.of.split, "n": len(self.of.rows)}
        self.fixed.append(Figure(measure=measure, name=name, value=value, **(at | more)))  # type: ignore[arg-type]

    def figures(self) -> list[Figure]:
        """Give every figure its interval, all on the same resamples."""
        clusters = self.of.clusters

        def statistic(count: NDArray[np.float64], /) -> dict[str, NDArray[np.float64]]:
            # The first word of a name says in which range a figure lies.
            return {
                f"{name}\t{measure}": value
                for measure, statistics in self.statistics.items()
                for one in statistics
                for name, value in one(count).items()
            }

        found = []
        if self.statistics:
            for key, one in intervals(resample([[statistic]], clusters, Resampling(level=_LEVEL)), 0).items():
                name, _, measure = key.partition("\t")
                found.append(
                    Figure(
                        measure=measure,
                        name=name,
                        embedding=self.embedding,
                        dataset=self.of.dataset,
                        split=self.of.split,
                        value=one.value,
                        low=one.low,
                        high=one.high,
                        wide=one.wide if one.wide and np.isfinite(one.wide).all() else None,
                        chance=self.chance.get(name),
                        n=len(self.of.rows),
                        unit=clusters.unit,
                        n_clusters=clusters.n_units,
                    )
                )
        return found + self.fixed


class _Clock:
    """Adds up seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - started


# --------------------------------------------------------------------------------------------------------- one by one


def _knn_figures(found: _Found, neighbour_label: NDArray[np.intp], k: int, n_classes: int) -> None:
    """Judge the shares of classes among k neighbours, of the neighbours' labels (n, K)."""
    of, names = found.of, ("balanced_accuracy", "auroc")
    shares = class_shares(neighbour_label, k, n_classes)
    counted = tally(of.label, shares, cluster=of.clusters.index, n_clusters=of.clusters.n, names=names)
    found.statistics["knn"].append(counted)
    found.chance["auroc"] = 0.5
    if len(np.unique(of.label)) == n_classes:  # else it depends on which classes are guessed
        found.chance["balanced_accuracy"] = 1 / n_classes


def _best_k(label: NDArray[np.intp], apart: NDArray[np.intp], n_classes: int) -> int:
    """Choose k by balanced accuracy, of neighbours on other slides (n, K); the smallest of equals."""
    possible = [k for k in NEIGHBOURS if k <= apart.shape[1]]
    return max(
        possible,
        key=lambda k: balanced_accuracy(label, predicted_classes(class_shares(label[apart], k, n_classes))),
    )


def _retrieval(found: _Found, apart: NDArray[np.intp], average_precision: NDArray[np.float64]) -> None:
    label = found.of.label
    values = {f"precision {k}": precision_at(label, apart, k) for k in CUT_OFFS if k <= apart.shape[1]}
    values["average_precision"] = average_precision
    found.statistics["retrieval"].append(class_means(values, label, found.of.clusters))
    found.chance.update(dict.fromkeys(values, 1 / len(np.unique(label))))


def _clusters(found: _Found, embeddings: Tensor, n_classes: int, seed: int) -> None:
    samples, clusters = found.of.samples, found.of.clusters
    assigned = k_means(np.asarray((embeddings - embeddings.mean(0)).cpu()), n_classes, seed=seed)
    for by, values in (("class", samples.label.astype(str)), ("domain", samples.domain), ("slide", samples.group)):
        known = np.flatnonzero(values != "")
        names, number = np.unique(values[known], return_inverse=True)
        if len(names) < 2:
            continue
        shape = (-1, len(names), n_classes)
        cell = number * n_classes + assigned[known]
        n_cells = len(names) * n_classes
        if by == "slide" or n_cells > _MOST_CELLS:  # resampled slides would be other ones; or too many sums
            whole = np.bincount(cell, minlength=n_cells).reshape(shape)
            for name, value in agreement(whole.astype(np.float64)).items():
                found.fix("clustering", f"{name} {by}", float(value[0]), chance=0.0)
            continue

        def figures(
            sums: NDArray[np.float64], by: str = by, shape: tuple[int, int, int] = shape
        ) -> Mapping[str, NDArray[np.float64]]:
            return {f"{name} {by}": value for name, value in agreement(sums.reshape(shape)).items()}

        columns = np.zeros((len(samples), n_cells))
        columns[known, cell] = 1
        found.statistics["clustering"].append(Sums(sums_by_cluster(columns, clusters), figures))
        found.chance.update({f"ari {by}": 0.0, f"nmi {by}": 0.0})


def _robustness(found: _Found, unit: Tensor, within: Neighbours, seed: int) -> None:
    of, by = found.of, found.of.confounded_by
    # Patches of a slide share domain and more: neighbours are sought on other slides, unless slides are the confounder.
    near = (within.any if by == "slide" else within.apart)[:, :FEW]
    counts = {f"index {by}": robustness_counts(near, of.label, of.confounder)[:, None]}
    found.chance[f"index {by}"] = robustness_of_chance(of.label, of.confounder)
    group = np.arange(len(of.rows)) if by == "slide" else of.group
    margins = robustness_margins(unit, group, of.label, of.confounder)
    statistics = median_margin(f"margin {by}", [[(of.clusters.index, margins)]])
    drawn = [] if by == "slide" else draw_balanced(of.label, of.confounder, draws=BALANCED_DRAWS, seed=seed)
    if any(drawn):
        where = (unit, of.group, of.label, of.confounder, drawn)
        counts[f"balanced {by}"] = balanced_robustness(*where)
        statistics += balanced_margin(f"balanced_margin {by}", *where, of.clusters)
        found.chance.update({f"balanced {by}": 0.5, f"balanced_margin {by}": 0.0})
    indices = [robustness_index(name, one, of.clusters) for name, one in counts.items()]
    found.statistics["robustness"] += [*indices, *statistics]


def _invariance(found: _Found, plain: Tensor, altered: Mapping[str, NDArray[np.float16]]) -> None:
    """Compare embeddings with those of altered patches, by alteration."""
    values: dict[str, NDArray[np.floating]] = {}
    for name, embeddings in altered.items():
        own, at_hand, others = self_similarity(plain, as_tensor(embeddings, str(plain.device)))
        values |= {f"cosine {name}": own, f"found {name}": at_hand.astype(np.float64)}
        found.chance.update({f"cosine {name}": others, f"found {name}": 1 / len(own)})
    if values:
        label = np.zeros(len(plain), np.intp)
        found.statistics["invariance"].append(class_means(values, label, found.of.clusters))


def _few_shots(found: _Found, train: Tensor, test: Tensor, drawn: Mapping[int, NDArray[np.intp]]) -> None:
    values = {}
    for shots, rows in drawn.items():
        share, by_draw = few_shot(train, test, found.of.label, rows)
        values[f"balanced_accuracy {shots}"] = share
        low, high = np.quantile(by_draw, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2]).tolist()
        more = {"low": low, "high": high, "unit": "draw", "n_clusters": len(by_draw)}
        found.fix("fewshot", f"draws {shots}", float(by_draw.mean()), **more)
    found.statistics["fewshot"].append(class_means(values, found.of.label, found.of.clusters))
    n_classes = next(iter(drawn.values())).shape[1]
    found.chance.update(dict.fromkeys(values, 1 / n_classes))


# ------------------------------------------------------------------------------------------------------------- all


def measure_store(
    store: FeatureStore,
    models: Sequence[str] | None = None,
    *,
    measures: Sequence[str] = (),
    options: ProbeOptions,
    runs: Path,
) -> MeasureRecord:
    """Measure an embedding of every model of the store, or of those named, and write the figures among the runs.

    Args:
        store: with the embeddings of the training dataset and of those to score.
        models: names; None for all that have embedded the training dataset.
        measures: keys of `MEASURES`; none for all that apply.
        options: `train`, `test`, `view`, `pooling`, `labels`, `seed` and `device` are those of a probe; the others
            count for nothing, as no probe is fitted and no folds are needed.
            Without `view` and `pooling` the newest probe in `runs` of a model decides, else the card's embedding
            of the view `full`, or of the first that all datasets have.
        runs: the folder of all runs.

    Raises:
        UserError: as `probe.probing.probe_store`, but for folds; or if a measure is unknown, named and does not apply,
            or none applies.
    """
    asked = _parsed(measures)
    counting = {name: getattr(options, name) for name in _OPTIONS}
    setup, models = prepare(store, models, ProbeOptions(**counting), fitted=False)
    options, device, clock = setup.options, setup.device, _Clock()
    n_classes = setup.experiment.n_classes
    of_models = {model: replace(setup, experiment=experiment_of(setup, [model])) for model in dict.fromkeys(models)}
    chosen = {model: _choose(of_model, model, runs) for model, of_model in of_models.items()}
    rows = {key: value for of_model in of_models.values() for key, value in _rows(of_model.experiment).items()}
    sets = {key: patch_set(*key, setup.experiment.tables[key[0]], value) for key, value in rows.items()}
    names = store.class_names(setup.experiment.train)
    silent = {key: silent_measures(of, names) for key, of in sets.items()}
    wanted = _applicable(asked, chosen, sets, silent, names, store)
    say_left_out(sets, silent, wanted)
    drawn: dict[int, NDArray[np.intp]] = {}
    if "fewshot" in wanted:
        with clock("fewshot"):
            drawn = _drawn(sets[setup.experiment.train, "train"], n_classes, options.seed)
    embeddings, figures = [], []
    near: dict[str, dict[Key, NDArray[np.intp]]] = {}  # model to set to neighbours, for alignment
    with progress("measures", sum(len(_rows(of.experiment)) for of in of_models.values()), "sets") as advance:
        for model, of_model in of_models.items():
            entry, pooling, why = chosen[model]
            measured = _measured(store, of_model, entry, pooling, why)
            say(f"{measured.label}: {why}.")
            near[model], known = {}, None
            for key in _rows(of_model.experiment):  # the training patches first
                found, here = _Found.none(sets[key], measured.label), wanted - silent[key].keys()
                with clock("reading"):
                    raw = _read(of_model, chosen[model], sets[key])
                    unit = unit_vectors(raw, device)
                if not here.isdisjoint(_OF_NEIGHBOURS):
                    within = _within(found, unit, here, options.seed, clock)
                    near[model][key] = within.any[:, :FEW]
                    if found.of.split == "train" and "knn" in here:
                        known = _Known(unit, found.of.label, _best_k(found.of.label, within.apart, n_classes))
                        _knn_figures(found, found.of.label[within.apart], known.k, n_classes)
                known = known or _Known(unit, found.of.label, 1)
                if found.of.split == "test" and "knn" in here:
                    with clock("knn"):
                        _knn_figures(found, known.label[nearest_rows(unit, known.unit, known.k)], known.k, n_classes)
                if found.of.split == "test" and "fewshot" in here:
                    with clock("fewshot"):
                        _few_shots(found, known.unit, unit, drawn)
                if "clustering" in here:
                    with clock("clustering"):
                        _clusters(found, unit, n_classes, options.seed)
                if "invariance" in here:
                    with clock("invariance"):
                        entries = _altered_entries(store, entry, found.of.dataset)
                        altered = {
                            name: _read(of_model, (other, pooling, ""), found.of) for name, other in entries.items()
                        }
                        _invariance(found, as_tensor(raw, device), altered)
                with clock("intervals"):
                    figures += found.figures()
                advance(1)
            embeddings.append(replace(measured, neighbours=known.k if known and "knn" in wanted else None))
    if "alignment" in wanted:
        for one, other in combinations(of_models, 2):
            with clock("alignment"):
                pair = [(of_models[model], chosen[model]) for model in (one, other)]
                figures += _alignment(pair, [near[one], near[other]], sets)
    datasets = dict.fromkeys(dataset for dataset, _ in sets)
    record = MeasureRecord(
        train=setup.experiment.train,
        test=tuple(name for name in datasets if name != setup.experiment.train),
        store=str(store.path),
        options={**counting, "measures": list(measures)},
        measures=tuple(name for name in MEASURES if name in wanted),
        label_names=names,
        embeddings=tuple(embeddings),
        table_digests={name: setup.experiment.tables[name].table_digest for name in datasets},
        figures=tuple(sorted(figures, key=lambda figure: list(MEASURES).index(figure.measure))),
        seconds={name: round(seconds, 3) for name, seconds in clock.seconds.items()},
        versions=versions(),
    )
    return write_measures(runs, record)


@dataclass(frozen=True, eq=False)
class _Known:
    """The training patches of an embedding, with which test patches are compared: unit vectors, labels, and k."""

    unit: Tensor
    label: NDArray[np.intp]
    k: int


def _read(of_model: Setup, chosen: Chosen, of: PatchSet) -> NDArray[np.float16]:
    """Read the embeddings of a set: (n, d)."""
    entry, pooling, _ = chosen
    return embeddings_of(of_model, entry, pooling, of.dataset, of.rows).read()


def _within(found: _Found, unit: Tensor, wanted: frozenset[str], seed: int, clock: _Clock) -> Neighbours:
    """Find the neighbours within a set, once for all that is asked of them."""
    of = found.of
    with clock("neighbours"):
        within = neighbours(
            unit, of.group, of.label, most=max(*NEIGHBOURS, *CUT_OFFS, FEW), ranked="retrieval" in wanted
        )
    if "retrieval" in wanted:
        _retrieval(found, within.apart, within.average_precision)
    if "robustness" in wanted:
        with clock("robustness"):
            _robustness(found, unit, within, seed)
    return within


def _parsed(measures: Sequence[str]) -> tuple[str, ...]:
    for name in measures:
        if name not in MEASURES:
            raise UserError(
                f"unknown measure {name!r}: expected {', '.join(MEASURES)}, or none for all that apply."
                f"{nearest(name, MEASURES)}"
            )
    return tuple(measures)


def _rows(experiment: Experiment) -> dict[Key, NDArray[np.intp]]:
    """Name the sets that are measured, the training patches first, and their rows."""
    tests = {(name, "test"): rows for name, rows in experiment.tests.items()}
    return {(experiment.train, "train"): experiment.rows} | tests


def _choose(of_model: Setup, model: str, runs: Path) -> tuple[Entry, str, str]:
    """Choose the embedding of a model: training entry, pooling, and why."""
    options, candidates = of_model.options, list_candidates(of_model, model)
    if options.view or options.pooling:
        why = "as named"
    else:
        probed = _probed(runs, model, of_model.experiment.train)
        for entry, pooling in candidates:
            if (entry.view, pooling) == probed:
                return entry, pooling, f"the view and pooling that the newest probe in {runs} chose"
        why = "the card's embedding; no probe of this model was found that has chosen another"
    # Of equals the first: `full` before other views, the card's pooling before others.
    entry, pooling = min(candidates, key=lambda one: (one[0].view != "full", one[1] != "card"))
    return entry, pooling, why


def _probed(runs: Path, model: str, train: str) -> tuple[str, str] | None:
    """Find the view and pooling that a model's newest probe has chosen, of those for which none were named.

    Runs that cannot be read are no help.
    """
    newest: tuple[str, tuple[str, str] | None] = ("", None)
    for path in runs.glob("probe-*/run.json"):
        try:
            run = read_run(path.parent)
        except UserError:
            continue
        named = run.options.get("view") or run.options.get("pooling")
        if (run.model, run.train, run.combined) == (model, train, None) and not named:
            newest = max(newest, (run.created, (run.view, run.pooling)), key=lambda one: one[0])
    return newest[1]


def _applicable(
    asked: Sequence[str],
    chosen: Mapping[str, Chosen],
    sets: Mapping[Key, PatchSet],
    silent: Mapping[Key, Mapping[str, str]],
    names: Sequence[str],
    store: FeatureStore,
) -> frozenset[str]:
    """Find the measures that can be computed, of one set or more.

    Raises:
        UserError: if one that was asked for cannot, or none can.
    """
    entries = [entry for entry, _, _ in chosen.values()]
    datasets = list(dict.fromkeys(dataset for dataset, _ in sets))
    first, train = entries[0], sets[entries[0].dataset, "train"]
    plain, alteration = split_alteration(first.view)
    telling = [name for name in ALTERATIONS if "+flips" not in first.view or name not in ("rot90", "fliph")]
    views = [altered_view(plain, name) for name in telling]
    if all(entry.imported for entry in entries):
        again = missing_import(store, first.model, first.dataset, first.view)
        another = missing_import(store, "NAME", first.dataset, first.view)
        altered = missing_import(store, first.model, first.dataset, views[0])
        altered += " (and so on), with embeddings of altered patches"
    else:
        again = missing_embeddings(store, ",".join(chosen), datasets, first.view)
        another = missing_embeddings(store, f"{first.model},NAME", datasets, first.view)
        altered = missing_embeddings(store, ",".join(chosen), datasets, ",".join([plain, *views]))
    why_not = {}
    for name in MEASURES:  # those that say nothing of any set
        of_sets = {key: silent[key].get(name) for key in sets if name != "fewshot" or key[1] == "test"}
        if all(of_sets.values()):
            reasons = "; ".join(f"{dataset}, {split}: {why}" for (dataset, split), why in of_sets.items())
            why_not[name] = f"{name} would say nothing of any set. {reasons}. Leave it out, or add patches."
    if "knn" in silent[first.dataset, "train"]:
        why = silent[first.dataset, "train"]["knn"]
        why_not["knn"] = (
            f"k of the k nearest neighbours is chosen on {first.dataset}'s training patches, by neighbours on other "
            f"slides: {why}. Leave knn out, or add training patches of other slides and classes."
        )
    if len(chosen) < 2:
        why_not["alignment"] = (
            f"alignment compares two backbones, and here is one, {first.model}. Embed another: {another}"
        )
    elif all(len(of.rows) < 3 for of in sets.values()):
        why_not["alignment"] = "alignment is of three patches or more, and no set has so many."
    if not any(of.confounded_by for of in sets.values()):
        why_not["robustness"] = (
            "the robustness index needs to know from which scanner, laboratory or slide a patch is, and no set has "
            "two domains or two slides. Name them in the columns `domain` or `group` of the patch table, and run "
            f"again: {again}"
        )
    if not any(split == "test" for _, split in sets):
        why_not["fewshot"] = (
            f"few labelled patches are drawn from training patches and judged on others, and {first.dataset} has no "
            "test split. Embed a test set too, or mark one in the column `split`."
        )
    elif lacking := [name for k, name in enumerate(names) if not (train.label == k).any()]:
        why_not["fewshot"] = (
            f"few labelled patches are drawn of each class, and {first.dataset} has no training patch of "
            f"{', '.join(lacking)}. Label some."
        )
    if alteration is not None:
        why_not["invariance"] = (
            f"unaltered patches are compared with altered ones, and view {first.view} is of altered ones. Name the "
            f"unaltered one: `view={plain!r}`."
        )
    elif not any(_altered_entries(store, entry, entry.dataset) for entry in entries):
        why_not["invariance"] = f"no altered patches are embedded in view {first.view}. Run: {altered}"
    for name in asked:
        if name in why_not:
            raise UserError(why_not[name])
    wanted = frozenset(asked or MEASURES) - why_not.keys()
    if not wanted:
        raise UserError(f"nothing can be measured: {' '.join(why_not.values())}")
    if not asked:
        for reason in why_not.values():
            say(f"Left out: {reason}")
    return wanted


def _altered_entries(store: FeatureStore, entry: Entry, dataset: str) -> dict[str, Entry]:
    """Find the complete entries of a dataset that show the view of an entry altered, by alteration."""
    found = {}
    for other in store.entries(dataset, entry.model):
        view, alteration = split_alteration(other.view)
        same_weights = other.parts.get("weights_sha256") == entry.parts.get("weights_sha256")
        if alteration is not None and view == entry.view and other.complete and same_weights:
            found[alteration] = other
    return {name: found[name] for name in ALTERATIONS if name in found}


def _drawn(of: PatchSet, n_classes: int, seed: int) -> dict[int, NDArray[np.intp]]:
    """Draw the labelled patches that all embeddings are given: number of shots to rows of the training patches."""
    shots = possible_shots(of.label, n_classes)
    most = draw_shots(of.label, of.group, n_classes=n_classes, shots=max(shots), draws=DRAWS, seed=seed)
    return {m: most[..., :m] for m in shots}


def _measured(store: FeatureStore, of_model: Setup, entry: Entry, pooling: str, why: str) -> Measured:
    fingerprints = {
        name: store.entry(name, model=entry.model, view=entry.view).fingerprint for name in of_model.experiment.tables
    }
    return Measured(model=entry.model, view=entry.view, pooling=pooling, chosen=why, fingerprints=fingerprints)


def _alignment(
    pair: Sequence[tuple[Setup, Chosen]], near: Sequence[Mapping[Key, NDArray[np.intp]]], sets: Mapping[Key, PatchSet]
) -> list[Figure]:
    """Compare two backbones on every set that both have embedded."""
    figures = []
    for key in [key for key in near[0] if key in near[1] and len(sets[key].rows) > 2]:
        of = sets[key]
        raw = [as_tensor(_read(of_model, chosen, of), of_model.device) for of_model, chosen in pair]
        found = _Found.none(
            of, " and ".join(f"{entry.model} ({entry.view}, {pooling})" for _, (entry, pooling, _) in pair)
        )
        cka, chance = linear_cka(*raw)
        found.fix("alignment", "cka", cka, chance=chance)
        shared = mutual_neighbours(near[0][key], near[1][key])
        found.statistics["alignment"].append(class_means({"mutual": shared}, np.zeros_like(of.label), of.clusters))
        found.chance["mutual"] = near[0][key].shape[1] / (len(of.rows) - 1)
        figures += found.figures()
    return figures
