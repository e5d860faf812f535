"""What does the paper's own probe give? One linear layer on stored embeddings, its way, all folds at once.

The protocol of Banerjee et al. 2025, sections 4 and 4.2: Adam (learning rate 1e-4, L2 penalty 1e-5), cross-entropy on
two logits, weighted random sampling by inverse class frequency, batches of 8, up to 100 epochs, learning rate halved
after 3 epochs without a better validation balanced accuracy (down to 1e-7), stop after 15; the best epoch's weights are
kept. The folds are slices of one weight tensor, so one pass over the data trains them all; each keeps its own sampler,
schedule and early stopping, and a stopped fold leaves the batch. Kept for reproduction: `logistic.py` is the better
probe.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.console import progress
from probe.metrics import balanced_accuracy


@dataclass(frozen=True)
class PaperRecipe:
    """The paper's hyperparameters (section 4)."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-5
    batch_size: int = 8
    max_epochs: int = 100
    patience: int = 15
    plateau_factor: float = 0.5
    plateau_patience: int = 3
    min_learning_rate: float = 1e-7


@dataclass(frozen=True, eq=False)
class PaperFit:
    """Per-fold linear probes: logit = x @ coef + intercept is the difference of the two class logits.

    Attributes:
        coef: (F, d) float32.
        intercept: (F,) float32.
        best_epoch: (F,) the epoch whose weights were kept, from 0.
        n_epochs: (F,) how many epochs each fold ran.
    """

    coef: NDArray[np.float32]
    intercept: NDArray[np.float32]
    best_epoch: NDArray[np.intp]
    n_epochs: NDArray[np.intp]


def fit_paper_probe(
    X: NDArray[np.floating],
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    seed: int,
    recipe: PaperRecipe = PaperRecipe(),
) -> PaperFit:
    """Train one linear layer per fold on raw (not standardised) embeddings.

    Args:
        X: (n, d) embeddings.
        y: (n,) labels, 0 or 1.
        masks: (F, n) the training rows of each fold; the others validate it.
        seed: decides the initial weights and the samplers, fold by fold: a fold's result does not depend on the others.
        recipe: the hyperparameters.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the products are tiny: a second thread only waits, for long on a busy machine
    try:
        return _fit(X, y, masks=masks, seed=seed, recipe=recipe)
    finally:
        torch.set_num_threads(threads)


def _fit(
    X: NDArray[np.floating], y: NDArray[np.integer], *, masks: NDArray[np.bool_], seed: int, recipe: PaperRecipe
) -> PaperFit:
    n_folds, d = len(masks), X.shape[1]
    features = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32))
    target = torch.from_numpy(np.asarray(y, dtype=np.int64))
    generators = [torch.Generator().manual_seed(seed * 1000 + k) for k in range(n_folds)]
    bound = d**-0.5  # torch.nn.Linear's initialisation
    init = torch.stack([torch.rand(d + 1, 2, generator=g) * 2 * bound - bound for g in generators])  # (F, d + 1, 2)
    weights, bias = init[:, :d].clone(), init[:, d:].clone()
    adam = _Adam([weights, bias], recipe)
    rate = torch.full((n_folds, 1, 1), recipe.learning_rate)
    train_rows = [torch.from_numpy(np.flatnonzero(mask)) for mask in masks]
    sampling = [1.0 / torch.bincount(target[rows])[target[rows]] for rows in train_rows]

    best_weights, best_bias = weights.clone(), bias.clone()
    best_score, best_epoch = [-1.0] * n_folds, [0] * n_folds
    bad_epochs, n_epochs, active = [0] * n_folds, [0] * n_folds, list(range(n_folds))
    with progress("paper probe", recipe.max_epochs * n_folds, "epochs") as advance:
        for epoch in range(recipe.max_epochs):
            # Whole batches only: the last one is filled up rather than cut short.
            drawn = {k: _draw(train_rows[k], sampling[k], recipe.batch_size, generators[k]) for k in active}
            for step in range(max(map(len, drawn.values()))):
                folds = [
                    k for k in active if step < len(drawn[k])
                ]  # the smaller folds' epochs end a few batches earlier
                rows = torch.stack([drawn[k][step] for k in folds])  # (f, b)
                adam.step(folds, _gradients(features[rows], target[rows], weights, bias, folds), rate)
            for k in list(active):
                n_epochs[k] += 1
                held_out = ~masks[k]
                logits = features[torch.from_numpy(held_out)] @ weights[k] + bias[k]
                score = balanced_accuracy(y[held_out], (logits[:, 1] > logits[:, 0]).numpy())
                if score > best_score[k]:
                    best_score[k], best_epoch[k] = score, epoch
                    best_weights[k], best_bias[k] = weights[k], bias[k]
                since_best = epoch - best_epoch[k]
                bad_epochs[k] = 0 if since_best == 0 else bad_epochs[k] + 1
                if bad_epochs[k] > recipe.plateau_patience:
                    rate[k] = (rate[k] * recipe.plateau_factor).clamp(min=recipe.min_learning_rate)
                    bad_epochs[k] = 0
                if since_best >= recipe.patience:
                    active.remove(k)
                advance(1)
            if not active:
                break
    return PaperFit(
        coef=(best_weights[:, :, 1] - best_weights[:, :, 0]).numpy(),
        intercept=(best_bias[:, 0, 1] - best_bias[:, 0, 0]).numpy(),
        best_epoch=np.array(best_epoch),
        n_epochs=np.array(n_epochs),
    )


def _draw(rows: Tensor, weight: Tensor, batch_size: int, generator: torch.Generator) -> Tensor:
    """One epoch of a fold: (n_batches, b) of its rows, drawn with replacement by weight."""
    n_batches = -(-len(rows) // batch_size)
    picked = torch.multinomial(weight, n_batches * batch_size, replacement=True, generator=generator)
    return rows[picked].view(n_batches, batch_size)


def _gradients(x: Tensor, target: Tensor, weights: Tensor, bias: Tensor, folds: list[int]) -> list[Tensor]:
    """Of the mean cross-entropy: x (f, b, d), target (f, b) to gradients (f, d, 2) and (f, 1, 2)."""
    residual = torch.softmax(torch.baddbmm(bias[folds], x, weights[folds]), dim=-1)
    residual -= torch.nn.functional.one_hot(target, 2)
    residual /= x.shape[1]
    return [x.transpose(1, 2) @ residual, residual.sum(dim=1, keepdim=True)]


class _Adam:
    """Adam with an L2 penalty (torch.optim.Adam's weight_decay), one step count and learning rate per fold."""

    def __init__(self, parameters: list[Tensor], recipe: PaperRecipe) -> None:
        self.parameters, self.recipe = parameters, recipe
        self.mean = [torch.zeros_like(p) for p in parameters]
        self.square = [torch.zeros_like(p) for p in parameters]
        # float64: in float32, 1 - .999**t has lost half of its digits in the first steps.
        self.n_steps = torch.zeros(len(parameters[0]), 1, 1, dtype=torch.float64)

    def step(self, folds: list[int], gradients: list[Tensor], rate: Tensor) -> None:
        beta1, beta2, eps = 0.9, 0.999, 1e-8
        self.n_steps[folds] += 1
        t = self.n_steps[folds]
        for parameter, mean, square, gradient in zip(self.parameters, self.mean, self.square, gradients, strict=True):
            g = gradient + self.recipe.weight_decay * parameter[folds]
            m = mean[folds] * beta1 + g * (1 - beta1)
            v = square[folds] * beta2 + g.square() * (1 - beta2)
            mean[folds], square[folds] = m, v
            unbiased, unbiased_square = (1 - beta1**t).to(m), (1 - beta2**t).to(m)
            parameter[folds] -= rate[folds] / unbiased * m / ((v / unbiased_square).sqrt() + eps)
