"""How is one backbone probed? Folds, strengths, view and pooling from training data alone; the tests only ever score.

For each candidate (view, pooling) every fit goes into one batched problem: with F folds, the F fits that leave one
fold out and the F (F - 1) / 2 fits that leave two out, each at every strength. The fit without folds f and g, judged
on g, is an inner validation of outer fold f; judged on f, it is one of outer fold g: nested cross-validation for the
price of half its fits. So

- the strength of fold f is chosen by grouped validation within fold f's training rows;
- view and pooling are chosen by the mean validation AUROC over folds;
- held-out rows and other datasets choose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from features.console import UserError, nearest
from features.folds import SEED, Folds, grouped_folds
from features.samples import TEST, Samples
from features.store import Entry, FeatureStore
from probe.evidence import evaluate
from probe.logistic import fit_logistic, predict_logits
from probe.metrics import auroc, balanced_accuracy, balanced_log_loss
from probe.results import VALIDATION, Predictions, concatenate, predictions_of, write_run
from probe.sgd import PaperRecipe, fit_paper_probe

Recipe = Literal["exact", "paper"]
# Inverse L2 strengths C, half a decade apart: from "only the mean direction" to "nearly unpenalised" on
# standardised embeddings of a few thousand patches.
STRENGTHS = tuple(float(f"{c:.3g}") for c in np.logspace(-5, -0.5, 10))
DEFAULT_TRAIN = "ami-br"
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
        seed: of the folds, and of the paper recipe's training.
    """

    cv: int = 5
    train: str | None = None
    test: tuple[str, ...] | None = None
    view: str | None = None
    pooling: str | None = None
    recipe: Recipe = "exact"
    seed: int = SEED


@dataclass(frozen=True, eq=False)
class Probe:
    """Per-fold linear probes of one candidate: logit = x @ coef[f] + intercept[f].

    Attributes:
        coef: (F, d) float32.
        intercept: (F,) float64; with uncentred embeddings a small difference of large sums.
        validation_logit: (n,) each training-split row under the model of the fold it validates.
        record: what was chosen and how well it converged, as plain JSON values.
    """

    coef: NDArray[np.float32]
    intercept: NDArray[np.float64]
    validation_logit: NDArray[np.float32]
    record: dict[str, Any]


def probe_store(
    store: FeatureStore, models: Sequence[str] | None = None, *, options: ProbeOptions, runs: Path
) -> list[Path]:
    """Probe every model of the store (or those named) and write one run each; returns the run folders.

    Raises:
        UserError: if a dataset or model is not in the store or its embeddings are incomplete, if datasets were
            embedded differently, or if the training split cannot be cut into folds.
    """
    tables = {name: store.samples(name) for name in store.datasets()}
    train = _train_dataset(store, tables, options)
    table = tables[train]
    rows = table.training_rows
    scheme: Literal["default", "paper"] = "paper" if options.recipe == "paper" and _is_ami_br(train) else "default"
    folds = grouped_folds(table.select(rows), options.cv, seed=options.seed, scheme=scheme)
    found = list(dict.fromkeys(entry.model for entry in store.entries(train)))
    for model in models or ():
        if model not in found:
            raise UserError(
                f"{store.path} has no embeddings of {model!r} for {train}; it has {', '.join(found) or 'none'}."
                f"{nearest(model, found)} Run: fm-extract --model {model} --dataset {train}"
            )
    if not found:
        raise UserError(f"{store.path} has no embeddings of {train}. Run: fm-extract --dataset {train}")
    return [
        _probe_model(store, tables, model, train=train, rows=rows, folds=folds, options=options, runs=runs)
        for model in models or found
    ]


def fit_exact(
    X: NDArray[np.floating], y: NDArray[np.integer], folds: Folds, *, strengths: Sequence[float] = STRENGTHS
) -> Probe:
    """Nested, grouped cross-validation of an L2-regularised logistic regression, as one batched solve.

    Args:
        X: (n, d) embeddings of the training split.
        y: (n,) labels, 0 or 1.
        folds: which row validates where.
        strengths: (S,) values of C to choose from, per fold.

    Raises:
        UserError: with fewer than three folds, which leave nothing to nest; and as `fit_logistic` does.
    """
    n_folds, fold = folds.n_folds, folds.fold
    if n_folds < 3:
        raise UserError(f"choosing a strength within each training set needs at least 3 folds, got {n_folds}: --cv 3.")
    pairs = list(combinations(range(n_folds), 2))
    masks = np.stack([fold != f for f in range(n_folds)] + [(fold != f) & (fold != g) for f, g in pairs])
    fits = fit_logistic(X, y, masks=masks, strengths=np.asarray(strengths))

    # inner[f, s]: mean balanced log loss on each other fold g of the fit that saw neither f nor g.
    inner = np.zeros((n_folds, len(strengths)))
    for p, (f, g) in enumerate(pairs, start=n_folds):
        inner[f] += balanced_log_loss(y[fold == g], fits.logits[fold == g, p])
        inner[g] += balanced_log_loss(y[fold == f], fits.logits[fold == f, p])
    chosen = inner.argmin(axis=1)  # (F,)
    each = np.arange(n_folds)
    return Probe(
        coef=fits.coef[each, chosen],
        intercept=fits.intercept[each, chosen],
        validation_logit=fits.logits[np.arange(len(y)), fold, chosen[fold]],
        record={
            "strengths": list(strengths),
            "chosen_strength": [strengths[s] for s in chosen],
            "at_edge": bool(np.isin(chosen, (0, len(strengths) - 1)).any()),
            "inner_loss": np.round(inner / (n_folds - 1), 5).tolist(),
            "max_gradient": float(fits.gradient_norm.max()),
            "n_not_converged": int((~fits.converged).sum()),
            "n_fits": int(fits.converged.size),
        },
    )


def fit_paper(X: NDArray[np.floating], y: NDArray[np.integer], folds: Folds, *, seed: int) -> Probe:
    """The paper's own probe; see `probe.sgd`."""
    fit = fit_paper_probe(X, y, masks=folds.training, seed=seed)
    logits = X.astype(np.float32) @ fit.coef.T + fit.intercept  # (n, F)
    return Probe(
        coef=fit.coef,
        intercept=fit.intercept.astype(np.float64),
        validation_logit=logits[np.arange(len(y)), folds.fold],
        record={
            "recipe": asdict(PaperRecipe()),
            "best_epoch": fit.best_epoch.tolist(),
            "n_epochs": fit.n_epochs.tolist(),
        },
    )


def _is_ami_br(name: str) -> bool:
    return name == DEFAULT_TRAIN


def _train_dataset(store: FeatureStore, tables: Mapping[str, Samples], options: ProbeOptions) -> str:
    if not tables:
        raise UserError(f"{store.path} holds no dataset yet. Run: fm-extract")
    if options.train is not None:
        _require_dataset(store, options.train)
        return options.train
    if DEFAULT_TRAIN in tables:
        return DEFAULT_TRAIN
    trainable = [name for name in tables if (tables[name].split != TEST).any()]
    trainable = [name for name in trainable if name != DEMO] or trainable
    if len(trainable) == 1:
        return trainable[0]
    raise UserError(f"{store.path} holds {', '.join(tables)}: say which one to train on with --train.")


def _require_dataset(store: FeatureStore, name: str) -> None:
    datasets = store.datasets()
    if name not in datasets:
        raise UserError(
            f"{store.path} has no dataset {name!r}; it has {', '.join(datasets)}.{nearest(name, datasets)} "
            f"Run: fm-extract --dataset {name}"
        )


def _test_datasets(store: FeatureStore, model: str, train: str, options: ProbeOptions) -> list[str]:
    """The other datasets to score: those asked for, or all that have this model complete, the demo left out."""
    if options.test is not None:
        for name in options.test:
            _require_dataset(store, name)
        return [name for name in options.test if name != train]
    return [
        name
        for name in store.datasets()
        if name not in (train, DEMO) and any(entry.complete for entry in store.entries(name, model))
    ]


def _candidates(
    store: FeatureStore, model: str, train: str, tests: Sequence[str], options: ProbeOptions
) -> list[tuple[Entry, str]]:
    """The (train entry, pooling) pairs to choose from: views that every set has, poolings that the store has."""
    view = options.view or ("full" if options.recipe == "paper" else None)
    pooling = options.pooling or ("card" if options.recipe == "paper" else None)
    here = {entry.view: entry for entry in store.entries(train, model) if entry.complete}
    for name in tests:
        there = {entry.view: entry for entry in store.entries(name, model) if entry.complete}
        if view is not None and view in here and view not in there:
            raise UserError(
                f"{name} has no complete embeddings of {model} in view {view}. "
                f"Run: fm-extract --model {model} --dataset {name} --view {view}"
            )
        here = {key: entry for key, entry in here.items() if key in there}
        for key, entry in here.items():
            _require_same_embedding(entry, there[key])
    if view is not None:
        here = {key: entry for key, entry in here.items() if key == view}
    if not here:
        asked = f"in view {view}" if view else f"in a view that {', '.join([train, *tests])} share"
        raise UserError(
            f"{store.path} has no complete embeddings of {model} {asked}. "
            f"Run: fm-extract --model {model} --dataset {','.join([train, *tests])} --view {view or 'full'}"
        )
    pairs = []
    for entry in here.values():
        poolings = [pooling] if pooling else _distinct_poolings(entry)
        pairs += [(entry, name) for name in poolings]
    return pairs


def _distinct_poolings(entry: Entry) -> list[str]:
    """The card's embedding first, then every stored pooling that differs from it."""
    return ["card", *(name for name in entry.poolings if name != entry.card_pooling)]


def _require_same_embedding(train: Entry, test: Entry) -> None:
    """Embeddings of two datasets compare only if everything but the patches was the same."""
    own = {"dataset_digest", "source_mpp"}
    differing = [
        f"{key} ({train.parts.get(key)} against {test.parts.get(key)})"
        for key in sorted((train.parts.keys() | test.parts.keys()) - own)
        if train.parts.get(key) != test.parts.get(key) and not (train.imported or test.imported)
    ]
    if differing:
        raise UserError(
            f"{train.model} in view {train.view} was computed differently for {train.dataset} and {test.dataset}: "
            f"{'; '.join(differing)}. Run fm-extract again for both with the same options and --overwrite."
        )


def _probe_model(
    store: FeatureStore,
    tables: Mapping[str, Samples],
    model: str,
    *,
    train: str,
    rows: NDArray[np.intp],
    folds: Folds,
    options: ProbeOptions,
    runs: Path,
) -> Path:
    started = time.perf_counter()
    table = tables[train]
    y = table.label[rows]
    tests = _test_datasets(store, model, train, options)
    tried: list[dict[str, Any]] = []
    best: tuple[float, Probe, Entry, str] | None = None
    for entry, pooling in _candidates(store, model, train, tests, options):
        X = store.read(train, model, entry.view, pooling, rows=rows)
        probe = fit_paper(X, y, folds, seed=options.seed) if options.recipe == "paper" else fit_exact(X, y, folds)
        per_fold = [
            (
                auroc(y[held], probe.validation_logit[held]),
                balanced_accuracy(y[held], probe.validation_logit[held] >= 0),
            )
            for held in (folds.fold == f for f in range(folds.n_folds))
        ]
        area, accuracy = (float(value) for value in np.mean(per_fold, axis=0))
        tried.append(
            {"view": entry.view, "pooling": pooling, "validation_auroc": area, "validation_balanced_accuracy": accuracy}
            | probe.record
        )
        if best is None or area > best[0]:
            best = (area, probe, entry, pooling)
    assert best is not None  # _candidates raises rather than return none
    _, probe, entry, pooling = best

    parts = [predictions_of(train, table.select(rows), split=VALIDATION, fold=folds.fold, logit=probe.validation_logit)]
    fingerprints = {train: entry.fingerprint}
    for name in [train, *tests]:
        samples = tables[name]
        held_out = np.flatnonzero(samples.split == TEST) if name == train else np.arange(len(samples))
        if len(held_out):
            parts.append(_score(store, name, samples, held_out, model, entry.view, pooling, probe))
        fingerprints[name] = next(e.fingerprint for e in store.entries(name, model) if e.view == entry.view)
    run = {
        "kind": "probe",
        "model": model,
        "method": "probe",
        "options": asdict(options),
        "store": str(store.path),
        "train": train,
        "test": tests,
        "view": entry.view,
        "pooling": pooling,
        "card_pooling": entry.card_pooling,
        "label_names": store.dataset_attrs(train).get("label_names", ["0", "1"]),
        "sources": {name: store.dataset_attrs(name).get("source", "") for name in [train, *tests]},
        "fingerprints": fingerprints,
        "embedding": entry.parts,
        "folds": {"n": folds.n_folds, "source": folds.source, "digest": folds.digest, "seed": options.seed},
        "table_digests": {name: store.dataset_attrs(name)["table_digest"] for name in [train, *tests]},
        "candidates": tried,
    }
    predictions = concatenate(parts)
    return write_run(
        runs,
        run,
        predictions,
        tables=tables,
        metrics=evaluate(predictions),
        weights={"coef": probe.coef, "intercept": probe.intercept},
        seconds=time.perf_counter() - started,
    )


def _score(
    store: FeatureStore,
    name: str,
    samples: Samples,
    rows: NDArray[np.intp],
    model: str,
    view: str,
    pooling: str,
    probe: Probe,
) -> Predictions:
    X = store.read(name, model, view, pooling, rows=rows)
    logits = predict_logits(X, probe.coef, probe.intercept)  # (m, F)
    return predictions_of(name, samples.select(rows), split=TEST, fold=np.arange(logits.shape[1]), logit=logits)
