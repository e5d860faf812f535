"""How are the backbones of a store probed? View and pooling are chosen on training data alone; tests only ever score.

For each backbone, every candidate (view, pooling) is fitted, and the one with the highest mean validation AUROC over
folds is kept. A learning curve (`probe.curve`) is the same fits again of the chosen candidate, each on fewer slides.
Embeddings that do not fit into memory stay in the store and are read block by block (`probe.stream`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from features.blocks import Embeddings
from features.console import UserError, nearest, progress
from features.device import find_device
from features.entry import Entry
from features.folds import SEED, effective_groups
from features.samples import TEST
from features.store import FeatureStore
from probe.curve import CURVE_FILE, DRAWS, Subset, checked_fractions, curve_csv, curve_points, draw_subsets
from probe.experiment import AMI_BR, Experiment, FoldLogits, make_experiment
from probe.linear import Probe, fit_exact, fit_paper, fit_subset, held_out_folds, in_memory
from probe.metrics import auroc, balanced_accuracy
from probe.runs import Candidate, Cost, CurveFits, RunRecord, write_run

DEMO = "demo"


@dataclass(frozen=True)
class ProbeOptions:
    """What the user may choose.

    Attributes:
        cv: number of folds.
        train: dataset whose training split is cross-validated; None for ami-br, or the store's only other one.
        test: datasets to score besides the training set's own test split; None for all of the store's but the demo.
        view: one view, or None to choose among those in the store.
        pooling: "card", "cls", "mean", "center", "cls+mean", or None to choose.
        recipe: "exact" (`fit_exact`) or "paper" (`fit_paper`, the paper's folds, the card's embedding of `full`).
        seed: of the folds, of the paper recipe's training, and of the learning curve's draws.
        fractions: of the training slides, in (0, 1], for a learning curve of the chosen candidate; none for no curve.
        device: where to fit: "auto", "cpu", "cuda" or "cuda:N". The paper's recipe, whose products are tiny, always
            computes on the processor.
    """

    cv: int = 5
    train: str | None = None
    test: tuple[str, ...] | None = None
    view: str | None = None
    pooling: str | None = None
    recipe: Literal["exact", "paper"] = "exact"
    seed: int = SEED
    fractions: tuple[float, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        checked_fractions(self.fractions)
        if self.recipe not in ("exact", "paper"):
            raise UserError(f"unknown recipe {self.recipe!r}: use exact or paper.")
        if self.fractions and self.recipe == "paper":
            raise UserError(
                "`fractions` needs `recipe='exact'`: the paper's probe has no learning curve here. Leave one out."
            )


@dataclass(frozen=True, eq=False)
class _Setup:
    """What the probes of all backbones of a store share."""

    store: FeatureStore
    options: ProbeOptions
    experiment: Experiment  # with all datasets of the store; `_experiment_of` keeps those to score
    subsets: tuple[Subset, ...]  # of the learning curve
    device: str


@dataclass(frozen=True, eq=False)
class _Chosen:
    """A candidate and its probe."""

    entry: Entry  # of the training dataset
    pooling: str
    probe: Probe
    record: Candidate


def probe_store(
    store: FeatureStore, models: Sequence[str] | None = None, *, options: ProbeOptions = ProbeOptions(), runs: Path
) -> list[RunRecord]:
    """Probe every model of the store, or those named, and write one run each.

    Args:
        store: with the embeddings of the training dataset and of those to score.
        models: names; None for all that have embedded the training dataset.
        options: what the user chose.
        runs: the folder of all runs.

    Returns:
        The runs, in the order of the models.

    Raises:
        UserError: if a dataset or model is not in the store or its embeddings are incomplete, if datasets were
            embedded differently, if the training split cannot be cut into folds, if a fraction is too small to train
            on, or if the device does not exist here.
    """
    device = str(find_device(options.device))
    tables = {name: store.samples(name) for name in store.datasets()}
    train = _train_dataset(store, {name: bool((table.split != TEST).any()) for name, table in tables.items()}, options)
    experiment = make_experiment(train, tables, cv=options.cv, seed=options.seed, paper_folds=options.recipe == "paper")
    embedded = list(dict.fromkeys(entry.model for entry in store.entries(train)))
    for model in models or ():
        if model not in embedded:
            raise UserError(
                f"{store.path} has no embeddings of {model!r} for {train}; it has {', '.join(embedded) or 'none'}."
                f"{nearest(model, embedded)} Run: fm-extract --model {model} --dataset {train}"
            )
    if not embedded:
        raise UserError(f"{store.path} has no embeddings of {train}. Run: fm-extract --dataset {train}")
    setup = _Setup(store, options, experiment, _subsets(experiment, options), device)
    return [_probe_model(setup, model, runs) for model in models or embedded]


def _probe_model(setup: _Setup, model: str, runs: Path) -> RunRecord:
    started = time.perf_counter()
    store, experiment = setup.store, _experiment_of(setup, model)
    chosen, candidates = _choose(setup, experiment, model)
    entry = chosen.entry
    curve = _fit_curve(setup, experiment, chosen)
    logits = [_score(setup, experiment, chosen, probe) for probe in (chosen.probe, *(probe for _, probe in curve))]
    predictions = experiment.predictions(logits[0])
    files = {}
    if curve:
        points = []
        for (subset, probe), scored in zip(curve, logits[1:], strict=True):
            strength = probe.fit.chosen_strength or ()
            points += curve_points(subset, experiment.label, strength, experiment.predictions(scored))
        files[CURVE_FILE] = curve_csv(points)
    attributes = {name: store.dataset_attrs(name) for name in experiment.tables}
    names = attributes[experiment.train].get("label_names", ["0", "1"])
    record = RunRecord(
        kind="probe",
        model=model,
        method="probe",
        options=asdict(setup.options),
        store=str(store.path),
        train=experiment.train,
        test=experiment.test,
        view=entry.view,
        pooling=chosen.pooling,
        card_pooling=entry.card_pooling,
        label_names=(names[0], names[1]),
        sources={name: attrs.get("source", "") for name, attrs in attributes.items()},
        fingerprints={name: store.entry(name, model=model, view=entry.view).fingerprint for name in experiment.tables},
        embedding=entry.parts,
        folds=experiment.folds_record(),
        table_digests=experiment.table_digests,
        candidates=tuple(candidates),
        learning_curve=_curve_fits([probe for _, probe in curve if probe is not chosen.probe]) if curve else None,
        cost=Cost(device=setup.device),
    )
    return write_run(
        runs,
        record,
        predictions=predictions,
        tables=experiment.tables,
        weights={"coef": chosen.probe.coef, "intercept": chosen.probe.intercept},
        seconds=time.perf_counter() - started,
        files=files,
    )


# ------------------------------------------------------------------------------------------------------------- datasets


def _train_dataset(store: FeatureStore, trainable: dict[str, bool], options: ProbeOptions) -> str:
    """Find the dataset to train on; `trainable` says for each whether it has rows outside its test split."""
    if not trainable:
        raise UserError(f"{store.path} holds no dataset yet. Run: fm-extract")
    if options.train is not None:
        _require_dataset(store, options.train)
        return options.train
    if AMI_BR in trainable:
        return AMI_BR
    names = [name for name, can_train in trainable.items() if can_train]
    names = [name for name in names if name != DEMO] or names
    if len(names) == 1:
        return names[0]
    raise UserError(f"{store.path} holds {', '.join(trainable)}: say which one to train on with `train`.")


def _require_dataset(store: FeatureStore, name: str) -> None:
    datasets = store.datasets()
    if name not in datasets:
        raise UserError(
            f"{store.path} has no dataset {name!r}; it has {', '.join(datasets)}.{nearest(name, datasets)} "
            f"Run: fm-extract --dataset {name}"
        )


def _experiment_of(setup: _Setup, model: str) -> Experiment:
    """Make the experiment of a model: with the datasets asked for, or all but the demo that it has embedded."""
    store, experiment, requested = setup.store, setup.experiment, setup.options.test
    for name in requested or ():
        _require_dataset(store, name)
    if requested is None:
        tests = [
            name
            for name in experiment.test
            if name != DEMO and any(entry.complete for entry in store.entries(name, model))
        ]
    else:
        tests = [name for name in requested if name != experiment.train]
    return replace(experiment, tables={name: experiment.tables[name] for name in (experiment.train, *tests)})


def _score(setup: _Setup, experiment: Experiment, chosen: _Chosen, probe: Probe) -> FoldLogits:
    tests = {}
    for test in experiment.tests:
        stored = setup.store.embeddings(
            test.dataset, model=chosen.entry.model, view=chosen.entry.view, pooling=chosen.pooling, rows=test.rows
        )
        tests[test.dataset] = probe.decision_function(in_memory(stored, experiment.folds.n_folds))
    return FoldLogits(probe.validation_logit, tests)


# ----------------------------------------------------------------------------------------------------------- candidates


def _choose(setup: _Setup, experiment: Experiment, model: str) -> tuple[_Chosen, list[Candidate]]:
    """Fit every candidate; return the one with the highest validation AUROC, the first of equals, and all records."""
    y, folds = experiment.label, experiment.folds
    best: _Chosen | None = None
    candidates = []
    for entry, pooling in _candidates(setup, experiment, model):
        stored = _training_embeddings(setup, experiment, entry, pooling)
        if setup.options.recipe == "paper":
            probe = fit_paper(stored.read(), y, folds=folds, seed=setup.options.seed)
        else:
            probe = fit_exact(in_memory(stored, folds.n_folds), y, folds=folds, device=setup.device)
        held_out = [folds.fold == f for f in range(folds.n_folds)]
        logit = probe.validation_logit
        candidate = Candidate(
            view=entry.view,
            pooling=pooling,
            validation_auroc=float(np.mean([auroc(y[rows], logit[rows]) for rows in held_out])),
            validation_balanced_accuracy=float(
                np.mean([balanced_accuracy(y[rows], logit[rows] >= 0) for rows in held_out])
            ),
            **vars(probe.fit),
        )
        candidates.append(candidate)
        if best is None or candidate.validation_auroc > best.record.validation_auroc:
            best = _Chosen(entry, pooling, probe, candidate)
    assert best is not None  # _candidates raises rather than return none
    return best, candidates


def _training_embeddings(setup: _Setup, experiment: Experiment, entry: Entry, pooling: str) -> Embeddings:
    return setup.store.embeddings(
        experiment.train, model=entry.model, view=entry.view, pooling=pooling, rows=experiment.rows
    )


def _candidates(setup: _Setup, experiment: Experiment, model: str) -> list[tuple[Entry, str]]:
    """List the pairs (training entry, pooling) to choose from: views that every dataset has, and all poolings."""
    store, train, tests, options = setup.store, experiment.train, experiment.test, setup.options
    view = options.view or ("full" if options.recipe == "paper" else None)
    pooling = options.pooling or ("card" if options.recipe == "paper" else None)
    by_view = {entry.view: entry for entry in store.entries(train, model) if entry.complete}
    for name in tests:
        test_entries = {entry.view: entry for entry in store.entries(name, model) if entry.complete}
        if view is not None and view in by_view and view not in test_entries:
            raise UserError(
                f"{name} has no complete embeddings of {model} in view {view}. "
                f"Run: fm-extract --model {model} --dataset {name} --view {view}"
            )
        by_view = {key: entry for key, entry in by_view.items() if key in test_entries}
        for key, entry in by_view.items():
            _require_same_embedding(entry, test_entries[key])
    if view is not None:
        by_view = {key: entry for key, entry in by_view.items() if key == view}
    if not by_view:
        where = f"in view {view}" if view else f"in a view that {', '.join([train, *tests])} share"
        raise UserError(
            f"{store.path} has no complete embeddings of {model} {where}. "
            f"Run: fm-extract --model {model} --dataset {','.join([train, *tests])} --view {view or 'full'}"
        )
    return [
        (entry, name) for entry in by_view.values() for name in ([pooling] if pooling else _distinct_poolings(entry))
    ]


def _distinct_poolings(entry: Entry) -> list[str]:
    """List the card's embedding first, then every stored pooling that differs from it."""
    return ["card", *(name for name in entry.poolings if name != entry.card_pooling)]


def _require_same_embedding(train: Entry, test: Entry) -> None:
    """Refuse two datasets whose embeddings differ in anything but the patches."""
    patches = {"dataset_digest", "source_mpp"}
    differing = [
        f"{key} ({train.parts.get(key)} against {test.parts.get(key)})"
        for key in sorted((train.parts.keys() | test.parts.keys()) - patches)
        if train.parts.get(key) != test.parts.get(key) and not (train.imported or test.imported)
    ]
    if differing:
        raise UserError(
            f"{train.model} in view {train.view} was computed differently for {train.dataset} and {test.dataset}: "
            f"{'; '.join(differing)}. Run fm-extract again for both with the same options and --overwrite."
        )


# ------------------------------------------------------------------------------------------------------- learning curve


def _subsets(experiment: Experiment, options: ProbeOptions) -> tuple[Subset, ...]:
    """Draw what the learning curve of every model trains on."""
    if not options.fractions:
        return ()
    return draw_subsets(
        experiment.label,
        experiment.folds.fold,
        effective_groups(experiment.samples),
        left_out=held_out_folds(experiment.folds.n_folds),
        fractions=options.fractions,
        seed=options.seed,
    )


def _fit_curve(setup: _Setup, experiment: Experiment, chosen: _Chosen) -> list[tuple[Subset, Probe]]:
    """Fit every subset's probes of the chosen candidate; those of fraction 1 are the run's.

    One batch per fraction and draw, not one for all: each takes only the rows of its subset, and none is larger than
    the run's own fit.
    """
    if not setup.subsets:
        return []
    stored = _training_embeddings(setup, experiment, chosen.entry, chosen.pooling)
    X: NDArray[np.float16] | Embeddings = in_memory(stored, experiment.folds.n_folds)
    curve = []
    with progress(f"learning curve {chosen.entry.model}", len(setup.subsets), "subsets") as advance:
        for subset in setup.subsets:
            probe = chosen.probe
            if subset.fraction != 1:
                probe = fit_subset(X, experiment.label, folds=experiment.folds, subset=subset, device=setup.device)
            curve.append((subset, probe))
            advance(1)
    return curve


def _curve_fits(probes: Sequence[Probe]) -> CurveFits:
    fits = [probe.fit for probe in probes]
    return CurveFits(
        draws=DRAWS,
        n_fits=sum(fit.n_fits or 0 for fit in fits),
        n_not_converged=sum(fit.n_not_converged or 0 for fit in fits),
        max_gradient=max((fit.max_gradient or 0.0 for fit in fits), default=0.0),
    )
