"""How are all folds stepped at once, each at its own rate?

Adam (Kingma & Ba 2015, arXiv:1412.6980), with weight decay added to the gradient, or AdamW (Loshchilov & Hutter 2019,
arXiv:1711.05101), with weights decayed by themselves, as `torch.optim` computes them. There the rate, the number of
steps and whether a parameter is stepped at all are decided on the host, once per optimiser. Here they are a row of
numbers per fold and step, computed for a whole epoch beforehand: a GPU then never waits for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from finetune.recipes import Recipe

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's own


class Scalars(NamedTuple):
    """What a step of one fold needs, of which a schedule holds one each along its last axis.

    Attributes:
        weight: of the fold's loss: 1 where it is stepped, 0 where it has stopped or its epoch has ended.
        size: learning rate / (1 - beta1^t) for the t-th step; 0 where it is not stepped.
        root: sqrt(1 - beta2^t).
        decay: AdamW's factor, 1 - learning rate * weight decay; 1 for Adam.
    """

    weight: float
    size: float
    root: float
    decay: float


IDLE = Scalars(0.0, 0.0, 1.0, 1.0)


def scalars(recipe: Recipe, *, rate: float, step: int) -> Scalars:
    """Compute the scalars of a fold's `step`-th step, counted from 1, at a learning rate."""
    decay = 1 - rate * recipe.weight_decay if recipe.optimizer == "adamw" else 1.0
    return Scalars(1.0, rate / (1 - BETA1**step), (1 - BETA2**step) ** 0.5, decay)


def schedule_of(rows: Sequence[Sequence[Scalars]], like: Tensor) -> Tensor:
    """Make one tensor (n_batches, n_rows, 4) of the scalars of all steps, in the type and on the device of `like`."""
    return torch.tensor(rows, dtype=torch.float64).to(like)


def adam_(values: Tensor, gradients: Tensor, moments: Tensor, schedule: Tensor, recipe: Recipe) -> None:
    """Step all rows in place. Rows that are not stepped keep their bits, moments included.

    Args:
        values: (n_rows, p).
        gradients: (n_rows, p), finite.
        moments: (n_rows, 2, p) running means of gradients and of their squares.
        schedule: (n_rows, 4) `Scalars`.
        recipe: with optimiser and weight decay.
    """
    weight, size, root, decay = (column[:, None] for column in schedule.unbind(dim=1))
    mean, square = moments.unbind(dim=1)
    if recipe.optimizer == "adamw":
        values.mul_(decay)
    elif recipe.weight_decay:
        gradients = torch.add(gradients, values, alpha=recipe.weight_decay)
    mean.lerp_(gradients, weight * (1 - BETA1))
    square.lerp_(gradients.square(), weight * (1 - BETA2))
    denominator = square.sqrt().div_(root).add_(EPS)
    values.sub_(denominator.reciprocal_().mul_(mean).mul_(size))
