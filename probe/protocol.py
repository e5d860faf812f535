"""How is one backbone probed? Folds, strengths, view and pooling from training data alone; the tests only ever score.

For each candidate (view, pooling) every fit goes into one batched problem: with F folds, the F fits that leave one
fold out and the F (F - 1) / 2 fits that leave two out, each at every strength. The fit without folds f and g, judged
on g, is an inner validation of outer fold f; judged on f, it is one of outer fold g: nested cross-validation for the
price of half its fits. So

- the strength of fold f is chosen by grouped validation within fold f's training rows;
- view and pooling are chosen by the mean validation AUROC over folds;
- held-out rows and other datasets choose nothing.

A learning curve (`probe.curve`) is the same fits again of the chosen candidate, each on fewer slides. Embeddings that
do not fit into memory (`probe.stream.BUDGET`) stay in the store and are read block by block.
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

from features.blocks import Embeddings
from features.console import UserError, nearest, progress
from features.device import find_device
from features.entry import Entry
from features.folds import SEED, Folds, effective_groups, grouped_folds
from features.samples import TEST, Samples
from features.store import FeatureStore
from probe.curve import CURVE_FILE, DRAWS, CurvePoint, Subset, checked_fractions, curve_csv, curve_points, draw_subsets
from probe.evidence import evaluate
from probe.logistic import Fits, fit_logistic, predict_logits
from probe.metrics import auroc, balanced_accuracy, balanced_log_loss
from probe.paper import PaperRecipe, fit_paper_probe
from probe.runs import VALIDATION, Predictions, concatenate, predictions_of, write_run
from probe.stream import fit_streamed, fits_in_memory

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
        seed: of the folds, of the paper recipe's training, and of the learning curve's draws.
        fractions: of the training slides, in (0, 1], for a learning curve of the chosen candidate; none for no curve.
        device: where to fit: "auto", "cpu", "cuda" or "cuda:N"; the paper's recipe, whose products are tiny, stays on
            the processor.
    """

    cv: int = 5
    train: str | None = None
    test: tuple[str, ...] | None = None
    view: str | None = None
    pooling: str | None = None
    recipe: Recipe = "exact"
    seed: int = SEED
    fractions: tuple[float, ...] = ()
    device: str = "auto"


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
            embedded differently, if the training split cannot be cut into folds, if a learning curve is asked for
            with the paper's recipe or a fraction that cannot be trained on, or if the device does not exist here.
    """
    checked_fractions(options.fractions)
    device = str(find_device(options.device))
    if options.fractions and options.recipe == "paper":
        raise UserError(
            "--fractions needs --recipe exact: the paper's probe has no learning curve here. Leave one out."
        )
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
    subsets = _subsets(table.select(rows), folds, options)
    return [
        _probe_model(
            store,
            tables,
            model,
            train=train,
            rows=rows,
            folds=folds,
            subsets=subsets,
            options=options,
            device=device,
            runs=runs,
        )
        for model in models or found
    ]


def fit_exact(
    X: NDArray[np.floating] | Embeddings,
    y: NDArray[np.integer],
    folds: Folds,
    *,
    strengths: Sequence[float] = STRENGTHS,
    device: str = "cpu",
) -> Probe:
    """Nested, grouped cross-validation of an L2-regularised logistic regression, as one batched solve.

    Args:
        X: (n, d) embeddings of the training split, in memory or still in the store.
        y: (n,) labels, 0 or 1.
        folds: which row validates where.
        strengths: (S,) values of C to choose from, per fold.
        device: where to compute, as torch names it.

    Raises:
        UserError: with fewer than three folds, which leave nothing to nest; and as `fit_logistic` does.
    """
    fold, left_out = folds.fold, _left_out(folds.n_folds)
    masks = np.stack([~np.isin(fold, held) for held in left_out])
    fits = _fit(X, y, masks=masks, strengths=strengths, device=device)
    chosen, record = _choose_strengths(fits, y, fold, masks=masks, left_out=left_out, strengths=strengths)
    each = np.arange(folds.n_folds)
    return Probe(
        coef=fits.coef[each, chosen],
        intercept=fits.intercept[each, chosen],
        validation_logit=fits.logits[np.arange(len(y)), fold, chosen[fold]],
        record=record,
    )


def _fit(
    X: NDArray[np.floating] | Embeddings,
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    strengths: Sequence[float],
    device: str,
) -> Fits:
    if isinstance(X, np.ndarray):
        return fit_logistic(X, y, masks=masks, strengths=strengths, device=device)
    return fit_streamed(X, y, masks=masks, strengths=strengths, device=device)


def fit_subset(
    X: NDArray[np.floating] | Embeddings,
    y: NDArray[np.integer],
    folds: Folds,
    subset: Subset,
    *,
    strengths: Sequence[float] = STRENGTHS,
    device: str = "cpu",
) -> Probe:
    """`fit_exact` on a share of the slides: as many columns, over no more rows than any of its fits trains on.

    Args:
        X, y, folds, strengths, device: as for `fit_exact`.
        subset: of `draw_subsets`, its masks in the order of `_left_out`.
    """
    fold, left_out, used = folds.fold, _left_out(folds.n_folds), np.flatnonzero(subset.masks.any(axis=0))
    masks = subset.masks[:, used]
    some = X[used] if isinstance(X, np.ndarray) else _loaded(X.select(used), folds.n_folds)
    fits = _fit(some, y[used], masks=masks, strengths=strengths, device=device)
    chosen, record = _choose_strengths(fits, y[used], fold[used], masks=masks, left_out=left_out, strengths=strengths)
    each = np.arange(folds.n_folds)
    coef, intercept = fits.coef[each, chosen], fits.intercept[each, chosen]
    logits = predict_logits(X, coef, intercept)  # (n, F)
    return Probe(coef, intercept, validation_logit=logits[np.arange(len(y)), fold], record=record)


def _loaded(stored: Embeddings, n_folds: int) -> NDArray[np.float16] | Embeddings:
    """The embeddings in memory, if all fits of them fit there too."""
    n_columns = n_folds * (n_folds + 1) // 2 * len(STRENGTHS)
    return stored.read() if fits_in_memory(stored.shape, n_columns) else stored


def _left_out(n_folds: int) -> list[tuple[int, ...]]:
    """The folds that each fit leaves out: each one, then each two."""
    if n_folds < 3:
        raise UserError(f"choosing a strength within each training set needs at least 3 folds, got {n_folds}: --cv 3.")
    return [(f,) for f in range(n_folds)] + list(combinations(range(n_folds), 2))


def _choose_strengths(
    fits: Fits,
    y: NDArray[np.integer],
    fold: NDArray[np.intp],
    *,
    masks: NDArray[np.bool_],
    left_out: Sequence[tuple[int, ...]],
    strengths: Sequence[float],
) -> tuple[NDArray[np.intp], dict[str, Any]]:
    """Each fold's strength, chosen within its own training rows, and how the fits went.

    The fit that leaves out f and g is judged for f on those rows of g that f trains on, and the other way round; for
    f alone, where g has only one class there, it says nothing.

    Args:
        fits: of `masks` and `strengths`.
        y, fold: (n,) labels, and where each row validates.
        masks: (m, n) the rows that each fit trains on.
        left_out: (m) the folds that it leaves out, in the order of `_left_out`.
        strengths: (S,) values of C.

    Returns:
        (F,) the place of the chosen strength, and the record of a `Probe`.
    """
    n_folds = sum(len(held) == 1 for held in left_out)
    # inner[f, s]: mean balanced log loss on each other fold g of the fit that saw neither f nor g.
    inner, judges = np.zeros((n_folds, len(strengths))), np.zeros(n_folds, dtype=np.intp)
    for m, held in enumerate(left_out[n_folds:], start=n_folds):
        for f, g in (held, held[::-1]):
            rows = masks[f] & (fold == g)
            if len(np.unique(y[rows])) == 2:
                inner[f] += balanced_log_loss(y[rows], fits.logits[rows, m])
                judges[f] += 1
    chosen = inner.argmin(axis=1)  # (F,)
    return chosen, {
        "strengths": list(strengths),
        "chosen_strength": [strengths[s] for s in chosen],
        "at_edge": bool(np.isin(chosen, (0, len(strengths) - 1)).any()),
        "inner_loss": np.round(inner / judges[:, None], 5).tolist(),
        "max_gradient": float(fits.gradient_norm.max()),
        "n_not_converged": int((~fits.converged).sum()),
        "n_fits": int(fits.converged.size),
    }


def fit_paper(X: NDArray[np.floating], y: NDArray[np.integer], folds: Folds, *, seed: int) -> Probe:
    """The paper's own probe; see `probe.paper`."""
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
    subsets: Sequence[Subset],
    options: ProbeOptions,
    device: str,
    runs: Path,
) -> Path:
    started = time.perf_counter()
    table = tables[train]
    y = table.label[rows]
    tests = _test_datasets(store, model, train, options)
    tried: list[dict[str, Any]] = []
    best: tuple[float, Probe, Entry, str] | None = None
    for entry, pooling in _candidates(store, model, train, tests, options):
        stored = store.embeddings(train, model=model, view=entry.view, pooling=pooling, rows=rows)
        if options.recipe == "paper":
            probe = fit_paper(stored.read(), y, folds, seed=options.seed)
        else:
            probe = fit_exact(_loaded(stored, folds.n_folds), y, folds, device=device)
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

    curve = _fit_curve(store, train, entry, pooling, rows, y, folds=folds, subsets=subsets, whole=probe, device=device)
    points: list[CurvePoint] = []
    parts = [_validation(train, table.select(rows), folds, probe)]
    for subset, part in curve:
        predictions = _validation(train, table.select(rows), folds, part)
        points += curve_points(subset, y, part.record["chosen_strength"], predictions)
    fingerprints = {train: entry.fingerprint}
    for name in [train, *tests]:
        samples = tables[name]
        held_out = np.flatnonzero(samples.split == TEST) if name == train else np.arange(len(samples))
        if len(held_out):
            X = _loaded(
                store.embeddings(name, model=model, view=entry.view, pooling=pooling, rows=held_out), folds.n_folds
            )
            parts.append(_score(X, name, samples.select(held_out), probe))
            for subset, part in curve:
                predictions = _score(X, name, samples.select(held_out), part)
                points += curve_points(subset, y, part.record["chosen_strength"], predictions)
        fingerprints[name] = store.entry(name, model=model, view=entry.view).fingerprint
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
        "cost": {"device": device},
    }
    if curve:
        more = [part.record for _, part in curve if part is not probe]
        run["learning_curve"] = {
            "draws": DRAWS,
            "n_fits": sum(record["n_fits"] for record in more),
            "n_not_converged": sum(record["n_not_converged"] for record in more),
            "max_gradient": max((record["max_gradient"] for record in more), default=0.0),
        }
    predictions = concatenate(parts)
    del parts
    return write_run(
        runs,
        run,
        predictions,
        tables=tables,
        metrics=evaluate(predictions),
        weights={"coef": probe.coef, "intercept": probe.intercept},
        seconds=time.perf_counter() - started,
        files={CURVE_FILE: curve_csv(points)} if curve else None,
    )


def _subsets(samples: Samples, folds: Folds, options: ProbeOptions) -> tuple[Subset, ...]:
    """What the learning curve of every model trains on; `samples` is the training split."""
    if not options.fractions:
        return ()
    return draw_subsets(
        samples.label,
        folds.fold,
        effective_groups(samples),
        left_out=_left_out(folds.n_folds),
        fractions=options.fractions,
        seed=options.seed,
    )


def _fit_curve(
    store: FeatureStore,
    train: str,
    entry: Entry,
    pooling: str,
    rows: NDArray[np.intp],
    y: NDArray[np.integer],
    *,
    folds: Folds,
    subsets: Sequence[Subset],
    whole: Probe,
    device: str,
) -> list[tuple[Subset, Probe]]:
    """Every subset's probes of the chosen candidate; fraction 1 is the run's own, `whole`.

    A batch per fraction and draw, not one for all: over the rows of that subset alone it takes a share of the time,
    and none is larger than the run's own.
    """
    if not subsets:
        return []
    X = _loaded(store.embeddings(train, model=entry.model, view=entry.view, pooling=pooling, rows=rows), folds.n_folds)
    curve = []
    with progress(f"learning curve {entry.model}", len(subsets), "subsets") as advance:
        for subset in subsets:
            curve.append((subset, whole if subset.fraction == 1 else fit_subset(X, y, folds, subset, device=device)))
            advance(1)
    return curve


def _validation(name: str, samples: Samples, folds: Folds, probe: Probe) -> Predictions:
    return predictions_of(name, samples, split=VALIDATION, fold=folds.fold, logit=probe.validation_logit)


def _score(X: NDArray[np.floating] | Embeddings, name: str, samples: Samples, probe: Probe) -> Predictions:
    logits = predict_logits(X, probe.coef, probe.intercept)  # (m, F)
    return predictions_of(name, samples, split=TEST, fold=np.arange(logits.shape[1]), logit=logits)
