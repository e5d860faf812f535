"""What does a recipe fix? Everything about training except the data, the backbone and the method.

`paper` is the text of Banerjee et al. 2025, section 4. `default` is ours, chosen by cross-validation on AMi-Br's
training split alone; docs/protocol.md has the comparison.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from finetune.augment import AugmentOptions
from probe.schedule import PAPER, plateau_rate


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a fold is trained.

    Attributes:
        view: input policy, where the user names none; None for the backbone's own (`finetune_view`).
        epochs: at most; an epoch draws as many patches as the fold trains on.
        batch_size: patches per fold and step.
        learning_rate: at the start (plateau) or at its peak (cosine).
        weight_decay: of Adam (added to the gradient) or AdamW.
        optimizer: "adam" or "adamw".
        schedule: "plateau" multiplies the rate by `plateau_factor` after more than `plateau_patience` epochs without a
            better validation balanced accuracy; "cosine" lets it fall to zero over all epochs.
        warmup: epochs, or a fraction of one, over which the cosine schedule rises to its peak.
        plateau_factor, plateau_patience, min_learning_rate: of the plateau schedule.
        patience: epochs without a better validation balanced accuracy after which a fold stops.
        statistics: normalise images by the model card's mean and std, or by ImageNet's.
        augment: how patches change from epoch to epoch; None for not at all.
    """

    view: str | None
    epochs: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    optimizer: Literal["adam", "adamw"]
    schedule: Literal["plateau", "cosine"]
    warmup: float = 0.0
    plateau_factor: float = PAPER.plateau_factor
    plateau_patience: int = PAPER.plateau_patience
    min_learning_rate: float = PAPER.min_learning_rate
    patience: int = PAPER.patience
    statistics: Literal["card", "imagenet"] = "card"
    augment: AugmentOptions | None = field(default_factory=AugmentOptions)


RECIPES = {
    # The text names the augmentations without their strengths: those of torchvision's usual examples are taken.
    "paper": Recipe(
        view="full",
        epochs=PAPER.max_epochs,
        batch_size=PAPER.batch_size,
        learning_rate=PAPER.learning_rate,
        weight_decay=PAPER.weight_decay,
        optimizer="adam",
        schedule="plateau",
        statistics="imagenet",
        augment=AugmentOptions(flip_vertical=0.0),
    ),
    "default": Recipe(
        view=None,
        epochs=8,
        batch_size=16,
        learning_rate=1e-3,
        weight_decay=0.01,
        optimizer="adamw",
        schedule="cosine",
        warmup=0.5,
        patience=8,
        augment=AugmentOptions(rotation=180.0),
    ),
}

# Learning rates of our own recipe, by method and whether the backbone is convolutional. 1e-3 for adapters of
# convolutions was chosen by cross-validation on the bundled network (3e-3 diverges). In the authors' runs on
# H-optimus, a transformer, 1e-3 cost .2 balanced accuracy against 5e-5, so transformers stay at the paper's 1e-4.
RATES = {
    ("lora", True): 1e-3,
    ("lora", False): 1e-4,
    ("head", True): 1e-3,
    ("head", False): 1e-3,
    ("full", True): 1e-4,
    ("full", False): 3e-5,
}


def recipe_for(name: str, *, method: str, convolutional: bool) -> Recipe:
    """Find a recipe of `RECIPES`; ours gets its learning rate from `RATES`.

    >>> recipe_for("default", method="full", convolutional=True).learning_rate
    0.0001
    """
    recipe = RECIPES[name]
    return replace(recipe, learning_rate=RATES[method, convolutional]) if name == "default" else recipe


def learning_rate(scores: Sequence[float], recipe: Recipe, *, batch: int, n_batches: int) -> float:
    """Compute the learning rate of one batch of a fold's next epoch.

    >>> learning_rate([0.7, 0.6, 0.6, 0.6, 0.6], RECIPES["paper"], batch=0, n_batches=100)
    5e-05

    Args:
        scores: the fold's validation balanced accuracy after each epoch so far.
        recipe: with the schedule.
        batch, n_batches: which batch of the epoch, from 0, of how many.
    """
    if recipe.schedule == "plateau":
        return plateau_rate(
            scores,
            start=recipe.learning_rate,
            factor=recipe.plateau_factor,
            patience=recipe.plateau_patience,
            minimum=recipe.min_learning_rate,
        )
    at = len(scores) + (batch + 0.5) / n_batches  # in epochs
    if at < recipe.warmup:
        return recipe.learning_rate * at / recipe.warmup
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (at - recipe.warmup) / (recipe.epochs - recipe.warmup)))
