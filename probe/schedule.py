"""When does the learning rate fall, when does training stop, and which epoch is kept?

All of this follows from the validation scores of the epochs so far, and from nothing else. So a schedule has no state
of its own: a training that is resumed from a checkpoint computes the same rates as one that was never interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRecipe:
    """The hyperparameters of Banerjee et al. 2025, section 4: one set for probes, LoRA and end-to-end training."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch_size: int = 8
    max_epochs: int = 100
    patience: int = 15
    plateau_factor: float = 0.5
    plateau_patience: int = 3
    min_learning_rate: float = 1e-7


PAPER = PaperRecipe()


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


def plateau_rate(scores: Sequence[float], *, start: float, factor: float, patience: int, minimum: float) -> float:
    """Return the learning rate of the next epoch, as torch's ReduceLROnPlateau (mode "max", threshold 0) sets it.

    Args:
        scores: validation scores of the epochs so far.
        start: learning rate of the first epoch.
        factor: multiplies the rate after more than `patience` epochs in a row that were not better than the best.
        patience: how many such epochs are tolerated.
        minimum: the rate never falls below it.

    >>> plateau_rate([0.7, 0.6, 0.6], start=1e-4, factor=0.5, patience=1, minimum=1e-7)
    5e-05
    """
    rate, best, n_bad = start, -math.inf, 0
    for score in scores:
        if score > best:
            best, n_bad = score, 0
        else:
            n_bad += 1
        if n_bad > patience:
            rate, n_bad = min(rate, max(rate * factor, minimum)), 0
    return rate
