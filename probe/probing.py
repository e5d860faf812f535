"""How are the backbones of a store probed? View and pooling are chosen on training data alone; tests only ever score.

For each backbone, every candidate (view, pooling) is fitted, and the one with the highest mean validation AUROC over
fold models is kept. A learning curve (`probe.curve`) is the same fits again of the chosen candidate, each on fewer
slides. Embeddings that do not fit into memory stay in the store and are read block by block (`probe.stream`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from features.blocks import Embeddings
from features.console import UserError, nearest, progress, say
from features.device import compute_exactly, find_device
from features.entry import Entry
from features.folds import SEED, effective_groups, require_seeds
from features.labels import NUMBERS, Classes, aligned, compare_classes, parse_renaming
from features.leaks import similar_rows
from features.samples import TEST, Samples
from features.store import FeatureStore
from probe.curve import (
    CURVE_FILE,
    DRAWS,
    CurvePoint,
    Subset,
    checked_fractions,
    curve_csv,
    curve_points,
    draw_subsets,
)
from probe.experiment import AMI_BR, Experiment, FoldLogits, make_experiment
from probe.linear import Probe, fit_exact, fit_paper, held_out_folds, in_memory
from probe.metrics import judge_logits
from probe.predictions import Predictions
from probe.runs import Candidate, Cost, CurveFits, RunRecord, write_run
from probe.schedule import probe_recipe

DEMOS = ("demo", "demo-phases")  # drawn, and trained on only where there is nothing else, the first before the other
# What a trained probe's recipe sees: the paper's text resizes the whole patch to 224 pixels and normalises it by
# ImageNet's statistics; the authors' scripts prepare it as each model's card says.
TRAINED_VIEWS = {"paper": "full@224+imagenet", "authors": "full"}
_LATER = ("soft_labels", "folds_by")
_TEXT = {"crop": None, "resize": 224, "input_size": 224, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


@dataclass(frozen=True)
class ProbeOptions:
    """What the user may choose.

    Attributes:
        cv: number of folds.
        train: dataset whose training split is cross-validated; None for ami-br, or the store's only other one.
        test: datasets to score besides the training set's own test split; None for all of the store's but the demo.
        view: one view, or None to choose among those in the store.
        pooling: "card", "cls", "mean", "center", "cls+mean", or None to choose.
        recipe: "exact" (`fit_exact`), or what the paper's text ("paper") or its authors' scripts ("authors") do:
            `fit_paper`, on the paper's folds, with the card's embedding of the whole patch.
        labels: what classes of the test sets are called in the training set, as "old=new,old=new".
        soft_labels: "votes" to train on the raters' shares of votes; None for labels.
        folds_by: "domain" to hold each domain out in turn instead of `cv` folds; a run's options then say so many.
        seed: of the paper recipe's training, and of the learning curve's draws.
        seeds: how many times the paper's probe is trained, with `seed`, `seed + 1`, ...
        fold_seed: of the folds.
        fractions: of the training slides, in (0, 1], for a learning curve of the chosen candidate; none for no curve.
        device: where to fit: "auto", "cpu", "cuda" or "cuda:N". The paper's recipe, whose products are tiny, always
            computes on the processor.
    """

    cv: int = 5
    train: str | None = None
    test: tuple[str, ...] | None = None
    view: str | None = None
    pooling: str | None = None
    recipe: Literal["exact", "paper", "authors"] = "exact"
    labels: str | None = None
    soft_labels: str | None = None
    folds_by: str | None = None
    seed: int = SEED
    seeds: int = 1
    fold_seed: int = SEED
    fractions: tuple[float, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        require_seeds(self.seed, self.seeds)
        checked_fractions(self.fractions)
        if self.recipe not in ("exact", *TRAINED_VIEWS):
            raise UserError(f"unknown recipe {self.recipe!r}: use exact, {' or '.join(TRAINED_VIEWS)}.")
        if self.fractions and self.soft_labels:
            raise UserError("`fractions`: a learning curve is of labels. Leave it or `soft_labels` out.")
        if self.fractions and self.recipe != "exact":
            raise UserError(
                "`fractions` needs `recipe='exact'`: the paper's probe has no learning curve here. Leave one out."
            )
        if self.seeds > 1 and self.recipe == "exact":
            raise UserError(
                f"`seeds={self.seeds}`: the exact probe draws nothing at random, so the same folds give the same probe "
                "with every seed. Leave `seeds` out, or use `recipe='paper'`."
            )

    def as_record(self) -> dict[str, Any]:
        """Give the options as a run records them; those that came later only where they were asked for."""
        return {name: value for name, value in asdict(self).items() if value or name not in _LATER}

    @property
    def training_seeds(self) -> tuple[int, ...]:
        """The seeds of all trainings."""
        return tuple(range(self.seed, self.seed + self.seeds))


@dataclass(frozen=True, eq=False)
class _Setup:
    """What the probes of a backbone need; all but the datasets to score is the same for all of a store."""

    store: FeatureStore
    options: ProbeOptions
    experiment: Experiment
    subsets: tuple[Subset, ...]  # of the learning curve
    device: str


@dataclass(frozen=True, eq=False)
class _Fitted:
    """A candidate and its probe."""

    entry: Entry  # of the training dataset
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
    device = find_device(options.device, apple=False)
    compute_exactly(device)
    tables = {name: store.samples(name) for name in store.datasets()}
    train = _train_dataset(store, tables, options)
    tables = {train: tables[train]} | _aligned_tests(store, train, tables, options)
    paper_folds = options.recipe != "exact"
    experiment = make_experiment(
        train,
        tables,
        cv=options.cv,
        fold_seed=options.fold_seed,
        paper_folds=paper_folds,
        classes=_classes(store, train),
        soft_labels=options.soft_labels,
        folds_by=options.folds_by,
    )
    options = replace(options, cv=experiment.folds.n_folds)
    embedded = list(dict.fromkeys(entry.model for entry in store.entries(train)))
    for model in models or ():
        if model not in embedded:
            raise UserError(
                f"{store.path} has no embeddings of {model!r} for {train}; it has {', '.join(embedded) or 'none'}."
                f"{nearest(model, embedded)} Run: fm-extract --model {model} --dataset {train}"
            )
    if not embedded:
        raise UserError(f"{store.path} has no embeddings of {train}. Run: fm-extract --dataset {train}")
    setup = _Setup(store, options, experiment, _subsets(experiment, options), str(device))
    return [
        _probe_model(replace(setup, experiment=_experiment_of(setup, model)), model, runs)
        for model in models or embedded
    ]


def _probe_model(setup: _Setup, model: str, runs: Path) -> RunRecord:
    started = time.perf_counter()
    store, experiment = setup.store, setup.experiment
    candidates = _fit_candidates(setup, model)
    chosen = max(candidates, key=lambda fitted: fitted.record.validation_auroc)  # the first of equals
    entry, probe = chosen.entry, chosen.probe
    if probe.fit.n_dropped:
        say(
            f"{model} ({entry.view}, {chosen.record.pooling}): {probe.fit.n_dropped:,} of {probe.coef.shape[-1]:,} "
            "features vary by no more than rounding in training, and have no weight."
        )
    points, curve_fits = _learning_curve(setup, chosen) if setup.subsets else ([], None)
    attributes = {name: store.dataset_attrs(name) for name in experiment.tables}
    record = RunRecord(
        kind="probe",
        model=model,
        method="probe",
        options=setup.options.as_record(),
        store=str(store.path),
        train=experiment.train,
        test=experiment.test,
        view=entry.view,
        pooling=chosen.record.pooling,
        card_pooling=entry.card_pooling,
        label_names=_classes(store, experiment.train),
        ordinal=bool(attributes[experiment.train].get("ordinal")),
        sources={name: attrs.get("source", "") for name, attrs in attributes.items()},
        fingerprints={name: store.entry(name, model=model, view=entry.view).fingerprint for name in experiment.tables},
        embedding=entry.parts,
        folds=experiment.folds_record(),
        seeds=setup.options.training_seeds,
        table_digests=experiment.table_digests,
        similar=_similar(setup, chosen) or None,
        candidates=tuple(fitted.record for fitted in candidates),
        learning_curve=curve_fits,
        cost=Cost(device=setup.device),
    )
    return write_run(
        runs,
        record,
        predictions=_predictions(setup, chosen, probe),
        tables=experiment.tables,
        weights={"coef": probe.coef, "intercept": probe.intercept},
        seconds=time.perf_counter() - started,
        files={CURVE_FILE: curve_csv(points)} if points else None,
    )


# ------------------------------------------------------------------------------------------------------------- datasets


def _train_dataset(store: FeatureStore, tables: dict[str, Samples], options: ProbeOptions) -> str:
    """Find the dataset to train on: that of the options, AMi-Br, or the only one with rows outside its test split."""
    if not tables:
        raise UserError(f"{store.path} holds no dataset yet. Run: fm-extract")
    if options.train is not None:
        _require_dataset(store, options.train)
        return options.train
    if AMI_BR in tables:
        return AMI_BR
    names = [name for name, table in tables.items() if (table.split != TEST).any()]
    names = [name for name in names if name not in DEMOS] or [name for name in DEMOS if name in names][:1]
    if len(names) == 1:
        return names[0]
    raise UserError(f"{store.path} holds {', '.join(tables)}: say which one to train on with `train`.")


def _require_dataset(store: FeatureStore, name: str) -> None:
    datasets = store.datasets()
    if name not in datasets:
        raise UserError(
            f"{store.path} has no dataset {name!r}; it has {', '.join(datasets)}.{nearest(name, datasets)} "
            f"Run: fm-extract --dataset {name}"
        )


def _aligned_tests(
    store: FeatureStore, train: str, tables: dict[str, Samples], options: ProbeOptions
) -> dict[str, Samples]:
    """Select the datasets to score, their labels by the classes of the training set.

    Those of another task are left out, and that is said, unless they were asked for.
    """
    renamed = parse_renaming(options.labels)
    classes = _classes(store, train)
    tests = {}
    embedded = [name for name in tables if name not in DEMOS and store.entries(name)]
    for name in embedded if options.test is None else options.test:
        _require_dataset(store, name)
        if name == train:
            continue
        names = _classes(store, name)
        mapped = tuple(renamed.get(name, name) for name in names)
        if options.test is None and compare_classes(classes, mapped) == "other":
            say(f"{name} has other classes ({', '.join(names)}) than {train} ({', '.join(classes)}) and is not scored.")
            continue
        found = aligned(classes, names, train_name=train, test_name=name, labels=renamed)
        tests[name] = tables[name].relabelled(found)
    renamed.require_met()
    return tests


def _classes(store: FeatureStore, dataset: str) -> Classes:
    return tuple(store.dataset_attrs(dataset).get("label_names", NUMBERS))


def _experiment_of(setup: _Setup, model: str) -> Experiment:
    """Make the experiment of a model: with the datasets asked for, or all but the demo that it has embedded."""
    store, experiment, requested = setup.store, setup.experiment, setup.options.test
    for name in requested or ():
        _require_dataset(store, name)
    if requested is None:
        tests = [
            name
            for name in experiment.test
            if name not in DEMOS and any(entry.complete for entry in store.entries(name, model))
        ]
    else:
        tests = [name for name in requested if name != experiment.train]
    return replace(experiment, tables={name: experiment.tables[name] for name in (experiment.train, *tests)})


def _embeddings(setup: _Setup, entry: Entry, pooling: str, dataset: str, rows: NDArray[np.intp]) -> Embeddings:
    """Find the embeddings of rows of a dataset, by the model and in the view of an entry."""
    return setup.store.embeddings(dataset, model=entry.model, view=entry.view, pooling=pooling, rows=rows)


def _similar(setup: _Setup, chosen: _Fitted) -> dict[str, tuple[str, ...]]:
    """Find the test patches, by dataset, that look like training patches in the chosen embedding."""
    experiment, entry, pooling = setup.experiment, chosen.entry, chosen.record.pooling
    training = _embeddings(setup, entry, pooling, experiment.train, experiment.rows)
    _say_what_folds_share(training, experiment)
    found = {}
    for name, rows in experiment.tests.items():
        similar = similar_rows(training, _embeddings(setup, entry, pooling, name, rows))
        if similar.any():
            found[name] = tuple(experiment.tables[name].id[rows[similar]].tolist())
    return found


def _say_what_folds_share(training: Embeddings, experiment: Experiment) -> None:
    """Say how many patches look like one in another fold: out-of-fold figures know them."""
    shared = int(similar_rows(training, training, fold=experiment.folds.fold).sum())
    if shared:
        say(
            f"{shared:,} training patches of {experiment.train} look like one in another fold: out-of-fold figures are "
            "optimistic. If they are of one slide or patient, name it in `group`."
        )


def _n_fits(experiment: Experiment, options: ProbeOptions) -> int:
    """Count the fits of a batch, which need memory beside the embeddings."""
    return len(held_out_folds(experiment.folds)) if options.recipe == "exact" else experiment.folds.n_folds


def _predictions(setup: _Setup, chosen: _Fitted, probe: Probe) -> Predictions:
    """Predict every patch of the experiment by a probe of the chosen candidate."""
    experiment, tests = setup.experiment, {}
    for name, rows in experiment.tests.items():
        stored = _embeddings(setup, chosen.entry, chosen.record.pooling, name, rows)
        tests[name] = probe.decision_function(
            in_memory(stored, _n_fits(experiment, setup.options), n_classes=experiment.n_classes)
        )
    return experiment.predictions(FoldLogits(probe.validation_logit, tests, setup.options.training_seeds))


# ----------------------------------------------------------------------------------------------------------- candidates


def _fit_candidates(setup: _Setup, model: str) -> list[_Fitted]:
    """Fit every candidate."""
    experiment = setup.experiment
    y, folds = experiment.label, experiment.folds
    held_out = [folds.fold == f for f in range(folds.n_folds)]
    classes: dict[str, Any] = {"n_classes": experiment.n_classes, "target": experiment.target}
    fitted = []
    for entry, pooling in _candidates(setup, model):
        stored = _embeddings(setup, entry, pooling, experiment.train, experiment.rows)
        if setup.options.recipe != "exact":
            recipe = probe_recipe(setup.options.recipe, model=model)
            probe = fit_paper(
                stored.read(), y, folds=folds, seeds=setup.options.training_seeds, recipe=recipe, **classes
            )
        else:
            probe = fit_exact(
                in_memory(stored, _n_fits(experiment, setup.options), n_classes=experiment.n_classes),
                y,
                folds=folds,
                device=setup.device,
                **classes,
            )
        judged = [
            judge_logits(y[rows], probe.validation_logit[rows, k])
            for k in range(probe.validation_logit.shape[1])
            for rows in held_out
        ]
        record = Candidate(
            view=entry.view,
            pooling=pooling,
            validation_auroc=float(np.mean([area for _, area in judged])),
            validation_balanced_accuracy=float(np.mean([accuracy for accuracy, _ in judged])),
            **vars(probe.fit),
        )
        fitted.append(_Fitted(entry, probe, record))
    return fitted


def _candidates(setup: _Setup, model: str) -> list[tuple[Entry, str]]:
    """List the pairs (training entry, pooling) to choose from: views that every dataset has, and all poolings."""
    store, train, tests, options = setup.store, setup.experiment.train, setup.experiment.test, setup.options
    pooling = options.pooling or (None if options.recipe == "exact" else "card")

    def complete(dataset: str) -> dict[str, Entry]:
        return {entry.view: entry for entry in store.entries(dataset, model) if entry.complete}

    view = options.view or _view_of_recipe(options.recipe, model, {name: complete(name) for name in (train, *tests)})
    by_view = complete(train)
    for name in tests:
        test_entries = complete(name)
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


def _view_of_recipe(recipe: str, model: str, by_dataset: Mapping[str, Mapping[str, Entry]]) -> str | None:
    """Choose the view that a recipe asks for; `full` where not every dataset has that one, and then say so.

    Args:
        recipe, model: of the probe.
        by_dataset: dataset to view to entry.
    """
    asked = TRAINED_VIEWS.get(recipe)
    has_asked, has_full = (all(view in entries for entries in by_dataset.values()) for view in (asked, "full"))
    if asked is None or has_asked or not has_full:
        return asked  # where none is there, the caller says what is missing
    transforms = [entries["full"].parts.get("transform", {}) for entries in by_dataset.values()]
    if any(transform.get(name) != value for transform in transforms for name, value in _TEXT.items()):
        say(
            f"{model}: the paper's text asks for view {asked}; used is full, as the model's card prepares it. For the "
            f"other: fm-extract --model {model} --dataset {','.join(by_dataset)} --view {asked}"
        )
    return "full"


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
        left_out=held_out_folds(experiment.folds),
        fractions=options.fractions,
        seed=options.seed,
    )


def _learning_curve(setup: _Setup, chosen: _Fitted) -> tuple[list[CurvePoint], CurveFits]:
    """Fit every subset's probes of the chosen candidate, and score them; those of fraction 1 are the run's.

    One batch per fraction and draw, not one for all: each takes only the rows of its subset, and none is larger than
    the run's own fit.
    """
    experiment, model = setup.experiment, chosen.entry.model
    X = in_memory(
        _embeddings(setup, chosen.entry, chosen.record.pooling, experiment.train, experiment.rows),
        _n_fits(experiment, setup.options),
        n_classes=experiment.n_classes,
    )
    points, fits = [], []
    with progress(f"learning curve {model}", len(setup.subsets), "subsets") as advance:
        for subset in setup.subsets:
            probe = chosen.probe
            if subset.fraction != 1:
                probe = fit_exact(
                    X,
                    experiment.label,
                    folds=experiment.folds,
                    subset=subset,
                    device=setup.device,
                    n_classes=experiment.n_classes,
                )
                fits.append(probe.fit)
            strength = probe.fit.chosen_strength or ()
            points += curve_points(subset, experiment.label, strength, _predictions(setup, chosen, probe))
            advance(1)
    return points, CurveFits(
        draws=DRAWS,
        n_fits=sum(fit.n_fits or 0 for fit in fits),
        n_not_converged=sum(fit.n_not_converged or 0 for fit in fits),
        max_gradient=max((fit.max_gradient or 0.0 for fit in fits), default=0.0),
    )
