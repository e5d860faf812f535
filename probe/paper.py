"""How is the paper's own probe trained? One linear layer per seed and fold on stored embeddings, kept for reproduction.

The protocol is that of Banerjee et al. 2025, sections 4 and 4.2: Adam (learning rate 1e-4, L2 penalty 1e-5),
cross-entropy on one logit per class, random sampling weighted by inverse class frequency, batches of 8, up to 100
epochs. The learning rate is halved after 3 epochs without a better validation balanced accuracy, down to 1e-7; training
stops after 15 such epochs; the weights of the best epoch are kept. Each layer has its own sampler, schedule and early
stopping. The authors' scripts do otherwise in rates and weight decay: `probe.schedule.AUTHORS`. `probe.logistic` is the
better probe.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from features.console import ProgressCallback, progress
from features.folds import fold_models
from probe.metrics import balanced_accuracy
from probe.records import FitRecord
from probe.schedule import PAPER, PaperRecipe, best_epoch, plateau_rate, should_stop


def fit_paper_probe(
    X: NDArray[np.floating],
    y: NDArray[np.integer],
    *,
    masks: NDArray[np.bool_],
    seeds: Sequence[int],
    recipe: PaperRecipe = PAPER,
    n_classes: int = 2,
    target: NDArray[np.floating] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float64], FitRecord]:
    """Train one linear layer per seed and fold on raw embeddings, which are not standardised.

    Args:
        X: (n, d) embeddings.
        y: (n,) labels, 0 ... c - 1, by which rows are sampled and layers judged.
        masks: (F, n) the training rows of each fold; the others validate it.
        seeds: (K,) of the initial weights and the samplers. Each layer has its own generator, so its result does not
            depend on the others.
        recipe: the hyperparameters.
        n_classes: c.
        target: (n, c) a distribution over the classes for every row, against which the cross-entropy is taken.

    Returns:
        coef (K * F, c - 1, d) and intercept (K * F, c - 1), seed by seed: logit = x @ coef + intercept is what the
        logit of class 1 ... c - 1 exceeds that of class 0 by; and for how long each layer trained.
    """
    features = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32))
    label = torch.from_numpy(np.asarray(y, dtype=np.int64))
    learned = label if target is None else torch.from_numpy(np.ascontiguousarray(target, dtype=np.float32))
    models = fold_models(seeds, len(masks))
    with progress("paper probe", recipe.max_epochs * len(models), "epochs") as advance, _one_thread():
        fitted = [
            _fit_layer(
                features,
                label,
                learned,
                n_classes=n_classes,
                mask=masks[fold],
                generator=torch.Generator().manual_seed(seed * 1000 + fold),
                recipe=recipe,
                advance=advance,
            )
            for seed, fold in models
        ]
    weights, biases, scores = zip(*fitted, strict=True)
    weight, bias = torch.stack(weights), torch.stack(biases)  # (K * F, c, d), (K * F, c)
    record = FitRecord(
        recipe=asdict(recipe), best_epoch=tuple(map(best_epoch, scores)), n_epochs=tuple(map(len, scores))
    )
    return (weight[:, 1:] - weight[:, :1]).numpy(), (bias[:, 1:] - bias[:, :1]).double().numpy(), record


@contextmanager
def _one_thread() -> Iterator[None]:
    """Compute on one thread: the products are tiny, and a second thread would only wait, long on a busy machine."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)


def _fit_layer(
    features: Tensor,
    label: Tensor,
    learned: Tensor,
    *,
    n_classes: int,
    mask: NDArray[np.bool_],
    generator: torch.Generator,
    recipe: PaperRecipe,
    advance: ProgressCallback,
) -> tuple[Tensor, Tensor, list[float]]:
    """Train one layer on what is to be learned: labels (n,), or distributions (n, c).

    Returns:
        The weight (c, d) and bias (c,) of its best epoch, and all epochs' scores.
    """
    d = features.shape[1]
    bound = d**-0.5  # torch.nn.Linear's initialisation
    initial = torch.rand(d + 1, n_classes, generator=generator) * 2 * bound - bound
    layer = torch.nn.Linear(d, n_classes)
    layer.weight.data, layer.bias.data = initial[:d].T.contiguous(), initial[d].clone()
    optimizer = torch.optim.Adam(layer.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    rows = torch.from_numpy(np.flatnonzero(mask))
    held_out = torch.from_numpy(~mask)
    scores: list[float] = []
    best = layer.weight.detach().clone(), layer.bias.detach().clone()
    while not should_stop(scores, patience=recipe.patience, max_epochs=recipe.max_epochs):
        optimizer.param_groups[0]["lr"] = plateau_rate(
            scores,
            start=recipe.learning_rate,
            factor=recipe.plateau_factor,
            patience=recipe.plateau_patience,
            minimum=recipe.min_learning_rate,
            threshold=recipe.plateau_threshold,
        )
        for batch in draw_batches(rows, label[rows], batch_size=recipe.batch_size, generator=generator):
            optimizer.zero_grad()
            torch.autograd.backward(F.cross_entropy(layer(features[batch]), learned[batch]))
            optimizer.step()
        with torch.no_grad():
            logits = layer(features[held_out])
        scores.append(balanced_accuracy(label[held_out].numpy(), logits.numpy().argmax(axis=1)))
        if best_epoch(scores) == len(scores) - 1:
            best = layer.weight.detach().clone(), layer.bias.detach().clone()
        advance(1)
    return *best, scores


def draw_batches(rows: Tensor, label: Tensor, *, batch_size: int, generator: torch.Generator) -> Tensor:
    """Draw one epoch of (n,) rows with replacement, each weighted inversely to the frequency of its class.

    As many rows are drawn as there are, rounded up to whole batches: (n_batches, batch_size) row numbers.
    """
    weight = (1.0 / torch.bincount(label))[label]
    n_batches = -(-len(rows) // batch_size)
    drawn = torch.multinomial(weight, n_batches * batch_size, replacement=True, generator=generator)
    return rows[drawn].view(n_batches, batch_size)
