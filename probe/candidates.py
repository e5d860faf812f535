"""Which embeddings may a probe choose from, one or several together, and how good is each out of fold?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from features.alterations import split_alteration
from features.blocks import Embeddings
from features.console import UserError, say
from features.entry import Entry
from features.store import FeatureStore
from features.views import parse_view
from probe.combine import forward_selection, mean_logits
from probe.commands import missing_embeddings
from probe.curve import Subset
from probe.experiment import Experiment
from probe.linear import STRENGTHS, Probe, fit_exact, fit_paper, held_out_folds, in_memory
from probe.metrics import judge_logits
from probe.records import COMBINED, Candidate, Combined, FitRecord, joined
from probe.schedule import probe_recipe
from probe.stream import fits_in_memory

if TYPE_CHECKING:
    from probe.probing import ProbeOptions

# What a trained probe's recipe sees: the paper's text resizes the whole patch to 224 pixels and normalises it by
# ImageNet's statistics; the authors' scripts prepare it as each model's card says.
TRAINED_VIEWS = {"paper": "full@224+imagenet", "authors": "full"}
TEXT_TRANSFORM = {
    "crop": None,
    "resize": 224,
    "input_size": 224,
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


@dataclass(frozen=True, eq=False)
class Setup:
    """What the probes of a backbone need; all but the datasets to score is the same for all of a store."""

    store: FeatureStore
    options: ProbeOptions
    experiment: Experiment
    subsets: tuple[Subset, ...]  # of the learning curve
    device: str


@dataclass(frozen=True, eq=False)
class Fitted:
    """A candidate: one embedding and its probe, or a combination of several."""

    embeddings: tuple[tuple[Entry, str], ...]  # the entry of the training dataset, and the pooling
    probes: tuple[Probe, ...]  # one; or one per embedding, whose mean is told
    record: Candidate

    @property
    def validation_logit(self) -> NDArray[np.float64]:
        """(n, K, c - 1) as `Probe.validation_logit`."""
        return mean_logits([probe.validation_logit for probe in self.probes])


def validation_auroc(fitted: Fitted) -> float:
    """Give the figure that candidates are chosen by."""
    return fitted.record.validation_auroc


def embeddings_of(setup: Setup, entry: Entry, pooling: str, dataset: str, rows: NDArray[np.intp]) -> Embeddings:
    """Find the embeddings of rows of a dataset, by the model and in the view of an entry."""
    return setup.store.embeddings(dataset, model=entry.model, view=entry.view, pooling=pooling, rows=rows)


def n_fits(experiment: Experiment, options: ProbeOptions) -> int:
    """Count the fits of a batch, which need memory beside the embeddings."""
    return len(held_out_folds(experiment.folds)) if options.recipe == "exact" else experiment.folds.n_folds


def fit_candidates(setup: Setup, model: str) -> list[Fitted]:
    """Fit every candidate."""
    experiment = setup.experiment
    y, folds = experiment.label, experiment.folds
    classes: dict[str, Any] = {"n_classes": experiment.n_classes, "target": experiment.target}
    fitted = []
    for entry, pooling in list_candidates(setup, model):
        stored = embeddings_of(setup, entry, pooling, experiment.train, experiment.rows)
        if setup.options.recipe != "exact":
            recipe = probe_recipe(setup.options.recipe, model=model)
            probe = fit_paper(
                stored.read(), y, folds=folds, seeds=setup.options.training_seeds, recipe=recipe, **classes
            )
        else:
            probe = fit_exact(
                in_memory(stored, n_fits(experiment, setup.options), n_classes=experiment.n_classes),
                y,
                folds=folds,
                device=setup.device,
                **classes,
            )
        accuracy, area = _judged(experiment, probe.validation_logit)
        record = Candidate(
            view=entry.view,
            pooling=pooling,
            validation_auroc=area,
            validation_balanced_accuracy=accuracy,
            **vars(probe.fit),
        )
        fitted.append(Fitted(((entry, pooling),), (probe,), record))
    return fitted


def _judged(experiment: Experiment, logit: NDArray[np.floating]) -> tuple[float, float]:
    """Compute mean balanced accuracy and AUROC over fold models, of out-of-fold logits (n, K, c - 1)."""
    y, fold = experiment.label, experiment.folds.fold
    held_out = [fold == f for f in range(experiment.folds.n_folds)]
    judged = [judge_logits(y[rows], logit[rows, k]) for k in range(logit.shape[1]) for rows in held_out]
    accuracy, area = np.mean(judged, axis=0).tolist()
    return accuracy, area


def best_combination(setup: Setup, every: Sequence[Fitted]) -> tuple[Fitted | None, list[Candidate]]:
    """Try combinations of candidates, and find the best if it is better out of fold than the best candidate.

    Returns:
        The combination, or None; and the records of all that it was chosen from.
    """
    experiment = setup.experiment
    logits = [one.validation_logit for one in every]
    path = [every[k] for k in forward_selection(logits, lambda logit: _judged(experiment, logit)[1])]
    sizes = range(2, len(path) + 1)
    tried = [found for how in COMBINED for n in sizes if (found := _combination(setup, path[:n], how)) is not None]
    chosen = max([path[0], *tried], key=validation_auroc)  # the first of equals
    if chosen is path[0]:
        ((entry, pooling),) = chosen.embeddings
        area = max((one.record.validation_auroc for one in tried), default=0.0)
        said = f"the best of {len(tried)} combinations of {len(every)} embeddings reached {area:.4f}"
        say(
            f"No combination is better out of fold than {entry.model} ({entry.view}, {pooling}) alone (AUROC "
            f"{chosen.record.validation_auroc:.4f}): {said if tried else 'there is no other embedding'}."
        )
    alone = [
        Candidate(  # how it was fitted is in the run of its model
            model=one.embeddings[0][0].model,
            view=one.record.view,
            pooling=one.record.pooling,
            validation_auroc=one.record.validation_auroc,
            validation_balanced_accuracy=one.record.validation_balanced_accuracy,
        )
        for one in every
    ]
    return None if chosen is path[0] else chosen, [*alone, *(one.record for one in tried)]


def _combination(setup: Setup, parts: Sequence[Fitted], combined: Combined) -> Fitted | None:
    """Join candidates of one embedding each; None for embeddings side by side for which there is no memory."""
    experiment = setup.experiment
    embeddings = tuple(part.embeddings[0] for part in parts)
    if combined == "mean":
        probes, fit = tuple(part.probes[0] for part in parts), FitRecord()
    else:
        stored = [embeddings_of(setup, *embedding, experiment.train, experiment.rows) for embedding in embeddings]
        width, n_columns = sum(one.shape[1] for one in stored), n_fits(experiment, setup.options) * len(STRENGTHS)
        if not fits_in_memory((len(experiment.rows), width), n_columns, n_classes=experiment.n_classes):
            say(f"{len(parts)} embeddings side by side ({width:,} features) need more memory than there is; left out.")
            return None
        probe = fit_exact(
            np.concatenate([one.read() for one in stored], axis=1),
            experiment.label,
            folds=experiment.folds,
            device=setup.device,
            n_classes=experiment.n_classes,
            target=experiment.target,
        )
        probes, fit = (probe,), probe.fit
    accuracy, area = _judged(experiment, mean_logits([probe.validation_logit for probe in probes]))
    record = Candidate(
        model=joined([entry.model for entry, _ in embeddings]),
        view=joined([entry.view for entry, _ in embeddings]),
        pooling=joined([pooling for _, pooling in embeddings]),
        combined=combined,
        validation_auroc=area,
        validation_balanced_accuracy=accuracy,
        **vars(fit),
    )
    return Fitted(embeddings, probes, record)


def list_candidates(setup: Setup, model: str) -> list[tuple[Entry, str]]:
    """List the pairs (training entry, pooling) to choose from: views that every dataset has, and all poolings.

    Views of altered patches are among them only if one is asked for.
    """
    store, train, tests, options = setup.store, setup.experiment.train, setup.experiment.test, setup.options
    pooling = options.pooling or (None if options.recipe == "exact" else "card")

    def complete(dataset: str) -> dict[str, Entry]:
        entries = store.entries(dataset, model)
        return {
            one.view: one for one in entries if one.complete and (options.view or not split_alteration(one.view)[1])
        }

    if options.view:
        named = [view.strip() for view in options.view.split(",")]
    else:
        view = _view_of_recipe(store, options.recipe, model, {name: complete(name) for name in (train, *tests)})
        named = [] if view is None else [view]
    by_view = complete(train)
    # The modifiers of a view may be named in any order.
    stored = {tuple(sorted(key.split("+"))): key for key in by_view}
    named = list(dict.fromkeys(stored.get(tuple(sorted(view.split("+"))), view) for view in named))
    for name in tests:
        test_entries = complete(name)
        if lacking := [view for view in named if view in by_view and view not in test_entries]:
            raise UserError(
                f"{name} has no complete embeddings of {model} in view {lacking[0]}. "
                f"Run: {missing_embeddings(store, model, [name], ','.join(lacking))}"
            )
        by_view = {key: entry for key, entry in by_view.items() if key in test_entries}
        for key, entry in by_view.items():
            _require_same_embedding(entry, test_entries[key])
    lacking = [view for view in named if view not in by_view]
    if lacking or not by_view:
        for view in lacking:
            _require_view(store, view)
        where = f"in view {lacking[0]}" if lacking else f"in a view that {', '.join([train, *tests])} share"
        raise UserError(
            f"{store.path} has no complete embeddings of {model} {where}. "
            f"Run: {missing_embeddings(store, model, [train, *tests], ','.join(lacking) or 'full')}"
        )
    by_view = {key: by_view[key] for key in named} if named else by_view
    return [
        (entry, name) for entry in by_view.values() for name in ([pooling] if pooling else _distinct_poolings(entry))
    ]


def _require_view(store: FeatureStore, view: str) -> None:
    """Refuse a name that is no view, so that nobody is told to embed patches in it; imported ones have any name."""
    stored = sorted({entry.view for entry in store.entries()})
    if view in stored:
        return
    try:
        parse_view(view)
    except UserError as error:
        raise UserError(f"{error} {store.path} has {', '.join(stored)}.") from None


def _view_of_recipe(
    store: FeatureStore, recipe: str, model: str, by_dataset: Mapping[str, Mapping[str, Entry]]
) -> str | None:
    """Choose the view that a recipe asks for; `full` where not every dataset has that one, and then say so.

    Args:
        store, recipe, model: of the probe.
        by_dataset: dataset to view to entry.
    """
    asked = TRAINED_VIEWS.get(recipe)
    has_asked, has_full = (all(view in entries for entries in by_dataset.values()) for view in (asked, "full"))
    if asked is None or has_asked or not has_full:
        return asked  # where none is there, the caller says what is missing
    transforms = [entries["full"].parts.get("transform", {}) for entries in by_dataset.values()]
    if any(transform.get(name) != value for transform in transforms for name, value in TEXT_TRANSFORM.items()):
        say(
            f"{model}: the paper's text asks for view {asked}; used is full, as the model's card prepares it. For the "
            f"other: {missing_embeddings(store, model, by_dataset, asked)}"
        )
    return "full"


def _distinct_poolings(entry: Entry) -> list[str]:
    """List the card's embedding first, then every stored pooling that differs from it."""
    return ["card", *(name for name in entry.poolings if name != entry.card_pooling)]


def _require_same_embedding(train: Entry, test: Entry) -> None:
    """Refuse two datasets whose embeddings differ in anything but the patches."""
    patches = {"dataset_digest", "source_mpp", "crop"}
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
