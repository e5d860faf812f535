"""How are the backbones of a store probed? View and pooling are chosen on training data alone; tests only ever score.

For each backbone, every candidate (view, pooling) is fitted, and the one with the highest mean validation AUROC over
fold models is kept. Then combinations of candidates of all backbones may be tried (`probe.combine`). A learning curve
(`probe.curve`) is the same fits again of the chosen candidate, each on fewer slides. Embeddings that do not fit into
memory stay in the store and are read block by block (`probe.stream`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from features.blocks import Embeddings
from features.console import UserError, nearest, progress, say
from features.device import compute_exactly, find_device
from features.folds import SEED, effective_groups, require_seeds
from features.labels import NUMBERS, Classes, aligned, compare_classes, parse_renaming
from features.leaks import similar_rows
from features.samples import TEST, Samples
from features.store import FeatureStore
from probe.candidates import (
    TRAINED_VIEWS,
    Fitted,
    Setup,
    best_combination,
    embeddings_of,
    fit_candidates,
    n_fits,
    validation_auroc,
)
from probe.combine import mean_logits
from probe.commands import missing_embeddings
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
from probe.experiment import AMI_BR, Experiment, FoldLogits, make_experiment, require_known
from probe.linear import FEWEST_FOLDS, Probe, fit_exact, held_out_folds, in_memory
from probe.logistic import predict_logits
from probe.predictions import Predictions
from probe.records import Candidate, Cost, CurveFits, Part, RunRecord, joined
from probe.runs import weight_name, write_run

DEMOS = ("demo", "demo-phases")  # drawn, and trained on only where there is nothing else, the first before the other
_LATER = ("soft_labels", "combine", "folds_by")


@dataclass(frozen=True)
class ProbeOptions:
    """What the user may choose.

    Attributes:
        cv: number of folds.
        train: dataset whose training split is cross-validated; None for ami-br, or the store's only other one.
        test: datasets to score besides the training set's own test split; None for all of the store's but the demo.
        view: one view; several, joined by commas, to choose among; or None to choose among those in the store.
        pooling: "card", "cls", "mean", "center", "cls+mean", or None to choose.
        recipe: "exact" (`fit_exact`), or what the paper's text ("paper") or its authors' scripts ("authors") do:
            `fit_paper`, on the paper's folds, with the card's embedding of the whole patch.
        labels: what classes of the test sets are called in the training set, as "old=new,old=new".
        soft_labels: "votes" to train on the raters' shares of votes; None for labels.
        combine: also look for a combination of embeddings that is better than the best of them.
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
    combine: bool = False
    folds_by: str | None = None
    seed: int = SEED
    seeds: int = 1
    fold_seed: int = SEED
    fractions: tuple[float, ...] = ()
    device: str = "auto"

    def __post_init__(self) -> None:
        require_seeds(self.seed, self.seeds)
        checked_fractions(self.fractions)
        require_known(soft_labels=self.soft_labels, folds_by=self.folds_by)
        if self.recipe not in ("exact", *TRAINED_VIEWS):
            raise UserError(f"unknown recipe {self.recipe!r}: use exact, {' or '.join(TRAINED_VIEWS)}.")
        if self.fractions and self.soft_labels:
            raise UserError("`fractions`: a learning curve is of labels. Leave it or `soft_labels` out.")
        if self.fractions and self.recipe != "exact":
            raise UserError(
                "`fractions` needs `recipe='exact'`: the paper's probe has no learning curve here. Leave one out."
            )
        if self.combine and self.recipe != "exact":
            raise UserError("`combine` needs `recipe='exact'`: the paper's probe is of one embedding. Leave one out.")
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


def probe_store(
    store: FeatureStore, models: Sequence[str] | None = None, *, options: ProbeOptions = ProbeOptions(), runs: Path
) -> list[RunRecord]:
    """Probe every model of the store, or those named, and write one run each; and one of a combination, if better.

    Args:
        store: with the embeddings of the training dataset and of those to score.
        models: names; None for all that have embedded the training dataset.
        options: what the user chose.
        runs: the folder of all runs.

    Returns:
        The runs, in the order of the models, and last that of the combination.

    Raises:
        UserError: if a dataset or model is not in the store or its embeddings are incomplete, if datasets were
            embedded differently, if the training split cannot be cut into folds, if a fraction is too small to train
            on, or if the device does not exist here.
    """
    setup, models = prepare(store, models, options)
    options = setup.options
    _say_sets_of_one_class([experiment_of(setup, [model]) for model in models], _classes(store, setup.experiment.train))
    records, every = [], []
    for model in models:
        started = time.perf_counter()
        of_model = replace(setup, options=replace(options, combine=False), experiment=experiment_of(setup, [model]))
        candidates = fit_candidates(of_model, model)
        chosen = max(candidates, key=validation_auroc)  # the first of equals
        records.append(_write(of_model, chosen, [one.record for one in candidates], runs=runs, started=started))
        every += candidates
    if options.combine:
        started = time.perf_counter()
        found, tried = best_combination(setup, every)
        if found is not None:
            of_parts = replace(setup, experiment=experiment_of(setup, [entry.model for entry, _ in found.embeddings]))
            records.append(_write(of_parts, found, tried, runs=runs, started=started))
    return records


def prepare(
    store: FeatureStore, models: Sequence[str] | None, options: ProbeOptions, *, fitted: bool = True
) -> tuple[Setup, list[str]]:
    """Find out what is asked: datasets, rows, folds, and the names of the models. Args and raises: as `probe_store`.

    Where nothing is fitted there are no folds, and none are needed.
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
        cv=options.cv if fitted else None,
        at_least=FEWEST_FOLDS if options.recipe == "exact" else 2,
        fold_seed=options.fold_seed,
        paper_folds=paper_folds,
        classes=_classes(store, train),
        soft_labels=options.soft_labels,
        folds_by=options.folds_by,
    )
    if fitted:
        options = replace(options, cv=experiment.folds.n_folds)
    embedded = list(dict.fromkeys(entry.model for entry in store.entries(train)))
    for model in models or ():
        if model not in embedded:
            raise UserError(
                f"{store.path} has no embeddings of {model!r} for {train}; it has {', '.join(embedded) or 'none'}."
                f"{nearest(model, embedded)} Run: {missing_embeddings(store, model, [train])}"
            )
    if not embedded:
        raise UserError(f"{store.path} has no embeddings of {train}. Run: {missing_embeddings(store, None, [train])}")
    return Setup(store, options, experiment, _subsets(experiment, options), str(device)), list(models or embedded)


def _write(setup: Setup, chosen: Fitted, candidates: Sequence[Candidate], *, runs: Path, started: float) -> RunRecord:
    """Score the chosen candidate, and write its run."""
    store, experiment, combined = setup.store, setup.experiment, chosen.record.combined
    for (entry, pooling), probe in zip(chosen.embeddings, chosen.probes, strict=False):
        if probe.fit.n_dropped and not combined:
            say(
                f"{entry.model} ({entry.view}, {pooling}): {probe.fit.n_dropped:,} of {probe.coef.shape[-1]:,} "
                "features vary by no more than rounding in training, and have no weight."
            )
    points, curve_fits = _learning_curve(setup, chosen) if setup.subsets and not combined else ([], None)
    attributes = {name: store.dataset_attrs(name) for name in experiment.tables}
    classes = _classes(store, experiment.train)
    parts = tuple(
        Part(
            model=entry.model,
            view=entry.view,
            pooling=pooling,
            card_pooling=entry.card_pooling,
            fingerprints={
                name: store.entry(name, model=entry.model, view=entry.view).fingerprint for name in experiment.tables
            },
            embedding=entry.parts,
        )
        for entry, pooling in chosen.embeddings
    )
    method = {
        None: "probe",
        "mean": f"mean of {len(parts)} probes",
        "concatenation": f"probe of {len(parts)} embeddings",
    }[combined]
    record = RunRecord(
        kind="probe",
        model=joined([part.model for part in parts]),
        method=method,
        options=setup.options.as_record(),
        store=str(store.path.resolve() if isinstance(store.path, Path) else store.path),
        train=experiment.train,
        test=experiment.test,
        view=joined([part.view for part in parts]),
        pooling=joined([part.pooling for part in parts]),
        combined=combined,
        parts=parts if combined else None,
        card_pooling="" if combined else parts[0].card_pooling,
        label_names=classes,
        ordinal=bool(attributes[experiment.train].get("ordinal")),
        sources={name: attrs.get("source", "") for name, attrs in attributes.items()},
        slides={name: attrs["slides"] for name, attrs in attributes.items() if "slides" in attrs} or None,
        fingerprints={} if combined else parts[0].fingerprints,
        embedding={} if combined else parts[0].embedding,
        folds=experiment.folds_record(),
        seeds=setup.options.training_seeds,
        table_digests=experiment.table_digests,
        similar=_similar(setup, chosen) or None,
        test_classes={name: of for name in experiment.test if (of := _classes(store, name)) != classes} or None,
        candidates=tuple(candidates),
        learning_curve=curve_fits,
        cost=Cost(device=setup.device),
    )
    return write_run(
        runs,
        record,
        predictions=_predictions(setup, chosen, chosen.probes),
        tables=experiment.tables,
        weights={
            weight_name(name, k, len(chosen.probes)): getattr(probe, name)
            for k, probe in enumerate(chosen.probes)
            for name in ("coef", "intercept")
        },
        seconds=time.perf_counter() - started,
        files={CURVE_FILE: curve_csv(points)} if points else None,
    )


# ------------------------------------------------------------------------------------------------------------- datasets


def _train_dataset(store: FeatureStore, tables: dict[str, Samples], options: ProbeOptions) -> str:
    """Find the dataset to train on: that of the options, AMi-Br, or the only one with rows outside its test split."""
    if not tables:
        raise UserError(f"{store.path} holds no dataset yet. Run: {missing_embeddings(store, None, ['demo'])}")
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
            f"Run: {missing_embeddings(store, None, [name])}"
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


def experiment_of(setup: Setup, models: Sequence[str]) -> Experiment:
    """Make the experiment of models: with the datasets asked for, or all but the demo that they have embedded."""
    store, experiment, requested = setup.store, setup.experiment, setup.options.test
    for name in requested or ():
        _require_dataset(store, name)
    if requested is None:
        tests = [
            name
            for name in experiment.test
            if name not in DEMOS
            and all(any(entry.complete for entry in store.entries(name, model)) for model in models)
        ]
    else:
        tests = [name for name in requested if name != experiment.train]
    return replace(experiment, tables={name: experiment.tables[name] for name in (experiment.train, *tests)})


def _say_sets_of_one_class(experiments: Sequence[Experiment], classes: Classes) -> None:
    """Say once of which test sets there will be no figures, and why."""
    labels = {name: one.tables[name].label[rows] for one in experiments for name, rows in one.tests.items()}
    for name, label in labels.items():
        present = np.unique(label)
        if len(present) == 1:
            say(
                f"{name}, test: it has patches of one class alone, {classes[present[0]]}, so there is neither a "
                "balanced accuracy nor an AUROC. Label patches of another class."
            )


def _similar(setup: Setup, chosen: Fitted) -> dict[str, tuple[str, ...]]:
    """Find the test patches, by dataset, that look like training patches in a chosen embedding."""
    experiment = setup.experiment
    similar = {name: np.zeros(len(rows), dtype=np.bool_) for name, rows in experiment.tests.items()}
    for entry, pooling in chosen.embeddings:
        training = embeddings_of(setup, entry, pooling, experiment.train, experiment.rows)
        if not chosen.record.combined:  # of others the run of each part has said so
            _say_what_folds_share(training, experiment)
        for name, rows in experiment.tests.items():
            similar[name] |= similar_rows(training, embeddings_of(setup, entry, pooling, name, rows))
    return {
        name: tuple(experiment.tables[name].id[experiment.tests[name][of]].tolist())
        for name, of in similar.items()
        if of.any()
    }


def _say_what_folds_share(training: Embeddings, experiment: Experiment) -> None:
    """Say how many patches look like one in another fold: out-of-fold figures know them."""
    shared = int(similar_rows(training, training, fold=experiment.folds.fold).sum())
    if shared:
        say(
            f"{shared:,} training patches of {experiment.train} look like one in another fold: out-of-fold figures are "
            "optimistic. If they are of one slide or patient, name it in `group`."
        )


def _predictions(setup: Setup, chosen: Fitted, probes: Sequence[Probe]) -> Predictions:
    """Predict every patch of the experiment by probes of the chosen candidate."""
    experiment, tests = setup.experiment, {}
    for name, rows in experiment.tests.items():
        logits: list[NDArray[np.float32]] = []
        start = 0
        for k, (entry, pooling) in enumerate(chosen.embeddings):
            stored = embeddings_of(setup, entry, pooling, name, rows)
            X = in_memory(stored, n_fits(experiment, setup.options), n_classes=experiment.n_classes)
            if len(probes) == len(chosen.embeddings):
                logits.append(probes[k].decision_function(X))
                continue
            # Side by side: each embedding has its columns of the one probe, and what they add up to is the logit.
            of_part = probes[0].coef[..., start : start + X.shape[1]]
            added = predict_logits(X, of_part, probes[0].intercept * (start == 0))
            logits, start = [added + logits[0] if logits else added], start + X.shape[1]
        tests[name] = mean_logits(logits).astype(np.float32)
    validation = mean_logits([probe.validation_logit for probe in probes]).astype(np.float32)
    return experiment.predictions(FoldLogits(validation, tests, setup.options.training_seeds))


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


def _learning_curve(setup: Setup, chosen: Fitted) -> tuple[list[CurvePoint], CurveFits]:
    """Fit every subset's probes of the chosen candidate, and score them; those of fraction 1 are the run's.

    One batch per fraction and draw, not one for all: each takes only the rows of its subset, and none is larger than
    the run's own fit.
    """
    experiment, (entry, pooling), own = setup.experiment, chosen.embeddings[0], chosen.probes[0]
    X = in_memory(
        embeddings_of(setup, entry, pooling, experiment.train, experiment.rows),
        n_fits(experiment, setup.options),
        n_classes=experiment.n_classes,
    )
    points, fits = [], []
    with progress(f"learning curve {entry.model}", len(setup.subsets), "subsets") as advance:
        for subset in setup.subsets:
            probe = own
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
            points += curve_points(subset, experiment.label, strength, _predictions(setup, chosen, [probe]))
            advance(1)
    return points, CurveFits(
        draws=DRAWS,
        n_fits=sum(fit.n_fits or 0 for fit in fits),
        n_not_converged=sum(fit.n_not_converged or 0 for fit in fits),
        max_gradient=max((fit.max_gradient or 0.0 for fit in fits), default=0.0),
    )
