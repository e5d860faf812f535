"""Which embeddings, or which runs, are better together than the best of them alone?

Two ways to join embeddings are tried: the mean of the probabilities of a probe of each, and one probe of all of them
side by side. Which ones, forward selection decides on out-of-fold predictions (Caruana et al., Ensemble selection from
libraries of models, ICML 2004; here each at most once). It begins with the best and adds the one that helps most, so it
looks at few combinations. What is chosen is better out of fold than it will be elsewhere, as any best of several is.

Probabilities are averaged, not logits: a run's fold models are joined so too, and means of means are means of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from scipy.special import logsumexp

from features.console import UserError
from features.folds import SEED
from probe.ensembles import Ensemble, ensemble_of
from probe.evidence import compare
from probe.predictions import VALIDATION, Predictions, concatenate
from probe.records import RunRecord
from probe.resample import Resampling
from probe.runs import read_predictions, read_samples
from probe.significance import Difference

MOST_PARTS = 4
_STEPS, _CLOSE = 10_000, 1e-9  # of `fitted_weights`
_NOTHING = 1e-9  # a share that moves no probability


def mean_logits(logits: Sequence[NDArray[np.floating]], weights: Sequence[float] | None = None) -> NDArray[np.float64]:
    """Compute the logits (..., c - 1) of the mean of the probabilities that logits of the same shape stand for.

    >>> mean_logits([np.array([0.0]), np.log([3.0])]).round(4)  # of .5 and .75
    array([0.5108])

    Args:
        logits: K arrays (..., c - 1), of classes 1, 2, ... over class 0.
        weights: K shares; None for equal ones.
    """
    if len(logits) == 1:
        return np.asarray(logits[0], dtype=np.float64)  # to the last bit
    wide = np.stack([np.concatenate([np.zeros_like(one[..., :1]), one], axis=-1) for one in logits]).astype(np.float64)
    share = np.full(len(wide), 1 / len(wide)) if weights is None else np.asarray(weights, dtype=np.float64)
    share = share.reshape(-1, *[1] * (wide.ndim - 1))
    mixed = logsumexp(wide - logsumexp(wide, axis=-1, keepdims=True), axis=0, b=share)
    return np.asarray(mixed[..., 1:] - mixed[..., :1])


def forward_selection(
    logits: Sequence[NDArray[np.floating]], score: Callable[[NDArray[np.float64]], float], *, most: int = MOST_PARTS
) -> list[int]:
    """Order candidates by what they add: the best alone, then again and again the one with which the mean is best.

    Args:
        logits: (n, ...) out-of-fold logits of each candidate.
        score: of such logits; the higher, the better. Of equals the first is taken.
        most: how many to take.
    """
    path: list[int] = []
    while len(path) < min(most, len(logits)):
        rest = [k for k in range(len(logits)) if k not in path]
        path.append(max(rest, key=lambda k: score(mean_logits([logits[j] for j in (*path, k)]))))
    return path


def fitted_weights(label: NDArray[np.integer], probability: NDArray[np.float64]) -> NDArray[np.float64]:
    """Find the shares under which the mean of K probabilities has the smallest balanced log loss.

    The loss is convex in the shares. Each step gives every member its part in the probability of what is there (the EM
    algorithm for the shares of a mixture), which never raises the loss and leaves shares positive with sum 1. In the
    end those that have all but vanished become 0.

    Args:
        label: (n,) class numbers.
        probability: (K, n, c), out of fold.

    Returns:
        (K,) shares.
    """
    right = np.maximum(probability[:, np.arange(len(label)), label], np.finfo(np.float64).tiny)  # (K, n)
    balance = 1 / np.bincount(label)[label]
    balance /= balance.sum()
    share = np.full(len(right), 1 / len(right))
    for _ in range(_STEPS):
        before, share = share, share * ((right / (share @ right)) @ balance)
        if np.abs(share - before).max() < _CLOSE:
            break
    share = np.where(share < _NOTHING, 0, share)
    return np.asarray(share / share.sum())


def averaged(runs: Mapping[str, Predictions], weights: Sequence[float] | None = None) -> Predictions:
    """Average the predictions of runs on the same folds, fold by fold, on every set that all of them have.

    Args:
        runs: name to predictions. Of a run of several trainings, the mean over them counts.
        weights: a share for each run; None for equal ones.

    Returns:
        Predictions of one model per fold, in the first run's order of patches.

    Raises:
        UserError: if the runs have no set in common, or on one of them other patches, labels, slides or folds.
    """
    first, *others = runs.values()
    shared = [name for name in first.sets() if all(name in other.sets() for other in others)]
    if not shared:
        raise UserError(f"{' and '.join(runs)} have no set in common, so they cannot be averaged.")
    parts = []
    for dataset, split in shared:
        of_set = [run.select((run.dataset == dataset) & (run.split == split)) for run in runs.values()]
        arranged = [_arranged(part) for part in of_set]
        rows, _ = arranged[0]
        reference = of_set[0].select(rows)
        for name, part, (own, _) in zip(runs, of_set, arranged, strict=True):
            for column in ("id", "fold", "label", "group"):
                if not np.array_equal(getattr(part, column)[own], getattr(reference, column)):
                    raise UserError(
                        f"{next(iter(runs))} and {name} differ in the {column} of patches of {dataset}/{split}. Only "
                        "runs on the same patches and folds can be averaged."
                    )
        logit = mean_logits([logits for _, logits in arranged], weights)
        mean = replace(reference, logit=logit.astype(np.float32), seed=np.full(len(rows), SEED))
        parts.append(mean.select(np.argsort(rows, kind="stable")))
    return concatenate(parts)


def _arranged(part: Predictions) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Sort the predictions of a set by patch and fold; return a row of each, and the logits of its mean over seeds."""
    order = np.lexsort((part.seed, part.fold, part.id))
    id, fold = part.id[order], part.fold[order]
    starts = np.flatnonzero(np.append(True, (id[1:] != id[:-1]) | (fold[1:] != fold[:-1])))
    n_seeds, uneven = divmod(len(order), len(starts))
    if uneven or (np.diff(starts, append=len(order)) != n_seeds).any():
        raise UserError(f"predictions of {part.dataset[0]}/{part.split[0]} are not those of whole fold models.")
    logit = part.logit[order].reshape(len(starts), n_seeds, -1)
    return order[starts], mean_logits(list(logit.swapaxes(0, 1)))


def weights_of(runs: Mapping[str, Predictions], how: str) -> tuple[float, ...] | None:
    """Choose the shares of runs in their mean: None for "equal", or by `fitted_weights` for "out-of-fold".

    Raises:
        UserError: if `how` is neither.
    """
    if how == "equal":
        return None
    if how != "out-of-fold":
        raise UserError(f"unknown weights {how!r}: use equal or out-of-fold.")
    averaged(runs)  # refuses runs on other patches or folds
    alone = [averaged({name: run.select(run.split == VALIDATION)}) for name, run in runs.items()]
    matched = [one.select(np.argsort(one.id, kind="stable")) for one in alone]
    return tuple(fitted_weights(matched[0].label, np.stack([one.probability for one in matched])).tolist())


def gains(
    combined: RunRecord, part: RunRecord, *, resampling: Resampling = Resampling()
) -> dict[str, dict[str, Difference]]:
    """Compare a combination with its best part on every set that both have: figure to combination minus part.

    Out of fold there is an interval and no p-value, because the combination was chosen there.

    Returns:
        "<dataset>/<split>" to figure to difference.
    """
    of_both: list[dict[str, Ensemble]] = []
    for record in (combined, part):
        assert record.folder is not None
        predictions = read_predictions(record.folder, seed=record.seeds[0])
        tables = read_samples(record.folder, predictions)
        of_both.append(
            {
                f"{dataset}/{split}": ensemble_of(
                    predictions, dataset, split, samples=tables[dataset], ordinal=record.ordinal
                )
                for dataset, split in predictions.sets()
            }
        )
    ours, theirs = of_both
    chose = {"combined": combined.chosen_out_of_fold, "part": part.chosen_out_of_fold}
    return {
        name: compare(
            {"combined": ours[name], "part": theirs[name]},
            resampling=resampling,
            chose=chose if name.endswith(f"/{VALIDATION}") else None,
        )
        .pairs[0]
        .differences
        for name in ours
        if name in theirs
    }
