"""When does the learning rate fall, when does training stop, and which epoch is kept?

All of this follows from the validation scores of the epochs so far, and from nothing else. So a schedule has no state
of its own: a training that is resumed from a checkpoint computes the same rates as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class PaperRecipe:
    """The hyperparameters of Banerjee et al. 2025, section 4: one set for probes, LoRA and end-to-end training.

    `plateau_threshold` is not in the text; it is the default of torch's ReduceLROnPlateau.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch_size: int = 8
    max_epochs: int = 100
    patience: int = 15
    plateau_factor: float = 0.5
    plateau_patience: int = 3
    plateau_threshold: float = 1e-4
    min_learning_rate: float = 1e-7


PAPER = PaperRecipe()

# The probes of the authors' scripts (AMi-Br_Benchmark, commit 3acf4dad): one set, but for one model.
AUTHORS = replace(PAPER, learning_rate=5e-5)
AUTHORS_BY_MODEL = {"prov-gigapath": replace(PAPER, learning_rate=1e-3, weight_decay=1e-4)}


def probe_recipe(name: str, *, model: str) -> PaperRecipe:
    """Find the hyperparameters of a trained probe: of the paper's text ("paper") or of its scripts ("authors").

    >>> probe_recipe("authors", model="prov-gigapath").learning_rate
    0.001
    """
    return PAPER if name == "paper" else AUTHORS_BY_MODEL.get(model, AUTHORS)


_LEAST_FALL = 1e-8  # torch's `eps`: a rate that would fall by less stays


def best_epoch(scores: Sequence[float]) -> int:
    """Return the epoch, counted from 0, with the highest score; the first of equals; -1 before any epoch.

    >>> best_epoch([0.6, 0.7, 0.7])
    1
    """
    return max(range(len(scores)), key=lambda epoch: scores[epoch], default=-1)


def should_stop(scores: Sequence[float], *, patience: int, max_epochs: int) -> bool:
    """Say whether training ends: after `max_epochs`, or `patience` epochs after the best one.

    >>> should_stop([0.6, 0.7, 0.65], patience=2, max_epochs=100)
    False
    >>> should_stop([0.6, 0.7, 0.65, 0.7], patience=2, max_epochs=100)
    True
    """
    return len(scores) >= max_epochs or len(scores) - 1 - best_epoch(scores) >= patience


def plateau_rate(
    scores: Sequence[float], *, start: float, factor: float, patience: int, minimum: float, threshold: float
) -> float:
    """Return the learning rate of the next epoch, as torch's ReduceLROnPlateau (mode "max") sets it.

    Args:
        scores: validation scores of the epochs so far.
        start: learning rate of the first epoch.
        factor: multiplies the rate after more than `patience` epochs in a row that were not better than the best.
        patience: how many such epochs are tolerated.
        minimum: the rate never falls below it.
        threshold: by which fraction of the best score a better one must exceed it. Early stopping and the choice of
            the epoch that is kept know no such threshold.

    >>> plateau_rate([0.7, 0.6, 0.6], start=1e-4, factor=0.5, patience=1, minimum=1e-7, threshold=1e-4)
    5e-05
    """
    rate, best, n_bad = start, -math.inf, 0
    for score in scores:
        if score > best * (1 + threshold):
            best, n_bad = score, 0
        else:
            n_bad += 1
        if n_bad > patience:
            lower, n_bad = max(rate * factor, minimum), 0
            rate = lower if rate - lower > _LEAST_FALL else rate
    return rate
